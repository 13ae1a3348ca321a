"""Builds the kernels of this folder, `*.cpp`, and calls those of decode steps: at the speed of the memory.

They are compiled once per host, in a few seconds, when first asked for. A CPU with AVX-512 in bfloat16 has all of them,
another with AVX2 those of decode steps in float32 and of Adafactor; elsewhere, and where there is no compiler, torch's
operations serve. `sequence.py` calls those for whole sequences, and the optimizer its own.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Sources = dict[str, tuple[str, ...]]
WITH_BFLOAT16: Sources = {
    "adafactor": (),
    "decode_attention": ("-ffast-math",),
    "decode_linear": ("-ffast-math",),
    "decode_step": (),
    "sequence_attention": (),
    "sequence_linear": (),
    "sequence_pointwise": (),
}
"""The kernels and their flags. With -ffast-math compilers take it that there is no NaN; in training one must show."""
FLOAT32_ALONE: Sources = {"adafactor": (), "decode_float32": ("-ffast-math",), "decode_step": ()}
"""The same for a CPU without bfloat16."""
HEADERS = ("common", "dropout", "products", "tiles", "vectors")
COMPILE = ("-c", "-O3", "-march=native", "-fopenmp", "-fPIC")
LINK = ("-shared", "-fopenmp")
"""Without -ffast-math, with which GCC would link code that makes the whole process flush small numbers to zero."""
NEEDED = (({"avx512f", "avx512_bf16"}, WITH_BFLOAT16), ({"avx2", "fma"}, FLOAT32_ALONE))
"""Features of the CPU and the kernels for them; the first that it has all of count."""
HEAD_DIMS = (32, 64, 128)
OUTPUTS, TILE_INPUTS, TILE_OUTPUTS = 32, 32, 16
"""Outputs computed at a time, and the tiles that bfloat16 weights are packed in, as `decode_linear.cpp` reads them."""


def serves_attention(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel is there for such a cache."""
    if dtype == torch.bfloat16:
        return head_dim in HEAD_DIMS and has_bfloat16()
    return head_dim in HEAD_DIMS and dtype == torch.float32 and is_built()


def attend(q_BGRK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of one query position per sequence, (B, G, R, K).

    Args:
        q_BGRK: contiguous but for the step between sequences.
        k_BGSK: the first S positions of a contiguous cache.
        v_BGSK: the same.
        bias: added to the scores, broadcastable to (B, G, R, S), its last axis contiguous; or None.

    Raises:
        TypeError: they are of several number formats.
    """
    check_alike(q_BGRK, k_BGSK, v_BGSK, bias)
    B, G, R, K = q_BGRK.shape
    end = k_BGSK.shape[2]
    out_BGRK = q_BGRK.new_empty(q_BGRK.shape)
    strides: tuple[int, ...] = (0, 0, 0)
    if bias is not None:
        bias = bias.expand(B, G, R, end)
        strides = bias.stride()[:3]
    sizes = (ctypes.c_long * 9)(B, G, R, end, q_BGRK.stride(0), k_BGSK.stride(1), *strides)
    pointers = (None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (q_BGRK, k_BGSK, v_BGSK, bias, out_BGRK))
    attention_kernel(q_BGRK.dtype, K)(*pointers, sizes)
    return out_BGRK


def pack(weight: Tensor, gated: bool = False) -> Tensor | None:
    """A weight (outputs, inputs) in the order in which `linear` reads it; None where there is no kernel for it.

    If gated, 16 outputs of the first half, the gate, and 16 of the second come in turn. Then float32:
    (outputs / 32, inputs, 32), or bfloat16: (outputs / 16, inputs / 32, 16 pairs of inputs, 16 outputs, 2).
    """
    outputs, inputs = weight.shape
    if weight.device.type != "cpu" or outputs % OUTPUTS or library() is None:
        return None
    if gated:
        weight = weight.view(2, -1, OUTPUTS // 2, inputs).transpose(0, 1).reshape(outputs, inputs)
    if weight.dtype == torch.float32 and inputs % 16 == 0:
        return weight.view(-1, OUTPUTS, inputs).transpose(1, 2).contiguous()
    if weight.dtype == torch.bfloat16 and inputs % TILE_INPUTS == 0 and has_bfloat16():
        tiles = weight.view(outputs // TILE_OUTPUTS, TILE_OUTPUTS, inputs // TILE_INPUTS, TILE_INPUTS // 2, 2)
        return tiles.permute(0, 2, 3, 1, 4).contiguous()
    return None


def linear(
    x: Tensor,
    packed: Tensor,
    outputs: int,
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """norm(x) W^T, gated, plus a residual, each as asked: (..., inputs) to (..., outputs), half as many if gated.

    For any number of rows, best for those of a decode step.

    Args:
        x: in the packed weight's number format.
        packed: the weight, from `pack`.
        outputs: rows of the weight.
        norm: weight of the RMS norm of x (inputs), or None for x as it is.
        epsilon: the norm's.
        gated: as the weight was packed; results are gelu(gate) * the other half.
        residual: added to the results, of their shape.

    Raises:
        MemoryError: no room for a copy of x.
        TypeError: they are of several number formats.
    """
    check_alike(x, packed, norm, residual)
    x = x.contiguous()
    inputs = x.shape[-1]
    y = x.new_empty((*x.shape[:-1], outputs // 2 if gated else outputs))
    if not x.numel():
        return y
    tensors = (x, norm, packed, None if residual is None else residual.contiguous(), y)
    sizes = (ctypes.c_long * 4)(x.numel() // inputs, inputs, outputs, gated)
    if linear_kernel(x.dtype)(*(None if t is None else t.data_ptr() for t in tensors), sizes, epsilon):
        raise MemoryError(f"no memory to lay out {tuple(x.shape)} inputs")
    return y


torch.library.custom_op("gqa_exp::linear", linear, mutates_args=()).register_fake(
    lambda x, packed, outputs, norm=None, epsilon=0.0, gated=False, residual=None: x.new_empty(
        (*x.shape[:-1], outputs // 2 if gated else outputs)
    )
)


def check_alike(first: Tensor, *others: Tensor | None) -> None:
    """Check that tensors are of one number format: the kernels would take the bits of one for those of another.

    Raises:
        TypeError: they are not.
    """
    for other in others:
        if other is not None and other.dtype != first.dtype:
            raise TypeError(f"number formats differ: {first.dtype} and {other.dtype}")


@functools.cache
def attention_kernel(dtype: torch.dtype, head_dim: int) -> Callable[..., None]:
    """The kernel behind `attend`, where `serves_attention`."""
    function: Callable[..., None] = getattr(library(), f"{str(dtype).removeprefix('torch.')}_{head_dim}")
    return function


@functools.cache
def linear_kernel(dtype: torch.dtype) -> Callable[..., int]:
    """The kernel behind `linear`."""
    function = getattr(library(), f"linear_{str(dtype).removeprefix('torch.')}")
    function.argtypes = (*[ctypes.c_void_p] * 5, ctypes.POINTER(ctypes.c_long), ctypes.c_float)
    return function  # type: ignore[no-any-return]


@functools.cache
def step_kernel() -> Callable[..., int]:
    """The one that runs these two for a whole decode step, see `decode_step.py`."""
    function: Callable[..., int] = library().decode_step  # type: ignore[union-attr]
    pointer = ctypes.c_void_p
    function.argtypes = (pointer, pointer, ctypes.c_long, pointer, ctypes.c_long, pointer)  # type: ignore[attr-defined]
    return function


def use_tiles(wanted: bool) -> bool:
    """Whether products in bfloat16 use AMX from now on: as wanted, where CPU and system have it. It is on at first.

    What was compiled with the other answer does not fit this one.
    """
    found = library()
    return found is not None and has_bfloat16() and bool(found.use_tiles(wanted))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies_in_tiles() -> bool:
    """Whether products in bfloat16 use AMX now."""
    return has_bfloat16() and ctypes.c_bool.in_dll(library(), "in_tiles").value  # type: ignore[arg-type]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_built() -> bool:
    """Whether there are kernels on this host; torch.compile takes the answer for good."""
    return library() is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_bfloat16() -> bool:
    """Whether those for bfloat16 are among them, and so those for whole sequences."""
    return hasattr(library(), "linear_bfloat16")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_tiles() -> bool:
    """Whether the processor has AMX, which torch's products use for bfloat16."""
    return " amx_bf16 " in f"{_cpu()} "


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where this host cannot have any."""
    sources = _sources()
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not sources:
        return None
    files = (*map(_source, sources), *(_source(name, ".h") for name in HEADERS))
    facts = [*(file.read_bytes() for file in files), repr((compiler, sources, COMPILE, LINK, _cpu())).encode()]
    key = hashlib.sha256(b"\0".join(facts)).hexdigest()[:16]
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gqa_exp" / f"kernels-{key}.so"
    try:
        if not path.exists():
            _build(compiler, sources, path)
        built = ctypes.CDLL(str(path))  # its OpenMP is torch's: both ask for libgomp.so.1, which is loaded already
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("no compiled kernels (%s); torch's operations serve", error)
        return None
    if sources is WITH_BFLOAT16:
        built.use_tiles(True)
    return built


def _sources() -> Sources:
    features = set(_cpu().split())
    return next((sources for needed, sources in NEEDED if features >= needed), {})


def _source(name: str, suffix: str = ".cpp") -> Path:
    return Path(__file__).with_name(name + suffix)


def _build(compiler: str, sources: Sources, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # renamed, so that no process meets half a file
        linked = Path(folder) / path.name
        compiled = [str(Path(folder) / f"{name}.o") for name in sources]
        commands = [
            [compiler, *COMPILE, *flags, str(_source(name)), "-o", to]
            for (name, flags), to in zip(sources.items(), compiled, strict=True)
        ]
        for command in (*commands, [compiler, *LINK, *compiled, "-o", str(linked)]):
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        linked.replace(path)


@functools.cache
def _cpu() -> str:
    """Model and features of the processor; empty where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    wanted = ("model name", "flags")
    return " ".join(next((line.partition(":")[2] for line in lines if line.startswith(name)), "") for name in wanted)
