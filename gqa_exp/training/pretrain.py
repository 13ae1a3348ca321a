"""Pre-training of a multi-head base on a corpus, and uptraining, which is the same thing from a later step on."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import Logger

from gqa_exp.config import C4, CORPUS_PATHS, Config, CorpusConfig
from gqa_exp.data.corpus import (
    CorpusStream,
    corpus_files_hash,
    corpus_hash,
    corpus_tokens,
    corrupted_lengths,
    file_tokens,
    heldout_batches,
    heldout_tokens,
    unigram_loss,
)
from gqa_exp.data.stream import TextStream, stream_identity
from gqa_exp.data.tokenizer import Tokenizer, check_vocabulary
from gqa_exp.errors import InputError
from gqa_exp.host import first_process
from gqa_exp.model import T5, T5Config
from gqa_exp.training.initialize import start_reading
from gqa_exp.training.loop import Batch, Recipe, heldout_loss, step_seed, train
from gqa_exp.training.schedule import learning_rate
from gqa_exp.training.state import TrainingState

logger = logging.getLogger(__name__)

HELDOUT_WINDOWS = 16
"""Windows per source for the held-out loss: enough to compare, little enough to take seconds."""
HELDOUT_EVERY = 500
"""Steps between two looks at the held-out loss."""
HOUR = 3600.0


def read_corpus(config: CorpusConfig, tokenizer: Tokenizer, cache: Path) -> Any:
    """The training tokens of a corpus: the embedded text, or the user's files; None for one that is streamed.

    Raises:
        InputError: a file is missing, empty or not UTF-8.
    """
    if config.name == C4:
        return None
    if config.files:
        return file_tokens(config.files, tokenizer, cache)
    return corpus_tokens("train", tokenizer, cache)


def corpus_identity(config: CorpusConfig, tokenizer: Tokenizer) -> str:
    """Hash of the text and tokenizer a corpus consists of; its lengths and noise are keyed by the configuration."""
    if config.name == C4:
        return stream_identity(config, tokenizer)
    return corpus_files_hash(config.files, tokenizer) if config.files else corpus_hash(tokenizer)


def flat_steps(steps: int, flat_fraction: float) -> int:
    """Steps for which the rate stays at its peak, at least one."""
    return max(1, round(flat_fraction * steps))


def pretraining_recipe(
    config: Config,
    stage: str,
    seed: int,
    tokens: Any,
    tokenizer: Tokenizer,
    stop: int,
    positions: Mapping[str, Any] | None = None,
) -> Recipe:
    """What pre-training does at each absolute step; uptraining continues it with a later `stop`.

    Args:
        config: corpus and pretrain are used.
        stage: "pretrain" or "uptrain".
        seed: of the order of the text and its noise.
        tokens: from `read_corpus`.
        tokenizer: the model's.
        stop: step at which the stage ends.
        positions: where a streamed corpus goes on, from the record of the state to go on with.
    """
    pretrain = config.pretrain
    flat = flat_steps(pretrain.steps, pretrain.flat_fraction)
    text: dict[str, Any]
    if tokens is None:
        streamed = TextStream(config.corpus, tokenizer, seed, pretrain.batch_size, positions)
        text = {"batch": streamed.batch, "batch_of_rank": streamed.batch, "positions": streamed.positions}
    else:
        stream = CorpusStream(tokens, config.corpus, tokenizer, seed)
        text = {"batch": lambda step: stream.batch(step, pretrain.batch_size)}
    return Recipe(
        stage=stage,
        seed=seed,
        learning_rate=lambda step: learning_rate(step, peak=pretrain.peak_lr, flat_steps=flat),
        stop=stop,
        z_loss=pretrain.z_loss,
        **text,
    )


def heldout_sets(config: Config, tokenizer: Tokenizer, cache: Path) -> dict[str, list[Batch]]:
    """A few held-out batches of each text source of the embedded corpus, with fixed noise."""
    sets = {}
    for source, tokens in heldout_tokens(tokenizer, cache).items():
        batches = list(heldout_batches(tokens, config.corpus, tokenizer, HELDOUT_WINDOWS))[:1]
        if batches:
            sets[source] = batches
    return sets


def measure_heldout(model: T5, sets: dict[str, list[Batch]], config: Config) -> dict[str, float]:
    """Held-out loss (nats per target token) per source, and their mean over all tokens as "all"."""
    losses = {source: heldout_loss(model, batches, config.trainer) for source, batches in sets.items()}
    everything = [batch for batches in sets.values() for batch in batches]
    losses["all"] = heldout_loss(model, everything, config.trainer)
    return {source: round(loss, 4) for source, loss in losses.items()}


def exchange_inputs(sets: dict[str, list[Batch]]) -> dict[str, list[Batch]]:
    """The same batches, but each target with the input of its neighbour.

    A model that reads its input loses by this; one that has only learned what targets look like does not. Early bases
    do not read, and such a base cannot tell one conversion of its cross-attention from another. Neighbours often are of
    the same document, so it could lose more. A sample without neighbour is left out.
    """
    exchanged = {
        source: [
            {**batch, "input_ids": batch["input_ids"].roll(1, dims=0)} for batch in batches if len(batch["labels"]) > 1
        ]
        for source, batches in sets.items()
    }
    return {source: batches for source, batches in exchanged.items() if batches}


def gain_of_the_last_hour(curve: Sequence[Sequence[float]]) -> float | None:
    """By which share the last hour lowered the held-out loss.

    Args:
        curve: rows (step, held-out loss, the same with inputs exchanged, seconds of training so far), oldest first;
            rows without seconds, of older records, are left out. The seconds are the clock's: where the process was
            paused or shared its cores, an hour holds less training.

    Returns:
        1 - loss / loss an hour before, the latter interpolated between looks; None after less than an hour.
    """
    timed = [(row[3], row[1]) for row in curve if len(row) > 3]
    if not timed or timed[0][0] > timed[-1][0] - HOUR:
        return None
    seconds, losses = zip(*timed, strict=True)
    return float(1 - losses[-1] / np.interp(seconds[-1] - HOUR, seconds, losses))


def unigram_baseline(config: Config, tokens: Any, sets: dict[str, list[Batch]], tokenizer: Tokenizer) -> float:
    """Held-out loss of a model that knows only how frequent each target token is."""
    stream = CorpusStream(tokens, config.corpus, tokenizer, seed=0)
    train_labels = torch.cat([stream.batch(step, 64)["labels"] for step in range(50)])
    heldout_labels = torch.cat([batch["labels"].flatten() for batches in sets.values() for batch in batches])
    return unigram_loss(train_labels.numpy(), heldout_labels.numpy(), tokenizer.vocab_size)


def starting_state(config: Config, tokenizer: Tokenizer, resume: Path) -> TrainingState:
    """Where pre-training starts: freshly drawn, or where an interrupted run of the same recipe stopped.

    Args:
        config: model, corpus, pretrain, trainer and seed are used.
        tokenizer: the corpus's.
        resume: folder of the state to resume from, if there is one.

    Raises:
        InputError: the tokenizer does not fit the model, a text file cannot be read, or the resumable state is of
            another geometry or recipe.
    """
    geometry = T5Config.from_model_config(config.model)
    check_vocabulary(tokenizer, geometry.vocab_size, "the embedded text's tokenizer")
    settings = {
        "text": corpus_identity(config.corpus, tokenizer),
        "pretrain": dict(vars(config.pretrain)),
        "corpus": dict(vars(config.corpus)),
        "seed": config.seed,
        "precision": config.trainer.precision,
    }
    if resume.exists():
        state = TrainingState.load(resume)
        if state.model.config != geometry:
            raise InputError(f"{resume}: an unfinished run of another geometry; remove it or choose another output")
        _check_same_run(settings, state.record.get("recipe", settings), resume)
        logger.info("resuming at step %d", state.step)
    else:
        torch.manual_seed(step_seed(config.seed, "initialize", 0))
        state = TrainingState(T5(geometry))
        if config.pretrain.init == "reading":
            start_reading(state.model)
    state.record["recipe"] = settings
    return state


def pretrain_base(
    config: Config,
    tokenizer: Tokenizer,
    work: Path,
    export: Path,
    trackers: Callable[[], AbstractContextManager[Sequence[Logger]]] = lambda: nullcontext(()),
) -> TrainingState:
    """Train a multi-head base from scratch, or go on where an interrupted run stopped, and export it.

    Args:
        config: model, corpus, pretrain, trainer and seed are used.
        tokenizer: the corpus's.
        work: folder for the state to resume from and the token cache.
        export: checkpoint folder to write: bfloat16 weights, optimizer slots, step and training record.
        trackers: opens the Lightning loggers to report to; called once there is something to train.

    Raises:
        InputError: what `starting_state` and `read_corpus` refuse.
    """
    resume = work / "state"
    state = starting_state(config, tokenizer, resume)
    tokens = read_corpus(config.corpus, tokenizer, work / "cache")
    sets = {} if config.corpus.files or tokens is None else heldout_sets(config, tokenizer, work / "cache")
    exchanged_sets = exchange_inputs(sets)

    loggers: Sequence[Logger] = ()

    def look_at_heldout(now: TrainingState) -> bool:
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled for a handful of batches
            loss = measure_heldout(now.model, sets, config)
            exchanged = measure_heldout(now.model, exchanged_sets, config)
        now.record.update(heldout_loss=loss, heldout_exchanged_loss=exchanged)
        curve = now.record.setdefault("heldout_curve", [])
        curve.append([now.step, loss["all"], exchanged["all"], round(now.record["seconds"], 3)])
        gain = now.record["heldout_gain"] = gain_of_the_last_hour(curve)
        values = {"heldout_loss": loss["all"], "heldout_exchanged_loss": exchanged["all"], "step": now.step}
        for tracker in loggers:
            tracker.log_metrics({f"pretrain/{name}": value for name, value in values.items()})
        logger.info(
            "held-out loss %.4f, with inputs exchanged %.4f%s", loss["all"], exchanged["all"],
            "" if gain is None else f"; the last hour changed it by {-100 * gain:+.1f} %",
        )  # fmt: skip
        return False

    positions = state.record.get("positions")
    recipe = pretraining_recipe(config, "pretrain", config.seed, tokens, tokenizer, config.pretrain.steps, positions)
    if sets:
        recipe = replace(recipe, evaluate_every=HELDOUT_EVERY, evaluate=look_at_heldout)
    if state.step < recipe.stop:
        with trackers() as loggers:
            state = train(state, recipe, config.trainer, label="pretrain", resume_folder=resume, trackers=loggers)
        if first_process():
            state.save(resume)
    if not first_process():  # the first one has the record
        return state
    record = state.record
    if sets:
        record["heldout_unigram_loss"] = round(unigram_baseline(config, tokens, sets, tokenizer), 4)
        logger.info("held-out loss of a unigram model %.4f", record["heldout_unigram_loss"])
    record["tokens_per_second"] = round(record["tokens"] / record["seconds"], 1)
    if tokens is not None:
        record["epochs"] = round(
            state.step * config.pretrain.batch_size * recipe_window(config) / len(np.asarray(tokens)), 3
        )
        record["corpus_tokens"] = len(tokens)
    shipped = replace(state, slots={name: slot.clone() for name, slot in state.slots.items()})
    shipped.save(export, torch.bfloat16)
    return state


def _check_same_run(ours: dict[str, Any], theirs: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with a run that was started otherwise; only its length may change, not its flat steps.

    What an older record does not hold cannot contradict.
    """

    def fields(settings: dict[str, Any]) -> dict[str, Any]:
        pretrain = dict(settings["pretrain"])
        pretrain["flat_steps"] = flat_steps(pretrain.pop("steps"), pretrain.pop("flat_fraction"))
        named = {f"pretrain.{name}": value for name, value in pretrain.items()}
        # "text" tells what the corpus is, wherever its files lie
        named |= {f"corpus.{name}": value for name, value in settings["corpus"].items() if name not in CORPUS_PATHS}
        return {**named, **{name: settings[name] for name in ("text", "seed") if name in settings}}

    before = fields(theirs)
    for name, value in fields(ours).items():
        if value != before.get(name, value):
            raise InputError(
                f"{folder}: a run with {name}={before[name]}, not {value}; remove it or choose another output"
            )


def recipe_window(config: Config) -> int:
    """Raw tokens that one window takes from the corpus."""
    return corrupted_lengths(config.corpus).window
