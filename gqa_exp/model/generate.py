"""Greedy decoding with preallocated caches: what the harness scores and what it times, one function for both.

The phases the timer looks at are functions of their own: `T5.encode`, `start_decoding` (allocates the self-attention
caches and computes the cross-attention keys and values, once) and `decode_step` (one token for every sequence).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gqa_exp.model.attention import KVCache
from gqa_exp.model.t5 import T5, DecoderLayer


@dataclass
class DecodingState:
    """Everything a decode step needs from the past."""

    self_caches: list[KVCache]
    cross_caches: list[KVCache]
    cross_mask: Tensor | None
    """Additive (B, 1, 1, S), or None when nothing is padded."""
    bias_HL: Tensor
    """Self-attention bias by distance, farthest first, so that the bias of a step is a view."""
    length: int = 0
    """Tokens in the self-attention caches."""

    def self_cache_bytes(self) -> int:
        """Bytes allocated for self-attention, all samples and layers."""
        return sum(cache.nbytes for cache in self.self_caches)

    def cross_cache_bytes(self) -> int:
        """Bytes allocated for cross-attention, all samples and layers."""
        return sum(cache.nbytes for cache in self.cross_caches)


def _layers(model: T5) -> list[DecoderLayer]:
    return [layer for layer in model.decoder.layers if isinstance(layer, DecoderLayer)]


def start_decoding(model: T5, encoded_BSD: Tensor, attention_mask: Tensor | None, max_new_tokens: int) -> DecodingState:
    """Allocate the caches and fill those of cross-attention.

    Args:
        model: the model.
        encoded_BSD: encoded source states.
        attention_mask: (B, S) of ones and zeros, or None when nothing is padded.
        max_new_tokens: capacity of the self-attention caches.
    """
    B, S, _ = encoded_BSD.shape
    self_caches, cross_caches = [], []
    for layer in _layers(model):
        self_caches.append(KVCache(layer.self_attention, B, max_new_tokens, encoded_BSD))
        cross = KVCache(layer.cross_attention, B, S, encoded_BSD)
        cross.fill(0, *layer.cross_attention.keys_values(encoded_BSD))
        cross_caches.append(cross)
    distances = torch.arange(-(max_new_tokens - 1), 1, device=encoded_BSD.device)
    bias_HL = model.decoder.relative_bias.of_distances(distances).contiguous()
    return DecodingState(self_caches, cross_caches, model.additive_mask(attention_mask), bias_HL)


def decode_step(model: T5, token_B: Tensor, state: DecodingState) -> Tensor:
    """Feed one token per sequence and return the logits (B, V) of the next; advances `state`.

    Raises:
        IndexError: the caches are full.
    """
    position, capacity = state.length, state.bias_HL.shape[1]
    if position >= capacity:
        raise IndexError(f"the decoding caches hold {capacity} tokens and are full")
    bias_1H1S = state.bias_HL[:, capacity - 1 - position :][None, :, None, :]
    x_BTD = model.embedding(token_B[:, None])
    for layer, self_cache, cross_cache in zip(_layers(model), state.self_caches, state.cross_caches, strict=True):
        normed = layer.self_attention_norm(x_BTD)
        k, v = self_cache.fill(position, *layer.self_attention.keys_values(normed))
        x_BTD = x_BTD + layer.self_attention.attend(normed, k, v, bias_1H1S)
        normed = layer.cross_attention_norm(x_BTD)
        x_BTD = x_BTD + layer.cross_attention.attend(normed, cross_cache.k_BGSK, cross_cache.v_BGSK, state.cross_mask)
        x_BTD = x_BTD + layer.feed_forward(layer.feed_forward_norm(x_BTD))
    state.length += 1
    return model.lm_head(model.decoder.final_norm(x_BTD[:, 0]))  # type: ignore[no-any-return]


@torch.inference_mode()
def generate(
    model: T5,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    stop_at_eos: bool = True,
) -> Tensor:
    """Greedy generation.

    Args:
        model: the model, in evaluation mode.
        input_ids: (B, S).
        attention_mask: (B, S), 1 for tokens and 0 for padding; None when nothing is padded.
        max_new_tokens: longest output.
        stop_at_eos: after a sequence's end-of-sequence emit padding, and stop when all have ended. False generates
            exactly `max_new_tokens` tokens, so that timed variants do equal work.

    Returns:
        ids (B, at most max_new_tokens), without the start token.

    Raises:
        ValueError: `max_new_tokens` is below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more")
    config = model.config
    state = start_decoding(model, model.encode(input_ids, attention_mask), attention_mask, max_new_tokens)
    B = input_ids.shape[0]
    ids_BT = input_ids.new_full((B, max_new_tokens), config.pad_id)
    token_B = input_ids.new_full((B,), config.decoder_start_id)
    ended_B = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
    for position in range(max_new_tokens):
        token_B = decode_step(model, token_B, state).argmax(-1)
        if stop_at_eos:
            token_B = token_B.masked_fill(ended_B, config.pad_id)
            ended_B |= token_B == config.eos_id
        ids_BT[:, position] = token_B
        if stop_at_eos and bool(ended_B.all()):
            return ids_BT[:, : position + 1]
    return ids_BT
