"""Pre-training of a base: what it starts from, and what its record says of reading."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import DummyLogger

from gqa_exp import pretrain as pretrain_command
from gqa_exp.config import Config
from gqa_exp.data.corpus import heldout_batches
from gqa_exp.data.tokenizer import default_tokenizer
from gqa_exp.errors import InputError
from gqa_exp.model import T5
from gqa_exp.model.checkpoint import load
from gqa_exp.training import pretrain
from gqa_exp.training.state import TrainingState

SETTINGS = {
    "model": {"d_model": 32, "d_ff": 16, "num_heads": 2, "head_dim": 16, "vocab_size": 8192},
    "corpus": {"input_length": 32, "target_length": 8},
    "pretrain": {"steps": 6, "batch_size": 4},
    "trainer": {"precision": "32-true", "compile": False, "threads": 1},
}


@pytest.fixture
def config() -> Config:
    """A tiny base on a tiny corpus."""
    config = Config()
    for group, fields in SETTINGS.items():
        for name, value in fields.items():
            setattr(getattr(config, group), name, value)
    config.model.num_encoder_layers = config.model.num_decoder_layers = 1
    return config


@pytest.fixture
def heldout(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Random text in place of the embedded one: two sources held out, one shorter than a window."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(pretrain, "read_corpus", lambda *_: rng.integers(2, 8000, 2000))
    tokens = {"one": rng.integers(2, 8000, 400), "two": rng.integers(2, 8000, 300), "short": rng.integers(2, 8000, 9)}
    monkeypatch.setattr(pretrain, "heldout_tokens", lambda *_: tokens)
    monkeypatch.setattr(pretrain, "HELDOUT_EVERY", 4)
    return tokens


def nll(model: T5, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean cross-entropy, sample by sample."""
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(x[None], model.shift_right(y[None]))[0], y)
            for x, y in zip(inputs, labels, strict=True)
        ]
    return float(torch.stack(losses).mean())


def test_the_record_tells_the_heldout_loss_and_what_other_inputs_make_of_it(config, heldout, tmp_path: Path) -> None:
    state = pretrain.pretrain_base(config, default_tokenizer(), tmp_path / "work", tmp_path / "base")
    record = json.loads((tmp_path / "base" / "training.json").read_text())
    assert set(record["heldout_loss"]) == {"one", "two", "all"}
    [batch] = heldout_batches(heldout["one"], config.corpus, default_tokenizer(), 16)
    inputs, labels = batch["input_ids"], batch["labels"]
    assert len(inputs) > 5
    assert record["heldout_loss"]["one"] == pytest.approx(nll(state.model, inputs, labels), abs=2e-4)
    others = torch.stack([inputs[i - 1] for i in range(len(inputs))])
    assert record["heldout_exchanged_loss"]["one"] == pytest.approx(nll(state.model, others, labels), abs=2e-4)
    assert [row[0] for row in record["heldout_curve"]] == [4, 6]
    assert record["heldout_curve"][-1][1:3] == [record["heldout_loss"]["all"], record["heldout_exchanged_loss"]["all"]]
    times = [row[3] for row in record["heldout_curve"]]
    assert 0 < times[0] < times[1] == pytest.approx(record["seconds"], abs=1e-3)


def test_the_gain_of_the_last_hour_is_against_the_loss_an_hour_ago() -> None:
    curve = [[500, 5.0, 6.0], [1000, 4.0, 6.0, 900.0], [1500, 3.5, 6.0, 1800.0], [2000, 3.0, 6.0, 4500.0]]
    assert pretrain.gain_of_the_last_hour(curve) == pytest.approx(0.25)
    # half way between two looks, so half way between their losses
    assert pretrain.gain_of_the_last_hour([*curve, [2500, 3.0, 6.0, 4950.0]]) == pytest.approx(1 - 3.0 / 3.75)
    assert pretrain.gain_of_the_last_hour([*curve, [2500, 3.2, 6.0, 5400.0]]) == pytest.approx(1 - 3.2 / 3.5)
    assert pretrain.gain_of_the_last_hour(curve[:3]) is None
    assert pretrain.gain_of_the_last_hour(curve[:1]) is None


@pytest.mark.parametrize("init", ["t5", "reading"])
def test_looking_at_the_heldout_loss_changes_nothing(config, heldout, init, tmp_path: Path, monkeypatch) -> None:
    config.pretrain.init = init
    states = []
    for every in (1, 100):
        monkeypatch.setattr(pretrain, "read_corpus", lambda *_: np.arange(2000) % 700 + 2)
        monkeypatch.setattr(pretrain, "HELDOUT_EVERY", every)
        folder = tmp_path / str(every)
        states.append(pretrain.pretrain_base(config, default_tokenizer(), folder / "work", folder / "base"))
    assert_same(*states)


def assert_same(one: TrainingState, other: TrainingState) -> None:
    """Same step, weights and optimizer slots, to the bit."""
    assert one.step == other.step
    for ours, theirs in ((one.model.state_dict(), other.model.state_dict()), (one.slots, other.slots)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_run_can_be_made_longer_and_is_then_the_longer_run(config, heldout, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pretrain, "read_corpus", lambda *_: np.arange(2000) % 700 + 2)
    config.pretrain.flat_fraction = 0.5
    direct = pretrain.pretrain_base(config, default_tokenizer(), tmp_path / "direct", tmp_path / "base")
    config.pretrain.steps, config.pretrain.flat_fraction = 4, 0.75  # three flat steps, as before
    pretrain.pretrain_base(config, default_tokenizer(), tmp_path / "work", tmp_path / "short")
    config.pretrain.steps, config.pretrain.flat_fraction = 6, 0.5
    config.corpus.name = "the same under another name"
    longer = pretrain.pretrain_base(config, default_tokenizer(), tmp_path / "work", tmp_path / "long")
    assert_same(direct, longer)
    looks = [[row[:3] for row in state.record["heldout_curve"]] for state in (direct, longer)]
    assert looks[0] == looks[1]


@pytest.mark.parametrize(
    ("group", "field", "value", "message"),
    [
        ("pretrain", "init", "t5", "a run with pretrain.init=reading, not t5"),
        ("pretrain", "batch_size", 5, "a run with pretrain.batch_size=4, not 5"),
        ("pretrain", "flat_fraction", 0.9, "flat_steps=3, not 5"),
        (None, "seed", 1, "seed=0, not 1"),
        (None, "text", "other", "text="),
    ],
)
def test_a_run_is_not_continued_as_another(
    config, heldout, tmp_path: Path, monkeypatch, group, field, value, message
) -> None:
    config.pretrain.flat_fraction = 0.5
    work, base = tmp_path / "work", tmp_path / "base"
    pretrain.pretrain_base(config, default_tokenizer(), work, base)
    before = (work / "state" / "training.json").read_bytes()
    if field == "text":
        monkeypatch.setattr(pretrain, "corpus_identity", lambda *_: value)
    else:
        setattr(getattr(config, group) if group else config, field, value)
    with pytest.raises(InputError, match=message):
        pretrain.pretrain_base(config, default_tokenizer(), work, base)
    assert (work / "state" / "training.json").read_bytes() == before


def test_what_an_older_record_does_not_hold_cannot_contradict(config, heldout, tmp_path: Path) -> None:
    work, base = tmp_path / "work", tmp_path / "base"
    pretrain.pretrain_base(config, default_tokenizer(), work, base)
    path = work / "state" / "training.json"
    record = json.loads(path.read_text())
    del record["recipe"]["text"], record["recipe"]["pretrain"]["init"]
    path.write_text(json.dumps(record))
    config.pretrain.steps, config.pretrain.flat_fraction = 8, 0.0
    assert pretrain.pretrain_base(config, default_tokenizer(), work, base).step == 8


def test_a_sample_without_neighbour_is_not_exchanged() -> None:
    batch = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "labels": torch.tensor([[1], [2]])}
    alone = {name: tensor[:1] for name, tensor in batch.items()}
    exchanged = pretrain.exchange_inputs({"two": [batch], "one": [alone]})
    assert list(exchanged) == ["two"]
    assert exchanged["two"][0]["input_ids"].tolist() == [[7, 8], [5, 6]]
    assert exchanged["two"][0]["labels"].tolist() == [[1], [2]]


def test_keys_are_the_queries_only_where_the_configuration_says_so(config, heldout, tmp_path: Path) -> None:
    config.pretrain.peak_lr = 1e-8  # stays where it started
    for init in ("t5", "reading"):
        config.pretrain.init = init
        pretrain.pretrain_base(config, default_tokenizer(), tmp_path / init / "work", tmp_path / init / "base")
        attention = load(tmp_path / init / "base").decoder.layers[0].cross_attention
        q, k = (weight.detach().flatten() for weight in (attention.q.weight, attention.k.weight))
        cosine = float(F.cosine_similarity(q, k, dim=0))
        assert cosine == pytest.approx(1.0 if init == "reading" else 0.0, abs=0.1)


def test_the_command_draws_the_curves_and_tells_the_tracker(config, heldout, tmp_path: Path, monkeypatch) -> None:
    told: list[dict[str, float]] = []

    class Recorder(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            told.append(dict(metrics))

    @contextmanager
    def tracking(*_: object) -> Iterator[object]:
        yield SimpleNamespace(loggers=[Recorder()])

    monkeypatch.setattr(pretrain_command, "tracking", tracking)
    config.output = str(tmp_path)
    pretrain_command.pretrain(config)
    folder = tmp_path / "pretrain" / "mini"
    record = json.loads((folder / "base" / "training.json").read_text())
    assert [entry["pretrain/heldout_loss"] for entry in told if "pretrain/heldout_loss" in entry] == [
        row[1] for row in record["heldout_curve"]
    ]
    assert any("pretrain/loss" in entry for entry in told)
    assert f"{record['heldout_curve'][-1][1]:.3f}" in (folder / "report" / "pretraining.md").read_text()
    assert (folder / "report" / "pretraining.png").exists()
    told.clear()
    opened: list[object] = []
    monkeypatch.setattr(pretrain_command, "tracking", lambda *_: opened.append(_))
    pretrain_command.pretrain(config)  # finished: nothing to tell
    config.seed = 1
    with pytest.raises(InputError, match="seed=0, not 1"):
        pretrain_command.pretrain(config)
    assert not told
    assert not opened
