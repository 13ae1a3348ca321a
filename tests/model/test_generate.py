import pytest
import torch
import transformers

from gqa_exp.model import generate
from gqa_exp.model.checkpoint import save_hf
from gqa_exp.model.inference import InferenceT5


@pytest.mark.parametrize("kv_heads", [1, 2, 4, [4, 1, 2]])
@pytest.mark.parametrize("lengths", [[9, 4, 1], [5, 5]])
def test_every_cached_step_equals_a_full_forward_pass(tiny_model, padded_batch, kv_heads, lengths):
    # Few distances per bucket, so that 40 steps pass through all of them.
    model = tiny_model(num_kv_heads=kv_heads, relative_buckets=8, relative_max_distance=20)
    input_ids, mask = padded_batch(lengths, model.config.vocab_size)
    steps = 40
    with torch.no_grad():
        prepared = InferenceT5(model)
        state = prepared.start(prepared.encode(input_ids, mask), mask, steps)
        decoder_ids = torch.full((len(lengths), 1), model.config.decoder_start_id)
        for step in range(steps):
            logits = prepared.step(decoder_ids[:, -1], state)
            full = model(input_ids, decoder_ids, mask)[:, -1]
            torch.testing.assert_close(logits, full, rtol=1e-5, atol=1e-5)
            assert state.length == step + 1
            decoder_ids = torch.cat([decoder_ids, logits.argmax(-1, keepdim=True)], dim=1)
        with pytest.raises(IndexError, match="hold 40 tokens"):
            prepared.step(decoder_ids[:, -1], state)
    generated = generate(model, input_ids, mask, max_new_tokens=steps, stop_at_eos=False)
    assert torch.equal(generated, decoder_ids[:, 1:])


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_sequence_does_not_depend_on_its_batch(tiny_model, padded_batch, kv_heads):
    model = tiny_model(num_kv_heads=kv_heads)
    lengths = [9, 4, 6]
    input_ids, mask = padded_batch(lengths, model.config.vocab_size)
    batch = generate(model, input_ids, mask, max_new_tokens=8, stop_at_eos=False)
    for row, length in enumerate(lengths):
        alone = generate(model, input_ids[row : row + 1, :length], max_new_tokens=8, stop_at_eos=False)
        assert torch.equal(batch[row], alone[0])


def eos_model(tiny_model, seed, **changes):
    """A model of so few tokens that some sequences end."""
    return tiny_model(seed, vocab_size=8, **changes)


def test_greedy_ids_equal_transformers(tiny_model, padded_batch, tmp_path):
    ended = 0
    for seed in range(4):
        # transformers sizes its cache by the encoder's layers, so the decoder must not have more
        model = eos_model(tiny_model, seed, num_decoder_layers=2)
        save_hf(model, tmp_path / str(seed))
        reference = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / str(seed)).eval()
        input_ids, mask = padded_batch([9, 4, 6, 7], 8, seed)
        # Without its cache: transformers 5 sizes that by the encoder's layers, which are fewer here than the decoder's.
        settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1, "use_cache": False}
        theirs = reference.generate(input_ids=input_ids, attention_mask=mask, **settings)
        ours = generate(model, input_ids, mask, max_new_tokens=12)
        assert torch.equal(ours, theirs[:, 1:])  # theirs begins with the start token
        ended += int((ours == model.config.eos_id).sum())
    assert ended


def test_padding_follows_end_of_sequence(tiny_model, padded_batch):
    ended_early = ran_out = stopped_together = 0
    for seed in range(12):
        model = eos_model(tiny_model, seed, num_kv_heads=2)
        input_ids, mask = padded_batch([9, 4, 6], 8, seed)
        stopped = generate(model, input_ids, mask, max_new_tokens=12)
        free = generate(model, input_ids, mask, max_new_tokens=12, stop_at_eos=False)
        assert free.shape == (3, 12)
        lengths = []
        for row in range(3):
            ends = (free[row] == 1).nonzero()
            length = int(ends[0]) + 1 if len(ends) else 12
            lengths.append(length)
            assert torch.equal(stopped[row, :length], free[row, :length])
            assert not stopped[row, length:].any()
            ended_early += length < 12
            ran_out += not len(ends)
        assert stopped.shape[1] == max(lengths)
        stopped_together += max(lengths) < 12
    assert ended_early
    assert ran_out
    assert stopped_together


def test_generates_with_other_special_ids(tiny_model):
    model = tiny_model(2, vocab_size=8, pad_id=3, eos_id=5, decoder_start_id=6)
    ids = torch.randint(0, 8, (20, 4))
    out = generate(model, ids, max_new_tokens=10)
    free = generate(model, ids, max_new_tokens=10, stop_at_eos=False)
    start = torch.full((20, 1), 6)
    assert torch.equal(free[:, :1], model(ids, start).argmax(-1))
    ended = 0
    for row in range(20):
        ends = (free[row] == 5).nonzero()
        if len(ends):
            ended += 1
            assert (out[row, int(ends[0]) + 1 :] == 3).all()
    assert ended


@pytest.mark.parametrize("count", [0, -1])
def test_refuses_to_generate_nothing(tiny_model, count):
    with pytest.raises(ValueError, match="must be 1 or more"):
        generate(tiny_model(), torch.ones(1, 3, dtype=torch.long), max_new_tokens=count)


def test_no_gradient_is_kept(tiny_model):
    model = tiny_model()
    assert not generate(model, torch.ones(1, 3, dtype=torch.long), max_new_tokens=2).requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters())
