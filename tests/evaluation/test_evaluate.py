"""Batching, order, padding and counting of greedy evaluation, against one example at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gqa_exp.errors import InputError
from gqa_exp.evaluation import evaluate as module
from gqa_exp.evaluation.evaluate import batches_by_length, evaluate_model, pad
from gqa_exp.model import T5, InferenceT5, T5Config, generate

EOS = 1


class NumberTokenizer:
    """Writes token ids as numbers."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def tiny_model() -> T5:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=12, d_model=16, d_ff=32, num_heads=4, head_dim=8, num_encoder_layers=1, num_decoder_layers=1,
        num_kv_heads=2,
    )  # fmt: skip
    model = T5(config)
    # Larger than trained weights, so that the output depends on the input and ends now and then.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def tiny_inputs(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 15, (count,), generator=generator).tolist()
    return [[*torch.randint(2, 12, (length,), generator=generator).tolist(), EOS] for length in lengths]


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=50), st.integers(40, 200))
def test_batches_hold_every_example_once_within_the_limit(lengths: list[int], batch_tokens: int) -> None:
    batches = batches_by_length(lengths, batch_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[i] for i in batch) <= batch_tokens for batch in batches)
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)
    for batch in batches[:-1]:  # none is cut short
        assert (len(batch) + 1) * lengths[batch[0]] > batch_tokens


def test_inputs_that_fit_no_batch_are_named() -> None:
    with pytest.raises(InputError, match=r"cannot hold input 1 of 9 tokens; use 9 or more"):
        batches_by_length([3, 9], 8)
    with pytest.raises(InputError, match="input 1 has no tokens"):
        batches_by_length([3, 0], 8)


def test_outputs_of_logits_that_are_not_finite_are_not_scored() -> None:
    model = tiny_model()
    with torch.no_grad():
        for layer in (*model.encoder.layers, *model.decoder.layers):
            layer.feed_forward.wo.weight.mul_(1e4)  # type: ignore[union-attr,operator]
    inputs, references = tiny_inputs(3), [["2 3"]] * 3

    def evaluate(dtype: torch.dtype) -> None:
        evaluate_model(
            model.to(dtype), NumberTokenizer(), inputs, references, kind="summarization", max_new_tokens=5,
            batch_tokens=100,
        )  # fmt: skip

    evaluate(torch.bfloat16)
    with pytest.raises(InputError, match=r"not finite in torch.float16.*evaluation.dtype=bfloat16"):
        evaluate(torch.float16)
    with torch.no_grad():
        model.float().embedding.weight[3, 0] = float("nan")
    with pytest.raises(InputError, match=r"not finite in torch.float32"):
        evaluate(torch.float32)
    with pytest.raises(FloatingPointError):
        generate(model, torch.tensor([[3, EOS]]), max_new_tokens=2)
    assert generate(model, torch.tensor([[3, EOS]]), max_new_tokens=2, stop_at_eos=False).shape == (1, 2)


def test_padding_is_masked_by_length() -> None:
    ids, mask = pad([[5, 0, 7], [8]], 0)
    assert ids.tolist() == [[5, 0, 7], [8, 0, 0]]
    assert mask is not None
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert pad([[5, 6], [7, 8]], 0)[1] is None


def test_batched_evaluation_writes_what_one_at_a_time_writes() -> None:
    model, inputs = tiny_model().train(), tiny_inputs(25)
    alone, lengths = [], []
    for ids in inputs:
        output = generate(model.eval(), torch.tensor([ids]), max_new_tokens=10)[0].tolist()
        lengths.append(len(output))
        alone.append(" ".join(str(token) for token in output if token != EOS))
    assert len(set(alone)) > 5, "the test needs a model whose outputs differ"
    assert min(lengths) < 10, "the test needs a model that ends"
    model.train()
    references = [[text] for text in alone]
    result = evaluate_model(
        model, NumberTokenizer(), inputs, references, kind="question answering", max_new_tokens=10, batch_tokens=40
    )
    assert result.predictions == alone
    assert result.mean_generated_tokens == pytest.approx(sum(lengths) / len(lengths))
    assert model.training
    assert result.scores.num_examples == 25


def test_text_ends_at_end_of_sequence_and_order_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def echo(model: InferenceT5, input_ids: Tensor, attention_mask: Tensor | None, *, max_new_tokens: int) -> Tensor:
        seen.append((tuple(input_ids.shape), torch.is_inference_mode_enabled(), model.training))
        return input_ids[:, :max_new_tokens]

    monkeypatch.setattr(module, "generate", echo)
    inputs = [[7, EOS], [2, 3, 4, 5, 6, EOS], [8, 9, EOS, 9, 9]]
    result = evaluate_model(
        tiny_model(), NumberTokenizer(), inputs, [["7"], ["2"], ["8 9"]],
        kind="question answering", max_new_tokens=4, batch_tokens=10, progress="test",
    )  # fmt: skip
    assert result.predictions == ["7", "2 3 4 5", "8 9"]
    assert result.mean_generated_tokens == pytest.approx((2 + 4 + 3) / 3)
    assert result.scores.per_example["exact_match"] == [100, 0, 100]
    assert seen == [((1, 6), True, False), ((2, 5), True, False)]


def test_bad_input_stops_before_generation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "generate", lambda *_, **__: pytest.fail("generated"))
    for inputs, references, kind, message in [
        ([], [], "translation", "no examples"),
        ([[1]], [], "translation", "1 examples but 0"),
        ([[1]], [["a"]], "translating", 'did you mean "translation"'),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate_model(
                tiny_model(), NumberTokenizer(), inputs, references, kind=kind, max_new_tokens=4, batch_tokens=10
            )
    assert capsys.readouterr().err == ""
