"""Builds and calls `decode_attention.cpp`: the attention of a decode step on CPUs with AVX-512 and bfloat16.

It is compiled once per host, in two seconds, when first asked for. Without such a CPU or a compiler there is
none, and torch's operations serve.
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

SOURCE = Path(__file__).with_name("decode_attention.cpp")
COMPILE = ("-c", "-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC")
LINK = ("-shared", "-fopenmp")
"""Without -ffast-math, with which GCC would link code that makes the whole process flush small numbers to zero."""
NEEDED = {"avx512f", "avx512_bf16"}
HEAD_DIMS = (32, 64, 128)
MOST_QUERIES = 8
"""Query heads per KV head up to which it is at least as fast as torch's products; those then compute in tiles."""


def serves(dtype: torch.dtype, head_dim: int, queries: int) -> bool:
    """Whether the kernel is there for such a cache, and worth it for so many query heads per KV head."""
    known = dtype in (torch.float32, torch.bfloat16) and head_dim in HEAD_DIMS
    return known and queries <= MOST_QUERIES and library() is not None


def attend(q_BGRK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of one query position per sequence, (B, G, R, K).

    Args:
        q_BGRK: contiguous but for the step between sequences.
        k_BGSK: the first S positions of a contiguous cache.
        v_BGSK: the same.
        bias: added to the scores, broadcastable to (B, G, R, S), its last axis contiguous; or None.
    """
    B, G, R, K = q_BGRK.shape
    end = k_BGSK.shape[2]
    out_BGRK = q_BGRK.new_empty(q_BGRK.shape)
    strides: tuple[int, ...] = (0, 0, 0)
    if bias is not None:
        bias = bias.expand(B, G, R, end)
        strides = bias.stride()[:3]
    sizes = (ctypes.c_long * 9)(B, G, R, end, q_BGRK.stride(0), k_BGSK.stride(1), *strides)
    pointers = (None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (q_BGRK, k_BGSK, v_BGSK, bias, out_BGRK))
    _function(q_BGRK.dtype, K)(*pointers, sizes)
    return out_BGRK


@functools.cache
def _function(dtype: torch.dtype, head_dim: int) -> Callable[..., None]:
    function: Callable[..., None] = getattr(library(), f"{str(dtype).removeprefix('torch.')}_{head_dim}")
    return function


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None where this host cannot have one."""
    cpu = _cpu()
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not set(cpu.split()) >= NEEDED:
        return None
    source = SOURCE.read_bytes()
    key = hashlib.sha256(b"\0".join([source, *map(str.encode, (compiler, *COMPILE, *LINK, cpu))])).hexdigest()[:16]
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gqa_exp" / f"decode_attention-{key}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                dir=path.parent
            ) as folder:  # renamed, so that no process meets half a file
                compiled, linked = Path(folder) / "kernel.o", Path(folder) / path.name
                for command in (
                    [compiler, *COMPILE, str(SOURCE), "-o", str(compiled)],
                    [compiler, *LINK, str(compiled), "-o", str(linked)],
                ):
                    subprocess.run(command, check=True, capture_output=True, timeout=120)
                linked.replace(path)
        return ctypes.CDLL(str(path))  # its OpenMP is torch's: both ask for libgomp.so.1, which is loaded already
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("no compiled decode attention (%s); torch's operations serve", error)
        return None


def _cpu() -> str:
    """Model and features of the processor; empty where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    wanted = ("model name", "flags")
    return " ".join(next((line.partition(":")[2] for line in lines if line.startswith(name)), "") for name in wanted)
