import json
import sys

import pytest
import torch

from gqa_exp.model import T5Config
from gqa_exp.timing.cli import read_model_config
from gqa_exp.training import benchmark


def test_both_sides_train_on_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmark, "SHAPES", {"fine-tuning": (2, 9, 5, 0.0)})
    monkeypatch.setattr(benchmark, "can_compile", lambda accelerator: False)
    words = ["--models", "micro", "--shapes", "fine-tuning", "--dtype=float32", "--steps=2", "--rounds=2"]
    losses, flops = [], []
    real = benchmark.measure

    def measure(*arguments):
        monkeypatch.setattr(benchmark, "trainees", spy)
        return real(*arguments)

    real_trainees = benchmark.trainees

    def spy(*arguments):
        found = real_trainees(*arguments)
        flops.append({name: trainee.product_flops() for name, trainee in found.items()})
        before = {name: trainee.loss().item() for name, trainee in found.items()}
        for trainee in found.values():
            trainee.step()
        losses.append((before, {name: trainee.loss().item() for name, trainee in found.items()}))
        return found

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["benchmark", *words])
    benchmark.main()
    (before, after) = losses[0]
    assert before["ours eager"] == pytest.approx(before["transformers eager"], rel=1e-5)
    assert after["ours eager"] == pytest.approx(after["transformers eager"], rel=1e-3)
    assert after["ours eager"] < before["ours eager"]
    assert flops[0]["ours eager"] == flops[0]["transformers eager"]
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    (result,) = line["results"]
    assert set(result["tokens_per_second"]) == {"ours eager", "transformers eager"}
    seconds = {name: sorted(each) for name, each in result["step_seconds"].items()}
    assert result["tokens_per_second"]["ours eager"] == pytest.approx(2 * 14 * 2 / sum(seconds["ours eager"]))
    assert result["product_seconds"] > 0
    micro = T5Config.from_model_config(read_model_config("micro"))
    D, F, heads = micro.d_model, micro.d_ff, micro.num_heads * micro.head_dim
    encoder = micro.num_encoder_layers * (4 * D * heads + 3 * D * F) + micro.num_decoder_layers * 2 * D * heads
    decoder = micro.num_decoder_layers * (6 * D * heads + 3 * D * F) + micro.vocab_size * D
    assert result["product_flops"] == flops[0]["ours eager"] == 6 * 2 * (9 * encoder + 5 * decoder)
    assert line["matmul_flops"] > 0
    # attention: 9 x 9 pairs in an encoder layer; in a decoder's 5 x 9, and 1 + 2 + 3 + 4 + 5 that are not masked
    pairs = micro.num_encoder_layers * 81 + micro.num_decoder_layers * (45 + 15)
    assert result["attention_flops"] == 2 * heads * pairs * 2 * (2 + 4)
    theirs = sum(seconds["transformers eager"]) / 2
    peak = max(line["matmul_flops"], result["product_flops"] / result["product_seconds"])
    assert result["bound"] == pytest.approx(theirs / ((result["product_flops"] + result["attention_flops"]) / peak))


def test_both_sides_drop_as_often_as_the_shape_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "can_compile", lambda accelerator: False)
    geometry = T5Config.from_model_config(read_model_config("micro"))
    ids = torch.randint(3, 100, (2, 9)), torch.randint(3, 100, (2, 5))
    for name, trainee in benchmark.trainees(geometry, ids, 0.25, "float32", 0).items():
        found = {module.p for module in trainee.model.modules() if isinstance(module, torch.nn.Dropout)}
        found |= {
            module.dropout for module in trainee.model.modules() if isinstance(getattr(module, "dropout", None), float)
        }
        assert found == {0.25}, name


@pytest.mark.parametrize(
    ("word", "said"),
    [("--steps=0", "--steps 1 or more"), ("--dtype=float16", "must be float32"), ("--device=cuda", 'use "cpu"')],
)
def test_bad_input_is_one_line(
    word: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark", word])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert said in message
