"""Greedy evaluation of a checkpoint on a task: the same `generate` that is timed, batched so that little is padding.

Inputs of similar length share a batch, since a decode step reads the cross-attention cache of the padding as well.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gqa_exp.errors import InputError
from gqa_exp.evaluation.metrics import Scores, check_examples, metric_of_kind, score
from gqa_exp.model import T5, InferenceT5, generate


class Decoder(Protocol):
    """What evaluation needs of a tokenizer."""

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint wrote for a set of examples, and what that is worth.

    Attributes:
        predictions: one text per example, in the order of the inputs.
        scores: see `Scores`.
        mean_generated_tokens: mean decode steps an example needed, its end-of-sequence token included.
        seconds: wall time of generation, all batches, without scoring. Not a measurement of speed: the timer's job.
    """

    predictions: list[str]
    scores: Scores
    mean_generated_tokens: float
    seconds: float


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group examples of similar length into batches of at most `batch_tokens` tokens, padding included.

    Args:
        lengths: tokens of each example.
        batch_tokens: most tokens of a batch, padded to its longest example.

    Returns:
        Indices of the examples of each batch, the longest examples first: what does not fit into memory fails at once.

    Raises:
        InputError: an example is empty, or longer than a batch may be.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[index] < 1:
            raise InputError(f"input {index} has no tokens; an input ends with end-of-sequence at least")
        if lengths[index] > batch_tokens:
            raise InputError(
                f"evaluation.batch_tokens={batch_tokens} cannot hold input {index} of {lengths[index]} tokens; "
                f"use {max(lengths)} or more"
            )
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


def pad(sequences: Sequence[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Right-pad token ids to the longest sequence.

    Returns:
        ids (B, S), and the attention mask (B, S), 1 for tokens and 0 for padding, or None when nothing is padded.
    """
    ids_BS = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sequences], True, pad_id)
    lengths_B = torch.tensor([len(ids) for ids in sequences])
    # By length, not by value: a mask must not depend on an input never holding the padding id.
    mask_BS = (torch.arange(ids_BS.shape[1]) < lengths_B[:, None]).long()
    return ids_BS, None if bool(mask_BS.all()) else mask_BS


def evaluate_model(
    model: T5,
    tokenizer: Decoder,
    encoded_inputs: Sequence[list[int]],
    references: Sequence[Sequence[str]],
    *,
    kind: str,
    max_new_tokens: int,
    batch_tokens: int,
    device: torch.device | str = "cpu",
    progress: str = "",
) -> Evaluation:
    """Generate greedily for every input, and score the outputs.

    Args:
        model: the model; it is moved to `device` and left in the mode, training or evaluation, it was in.
        tokenizer: decodes the output.
        encoded_inputs: token ids of each input, end-of-sequence included.
        references: the accepted texts of each input.
        kind: the task's kind, which chooses the metric.
        max_new_tokens: longest output.
        batch_tokens: input tokens of a batch, padding included.
        device: where to run.
        progress: what the progress bar calls this evaluation; empty for none. Shown on a terminal only.

    Raises:
        InputError: what `score` and `batches_by_length` refuse, before anything is generated; logits that are not
            finite: an output from them would be scored as if the model had meant it.
    """
    check_examples(len(encoded_inputs), references)
    metric_of_kind(kind)
    batches = batches_by_length([len(ids) for ids in encoded_inputs], batch_tokens)
    device = torch.device(device)
    was_training = model.training
    model.to(device).eval()
    predictions, generated = [""] * len(encoded_inputs), 0
    started = time.perf_counter()
    try:
        with torch.inference_mode(), _progress_bar(shown=bool(progress)) as bar:
            prepared = InferenceT5(model)
            # Batches hold about equally many tokens, so counting them, not examples, gives an even estimate.
            for batch in bar.track(batches, description=progress):
                ids_BS, mask_BS = pad([encoded_inputs[i] for i in batch], model.config.pad_id)
                mask_BS = None if mask_BS is None else mask_BS.to(device)
                output_BT = generate(prepared, ids_BS.to(device), mask_BS, max_new_tokens=max_new_tokens)
                for index, output in zip(batch, output_BT.tolist(), strict=True):
                    ended = model.config.eos_id in output
                    length = output.index(model.config.eos_id) if ended else len(output)
                    predictions[index] = tokenizer.decode(output[:length])
                    generated += length + ended
    except FloatingPointError as error:
        raise InputError(
            f"decoding gave {error}, so its outputs mean nothing; where that is float16, "
            "evaluation.dtype=bfloat16 holds larger numbers, else the checkpoint is broken"
        ) from error
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - started
    return Evaluation(predictions, score(kind, predictions, references), generated / len(predictions), seconds)


def _progress_bar(*, shown: bool) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"))
    clocks = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, *clocks, console=console, transient=True, disable=not (shown and console.is_terminal))
