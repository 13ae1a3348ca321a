"""The decoder's layers, packed so that what a decode step has to read is read at the memory's speed.

A decode step does little arithmetic and reads every weight of the decoder once, and both caches. So the projections of
the same input become one product each (q, k and v; the two of the gated feed-forward), from a copy of the separate
parameters that training needs; on CPU that copy lies in the order in which the kernel of `native.py` reads it, or
oneDNN. The R query heads of a group take the place of query positions, so nothing is repeated.

Shape suffixes: B batch, S source length, T cached positions, D d_model, H query heads, G KV heads, R = H/G, K head_dim,
F d_ff.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gqa_exp.host import supports_dtype
from gqa_exp.model import native
from gqa_exp.model.attention import KVCache
from gqa_exp.model.t5 import DecoderLayer, RMSNorm, activate

HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
ROWS = 8
"""Rows of the input for which oneDNN lays out a weight. Measured with 1 to 200 rows, the layout serves all of them."""


class PackedLinear(nn.Module):
    """A product of a decode step with what stands around it: norm(x) W^T, gated, plus a residual, each as asked.

    W is kept in one layout alone: that of the kernel of `native.py` where there is one, which then does all of this in
    one pass, else oneDNN's, else its own. At batch 8 on 2 cores that read 31 GB/s weights were read at (GB/s):

                                 plain   oneDNN   native
        bfloat16, T5-Base         13.5     21.0     26.4
        bfloat16, XXL             23.0     27.2     30.4
        float32, T5-Base          12.0     19.3     25.0
        float32, XXL              10.3     22.9     29.8

    and on 2 cores with AVX2 alone that read 29 GB/s:

        float32, T5-Base           6.6     11.8     19.2

    Args:
        weights: (outputs, inputs) each, one below the other; gated, the gate's and the other's.
        norm: of x, before the product.
        gated: results are gelu(first half of the outputs) * second half.
        few_rows: of x; for many, as all source positions, oneDNN's own product is the faster one.
        compiled: on a CPU, torch.compile will see this module, and lays out plain weights for oneDNN by itself; on a
            GPU it makes one kernel each of what is before and behind the product.
    """

    weight: Tensor

    def __init__(
        self,
        *weights: Tensor,
        norm: RMSNorm | None = None,
        gated: bool = False,
        few_rows: bool = True,
        compiled: bool,
    ) -> None:
        super().__init__()
        self.norm, self.gated = norm, gated
        weight = torch.cat(weights).detach() if len(weights) > 1 else weights[0].detach()
        self.outputs, self.inputs = weight.shape
        dtype = str(weight.dtype).removeprefix("torch.")
        on_cpu = weight.device.type == "cpu"
        packed = native.pack(weight, gated) if few_rows else None
        self.layout = "native" if packed is not None else "plain"
        if packed is None and not compiled and on_cpu and HAS_ONEDNN and supports_dtype(dtype, "cpu"):
            packed, self.layout = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS), "oneDNN"
        self.register_buffer("weight", weight if packed is None else packed, persistent=False)
        if compiled and few_rows and not on_cpu:
            self.compile(dynamic=False)  # one compiled function for all layers' modules of a kind

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., inputs) to (..., outputs), half as many if gated; `residual` is added."""
        if self.layout == "native":
            function = torch.ops.gqa_exp.linear if torch.compiler.is_compiling() else native.linear
            norm, epsilon = (None, 0.0) if self.norm is None else (self.norm.weight, self.norm.epsilon)
            return function(x, self.weight, self.outputs, norm, epsilon, self.gated, residual)
        if self.norm is not None:
            x = self.norm(x)
        if self.layout == "oneDNN":
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        else:
            y = F.linear(x, self.weight)
        if self.gated:
            gate, up = y.chunk(2, dim=-1)
            y = F.gelu(gate, approximate="tanh") * up
        return y if residual is None else residual + y  # type: ignore[no-any-return]


class PackedDecoderLayer(nn.Module):
    """What a decode step computes in one layer."""

    def __init__(self, layer: DecoderLayer, compiled: bool) -> None:
        super().__init__()
        own, cross, feed_forward = layer.self_attention, layer.cross_attention, layer.feed_forward
        self.num_kv_heads, self.head_dim = own.num_kv_heads, own.head_dim
        self.group = own.num_heads // own.num_kv_heads
        pack = functools.partial(PackedLinear, compiled=compiled)
        self.qkv = pack(own.q.weight, own.k.weight, own.v.weight, norm=layer.self_attention_norm)
        self.o = pack(own.o.weight)
        self.cross_q = pack(cross.q.weight, norm=layer.cross_attention_norm)
        self.cross_kv = pack(cross.k.weight, cross.v.weight, few_rows=False)
        self.cross_o = pack(cross.o.weight)
        # The products' own gate is T5.1.1's; others act on what the products give.
        self.kind = feed_forward.kind
        inner = [projection.weight for projection in feed_forward.inner]
        self.wi = pack(*inner, norm=layer.feed_forward_norm, gated=self.kind == "gated-gelu")
        self.wo = pack(feed_forward.wo.weight)

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
        self, x_BD: Tensor, position: int | Tensor, bias_HT: Tensor, own: KVCache, cross: KVCache, mask: Tensor | None
    ) -> Tensor:
        """One token per sequence, (B, D) to (B, D).

        Args:
            x_BD: embedded tokens, or the layer before's output.
            position: the token's, as `KVCache.put` takes it; its key and value are put there in the layer's own cache.
            bias_HT: added to the scores of the first T cached positions, the token's own among them.
            own: cache of self-attention.
            cross: cache of cross-attention, filled.
            mask: added to cross-attention's scores, (B, 1, 1, S), or None.
        """
        B, G, R, K = x_BD.shape[0], self.num_kv_heads, self.group, self.head_dim
        q, k, v = self.qkv(x_BD).split((G * R * K, G * K, G * K), dim=1)
        own.put(k.reshape(B, G, K), v.reshape(B, G, K), position)
        end = bias_HT.shape[1]
        out_BGRK = own.attend(q.reshape(B, G, R, K), end, bias_HT.view(G, R, end))
        x_BD = self.o(out_BGRK.reshape(B, G * R * K), x_BD)
        q_BGRK = self.cross_q(x_BD).view(B, G, R, K)
        out_BGRK = cross.attend(q_BGRK, cross.v_BGSK.shape[2], mask)
        x_BD = self.cross_o(out_BGRK.reshape(B, G * R * K), x_BD)
        hidden_BF = self.wi(x_BD)
        if not self.wi.gated:
            hidden_BF = activate(self.kind, *hidden_BF.split(self.wo.inputs, dim=1))
        return self.wo(hidden_BF, x_BD)  # type: ignore[no-any-return]
