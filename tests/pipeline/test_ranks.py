"""A point on several processes is the point of one: the store is written once, and holds the same."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gqa_exp.config import Config, TrainerConfig
from gqa_exp.errors import InputError
from gqa_exp.host import check_launch
from gqa_exp.pipeline.plan import Plan
from gqa_exp.pipeline.point import results_folder, run_point, store_of
from gqa_exp.results import read_frame

SCRIPT = Path(__file__).with_name("one_rank.py")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_compute_the_point_of_one(
    strategy: str, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = make_config(num_kv_heads=1, proportion=0.2)
    config.finetune.dropout = 0.0  # each rank draws its own
    alone = run_point(config, Plan([config], store_of(config)))
    config = make_config(num_kv_heads=1, proportion=0.2, output=str(tmp_path / "together"))
    config.finetune.dropout = 0.0
    config.trainer.strategy, config.trainer.devices, config.trainer.micro_batch_tokens = strategy, 2, 48
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(tmp_path / "config.json")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = read_frame(results_folder(config)).to_dict("records")
    assert row["status"] == "done"
    assert row["stages.evaluate"] == alone.stages["evaluate"]
    for name in ("uptrain_steps", "uptrain_tokens", "finetune_steps", "finetune_tokens"):
        assert row[f"training.{name}"] == alone.training[name], name
    assert row["training.uptrain_loss"] == pytest.approx(alone.training["uptrain_loss"], abs=1e-3)
    assert row["training.finetune_loss"] == pytest.approx(alone.training["finetune_loss"], abs=1e-3)
    store = store_of(config).root
    left = {path.relative_to(store) for name in ("uptrain", "finetune") for path in (store / name).iterdir()}
    assert len(left) == 2, "what a rank wrote aside was left behind"
    assert not [*(store / "locks").glob("*.begun"), *(store / "locks").glob("*.agreed")]


def test_several_devices_need_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    check_launch(TrainerConfig())
    with pytest.raises(
        InputError, match="needs 8 processes, not 1; start them by torchrun --standalone --nproc-per-node 4"
    ):
        check_launch(TrainerConfig(devices=4, num_nodes=2))
    monkeypatch.setenv("WORLD_SIZE", "8")
    check_launch(TrainerConfig(devices=4, num_nodes=2))
    with pytest.raises(InputError, match=r"trainer.devices=1 on 1 node\(s\) needs 1 processes, not 8"):
        check_launch(TrainerConfig())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(InputError, match="add --standalone or --rdzv-id"):
        check_launch(TrainerConfig(devices=4, num_nodes=2))
