"""Text-to-text tasks on the embedded text: summarization (short and of many documents), translation, reading.

Tasks on other text (`gqa_exp.data.public`) are had through the same functions. Those here are derived from the same
tables when they are loaded, so text is stored once and the split, made per source package and help page, is the same
for all. Whatever is drawn (order, blanks, distractors) is drawn by hash of the example's id: an example stays as it is
when others come or go.

What a task needs beyond its examples (prompt, lengths, metric) is configuration: `conf/task`.
"""

import hashlib
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import datasets

from gqa_exp.config import Split, TaskConfig
from gqa_exp.data import embedded, public
from gqa_exp.data.corpus import file_hash
from gqa_exp.data.public import CONTEXT
from gqa_exp.errors import InputError, suggest

TASKS_VERSION = 2
"""Raise when the same files and configuration would give other examples."""


def blank(i: int) -> str:
    """The sentinel that stands in an input where the i-th part of the output belongs, and in the target before it.

    So a task asks as pre-training asks for spans, and a base brings to it what it has learned.
    """
    return f"<extra_id_{i}>"


BLANK = blank(0)
JOINT = " . "
"""Between the sentences of a summary: what T5's rougeLsum takes for a line break."""

SHORTEST_BODY = 30  # words, so that there is something to summarize
SHORTEST_SOURCE = 120  # words of all its packages' bodies; debian_multi is the task of long inputs
MOST_PACKAGES = 16  # debian_multi: beyond it, a source's synopses are a list rather than a summary
TOKENS_PER_WORD = 2.0  # of descriptions in the shipped 8k vocabulary, on the safe side
NAME_WORDS = 4  # what a package's name and sentinel cost, in words

NO_APPLICATIONS = frozenset(["debug", "doc", "introspection", "libdevel", "libs", "localization", "oldlibs"])
"""Sections that hold parts of applications, or libraries."""
NO_APPLICATION = re.compile(
    r"^(lib|gir1|(golang|haskell|librust|node|php|python3?|r|ruby)-)"
    r"|-(common|data|dbg|dev|docs?|i18n|l10n|langpack|locales?)(-|$)"
)
"""Names, by Debian's conventions, of parts of applications, or of libraries."""

WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
STOP_WORDS = frozenset(
    WORD.findall(
        """about also among based been between both contains different each following from have here into like made make
        many more most much must only other over package packages provide provided provides several should similar some
        such than that their them then there these they this those through under used uses using various very want well
        were what when where which while will with within without would your"""
    )
)
"""Frequent words of four letters and more that say little."""
NEIGHBOURS = 5  # words on each side that the overlap baseline compares


class Example(NamedTuple):
    """One row of a task."""

    id: str
    group: str
    """Source package or help page: what the split keeps together."""
    input: str
    """Prompt included."""
    target: str
    references: list[str]
    """What counts as right; the target without its sentinels is among them."""


def load_task(config: TaskConfig, split: Split) -> datasets.Dataset:
    """A task's examples, in a fixed shuffled order (so that the first n are a fair sample).

    Args:
        config: names the task; its prompt, lengths and `passages` shape the examples.
        split: dev selects, test reports.

    Returns:
        Columns id, group, input, target (text) and references (list of text).

    Raises:
        InputError: unknown task, more passages than the split can fill, or as `gqa_exp.data.public.load_public`.
    """
    if config.name in public.KNOWN:
        return public.load_public(config, split)
    examples = sorted(_task(config).build(config, split), key=lambda example: _hash(example.id))
    return datasets.Dataset.from_dict(
        {field: [getattr(example, field) for example in examples] for field in Example._fields}
    )


def task_hash(config: TaskConfig) -> str:
    """Content hash of what determines the examples: tables, the fields that shape them, and this module's version."""
    if config.name in public.KNOWN:
        return public.public_hash(config)
    shape = {name: getattr(config, name) for name in ("name", "prompt", "max_input_tokens", "passages")}
    tables = [file_hash(embedded.FOLDER / f"{table}.parquet") for table in _task(config).tables]
    return hashlib.sha256(json.dumps([TASKS_VERSION, shape, tables], sort_keys=True).encode()).hexdigest()


def baseline_predictions(config: TaskConfig, dataset: datasets.Dataset) -> dict[str, list[str]]:
    """What one gets without a model.

    Args:
        config: the task.
        dataset: its examples, from `load_task`.

    Returns:
        One prediction per example under each baseline's name: "lead" (summarization: the descriptions' first words, as
        many as a synopsis has on average in train), "copy" (translation: the source), "frequent" and "overlap"
        (debian_cloze: the context's most frequent content word; the one whose neighbours are most like the blank's).

    Raises:
        InputError: unknown task.
    """
    if config.name in public.KNOWN:
        return public.public_baselines(config, dataset)
    task = _task(config)
    inputs = [text.removeprefix(config.prompt) for text in dataset["input"]]
    if task is TASKS["en_de"]:
        return {"copy": [text.removesuffix(f" {BLANK}") for text in inputs]}
    if task is TASKS["debian_cloze"]:
        return {"frequent": [_frequent(text) for text in inputs], "overlap": [_overlap(text) for text in inputs]}
    targets = [references[0] for references in load_task(config, "train")["references"]]
    synopses = [words for target in targets for words in target.split(JOINT)]
    words = round(sum(len(synopsis.split()) for synopsis in synopses) / len(synopses))
    return {"lead": [_lead(text, words) for text in inputs]}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


class Package(NamedTuple):
    """A row of the embedded packages; see `gqa_exp.data.embedded.packages`."""

    name: str
    source: str
    section: str
    split: str
    synopsis: str
    body: str
    synopsis_de: str | None
    body_de: str | None

    @property
    def tells_enough(self) -> bool:
        """Whether there is something to summarize."""
        return len(self.body.split()) >= SHORTEST_BODY


def _packages(split: Split) -> list[Package]:
    rows = [row for row in embedded.packages().to_list() if row["split"] == split]
    packages = [Package(*(row[field] for field in Package._fields)) for row in rows]
    return sorted(packages, key=lambda package: package.name)


def _applications(split: Split) -> list[Package]:
    """Packages that one installs for their own sake, with a description worth reading."""
    return [
        package
        for package in _packages(split)
        if package.section not in NO_APPLICATIONS and not NO_APPLICATION.search(package.name) and package.tells_enough
    ]


def _blocks(names: Iterable[str], bodies: Iterable[str]) -> str:
    """Descriptions headed by their names, one per line."""
    return "\n".join(f"{name}: {' '.join(body.split())}" for name, body in zip(names, bodies, strict=True))


def _cut_to_share(texts: Sequence[str], words: int) -> list[str]:
    """Cut the longest texts to one common length so that together they have at most so many words.

    Cutting off the end of the whole would take away entire documents, and with them what the target says of them.
    """
    split = [text.split() for text in texts]
    room = max(words, len(split))  # at least one word of each
    for i, length in enumerate(sorted(map(len, split))):
        share = room // (len(split) - i)
        if length > share:
            return [" ".join(text[:share]) for text in split]
        room -= length
    return [" ".join(text) for text in split]


# --- the tasks --------------------------------------------------------------------------------------------------------


def _debian_synopsis(config: TaskConfig, split: Split) -> Iterator[Example]:
    """An application's long description to its synopsis."""
    for package in _applications(split):
        text = config.prompt + _blocks([package.name], [f"{BLANK} {package.body}"])
        yield Example(package.name, package.source, text, f"{BLANK} {package.synopsis}", [package.synopsis])


def _debian_multi(config: TaskConfig, split: Split) -> Iterator[Example]:
    """All packages of one source to their synopses, in the order of their names."""
    sources: dict[str, list[Package]] = defaultdict(list)
    for package in _packages(split):
        sources[package.source].append(package)
    for source, packages in sources.items():
        bodies = [package.body for package in packages]
        telling = {package.body for package in packages if package.tells_enough}
        long_enough = sum(len(body.split()) for body in bodies) >= SHORTEST_SOURCE
        if len(telling) >= 2 and long_enough and len(packages) <= MOST_PACKAGES:
            words = int(config.max_input_tokens / TOKENS_PER_WORD) - NAME_WORDS * len(packages)
            asked = [f"{blank(i)} {body}" for i, body in enumerate(_cut_to_share(bodies, words))]
            text = config.prompt + _blocks([package.name for package in packages], asked)
            synopses = [package.synopsis for package in packages]
            target = JOINT.join(f"{blank(i)} {synopsis}" for i, synopsis in enumerate(synopses))
            yield Example(source, source, text, target, [JOINT.join(synopses)])


def _pairs(split: Split) -> Iterator[tuple[str, str, str, str]]:
    """Aligned texts as (id, group, English, German)."""
    count: Counter[str] = Counter()
    for row in embedded.help_segments().to_list():
        if row["split"] == split:
            yield f"help/{row['page']}/{count[row['page']]}", row["page"], row["en"], row["de"]
            count[row["page"]] += 1
    for package in _packages(split):
        if package.synopsis_de and package.body_de:
            english = [package.synopsis, *package.body.split("\n")]
            german = [package.synopsis_de, *package.body_de.split("\n")]
            aligned = len(english) == len(german)  # else nothing says which paragraphs belong together
            for i in range(len(english) if aligned else 1):
                yield f"debian/{package.name}/{i}", package.source, english[i], german[i]


def _en_de(config: TaskConfig, split: Split) -> Iterator[Example]:
    """An English segment to German; pairs that look misaligned or untranslated are left out."""
    seen: set[str] = set()
    for earlier in ("train", "dev", "test"):  # a short segment may stand in several splits: the first one keeps it
        for name, group, en, de in _pairs(earlier):
            fits = all(2 <= len(text.split()) <= 100 for text in (en, de)) and 0.5 <= len(de) / len(en) <= 2
            if not fits or en.casefold() == de.casefold() or en.casefold() in seen:
                continue
            seen.add(en.casefold())
            if earlier == split:
                yield Example(name, group, f"{config.prompt}{en} {BLANK}", f"{BLANK} {de}", [de])
        if earlier == split:
            return


def _content_words(text: str) -> list[str]:
    """Words of four letters and more that are no stop words, in lower case."""
    words = (word.casefold() for word in WORD.findall(text))
    return [word for word in words if word not in STOP_WORDS and sum(map(str.isalpha, word)) >= 4]


def _blank_out(name: str, synopsis: str, body: str) -> tuple[str, str] | None:
    """Blank out a content word of the synopsis that the description has too.

    Returns:
        The synopsis with a blank for each occurrence of the word, and the word. None where no word will do: what is
        left of name and synopsis must not contain it.
    """
    described = set(_content_words(body))
    choices = []
    for word in dict.fromkeys(WORD.findall(synopsis)):
        if word.casefold() in described:
            blanked = re.sub(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", BLANK, synopsis, flags=re.IGNORECASE)
            if word.casefold() not in f"{name} {blanked.replace(BLANK, ' ')}".casefold():
                choices.append((blanked, word))
    return choices[_hash(f"{name}/blank") % len(choices)] if choices else None


def _debian_cloze(config: TaskConfig, split: Split) -> Iterator[Example]:
    """The word that is missing in a synopsis, to be found in the description among those of other packages."""
    packages = _applications(split)
    if (sources := len({package.source for package in packages})) < config.passages:
        raise InputError(f"task.passages={config.passages}, but split {split} has only {sources} source packages")
    for package in packages:
        others: dict[str, Package] = {}
        for k in itertools.count():
            if len(others) == config.passages - 1:
                break
            other = packages[_hash(f"{package.name}/{k}") % len(packages)]
            if other.source != package.source:
                others.setdefault(other.source, other)
        place = _hash(f"{package.name}/place") % config.passages
        passages = [*others.values()]
        passages.insert(place, package)
        words = int(config.max_input_tokens / TOKENS_PER_WORD) - NAME_WORDS * (len(passages) + 1)
        words -= len(package.synopsis.split())
        bodies = _cut_to_share([passage.body for passage in passages], words)
        if blanked := _blank_out(package.name, package.synopsis, bodies[place]):
            question, answer = blanked
            context = _blocks([passage.name for passage in passages], bodies)
            text = f"{config.prompt}{package.name}: {question}{CONTEXT}{context}"
            yield Example(package.name, package.source, text, f"{BLANK} {answer}", [answer])


class Task(NamedTuple):
    """How a task's examples are made, and from which of the embedded tables."""

    build: Callable[[TaskConfig, Split], Iterator[Example]]
    tables: tuple[str, ...]


TASKS = {
    "debian_synopsis": Task(_debian_synopsis, ("packages",)),
    "debian_multi": Task(_debian_multi, ("packages",)),
    "en_de": Task(_en_de, ("packages", "help")),
    "debian_cloze": Task(_debian_cloze, ("packages",)),
}


def _task(config: TaskConfig) -> Task:
    if config.name not in TASKS:
        raise InputError(f'task "{config.name}" is unknown; {suggest(config.name, (*TASKS, *public.KNOWN))}')
    return TASKS[config.name]


# --- baselines --------------------------------------------------------------------------------------------------------


def _lead(text: str, words: int) -> str:
    bodies = [block.partition(": ")[2].removeprefix(blank(i)) for i, block in enumerate(text.split("\n"))]
    return JOINT.join(" ".join(body.split()[:words]) for body in bodies)


def _frequent(text: str) -> str:
    ranked = Counter(_content_words(text.partition(CONTEXT)[2])).most_common(1)
    return ranked[0][0] if ranked else ""


def _overlap(text: str) -> str:
    question, _, context = text.partition(CONTEXT)
    before, _, after = question.partition(BLANK)
    question, after = (part.replace(BLANK, " ") for part in (question, after))
    around = {word.casefold() for word in WORD.findall(before)[-NEIGHBOURS:] + WORD.findall(after)[:NEIGHBOURS]}
    asked = {word.casefold() for word in WORD.findall(question)}
    words = [word.casefold() for word in WORD.findall(context)]
    content = set(_content_words(context)) - asked
    scores: dict[str, int] = {}
    for i, word in enumerate(words):
        if word in content:
            neighbours = {*words[max(0, i - NEIGHBOURS) : i], *words[i + 1 : i + 1 + NEIGHBOURS]}
            scores[word] = max(scores.get(word, 0), len(neighbours & around))
    counts = Counter(words)
    return max(scores, key=lambda word: (scores[word], counts[word]), default="")
