"""Synthetic results folders: rows and per-example scores whose true differences are known."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sacrebleu

from gqa_exp.results import Result, baseline_column, write_examples, write_result

TASKS = {
    "debian_synopsis": ("summarization", "rouge1"),
    "en_de": ("translation", "bleu"),
    "debian_cloze": ("question answering", "f1"),
    "debian_multi": ("summarization", "rouge1"),
}
WORDS = [f"w{n}" for n in range(50)]


def sentences(task: str, count: int) -> list[list[str]]:
    """Reference sentences of a translation task: the same for every point."""
    generator = np.random.default_rng(zlib.crc32(task.encode()))
    return [list(generator.choice(WORDS, size=12)) for _ in range(count)]


@dataclass
class Rows:
    """Writes rows into a folder; `quality` is the mean score a point should come out at, roughly."""

    folder: Path
    count: int = 120
    written: list[Result] = field(default_factory=list)

    def add(
        self,
        kv_heads: int,
        proportion: float,
        quality: float,
        task: str = "debian_synopsis",
        seed: int = 0,
        speedup: float | None = 1.0,
        examples: bool = True,
        noise_floor: float = 0.03,
        baselines: dict[str, float] | None = None,
        **changes: Any,
    ) -> Result:
        label = {8: "MHA", 1: "MQA"}.get(kv_heads, f"GQA-{kv_heads}")
        kind, metric = TASKS[task]
        key = f"{task}-{label}-{proportion:g}-{seed}-{changes.get('method', 'mean')}{changes.pop('suffix', '')}"
        frame = self._examples(task, metric, quality, seed)
        time: dict[str, Any] = {}
        if speedup is not None:
            seconds = 0.1 / speedup
            time = {
                "per_sample": seconds, "per_sample_low": 0.98 * seconds, "per_sample_high": 1.03 * seconds,
                "speedup": speedup, "speedup_low": 0.97 * speedup, "speedup_high": 1.02 * speedup,
                "noise_floor": noise_floor, "decode_step_speedup": 1.4 * speedup, "device": "cpu", "batch_size": 64,
                "source_length": 1024, "output_length": 64, "dtype": "bfloat16", "warning": None,
            }  # fmt: skip
        score = score_of(frame, metric)
        trivial: dict[str, Any] = {"lead": 30.0}
        if baselines is not None:  # with examples of their own
            for name, value in baselines.items():
                other = self._examples(task, metric, value, seed=99)
                trivial[name] = score_of(other, metric)
                for column in set(other) - {"id", "references"}:
                    frame[baseline_column(name, column)] = other[column]
        values: dict[str, Any] = {
            "key": key, "status": "done", "sweep": "demo", "label": label, "model": "mini", "task": task,
            "task_kind": kind, "num_heads": 8, "num_kv_heads": [kv_heads] * 4, "method": "mean",
            "proportion": proportion, "seed": seed, "metric": metric, "score": score, "score_low": score - 1.5,
            "score_high": score + 1.5, "num_examples": self.count, "baselines": trivial, "time": time,
            "parameters": 11_000_000 + kv_heads * 100_000, "kv_cache_bytes_per_sample": 70_000 * kv_heads,
            "environment": {"cpu": "A CPU", "gpu": None, "threads": 2}, "ended": "2026-01-01T00:00:00",
        }  # fmt: skip
        result = Result(**{**values, **changes})
        write_result(self.folder, result)
        if examples:
            write_examples(self.folder, key, frame)
        self.written.append(result)
        return result

    def _examples(self, task: str, metric: str, quality: float, seed: int) -> pd.DataFrame:
        # Difficulty belongs to the example and is shared by all points: that is what pairing is for.
        difficulty = np.random.default_rng(zlib.crc32(task.encode())).normal(0, 12, self.count)
        own = np.random.default_rng([seed, int(quality * 1000)]).normal(0, 2, self.count)
        frame = pd.DataFrame({"id": [f"{task}/{n}" for n in range(self.count)]})
        frame["prediction"], frame["references"] = "", [["reference"]] * self.count
        if metric == "bleu":
            generator = np.random.default_rng([seed, 7])
            references = sentences(task, self.count)
            keep = (quality / 100) ** 0.5
            predictions = [[w if generator.random() < keep else "x" for w in words] for words in references]
            frame["prediction"] = [" ".join(words) for words in predictions]
            frame["references"] = [[" ".join(words)] for words in references]
            pairs = zip(frame["prediction"], frame["references"], strict=True)
            frame["bleu_stats"] = [bleu_stats(prediction, reference) for prediction, reference in pairs]
        else:
            frame[metric] = np.clip(quality + difficulty + own, 0, 100)
        return frame

    def demo(self, quality: Callable[[int, float, str], float], proportions: tuple[float, ...] = (0.02,)) -> None:
        """The demo's points: three architectures at each proportion and MQA right after conversion, three tasks."""
        for task in ("debian_synopsis", "en_de", "debian_cloze"):
            for kv_heads, speedup in ((8, 1.0), (2, 1.8), (1, 2.1)):
                for proportion in proportions:
                    self.add(kv_heads, proportion, quality(kv_heads, proportion, task), task, speedup=speedup)
            self.add(1, 0.0, quality(1, 0.0, task), task, speedup=2.1)


def bleu_stats(prediction: str, references: list[str]) -> list[int]:
    score = sacrebleu.corpus_bleu([prediction], [[reference] for reference in references], tokenize="intl")
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def score_of(frame: pd.DataFrame, metric: str) -> float:
    if metric != "bleu":
        return float(frame[metric].mean())
    references = [[entry[0] for entry in frame["references"]]]
    return sacrebleu.corpus_bleu(list(frame["prediction"]), references, tokenize="intl").score


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return Rows(tmp_path / "results")
