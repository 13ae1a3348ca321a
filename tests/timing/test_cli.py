import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from gqa_exp.config import TimingConfig
from gqa_exp.errors import InputError
from gqa_exp.model import T5, T5Config
from gqa_exp.model.checkpoint import save
from gqa_exp.results import TIME_FIELDS
from gqa_exp.timing import cli
from gqa_exp.timing.cli import main, read_model_config
from gqa_exp.timing.geometry import bytes_needed

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
QUICK = [
    "--batch-size=2",
    "--source-length=6",
    "--output-length=3",
    "--min-rounds=2",
    "--min-seconds=0",
    "--compile=off",
]


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
        (["--model=tiny", "--depths", "1", "3"], "timing.depths=[1, 3]"),
        (["--model=tiny", "--depths", "1"], "two ascending numbers"),
        (["--model=tiny", "--depths", "deep"], "must be whole numbers"),
        (["--model=tiny", "--fills", "1", "2"], "from 1 to output_length=3"),
        (["--model=tiny", "--fills", "3", "1"], "timing.fills=[3, 1]"),
        (["--model=tiny", "--encoder-batch-size=3"], "above batch_size=2"),
        (["--model=tiny", "--cross-kv=again"], 'timing.cross_kv="again"'),
        (["--model=tiny", "--batch-size=100000000", "--source-length=100000"], "are free"),
        (["--sweep=figure66"], 'did you mean "figure6"'),
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


def test_shortcuts_are_marked_and_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], models: Path
) -> None:
    (models / "deep.yaml").write_text(
        yaml.safe_dump({**GEOMETRY, "name": "deep", "num_encoder_layers": 5, "num_decoder_layers": 5})
    )
    shortcuts = ["--depths", "1", "2", "4", "--fills", "1", "3", "--encoder-batch-size=1"]
    run(monkeypatch, "--model=deep", "--num-kv-heads", "4", "1", *shortcuts, "--prove", f"--output={tmp_path}")
    printed = capsys.readouterr().out
    assert "* composed: extended from 1, 2, 4 to 5 + 5 layers; decode steps sampled at cache fills 1, 3" in printed
    assert "MQA: composed / whole" in printed
    assert "of the line" in printed
    line = json.loads(printed.splitlines()[-1])
    assert set(line["variants"]) == {"MHA", "MHA, whole", "MQA", "MQA, whole"}
    assert line["variants"]["MQA"]["fit_error"] >= 0
    record = json.loads(Path(line["file"]).read_text())
    assert set(record["raw"]["end_to_end"]["rounds"][0]["samples"]["MQA"]) == {
        f"{phase}@{depth}" for phase in ("encode", "cross_cache", "decode_step", "memory_read") for depth in (1, 2, 4)
    }


def test_what_does_not_fit_is_extended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], models: Path
) -> None:
    deep = {**GEOMETRY, "name": "deep", "num_encoder_layers": 30, "num_decoder_layers": 30}
    (models / "deep.yaml").write_text(yaml.safe_dump(deep))
    config = TimingConfig(batch_size=2, source_length=6, output_length=3)
    names = GEOMETRY.keys() - {"name", "num_encoder_layers", "num_decoder_layers"}
    four = T5Config(**{name: GEOMETRY[name] for name in names}, num_encoder_layers=4, num_decoder_layers=4)
    monkeypatch.setattr(cli, "free_memory", lambda device: 1.2 * bytes_needed([four], config, "float32"))
    run(monkeypatch, "--model=deep", "--dtype=float32", f"--output={tmp_path}")
    printed = capsys.readouterr().out
    assert "* composed: extended from 1, 2, 4 to 30 + 30 layers" in printed
    assert "phased" not in printed, "parts are timed in phases already"


def test_a_sweep_gives_model_heads_and_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gqa-time", "--sweep=figure6", "--batch-size=2"])
    arguments = cli._parse()
    assert (arguments.model, arguments.num_kv_heads) == ("t5_xxl", ["1", "4", "8", "16", "32", "64"])
    assert (arguments.source_length, arguments.output_length, arguments.fills) == (2048, 512, [1, 128, 256, 512])
    assert arguments.batch_size == 2, "what the command line says goes before"
    assert arguments.depths == ["auto"]


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
