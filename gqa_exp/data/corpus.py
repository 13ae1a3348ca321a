"""Pre-training text as batches, each a pure function of (seed, step): a run can stop anywhere and resume exactly.

The objective is T5's span corruption: spans of tokens are taken out of a window, a sentinel marks the place of each,
and the target says what stood there. Documents are joined (each closed by the end-of-sequence id) and cut into windows
of one length, chosen so that inputs and targets come out at exactly the configured lengths: nothing is ever padded.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from gqa_exp.config import CorpusConfig
from gqa_exp.data import embedded
from gqa_exp.data.tokenizer import EOS_ID, Tokenizer
from gqa_exp.errors import InputError

Ids = npt.NDArray[np.integer[Any]]
Mask = npt.NDArray[np.bool_]
Batch = dict[str, torch.Tensor]

CORPUS_VERSION = 2
"""Raise when the same files would give other tokens."""
TOKENIZE_CHUNK = 4096  # documents between two updates of the progress bar

# Streams of random numbers, so that no two purposes share draws.
WINDOW_ORDER, NOISE, HELDOUT_NOISE, DOCUMENT_ORDER = range(4)


class Corruption(NamedTuple):
    """How many tokens go where when one window is corrupted."""

    window: int
    """Raw tokens."""
    noise: int
    """Raw tokens that are taken out, in `spans` spans."""
    spans: int
    inputs: int
    """Kept tokens, a sentinel per span and the end-of-sequence id."""
    targets: int
    """Removed tokens, a sentinel per span and the end-of-sequence id."""


def corruption(window: int, noise_density: float, mean_span: float) -> Corruption:
    """The counts for a window of `window` >= 2 raw tokens.

    Rounding as T5's `random_spans_noise_mask` (google-research/text-to-text-transfer-transformer,
    t5/data/preprocessors.py); the spans are bounded by the kept tokens too, since kept stretches are not empty either.
    """
    noise = min(max(round(window * noise_density), 1), window - 1)
    spans = min(max(round(noise / mean_span), 1), noise, window - noise)
    return Corruption(window, noise, spans, window - noise + spans + 1, noise + spans + 1)


def corrupted_lengths(config: CorpusConfig) -> Corruption:
    """The longest window whose corruption gives exactly `input_length` inputs (T5: 512 and 114 from 568 raw tokens).

    Raises:
        InputError: no window gives the configured lengths; the message names the target length that would fit.
    """
    window = 2
    while corruption(window + 1, config.noise_density, config.mean_span).inputs <= config.input_length:
        window += 1
    counts = corruption(window, config.noise_density, config.mean_span)
    if (counts.inputs, counts.targets) != (config.input_length, config.target_length):
        raise InputError(
            f"corpus.input_length={config.input_length} and corpus.target_length={config.target_length} do not belong "
            f"together at noise_density={config.noise_density:g}, mean_span={config.mean_span:g}; "
            f"use input_length={counts.inputs} and target_length={counts.targets}"
        )
    return counts


def _segment(total: int, parts: int, rng: np.random.Generator) -> Ids:
    """Random lengths >= 1 of `parts` segments that make `total`, each way to cut equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def noise_mask(counts: Corruption, rng: np.random.Generator) -> Mask:
    """Which tokens of a window are taken out: kept and removed stretches of random lengths alternate, kept first.

    Returns:
        (window,) with exactly `counts.noise` True in exactly `counts.spans` runs.
    """
    kept = _segment(counts.window - counts.noise, counts.spans, rng)
    removed = _segment(counts.noise, counts.spans, rng)
    return np.repeat(np.tile([False, True], counts.spans), np.stack([kept, removed], axis=1).ravel())


def corrupt(windows: Ids, masks: Mask, tokenizer: Tokenizer) -> tuple[Ids, Ids]:
    """Split windows into inputs and targets.

    Args:
        windows: (B, window) raw tokens.
        masks: (B, window), each row from `noise_mask` with the same counts.
        tokenizer: knows the sentinels.

    Returns:
        inputs (B, inputs): kept tokens, the i-th removed span replaced by sentinel i, end of sequence;
        targets (B, targets): for each span its sentinel and its tokens, end of sequence.
    """
    rows = len(windows)
    first = masks.copy()
    first[:, 1:] &= ~masks[:, :-1]
    sentinels = tokenizer.sentinel(0) + 1 - np.cumsum(first, axis=1)
    eos = np.full((rows, 1), EOS_ID)
    inputs = np.where(first, sentinels, windows)[~masks | first].reshape(rows, -1)
    # Two places per token: the sentinel, where a span begins, stands before the span's first token.
    both = np.stack([sentinels, windows], axis=2)
    targets = both[np.stack([first, masks], axis=2)].reshape(rows, -1)
    return np.concatenate([inputs, eos], axis=1), np.concatenate([targets, eos], axis=1)


def to_batch(windows: Ids, masks: Sequence[Mask], tokenizer: Tokenizer) -> Batch:
    """Windows (B, window), corrupted by masks (window,) each: input_ids and labels, torch.long."""
    inputs, targets = corrupt(windows, np.stack(masks), tokenizer)
    return {
        "input_ids": torch.from_numpy(inputs.astype(np.int64)),
        "labels": torch.from_numpy(targets.astype(np.int64)),
    }


def checked_lengths(config: CorpusConfig, tokenizer: Tokenizer) -> Corruption:
    """The counts of a corpus's windows.

    Raises:
        InputError: lengths that do not belong together, or too few sentinels.
    """
    counts = corrupted_lengths(config)
    if counts.spans > tokenizer.num_sentinels:
        raise InputError(
            f"corpus.input_length={config.input_length} needs {counts.spans} sentinels per window, but the tokenizer "
            f"has {tokenizer.num_sentinels}; shorten the input or raise corpus.mean_span"
        )
    return counts


class CorpusStream:
    """Endless span-corruption batches over one long row of tokens.

    The n-th window ever taken (n = step * batch_size + row) is window n mod N of epoch n // N. Each epoch begins at an
    offset of its own, wraps around the end, and has its own order; the noise is drawn per n. So the batch size only
    groups windows, and steps need no history.

    Args:
        tokens: all documents, each closed by the end-of-sequence id; uint16 or int32, may be memory-mapped.
        config: lengths and noise.
        tokenizer: knows the sentinels.
        seed: of order and noise.

    Raises:
        InputError: lengths that do not belong together, too few sentinels, or too few tokens for one window.
    """

    def __init__(self, tokens: Ids, config: CorpusConfig, tokenizer: Tokenizer, seed: int) -> None:
        self.tokens = tokens
        self.tokenizer = tokenizer
        self.seed = seed
        self.counts = checked_lengths(config, tokenizer)
        if len(tokens) < self.counts.window:
            raise InputError(f"corpus {config.name} has {len(tokens)} tokens; one window needs {self.counts.window}")
        self.windows_per_epoch = len(tokens) // self.counts.window
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)  # a batch may reach into the next

    def _draw_epoch(self, epoch: int) -> tuple[int, Ids]:
        rng = np.random.default_rng([self.seed, WINDOW_ORDER, epoch])
        return int(rng.integers(len(self.tokens))), rng.permutation(self.windows_per_epoch)

    def window(self, n: int) -> Ids:
        """Raw tokens of the n-th window ever taken, (window,)."""
        epoch, place = divmod(n, self.windows_per_epoch)
        offset, order = self._epoch(epoch)
        start = offset + int(order[place]) * self.counts.window
        return self.tokens.take(np.arange(start, start + self.counts.window), mode="wrap")

    def mask(self, n: int) -> Mask:
        """What corruption takes out of the n-th window, (window,)."""
        return noise_mask(self.counts, np.random.default_rng([self.seed, NOISE, n]))

    def batch(self, step: int, batch_size: int) -> Batch:
        """The batch of a step, whatever was asked before.

        Args:
            step: counted from 0.
            batch_size: windows per step, B.

        Returns:
            input_ids (B, input_length) and labels (B, target_length), torch.long.
        """
        taken = range(step * batch_size, (step + 1) * batch_size)
        return to_batch(np.stack([self.window(n) for n in taken]), [self.mask(n) for n in taken], self.tokenizer)


def heldout_batches(tokens: Ids, config: CorpusConfig, tokenizer: Tokenizer, batch_size: int) -> Iterator[Batch]:
    """All windows of held-out text, once, in order, always with the same noise.

    Yields:
        Batches as `CorpusStream.batch`; the last may be smaller, and text shorter than one window gives none.

    Raises:
        InputError: lengths that do not belong together, or too few sentinels.
    """
    counts = checked_lengths(config, tokenizer)
    total = len(tokens) // counts.window
    windows = np.asarray(tokens[: total * counts.window]).reshape(total, counts.window)
    masks = [noise_mask(counts, np.random.default_rng([HELDOUT_NOISE, n])) for n in range(total)]
    for start in range(0, total, batch_size):
        part = slice(start, start + batch_size)
        yield to_batch(windows[part], masks[part], tokenizer)


def unigram_loss(train_labels: Ids | torch.Tensor, heldout_labels: Ids | torch.Tensor, vocab_size: int) -> float:
    """Loss of a model that knows only how frequent each label is: what any language model has to beat.

    Args:
        train_labels: label ids of any shape; frequencies are counted here and smoothed by adding one.
        heldout_labels: label ids of any shape, such as the model's loss is measured on. Neither may be padded.
        vocab_size: ids that exist.

    Returns:
        Mean cross-entropy per held-out label, in nats.
    """
    train = np.bincount(np.asarray(train_labels).ravel(), minlength=vocab_size) + 1.0
    heldout = np.bincount(np.asarray(heldout_labels).ravel(), minlength=vocab_size)
    return float(-(heldout * np.log(train / train.sum())).sum() / heldout.sum())


# --- text to tokens ---------------------------------------------------------------------------------------------------


def read_text_file(path: str | Path) -> str:
    """A text file of the user's.

    Raises:
        InputError: it cannot be read, is empty, or is not UTF-8 (the message gives the byte offset).
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"text file {path} cannot be read ({error.strerror})") from None
    if not data.strip():
        raise InputError(f"text file {path} is empty")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"text file {path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; convert it"
        ) from None


def tokenize(texts: Sequence[str], tokenizer: Tokenizer, threads: int = 2) -> Ids:
    """Join documents to one row of tokens, each closed by the end-of-sequence id.

    Returns:
        (tokens,), uint16 where the vocabulary allows, else int32.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    parts: list[Ids] = [np.empty(0, dtype)]
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("tokenizing", total=len(texts))
        for start in range(0, len(texts), TOKENIZE_CHUNK):
            chunk = texts[start : start + TOKENIZE_CHUNK]
            parts += [np.array(ids, dtype) for ids in tokenizer.encode_batch(chunk, threads=threads)]
            progress.advance(bar, len(chunk))
    return np.concatenate(parts)


@lru_cache
def file_hash(path: Path) -> str:
    """sha256 of a file's bytes; remembered, since the shipped files do not change while a command runs."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def corpus_hash(tokenizer: Tokenizer) -> str:
    """Content hash of all that determines the corpus's tokens: files, tokenizer, and this module's version."""
    files = [file_hash(path) for path in sorted(embedded.FOLDER.glob("*.parquet"))]
    return hashlib.sha256("/".join([str(CORPUS_VERSION), tokenizer.content_hash, *files]).encode()).hexdigest()


def _cached(path: Path, write: Callable[[BinaryIO], None]) -> Path:
    """Make a file unless it exists: once, however many processes ask, and whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                try:
                    write(file)  # type: ignore[arg-type]
                except BaseException:
                    os.unlink(file.name)
                    raise
            os.replace(file.name, path)
    return path


def corpus_tokens(
    split: Literal["train", "heldout"],
    tokenizer: Tokenizer,
    cache_folder: str | Path,
    sources: Sequence[str] | None = None,
) -> Ids:
    """The embedded corpus as one row of tokens, documents in a fixed shuffled order.

    Args:
        split: which part of the corpus.
        tokenizer: makes the tokens.
        cache_folder: keeps the result under a name that holds its content hash, so it is made once.
        sources: only these of the corpus's sources; None for all.

    Returns:
        (tokens,), memory-mapped.

    Raises:
        InputError: a source that does not exist.
    """

    def write(file: BinaryIO) -> None:
        documents = embedded.corpus_documents(split).to_pandas()
        known = set(documents["source"])
        for source in set(sources or ()) - known:
            raise InputError(f"corpus has no source {source}; known: {', '.join(sorted(known))}")
        texts = [
            text
            for text, source in zip(documents["text"], documents["source"], strict=True)
            if sources is None or source in sources
        ]
        order = np.random.default_rng(DOCUMENT_ORDER).permutation(len(texts))
        np.save(file, tokenize([texts[i] for i in order], tokenizer), allow_pickle=False)

    named = hashlib.sha256("/".join([corpus_hash(tokenizer), *sorted(sources or ("all",))]).encode()).hexdigest()
    path = _cached(Path(cache_folder) / f"{split}-{named[:16]}.npy", write)
    tokens: Ids = np.load(path, mmap_mode="r", allow_pickle=False)
    return tokens


def corpus_files_hash(files: Sequence[str], tokenizer: Tokenizer) -> str:
    """Content hash of the tokens that the user's text files give.

    Raises:
        InputError: as `read_text_file`.
    """
    digest = hashlib.sha256(tokenizer.content_hash.encode())
    for path in files:
        digest.update(hashlib.sha256(read_text_file(path).encode()).digest())
    return digest.hexdigest()


def file_tokens(files: Sequence[str], tokenizer: Tokenizer, cache_folder: str | Path) -> Ids:
    """The user's text files as one row of tokens, each file a document; kept as `corpus_tokens` keeps its own.

    Raises:
        InputError: as `read_text_file`.
    """

    def write(file: BinaryIO) -> None:
        np.save(file, tokenize([read_text_file(path) for path in files], tokenizer), allow_pickle=False)

    named = f"{CORPUS_VERSION}-{corpus_files_hash(files, tokenizer)[:16]}"
    path = _cached(Path(cache_folder) / f"files-{named}.npy", write)
    tokens: Ids = np.load(path, mmap_mode="r", allow_pickle=False)
    return tokens


def heldout_tokens(tokenizer: Tokenizer, cache_folder: str | Path) -> dict[str, Ids]:
    """The held-out part of the embedded corpus, source by source; see `corpus_tokens`."""

    def write(file: BinaryIO) -> None:
        documents = embedded.corpus_documents("heldout").to_pandas()
        grouped = documents.groupby("source", sort=True)["text"]
        arrays: dict[str, Any] = {str(source): tokenize(list(texts), tokenizer) for source, texts in grouped}
        np.savez(file, **arrays)

    path = _cached(Path(cache_folder) / f"heldout-{corpus_hash(tokenizer)[:16]}.npz", write)
    with np.load(path, allow_pickle=False) as arrays:
        return {source: arrays[source] for source in arrays.files}
