"""The paper's figures (arXiv 2305.13245), for orientation beside ours and nowhere else: column "paper", with a mark.

Marks say how sure a figure is: "2" read in two or more independent copies; "1" in one; "D" derived, or read off a
published figure. They were taken with other models, data and hardware: no measured value is ever averaged with them.
"""

from dataclasses import dataclass
from typing import Literal

from analysis.stats import gap_closure

Mark = Literal["2", "1", "D"]
MARKS = {"2": "read in two or more independent copies", "1": "read in one copy", "D": "derived, or read off a figure"}
SETTING = "T5.1.1-XXL (64 heads), proportion 0.05, dev sets, TPUv4, input up to 2048 and output up to 512 tokens"
PROPORTION = 0.05


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's Table 1: seconds per sample per chip, the printed average, and one score per task."""

    model: str
    seconds_per_sample: float
    printed_average: float
    scores: tuple[float, ...]

    @property
    def average(self) -> float:
        """The mean of the row's own scores, which for MQA is not the printed one."""
        return sum(self.scores) / len(self.scores)


TABLE_1_MARK: Mark = "2"
TABLE_1_TASKS = (
    "CNN/DailyMail ROUGE-1",
    "arXiv ROUGE-1",
    "PubMed ROUGE-1",
    "MediaSum ROUGE-1",
    "Multi-News ROUGE-1",
    "WMT14 En-De BLEU",
    "TriviaQA F1",
)
TABLE_1 = {
    row.model: row
    for row in (
        PaperRow("MHA-Large", 0.37, 46.0, (42.9, 44.6, 46.2, 35.5, 46.6, 27.7, 78.2)),
        PaperRow("MHA-XXL", 1.51, 47.2, (43.8, 45.6, 47.5, 36.4, 46.9, 28.4, 81.9)),
        PaperRow("MQA-XXL", 0.24, 46.6, (43.0, 45.0, 46.9, 36.1, 46.5, 28.5, 81.3)),
        PaperRow("GQA-8-XXL", 0.28, 47.1, (43.5, 45.4, 47.7, 36.3, 47.2, 28.4, 81.6)),
    )
}

FIGURE_4_MARK: Mark = "D"
FIGURE_4 = {"mean": 55.55, "first": 55.45, "random": 55.23}
"""T5-Large to MQA at proportion 0.05, by conversion method (read off, within 0.01)."""

FIGURE_5_MARK: Mark = "D"
FIGURE_5 = {
    "MHA": {0.0: 57.54, 0.05: 57.54, 0.1: 57.54},
    "GQA-8": {0.0: 56.72, 0.05: 57.41, 0.1: 57.57},
    "MQA": {0.0: 53.93, 0.05: 56.92, 0.1: 57.15},
}
"""XXL, mean of CNN/DailyMail, Multi-News and TriviaQA by proportion (read off, within 0.02)."""

FIGURE_6_MARK: Mark = "D"
FIGURE_6 = {1: 0.49, 4: 0.48, 8: 0.52, 16: 0.59, 32: 0.80, 64: 2.53}
"""XXL, seconds per sample by number of KV heads, input 2048, output 512 (read off, within 0.01)."""


def speedup(model: str) -> float:
    """Time of MHA-XXL over time of `model`, from Table 1."""
    return TABLE_1["MHA-XXL"].seconds_per_sample / TABLE_1[model].seconds_per_sample


def closure_by_printed_averages() -> float:
    """Share of the MQA-to-MHA gap that GQA-8-XXL closes, per cent, by the averages as printed."""
    return gap_closure(*(TABLE_1[model].printed_average for model in ("MHA-XXL", "MQA-XXL", "GQA-8-XXL")))


def closure_by_row_means() -> float:
    """The same by the means of the rows: the printed MQA average (46.6) is not the mean of its own row (46.76)."""
    return gap_closure(*(TABLE_1[model].average for model in ("MHA-XXL", "MQA-XXL", "GQA-8-XXL")))
