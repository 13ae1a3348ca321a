"""What the README tells a newcomer to type and to open has to exist."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from gqa_exp.cli import compose
from gqa_exp.convert import _parser as convert_parser
from gqa_exp.timing.cli import _parser as time_parser
from gqa_exp.timing.cli import read_model_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINES = [
    shlex.split(line, comments=True)
    for block in re.findall(r"^```\w*\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
HYDRA = [line for line in LINES if line[0] in ("gqa-run", "gqa-pretrain")]
HYDRA += [["gqa-run", *line[line.index("gqa_exp.run") + 1 :]] for line in LINES if line[0] == "torchrun"]
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL))


def points(overrides: list[str]) -> list[list[str]]:
    """A command line's first and last point: of every list of values with commas, the first or the last value."""
    swept = "-m" in overrides
    kept = [each for each in overrides if each != "-m"]
    if not swept:
        return [kept]
    listed = [name_and_values.partition("=") for name_and_values in kept]
    return [[f"{name}={values.split(',')[end]}" for name, _, values in listed] for end in (0, -1)]


def test_the_examples_are_found() -> None:
    assert {line[0] for line in LINES} >= {"make", "gqa-pretrain", "gqa-convert", "gqa-time", "gqa-report"}
    assert len(HYDRA) >= 8
    assert ["gqa-run", "-m", "+sweeps=demo"] in HYDRA


def test_every_command_has_an_entry_point() -> None:
    named = set(re.findall(r"\bgqa-[a-z]+\b", README))
    assert named == set(PROJECT["scripts"])


@pytest.mark.parametrize("line", HYDRA, ids=" ".join)
def test_every_configuration_composes(line: list[str], tmp_path: Path) -> None:
    for overrides in points(line[1:]):
        elsewhere = [f"output={tmp_path}" if each.startswith("output=") else each for each in overrides]
        assert compose(elsewhere).method


def test_sweep_files_list_what_composes() -> None:
    names = [each.removeprefix("+sweeps=") for line in HYDRA for each in line if each.startswith("+sweeps=")]
    for name in names:
        assert compose([f"+sweeps={name}"]).sweep == name


def test_the_other_commands_take_their_arguments() -> None:
    for command, *arguments in LINES:
        if command == "gqa-convert":
            assert convert_parser().parse_args(arguments).source == Path("SOURCE")
        elif command == "gqa-time":
            parsed = time_parser().parse_args(arguments)
            assert (
                compose([f"+sweeps={parsed.sweep}"]) if parsed.sweep else read_model_config(parsed.model)
            ) is not None


def test_every_make_target_exists() -> None:
    named = set(re.findall(r"\bmake ([a-z]+)\b(?=[` ]|$)", " \n".join([*INLINE, *map(" ".join, LINES)]), re.MULTILINE))
    assert {"demo", "test", "help", "clean", "check"} <= named
    for target in sorted(named):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


def test_the_plot_that_make_names_is_where_the_report_goes() -> None:
    plot = re.search(r"^PLOT := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert plot
    config = compose(["+sweeps=demo"])
    assert plot[1] == f"{config.output}/results/{config.sweep}/report/frontier.png"


def test_every_path_exists() -> None:
    links = [each for each in re.findall(r"\]\(([^)]+)\)", README) if "://" not in each]
    rooms = {path.name for path in ROOT.iterdir()} - {"runs"}  # what runs leave behind is not there yet
    paths = {text for text in INLINE if re.fullmatch(r"[\w./-]+/[\w./-]*", text) and text.split("/")[0] in rooms}
    assert len(links) >= 5
    assert len(paths) >= 10
    missing = [path for path in [*links, *paths] if not path.startswith(".venv/") and not (ROOT / path).exists()]
    assert not missing
