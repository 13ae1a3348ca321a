"""Span corruption loses nothing, has T5's statistics, and every batch is a pure function of (seed, step)."""

import io
import itertools
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import scipy.stats
import sentencepiece
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gqa_exp.config import CorpusConfig
from gqa_exp.data import corpus
from gqa_exp.data.corpus import (
    CorpusStream,
    corpus_tokens,
    corrupt,
    corrupted_lengths,
    corruption,
    file_tokens,
    heldout_batches,
    heldout_tokens,
    noise_mask,
    read_text_file,
    tokenize,
    unigram_loss,
)
from gqa_exp.data.tokenizer import Tokenizer
from gqa_exp.errors import InputError


class Sentinels:
    """All that corruption asks of a tokenizer; ids below TOP - 99 are free for raw tokens."""

    TOP = 65_000
    num_sentinels = 100

    def sentinel(self, i: int) -> int:
        return self.TOP - i


def restore(inputs: list[int], targets: list[int]) -> list[int]:
    """Undo corruption by reading: put each span of the target where its sentinel stands in the input."""
    assert inputs[-1] == targets[-1] == 1
    spans: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token > Sentinels.TOP - 100:
            spans[token] = []
            current = spans[token]
        else:
            current.append(token)
    assert list(spans) == [Sentinels.TOP - i for i in range(len(spans))]
    assert all(spans.values())
    return [t for token in inputs[:-1] for t in (spans.pop(token) if token > Sentinels.TOP - 100 else [token])]


def fitting(input_length: int, density: float = 0.15, span: float = 3.0) -> CorpusConfig:
    """The configuration with the one target length that belongs to the input length."""
    window = next(w for w in itertools.count(2) if corruption(w + 1, density, span).inputs > input_length)
    targets = corruption(window, density, span).targets
    return CorpusConfig(input_length=input_length, target_length=targets, noise_density=density, mean_span=span)


def test_t5s_lengths_are_512_and_114_from_568():
    counts = corrupted_lengths(CorpusConfig())
    assert counts == (568, 85, 28, 512, 114)  # window, noise, spans, inputs, targets
    assert counts.inputs == 568 - 85 + 28 + 1
    assert counts.targets == 85 + 28 + 1


@given(st.integers(8, 1200), st.integers(4, 300))
def test_lengths_that_do_not_belong_together_are_refused_with_those_that_do(inputs, targets):
    right = fitting(inputs)
    assert corrupted_lengths(right).inputs == inputs
    if targets != right.target_length:
        with pytest.raises(InputError, match=f"target_length={right.target_length}$"):
            corrupted_lengths(replace(right, target_length=targets))


@given(st.integers(8, 300), st.floats(0.01, 0.9), st.floats(1, 20), st.integers(1, 4), st.integers(0, 2**31 - 1))
def test_input_and_target_together_are_the_window(length, density, span, rows, seed):
    counts = corruption(length, density, span)
    assume(counts.spans <= Sentinels.num_sentinels)
    rng = np.random.default_rng(seed)
    windows = rng.integers(2, Sentinels.TOP - 100, (rows, length)).astype(np.uint16)
    masks = np.stack([noise_mask(counts, rng) for _ in range(rows)])
    inputs, targets = corrupt(windows, masks, Sentinels())
    assert inputs.shape == (rows, counts.inputs)
    assert targets.shape == (rows, counts.targets)
    for window, shown, hidden in zip(windows.tolist(), inputs.tolist(), targets.tolist(), strict=True):
        assert restore(shown, hidden) == window


@given(st.integers(2, 600), st.floats(0.01, 0.9), st.floats(1, 20), st.integers(0, 2**31 - 1))
def test_a_mask_has_the_noise_and_the_spans_it_should(length, density, span, seed):
    counts = corruption(length, density, span)
    mask = noise_mask(counts, np.random.default_rng(seed))
    runs = [(value, len(list(run))) for value, run in itertools.groupby(mask.tolist())]
    assert mask.shape == (length,)
    assert not mask[0]
    assert mask[-1]
    assert sum(n for value, n in runs if value) == counts.noise
    assert sum(value for value, _ in runs) == counts.spans
    if length * density >= 10 and span <= 5 and density <= 0.5:  # where rounding is small beside the value
        assert counts.noise == pytest.approx(length * density, abs=0.5)
        assert counts.noise / counts.spans == pytest.approx(span, rel=0.5)


def test_every_way_to_cut_is_equally_likely():
    counts = corruption(12, 0.42, 2.5)  # 5 noise tokens in 2 spans: 4 ways; 7 kept ones in 2: 6 ways
    assert (counts.noise, counts.spans) == (5, 2)
    rng = np.random.default_rng(0)
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(4800):
        runs = tuple(len(list(run)) for _, run in itertools.groupby(noise_mask(counts, rng).tolist()))
        seen[runs] = seen.get(runs, 0) + 1
    assert len(seen) == 24
    assert scipy.stats.chisquare(list(seen.values())).pvalue > 1e-3


# --- the stream -------------------------------------------------------------------------------------------------------


def stream(total: int = 3000, config: CorpusConfig | None = None, seed: int = 0) -> CorpusStream:
    return CorpusStream(np.arange(2, total + 2, dtype=np.uint16), config or fitting(34), Sentinels(), seed)


def restored(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    return [restore(i, t) for i, t in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)]


def test_a_batch_needs_no_history():
    one, other = stream(), stream()
    straight = [one.batch(step, 4) for step in range(60)]  # about three epochs
    assert one.windows_per_epoch < 100
    for step in (59, 3, 40, 0):
        again = other.batch(step, 4)
        for name in ("input_ids", "labels"):
            assert torch.equal(again[name], straight[step][name])
    assert straight[0]["input_ids"].dtype == straight[0]["labels"].dtype == torch.long
    assert straight[0]["input_ids"].shape == (4, 34)
    assert not torch.equal(stream(seed=1).batch(0, 4)["input_ids"], straight[0]["input_ids"])


@given(st.integers(1, 7), st.integers(0, 20))
def test_the_batch_size_only_groups_windows(size, step):
    ones = [stream().batch(n, 1)["input_ids"] for n in range(step * size, (step + 1) * size)]
    assert torch.equal(torch.cat(ones), stream().batch(step, size)["input_ids"])


def test_an_epoch_uses_every_window_once_and_the_next_one_others():
    source = stream()
    window, windows = source.counts.window, source.windows_per_epoch
    assert windows == 3000 // window
    epochs = [[w for n in range(windows) for w in restored(source.batch(e * windows + n, 1))] for e in range(3)]
    for epoch in epochs:
        tokens = [token for w in epoch for token in w]
        assert len(tokens) == len(set(tokens)) == windows * window  # no token twice
        assert all((b - a) % 3000 == 1 for w in epoch for a, b in itertools.pairwise(w))  # windows are whole
    starts = [[w[0] for w in epoch] for epoch in epochs]
    assert starts[0] != sorted(starts[0])
    assert len({start % window for epoch in starts for start in epoch[:1]}) > 1  # boundaries move
    batch = restored(source.batch(0, windows + 2))  # reaches over the end of the epoch
    assert batch == epochs[0] + epochs[1][:2]


def test_the_same_window_meets_other_noise_in_the_next_epoch():
    source = stream(total=stream().counts.window)
    assert source.windows_per_epoch == 1
    assert len({tuple(np.flatnonzero(source.mask(n))) for n in range(20)}) > 10


def test_heldout_batches_cover_the_text_in_order_and_never_change():
    tokens = np.arange(2, 1002, dtype=np.uint16)
    config = fitting(34)
    first, second = (list(heldout_batches(tokens, config, Sentinels(), 8)) for _ in range(2))
    window = corrupted_lengths(config).window
    seen = [token for batch in first for w in restored(batch) for token in w]
    assert seen == tokens[: 1000 // window * window].tolist()
    assert [len(b["labels"]) for b in first] == [8] * (1000 // window // 8) + [1000 // window % 8]
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(first, second, strict=True))
    assert list(heldout_batches(tokens[: window - 1], config, Sentinels(), 8)) == []


def test_too_little_text_and_too_few_sentinels_are_refused():
    with pytest.raises(InputError, match="has 20 tokens; one window needs"):
        stream(total=20)
    with pytest.raises(InputError, match="sentinels"):
        stream(config=fitting(2048))


def test_unigram_loss_is_the_cross_entropy_of_smoothed_frequencies():
    rng = np.random.default_rng(0)
    train, heldout = rng.integers(0, 50, (40, 30)), torch.from_numpy(rng.binomial(49, 0.3, (10, 30)))
    p = np.bincount(heldout.numpy().ravel(), minlength=50) / heldout.numel()
    q = (np.bincount(train.ravel(), minlength=50) + 1) / (train.size + 50)
    expected = scipy.stats.entropy(p) + scipy.stats.entropy(p, q)
    assert unigram_loss(train, heldout, 50) == pytest.approx(expected)


# --- text to tokens ---------------------------------------------------------------------------------------------------

DOCUMENTS = {"a": ["first text\nof a", "second text of a"], "b": ["only text of b"]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for texts in DOCUMENTS.values() for text in texts] * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Small documents in the place of the embedded ones; lists the splits that were read."""
    read: list[str] = []

    def documents(split: str) -> datasets.Dataset:
        read.append(split)
        rows = [(text, source) for source, texts in DOCUMENTS.items() for text in texts]
        return datasets.Dataset.from_dict({"text": [t for t, _ in rows], "source": [s for _, s in rows]})

    folder = tmp_path / "embedded"
    folder.mkdir()
    (folder / "corpus.parquet").write_bytes(b"one")
    monkeypatch.setattr(corpus.embedded, "FOLDER", folder)
    monkeypatch.setattr(corpus.embedded, "corpus_documents", documents)
    return read


def texts_of(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    assert tokens[-1] == 1
    return sorted(tokenizer.decode(part.tolist()) for part in np.split(tokens, np.flatnonzero(tokens == 1) + 1)[:-1])


def test_tokens_are_all_documents_and_are_made_once(tokenizer, calls, tmp_path):
    tokens = corpus_tokens("train", tokenizer, tmp_path / "cache")
    assert tokens.dtype == np.uint16
    assert texts_of(tokens, tokenizer) == ["first text of a", "only text of b", "second text of a"]
    assert np.array_equal(tokens, corpus_tokens("train", tokenizer, tmp_path / "cache"))
    assert calls == ["train"]
    assert texts_of(corpus_tokens("train", tokenizer, tmp_path / "cache", ["b"]), tokenizer) == ["only text of b"]
    parts = heldout_tokens(tokenizer, tmp_path / "cache")
    assert {source: texts_of(part, tokenizer) for source, part in parts.items()} == {
        "a": ["first text of a", "second text of a"],
        "b": ["only text of b"],
    }
    assert len(heldout_tokens(tokenizer, tmp_path / "cache")) == 2
    assert calls == ["train", "train", "heldout"]


def test_changed_files_or_tokenizer_make_new_tokens(tokenizer, calls, tmp_path):
    cache = tmp_path / "cache"
    corpus_tokens("train", tokenizer, cache)
    fewer = object.__new__(Tokenizer)
    fewer.__dict__.update(tokenizer.__dict__, content_hash="another")
    corpus_tokens("train", fewer, cache)
    (corpus.embedded.FOLDER / "help.parquet").write_bytes(b"two")
    corpus_tokens("train", tokenizer, cache)
    assert len(calls) == len(list(cache.glob("*.npy"))) == 3


def test_nothing_is_left_of_an_attempt_that_failed(tokenizer, calls, tmp_path):
    with pytest.raises(InputError, match="no source c; known: a, b"):
        corpus_tokens("train", tokenizer, tmp_path / "cache", ["c"])
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def test_files_are_tokenized_once_by_content(tokenizer, tmp_path, monkeypatch):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, text in zip(files, ("first text of a", "only text of b"), strict=True):
        file.write_text(text)
    seen = []
    monkeypatch.setattr(corpus, "tokenize", lambda texts, t: seen.append(texts) or tokenize(texts, t))
    for _ in range(2):
        tokens = file_tokens([str(file) for file in files], tokenizer, tmp_path / "cache")
        assert texts_of(tokens, tokenizer) == ["first text of a", "only text of b"]
    assert seen == [["first text of a", "only text of b"]]
    files[1].write_text("second text of a")
    assert "second text of a" in texts_of(file_tokens(list(map(str, files)), tokenizer, tmp_path / "cache"), tokenizer)
    assert len(seen) == 2


def test_text_files_are_checked(tmp_path):
    path = tmp_path / "text"
    path.write_text("Grüße\n", encoding="utf-8")
    assert read_text_file(path) == "Grüße\n"
    with pytest.raises(InputError, match="missing cannot be read"):
        read_text_file(tmp_path / "missing")
    path.write_bytes(b" \n")
    with pytest.raises(InputError, match="is empty"):
        read_text_file(path)
    path.write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(InputError, match="byte 0xfc at offset 2"):
        read_text_file(path)
