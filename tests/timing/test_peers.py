import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

from gqa_exp.errors import InputError
from gqa_exp.model.checkpoint import save_hf
from gqa_exp.timing import peers
from gqa_exp.timing.timer import Round, Series


def test_agreement_ends_at_the_first_difference() -> None:
    assert peers.agreement([[1, 2, 3, 4]], [[1, 2, 3, 4]]) == 1
    assert peers.agreement([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.5
    assert peers.agreement([[1, 2], [3, 4]], [[1, 2], [9, 4]]) == 0.5


def test_decoding_is_the_long_run_less_the_single_token() -> None:
    rounds = [Round(["a"], {"a": {"long": [long], "short": [1.0]}}) for long in (5.0, 9.0)]
    assert peers.step_seconds(Series(rounds=rounds), "a", tokens=5) == [1.0, 2.0]


def test_transformers_writes_the_same_on_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "REST", 0.0)
    words = ["--model=micro", "--batch-size=2", "--source-length=9", "--output-length=6", "--dtypes", "float32"]
    monkeypatch.setattr(sys, "argv", ["peers", *words, "--num-kv-heads", "2", "--no-ctranslate2", "--rounds=2"])
    peers.main()
    printed = capsys.readouterr().out
    line = json.loads(printed.splitlines()[-1])
    assert set(line["engines"]) == {"ours float32", "ours float32, G=2", "transformers float32"}
    theirs = line["engines"]["transformers float32"]
    assert theirs["equal_ids"] == 1
    own = line["engines"]["ours float32"]["step_seconds"]
    in_each_round = [its / mine for its, mine in zip(theirs["step_seconds"], own, strict=True)]  # of tokens per second
    assert len(in_each_round) == 2
    assert theirs["ours float32 / it"]["median"] == pytest.approx(statistics.median(in_each_round))


def test_converted_heads_expanded_write_the_same_in_other_tools(tiny_model, tmp_path: Path) -> None:
    model = tiny_model(num_kv_heads=[4, 1], num_decoder_layers=2)
    save_hf(model, tmp_path, expand=True)
    peers.write_tokenizer(tmp_path, model.config.vocab_size)
    input_ids = torch.randint(len(peers.SPECIAL), model.config.vocab_size, (3, 9))
    ours = peers.ours(model, input_ids, "float32")(12)
    assert len({tuple(ids) for ids in ours}) > 1
    assert peers.transformers_t5(tmp_path, input_ids, "float32")(12) == ours
    worker = peers.ctranslate2_t5(tmp_path, input_ids, "float32")
    assert worker(12) == ours
    worker.close()
    assert worker.process.returncode == 0
    killed = peers.ctranslate2_t5(tmp_path, input_ids, "float32")
    killed.process.kill()
    with pytest.raises(InputError, match=r"CTranslate2, run by .*, ended: exit code -9"):
        killed(12)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output-length=1"], "must be 2 or more"),
        (["--batch-size=0"], "batch_size=0"),
        (["--dtypes", "float64"], "--dtypes float64 does not run"),
        (["--model=t5_bas"], 'did you mean "t5_base"'),
        (["--device=cuda"], 'finds no GPU here; use "cpu"'),
        (["--device=cuda", "--ctranslate2", "int8"], "on a CPU alone"),
        (["--device=cuda", "--ctranslate2"], "on a CPU alone"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["peers", *words])
    with pytest.raises(SystemExit) as ended:
        peers.main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert said in message


def test_a_peer_that_cannot_run_is_said(tmp_path: Path) -> None:
    # This environment's own interpreter has no T5GQA.
    with pytest.raises(InputError, match=r"T5GQA, run by .*, ended: ModuleNotFoundError"):
        peers.Worker("T5GQA", sys.executable, tmp_path, torch.zeros(1, 2, dtype=torch.long), "1", "float32")
