"""The public data sets' layouts, as small local files, through the code path that reads the real ones."""

import gzip
import json
import logging

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest

from gqa_exp.config import PUBLIC_TASKS, TaskConfig
from gqa_exp.data.batching import FinetuneBatches, encode_task
from gqa_exp.data.corpus import file_hash
from gqa_exp.data.public import PUBLIC
from gqa_exp.data.tasks import baseline_predictions, load_task, task_hash
from gqa_exp.data.tokenizer import default_tokenizer
from gqa_exp.errors import InputError

LONG = "A very long document. " * 2000
SUMMARIZE = "summarize: "


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def parquet(path, rows, schema=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def config(name, folder=None, prompt=SUMMARIZE, **fields):
    return TaskConfig(name=name, prompt=prompt, data_dir=None if folder is None else str(folder), **fields)


def by_input(dataset):
    return {row["input"]: row for row in dataset}


# Columns and nesting as in the hub's repositories; the odd rows of each: empty, missing, very long, not English.
SUMMARIES = [
    ("First text.", "One."),
    ("", "no article"),
    ("no summary", None),
    (LONG, "Long."),
    ("Zoë aß Süßes 漢字.", "Zoë."),
]


def pairs(source, target, **more):
    return [{source: text, target: summary, **more} for text, summary in SUMMARIES]


def cnn_dailymail(folder):
    rows = pairs("article", "highlights", id="f00d")
    for split in ("train", "validation", "test"):
        parquet(folder / "3.0.0" / f"{split}-00000-of-00002.parquet", rows[:3])
        parquet(folder / "3.0.0" / f"{split}-00001-of-00002.parquet", rows[3:])
    parquet(folder / "1.0.0" / "train-00000-of-00001.parquet", [{"article": "old", "highlights": "old", "id": "1"}])


def arxiv(folder):
    rows = pairs("article", "abstract")
    for split in ("train", "validation", "test"):
        parquet(folder / "document" / f"{split}-00000-of-00001.parquet", rows)
        parquet(folder / "section" / f"{split}-00000-of-00001.parquet", rows[:1])


def mediasum(folder):
    for split in ("train", "validation", "test"):
        parquet(folder / "newline_prepended" / split / "0000.parquet", pairs("document", "summary", id="CNN-1"))


def multi_news(folder):
    for split in ("train", "validation", "test"):
        parquet(folder / "default" / split / "0000.parquet", pairs("document", "summary"))


def as_raw_multi_news(folder):
    folder = folder / "data"
    folder.mkdir(parents=True)
    for split in ("train", "val", "test"):
        (folder / f"{split}.src.cleaned").write_text("".join(f"{text}\n" for text, _ in SUMMARIES), encoding="utf-8")
        (folder / f"{split}.tgt.cleaned").write_text("".join(f"{s or ''}\n" for _, s in SUMMARIES), encoding="utf-8")


def as_json_lines(folder):
    for split in ("train", "val", "test"):
        jsonl(folder / f"{split}.jsonl", pairs("article", "abstract"))


def test_every_public_task_is_configured():
    assert tuple(PUBLIC) == PUBLIC_TASKS


LAYOUTS = {
    "cnn_dailymail": ("cnn_dailymail", cnn_dailymail),
    "arxiv": ("arxiv", arxiv),
    "pubmed": ("pubmed", arxiv),
    "pubmed, JSON lines": ("pubmed", as_json_lines),
    "mediasum": ("mediasum", mediasum),
    "multi_news": ("multi_news", multi_news),
    "multi_news, raw": ("multi_news", as_raw_multi_news),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_summaries(layout, split, tmp_path, caplog):
    name, write = LAYOUTS[layout]
    write(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = load_task(config(name, tmp_path), split)
    usable = {SUMMARIZE + text.strip(): summary for text, summary in SUMMARIES if text and summary}
    assert {row["input"]: row["target"] for row in found} == usable
    assert all(row["references"] == [row["target"]] for row in found)
    assert len(set(found["id"])) == 3
    assert "2 of 5 rows have no input or no output and were left out" in caplog.text
    leads = baseline_predictions(config(name, tmp_path), found)["lead"]
    assert leads == [text.removeprefix(SUMMARIZE).split()[0] for text in found["input"]]


def test_documents_of_many_parts_keep_their_joints(tmp_path):
    (tmp_path / "train.src").write_text("One. NEWLINE_CHAR Two. ||||| Three.\n", encoding="utf-8")
    (tmp_path / "train.tgt").write_text("All.\n", encoding="utf-8")
    assert load_task(config("multi_news", tmp_path), "train")["input"][:] == ["summarize: One. \n Two. ||||| Three."]
    (tmp_path / "train.tgt").write_text("All.\nMore.\n", encoding="utf-8")
    file_hash.cache_clear()  # a command remembers the hashes of files
    with pytest.raises(InputError, match=r"train.src and train.tgt differ in length: one ends before line 2"):
        load_task(config("multi_news", tmp_path), "train")
    (tmp_path / "train.src").write_bytes("Übel".encode("latin-1"))
    file_hash.cache_clear()
    with pytest.raises(InputError, match=r"train.src: cannot be read or cached \('utf-8' codec can't decode"):
        load_task(config("multi_news", tmp_path), "train")
    (tmp_path / "train.tgt").unlink()
    with pytest.raises(InputError, match=r"train.tgt is missing beside it"):
        load_task(config("multi_news", tmp_path), "train")
    with pytest.raises(InputError, match="no file of the test split"):
        load_task(config("multi_news", tmp_path), "test")


def test_raw_interviews_are_said_speaker_by_speaker(tmp_path):
    dialogues = [
        {"id": "CNN-1", "program": "P", "date": "2020", "url": "", "title": "T", "summary": "Two talk.",
         "utt": ["Hello.", "Good evening, Zoë."], "speaker": ["HOST", "GUEST"]},
        {"id": "NPR-2", "program": "P", "date": "", "url": "", "title": "T", "summary": "", "utt": [], "speaker": []},
        {"id": "NPR-3", "program": "P", "date": "2020", "url": "", "title": "T", "summary": "One talks.",
         "utt": ["Well."], "speaker": ["HOST"]},
    ]  # fmt: skip
    (tmp_path / "news_dialogue.json").write_text(json.dumps(dialogues))
    (tmp_path / "train_val_test_split.json").write_text(
        json.dumps({"train": ["CNN-1", "NPR-2"], "val": ["NPR-3"], "test": []})
    )
    task = config("mediasum", tmp_path)
    (row,) = load_task(task, "train")
    assert row["input"] == "summarize: HOST: Hello.\nGUEST: Good evening, Zoë."
    assert load_task(task, "dev")["input"][:] == ["summarize: HOST: Well."]
    (tmp_path / "train_val_test_split.json").unlink()
    with pytest.raises(InputError, match=r"train_val_test_split.json is missing beside it"):
        load_task(task, "train")


def test_translations(tmp_path):
    rows = [
        {"translation": {"de": "Guten Morgen, Zoë.", "en": "Good morning, Zoë."}},
        {"translation": {"de": "", "en": "Nothing."}},
        {"translation": {"de": "Nichts.", "en": None}},
        {"translation": None},
    ]
    parquet(tmp_path / "de-en" / "train-00000-of-00001.parquet", rows)
    parquet(tmp_path / "fr-en" / "train-00000-of-00001.parquet", [{"translation": {"fr": "Oui", "en": "Yes"}}])
    task = config("wmt14_en_de", tmp_path, "translate English to German: ", kind="translation", metric="bleu")
    (row,) = load_task(task, "train")
    assert (row["input"], row["target"]) == ("translate English to German: Good morning, Zoë.", "Guten Morgen, Zoë.")
    assert baseline_predictions(task, load_task(task, "train")) == {"copy": ["Good morning, Zoë."]}


def test_questions_have_context_and_aliases(tmp_path):
    def row(question, value, aliases, contexts):
        pages = {"doc_source": ["TagMe"] * len(contexts), "filename": [""] * len(contexts),
                 "title": [""] * len(contexts), "wiki_context": contexts}  # fmt: skip
        answer = {"value": value, "aliases": aliases, "normalized_aliases": [a.lower() for a in aliases],
                  "normalized_value": (value or "").lower(), "type": "WikipediaEntity"}  # fmt: skip
        return {"question": question, "question_id": "q", "entity_pages": pages, "answer": answer}

    rows = [
        row("Who?", "Zoë", ["Zoë", "Zoe", ""], ["First page.", LONG]),
        row("Where?", "Here", [], []),
        row("", "x", [], ["page"]),
        row("What?", None, [], ["page"]),
        {"question": "Nothing known?", "question_id": "q", "entity_pages": None, "answer": None},
    ]
    parquet(tmp_path / "rc.wikipedia" / "validation-00000-of-00001.parquet", rows)
    task = config("triviaqa", tmp_path, "question: ", kind="question answering", metric="f1")
    found = by_input(load_task(task, "dev"))
    assert set(found) == {f"question: Who? context: First page. {LONG.strip()}", "question: Where? context: "}
    assert found["question: Where? context: "]["references"] == ["Here"]
    who = found[f"question: Who? context: First page. {LONG.strip()}"]
    assert (who["target"], who["references"]) == ("Zoë", ["Zoë", "Zoe"])
    assert baseline_predictions(task, load_task(task, "dev")) == {}


# --- the user's own ---------------------------------------------------------------------------------------------------


def own(tmp_path, suffix):
    rows = [
        {"question": "Who?", "right": "Zoë"},
        {"question": "Nothing?", "right": ""},
        {"question": "Two?", "right": "2"},
    ]
    path = tmp_path / f"mine{suffix}"
    if suffix == ".parquet":
        parquet(path, rows)
    elif suffix == ".csv":
        path.write_text("question,right\nWho?,Zoë\nNothing?,\nTwo?,2\n", encoding="utf-8")
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        jsonl(path, rows)
    return config("custom", prompt="answer: ", train_files=[str(path)], source_column="question", target_column="right")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
def test_outputs_stay_as_they_are_written(tmp_path, suffix):
    """Readers that guess a column's type make other texts of numbers and dates, and nothing of NA."""
    targets = ["2", "007", "", "2020-01-01", "NA", "None", "1e3", "true"]
    for kept in (targets, targets[:3], ["2020-01-01", "2021-02-03"]):
        path = tmp_path / f"{len(kept)}{suffix}"
        rows = [{"source": f"q{n}", "target": target} for n, target in enumerate(kept)]
        if suffix == ".csv":
            path.write_text("source,target\n" + "".join(f"{r['source']},{r['target']}\n" for r in rows))
        else:
            path.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows))
        found = load_task(config("custom", prompt="", train_files=[str(path)]), "train")
        assert {r["input"]: r["target"] for r in found} == {r["source"]: r["target"] for r in rows if r["target"]}


def test_numbers_in_json_are_outputs_too(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"source": "1+1?", "target": 2}, {"source": "1/2?", "target": [0.5, "half"]}])
    with pytest.raises(InputError, match=r'a.jsonl: row 2: "target" is a list, others are not'):
        load_task(config("custom", prompt="", train_files=[str(tmp_path / "a.jsonl")]), "train")
    jsonl(tmp_path / "a.jsonl", [{"source": "1+1?", "target": 2}, {"source": "1/2?", "target": "half"}])
    file_hash.cache_clear()
    found = load_task(config("custom", prompt="", train_files=[str(tmp_path / "a.jsonl")]), "train")
    assert sorted(found["target"]) == ["2", "half"]


def test_files_of_other_tools(tmp_path):
    """A byte order mark, a list after white space, and columns that are empty at first or not asked for."""
    rows = [
        {"source": f"q{n}", "target": None if n < 1200 else "a", "note": "" if n < 1200 else n} for n in range(1201)
    ]
    for name, text in (
        ("a.jsonl", "\ufeff" + "".join(json.dumps(row) + "\n" for row in rows)),
        ("b.json", "\n  " + json.dumps(rows)),
        (
            "c.csv",
            "\ufeffsource,target,note\n" + "".join(f"q{n},{'a' if n == 1200 else ''},{n}\n" for n in range(1201)),
        ),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        found = load_task(config("custom", prompt="", train_files=[str(tmp_path / name)]), "train")
        assert [(row["input"], row["target"]) for row in found] == [("q1200", "a")]
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match=r"empty.jsonl: no row has source or target"):
        load_task(config("custom", train_files=[str(tmp_path / "empty.jsonl")]), "train")


def test_splits_of_one_file_have_their_own_ids(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"source": "q", "target": "a"}])
    files = {"train_files": [str(tmp_path / "a.jsonl")], "test_files": [str(tmp_path / "a.jsonl")]}
    ids = {split: load_task(config("custom", prompt="", **files), split)["id"][0] for split in ("train", "test")}
    assert ids == {"train": "train/0", "test": "test/0"}


def test_a_changed_file_is_read_anew(tmp_path):
    task = config("custom", prompt="", train_files=[str(tmp_path / "a.jsonl")])
    jsonl(tmp_path / "a.jsonl", [{"source": "q", "target": "before"}])
    assert load_task(task, "train")["target"][:] == ["before"]
    jsonl(tmp_path / "a.jsonl", [{"source": "q", "target": "after"}])
    file_hash.cache_clear()
    assert load_task(task, "train")["target"][:] == ["after"]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl", ".jsonl.gz"])
def test_own_files_of_every_format(tmp_path, suffix):
    found = load_task(own(tmp_path, suffix), "train")
    assert {row["input"]: row["target"] for row in found} == {"answer: Who?": "Zoë", "answer: Two?": "2"}


def test_own_targets_may_be_lists(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"source": "Who?", "target": ["Zoë", "Zoe"]}, {"source": "None?", "target": []}])
    (row,) = load_task(config("custom", prompt="", train_files=[str(tmp_path / "a.jsonl")]), "train")
    assert (row["input"], row["target"], row["references"]) == ("Who?", "Zoë", ["Zoë", "Zoe"])


def test_the_hash_follows_content_not_place(tmp_path):
    first, second, third = (tmp_path / name for name in ("one", "two", "three"))
    for folder in (first, second, third):
        cnn_dailymail(folder)
    parquet(third / "3.0.0" / "test-00001-of-00002.parquet", [{"article": "x", "highlights": "y", "id": "z"}])
    hashes = [task_hash(config("cnn_dailymail", folder)) for folder in (first, second, third)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert task_hash(config("cnn_dailymail", first, prompt="sum up: ")) != hashes[0]


def test_ids_are_cached_by_content_and_cut_ones_counted(tmp_path, caplog, monkeypatch):
    cnn_dailymail(tmp_path)
    tokenizer = default_tokenizer()
    with caplog.at_level(logging.WARNING):
        encoded = encode_task(load_task(config("cnn_dailymail", tmp_path), "train"), tokenizer, 64, 16, sentinels=False)
    assert "1 of 3 inputs are longer than 64 tokens and were cut" in caplog.text
    assert (encoded.truncated_inputs, encoded.truncated_targets) == (1, 0)
    rows = load_task(config("cnn_dailymail", tmp_path), "train")
    expected = [tokenizer.encode(row["input"], max_tokens=64) for row in rows]
    assert list(encoded.input_ids) == expected
    assert encoded.lengths == [
        (len(ids), len(tokenizer.encode(row["target"]))) for ids, row in zip(expected, rows, strict=True)
    ]
    batches = FinetuneBatches(encoded.input_ids, encoded.target_ids, 512, 0, lengths=encoded.lengths)
    assert batches.batch(0)["labels"].shape[0] == 3

    monkeypatch.setattr(type(tokenizer), "encode_batch", None)  # it is not called again
    again = encode_task(load_task(config("cnn_dailymail", tmp_path), "train"), tokenizer, 64, 16, sentinels=False)
    assert list(again.input_ids) == expected


def test_sentinels_in_public_text_are_text(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"source": "what <extra_id_0> is", "target": "<extra_id_200>"}])
    found = load_task(config("custom", prompt="", train_files=[str(tmp_path / "a.jsonl")]), "train")
    tokenizer = default_tokenizer()
    encoded = encode_task(found, tokenizer, 64, 64, sentinels=False)
    assert list(encoded.input_ids) == [tokenizer.encode("what <extra_id_0> is")]


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_bad_folders_and_files_end_in_one_clear_line(tmp_path):
    def refused(task, said, split="train"):
        with pytest.raises(InputError, match=said) as raised:
            load_task(task, split)
        assert "\n" not in str(raised.value)

    refused(
        config("cnn_dailymail", tmp_path / "none"), "no such folder; it must hold the files of abisee/cnn_dailymail"
    )
    refused(config("cnn_dailymail", tmp_path), "no file of the train split.*as in the repository of abisee")
    parquet(tmp_path / "train.parquet", [{"article": "a", "highlight": "b"}])
    refused(config("cnn_dailymail", tmp_path), 'train.parquet: no column "highlights"; did you mean "highlight"')
    parquet(tmp_path / "train.parquet", [{"article": "", "highlights": "b"}, {"article": "a", "highlights": None}])
    refused(config("cnn_dailymail", tmp_path), "none of the 2 rows has both an input and an output")
    (tmp_path / "train.parquet").write_bytes(b"hello")
    refused(config("cnn_dailymail", tmp_path), r"train.parquet: cannot be read or cached \(")
    jsonl(tmp_path / "other" / "train.jsonl", [{"article": "a", "highlight": "b"}])
    refused(
        config("cnn_dailymail", tmp_path / "other"), 'train.jsonl: no column "highlights"; did you mean "highlight"'
    )
    (tmp_path / "other" / "train.jsonl").write_text("hello\n")
    refused(config("cnn_dailymail", tmp_path / "other"), r"train.jsonl: cannot be read or cached \(Expecting value")
    for name in ("1.0.0", "2.0.0"):
        parquet(tmp_path / "two" / name / "train.parquet", [{"article": "a", "highlights": "b"}])
    refused(config("cnn_dailymail", tmp_path / "two"), "split lie in 1.0.0, 2.0.0, none of them 3.0.0")
    refused(config("custom"), "task.train_files is empty")
    refused(config("custom", train_files=[str(tmp_path / "x.csv")]), r"task.train_files: .*x.csv: no such file")
    (tmp_path / "x.txt").touch()
    refused(
        config("custom", train_files=[str(tmp_path / "x.txt")]), "x.txt: files must be of one of the formats .parquet"
    )
    refused(config("cnn_dailymal"), 'did you mean "cnn_dailymail"')


def test_without_a_network_the_way_out_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name, said in (("cnn_dailymail", "abisee/cnn_dailymail"), ("multi_news", "alexfabbri/multi_news")):
        with pytest.raises(
            InputError, match=f"{said}: not to be had from the Hugging Face hub .*task.data_dir"
        ) as raised:
            load_task(config(name), "train")
        assert "\n" not in str(raised.value)


def test_a_full_disk_is_said(monkeypatch, tmp_path):
    cnn_dailymail(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    task, said = config("cnn_dailymail", tmp_path), r"cannot be read or cached \(\[Errno 28\] No space left on device"
    examples = load_task(task, "train")
    for owner, name in ((datasets, "load_dataset"), (datasets.Dataset, "map")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(InputError, match=said):
                load_task(task, "train")
            if name == "map":
                with pytest.raises(InputError, match=said):
                    encode_task(examples, default_tokenizer(), 64, 16)
