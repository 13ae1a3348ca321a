"""One point in, one result row out."""

import dataclasses
import json
import logging
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from gqa_exp.config import Config
from gqa_exp.errors import InputError, one_line
from gqa_exp.host import first_process
from gqa_exp.model import T5Config
from gqa_exp.pipeline.plan import Plan
from gqa_exp.pipeline.stages import EXAMPLES, SCORES, Pipeline
from gqa_exp.pipeline.store import Store, key_of
from gqa_exp.pipeline.tracking import tracking
from gqa_exp.results import Result, Scalar, write_examples, write_result
from gqa_exp.timing.cost import BYTES_PER_ELEMENT
from gqa_exp.timing.environment import environment
from gqa_exp.training.loop import Diverged

logger = logging.getLogger(__name__)

ELSEWHERE = (
    *("base", "num_kv_heads", "method", "seed", "step"),
    *("convert", "parent", "finetune"),
    *("max_input_tokens", "max_target_tokens"),
)
"""Facts of stages that are no settings: what makes the point, keys of other stages, what a row's `finetune` holds."""
CODE_AND_MACHINE = ("git_commit", "git_dirty", "cpu", "gpu", "threads", "version_torch")
"""What is told of each stage's environment where it was another than the evaluation's."""


def results_folder(config: Config) -> Path:
    """Where the rows of a sweep are."""
    return Path(config.output) / "results" / config.sweep


def store_of(config: Config) -> Store:
    """The store that all sweeps of an output folder share."""
    return Store(Path(config.output) / "store")


def new_result(pipeline: Pipeline) -> Result:
    """The row of a point before anything is computed: configuration, keys, sizes, environment."""
    config, timing = pipeline.config, pipeline.config.timing
    geometry = T5Config.from_model_config(config.model, pipeline.kv_heads)
    element = BYTES_PER_ELEMENT[timing.dtype]
    stages: dict[str, Scalar] = {"base": pipeline.base_key}
    stages.update({stage.name: stage.key for stage in pipeline.stages()})
    evaluate = pipeline.evaluate_stage.key
    return Result(
        key=key_of({"evaluate": evaluate, "sweep": config.sweep}),
        status="failed",
        sweep=config.sweep,
        label=pipeline.label,
        model=config.model.name,
        task=config.task.name,
        task_kind=config.task.kind,
        num_heads=config.model.num_heads,
        num_kv_heads=list(pipeline.kv_heads),
        method=config.method,
        proportion=config.proportion,
        seed=config.seed,
        stages=stages,
        split=config.evaluation.split,
        metric=config.task.metric,
        finetune={
            **vars(config.finetune),
            "max_input_tokens": config.task.max_input_tokens,
            "max_target_tokens": config.task.max_target_tokens,
        },
        settings={name: value for stage in pipeline.stages() for name, value in _settings(stage.name, stage.facts)},
        parameters=geometry.num_parameters(),
        weight_bytes=geometry.num_parameters() * element,
        kv_cache_bytes_per_sample=geometry.kv_cache_bytes(timing.source_length, timing.output_length, element),
        config_hash=key_of(dataclasses.asdict(config)),
        environment=environment(),
        started=_now(),
    )


def _settings(name: str, value: Any) -> Iterator[tuple[str, Scalar]]:
    """Facts of a stage as `STAGE.NAME`, dictionaries opened; without what is None or stands elsewhere in a row."""
    if isinstance(value, dict):
        for entry, inner in value.items():
            if entry not in ELSEWHERE:
                yield from _settings(f"{name}.{entry}", inner)
    elif value is not None:
        yield name, json.dumps(value) if isinstance(value, list | tuple) else value


def run_point(config: Config, plan: Plan) -> Result:
    """Compute a point's stages, as far as the store lacks them, and write its result row.

    A diverged stage is an outcome: the row says so and no exception is raised. Any other failure leaves a row of
    status "failed" and is raised again.

    Raises:
        InputError: bad input; nothing is written.
    """
    pipeline = Pipeline(config, store_of(config))
    result = new_result(pipeline)
    path = results_folder(config) / f"{result.key}.json"
    if path.exists() and all(pipeline.store.holds(stage) for stage in pipeline.stages()):
        known = Result.from_row(json.loads(path.read_text(encoding="utf-8")))
        if known.status != "failed":
            logger.info("%s %g %s: in the store", known.label, known.proportion, known.task)
            return known
    pipeline.check_data()
    proportion = f"{config.proportion:g}"
    name = f"{result.label} {proportion} {config.task.name} seed {config.seed}"
    tags = [result.label, f"proportion={proportion}", config.task.name]
    with tracking(config, name, config.sweep, config.task.name, tags, result.key) as tracker:
        pipeline.trackers = tracker.loggers
        try:
            for stage in pipeline.stages():
                with plan.stage(stage):
                    pipeline.obtain(stage)
            if not first_process():
                return result
            _add_outcome(result, pipeline)
            result.status, result.ended = "done", _now()
        except Diverged as diverged:
            result.status, result.error = "diverged", str(diverged)
            logger.warning("%s %g %s: %s", result.label, result.proportion, result.task, diverged)
        except InputError:
            raise
        except Exception as error:
            result.error = one_line("".join(traceback.format_exception_only(error)))
            raise
        finally:
            if first_process() and (result.ended or result.error is not None):
                result.ended = result.ended or _now()
                write_result(results_folder(config), result)
                tracker.finish(result)
    return result


def _add_outcome(result: Result, pipeline: Pipeline) -> None:
    """Fill in quality and training record from the stages' folders."""
    store = pipeline.store
    folder = store.folder(pipeline.evaluate_stage)
    result.environment = dict(store.record(pipeline.evaluate_stage)["environment"])
    scores: dict[str, Any] = json.loads((folder / SCORES).read_text(encoding="utf-8"))
    result.metrics, result.baselines = scores["metrics"], scores["baselines"]
    result.score = scores["metrics"][result.metric]
    result.score_low, result.score_high = scores["score_low"], scores["score_high"]
    result.num_examples = scores["num_examples"]
    result.mean_generated_tokens = scores["mean_generated_tokens"]
    write_examples(results_folder(pipeline.config), result.key, pd.read_parquet(folder / EXAMPLES))
    for stage in pipeline.stages():
        record = store.record(stage)
        result.training[f"{stage.name}_seconds"] = max(record["seconds"], record["outcome"].get("seconds", 0.0))
        for name in CODE_AND_MACHINE:
            if (value := record["environment"].get(name)) != result.environment.get(name):
                result.environment[f"{stage.name}_{name}"] = value
        for name in ("steps", "tokens", "loss", "best_step", "truncated_inputs", "truncated_targets"):
            if name in record["outcome"]:
                result.training[f"{stage.name}_{name}"] = record["outcome"][name]
        result.dev_score = record["outcome"].get("best_score", result.dev_score)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
