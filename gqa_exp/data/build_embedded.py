"""Builds the embedded text (`gqa_exp/data/embedded`) from Debian packages, so that anyone can see and redo every step.

It needs a Debian bookworm machine with apt, dpkg-deb and groff, and network access; nothing else in the project does.
Run `python -m gqa_exp.data.build_embedded --work DIR`; DIR keeps what was downloaded.

The split is made here, once, for all tasks. A text is known by its first 80 characters (case and white space folded); a
document that holds them, or, if the text is shorter, has it as a paragraph, is its near-duplicate. Source packages
connected by near-duplicates form a family, and a family lies in one split; everything else in the corpus loses each
paragraph that would make it a near-duplicate of a dev or test text.
"""

import argparse
import datetime
import gzip
import hashlib
import io
import re
import struct
import subprocess
import unicodedata
import xml.etree.ElementTree as ET
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import sentencepiece

from gqa_exp.data.embedded import FOLDER, TOKENIZER, corpus_documents
from gqa_exp.errors import InputError, command

PREFIX = 80  # characters by which near-duplicates are known
WINDOW = 64  # characters hashed to find a prefix; a power of two no longer than PREFIX
HELDOUT = 0.015  # share of the corpus's other documents that is held out
EVALUATED = {"dev": 0.11, "test": 0.11}  # share of the families; the large ones, all in train, make it less of the text
LARGE_FAMILY = 20  # source packages; beyond it, shared boilerplate rather than a shared origin
PIECES = 8092  # 8192 with the 100 sentinels that sit on top
SHORTEST = 200  # characters of a document
# Which lines are drawn depends on their order; the shipped tokenizer's were drawn when translations stood apart.
TOKENIZER_LINES = 500_000
SPLITS: tuple[Literal["train", "heldout"], ...] = ("train", "heldout")
THREADS = 2


# --- cleaning ---------------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """The text in NFC on one line, without soft hyphens and control characters."""
    text = unicodedata.normalize("NFC", text.replace("\u00ad", "").replace("\u200b", "").replace("¶", ""))
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def is_prose(line: str) -> bool:
    """Whether a line of a manual reads as language rather than as code, a table or navigation."""
    dense = line.replace(" ", "")
    return line.count(" ") >= 4 and sum(map(str.isalpha, dense)) >= 0.75 * len(dense)


def fold(text: str) -> str:
    """The form in which texts are compared: lower case, white space folded."""
    return " ".join(text.lower().split())


def prefix(text: str) -> str:
    """What a text is known by among near-duplicates."""
    return fold(text)[:PREFIX]


def fraction(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


# --- reading the formats ----------------------------------------------------------------------------------------------


class Blocks(HTMLParser):
    """Collects the text of an HTML page's blocks with the id of the element that opened each."""

    BREAKS = frozenset(
        ["p", "div", "li", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "h6", "td", "th", "tr", "table", "ul", "ol", "dl"]
    ) | {"br", "blockquote", "section", "body"}
    SKIPPED = frozenset(["script", "style", "head", "nav", "pre", "header", "footer"])

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[tuple[str, str, str]] = []  # (element id, class, text)
        self._text: list[str] = []
        self._opened = ("", "")
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Start a block, or a stretch to leave out."""
        if tag in self.SKIPPED:
            self._skipping += 1
        if tag in self.BREAKS:
            self.end_block()
            named = dict(attrs)
            self._opened = (named.get("id") or "", named.get("class") or "")

    def handle_endtag(self, tag: str) -> None:
        """End what the tag started."""
        if tag in self.SKIPPED:
            self._skipping = max(0, self._skipping - 1)
        if tag in self.BREAKS:
            self.end_block()

    def handle_data(self, data: str) -> None:
        """Collect text."""
        if not self._skipping:
            self._text.append(data)

    def end_block(self) -> None:
        """Close the current block."""
        if text := clean("".join(self._text)):
            self.blocks.append((*self._opened, text))
        self._text, self._opened = [], ("", "")


def html_blocks(path: Path) -> list[tuple[str, str, str]]:
    """The blocks of an HTML file as (element id, class, text)."""
    parser = Blocks()
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    parser.end_block()
    return parser.blocks


def read_html(path: Path) -> list[list[str]]:
    """An HTML page as one document."""
    return [[text for _, _, text in html_blocks(path)]]


def read_mallard(path: Path) -> list[list[str]]:
    """A page of GNOME's help (Mallard XML) as one document."""
    page = ET.parse(path).getroot()
    names = {"p", "title", "desc"}
    return [[clean("".join(e.itertext())) for e in page.iter() if e.tag.rpartition("}")[2] in names]]


def read_man(path: Path) -> list[list[str]]:
    """A manual page, set by groff in lines long enough that each paragraph is one."""
    page = gzip.decompress(path.read_bytes())
    if page.lstrip().startswith(b".so "):  # only a link to another page
        return []
    options = [
        "-K",
        "utf8",
        "-t",
        "-T",
        "utf8",
        "-man",
        "-rLL=20000n",
        "-rHY=0",
        "-dAD=l",
        "-P-c",
        "-P-b",
        "-P-o",
        "-P-u",
    ]
    done = subprocess.run(["groff", *options], input=page, capture_output=True, check=True)
    return [[clean(line) for line in done.stdout.decode("utf-8", errors="replace").splitlines()]]


def read_pod(path: Path) -> list[list[str]]:
    """A page of Perl's documentation; indented paragraphs are code and left out."""
    paragraphs = re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="replace"))
    lines = []
    for paragraph in paragraphs:
        if paragraph[:1].isspace() or paragraph.startswith("="):
            continue
        text = re.sub(r"E<(lt|gt|sol|verbar)>", lambda m: {"lt": "<", "gt": ">", "sol": "/"}.get(m[1], "|"), paragraph)
        text = re.sub(r"[XZ]<[^<>]*>", "", text)
        while (plainer := re.sub(r"\b[BCFILS]<+\s?(?:[^<>|]*\|)?([^<>]*?)\s?>+", r"\1", text)) != text:
            text = plainer
        lines.append(clean(text))
    return [lines]


def read_wordnet(path: Path) -> list[list[str]]:
    """WordNet's glosses, each behind the words it explains, 200 to a document."""
    lines = []
    for row in path.read_text(encoding="utf-8").splitlines():
        if row.startswith(" ") or "|" not in row:
            continue
        fields, gloss = row.split("|", 1)
        columns = fields.split()
        words = [columns[4 + 2 * i].split("(")[0].replace("_", " ") for i in range(int(columns[3], 16))]
        lines.append(clean(f"{', '.join(words)}: {gloss}"))
    return [lines[i : i + 200] for i in range(0, len(lines), 200)]


def read_novels(path: Path) -> list[list[str]]:
    """R's lazy-load database of character vectors (the lines of one novel each), 100 paragraphs to a document.

    The file is a row of (length, zlib stream); a stream holds R's XDR serialization of the vector: a header, then for
    each string its flags, its length and its bytes (R Internals, section 1.8).
    """
    packed, documents = path.read_bytes(), []
    while packed:
        stream = zlib.decompressobj()
        data = stream.decompress(packed[4:])
        packed = stream.unused_data
        (encoding,) = struct.unpack_from(">i", data, 14)
        position = 18 + encoding
        kind, count = struct.unpack_from(">ii", data, position)
        if kind & 0xFF != 16:  # STRSXP
            raise InputError(f"{path}: expected a vector of strings, found R type {kind & 0xFF}")
        position += 8
        lines = []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", data, position + 4)
            lines.append(data[position + 8 : position + 8 + length].decode())
            position += 8 + length
        paragraphs = [clean(p) for p in re.split(r"\n\s*\n", "\n".join(lines))]
        documents += [paragraphs[i : i + 100] for i in range(0, len(paragraphs), 100)]
    return documents


@dataclass(frozen=True)
class Part:
    """A package's share in the corpus: which files, how they are read, under which licence."""

    package: str
    licence: str
    files: str
    read: Callable[[Path], list[list[str]]]
    source: str = ""
    everything: bool = False  # keep lines that do not look like prose

    @property
    def name(self) -> str:
        """What the corpus's column `source` says."""
        return self.source or self.package


PARTS = (
    Part("manpages", "Linux-man-pages-copyleft, GPL-2+, BSD and others", "usr/share/man/man*/*.gz", read_man),
    Part("manpages-dev", "Linux-man-pages-copyleft, GPL-2+, BSD and others", "usr/share/man/man*/*.gz", read_man),
    Part("manpages-de", "GPL-3+", "usr/share/man/de/man*/*.gz", read_man),
    Part("manpages-de-dev", "GPL-3+", "usr/share/man/de/man*/*.gz", read_man),
    Part("python3.11-doc", "PSF-2.0", "usr/share/doc/python3.11/html/**/*.html", read_html, "python3-doc"),
    Part("perl-doc", "GPL-1+ or Artistic", "usr/share/perl/*/pod/*.pod", read_pod),
    Part("wordnet-base", "WordNet 3.0", "usr/share/wordnet/data.*", read_wordnet, "wordnet", everything=True),
    Part("anarchism", "GPL-2", "usr/share/doc/anarchism/html/*.html", read_html),
    Part(
        "r-cran-janeaustenr",
        "public domain (novels), MIT (package)",
        "usr/lib/R/**/data/Rdata.rdb",
        read_novels,
        "janeausten",
        everything=True,
    ),
    Part("debian-reference-en", "GPL-2+", "usr/share/debian-reference/*.html", read_html),
    Part("debian-reference-de", "GPL-2+", "usr/share/debian-reference/*.html", read_html),
    Part("developers-reference", "GPL-2+", "usr/share/developers-reference/*.html", read_html),
    Part("developers-reference-de", "GPL-2+", "usr/share/developers-reference/de/*.html", read_html),
    Part(
        "debian-handbook",
        "GPL-2+ or CC-BY-SA-3.0",
        "usr/share/doc/debian-handbook/html/en-US/*.html",
        read_html,
        "debian-handbook-en",
    ),
    Part(
        "debian-handbook",
        "GPL-2+ or CC-BY-SA-3.0",
        "usr/share/doc/debian-handbook/html/de-DE/*.html",
        read_html,
        "debian-handbook-de",
    ),
    Part("debian-policy", "GPL-2+", "usr/share/doc/debian-policy/policy.html/*.html", read_html),
    Part("debian-history", "GPL-2+", "usr/share/doc/debian-history/docs/*.en.html", read_html, "debian-history-en"),
    Part("debian-history", "GPL-2+", "usr/share/doc/debian-history/docs/*.de.html", read_html, "debian-history-de"),
    Part(
        "installation-guide-amd64",
        "GPL-2",
        "usr/share/doc/installation-guide-amd64/en/*.html",
        read_html,
        "installation-guide-en",
    ),
    Part(
        "installation-guide-amd64",
        "GPL-2",
        "usr/share/doc/installation-guide-amd64/de/*.html",
        read_html,
        "installation-guide-de",
    ),
    Part("gnome-user-docs", "CC-BY-SA-3.0", "usr/share/help/C/**/*.page", read_mallard, "gnome-user-docs-en"),
    Part("gnome-user-docs", "CC-BY-SA-3.0", "usr/share/help/de/**/*.page", read_mallard, "gnome-user-docs-de"),
    Part("git-doc", "GPL-2", "usr/share/doc/git-doc/**/*.html", read_html),
    Part("postgresql-doc-15", "PostgreSQL", "usr/share/doc/postgresql-doc-15/html/*.html", read_html, "postgresql-doc"),
)
HELP = (("libreoffice-help-en-us", "en-US"), ("libreoffice-help-de", "de"))


# --- near-duplicates and the split ------------------------------------------------------------------------------------


def window_hashes(text: str) -> npt.NDArray[np.uint64]:
    """A polynomial hash modulo 2^64 of each `WINDOW` consecutive characters, built by doubling the window."""
    hashes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
    if len(hashes) < WINDOW:
        return hashes[:0]
    factor, width = 0x9E3779B97F4A7C15, 1
    while width < WINDOW:
        hashes = hashes[:-width] * np.uint64(factor) + hashes[width:]
        factor, width = factor * factor % 2**64, 2 * width
    return hashes


class Prefixes:
    """The first characters of many texts, to be found anywhere in others."""

    def __init__(self, texts: Iterable[str]) -> None:
        keys = set(map(prefix, texts))
        self.short = {key for key in keys if len(key) < PREFIX}
        self.long: dict[int, list[str]] = defaultdict(list)
        for key in sorted(keys - self.short):
            self.long[int(window_hashes(key[:WINDOW])[0])].append(key)
        self.hashes = np.array(sorted(self.long), dtype=np.uint64)

    def matches(self, lines: Sequence[str]) -> Iterator[tuple[range, str]]:
        """Find the prefixes in a document.

        Args:
            lines: the document's paragraphs.

        Yields:
            The lines that a prefix touches, and the prefix: 80 characters that stand anywhere in the document, or a
            shorter text that is a whole line of it.
        """
        folded = [fold(line) for line in lines]
        for i, line in enumerate(folded):
            if line in self.short:
                yield range(i, i + 1), line
        text = " ".join(folded)
        hashes = window_hashes(text)
        if not len(hashes) or not len(self.hashes):
            return
        nearest = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        starts = np.cumsum([0] + [len(line) + 1 for line in folded[:-1]])
        for place in np.flatnonzero(self.hashes[nearest] == hashes).tolist():
            for key in self.long[int(hashes[place])]:
                if text.startswith(key, place):
                    first, last = np.searchsorted(starts, [place, place + len(key) - 1], side="right") - 1
                    yield range(int(first), int(last) + 1), key

    def without(self, lines: Sequence[str]) -> list[str]:
        """The document without the lines that a prefix touches."""
        touched = {i for span, _ in self.matches(lines) for i in span}
        return [line for i, line in enumerate(lines) if i not in touched]


@dataclass
class Package:
    """A row of `packages.parquet`."""

    name: str
    source: str
    section: str
    split: str
    synopsis: str
    body: str
    synopsis_de: str | None
    body_de: str | None

    @property
    def texts(self) -> list[str]:
        """What it is known by among near-duplicates."""
        return [text for text in (self.body, self.body_de) if text]

    @property
    def lines(self) -> list[str]:
        """All of its text, as lines."""
        german = [self.synopsis_de or "", *self.body_de.split("\n")] if self.body_de else []
        return [self.synopsis, *self.body.split("\n"), *german]


def families(table: Sequence[Package]) -> dict[str, str]:
    """Join source packages that near-duplicates connect.

    Args:
        table: the packages.

    Returns:
        For each source package the alphabetically first one of its family.
    """
    parent = {package.source: package.source for package in table}

    def root(source: str) -> str:
        while parent[source] != source:
            parent[source] = parent[parent[source]]
            source = parent[source]
        return source

    def join(one: str, other: str) -> None:
        first, second = sorted((root(one), root(other)))
        parent[second] = first

    owners: dict[str, str] = {}
    for package in table:
        for text in package.texts:
            join(package.source, owners.setdefault(prefix(text), package.source))
    prefixes = Prefixes(text for package in table for text in package.texts)
    for package in table:
        for _, key in prefixes.matches(package.lines):
            join(package.source, owners[key])
    return {source: root(source) for source in parent}


def split_of(name: str) -> str:
    """The split of a family or a page: a function of its name alone."""
    place = fraction(name)
    if place < EVALUATED["dev"]:
        return "dev"
    return "test" if place < EVALUATED["dev"] + EVALUATED["test"] else "train"


# --- the tables -------------------------------------------------------------------------------------------------------


def run(*words: str | Path) -> str:
    """Run a program and return what it prints."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{words[0]} failed ({done.stderr.strip()[-300:]}): this needs Debian bookworm and a network")
    return done.stdout


def apt_options(work: Path) -> list[str]:
    """Options that keep apt's lists in the work folder and ask for the German descriptions."""
    options = [f"Dir::State::lists={work / 'lists'}", "Acquire::Languages=", "Acquire::Languages::=en"]
    return [word for option in [*options, "Acquire::Languages::=de"] for word in ("-o", option)]


def download(work: Path) -> dict[str, str]:
    """Fetch the package lists and unpack the packages that hold text.

    Args:
        work: where they go; what is already there is not fetched again.

    Returns:
        The version of each package.
    """
    for folder in ("lists/partial", "debs", "unpacked"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    if not list((work / "lists").glob("*Translation-de*")):
        run("apt-get", *apt_options(work), "update")
    versions = {}
    for package in sorted({part.package for part in PARTS} | {package for package, _ in HELP}):
        if not list((work / "debs").glob(f"{package}_*.deb")):
            run("sh", "-c", 'cd "$0" && exec apt-get "$@"', work / "debs", *apt_options(work), "download", package)
        archive = next((work / "debs").glob(f"{package}_*.deb"))
        versions[package] = run("dpkg-deb", "--field", archive, "Version").strip()
        if not (work / "unpacked" / package).exists():
            run("dpkg-deb", "-x", archive, work / "unpacked" / package)
    return versions


def stanzas(work: Path, kind: str) -> Iterator[dict[str, str]]:
    """The stanzas of one of bookworm's main lists; a field's continuation lines keep their line breaks."""
    (listing,) = (work / "lists").glob(f"*_dists_bookworm_main_*{kind}*")
    for stanza in run("/usr/lib/apt/apt-helper", *apt_options(work), "cat-file", listing).split("\n\n"):
        fields = re.findall(r"^([^\s:]+):[ \t]*(.*(?:\n[ \t].*)*)", stanza, flags=re.MULTILINE)
        if fields:
            yield dict(fields)


def description(field: str) -> tuple[str, str]:
    """A description's synopsis and body.

    Args:
        field: the field's value; in it " ." ends a paragraph, and a line that starts with two spaces stands for itself
            (Debian Policy, section 5.6.13).

    Returns:
        The synopsis, and the body's paragraphs and list items, one per line.
    """
    synopsis, *rest = field.split("\n")
    lines: list[str] = []
    joins = in_item = False
    for raw in rest:
        text = clean(raw)
        item = re.match(r"[-*+o•·] ", text) is not None
        verbatim = raw.startswith("  ")
        if text == ".":
            joins = in_item = False
        elif text:
            if lines and joins and not item and (in_item or not verbatim):
                lines[-1] += " " + text
            else:
                lines.append(text)
            in_item = item or (in_item and joins)
            joins = not verbatim or in_item
    return clean(synopsis), "\n".join(lines)


def packages_table(work: Path) -> list[Package]:
    """One row per distinct description, split by family."""
    english = {s["Description-md5"]: description(s["Description-en"]) for s in stanzas(work, "Translation-en")}
    german = {s["Description-md5"]: description(s["Description-de"]) for s in stanzas(work, "Translation-de")}
    rows: dict[tuple[str, str], Package] = {}
    for stanza in sorted(stanzas(work, "Packages"), key=lambda s: s["Package"]):
        name, section, key = stanza["Package"], stanza.get("Section", ""), stanza.get("Description-md5", "")
        synopsis, body = english.get(key, ("", ""))
        empty = re.search(r"transitional|dummy package|debug(ging)? symbols", f"{synopsis}\n{body}", re.IGNORECASE)
        if not body or empty or section in ("oldlibs", "debug") or name.endswith(("-dbg", "-dbgsym")):
            continue
        synopsis_de, body_de = german.get(key, (None, None))
        source = stanza.get("Source", name).split()[0]
        package = Package(name, source, section, "train", synopsis, body, synopsis_de, body_de or None)
        rows.setdefault((synopsis, body), package)
    table = list(rows.values())
    family = families(table)
    sizes = pd.Series(family).value_counts()
    print(f"{len(family)} source packages in {len(sizes)} families, the largest of {sizes.iloc[:8].tolist()}")
    for package in table:
        if sizes[family[package.source]] <= LARGE_FAMILY:
            package.split = split_of(family[package.source])
    return table


def help_paragraphs(path: Path) -> dict[tuple[str, int], str]:
    """A help page's paragraphs by their id and how often it was seen: an embedded section repeats its ids."""
    paragraphs: dict[tuple[str, int], str] = {}
    seen: Counter[str] = Counter()
    for name, kind, text in html_blocks(path) if path.exists() else ():
        if re.match(r"(par|hd)_id", name) and kind != "code":
            paragraphs[name, seen[name]] = text
            seen[name] += 1
    return paragraphs


def help_table(work: Path, table: Sequence[Package]) -> pd.DataFrame:
    """LibreOffice help's aligned paragraphs, split by page; of near-duplicates in two splits the evaluated one goes."""
    english, german = (
        work / "unpacked" / package / "usr/share/libreoffice/help" / folder / "text" for package, folder in HELP
    )
    rows: dict[tuple[str, str], tuple[str, str, str, str]] = {}
    for path in sorted(english.rglob("*.html")):
        page = path.relative_to(english)
        translated = help_paragraphs(german / page)
        for key, en in help_paragraphs(path).items():
            de = translated.get(key, en)
            if en != de and en.count(" ") >= 2 and 0.4 < len(de) / len(en) < 2.5:
                name = page.with_suffix("").as_posix()
                rows.setdefault((en, de), (name, en, de, split_of(name)))
    frame = pd.DataFrame(rows.values(), columns=["page", "en", "de", "split"])
    barred = Prefixes(text for package in table if package.split != "train" for text in package.texts)
    frame = frame.drop(
        index=[i for side in ("en", "de") for span, _ in barred.matches(list(frame[side])) for i in span]
    )
    kept = frame[frame["split"] == "train"]
    lines = [line for package in table if package.split == "train" for line in package.lines]
    for split in ("dev", "test"):
        part = frame[frame["split"] == split]
        matches = Prefixes([*part["en"], *part["de"]]).matches([*lines, *kept["en"], *kept["de"]])
        taken = {key for _, key in matches}
        free = [taken.isdisjoint((prefix(en), prefix(de))) for en, de in zip(part["en"], part["de"], strict=True)]
        kept = pd.concat([kept, part[free]])
    return kept.sort_index()  # the order of the pages


def corpus_table(work: Path, evaluated: Iterable[str]) -> pd.DataFrame:
    """The other documents, without lines that an earlier document has and without any evaluated text."""
    barred, seen, rows = Prefixes(evaluated), set[str](), []
    with ThreadPoolExecutor(THREADS) as pool:
        for part in PARTS:
            root = work / "unpacked" / part.package
            paths = sorted(path for path in root.glob(part.files) if path.is_file() and not path.is_symlink())
            read = [
                (path, document)
                for path, file in zip(paths, pool.map(part.read, paths), strict=True)
                for document in file
            ]
            for number, (path, document) in enumerate(read):
                fresh = [line for line in document if line not in seen and (part.everything or is_prose(line))]
                seen.update(fresh)
                text = "\n".join(barred.without(list(dict.fromkeys(fresh))))
                if len(text) >= SHORTEST:
                    place = fraction(f"{part.name}/{path.relative_to(root)}/{number}")
                    rows.append((part.name, "heldout" if place < HELDOUT else "train", text))
            print(f"{part.name}: {sum(len(t) for n, _, t in rows if n == part.name) / 1e6:.1f} MB of text")
    return pd.DataFrame(rows, columns=["source", "split", "text"])


def train_tokenizer() -> None:
    """Train the SentencePiece unigram model on a fixed sample of the corpus's training lines."""
    lines = [line for text in corpus_documents("train")["text"] for line in text.split("\n")]
    share = TOKENIZER_LINES / len(lines)
    sample = [line for i, line in enumerate(lines) if fraction(str(i)) < share]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample),
        model_writer=model,
        model_type="unigram",
        vocab_size=PIECES,
        character_coverage=0.9998,  # the rest of Latin script and punctuation; other scripts become unknown
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=THREADS,
        minloglevel=1,
    )
    TOKENIZER.write_bytes(model.getvalue())


# --- the read-me ------------------------------------------------------------------------------------------------------

README = """# The embedded text

Real text from Debian bookworm (main), built on {date} by
`python -m gqa_exp.data.build_embedded --work DIR` on a bookworm machine with apt, dpkg-deb, groff and a network;
nothing here was written or edited by hand. Run it again to rebuild; what Debian has updated since will be newer.

| file | what | rows | MB | sha256 |
|---|---|---:|---:|---|
{files}

## Splits

Packages and help are split once for all tasks: packages by families of source packages, help by page. Two packages'
texts are near-duplicates when one contains the first {prefix} characters of the other's description (case and white
space folded; a shorter one must equal a whole paragraph), in either language; source packages that near-duplicates
connect form a family, and a family of more than {large} source packages is always in train. Of help, a dev or test
paragraph whose beginning stands in an earlier split was dropped. From everything in the corpus, each paragraph that
touches the beginning of a dev or test text was dropped.

{splits}

## Corpus

What `corpus_documents("train")` and `("heldout")` return, by source. Tokens are the tokenizer's, one end-of-sequence
mark per document included. A document of `debian` is a source package with the descriptions of its packages, one of
`help` is a page; in both, a paragraph's translation stands behind it (that of a whole description where the paragraphs
do not correspond).

{corpus}

The tokenizer is a SentencePiece unigram model of {pieces} pieces (pad 0, eos 1, unk 2), trained on {lines:,} lines of
the corpus's train part. The 100 sentinels sit on top: `<extra_id_0>` is {last}, descending.

## Origin and licences

Package descriptions (`packages.parquet`; `debian` in the corpus) are from bookworm's Packages, Translation-en and
Translation-de lists, main section. They are free by Debian's guidelines (DFSG): each stands under the licence of the
package that it describes (its `debian/copyright`); the translations are the Debian Description Translation Project's,
under the same terms. The other parts:

| package | version | in the corpus as | licence |
|---|---|---|---|
{parts}
"""


def markdown(frame: pd.DataFrame) -> str:
    """The frame as a Markdown table, numbers with thousands separators."""
    rows = [[f"{value:,}" if isinstance(value, int) else str(value) for value in row] for row in frame.values.tolist()]
    header = [[str(name) for name in frame.columns], ["---"] * len(frame.columns)]
    return "\n".join(f"| {' | '.join(row)} |" for row in header + rows)


def write_readme(versions: dict[str, str], table: pd.DataFrame, segments: pd.DataFrame, other: pd.DataFrame) -> None:
    """Write `README.md` from what was built."""
    names = {
        "packages.parquet": ("package descriptions, English and German", len(table)),
        "help.parquet": ("LibreOffice help, English and German paragraphs", len(segments)),
        "corpus.parquet": ("other documents of the corpus", len(other)),
        "tokenizer.model": ("SentencePiece model", PIECES),
    }
    files = []
    for name, (what, rows) in names.items():
        data = (FOLDER / name).read_bytes()
        files.append(f"| `{name}` | {what} | {rows:,} | {len(data) / 1e6:.2f} | `{hashlib.sha256(data).hexdigest()}` |")
    groups = {
        "packages": table,
        "packages with a German body": table[table["body_de"].notna()],
        "source packages": table.drop_duplicates("source"),
        "help paragraphs": segments,
        "help pages": segments.drop_duplicates("page"),
    }
    splits = pd.DataFrame([{"": name, **counts(group["split"])} for name, group in groups.items()])
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    sizes = []
    for split in SPLITS:
        documents = corpus_documents(split)
        tokens = [len(ids) + 1 for ids in tokenizer.encode(list(documents["text"]), num_threads=THREADS)]
        by_source = pd.Series(tokens, dtype=int).groupby(list(documents["source"]), sort=False).agg(["size", "sum"])
        by_source.loc["all"] = by_source.sum()
        sizes.append(by_source.rename(columns={"size": f"{split} documents", "sum": f"{split} tokens"}))
    corpus = pd.concat(sizes, axis=1).fillna(0).astype(int).reset_index(names="source")
    listing = {(part.package, part.name, part.licence) for part in PARTS}
    listing |= {(package, "help", "MPL-2.0") for package, _ in HELP}
    text = README.format(
        date=datetime.date.today().isoformat(),
        files="\n".join(files),
        prefix=PREFIX,
        large=LARGE_FAMILY,
        splits=markdown(splits),
        corpus=markdown(corpus),
        pieces=PIECES,
        lines=TOKENIZER_LINES,
        last=PIECES + 99,
        parts="\n".join(
            f"| {package} | {versions[package]} | {name} | {terms} |" for package, name, terms in sorted(listing)
        ),
    )
    (FOLDER / "README.md").write_text(text, encoding="utf-8")


def counts(split: "pd.Series[str]") -> dict[str, int]:
    """Rows per split, in the order in which one reads them."""
    return {name: int((split == name).sum()) for name in ("train", "dev", "test", "heldout") if name in set(split)}


def write(name: str, frame: pd.DataFrame) -> None:
    """Write a table, compressed as far as Zstandard goes at a bearable speed."""
    frame.to_parquet(FOLDER / f"{name}.parquet", index=False, compression="zstd", compression_level=19)
    print(f"{name}: {(FOLDER / f'{name}.parquet').stat().st_size / 1e6:.2f} MB, {counts(frame['split'])}")


@command
def main() -> None:
    """Build the tables, the tokenizer and the read-me."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads; kept, and used again")
    work = parser.parse_args().work.resolve()
    versions = download(work)
    table = packages_table(work)
    segments = help_table(work, table)
    evaluated = [text for package in table if package.split != "train" for text in package.texts]
    evaluated += [text for side in ("en", "de") for text in segments.loc[segments["split"] != "train", side]]
    other = corpus_table(work, evaluated)
    frame = pd.DataFrame(table)
    write("packages", frame)
    write("help", segments)
    write("corpus", other)
    train_tokenizer()
    write_readme(versions, frame, segments, other)


if __name__ == "__main__":
    main()
