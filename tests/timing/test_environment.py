import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

from gqa_exp.timing import probe
from gqa_exp.timing.environment import environment, git_state, hardware_id, supports_dtype
from gqa_exp.timing.probe import PlainRead, last_level_cache_bytes, memory_bandwidth


def test_environment_is_flat_and_jsonable() -> None:
    record = environment()
    assert all(value is None or isinstance(value, str | int | float) for value in record.values())
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["version_torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()


def test_hardware_id_tells_thread_counts_apart() -> None:
    before, threads = hardware_id(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert hardware_id() != before
    finally:
        torch.set_num_threads(threads)
    assert hardware_id() == before


def test_git_state(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    assert git_state(package) == (None, None), "no git"
    git("init")
    assert git_state(package) == (None, None), "inside a repository that does not track it"
    git("add", "package/__init__.py")
    git("commit", "-m", "x")
    commit, dirty = git_state(package)
    assert commit is not None
    assert len(commit) == 40
    assert dirty is False
    (package / "__init__.py").write_text("x = 1\n")
    assert git_state(package) == (commit, True)


def test_float32_is_always_supported() -> None:
    assert supports_dtype("float32", "cpu")


@pytest.mark.skipif(not supports_dtype("bfloat16", "cpu"), reason="no bfloat16 on this CPU")
def test_supported_dtype_really_multiplies() -> None:
    a = torch.ones(8, 8, dtype=torch.bfloat16)
    assert (a @ a)[0, 0] == 8


def test_bandwidth_is_finite_and_positive() -> None:
    bandwidth = memory_bandwidth(repeats=2)
    assert math.isfinite(bandwidth)
    assert bandwidth > 0


def test_a_plain_read_takes_what_passes_between_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SMALLEST_BUFFER", 4096)
    monkeypatch.setattr(probe, "LARGEST_BUFFER", 4096)
    read = PlainRead()
    readings = iter([1.0, 3.0, 3.5, 9.5])
    assert read.nbytes == 4096
    assert read.seconds(lambda: next(readings), 3) == [2.0, 0.5, 6.0]
    with pytest.raises(StopIteration):
        next(readings)


def test_last_level_cache_is_the_largest(tmp_path: Path) -> None:
    assert last_level_cache_bytes(tmp_path) == 32 * 2**20, "where the system does not tell"
    for index, size in enumerate(["32K", "1M", "49152K"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_level_cache_bytes(tmp_path) == 48 * 2**20
