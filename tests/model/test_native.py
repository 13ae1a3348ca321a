import copy
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gqa_exp.model import native
from gqa_exp.model.decode_step import DecodeStep
from gqa_exp.model.inference import InferenceT5
from gqa_exp.model.t5 import RMSNorm


@pytest.fixture(params=["float32", "float32 without AVX-512", "bfloat16", "bfloat16 in tiles"])
def dtype(request):
    """Number format and instructions of the products; skipped on hosts that cannot have them."""
    if "without" in request.param:
        request.getfixturevalue("without_avx512")
    dtype, tiles = getattr(torch, request.param.split()[0]), "tiles" in request.param
    if not native.serves_attention(dtype, 32) or native.use_tiles(tiles) != tiles:
        pytest.skip("no such instructions, or no compiler")
    yield dtype
    native.use_tiles(True)


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    inputs=st.integers(1, 10),
    outputs=st.integers(1, 5),
    norm=st.booleans(),
    gated=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_linear_is_its_formula(dtype, shape, inputs, outputs, norm, gated, residual, seed):
    torch.manual_seed(seed)
    inputs, outputs = (16 if dtype == torch.float32 else 32) * inputs, 32 * outputs
    x = torch.randn(*shape, inputs).to(dtype)
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    scale = RMSNorm(inputs, 1e-6).to(dtype)
    torch.nn.init.uniform_(scale.weight, 0.5, 2)
    added = torch.randn(*shape, outputs // 2 if gated else outputs).to(dtype) if residual else None

    rows = (scale(x) if norm else x).detach().double()
    expected = rows @ weight.double().T
    # Normalised inputs are rounded up to three times, differently in the formula and in the kernel.
    rounding, inner = (1e-6, 1e-5) if dtype == torch.float32 else (2.0**-8, 3 * 2.0**-8 if norm else 1e-6)
    error = inner * (rows.abs() @ weight.double().abs().T)
    if gated:
        (gate, up), (of_gate, of_up) = expected.chunk(2, dim=-1), error.chunk(2, dim=-1)
        expected = F.gelu(gate, approximate="tanh") * up
        error = 1.13 * of_gate * (up.abs() + of_up) + gate.abs() * of_up  # the slope of gelu is 1.13 at most
    if residual:
        expected = expected + added.double()
    found = native.linear(x, native.pack(weight, gated), outputs, scale.weight if norm else None, 1e-6, gated, added)
    assert found.dtype == dtype
    assert ((found.detach().double() - expected).abs() <= error + rounding * expected.abs() + 1e-5).all()


@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("inputs", [64, 320])
@pytest.mark.parametrize("rows", [1, 16, 17, 31, 32, 33, 64, 65, 100])
def test_rows_and_threads(rows, inputs, threads, dtype):
    """Whole numbers small enough that every sum is exact, whatever its order; three blocks of outputs."""
    torch.set_num_threads(threads)
    x = torch.randint(-3, 4, (rows, inputs)).to(dtype)
    weight = torch.zeros(96, inputs, dtype=dtype)
    weight[:, torch.randperm(inputs)[:64]] = torch.randint(-1, 2, (96, 64)).to(dtype)
    assert torch.equal(native.linear(x, native.pack(weight), 96).double(), x.double() @ weight.double().T)


def test_gates_of_any_size(dtype):
    """e^(-2 z) of the tanh in gelu is infinite from a gate of -10.1 on."""
    gates = torch.tensor([-1e4, -100.0, -30.0, -12.0, -10.25, -9.0, -1.0, 0.0, 1.0, 12.0, 100.0, 1e4]).to(dtype)
    x, weight = torch.zeros(len(gates), 32, dtype=dtype), torch.zeros(64, 32, dtype=dtype)
    x[:, 0], x[:, 1] = gates, 1
    weight[:32, 0], weight[32:, 1] = 1, 1
    found = native.linear(x, native.pack(weight, gated=True), 64, gated=True)
    expected = F.gelu(gates.double(), approximate="tanh")[:, None].expand(-1, 32)
    torch.testing.assert_close(found.double(), expected, rtol=4e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_columns_of_a_larger_matrix_and_no_rows_at_all():
    if native.library() is None:
        pytest.skip("no such instructions, or no compiler")
    wide, weight = torch.randn(3, 128), torch.randn(32, 64)
    found = native.linear(wide[:, 32:96], native.pack(weight), 32)
    torch.testing.assert_close(found, F.linear(wide[:, 32:96], weight), rtol=1e-5, atol=1e-4)
    assert native.linear(wide[:0, :64], native.pack(weight), 32).shape == (0, 32)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(32, 24),  # inputs that fill no vector
        torch.zeros(48, 32),  # outputs that fill no block
        torch.zeros(32, 16, dtype=torch.bfloat16),  # inputs that fill no tile
        torch.zeros(32, 32, dtype=torch.float16),
    ],
)
def test_other_weights_have_no_kernel(weight):
    assert native.pack(weight) is None


def test_the_kernel_leaves_small_numbers_alone():
    """A library linked with fast mathematics makes the whole process flush subnormal numbers to zero."""
    native.library()
    smallest = torch.tensor([1e-40]).clone()
    assert (smallest * 0.5 > 0).all()
    assert np.float32(1e-40) * np.float32(0.5) > 0


@pytest.mark.skipif(not native._sources() or not shutil.which("g++"), reason="neither")
def test_where_there_can_be_kernels_there_are():
    """Else all tests of theirs would be skipped."""
    assert native.library() is not None


def test_without_avx512_there_is_no_kernel_for_bfloat16(request):
    if native.has_bfloat16():
        request.getfixturevalue("without_avx512")
    if not native.is_built():
        pytest.skip("no such instructions, or no compiler")
    assert not native.has_bfloat16()
    assert not native.use_tiles(True)
    assert native.pack(torch.zeros(32, 32)) is not None
    assert native.pack(torch.zeros(32, 32, dtype=torch.bfloat16)) is None
    assert native.serves_attention(torch.float32, 64)
    assert not native.serves_attention(torch.bfloat16, 64)


def test_without_a_compiler_or_such_a_cpu_there_is_no_kernel(monkeypatch, tmp_path, caplog):
    fresh = native.library.__wrapped__
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_cpu", lambda: "some model avx2")  # but without fma
    assert fresh() is None
    monkeypatch.setattr(native, "_cpu", lambda: "avx512f avx512_bf16")
    monkeypatch.setenv("CXX", "false")
    assert fresh() is None
    assert "torch's operations serve" in caplog.text
    assert not list(tmp_path.rglob("*.so"))


def test_several_number_formats_are_refused(dtype):
    """Their bits would be taken for those of the first."""
    other = torch.float64
    q, k = torch.randn(2, 1, 3, 32).to(dtype), torch.randn(2, 1, 5, 32).to(dtype)
    assert native.attend(q, k, k, None).dtype == dtype
    for wrong in (
        (q, k.to(other), k, None),
        (q, k, k.to(other), None),
        (q, k, k, torch.zeros(1, 1, 1, 5, dtype=other)),
    ):
        with pytest.raises(TypeError, match="number formats differ"):
            native.attend(*wrong)
    packed = native.pack(torch.randn(32, 32).to(dtype))
    with pytest.raises(TypeError, match="number formats differ"):
        native.linear(torch.randn(2, 32, dtype=other), packed, 32)
    with pytest.raises(TypeError, match="number formats differ"):
        native.linear(torch.randn(2, 32).to(dtype), packed, 32, residual=torch.zeros(2, 32, dtype=other))


SIZES = {"d_model": 64, "d_ff": 96, "num_heads": 4, "head_dim": 32, "vocab_size": 128}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("cross_kv", ["cached", "recomputed"])
@pytest.mark.parametrize("lengths", [[19, 4, 7, 12], [19], [2, 3, 9] * 3, [5] * 70])
@torch.inference_mode()
def test_a_step_in_one_call_equals_its_kernels_called_one_by_one(
    tiny_model, padded_batch, dtype, lengths, cross_kv, threads
):
    torch.set_num_threads(threads)
    model = InferenceT5(tiny_model(num_kv_heads=[4, 1, 2], **SIZES).to(dtype), cross_kv)
    input_ids, mask = padded_batch(lengths, 128)
    mask = None if mask.all() else mask
    states = [model.start(model.encode(input_ids, mask), mask, 16) for _ in range(2)]
    assert states[0].native_step is not None
    states[1].native_step = None

    def steps(token_TB):
        for token_B in token_TB:
            at_once, one_by_one = (model.step(token_B, state) for state in states)
            assert at_once.dtype == dtype
            assert torch.equal(at_once, one_by_one)

    steps(torch.randint(3, 128, (8, len(lengths))))
    going = torch.arange(len(lengths)).flip(0)[: (len(lengths) + 1) // 2]
    for state in states:
        state.keep(going)
    steps(torch.randint(3, 128, (8, len(going))))
    for caches in zip(states[0].self_caches, states[1].self_caches, strict=True):
        assert torch.equal(caches[0].keys, caches[1].keys)
        assert torch.equal(caches[0].v_BGSK, caches[1].v_BGSK)


@torch.inference_mode()
def test_one_mask_for_all_sequences(tiny_model, padded_batch, dtype):
    model = InferenceT5(tiny_model(**SIZES).to(dtype))
    input_ids, mask = padded_batch([9, 9, 4], 128)
    states = [model.start(model.encode(input_ids), each, 5) for each in (mask[2:], mask[2:].expand(3, 9))]
    assert states[0].native_step is not None
    assert torch.equal(*(model.step(input_ids[:, 0], state) for state in states))
    for state in states:
        state.keep(torch.tensor([2, 1]))
    assert torch.equal(*(model.step(input_ids[:2, 0], state) for state in states))


WITHOUT_A_KERNEL = [{"feed_forward": "gated-silu"}, {"vocab_size": 60}, {"head_dim": 24}, {"d_model": 56}]


@pytest.mark.parametrize("other", WITHOUT_A_KERNEL)
@torch.inference_mode()
def test_a_step_that_has_a_part_without_a_kernel_is_not_one_call(tiny_model, other):
    for changes in ({}, other):
        model = InferenceT5(tiny_model(**{**SIZES, **changes}))
        state = model.start(torch.zeros(2, 3, model.config.d_model), None, 5)
        assert (state.native_step is not None) == (native.is_built() and not changes)


@torch.inference_mode()
def test_a_model_cut_short_is_one_call_of_its_layers(tiny_model, dtype):
    model = InferenceT5(tiny_model(num_kv_heads=[4, 1, 2], **SIZES).to(dtype))
    encoded, token_B = torch.randn(2, 3, 64).to(dtype), torch.tensor([5, 6])
    for layers in (0, 1, 2):
        short = model.shallow(layers)
        states = [short.start(encoded, None, 5) for _ in range(2)]
        assert (states[0].native_step is not None) == (layers > 0)
        states[1].native_step = None
        assert torch.equal(*(short.step(token_B, state) for state in states))


@torch.inference_mode()
def test_a_step_of_other_shapes_is_refused(tiny_model, dtype):
    """The kernels would read and write what lies behind."""
    model = InferenceT5(tiny_model(**SIZES).to(dtype))
    state = model.start(torch.zeros(3, 4, 64, dtype=dtype), None, 5)
    parts_alone = InferenceT5(tiny_model(feed_forward="gated-silu", **SIZES).to(dtype))
    state_of_parts = parts_alone.start(torch.zeros(3, 4, 64, dtype=dtype), None, 5)
    for token_B in (torch.tensor([3]), torch.tensor([3, 4]), torch.tensor([3, 4, 5, 6]), torch.tensor([[3], [4], [5]])):
        for prepared, its_state in ((model, state), (parts_alone, state_of_parts)):
            with pytest.raises(ValueError, match="for 3 sequences"):
                prepared.step(token_B, its_state)
    assert state.length == state_of_parts.length == 0
    x_BD, step = torch.zeros(3, 64, dtype=dtype), state.native_step
    assert step(x_BD, 1, state.bias(1, 2)) is step(x_BD, 2, state.bias(2, 3)), "logits stay where they are"
    wrong = [
        (x_BD, 0, state.bias(1, 2)),
        (x_BD, -1, state.bias(1, 0)),
        (x_BD, 5, torch.zeros(4, 6, dtype=dtype)),
        (x_BD, 1, torch.zeros(2, 4, dtype=dtype).T),
        (torch.zeros(64, 3, dtype=dtype).T, 1, state.bias(1, 2)),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="must be"):
            step(*arguments)
    for caches in (state.self_caches, state.cross_caches):
        other = copy.copy(caches[1])
        other.v_BGSK = other.v_BGSK[:, :, :-1].contiguous()
        with pytest.raises(ValueError, match="a cache is"):
            DecodeStep(*step.parts, *([caches[0], other, caches[2]] for _ in range(2)), None)
    nobody = model.start(torch.zeros(0, 4, 64, dtype=dtype), None, 5)
    assert model.step(torch.zeros(0, dtype=torch.long), nobody).shape == (0, 128)


def test_a_step_of_several_number_formats_is_refused(tiny_model, dtype):
    model = InferenceT5(tiny_model(**SIZES).to(dtype))
    with torch.inference_mode():
        state = model.start(torch.zeros(2, 3, 64, dtype=dtype), None, 5)
    step, own, cross = state.native_step, state.self_caches, state.cross_caches
    with pytest.raises(TypeError, match="number formats differ"):
        step(torch.zeros(2, 64, dtype=torch.float64), 0, state.bias(0, 1))
    with pytest.raises(TypeError, match="number formats differ"):
        step(torch.zeros(2, 64, dtype=dtype), 0, state.bias(0, 1).double())
    with pytest.raises(TypeError, match="number formats differ"):
        DecodeStep(*step.parts, own, cross, torch.zeros(2, 1, 1, 3, dtype=torch.float64))
    cross[1].v_BGSK = cross[1].v_BGSK.double()
    with pytest.raises(TypeError, match="number formats differ"):
        DecodeStep(*step.parts, own, cross, None)
    cross[1].v_BGSK = cross[1].v_BGSK.to(dtype)
    model.layers[1].wi.norm.double()
    with pytest.raises(TypeError, match="number formats differ"):
        DecodeStep(*step.parts, own, cross, None)


def test_has_tiles_is_what_the_processor_says(monkeypatch):
    for flags, expected in (("model avx512f amx_bf16 amx_tile", True), ("model avx512f avx512_bf16", False)):
        monkeypatch.setattr(native, "_cpu", lambda flags=flags: flags)
        assert native.has_tiles() is expected


def test_multiplies_in_tiles_is_what_was_granted():
    for wanted in (False, True):
        granted = native.use_tiles(wanted)
        assert native.multiplies_in_tiles() is granted
