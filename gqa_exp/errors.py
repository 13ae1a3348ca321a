"""Bad input ends a command with one clear line and exit code 2; this module is how.

Every command wraps its `main` in `command`; code below it raises `InputError` with a message that says what is wrong,
where, and what would be right.
"""

import argparse
import difflib
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

EXIT_BAD_INPUT = 2


class InputError(Exception):
    """The user's input is wrong. The message is one line: what is wrong, where, what would be right."""


def suggest(name: str, known: Iterable[str]) -> str:
    """A clause naming the known choices, the nearest one first if there is one.

    Args:
        name: what the user wrote.
        known: the names that exist.

    Returns:
        Text such as ``did you mean "mean"? (known: first, mean, random)``.
    """
    choices = sorted(known)
    nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if nearest and len(choices) > 20:
        return f'did you mean "{nearest[0]}"?'
    listing = f"known: {', '.join(choices)}" if choices else "none are known"
    return f'did you mean "{nearest[0]}"? ({listing})' if nearest else listing


def one_line(text: object) -> str:
    """The text with its line breaks and runs of spaces folded to single spaces."""
    return " ".join(str(text).split())


class Parser(argparse.ArgumentParser):
    """argparse, ending bad usage in one line as every command here does."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for bad usage.

        Raises:
            InputError: always.
        """
        raise InputError(f"{message}; see {self.prog} --help")


def disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full; safetensors has it in its text alone."""
    return getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command's main function.

    `InputError` and a full disk become one line on stderr and exit code 2, Ctrl-C exit code 1.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except InputError as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            sys.exit(EXIT_BAD_INPUT)
        except KeyboardInterrupt:
            print("interrupted; everything finished so far is kept, and the same command resumes", file=sys.stderr)
            sys.exit(1)
        except Exception as error:
            if not disk_full(error):
                raise
            where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
            print(
                f"error: {where}the disk is full; free space, or choose an output on another one. Everything finished "
                "so far is kept, and the same command goes on from there",
                file=sys.stderr,
            )
            sys.exit(EXIT_BAD_INPUT)

    return wrapped
