"""Loss curves from training records."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import pretraining
from analysis.pretraining import PowerLaw, Training, curve, main, outlook, read_training, summary, write_curves


def record(**changes: Any) -> dict[str, Any]:
    """200 reports of 5 steps of 100 tokens; the loss falls by 0.01 with each, on top of a zigzag of 1."""
    zigzag = [[5 * (i + 1), 8.0 - 0.01 * i + (1 if i % 2 else -1)] for i in range(200)]
    looks = [[500, 6.1, 7.0], [1000, 5.5, 7.5, 4000.0]]
    values = {
        "step": 1000, "tokens": 100_000, "seconds": 50.0, "tokens_per_second": 2000.0, "epochs": 0.5, "curve": zigzag,
        "heldout_curve": looks, "heldout_unigram_loss": 6.9, "heldout_gain": 0.0123,
        "recipe": {"pretrain": {"peak_lr": 0.03, "batch_size": 4}},
    }  # fmt: skip
    return {**values, **changes}


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "training.json").write_text(json.dumps(record(**changes)), encoding="utf-8")
    return folder


def test_the_summary_says_what_the_record_says(tmp_path: Path) -> None:
    folder = write(tmp_path / "trial" / "pretrain" / "mini" / "base")
    header, [row] = summary([read_training(folder)])
    shown = dict(zip(header, row, strict=True))
    assert shown["base"] == "trial/mini"
    assert [shown[name] for name in ("peak rate", "steps", "million tokens", "tokens/s")] == [
        "0.03", "1000", "0.10", "2,000",
    ]  # fmt: skip
    assert [shown[name] for name in ("held-out loss", "inputs exchanged", "unigram")] == ["5.500", "7.500", "6.900"]
    assert shown["gain of the last hour"] == "1.2 %"


def test_a_bare_record_leaves_gaps(tmp_path: Path) -> None:
    folder = write(tmp_path / "old", heldout_curve=[], recipe={}, heldout_gain=None)
    header, [row] = summary([read_training(folder)])
    shown = dict(zip(header, row, strict=True))
    assert shown["base"] == "old"
    assert {shown[name] for name in ("peak rate", "held-out loss", "gain of the last hour")} == {"-"}
    rows = curve(read_training(folder))[1]
    assert [row[0] for row in rows] == ["5", *(str(100 * part) for part in range(1, 11))]
    assert all(row[3:] == ["-", "-"] for row in rows)


def test_smoothing_takes_out_the_zigzag_and_keeps_the_fall(tmp_path: Path) -> None:
    loss = read_training(write(tmp_path / "base")).loss
    assert loss[0] == (5.0, 7.0)  # the first report as it is
    for i in (50, 100, 150):  # nine neighbours of an odd number: the zigzag cancels but for one part in nine
        assert loss[i][1] == pytest.approx(8.0 - 0.01 * i, abs=1 / 9 + 1e-9)


def test_all_losses_of_a_row_are_of_one_step(tmp_path: Path) -> None:
    training = read_training(
        write(tmp_path / "base", heldout_curve=[[350, 6.1, 7.0], [700, 5.8, 7.2], [1000, 5.5, 7.5]])
    )
    _, rows = curve(training)
    losses = dict(training.loss)
    assert [row[0] for row in rows] == ["5", "350", "700", "1000"]
    assert [row[2] for row in rows] == [f"{losses[float(row[0])]:.3f}" for row in rows]
    assert [row[3:] for row in rows] == [["-", "-"], ["6.100", "7.000"], ["5.800", "7.200"], ["5.500", "7.500"]]
    assert [row[1] for row in rows[1:]] == ["0.04", "0.07", "0.10"]  # 100 tokens a step


def test_command_writes_table_and_figure_of_several(tmp_path: Path, monkeypatch, capsys) -> None:
    one, other = write(tmp_path / "one"), write(tmp_path / "other", heldout_curve=[])
    output = tmp_path / "report"
    monkeypatch.setattr("sys.argv", ["pretraining", str(one), str(other), "--output", str(output)])
    main()
    figure = output / "pretraining.png"
    assert capsys.readouterr().out.strip() == str(figure)
    assert figure.stat().st_size > 10_000
    text = (output / "pretraining.md").read_text()
    assert text.count("\n## ") == 2


def looks_on(floor: float, scale: float, exponent: float) -> list[list[float]]:
    """Held-out losses of a power law in million tokens, at every tenth of 1000 steps of 100 tokens."""
    return [[step, floor + scale * (step / 1e4) ** -exponent, 9.0] for step in range(100, 1001, 100)]


@given(floor=st.floats(0.5, 3.0), scale=st.floats(0.05, 1.0), exponent=st.floats(0.1, 1.0))
@settings(max_examples=30, deadline=None)
def test_a_power_law_is_found_and_tells_when_an_hour_stops_paying(floor: float, scale: float, exponent: float) -> None:
    training = Training("base", record(heldout_curve=looks_on(floor, scale, exponent)))
    law = training.power_law
    assert law is not None
    assert law.error < 1e-3
    assert law.loss(0.05) == pytest.approx(floor + scale * 0.05**-exponent, rel=1e-3)
    until = law.paying_until(7.2)  # 2000 tokens/s
    assert law.loss(until + 7.2) == pytest.approx(0.99 * law.loss(until), rel=1e-6)
    assert law.loss(1.1 * until + 7.2) > 0.99 * law.loss(1.1 * until), "later, an hour gains less"


def test_the_outlook_is_written_where_losses_allow_one(tmp_path: Path) -> None:
    law = Training("base", record(heldout_curve=looks_on(2.0, 0.5, 0.5)))
    text = outlook(law)
    assert text is not None
    assert "2.00 + 0.50 N^-0.50" in text
    assert "7 million tokens at this run's rate" in text
    few = Training("base", record(heldout_curve=looks_on(2.0, 0.5, 0.5)[:4]))
    assert outlook(few) is None
    assert outlook(Training("base", record(heldout_curve=looks_on(0.0, 3.0, 0.1)))) is None, "no floor in sight"
    assert outlook(Training("base", record(heldout_curve=looks_on(2.0, 0.5, 0.5), tokens_per_second=None))) is None
    write_curves([law, few], tmp_path)
    assert (tmp_path / "pretraining.md").read_text().count("By it, an hour more") == 1


@pytest.mark.parametrize(
    "losses",
    [
        [3.0] * 10,
        [3.0 + 0.01 * (-1) ** i for i in range(10)],
        [2.0 + 0.1 * i for i in range(10)],  # rising
        [3.0, 2.8, 2.6, 2.5, 2.45, 2.5, 2.7, 3.2, 5.0, 9.0],  # diverging
        [3.0, 2.7, 2.5, 2.4, 2.35, 2.35, 2.4, 2.5, 2.6, 2.75],  # learning its text by heart
        [float("nan")] * 10,
    ],
)
def test_losses_that_follow_no_law_give_no_outlook(tmp_path: Path, losses: list[float]) -> None:
    looks = [[100.0 * (i + 1), loss, 9.0] for i, loss in enumerate(losses)]
    training = Training("base", record(heldout_curve=looks))
    assert training.power_law is None
    assert write_curves([training], tmp_path).exists()


def test_a_loss_that_is_not_a_number_is_left_out_of_the_law() -> None:
    looks = looks_on(2.0, 0.5, 0.5)
    looks[4][1] = float("nan")
    law = Training("base", record(heldout_curve=looks)).power_law
    assert law is not None
    assert law.floor == pytest.approx(2.0, rel=1e-3)


def test_hours_too_short_to_ever_pay() -> None:
    assert PowerLaw(2.0, 0.001, 0.01, 0.0).paying_until(5.0) == 0


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        '{"step": 0, "tokens": 0, "curve": [[1, 2]]}',
        '{"step": 5}',
        json.dumps(record(heldout_curve=[[500, 6.1]])),
        json.dumps(record(heldout_curve=None)),
        json.dumps(record(recipe=None)),
        json.dumps(record(curve=[])),
    ],
)
def test_bad_records_are_one_line_and_exit_code_2(tmp_path: Path, monkeypatch, capsys, content: str | None) -> None:
    if content is not None:
        (tmp_path / "training.json").write_text(content)
    monkeypatch.setattr("sys.argv", ["pretraining", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    stderr = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert len(stderr.splitlines()) == 1
    assert "no training record with a loss curve" in stderr


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(pretraining.InputError, match="cannot write to"):
        write_curves([read_training(write(tmp_path / "base"))], tmp_path / "file")
