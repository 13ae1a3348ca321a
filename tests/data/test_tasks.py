"""The tasks hold what they promise, on a sample of the shipped tables."""

import dataclasses
import hashlib
import re
import statistics
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import datasets
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gqa_exp.config import TaskConfig, check_ranges
from gqa_exp.data import embedded, tasks
from gqa_exp.data.public import KNOWN
from gqa_exp.data.tasks import TASKS, baseline_predictions, load_task, task_hash
from gqa_exp.errors import InputError

SPLITS = ("train", "dev", "test")
CONF = Path(__file__).parents[2] / "conf" / "task"

Load = Callable[..., list[dict[str, object]]]


def config(name: str, **changes: object) -> TaskConfig:
    return TaskConfig(**{**yaml.safe_load((CONF / f"{name}.yaml").read_text())["task"], **changes})


def sampled(table: datasets.Dataset, column: str) -> datasets.Dataset:
    """A tenth of the groups (source packages, help pages)."""
    return table.filter(lambda group: hashlib.md5(group.encode()).digest()[0] < 26, input_columns=column)


@pytest.fixture(scope="module", autouse=True)
def tables() -> Iterator[dict[str, datasets.Dataset]]:
    kept = {
        "packages": sampled(embedded.packages(), "source"),
        "help_segments": sampled(embedded.help_segments(), "page"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, table in kept.items():
            patch.setattr(embedded, name, lambda table=table: table)
        yield kept


@pytest.fixture(scope="module")
def load() -> Load:
    @cache
    def rows(name: str, split: str, passages: int = 1) -> list[dict[str, object]]:
        return load_task(config(name, passages=passages), split).to_list()

    return rows


@pytest.fixture(scope="module")
def by_name(tables: dict[str, datasets.Dataset]) -> dict[str, dict[str, str]]:
    return {row["name"]: row for row in tables["packages"].to_list()}


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+(?:-[^\W_]+)*", text.casefold()))


# --- all tasks --------------------------------------------------------------------------------------------------------


def test_each_task_has_its_configuration_and_no_other():
    files = {path.stem for path in CONF.glob("*.yaml")}
    assert files == {*TASKS, *KNOWN}
    for name in files:
        check_ranges(config(name))
        assert config(name).name == name


@pytest.mark.parametrize("name", TASKS)
def test_examples_are_whole(name, load):
    prompt = config(name).prompt
    for split in SPLITS:
        rows = load(name, split)
        assert len(rows) >= 20
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            assert list(row) == ["id", "group", "input", "target", "references"]
            assert row["input"].startswith(prompt)
            assert len(row["input"]) > len(prompt)
            assert row["target"].strip()
            assert row["target"].startswith("<extra_id_0> ")
            assert row["input"].count("<extra_id_0>") >= 1
            assert re.sub("<extra_id_[0-9]+> ", "", row["target"]) in row["references"]


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_group_and_no_text(name, load):
    for column in ("group", "id", "input"):
        parts = [{row[column] for row in load(name, split)} for split in SPLITS]
        assert sum(map(len, parts)) == len(set.union(*parts))


def test_all_tasks_split_alike(tables, load):
    split_of = {row["source"]: row["split"] for row in tables["packages"].to_list()}
    split_of |= {row["page"]: row["split"] for row in tables["help_segments"].to_list()}
    for name in TASKS:
        for split in SPLITS:
            assert {split_of[row["group"]] for row in load(name, split)} == {split}


@pytest.mark.parametrize("name", TASKS)
def test_the_order_is_shuffled_and_owes_nothing_to_other_examples(name, load, tables, monkeypatch):
    before = load(name, "dev")
    ids = [row["id"] for row in before]
    assert ids != sorted(ids)
    half = tables["packages"].filter(
        lambda source: hashlib.md5(source.encode()).digest()[1] < 128, input_columns="source"
    )
    monkeypatch.setattr(embedded, "packages", lambda: half)
    after = load_task(config(name), "dev").to_list()
    assert 0 < len(after) < len(before)
    kept = {row["id"] for row in after}
    if name != "en_de":  # there an example may appear whose duplicate went
        assert after == [row for row in before if row["id"] in kept]
    assert [i for i in ids if i in kept] == [row["id"] for row in after if row["id"] in set(ids)]


def test_an_unknown_task_is_refused_with_the_nearest():
    wrong = TaskConfig(name="debian_synopses")
    for call in (lambda: load_task(wrong, "dev"), lambda: task_hash(wrong), lambda: baseline_predictions(wrong, None)):
        with pytest.raises(InputError, match='did you mean "debian_synopsis"'):
            call()


def test_the_hash_follows_what_shapes_the_examples(monkeypatch, tmp_path):
    cloze = config("debian_cloze")
    shaping = [cloze, config("en_de"), *(config("debian_cloze", **c) for c in ({"passages": 2}, {"prompt": "x"}))]
    assert len({task_hash(c) for c in shaping}) == 4
    assert task_hash(dataclasses.replace(cloze, metric="exact_match", max_target_tokens=9)) == task_hash(cloze)
    for table in ("packages", "help"):
        (tmp_path / f"{table}.parquet").write_bytes(b"other text")
    before = task_hash(cloze)
    monkeypatch.setattr(embedded, "FOLDER", tmp_path)
    assert task_hash(cloze) != before


# --- summarization ----------------------------------------------------------------------------------------------------


def test_a_synopsis_belongs_to_its_description(by_name, load):
    for row in load("debian_synopsis", "dev")[:50]:
        source = by_name[row["id"]]
        assert row["references"] == [source["synopsis"]]
        assert row["target"] == f"<extra_id_0> {source['synopsis']}"
        assert row["input"] == f"summarize: {row['id']}: <extra_id_0> {' '.join(source['body'].split())}"
        assert len(source["body"].split()) >= 30
        assert not re.match(r"lib|python3?-", row["id"])
        assert not re.search(r"-(dev|dbg|doc|data)$", row["id"])


def test_many_documents_are_all_packages_of_a_source(by_name, load):
    rows = load("debian_multi", "train")
    assert max(len(row["input"].split()) for row in rows) > 200
    for row in rows[:50]:
        members = [p for p in by_name.values() if p["source"] == row["id"]]
        blocks = row["input"].removeprefix("summarize: ").split("\n")
        assert [block.partition(": ")[0] for block in blocks] == sorted(p["name"] for p in members)
        synopses = [p["synopsis"] for p in sorted(members, key=lambda p: p["name"])]
        assert row["references"] == [" . ".join(synopses)]
        assert row["target"] == " . ".join(f"<extra_id_{i}> {synopsis}" for i, synopsis in enumerate(synopses))
        bodies = {p["name"]: " ".join(p["body"].split()) for p in members}
        for i, (name, _, shown) in enumerate(block.partition(": ") for block in blocks):
            assert shown.startswith(f"<extra_id_{i}> ")
            assert bodies[name].startswith(shown.removeprefix(f"<extra_id_{i}> "))
        assert len(set(bodies.values())) >= 2


@given(st.lists(st.integers(1, 60), min_size=1, max_size=10), st.integers(10, 200))
def test_the_longest_give_way_first(lengths, words):
    texts = [" ".join(f"{i}.{n}" for n in range(length)) for i, length in enumerate(lengths)]
    cut = tasks._cut_to_share(texts, words)
    sizes = [len(text.split()) for text in cut]
    assert all(text.startswith(shown) and shown for text, shown in zip(texts, cut, strict=True))
    assert sum(sizes) <= words
    if sum(lengths) <= words:
        assert cut == texts
    else:
        assert words - sum(sizes) < len(texts)  # no room is wasted
        shares = {size for size, length in zip(sizes, lengths, strict=True) if size < length}
        assert len(shares) == 1
        assert max(sizes) == shares.pop()


def test_lead_is_the_descriptions_first_words(load):
    data = load_task(config("debian_synopsis"), "dev")
    predictions = baseline_predictions(config("debian_synopsis"), data)["lead"]
    mean = statistics.mean(len(row["references"][0].split()) for row in load("debian_synopsis", "train"))
    for row, prediction in zip(data.to_list(), predictions, strict=True):
        body = row["input"].partition(f"{row['id']}: <extra_id_0> ")[2].split()
        assert prediction.split() == body[: round(mean)]


def test_lead_of_many_documents_takes_from_each(load):
    data = load_task(config("debian_multi"), "dev").select(range(20))
    for row, prediction in zip(data.to_list(), baseline_predictions(config("debian_multi"), data)["lead"], strict=True):
        parts, blocks = prediction.split(" . "), row["input"].split("\n")
        if prediction.count(" . ") == len(blocks) - 1:  # no description has the mark itself
            assert all(part in block for part, block in zip(parts, blocks, strict=True))


# --- translation ------------------------------------------------------------------------------------------------------


def test_pairs_are_aligned_segments(tables, by_name, load):
    segments = {(row["page"], row["en"], row["de"]) for row in tables["help_segments"].to_list()}
    kinds = set()
    for row in load("en_de", "dev"):
        english = row["input"].removeprefix("translate English to German: ").removesuffix(" <extra_id_0>")
        [german] = row["references"]
        assert row["target"] == f"<extra_id_0> {german}"
        kind, name = row["id"].split("/")[:2]
        kinds.add(kind)
        assert english.casefold() != german.casefold()
        assert 0.5 <= len(german) / len(english) <= 2
        assert all(2 <= len(text.split()) <= 100 for text in (english, german))
        if kind == "help":
            assert (row["group"], english, german) in segments
        else:
            found = by_name[name]
            pairs = zip(found["body"].split("\n"), found["body_de"].split("\n"), strict=False)
            assert (english, german) in [*pairs, (found["synopsis"], found["synopsis_de"])]
    assert kinds == {"help", "debian"}


def test_no_english_text_comes_twice(load):
    english = [row["input"].casefold() for split in SPLITS for row in load("en_de", split)]
    assert len(english) == len(set(english))


def test_copy_is_the_source():
    data = load_task(config("en_de"), "dev").select(range(20))
    (copies,) = baseline_predictions(config("en_de"), data).values()
    assert [f"translate English to German: {copy} <extra_id_0>" for copy in copies] == list(data["input"])


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passages", [1, 4])
def test_the_answer_stands_in_the_context_and_not_in_the_question(passages, by_name, load):
    for row in load("debian_cloze", "dev", passages):
        question, _, context = row["input"].partition(" context: ")
        [reference] = row["references"]
        answer = reference.casefold()
        assert row["target"] == f"<extra_id_0> {reference}"
        assert answer in words_of(context)
        assert answer not in question.removeprefix("question: ").replace("<extra_id_0>", "").casefold()
        name, _, blanked = question.removeprefix("question: ").partition(": ")
        assert name == row["id"]
        assert "<extra_id_0>" in blanked
        assert blanked.replace("<extra_id_0>", reference).casefold() == by_name[name]["synopsis"].casefold()
        assert sum(map(str.isalpha, answer)) >= 4


def test_passages_are_packages_of_the_split_the_right_one_anywhere(by_name, load):
    places, most_tokens = [], config("debian_cloze").max_input_tokens
    for row in load("debian_cloze", "dev", 4):
        blocks = [block.partition(": ") for block in row["input"].partition(" context: ")[2].split("\n")]
        names = [name for name, _, _ in blocks]
        assert len({by_name[name]["source"] for name in names}) == 4
        assert {by_name[name]["split"] for name in names} == {"dev"}
        places.append(names.index(row["id"]))
        right = blocks[places[-1]][2]
        assert row["references"][0].casefold() in words_of(right)
        assert len(row["input"].split()) <= most_tokens / 2
    assert set(places) == {0, 1, 2, 3}
    distractors = {n for row in load("debian_cloze", "dev", 4) for n in re.findall(r"\n(\S+): ", row["input"])}
    assert len(distractors) > 20


def test_more_passages_than_packages_are_refused():
    with pytest.raises(InputError, match=r"has only \d+ source packages"):
        load_task(config("debian_cloze", passages=10**6), "dev")


def test_nothing_is_blanked_that_would_still_be_seen():
    blank = tasks._blank_out
    assert blank("tool", "editor of Sounds", "it edits sounds, sounds") == ("editor of <extra_id_0>", "Sounds")
    assert blank("tool", "sounds of sounds", "it edits sounds") == ("<extra_id_0> of <extra_id_0>", "sounds")
    assert blank("tool", "extra sounds", "with extra noise") == ("<extra_id_0> sounds", "extra")
    assert blank("gimp-sounds", "editor of sounds", "it edits sounds") is None  # the name tells
    assert blank("tool", "plays soundscapes of sound", "plain sound") is None  # another word tells
    assert blank("tool", "this with sounds", "this with noises") is None  # only stop words stand in the body
    assert blank("tool", "multi-player game", "a game, multi-player") is not None


def test_cloze_baselines_on_a_context_read_by_hand():
    text = (
        "question: frob: fast <extra_id_0> for colour images context: frob: Frob turns slides into a viewer. "
        "The viewer is good, the viewer is fast. It is a fast converter for colour images.\nother: plain text"
    )
    twice = "question: b: mixing <extra_id_0> with <extra_id_0> context: b: extra sounds, mixing sounds with extra care"
    data = datasets.Dataset.from_dict({"input": [text, "question: a: <extra_id_0> context: ", twice]})
    predictions = baseline_predictions(config("debian_cloze"), data)
    assert predictions == {"frequent": ["viewer", "", "extra"], "overlap": ["converter", "", "extra"]}
