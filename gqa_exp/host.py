"""Settings of the process that make CPU training and decoding fast; nothing here changes a result."""

import ctypes
import os
import shutil
import sys

import psutil
import torch

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> None:
    """Keep the allocator from returning memory to the kernel; does nothing where libc is not glibc.

    PyTorch frees and allocates activations of many MB at every step. By default glibc maps and unmaps each, and the
    kernel zeroes every page anew. The same as the environment variables MALLOC_MMAP_MAX_=0, MALLOC_TRIM_THRESHOLD_=-1,
    MALLOC_TOP_PAD_ and MALLOC_ARENA_MAX=1, which would have to be set before the process starts.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 1 << 26), (_M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def prepare(threads: int | None) -> None:
    """Set the thread count (None: all physical cores this process may use) and the allocator."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, min(psutil.cpu_count(logical=False) or usable, usable)))
    keep_freed_memory()


def can_compile(accelerator: str) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler on CPU; on GPU Triton brings its own."""
    if accelerator == "gpu":
        return torch.cuda.is_available()
    return shutil.which(os.environ.get("CXX", "g++")) is not None or shutil.which("clang++") is not None
