"""One lock per host, so that nothing is timed while something trains.

A training run beside a timing run would be measured as slowness of whichever variant happened to run then. Training
therefore holds this lock shared (any number of trainings at once), timing holds it alone. The kernel keeps it
(`flock`): it reaches every process on the host, and a process that crashes gives it back. It is not fair: a timing job
waits until no training is running, however many start meanwhile.
"""

import fcntl
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gqa_exp.errors import InputError


@dataclass
class _Held(threading.local):
    """What this thread holds; every thread opens the file for itself, so threads exclude each other as processes do."""

    mode: int = 0
    depth: int = 0


_held = _Held()


def lock_path() -> Path:
    """The lock's file: in the system's temporary folder, the same for every user and checkout on this host."""
    return Path(tempfile.gettempdir()) / "gqa_exp.host.lock"


@contextmanager
def training_allowed() -> Iterator[None]:
    """Hold the host for training: shared with other trainings, never with timing. May be nested.

    Raises:
        InputError: the lock's file cannot be opened.
        RuntimeError: entered inside `timing_alone` by the same thread, which would wait for itself forever.
    """
    with _hold(fcntl.LOCK_SH, "a timing run on this host to end before training"):
        yield


@contextmanager
def timing_alone() -> Iterator[None]:
    """Hold the host for timing: no training and no other timing meanwhile. May be nested.

    Raises:
        InputError: the lock's file cannot be opened.
        RuntimeError: entered inside `training_allowed` by the same thread, which would wait for itself forever.
    """
    with _hold(fcntl.LOCK_EX, "all training and timing on this host to end before timing"):
        yield


@contextmanager
def _hold(mode: int, awaited: str) -> Iterator[None]:
    if _held.depth:
        if _held.mode != mode:
            raise RuntimeError("training and timing cannot hold the host inside each other; end one first")
        _held.depth += 1
        try:
            yield
        finally:
            _held.depth -= 1
        return
    handle, owner = _open(lock_path()), os.getpid()
    try:
        try:
            fcntl.flock(handle, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for {awaited} (lock {lock_path()})", file=sys.stderr, flush=True)
            fcntl.flock(handle, mode)
        _held.mode, _held.depth = mode, 1
        yield
    finally:
        _held.mode, _held.depth = 0, 0
        if os.getpid() == owner:
            # Closing alone would leave the lock to forked children (data workers), which hold the file open too.
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _open(path: Path) -> int:
    """Open the lock's file, creating it if need be. Reading is enough to lock it, so its owner does not matter."""
    try:
        try:
            # Without O_CREAT first: kernels refuse O_CREAT on another user's file in a sticky folder.
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise InputError(
            f"cannot open the host lock {path} ({error.strerror}); make the temporary folder writable (TMPDIR)"
        ) from error
