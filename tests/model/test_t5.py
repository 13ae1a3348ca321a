import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gqa_exp.config import ModelConfig
from gqa_exp.errors import InputError
from gqa_exp.model import T5, T5Config, generate
from gqa_exp.model.checkpoint import hf_name, save_hf
from gqa_exp.model.inference import InferenceT5
from gqa_exp.model.t5 import RMSNorm, gelu, initial_std
from gqa_exp.training.loss import token_loss


def transformers_twin(model, dropout=0.0):
    """transformers' T5 with the weights of ours, and an output matrix of its own."""
    config = model.config
    reference = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_kv=config.head_dim,
            d_ff=config.d_ff,
            num_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.relative_buckets,
            relative_attention_max_distance=config.relative_max_distance,
            layer_norm_epsilon=config.layer_norm_epsilon,
            feed_forward_proj=config.feed_forward,
            tie_word_embeddings=config.tied_embeddings,
            dropout_rate=dropout,
            pad_token_id=config.pad_id,
            eos_token_id=config.eos_id,
            decoder_start_token_id=config.decoder_start_id,
            attn_implementation="eager",
        )
    )
    weights = {hf_name(name): tensor for name, tensor in model.state_dict().items()}
    for stack in ("encoder", "decoder"):
        weights[f"{stack}.embed_tokens.weight"] = weights["shared.weight"]
    if config.tied_embeddings:
        weights["lm_head.weight"] = weights["shared.weight"]
    else:
        reference.lm_head.weight = torch.nn.Parameter(torch.empty_like(reference.lm_head.weight))
    reference.load_state_dict(weights)
    assert torch.equal(reference.lm_head.weight, reference.shared.weight) == config.tied_embeddings
    return reference.eval()


@st.composite
def geometries(draw):
    return {
        "vocab_size": draw(st.integers(8, 40)),
        "d_model": draw(st.integers(4, 24)),
        "d_ff": draw(st.integers(4, 24)),
        "num_heads": draw(st.integers(1, 5)),
        "head_dim": draw(st.integers(2, 7)),
        "num_encoder_layers": draw(st.integers(1, 3)),
        "num_decoder_layers": draw(st.integers(1, 3)),
        "relative_buckets": draw(st.sampled_from([8, 32])),
        "relative_max_distance": draw(st.sampled_from([10, 128])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-6, 1e-2])),
        "feed_forward": draw(st.sampled_from(["gated-gelu", "gated-silu", "relu"])),
        "tied_embeddings": draw(st.booleans()),
    }


@given(geometries(), st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 10), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_logits_of_multi_head_equal_transformers(tiny_model, padded_batch, geometry, lengths, target, seed):
    model = tiny_model(seed, **geometry)
    reference = transformers_twin(model)
    input_ids, mask = padded_batch(lengths, model.config.vocab_size, seed)
    decoder_ids = torch.randint(model.config.vocab_size, (len(lengths), target))
    with torch.no_grad():
        theirs = reference(input_ids=input_ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
        ours = model(input_ids, decoder_ids, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_logits_equal_transformers_where_every_bucket_is_used(tiny_model, padded_batch):
    model = tiny_model()
    reference = transformers_twin(model)
    input_ids, mask = padded_batch([300, 170], model.config.vocab_size)
    decoder_ids = torch.randint(model.config.vocab_size, (2, 160))
    # 0 apart, the past, and the future (encoder only) each end in the bucket of everything from max_distance on.
    seen = model.encoder.relative_bias.bucket(torch.arange(-299, 300)).unique()
    assert seen.tolist() == [bucket for bucket in range(32) if bucket != 16]  # bucket 16: 0 steps into the future
    assert model.decoder.relative_bias.bucket(torch.arange(-159, 1)).unique().tolist() == list(range(32))
    with torch.no_grad():
        theirs = reference(input_ids=input_ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
        ours = model(input_ids, decoder_ids, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_logits_equal_transformers_through_a_folder(tiny_model, padded_batch, tmp_path):
    model = tiny_model(num_decoder_layers=1)  # fewer than the encoder has, which the folder must say
    save_hf(model, tmp_path)
    reference = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert not torch.equal(reference.lm_head.weight, reference.shared.weight)
    input_ids, mask = padded_batch([9, 4, 6], model.config.vocab_size)
    decoder_ids = torch.randint(model.config.vocab_size, (3, 7))
    with torch.no_grad():
        theirs = reference(input_ids=input_ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
        torch.testing.assert_close(model(input_ids, decoder_ids, mask), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_loss_and_gradients_equal_transformers(tiny_model, padded_batch, dropout):
    """Dropout too: drawn from one seed, in the same places, in the same order."""
    model = tiny_model().train()
    model.set_dropout(dropout)
    reference = transformers_twin(model, dropout).train()
    input_ids, mask = padded_batch([9, 4, 6], model.config.vocab_size)
    labels, _ = padded_batch([5, 8, 3], model.config.vocab_size, seed=1)
    torch.manual_seed(5)
    theirs = reference(input_ids=input_ids, attention_mask=mask, labels=labels.masked_fill(labels == 0, -100)).loss
    theirs.backward()
    torch.manual_seed(5)
    ours, _ = token_loss(model(input_ids, model.shift_right(labels), mask), labels, z_loss=0.0)
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    reference_grads = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        expected = reference_grads.pop(hf_name(name))
        assert float(parameter.grad.abs().max()) > 0, name
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert not reference_grads


def tile_kv_heads(model):
    """A multi-head model in which every query head has its own copy of its group's K/V head."""
    config = model.config
    tiled = T5(T5Config(**{**vars(config), "num_kv_heads": None})).eval()
    weights = model.state_dict()
    for layer, kv_heads in enumerate(config.kv_heads):
        for site in ("self_attention", "cross_attention"):
            for name in ("k", "v"):
                key = f"decoder.layers.{layer}.{site}.{name}.weight"
                heads = weights[key].split(config.head_dim)
                weights[key] = torch.cat([heads[h * kv_heads // config.num_heads] for h in range(config.num_heads)])
    tiled.load_state_dict(weights)
    return tiled


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 6, 12, [12, 1, 3], [2, 6, 4], [1, 1, 12]])
def test_fewer_kv_heads_equal_multi_head_with_tiled_copies(tiny_model, padded_batch, kv_heads):
    model = tiny_model(num_heads=12, num_kv_heads=kv_heads)
    tiled = tile_kv_heads(model)
    input_ids, mask = padded_batch([9, 4, 6], model.config.vocab_size)
    decoder_ids = torch.randint(model.config.vocab_size, (3, 7))
    with torch.no_grad():
        expected = tiled(input_ids, decoder_ids, mask)
        torch.testing.assert_close(model(input_ids, decoder_ids, mask), expected, rtol=1e-4, atol=1e-4)
    with_gradients = model(input_ids, decoder_ids, mask)  # the path of training
    torch.testing.assert_close(with_gradients.detach(), expected, rtol=1e-4, atol=1e-4)
    ours, theirs = (generate(m, input_ids, mask, max_new_tokens=6, stop_at_eos=False) for m in (model, tiled))
    assert torch.equal(ours, theirs)


def test_padding_changes_nothing(tiny_model, padded_batch):
    model = tiny_model(num_kv_heads=2)
    input_ids, mask = padded_batch([9, 4], model.config.vocab_size)
    decoder_ids = torch.randint(model.config.vocab_size, (2, 5))
    with torch.no_grad():
        batch = model(input_ids, decoder_ids, mask)
        alone = model(input_ids[1:, :4], decoder_ids[1:])
        unmasked = model(input_ids, decoder_ids)
    torch.testing.assert_close(batch[1:], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(unmasked[1], batch[1], atol=1e-2)


def test_decoder_sees_no_future(tiny_model):
    model = tiny_model(num_kv_heads=1)
    input_ids, decoder_ids = torch.randint(2, 60, (2, 6)), torch.randint(2, 60, (2, 8))
    changed = decoder_ids.clone()
    changed[:, 5:] = 1
    with torch.no_grad():
        first, second = model(input_ids, decoder_ids), model(input_ids, changed)
    assert torch.equal(first[:, :5], second[:, :5])
    assert not torch.allclose(first[:, 5:], second[:, 5:], atol=1e-2)


@given(
    st.sampled_from([(1, None), (4, 1), (4, 2), (6, [6, 3]), (8, [1, 2])]),
    st.integers(1, 30),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from([{}, {"feed_forward": "relu", "tied_embeddings": True}]),
)
@settings(max_examples=15, deadline=None)
def test_sizes_are_what_the_formulas_say(tiny_config, heads, d_ff, head_dim, encoder_layers, relative):
    num_heads, kv_heads = heads
    config = tiny_config(
        **relative,
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        d_ff=d_ff,
        head_dim=head_dim,
        num_encoder_layers=encoder_layers,
        num_decoder_layers=2,
    )
    model = T5(config)
    assert config.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    B, S, T = 3, 7, 5
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        encoded = torch.zeros(B, S, config.d_model, dtype=dtype)
        state = InferenceT5(model.to(dtype)).start(encoded, None, T)
        assert state.self_cache_bytes() == B * config.kv_cache_bytes(0, T, width)
        assert state.cross_cache_bytes() == B * config.kv_cache_bytes(S, 0, width)
        allocated = sum(
            t.untyped_storage().nbytes() for c in state.self_caches + state.cross_caches for t in (c.keys, c.v_BGSK)
        )
        assert allocated == B * config.kv_cache_bytes(S, T, width)


@pytest.mark.parametrize("kv_heads", [None, 1, [4, 2, 1]])
def test_decode_step_reads_the_decoder_without_cross_projections(tiny_config, kv_heads):
    config = tiny_config(num_kv_heads=kv_heads)
    read = 0
    for name, parameter in T5(config).named_parameters():
        cached = "cross_attention.k." in name or "cross_attention.v." in name or "relative_bias" in name
        if name == "lm_head.weight" or (name.startswith("decoder.") and not cached):
            read += parameter.numel()
    B, S, fill = 5, 11, 3
    read += B * config.d_model  # embedding rows
    read += B * sum(2 * heads * config.head_dim * (S + fill) for heads in config.kv_heads)
    assert config.decode_step_bytes(B, S, fill, 2) == 2 * read


def test_multi_query_reads_an_eighth_of_the_cache_of_eight_heads(tiny_config):
    mha, mqa = (tiny_config(num_heads=8, num_kv_heads=heads) for heads in (8, 1))
    assert mha.kv_cache_bytes(100, 10, 2) == 8 * mqa.kv_cache_bytes(100, 10, 2)


def test_kv_heads_are_kept_per_layer(tiny_config):
    assert tiny_config().kv_heads == (4, 4, 4)
    assert tiny_config(num_kv_heads=2) == tiny_config(num_kv_heads=[2, 2, 2])
    model = T5(tiny_config(num_kv_heads=[4, 1, 2]))
    for layer, heads in zip(model.decoder.layers, (4, 1, 2), strict=True):
        for site in (layer.self_attention, layer.cross_attention):
            assert site.num_kv_heads == heads
            assert site.k.weight.shape == site.v.weight.shape == (heads * 6, 20)
    assert all(layer.self_attention.num_kv_heads == 4 for layer in model.encoder.layers)
    with pytest.raises(InputError, match="num_kv_heads=3 does not divide num_heads=4"):
        tiny_config(num_kv_heads=3)


def test_geometry_of_a_configured_model():
    config = T5Config.from_model_config(ModelConfig(d_model=24, vocab_size=200, num_heads=6), [6, 3, 2, 1])
    assert (config.d_model, config.vocab_size, config.num_heads, config.kv_heads) == (24, 200, 6, (6, 3, 2, 1))
    assert (config.d_ff, config.head_dim, config.num_encoder_layers) == (768, 32, 4)


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_rms_norm_is_its_formula(epsilon):
    torch.manual_seed(0)
    norm = RMSNorm(10, epsilon)
    torch.nn.init.normal_(norm.weight)
    x = 3 * torch.randn(2, 4, 10) + 5  # a mean, which must stay
    expected = norm.weight * x / (x.pow(2).sum(-1, keepdim=True) / 10 + epsilon).sqrt()
    torch.testing.assert_close(norm(x), expected)


def test_rms_norm_squares_in_float32():
    norm = RMSNorm(4, 1e-6).half()
    assert torch.equal(norm(torch.full((1, 4), 300.0, dtype=torch.float16)), torch.ones(1, 4, dtype=torch.float16))
    assert norm.bfloat16()(torch.ones(1, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_bfloat16_is_near_float32(tiny_model, padded_batch, kv_heads):
    model = tiny_model(num_kv_heads=kv_heads)
    halved = copy.deepcopy(model).bfloat16()
    input_ids, mask = padded_batch([9, 4], model.config.vocab_size)
    decoder_ids = torch.randint(model.config.vocab_size, (2, 6))
    with torch.no_grad():
        exact, near = model(input_ids, decoder_ids, mask), halved(input_ids, decoder_ids, mask)
    assert near.dtype == torch.bfloat16
    assert (near.float() - exact).abs().mean() < 0.03 * exact.std()
    ids = generate(halved, input_ids, mask, max_new_tokens=4, stop_at_eos=False)
    assert ids.shape == (2, 4)


def test_bfloat16_autocast_is_near_float32_backwards_too(tiny_model, padded_batch):
    model = tiny_model(num_kv_heads=2).train()
    input_ids, mask = padded_batch([9, 4], model.config.vocab_size)
    labels, _ = padded_batch([6, 3], model.config.vocab_size)
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(input_ids, model.shift_right(labels), mask)
        loss, _ = token_loss(logits, labels, 1e-4)
        losses.append((float(loss.detach()), torch.autograd.grad(loss, list(model.parameters()))))
    (exact, exact_grads), (near, near_grads) = losses
    assert near != exact
    assert abs(near - exact) < 0.02 * exact
    for gradient, reference in zip(near_grads, exact_grads, strict=True):
        assert (gradient - reference).norm() < 0.1 * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_of_compiled_layers_is_torchs(dtype):
    # Written out for the compiler; float64 on torch's side tells the error of either form from the other's.
    x = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor([0.0, 1e-20, -1e-20, 1e4, -1e4])]).to(dtype)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = torch.compile(gelu, backend="aot_eager")(ours), F.gelu(exact, approximate="tanh")
    assert y.dtype == dtype
    (slope,) = torch.autograd.grad(y.sum(), ours)
    (expected_slope,) = torch.autograd.grad(expected.sum(), exact)
    relative = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=relative, atol=1e-6)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=relative, atol=2e-6)
    assert torch.equal(gelu(x), F.gelu(x, approximate="tanh"))


def test_fresh_weights_have_the_initial_scale():
    torch.manual_seed(0)
    config = T5Config(500, 64, 96, 4, 32, 2, 2, 2)
    for name, parameter in T5(config).named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            std = initial_std(".".join(name.split(".")[-2:]), config)
            spread = 4 / (2 * parameter.numel()) ** 0.5  # four standard errors of a standard deviation
            assert abs(float(parameter.detach().std()) / std - 1) < spread, name
    # mesh_tensorflow's: queries carry the 1/sqrt(head_dim) that T5's attention leaves out
    assert initial_std("q.weight", config) == (64 * 32) ** -0.5
    assert initial_std("k.weight", config) == initial_std("v.weight", config) == 64**-0.5
    assert initial_std("o.weight", config) == (4 * 32) ** -0.5
    assert initial_std("wo.weight", config) == 96**-0.5
    assert initial_std("embedding.weight", config) == 1.0


def test_shift_right_starts_with_the_start_token(tiny_model):
    model = tiny_model(decoder_start_id=7)
    assert model.shift_right(torch.tensor([[3, 4, 5], [6, 1, 0]])).tolist() == [[7, 3, 4], [7, 6, 1]]


def test_output_matrix_is_not_the_embedding(tiny_model):
    model = tiny_model()
    assert model.lm_head.weight.data_ptr() != model.embedding.weight.data_ptr()
    ids = torch.randint(2, 60, (2, 5))
    hidden = model.decode(ids, model.encode(ids))
    torch.testing.assert_close(model(ids, ids), F.linear(hidden, model.lm_head.weight))


def test_a_sweep_of_many_variants_stays_compiled(tiny_config, monkeypatch: pytest.MonkeyPatch) -> None:
    # Beyond torch's limit of versions it would run on uncompiled, with nothing but a warning among others.
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["frames"]
    frames.clear()
    try:
        for kv_heads in (4, 2, 1):
            for length in (6, 8, 10):
                model = T5(tiny_config(num_kv_heads=kv_heads))
                model.compile_layers()
                ids = torch.randint(3, 60, (2, length))
                for mode, mask in ((True, None), (True, torch.ones_like(ids)), (False, torch.ones_like(ids))):
                    model.train(mode)
                    with torch.set_grad_enabled(mode):
                        model(ids, ids[:, :4], mask)
        assert frames["ok"] == frames["total"] > 8
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("head_dim", [16, 32])
def test_a_sample_that_is_masked_as_a_whole_does_not_spoil_the_others(dropout, head_dim):
    """As data with an empty input has it; under autocast the mask is float32, whose least number bfloat16 lacks."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=64, d_ff=96, num_heads=4, head_dim=head_dim, num_encoder_layers=1, num_decoder_layers=1
    )
    model = T5(config).train()
    model.set_dropout(dropout)
    mask = torch.ones(3, 21, dtype=torch.long)
    mask[1] = 0
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randint(2, 64, (3, 21)), torch.randint(2, 64, (3, 5)), mask)
    logits.float().mean().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
