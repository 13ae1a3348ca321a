"""A decode step on a CPU by one call: `decode_step.cpp` runs all kernels of all layers, with no Python between them.

Shape suffixes: B batch, D d_model, H query heads, T cached positions, V vocabulary.
"""

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gqa_exp.model import native
from gqa_exp.model.attention import KVCache
from gqa_exp.model.packed import PackedDecoderLayer, PackedLinear


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("norm", "weights")),
        *((name, ctypes.c_long) for name in ("inputs", "outputs", "gated")),
        ("epsilon", ctypes.c_float),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("keys", "values")), ("capacity", ctypes.c_long)]


PRODUCTS = ("qkv", "o", "cross_q", "cross_o", "wi", "wo")


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Product) for name in PRODUCTS),
        *((name, _Cache) for name in ("own", "cross")),
        ("kv_heads", ctypes.c_long),
    ]


class _Bias(ctypes.Structure):
    _fields_ = [("scores", ctypes.c_void_p), *((name, ctypes.c_long) for name in ("batch", "head"))]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("multiply", "attend", "layers")),
        ("depth", ctypes.c_long),
        ("lm_head", _Product),
        ("mask", _Bias),
        *((name, ctypes.c_long) for name in ("batch", "heads", "head_dim", "head_bytes")),
        *((name, ctypes.c_void_p) for name in ("queries", "mixed", "hidden")),
    ]


class DecodeStep:
    """The decode steps of one state, by the kernels of `native.py`.

    Args:
        layers: whose steps `serves` says can be run so.
        lm_head: with the norm before it.
    """

    def __init__(self, layers: Sequence[PackedDecoderLayer], lm_head: PackedLinear) -> None:
        self.layers, self.lm_head = layers, lm_head
        self.dtype = lm_head.weight.dtype
        first = layers[0]
        self.step = _Step(
            multiply=_address(native.linear_kernel(self.dtype)),
            attend=_address(native.attention_kernel(self.dtype, first.head_dim)),
            depth=len(layers),
            lm_head=self._product(lm_head),
            heads=first.num_kv_heads * first.group,
            head_dim=first.head_dim,
            head_bytes=first.head_dim * self.dtype.itemsize,
        )

    @staticmethod
    def serves(layers: Sequence[PackedDecoderLayer], lm_head: PackedLinear, caches: Sequence[KVCache]) -> bool:
        """Whether there is a kernel for each part of these layers' steps."""
        products = [getattr(layer, name) for layer in layers for name in PRODUCTS]
        native_alone = all(product.layout == "native" for product in (*products, lm_head))
        return native_alone and all(layer.wi.gated for layer in layers) and all(cache.native for cache in caches)

    def bind(self, own: Sequence[KVCache], cross: Sequence[KVCache], mask: Tensor | None) -> None:
        """Let steps read and write these caches from now on.

        Args:
            own: of self-attention.
            cross: of cross-attention.
            mask: added to cross-attention's scores, (B, 1, 1, S), or None.

        Raises:
            TypeError: they are of another number format than the weights.
        """
        B, S = own[0].v_BGSK.shape[0], cross[0].v_BGSK.shape[2]
        widest = max(layer.qkv.outputs for layer in self.layers)
        inner = max(layer.wo.inputs for layer in self.layers)
        mask = None if mask is None else mask.reshape(B, S)
        native.check_alike(self.lm_head.weight, mask, *(cache.v_BGSK for cache in (*own, *cross)))
        layers = (_Layer * len(self.layers))()
        for to, layer, *caches in zip(layers, self.layers, own, cross, strict=True):
            for name in PRODUCTS:
                setattr(to, name, self._product(getattr(layer, name)))
            to.own, to.cross = (
                _Cache(cache.keys.data_ptr(), cache.v_BGSK.data_ptr(), cache.v_BGSK.shape[2]) for cache in caches
            )
            to.kv_heads = layer.num_kv_heads
        heads = self.step.heads * self.step.head_dim
        self.logits_BV = torch.empty(B, self.lm_head.outputs, dtype=self.dtype)
        work = [torch.empty(B, width, dtype=self.dtype) for width in (widest, heads, inner)]
        self.step.layers, self.step.batch = ctypes.addressof(layers), B
        self.step.queries, self.step.mixed, self.step.hidden = (each.data_ptr() for each in work)
        self.step.mask = _Bias(*((None, 0, 0) if mask is None else (mask.data_ptr(), S, 0)))
        self._read = (layers, own, cross, mask, work)  # as long as their addresses are in use

    def __call__(self, x_BD: Tensor, position: int, bias_HT: Tensor) -> Tensor:
        """The logits (B, V) of one step, which a later step overwrites.

        Args:
            x_BD: the embedded tokens; written to.
            position: theirs.
            bias_HT: added to the scores of the cached positions and their own, the last axis contiguous.

        Raises:
            MemoryError: no room for a copy of the inputs of a product.
            TypeError: they are of another number format than the weights.
        """
        native.check_alike(self.lm_head.weight, x_BD, bias_HT)
        x, bias, logits = (each.data_ptr() for each in (x_BD, bias_HT, self.logits_BV))
        if native.step_kernel()(ctypes.addressof(self.step), x, position, bias, bias_HT.stride(0), logits):
            raise MemoryError(f"no memory to lay out {tuple(x_BD.shape)} inputs")
        return self.logits_BV

    def _product(self, product: PackedLinear) -> _Product:
        norm, epsilon = (None, 0.0) if product.norm is None else (product.norm.weight, product.norm.epsilon)
        native.check_alike(self.lm_head.weight, product.weight, norm)
        at = None if norm is None else norm.data_ptr()
        return _Product(at, product.weight.data_ptr(), product.inputs, product.outputs, product.gated, epsilon)


def _address(kernel: Callable[..., object]) -> int | None:
    return ctypes.cast(kernel, ctypes.c_void_p).value  # type: ignore[arg-type]
