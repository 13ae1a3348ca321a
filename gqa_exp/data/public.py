"""Tasks on other text than the embedded one: the paper's seven public data sets, and files of the user's own.

Prompts and preprocessing are those of the paper's authors (public T5 and LongT5 code), as far as they are known.
A data set comes by its hub id, or from `task.data_dir`: the files of its hub repository, or where that holds a loading
script, its Parquet conversion or the raw files. Rows without input or output are left out, counted and logged.
"""

import csv
import errno
import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import fsspec

from gqa_exp.config import CUSTOM, Split, TaskConfig
from gqa_exp.data.batching import on_disk
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
class RawForm:
    """Files of a data set as they were before its repository on the hub.

    Attributes:
        files: those of a split in a folder; none where the folder has no such form.
        rows: of these files.
    """

    files: Callable[[Path, Split], list[Path]]
    rows: Callable[[Sequence[Path], Split], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class PublicTask:
    """A data set of the hub, and how one of its rows becomes an example.

    Attributes:
        hub_id: of the repository.
        config: its configuration, a folder of its files.
        columns: that a row must have.
        example: of a row.
        raw: another form of its files. Such a repository holds a loading script, which is not run: from the hub, the
            Parquet conversion is read instead.
    """

    hub_id: str
    config: str
    columns: tuple[str, ...]
    example: Callable[[Row], Source]
    raw: RawForm | None = None


def _text(value: Any) -> str:
    """A text without outer space; anything else is empty."""
    return value.strip() if isinstance(value, str) else ""


def _part(row: Any, name: str) -> Any:
    """A nested field, None where it or what it is in is missing."""
    return row.get(name) if isinstance(row, Mapping) else None


def _summary(source: str, target: str) -> Callable[[Row], Source]:
    def example(row: Row) -> Source:
        return _text(row[source]), _text(row[target]), [_text(row[target])]

    return example


def _translation(row: Row) -> Source:
    english, german = (_text(_part(row["translation"], language)) for language in ("en", "de"))
    return english, german, [german]


def _question(row: Row) -> Source:
    """Question and the Wikipedia pages it was answered from; the value is the target, its aliases are right too."""
    answer, question = row["answer"], _text(row["question"])
    contexts = " ".join(map(_text, _part(row["entity_pages"], "wiki_context") or []))
    value = _text(_part(answer, "value"))
    references = dict.fromkeys([value, *map(_text, _part(answer, "aliases") or [])])
    return f"{question}{CONTEXT}{contexts}" if question else "", value, [alias for alias in references if alias]


def _multi_news_files(folder: Path, split: Split) -> list[Path]:
    """`train.src.cleaned` and `train.tgt.cleaned`: one document, and one summary, a line."""
    for name in SPLIT_NAMES[split]:
        for source in sorted(folder.rglob(f"{name}.src*")):
            target = source.with_name(source.name.replace(".src", ".tgt"))
            if not target.is_file():
                raise InputError(f"{source}: {target.name} is missing beside it; it holds the summaries")
            return [source, target]
    return []


def _multi_news_rows(files: Sequence[Path], split: Split) -> Iterator[dict[str, Any]]:
    source, target = files
    with (
        source.open(encoding="utf-8", newline="\n") as documents,
        target.open(encoding="utf-8", newline="\n") as summaries,
    ):
        for number, (document, summary) in enumerate(zip_longest(documents, summaries), 1):
            if document is None or summary is None:
                raise InputError(f"{source} and {target.name} differ in length: one ends before line {number}")
            yield {"document": document.replace("NEWLINE_CHAR", "\n"), "summary": summary}


def _mediasum_files(folder: Path, split: Split) -> list[Path]:
    """`news_dialogue.json`, and `train_val_test_split.json` with the ids of each split."""
    dialogues, ids = folder / "news_dialogue.json", folder / "train_val_test_split.json"
    if dialogues.is_file() and not ids.is_file():
        raise InputError(f"{dialogues}: {ids.name} is missing beside it; it holds the ids of each split")
    return [dialogues, ids] if dialogues.is_file() else []


def _mediasum_rows(files: Sequence[Path], split: Split) -> Iterator[dict[str, Any]]:
    """Dialogues, said as `speaker: utterance`."""
    dialogues, ids = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    wanted = {name for key in SPLIT_NAMES[split] for name in ids.get(key, [])}
    for row in dialogues:
        if row["id"] in wanted:
            turns = zip(row["speaker"], row["utt"], strict=True)
            document = "\n".join(f"{_text(speaker)}: {_text(utterance)}" for speaker, utterance in turns)
            yield {"document": document, "summary": row["summary"]}


_ARTICLES = ("article", "abstract")
_DOCUMENTS = ("document", "summary")
PUBLIC = {
    "cnn_dailymail": PublicTask(
        "abisee/cnn_dailymail", "3.0.0", ("article", "highlights"), _summary("article", "highlights")
    ),
    "arxiv": PublicTask("ccdv/arxiv-summarization", "document", _ARTICLES, _summary(*_ARTICLES)),
    "pubmed": PublicTask("ccdv/pubmed-summarization", "document", _ARTICLES, _summary(*_ARTICLES)),
    "mediasum": PublicTask(
        "ccdv/mediasum",
        "newline_prepended",
        _DOCUMENTS,
        _summary(*_DOCUMENTS),
        RawForm(_mediasum_files, _mediasum_rows),
    ),
    "multi_news": PublicTask(
        "alexfabbri/multi_news",
        "default",
        _DOCUMENTS,
        _summary(*_DOCUMENTS),
        RawForm(_multi_news_files, _multi_news_rows),
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
    _check_columns(where, columns, rows.column_names)
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

    with on_disk(where):
        made = rows.map(
            examples,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            features=FEATURES,
            new_fingerprint=_fingerprint([rows._fingerprint, split, *_shape(config)]),
            desc=f"reading {config.name}",
        )
    dropped = len(rows) - len(made)
    if not len(made):
        raise InputError(f"{where}: none of the {len(rows)} rows has both an input and an output")
    if dropped:
        logger.warning("%s: %d of %d rows have no input or no output and were left out", where, dropped, len(rows))
    with on_disk(where):
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
    return hashlib.sha256(json.dumps([*_shape(config), content]).encode()).hexdigest()


def _shape(config: TaskConfig) -> list[Any]:
    """What determines examples beside their files."""
    return [PUBLIC_VERSION, config.name, config.prompt, config.source_column, config.target_column]


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
    where = str(files[0])
    if (
        task is not None
        and task.raw is not None
        and config.data_dir
        and files == task.raw.files(Path(config.data_dir), split)
    ):
        return where, _cached(task.raw.rows, {"files": tuple(files), "split": split}, files, where)
    columns = (config.source_column, config.target_column) if task is None else task.columns
    return where, _read(files, columns)


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
    if task.raw is not None and (raw := task.raw.files(folder, split)):
        return raw
    root = folder / task.config if (folder / task.config).is_dir() else folder
    found = [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and _suffix(path) in READERS and _is_of(path.relative_to(root), split)
    ]
    names = SPLIT_NAMES[split]
    others = {path.relative_to(root).parts[0] for path in found if len(path.relative_to(root).parts) > 1}
    if others - {"data", "default", *names}:
        raise InputError(
            f"task.data_dir={folder}: files of the {names[0]} split lie in {', '.join(sorted(others))}, none of them "
            f"{task.config}; give the folder of one configuration"
        )
    if not found and not optional:
        raise InputError(
            f"task.data_dir={folder}: no file of the {names[0]} split; it takes files or folders whose names say "
            f"{' or '.join(names)}, of {', '.join(READERS)}, as in the repository of {task.hub_id}"
        )
    return found


def _suffix(path: Path) -> str:
    """The suffix that tells the format, compression left aside."""
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst", ".xz") else path.suffix


def _is_of(path: Path, split: Split) -> bool:
    """Whether a path names the split: `train-00000-of-00003.parquet`, `default/train/0000.parquet`, `val.jsonl`."""
    words = re.split(r"[^a-z]+", str(path).lower())
    return any(name in words for name in SPLIT_NAMES[split])


def _read(files: Sequence[Path], columns: Sequence[str]) -> datasets.Dataset:
    """Rows of files of one format, from the cache of `datasets` where they are unchanged.

    Texts stay as they are written: readers that guess types make 2.0 of an output "2", and dates of others.
    """
    formats = {READERS.get(_suffix(path)) for path in files}
    if len(formats) != 1 or None in formats:
        raise InputError(f"{files[0]}: files must be of one of the formats {', '.join(READERS)}")
    kind, where = formats.pop(), str(files[0])
    if kind == "json":
        with on_disk(where):
            kinds = _json_kinds(files, columns)
        return _cached(_json_rows, {"files": tuple(files), "columns": tuple(columns)}, files, where, kinds)
    settings: dict[str, Any] = {}
    with on_disk(where):
        if kind == "csv":
            for path in files:
                with _open(path) as lines:
                    _check_columns(str(path), columns, next(csv.reader(lines), []))
            settings = {"converters": dict.fromkeys(columns, str), "keep_default_na": False, "usecols": list(columns)}
        # By content: what `datasets` goes by is a file's place and time.
        name = _fingerprint([PUBLIC_VERSION, kind, *columns, *map(file_hash, files)])
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "gqa_exp" / name
        paths = [str(path) for path in files]
        rows = datasets.load_dataset(kind, data_files=paths, split="train", cache_dir=str(folder), **settings)
        rows._fingerprint = name
        return rows


def _open(path: Path) -> Any:
    """A text file, compressed or not, with or without a byte order mark."""
    return fsspec.open(str(path), "rt", compression="infer", encoding="utf-8-sig", newline="")


def _objects(path: Path) -> Iterator[Any]:
    """The objects of JSON lines, or of a list of them."""
    with _open(path) as lines:
        whole = next(filter(str.strip, lines), "").lstrip().startswith("[")
        lines.seek(0)
        yield from json.load(lines) if whole else map(json.loads, filter(str.strip, lines))


def _json_kinds(files: Sequence[Path], columns: Sequence[str]) -> datasets.Features | None:
    """Of columns of texts, or of lists of them, which it is; None where one is nested otherwise.

    Raises:
        InputError: the first row lacks a column, or there is no row.
    """
    unknown, kinds = set(columns), {}
    for path in files:
        for number, row in enumerate(_objects(path)):
            if not number:
                _check_columns(str(path), columns, row)
            for name in list(unknown):
                if row.get(name) is not None:
                    kinds[name] = type(_plain(row[name]))
                    unknown.discard(name)
            if not unknown:
                break
        if not unknown:
            break
    if not kinds:
        raise InputError(f"{files[0]}: no row has {' or '.join(columns)}")
    text = datasets.Value("string")
    known: dict[type, Any] = {str: text, list: datasets.List(text)}
    if not set(kinds.values()) <= known.keys():
        return None
    return datasets.Features({name: known[kinds.get(name, str)] for name in columns})


def _json_rows(files: Sequence[Path], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The columns of every row; each column of one kind throughout."""
    kinds: dict[str, type] = {}
    for path in files:
        for number, row in enumerate(_objects(path), 1):
            values = {name: _plain(row.get(name)) for name in columns}
            for name, value in values.items():
                if value is not None and kinds.setdefault(name, type(value)) is not type(value):
                    raise InputError(f'{path}: row {number}: "{name}" is a {type(value).__name__}, others are not')
            yield values


def _check_columns(where: str, columns: Sequence[str], known: Collection[str]) -> None:
    """Refuse rows that lack one of the columns."""
    for column in columns:
        if column not in known:
            raise InputError(f'{where}: no column "{column}"; {suggest(column, known)}')


def _plain(value: Any) -> Any:
    """Numbers written out, so that a column is of one type."""
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, int | float) else value


def _cached(
    rows: Callable[..., Iterator[dict[str, Any]]],
    arguments: dict[str, Any],
    files: Sequence[Path],
    where: str,
    features: datasets.Features | None = None,
) -> datasets.Dataset:
    """Rows that Python reads, from the cache of `datasets` where the files' content is known.

    Its arguments hold no lists, which `datasets` would take for shards.
    """
    facts = [PUBLIC_VERSION, rows.__name__, str(arguments.get("split")), arguments.get("columns")]
    name = _fingerprint([*facts, *map(file_hash, files)])
    with on_disk(where):
        return datasets.Dataset.from_generator(rows, features, gen_kwargs=arguments, fingerprint=name)


def _from_hub(task: PublicTask, split: Split) -> tuple[str, datasets.Dataset]:
    """A split of a hub data set, from the cache of `datasets` or the network."""
    name = SPLIT_NAMES[split][0]
    try:
        if task.raw is not None:
            converted = f"hf://datasets/{task.hub_id}@refs/convert/parquet/{task.config}/{name}/*.parquet"
            return task.hub_id, datasets.load_dataset("parquet", data_files=converted, split="train")
        return task.hub_id, datasets.load_dataset(task.hub_id, task.config, split=name)
    except InputError:
        raise
    except Exception as error:  # of several libraries
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise InputError(
                f"{task.hub_id}: cannot be cached ({one_line(error)}); free space, or set HF_HOME"
            ) from error
        raise InputError(
            f"{task.hub_id}: not to be had from the Hugging Face hub ({one_line(error)[:120]}); download the files of "
            f"its {task.config} configuration{' (Parquet conversion or raw)' if task.raw else ''} into a folder, "
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


def _fingerprint(facts: Sequence[Any]) -> str:
    """Names what is cached of these facts."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
