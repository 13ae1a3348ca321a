"""The schema of a result row: what one point of an experiment leaves behind, and all that analysis ever reads.

A results folder holds one `KEY.json` per point (flat: nested fields are joined with dots), beside it
`KEY.examples.parquet` with one row per evaluated example, and `times/KEY.json`, one per timing job with the raw times.
This module imports nothing of ours, so that `analysis` can read results without the training code.
"""

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

SCHEMA_VERSION = 1
Status = Literal["done", "diverged", "failed"]
Scalar = str | int | float | bool | None


@dataclass
class Result:
    """One point: its configuration, the keys of its stages, quality, time, cost, training record and environment.

    Dictionaries are open-ended families (metric names, stage names); in the flat row their entries appear as
    `family.entry`. Times are seconds, sizes bytes, scores percentages (0 to 100).
    """

    key: str
    """Identity of the point: a hash of everything that can change its output, timing apart."""
    status: Status
    # -- the point
    sweep: str
    """Name of the sweep that computed it, or "single"."""
    label: str
    """What a figure calls the variant: "MHA", "GQA-2", "MQA" (mixed head counts: "GQA-[8,4,2,1]")."""
    model: str
    task: str
    task_kind: str
    """"summarization", "translation" or "question answering"."""
    num_heads: int
    num_kv_heads: list[int]
    """KV heads of each decoder layer; a list, stored as JSON text in the flat row."""
    method: str
    proportion: float
    """Uptraining proportion: uptraining steps as a share of the base's steps (the paper's alpha)."""
    seed: int
    error: str | None = None
    """Why the point failed or diverged, with the step; None when done."""
    stages: dict[str, Scalar] = field(default_factory=dict)
    """Stage name to key: base, convert, uptrain, finetune, evaluate, time."""
    # -- quality (test split unless `split` says otherwise)
    split: str = "test"
    metric: str = ""
    """Name of the task's primary metric: rouge1, bleu or f1."""
    score: float | None = None
    score_low: float | None = None
    score_high: float | None = None
    """95 % bootstrap interval over the evaluated examples; conditional on the one base and this seed's training."""
    num_examples: int = 0
    metrics: dict[str, Scalar] = field(default_factory=dict)
    """Every metric of the task, among them the primary one."""
    baselines: dict[str, Scalar] = field(default_factory=dict)
    """Primary metric of the task's trivial baselines on the same examples."""
    finetune: dict[str, Scalar] = field(default_factory=dict)
    """The fine-tuning recipe: the fields of `gqa_exp.config.FinetuneConfig`, and the lengths examples were cut to.
    Empty in rows of before it was recorded."""
    settings: dict[str, Scalar] = field(default_factory=dict)
    """What else the stages were computed with, `STAGE.NAME`: data and tokenizer by their hashes, versions of the code,
    number formats, ...: all that a stage's key is made of, but what makes the point and what `finetune` holds. Empty in
    rows of before it was recorded."""
    mean_generated_tokens: float | None = None
    dev_score: float | None = None
    """Value of the selection criterion of the kept fine-tuning checkpoint on the dev split."""
    # -- time (of the architecture, on this hardware; see times/KEY.json for raw values)
    time: dict[str, Scalar] = field(default_factory=dict)
    """Joined by architecture and hardware: see `TIME_FIELDS`."""
    # -- cost
    parameters: int = 0
    weight_bytes: int = 0
    kv_cache_bytes_per_sample: int = 0
    """Analytic, at the timing's source and output lengths."""
    kv_cache_bytes_per_sample_allocated: int | None = None
    """As the timer found the caches allocated."""
    # -- training record
    training: dict[str, Scalar] = field(default_factory=dict)
    """Per stage: `uptrain_steps`, `uptrain_tokens`, `uptrain_loss`, `uptrain_seconds`, the same for finetune, ...
    Seconds are those of the process that finished the stage, or of all its training steps where these took longer: it
    may have been resumed, or begun where a shorter one of its chain ended."""
    # -- provenance
    config_hash: str = ""
    environment: dict[str, Scalar] = field(default_factory=dict)
    """CPU/GPU, threads, library versions, git commit and dirty flag, host load; of the evaluation, once there is one,
    and as `STAGE_NAME` what of code and machine differed when an earlier stage was computed."""
    started: str = ""
    ended: str = ""
    """ISO 8601, UTC."""
    schema_version: int = SCHEMA_VERSION

    def row(self) -> dict[str, Scalar]:
        """The flat record: dictionaries opened with dotted names, lists as JSON text."""
        flat: dict[str, Scalar] = {}
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, dict):
                flat.update({f"{spec.name}.{name}": entry for name, entry in value.items()})
            elif isinstance(value, list):
                flat[spec.name] = json.dumps(value)
            else:
                flat[spec.name] = value
        return flat

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Result":
        """Inverse of `row`.

        Raises:
            ValueError: the row was written by another schema version.
        """
        if row.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"result row of schema version {row.get('schema_version')}, this code reads {SCHEMA_VERSION}"
            )
        values: dict[str, Any] = {}
        families: dict[str, Any] = {}
        for name, value in row.items():
            family, dot, entry = name.partition(".")
            if dot:
                families.setdefault(family, {})[entry] = value
            else:
                values[name] = value
        values["num_kv_heads"] = json.loads(values["num_kv_heads"])
        return cls(**values, **families)


TIME_FIELDS = {
    "per_sample": "median seconds per sample, end to end (encode, cross cache, all tokens), divided by the batch",
    "per_sample_low": "95 % bootstrap interval of the median, low end",
    "per_sample_high": "95 % bootstrap interval of the median, high end",
    "per_sample_p90": "90th percentile over rounds",
    "per_sample_p99": "99th percentile over rounds",
    "speedup": "time of MHA / time of this architecture, median of the per-round ratios",
    "speedup_low": "95 % bootstrap interval of that median, low end",
    "speedup_high": "95 % bootstrap interval of that median, high end",
    "noise_floor": "relative: the A/A run's largest deviation of the ratio from 1; a smaller difference is none",
    "encode": "median seconds per batch",
    "cross_cache": "median seconds per batch to build the cross-attention keys and values",
    "first_token": "median seconds per batch of the first decode step",
    "decode_step": "median seconds per batch of one further decode step",
    "decode_step_speedup": "MHA decode step / this one's, median of per-round ratios",
    "decode_step_bytes": "bytes one decode step must read, at the mean cache fill",
    "decode_bandwidth": "decode_step_bytes / decode_step, bytes per second",
    "memory_bandwidth": "plain read of memory in the same process, right after the decode steps, bytes per second",
    "bandwidth_share": "decode_bandwidth / memory_bandwidth, median of the per-round ratios",
    "predicted_per_sample": "the cost model's lower bound on this host, seconds per sample end to end",
    "predicted_decode_step": "the same for one decode step of a batch at the mean cache fill",
    "natural_length_per_sample": "seconds per sample up to end-of-sequence, on task inputs; of the timed checkpoint",
    "batch_size": "samples decoded together",
    "source_length": "input tokens",
    "output_length": "generated tokens, end-of-sequence off",
    "dtype": "number format of weights, caches and arithmetic",
    "rounds": "interleaved rounds that were counted",
    "device": "device the times were taken on",
    "hardware": "its model, and of a CPU the number of threads; stages may have been computed on another",
    "threads": "CPU threads of the process that was timed",
    "compiled": "whether decode steps were compiled",
    "cross_kv": "cached: cross-attention's keys and values are computed once; recomputed: at each decode step",
    "composed": "the shortcuts by which a time was composed of timed parts (depths, steps, encoder batch), or null",
    "fit_error": "farthest relative distance of a timed depth from the line that extends it, median of rounds, or null",
    "warning": "why the times deserve caution (noise floor above 20 %, clock trouble), or null",
}
"""The entries of `Result.time`, as `time.NAME` in the flat row."""


def write_atomically(path: Path, text: str) -> None:
    """Write aside and rename, so that a reader or an interruption never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def write_result(folder: Path, result: Result) -> Path:
    """Write one row as `folder/KEY.json`; returns its path."""
    path = folder / f"{result.key}.json"
    write_atomically(path, json.dumps(result.row(), indent=1, allow_nan=True) + "\n")
    return path


def baseline_column(baseline: str, column: str) -> str:
    """Where a baseline's `prediction`, per-example metric or `bleu_stats` stands in a frame of examples."""
    return f"baseline.{baseline}.{column}"


def write_examples(folder: Path, key: str, examples: pd.DataFrame) -> Path:
    """Write the per-example outputs of a point beside its row.

    Args:
        folder: the results folder.
        key: the point's key.
        examples: columns `id`, `prediction`, `references` (list of str), one column per metric that has per-example
            scores, and for BLEU `bleu_stats`: sacrebleu's sufficient statistics (list of int), for paired tests. The
            same columns of each trivial baseline, but `id` and `references`, stand under `baseline_column`.
    """
    path = folder / f"{key}.examples.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{key}.examples.{os.getpid()}.parquet"
    examples.to_parquet(aside, index=False)
    os.replace(aside, path)
    return path


def read_results(folder: Path) -> list[Result]:
    """All rows of a results folder, sorted by task, label, proportion and seed.

    Raises:
        ValueError: a row is not readable; names the file.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            results.append(Result.from_row(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: not a result row ({error})") from error
    return sorted(results, key=lambda r: (r.task, -max(r.num_kv_heads), r.method, r.proportion, r.seed))


def read_frame(folder: Path) -> pd.DataFrame:
    """The rows of `read_results` as a pandas frame, one column per flat field."""
    return pd.DataFrame([result.row() for result in read_results(folder)])


def read_examples(folder: Path, key: str) -> pd.DataFrame:
    """The per-example outputs of a point, as `write_examples` wrote them."""
    return pd.read_parquet(folder / f"{key}.examples.parquet")
