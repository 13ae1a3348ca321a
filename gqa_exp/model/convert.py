"""Conversion of a checkpoint to fewer KV heads: the K and V projections of a group's heads become one head's.

Mean-pooling is the paper's method (section 2.1); keeping the first head, and drawing fresh weights, are what it
compares with (Figure 4). Only decoder self- and cross-attention change; the encoder stays multi-head.
"""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from gqa_exp.config import METHODS, kv_heads_per_layer
from gqa_exp.errors import InputError, suggest
from gqa_exp.model.attention import GroupedAttention
from gqa_exp.model.sequence import Linear
from gqa_exp.model.t5 import T5, DecoderLayer, initial_std

SITES = ("self_attention", "cross_attention")


def pool_heads(weight: Tensor, heads_before: int, heads_after: int, method: str) -> Tensor:
    """Pool a projection's heads, contiguous ones together.

    Args:
        weight: (heads_before * K, D).
        heads_before: KV heads of `weight`.
        heads_after: KV heads wanted; divides `heads_before`.
        method: "mean" or "first".

    Returns:
        (heads_after * K, D).
    """
    members = weight.view(heads_after, heads_before // heads_after, -1, weight.shape[1])
    pooled: Tensor = members.float().mean(1).to(weight.dtype) if method == "mean" else members[:, 0]
    return pooled.flatten(0, 1)


def tile_heads(weight: Tensor, heads_before: int, heads_after: int) -> Tensor:
    """A projection in which each head stands once for each of those that were, or could be, pooled to it.

    Args:
        weight: (heads_before * K, D).
        heads_before: KV heads of `weight`.
        heads_after: KV heads wanted; a multiple of `heads_before`.

    Returns:
        (heads_after * K, D).
    """
    heads = weight.view(heads_before, 1, -1, weight.shape[1])
    return heads.expand(-1, heads_after // heads_before, -1, -1).reshape(-1, weight.shape[1])


@torch.no_grad()
def convert(model: T5, num_kv_heads: Any, method: str = "mean", seed: int = 0) -> T5:
    """A new model with fewer KV heads in the decoder; the given one is not changed.

    Layers whose number of heads stays keep their weights under every method.

    Args:
        model: the model to convert, usually multi-head.
        num_kv_heads: an int, or one per decoder layer; divides the layer's present number.
        method: "mean", "first" or "random" (fresh K and V at the initial scale).
        seed: of the fresh weights; "mean" and "first" do not use it.

    Raises:
        InputError: unknown method, or a number of heads that does not fit.
    """
    if method not in METHODS:
        raise InputError(f'method="{method}" is unknown; {suggest(method, METHODS)}')
    before = model.config.kv_heads
    after = kv_heads_per_layer(num_kv_heads, model.config.num_heads, model.config.num_decoder_layers)
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        if old % new:
            raise InputError(
                f"decoder layer {layer} has {old} KV heads, which cannot be pooled to num_kv_heads={new}; "
                f"use one of {[g for g in range(1, old + 1) if old % g == 0]}"
            )
    converted = copy.deepcopy(model)
    converted.config = dataclasses.replace(model.config, num_kv_heads=after)
    generator = torch.Generator().manual_seed(seed)
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        if old == new:
            continue
        for site in SITES:
            attention = _site(converted, index, site)
            for name in ("k", "v"):
                weight = getattr(attention, name).weight
                if method == "random":
                    shape = (new * attention.head_dim, weight.shape[1])
                    fresh = torch.randn(shape, generator=generator) * initial_std(f"{name}.weight", model.config)
                    pooled = fresh.to(weight)
                else:
                    pooled = pool_heads(weight, old, new, method)
                _replace(attention, name, pooled.clone())
            attention.num_kv_heads = new
    return converted


@torch.no_grad()
def expand_heads(model: T5) -> T5:
    """A new multi-head model of the same function: each KV head once for every query head that reads it.

    It gains nothing and loses the savings; it serves tools that know multi-head attention only.
    """
    expanded = copy.deepcopy(model)
    heads = model.config.num_heads
    expanded.config = dataclasses.replace(model.config, num_kv_heads=None)
    for index, kv_heads in enumerate(model.config.kv_heads):
        for site in SITES:
            attention = _site(expanded, index, site)
            for name in ("k", "v"):
                _replace(attention, name, tile_heads(getattr(attention, name).weight, kv_heads, heads))
            attention.num_kv_heads = heads
    return expanded


def _replace(attention: GroupedAttention, name: str, weight: Tensor) -> None:
    """Put a projection of another size in the place of the given one."""
    projection = Linear(weight.shape[1], weight.shape[0], device="meta")
    projection.weight = nn.Parameter(weight, requires_grad=getattr(attention, name).weight.requires_grad)
    setattr(attention, name, projection)


def _site(model: T5, layer: int, site: str) -> GroupedAttention:
    module = model.decoder.layers[layer]
    assert isinstance(module, DecoderLayer)
    attention = getattr(module, site)
    assert isinstance(attention, GroupedAttention)
    return attention


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """What conversion did at one attention site of one decoder layer."""

    layer: int
    site: str
    heads_before: int
    heads_after: int
    k_error: float
    """Relative error of the K projection: |W - tiled pooled W| / |W| (Frobenius)."""
    v_error: float


@torch.no_grad()
def conversion_report(before: T5, after: T5) -> list[SiteReport]:
    """Per decoder layer and site: heads pooled, and how far each head's projection is from its group's pooled one.

    Raises:
        InputError: the two models are not of one geometry apart from their KV heads.
    """
    if dataclasses.replace(before.config, num_kv_heads=None) != dataclasses.replace(after.config, num_kv_heads=None):
        raise InputError("the two models differ in more than num_kv_heads; compare a model with its own conversion")
    reports = []
    for layer in range(before.config.num_decoder_layers):
        for site in SITES:
            old, new = _site(before, layer, site), _site(after, layer, site)
            errors = {}
            for name in ("k", "v"):
                original = getattr(old, name).weight.float()
                tiled = tile_heads(getattr(new, name).weight.float(), new.num_kv_heads, old.num_kv_heads)
                errors[name] = float((original - tiled).norm() / original.norm())
            reports.append(SiteReport(layer, site, old.num_kv_heads, new.num_kv_heads, errors["k"], errors["v"]))
    return reports
