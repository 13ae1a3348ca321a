"""Weights & Biases: one run per point or base, grouped by sweep, tagged to be filtered by; offline by default."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from lightning.pytorch.loggers import Logger, WandbLogger

from gqa_exp.config import Config
from gqa_exp.host import first_process
from gqa_exp.results import Result


class Tracker:
    """Where a point reports to; does nothing when tracking is disabled."""

    def __init__(self, logger: WandbLogger | None) -> None:
        self.logger = logger

    @property
    def loggers(self) -> list[Logger]:
        """What training stages log to."""
        return [] if self.logger is None else [self.logger]

    def finish(self, result: Result) -> None:
        """Put the result row into the run's summary."""
        if self.logger is not None:
            self.logger.experiment.summary.update(
                {name: value for name, value in result.row().items() if name != "key"}
            )


@contextmanager
def tracking(config: Config, name: str, group: str, job: str, tags: Sequence[str], key: str) -> Iterator[Tracker]:
    """A W&B run for one point or one base, closed at the end.

    Args:
        config: the point; `tracking.mode` decides whether anything is written, and where to.
        name: of the run.
        group: what the dashboard shows together: a sweep.
        job: kind of run: the task, or "pretrain".
        tags: to filter by.
        key: kept in the run's configuration, to find what it left: a point's key, a base's folder.
    """
    if config.tracking.mode == "disabled" or not first_process():
        yield Tracker(None)
        return
    import wandb

    folder = Path(config.output) / "tracking"
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=config.tracking.project,
        entity=config.tracking.entity,
        mode="offline" if config.tracking.mode == "offline" else "online",
        dir=folder,
        group=group,
        job_type=job,
        name=name,
        tags=list(tags),
        config={**asdict(config), "key": key},
        settings=wandb.Settings(silent=True, console="off"),
    )
    try:
        # Each stage counts its own steps.
        for stage in ("pretrain", "uptrain", "finetune"):
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        yield Tracker(WandbLogger(experiment=run))
    finally:
        run.finish()
