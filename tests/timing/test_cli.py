import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from gqa_exp.errors import InputError
from gqa_exp.model import T5, T5Config
from gqa_exp.model.checkpoint import save
from gqa_exp.results import TIME_FIELDS
from gqa_exp.timing import cli
from gqa_exp.timing.cli import main, read_model_config

GEOMETRY = {
    "name": "tiny",
    "d_model": 16,
    "d_ff": 32,
    "num_heads": 4,
    "head_dim": 4,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "vocab_size": 128,
}
QUICK = ["--batch-size=2", "--source-length=6", "--output-length=3", "--min-rounds=2", "--min-seconds=0"]


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(GEOMETRY))
    monkeypatch.setattr(cli, "MODELS", folder)
    monkeypatch.setattr(read_model_config, "__defaults__", (folder,))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gqa-time", *QUICK, *arguments])
    main()


def test_table_file_and_one_json_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--model=tiny", "--num-kv-heads", "1", "4", "4,2", f"--output={tmp_path}")
    printed = capsys.readouterr().out
    assert "Not quality-checked" in printed
    line = json.loads(printed.splitlines()[-1])
    assert line["quality"] == "not quality-checked"
    assert line["reference"] == "MHA"
    assert set(line["variants"]) == {"MHA", "MQA", "GQA-[4,2]"}
    assert set(TIME_FIELDS) < set(line["variants"]["MQA"])
    path = Path(line["file"])
    assert path.parent == tmp_path / "times"
    record = json.loads(path.read_text())
    assert len(record["raw"]["end_to_end"]["rounds"]) == 2
    assert record["models"]["MQA"]["num_kv_heads"] == [1, 1]


def test_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    for name, heads in (("a", 4), ("b", 1)):
        geometry = {key: value for key, value in GEOMETRY.items() if key != "name"}
        save(T5(T5Config(**geometry, num_kv_heads=heads)), tmp_path / name)
    run(monkeypatch, f"--checkpoint=a={tmp_path}/a", f"--checkpoint=b={tmp_path}/b", f"--output={tmp_path}/out")
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["reference"] == "a"
    assert line["variants"]["b"]["decode_step_bytes"] < line["variants"]["a"]["decode_step_bytes"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model=tiny", "--batch-size=0"], "timing.batch_size=0"),
        (["--model=tiny", "--source-length=0"], "timing.source_length=0"),
        (["--model=tiny", "--output-length=-1"], "timing.output_length=-1"),
        (["--model=tiny", "--batch-size=many"], "invalid int value"),
        (["--model=tiny", "--dtype=bfloat"], 'did you mean "bfloat16"'),
        (["--model=tiny", "--num-kv-heads", "3"], "does not divide"),
        (["--model=tiny", "--num-kv-heads", "0"], "does not divide"),
        (["--model=tiny", "--num-kv-heads", "8"], "does not divide"),
        (["--model=tiny", "--num-kv-heads", "two"], "must be an int"),
        (["--model=tiny", "--num-kv-heads", "4,4,4"], "2 layers"),
        (["--model=tinny"], 'did you mean "tiny"'),
        (["--model=tiny", "--reference=MQA"], "not among the variants"),
        (["--num-kv-heads", "2"], "needs --model"),
        (["--checkpoint=nowhere"], "NAME=DIR"),
        (["--checkpoint=a=/nowhere/at/all"], "/nowhere/at/all"),
        ([], "nothing to time"),
        (["--threads=0", "--model=tiny"], "threads=0"),
        (["--no-such-option"], "--help"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments, f"--output={tmp_path}/out")
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert said in message


def test_unwritable_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--model=tiny", f"--output={tmp_path}/file")
    assert ended.value.code == 2
    assert "cannot write to the output folder" in capsys.readouterr().err


def test_a_file_that_is_no_geometry(models: Path) -> None:
    (models / "odd.yaml").write_text("layers: 3\n")
    with pytest.raises(InputError, match=r"odd\.yaml"):
        read_model_config("odd", models)
