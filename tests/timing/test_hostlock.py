import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from gqa_exp.errors import InputError
from gqa_exp.timing import hostlock
from gqa_exp.timing.hostlock import lock_path, timing_alone, training_allowed

HOLD = """
import sys
from gqa_exp.timing.hostlock import {mode}
with {mode}():
    print("held", flush=True)
    sys.stdin.readline()
"""


class Process:
    """Another process that enters a lock and stays until told to go."""

    def __init__(self, mode: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(HOLD.format(mode=mode))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # A lock that does not do its work must fail the test, not hang it.
        self.limit = threading.Timer(20, self.process.kill)
        self.limit.start()

    def wait_until_held(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def waiting_line(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def end(self) -> None:
        self.process.communicate("go\n")
        self.limit.cancel()


@pytest.mark.parametrize(
    ("first", "second"),
    [("training_allowed", "timing_alone"), ("timing_alone", "training_allowed"), ("timing_alone", "timing_alone")],
)
def test_timing_excludes_across_processes(first: str, second: str) -> None:
    with getattr(hostlock, first)():
        other = Process(second)
        assert "waiting for" in other.waiting_line()
        assert other.process.poll() is None
    other.wait_until_held()
    other.end()


def test_trainings_share_the_host() -> None:
    with training_allowed():
        other = Process("training_allowed")
        other.wait_until_held()
        other.end()


def test_a_crash_releases_the_lock() -> None:
    other = Process("timing_alone")
    other.wait_until_held()
    other.process.kill()
    other.end()
    with training_allowed():
        pass


def test_nesting_releases_at_the_outermost_exit() -> None:
    with training_allowed():
        with training_allowed():
            pass
        other = Process("timing_alone")
        assert "waiting for" in other.waiting_line()
        with pytest.raises(RuntimeError, match="inside each other"), timing_alone():
            pass
    other.wait_until_held()
    other.end()


def test_threads_exclude_each_other_too() -> None:
    order: list[str] = []

    def train() -> None:
        with training_allowed():
            order.append("training")

    with timing_alone():
        thread = threading.Thread(target=train)
        thread.start()
        time.sleep(0.1)
        order.append("timing")
    thread.join()
    assert order == ["timing", "training"]


def test_a_forked_child_does_not_release_its_parent_s_lock() -> None:
    held = timing_alone()
    held.__enter__()
    child = os.fork()
    if child == 0:  # leaves the context, as a data worker does that unwinds
        held.__exit__(None, None, None)
        os._exit(0)
    os.waitpid(child, 0)
    other = Process("training_allowed")
    assert "waiting for" in other.waiting_line()
    held.__exit__(None, None, None)
    other.wait_until_held()
    other.end()


def test_an_unusable_lock_file_is_bad_input() -> None:
    Path(lock_path()).symlink_to("elsewhere")
    with pytest.raises(InputError, match="host lock"), training_allowed():
        pass
