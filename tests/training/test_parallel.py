"""Several processes train as one does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel import GEOMETRY, batch

from gqa_exp.config import TrainerConfig
from gqa_exp.errors import InputError
from gqa_exp.model import T5
from gqa_exp.training.loop import Recipe, train
from gqa_exp.training.state import TrainingState, save_shards

SCRIPT = Path(__file__).with_name("parallel.py")


def run(folder: Path, strategy: str, devices: int, *start: Path) -> tuple[dict[str, Any], TrainingState]:
    words = [sys.executable, str(SCRIPT), str(folder), strategy, str(devices), *map(str, start)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((folder / f"{strategy}.json").read_text())
    assert record["ranks"] == devices
    return record, TrainingState.load(folder / strategy)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], TrainingState]:
    return run(tmp_path_factory.mktemp("alone"), "auto", 1)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_follow_the_curve_of_one(
    strategy: str, alone: tuple[dict[str, Any], TrainingState], tmp_path: Path
) -> None:
    (record, of_one), expected = alone, alone[0]["curve"]
    together, of_two = run(tmp_path, strategy, 2)
    found = together["curve"]
    assert together["tokens"] == record["tokens"]
    assert [step for step, _ in found] == list(range(1, 51))
    assert expected[0][1] - expected[-1][1] > 0.5, "the run must learn something"
    apart = max(abs(ours - theirs) for (_, ours), (_, theirs) in zip(found, expected, strict=True))
    print(f"{strategy}: largest difference of the loss over 50 steps {apart:.1e}")
    assert apart < 1e-3
    for name, weight in of_one.model.state_dict().items():
        torch.testing.assert_close(of_two.model.state_dict()[name], weight, rtol=1e-2, atol=1e-3, msg=name)
    assert of_two.slots.keys() == of_one.slots.keys()
    weights = [torch.cat([w.flatten() for w in state.model.state_dict().values()]) for state in (of_one, of_two)]
    assert not torch.equal(*weights), "the same order of sums, so the same process"

    # What they kept after step 49 goes on in one process.
    kept = tmp_path / f"{strategy} kept"
    shards = sorted(path.name for path in kept.glob("shard-*"))
    both = ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"]
    assert shards == (both if strategy == "fsdp" else [])
    resumed = TrainingState.load(kept)
    assert resumed.step == 49
    config = TrainerConfig(precision="32-true", compile=False, threads=1)
    same_state(train(resumed, Recipe("pretrain", 0, batch, lambda step: 0.02, stop=50), config, label="on"), of_two)
    if strategy == "fsdp":  # and on two again
        (tmp_path / "again").mkdir()
        same_state(run(tmp_path / "again", strategy, 2, kept)[1], of_two)


def same_state(ours: TrainingState, theirs: TrainingState) -> None:
    assert ours.step == theirs.step
    for mine, other in ((ours.model.state_dict(), theirs.model.state_dict()), (ours.slots, theirs.slots)):
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_state_with_a_missing_shard_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = T5(GEOMETRY)
    for rank in (1, 0):
        rows = {name: torch.chunk(weight, 2)[rank] for name, weight in model.state_dict().items()}
        if rank == 1:
            (tmp_path / ".state.shards").mkdir()
        save_shards(tmp_path / "state", GEOMETRY, rows, {}, 7, {"tokens": 3}, rank, 2, lambda: None)
    with pytest.raises(InputError, match="shard 1 of 2 is missing"):
        TrainingState.load(tmp_path / "state")
