"""The report on gqa-time's files: from a run of the command itself, and from made-up numbers of known ratios."""

import json
import sys
from pathlib import Path

import pytest

from analysis import paper
from analysis.report import main as report
from analysis.times import read_jobs, table, write_times
from gqa_exp.errors import InputError
from gqa_exp.timing.cli import main as time_command

HEADS = (1, 4, 8, 16, 32, 64)


def record(model: str = "t5_xxl", **changes: object) -> dict[str, object]:
    """A job of gqa-time: time is 1 s plus 0.1 s per KV head, and the model's bound half of it."""
    variants = {}
    for heads in HEADS:
        seconds = 1 + 0.1 * heads
        fields = {
            "per_sample": seconds, "per_sample_low": seconds - 0.1, "per_sample_high": seconds + 0.1,
            "speedup": 2.0, "predicted_per_sample": seconds / 2, "decode_step": 0.25, "predicted_decode_step": 0.125,
            "decode_bandwidth": 2e10, "bandwidth_share": 0.5, "dtype": "bfloat16",
            "composed": "extended from 1, 2, 4 to 24 + 24 layers", "fit_error": 0.01 * heads,
        }  # fmt: skip
        variants[f"G{heads}"] = {"fields": fields}
    return {
        "quality": "not quality-checked", "model": model, "hardware": "CPU", "started": "2026", "warning": None,
        "noise_floor": 0.02, "variants": {**variants, "G1, whole": variants["G1"]},
        "models": {f"G{heads}": {"num_kv_heads": [heads] * 2} for heads in reversed(HEADS)},
        "elsewhere": {"8 TPUv4": {f"G{heads}": {"batch_size": 256, "per_sample": 3.0 * heads} for heads in HEADS}},
        "config": {"batch_size": 8, "source_length": 2048, "output_length": 512}, **changes,
    }  # fmt: skip


def write(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.json").write_text(json.dumps(record(**changes)))
    return folder


def test_curves_are_relative_to_the_fewest_heads(tmp_path: Path) -> None:
    (job,) = read_jobs(write(tmp_path))
    assert job.variants == [f"G{heads}" for heads in HEADS], "fewest first, proofs left out"
    curves = job.curves()
    assert list(curves) == ["measured", "cost model, this host", "cost model, 8 TPUv4", "paper, 8 TPUv4"]
    assert curves["paper, 8 TPUv4"] == {f"G{heads}": seconds for heads, seconds in paper.FIGURE_6.items()}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(job).splitlines() if "G64" in line]
    old = record()
    for variant in old["variants"].values():
        variant["fields"] |= {"bandwidth_share": None, "memory_bandwidth": 8e10}
    (tmp_path / "a.json").write_text(json.dumps(old))
    assert " 0.25 |" in table(read_jobs(tmp_path)[0]), "records of before it was a field: from the two bandwidths"
    assert rows == [[
        "G64 *", "7400.0 [7300.0, 7500.0]", "3700.0", "2.00", "250.00", "125.00", "20.0", "0.50",
        f"{7.4 / 1.1:.2f}", f"{7.4 / 1.1:.2f}", "64.00", f"{2.53 / 0.49:.2f}",
    ]]  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{"model": "t5_xl"}, {"config": {"batch_size": 8, "source_length": 1024, "output_length": 512}}]
)
def test_the_paper_stands_beside_its_own_geometry_and_lengths_alone(tmp_path: Path, changes: dict[str, object]) -> None:
    (job,) = read_jobs(write(tmp_path, **changes))
    assert not any(curve.startswith("paper") for curve in job.curves())


def test_report_says_what_was_composed_and_how_sure(tmp_path: Path) -> None:
    path = write_times(read_jobs(write(tmp_path / "times")), tmp_path / "report")
    text = path.read_text()
    assert "composed: extended from 1, 2, 4 to 24 + 24 layers." in text
    assert "within 64.0% of the line" in text
    assert "Noise floor 2.0%" in text
    assert "Not quality-checked" in text
    assert (tmp_path / "report" / "times.png").stat().st_size > 10_000


def test_files_of_sweeps_are_left_out_and_broken_ones_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "sweep.json").write_text(json.dumps({"facts": {}, "variants": {}}))
    assert len(read_jobs(tmp_path)) == 1
    (tmp_path / "broken.json").write_text('{"quality": "", "variants": {}}')
    with pytest.raises(InputError, match=r"broken\.json: not a record of gqa-time"):
        read_jobs(tmp_path)


def test_from_gqa_time_to_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["gqa-time", "--model", "micro", "--num-kv-heads", "4", "1"]
    short = ["--batch-size=2", "--source-length=6", "--output-length=3"]
    quick = ["--min-rounds=2", "--min-seconds=0", "--compile=off", f"--output={tmp_path}"]
    monkeypatch.setattr(sys, "argv", [*words, *short, *quick])
    time_command()
    monkeypatch.setattr(sys, "argv", ["gqa-report", str(tmp_path)])
    report()
    assert capsys.readouterr().out.splitlines()[-1] == f"times   {tmp_path}/report/times.md"
    text = (tmp_path / "report" / "times.md").read_text()
    assert "## micro, batch 2, source 6, output 3" in text
    assert "| MQA " in text
    assert "H100" in text
