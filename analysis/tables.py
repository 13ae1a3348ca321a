"""One row per point with its quality and its time side by side: CSV for machines, Markdown and text for eyes."""

from collections.abc import Sequence

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from analysis.stats import Estimate
from analysis.study import METRIC_NAMES, Point, Study, Task, finished, number, recipe_of, task_of
from gqa_exp.results import Result, Scalar

NOT_MEASURED = "not measured"
MISSING = "-"


def with_interval(estimate: Estimate | None, digits: int, scale: float = 1.0, sign: bool = False) -> str:
    """Text such as "35.62 [34.10, 37.02]"; a missing estimate is "-"."""
    if estimate is None:
        return MISSING
    form = f"{'+' if sign else ''}.{digits}f"
    text = f"{estimate.value * scale:{form}}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{estimate.low * scale:{form}}, {estimate.high * scale:{form}}]"


def _with_lost(text: str, point: Point, task: Task | None) -> str:
    """A score's text with how many of its runs did not finish, or that in its place where there is none."""
    lost = point.lost(task)
    if not lost:
        return text
    return lost if text == MISSING else f"{text} ({lost})"


def _seeds(point: Point) -> str:
    """How many seeds a score is the mean of: "3", or "1 to 3" where not all tasks have as many."""
    return _span([len(runs) for runs in point.runs.values()], 0)


def frame(study: Study) -> pd.DataFrame:
    """The whole table with plain numbers: one row per point, then one per baseline of a task.

    Intervals are columns `_low` and `_high`, the standard deviation over seeds `_spread`, the paired difference to MHA
    of the same proportion `.difference`, to MHA of proportion 0 `.difference_to_base`, to a trivial baseline
    `.over_NAME`. Seconds, bytes, scores 0 to 100.
    """
    rows: list[dict[str, object]] = []
    for point in study.points:
        variant = point.variant
        row: dict[str, object] = {
            "label": variant.label,
            "method": variant.method,
            "proportion": variant.proportion,
            "model": variant.model,
            "base": variant.base,
            "num_heads": variant.num_heads,
            "num_kv_heads": " ".join(map(str, variant.num_kv_heads)),
            "seeds": len(point.seeds),
            "unfinished": len(point.unfinished),
        }
        reference, base = study.reference(point), study.mha(point, 0.0)
        for task in [*study.tasks, None] if study.has_mean else study.tasks:
            column = f"{task.label}.{task.metric}" if task else "mean"
            _put(row, column, study.score(point, task))
            if task:
                row[f"{column}_spread"] = study.spread(point, task)
                row[f"{column}_seeds"] = len(point.runs.get(task, {}))
                for name in study.baselines(task):
                    _put(row, f"{column}.over_{name}", study.over_baseline(point, task, name))
                row[f"{column}_examples"] = max((r.num_examples for r in point.runs.get(task, {}).values()), default=0)
            _put(row, f"{column}.difference", study.difference(point, reference, task) if reference else None)
            different = base is not None and base is not point
            _put(
                row, f"{column}.difference_to_base", study.difference(point, base, task) if base and different else None
            )
        _put(row, "time_per_sample", point.time_estimate("per_sample"))
        _put(row, "speedup", point.time_estimate("speedup"))
        row["predicted_per_sample"] = number(point.time.get("predicted_per_sample"))
        row["decode_step_speedup"] = number(point.time.get("decode_step_speedup"))
        row["noise_floor"] = number(point.time.get("noise_floor"))
        row["kv_cache_bytes_per_sample"] = _cost(point, "kv_cache_bytes_per_sample")
        row["parameters"] = _cost(point, "parameters")
        rows.append(row)
    for name, values in baselines(study).items():
        scores = {f"{task.label}.{task.metric}": value for task, value in values.items()}
        rows.append({"label": f"{name} baseline", **scores})
    return pd.DataFrame(rows)


def _put(row: dict[str, object], column: str, estimate: Estimate | None) -> None:
    row[column] = estimate and estimate.value
    row[f"{column}_low"] = estimate and estimate.low
    row[f"{column}_high"] = estimate and estimate.high


def _cost(point: Point, name: str) -> int | None:
    """A cost of the architecture, from the latest finished row that has it."""
    values = [int(getattr(row, name)) for row in sorted(point.rows, key=lambda row: row.ended) if getattr(row, name)]
    return values[-1] if values else None


def baselines(study: Study) -> dict[str, dict[Task, float]]:
    """Scores of the trivial baselines, by name and task."""
    result: dict[str, dict[Task, float]] = {}
    for task in study.tasks:
        for name, value in study.baselines(task).items():
            result.setdefault(name, {})[task] = value
    return result


def cells(study: Study) -> tuple[list[str], list[list[str]]]:
    """Header and text cells of the table for readers: quality and time of each point in one row, then baselines."""
    several_models = len({point.variant.model for point in study.points}) > 1
    header = ["point", "method", "proportion", "seeds"]
    header += [f"{task.label} {METRIC_NAMES.get(task.metric, task.metric)}" for task in study.tasks]
    header += ["mean", "mean vs MHA"] if study.has_mean else [f"{task.label} vs MHA" for task in study.tasks]
    header += ["ms per sample", "bound", "speed-up", "step speed-up", "KV KiB per sample", "parameters"]
    rows = []
    for point in study.points:
        variant = point.variant
        label = f"{variant.label}-{variant.model}" if several_models else variant.label
        row = [label, variant.method or MISSING, f"{variant.proportion:g}", _seeds(point)]
        for task in study.tasks:
            spread = study.spread(point, task)
            text = with_interval(study.score(point, task), 2)
            row.append(_with_lost(text if spread is None else f"{text} sd {spread:.2f}", point, task))
        if study.has_mean:
            row.append(_with_lost(with_interval(study.score(point, None), 2), point, None))
        for each in [None] if study.has_mean else study.tasks:
            row.append(_difference_cell(study, point, each))
        per_sample = point.time_estimate("per_sample")
        step, cache, parameters = (
            number(point.time.get("decode_step_speedup")),
            _cost(point, "kv_cache_bytes_per_sample"),
            _cost(point, "parameters"),
        )
        bound = number(point.time.get("predicted_per_sample"))
        row.append(with_interval(per_sample, 2, 1e3) if per_sample else NOT_MEASURED)
        row.append(f"{1e3 * bound:.2f}" if bound is not None else MISSING)
        row.append(with_interval(point.time_estimate("speedup"), 2))
        row.append(f"{step:.2f}" if step is not None else MISSING)
        row.append(f"{cache / 1024:,.0f}" if cache else MISSING)
        row.append(f"{parameters / 1e6:.2f}M" if parameters else MISSING)
        rows.append(row)
    for name, values in baselines(study).items():
        scores = [f"{values[task]:.2f}" if task in values else MISSING for task in study.tasks]
        rows.append(
            [f"{name} baseline", MISSING, MISSING, MISSING, *scores, *[MISSING] * (len(header) - 4 - len(scores))]
        )
    return header, rows


def _difference_cell(study: Study, point: Point, task: Task | None) -> str:
    if point.variant.is_mha:
        return "reference"
    reference = study.reference(point)
    return with_interval(study.difference(point, reference, task), 2, sign=True) if reference else "no reference"


def differences(study: Study) -> tuple[list[str], list[list[str]]]:
    """Per task, each point's paired difference to MHA of its own proportion and, beside it, to MHA of proportion 0."""
    header = ["point", "minus"] + [task.title for task in study.tasks] + (["mean"] if study.has_mean else [])
    rows = []
    for point in study.points:
        others = [study.reference(point), study.mha(point, 0.0)]
        for other in dict.fromkeys(o.name for o in others if o is not None and o is not point):
            reference = next(each for each in study.points if each.name == other)
            tasks = [*study.tasks, *([None] if study.has_mean else [])]
            parts = [with_interval(study.difference(point, reference, task), 2, sign=True) for task in tasks]
            rows.append([point.name, other, *parts])
    return header, rows


def over_baselines(study: Study) -> tuple[list[str], list[list[str]]]:
    """Each point's paired difference to the trivial baselines of each task."""
    columns = [(task, name) for task in study.tasks for name in study.baselines(task)]
    header = ["point", *(f"{task.title} minus {name}" for task, name in columns)]
    rows = []
    for point in study.points:
        parts = [with_interval(study.over_baseline(point, task, name), 2, sign=True) for task, name in columns]
        if set(parts) - {MISSING}:
            rows.append([point.name, *parts])
    return header, rows


def recipes(study: Study) -> tuple[list[str], list[list[str]]]:
    """How the rows of each task were fine-tuned, one line per distinct recipe, with what it gave on dev.

    A search over recipes is read from here, diverged ones included; in a comparison of variants there is one line per
    task. The best mean over its rows stands first. The dev score is that of the kept checkpoint, hence the best of
    several looks; the score is that of the row.
    """
    found: dict[tuple[Task, tuple[tuple[str, Scalar], ...]], list[Result]] = {}
    for result in study.results:
        if result.finetune:
            found.setdefault((task_of(result), recipe_of(result)), []).append(result)
    names = {"max_input_tokens": "input", "max_target_tokens": "target", "batch_tokens": "tokens per step"}
    always = ("max_input_tokens", "max_target_tokens", "steps", "batch_tokens", "lr", "dropout", "patience")
    varied = {name for _, recipe in found for name, _ in recipe if len({dict(r).get(name) for _, r in found}) > 1}
    fields = [*always, *sorted(varied - set(always))]
    header = [
        "task",
        *(names.get(name, name) for name in fields),
        "rows",
        "best dev score",
        "at step",
        "score",
        "minutes",
    ]
    lines: list[tuple[int, float, list[str]]] = []
    order = {task: rank for rank, task in enumerate(study.tasks)}
    for (task, recipe), results in found.items():
        scores = [score for result in results if (score := number(result.dev_score)) is not None]
        statuses = sorted({result.status for result in results if not finished(result)})
        cells = [
            task.title,
            *(_plain(dict(recipe).get(name)) for name in fields),
            str(len(results)) + (f" ({', '.join(statuses)})" if statuses else ""),
            _span(scores, 2),
            _span([number(result.training.get("finetune_best_step")) for result in results], 0),
            _span([number(result.score) for result in results], 2),
            _span([_minutes(result) for result in results], 1),
        ]
        mean = sum(scores) / len(scores) if scores else float("-inf")
        lines.append((order.get(task, len(order)), -mean, cells))
    return header, [cells for *_, cells in sorted(lines, key=lambda line: line[:2])]


def _minutes(result: Result) -> float | None:
    seconds = number(result.training.get("finetune_seconds"))
    return None if seconds is None else seconds / 60


def _plain(value: Scalar) -> str:
    return MISSING if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _span(values: Sequence[float | None], digits: int) -> str:
    """The values' range, or the one value."""
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    ends = [f"{end:.{digits}f}" for end in (min(known), max(known))]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def table_markdown(study: Study) -> str:
    """The table, the paired differences per task and what the numbers mean, as Markdown."""
    parts = ["# Quality and time per point\n", markdown(*cells(study)), legend(study)]
    header, rows = differences(study)
    if rows:
        parts += ["## Paired differences to MHA\n", markdown(header, rows)]
    header, rows = over_baselines(study)
    if rows:
        parts += ["## Paired differences to trivial baselines\n", markdown(header, rows)]
    header, rows = recipes(study)
    if rows:
        parts += ["## Fine-tuning\n", markdown(header, rows)]
    return "\n".join(parts)


def legend(study: Study) -> str:
    """How to read the table, in a few lines."""
    timing = f"Times: {study.setting}." if study.setting else "No point was timed."
    floors = sorted({f for p in study.points if (f := number(p.time.get("noise_floor"))) is not None})
    if floors:
        timing += f" Noise floor {100 * floors[-1]:.1f} %: a smaller difference is none."
    return (
        "Scores are 0 to 100; brackets hold 95 % intervals over evaluated examples (and over seeds where there are "
        "several; sd is the standard deviation over seeds), conditional on one base. Differences are paired by example "
        'and seed; "vs MHA" means MHA uptrained for the same proportion. The mean is over the tasks\' primary scores. '
        f"{timing} Speed-up is the time of MHA over the point's; step is one decode step alone. Bound: the least "
        "milliseconds per sample that the cost model allows on the host that was timed.\n"
    )


def console_table(study: Study) -> Table:
    """The table for a terminal of 120 columns: intervals on a second line, columns that say nothing left out."""
    header, rows = cells(study)
    tasks = header[4 : 4 + len(study.tasks)]
    hidden = {"parameters"}
    if study.has_mean and len(tasks) > 3:
        hidden |= {"step speed-up", "bound"}
    if study.has_mean and len(tasks) > 4:
        hidden.update(tasks)
    hidden |= {name for name in ("method", "seeds") if len({r[header.index(name)] for r in rows} - {MISSING}) <= 1}
    names = {"proportion": "prop.", "KV KiB per sample": "KV KiB", "ms per sample": "ms per\nsample"}
    names |= {name: name.replace("_", "_\n", 1).replace(" ", "\n") for name in tasks}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown = [index for index, name in enumerate(header) if name not in hidden]
    for index in shown:
        table.add_column(
            names.get(header[index], header[index].replace(" ", "\n", 1)), justify="right" if index else "left"
        )
    for row in rows:
        texts = (row[index].replace(" [", "\n[").replace("] ", "]\n").replace(", ", " ") for index in shown)
        table.add_row(*(Text(text) for text in texts))
    return table
