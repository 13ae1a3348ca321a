import pytest

from gqa_exp.model import native, sequence

CACHED = (native.library, native.linear_kernel, native.attention_kernel, native.step_kernel)


@pytest.fixture
def without_avx512(monkeypatch):
    """The kernels of a CPU that has AVX2 alone, whatever this one has."""
    if not native.has_bfloat16():
        pytest.skip("this host has those anyway, or none")
    features = " ".join(word for word in native._cpu().split() if not word.startswith(("avx512", "amx")))
    monkeypatch.setattr(native, "_cpu", lambda: features)
    monkeypatch.setattr(native, "COMPILE", (*native.COMPILE, "-mno-avx512f"))
    for cached in CACHED:
        cached.cache_clear()
    yield
    for cached in CACHED:
        cached.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """Names of the kernels for whole sequences that a test calls, in order."""
    made, kernel = [], sequence._kernel
    monkeypatch.setattr(sequence, "_kernel", lambda name: made.append(name) or kernel(name))
    return made
