"""Several points at the same time on one host, each in a process of its own: with GPUs, one point per GPU.

For models that fit one device, where a point each is faster than all devices on one. Points share stages through the
store, whose locks let only one of them compute each; those that would wait for another are started later.

python -m gqa_exp.pipeline.parallel CONFIG.json: one such process.
"""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf

from gqa_exp.config import Config
from gqa_exp.errors import EXIT_BAD_INPUT, InputError, command
from gqa_exp.host import check_launch, device_of, physical_cores, prepare, quiet_libraries
from gqa_exp.pipeline.plan import Plan
from gqa_exp.pipeline.point import run_point, store_of
from gqa_exp.pipeline.stages import Pipeline
from gqa_exp.pipeline.store import Stage, Store
from gqa_exp.training.loop import clock

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
PLANNED_PACE = 0.05
"""Share of the planned work for which the guessed pace counts beside the measured one."""


def places(accelerator: str, count: int | None) -> list[str | None]:
    """What processes run on at the same time: a GPU each, as CUDA_VISIBLE_DEVICES names it, or a share of the CPU.

    Args:
        accelerator: `trainer.accelerator` of the points.
        count: how many; None: one per GPU that is visible, or per physical core.

    Raises:
        InputError: a count that there are not GPUs for, or below 1.
    """
    on_gpu = device_of(accelerator) == "cuda"
    found: list[str | None] = [None] * (count or physical_cores())
    if on_gpu:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = [str(i) for i in range(torch.cuda.device_count())]
        found = list(gpus if named is None else named.split(",")[: len(gpus)])
    if not found or (count is not None and not 1 <= count <= len(found)):
        most = f"there are {len(found)} GPUs" if on_gpu else "it must be 1 or more"
        raise InputError(f"hydra.launcher.points={count}: {most}; without it there is one per GPU, or per CPU core")
    return found[:count]


def run_points(configs: Sequence[Config], count: int | None, folder: Path, first: int = 0) -> list[int]:
    """Compute points, as many at a time as there is room for; nothing is timed.

    Args:
        configs: the points, checked.
        count: how many at a time; see `places`.
        folder: for the configurations that the processes read, and their logs.
        first: number of the first point, by which these files are named.

    Returns:
        Exit codes, in order; -1 for points not begun, since another one was refused as bad input.

    Raises:
        InputError: a point wants several devices, or there are fewer GPUs than `count`.
    """
    for config in configs:
        if config.trainer.devices * config.trainer.num_nodes > 1:
            raise InputError(
                f"trainer.devices={config.trainer.devices}: hydra/launcher=parallel gives each point one device; "
                "leave one of the two out"
            )
    free = places(configs[0].trainer.accelerator, count)[: len(configs)]
    threads = max(1, physical_cores() // len(free))
    codes = [-1] * len(configs)
    waiting = list(range(len(configs)))
    running: dict[int, tuple[subprocess.Popen[bytes], str | None]] = {}
    pipelines = [Pipeline(config, store_of(config)) for config in configs]
    shared = [(pipeline.store, pipeline.pretrained_stage) for pipeline in pipelines]
    progress = _Progress(configs, len(free))
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        while running or waiting:
            while free and (index := _next(shared, waiting, list(running))) is not None:
                waiting.remove(index)
                place = free.pop(0)
                running[index] = (_start(configs[index], threads, place, folder / f"{first + index}.json"), place)
            for index, (process, place) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                codes[index] = code
                del running[index]
                free.append(place)
                progress.say()
                if code == EXIT_BAD_INPUT:  # the others would meet the same
                    waiting.clear()
            time.sleep(POLL_SECONDS)
    finally:
        for process, _ in running.values():
            process.send_signal(signal.SIGINT)
        for process, _ in running.values():
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return codes


def _interrupt(*_: object) -> None:
    """To be asked to end is to be interrupted: the processes are not left behind."""
    raise KeyboardInterrupt


def _next(shared: Sequence[tuple[Store, Stage]], waiting: Sequence[int], running: Sequence[int]) -> int | None:
    """The first point that need not wait for what a running one computes; `shared` is what each is fine-tuned from."""
    busy = [shared[index][1].key for index in running]
    for index in waiting:
        store, stage = shared[index]
        if stage.key not in busy or store.holds(stage):
            return index
    return None


def _start(config: Config, threads: int, gpu: str | None, path: Path) -> subprocess.Popen[bytes]:
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer))
    config.trainer.threads = config.trainer.threads or threads
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n", encoding="utf-8")
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    # In a session of its own Ctrl-C reaches it once, from here.
    words = [sys.executable, "-m", "gqa_exp.pipeline.parallel", str(path)]
    return subprocess.Popen(words, env=environment, start_new_session=True)


class _Progress:
    """How many points are done, and how long the rest will take at the pace so far."""

    def __init__(self, configs: Sequence[Config], places: int) -> None:
        self.configs, self.places, self.store = configs, places, store_of(configs[0])
        self.began, self.done = time.perf_counter(), 0
        self.plan = Plan(configs, self.store)
        self.all = self._left()
        about = clock(self.all / places)
        logger.info("%d points, %d at a time; about %s (minutes:seconds)", len(configs), places, about)

    def _left(self) -> float:
        """Seconds of one process, at first guesses; timing, which comes after, not counted."""
        for name, key in list(self.plan.work):
            if name == "time" or self.store.holds(Stage(name, key, {})):
                del self.plan.work[name, key]
        return self.plan.left()

    def say(self) -> None:
        self.done += 1
        elapsed, left = time.perf_counter() - self.began, self._left()
        about = clock(seconds_left(self.all, left, elapsed, self.places))
        logger.info(
            "-- %d of %d points done, %s elapsed, about %s left", self.done, len(self.configs), clock(elapsed), about
        )


def seconds_left(planned: float, left: float, elapsed: float, places: int) -> float:
    """How long the rest will take: at the pace so far, held to the guessed one while little is done.

    Else points that were in the store already, which take seconds and do none of the work, would make the rest endless.

    Args:
        planned: work of one process at the start, in guessed seconds.
        left: of it.
        elapsed: seconds.
        places: processes at a time.
    """
    held = PLANNED_PACE * planned
    return left * (elapsed + held / places) / (planned - left + held) if left else 0.0


@command
def main() -> None:
    """One process: the point of a configuration file, which gets a log beside it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a launcher in the background would leave it ignored
    log = logging.FileHandler(Path(sys.argv[1]).with_suffix(".log"), encoding="utf-8")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout), log]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)
    quiet_libraries()
    config = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(Config), json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    )
    assert isinstance(config, Config)
    check_launch(config.trainer)
    prepare(config.trainer.threads)
    run_point(config, Plan([config], store_of(config)))


if __name__ == "__main__":
    main()
