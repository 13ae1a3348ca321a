"""The store: what a stage computed, under a key of all that can change it, so that nothing is computed twice.

A folder `STAGE/KEY` appears whole (written aside, then renamed) and never changes. A lock per key lets any number of
processes share a store; `partial/STAGE-KEY` keeps what an interrupted stage resumes from.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from gqa_exp.errors import InputError
from gqa_exp.host import first_process
from gqa_exp.results import write_atomically
from gqa_exp.timing.environment import environment
from gqa_exp.training.loop import Diverged

logger = logging.getLogger(__name__)

STAGE_FILE = "stage.json"
RUN_NAMES = ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "SLURM_JOB_ID")
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
"""What launchers set in the environment of all ranks alike; together the name of one attempt at a run."""


def key_of(facts: dict[str, Any]) -> str:
    """A short hash of facts in canonical form: order of fields does not count, and 0.05 = 5e-2, 1 = 1.0."""

    def canonical(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): canonical(entry) for name, entry in value.items()}
        if isinstance(value, list | tuple):
            return [canonical(entry) for entry in value]
        if isinstance(value, float) and value.is_integer():
            return int(value)
        return value

    text = json.dumps(canonical(facts), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Stage:
    """A stage of one point: its name, its key, and the facts the key was made of."""

    name: str
    key: str
    facts: dict[str, Any]


class Store:
    """Stage outputs under one folder.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            for folder in (root, root / "locks", root / "partial"):
                folder.mkdir(parents=True, exist_ok=True)
            probe = root / "locks" / f".{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"{root}: the store cannot be written ({error.strerror}); choose another output"
            ) from error

    def folder(self, stage: Stage) -> Path:
        """Where the stage's output is, or will be."""
        return self.root / stage.name / stage.key

    def partial(self, stage: Stage) -> Path:
        """Where the stage keeps what it resumes from."""
        return self.root / "partial" / f"{stage.name}-{stage.key}"

    def holds(self, stage: Stage) -> bool:
        """Whether the stage has been computed."""
        return (self.folder(stage) / STAGE_FILE).exists()

    def record(self, stage: Stage) -> dict[str, Any]:
        """What the stage left beside its output: facts, seconds, environment, and what its function returned."""
        record: dict[str, Any] = json.loads((self.folder(stage) / STAGE_FILE).read_text(encoding="utf-8"))
        return record

    def obtain(self, stage: Stage, compute: Callable[[Path], dict[str, Any]], together: bool = False) -> Path:
        """The stage's folder, computed by `compute(folder)` unless the store holds it.

        Of the ranks of one run only the first locks and writes; the others wait for what it leaves.

        Args:
            stage: which.
            compute: writes the output into the folder it is given; what it returns is kept in the record.
            together: all ranks take part in the computation.

        Raises:
            Diverged: the stage diverged, now or when it was computed.
        """
        folder = self.folder(stage)
        if not first_process():
            self._follow(stage, compute, together)
            return self._outcome(stage)
        with FileLock(self.root / "locks" / f"{stage.name}-{stage.key}.lock"):
            if not self.holds(stage):
                self._compute(stage, folder, compute)
        return self._outcome(stage)

    def _outcome(self, stage: Stage) -> Path:
        outcome = self.record(stage)["outcome"]
        if "diverged_at_step" in outcome:
            raise Diverged(stage.name, outcome["diverged_at_step"])
        return self.folder(stage)

    def _follow(self, stage: Stage, compute: Callable[[Path], dict[str, Any]], together: bool) -> None:
        """What a rank other than the first does: its part if the first one computes, and wait.

        If the first one fails, the launcher ends the others.
        """
        joined = False
        while not self.holds(stage):
            if together and not joined and self._begun(stage).exists():
                joined = True
                with suppress(Diverged):
                    compute(self.folder(stage))
            time.sleep(0.1)

    def _begun(self, stage: Stage) -> Path:
        """Exists while the first rank of this run computes a stage; another run's says nothing to these ranks."""
        run = "-".join(os.environ.get(name, "") for name in (*RUN_NAMES, *RESTART_COUNTS))
        return self.root / "locks" / f"{stage.name}-{stage.key}.{run}.begun"

    def agree(self, stage: Stage, choose: Callable[[], str]) -> str:
        """What the first of the ranks that compute a stage together chooses; the others wait for it, and follow.

        What is in the store may change between the looks of two ranks, and what they do must not.

        Raises:
            Diverged: the first one found that the stage diverges.
        """
        agreed = self._begun(stage).with_suffix(".agreed")
        if first_process():
            choice = choose()
            write_atomically(agreed, choice)
            return choice
        while True:
            if self.holds(stage):  # the first one is through already, since it had only to say that this diverges
                self._outcome(stage)
            with suppress(FileNotFoundError):
                return agreed.read_text(encoding="utf-8")
            time.sleep(0.1)

    def _compute(self, stage: Stage, folder: Path, compute: Callable[[Path], dict[str, Any]]) -> None:
        aside = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        aside.mkdir(parents=True)
        began = time.perf_counter()
        begun = self._begun(stage)
        begun.with_suffix(".agreed").unlink(missing_ok=True)  # of a run that was killed
        begun.touch()
        try:
            try:
                outcome = compute(aside)
            except Diverged as diverged:
                outcome = {"diverged_at_step": diverged.step}
            record = {
                "stage": stage.name,
                "key": stage.key,
                "facts": stage.facts,
                "outcome": outcome,
                "seconds": round(time.perf_counter() - began, 3),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "environment": environment(),
            }
            (aside / STAGE_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            begun.unlink(missing_ok=True)
            begun.with_suffix(".agreed").unlink(missing_ok=True)
        for pattern in (f"{stage.name}-{stage.key}*", f".{stage.name}-{stage.key}*"):  # the latter of interrupted saves
            for leftover in (self.root / "partial").glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)
