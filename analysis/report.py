"""gqa-report: a results folder in; table, figure, claims and a report that holds them together out. Times alone too.

It reads rows and per-example scores only, so it runs anywhere, in seconds, as often as one likes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from analysis import paper
from analysis.claims import Claim, all_claims, claims_markdown
from analysis.figures import write_frontier
from analysis.study import Point, Study, number, read_study
from analysis.tables import MISSING, console_table, frame, markdown, table_markdown, with_interval
from analysis.times import read_jobs, write_times
from gqa_exp.errors import InputError, Parser, command, one_line
from gqa_exp.results import write_atomically

CONSOLE_WIDTH = 120


def write_report(results_folder: Path, output: Path, sweep: str | None = None) -> Path:
    """Write table.md, table.csv, frontier.png, frontier.pdf, claims.md and report.md, and print the table.

    Args:
        results_folder: rows as `gqa_exp.results.write_result` writes them, with their per-example files.
        output: folder to write to; made if missing.
        sweep: only rows of this sweep; None for all.

    Returns:
        The path of frontier.png.

    Raises:
        InputError: no results, an unreadable row, an unknown sweep, or an output folder that cannot be written.
    """
    study = read_study(results_folder, sweep)
    claims = all_claims(study)
    try:
        output.mkdir(parents=True, exist_ok=True)
        table = table_markdown(study)
        write_atomically(output / "table.md", table)
        write_atomically(output / "table.csv", frame(study).to_csv(index=False))
        write_atomically(output / "claims.md", claims_markdown(claims))
        figure = write_frontier(study, output)
        write_atomically(output / "report.md", report_markdown(study, claims, table, sweep))
    except OSError as error:
        raise InputError(f"cannot write the report to {output} ({error}); give a folder that can be written") from error
    _show(study, claims, output)
    return figure


def _show(study: Study, claims: Sequence[Claim], output: Path) -> None:
    console = Console(width=CONSOLE_WIDTH, highlight=False, soft_wrap=False)
    console.print(console_table(study))
    verdicts = ("supported", "not supported", "cannot tell")
    counts = ", ".join(f"{sum(claim.verdict == each for claim in claims)} {each}" for each in verdicts)
    lines = [f"{len(study.unfinished)} of {len(study.results)} rows did not finish"] if study.unfinished else []
    lines += [f"table   {output / 'table.md'} (and table.csv)", f"claims  {output / 'claims.md'}: {counts}"]
    lines += [f"report  {output / 'report.md'}", f"plot    {output / 'frontier.png'}"]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def report_markdown(study: Study, claims: list[Claim], table: str, sweep: str | None) -> str:
    """The report: figure, table, claims, what is missing, environment, and the paper's figures for orientation."""
    title = f"sweep {sweep}" if sweep else "all sweeps: " + ", ".join(sorted({r.sweep for r in study.results}))
    finished = len(study.results) - len(study.unfinished)
    parts = [
        f"# Report, {title}\n",
        f"{len(study.results)} rows: {finished} finished, {len(study.unfinished)} failed or diverged. "
        f"{len(study.points)} points, {len(study.tasks)} tasks.\n",
        "![Quality against measured time](frontier.png)\n",
        _nested(table),
        _nested(claims_markdown(claims)),
        "## Rows that did not finish, and other remarks\n",
        remarks(study),
        "## The paper, for orientation\n",
        orientation(study),
        "## Environment\n",
        environment(study),
    ]
    return "\n".join(parts)


def _nested(text: str) -> str:
    """A document's text one heading level down."""
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in text.splitlines()) + "\n"


def remarks(study: Study) -> str:
    """Failed and diverged rows one by one, then the study's notes."""
    lines = [
        f"- {row.status}: {row.label}, proportion {row.proportion:g}, {row.task}, seed {row.seed} ({row.key}): "
        f"{one_line(row.error or 'no score')}"
        for row in study.unfinished
    ]
    untimed = [point.name for point in study.points if point.rows and not point.time]
    if untimed:
        lines.append(f"- Time not measured: {', '.join(untimed)}.")
    orphans = [p.name for p in study.points if not p.variant.is_mha and study.reference(p) is None]
    if orphans:
        lines.append(f"- No MHA of the same proportion in these results, so no reference: {', '.join(orphans)}.")
    return "\n".join(lines + [f"- {note}" for note in study.notes]) + "\n" if lines or study.notes else "None.\n"


def orientation(study: Study) -> str:
    """The paper's figures beside ours where a point of ours matches, then its Table 1; measured and paper never mix."""
    mark = paper.TABLE_1_MARK
    header = ["quantity", "measured", "paper", "mark"]
    rows: list[list[str]] = []
    for point in _closest_to_the_paper(study):
        variant = point.variant
        name = "MQA-XXL" if variant.is_mqa else "GQA-8-XXL"
        speedup = point.time_estimate("speedup")
        rows.append(
            [f"speed-up of {point.name} over MHA", with_interval(speedup, 2), f"{paper.speedup(name):.1f}", "D"]
        )
        reference = study.reference(point)
        measured = study.difference(point, reference, None) if reference else None
        theirs = paper.TABLE_1[name].average - paper.TABLE_1["MHA-XXL"].average
        rows.append(
            [f"{point.name} minus MHA, mean over tasks", with_interval(measured, 2, sign=True), f"{theirs:+.2f}", "D"]
        )
        if not variant.is_mqa:
            closure = _closure(study, point, reference)
            printed, means = paper.closure_by_printed_averages(), paper.closure_by_row_means()
            text = f"{printed:.0f} by printed averages, {means:.1f} by row means"
            rows.append([f"MQA-to-MHA gap closed by {point.name}, %", closure, text, "D"])
    marks = "; ".join(f"{each}: {meaning}" for each, meaning in paper.MARKS.items())
    text = (
        f"Column paper: {paper.SETTING}; GQA there has 8 of 64 heads. Other model, data, lengths and hardware: compare "
        f"directions, not values. Marks: {marks}.\n\n"
    )
    if rows:
        text += markdown(header, rows) + "\n"
    columns = ["paper, Table 1", "s per sample", "average (printed)", "mean of the row", *paper.TABLE_1_TASKS, "mark"]
    table = [
        [
            row.model,
            f"{row.seconds_per_sample:.2f}",
            f"{row.printed_average:.1f}",
            f"{row.average:.2f}",
            *(f"{score:.1f}" for score in row.scores),
            mark,
        ]
        for row in paper.TABLE_1.values()
    ]
    return text + markdown(columns, table)


def _closest_to_the_paper(study: Study) -> list[Point]:
    """Points with fewer KV heads, pooled by mean, of the uptraining proportion that is closest to the paper's."""
    fewer = [p for p in study.points if p.variant.method == "mean" and p.variant.proportion > 0 and p.rows]
    if not fewer:
        return []
    closest = min((p.variant.proportion for p in fewer), key=lambda proportion: abs(proportion - paper.PROPORTION))
    return [point for point in fewer if point.variant.proportion == closest]


def _closure(study: Study, gqa: Point, mha: Point | None) -> str:
    v = gqa.variant
    mqa = study.find(
        lambda o: o.is_mqa and (o.model, o.base, o.method, o.proportion) == (v.model, v.base, v.method, v.proportion)
    )
    if mha is None or mqa is None:
        return MISSING
    closure = study.closure(mha, mqa, gqa, None)
    if closure is None:
        return MISSING
    gap, share = closure
    return with_interval(share, 0) if gap.low is not None and gap.low > 0 else "no distinguishable gap"


def environment(study: Study) -> str:
    """What the rows were computed on: every value that occurs; numbers that vary as a range."""
    values: dict[str, list[object]] = {}
    for result in study.results:
        for name, value in result.environment.items():
            seen = values.setdefault(name, [])
            if value not in seen:
                seen.append(value)
    rows = []
    for name, seen in values.items():
        numbers = [each for each in map(number, seen) if each is not None]
        if len(seen) > 3 and len(numbers) == len(seen):
            rows.append([name, f"{min(numbers):g} to {max(numbers):g}"])
        else:
            rows.append([name, ", ".join(str(each) for each in seen)])
    return markdown(["what", "value"], rows) if rows else "The rows record none.\n"


def _arguments() -> argparse.Namespace:
    parser = Parser(prog="gqa-report", description="Tables, figure, claims and report from result rows.")
    parser.add_argument(
        "results", type=Path, metavar="RESULTS_DIR", help="folder of KEY.json rows, or the output folder of gqa-time"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: RESULTS_DIR/report)")
    parser.add_argument("--sweep", metavar="NAME", help="only rows of this sweep (default: all)")
    return parser.parse_args()


@command
def main() -> None:
    """Entry point of gqa-report."""
    arguments = _arguments()
    output = arguments.output or arguments.results / "report"
    times = arguments.results / "times"
    if not list(arguments.results.glob("*.json")) and times.is_dir() and (jobs := read_jobs(times)):
        print(f"times   {write_times(jobs, output)}")
        return
    write_report(arguments.results, output, arguments.sweep)
