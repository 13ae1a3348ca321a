"""The shipped text: its splits do not leak, its tokenizer is what the model expects, its read-me tells the truth."""

import hashlib
from collections import defaultdict
from pathlib import Path

import pandas as pd
import pytest
import sentencepiece

from gqa_exp.data import build_embedded as build
from gqa_exp.data import embedded

PREFIX = 80


def folded(text: str) -> str:
    return " ".join(text.lower().split())


@pytest.fixture(scope="module")
def packages() -> pd.DataFrame:
    return embedded.packages().to_pandas()


@pytest.fixture(scope="module")
def segments() -> pd.DataFrame:
    return embedded.help_segments().to_pandas()


@pytest.fixture(scope="module")
def train_documents() -> list[str]:
    return list(embedded.corpus_documents("train")["text"])


def evaluated(packages: pd.DataFrame, segments: pd.DataFrame, *splits: str) -> set[str]:
    """The beginnings of the texts of some splits."""
    rows, pairs = packages[packages.split.isin(splits)], segments[segments.split.isin(splits)]
    texts = [*rows.body, *rows.body_de.dropna(), *pairs.en, *pairs.de]
    return {folded(text)[:PREFIX] for text in texts}


def test_size_on_disk() -> None:
    assert sum(path.stat().st_size for path in embedded.FOLDER.iterdir() if path.is_file()) < 30e6


def test_splits_hold_together(packages: pd.DataFrame, segments: pd.DataFrame) -> None:
    assert (packages.groupby("source").split.nunique() == 1).all()
    assert (segments.groupby("page").split.nunique() == 1).all()
    splits = defaultdict(set)
    for column in ("body", "body_de"):
        for text, split in packages[[column, "split"]].dropna().itertuples(index=False):
            splits[folded(text)[:PREFIX]].add(split)
    for column in ("en", "de"):
        for text, split in segments[[column, "split"]].itertuples(index=False):
            splits[folded(text)[:PREFIX]].add(split)
    assert [text for text, seen in splits.items() if len(seen) > 1] == []


def test_every_split_is_large_enough(packages: pd.DataFrame, segments: pd.DataFrame) -> None:
    for split in ("dev", "test"):
        rows = packages[packages.split == split]
        assert (rows.groupby("source").size() >= 2).sum() >= 400
        assert rows.body_de.notna().sum() >= 400
        assert (segments.split == split).sum() >= 400
        assert (rows.body.str.split().str.len() >= 30).sum() >= 400


def found(keys: set[str], documents: list[str]) -> set[str]:
    """The keys that stand somewhere in the documents; a key shorter than a prefix must be a whole line."""
    by_words = defaultdict(set)
    for key in keys:
        by_words[tuple(key.split(" ")[:3])].add(key)
    hits = set()
    for document in documents:
        lines = [folded(line) for line in document.split("\n")]
        text = " ".join(lines)
        words = text.split(" ")
        for start in by_words.keys() & set(zip(words, words[1:], words[2:], strict=False)):
            hits |= {key for key in by_words[start] if len(key) == PREFIX and key in text}
        hits |= keys.intersection(line for line in lines if len(line) < PREFIX)
    return hits


def test_no_evaluated_text_in_the_corpus(
    packages: pd.DataFrame, segments: pd.DataFrame, train_documents: list[str]
) -> None:
    barred = evaluated(packages, segments, "dev", "test")
    # A text that begins with a short paragraph is cut in two where translations stand between; so each language alone.
    rows, pages = packages[packages.split == "train"], segments[segments.split == "train"].groupby("page")
    alone = [*rows.body, *rows.body_de.dropna(), *pages.en.agg("\n".join), *pages.de.agg("\n".join)]
    # Some that are there, looked for in the same pass, show that the search finds what there is.
    present = {key for key in sorted(evaluated(packages, segments, "train"))[::100] if len(key) == PREFIX}
    assert found(barred | present, alone) == present
    hits = found(barred | present, train_documents)
    assert not hits & barred
    assert len(hits) > 0.8 * len(present)


def test_heldout_documents_are_not_test_texts(packages: pd.DataFrame, segments: pd.DataFrame) -> None:
    heldout = embedded.corpus_documents("heldout")
    assert {"debian", "help", "wordnet"} <= set(heldout["source"])
    lines = {folded(line)[:PREFIX] for text in heldout["text"] for line in text.split("\n")}
    assert not lines & evaluated(packages, segments, "test")


def test_translations_stand_behind_what_they_translate(packages: pd.DataFrame, segments: pd.DataFrame) -> None:
    documents = embedded.corpus_documents("train").to_pandas()
    package = packages[packages.name == "9menu"].iloc[0]
    text = next(text for text in documents.text if text.startswith("9menu: "))
    pairs = zip(package.body.split("\n"), package.body_de.split("\n"), strict=True)
    assert text.split("\n") == [
        f"9menu: {package.synopsis}",
        package.synopsis_de,
        *(line for pair in pairs for line in pair),
    ]
    page = segments[segments.split == "train"].iloc[0].page
    rows = segments[segments.page == page]
    text = next(text for text in documents[documents.source == "help"].text if text.startswith(rows.iloc[0].en))
    assert text.split("\n") == [line for en, de in zip(rows.en, rows.de, strict=True) for line in (en, de)]


def test_packages_of_a_source_make_one_document(packages: pd.DataFrame) -> None:
    documents = embedded.corpus_documents("train").to_pandas()
    train = packages[packages.split == "train"]
    texts = list(documents[documents.source == "debian"].text)
    assert len(texts) == train.source.nunique()
    source = train.source.value_counts().index[50]
    names = sorted(train[train.source == source].name)
    [text] = [text for text in texts if text.startswith(f"{names[0]}: ")]
    places = [f"\n{text}".index(f"\n{name}: ") for name in names]
    assert len(names) > 5
    assert places == sorted(places)


def test_text_is_clean(packages: pd.DataFrame, train_documents: list[str]) -> None:
    assert not packages.body.str.contains(r"^ ?\.$|\n ?\.(?:\n|$)", regex=True).any()
    assert not packages.synopsis.str.contains("\n").any()
    assert not any("\u00ad" in text or "\x1b" in text or "\x08" in text for text in train_documents)
    assert packages.duplicated(["synopsis", "body"]).sum() == 0


def test_tokenizer() -> None:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(embedded.TOKENIZER))
    assert tokenizer.vocab_size() == 8092
    ids = (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id(), tokenizer.bos_id())
    assert ids == (0, 1, 2, -1)
    for text in ("Ein Paket für große Übungen.", "The package's synopsis (see apt-get(8)) costs 42%."):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_readme_states_the_hashes() -> None:
    readme = (embedded.FOLDER / "README.md").read_text(encoding="utf-8")
    for name in ("packages.parquet", "help.parquet", "corpus.parquet", "tokenizer.model"):
        assert hashlib.sha256((embedded.FOLDER / name).read_bytes()).hexdigest() in readme


def test_description_follows_debian_policy() -> None:
    field = "a synopsis\n First line\n goes on.\n .\n Next:\n  * one\n    continued\n  * two\n .\n Last."
    assert build.description(field) == ("a synopsis", "First line goes on.\nNext:\n* one continued\n* two\nLast.")


def test_prefixes_are_found_across_lines_and_nowhere_else() -> None:
    long = (
        "This description is long enough to be known by its first eighty characters, and then it goes on for a while."
    )
    prefixes = build.Prefixes([long, "A short text."])
    document = [
        "Before it.",
        "Quoted: this description is  long enough to be KNOWN by its",
        "first eighty characters, and ",
    ]
    assert prefixes.without([*document, "then something else.", "a short text."]) == [
        "Before it.",
        "then something else.",
    ]
    assert prefixes.without(["Not a short text.", long[: PREFIX - 1]]) == ["Not a short text.", long[: PREFIX - 1]]


def test_near_duplicates_make_a_family() -> None:
    def package(source: str, body: str, body_de: str | None = None) -> build.Package:
        return build.Package(source, source, "misc", "train", "synopsis", body, body_de and "kurz", body_de)

    shared = "word " * 30
    table = [
        package("c", f"{shared} one"),
        package("b", f"intro\n{shared} two", "gleiche Übersetzung"),
        package("a", "something else", "Gleiche  Übersetzung"),
        package("d", "a text that stands alone"),
    ]
    assert build.families(table) == {"a": "a", "b": "a", "c": "a", "d": "d"}


def test_html_blocks_keep_their_ids(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<head><title>no</title></head><p id="x" class="y">one <b>two</b></p><pre>code</pre><li>three</li>')
    assert build.html_blocks(page) == [("x", "y", "one two"), ("", "", "three")]
