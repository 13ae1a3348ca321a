"""What is different on a GPU: its attention, decode steps in each number format, timing, and training beside a CPU's.

More of recorded steps is in test_graphs.py.
"""

import copy
import math

import pytest
import torch

from gqa_exp.config import TimingConfig
from gqa_exp.model import attention
from gqa_exp.model.inference import InferenceT5
from gqa_exp.model.t5 import additive_mask
from gqa_exp.timing.timer import time_variants
from gqa_exp.training.loss import token_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SIZES = {"d_model": 64, "d_ff": 96, "num_heads": 4, "head_dim": 16, "vocab_size": 128}


def steps_of(model, input_ids, mask, tokens_BT):
    """Logits (B, T, V) of decode steps that are fed the given tokens."""
    with torch.inference_mode():
        state = model.start(model.encode(input_ids, mask), mask, tokens_BT.shape[1])
        return torch.stack([model.step(token_B, state).clone() for token_B in tokens_BT.T], dim=1)


# Undivided, divided, with a rest; one query head per KV head and many; one key; more pairs than any GPU has blocks for.
SHAPES = [
    (2, 4, 1, 50, 64), (2, 1, 64, 2048, 64), (3, 2, 20, 1030, 32), (1, 1, 128, 300, 64), (2, 2, 3, 1, 16),
    (64, 32, 2, 1100, 64), (1, 2, 64, 300, 128), (64, 32, 1, 1100, 128),
]  # fmt: skip


@pytest.mark.parametrize(("B", "G", "R", "S", "K"), SHAPES)
@pytest.mark.parametrize("bias", ["none", "by head", "by sample"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 3e-3)])
def test_a_steps_attention_is_its_formula(B, G, R, S, K, bias, dtype, tolerance):
    from gqa_exp.model import gpu_attention

    assert gpu_attention.serves(dtype, K, R) == (dtype != torch.float32 or (K < 128 and R <= 64))
    torch.manual_seed(0)
    k, v = torch.randn(2, B, G, S + 5, K, device="cuda").to(dtype)
    k[:, :, S:] = v[:, :, S:] = torch.nan  # what lies behind must not be read
    k, v = k[:, :, :S], v[:, :, :S]
    q_and_more = torch.randn(B, G * R * K + 24, device="cuda") * 2 / K**0.5  # scores of some 2, as a trained model's
    q = q_and_more.to(dtype)[:, : G * R * K].reshape(B, G, R, K)
    there = (torch.rand(B, S, device="cuda") < 0.7).long()
    there[:, 0] = 1
    added = {
        "none": None,
        "by head": torch.randn(G * R, 2 * S + 3, device="cuda").to(dtype)[:, 3 : 3 + S].view(G, R, S),
        "by sample": additive_mask(there, dtype),
    }[bias]
    scores = q.double() @ k.double().transpose(-1, -2)
    expected = (scores + (0 if added is None else added.double())).softmax(-1) @ v.double()
    found = attention._gpu_attention(q, k, v, added)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("compile_step", [True, False])
@pytest.mark.parametrize("cross_kv", ["cached", "recomputed"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "head_dim"),
    [(torch.float32, 1e-4, 16), (torch.bfloat16, 0.1, 16), (torch.float16, 0.05, 16), (torch.bfloat16, 0.1, 24)],
)  # 24: SDPA's, where the kernel does not serve
def test_steps_equal_a_full_forward_pass(
    tiny_model, padded_batch, monkeypatch, dtype, tolerance, head_dim, padded, cross_kv, compile_step
):
    monkeypatch.setattr("gqa_exp.model.inference.GPU_STRETCH", 8)  # 20 steps in three graphs
    model = tiny_model(
        num_kv_heads=[4, 1, 2], relative_buckets=8, relative_max_distance=20, **{**SIZES, "head_dim": head_dim}
    )
    prepared = InferenceT5(copy.deepcopy(model).to("cuda", dtype), cross_kv, compile_step=compile_step)
    assert prepared.compiled == compile_step
    # The first two batches share graphs; the third has another shape, and the fourth is the second again.
    for seed, lengths in enumerate(([9, 4], [9, 7], [11, 3, 5], [9, 7])):
        input_ids, mask = padded_batch(lengths if padded else [max(lengths)] * len(lengths), 128, seed)
        mask = mask if padded else None
        tokens_BT = torch.randint(3, 128, (len(lengths), 20))
        with torch.no_grad():
            expected = model(input_ids, tokens_BT, mask)
        on_gpu = None if mask is None else mask.cuda()
        found = steps_of(prepared, input_ids.cuda(), on_gpu, tokens_BT.cuda())
        torch.testing.assert_close(found.float().cpu(), expected, rtol=tolerance, atol=tolerance)


def test_variants_are_timed_whole_and_in_parts(tiny_model):
    variants = {name: tiny_model(num_kv_heads=heads, **SIZES) for name, heads in (("MHA", 4), ("MQA", 1))}
    lengths = {"batch_size": 4, "source_length": 40, "output_length": 48, "device": "cuda", "dtype": "bfloat16"}
    few = {"min_rounds": 2, "min_seconds": 0.0, "warmup_rounds": 1}
    for shortcuts in ({}, {"depths": [1, 2], "fills": [1, 24, 48], "encoder_batch_size": 2}):
        config = TimingConfig(**lengths, **few, **shortcuts)
        report = time_variants(variants, config, reference="MHA")
        for name in variants:
            row = report.fields(name)
            assert row["compiled"]
            assert row["hardware"] == torch.cuda.get_device_name(0)
            assert row["decode_step"] > row["predicted_decode_step"] > 0
            assert row["per_sample"] > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_training_on_a_gpu_follows_training_on_a_cpu(tiny_model, padded_batch, compiled):
    on_cpu = tiny_model(num_kv_heads=2, **SIZES)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    if compiled:
        on_gpu.compile_layers()
    input_ids, mask = padded_batch([21, 9, 14], 128)
    labels = torch.randint(3, 128, (3, 13))
    losses = []
    for model in (on_cpu, on_gpu):
        model.train()
        device = model.device
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        found = []
        for _ in range(5):
            optimizer.zero_grad()
            target = labels.to(device)
            logits = model(input_ids.to(device), model.shift_right(target), mask.to(device))
            loss = token_loss(logits, target, 1e-4, 0)[0]
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1][-1] < losses[1][0] - 0.01
    assert all(map(math.isfinite, losses[1]))
