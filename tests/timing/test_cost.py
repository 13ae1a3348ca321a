"""The cost model against independent counts: torch's FLOP counter, tensors that exist, the geometry's own formulas."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gqa_exp.model import T5, T5Config
from gqa_exp.model.inference import InferenceT5
from gqa_exp.timing.cost import DEVICES, Device, Work, bound, largest_batch

DEVICE = Device("test", 1e9, {"bfloat16": 1e12, "float32": 5e11}, 1e9, "made up")
HEADS = st.sampled_from([1, 2, 4])


def linear_flops(x_shape, weight_shape, *_, **__) -> int:
    """torch counts its own linear, but not oneDNN's: two FLOPs per weight and row."""
    return 2 * math.prod(x_shape) * weight_shape[0]


ONEDNN = {torch.ops.mkldnn._linear_pointwise: linear_flops}


def geometry(kv_heads: object = None) -> T5Config:
    return T5Config(
        vocab_size=60, d_model=20, d_ff=28, num_heads=4, head_dim=6, num_encoder_layers=2, num_decoder_layers=3,
        num_kv_heads=kv_heads,
    )  # fmt: skip


XXL = T5Config(
    vocab_size=32128, d_model=4096, d_ff=10240, num_heads=64, head_dim=64, num_encoder_layers=24, num_decoder_layers=24
)


@given(st.lists(HEADS, min_size=3, max_size=3), st.integers(1, 4), st.integers(1, 30), st.integers(1, 20))
def test_a_decode_step_moves_the_bytes_that_the_geometry_counts(kv_heads, batch, source, fill) -> None:
    work = Work(geometry(kv_heads), batch, source, 20)
    counted = sum(operation.bytes for operation in work.decode_step(fill))
    assert counted == pytest.approx(work.geometry.decode_step_bytes(batch, source, fill, 2))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_flops_are_those_that_torch_counts(kv_heads: int) -> None:
    model = T5(geometry(kv_heads)).eval()
    work = Work(model.config, batch_size=3, source_length=10, output_length=8, dtype="float32")
    ids = torch.randint(3, 60, (3, 10))

    def counted(run) -> float:
        # torch counts the products of SDPA's plain form, but not inside its fused kernel for CPU.
        with (
            FlopCounterMode(display=False, custom_mapping=ONEDNN) as counter,
            torch.inference_mode(),
            sdpa_kernel(SDPBackend.MATH),
        ):
            run()
        return counter.get_total_flops()

    prepared = InferenceT5(model)
    encoded = prepared.encode(ids)
    state = prepared.start(encoded, None, 8)

    def flops(operations) -> float:
        return sum(operation.flops for operation in operations)

    assert counted(lambda: prepared.encode(ids)) == flops(work.encode())
    assert counted(lambda: prepared.start(encoded, None, 8)) == flops(work.cross_cache())
    for fill in (1, 2, 3):
        step = counted(lambda: prepared.step(ids[:, 0], state))
        assert step == flops(work.decode_step(fill))
    recomputed = dataclasses.replace(work, cross_kv="recomputed")
    again = flops(recomputed.decode_step(3)) - flops(work.decode_step(3))
    assert again == flops(work.cross_cache())


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_memory_is_that_of_the_tensors(kv_heads: int) -> None:
    model = T5(geometry(kv_heads)).eval()
    work = Work(model.config, batch_size=3, source_length=10, output_length=8, dtype="float32")
    assert work.weight_bytes() == sum(parameter.nbytes for parameter in model.parameters())
    with torch.inference_mode():
        prepared = InferenceT5(model)
        state = prepared.start(prepared.encode(torch.randint(3, 60, (3, 10))), None, 8)
    assert 3 * work.cache_bytes_per_sample() == state.self_cache_bytes() + state.cross_cache_bytes()


def test_the_encoder_moves_every_weight_of_its_own_once() -> None:
    model = T5(geometry())
    work = Work(model.config, batch_size=1, source_length=1, output_length=1, dtype="float32")
    weights = sum(p.nbytes for name, p in model.encoder.named_parameters() if "relative_bias" not in name)
    assert sum(operation.bytes for operation in work.encode()) == weights + 20 * 4  # and one row of the embedding


def test_the_bound_is_the_sum_over_operations_of_the_slower_side() -> None:
    work = Work(geometry(2), batch_size=3, source_length=10, output_length=5)
    found = bound(work, DEVICE)
    by_hand = 0.0
    for fill in range(1, 6):
        for operation in work.decode_step(fill):
            by_hand += max(operation.bytes / 1e9, operation.flops / 1e12)
    assert found.decode == pytest.approx(by_hand)
    # No less than either side of the whole alone, no more than both together.
    step_memory, step_compute = found.step_bytes / 1e9, found.step_flops / 1e12
    rounding = 1e-9 * found.step
    assert max(step_memory, step_compute) - rounding <= found.step <= step_memory + step_compute + rounding
    assert found.total == found.encode + found.cross_cache + found.decode


@given(st.integers(1, 64), st.integers(1, 4096))
def test_fewer_heads_never_cost_more_and_recomputing_never_less(batch, source) -> None:
    times = [bound(Work(geometry(h), batch, source, 4), DEVICE) for h in (4, 2, 1)]
    assert times[0].step > times[1].step > times[2].step
    recomputed = bound(Work(geometry(1), batch, source, 4, cross_kv="recomputed"), DEVICE)
    assert recomputed.cross_cache == 0.0
    assert recomputed.total >= times[2].total


def test_kv_heads_are_copied_where_there_are_more_devices() -> None:
    eight = dataclasses.replace(DEVICE, count=8, memory=1e12)
    caches = {}
    for heads in (1, 8, 64):
        work = Work(dataclasses.replace(XXL, num_kv_heads=heads), 8, 2048, 512, devices=8)
        caches[heads] = work.cache_bytes_per_sample()
        assert bound(work, eight).step > 0
    assert caches[1] == caches[8] == caches[64] / 8
    alone = Work(dataclasses.replace(XXL, num_kv_heads=64), 8, 2048, 512)
    assert alone.cache_bytes_per_sample() == alone.geometry.kv_cache_bytes(2048, 512, 2) == 8 * caches[64]
    shared = dataclasses.replace(alone, devices=8)
    assert shared.weight_bytes() == pytest.approx(alone.weight_bytes() / 8)  # nothing is copied: 64 heads on 8


def test_largest_batch_fits_and_one_more_does_not() -> None:
    work = Work(dataclasses.replace(XXL, num_kv_heads=8), 1, 2048, 512)
    device = DEVICES["H100"]
    most = largest_batch(work, device)

    def needed(batch: int) -> float:
        return work.weight_bytes() + batch * (work.cache_bytes_per_sample() + 2048 * 4096 * 2)

    assert most > 0
    assert needed(most) <= device.memory < needed(most + 1)
    assert largest_batch(work, DEVICE) == 0  # the weights alone are more


def test_what_a_device_does_not_state_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="TPUv4 states no peak for float32; it has bfloat16"):
        bound(Work(geometry(), 1, 8, 2, dtype="float32"), DEVICES["TPUv4"])
    with pytest.raises(ValueError, match="work for 1 devices, but TPUv4 counts 8"):
        bound(Work(geometry(), 1, 8, 2), dataclasses.replace(DEVICES["TPUv4"], count=8))
