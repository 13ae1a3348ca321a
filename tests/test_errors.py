"""How a command ends when the world is not as it should be."""

import errno
import os

import pytest
from safetensors import SafetensorError

from gqa_exp.errors import InputError, command


def end(error: BaseException) -> int | None:
    """The exit code of a command that meets an error."""

    @command
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        main()
    code = stopped.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/store/cache/train.npy"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert end(error) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the disk is full; free space" in line
    assert isinstance(error, SafetensorError) or "runs/store/cache/train.npy" in line


def test_bad_input_is_one_line_and_ctrl_c_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert end(InputError("num_kv_heads=3:\n use 1, 2, 4 or 8")) == 2
    assert end(KeyboardInterrupt()) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: num_kv_heads=3: use 1, 2, 4 or 8"
    assert "the same command resumes" in second


def test_other_errors_keep_their_traceback() -> None:
    @command
    def main() -> None:
        raise OSError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        main()
