"""The positive control of the method: a model that was damaged must be seen to be damaged, on every task.

MQA by random conversion has lost what the base knew of keys and values. Fine-tuned like MHA it must score lower; where
it does not, base, task and recipe together cannot see what this project is built to see.
"""

from pathlib import Path

import pytest

from gqa_exp.cli import compose
from gqa_exp.data.tasks import TASKS
from gqa_exp.evaluation import paired_bootstrap, score
from gqa_exp.host import prepare
from gqa_exp.pipeline.plan import Plan
from gqa_exp.pipeline.point import results_folder, run_point, store_of
from gqa_exp.results import Result, read_examples

SHORT = ["+sweeps=demo", "proportion=0", "timing.enabled=false", "tracking=disabled", "evaluation.max_examples=400"]
"""The demo's recipe, from the shipped base, on enough examples for a narrow interval."""


@pytest.fixture
def all_threads() -> None:
    """Other tests are too small for more than one thread; these train for minutes."""
    prepare(None)


@pytest.mark.slow
@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("task", TASKS)
def test_random_mqa_scores_below_mha(task: str, tmp_path: Path) -> None:
    def point(*overrides: str) -> tuple[Result, list[str], list[list[str]]]:
        config = compose([*SHORT, f"task={task}", f"output={tmp_path}", *overrides])
        row = run_point(config, Plan([config], store_of(config)))
        examples = read_examples(results_folder(config), row.key)
        return row, list(examples["prediction"]), [list(texts) for texts in examples["references"]]

    mha, mha_texts, references = point("num_kv_heads=8")
    mqa, mqa_texts, same_references = point("num_kv_heads=1", "method=random")
    assert references == same_references
    scores = [score(mha.task_kind, texts, references) for texts in (mha_texts, mqa_texts)]
    difference, low, high = paired_bootstrap(scores[0], scores[1], mha.metric)
    means = f"MHA {mha.score:.2f}, random MQA {mqa.score:.2f}"
    print(f"{task}: {mha.metric} {means}, difference {difference:.2f} ({low:.2f} to {high:.2f})")
    assert low > 0
