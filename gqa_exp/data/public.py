"""Tasks on other text than the embedded one: the paper's seven public data sets, and files of the user's own.

Prompts and preprocessing are those of the paper's authors (public T5 and LongT5 code; see PAPER.md for what is known).
A data set comes by its hub id, or from `task.data_dir`: the files of its hub repository, or where that holds a loading
script, its Parquet conversion or the raw files. Rows without input or output are left out, counted and logged.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from gqa_exp.config import CUSTOM, Split, TaskConfig
from gqa_exp.data.corpus import file_hash
from gqa_exp.errors import InputError, one_line, suggest

logger = logging.getLogger(__name__)

PUBLIC_VERSION = 1
"""Raise when the same files and configuration would give other examples."""
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""What files and folders call each split; hub data sets the first."""
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
CONTEXT = " context: "
LEAD_SAMPLE = 10_000
"""Training targets whose mean length tells how long a lead is."""

Row = Mapping[str, Any]
Source = tuple[str, str, list[str]]
"""Input without the prompt, target, and all accepted outputs."""


@dataclass(frozen=True)
class PublicTask:
    """A data set of the hub, and how one of its rows becomes an example.

    Attributes:
        hub_id: of the repository.
        config: its configuration, a folder of its files.
        columns: that a row must have.
        example: of a row.
        scripted: its repository holds a loading script, which is not run: the hub's Parquet conversion is read instead.
        raw: reads a split of the raw files in a folder; None where the folder has none, or there is no such form.
    """

    hub_id: str
    config: str
    columns: tuple[str, ...]
    example: Callable[[Row], Source]
    scripted: bool = False
    raw: Callable[[Path, Split], list[dict[str, Any]] | None] | None = None


def _summary(source: str, target: str) -> Callable[[Row], Source]:
    def example(row: Row) -> Source:
        return _text(row[source]), _text(row[target]), [_text(row[target])]

    return example


def _translation(row: Row) -> Source:
    english, german = _text(row["translation"]["en"]), _text(row["translation"]["de"])
    return english, german, [german]


def _question(row: Row) -> Source:
    """Question and the Wikipedia pages it was answered from; the value is the target, its aliases are right too."""
    answer = row["answer"]
    contexts = " ".join(_text(page) for page in row["entity_pages"]["wiki_context"])
    value = _text(answer["value"])
    references = dict.fromkeys([value, *(_text(alias) for alias in answer["aliases"] or [])])
    question = _text(row["question"])
    return f"{question}{CONTEXT}{contexts}" if question else "", value, [alias for alias in references if alias]


def _text(value: Any) -> str:
    """A text without outer space; anything missing is empty."""
    return value.strip() if isinstance(value, str) else ""


def _interview(row: Row) -> Source:
    """MediaSum's raw dialogues, said as `speaker: utterance`; its conversions hold the document as a text."""
    if isinstance(row.get("document"), str):
        return _text(row["document"]), _text(row["summary"]), [_text(row["summary"])]
    turns = zip(row["speaker"] or [], row["utt"] or [], strict=False)
    document = "\n".join(f"{_text(speaker)}: {_text(utterance)}" for speaker, utterance in turns)
    return document, _text(row["summary"]), [_text(row["summary"])]


def _raw_multi_news(folder: Path, split: Split) -> list[dict[str, Any]] | None:
    """`train.src.cleaned` and `train.tgt.cleaned`, one document and one summary a line."""
    for name in SPLIT_NAMES[split]:
        for source in sorted(folder.rglob(f"{name}.src*")):
            target = source.with_name(source.name.replace(".src", ".tgt"))
            if not target.is_file():
                raise InputError(f"{source}: {target.name} is missing beside it; it holds the summaries")
            texts = [path.read_text(encoding="utf-8").split("\n") for path in (source, target)]
            documents, summaries = (lines[:-1] if lines[-1] == "" else lines for lines in texts)
            if len(documents) != len(summaries):
                raise InputError(f"{source} has {len(documents)} lines, but {target.name} has {len(summaries)}")
            break_line = "NEWLINE_CHAR"
            return [
                {"document": document.replace(break_line, "\n"), "summary": summary}
                for document, summary in zip(documents, summaries, strict=True)
            ]
    return None


def _raw_mediasum(folder: Path, split: Split) -> list[dict[str, Any]] | None:
    """`news_dialogue.json`, and `train_val_test_split.json` with the ids of each split."""
    dialogues, split_file = folder / "news_dialogue.json", folder / "train_val_test_split.json"
    if not dialogues.is_file():
        return None
    try:
        ids = json.loads(split_file.read_text(encoding="utf-8"))
        wanted = next(set(ids[name]) for name in SPLIT_NAMES[split] if name in ids)
        rows = json.loads(dialogues.read_text(encoding="utf-8"))
        kept = ("id", "summary", "utt", "speaker")
        return [{name: row[name] for name in kept} for row in rows if row["id"] in wanted]
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise InputError(
            f"{folder}: MediaSum's raw files cannot be read ({one_line(error)}); "
            f"it takes {dialogues.name} and {split_file.name}"
        ) from error


PUBLIC = {
    "cnn_dailymail": PublicTask(
        "abisee/cnn_dailymail", "3.0.0", ("article", "highlights"), _summary("article", "highlights")
    ),
    "arxiv": PublicTask(
        "ccdv/arxiv-summarization", "document", ("article", "abstract"), _summary("article", "abstract")
    ),
    "pubmed": PublicTask(
        "ccdv/pubmed-summarization", "document", ("article", "abstract"), _summary("article", "abstract")
    ),
    "mediasum": PublicTask("ccdv/mediasum", "document", ("summary",), _interview, scripted=True, raw=_raw_mediasum),
    "multi_news": PublicTask(
        "alexfabbri/multi_news",
        "default",
        ("document", "summary"),
        _summary("document", "summary"),
        scripted=True,
        raw=_raw_multi_news,
    ),
    "wmt14_en_de": PublicTask("wmt/wmt14", "de-en", ("translation",), _translation),
    "triviaqa": PublicTask("mandarjoshi/trivia_qa", "rc.wikipedia", ("question", "entity_pages", "answer"), _question),
}
KNOWN = (*PUBLIC, CUSTOM)


def load_public(config: TaskConfig, split: Split) -> datasets.Dataset:
    """A split of a public data set or of the user's own files, in a fixed shuffled order.

    Args:
        config: one of `KNOWN`.
        split: dev is what data sets call validation.

    Returns:
        Columns id, group (the id), input, target (text) and references (list of text).

    Raises:
        InputError: files that are missing or cannot be read, a hub that cannot be reached, a missing column, or no
            usable row.
    """
    where, rows = _rows(config, split)
    task = PUBLIC.get(config.name)
    columns = (config.source_column, config.target_column) if task is None else task.columns
    for column in columns:
        if column not in rows.column_names:
            raise InputError(f'{where}: no column "{column}"; {suggest(column, rows.column_names)}')
    example = _own(config) if task is None else task.example
    prompt = config.prompt

    def examples(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        kept: dict[str, list[Any]] = {name: [] for name in FEATURES}
        for place, index in enumerate(indices):
            source, target, references = example({name: values[place] for name, values in batch.items()})
            if source and target:
                name = f"{split}/{index}"
                for column, value in zip(kept.values(), (name, name, prompt + source, target, references), strict=True):
                    column.append(value)
        return kept

    made = rows.map(
        examples,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=FEATURES,
        new_fingerprint=_fingerprint(rows, config),
        desc=f"reading {config.name}",
    )
    dropped = len(rows) - len(made)
    if not len(made):
        raise InputError(f"{where}: none of the {len(rows)} rows has both an input and an output")
    if dropped:
        logger.warning("%s: %d of %d rows have no input or no output and were left out", where, dropped, len(rows))
    return made.shuffle(seed=0)


FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "group": datasets.Value("string"),
        "input": datasets.Value("string"),
        "target": datasets.Value("string"),
        "references": datasets.List(datasets.Value("string")),
    }
)


def public_hash(config: TaskConfig) -> str:
    """Content hash of what determines the examples: files, or the hub's fingerprints, and the fields that shape them.

    Raises:
        InputError: as `load_public`.
    """
    content: list[str] = []
    for split in SPLIT_NAMES:
        files = _files(config, split, optional=True)
        if files is None:
            content.append(str(_from_hub(PUBLIC[config.name], split)[1]._fingerprint))
        else:
            content += [split, *(file_hash(path) for path in files)]
    shape = [config.name, config.prompt, config.source_column, config.target_column]
    return hashlib.sha256(json.dumps([PUBLIC_VERSION, shape, content]).encode()).hexdigest()


def public_baselines(config: TaskConfig, dataset: datasets.Dataset) -> dict[str, list[str]]:
    """What one gets without a model: "lead" for summaries, "copy" for translations, nothing for questions.

    Args:
        config: the task.
        dataset: its examples, from `load_public`.
    """
    inputs = [text.removeprefix(config.prompt) for text in dataset["input"]]
    if config.kind == "translation":
        return {"copy": inputs}
    if config.kind == "question answering":
        return {}
    train = load_public(config, "train")
    sample = train.select(range(min(LEAD_SAMPLE, len(train))))["target"]
    words = round(sum(len(target.split()) for target in sample) / len(sample))
    return {"lead": [" ".join(text.split()[:words]) for text in inputs]}


# --- where rows come from ---------------------------------------------------------------------------------------------


def _rows(config: TaskConfig, split: Split) -> tuple[str, datasets.Dataset]:
    """The rows of a split, and what to call the place they are from."""
    task = PUBLIC.get(config.name)
    files = _files(config, split)
    if files is None:
        assert task is not None
        return _from_hub(task, split)
    if task is not None and task.raw is not None and config.data_dir and _raw_files(Path(config.data_dir)):
        raw = task.raw(Path(config.data_dir), split)
        if raw is None:
            raise InputError(
                f"task.data_dir={config.data_dir}: raw files, but none of the {SPLIT_NAMES[split][0]} split"
            )
        return config.data_dir, datasets.Dataset.from_list(raw)
    return str(files[0]), _read(files)


def _files(config: TaskConfig, split: Split, optional: bool = False) -> list[Path] | None:
    """The files of a split, at least one unless `optional`; None where the data set is to come from the hub."""
    if config.name == CUSTOM:
        given = {"train": config.train_files, "dev": config.dev_files, "test": config.test_files}[split]
        if not given and not optional:
            raise InputError(f"task.{split}_files is empty; name files with the columns of task=custom")
        for path in given:
            if not Path(path).is_file():
                raise InputError(f"task.{split}_files: {path}: no such file")
        return [Path(path) for path in given]
    if config.data_dir is None:
        return None
    task, folder = PUBLIC[config.name], Path(config.data_dir)
    if not folder.is_dir():
        raise InputError(f"task.data_dir={folder}: no such folder; it must hold the files of {task.hub_id}")
    if task.raw is not None and (raw := _raw_files(folder)):
        return raw
    root = folder / task.config if (folder / task.config).is_dir() else folder
    found = [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and _suffix(path) in READERS and _is_of(path.relative_to(root), split)
    ]
    if not found and not optional:
        names = SPLIT_NAMES[split]
        raise InputError(
            f"task.data_dir={folder}: no file of the {names[0]} split; it takes files or folders whose names say "
            f"{' or '.join(names)}, of {', '.join(READERS)}, as in the repository of {task.hub_id}"
        )
    return found


def _raw_files(folder: Path) -> list[Path]:
    """The raw files of data sets whose repositories hold scripts."""
    patterns = ("*.src*", "*.tgt*", "news_dialogue.json", "train_val_test_split.json")
    return sorted({path for pattern in patterns for path in folder.rglob(pattern)})


def _suffix(path: Path) -> str:
    """The suffix that tells the format, compression left aside."""
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst", ".xz") else path.suffix


def _is_of(path: Path, split: Split) -> bool:
    """Whether a path names the split: `train-00000-of-00003.parquet`, `default/train/0000.parquet`, `val.jsonl`."""
    words = re.split(r"[^a-z]+", str(path).lower())
    return any(name in words for name in SPLIT_NAMES[split])


def _read(files: Sequence[Path]) -> datasets.Dataset:
    """Rows of files of one format, from the cache of `datasets` where they are unchanged."""
    formats = {READERS.get(_suffix(path)) for path in files}
    if len(formats) != 1 or None in formats:
        raise InputError(f"{files[0]}: files must be of one of the formats {', '.join(READERS)}")
    try:
        return datasets.load_dataset(formats.pop(), data_files=[str(path) for path in files], split="train")
    except OSError as error:  # the disk, most likely
        raise InputError(f"{files[0]}: cannot be read or cached ({one_line(error)[:200]})") from error
    except Exception as error:  # readers of several libraries
        cause = error.__cause__ or error
        raise InputError(f"{files[0]}: cannot be read ({one_line(cause)[:200]})") from error


def _from_hub(task: PublicTask, split: Split) -> tuple[str, datasets.Dataset]:
    """A split of a hub data set, from the cache of `datasets` or the network."""
    name = SPLIT_NAMES[split][0]
    try:
        if task.scripted:
            converted = f"hf://datasets/{task.hub_id}@refs/convert/parquet/{task.config}/{name}/*.parquet"
            return task.hub_id, datasets.load_dataset("parquet", data_files=converted, split="train")
        return task.hub_id, datasets.load_dataset(task.hub_id, task.config, split=name)
    except Exception as error:  # of several libraries
        raise InputError(
            f"{task.hub_id}: not to be had from the Hugging Face hub ({one_line(error)[:120]}); download the files of "
            f"its {task.config} configuration{' (Parquet conversion or raw)' if task.scripted else ''} into a folder, "
            "and give that as task.data_dir"
        ) from error


def _own(config: TaskConfig) -> Callable[[Row], Source]:
    """Examples of the user's files; a target may be a list, all of which is right."""

    def example(row: Row) -> Source:
        target = row[config.target_column]
        texts = target if isinstance(target, list) else [target]
        references = [text for text in map(_cell, texts) if text]
        return _cell(row[config.source_column]), references[0] if references else "", references

    return example


def _cell(value: Any) -> str:
    """A cell as text; numbers are written out."""
    return "" if value is None else _text(value if isinstance(value, str) else str(value))


def _fingerprint(rows: datasets.Dataset, config: TaskConfig) -> str:
    """Names the cached examples of these rows."""
    shape = [PUBLIC_VERSION, config.name, config.prompt, config.source_column, config.target_column]
    return hashlib.sha256(json.dumps([rows._fingerprint, shape]).encode()).hexdigest()[:16]
