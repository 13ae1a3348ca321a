"""What reaches Weights & Biases: read back from the offline run's own file."""

import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only
from wandb.proto.wandb_internal_pb2 import Record

from gqa_exp.config import Config
from gqa_exp.pipeline.tracking import tracking


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    config = Config(output=str(tmp_path))
    config.tracking.mode = "offline"
    return config


def records(folder: Path) -> list[Record]:
    """The run file's records: LevelDB's log format (blocks of 32 KiB, chunks of 7 bytes of header and data)."""
    [path] = (folder / "tracking" / "wandb").glob("offline-run-*/*.wandb")
    data, position, parts, found = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        room = 2**15 - position % 2**15
        if room < 7:  # too little for a header: the rest of the block is padding
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):
            break  # not written to its end yet
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def records_once(folder: Path, complete: Callable[[list[Record]], bool]) -> list[Record]:
    """The same, once they are complete: another process writes them, and may be at it still when the run has ended."""
    deadline = time.monotonic() + 60
    while not complete(found := records(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def kinds(found: list[Record]) -> set[str | None]:
    return {entry.WhichOneof("record_type") for entry in found}


def test_an_offline_run_holds_name_group_tags_and_what_was_logged(config: Config, tmp_path: Path) -> None:
    with tracking(config, "pretrain mini seed 0", "pretrain", "job", ["mini"], "key") as tracker:
        for logger in tracker.loggers:
            logger.log_metrics({"pretrain/heldout_loss": 4.25, "pretrain/step": 500})
    found = records_once(tmp_path, lambda found: kinds(found) >= {"run", "history"})
    [run] = {entry.run.run_id: entry.run for entry in found if entry.WhichOneof("record_type") == "run"}.values()
    assert (run.display_name, run.run_group, run.job_type, list(run.tags)) == (
        "pretrain mini seed 0", "pretrain", "job", ["mini"],
    )  # fmt: skip
    history = [
        {(item.key or "/".join(item.nested_key)): item.value_json for item in entry.history.item}
        for entry in found
        if entry.WhichOneof("record_type") == "history"
    ]
    assert any(row.get("pretrain/heldout_loss") == "4.25" and row.get("pretrain/step") == "500" for row in history)


def test_disabled_writes_nothing(config: Config, tmp_path: Path) -> None:
    config.tracking.mode = "disabled"
    with tracking(config, "name", "group", "job", [], "key") as tracker:
        assert tracker.loggers == []
    assert not (tmp_path / "tracking").exists()


def test_of_several_processes_only_the_first_has_a_run(config: Config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    with tracking(config, "name", "group", "job", [], "key") as tracker:
        assert tracker.loggers == []
    assert not (tmp_path / "tracking").exists()
