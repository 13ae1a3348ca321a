"""What a result was computed on: times without it mean nothing, and scores without it cannot be traced.

`environment` is recorded with every result row; `hardware_id` is the part of it by which rows are joined to times.
"""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import psutil
import torch

import gqa_exp
from gqa_exp.host import supports_dtype
from gqa_exp.results import Scalar

PACKAGES = (
    "torch",
    "lightning",
    "numpy",
    "scipy",
    "hydra-core",
    "datasets",
    "evaluate",
    "rouge-score",
    "sacrebleu",
    "sentencepiece",
    "safetensors",
)


def environment() -> dict[str, Scalar]:
    """Hardware, system, library versions, state of the code and load of the host, as one flat record.

    Sizes are bytes; `version_NAME` is null for a package that is not installed, `git_commit` and `git_dirty` are null
    where the code is not under git, GPU fields where there is no GPU.
    """
    commit, dirty = git_state(Path(gqa_exp.__file__).parent)
    load = psutil.getloadavg()
    record: dict[str, Scalar] = {
        "cpu": cpu_model(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(logical=True),
        "threads": torch.get_num_threads(),
        "gpu": gpu_name(),
        "gpus": torch.cuda.device_count(),
        "memory": psutil.virtual_memory().total,
        "os": platform.platform(),
        "python": platform.python_version(),
        "bf16_cpu": supports_dtype("bfloat16", "cpu"),
        "bf16_gpu": supports_dtype("bfloat16", "cuda") if torch.cuda.is_available() else None,
        "git_commit": commit,
        "git_dirty": dirty,
        "load_1_minute": load[0],
        "load_5_minutes": load[1],
    }
    for package in PACKAGES:
        record[f"version_{package.replace('-', '_')}"] = _version(package)
    return record


def hardware_id(device: str = "cpu") -> str:
    """A short, stable name of what times depend on: the GPU's model, or the CPU's model and the number of threads.

    Args:
        device: "cpu" or "cuda".
    """
    if device == "cuda":
        return gpu_name() or "no GPU"
    return f"{cpu_model()}, {torch.get_num_threads()} threads"


def cpu_model() -> str:
    """The processor's marketing name, as far as the system tells."""
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_name() -> str | None:
    """Name of the first GPU, None where there is none."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the repository that tracks the package in `folder`.

    Returns:
        (None, None) where there is no git, no commit, or the package merely lies inside some other repository.
    """
    if _output("git", "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    status = _output("git", "-C", str(folder), "status", "--porcelain")
    return (commit, bool(status)) if commit and status is not None else (None, None)


def _output(*command: str) -> str | None:
    """Standard output of a command, None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, env={**os.environ, "LC_ALL": "C"})
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
