"""The number formats that "auto" stands for."""

import dataclasses

import pytest

from gqa_exp import host
from gqa_exp.cli import compose
from gqa_exp.config import Config


def formats(config: Config) -> tuple[str, str, str]:
    return config.trainer.precision, config.evaluation.dtype, config.timing.dtype


@pytest.mark.parametrize(
    ("supported", "expected"),
    [(True, ("bf16-mixed", "bfloat16", "bfloat16")), (False, ("32-true", "float32", "float32"))],
)
def test_auto_is_what_the_host_computes(
    supported: bool, expected: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert formats(Config()) == ("auto", "auto", "auto")
    monkeypatch.setattr(host, "supports_dtype", lambda dtype, device: supported or dtype == "float32")
    assert formats(compose([])) == expected  # resolved before any key is computed
    assert formats(compose(["+sweeps=demo"])) == expected


def test_a_chosen_format_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "supports_dtype", lambda dtype, device: dtype == "float32")
    chosen = ["trainer.precision=bf16-mixed", "evaluation.dtype=float16", "timing.dtype=bfloat16"]
    assert formats(compose(chosen)) == ("bf16-mixed", "float16", "bfloat16")


def test_resolving_twice_changes_nothing() -> None:
    config = compose([])
    before = dataclasses.asdict(config)
    host.resolve_number_formats(config)
    assert dataclasses.asdict(config) == before
