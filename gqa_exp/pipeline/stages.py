"""The stages of a point: base, convert, uptrain, finetune, evaluate; what keys each, and how it is computed.

Keys hash what can change a stage's output and nothing else: conversion ignores the method where no layer changes and
the seed unless it draws; uptraining is keyed by its chain and the absolute step it reaches, so that a proportion
reached through a smaller one is the same object as one reached directly. `*_VERSION` is raised by hand when a stage's
code changes its results.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch.loggers import Logger

from gqa_exp.config import CORPUS_PATHS, TASK_PATHS, Config, PretrainConfig, kv_heads_per_layer, variant_label
from gqa_exp.data.public import KNOWN
from gqa_exp.data.tasks import baseline_predictions, load_task, task_hash
from gqa_exp.data.tokenizer import FILES as TOKENIZER_FILES
from gqa_exp.data.tokenizer import Tokenizer, check_vocabulary, default_tokenizer
from gqa_exp.errors import InputError
from gqa_exp.evaluation import Scores, bootstrap_interval, score
from gqa_exp.host import first_process
from gqa_exp.model import T5, conversion_report
from gqa_exp.model.checkpoint import TRAINING, content_hash, hf_folder, is_hf, load, load_hf
from gqa_exp.pipeline.store import STAGE_FILE, Stage, Store, key_of
from gqa_exp.results import baseline_column
from gqa_exp.training.conversion import convert_state
from gqa_exp.training.finetune import evaluate_split, finetune, generation_model, read_split
from gqa_exp.training.loop import Diverged, train
from gqa_exp.training.pretrain import corpus_identity, pretraining_recipe, read_corpus
from gqa_exp.training.state import TrainingState

logger = logging.getLogger(__name__)

CONVERT_VERSION = UPTRAIN_VERSION = 1
FINETUNE_VERSION = 2
EVALUATE_VERSION = 5
SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints"
SCORES, EXAMPLES = "scores.json", "examples.parquet"
RECIPE_FIELDS = {
    "pretrain": tuple(spec.name for spec in dataclasses.fields(PretrainConfig)),
    "corpus": ("input_length", "target_length", "noise_density", "mean_span"),
}
"""What uptraining takes from the base's training record: it is the same training, continued."""


def base_folder(config: Config) -> Path:
    """The base checkpoint of a configured model: the given one, or the one shipped.

    Raises:
        InputError: none is shipped for this model; or it is a hub id, and the hub cannot be reached.
    """
    if config.model.base is not None:
        return hf_folder(config.model.base)
    folder = SHIPPED / config.model.name
    if not folder.is_dir():
        raise InputError(
            f"model {config.model.name} has no shipped base checkpoint; train one with gqa-pretrain and give its "
            "folder as model.base=FOLDER"
        )
    return folder


class Pipeline:
    """The stages of one point over a store.

    Args:
        config: the point, checked.
        store: where stages are kept.
        trackers: Lightning loggers that stages computed here report to.

    Raises:
        InputError: the base checkpoint is missing or has no training record, or `config.pretrain` contradicts it.
    """

    def __init__(self, config: Config, store: Store, trackers: Sequence[Logger] = ()) -> None:
        self.base = base_folder(config)
        self.config = config
        self.config = self._with_recipe_of_the_base(config)
        self.store = store
        self.trackers = trackers
        model = config.model
        self.kv_heads = kv_heads_per_layer(config.num_kv_heads, model.num_heads, model.num_decoder_layers)
        self.label = variant_label(self.kv_heads, model.num_heads)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the base: the one in its folder, else that of the embedded text.

        Raises:
            InputError: it has more ids than the model, or so few that it must belong to another.
        """
        own = any((self.base / name).is_file() for name in TOKENIZER_FILES)
        tokenizer = Tokenizer(self.base) if own else default_tokenizer()
        which = "its tokenizer" if own else f"no tokenizer ({' or '.join(TOKENIZER_FILES)}), and the embedded text's"
        check_vocabulary(tokenizer, self.config.model.vocab_size, f"{self.base}: {which}")
        return tokenizer

    # -- keys ----------------------------------------------------------------------------------------------------------

    @cached_property
    def base_key(self) -> str:
        """Content hash of the base checkpoint."""
        files = sorted(path for path in self.base.iterdir() if path.is_file())
        return _content_hash(self.base, tuple((path.name, path.stat().st_mtime_ns) for path in files))[:16]

    @cached_property
    def base_record(self) -> dict[str, Any]:
        """The base's training record: its step, and what `gqa-pretrain` wrote of its recipe."""
        if is_hf(self.base):
            steps = self.config.model.steps
            if steps is None and self.config.proportion:
                raise InputError(
                    f"{self.base}: a checkpoint of transformers does not say how many steps it was trained for, and "
                    "proportion is a share of them; give model.steps (T5.1.1: 1000000)"
                )
            return {"step": steps or 0}
        path = self.base / TRAINING
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            int(record["step"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: no training record with a step ({error}); uptraining needs it") from error
        return record

    @property
    def base_step(self) -> int:
        """Optimizer steps the base was trained for; proportions are shares of it."""
        return int(self.base_record["step"])

    def _with_recipe_of_the_base(self, config: Config) -> Config:
        """The configuration with the base's own recipe and corruption, as far as its training record holds them."""
        replaced = {}
        for group, fields in RECIPE_FIELDS.items():
            configured, default = getattr(config, group), getattr(Config(), group)
            recorded = self.base_record.get("recipe", {}).get(group, {})
            known = {name: recorded[name] for name in fields if name in recorded}
            for name, value in known.items():
                if getattr(configured, name) not in (value, getattr(default, name)):
                    raise InputError(
                        f"{group}.{name}={getattr(configured, name)}: uptraining continues the recipe of {self.base}, "
                        f"which was trained with {value}; leave it out, or pre-train another base with it"
                    )
            replaced[group] = dataclasses.replace(configured, **known)
        return dataclasses.replace(config, **replaced)

    @cached_property
    def convert_stage(self) -> Stage:
        """Conversion of the base."""
        config = self.config
        changed = any(kv_heads != config.model.num_heads for kv_heads in self.kv_heads)
        facts = {
            "version": CONVERT_VERSION,
            "base": self.base_key,
            "num_kv_heads": self.kv_heads,
            "method": config.method if changed else None,
            "seed": config.seed if changed and config.method == "random" else None,
            "optimizer_slots": config.convert.optimizer_slots if changed else None,
        }
        if is_hf(self.base):  # ours hold their step, so the content hash does
            facts["step"] = self.base_step
        return Stage("convert", key_of(facts), facts)

    @cached_property
    def uptrain_stop(self) -> int:
        """The absolute step that uptraining reaches."""
        return self.base_step + round(self.config.proportion * self.base_step)

    @cached_property
    def uptrain_stage(self) -> Stage | None:
        """Uptraining of the converted checkpoint; None where the proportion rounds to no step."""
        config = self.config
        if self.uptrain_stop == self.base_step:
            return None
        chain = {
            "version": UPTRAIN_VERSION,
            "convert": self.convert_stage.key,
            "seed": config.seed,
            "corpus": corpus_identity(config.corpus, self.tokenizer),
            "corruption": {name: value for name, value in vars(config.corpus).items() if name not in CORPUS_PATHS},
            "pretrain": vars(config.pretrain),
            "precision": config.trainer.precision,
            "spike": config.trainer.spike,
        }
        facts = {**chain, "step": self.uptrain_stop}
        return Stage("uptrain", f"{key_of(chain)}-{self.uptrain_stop:09d}", facts)

    @property
    def pretrained_stage(self) -> Stage:
        """What fine-tuning starts from."""
        return self.uptrain_stage or self.convert_stage

    @cached_property
    def finetune_stage(self) -> Stage:
        """Fine-tuning on the task."""
        config = self.config
        facts = {
            "version": FINETUNE_VERSION,
            "parent": self.pretrained_stage.key,
            "seed": config.seed,
            "data": task_hash(config.task),
            "tokenizer": self.tokenizer.content_hash,
            "task": {name: value for name, value in vars(config.task).items() if name not in TASK_PATHS},
            "finetune": vars(config.finetune),
            "dtype": config.evaluation.dtype,
            "precision": config.trainer.precision,
            "spike": config.trainer.spike,
        }
        return Stage("finetune", key_of(facts), facts)

    @cached_property
    def evaluate_stage(self) -> Stage:
        """Evaluation of the fine-tuned checkpoint."""
        evaluation = {name: value for name, value in vars(self.config.evaluation).items() if name != "batch_tokens"}
        facts = {"version": EVALUATE_VERSION, "finetune": self.finetune_stage.key, "evaluation": evaluation}
        return Stage("evaluate", key_of(facts), facts)

    def stages(self) -> list[Stage]:
        """The stages that the point needs, in order; the base exists already."""
        chain = [self.convert_stage, self.uptrain_stage, self.finetune_stage, self.evaluate_stage]
        return [stage for stage in chain if stage is not None]

    def check_data(self) -> None:
        """Read the examples of a task on other than the embedded text before hours are spent on what they are for.

        Raises:
            InputError: a file is missing or cannot be read, a column is missing, or no row can be used.
        """
        task = self.config.task
        if task.name in KNOWN and not self.store.holds(self.evaluate_stage):
            for split in dict.fromkeys(("train", "dev", self.config.evaluation.split)):
                load_task(task, split)  # type: ignore[arg-type]  # one of the split names, checked

    # -- computation ---------------------------------------------------------------------------------------------------

    def obtain(self, stage: Stage) -> Path:
        """The folder of one of this point's stages, computed unless the store holds it; parents first.

        Raises:
            Diverged: this stage or a parent diverged.
        """
        compute = {
            "convert": self._convert,
            "uptrain": self._uptrain,
            "finetune": self._finetune,
            "evaluate": self._evaluate,
        }[stage.name]
        return self.store.obtain(stage, compute, together=stage.name in ("uptrain", "finetune"))

    def _convert(self, folder: Path) -> dict[str, Any]:
        step = self.base_step
        base = TrainingState(load_hf(self.base), step=step) if is_hf(self.base) else TrainingState.load(self.base)
        self._check_geometry(base.model)
        config = self.config
        state = convert_state(base, self.kv_heads, config.method, config.seed, config.convert.optimizer_slots)
        # A streamed corpus goes on where the base stopped; the rest is the base's own story.
        state.record = {name: value for name, value in state.record.items() if name == "positions"}
        state.save(folder)
        report = [dataclasses.asdict(site) for site in conversion_report(base.model, state.model)]
        return {"report": report, "source": str(self.base)}

    def _check_geometry(self, base: T5) -> None:
        found, wanted = dataclasses.asdict(base.config), vars(self.config.model)
        for name in (
            "d_model",
            "d_ff",
            "num_heads",
            "head_dim",
            "num_encoder_layers",
            "num_decoder_layers",
            "vocab_size",
            "feed_forward",
            "tied_embeddings",
        ):
            if found[name] != wanted[name]:
                raise InputError(
                    f"{self.base}: the checkpoint has {name}={found[name]}, but model.{name}={wanted[name]}; "
                    "choose the model that the checkpoint belongs to"
                )

    def _uptrain(self, folder: Path) -> dict[str, Any]:
        stage = self.uptrain_stage
        assert stage is not None
        converted = self.obtain(self.convert_stage)
        chain = stage.key.rpartition("-")[0]

        def longest() -> str:
            found = (self.store.root / "uptrain").glob(f"{chain}-*")
            return str(max((p for p in found if _step_of(p) < self.uptrain_stop), key=_step_of, default=converted))

        shorter = Path(self.store.agree(stage, longest))
        if shorter != converted:
            outcome = json.loads((shorter / STAGE_FILE).read_text(encoding="utf-8"))["outcome"]
            if "diverged_at_step" in outcome:  # as every longer one of the chain has
                raise Diverged("uptrain", outcome["diverged_at_step"])
        partial = self.store.partial(stage)
        starts = [TrainingState.load(path) for path in (shorter, partial) if path.exists()]
        state = max(starts, key=lambda candidate: candidate.step)
        tokens = read_corpus(self.config.corpus, self.tokenizer, self.store.root / "cache")
        positions = state.record.get("positions")
        recipe = pretraining_recipe(
            self.config, "uptrain", self.config.seed, tokens, self.tokenizer, self.uptrain_stop, positions
        )
        label = f"uptrain {self.label} {self.config.proportion:g}"
        state = train(state, recipe, self.config.trainer, label=label, resume_folder=partial, trackers=self.trackers)
        if first_process():
            state.save(folder)
        return {"steps": state.step - self.base_step, **state.record}

    def _finetune(self, folder: Path) -> dict[str, Any]:
        start = TrainingState(load(self.obtain(self.pretrained_stage)))
        config = self.config
        best = finetune(
            start,
            config,
            self.tokenizer,
            label=f"finetune {self.label} {config.proportion:g} {config.task.name}",
            resume_folder=self.store.partial(self.finetune_stage),
            trackers=self.trackers,
        )
        if first_process():
            best.save(folder)
        return best.record

    def _evaluate(self, folder: Path) -> dict[str, Any]:
        config, metric = self.config, self.config.task.metric
        model = generation_model(load(self.obtain(self.finetune_stage)), config)
        split = read_split(config, config.evaluation.split, self.tokenizer, config.evaluation.max_examples)
        label = f"evaluate {self.label} {config.proportion:g} {config.task.name}"
        evaluation = evaluate_split(model, config, split, self.tokenizer, progress=label)
        scores = evaluation.scores
        low, high = bootstrap_interval(scores, metric)
        columns = {"id": list(split.dataset["id"]), "references": split.references}
        columns |= example_columns(evaluation.predictions, scores)
        baselines = {}
        for name, predictions in baseline_predictions(config.task, split.dataset).items():
            trivial = score(config.task.kind, predictions, split.references)
            baselines[name] = trivial.metrics[metric]
            for column, values in example_columns(predictions, trivial).items():
                columns[baseline_column(name, column)] = values
        pd.DataFrame(columns).to_parquet(folder / EXAMPLES, index=False)
        result = {
            "metrics": scores.metrics,
            "score_low": low,
            "score_high": high,
            "num_examples": scores.num_examples,
            "mean_generated_tokens": evaluation.mean_generated_tokens,
            "baselines": baselines,
        }
        (folder / SCORES).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        logger.info("%s: %s %.2f (%.2f to %.2f)", label, metric, scores.metrics[metric], low, high)
        return {"seconds_generating": evaluation.seconds, "truncated_inputs": split.encoded.truncated_inputs}


def example_columns(predictions: Sequence[str], scores: Scores) -> dict[str, Any]:
    """What is kept of each example: the text, and what its score is made of."""
    statistics = {} if scores.bleu_stats is None else {"bleu_stats": scores.bleu_stats}
    return {"prediction": list(predictions), **scores.per_example, **statistics}


@lru_cache
def _content_hash(folder: Path, stamps: tuple[tuple[str, int], ...]) -> str:
    """Read once per process and state of the folder: a sweep has many points of one base, which may be large."""
    return content_hash(folder)


def _step_of(path: Path) -> int:
    match = re.fullmatch(r"[0-9a-f]+-(\d+)", path.name)
    return int(match.group(1)) if match else -1
