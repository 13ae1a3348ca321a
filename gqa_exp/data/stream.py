"""Pre-training text that is too much to tokenize beforehand: C4, read while it is trained on.

Files are put into an order drawn from the seed and dealt to lanes in turn, and each row of a batch belongs to a lane. A
lane reads its files one after the other, joins their documents (each closed by the end-of-sequence id) and cuts them
into windows. Ranks share the lanes, and within a rank a few workers do, so what is trained on does not depend on how
many there are of either. The next batch is made while a step is computed: workers are threads, since decompressing and
tokenizing, most of the work, let others run. Where a lane stands is three numbers (file, document, token), which are
kept with the training state: a run resumes where it stopped.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np

from gqa_exp.config import CorpusConfig
from gqa_exp.data.corpus import NOISE, Batch, Ids, checked_lengths, noise_mask, to_batch
from gqa_exp.data.tokenizer import Tokenizer
from gqa_exp.errors import InputError, one_line

C4_FILES = tuple(f"hf://datasets/allenai/c4/en/c4-train.{i:05}-of-01024.json.gz" for i in range(1024))
"""The English configuration of allenai/c4 on the Hugging Face hub."""
LANES = 64
"""Most lanes; a power of two, so that any usual number of ranks divides it."""
TOGETHER = 64
"""Documents tokenized at a time."""
WORKERS = 8
"""Most lanes that a rank reads at the same time."""
FILE_ORDER = 4
"""Of the streams of random numbers in `gqa_exp.data.corpus`, the next."""


class Position(NamedTuple):
    """The first token of a lane that has not been taken."""

    file: int
    """Of the lane's files; beyond the last they begin again."""
    document: int
    token: int


class Lane:
    """An endless row of tokens over some files.

    Args:
        files: JSON lines with a field "text", compressed or not; local paths, or addresses that fsspec knows.
        tokenizer: makes the ids.
        position: where to begin.
    """

    def __init__(self, files: Sequence[str], tokenizer: Tokenizer, position: Position) -> None:
        self.files, self.tokenizer, self.position = files, tokenizer, position
        self._documents = self._read()
        self._buffer: deque[tuple[int, int, Ids]] = deque()
        """Documents read, of which the first has been taken up to the position's token."""

    def _read(self) -> Iterator[tuple[int, int, Ids]]:
        """Documents from the position on: number of file, of document, and ids."""
        file, skip, found = self.position.file, self.position.document, True
        while True:
            texts = enumerate(islice(_texts(self.files[file % len(self.files)]), skip, None), skip)
            while together := list(islice(texts, TOGETHER)):
                found = True
                ids = self.tokenizer.encode_batch([text for _, text in together])
                for (document, _), row in zip(together, ids, strict=True):
                    yield file, document, np.array(row, np.int32)
            file, skip = file + 1, 0
            if file % len(self.files) == 0:
                if not found:
                    raise InputError(f"{self.files[0]}: no documents in it or its like; a corpus needs text")
                found = False

    def take(self, count: int) -> Ids:
        """The next tokens, (count,)."""
        parts: list[Ids] = []
        while count:
            if not self._buffer:
                self._buffer.append(next(self._documents))
            file, document, ids = self._buffer[0]
            start = self.position.token if (file, document) == self.position[:2] else 0
            part = ids[start : start + count]
            parts.append(part)
            count -= len(part)
            self.position = Position(file, document, start + len(part))
            if self.position.token >= len(ids):
                self._buffer.popleft()
                self.position = Position(file, document + 1, 0)
        return np.concatenate(parts)


def _texts(path: str) -> Iterator[str]:
    """The documents of a file."""
    number = 0
    try:
        with fsspec.open(path, "rt", compression="infer", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError(f"text is {text!r}")
                yield text
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{path}: line {number} is no JSON object with a "text" ({one_line(error)[:80]})') from error
    except Exception as error:  # of the network, by several libraries
        raise InputError(
            f"{path}: cannot be read ({one_line(error)[:120]}); download files of allenai/c4, en/c4-train.*.json.gz, "
            "into a folder, and give that as corpus.data_dir"
        ) from error


def c4_files(config: CorpusConfig) -> list[str]:
    """The files of a streamed corpus: of a local folder, or of the hub.

    Raises:
        InputError: no such folder, or none of its files looks like one of C4's.
    """
    if config.data_dir is None:
        return list(C4_FILES)
    folder = Path(config.data_dir)
    folder = folder / "en" if (folder / "en").is_dir() else folder  # of a copy of the whole repository
    found = sorted(str(path) for path in folder.glob("*train*") if path.name.endswith((".json.gz", ".json", ".jsonl")))
    if not found:
        raise InputError(f"corpus.data_dir={folder}: no files named like c4-train.00000-of-01024.json.gz")
    return found


def stream_identity(config: CorpusConfig, tokenizer: Tokenizer) -> str:
    """Hash of what a streamed corpus consists of: names and sizes of files, which are too many to be read for it."""
    files = c4_files(config)
    sizes = [[Path(file).name, Path(file).stat().st_size if config.data_dir else 0] for file in files]
    return hashlib.sha256(json.dumps([tokenizer.content_hash, sizes]).encode()).hexdigest()


class TextStream:
    """Endless span-corruption batches over streamed files.

    Args:
        config: files, lengths and noise.
        tokenizer: makes the ids.
        seed: of the files' order and the noise.
        batch_size: windows per step, of all ranks together.
        positions: to go on from; those of other files, or of another order of them, do not count.

    Raises:
        InputError: what `c4_files` refuses; or lengths that do not belong together.
    """

    def __init__(
        self,
        config: CorpusConfig,
        tokenizer: Tokenizer,
        seed: int,
        batch_size: int,
        positions: Mapping[str, Any] | None = None,
    ) -> None:
        self.counts = checked_lengths(config, tokenizer)
        self.tokenizer, self.seed, self.batch_size = tokenizer, seed, batch_size
        files = c4_files(config)
        order = np.random.default_rng([seed, FILE_ORDER]).permutation(len(files))
        self.lanes = 2 ** int(np.log2(min(LANES, batch_size, len(files))))
        self.identity = f"{stream_identity(config, tokenizer)[:16]}-{seed}-{self.lanes}"
        known = dict(positions or {})
        same = known.pop("of", None) == self.identity
        begin = {int(lane): Position(*position) for lane, position in known.items()} if same else {}
        self._files = [[files[i] for i in order[lane :: self.lanes]] for lane in range(self.lanes)]
        self._begin = [begin.get(lane, Position(0, 0, 0)) for lane in range(self.lanes)]
        self._lanes: dict[int, Lane] = {}
        self._workers = ThreadPoolExecutor(WORKERS, "lane")
        self._ahead = ThreadPoolExecutor(1, "batch")
        self._next: tuple[tuple[int, int, int], Future[Batch]] | None = None
        self._after: dict[int, dict[str, Position]] = {}
        """Where lanes stood after the latest steps: batches may be fetched ahead of the step that uses them."""

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """A rank's rows of the batch of a step; steps must be asked for in turn.

        Args:
            step: counted from 0.
            rank: which of the ranks asks.
            ranks: how many there are; they must divide the lanes.

        Returns:
            input_ids and labels, torch.long; of the whole batch every `ranks`-th row.

        Raises:
            InputError: the ranks do not divide the lanes, or a file cannot be read.
        """
        if self.lanes % ranks:
            raise InputError(
                f"{ranks} ranks cannot share the {self.lanes} lanes of the corpus; use a power of two, at most "
                f"{LANES}, pretrain.batch_size and the number of files"
            )
        asked = (step, rank, ranks)
        if self._next is None:
            self._next = (asked, self._ahead.submit(self._make, *asked))
        if self._next[0] != asked:
            raise ValueError(f"step, rank and ranks {asked} asked for, but {self._next[0]} comes next")
        made = self._next[1].result()
        self._next = ((step + 1, rank, ranks), self._ahead.submit(self._make, step + 1, rank, ranks))
        return made

    def _make(self, step: int, rank: int, ranks: int) -> Batch:
        rows = range(rank, self.batch_size, ranks)
        lanes = sorted({row % self.lanes for row in rows})
        counts = [sum(row % self.lanes == lane for row in rows) for lane in lanes]
        taken = dict(zip(lanes, self._workers.map(self._take, lanes, counts), strict=True))
        windows = np.stack([next(taken[row % self.lanes]) for row in rows])
        masks = [
            noise_mask(self.counts, np.random.default_rng([self.seed, NOISE, step * self.batch_size + row]))
            for row in rows
        ]
        self._after[step + 1] = {str(number): lane.position for number, lane in self._lanes.items()}
        self._after.pop(step - 7, None)
        return to_batch(windows, masks, self.tokenizer)

    def positions(self, step: int) -> dict[str, Any]:
        """Where this rank's lanes stand when so many steps are done, for `positions` of a later stream."""
        lanes = {lane: list(position) for lane, position in self._after.get(step, {}).items()}
        return {"of": self.identity, **lanes}

    def _take(self, lane: int, count: int) -> Iterator[Ids]:
        """A lane's next windows."""
        if lane not in self._lanes:
            self._lanes[lane] = Lane(self._files[lane], self.tokenizer, self._begin[lane])
        return iter([self._lanes[lane].take(self.counts.window) for _ in range(count)])
