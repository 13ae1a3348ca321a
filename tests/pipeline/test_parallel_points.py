"""Points in processes of their own are the points of one process, and share what they share."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gqa_exp.config import Config
from gqa_exp.errors import InputError
from gqa_exp.pipeline import parallel
from gqa_exp.pipeline.parallel import places, run_points, seconds_left
from gqa_exp.pipeline.plan import Plan
from gqa_exp.pipeline.point import results_folder, run_point, store_of
from gqa_exp.results import read_frame

Make = Callable[..., Config]


def points(make_config: Make, output: Path) -> list[Config]:
    """Two tasks that share an uptraining, and a third point that shares nothing."""
    configs = [make_config(num_kv_heads=g, proportion=0.2, output=str(output)) for g in (1, 1, 2)]
    configs[1].finetune.lr = 2e-3
    return configs


def test_they_are_the_points_of_one_process(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, together = points(make_config, tmp_path / "alone"), points(make_config, tmp_path / "together")
    for config in alone:
        run_point(config, Plan(alone, store_of(config)))
    begun: list[int] = []
    start = parallel._start

    def observed(config: Config, threads: int, gpu: str | None, path: Path) -> Any:
        begun.append(together.index(config))
        return start(config, threads, gpu, path)

    monkeypatch.setattr(parallel, "_start", observed)
    monkeypatch.setattr(parallel, "physical_cores", lambda: 2)
    assert run_points(together, None, tmp_path / "points") == [0, 0, 0]
    assert begun == [0, 2, 1], "the second would wait for what the first computes"
    assert "uptrain MQA" in (tmp_path / "points" / "0.log").read_text()
    rows = [read_frame(results_folder(configs[0])).sort_values("key") for configs in (alone, together)]
    for name in ("key", "status", "score", "stages.uptrain", "training.uptrain_loss", "training.finetune_loss"):
        assert list(rows[1][name]) == list(rows[0][name]), name
    assert len(list((tmp_path / "together" / "store" / "uptrain").iterdir())) == 2


def test_a_refused_point_ends_the_others_before_they_begin(
    make_config: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.csv").write_text("source,target\n,\n")
    configs = points(make_config, tmp_path / "runs")
    task = configs[0].task
    task.name, task.train_files, task.dev_files, task.test_files = "custom", *[[str(tmp_path / "empty.csv")]] * 3
    assert run_points(configs, 1, tmp_path / "points") == [2, -1, -1]
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    assert "empty.csv" in line


def test_a_failed_point_leaves_the_others(make_config: Make, tmp_path: Path) -> None:
    configs = points(make_config, tmp_path / "runs")
    (store_of(configs[0]).root / "cache").write_text("a file where a folder should be")
    del configs[1]
    configs[1].proportion = 0.0  # needs no corpus
    codes = run_points(configs, 1, tmp_path / "points")
    assert codes == [1, 0]
    assert sorted(read_frame(results_folder(configs[0]))["status"]) == ["done", "failed"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_leaves_no_process(
    number: int, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def sleeping(*_: object) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True))
        if len(started) == 2:
            timer.start()
        return started[-1]

    # Where the tests run in a shell's background it is ignored, by what is started here too.
    at_first = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
    monkeypatch.setattr(parallel, "_start", sleeping)
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)]
    try:
        with pytest.raises(KeyboardInterrupt):
            run_points(points(make_config, tmp_path / "runs"), 2, tmp_path / "points")
    finally:
        signal.signal(signal.SIGINT, at_first)
    timer.join()
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)] == handlers


def test_each_gpu_is_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert places("gpu", None) == ["0", "1", "2", "3"]
    assert places("gpu", 2) == ["0", "1"]
    assert places("cpu", 3) == [None] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5b,7,2,3")
    assert places("gpu", 2) == ["GPU-5b", "7"]
    for count in (5, 0, -1):
        with pytest.raises(InputError, match=f"points={count}: there are 4 GPUs"):
            places("gpu", count)
    with pytest.raises(InputError, match="it must be 1 or more"):
        places("cpu", -1)


def test_a_process_sees_its_gpu_alone(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(parallel.subprocess, "Popen", lambda words, env, **_: seen.update(words=words, env=env))
    config = make_config(num_kv_heads=1)
    config.trainer.threads = None
    parallel._start(config, 3, "5", tmp_path / "0.json")
    assert seen["env"]["CUDA_VISIBLE_DEVICES"] == "5"
    assert seen["words"][-1] == str(tmp_path / "0.json")
    written = json.loads((tmp_path / "0.json").read_text())
    assert (written["num_kv_heads"], written["trainer"]["threads"]) == (1, 3)
    assert config.trainer.threads is None


def test_what_is_left_is_told_by_the_pace_so_far() -> None:
    assert seconds_left(0.0, 0.0, 9.0, 2) == 0
    assert seconds_left(6000.0, 6000.0, 0.0, 2) == pytest.approx(3000)
    # Points of the store alone are done: some seconds have passed, and nearly all is left.
    assert 3000 < seconds_left(6000.0, 5999.0, 19.0, 2) < 3500
    # Half is done, in twice the time that was planned; the other half takes nearly as long.
    assert seconds_left(6000.0, 3000.0, 3000.0, 2) == pytest.approx(3000, rel=0.05)
    assert seconds_left(6000.0, 0.0, 7000.0, 2) == 0


def test_points_of_several_devices_are_refused(make_config: Make, tmp_path: Path) -> None:
    config = make_config()
    config.trainer.devices = 2
    with pytest.raises(InputError, match=r"trainer.devices=2: hydra/launcher=parallel gives each point one device"):
        run_points([config], None, tmp_path)
