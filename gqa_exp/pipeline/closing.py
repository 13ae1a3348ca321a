"""What closes a run: one timing job over all its architectures, joined to the rows, and the report.

Decode time depends on architecture, lengths and hardware, not on what the weights learned. So a sweep is timed once, at
its end: all architectures interleaved in one process, alone on the host, on real checkpoints of the sweep.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gqa_exp.config import Config
from gqa_exp.evaluation.evaluate import pad
from gqa_exp.model.checkpoint import load, load_any
from gqa_exp.pipeline.plan import Plan
from gqa_exp.pipeline.point import new_result, results_folder, store_of
from gqa_exp.pipeline.stages import Pipeline
from gqa_exp.pipeline.store import Stage, key_of
from gqa_exp.results import Result, write_atomically, write_result
from gqa_exp.timing.environment import hardware_id
from gqa_exp.timing.timer import time_variants
from gqa_exp.training.finetune import read_split

logger = logging.getLogger(__name__)

TIME_VERSION = 6
REFERENCE = "MHA"


def close(configs: Sequence[Config], plan: Plan) -> None:
    """Time the architectures of the given points, model by model, and write the times into their rows.

    Args:
        configs: the points of a sweep, or a single one; all with the same timing and output.
        plan: told when the timing is done.
    """
    first = configs[0]
    if not first.timing.enabled:
        return
    rows = {path.stem: _read(path) for path in results_folder(first).glob("*.json")}
    by_model: dict[str, list[Timed]] = {}
    for config in configs:
        pipeline = Pipeline(config, store_of(config))
        fresh = new_result(pipeline)
        if fresh.key in rows and rows[fresh.key].status == "done":
            timed = Timed(pipeline, rows[fresh.key], fresh)
            by_model.setdefault(key_of(_geometry(config)), []).append(timed)
    if not by_model:
        logger.warning("no finished point to time")
        return
    with plan.stage(Stage("time", "", {})):
        for points in by_model.values():
            _join(points)


class Timed(NamedTuple):
    """A point that is to have a time."""

    pipeline: Pipeline
    row: Result
    fresh: Result
    """What the row says before anything is computed, by the configuration of now."""


def _join(points: Sequence[Timed]) -> None:
    """Time the architectures of one model and write the times into the rows."""
    # The first point of each architecture lends its checkpoint; where rows are from elsewhere, one that has it.
    owners: dict[str, Pipeline] = {}
    for pipeline, *_ in sorted(points, key=lambda p: not p.pipeline.store.holds(p.pipeline.finetune_stage)):
        owners.setdefault(pipeline.label, pipeline)
    record = _timing_record(points[0].pipeline.config, owners)
    if record is None:
        return
    for pipeline, row, fresh in points:
        if row.stages.get("time") == record["key"]:
            continue
        variant = record["variants"][pipeline.label]
        row.time = dict(variant["fields"])
        if record["checkpoints"].get(pipeline.label) != pipeline.finetune_stage.key:
            row.time["natural_length_per_sample"] = None  # measured on the outputs of another checkpoint
        row.kv_cache_bytes_per_sample_allocated = variant["allocated_cache_bytes_per_sample"]
        # What depends on lengths and number format of the timing, which may be others than when the row was written.
        row.kv_cache_bytes_per_sample, row.weight_bytes = fresh.kv_cache_bytes_per_sample, fresh.weight_bytes
        row.config_hash = fresh.config_hash
        row.stages["time"] = record["key"]
        write_result(results_folder(pipeline.config), row)


def _geometry(config: Config) -> dict[str, Any]:
    """What times depend on of a model: not on which checkpoint."""
    return {name: value for name, value in vars(config.model).items() if name not in ("base", "steps")}


def _timing_record(config: Config, owners: dict[str, Pipeline]) -> dict[str, Any] | None:
    """The timing job's file, measured unless there is one of the same architectures, settings and hardware.

    None where there is none, and the store lacks the checkpoint of one of them.
    """
    facts = {
        "version": TIME_VERSION,
        "hardware": hardware_id(config.timing.device),
        "timing": vars(config.timing),
        "model": _geometry(config),
        "architectures": {label: owner.kv_heads for label, owner in owners.items()},
    }
    path = results_folder(config) / "times" / f"{key_of(facts)}.json"
    if path.exists():
        logger.info("times of these architectures on this hardware: in the store")
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record
    missing = [label for label, owner in owners.items() if not owner.store.holds(owner.finetune_stage)]
    if missing:
        logger.warning("not timed, since the store has no checkpoint of %s", ", ".join(missing))
        return None
    models = {label: load(owner.store.folder(owner.finetune_stage)) for label, owner in owners.items()}
    if REFERENCE not in models:  # a single point: MHA is the base itself
        models[REFERENCE] = load_any(next(iter(owners.values())).base)
    logger.info("timing %s, interleaved", ", ".join(models))
    natural = {label: _natural_inputs(owner) for label, owner in owners.items()}
    report = time_variants(models, config.timing, reference=REFERENCE, natural=natural, progress=logger.info)
    record = {
        "key": path.stem,
        "facts": facts,
        "checkpoints": {label: owner.finetune_stage.key for label, owner in owners.items()},
        "variants": {
            label: {
                "fields": report.fields(label),
                "allocated_cache_bytes_per_sample": report.allocated_cache_bytes_per_sample(label),
                "verdict": report.verdict(label),
            }
            for label in models
        },
        "report": report.to_dict(),
    }
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    return record


def _natural_inputs(owner: Pipeline) -> tuple[Any, Any]:
    """A batch of the point's own test inputs."""
    config = owner.config
    split = read_split(config, config.evaluation.split, owner.tokenizer, config.timing.batch_size)
    return pad(split.encoded.input_ids, owner.tokenizer.pad_id)


def _read(path: Path) -> Result:
    return Result.from_row(json.loads(path.read_text(encoding="utf-8")))
