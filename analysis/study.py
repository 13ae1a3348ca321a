"""From the rows of a results folder to points that can be compared, with all that must not be compared kept apart.

A row is one seed of one point on one task. Here rows become points (seeds together, tasks side by side), each knows its
reference, and what cannot enter an average - failed, diverged or superseded rows, times of another machine - is listed
in the notes instead of vanishing.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analysis.stats import Draws, Estimate, ExampleScores, example_scores, gap_closure, mean_draws, paired_draws
from gqa_exp.errors import InputError, suggest
from gqa_exp.results import Result, Scalar, baseline_column, read_examples, read_results

KINDS = ("summarization", "translation", "question answering")
METRIC_NAMES = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeLsum": "ROUGE-Lsum",
    "bleu": "BLEU",
    "f1": "F1",
    "exact_match": "EM",
}
SCORE_TOLERANCE = 0.05
"""By how much a row's score may differ from that of its examples; more, and they do not belong together."""


class Task(NamedTuple):
    """What scores may be compared within: one task, one split, one primary metric."""

    kind: str
    name: str
    split: str
    metric: str

    @property
    def label(self) -> str:
        """The name, with the split where it is not the test split."""
        return self.name if self.split == "test" else f"{self.name} ({self.split})"

    @property
    def title(self) -> str:
        """For headings: "debian_synopsis, ROUGE-1"."""
        return f"{self.label}, {METRIC_NAMES.get(self.metric, self.metric)}"


class Variant(NamedTuple):
    """An architecture, how it came from its base, and for how long it was uptrained: a point without task and seed."""

    model: str
    base: str
    label: str
    num_heads: int
    num_kv_heads: tuple[int, ...]
    method: str
    """Empty at G = H, where no heads are pooled."""
    proportion: float

    @property
    def is_mha(self) -> bool:
        """Whether every decoder layer has as many KV heads as query heads."""
        return set(self.num_kv_heads) == {self.num_heads}

    @property
    def is_mqa(self) -> bool:
        """Whether every decoder layer has one KV head, and more than one query head."""
        return set(self.num_kv_heads) == {1} and not self.is_mha


class TimeSetting(NamedTuple):
    """What must be equal for two times to stand in one table."""

    device: str
    hardware: str
    batch_size: int
    source_length: int
    output_length: int
    dtype: str
    cross_kv: str

    def __str__(self) -> str:
        recomputed = "" if self.cross_kv == "cached" else f", cross-attention's keys and values {self.cross_kv}"
        return (
            f"{self.hardware}; batch {self.batch_size}, source {self.source_length} tokens, "
            f"output {self.output_length} tokens, {self.dtype}{recomputed}"
        )


@dataclass
class Point:
    """A variant with its finished runs (by task, then seed), unfinished ones and time in the study's setting."""

    variant: Variant
    runs: dict[Task, dict[int, Result]] = field(default_factory=dict)
    unfinished: list[Result] = field(default_factory=list)
    time: dict[str, Scalar] = field(default_factory=dict)
    """Empty where not measured in the study's setting."""
    name: str = ""
    """Unique within the study, as "GQA-2 (0.05)"."""

    @property
    def seeds(self) -> list[int]:
        """Seeds with a finished run on any task."""
        return sorted({seed for runs in self.runs.values() for seed in runs})

    @property
    def rows(self) -> list[Result]:
        """All finished rows."""
        return [result for runs in self.runs.values() for result in runs.values()]

    def lost(self, task: Task | None) -> str:
        """What a score, or the mean over tasks, does not hold of its seeds: "2 of 3 diverged"; "" where all finished.

        It is not the score of all then, since what diverges is not drawn by chance.
        """
        done = [row for row in self.rows if task in (None, task_of(row))]
        lost = {  # once, however often it was tried
            (task_of(row), row.seed): "without score" if row.status == "done" else row.status
            for row in self.unfinished
            if task in (None, task_of(row)) and row.seed not in self.runs.get(task_of(row), {})
        }
        statuses = ", ".join(sorted(set(lost.values())))
        return f"{len(lost)} of {len(lost) + len(done)} {statuses}" if lost and done else statuses

    def time_estimate(self, entry: str) -> Estimate | None:
        """A time entry with its interval, None if it was not measured."""
        value = number(self.time.get(entry))
        if value is None:
            return None
        return Estimate(value, number(self.time.get(f"{entry}_low")), number(self.time.get(f"{entry}_high")))


@dataclass
class Study:
    """All points of a results folder, or of one sweep in it."""

    folder: Path
    results: list[Result]
    points: list[Point]
    tasks: list[Task]
    setting: TimeSetting | None
    notes: list[str]
    _examples: dict[tuple[str, str], ExampleScores | None] = field(default_factory=dict)
    _draws: dict[tuple[Task, tuple[Variant, ...]], list[Draws] | None] = field(default_factory=dict)

    @property
    def unfinished(self) -> list[Result]:
        """Failed, diverged and scoreless rows."""
        return [result for result in self.results if not finished(result)]

    @property
    def has_mean(self) -> bool:
        """Whether a mean over tasks is meaningful: all kinds of task are there, each on one split."""
        return {task.kind for task in self.tasks} >= set(KINDS) and len({task.split for task in self.tasks}) == 1

    def note(self, text: str) -> None:
        """Keep a remark for the report, once."""
        if text not in self.notes:
            self.notes.append(text)

    # -- relations between points

    def find(self, test: Callable[[Variant], bool]) -> Point | None:
        """The first point whose variant passes the test."""
        return next((point for point in self.points if test(point.variant)), None)

    def mha(self, point: Point, proportion: float) -> Point | None:
        """MHA of the same base, uptrained for `proportion`."""
        v = point.variant
        return self.find(lambda o: o.is_mha and (o.model, o.base, o.proportion) == (v.model, v.base, proportion))

    def reference(self, point: Point) -> Point | None:
        """MHA of the same base uptrained for the same proportion; None where it is missing, or the point itself."""
        other = self.mha(point, point.variant.proportion)
        return None if other is point else other

    def sibling(self, point: Point, **changes: object) -> Point | None:
        """The point that differs from this one by `changes` of its variant's fields only."""
        return self.find(lambda other: other == point.variant._replace(**changes))  # type: ignore[arg-type]

    # -- quality

    def examples(self, result: Result, baseline: str = "") -> ExampleScores | None:
        """A run's per-example statistics; None, with a note, where they are missing or do not give the row's score.

        Args:
            result: the run's row.
            baseline: the statistics of this trivial baseline on the run's examples instead.

        Raises:
            InputError: the file is there and cannot be read.
        """
        key = (result.key, baseline)
        if key not in self._examples:
            self._examples[key] = self._read_examples(result, baseline)
        return self._examples[key]

    def _read_examples(self, result: Result, baseline: str) -> ExampleScores | None:
        path = self.folder / f"{result.key}.examples.parquet"
        what = f"{result.key} ({f'{baseline} baseline' if baseline else result.label} on {result.task})"
        missing = f"{what} has no per-example scores: no paired intervals."
        if not path.exists():
            self.note(missing)
            return None
        try:
            examples = read_examples(self.folder, result.key)
            if baseline and baseline_column(baseline, "prediction") not in examples:
                self.note(f"Some rows on {result.task} are of before the {baseline} baseline was kept by example.")
                return None
            scores = example_scores(examples, result.metric, baseline)
        except (ValueError, TypeError, OSError) as error:
            raise InputError(f"{path} does not hold per-example scores ({error}); evaluate the point again") from error
        said = number(result.baselines.get(baseline) if baseline else result.score) or 0.0
        if abs(scores.score - said) > SCORE_TOLERANCE:
            self.note(
                f"{what}: its examples give {scores.score:.2f}, its row says {said:.2f}; they do not belong together: "
                "no paired intervals."
            )
            return None
        return scores

    def draws(self, points: Sequence[Point], task: Task) -> list[Draws] | None:
        """Paired resamples of the points' scores on a task; None where examples, or common ones, are missing."""
        key = (task, tuple(point.variant for point in points))
        if key not in self._draws:
            self._draws[key] = self._compute_draws(points, task)
        return self._draws[key]

    def _compute_draws(self, points: Sequence[Point], task: Task) -> list[Draws] | None:
        compared: list[dict[int, ExampleScores]] = []
        for point in points:
            scores = {seed: self.examples(result) for seed, result in point.runs.get(task, {}).items()}
            compared.append({seed: entry for seed, entry in scores.items() if entry is not None})
        if len({frozenset(entry.statistics.index) for scores in compared for entry in scores.values()}) > 1:
            self.note(f"{task.title}: not all rows are of the same examples; differences are over those in common.")
        try:
            return paired_draws(compared, stream=f"{task.name}/{task.split}")
        except ValueError:
            return None

    def mean_draws(self, points: list[Point]) -> list[Draws] | None:
        """The same for the mean over tasks, each task resampled independently."""
        by_task = [self.draws(points, task) for task in self.tasks] if self.has_mean else []
        complete = [draws for draws in by_task if draws is not None]
        if not complete or len(complete) < len(self.tasks):
            return None
        return [mean_draws([draws[index] for draws in complete]) for index in range(len(points))]

    def compared(self, points: list[Point], task: Task | None) -> list[Draws] | None:
        """Paired resamples on a task, or for the mean over tasks where it is None."""
        return self.mean_draws(points) if task is None else self.draws(points, task)

    def score(self, point: Point, task: Task | None) -> Estimate | None:
        """Score on a task (mean over seeds), or the mean over tasks where it is None; None where a part is missing."""
        if task is None:
            parts = [self.score(point, each) for each in self.tasks] if self.has_mean else []
            values = [part.value for part in parts if part is not None]
            if not values or len(values) < len(self.tasks):
                return None
        else:
            runs = list(point.runs.get(task, {}).values())
            if not runs:
                return None
            if len(runs) == 1 and number(runs[0].score_low) is not None:
                return Estimate(score_of(runs[0]), number(runs[0].score_low), number(runs[0].score_high))
            values = [score_of(run) for run in runs]
        interval = self.compared([point], task)
        ends = interval[0].estimate() if interval else Estimate(0.0)
        return Estimate(float(np.mean(values)), ends.low, ends.high)

    def spread(self, point: Point, task: Task) -> float | None:
        """Standard deviation over seeds (n - 1); None with fewer than two."""
        values = [score_of(run) for run in point.runs.get(task, {}).values()]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def difference(self, point: Point, other: Point, task: Task | None) -> Estimate | None:
        """Paired difference `point - other` over common seeds and examples.

        Without per-example scores it is the difference of the rows' scores of common seeds, and has no interval.
        """
        draws = self.compared([point, other], task)
        if draws:
            return (draws[0] - draws[1]).estimate()
        gaps = []
        if task is None and not self.has_mean:
            return None
        for each in self.tasks if task is None else [task]:
            left, right = point.runs.get(each, {}), other.runs.get(each, {})
            seeds = sorted(set(left) & set(right))
            if not seeds:
                return None
            gaps.append(np.mean([score_of(left[seed]) - score_of(right[seed]) for seed in seeds]))
        return Estimate(float(np.mean(gaps)))

    def closure(self, mha: Point, mqa: Point, gqa: Point, task: Task | None) -> tuple[Estimate, Estimate] | None:
        """The MQA-to-MHA gap in points, and the share of it that `gqa` closes, in per cent; None without examples.

        The share's interval means nothing where the gap's reaches 0: the caller must look at the gap first.
        """
        draws = self.compared([mha, mqa, gqa], task)
        if draws is None:
            return None
        gap = (draws[0] - draws[1]).estimate()
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = gap_closure(*(entry.draws for entry in draws))
            value = gap_closure(*(np.float64(entry.value) for entry in draws))
        if not np.isfinite(shares).all():  # few examples: a resample without a gap has no share, so no interval either
            return gap, Estimate(float(value))
        return gap, Draws(float(value), shares).estimate()

    def over_baseline(self, point: Point, task: Task, baseline: str) -> Estimate | None:
        """Paired difference between a point and a trivial baseline on the same examples; None without examples.

        None too where some seed has no scores of the baseline by example: the difference would be another's.
        """
        own = {seed: self.examples(result) for seed, result in point.runs.get(task, {}).items()}
        trivial = {seed: self.examples(result, baseline) for seed, result in point.runs.get(task, {}).items()}
        both = [{seed: each for seed, each in side.items() if each is not None} for side in (own, trivial)]
        if not own or any(len(side) < len(own) for side in both):
            return None
        try:
            ours, theirs = paired_draws(both, stream=f"{task.name}/{task.split}")
        except ValueError:  # seeds without an example in common
            return None
        return (ours - theirs).estimate()

    def baselines(self, task: Task) -> dict[str, float]:
        """The task's trivial baselines, of the row with the most examples."""
        rows = [result for point in self.points for result in point.runs.get(task, {}).values() if result.baselines]
        if not rows:
            return {}
        row = max(rows, key=lambda result: result.num_examples)
        values = {name: number(value) for name, value in sorted(row.baselines.items())}
        return {name: value for name, value in values.items() if value is not None}


def number(value: object) -> float | None:
    """The value as a float; None if it is missing, no number or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def score_of(result: Result) -> float:
    """The score of a finished row."""
    assert result.score is not None, "only finished rows enter a point"
    return float(result.score)


def finished(result: Result) -> bool:
    """Whether the row has a score that may enter averages."""
    return result.status == "done" and number(result.score) is not None


def task_of(result: Result) -> Task:
    """What the row's score may be compared within."""
    return Task(result.task_kind, result.task, result.split, result.metric)


def recipe_of(result: Result) -> tuple[tuple[str, Scalar], ...]:
    """How the row was fine-tuned; empty for rows that do not record it."""
    return tuple(sorted(result.finetune.items()))


def _preferred(earlier: Result, later: Result) -> tuple[Result, str]:
    """Which of two rows of one point, task and seed is shown, and what to say of the other.

    Of two recipes the one that did better on dev; otherwise, and where more than the recipe differs, the later row,
    which other code or another machine computed.
    """
    what = f"({later.label} on {later.task}, proportion {later.proportion:g}, seed {later.seed})"
    scores = (number(earlier.dev_score), number(later.dev_score))
    alike = earlier.settings == later.settings
    if alike and recipe_of(earlier) != recipe_of(later) and scores[0] is not None and scores[1] is not None:
        kept, other = (earlier, later) if scores[0] >= scores[1] else (later, earlier)
        return kept, (
            f"{other.key} {what} was fine-tuned by another recipe than {kept.key}, which did better on dev "
            f"({kept.dev_score:.2f} against {other.dev_score:.2f}) and is shown."
        )
    return later, f"{earlier.key} {what} is superseded by the later {later.key} and not shown."


def variant_of(result: Result) -> Variant:
    """The variant that a row belongs to."""
    heads = tuple(result.num_kv_heads)
    pooled = set(heads) != {result.num_heads}
    return Variant(
        model=result.model,
        base=str(result.stages.get("base") or ""),
        label=result.label,
        num_heads=result.num_heads,
        num_kv_heads=heads,
        method=result.method if pooled else "",
        proportion=result.proportion,
    )


def time_setting(result: Result) -> TimeSetting | None:
    """Hardware, batch, lengths and number format of a row's time; None where the row has none."""
    if number(result.time.get("per_sample")) is None:
        return None
    device = str(result.time.get("device") or "cpu")
    hardware = str(result.time.get("hardware") or _hardware_of_the_row(result, device))
    batch, source, output = (
        int(number(result.time.get(name)) or 0) for name in ("batch_size", "source_length", "output_length")
    )
    dtype = str(result.time.get("dtype") or "unknown dtype")
    cross_kv = str(result.time.get("cross_kv") or "cached")
    return TimeSetting(device, hardware, batch, source, output, dtype, cross_kv)


def _hardware_of_the_row(result: Result, device: str) -> str:
    """For times of before they told their own: the machine that wrote the row, taken for the one that was timed."""
    environment = result.environment
    if device.startswith("cuda"):
        return str(environment.get("gpu") or "GPU of unknown kind")
    # Threads of the timing: what was trained beside another run had fewer (still older rows do not tell the two apart).
    threads = result.time.get("threads") or environment.get("threads") or "?"
    return f"{environment.get('cpu') or 'CPU of unknown kind'}, {threads} threads"


def read_study(folder: Path, sweep: str | None = None) -> Study:
    """Read a results folder into points.

    Args:
        folder: one `KEY.json` per row, per-example Parquet files beside.
        sweep: only rows of this sweep; None for all.

    Raises:
        InputError: no such folder, no rows, a row that cannot be read, or a sweep that is not there.
    """
    if not folder.is_dir():
        raise InputError(f"no results folder at {folder}; give the folder that gqa-run wrote its rows to")
    try:
        results = read_results(folder)
    except (ValueError, OSError) as error:
        raise InputError(f"unreadable results: {error}; remove the file or compute the point again") from error
    if not results:
        raise InputError(f"no results in {folder}; give a folder with KEY.json rows, as gqa-run writes them")
    if sweep is not None:
        known = {result.sweep for result in results}
        if sweep not in known:
            raise InputError(f'no results of sweep "{sweep}" in {folder}; {suggest(sweep, known)}')
        results = [result for result in results if result.sweep == sweep]
    return build_study(folder, results)


def build_study(folder: Path, results: list[Result]) -> Study:
    """Group rows into points, pick the one time setting that is shown, name the points."""
    notes: list[str] = []
    settings = Counter(setting for result in results if finished(result) and (setting := time_setting(result)))
    setting = max(sorted(settings), key=lambda each: settings[each]) if settings else None
    for other in sorted(set(settings) - {setting}):
        notes.append(f"{settings[other]} rows were timed in another setting ({other}): their times are not shown.")

    points: dict[Variant, Point] = {}
    tasks: set[Task] = set()
    for result in sorted(results, key=lambda each: each.ended):
        point = points.setdefault(variant_of(result), Point(variant_of(result)))
        task = task_of(result)
        if not finished(result):
            point.unfinished.append(result)
            continue
        tasks.add(task)
        runs = point.runs.setdefault(task, {})
        if result.seed in runs:
            result, note = _preferred(runs[result.seed], result)
            notes.append(note)
        runs[result.seed] = result
    for point in points.values():
        timed = [result for result in point.rows if setting is not None and time_setting(result) == setting]
        if timed:
            point.time = max(timed, key=lambda result: result.ended).time
            if warning := point.time.get("warning"):
                notes.append(f"Timing: {warning}.")
    for task in sorted(tasks):
        used = {recipe_of(run) for point in points.values() for run in point.runs.get(task, {}).values()}
        if len(used) > 1:  # a row that does not say how it was fine-tuned counts as another recipe
            notes.append(f"{task.title}: not all rows say that they were fine-tuned alike, so they hardly compare.")
    notes += _unlike(list(points.values()))
    jobs = {result.stages.get("time") for point in points.values() for result in point.rows if result.time}
    if len(jobs - {None}) > 1:
        notes.append("Times come from several timing jobs: speed-ups compare, seconds only as far as the machine held.")

    ordered = sorted(points.values(), key=lambda p: _order(p.variant))
    _name(ordered)
    kinds = {kind: rank for rank, kind in enumerate(KINDS)}
    in_order = sorted(tasks, key=lambda task: (kinds.get(task.kind, len(kinds)), task))
    return Study(folder, results, ordered, in_order, setting, list(dict.fromkeys(notes)))


def _unlike(points: Sequence[Point]) -> list[str]:
    """What of their settings finished rows do not have alike: within a task, and for what comes before it, a base."""
    found: dict[str, dict[str, set[Scalar]]] = {}
    silent: Counter[str] = Counter()
    for point in points:
        for task, runs in point.runs.items():
            for run in runs.values():
                silent[task.title] += not run.settings
                for name, value in run.settings.items():
                    of_the_task = name.startswith(("finetune.", "evaluate."))
                    place = task.title if of_the_task else f"Base {point.variant.base[:6]}"
                    found.setdefault(place, {}).setdefault(name, set()).add(value)
    notes = []
    for place, settings in found.items():
        differing = [f"{name} ({', '.join(sorted(map(str, v)))})" for name, v in settings.items() if len(v) > 1]
        if differing:
            notes.append(f"{place}: rows were not computed alike, so they hardly compare: {'; '.join(differing)}.")
        if silent[place]:
            notes.append(f"{place}: {silent[place]} rows are of before rows told by what settings they were computed.")
    return notes


def _order(variant: Variant) -> tuple[object, ...]:
    """Model by model, MHA first and MQA last, smaller proportions first."""
    heads = sum(variant.num_kv_heads) / len(variant.num_kv_heads)
    return (variant.model, variant.base, -heads, variant.label, variant.method, variant.proportion)


def _name(points: list[Point]) -> None:
    """Names that say what tells the study's points apart, and no more."""
    models = {point.variant.model for point in points}
    bases = {(point.variant.model, point.variant.base) for point in points}
    methods = {point.variant.method for point in points} - {""}
    for point in points:
        variant = point.variant
        name = f"{variant.label}-{variant.model}" if len(models) > 1 else variant.label
        if len(bases) > len(models):
            name += f" base {variant.base[:6]}"
        if variant.method and len(methods) > 1:
            name += f" {variant.method}"
        point.name = f"{name} ({variant.proportion:g})"
