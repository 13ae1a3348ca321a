"""What this host can do, and settings of the process that make training and decoding on it fast.

Only the choice of a number format changes results; it is made once, before any key is computed, and recorded.
"""

import ctypes
import logging
import os
import shutil
import sys

import psutil
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only

from gqa_exp.config import Config, TrainerConfig
from gqa_exp.errors import InputError

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


def physical_cores() -> int:
    """Physical cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or usable, usable)


def prepare(threads: int | None) -> None:
    """Set the thread count (None: this rank's share of the physical cores it may use) and the allocator."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, physical_cores() // ranks))
    keep_freed_memory()


def quiet_libraries() -> None:
    """Keep what libraries log at every turn out of a run's output; their warnings stay."""
    for name in ("httpx", "datasets", "fontTools", "absl", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def first_process() -> bool:
    """Whether this is the only process of a run, or rank 0 of several: the one that writes, and speaks for all."""
    rank: int | None = getattr(rank_zero_only, "rank", None)
    return not rank


def device_of(accelerator: str) -> str:
    """The device that an accelerator setting ("cpu", "gpu" or "auto") means here: "cpu" or "cuda"."""
    return "cuda" if accelerator == "gpu" or (accelerator == "auto" and torch.cuda.is_available()) else "cpu"


def check_launch(config: TrainerConfig) -> None:
    """Check that a run has one process per device: neither fewer nor, each of them believing itself alone, more.

    Raises:
        InputError: it has not; says how to start it.
    """
    wanted = config.devices * config.num_nodes
    slurm = os.environ.get("SLURM_NTASKS") if SLURMEnvironment.detect() else None
    started = int(os.environ.get("WORLD_SIZE") or slurm or 1)
    if os.environ.get("TORCHELASTIC_RUN_ID") == "none":  # torchrun's default
        raise InputError(
            "torchrun gave the run no name, by which its ranks know each other; add --standalone or --rdzv-id"
        )
    if started != wanted:
        raise InputError(
            f"trainer.devices={config.devices} on {config.num_nodes} node(s) needs {wanted} processes, not {started}; "
            f"start them by torchrun --standalone --nproc-per-node {config.devices} -m gqa_exp.run ... (on several "
            "nodes: --nnodes and --rdzv-id), or by srun --kill-on-bad-exit"
        )


def can_compile(accelerator: str) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler, on a GPU too, for code that calls Triton's kernels."""
    if accelerator == "gpu" and not torch.cuda.is_available():
        return False
    return shutil.which(os.environ.get("CXX", "g++")) is not None or shutil.which("clang++") is not None


def check_device(device: str, setting: str) -> None:
    """Check that a device is there.

    Args:
        device: "cpu" or "cuda".
        setting: what asks for it, as the user wrote it.

    Raises:
        InputError: it is a GPU, and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(f'{setting}, but torch finds no GPU here; use "cpu"')


def supports_dtype(dtype: str, device: str) -> bool:
    """Whether the device's matrix library computes in this number format at all (not whether it is fast).

    Args:
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
    """
    if dtype == "float32":
        return True
    if device == "cuda":
        return dtype == "float16" or torch.cuda.is_bf16_supported()
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    name = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}[dtype]
    return bool(getattr(torch.ops.mkldnn, name)())


def resolve_dtype(dtype: str, device: str) -> str:
    """The number format to use: "auto" is bfloat16 where the device computes it, else float32; others stay.

    A CPU without bfloat16 instructions multiplies in it through a reference loop: 0.3 GFLOP/s were measured on an AVX2
    host that reached 150 in float32. So a format that is fast on one host can stall another.

    Args:
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
    """
    if dtype != "auto":
        return dtype
    return "bfloat16" if supports_dtype("bfloat16", device) else "float32"


def resolve_number_formats(config: Config) -> None:
    """Replace every "auto" number format by this host's, in place: keys and results then hold what was really used."""
    device = device_of(config.trainer.accelerator)
    if config.trainer.precision == "auto":
        config.trainer.precision = "bf16-mixed" if resolve_dtype("auto", device) == "bfloat16" else "32-true"
    config.evaluation.dtype = resolve_dtype(config.evaluation.dtype, device)
    config.timing.dtype = resolve_dtype(config.timing.dtype, config.timing.device)
