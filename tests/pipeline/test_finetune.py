"""Fine-tuning until dev gets no better: what is kept, and when it ends."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gqa_exp.config import Config
from gqa_exp.data.tokenizer import default_tokenizer
from gqa_exp.errors import InputError
from gqa_exp.evaluation import Evaluation, Scores
from gqa_exp.model import T5
from gqa_exp.pipeline.plan import Plan
from gqa_exp.pipeline.point import run_point, store_of
from gqa_exp.training import finetune as module
from gqa_exp.training.finetune import finetune
from gqa_exp.training.state import TrainingState


@pytest.mark.parametrize(
    ("scores", "best", "last"),
    [
        (
            [1.0, 3.0, 2.0, 3.0, 1.0, 9.0],
            2,
            5,
        ),  # three looks in a row without a better score; an equal one is no better
        ([1.0, 3.0, 2.0, 1.0, 4.0, 2.0], 5, 6),  # a better one begins the count anew; the steps run out
        ([5.0, 4.0, 3.0, 2.0, 9.0, 9.0], 1, 4),
    ],
)
def test_patience_and_the_best_checkpoint(
    make_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scores: list[float],
    best: int,
    last: int,
) -> None:
    config = make_config()
    config.finetune.steps, config.finetune.evaluate_every, config.finetune.patience = 6, 1, 3
    seen: list[dict[str, torch.Tensor]] = []

    def scripted(model: T5, *_: object, **__: object) -> Evaluation:
        seen.append({name: weight.clone() for name, weight in model.state_dict().items()})
        value = scores[len(seen) - 1]
        return Evaluation([], Scores({"rouge1": value}, {"rouge1": [value]}), 0.0, 0.0)

    monkeypatch.setattr(module, "evaluate_split", scripted)
    start = TrainingState(TrainingState.load(Path(config.model.base or "")).model)
    found = finetune(start, config, default_tokenizer(), label="test", resume_folder=tmp_path / "partial")
    assert len(seen) == last
    assert (found.step, found.record["best_step"], found.record["best_score"]) == (best, best, scores[best - 1])
    assert found.record["steps"] == last
    assert found.record["dev_curve"] == [[step, scores[step - 1]] for step in range(1, last + 1)]
    for name, weight in found.model.state_dict().items():
        assert torch.equal(weight, seen[best - 1][name]), name
    assert any(not torch.equal(seen[0][name], seen[-1][name]) for name in seen[0])


def test_data_that_cannot_be_used_is_said_before_anything_is_computed(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = make_config(num_kv_heads=1, proportion=0.5)
    task = config.task
    task.name, task.train_files, task.dev_files = "custom", [str(tmp_path / "a.jsonl")], [str(tmp_path / "b.jsonl")]
    config.evaluation.split = "dev"
    rows = [{"source": "What is it?", "target": "A test."}] * 3
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text(json.dumps({"source": "What?", "target": ""}) + "\n")
    with pytest.raises(InputError, match=r"b.jsonl: none of the 1 rows has both an input and an output"):
        run_point(config, Plan([config], store_of(config)))
    assert not list((store_of(config).root / "locks").glob("convert-*"))
