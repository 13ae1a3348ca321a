"""Intervals for scores that are compared on the same test examples, so that a difference is never read off two means.

Every metric here is a function of the *sum* of per-example statistics: a mean is (sum of values) / (sum of ones), and
corpus BLEU is computed from sacrebleu's summed n-gram counts. A bootstrap resample is a row of example weights, one
matrix product gives the summed statistics of all resamples, and compared points share the rows: that pairs them.

All intervals are conditional on the one base checkpoint: no resampling of ours can show what another base would give.
"""

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from sacrebleu.metrics.bleu import BLEU, MAX_NGRAM_ORDER

from gqa_exp.results import baseline_column

FloatArray = npt.NDArray[np.float64]
Number = TypeVar("Number", float, FloatArray)

RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 0
BLEU_STATISTICS = 2 + 2 * MAX_NGRAM_ORDER
"""sacrebleu's layout: system length, reference length, correct n-grams by order, total n-grams by order."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; the ends are None where nothing was there to compute them from."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Draws:
    """A statistic of the full sample, and of every resample: `draws` has shape (RESAMPLES,).

    Draws made from the same resamples may be subtracted: the result is a paired difference.
    """

    value: float
    draws: FloatArray

    def __sub__(self, other: "Draws") -> "Draws":
        return Draws(self.value - other.value, self.draws - other.draws)

    def estimate(self) -> Estimate:
        """The value with its percentile interval."""
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.percentile(self.draws, [tail, 100 - tail])
        return Estimate(self.value, float(low), float(high))


@dataclass(frozen=True, eq=False)
class ExampleScores:
    """What one evaluated run leaves for paired tests.

    `statistics` is a frame with one row of sufficient statistics per example, indexed by what identifies an example
    (str): its id, with a checksum of its references, since another file may have other examples under the same ids.
    """

    metric: str
    statistics: pd.DataFrame
    _resampled: dict[tuple[str, tuple[str, ...]], Draws] = field(default_factory=dict)

    def resampled(self, ids: tuple[str, ...], stream: str) -> Draws:
        """The metric over these examples and over each resample of them; kept, since a run is compared with several."""
        if (stream, ids) not in self._resampled:
            table = self.statistics.loc[list(ids)].to_numpy(dtype=np.float64)
            value = float(corpus_score(self.metric, table.sum(axis=0)))
            draws = corpus_score(self.metric, resample_weights(len(ids), stream) @ table)
            self._resampled[stream, ids] = Draws(value, draws)
        return self._resampled[stream, ids]

    @property
    def score(self) -> float:
        """The metric over all examples."""
        return float(corpus_score(self.metric, self.statistics.to_numpy(dtype=np.float64).sum(axis=0)))


def example_scores(examples: pd.DataFrame, metric: str, baseline: str = "") -> ExampleScores:
    """Sufficient statistics from a run's per-example outputs.

    Args:
        examples: as `gqa_exp.results.write_examples` describes them.
        metric: the task's primary metric: "bleu" reads `bleu_stats`, any other the column of its name.
        baseline: read this trivial baseline's instead of the model's.

    Raises:
        ValueError: a column is missing or malformed, a value is not finite, or an id occurs twice.
    """
    column = "bleu_stats" if metric == "bleu" else metric
    column = baseline_column(baseline, column) if baseline else column
    for needed in ("id", column):
        if needed not in examples:
            raise ValueError(f'column "{needed}" is missing')
    if len(examples) == 0:
        raise ValueError("no examples")
    ids = examples["id"].astype(str)
    if ids.duplicated().any():
        raise ValueError(f'example id "{ids[ids.duplicated()].iloc[0]}" occurs twice')
    if metric == "bleu":
        statistics = np.array([np.asarray(entry, dtype=np.float64) for entry in examples[column]])
        if statistics.ndim != 2 or statistics.shape[1] != BLEU_STATISTICS:
            raise ValueError(f'"{column}" must hold {BLEU_STATISTICS} numbers per example')
    else:
        values = examples[column].to_numpy(dtype=np.float64)
        statistics = np.stack([values, np.ones_like(values)], axis=1)
    if not np.isfinite(statistics).all():
        raise ValueError(f'column "{column}" holds values that are not finite')
    if "references" in examples:
        sums = [zlib.crc32("\0".join(texts).encode()) for texts in examples["references"]]
        ids = ids + [f" {each:08x}" for each in sums]
    return ExampleScores(metric, pd.DataFrame(statistics, index=pd.Index(ids, name="id")))


def corpus_score(metric: str, sums: FloatArray) -> FloatArray:
    """The metric from summed statistics.

    Args:
        metric: "bleu", or any metric that is a mean over examples.
        sums: summed sufficient statistics, shape (..., S).

    Returns:
        Scores of shape (...), in the unit of the per-example values (BLEU: 0 to 100, smoothing exp).
    """
    if metric != "bleu":
        return np.asarray(sums[..., 0] / sums[..., 1])
    scores = [
        BLEU.compute_bleu(
            correct=[int(c) for c in row[2 : 2 + MAX_NGRAM_ORDER]],
            total=[int(t) for t in row[2 + MAX_NGRAM_ORDER :]],
            sys_len=int(row[0]),
            ref_len=int(row[1]),
            smooth_method="exp",
        ).score
        for row in sums.reshape(-1, BLEU_STATISTICS)
    ]
    return np.array(scores).reshape(sums.shape[:-1])


@functools.lru_cache(maxsize=16)
def resample_weights(count: int, stream: str) -> FloatArray:
    """How often each of `count` units is drawn in each resample: shape (RESAMPLES, count), rows sum to `count`.

    Args:
        count: number of units.
        stream: names an independent random stream; the same name and count give the same resamples.
    """
    generator = np.random.default_rng([SEED, zlib.crc32(stream.encode())])
    drawn = generator.integers(0, count, size=(RESAMPLES, count))
    flat = drawn + count * np.arange(RESAMPLES)[:, None]
    return np.bincount(flat.ravel(), minlength=RESAMPLES * count).reshape(RESAMPLES, count).astype(np.float64)


@functools.lru_cache(maxsize=16)
def seed_deviations(count: int) -> FloatArray:
    """How the mean over `count` seeds may lie off, as weights of the seeds' own deviations from it: (RESAMPLES, count).

    Their product with deviations of standard deviation s (n - 1) is distributed as s / sqrt(n) times Student's t of
    n - 1 degrees of freedom: what is known of a mean of n normal values. Few seeds cannot be resampled instead: that
    interval reaches from one of three to another, and the mean lies beyond all of them in 25 % of cases. One seed has
    no deviation: no interval can be had from it.
    """
    generator = np.random.default_rng([SEED, zlib.crc32(b"seeds")])
    if count == 1:
        return np.zeros((RESAMPLES, 1))
    normal = generator.standard_normal((RESAMPLES, count))
    return np.asarray(normal / np.sqrt(count * generator.chisquare(count - 1, size=(RESAMPLES, 1))))


def paired_draws(compared: Sequence[Mapping[int, ExampleScores]], stream: str) -> list[Draws]:
    """Scores of several points over the same resamples of their common examples and common seeds.

    Examples are resampled once for all points and seeds; where there are several seeds, their spread widens the
    interval as in Student's t, paired too. With one seed the interval is conditional on that seed's training.

    Args:
        compared: per point, seed to per-example statistics; all of one metric.
        stream: random stream of the examples; one per task, so that tasks are resampled independently.

    Returns:
        One `Draws` per point, in order; differences of them are paired.

    Raises:
        ValueError: the points share no seed or no example.
    """
    seeds = sorted(set.intersection(*(set(runs) for runs in compared)))
    if not seeds:
        raise ValueError("no seed in common")
    ids = tuple(sorted(set.intersection(*(set(runs[seed].statistics.index) for runs in compared for seed in seeds))))
    if not ids:
        raise ValueError("no example in common")
    # The same for all tasks: a seed's conversion and uptraining are shared by them.
    off = seed_deviations(len(seeds))
    result = []
    for runs in compared:
        parts = [runs[seed].resampled(ids, stream) for seed in seeds]
        values = np.array([part.value for part in parts])
        draws = np.mean([part.draws for part in parts], axis=0) + off @ (values - values.mean())
        result.append(Draws(float(values.mean()), draws))
    return result


def mean_draws(parts: Sequence[Draws]) -> Draws:
    """The unweighted mean, as of the tasks of a sweep; the parts come from independent streams."""
    return Draws(float(np.mean([part.value for part in parts])), np.mean([part.draws for part in parts], axis=0))


def gap_closure(mha: Number, mqa: Number, gqa: Number) -> Number:
    """How much of the quality lost from MHA to MQA a GQA model has back, in per cent; works on arrays of draws too.

    The paper's own figures through this function: 83 % by its printed averages, 87.5 % by the means of its rows.
    """
    return 100 * (gqa - mqa) / (mha - mqa)
