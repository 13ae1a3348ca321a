import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gqa_exp.convert import convert_checkpoint, main
from gqa_exp.errors import InputError
from gqa_exp.model import T5, T5Config, convert
from gqa_exp.model.checkpoint import content_hash, load, load_hf, save, save_hf
from gqa_exp.training.adafactor import Adafactor, load_named_slots, named_slots
from gqa_exp.training.state import TrainingState

HEADS, HEAD_DIM, D_MODEL, LAYERS = 4, 32, 128, 2
CONFIG = T5Config(
    vocab_size=128,
    d_model=D_MODEL,
    d_ff=32,
    num_heads=HEADS,
    head_dim=HEAD_DIM,
    num_encoder_layers=1,
    num_decoder_layers=LAYERS,
)
K_WEIGHT = "decoder.layers.1.cross_attention.k.weight"


def train_one_step(state: TrainingState) -> Adafactor:
    """Adafactor with the state's slots, after one step on a fixed batch."""
    optimizer = Adafactor(state.model.parameters())
    load_named_slots(optimizer, state.model.named_parameters(), state.slots)
    ids = torch.arange(2, 14).reshape(2, 6)
    state.model(ids, ids).logsumexp(-1).mean().backward()
    optimizer.step()
    return optimizer


@pytest.fixture(scope="module")
def trained() -> TrainingState:
    """A base after one real optimizer step: its slots are what training leaves, not what this test makes up."""
    torch.manual_seed(0)
    state = TrainingState(T5(CONFIG), step=7, record={"tokens": 1234, "loss": [6.5, 6.25]})
    optimizer = train_one_step(state)
    state.slots = named_slots(optimizer, state.model.named_parameters())
    state.model.zero_grad()
    return state


@pytest.fixture
def source(tmp_path: Path, trained: TrainingState) -> Path:
    trained.save(tmp_path / "source")
    return tmp_path / "source"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gqa-convert", *map(str, arguments)])
    main()


def test_the_command_writes_a_checkpoint_that_trains_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    run(monkeypatch, source, tmp_path / "new" / "target", "--num-kv-heads=4,2")
    state = TrainingState.load(tmp_path / "new" / "target")
    assert state.model.config.kv_heads == (4, 2)
    assert (state.step, state.record) == (7, {"tokens": 1234, "loss": [6.5, 6.25]})
    pairs = load_file(source / "model.safetensors")[K_WEIGHT].reshape(2, 2, HEAD_DIM, D_MODEL)
    torch.testing.assert_close(
        dict(state.model.named_parameters())[K_WEIGHT].detach(), pairs.mean(1).reshape(-1, D_MODEL)
    )
    train_one_step(state)  # refuses slots that do not fit the converted model
    printed = capsys.readouterr().out
    assert printed.count("4 to 4") == printed.count("4 to 2") == 2
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["target"], "something was left aside"


def test_manifest(source: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(source, tmp_path / "mean", 2, "mean", seed=5)
    convert_checkpoint(source, tmp_path / "random", [4, 1], "random", seed=5, slots="reset")
    mean, random = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("mean", "random"))
    assert mean["source_hash"] == random["source_hash"] == content_hash(source)
    assert (mean["method"], mean["num_kv_heads"], mean["seed"], mean["optimizer_slots"]) == (
        "mean",
        [2, 2],
        None,
        "pool",
    )
    assert (random["method"], random["num_kv_heads"], random["seed"]) == ("random", [4, 1], 5)
    assert random["optimizer_slots"] == "reset"
    assert mean["versions"]["torch"] == torch.__version__
    assert [(row["layer"], row["site"], row["k_error"]) for row in mean["report"]] == [
        (row.layer, row.site, row.k_error) for row in report
    ]
    # independent heads of equal size: their mean of two keeps half of the squared norm
    assert mean["report"][0]["k_error"] == pytest.approx(0.5**0.5, abs=0.05)
    assert random["report"][0]["k_error"] == 0


def test_equal_number_of_heads_changes_nothing(source: Path, tmp_path: Path) -> None:
    for method in ("mean", "first", "random"):
        for slots in ("pool", "reset"):
            target = tmp_path / f"{method}-{slots}"
            convert_checkpoint(source, target, HEADS, method, slots=slots)
            for name in ("model.safetensors", "optimizer.safetensors"):
                assert (target / name).read_bytes() == (source / name).read_bytes()


def test_slots_are_pooled_or_reset(source: Path, tmp_path: Path) -> None:
    old = load_file(source / "optimizer.safetensors")
    for slots in ("pool", "reset"):
        convert_checkpoint(source, tmp_path / slots, 1, slots=slots)
    pooled = load_file(tmp_path / "pool" / "optimizer.safetensors")
    reset = load_file(tmp_path / "reset" / "optimizer.safetensors")
    # second moments of a sum of independent gradients add up: of all four heads, element by element
    row, col = old[f"{K_WEIGHT}.row"], old[f"{K_WEIGHT}.col"]
    moments = (row[:, None] * col[None, :] / row.mean()).reshape(HEADS, HEAD_DIM, D_MODEL).sum(0)
    torch.testing.assert_close(pooled[f"{K_WEIGHT}.full"], moments)
    assert int(pooled[f"{K_WEIGHT}.step"]) == 1
    assert not [name for name in reset if name.startswith(K_WEIGHT)]
    kept = [name for name in old if "decoder" not in name or not name.split(".weight")[0].endswith((".k", ".v"))]
    assert len(kept) > 10
    for name in kept:
        assert torch.equal(old[name], pooled[name])
        assert torch.equal(old[name], reset[name])


def test_weights_alone(trained: TrainingState, tmp_path: Path) -> None:
    save(trained.model, tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "target", 1, "first")
    names = {path.name for path in (tmp_path / "target").iterdir()}
    assert names == {"config.json", "model.safetensors", "manifest.json"}
    assert json.loads((tmp_path / "target" / "manifest.json").read_text())["optimizer_slots"] is None
    first = dict(trained.model.named_parameters())[K_WEIGHT][:HEAD_DIM]
    assert torch.equal(dict(load(tmp_path / "target").named_parameters())[K_WEIGHT], first)


def test_from_transformers_with_weights_in_two_files(trained: TrainingState, source: Path, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    save_hf(trained.model, hf)
    weights = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    names = sorted(weights)
    for part, keys in enumerate((names[::2], names[1::2]), 1):
        save_file({key: weights[key] for key in keys}, hf / f"model-{part:05}-of-00002.safetensors")
    convert_checkpoint(hf, tmp_path / "one", 2, from_hf=True)
    convert_checkpoint(source, tmp_path / "ours", 2)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "ours" / "model.safetensors"
    ).read_bytes()
    weights[names[-1]] += 1
    save_file({key: weights[key] for key in names[1::2]}, hf / "model-00002-of-00002.safetensors")
    save_file({key: weights[key] for key in names[::2]}, hf / "model-00001-of-00002.safetensors")
    convert_checkpoint(hf, tmp_path / "two", 2, from_hf=True)
    hashes = {json.loads((tmp_path / name / "manifest.json").read_text())["source_hash"] for name in ("one", "two")}
    assert len(hashes) == 2, "the hash does not see the weights"


def test_to_transformers_and_back_with_the_tokenizer(
    trained: TrainingState, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "spiece.model").write_bytes(b"pieces")
    run(monkeypatch, source, tmp_path / "hf", "--num-kv-heads=2", "--to-hf")
    run(monkeypatch, tmp_path / "hf", tmp_path / "ours", "--from-hf")
    expected, found = convert(trained.model, 2), load(tmp_path / "ours")
    assert found.config == expected.config
    for name, weight in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    assert (tmp_path / "ours" / "spiece.model").read_bytes() == b"pieces"
    assert not (tmp_path / "hf" / "optimizer.safetensors").exists()
    run(monkeypatch, tmp_path / "ours", tmp_path / "plain", "--to-hf", "--expand")
    plain = load_hf(tmp_path / "plain")
    assert plain.config.kv_heads == (HEADS, HEADS)
    ids = torch.arange(2, 14).reshape(2, 6)
    torch.testing.assert_close(plain(ids, ids), found(ids, ids))


def truncated(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "optimizer.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()


def of_another_geometry(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "d_ff": 64}))


def with_foreign_slots(folder: Path) -> None:
    save_file({f"{K_WEIGHT}.row": torch.ones(3)}, folder / "optimizer.safetensors")


def from_transformers(folder: Path) -> None:
    model = load(folder)
    shutil.rmtree(folder)
    save_hf(model, folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "no such checkpoint folder"),
        (lambda folder: truncated(folder, "model.safetensors"), "truncated"),
        (lambda folder: truncated(folder, "optimizer.safetensors"), "truncated"),
        (lambda folder: truncated(folder, "training.json"), "training record"),
        (lambda folder: (folder / "training.json").unlink(), "training record"),
        (pickled, "pickled weights"),
        (of_another_geometry, "another geometry|asks for"),
        (with_foreign_slots, "optimizer slot"),
        (from_transformers, "--from-hf"),
    ],
)
def test_bad_source(
    spoil: Callable[[Path], object],
    said: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(source)
    refused(monkeypatch, capsys, said, source, tmp_path / "target", "--num-kv-heads=2")
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-kv-heads=3"], "does not divide"),
        (["--num-kv-heads=0"], "does not divide"),
        (["--num-kv-heads=8"], "does not divide"),
        (["--num-kv-heads=two"], "must be an int"),
        (["--num-kv-heads=4,2,1"], "2 layers"),
        (["--num-kv-heads=2", "--method=maen"], 'did you mean "mean"'),
        (["--num-kv-heads=2", "--slots=pol"], 'did you mean "pool"'),
        (["--num-kv-heads=2", "--seed=-1"], "seed=-1"),
        (["--num-kv-heads=2", "--from-hf"], "model_type=None does not fit"),
        (["--num-kv-heads=2", "--expand"], "together with --to-hf"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    said: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused(monkeypatch, capsys, said, source, tmp_path / "target", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str, *arguments: str | Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert any(each in message for each in said.split("|")), message


def test_more_heads_than_the_source_has(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "one", 1)
    with pytest.raises(InputError, match="1 KV heads"):
        convert_checkpoint(tmp_path / "one", tmp_path / "two", 2)


def test_a_target_in_use_is_kept(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    convert_checkpoint(source, target, 2)
    first = (target / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        convert_checkpoint(source, target, 1)
    with pytest.raises(InputError, match="does not divide"):
        convert_checkpoint(source, target, 3, overwrite=True)
    assert (target / "model.safetensors").read_bytes() == first
    convert_checkpoint(source, target, 1, overwrite=True)
    assert load(target).config.kv_heads == (1, 1)
    (target / "thesis.txt").touch()
    with pytest.raises(InputError, match=r"thesis\.txt"):
        convert_checkpoint(source, target, 2, overwrite=True)
    assert (target / "thesis.txt").exists()


def test_a_failed_swap_leaves_the_old_target(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    convert_checkpoint(source, target, 2)
    rename = Path.rename

    def fails_on_the_new_one(path: Path, to: Path) -> Path:
        if path.name == "new" and to.name == "target":
            raise OSError("no space left")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fails_on_the_new_one)
    with pytest.raises(InputError, match="no space left"):
        convert_checkpoint(source, target, 1, overwrite=True)
    assert load(target).config.kv_heads == (2, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_targets_that_cannot_be(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        convert_checkpoint(source, tmp_path / "file", 2)
    with pytest.raises(InputError, match="cannot be written"):
        convert_checkpoint(source, tmp_path / "file" / "target", 2)
    for around in (source, tmp_path):
        with pytest.raises(InputError, match="holds the source"):
            convert_checkpoint(source, around, 2, overwrite=True)
    (tmp_path / "empty").mkdir()
    convert_checkpoint(source, tmp_path / "empty", 2)
    assert load(tmp_path / "empty").config.kv_heads == (2, 2)
