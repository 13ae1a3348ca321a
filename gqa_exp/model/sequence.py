"""Attention, gated GELU, dropout and linear layers of whole sequences on a CPU, with gradients, by kernels.

For bfloat16: the first two in training and in the encoder, the others in training: linear layers for their gradients,
which are most of its work.
Against torch's own operations, compiled, on 2 cores with AVX-512 (ms; the last two from numbers that are in no cache):

    what                                                        torch  kernel
    attention, (56, 128, 8, 32), forward / backward         6.2 / 9.6   2.1 / 4.6
    attention, (14, 256, 8, 32), forward / backward         8.0 / 8.3   1.8 / 4.0
    attention, (8, 1024, 8, 32), forward alone                     67          28
    gated GELU, 7168 x 768, forward / backward              1.4 / 2.3   0.6 / 0.9
    linear, 7168 x 256 to 768, forward / backward           3.0 / 7.1   2.8 / 5.9
    linear, 7168 x 256 to 256, forward / backward           1.0 / 2.4   0.9 / 2.0

On 2 cores with AMX, attention of (56, 128, 8, 32) takes 7.9 / 23.5 by AVX-512, and in tiles 4.1 / 12.6; a product of
3584 x 512 with a weight to 384 is 1.2 to 1.5 times as fast as by torch, of 448 rows 2 to 2.6 times. Dropout of
7168 x 512, forward alone, takes 20 to 29 there by torch, compiled, and 1.5 to 2.1 by the kernel; attention of
(14, 256, 8, 32) with dropout, forward and backward, by torch, eager, 78 to 122, and 14 to 21.

Attention keeps two numbers per query rather than weights for the backward pass. It reads the mask apart, and the bias
by distance: T+S-1 numbers per head, which stay in the first cache, rather than T*S.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gqa_exp.model import native

VECTOR, PANEL = 16, 32
NUMBERS = 1 << 16
"""Values that an element's random number may take in dropout, see dropout.h."""
LEAST_ROWS = 256
"""Of a linear layer's inputs: with fewer the kernel is no faster than torch's products, and its calls cost more."""
MOST_SUMS, MOST_SUMS_IN_TILES = 384 * 256, 512 * 512
"""Of a weight's gradient, that a thread computes at a time: about half of its second cache."""


def serves(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Whether there is a kernel for attention of such numbers."""
    return device.type == "cpu" and dtype == torch.bfloat16 and native.serves_attention(dtype, head_dim)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _threads() -> int:
    """Of torch's operations; torch.compile, whose graph the question would break, takes the answer for good."""
    return torch.get_num_threads()


def serves_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, bias: Tensor | None, mask: Tensor | None) -> bool:
    """Whether the kernel computes this `attention`, and has a KV head for each thread."""
    B, _, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    alike = q_BTHK.dtype == k_BSGK.dtype == v_BSGK.dtype and k_BSGK.shape == v_BSGK.shape
    fits = alike and (len(k_BSGK), k_BSGK.shape[3], H % G) == (B, K, 0) and _threads() <= B * G
    by_distance = bias is None or (bias.dim() == 2 and bias.dtype in (torch.float32, torch.bfloat16))
    key_mask = mask is None or (mask.shape[1:3] == (1, 1) and not mask.requires_grad)
    return fits and by_distance and key_mask and serves(q_BTHK.dtype, q_BTHK.device, K)


def attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    bias_HL: Tensor | None,
    mask: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention in bfloat16 of H query heads over G key/value heads, (B, T, H, K), with gradients of all but the mask.

    Args:
        q_BTHK: queries.
        k_BSGK: keys.
        v_BSGK: values.
        bias_HL: added to the scores by distance, (H, T+S-1), see `by_position` in attention.py; float32 or bfloat16, or
            None.
        mask: added too, (B|1, 1, 1, S), of any floating type.
        dropout: probability of dropping an attention weight, see `dropout`.

    Raises:
        MemoryError: no room to work in.
        ValueError: the bias has not one number for each head and distance.
    """
    mask_BS = None if mask is None else mask[:, 0, 0].float().expand(len(q_BTHK), k_BSGK.shape[1])
    out: Tensor = _attention(q_BTHK, k_BSGK, v_BSGK, bias_HL, mask_BS, *_drawn(dropout))[0]
    return out


@torch.library.custom_op("gqa_exp::sequence_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, seed: Tensor | None, dropped: int
) -> tuple[Tensor, Tensor]:
    """The output, and what the softmax of each query took, (B, H, T, 2), for the backward pass."""
    out, softmax = _outputs(q)
    _call_attention("forward", (q, k, v, bias, mask, seed), (out, softmax), dropped)
    return out, softmax


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return _like(q), q.new_empty((B, H, T, 2), dtype=torch.float32)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(q)


@torch.library.custom_op("gqa_exp::sequence_attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    softmax: Tensor,
    d_out: Tensor,
    dropped: int,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias (H, T+S-1), the last empty if not asked for."""
    B, G = len(q), k.shape[2]
    gradients = _like(q), _like(k), _like(v)
    # As many shares of the batch as give all threads the same number of KV heads of a share, each with its own sums.
    threads = torch.get_num_threads()
    shares = max(1, min(B, threads // math.gcd(threads, G)))
    d_bias = None
    if bias is not None and with_bias:  # of queries of even and of odd place
        H, L = bias.shape
        d_bias = q.new_zeros((shares, H, 2, L), dtype=torch.float32)
    given = (q, k, v, bias, mask, seed, out, softmax, d_out)
    _call_attention("backward", given, (*gradients, d_bias), dropped, shares)
    return *gradients, q.new_empty(0, dtype=torch.float32) if d_bias is None else d_bias.sum((0, 2))


@_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, with_bias = rest
    shape = bias.shape if bias is not None and with_bias else (0,)
    return _like(q), _like(k), _like(v), q.new_empty(shape, dtype=torch.float32)


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropped = inputs
    ctx.save_for_backward(*tensors, *output)


def _attention_gradients(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    with_bias = ctx.needs_input_grad[3]
    saved = ctx.saved_tensors  # once: checkpointing computes them again at each look
    d_q, d_k, d_v, d_bias = _attention_backward(*saved, d_out, ctx.dropped, with_bias)
    return d_q, d_k, d_v, d_bias.to(saved[3].dtype) if with_bias else None, None, None, None


_attention.register_autograd(_attention_gradients, setup_context=_keep_attention)


def _call_attention(
    direction: str, given: Sequence[Tensor | None], results: Sequence[Tensor | None], dropped: int, shares: int = 1
) -> None:
    """Call the kernel, whose order of tensors and sizes this is.

    Raises:
        MemoryError: no room to work in.
        ValueError: the bias has not one number for each head and distance.
    """
    q, k, bias = given[0], given[1], given[3]
    assert q is not None
    assert k is not None
    held = [None if tensor is None else tensor.contiguous() for tensor in given]
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    if bias is not None:
        check_distances(bias, H, T, S)
    sizes = (ctypes.c_long * 7)(B, T, S, G, H // G, dropped, shares)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (*held, *results)]
    kind = "float32" if bias is None else _name(bias)
    if _kernel(f"{direction}_{K}_{kind}")((ctypes.c_void_p * len(pointers))(*pointers), sizes):
        raise MemoryError(f"no memory for attention of {T} queries over {S} keys")


def check_distances(bias: Tensor, H: int, T: int, S: int) -> None:
    """Check that a bias by distance is one of H heads, T queries and S keys.

    Raises:
        ValueError: it is not.
    """
    if bias.shape != (H, T + S - 1):
        raise ValueError(f"a bias of {tuple(bias.shape)} for {H} heads and {T + S - 1} distances")


def serves_gated_gelu(x: Tensor, y: Tensor) -> bool:
    """Whether the kernel computes this `gated_gelu`."""
    alike = x.dtype == y.dtype == torch.bfloat16 and x.shape == y.shape and x.shape[-1] % VECTOR == 0
    return alike and x.device.type == "cpu" and native.has_bfloat16()


def gated_gelu(x: Tensor, y: Tensor, dropout: float = 0.0) -> Tensor:
    """gelu(x) * y in bfloat16, GELU in tanh's approximation, then `dropout` of this probability; with gradients."""
    out: Tensor = _gated_gelu(x, y, *_drawn(dropout))
    return out


@torch.library.custom_op("gqa_exp::gated_gelu", mutates_args=())
def _gated_gelu(x: Tensor, y: Tensor, seed: Tensor | None, dropped: int) -> Tensor:
    out = _like(x)
    _call("gated_gelu", seed, dropped, x, y, out)
    return out


@_gated_gelu.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return _like(x)


@torch.library.custom_op("gqa_exp::gated_gelu_backward", mutates_args=())
def _gated_gelu_backward(
    x: Tensor, y: Tensor, seed: Tensor | None, dropped: int, d_out: Tensor
) -> tuple[Tensor, Tensor]:
    d_x, d_y = _like(x), _like(y)
    _call("gated_gelu_backward", seed, dropped, x, y, d_out, d_x, d_y)
    return d_x, d_y


@_gated_gelu_backward.register_fake
def _(x: Tensor, y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(x), _like(y)


def _keep_gated_gelu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.dropped = inputs
    ctx.save_for_backward(*tensors)


_gated_gelu.register_autograd(
    lambda ctx, d_out: (*_gated_gelu_backward(*ctx.saved_tensors, ctx.dropped, d_out), None, None),
    setup_context=_keep_gated_gelu,
)


def serves_dropout(x: Tensor) -> bool:
    """Whether the kernel computes this `dropout`: where numbers are bfloat16, or come to be under autocast."""
    typed = x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and _autocasts())
    return typed and x.device.type == "cpu" and native.has_bfloat16()


def _autocasts() -> bool:
    """Whether autocast makes bfloat16 of products' sides on a CPU."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def dropout(x: Tensor, probability: float) -> Tensor:
    """Zero elements with a probability, and scale the others so that the mean stays, by the kernel where it serves.

    The kernel draws numbers of 16 bits: the probability is rounded to a multiple of 1/65536, and the scale follows from
    the rounded one. The numbers follow from a seed, drawn from torch's generator at each call (compiled, by 32 bits of
    it), and are drawn again for the gradient, not stored.

    Raises:
        ValueError: the probability is not in [0, 1).
    """
    if not probability:
        return x
    if not serves_dropout(x):
        return F.dropout(x, probability)
    out: Tensor = _dropout(x, *_drawn(probability))
    return out


class Dropout(nn.Dropout):
    """nn.Dropout by the kernel where that serves."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return dropout(x, self.p) if self.training else x


@torch.library.custom_op("gqa_exp::dropout", mutates_args=())
def _dropout(x: Tensor, seed: Tensor | None, dropped: int) -> Tensor:
    out = _like(x)
    _call(f"dropout_{_name(x)}", seed, dropped, x, out)
    return out


@_dropout.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return _like(x)


def _keep_dropout(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.dropped = inputs
    ctx.save_for_backward(seed)


_dropout.register_autograd(
    lambda ctx, d_out: (_dropout(d_out, *ctx.saved_tensors, ctx.dropped), None, None), setup_context=_keep_dropout
)


def _drawn(probability: float) -> tuple[Tensor | None, int]:
    """A seed, if anything may be dropped, and how many of 65536 equally probable numbers drop an element."""
    if not 0 <= probability < 1:
        raise ValueError(f"dropout={probability} must be 0 or more, and below 1")
    dropped = min(round(probability * NUMBERS), NUMBERS - 1)
    # By an operation that torch.compile knows to be random, and neither leaves out nor repeats.
    return (torch.randint(1 << 62, (1,), device="cpu") if dropped else None), dropped


def serves_linear(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes this `linear`: in training, with a block of a weight's gradient for each thread.

    Not on processors with AMX, which torch's products use, unless it uses that too.
    """
    on_cpu = x.device.type == weight.device.type == "cpu"
    kernels = native.has_bfloat16() and native.has_tiles() == native.multiplies_in_tiles()
    if not (on_cpu and torch.is_grad_enabled() and kernels):
        return False  # before sizes are looked at, on which a compiled graph would then depend
    numbers = (torch.float32, torch.bfloat16)
    alike = x.dtype == weight.dtype == torch.bfloat16
    typed = x.dtype in numbers and weight.dtype in numbers if _autocasts() else alike
    whole = all(size and size % PANEL == 0 for size in weight.shape)
    fits = weight.dim() == 2 and x.shape[-1] == weight.shape[1] and whole
    return typed and fits and PANEL * _threads() <= max(weight.shape) and math.prod(x.shape[:-1]) >= LEAST_ROWS


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Product x W^T, (..., inputs) to (..., outputs), by the kernel where it serves.

    Args:
        x: (..., inputs).
        weight: (outputs, inputs). The kernel rounds one in float32 to bfloat16, and gives its gradient in float32.

    Raises:
        MemoryError: no room to work in.
    """
    if not serves_linear(x, weight):
        return F.linear(x, weight)
    y: Tensor = _linear(x.to(torch.bfloat16), weight)
    return y


class Linear(nn.Linear):
    """nn.Linear without a bias, which trains by the kernel where that serves."""

    def __init__(self, inputs: int, outputs: int, device: str | None = None) -> None:
        super().__init__(inputs, outputs, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return linear(x, self.weight)


@torch.library.custom_op("gqa_exp::sequence_linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    y = x.new_empty((*x.shape[:-1], len(weight)))
    _call_linear(f"linear_outputs_{_name(weight)}", weight.shape, x, weight, _panels(weight), y)
    return y


@_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


@torch.library.custom_op("gqa_exp::sequence_linear_backward", mutates_args=())
def _linear_backward(x: Tensor, weight: Tensor, d_y: Tensor, with_x: bool, with_weight: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x, in bfloat16, and of the weight, in float32; empty if not asked for."""
    d_x, d_weight = gradients = _gradients_of_linear(x, weight, with_x, with_weight)
    d_y = d_y.contiguous()
    if with_x:
        _call_linear(f"linear_input_gradient_{_name(weight)}", weight.shape, d_y, weight, _panels(weight), d_x)
    if with_weight:
        _call_linear("linear_weight_gradient", weight.shape, d_y, x, d_weight)
    return gradients


@_linear_backward.register_fake
def _(x: Tensor, weight: Tensor, d_y: Tensor, with_x: bool, with_weight: bool) -> tuple[Tensor, Tensor]:
    return _gradients_of_linear(x, weight, with_x, with_weight)


def _gradients_of_linear(x: Tensor, weight: Tensor, with_x: bool, with_weight: bool) -> tuple[Tensor, Tensor]:
    d_x = _like(x) if with_x else x.new_empty(0)
    return d_x, weight.new_empty(weight.shape if with_weight else 0, dtype=torch.float32)


def _keep_linear(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_gradients(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    with_x, with_weight = ctx.needs_input_grad
    x, weight = ctx.saved_tensors
    d_x, d_weight = _linear_backward(x, weight, d_y, with_x, with_weight)
    return d_x if with_x else None, d_weight.to(weight.dtype) if with_weight else None


_linear.register_autograd(_linear_gradients, setup_context=_keep_linear)


def _panels(weight: Tensor) -> Tensor:
    """Room for the weight in the order that products read it in."""
    return weight.new_empty(weight.shape, dtype=torch.bfloat16)


def _call_linear(name: str, weight: Sequence[int], *tensors: Tensor) -> None:
    """Call a kernel for a weight of this shape; the first tensor has a row for each that it is to be applied to.

    Raises:
        MemoryError: no room to work in.
    """
    held = [tensor.contiguous() for tensor in tensors]
    outputs, inputs = weight
    threads = torch.get_num_threads()
    most = MOST_SUMS_IN_TILES if native.multiplies_in_tiles() else MOST_SUMS
    blocks = threads * max(1, round(outputs * inputs / threads / most))
    rows = held[0].numel() // held[0].shape[-1]
    sizes = (ctypes.c_long * 4)(rows, outputs, inputs, blocks)
    if _kernel(name)(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in held), sizes):
        raise MemoryError(f"no memory to lay out {rows} rows of {outputs} and {inputs} numbers")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _call(name: str, seed: Tensor | None, dropped: int, *tensors: Tensor) -> None:
    """Call a kernel of `sequence_pointwise.cpp`, for all elements of tensors of one shape."""
    held = [tensor.contiguous() for tensor in tensors]
    pointers = (None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in (seed, *held))
    _kernel(name)(next(pointers), ctypes.c_long(dropped), *pointers, ctypes.c_long(held[0].numel()))


def _kernel(name: str) -> Callable[..., int]:
    function: Callable[..., int] = getattr(native.library(), name)
    return function
