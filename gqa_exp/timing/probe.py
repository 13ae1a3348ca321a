"""How fast this machine reads memory and multiplies: the yardsticks beside what decoding achieves.

A decode step reads every weight and every cached key and value once and computes little with them, so its time is
bounded below by those bytes over this bandwidth. A plain read is measured in the same process, with the same threads.
"""

import itertools
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from gqa_exp.timing.cost import Device

CACHE_MULTIPLE = 8
"""The buffer is this many times the last-level cache, so that at most an eighth of a pass can come from it."""
SMALLEST_BUFFER = 256 * 2**20
LARGEST_BUFFER = 4 * 2**30
CUDA_BUFFER = 2 * 2**30
"""Several tens of times the last-level cache of any GPU (50 MB on H100)."""


def synchronised_clock(device: str) -> Callable[[], float]:
    """A clock in seconds that waits for the device's queued work before each reading.

    Args:
        device: "cpu" or "cuda".
    """
    if device == "cpu":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


class PlainRead:
    """A sum over a buffer several times the last-level cache: what reading memory takes at that moment.

    Args:
        device: "cpu" (as many threads as torch uses) or "cuda".
    """

    def __init__(self, device: str = "cpu") -> None:
        if device == "cuda":
            size = min(CUDA_BUFFER, torch.cuda.mem_get_info()[0] // 2)
        else:
            size = min(max(SMALLEST_BUFFER, CACHE_MULTIPLE * last_level_cache_bytes()), LARGEST_BUFFER)
            size = min(size, psutil.virtual_memory().available // 4)
        # Ones, not empty: untouched pages all map to one page of zeros, which the cache would serve.
        self.buffer = torch.ones(max(1, size // 4), dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes that a pass reads."""
        return self.buffer.nbytes

    def seconds(self, clock: Callable[[], float], passes: int) -> list[float]:
        """Time of each of a number of passes, by a clock that waits for the device."""
        readings = [clock()]
        for _ in range(passes):
            self.buffer.sum()
            readings.append(clock())
        return [after - before for before, after in itertools.pairwise(readings)]


def memory_bandwidth(device: str = "cpu", repeats: int = 9) -> float:
    """Bytes per second of a plain read of memory, median of the repeats.

    Args:
        device: "cpu" or "cuda".
        repeats: passes that are counted, after two that are not.

    Returns:
        Bytes per second, finite and positive.
    """
    read = PlainRead(device)
    seconds = read.seconds(synchronised_clock(device), repeats + 2)[2:]
    return read.nbytes / max(statistics.median(seconds), 1e-9)


def matmul_flops(device: str, dtype: str, repeats: int = 5) -> float:
    """FLOP/s of a product of two square matrices of 2048 (8192 on a GPU), median of the repeats after two."""
    size = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(getattr(torch, dtype))
    clock = synchronised_clock(device)
    seconds = []
    for _ in range(repeats + 2):
        start = clock()
        a @ b
        seconds.append(clock() - start)
    return float(2 * size**3 / max(statistics.median(seconds[2:]), 1e-9))


def local_device(device: str, dtype: str) -> Device:
    """This host, or its GPU, as the cost model sees it: bandwidth and peak by the two probes.

    Args:
        device: "cpu" or "cuda".
        dtype: the number format whose peak is probed.
    """
    on_gpu = device == "cuda"
    memory = torch.cuda.mem_get_info()[1] if on_gpu else psutil.virtual_memory().total
    return Device(
        "this host's GPU" if on_gpu else "this host",
        memory_bandwidth(device),
        {dtype: matmul_flops(device, dtype)},
        memory,
        "probed: plain read of memory, product of large matrices",
    )


def last_level_cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the last-level cache that the first core sees; 32 MiB where the system does not tell.

    Args:
        folder: where Linux describes the caches, one `indexN/size` each (such as "32768K").
    """
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    sizes = []
    for path in folder.glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", path.read_text(encoding="ascii").strip())
        if match:
            sizes.append(int(match[1]) * units[match[2]])
    return max(sizes, default=32 * 2**20)
