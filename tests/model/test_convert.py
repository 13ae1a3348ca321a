import copy

import pytest
import torch

from gqa_exp.errors import InputError
from gqa_exp.model import T5, conversion_report, convert, generate
from gqa_exp.model.convert import pool_heads

K, D = 6, 20  # head_dim and d_model of the tiny models


def decoder_sites(model):
    for index, layer in enumerate(model.decoder.layers):
        for site in ("self_attention", "cross_attention"):
            for name in ("k", "v"):
                yield f"decoder.layers.{index}.{site}.{name}.weight", getattr(getattr(layer, site), name).weight


def make_groups_equal(model, kv_heads):
    """Copy the first head of each group over the group's other heads."""
    with torch.no_grad():
        for _, weight in decoder_sites(model):
            heads = weight.split(K)
            group = len(heads) // kv_heads
            weight.copy_(torch.cat([heads[h - h % group] for h in range(len(heads))]))
    return model


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_pools_contiguous_heads(tiny_model, method, kv_heads):
    model = tiny_model(num_heads=8)
    converted = convert(model, kv_heads, method)
    after = dict(decoder_sites(converted))
    for name, weight in decoder_sites(model):
        for g, pooled in enumerate(after[name].split(K)):
            members = [weight[h * K : (h + 1) * K] for h in range(8) if h * kv_heads // 8 == g]
            expected = sum(members) / len(members) if method == "mean" else members[0]
            torch.testing.assert_close(pooled, expected)
    assert converted.config.kv_heads == (kv_heads,) * 3
    assert converted.config.num_parameters() == sum(parameter.numel() for parameter in converted.parameters())
    others = converted.state_dict().keys() - after.keys()
    assert all(torch.equal(converted.state_dict()[name], model.state_dict()[name]) for name in others)


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_converting_equal_heads_changes_nothing(tiny_model, padded_batch, method, kv_heads):
    model = make_groups_equal(tiny_model(num_heads=8), kv_heads)
    converted = convert(model, kv_heads, method)
    input_ids, mask = padded_batch([9, 4], 60)
    decoder_ids = torch.randint(60, (2, 7))
    with torch.no_grad():
        expected = model(input_ids, decoder_ids, mask)
        torch.testing.assert_close(converted(input_ids, decoder_ids, mask), expected, rtol=1e-4, atol=1e-4)
    ours = generate(converted, input_ids, mask, max_new_tokens=8, stop_at_eos=False)
    assert torch.equal(ours, generate(model, input_ids, mask, max_new_tokens=8, stop_at_eos=False))
    assert all(site.k_error < 1e-6 and site.v_error < 1e-6 for site in conversion_report(model, converted))


@pytest.mark.parametrize("method", ["mean", "first", "random"])
@pytest.mark.parametrize("kv_heads", [None, [4, 2, 4]])
def test_as_many_heads_is_the_identity_in_a_copy(tiny_model, method, kv_heads):
    model = tiny_model(num_kv_heads=kv_heads)
    before = copy.deepcopy(model.state_dict())
    converted = convert(model, list(model.config.kv_heads), method)
    assert converted.config == model.config
    ours, theirs = converted.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, before[name])
        assert tensor.data_ptr() != theirs[name].data_ptr()


@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_the_given_model_stays_as_it_was(tiny_model, method):
    model = tiny_model()
    config, before = model.config, copy.deepcopy(model.state_dict())
    converted = convert(model, [4, 2, 1], method)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.fill_(3.0)
    assert model.config is config
    assert [layer.cross_attention.num_kv_heads for layer in model.decoder.layers] == [4, 4, 4]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_means_of_means_are_means(tiny_model):
    model = tiny_model(num_heads=8)
    direct, stepwise = convert(model, 1), convert(convert(model, 4), 1)
    mixed = convert(convert(model, [8, 4, 2]), 1)
    for name, tensor in direct.state_dict().items():
        torch.testing.assert_close(stepwise.state_dict()[name], tensor)
        torch.testing.assert_close(mixed.state_dict()[name], tensor)


def test_random_is_drawn_from_its_seed_alone(tiny_model):
    model = tiny_model()
    global_state = torch.get_rng_state()
    first, again, other = (convert(model, 2, "random", seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), global_state)
    changed = {name for name, _ in decoder_sites(model)}
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, other[name]) == (name not in changed)
    fresh = [first[name] for name in sorted(changed)]
    assert len({float(weight[0, 0]) for weight in fresh}) == len(fresh)  # every projection has draws of its own


def test_random_has_the_initial_scale(tiny_config):
    model = T5(tiny_config(d_model=128, num_heads=8, head_dim=32, num_decoder_layers=1))
    converted = convert(model, 4, "random")
    for (name, before), (_, after) in zip(decoder_sites(model), decoder_sites(converted), strict=True):
        spread = 4 / (2 * after.numel()) ** 0.5  # four standard errors of a standard deviation
        assert abs(float(after.detach().std()) * 128**0.5 - 1) < spread, name
        assert not torch.equal(after, pool_heads(before, 8, 4, "mean"))


def test_layers_that_keep_their_heads_keep_their_weights(tiny_model):
    model = tiny_model()
    converted = convert(model, [4, 1, 4], "random")
    changed = {
        name for name, tensor in converted.state_dict().items() if tensor.shape != model.state_dict()[name].shape
    }
    assert changed == {name for name, _ in decoder_sites(model) if name.startswith("decoder.layers.1.")}
    for name, tensor in converted.state_dict().items():
        assert name in changed or torch.equal(tensor, model.state_dict()[name])


def test_keeps_dtype_mode_and_gradients(tiny_model):
    model = tiny_model().bfloat16().train()
    model.set_dropout(0.1)
    converted = convert(model, 1)
    assert converted.training
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in converted.parameters())
    assert {layer.cross_attention.dropout for layer in converted.decoder.layers} == {0.1}
    k = model.decoder.layers[0].self_attention.k.weight
    exact = sum(head.float() for head in k.split(K)) / 4  # averaged in float32, rounded once
    assert torch.equal(converted.decoder.layers[0].self_attention.k.weight, exact.bfloat16())


def test_report_is_what_a_direct_computation_gives(tiny_model):
    model = tiny_model()
    kv_heads = (4, 2, 1)
    converted = convert(model, kv_heads, "first")
    reports = conversion_report(model, converted)
    assert [(r.layer, r.site) for r in reports] == [
        (layer, site) for layer in range(3) for site in ("self_attention", "cross_attention")
    ]
    before, after = dict(decoder_sites(model)), dict(decoder_sites(converted))
    for report in reports:
        assert (report.heads_before, report.heads_after) == (4, kv_heads[report.layer])
        for name, error in (("k", report.k_error), ("v", report.v_error)):
            key = f"decoder.layers.{report.layer}.{report.site}.{name}.weight"
            old, new = before[key].detach().double().split(K), after[key].detach().double().split(K)
            lost = sum(float((old[h] - new[h * report.heads_after // 4]).square().sum()) for h in range(4))
            whole = sum(float(head.square().sum()) for head in old)
            assert error == pytest.approx((lost / whole) ** 0.5, rel=1e-5, abs=1e-7)
            assert (error > 0.5) == (report.heads_after < 4)


def test_mean_pooling_loses_least(tiny_model):
    model = tiny_model()
    losses = {method: conversion_report(model, convert(model, 1, method)) for method in ("mean", "first", "random")}
    for mean, first, random in zip(*losses.values(), strict=True):
        assert mean.k_error < min(first.k_error, random.k_error)
        assert mean.v_error < min(first.v_error, random.v_error)


def test_refuses_what_does_not_fit(tiny_model):
    model = tiny_model()
    with pytest.raises(InputError, match='method="maen" is unknown; did you mean "mean"'):
        convert(model, 2, "maen")
    with pytest.raises(InputError, match=r"num_kv_heads=3 does not divide num_heads=4; use one of \[1, 2, 4\]"):
        convert(model, 3)
    with pytest.raises(InputError, match=r"decoder layer 1 has 2 KV heads.*num_kv_heads=4; use one of \[1, 2\]"):
        convert(tiny_model(num_kv_heads=[4, 2, 4]), 4)
    with pytest.raises(InputError, match="differ in more than num_kv_heads"):
        conversion_report(model, tiny_model(d_ff=7))
