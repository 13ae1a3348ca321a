"""A decode step on a CPU by one call: `decode_step.cpp` runs all kernels of all layers, with no Python between them.

Shape suffixes: B batch, S source length, T cached positions, D d_model, H query heads, G KV heads, K head_dim,
V vocabulary.
"""

import ctypes
from collections.abc import Callable, Sequence

from torch import Tensor

from gqa_exp.model import native
from gqa_exp.model.attention import KVCache
from gqa_exp.model.packed import PackedDecoderLayer, PackedLinear

# The structs of decode_step.cpp, field by field.


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("norm", "weights")),
        *((name, ctypes.c_long) for name in ("inputs", "outputs", "gated")),
        ("epsilon", ctypes.c_float),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("keys", "values")), ("capacity", ctypes.c_long)]


PRODUCTS = ("qkv", "o", "cross_q", "cross_o", "wi", "wo")
"""Of a layer, by its attributes' names, in the struct's order."""


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
        layers: of the decoder; `serves` must hold for them, `lm_head` and the caches.
        lm_head: with the norm before it.
        own: of self-attention, one for each layer, of B sequences.
        cross: of cross-attention, filled or to be filled before a step.
        mask: added to cross-attention's scores, (B, 1, 1, S), or None.

    Raises:
        TypeError: they are of several number formats.
        ValueError: caches of several shapes.
    """

    def __init__(
        self,
        layers: Sequence[PackedDecoderLayer],
        lm_head: PackedLinear,
        own: Sequence[KVCache],
        cross: Sequence[KVCache],
        mask: Tensor | None,
    ) -> None:
        self.parts = layers, lm_head
        self._tensors: list[Tensor] = []  # held, since what follows are their addresses
        weight, first = lm_head.weight, layers[0]
        B, _, capacity, K = own[0].v_BGSK.shape
        H, S = first.num_kv_heads * first.group, cross[0].v_BGSK.shape[2]
        self.logits_BV = weight.new_empty(B, lm_head.outputs)
        widest = max(layer.qkv.outputs for layer in layers)
        work = [weight.new_empty(B, width) for width in (widest, H * K, max(layer.wo.inputs for layer in layers))]
        self._layers = (_Layer * len(layers))(
            *(
                _Layer(
                    *(self._product(getattr(layer, name)) for name in PRODUCTS),
                    *(_Cache(*self._addresses(cache.keys, cache.v_BGSK), cache.v_BGSK.shape[2]) for cache in caches),
                    layer.num_kv_heads,
                )
                for layer, *caches in zip(layers, own, cross, strict=True)
            )
        )
        self._step = _Step(
            *map(_address, (native.linear_kernel(weight.dtype), native.attention_kernel(weight.dtype, K))),
            ctypes.addressof(self._layers),
            len(layers),
            self._product(lm_head),
            _Bias() if mask is None else _Bias(*self._addresses(mask.expand(B, 1, 1, S).contiguous()), S, 0),
            *(B, H, K, K * weight.element_size()),
            *self._addresses(*work),
        )
        native.check_alike(weight, *self._tensors)
        for caches, positions in ((own, capacity), (cross, S)):
            for layer, cache in zip(layers, caches, strict=True):
                expected = (B, layer.num_kv_heads, positions, K)
                if not cache.keys.shape == cache.v_BGSK.shape == expected:
                    raise ValueError(f"a cache is {tuple(cache.v_BGSK.shape)}, not {expected}")

    @staticmethod
    def serves(layers: Sequence[PackedDecoderLayer], lm_head: PackedLinear, caches: Sequence[KVCache]) -> bool:
        """Whether there is a kernel for each part of these layers' steps."""
        products = [getattr(layer, name) for layer in layers for name in PRODUCTS]
        native_alone = bool(layers) and all(product.layout == "native" for product in (*products, lm_head))
        return native_alone and all(layer.wi.gated for layer in layers) and all(cache.native for cache in caches)

    def __call__(self, x_BD: Tensor, position: int, bias_HT: Tensor) -> Tensor:
        """The logits (B, V) of one step, which the next one overwrites.

        Args:
            x_BD: the embedded tokens, contiguous; written to.
            position: theirs, T - 1.
            bias_HT: added to self-attention's scores of the cached positions and their own, the last axis contiguous.

        Raises:
            MemoryError: no room for a copy of the inputs of a product.
            TypeError: they are of another number format than the weights.
            ValueError: they are of other shapes, or the position is not in the cache.
        """
        native.check_alike(self.logits_BV, x_BD, bias_HT)
        step, capacity = self._step, self._layers[0].own.capacity
        shapes, expected = (x_BD.shape, bias_HT.shape), ((step.batch, step.lm_head.inputs), (step.heads, position + 1))
        contiguous = x_BD.is_contiguous() and bias_HT.stride(-1) == 1
        if shapes != expected or not contiguous or not 0 <= position < capacity:
            raise ValueError(
                f"inputs and bias {tuple(map(tuple, shapes))} at position {position} of {capacity}; "
                f"they must be {expected} and contiguous"
            )
        if not len(x_BD):
            return self.logits_BV
        x, bias, logits = (each.data_ptr() for each in (x_BD, bias_HT, self.logits_BV))
        if native.step_kernel()(ctypes.addressof(step), x, position, bias, bias_HT.stride(0), logits):
            raise MemoryError(f"no memory to lay out the inputs of a step's products, {len(x_BD)} rows")
        return self.logits_BV

    def _product(self, product: PackedLinear) -> _Product:
        norm, epsilon = (None, 0.0) if product.norm is None else (product.norm.weight.detach(), product.norm.epsilon)
        addresses = (None if norm is None else self._addresses(norm)[0], *self._addresses(product.weight))
        return _Product(*addresses, product.inputs, product.outputs, product.gated, epsilon)

    def _addresses(self, *tensors: Tensor) -> list[int]:
        self._tensors += tensors
        return [tensor.data_ptr() for tensor in tensors]


def _address(kernel: Callable[..., object]) -> int | None:
    return ctypes.cast(kernel, ctypes.c_void_p).value  # type: ignore[arg-type]
