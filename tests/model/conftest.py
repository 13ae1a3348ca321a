import pytest

from gqa_exp.model import sequence


@pytest.fixture
def calls(monkeypatch):
    """Names of the kernels for whole sequences that a test calls, in order."""
    made, kernel = [], sequence._kernel
    monkeypatch.setattr(sequence, "_kernel", lambda name: made.append(name) or kernel(name))
    return made
