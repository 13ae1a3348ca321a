"""What a run has to do, and how long that will take: an estimate of what is left, corrected by every finished stage."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gqa_exp.config import Config
from gqa_exp.pipeline.stages import Pipeline
from gqa_exp.pipeline.store import Stage, Store
from gqa_exp.training.loop import clock

logger = logging.getLogger(__name__)

FIRST_GUESS = {"convert": 1.0, "uptrain": 1 / 6000, "finetune": 1 / 5000, "evaluate": 0.05, "time": 1.0}
"""Seconds per unit of work (see `_work`) before the first stage of a kind has been measured; a 2-core laptop's."""
TIMING_SECONDS = 180.0


class Plan:
    """The stages of a set of points that the store lacks, each once however many points share it.

    Args:
        configs: the points.
        store: what is there already.
    """

    def __init__(self, configs: Sequence[Config], store: Store) -> None:
        self.work: dict[tuple[str, str], float] = {}
        self.seconds: dict[str, float] = {}
        self.done: dict[str, float] = {}
        for config in configs:
            pipeline = Pipeline(config, store)
            for stage in pipeline.stages():
                if not store.holds(stage):
                    self.work[stage.name, stage.key] = _work(stage.name, config, pipeline)
        if any(config.timing.enabled for config in configs):
            self.work["time", ""] = TIMING_SECONDS
        self.total = len(self.work)
        self.began = time.perf_counter()

    def describe(self, points: int) -> str:
        """One line for the start of a run."""
        kinds = [name for name, _ in self.work]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        return f"{points} points; to do: {counts or 'nothing'}; about {clock(self.left())} (minutes:seconds)"

    def left(self) -> float:
        """Seconds of work left, at the rates measured so far."""
        return sum(work * self._rate(kind) for (kind, _), work in self.work.items())

    def _rate(self, kind: str) -> float:
        return self.seconds[kind] / self.done[kind] if self.done.get(kind) else FIRST_GUESS[kind]

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Measure a stage and report what is left after it; a stage that was not planned costs nothing."""
        began = time.perf_counter()
        yield
        work = self.work.pop((stage.name, stage.key), None)
        if work is not None:
            self.seconds[stage.name] = self.seconds.get(stage.name, 0.0) + time.perf_counter() - began
            self.done[stage.name] = self.done.get(stage.name, 0.0) + work
            logger.info(
                "-- %d of %d stages done, %s elapsed, about %s left",
                self.total - len(self.work), self.total, clock(time.perf_counter() - self.began), clock(self.left()),
            )  # fmt: skip


def _work(kind: str, config: Config, pipeline: Pipeline) -> float:
    """Units of work of a stage: tokens of training, examples of evaluation, 1 for a conversion."""
    if kind == "uptrain":
        recipe = pipeline.config  # the base's, not the given one
        tokens = recipe.corpus.input_length + recipe.corpus.target_length
        return float((pipeline.uptrain_stop - pipeline.base_step) * recipe.pretrain.batch_size * tokens)
    if kind == "finetune":
        return float(config.finetune.steps * config.finetune.batch_tokens)
    return float(config.evaluation.max_examples) if kind == "evaluate" else 1.0
