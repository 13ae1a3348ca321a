"""A model prepared for decoding: what a step has to read, packed so that it is read at the memory's speed.

A decode step does little arithmetic and reads every weight of the decoder once, and both caches. So the projections of
the same input become one product each (q, k and v; the two of the gated feed-forward), from a copy of the separate
parameters that training needs; on CPU that copy lies in the order in which oneDNN reads it. Caches are allocated once,
and the R query heads of a group take the place of query positions, so nothing is repeated.

Shape suffixes: B batch, S source length, T target length, D d_model, H query heads, G KV heads, R = H/G, K head_dim,
F d_ff, V vocabulary.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gqa_exp.host import supports_dtype
from gqa_exp.model.attention import KVCache
from gqa_exp.model.t5 import T5, DecoderLayer, additive_mask

ROWS = 8
"""Rows of the input for which oneDNN lays out a weight. Measured with 1 to 200 rows, the layout serves all of them."""


class PackedLinear(nn.Module):
    """x W^T for the few rows of a decode step, W being the given weights one below the other.

    With oneDNN the weight is kept in its blocked layout alone: at 8 rows that reads 1.2 to 2.2 times as fast as
    F.linear, in bfloat16 and float32, 4096 inputs, on 2 cores.
    """

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        weight = torch.cat(weights).detach() if len(weights) > 1 else weights[0].detach()
        dtype = str(weight.dtype).removeprefix("torch.")
        self.onednn = (
            weight.device.type == "cpu"
            and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            and supports_dtype(dtype, "cpu")
        )
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) if self.onednn else weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        if self.onednn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")  # type: ignore[no-any-return]
        return F.linear(x, self.weight)


class PackedDecoderLayer(nn.Module):
    """What a decode step computes in one layer."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        own, cross, feed_forward = layer.self_attention, layer.cross_attention, layer.feed_forward
        self.num_kv_heads, self.head_dim = own.num_kv_heads, own.head_dim
        self.group = own.num_heads // own.num_kv_heads
        self.self_attention_norm = layer.self_attention_norm
        self.qkv = PackedLinear(own.q.weight, own.k.weight, own.v.weight)
        self.o = PackedLinear(own.o.weight)
        self.cross_attention_norm = layer.cross_attention_norm
        self.cross_q = PackedLinear(cross.q.weight)
        self.cross_kv = PackedLinear(cross.k.weight, cross.v.weight)
        self.cross_o = PackedLinear(cross.o.weight)
        self.feed_forward_norm = layer.feed_forward_norm
        self.wi = PackedLinear(feed_forward.wi_0.weight, feed_forward.wi_1.weight)
        self.wo = PackedLinear(feed_forward.wo.weight)

    def cache(self, batch: int, capacity: int, like: Tensor) -> KVCache:
        """An empty cache of this layer's KV heads."""
        return KVCache(batch, self.num_kv_heads, capacity, self.head_dim, like)

    def fill_cross(self, cache: KVCache, encoded_BSD: Tensor) -> None:
        """Compute cross-attention's keys and values of all source positions into their cache."""
        B, S, _ = encoded_BSD.shape
        k_BGSK, v_BGSK = (
            self.cross_kv(encoded_BSD).view(B, S, 2, self.num_kv_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        )
        cache.fill(k_BGSK, v_BGSK)

    def forward(
        self, x_BD: Tensor, position: int, bias_GRT: Tensor, own: KVCache, cross: KVCache, mask: Tensor | None
    ) -> Tensor:
        """One token per sequence, (B, D) to (B, D); its key and value are put into the layer's own cache."""
        B, G, R, K = x_BD.shape[0], self.num_kv_heads, self.group, self.head_dim
        q, k, v = self.qkv(self.self_attention_norm(x_BD)).split((G * R * K, G * K, G * K), dim=1)
        own.fill(k.reshape(B, G, 1, K), v.reshape(B, G, 1, K), position)
        out_BGRK = own.attend(q.reshape(B, G, R, K), position + 1, bias_GRT)
        x_BD = x_BD + self.o(out_BGRK.reshape(B, G * R * K))
        q_BGRK = self.cross_q(self.cross_attention_norm(x_BD)).view(B, G, R, K)
        out_BGRK = cross.attend(q_BGRK, cross.v_BGSK.shape[2], mask)
        x_BD = x_BD + self.cross_o(out_BGRK.reshape(B, G * R * K))
        gate_BF, up_BF = self.wi(self.feed_forward_norm(x_BD)).chunk(2, dim=1)
        return x_BD + self.wo(F.gelu(gate_BF, approximate="tanh") * up_BF)  # type: ignore[no-any-return]


@dataclass
class DecodingState:
    """Everything a decode step needs from the past."""

    self_caches: list[KVCache]
    cross_caches: list[KVCache]
    encoded_BSD: Tensor | None
    """The encoder's states, where each step computes cross-attention's keys and values from them."""
    cross_mask: Tensor | None
    """Additive (B, 1, 1, S), or None when nothing is padded."""
    bias_HT: Tensor
    """Self-attention bias by distance, farthest first, so that the bias of a step is a view."""
    length: int = 0
    """Tokens in the self-attention caches."""

    def self_cache_bytes(self) -> int:
        """Bytes allocated for self-attention, all samples and layers."""
        return sum(cache.nbytes for cache in self.self_caches)

    def cross_cache_bytes(self) -> int:
        """Bytes allocated for cross-attention, all samples and layers."""
        return sum(cache.nbytes for cache in self.cross_caches)

    def fill_self_caches(self) -> None:
        """Fill the self-attention caches with noise, to time a step at any fill: unwritten memory may hold NaN."""
        for cache in self.self_caches:
            cache.keys.normal_()
            cache.v_BGSK.normal_()

    def keep(self, rows_B: Tensor) -> None:
        """Keep only the sequences of these indices, in their order."""
        for cache in (*self.self_caches, *self.cross_caches):
            cache.keep(rows_B)
        self.encoded_BSD = None if self.encoded_BSD is None else self.encoded_BSD[rows_B]
        self.cross_mask = None if self.cross_mask is None else self.cross_mask[rows_B]


class InferenceT5(nn.Module):
    """A T5 prepared for decoding. Changes of the model made later do not reach its packed copies: prepare it anew.

    Args:
        model: the model, in the number format and on the device to decode with. Its encoder is shared, not copied.
        cross_kv: "cached" or "recomputed", see `gqa_exp.config.CROSS_KV`.
    """

    def __init__(self, model: T5, cross_kv: str = "cached") -> None:
        super().__init__()
        self.training = model.training
        self.config = model.config
        self.cross_kv = cross_kv
        # Parts, not the model itself: its own decoder can then be given up, which matters where it is large.
        self.embedding = model.embedding
        self.encoder = model.encoder
        self.relative_bias = model.decoder.relative_bias
        self.layers = nn.ModuleList(
            PackedDecoderLayer(layer) for layer in model.decoder.layers if isinstance(layer, DecoderLayer)
        )
        self.final_norm = model.decoder.final_norm
        self.lm_head = PackedLinear(model.lm_head.weight)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (B, S) to encoded states (B, S, D)."""
        mask = additive_mask(attention_mask, self.embedding.weight.dtype)
        return self.encoder(self.embedding(input_ids), mask)  # type: ignore[no-any-return]

    def shallow(self, layers: int) -> "InferenceT5":
        """The same model cut to its first layers of encoder and decoder, weights shared; for timing, not for text."""
        other = copy.copy(self)
        other._modules = {**self._modules, "layers": self.layers[:layers], "encoder": copy.copy(self.encoder)}
        other.encoder._modules = {**self.encoder._modules, "layers": self.encoder.layers[:layers]}
        other.config = self.config.cut(layers)
        return other

    def start(self, encoded_BSD: Tensor, attention_mask: Tensor | None, max_new_tokens: int) -> DecodingState:
        """Allocate the caches and fill those of cross-attention.

        Args:
            encoded_BSD: encoded source states.
            attention_mask: (B, S) of ones and zeros, or None when nothing is padded.
            max_new_tokens: capacity of the self-attention caches.
        """
        B, S, _ = encoded_BSD.shape
        self_caches = [layer.cache(B, max_new_tokens, encoded_BSD) for layer in self._layers]
        cross_caches = [layer.cache(B, S, encoded_BSD) for layer in self._layers]
        if self.cross_kv == "cached":
            for layer, cache in zip(self._layers, cross_caches, strict=True):
                layer.fill_cross(cache, encoded_BSD)
        distances = torch.arange(-(max_new_tokens - 1), 1, device=encoded_BSD.device)
        return DecodingState(
            self_caches,
            cross_caches,
            encoded_BSD if self.cross_kv == "recomputed" else None,
            additive_mask(attention_mask, self.embedding.weight.dtype),
            self.relative_bias.of_distances(distances).detach().contiguous(),
        )

    def step(self, token_B: Tensor, state: DecodingState) -> Tensor:
        """Feed one token per sequence and return the logits (B, V) of the next; advances `state`.

        Raises:
            IndexError: the caches are full.
        """
        position, capacity = state.length, state.bias_HT.shape[1]
        if position >= capacity:
            raise IndexError(f"the decoding caches hold {capacity} tokens and are full")
        bias_HT = state.bias_HT[:, capacity - 1 - position :]
        x_BD = self.embedding(token_B)
        for layer, own, cross in zip(self._layers, state.self_caches, state.cross_caches, strict=True):
            if state.encoded_BSD is not None:
                layer.fill_cross(cross, state.encoded_BSD)
            bias_GRT = bias_HT.view(layer.num_kv_heads, layer.group, position + 1)
            x_BD = layer(x_BD, position, bias_GRT, own, cross, state.cross_mask)
        state.length += 1
        return self.lm_head(self.final_norm(x_BD))  # type: ignore[no-any-return]

    @property
    def _layers(self) -> Sequence[PackedDecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, PackedDecoderLayer)]
