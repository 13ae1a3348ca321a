"""What pre-training records tell: how a base learned, how fast, whether it reads, and what an hour more would pay.

Reads the `training.json` of checkpoint folders, one base or several beside each other (as in a search for a learning
rate): `python -m analysis.pretraining FOLDER... --output DIR`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize
from numpy.typing import NDArray

from analysis.figures import GQA_STYLES, MHA_STYLE, MQA_STYLE
from analysis.study import number
from analysis.tables import MISSING, markdown
from gqa_exp.errors import InputError, Parser, command
from gqa_exp.results import write_atomically

Floats = NDArray[np.float64]
COLOURS = [colour for colour, _ in (MHA_STYLE, MQA_STYLE, *GQA_STYLES)]
PARTS = 10
SMOOTHING = 0.04
"""Share of all reports that the smoothed training loss averages at each: a report is the loss of one step's batch."""
PAYING = 0.01
"""An hour more is worth it while it lowers the held-out loss by so much of itself."""
NO_FLOOR = 0.01
"""A floor nearer than this, as a share of the lowest loss, to zero or to that loss is a bound that stopped the fit."""
WORST_FIT = 0.02
"""A law that misses a loss by a larger share is none."""
LEAST_LOOKS = 6
"""Held-out losses that three numbers are fitted to, at least."""


@dataclass(frozen=True)
class PowerLaw:
    """Loss floor + scale * (million tokens)^-exponent, the usual form of a loss curve (Hoffmann et al. 2022, eq. 2).

    Attributes:
        error: how far it misses a loss at most, as a share of that.
    """

    floor: float
    scale: float
    exponent: float
    error: float

    def loss(self, million: float) -> float:
        """Loss after so many million tokens."""
        return float(self.floor + self.scale * million**-self.exponent)

    def paying_until(self, million_per_hour: float) -> float:
        """Million tokens after which one hour more gains less than `PAYING`; 0 if none ever gained so much."""

        def excess(log_million: float) -> float:
            million = float(np.exp(log_million))
            return 1 - self.loss(million + million_per_hour) / self.loss(million) - PAYING

        low, high = np.log(million_per_hour) - 10, np.log(million_per_hour) + 15
        return float(np.exp(scipy.optimize.brentq(excess, low, high))) if excess(low) > 0 else 0.0


@dataclass(frozen=True)
class Training:
    """A base's training record under a name."""

    name: str
    record: dict[str, Any]

    def get(self, name: str) -> float | None:
        """A number of the record; None where it has none."""
        return number(self.record.get(name))

    @property
    def recipe(self) -> dict[str, Any]:
        """The pre-training recipe; empty where it was not recorded."""
        recipe: dict[str, Any] = self.record.get("recipe", {}).get("pretrain", {})
        return recipe

    @property
    def tokens_per_step(self) -> float:
        """Input and target tokens of a step."""
        return float(self.record["tokens"]) / float(self.record["step"])

    @property
    def loss(self) -> list[tuple[float, float]]:
        """Step and training loss (nats per target token), smoothed over neighbouring reports, the first one not."""
        curve = np.array(self.record["curve"], dtype=float)
        half = int(SMOOTHING * len(curve) / 2)
        windows = (slice(i - min(i, half), i + min(i, half) + 1) for i in range(len(curve)))
        return [(float(curve[i, 0]), float(curve[window, 1].mean())) for i, window in enumerate(windows)]

    @property
    def heldout(self) -> list[list[float]]:
        """Rows of step, held-out loss, the same with inputs exchanged, and seconds where they were recorded."""
        return [list(map(float, row)) for row in self.record.get("heldout_curve", [])]

    @property
    def power_law(self) -> PowerLaw | None:
        """Fitted to the held-out losses from a tenth of the run on; None where these are too few or follow no such law.

        Nor is there one without a floor in sight, since what lies beyond the run's end hangs on it.
        """
        first = float(self.record["step"]) / PARTS
        looks = [(row[0], row[1]) for row in self.heldout if row[0] >= first and np.isfinite(row[1])]
        if len(looks) < LEAST_LOOKS:
            return None
        steps, losses = np.array(looks).T
        million = steps * self.tokens_per_step / 1e6

        def law(x: Floats, floor: float, scale: float, exponent: float) -> Floats:
            return floor + scale * x**-exponent

        lowest = float(losses.min())
        guess, bounds = (lowest / 2, lowest / 2, 0.3), (0.0, [lowest, np.inf, 2.0])
        try:
            found, _ = scipy.optimize.curve_fit(law, million / million[-1], losses, guess, bounds=bounds)
        except RuntimeError:
            return None
        floor, scale, exponent = map(float, found)
        error = float(np.max(np.abs(law(million / million[-1], floor, scale, exponent) / losses - 1)))
        if not (NO_FLOOR < floor / lowest < 1 - NO_FLOOR and exponent > NO_FLOOR and error < WORST_FIT):
            return None
        return PowerLaw(floor, scale * float(million[-1]) ** exponent, exponent, error)


def read_training(folder: Path, name: str = "") -> Training:
    """The training record of a checkpoint folder.

    Args:
        folder: holds training.json, as `gqa-pretrain` writes it.
        name: what tables call it; the folder's own name by default, or its parents' where that says nothing.

    Raises:
        InputError: no such file, or no training record with a loss curve.
    """
    path = folder / "training.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        training = Training(name or _name_of(folder), record)
        if not (record["curve"] and training.tokens_per_step > 0 and training.loss):
            raise ValueError("an empty curve")
        if any(len(row) < 3 for row in training.heldout):
            raise ValueError("heldout_curve without step, loss and loss with inputs exchanged")
        training.recipe.get("peak_lr")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise InputError(
            f"{path}: no training record with a loss curve ({error!r}); give a base as gqa-pretrain exports it"
        ) from error
    return training


def _name_of(folder: Path) -> str:
    """OUTPUT/pretrain/MODEL/base is known as OUTPUT/MODEL; anything else by its own name."""
    parts = folder.resolve().parts
    exported = len(parts) > 4 and parts[-1] == "base" and parts[-3] == "pretrain"
    return f"{parts[-4]}/{parts[-2]}" if exported else parts[-1]


def summary(trainings: Sequence[Training]) -> tuple[list[str], list[list[str]]]:
    """One row per base: recipe, length, rate, and where it ended."""
    header = [
        "base", "peak rate", "windows per step", "steps", "million tokens", "epochs", "tokens/s", "training loss",
        "held-out loss", "inputs exchanged", "unigram", "gain of the last hour",
    ]  # fmt: skip
    rows = []
    for training in trainings:
        recipe = training.recipe
        gain = training.get("heldout_gain")
        last = training.heldout[-1] if training.heldout else [None, None, None]
        numbers = [
            (number(recipe.get("peak_lr")), "g"), (number(recipe.get("batch_size")), "g"), (training.get("step"), "g"),
            (training.record["tokens"] / 1e6, ".2f"), (training.get("epochs"), ".2f"),
            (training.get("tokens_per_second"), ",.0f"), (training.loss[-1][1], ".3f"), (last[1], ".3f"),
            (last[2], ".3f"), (training.get("heldout_unigram_loss"), ".3f"),
            (None if gain is None else 100 * gain, ".1f"),
        ]  # fmt: skip
        texts = [MISSING if value is None else f"{value:{form}}" for value, form in numbers]
        rows.append([training.name, *texts[:-1], MISSING if gain is None else f"{texts[-1]} %"])
    return header, rows


def outlook(training: Training) -> str | None:
    """What an hour more would pay, by the power law of the held-out losses; None where there is none."""
    law, rate = training.power_law, training.get("tokens_per_second")
    if law is None or not rate:
        return None
    hour = rate * 3600 / 1e6
    return (
        f"Held-out losses from a tenth of the run on lie within {law.error:.1%} of {law.floor:.2f} + "
        f"{law.scale:.2f} N^-{law.exponent:.2f}, N in million tokens. By it, an hour more, {hour:.0f} million tokens "
        f"at this run's rate, lowers the loss by less than {PAYING:.0%} from {law.paying_until(hour):,.0f} million "
        "tokens on.\n"
    )


def curve(training: Training) -> tuple[list[str], list[list[str]]]:
    """The loss at the start, at about every tenth of the run and at its end.

    Where the held-out loss was looked at, the rows are looks, so that all losses of a row are those of one step.
    """
    header = ["step", "million tokens", "training loss", "held-out loss", "inputs exchanged"]
    end = float(training.record["step"])
    looks = {row[0]: (f"{row[1]:.3f}", f"{row[2]:.3f}") for row in training.heldout}
    reported = [step for step, _ in training.loss]
    choices = sorted(set(looks) & set(reported)) or reported  # a look follows a report of its step
    tenths = [min(choices, key=lambda step: abs(step - end * part / PARTS)) for part in range(1, PARTS + 1)]
    losses = dict(training.loss)
    rows = []
    for step in dict.fromkeys([reported[0], *tenths]):
        million = f"{step * training.tokens_per_step / 1e6:.2f}"
        rows.append([f"{step:.0f}", million, f"{losses[step]:.3f}", *looks.get(step, (MISSING, MISSING))])
    return header, rows


def write_curves(trainings: Sequence[Training], folder: Path) -> Path:
    """Write pretraining.png and pretraining.md: the loss curves, and the figures to quote.

    Args:
        trainings: one, or several to compare.
        folder: made if missing.

    Returns:
        The path of the figure.

    Raises:
        InputError: the folder cannot be written.
    """
    parts = ["# Pre-training\n", "![Loss against tokens](pretraining.png)\n", markdown(*summary(trainings))]
    parts.append(
        "Losses are nats per target token; the training loss is that of steps' batches, smoothed over neighbouring "
        f"reports ({100 * SMOOTHING:.0f} % of all). Inputs exchanged: held-out loss when each sample gets the input of "
        "its neighbour; what it lies above the held-out loss is what the base gets from reading. Tokens/s are over the "
        "recorded seconds, pauses of the process included.\n"
    )
    for training in trainings:
        parts += [f"## {training.name}\n", markdown(*curve(training))]
        parts += [text] if (text := outlook(training)) else []
    figure_path = folder / "pretraining.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "pretraining.md", "\n".join(parts))
        _draw(trainings, figure_path)
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error}); give a folder that can be written") from error
    return figure_path


def _draw(trainings: Sequence[Training], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.0, 4.2), layout="constrained")
    for index, training in enumerate(trainings):
        colour = COLOURS[index % len(COLOURS)]
        million = training.tokens_per_step / 1e6
        steps, losses = zip(*training.loss, strict=True)
        axes.plot(np.array(steps) * million, losses, color=colour, linewidth=0.8, alpha=0.5, label=training.name)
        if training.heldout:
            looks = np.array([row[:3] for row in training.heldout])
            axes.plot(looks[:, 0] * million, looks[:, 1], color=colour, marker="o", markersize=3, linewidth=1.4)
            axes.plot(looks[:, 0] * million, looks[:, 2], color=colour, linestyle=":", linewidth=1.0)
    axes.plot([], [], color="0.3", linewidth=0.8, alpha=0.5, label="training")
    if any(training.heldout for training in trainings):
        axes.plot([], [], color="0.3", marker="o", markersize=3, label="held out")
        axes.plot([], [], color="0.3", linestyle=":", label="held out, inputs exchanged")
    axes.set_xlabel("million tokens, inputs and targets")
    axes.set_ylabel("loss, nats per target token")
    axes.set_xscale("log" if max(len(training.loss) for training in trainings) > 100 else "linear")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7.5, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@command
def main() -> None:
    """Entry point of `python -m analysis.pretraining`."""
    parser = Parser(prog="python -m analysis.pretraining", description="Loss curves of bases, from training records.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="checkpoint folders")
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="where to write (default: here)")
    arguments: argparse.Namespace = parser.parse_args()
    print(write_curves([read_training(folder) for folder in arguments.folders], arguments.output))


if __name__ == "__main__":
    main()
