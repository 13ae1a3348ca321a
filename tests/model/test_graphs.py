"""Decode steps that are recorded and replayed: as CUDA graphs on a GPU, and on a CPU by a tape that acts as they do."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gqa_exp.model import T5, generate
from gqa_exp.model.generate import LOOK_EVERY
from gqa_exp.model.graphs import RecordedSteps
from gqa_exp.model.inference import InferenceT5

SIZES = {"d_model": 64, "d_ff": 96, "num_heads": 4, "head_dim": 16, "vocab_size": 128}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


class Tape(TorchDispatchMode):
    """Operations and the memory they were recorded with; replayed, they read and write that memory and no other.

    So, as with a CUDA graph, tensors made anew for a later step are not seen, and Python does not run again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation is not torch.ops.aten._local_scalar_dense.default, "a graph cannot wait for a number"
        result = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for operation, args, kwargs, result in self.calls:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():  # no view, nor in place
                    old.copy_(new)


@pytest.fixture
def prepare(monkeypatch):
    """(model, device) to the model prepared on it with recorded steps."""

    def record(steps, step):
        with Tape() as tape:
            logits_BV = step(steps.token_B, steps.position)
        assert tape.calls
        return tape, logits_BV

    def make(model: T5, device: str, cross_kv: str = "cached") -> InferenceT5:
        if device == "cuda":
            return InferenceT5(model.cuda(), cross_kv, compile_step=True)
        monkeypatch.setattr("gqa_exp.model.native.library", lambda: None)  # the tape sees torch's operations alone
        monkeypatch.setitem(LOOK_EVERY, "cpu", LOOK_EVERY["cuda"])
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(RecordedSteps, "_record", record)
        prepared = InferenceT5(model, cross_kv)
        prepared.on_gpu = prepared.compiled = True
        return prepared

    return make


@pytest.mark.parametrize("cross_kv", ["cached", "recomputed"])
@pytest.mark.parametrize("padded", [True, False])
def test_steps_equal_a_full_forward_pass(tiny_model, padded_batch, prepare, monkeypatch, padded, cross_kv):
    """On a GPU: test_cuda.py, in each number format."""
    monkeypatch.setattr("gqa_exp.model.inference.GPU_STRETCH", 8)  # 20 steps in three graphs
    model = tiny_model(num_kv_heads=[4, 1, 2], relative_buckets=8, relative_max_distance=20, **SIZES)
    prepared = prepare(copy.deepcopy(model), "cpu", cross_kv)
    sources = []
    # The first two batches share graphs; the third has another shape, and the fourth is the second again.
    for seed, lengths in enumerate(([9, 4], [9, 7], [11, 3, 5], [9, 7])):
        input_ids, mask = padded_batch(lengths if padded else [max(lengths)] * len(lengths), 128, seed)
        mask = mask if padded else None
        tokens_BT = torch.randint(3, 128, (len(lengths), 20))
        with torch.inference_mode():
            expected = model(input_ids, tokens_BT, mask)
            encoded = prepared.encode(input_ids, mask)
            sources.append((encoded, encoded.clone()))
            state = prepared.start(encoded, mask, 20)
            found = torch.stack([prepared.step(token_B, state).clone() for token_B in tokens_BT.T], dim=1)
        assert state.recorded is not None
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(*source) for source in sources), "a later batch must not write to what was given"


@pytest.mark.parametrize("device", DEVICES)
def test_a_state_is_kept_for_its_shape_and_no_longer(tiny_model, padded_batch, prepare, monkeypatch, device):
    monkeypatch.setattr("gqa_exp.model.inference.KEPT", 1)
    model = prepare(tiny_model(num_kv_heads=2, **SIZES), device)

    def started(lengths, tokens=40):
        input_ids, mask = (each.to(device) for each in padded_batch(lengths, 128))
        state = model.start(model.encode(input_ids, mask), mask, tokens)
        for _ in range(tokens):
            model.step(input_ids[:, 0], state)
        return state

    with torch.inference_mode():
        first = started([9, 4])
        assert sorted(first.recorded.graphs) == [32, 40]
        first.length = 0
        with pytest.raises(ValueError, match="for 2 sequences"):
            model.step(torch.tensor([3], device=device), first)
        graphs = dict(first.recorded.graphs)
        assert started([9, 7]) is first
        assert first.recorded.graphs == graphs
        assert first.length == 40
        assert started([9, 7, 2]) is not first
        assert started([9, 4]) is not first
        assert len(model._kept) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_after_one_that_overflowed_is_sound(tiny_model, padded_batch, prepare, device):
    model = prepare(tiny_model(num_kv_heads=2, **SIZES), device)
    input_ids, mask = (each.to(device) for each in padded_batch([9, 4], 128))
    expected = generate(model, input_ids, mask, max_new_tokens=20, stop_at_eos=False)
    with torch.inference_mode():
        state = model.start(model.encode(input_ids, mask), mask, 20)
        for cache in state.self_caches:
            cache.keys.fill_(torch.nan)
            cache.v_BGSK.fill_(torch.nan)
    assert torch.equal(generate(model, input_ids, mask, max_new_tokens=20, stop_at_eos=False), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padded", [True, False])
def test_recorded_and_eager_steps_choose_the_tokens_that_a_cpu_does(tiny_model, padded_batch, prepare, device, padded):
    model = tiny_model(num_kv_heads=2, **{**SIZES, "vocab_size": 8})  # end-of-sequence is one of few words
    input_ids, mask = padded_batch([30, 12, 5] if padded else [30, 30, 30], 8)
    mask = mask if padded else None
    expected = [generate(model, input_ids, mask, max_new_tokens=70, stop_at_eos=stop) for stop in (True, False)]
    assert (expected[0] == model.config.eos_id).any()
    there = input_ids.to(device), None if mask is None else mask.to(device)
    for prepared in (prepare(model, device), InferenceT5(model)):
        for stop, tokens in zip((True, False, True), (*expected, expected[0]), strict=True):
            assert torch.equal(generate(prepared, *there, max_new_tokens=70, stop_at_eos=stop).cpu(), tokens)
