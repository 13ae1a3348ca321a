"""Examples to batches: as much text per step as a token budget allows, and as little padding as can be.

Batches are counted in tokens, not examples, so that a step costs the same whatever the task's lengths are; examples of
similar length share one. Every batch is a pure function of (seed, step), so fine-tuning can resume anywhere.
"""

import errno
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from gqa_exp.data.tokenizer import PAD_ID, Tokenizer
from gqa_exp.errors import InputError, one_line

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]


ENCODE_VERSION = 1
"""Raise when the same examples would give other ids."""


@contextmanager
def on_disk(where: str) -> Iterator[None]:
    """Reading and caching of `datasets`: what goes wrong with files, disks and their contents is said in one line.

    Raises:
        InputError: any error of what is done within; names the place.
    """
    try:
        yield
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        cause: BaseException = error  # the libraries wrap what went wrong
        while cause.__cause__ is not None and not isinstance(cause, InputError):
            cause = cause.__cause__
        if isinstance(cause, InputError):
            raise cause from error
        hint = "; free space, or set HF_HOME to another disk" if getattr(cause, "errno", None) == errno.ENOSPC else ""
        raise InputError(f"{where}: cannot be read or cached ({one_line(cause)[:200]}){hint}") from error


@dataclass(frozen=True)
class EncodedTask:
    """A task's examples as ids, each list closed by the end-of-sequence id, in the dataset's order."""

    input_ids: Sequence[list[int]]
    target_ids: Sequence[list[int]]
    lengths: list[tuple[int, int]]
    """Input and target tokens of each example."""
    truncated_inputs: int
    """Examples whose input was cut."""
    truncated_targets: int

    def __len__(self) -> int:
        return len(self.lengths)


def encode_task(
    dataset: datasets.Dataset, tokenizer: Tokenizer, max_input: int, max_target: int, sentinels: bool = True
) -> EncodedTask:
    """Tokenize a task's examples; what is cut is counted and logged, never silent.

    What is cut keeps its end of sequence, and a sentinel that stands last, since that is what asks for the output.
    Examples that came from files are kept in the cache of `datasets` beside them, under a name of their content, and
    read from there as they are needed.

    Args:
        dataset: columns input and target, as `gqa_exp.data.tasks.load_task` gives them.
        tokenizer: makes the ids.
        max_input: most tokens of an input, end of sequence included.
        max_target: most tokens of a target, end of sequence included.
        sentinels: whether `<extra_id_0>` in a text is a sentinel, or text like any other.
    """

    def shortened(row: list[int], limit: int) -> list[int]:
        end = 2 if len(row) > 1 and row[-2] >= tokenizer.num_pieces else 1
        return [*row[: max(0, limit - end)], *row[-end:]][-limit:]

    def encode(texts: dict[str, list[str]]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {}
        for column, limit in (("input", max_input), ("target", max_target)):
            ids = tokenizer.encode_batch(texts[column], sentinels=sentinels)
            columns[f"{column}_ids"] = [row if len(row) <= limit else shortened(row, limit) for row in ids]
            columns[f"{column}_length"] = list(map(len, columns[f"{column}_ids"]))
            columns[f"{column}_cut"] = [len(row) > limit for row in ids]
        return columns

    if dataset.cache_files:
        facts = [ENCODE_VERSION, dataset._fingerprint, tokenizer.content_hash, max_input, max_target, sentinels]
        with on_disk("tokenized examples"):
            columns: Any = dataset.map(
                encode,
                batched=True,
                remove_columns=dataset.column_names,
                new_fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16],
                desc="tokenizing",
            )
    else:
        columns = encode({column: list(dataset[column]) for column in ("input", "target")})
    lengths = list(zip(columns["input_length"][:], columns["target_length"][:], strict=True))
    longer = {}
    for column, limit in (("input", max_input), ("target", max_target)):
        longer[column] = sum(columns[f"{column}_cut"][:])
        if longer[column]:
            message = "%d of %d %ss are longer than %d tokens and were cut"
            logger.warning(message, longer[column], len(lengths), column, limit)
    return EncodedTask(columns["input_ids"], columns["target_ids"], lengths, longer["input"], longer["target"])


def round_up(length: int, multiple: int) -> int:
    """The next multiple at or above a length."""
    return -(-length // multiple) * multiple


def pad_batch(rows: Sequence[Sequence[int]], multiple: int = 1) -> torch.Tensor:
    """Rows of ids as one tensor, filled up at the right with the padding id.

    Args:
        rows: B lists of ids, at least one.
        multiple: the width is rounded up to it.

    Returns:
        (B, width), torch.long.
    """
    padded = torch.full((len(rows), round_up(max(map(len, rows)), multiple)), PAD_ID, dtype=torch.long)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
    return padded


def bucketed_batches(
    lengths: Sequence[tuple[int, int]],
    batch_tokens: int,
    seed: int,
    epoch: int,
    multiple: int = 32,
    most: int | None = None,
) -> list[list[int]]:
    """Share out the examples of one epoch.

    Lengths count rounded up, as they will be padded. Examples are sorted by them (those of equal lengths in random
    order) and packed in turn; then the batches are shuffled. The number of batches is the same in every epoch.

    Args:
        lengths: input and target tokens of each example.
        batch_tokens: most padded tokens of a batch, inputs plus targets.
        seed: with `epoch`, decides order and who shares a batch.
        epoch: counted from 0.
        multiple: to what lengths are rounded; a larger one makes fewer distinct shapes.
        most: examples of a batch at most; None: as many as there is room for.

    Returns:
        Indices of the examples of each batch; every example in exactly one.

    Raises:
        InputError: one example alone is beyond the budget.
    """
    rng = np.random.default_rng([seed, epoch])
    sizes = [(round_up(i, multiple), round_up(t, multiple)) for i, t in lengths]
    batches: list[list[int]] = []
    width = (0, 0)
    for index in sorted(map(int, rng.permutation(len(sizes))), key=sizes.__getitem__):
        grown = max(width[0], sizes[index][0]), max(width[1], sizes[index][1])
        has_place = bool(batches) and (most is None or len(batches[-1]) < most)
        if has_place and sum(grown) * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
            width = grown
        elif sum(sizes[index]) <= batch_tokens:
            batches.append([index])
            width = sizes[index]
        else:
            raise InputError(
                f"batch_tokens={batch_tokens} cannot hold an example of {lengths[index][0]} + {lengths[index][1]} "
                f"tokens, padded to {sizes[index][0]} + {sizes[index][1]}; use at least {sum(sizes[index])}"
            )
    return [batches[i] for i in rng.permutation(len(batches))]


class FinetuneBatches:
    """Endless fine-tuning batches; `batch(step)` needs no history.

    Args:
        inputs: ids of each example's input.
        targets: ids of each example's target.
        batch_tokens: most padded tokens of a batch, inputs plus targets.
        seed: of the order.
        multiple: to what padded lengths are rounded.
        lengths: tokens of each example's input and target, where they are known; else they are counted.
        most: examples of a batch at most; None: as many as there is room for.

    Raises:
        InputError: no examples, or one that alone is beyond the budget.
    """

    def __init__(
        self,
        inputs: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        batch_tokens: int,
        seed: int,
        multiple: int = 32,
        lengths: Sequence[tuple[int, int]] | None = None,
        most: int | None = None,
    ) -> None:
        if not len(inputs):
            raise InputError("there are no examples to train on")
        self.inputs = inputs
        self.targets = targets
        self.multiple = multiple
        known = lengths or [(len(i), len(t)) for i, t in zip(inputs, targets, strict=True)]
        self._epoch = lru_cache(maxsize=2)(
            lambda epoch: bucketed_batches(known, batch_tokens, seed, epoch, multiple, most)
        )
        self.steps_per_epoch = len(self._epoch(0))

    def indices(self, step: int) -> list[int]:
        """Which examples make the batch of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[place]

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0.

        Returns:
            input_ids and attention_mask (B, S), labels (B, T); torch.long, ids padded with 0.
        """
        rows = self.indices(step)
        input_ids = pad_batch([self.inputs[i] for i in rows], self.multiple)
        labels = pad_batch([self.targets[i] for i in rows], self.multiple)
        return {"input_ids": input_ids, "attention_mask": (input_ids != PAD_ID).long(), "labels": labels}
