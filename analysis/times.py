"""What gqa-time measured, as a table and a figure: time by number of KV heads, beside the cost model and the paper.

Reads the files that gqa-time writes (OUTPUT/times/KEY.json). No quality stands beside these times, and they say so.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from analysis import paper
from analysis.figures import GQA_STYLES, MHA_STYLE, MQA_STYLE
from analysis.stats import Estimate
from analysis.study import number
from analysis.tables import MISSING, markdown, with_interval
from gqa_exp.errors import InputError, one_line
from gqa_exp.results import write_atomically

STYLES = (MHA_STYLE, MQA_STYLE, *GQA_STYLES)
CAPTION = (
    "Not quality-checked. Times are medians with 95 % bootstrap intervals over rounds. Bound: the least that the cost "
    "model allows at this host's bandwidth and peak, which are probed before anything is timed. Columns of other "
    "devices are that model at their data sheets' figures, at the largest batch that fits up to 32 per device, in "
    "seconds per sample and device. Relative: to the fewest KV heads of the same column."
)


@dataclass(frozen=True)
class Job:
    """One timing job of gqa-time."""

    record: dict[str, Any]

    @property
    def title(self) -> str:
        """Geometry, batch, lengths, number format and hardware."""
        config, fields = self.record["config"], next(iter(self.record["variants"].values()))["fields"]
        model = self.record.get("model") or "checkpoints"
        lengths = f"source {config['source_length']}, output {config['output_length']}"
        return f"{model}, batch {config['batch_size']}, {lengths}, {fields['dtype']}, {self.record['hardware']}"

    @property
    def variants(self) -> list[str]:
        """Names, fewest KV heads first; those timed whole as a proof left out."""
        names = [name for name in self.record["variants"] if name in self.record["models"]]
        return sorted(names, key=lambda name: sum(self.record["models"][name]["num_kv_heads"]))

    def fields(self, name: str) -> dict[str, Any]:
        """What was found of a variant, see `gqa_exp.results.TIME_FIELDS`."""
        found: dict[str, Any] = self.record["variants"][name]["fields"]
        return found

    def kv_heads(self, name: str) -> int | None:
        """KV heads of each layer, None where layers differ."""
        heads = set(self.record["models"][name]["num_kv_heads"])
        return heads.pop() if len(heads) == 1 else None

    def estimate(self, name: str, quantity: str) -> Estimate | None:
        """A time with its interval; None where nothing could be measured."""
        value, low, high = (number(self.fields(name).get(f"{quantity}{end}")) for end in ("", "_low", "_high"))
        return None if value is None else Estimate(value, low, high)

    def curves(self) -> dict[str, dict[str, float]]:
        """Seconds per sample by source and variant: measured, the bound here, the bound elsewhere, the paper's."""
        curves: dict[str, dict[str, float]] = {"measured": {}, "cost model, this host": {}}
        for name in self.variants:
            fields = self.fields(name)
            for curve, entry in (("measured", "per_sample"), ("cost model, this host", "predicted_per_sample")):
                if (seconds := number(fields.get(entry))) is not None:
                    curves[curve][name] = seconds
        for device, found in self.record.get("elsewhere", {}).items():
            curves[f"cost model, {device}"] = {
                name: found[name]["per_sample"] for name in self.variants if name in found
            }
        if self.is_figure_6:
            heads = {name: self.kv_heads(name) for name in self.variants}
            curves["paper, 8 TPUv4"] = {name: paper.FIGURE_6[g] for name, g in heads.items() if g in paper.FIGURE_6}
        return {curve: values for curve, values in curves.items() if values}

    @property
    def is_figure_6(self) -> bool:
        """Whether geometry and lengths are those of the paper's Figure 6."""
        config = self.record["config"]
        lengths = (config["source_length"], config["output_length"])
        return bool(self.record.get("model") == "t5_xxl" and lengths == (2048, 512))


def read_jobs(folder: Path) -> list[Job]:
    """The timing jobs of gqa-time in a folder, oldest first; files of sweeps' own jobs are left out.

    Raises:
        InputError: a file is not such a record.
    """
    jobs = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if "quality" in record:
                jobs.append(Job(record))
                assert jobs[-1].title
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not a record of gqa-time ({one_line(error)}); move it elsewhere") from error
    return sorted(jobs, key=lambda job: str(job.record["started"]))


def write_times(jobs: Sequence[Job], folder: Path) -> Path:
    """Write times.md and a figure for each job.

    Args:
        jobs: at least one.
        folder: made if missing.

    Returns:
        The path of times.md.

    Raises:
        InputError: the folder cannot be written.
    """
    parts = ["# Times\n", CAPTION + "\n"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index, job in enumerate(jobs, 1):
            name = f"times-{index}" if len(jobs) > 1 else "times"
            _draw(job, folder / f"{name}.png")
            parts += [f"## {job.title}\n", f"![Time by KV heads]({name}.png)\n", table(job), remarks(job)]
        write_atomically(folder / "times.md", "\n".join(parts))
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error}); give a folder that can be written") from error
    return folder / "times.md"


def table(job: Job) -> str:
    """Variants with their times, bounds, bandwidth, and each curve relative to its fewest KV heads."""
    curves = job.curves()
    relative = {curve: _relative(values) for curve, values in curves.items()}
    header = ["variant", "ms per sample", "bound", "speed-up", "step ms", "bound", "GB/s", "of plain read"]
    header += [f"{curve}, relative" for curve in curves]
    rows = []
    for name in job.variants:
        fields = job.fields(name)
        rows.append(
            [
                f"{name} *" if fields.get("composed") else name,
                with_interval(job.estimate(name, "per_sample"), 1, 1e3),
                _scaled(fields.get("predicted_per_sample"), 1e3),
                with_interval(job.estimate(name, "speedup"), 2),
                _scaled(fields.get("decode_step"), 1e3, 2),
                _scaled(fields.get("predicted_decode_step"), 1e3, 2),
                _scaled(fields.get("decode_bandwidth"), 1e-9),
                _scaled(_share(fields), 1, 2),
                *(f"{relative[curve][name]:.2f}" if name in relative[curve] else MISSING for curve in curves),
            ]
        )
    return markdown(header, rows)


def remarks(job: Job) -> str:
    """Shortcuts, their errors, noise and warnings of a job."""
    lines = []
    composed = {name: str(how) for name in job.variants if (how := job.fields(name).get("composed"))}
    lines += [f"- \\* composed: {how}." for how in dict.fromkeys(composed.values())]
    errors = [error for name in composed if (error := number(job.fields(name).get("fit_error"))) is not None]
    if errors:
        lines.append(f"- Timed depths lie within {max(errors):.1%} of the line that extends them.")
    floor = number(job.record.get("noise_floor"))
    lines.append(
        f"- Noise floor {floor:.1%}: a smaller difference is none." if floor is not None else "- No noise floor."
    )
    if job.record.get("warning"):
        lines.append(f"- Warning: {job.record['warning']}.")
    return "\n".join(lines) + "\n"


def _relative(values: dict[str, float]) -> dict[str, float]:
    """Values over the first, which is that of the fewest KV heads."""
    first = next(iter(values.values()))
    return {name: value / first for name, value in values.items()}


def _share(fields: Mapping[str, object]) -> float | None:
    """Of the plain read's bandwidth; records of before this was a field of its own have the two bandwidths."""
    achieved, read = number(fields.get("decode_bandwidth")), number(fields.get("memory_bandwidth"))
    share = number(fields.get("bandwidth_share"))
    return achieved / read if share is None and achieved and read else share


def _scaled(value: object, scale: float, digits: int = 1) -> str:
    found = number(value)
    return MISSING if found is None else f"{found * scale:.{digits}f}"


def _draw(job: Job, path: Path) -> None:
    names = job.variants
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (curve, values), (colour, marker) in zip(job.curves().items(), STYLES, strict=False):
        relative = _relative(values)
        x = [names.index(name) for name in relative]
        line = "-" if curve == "measured" else ":" if curve.startswith("paper") else "--"
        axes.plot(x, list(relative.values()), color=colour, marker=marker, linestyle=line, markersize=5, label=curve)
    axes.set_xticks(range(len(names)), [str(job.kv_heads(name) or name) for name in names])
    axes.set_xlabel("key/value heads")
    axes.set_ylabel(f"time per sample, relative to {names[0]}")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.set_title(job.title, fontsize=8)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7.5, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
