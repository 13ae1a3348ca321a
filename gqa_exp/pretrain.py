"""gqa-pretrain: train a multi-head base from text; the same command resumes an interrupted run."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.loggers import Logger

from analysis.pretraining import read_training, write_curves
from gqa_exp.cli import run_hydra
from gqa_exp.config import Config
from gqa_exp.data.tokenizer import default_tokenizer
from gqa_exp.errors import InputError, command
from gqa_exp.host import check_launch, first_process, prepare
from gqa_exp.pipeline.tracking import tracking
from gqa_exp.training.pretrain import pretrain_base

logger = logging.getLogger(__name__)


def pretrain(config: Config) -> None:
    """Pre-train `config.model` and export it under OUTPUT/pretrain/MODEL/base.

    Raises:
        InputError: bad input, or num_kv_heads given: a base is multi-head.
    """
    if config.num_kv_heads not in (None, config.model.num_heads):
        raise InputError(
            f"num_kv_heads={config.num_kv_heads}: a base is multi-head; pre-train it, then use gqa-convert"
        )
    check_launch(config.trainer)
    prepare(config.trainer.threads)
    if not first_process():
        logging.getLogger("gqa_exp").setLevel(logging.WARNING)
    work = Path(config.output) / "pretrain" / config.model.name
    export = work / "base"
    name = f"pretrain {config.model.name} seed {config.seed}"

    @contextmanager
    def loggers() -> Iterator[Sequence[Logger]]:
        with tracking(config, name, "pretrain", "pretrain", [config.model.name], str(export)) as tracker:
            yield tracker.loggers

    pretrain_base(config, default_tokenizer(), work, export, loggers)
    if not first_process():
        return
    figure = write_curves([read_training(export, config.model.name)], work / "report")
    logger.info("loss curves: %s", figure)
    logger.info("base checkpoint: %s; use it with model.base=%s", export, export)


@command
def main() -> None:
    """The command."""
    run_hydra(pretrain)


if __name__ == "__main__":
    # Under its own name, by which Hydra finds callbacks: what they share with a run is in the module.
    from gqa_exp.pretrain import main as main_of_the_module

    main_of_the_module()
