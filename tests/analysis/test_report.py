"""From rows to points, tables, claims, figure and the gqa-report command."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Annotation
from rich.console import Console

from analysis.claims import Claim, all_claims, ratio_verdict
from analysis.figures import frontier
from analysis.report import main, report_markdown, write_report
from analysis.stats import Estimate
from analysis.study import Study, read_study, time_setting
from analysis.tables import console_table, frame, recipes, table_markdown
from gqa_exp.errors import InputError
from gqa_exp.results import read_examples, write_examples, write_result

BASE = {"debian_synopsis": 34.0, "en_de": 40.0, "debian_cloze": 30.0}
LOSS = {8: 0.0, 2: 1.0, 1: 4.0}


def demo_quality(kv_heads: int, proportion: float, task: str) -> float:
    return BASE[task] - LOSS[kv_heads] - (4.0 if proportion == 0 else 0.0)


def claim(study: Study, statement: str) -> Claim:
    found = [each for each in all_claims(study) if each.statement.startswith(statement)]
    assert len(found) == 1, [each.statement for each in all_claims(study)]
    return found[0]


# -- times


def test_times_are_of_the_hardware_and_kind_that_was_timed(rows) -> None:
    elsewhere = {"environment": {"cpu": "Another CPU", "threads": 1}}
    mha, mqa = rows.add(8, 0.0, 33.0, **elsewhere), rows.add(1, 0.0, 30.0, speedup=2.0)
    for row in (mha, mqa):
        write_result(rows.folder, dataclasses.replace(row, time={**row.time, "hardware": "A CPU, 2 threads"}))
    study = read_study(rows.folder)
    assert str(study.setting).startswith("A CPU, 2 threads; ")
    assert all(point.time for point in study.points)
    assert not study.notes
    write_result(rows.folder, dataclasses.replace(mqa, time={**mqa.time, "cross_kv": "recomputed"}))
    study = read_study(rows.folder)
    assert sum(bool(point.time) for point in study.points) == 1
    assert "values recomputed): their times are not shown" in "".join(study.notes)


# -- tables


def test_scores_and_means_in_the_table_are_those_of_the_rows(rows) -> None:
    rows.demo(demo_quality)
    table = frame(read_study(rows.folder))
    for _, line in table[table.seeds > 0].iterrows():
        mine = [r for r in rows.written if (r.label, r.proportion) == (line.label, line.proportion)]
        for result in mine:
            assert line[f"{result.task}.{result.metric}"] == pytest.approx(result.score)
        assert line["mean"] == pytest.approx(np.mean([r.score for r in mine]))
        assert line["mean_low"] < line["mean"] < line["mean_high"]
        assert line["time_per_sample"] == mine[0].time["per_sample"]
        assert line["parameters"] == mine[0].parameters
    assert table[table.label == "lead baseline"]["en_de.bleu"].tolist() == [30.0]


def test_differences_are_to_mha_of_the_same_proportion_with_the_base_beside(rows) -> None:
    rows.demo(demo_quality)
    rows.add(8, 0.0, 31.0)
    table = frame(read_study(rows.folder)).set_index(["label", "proportion"])
    score = table["debian_synopsis.rouge1"]
    difference = table["debian_synopsis.rouge1.difference"]
    to_base = table["debian_synopsis.rouge1.difference_to_base"]
    assert difference["MQA", 0.02] == pytest.approx(score["MQA", 0.02] - score["MHA", 0.02])
    assert difference["MQA", 0.0] == pytest.approx(score["MQA", 0.0] - score["MHA", 0.0])
    assert to_base["MQA", 0.02] == pytest.approx(score["MQA", 0.02] - score["MHA", 0.0])
    assert to_base["MHA", 0.02] == pytest.approx(score["MHA", 0.02] - score["MHA", 0.0])
    assert np.isnan(difference["MHA", 0.02])


def test_no_reference_is_said_and_not_replaced(rows) -> None:
    rows.demo(demo_quality)
    study = read_study(rows.folder)
    assert "no reference" in table_markdown(study)
    assert "no reference: MQA (0)" in report_markdown(study, [], "", None)


def test_seeds_are_averaged_and_their_spread_shown(rows) -> None:
    for seed, quality in enumerate((30.0, 32.0, 37.0)):
        rows.add(8, 0.02, quality, seed=seed)
    line = frame(read_study(rows.folder)).iloc[0]
    values = [result.score for result in rows.written]
    assert line["seeds"] == 3
    assert line["debian_synopsis.rouge1"] == pytest.approx(np.mean(values))
    assert line["debian_synopsis.rouge1_spread"] == pytest.approx(np.std(values, ddof=1))
    assert line["debian_synopsis.rouge1_high"] - line["debian_synopsis.rouge1_low"] > 3


def test_a_mean_needs_every_kind_of_task_and_every_task(rows) -> None:
    rows.add(8, 0.02, 30.0, "debian_synopsis")
    rows.add(8, 0.02, 30.0, "debian_cloze")
    assert "mean" not in frame(read_study(rows.folder))
    rows.add(8, 0.02, 30.0, "en_de")
    rows.add(1, 0.02, 30.0, "en_de")
    table = frame(read_study(rows.folder)).set_index("label")
    assert table["mean"].notna().to_dict() == {"MHA": True, "MQA": False, "lead baseline": False}


def test_failed_and_diverged_rows_are_counted_and_listed(rows) -> None:
    rows.demo(demo_quality)
    rows.add(4, 0.02, 30.0, status="diverged", error="loss is NaN at step 17", score=None)
    rows.add(2, 0.5, 30.0, status="failed", error="out of memory", score=None)
    rows.add(2, 0.5, 30.0, "en_de", status="done", score=float("nan"))
    study = read_study(rows.folder)
    text = report_markdown(study, [], "", None)
    assert "15 rows: 12 finished, 3 failed or diverged" in text
    assert "loss is NaN at step 17" in text
    assert "out of memory" in text
    assert frame(study)["unfinished"].sum() == 3
    assert "| diverged |" in table_markdown(study)


def test_scores_say_what_they_miss_of_runs_that_diverged(rows) -> None:
    for seed in range(3):
        rows.add(8, 0.02, 33.0, seed=seed)
        lost = {"status": "diverged", "score": None, "examples": False} if seed else {}
        rows.add(1, 0.02, 30.0, seed=seed, **lost)
    rows.add(1, 0.02, 30.0, "en_de")
    for suffix, seed in (("-failed before", 0), ("-failed too", 1)):
        rows.add(1, 0.02, 30.0, seed=seed, suffix=suffix, status="diverged", score=None, examples=False)
    study = read_study(rows.folder)
    cells = next(line for line in table_markdown(study).splitlines() if line.startswith("| MQA"))
    assert "] (2 of 3 diverged) |" in cells
    assert "| 1 |" in cells, "one seed on either task"
    assert "| 3 |" in next(line for line in table_markdown(study).splitlines() if line.startswith("| MHA"))
    assert claim(study, "MQA (0.02) scores below").evidence.endswith("; MQA (0.02): 2 of 3 diverged")


def test_splits_of_a_task_stand_apart(rows) -> None:
    rows.demo(demo_quality)
    assert read_study(rows.folder).has_mean
    rows.add(8, 0.02, 50.0, split="dev", suffix="-dev")
    study = read_study(rows.folder)
    line = frame(study).set_index(["label", "proportion"]).loc[("MHA", 0.02)]
    assert line["debian_synopsis (dev).rouge1"] == pytest.approx(50, abs=3)
    assert line["debian_synopsis.rouge1"] == pytest.approx(34, abs=3)
    assert "| debian_synopsis (dev) ROUGE-1 |" in table_markdown(study)
    assert not study.has_mean


def test_rows_of_other_settings_or_examples_are_told(rows) -> None:
    alike = {"evaluate.version": 5, "evaluate.evaluation.dtype": "bfloat16", "finetune.data": "d", "uptrain.version": 3}
    rows.add(8, 0.02, 33.0, settings=alike)
    mqa = rows.add(1, 0.02, 30.0, settings=alike)
    assert read_study(rows.folder).notes == []
    old = rows.add(1, 0.02, 35.0, settings={**alike, "evaluate.version": 4}, suffix="-old", dev_score=90.0)
    write_result(rows.folder, dataclasses.replace(old, ended="2025-01-01T00:00:00", finetune={"lr": 1.0}))
    study = read_study(rows.folder)
    assert study.notes == ["debian_synopsis-MQA-0.02-0-mean-old (MQA on debian_synopsis, proportion 0.02, seed 0) is "
                           "superseded by the later debian_synopsis-MQA-0.02-0-mean and not shown."]  # fmt: skip
    write_result(rows.folder, dataclasses.replace(mqa, settings={**alike, "evaluate.version": 4}))
    (rows.folder / f"{old.key}.json").unlink()
    assert "evaluate.version (4, 5)" in "".join(read_study(rows.folder).notes)
    write_result(rows.folder, dataclasses.replace(mqa, settings={}))
    assert "1 rows are of before rows told" in "".join(read_study(rows.folder).notes)
    write_result(rows.folder, dataclasses.replace(mqa, settings=alike))
    other = read_examples(rows.folder, mqa.key)
    other["references"] = [["another"]] * len(other)
    write_examples(rows.folder, mqa.key, other)
    study = read_study(rows.folder)
    assert "no paired interval" in claim(study, "MQA (0.02) scores below").evidence
    assert "not all rows are of the same examples" in "".join(study.notes)


def test_times_of_another_machine_or_missing_are_not_mixed_in(rows) -> None:
    rows.add(8, 0.02, 34.0)
    rows.add(2, 0.02, 33.0, speedup=1.5)
    rows.add(4, 0.02, 33.0, speedup=None)
    rows.add(1, 0.02, 32.0, speedup=9.0, environment={"cpu": "Another CPU", "threads": 64})
    study = read_study(rows.folder)
    table = frame(study).set_index("label")
    assert table["time_per_sample"].notna().to_dict() == {
        "MHA": True, "GQA-2": True, "GQA-4": False, "MQA": False, "lead baseline": False
    }  # fmt: skip
    assert table_markdown(study).count("not measured") == 2
    assert any("Another CPU" in note for note in study.notes)
    assert not [each for each in all_claims(study) if each.section == "Time" and "MQA" in each.statement]


def test_a_superseded_row_is_noted_and_the_later_one_shown(rows) -> None:
    rows.add(8, 0.02, 30.0, suffix="-a", ended="2026-01-01T00:00:00")
    later = rows.add(8, 0.02, 35.0, suffix="-b", ended="2026-01-02T00:00:00")
    study = read_study(rows.folder)
    assert frame(study)["debian_synopsis.rouge1"].iloc[0] == later.score
    assert any("superseded" in note for note in study.notes)


def test_splits_and_bases_are_never_compared(rows) -> None:
    rows.add(8, 0.02, 34.0, stages={"base": "one"})
    rows.add(1, 0.02, 30.0, stages={"base": "two"})
    rows.add(8, 0.05, 34.0, split="dev")
    rows.add(1, 0.05, 30.0)
    study = read_study(rows.folder)
    assert not [each for each in all_claims(study) if each.section == "Quality against MHA"]
    assert len(study.tasks) == 2


def test_examples_that_do_not_belong_to_their_row_give_no_interval(rows) -> None:
    rows.add(8, 0.02, 34.0)
    result = rows.add(1, 0.02, 30.0)
    write_examples(rows.folder, result.key, pd.DataFrame({"id": ["debian_synopsis/0"], "rouge1": [99.0]}))
    study = read_study(rows.folder)
    assert claim(study, "MQA (0.02) scores below MHA (0.02)").verdict == "cannot tell"
    assert any("do not belong together" in note for note in study.notes)


# -- claims


def test_quality_claims_flip_with_the_data(rows) -> None:
    rows.add(8, 0.02, 34.0)
    rows.add(1, 0.02, 31.0)
    rows.add(2, 0.02, 34.01)
    rows.add(4, 0.02, 36.0)
    study = read_study(rows.folder)
    assert claim(study, "MQA (0.02) scores below MHA (0.02)").verdict == "supported"
    close = claim(study, "GQA-2 (0.02) scores below MHA (0.02)")
    assert close.verdict == "cannot tell"
    assert "not distinguishable" in close.evidence
    assert claim(study, "GQA-4 (0.02) scores below MHA (0.02)").verdict == "not supported"


def test_gap_closure_needs_a_gap(rows) -> None:
    rows.add(8, 0.02, 34.0)
    rows.add(2, 0.02, 33.0)
    rows.add(1, 0.02, 30.0)
    study = read_study(rows.folder)
    closed = claim(study, "GQA-2 (0.02) closes")
    assert closed.verdict == "supported"
    mha, gqa, mqa = (next(r.score for r in rows.written if r.label == name) for name in ("MHA", "GQA-2", "MQA"))
    assert f"{100 * (gqa - mqa) / (mha - mqa):.0f} [" in closed.evidence

    for result in rows.written:
        (rows.folder / f"{result.key}.json").unlink()
    rows.add(8, 0.02, 34.0)
    rows.add(2, 0.02, 33.0)
    rows.add(1, 0.02, 34.01)
    none = claim(read_study(rows.folder), "GQA-2 (0.02) closes")
    assert none.verdict == "cannot tell"
    assert "no share" in none.evidence


def test_gap_closure_without_an_interval(rows) -> None:
    # Few right answers: the gap is distinguishable, yet about every 150th resample holds none of them and has no gap.
    for kv_heads, right in ((8, 5), (2, 2), (1, 0)):
        key = rows.add(kv_heads, 0.02, 30.0, score=100 * right / rows.count).key
        examples = read_examples(rows.folder, key)
        examples["rouge1"] = [100.0 if index < right else 0.0 for index in range(len(examples))]
        write_examples(rows.folder, key, examples)
    found = claim(read_study(rows.folder), "GQA-2 (0.02) closes")
    assert found.verdict == "cannot tell"
    assert found.evidence.endswith("; 40 % of it closed")


def test_gap_not_closed_is_not_supported(rows) -> None:
    rows.add(8, 0.02, 34.0)
    rows.add(2, 0.02, 26.0)
    rows.add(1, 0.02, 30.0)
    assert claim(read_study(rows.folder), "GQA-2 (0.02) closes").verdict == "not supported"


def test_uptraining_claim_shows_what_mha_gains_from_the_same_steps(rows) -> None:
    for kv_heads, before, after in ((8, 34.0, 35.0), (1, 26.0, 32.0)):
        rows.add(kv_heads, 0.0, before)
        rows.add(kv_heads, 0.02, after)
    study = read_study(rows.folder)
    gain = claim(study, "MQA (0.02) scores above MQA (0)")
    assert gain.verdict == "supported"
    assert "MHA gains +" in gain.evidence


@pytest.mark.parametrize("task", ["debian_synopsis", "en_de"])
def test_mha_is_compared_with_trivial_baselines_on_the_same_examples(rows, task: str) -> None:
    rows.add(8, 0.0, 34.0, task, baselines={"worse": 26.0, "alike": 34.02, "better": 45.0})
    rows.add(1, 0.0, 30.0, task, baselines={"worse": 26.0})
    study = read_study(rows.folder)
    found = {name: claim(study, f"MHA (0) scores above the {name}") for name in ("worse", "alike", "better")}
    assert [each.verdict for each in found.values()] == ["supported", "cannot tell", "not supported"]
    assert not [each for each in all_claims(study) if each.statement.startswith("MQA (0) scores above the")]
    mha, _ = rows.written
    row = frame(study).iloc[0]
    column = f"{task}.{mha.metric}.over_worse"
    assert row[column] == pytest.approx(mha.score - mha.baselines["worse"])
    assert 0 < row[f"{column}_low"] < row[column] < row[f"{column}_high"]
    if task == "debian_synopsis":  # difficulties shared by both cancel: unpaired, their spread of 12 alone gives 6
        assert row[f"{column}_high"] - row[f"{column}_low"] < 2.0
    assert "## Paired differences to trivial baselines" in table_markdown(study)


def test_a_baseline_that_does_not_belong_to_its_row_gives_no_interval(rows) -> None:
    rows.add(8, 0.0, 34.0)  # a row of before baselines were kept by example
    study = read_study(rows.folder)
    assert not [each for each in all_claims(study) if "baseline" in each.statement]
    assert "trivial baselines" not in table_markdown(study)
    assert [note for note in study.notes if "before the lead baseline was kept" in note]
    rows.add(8, 0.0, 34.0, baselines={"lead": 31.0}, ended="2026-01-02T00:00:00")
    key = rows.written[-1].key
    examples = read_examples(rows.folder, key)
    examples["baseline.lead.rouge1"] += 3.0
    write_examples(rows.folder, key, examples)
    assert any("lead baseline on debian_synopsis): its examples give" in note for note in noted(rows.folder))


def noted(folder: Path) -> list[str]:
    study = read_study(folder)
    all_claims(study)
    return study.notes


RECIPE = {"lr": 2e-3, "steps": 300, "batch_tokens": 2048, "max_input_tokens": 96}
TRAINED = {"finetune_best_step": 200, "finetune_seconds": 90.0}


def listed(folder: Path) -> list[dict[str, str]]:
    header, rows = recipes(read_study(folder))
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_a_search_lists_every_recipe_and_shows_the_best_on_dev(rows) -> None:
    for lr, dev, quality in ((1e-3, 20.0, 36.0), (5e-3, 24.0, 34.0), (2e-3, 23.0, 35.0)):
        recipe = {**RECIPE, "lr": lr}
        rows.add(8, 0.0, quality, suffix=f"-{lr}", finetune=recipe, dev_score=dev, training=TRAINED)
    rows.add(
        8, 0.0, 30.0, suffix="-diverged", finetune={**RECIPE, "lr": 0.1}, status="diverged", score=None, examples=False
    )
    shown = listed(rows.folder)
    assert [row["lr"] for row in shown] == ["0.005", "0.002", "0.001", "0.1"]
    assert (shown[0]["best dev score"], shown[0]["score"]) == ("24.00", f"{rows.written[1].score:.2f}")
    assert (shown[0]["at step"], shown[0]["minutes"], shown[0]["patience"]) == ("200", "1.5", "-")
    assert (shown[3]["rows"], shown[3]["best dev score"]) == ("1 (diverged)", "-")
    study = read_study(rows.folder)
    assert frame(study)["debian_synopsis.rouge1"].iloc[0] == rows.written[1].score  # neither the last nor the highest
    assert sum("did better on dev" in note for note in study.notes) == 2
    assert not [note for note in study.notes if "fine-tuned alike" in note]


def test_points_that_were_not_fine_tuned_alike_are_noted(rows) -> None:
    rows.add(8, 0.0, 34.0, finetune=RECIPE, dev_score=23.0, training=TRAINED)
    rows.add(2, 0.0, 30.0, finetune=RECIPE, dev_score=21.0, training={**TRAINED, "finetune_seconds": 120.0})
    [alike] = listed(rows.folder)
    assert (alike["rows"], alike["best dev score"], alike["minutes"]) == ("2", "21.00 to 23.00", "1.5 to 2.0")
    assert not [note for note in noted(rows.folder) if "fine-tuned alike" in note]
    rows.add(1, 0.0, 30.0)  # a row that does not say
    assert any("debian_synopsis, ROUGE-1: not all rows say" in note for note in noted(rows.folder))
    rows.add(1, 0.0, 30.0, finetune={**RECIPE, "dropout": 0.1}, dev_score=22.0, ended="2026-01-03T00:00:00")
    assert any("fine-tuned alike" in note for note in noted(rows.folder))


def test_recipes_rank_by_the_mean_over_their_rows(rows) -> None:
    for seed, (lucky, steady) in enumerate(((26.0, 24.0), (20.0, 23.9))):
        for lr, dev in ((1e-3, lucky), (2e-3, steady)):
            rows.add(8, 0.0, 34.0, seed=seed, suffix=f"-{lr}", finetune={**RECIPE, "lr": lr}, dev_score=dev)
    assert [row["lr"] for row in listed(rows.folder)] == ["0.002", "0.001"]


@pytest.mark.parametrize(
    ("speedup", "noise_floor", "expected"),
    [(2.0, 0.03, "supported"), (1.1, 0.15, "not supported"), (0.6, 0.03, "not supported"), (1.02, 0.01, "cannot tell")],
)
def test_time_claims_respect_the_noise_floor(rows, speedup: float, noise_floor: float, expected: str) -> None:
    rows.add(8, 0.02, 34.0, noise_floor=noise_floor)
    rows.add(1, 0.02, 34.0, speedup=speedup, noise_floor=noise_floor)
    found = claim(read_study(rows.folder), "MQA needs less time per sample than MHA")
    assert found.verdict == expected
    assert ("no difference" in found.evidence) == (abs(speedup - 1) <= noise_floor)


def test_a_time_without_a_noise_floor_decides_nothing() -> None:
    assert ratio_verdict(Estimate(3.0, 2.9, 3.1), None)[0] == "cannot tell"


# -- figure and report


def test_report_writes_everything_and_points_to_the_figure(rows, tmp_path: Path, capsys) -> None:
    rows.demo(demo_quality)
    figure = write_report(rows.folder, tmp_path / "out", "demo")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"table.md", "table.csv", "claims.md", "report.md", "frontier.png", "frontier.pdf"}
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "![" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert str(figure) in printed
    assert "GQA-2" in printed
    assert len(pd.read_csv(tmp_path / "out" / "table.csv")) == 5


def test_the_papers_figures_stand_in_their_own_column(rows, tmp_path: Path) -> None:
    rows.demo(demo_quality)
    study = read_study(rows.folder)
    text = report_markdown(study, [], "", None)
    assert "| quantity | measured | paper | mark |" in text
    assert "83 by printed averages, 87.5 by row means" in text
    assert "paper" not in table_markdown(study)


def test_every_point_is_labelled_and_no_labels_overlap(rows) -> None:
    rows.demo(demo_quality)
    figure = frontier(read_study(rows.folder))
    figure.canvas.draw()
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert len(panels) == 4
    for axes in panels:
        labels = [each for each in axes.texts if isinstance(each, Annotation) and "(" in each.get_text()]
        assert {each.get_text() for each in labels} == {"MHA (0.02)", "GQA-2 (0.02)", "MQA (0.02)", "MQA (0)"}
        boxes = [each.get_window_extent() for each in axes.texts]
        assert not [1 for n, one in enumerate(boxes) for two in boxes[:n] if one.overlaps(two)]


def test_a_crowd_of_points_is_named_by_architecture_and_proportion(rows) -> None:
    for kv_heads, speedup in ((8, 1.0), (2, 1.5), (1, 2.0)):
        for proportion in (0.0, 0.01, 0.05):
            rows.add(kv_heads, proportion, 30.0 + kv_heads, speedup=speedup)
    (axes,) = frontier(read_study(rows.folder)).axes
    texts = [each.get_text() for each in axes.texts]
    assert {"MHA", "GQA-2", "MQA"} <= set(texts)
    assert [texts.count(each) for each in ("0", "0.01", "0.05")] == [3, 3, 3]


def test_caption_says_hardware_lengths_and_condition(rows) -> None:
    rows.demo(demo_quality)
    caption = " ".join(" ".join(text.get_text() for text in frontier(read_study(rows.folder)).texts).split())
    for part in ("A CPU, 2 threads", "batch 64", "source 1024", "output 64", "conditional on one base"):
        assert part in caption
    rows.add(8, 0.02, 33.0, seed=1)
    caption = " ".join(" ".join(text.get_text() for text in frontier(read_study(rows.folder)).texts).split())
    assert "1 to 2 seeds" in caption


def test_the_threads_of_a_time_are_those_of_its_process(rows) -> None:
    """Points that are trained two at a time have a thread each; what times them at the end has both."""
    result = rows.add(1, 0.02, 32.0, environment={"cpu": "A CPU", "threads": 1})
    for threads, said in ((None, "A CPU, 1 threads"), (2, "A CPU, 2 threads")):
        result.time["threads"] = threads
        setting = time_setting(result)
        assert setting is not None
        assert setting.hardware == said


def test_a_folder_of_failures_only_still_reports(rows, tmp_path: Path, capsys) -> None:
    rows.add(8, 0.02, 30.0, status="failed", error="no memory", score=None)
    assert write_report(rows.folder, tmp_path / "out").exists()
    assert "1 of 1 rows did not finish" in capsys.readouterr().out


def test_console_table_fits_120_columns(rows) -> None:
    for task in ("debian_synopsis", "debian_multi", "en_de", "debian_cloze"):
        for kv_heads in (8, 2, 1):
            for seed in (0, 1):
                rows.add(kv_heads, 0.05, 30.0 + kv_heads, task, seed)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(console_table(read_study(rows.folder)))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 120
    assert "debian_" in "".join(lines)
    assert "…" not in "".join(lines)


# -- the command


def run_main(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["gqa-report", *map(str, arguments)])
    main()


@pytest.mark.parametrize("case", ["missing", "empty", "broken", "schema", "sweep", "output", "examples"])
def test_bad_input_is_one_line_and_exit_code_2(rows, tmp_path: Path, monkeypatch, capsys, case: str) -> None:
    rows.add(8, 0.02, 34.0)
    result = rows.add(1, 0.02, 34.0)
    arguments: list[object] = [rows.folder, "--output", tmp_path / "out"]
    named = ""
    if case == "missing":
        arguments[0] = named = tmp_path / "nowhere"
    elif case == "empty":
        arguments[0] = named = tmp_path / "empty"
        (tmp_path / "empty").mkdir()
    elif case == "broken":
        named = "bad.json"
        (rows.folder / "bad.json").write_text("{", encoding="utf-8")
    elif case == "schema":
        named = "old.json"
        (rows.folder / "old.json").write_text(json.dumps({"schema_version": 0}), encoding="utf-8")
    elif case == "sweep":
        arguments += ["--sweep", "dmeo"]
        named = 'did you mean "demo"?'
    elif case == "output":
        (tmp_path / "file").write_text("", encoding="utf-8")
        arguments[2] = named = tmp_path / "file" / "out"
    elif case == "examples":
        named = f"{result.key}.examples.parquet"
        (rows.folder / named).write_bytes(b"not parquet")
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(named) in lines[0]


def test_command_writes_beside_the_results_by_default(rows, monkeypatch, capsys) -> None:
    rows.add(8, 0.02, 34.0)
    run_main(monkeypatch, rows.folder)
    run_main(monkeypatch, rows.folder)  # its own output is no result row
    assert (rows.folder / "report" / "frontier.png").exists()


def test_only_the_named_sweep_is_read(rows) -> None:
    rows.add(8, 0.02, 34.0)
    rows.add(1, 0.02, 34.0, sweep="other")
    assert [point.variant.label for point in read_study(rows.folder, "demo").points] == ["MHA"]
    with pytest.raises(InputError, match="no results of sweep"):
        read_study(rows.folder, "nothing")


def test_analysis_imports_nothing_of_ours_but_results_and_errors() -> None:
    code = (
        "import sys, analysis.report; print(sorted(m for m in sys.modules if m.startswith('gqa_exp') or m == 'torch'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['gqa_exp', 'gqa_exp.errors', 'gqa_exp.results']"
