"""Hydra's side: everything in conf/ and sweeps/ composes, bad input is one line and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gqa_exp.cli import ROOT, compose
from gqa_exp.config import Config
from gqa_exp.errors import InputError

CHOICES = [
    f"{path.parent.name}={path.stem}"
    for path in sorted((ROOT / "conf").glob("*/*.yaml"))
    if path.parent.name not in ("hydra", "recipe")  # a recipe is chosen by models and tasks
]


NEEDED = {
    "task=custom": ["task.train_files=[a.csv]", "task.dev_files=[b.csv]", "task.test_files=[c.csv]"],
    "corpus=custom": ["corpus.files=[a.txt]"],
}
"""What the choices on the user's own files cannot do without."""


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes(choice: str) -> None:
    group, _, name = choice.partition("=")
    section = getattr(compose([choice, *NEEDED.get(choice, [])]), group)
    assert getattr(section, "name", name) == name


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task=en_du"], 'did you mean "en_de"'),
        (["model=mimi"], 'did you mean "mini"'),
        (["+sweeps=demoo"], 'did you mean "demo"'),
        (["method=maen"], 'did you mean "mean"'),
        (["finetune.stepz=3"], 'did you mean "finetune.steps"'),
        (["num_kv_heads=3"], r"\[1, 2, 4, 8\]"),
        (["num_kv_heads=0"], "does not divide"),
        (["num_kv_heads=16"], "does not divide"),
        (["num_kv_heads=[8,4,2]"], "one per decoder layer"),
        (["proportion=-0.1"], "between 0 and 1"),
        (["proportion=1.5"], "between 0 and 1"),
        (["proportion=nan"], "between 0 and 1"),
        (["proportion=much"], "could not be converted"),
        (["num_kv_heads"], "missing EQUAL"),
        (["finetune.batch_tokens=16"], "cannot hold one example"),
        (["task=custom"], "task.train_files is empty"),
        (["task=custom", "task.train_files=[a.csv]", "task.dev_files=[b.csv]"], "task.test_files is empty"),
        (["task.dev_files=[a.csv]"], "no meaning for task debian_synopsis; use task=custom"),
        (["task.data_dir=data"], "no meaning for task debian_synopsis"),
        (["corpus=custom"], "corpus.files is empty"),
        (["model=t5_large", "corpus.files=[a.txt]"], "corpus.files has no meaning for corpus c4; use corpus=custom"),
        (["task.kind=translation"], 'task.metric="rouge1" is no score of task.kind="translation"; use bleu'),
        (["trainer.strategy=fdsp"], 'did you mean "fsdp"'),
    ],
)
def test_bad_overrides(overrides: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        compose(overrides)
    assert "\n" not in str(caught.value)


def test_a_task_brings_its_recipe_and_a_sweep_may_replace_it() -> None:
    own = {name: compose([f"task={name}"]) for name in ("debian_synopsis", "en_de")}
    assert own["en_de"].finetune.lr != own["debian_synopsis"].finetune.lr
    assert own["en_de"].finetune.dropout == 0.0 != Config().finetune.dropout
    demo = compose(["+sweeps=demo", "task=en_de"])
    assert (demo.task.max_input_tokens, demo.finetune.steps, demo.finetune.lr) == (96, 300, 7e-3)
    assert demo.finetune.patience == own["en_de"].finetune.patience
    assert compose(["+sweeps=demo", "task=en_de", "finetune.lr=1e-4"]).finetune.lr == 1e-4


SCRIPT = """
import contextlib, io, json, sys
from gqa_exp import cli, pretrain, run
ran = []
run.run = lambda config: ran.append(config)
for command, *words in json.loads(sys.argv[1]):
    stderr, code = io.StringIO(), 0
    sys.argv = [command, *words]
    ran.clear()
    cli.sweep_points.clear()
    with contextlib.redirect_stderr(stderr):
        try:
            {"gqa-run": run.main, "gqa-pretrain": pretrain.main}[command]()
        except SystemExit as stop:
            code = stop.code
    points = [[p.num_kv_heads, p.proportion, p.task.name, p.seed] for p in cli.sweep_points]
    print("@" + json.dumps([code, stderr.getvalue(), len(ran), points]))
"""


def run_commands(*commands: list[str]) -> list[tuple[int, str, int, list[list[object]]]]:
    """Run commands in one process of their own, points recorded instead of computed.

    Hydra sets up logging for its process, so it is kept out of the tests' own.

    Returns:
        Per command: exit code, stderr, points run, and the sweep's checked points.
    """
    words = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return [tuple(json.loads(line[1:])) for line in done.stdout.splitlines() if line.startswith("@")]


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    output = f"output={tmp_path / 'out'}"
    for name, data in (("file", b""), ("empty.txt", b""), ("latin.txt", b"gr\xfc\xdfe aus M\xfcnchen")):
        (tmp_path / name).write_bytes(data)
    cases = [
        (["gqa-run", "task=en_du", output], "did you mean"),
        (["gqa-run", "-m", "+sweeps=demoo", output], "did you mean"),
        (["gqa-run", "-m", "num_kv_heads=8,3", output], "num_kv_heads=3"),
        (["gqa-run", "-m", "timing.batch_size=8,16", output], "differ in timing"),
        (["gqa-run", f"output={tmp_path / 'file'}"], "output"),
        (["gqa-pretrain", "num_kv_heads=2", output], "multi-head"),
        (["gqa-pretrain", f"corpus.files=[{tmp_path / 'empty.txt'}]", output], "empty"),
        (["gqa-pretrain", f"corpus.files=[{tmp_path / 'latin.txt'}]", output], "UTF-8"),
    ]
    outcomes = run_commands(*(command for command, _ in cases))
    for (command, said), (code, stderr, points, _) in zip(cases, outcomes, strict=True):
        lines = stderr.strip().splitlines()
        assert (code, len(lines), points) == (2, 1, 0), (command, stderr)
        assert said in lines[0]


@pytest.mark.parametrize(
    ("sweep", "points"),
    [
        ("demo", 12),
        ("recipes", 16),
        pytest.param("first_look", 24, marks=pytest.mark.slow),
        pytest.param("frontier", 192, marks=pytest.mark.slow),
    ],
)
def test_sweeps_expand_to_their_points(sweep: str, points: int, tmp_path: Path) -> None:
    ((code, _, ran, checked),) = run_commands(["gqa-run", "-m", f"+sweeps={sweep}", f"output={tmp_path}"])
    distinct = points // 4 if sweep == "recipes" else points  # its points differ in a recipe's field
    assert (code, ran, len(checked), len({tuple(point) for point in checked})) == (0, points, points, distinct)
    if sweep == "demo":
        assert {tuple(point[:2]) for point in checked} == {(8, 0.0025), (2, 0.0025), (1, 0.0025), (1, 0.0)}


def test_the_command_line_replaces_what_a_sweep_file_lists(tmp_path: Path) -> None:
    words = ["gqa-run", "-m", "+sweeps=demo", "task=en_de", "++seed=3,4", f"output={tmp_path}"]
    ((code, _, ran, checked),) = run_commands(words)
    assert (code, ran, len(checked)) == (0, 8, 8)
    assert {tuple(point[2:]) for point in checked} == {("en_de", 3), ("en_de", 4)}
