"""Batches keep within their budget, hold every example once per epoch, and need no history."""

import logging
from collections import Counter

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gqa_exp.data.batching import FinetuneBatches, bucketed_batches, encode_task, pad_batch, round_up
from gqa_exp.errors import InputError

LENGTHS = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 60)), min_size=1, max_size=80)


def padded(lengths: list[tuple[int, int]], rows: list[int], multiple: int) -> tuple[int, int]:
    """Width of inputs and targets after padding, from the definition."""
    widest = [max(lengths[i][side] for i in rows) for side in (0, 1)]
    return widest[0] + -widest[0] % multiple, widest[1] + -widest[1] % multiple


@given(LENGTHS, st.integers(320, 2000), st.integers(0, 99), st.integers(0, 3), st.sampled_from([1, 8, 32]))
def test_every_example_once_and_no_batch_above_the_budget(lengths, budget, seed, epoch, multiple):
    batches = bucketed_batches(lengths, budget, seed, epoch, multiple)
    assert sorted(i for rows in batches for i in rows) == list(range(len(lengths)))
    assert all(len(rows) * sum(padded(lengths, rows, multiple)) <= budget for rows in batches)
    assert batches == bucketed_batches(lengths, budget, seed, epoch, multiple)
    assert len(batches) == len(bucketed_batches(lengths, budget, seed + 1, epoch + 1, multiple))


def test_examples_of_similar_length_share_a_batch():
    lengths = [(1 + i * 37 % 500, 1 + i * 11 % 30) for i in range(600)]
    batches = bucketed_batches(lengths, 4096, seed=0, epoch=0)
    room = sum(len(rows) * sum(padded(lengths, rows, 32)) for rows in batches)
    assert sum(map(sum, lengths)) / room > 0.8  # of the padded tokens; in order of the list it is under 0.6
    assert (
        Counter(len(rows) * sum(padded(lengths, rows, 32)) > 2048 for rows in batches)[False] <= 2
    )  # budgets are used


def test_order_and_company_change_with_epoch_and_seed():
    lengths = [(20, 10)] * 100
    plans = [bucketed_batches(lengths, 640, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    company = [frozenset(frozenset(rows) for rows in plan) for plan in plans]
    assert len(set(company)) == 4


def test_batches_come_in_no_order_of_length():
    lengths = [(n, 1) for n in range(1, 400)]
    widths = [max(lengths[i][0] for i in rows) for rows in bucketed_batches(lengths, 512, 0, 0, multiple=1)]
    assert widths != sorted(widths)
    assert widths != sorted(widths, reverse=True)


def test_an_example_beyond_the_budget_is_refused():
    with pytest.raises(InputError, match=r"cannot hold an example of 100 \+ 5 tokens, .* use at least 160"):
        bucketed_batches([(10, 5), (100, 5)], 159, 0, 0)
    assert bucketed_batches([(10, 5), (100, 5)], 160, 0, 0)


def examples(count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Ids from which each example can be told."""
    inputs = [[100 + n] * (1 + n * 7 % 90) + [1] for n in range(count)]
    return inputs, [[500 + n] * (1 + n % 5) + [1] for n in range(count)]


def test_a_step_needs_no_history():
    one, other = FinetuneBatches(*examples(50), 1024, seed=3), FinetuneBatches(*examples(50), 1024, seed=3)
    steps = 3 * one.steps_per_epoch
    straight = [one.batch(step) for step in range(steps)]
    for step in (steps - 1, 0, one.steps_per_epoch):
        again = other.batch(step)
        assert all(torch.equal(again[name], straight[step][name]) for name in straight[step])


def test_batches_hold_the_examples_and_mask_the_padding():
    inputs, targets = examples(50)
    batches = FinetuneBatches(inputs, targets, 1024, seed=0)
    for epoch in range(2):
        seen = []
        for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
            batch = batches.batch(step)
            assert batch["input_ids"].shape == batch["attention_mask"].shape
            assert batch["input_ids"].numel() + batch["labels"].numel() <= 1024
            assert {t.dtype for t in batch.values()} == {torch.long}
            for ids, mask, labels in zip(*(batch[k].tolist() for k in batch), strict=True):
                source = [token for token, kept in zip(ids, mask, strict=True) if kept]
                seen.append((source, [token for token in labels if token]))
                assert ids == source + [0] * (len(ids) - len(source))
        assert sorted(seen) == sorted(zip(inputs, targets, strict=True))
    first, second = ([batches.indices(e * batches.steps_per_epoch + i) for i in range(3)] for e in (0, 1))
    assert first != second


def test_a_batch_has_at_most_so_many_examples():
    lengths = [(5, 3)] * 50
    assert [len(rows) for rows in bucketed_batches(lengths, 4096, 0, 0, multiple=8)] == [50]
    assert sorted(len(rows) for rows in bucketed_batches(lengths, 4096, 0, 0, multiple=8, most=16)) == [2, 16, 16, 16]
    assert max(len(rows) for rows in bucketed_batches(lengths, 64, 0, 0, multiple=8, most=16)) == 4


def test_no_examples_are_refused():
    with pytest.raises(InputError, match="no examples"):
        FinetuneBatches([], [], 1024, seed=0)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=40), min_size=1, max_size=6), st.integers(1, 32))
def test_padding_is_torchs_own_up_to_the_multiple(rows, multiple):
    ours = pad_batch(rows, multiple)
    theirs = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    assert ours.shape[1] == round_up(theirs.shape[1], multiple)
    assert ours.shape[1] % multiple == 0
    assert ours.shape[1] - theirs.shape[1] < multiple
    assert torch.equal(ours[:, : theirs.shape[1]], theirs)
    assert not ours[:, theirs.shape[1] :].any()


class Letters:
    """A tokenizer of one id per letter; capitals are its sentinels, above the pieces."""

    eos_id = 1
    num_pieces = 500
    content_hash = "letters"

    def encode_batch(self, texts: list[str], sentinels: bool) -> list[list[int]]:
        assert sentinels
        return [[*(ord(letter) + 500 * letter.isupper() for letter in text), 1] for text in texts]


def test_what_is_cut_is_counted_and_logged(caplog):
    data = datasets.Dataset.from_dict({"input": ["abcdef", "abc", "abcd"], "target": ["xy", "x", "x"]})
    with caplog.at_level(logging.WARNING):
        task = encode_task(data, Letters(), max_input=4, max_target=2)
    a, b, c, x = map(ord, "abcx")
    assert task.input_ids == [[a, b, c, 1]] * 3
    assert task.target_ids == [[x, 1]] * 3
    assert (task.truncated_inputs, task.truncated_targets) == (2, 1)
    assert task.lengths == [(4, 2)] * 3
    assert len(task) == 3
    assert [r.getMessage() for r in caplog.records] == [
        "2 of 3 inputs are longer than 4 tokens and were cut",
        "1 of 3 targets are longer than 2 tokens and were cut",
    ]
    caplog.clear()
    data = datasets.Dataset.from_dict({"input": ["abcdX", "aXcde", "abX"], "target": ["x"] * 3})
    task = encode_task(data, Letters(), max_input=4, max_target=2)
    sentinel = ord("X") + 500
    assert task.input_ids == [[a, b, sentinel, 1], [a, sentinel, c, 1], [a, b, sentinel, 1]]  # the last one is kept
    caplog.clear()
    data = datasets.Dataset.from_dict({"input": ["abcdef"], "target": ["xy"]})
    assert encode_task(data, Letters(), max_input=7, max_target=3).truncated_inputs == 0
    assert not caplog.records
