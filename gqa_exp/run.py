"""gqa-run: one point, or with -m a sweep; at its end one timing job and the report."""

import logging
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from analysis.report import write_report
from gqa_exp.cli import PARALLEL_LAUNCHER, run_hydra, sweep_points
from gqa_exp.config import Config
from gqa_exp.errors import command
from gqa_exp.host import check_launch, first_process, prepare, quiet_libraries
from gqa_exp.pipeline.closing import close
from gqa_exp.pipeline.plan import Plan
from gqa_exp.pipeline.point import results_folder, run_point, store_of

logger = logging.getLogger(__name__)

_plans: dict[str, Plan] = {}
"""The plan of the sweep in progress in this process, by output folder."""
_closing_errors: list[Exception] = []
"""Hydra turns a callback's exceptions into warnings; here they wait until Hydra is done, to be raised."""


def run(config: Config) -> None:
    """Compute one point; a single one is timed against MHA and reported at once, a sweep when it ends.

    Raises:
        InputError: bad input.
    """
    check_launch(config.trainer)
    prepare(config.trainer.threads)
    if not first_process():
        logging.getLogger("gqa_exp").setLevel(logging.WARNING)
    quiet_libraries()
    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    points = list(sweep_points) if in_sweep and sweep_points else [config]
    if config.output not in _plans:
        _plans[config.output] = Plan(points, store_of(config))
        logger.info("%s", _plans[config.output].describe(len(points)))
    plan = _plans[config.output]
    run_point(config, plan)
    if not in_sweep:
        _close(points, plan)


def _close(points: list[Config], plan: Plan) -> None:
    if not first_process():
        return
    close(points, plan)
    results = results_folder(points[0])
    plot = write_report(results, results / "report")
    logger.info("report: %s, plot: %s", plot.parent, plot)


class CloseSweep(Callback):
    """Hydra callback: times all architectures of a finished sweep and writes its report."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra after the last point."""
        points = list(sweep_points)
        launched_here = config.hydra.launcher._target_ == PARALLEL_LAUNCHER
        if not points or not (launched_here or points[0].output in _plans):  # jobs were launched elsewhere, or none
            return
        try:
            if launched_here:
                prepare(points[0].trainer.threads)
                quiet_libraries()
            _close(points, _plans.get(points[0].output) or Plan(points, store_of(points[0])))
        except Exception as error:
            _closing_errors.append(error)


@command
def main() -> None:
    """The command."""
    run_hydra(run)
    for error in _closing_errors:
        raise error


if __name__ == "__main__":
    # Under its own name, by which Hydra finds callbacks: what they share with a run is in the module.
    from gqa_exp.run import main as main_of_the_module

    main_of_the_module()
