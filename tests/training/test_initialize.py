"""What a base starts from: T5's draw, and on top of it attention that finds equal tokens and neighbours."""

import math

import pytest
import torch

from gqa_exp.model import T5, T5Config
from gqa_exp.model.attention import by_position
from gqa_exp.training.initialize import NEIGHBOUR_BIAS, NEIGHBOURS, start_reading

GEOMETRY = {"vocab_size": 500, "d_model": 256, "d_ff": 64, "num_heads": 8, "head_dim": 32}
LENGTH = 100


def models() -> tuple[T5, T5]:
    """The same draw twice: as T5 leaves it, and as pre-training starts."""
    config = T5Config(**GEOMETRY, num_encoder_layers=1, num_decoder_layers=2)
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(T5(config).eval())
    start_reading(drawn[1])
    return drawn[0], drawn[1]


def attention_to_the_equal_token(model: T5) -> float:
    """Mean weight, over heads and positions, of the first cross-attention of decoder tokens to the same input token."""
    ids = torch.randperm(500, generator=torch.Generator().manual_seed(1))[None, :LENGTH]
    attention = model.decoder.layers[0].cross_attention
    with torch.no_grad():
        states = model.decoder.layers[0].cross_attention_norm(model.embedding(ids))
        q, k = (linear(states).view(LENGTH, 8, 32) for linear in (attention.q, attention.k))
        weights = torch.einsum("thk,shk->hts", q, k).softmax(dim=-1)
    return float(weights.diagonal(dim1=1, dim2=2).mean())


def test_a_token_attends_to_itself_in_the_input() -> None:
    as_t5, reading = models()
    assert attention_to_the_equal_token(as_t5) == pytest.approx(1 / LENGTH, rel=0.5)
    assert attention_to_the_equal_token(reading) > 0.5


def test_the_first_heads_of_the_encoder_attend_to_their_neighbours() -> None:
    as_t5, reading = models()
    with torch.no_grad():
        biases = [model.encoder.relative_bias(LENGTH, LENGTH) for model in (as_t5, reading)]
    before, after = (by_position(bias_HL, LENGTH)[0] for bias_HL in biases)
    for head, distances in enumerate(NEIGHBOURS):
        for position in (20, 50, 79):
            near = [position + distance for distance in distances]
            assert after[head, position, near].tolist() == [NEIGHBOUR_BIAS] * len(near)
            others = torch.ones(LENGTH, dtype=torch.bool)
            others[near] = False
            assert torch.equal(after[head, position, others], before[head, position, others])
    assert torch.equal(after[len(NEIGHBOURS) :], before[len(NEIGHBOURS) :])


def test_nothing_else_differs_from_the_draw_of_t5_and_no_scale_does() -> None:
    as_t5, reading = models()
    changed = {"encoder.relative_bias.weight", *(f"decoder.layers.{i}.cross_attention.k.weight" for i in range(2))}
    for (name, before), after in zip(as_t5.named_parameters(), reading.parameters(), strict=True):
        assert torch.equal(before, after) == (name not in changed), name
    for layer in reading.decoder.layers:
        std = float(layer.cross_attention.k.weight.detach().std())
        assert std == pytest.approx(1 / math.sqrt(256), rel=0.02)  # T5's for keys


def test_only_a_multi_head_model_can_start_so() -> None:
    with pytest.raises(ValueError, match="multi-head"):
        start_reading(T5(T5Config(**GEOMETRY, num_encoder_layers=1, num_decoder_layers=1, num_kv_heads=2)))
