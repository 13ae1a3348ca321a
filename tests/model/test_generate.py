import itertools
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_exp.host import supports_dtype
from gqa_exp.model import generate, native
from gqa_exp.model.checkpoint import load, save_hf
from gqa_exp.model.generate import likeliest
from gqa_exp.model.inference import InferenceT5
from gqa_exp.model.packed import PackedLinear
from gqa_exp.pipeline.stages import SHIPPED


@pytest.mark.parametrize("kv_heads", [1, 2, 4, [4, 1, 2]])
@pytest.mark.parametrize("lengths", [[9, 4, 1], [5, 5]])
def test_every_cached_step_equals_a_full_forward_pass(tiny_model, padded_batch, kv_heads, lengths):
    # Few distances per bucket, so that 40 steps pass through all of them.
    model = tiny_model(num_kv_heads=kv_heads, relative_buckets=8, relative_max_distance=20)
    input_ids, mask = padded_batch(lengths, model.config.vocab_size)
    steps = 40
    with torch.no_grad():
        prepared = InferenceT5(model)
        state = prepared.start(prepared.encode(input_ids, mask), mask, steps)
        decoder_ids = torch.full((len(lengths), 1), model.config.decoder_start_id)
        for step in range(steps):
            logits = prepared.step(decoder_ids[:, -1], state)
            full = model(input_ids, decoder_ids, mask)[:, -1]
            torch.testing.assert_close(logits, full, rtol=1e-5, atol=1e-5)
            assert state.length == step + 1
            decoder_ids = torch.cat([decoder_ids, logits.argmax(-1, keepdim=True)], dim=1)
        with pytest.raises(IndexError, match="hold 40 tokens"):
            prepared.step(decoder_ids[:, -1], state)
    generated = generate(model, input_ids, mask, max_new_tokens=steps, stop_at_eos=False)
    assert torch.equal(generated, decoder_ids[:, 1:])


def steps_of(model, input_ids, mask, tokens_BT):
    """Logits (B, T, V) of decode steps that are fed the given tokens."""
    with torch.inference_mode():
        state = model.start(model.encode(input_ids, mask), mask, tokens_BT.shape[1])
        return torch.stack([model.step(token_B, state).clone() for token_B in tokens_BT.T], dim=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_compiled_steps_equal_a_full_forward_pass(tiny_model, padded_batch, monkeypatch, dtype, tolerance):
    monkeypatch.setattr("gqa_exp.model.inference.STRETCH", 6)  # ten steps in two graphs
    model = tiny_model(num_kv_heads=[4, 1, 2], relative_buckets=8, relative_max_distance=20)
    input_ids, mask = padded_batch([9, 4], model.config.vocab_size)
    tokens_BT = torch.randint(3, model.config.vocab_size, (2, 10))
    with torch.no_grad():
        expected = model(input_ids, tokens_BT, mask)
    compiled = InferenceT5(model.to(dtype), compile_step=True)
    assert compiled.compiled
    found = steps_of(compiled, input_ids, mask, tokens_BT)
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
    ours = generate(compiled, input_ids, mask, max_new_tokens=10, stop_at_eos=False)
    if dtype == torch.float32:
        assert torch.equal(ours, generate(model, input_ids, mask, max_new_tokens=10, stop_at_eos=False))


def test_without_a_compiler_steps_run_eagerly(tiny_model, monkeypatch):
    monkeypatch.setattr("gqa_exp.model.inference.can_compile", lambda accelerator: False)
    model = InferenceT5(tiny_model(), compile_step=True)
    assert not model.compiled
    assert model._decode_once == model._decode


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("layout", ["native", "oneDNN", "plain"])
def test_weights_of_every_layout_give_the_same(tiny_model, padded_batch, monkeypatch, layout, dtype, tolerance):
    sizes = {"d_model": 64, "d_ff": 96, "num_heads": 4, "head_dim": 32, "vocab_size": 128}
    model = tiny_model(num_kv_heads=2, **sizes)
    input_ids, mask = padded_batch([9, 4], model.config.vocab_size)
    tokens_BT = torch.randint(3, model.config.vocab_size, (2, 6))
    with torch.no_grad():
        expected = model(input_ids, tokens_BT, mask)
    if layout == "native" and not native.serves_attention(dtype, 32):
        pytest.skip("no such instructions, or no compiler")
    if layout == "oneDNN" and not supports_dtype(str(dtype).removeprefix("torch."), "cpu"):
        pytest.skip("oneDNN does not multiply in this number format here")
    if layout != "native":
        monkeypatch.setattr("gqa_exp.model.native.library", lambda: None)
    monkeypatch.setattr("gqa_exp.model.packed.HAS_ONEDNN", layout == "oneDNN")
    prepared = InferenceT5(model.to(dtype))
    products = [module for module in prepared.modules() if isinstance(module, PackedLinear)]
    assert {product.layout for product in products} - {"oneDNN", "plain"} == {layout} - {"oneDNN", "plain"}
    assert prepared.lm_head.layout == layout
    found = steps_of(prepared, input_ids, mask, tokens_BT)
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


def test_steps_of_a_trained_model_equal_a_full_forward_pass():
    """Its gates go where those of random weights never do: to where gelu's power of e is infinite, below -10.06."""
    torch.manual_seed(0)
    model = load(SHIPPED / "mini").eval()
    lowest = []
    for layer in model.decoder.layers:
        layer.feed_forward.inner[0].register_forward_hook(lambda _, __, gates: lowest.append(gates.min().item()))
    input_ids = torch.randint(3, model.config.vocab_size, (4, 128))
    tokens_BT = generate(InferenceT5(model), input_ids, max_new_tokens=48, stop_at_eos=False)
    with torch.no_grad():
        expected = model(input_ids, tokens_BT)
    assert min(lowest) < -10.06
    found = steps_of(InferenceT5(model), input_ids, None, tokens_BT)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["native", "other"])
@pytest.mark.parametrize(
    "relative", [{"feed_forward": "relu", "tied_embeddings": True}, {"feed_forward": "gated-silu"}]
)
def test_steps_of_relatives_equal_a_full_forward_pass(tiny_model, padded_batch, monkeypatch, relative, layout):
    sizes = {"d_model": 64, "d_ff": 96, "num_heads": 4, "head_dim": 32, "vocab_size": 128}
    model = tiny_model(num_kv_heads=2, **sizes, **relative)
    input_ids, mask = padded_batch([9, 4], model.config.vocab_size)
    tokens_BT = torch.randint(3, model.config.vocab_size, (2, 6))
    if layout != "native":
        monkeypatch.setattr("gqa_exp.model.native.library", lambda: None)
    with torch.no_grad():
        expected = model(input_ids, tokens_BT, mask)
    torch.testing.assert_close(steps_of(InferenceT5(model), input_ids, mask, tokens_BT), expected, rtol=1e-5, atol=1e-5)


def test_recomputed_cross_attention_equals_cached(tiny_model, padded_batch):
    model = tiny_model(num_kv_heads=2)
    input_ids, mask = padded_batch([9, 4], model.config.vocab_size)
    tokens_BT = torch.randint(3, model.config.vocab_size, (2, 6))
    cached, recomputed = (InferenceT5(model, how) for how in ("cached", "recomputed"))
    with torch.inference_mode():
        state = recomputed.start(recomputed.encode(input_ids, mask), mask, 6)
        for cache in state.cross_caches:
            cache.keys.fill_(torch.nan)
    found = [steps_of(each, input_ids, mask, tokens_BT) for each in (cached, recomputed)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        assert recomputed.step(tokens_BT[:, 0], state).isfinite().all(), "each step computes them anew"


@pytest.mark.parametrize("sizes", [{}, {"d_model": 64, "d_ff": 96, "head_dim": 32, "vocab_size": 32}])
def test_ended_sequences_leave_the_batch(tiny_model, monkeypatch, sizes):
    """Work shrinks with the sequences that go on, and what these become does not change by it."""
    rows, real_step = [], InferenceT5.step

    def step(self, token_B, state):
        rows.append(len(token_B))
        assert {len(cache.v_BGSK) for cache in (*state.self_caches, *state.cross_caches)} == {len(token_B)}
        assert (state.native_step is not None) == (native.is_built() and bool(sizes))  # the small have no kernels
        return real_step(self, token_B, state)

    monkeypatch.setattr(InferenceT5, "step", step)
    some_left = 0
    for seed in range(8):
        model = eos_model(tiny_model, seed, num_kv_heads=2, **sizes)
        ids = torch.randint(0, 8, (6, 4))
        rows.clear()
        stopped = generate(model, ids, max_new_tokens=40)
        assert rows[0] == 6
        assert all(2 * later <= earlier or later == earlier for earlier, later in itertools.pairwise(rows))
        some_left += rows[-1] < 6
        for row in range(6):
            alone = generate(model, ids[row : row + 1], max_new_tokens=40)[0]
            assert torch.equal(stopped[row, : len(alone)], alone)
            assert not stopped[row, len(alone) :].any()
    assert some_left


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_sequence_does_not_depend_on_its_batch(tiny_model, padded_batch, kv_heads):
    model = tiny_model(num_kv_heads=kv_heads)
    lengths = [9, 4, 6]
    input_ids, mask = padded_batch(lengths, model.config.vocab_size)
    batch = generate(model, input_ids, mask, max_new_tokens=8, stop_at_eos=False)
    for row, length in enumerate(lengths):
        alone = generate(model, input_ids[row : row + 1, :length], max_new_tokens=8, stop_at_eos=False)
        assert torch.equal(batch[row], alone[0])


def eos_model(tiny_model, seed, **changes):
    """A model of so few tokens that some sequences end."""
    return tiny_model(seed, **{"vocab_size": 8, **changes})


def test_greedy_ids_equal_transformers(tiny_model, padded_batch, tmp_path):
    ended = 0
    for seed in range(4):
        # transformers sizes its cache by the encoder's layers, so the decoder must not have more
        model = eos_model(tiny_model, seed, num_decoder_layers=2)
        save_hf(model, tmp_path / str(seed))
        reference = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / str(seed)).eval()
        input_ids, mask = padded_batch([9, 4, 6, 7], 8, seed)
        # Without its cache: transformers 5 sizes that by the encoder's layers, which are fewer here than the decoder's.
        settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1, "use_cache": False}
        theirs = reference.generate(input_ids=input_ids, attention_mask=mask, **settings)
        ours = generate(model, input_ids, mask, max_new_tokens=12)
        assert torch.equal(ours, theirs[:, 1:])  # theirs begins with the start token
        ended += int((ours == model.config.eos_id).sum())
    assert ended


def test_padding_follows_end_of_sequence(tiny_model, padded_batch):
    ended_early = ran_out = stopped_together = 0
    for seed in range(12):
        model = eos_model(tiny_model, seed, num_kv_heads=2)
        input_ids, mask = padded_batch([9, 4, 6], 8, seed)
        stopped = generate(model, input_ids, mask, max_new_tokens=12)
        free = generate(model, input_ids, mask, max_new_tokens=12, stop_at_eos=False)
        assert free.shape == (3, 12)
        lengths = []
        for row in range(3):
            ends = (free[row] == 1).nonzero()
            length = int(ends[0]) + 1 if len(ends) else 12
            lengths.append(length)
            assert torch.equal(stopped[row, :length], free[row, :length])
            assert not stopped[row, length:].any()
            ended_early += length < 12
            ran_out += not len(ends)
        assert stopped.shape[1] == max(lengths)
        stopped_together += max(lengths) < 12
    assert ended_early
    assert ran_out
    assert stopped_together


def test_generates_with_other_special_ids(tiny_model):
    model = tiny_model(2, vocab_size=8, pad_id=3, eos_id=5, decoder_start_id=6)
    ids = torch.randint(0, 8, (20, 4))
    out = generate(model, ids, max_new_tokens=10)
    free = generate(model, ids, max_new_tokens=10, stop_at_eos=False)
    start = torch.full((20, 1), 6)
    assert torch.equal(free[:, :1], model(ids, start).argmax(-1))
    ended = 0
    for row in range(20):
        ends = (free[row] == 5).nonzero()
        if len(ends):
            ended += 1
            assert (out[row, int(ends[0]) + 1 :] == 3).all()
    assert ended


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(
    rows=st.lists(
        st.lists(st.sampled_from([-2.0, 0.5, 1.0, 3.0, -math.inf, math.inf, math.nan]), min_size=40, max_size=40),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=40, deadline=None)
def test_the_likeliest_is_what_argmax_finds(dtype, rows):
    logits = torch.tensor(rows, dtype=dtype)
    assert torch.equal(likeliest(logits), logits.argmax(-1))


@pytest.mark.parametrize("count", [0, -1])
def test_refuses_to_generate_nothing(tiny_model, count):
    with pytest.raises(ValueError, match="must be 1 or more"):
        generate(tiny_model(), torch.ones(1, 3, dtype=torch.long), max_new_tokens=count)


def test_no_gradient_is_kept(tiny_model):
    model = tiny_model()
    assert not generate(model, torch.ones(1, 3, dtype=torch.long), max_new_tokens=2).requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters())
