import json
import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_exp import results
from gqa_exp.results import (
    Result,
    read_examples,
    read_frame,
    read_results,
    write_atomically,
    write_examples,
    write_result,
)


def point(key="abc", **values):
    point = {
        "status": "done",
        "sweep": "single",
        "label": "GQA-2",
        "model": "mini",
        "task": "debian_synopsis",
        "task_kind": "summarization",
        "num_heads": 8,
        "num_kv_heads": [2, 2],
        "method": "mean",
        "proportion": 0.05,
        "seed": 0,
    }
    return Result(key=key, **{**point, **values})


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5))
FAMILIES = st.dictionaries(st.text(min_size=1, max_size=8), SCALARS, max_size=3)  # names with dots and spaces too


@given(
    time=FAMILIES,
    metrics=FAMILIES,
    environment=FAMILIES,
    num_kv_heads=st.lists(st.integers(1, 64), max_size=4),
    error=st.one_of(st.none(), st.text()),
    score=st.one_of(st.none(), st.floats(allow_nan=False)),
)
@settings(deadline=None)
def test_row_and_back_is_the_identity(**values):
    result = point(**values)
    row = result.row()
    assert not any(isinstance(value, dict | list) for value in row.values())
    assert Result.from_row(row) == result
    assert Result.from_row(json.loads(json.dumps(row))) == result


def test_rows_are_flat():
    row = point(time={"speedup": 1.5, "by.batch": 2}, stages={"base": "k1"}).row()
    assert row["time.speedup"] == 1.5
    assert row["time.by.batch"] == 2
    assert row["stages.base"] == "k1"
    assert row["num_kv_heads"] == "[2, 2]"
    assert row["key"] == "abc"
    assert "time" not in row


def test_write_and_read(tmp_path):
    folder = tmp_path / "new" / "results"
    first = point("a", score=12.5, metrics={"rouge1": 12.5}, started="2026-01-01T00:00:00Z")
    diverged = point("b", status="diverged", error="finetune: loss is not finite at step 3", seed=1)
    assert write_result(folder, diverged) == folder / "b.json"
    write_result(folder, first)
    assert read_results(folder) == [first, diverged]
    write_result(folder, point("a", score=13.0))
    assert [result.score for result in read_results(folder)] == [13.0, None]
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.json"]


def test_not_a_number_survives_writing(tmp_path):
    write_result(tmp_path, point(training={"uptrain_loss": math.nan}))
    (result,) = read_results(tmp_path)
    assert math.isnan(result.training["uptrain_loss"])


def test_order_is_task_then_size_then_method_proportion_and_seed(tmp_path):
    expected = [
        point("z", task="a", num_kv_heads=[1, 1]),
        point("y", num_kv_heads=[8, 8]),
        point("x", num_kv_heads=[2, 4]),
        point("w", method="first", seed=3),
        point("v", proportion=0.0, seed=2),
        point("u", seed=1),
        point("t", seed=2),
    ]
    for result in expected:
        write_result(tmp_path, result)
    assert [result.key for result in read_results(tmp_path)] == ["z", "y", "x", "w", "v", "u", "t"]


def test_frame_has_a_column_per_flat_field(tmp_path):
    write_result(tmp_path, point("a", time={"speedup": 2.0}))
    write_result(tmp_path, point("b", seed=1, metrics={"bleu": 30.0}))
    frame = read_frame(tmp_path)
    assert list(frame["key"]) == ["a", "b"]
    assert frame["time.speedup"][0] == 2.0
    assert math.isnan(frame["time.speedup"][1])
    assert frame["metrics.bleu"][1] == 30.0


def test_an_empty_folder_has_no_results(tmp_path):
    assert read_results(tmp_path) == []
    assert read_frame(tmp_path).empty


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"key": ',
        "[]",
        "[1, 2]",
        '"text"',
        "3",
        "null",
        "{}",
        json.dumps({**point().row(), "schema_version": 99}),
        json.dumps({**point().row(), "no_such_field": 1}),
        json.dumps({name: value for name, value in point().row().items() if name != "num_kv_heads"}),
        json.dumps({name: value for name, value in point().row().items() if name != "label"}),
        json.dumps({**point().row(), "num_kv_heads": [2]}),
        "\udcff",  # written as a byte that is no UTF-8
    ],
)
def test_an_unreadable_row_is_named(tmp_path, text):
    write_result(tmp_path, point("good"))
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match="not a result row") as raised:
        read_results(tmp_path)
    assert str(raised.value).startswith(f"{path}: ")


def test_a_row_of_another_schema_says_so():
    with pytest.raises(ValueError, match="schema version 99, this code reads 1"):
        Result.from_row({**point().row(), "schema_version": 99})


def test_examples_round_trip(tmp_path):
    examples = pd.DataFrame(
        {
            "id": ["1", "2"],
            "prediction": ["ä b", ""],
            "references": [["x"], ["y", "z"]],
            "rouge1": [0.5, 1.0],
            "bleu_stats": [[1, 2, 3], [4, 5, 6]],
        }
    )
    assert write_examples(tmp_path / "new", "abc", examples) == tmp_path / "new" / "abc.examples.parquet"
    read = read_examples(tmp_path / "new", "abc")
    assert list(read.columns) == list(examples.columns)
    assert [list(row) for row in read["references"]] == [["x"], ["y", "z"]]
    assert [list(row) for row in read["bleu_stats"]] == [[1, 2, 3], [4, 5, 6]]
    assert list(read["prediction"]) == ["ä b", ""]
    assert list(read["rouge1"]) == [0.5, 1.0]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["abc.examples.parquet"]


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, failure):
    path = tmp_path / "row.json"
    write_atomically(path, "old")

    def fail(*_):
        raise failure

    monkeypatch.setattr(results.os, "replace", fail)
    with pytest.raises(failure):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [left for left in tmp_path.glob("**/*") if left.is_file()] == [path]


def test_a_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path):
    path = tmp_path / "row.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \udcff")
    assert path.read_text() == "old"
    assert [left for left in tmp_path.glob("**/*") if left.is_file()] == [path]
