"""Fine-tuning on a task: constant learning rate, best checkpoint on dev (paper, section 3.1)."""

import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from filelock import FileLock
from lightning.pytorch.loggers import Logger

from gqa_exp.config import Config
from gqa_exp.data.batching import EncodedTask, FinetuneBatches, encode_task
from gqa_exp.data.tasks import TASKS, load_task
from gqa_exp.data.tokenizer import Tokenizer
from gqa_exp.evaluation import Evaluation, evaluate_model
from gqa_exp.host import device_of, first_process
from gqa_exp.model import T5
from gqa_exp.training.loop import Recipe, train
from gqa_exp.training.state import TrainingState

logger = logging.getLogger(__name__)

LENGTH_MULTIPLE = 16
"""Padded lengths are rounded up to this: 8 pads less but gives twice the shapes, which compiling would pay for."""


@dataclass(frozen=True)
class EncodedSplit:
    """A split of a task: its examples, as text and as ids."""

    dataset: datasets.Dataset
    encoded: EncodedTask

    @property
    def references(self) -> list[list[str]]:
        """The accepted outputs of each example."""
        return [list(texts) for texts in self.dataset["references"]]


def read_split(config: Config, split: str, tokenizer: Tokenizer, limit: int | None = None) -> EncodedSplit:
    """Load and encode the first `limit` examples of a split (its order is shuffled and fixed)."""
    # One process at a time, so that those which start together find what the first one cached.
    with FileLock(Path(tempfile.gettempdir()) / f"gqa_exp.{os.getuid()}.cache.lock"):
        return _read_split(config, split, tokenizer, limit)


def _read_split(config: Config, split: str, tokenizer: Tokenizer, limit: int | None) -> EncodedSplit:
    dataset = load_task(config.task, split)  # type: ignore[arg-type]  # one of the split names, checked
    if limit is not None and limit < len(dataset):
        dataset = dataset.select(range(limit))
    task = config.task
    sentinels = task.name in TASKS  # those that ask as pre-training does; in other text nothing is one
    return EncodedSplit(
        dataset, encode_task(dataset, tokenizer, task.max_input_tokens, task.max_target_tokens, sentinels)
    )


def generation_model(model: T5, config: Config) -> T5:
    """A copy of the model in the number format that is evaluated, on the device that trains; weight by weight."""
    device, dtype = device_of(config.trainer.accelerator), getattr(torch, config.evaluation.dtype)
    with torch.device("meta"):
        copied = T5(model.config)
    weights = {name: w.detach().to(device, dtype, copy=True) for name, w in model.state_dict().items()}
    copied.load_state_dict(weights, assign=True)
    return copied.eval()


def evaluate_split(
    model: T5, config: Config, split: EncodedSplit, tokenizer: Tokenizer, progress: str = ""
) -> Evaluation:
    """Greedy outputs of a model for a split, and their scores."""
    return evaluate_model(
        model,
        tokenizer,
        split.encoded.input_ids,
        split.references,
        kind=config.task.kind,
        max_new_tokens=config.task.max_target_tokens,
        batch_tokens=max(config.evaluation.batch_tokens, config.task.max_input_tokens),
        device=model.device,
        progress=progress,
    )


def finetune(
    state: TrainingState,
    config: Config,
    tokenizer: Tokenizer,
    *,
    label: str,
    resume_folder: Path,
    trackers: Sequence[Logger] = (),
) -> TrainingState:
    """Fine-tune on `config.task`, evaluating on dev, and return the checkpoint that was best there.

    Args:
        state: the checkpoint to start from, step 0 and no optimizer slots; trained in place.
        config: task, finetune, evaluation, trainer and seed are used.
        tokenizer: the model's.
        label: what progress lines call the run.
        resume_folder: keeps the state to resume from, and beside it the best checkpoint so far.
        trackers: Lightning loggers.

    Returns:
        The best checkpoint: its `record` holds best_score, best_step, tokens, seconds, loss and the curves. On ranks
        other than the first: the last one.
    """
    settings = config.finetune
    best_folder = resume_folder.with_name(f"{resume_folder.name}-best")
    if resume_folder.exists():
        state = TrainingState.load(resume_folder)
        logger.info("%s: resuming at step %d", label, state.step)
    train_split = read_split(config, "train", tokenizer)
    dev = read_split(config, "dev", tokenizer, settings.dev_examples)
    batches = FinetuneBatches(
        train_split.encoded.input_ids,
        train_split.encoded.target_ids,
        settings.batch_tokens,
        config.seed,
        LENGTH_MULTIPLE,
        train_split.encoded.lengths,
        settings.batch_examples,
    )

    def look_at_dev(now: TrainingState) -> bool:
        record = now.record
        evaluation = evaluate_split(generation_model(now.model, config), config, dev, tokenizer)
        score = evaluation.scores.metrics[config.task.metric]
        record.setdefault("dev_curve", []).append([now.step, round(score, 4)])
        if score > record.get("best_score", float("-inf")):
            record.update(best_score=score, best_step=now.step, stale=0)
            TrainingState(now.model, {}, now.step, {"best_score": score}).save(best_folder)
        else:
            record["stale"] += 1
        logger.info("%s: step %d, dev %s %.2f", label, now.step, config.task.metric, score)
        for tracker in trackers:
            tracker.log_metrics({f"finetune/dev_{config.task.metric}": score, "finetune/step": now.step})
        return bool(record["stale"] >= settings.patience)

    recipe = Recipe(
        stage="finetune",
        seed=config.seed,
        batch=batches.batch,
        learning_rate=lambda step: settings.lr,
        stop=settings.steps,
        z_loss=settings.z_loss,
        dropout=settings.dropout,
        evaluate_every=settings.evaluate_every,
        evaluate=look_at_dev,
    )
    if settings.steps == 0 and first_process():
        look_at_dev(state)
    final = train(state, recipe, config.trainer, label=label, resume_folder=resume_folder, trackers=trackers)
    if not first_process():  # the first one has looked at dev, and kept the best
        return final
    best = TrainingState.load(best_folder)
    record = {
        **final.record,
        **best.record,  # its own score: a resumed run may have come by the same step twice, and scored it anew
        "best_step": best.step,
        "steps": final.step,
        "truncated_inputs": train_split.encoded.truncated_inputs,
        "truncated_targets": train_split.encoded.truncated_targets,
        "train_examples": len(train_split.encoded),
    }
    return TrainingState(best.model, {}, best.step, record)
