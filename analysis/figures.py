"""The quality-versus-time frontier: what grouped-query attention costs and gains, in one picture.

Architectures differ by colour and marker (both, so that the figure survives greyscale and colour blindness), points
right after conversion are hollow, thin lines join points of the same proportion. Labels go where they cover nothing.
"""

import dataclasses
import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox, ScaledTranslation, Transform

from analysis.stats import Estimate, FloatArray
from analysis.study import METRIC_NAMES, Point, Study, Task, number

# Okabe and Ito's palette, safe for the common kinds of colour blindness; yellow is left out, too pale for thin lines.
MHA_STYLE = ("#0072B2", "o")
MQA_STYLE = ("#D55E00", "^")
GQA_STYLES = (("#009E73", "s"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X"))
GREY = "0.55"
PANEL_INCHES, CROWDED_PANEL_INCHES = (4.2, 3.0), (5.2, 3.8)
CROWD = 8
"""A panel with more points than this names each architecture once, and the points by proportion alone."""
DODGE = 5.0
LABEL_OFFSETS = [(dx, dy) for radius in (6, 11, 17, 24, 32, 42) for dx, dy in (
    (radius, 0), (-radius, 0), (0, radius), (0, -radius),
    (radius, 0.6 * radius), (radius, -0.6 * radius), (-radius, 0.6 * radius), (-radius, -0.6 * radius),
)]  # fmt: skip
"""Where a label may stand relative to its point, in typographic points, near places first."""


@dataclass(frozen=True)
class Mark:
    """A point as one panel draws it: x in milliseconds (or a stand-in where not timed), y a score."""

    point: Point
    x: Estimate
    y: Estimate
    timed: bool
    dodge: float = 0.0
    """Typographic points to the right: points of one architecture have one time, and stand side by side."""


@dataclass(frozen=True)
class Label:
    """A text beside a mark, or above the marks of an architecture."""

    mark: Mark
    text: str
    height: float
    """Score at which it is anchored."""
    bold: bool = False


def styles(study: Study) -> dict[str, tuple[str, str]]:
    """Colour and marker per architecture label."""
    labels = list(dict.fromkeys(point.variant.label for point in study.points))
    grouped = [label for label in labels if label not in ("MHA", "MQA")]
    result = {label: GQA_STYLES[index % len(GQA_STYLES)] for index, label in enumerate(grouped)}
    return {label: {"MHA": MHA_STYLE, "MQA": MQA_STYLE}.get(label) or result[label] for label in labels}


def marks(study: Study, task: Task | None) -> list[Mark]:
    """What a panel shows; points without time stand together past the slowest timed one."""
    scored = [(point, score) for point in study.points if (score := study.score(point, task)) is not None]
    times = {point.name: time for point, _ in scored if (time := point.time_estimate("per_sample")) is not None}
    values = [time.value * 1e3 for time in times.values()]
    beyond = max(values) + max(0.4 * (max(values) - min(values)), 0.15 * max(values)) if values else 0.0
    result = []
    for point, score in scored:
        time = times.get(point.name)
        if time is None:
            result.append(Mark(point, Estimate(beyond), score, timed=False))
        else:
            ends = (None if end is None else end * 1e3 for end in (time.low, time.high))
            result.append(Mark(point, Estimate(time.value * 1e3, *ends), score, timed=True))
    return _side_by_side(result)


def _side_by_side(shown: list[Mark]) -> list[Mark]:
    together: dict[float, list[Mark]] = {}
    for mark in shown:
        together.setdefault(mark.x.value, []).append(mark)
    return [
        dataclasses.replace(mark, dodge=DODGE * (index - (len(column) - 1) / 2))
        for column in together.values()
        for index, mark in enumerate(column)
    ]


def frontier(study: Study) -> Figure:
    """The figure: the mean over tasks against time where all kinds of task are there, and one panel per task."""
    panels: list[Task | None] = [None, *study.tasks] if study.has_mean else list(study.tasks)
    columns = 1 if len(panels) <= 1 else 2
    rows = max(1, -(-len(panels) // columns))
    crowded = max((len(marks(study, task)) for task in panels), default=0) > CROWD
    panel = CROWDED_PANEL_INCHES if crowded else PANEL_INCHES
    width, height = panel[0] * columns, panel[1] * rows + 1.27
    figure, grid = plt.subplots(
        rows, columns, figsize=(width, height), squeeze=False, gridspec_kw={"hspace": 0.38, "wspace": 0.2}
    )
    figure.subplots_adjust(left=0.62 / width, right=1 - 0.15 / width, top=1 - 0.62 / height, bottom=1.27 / height)
    figure.suptitle("Quality against measured time of the same checkpoint", fontsize=11, y=1 - 0.14 / height, va="top")
    style = styles(study)
    axes_of = list(grid.flat)
    for spare in axes_of[len(panels) :]:
        spare.set_axis_off()
    if not panels:
        axes_of[0].text(0.5, 0.5, "no finished points", ha="center", va="center", transform=axes_of[0].transAxes)
    for axes, task in zip(axes_of, panels, strict=False):
        _panel(axes, study, task, style)
    _legend(figure, study, style, height)
    caption = textwrap.fill(_caption(study), width=int(width * 19.5))
    figure.text(0.5, 0.08 / height, caption, fontsize=6.5, color="0.25", ha="center", va="bottom", linespacing=1.3)
    return figure


def _panel(axes: Axes, study: Study, task: Task | None, style: dict[str, tuple[str, str]]) -> None:
    shown = marks(study, task)
    axes.set_title(_title(study, task), fontsize=9, loc="left", fontweight="bold" if task is None else "normal")
    axes.set_ylabel(
        f"mean of {_metrics(study)}" if task is None else METRIC_NAMES.get(task.metric, task.metric), fontsize=8
    )
    axes.set_xlabel("time per sample (ms)", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.5)
    if not shown:
        axes.text(0.5, 0.5, "no finished points", ha="center", va="center", fontsize=8, transform=axes.transAxes)
        return
    baselines = study.baselines(task) if task else {}
    _limits(axes, shown)
    far = _make_room(axes, baselines)
    for mark in shown:
        colour, marker = style[mark.point.variant.label]
        axes.errorbar(
            mark.x.value, mark.y.value, xerr=_arms(mark.x), yerr=_arms(mark.y),
            fmt=marker, color=colour, markersize=5.5,
            markerfacecolor="white" if mark.point.variant.proportion == 0 else colour, markeredgewidth=1.2,
            elinewidth=0.9 if len(shown) <= CROWD else 0.6, capsize=2, zorder=3, transform=_dodged(axes, mark),
        )  # fmt: skip
    taken = (
        _untimed(axes, shown)
        + [box for mark in shown for box in _drawn(axes, mark)]
        + _same_proportion_lines(axes, shown)
    )
    taken += _baselines(axes, baselines, far, taken)
    _label(axes, _labels(shown), style, taken)


def _dodged(axes: Axes, mark: Mark) -> Transform:
    """Data coordinates, moved by the mark's dodge."""
    return axes.transData + ScaledTranslation(mark.dodge / 72, 0, _figure(axes).dpi_scale_trans)


def _position(axes: Axes, mark: Mark) -> tuple[float, float]:
    """Where the mark's centre stands, in display coordinates."""
    x, y = _dodged(axes, mark).transform((mark.x.value, mark.y.value))
    return float(x), float(y)


def _metrics(study: Study) -> str:
    names = list(dict.fromkeys(METRIC_NAMES.get(task.metric, task.metric) for task in study.tasks))
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _title(study: Study, task: Task | None) -> str:
    return f"Mean over {len(study.tasks)} tasks" if task is None else f"{task.title} ({task.kind})"


def _arms(estimate: Estimate) -> list[list[float]] | None:
    """Matplotlib's error bar: lengths below and above."""
    if estimate.low is None or estimate.high is None:
        return None
    return [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]


def _ends(estimate: Estimate) -> tuple[float, float]:
    low = estimate.value if estimate.low is None else estimate.low
    high = estimate.value if estimate.high is None else estimate.high
    return low, high


def _limits(axes: Axes, shown: Sequence[Mark]) -> None:
    """Limits that hold all error bars, with room for labels."""
    for values, smallest, limit, margin in (
        ([_ends(mark.x) for mark in shown], 0.2, axes.set_xlim, 0.28),
        ([_ends(mark.y) for mark in shown], 0.02, axes.set_ylim, 0.14),
    ):
        low, high = min(low for low, _ in values), max(high for _, high in values)
        room = max(high - low, smallest * abs(high), 1e-6) * margin
        middle, half = (low + high) / 2, max(high - low, smallest * abs(high), 1e-6) / 2
        limit(max(middle - half - room, 0.0) if low >= 0 else middle - half - room, middle + half + room)


def _same_proportion_lines(axes: Axes, shown: Sequence[Mark]) -> list[Bbox]:
    """Join the architectures of each proportion; returns small boxes along the lines, for labels to keep off."""
    boxes: list[Bbox] = []
    families: dict[tuple[str, str, float], dict[str, Mark]] = {}
    for mark in shown:
        variant = mark.point.variant
        if mark.timed:  # one line through each architecture: of several methods, the first (mean sorts before random)
            families.setdefault((variant.model, variant.base, variant.proportion), {}).setdefault(variant.label, mark)
    for family in families.values():
        path = sorted(family.values(), key=lambda mark: mark.x.value)
        corners = np.array([_position(axes, mark) for mark in path])
        ends = axes.transData.inverted().transform(corners)
        axes.plot(ends[:, 0], ends[:, 1], color=GREY, linewidth=0.8, alpha=0.6, zorder=1)
        for start, end in itertools.pairwise(corners):
            steps = start + np.linspace(0, 1, 30)[:, None] * (end - start)
            boxes += [
                Bbox.from_extents(*np.minimum(a, b) - 1, *np.maximum(a, b) + 1) for a, b in itertools.pairwise(steps)
            ]
    return boxes


def _untimed(axes: Axes, shown: Sequence[Mark]) -> list[Bbox]:
    """Mark the strip of points without time and take the numbers off its ticks; returns the box of its border."""
    if all(mark.timed for mark in shown):
        return []
    position = next(mark.x.value for mark in shown if not mark.timed)
    timed = [_ends(mark.x)[1] for mark in shown if mark.timed]
    if not timed:
        axes.set_xticks([])
        axes.set_xlabel("time not measured", fontsize=8)
        return []
    axes.set_xticks([tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= max(timed) * 1.02])
    border = axes.axvline((position + max(timed)) / 2, color=GREY, linewidth=0.7, linestyle=(0, (1, 2)))
    axes.text(
        position,
        -0.02,
        "time not\nmeasured",
        fontsize=6.5,
        color="0.35",
        ha="center",
        va="top",
        transform=axes.get_xaxis_transform(),
    )
    return [_extent(border).padded(2)]


def _make_room(axes: Axes, baselines: dict[str, float]) -> dict[str, float]:
    """Widen the score axis for baselines near the points; returns the far ones, so that points keep their scale."""
    low, high = axes.get_ylim()
    reach, room = 0.4 * (high - low), 0.08 * (high - low)
    near = [value for value in baselines.values() if low - reach <= value <= high + reach]
    axes.set_ylim(min([low, *(value - room for value in near)]), max([high, *(value + room for value in near)]))
    return {name: value for name, value in baselines.items() if value not in near}


def _baselines(axes: Axes, baselines: dict[str, float], far: dict[str, float], taken: Sequence[Bbox]) -> list[Bbox]:
    """Dotted lines with their names where they cover least; the far ones are named at the edge they lie behind.

    Returns:
        The boxes of the names in display coordinates, for labels to keep off.
    """
    boxes: list[Bbox] = []
    for name, value in sorted(baselines.items(), key=lambda item: item[1]):
        if name in far:
            continue
        axes.axhline(value, color=GREY, linewidth=1.0, linestyle=":", zorder=1)
        text = axes.annotate(
            f"{name} baseline {value:.1f}", (0, value), xycoords=axes.get_yaxis_transform(), xytext=(0, 1.5),
            textcoords="offset points", fontsize=6.5, color="0.35", va="bottom",
        )  # fmt: skip
        size, frame = _extent(text), _extent(axes)
        starts = np.linspace(0.01, 0.99 - size.width / frame.width, 25)
        spots = [(start, size.translated(start * frame.width, 0)) for start in starts]
        start, box = spots[int(np.argmin(_overlaps([box for _, box in spots], [*taken, *boxes]).sum(axis=1)))]
        text.xy = (start, value)
        boxes.append(box)
    middle = sum(axes.get_ylim()) / 2
    for above in (True, False):
        names = ", ".join(f"{name} {value:.1f}" for name, value in far.items() if (value > middle) == above)
        if names:
            text = axes.annotate(
                f"baselines {'above' if above else 'below'}: {names}", (0.01, 0.99 if above else 0.01), fontsize=6.5,
                color="0.35", va="top" if above else "bottom", xycoords="axes fraction",
            )  # fmt: skip
            boxes.append(_extent(text))
    return boxes


def _labels(shown: Sequence[Mark]) -> list[Label]:
    """What the marks are called: each by its full name; in a crowd, by proportion under an architecture's name."""
    if len(shown) <= CROWD:
        return [Label(mark, mark.point.name, mark.y.value) for mark in shown]
    columns: dict[tuple[str, float], list[Mark]] = {}
    for mark in shown:
        columns.setdefault((mark.point.name.rpartition(" (")[0], mark.x.value), []).append(mark)
    names = []
    for (name, _), column in columns.items():
        middle = column[len(column) // 2]
        names.append(Label(middle, name, max(_ends(mark.y)[1] for mark in column), bold=True))
    return names + [Label(mark, f"{mark.point.variant.proportion:g}", mark.y.value) for mark in shown]


def _label(axes: Axes, labels: Sequence[Label], style: dict[str, tuple[str, str]], taken: list[Bbox]) -> None:
    """Put each label in the nearest place that covers no marker, error bar or other label."""
    pixel = _figure(axes).dpi / 72
    frame = _extent(axes)
    boxes = list(taken)
    for label in sorted(labels, key=lambda label: (not label.bold, -label.height)):
        mark, colour = label.mark, style[label.mark.point.variant.label][0]
        text = axes.annotate(
            label.text, (mark.x.value, label.height), xycoords=_dodged(axes, mark), textcoords="offset points",
            xytext=(0, 0), fontsize=7.5 if label.bold else 7, fontweight="bold" if label.bold else "normal",
            color=colour, ha="center", va="center", zorder=4,
        )  # fmt: skip
        x, y = (float(each) for each in _dodged(axes, mark).transform((mark.x.value, label.height)))
        extent = _extent(text)
        places = [_place(x, y, extent, offset, pixel) for offset in LABEL_OFFSETS]
        distances = [abs(dx) + abs(dy) for dx, dy in LABEL_OFFSETS]
        best = int(np.argmin(_covered(places, boxes, frame) + 0.1 * pixel * np.array(distances)))
        box = places[best]
        text.set_position((((box.x0 + box.x1) / 2 - x) / pixel, ((box.y0 + box.y1) / 2 - y) / pixel))
        boxes.append(box.padded(1.5 * pixel))
        if max(map(abs, LABEL_OFFSETS[best])) > 12 and not label.bold:  # far from its point: lead the eye
            nearest = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
            ends = axes.transData.inverted().transform([(x, y), nearest])
            axes.plot(ends[:, 0], ends[:, 1], color=colour, linewidth=0.5, alpha=0.7, zorder=2)


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def _extent(artist: Artist) -> Bbox:
    """Where the artist stands, in display coordinates."""
    return artist.get_window_extent()


def _place(x: float, y: float, size: Bbox, offset: tuple[float, float], pixel: float) -> Bbox:
    """The box of a label beside (x, y): it starts at the offset (points) and extends away from (x, y)."""
    dx, dy = offset
    centre_x = x + dx * pixel + np.sign(dx) * size.width / 2
    centre_y = y + dy * pixel + (np.sign(dy) * size.height / 2 if dx == 0 else 0)
    return Bbox.from_bounds(centre_x - size.width / 2, centre_y - size.height / 2, size.width, size.height)


def _covered(places: Sequence[Bbox], taken: Sequence[Bbox], frame: Bbox) -> FloatArray:
    """Badness of each place: thrice its area that covers something, eight times that outside the panel (pixels)."""
    areas = np.array([place.width * place.height for place in places])
    outside = areas - _overlaps(places, [frame])[:, 0]
    return np.asarray(3 * _overlaps(places, taken).sum(axis=1) + 8 * outside)


def _drawn(axes: Axes, mark: Mark) -> list[Bbox]:
    """Display boxes of a mark and its error bars."""
    x, y = _position(axes, mark)
    (left, right), (bottom, top) = _ends(mark.x), _ends(mark.y)
    (x0, y0), (x1, y1) = _dodged(axes, mark).transform([(left, bottom), (right, top)])
    pixel = _figure(axes).dpi / 72
    marker, thin = 4 * pixel, 1.5 * pixel
    return [
        Bbox.from_extents(x - marker, y - marker, x + marker, y + marker),
        Bbox.from_extents(x - thin, y0, x + thin, y1),
        Bbox.from_extents(x0, y - thin, x1, y + thin),
    ]


def _overlaps(some: Sequence[Bbox], others: Sequence[Bbox]) -> FloatArray:
    """Common area of each pair, shape (some, others)."""
    one = np.array([box.extents for box in some]).reshape(-1, 1, 4)
    two = np.array([box.extents for box in others]).reshape(1, -1, 4)
    sides = np.minimum(one[..., 2:], two[..., 2:]) - np.maximum(one[..., :2], two[..., :2])
    return np.asarray(np.clip(sides, 0, None).prod(axis=-1))


def _legend(figure: Figure, study: Study, style: dict[str, tuple[str, str]], height: float) -> None:
    shown = {mark.point.variant.label for task in [None, *study.tasks] for mark in marks(study, task)}
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=5.5, label=label)
        for label, (colour, marker) in style.items()
        if label in shown
    ]
    proportions = {point.variant.proportion for point in study.points}
    if 0 in proportions and len(proportions) > 1:
        handles.append(
            Line2D(
                [],
                [],
                color="0.3",
                marker="o",
                markerfacecolor="white",
                linestyle="",
                markersize=5.5,
                label="not uptrained",
            )
        )
    if handles:
        figure.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, 0.84 / height),
            ncols=len(handles),
            frameon=False,
            fontsize=7.5,
        )


def _caption(study: Study) -> str:
    """Hardware, lengths and what the error bars are conditional on."""
    timing = f"Time: {study.setting}" if study.setting else "No point was timed"
    floors = [floor for point in study.points if (floor := number(point.time.get("noise_floor"))) is not None]
    if floors:
        timing += f"; differences below the noise floor of {100 * max(floors):.1f} % are none"
    seeds = sorted({seed for point in study.points for seed in point.seeds})
    counts = sorted({len(runs) for point in study.points for runs in point.runs.values()}) or [0]
    several = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    trained = f"seed {seeds[0]}" if len(seeds) == 1 else f"{several} seeds"
    return (
        f"Numbers at points: uptraining proportion; points of one architecture share its time and stand side by side. "
        f"{timing}. Error bars: 95 % intervals of the score over evaluated examples, of the median time over rounds; "
        f"{trained}; conditional on one base checkpoint."
    )


def write_frontier(study: Study, folder: Path) -> Path:
    """Write `frontier.png` and its vector copy `frontier.pdf`; returns the path of the PNG."""
    with mpl.rc_context({"font.family": "DejaVu Sans", "pdf.fonttype": 42, "figure.dpi": 100}):
        figure = frontier(study)
        path = folder / "frontier.png"
        figure.savefig(path, dpi=200)
        figure.savefig(folder / "frontier.pdf")
        plt.close(figure)
    return path
