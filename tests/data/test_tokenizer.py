"""The tokenizer adds ids to SentencePiece's and nothing else: what it says is checked against the library itself."""

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gqa_exp.data import embedded
from gqa_exp.data.embedded import TOKENIZER
from gqa_exp.data.tokenizer import Tokenizer, default_tokenizer
from gqa_exp.errors import InputError

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Grüße aus Österreich, größer und schöner!", "a package (x86)"]


def train(path: Path, **ids: int) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("tokenizer") / "tiny.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@pytest.fixture(scope="module")
def library(model_path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model_path))


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> Tokenizer:
    return Tokenizer(model_path)


@given(text=st.text(alphabet="abcdefghijklmnop äöüTHX.,!?()8\n漢", max_size=60))
def test_ids_are_the_librarys_plus_end_of_sequence(text, tokenizer, library):
    assert tokenizer.encode(text) == [*library.encode(text), 1]
    assert tokenizer.encode(text, add_eos=False) == library.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == library.decode(library.encode(text))


@given(text=st.sampled_from(TEXTS), limit=st.integers(1, 40))
def test_truncation_keeps_room_for_end_of_sequence(text, limit, tokenizer, library):
    ids, whole = tokenizer.encode(text, max_tokens=limit), library.encode(text)
    assert len(ids) == min(limit, len(whole) + 1)
    assert ids == [*whole[: limit - 1], 1]


def test_a_batch_is_its_texts(tokenizer):
    assert tokenizer.encode_batch(TEXTS, max_tokens=9) == [tokenizer.encode(text, max_tokens=9) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), text=st.sampled_from(TEXTS))
def test_decode_skips_padding_and_sentinels_and_stops_at_end_of_sequence(data, text, tokenizer):
    ids = tokenizer.encode(text, add_eos=False)
    silent = st.sampled_from([tokenizer.pad_id, tokenizer.sentinel(0), tokenizer.sentinel(99)])
    for token in data.draw(st.lists(silent, max_size=5)):
        ids.insert(data.draw(st.integers(0, len(ids))), token)
    rest = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=5))
    assert tokenizer.decode([*ids, tokenizer.eos_id, *rest]) == text


@given(numbers=st.lists(st.integers(0, 99), max_size=4), data=st.data())
def test_a_sentinel_named_in_a_text_is_its_id_between_the_librarys(numbers, data, tokenizer, library):
    parts = [data.draw(st.sampled_from(["", *TEXTS])) for _ in range(len(numbers) + 1)]
    text, expected = parts[0], library.encode(parts[0])
    for number, part in zip(numbers, parts[1:], strict=True):
        text += (
            data.draw(st.sampled_from(["", " "]))
            + f"<extra_id_{number}>"
            + data.draw(st.sampled_from(["", " "]))
            + part
        )
        expected += [tokenizer.sentinel(number), *library.encode(part)]
    assert tokenizer.encode(text, add_eos=False, sentinels=True) == expected
    assert tokenizer.encode_batch([*TEXTS, text], max_tokens=9, sentinels=True)[-1] == [*expected[:8], 1]
    assert tokenizer.encode(text) == [*library.encode(text), 1]  # unless asked for, text like any other


def test_a_sentinel_that_does_not_exist_is_refused(tokenizer):
    with pytest.raises(InputError, match="<extra_id_100> in a text: the tokenizer has 100 sentinels"):
        tokenizer.encode("what <extra_id_100> is", sentinels=True)


def test_sentinels_count_down_from_the_top(tokenizer, library):
    sentinels = [tokenizer.sentinel(i) for i in range(100)]
    assert sentinels == list(range(library.get_piece_size() + 99, library.get_piece_size() - 1, -1))
    assert tokenizer.vocab_size == sentinels[0] + 1
    for outside in (-1, 100):
        with pytest.raises(ValueError, match="does not exist"):
            tokenizer.sentinel(outside)


def test_hash_follows_content(tokenizer, model_path, tmp_path):
    copy = tmp_path / "other name.model"
    copy.write_bytes(model_path.read_bytes())
    other = train(tmp_path / "other.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, user_defined_symbols="x")
    assert Tokenizer(copy).content_hash == tokenizer.content_hash
    assert len({t.content_hash for t in (tokenizer, Tokenizer(other), Tokenizer(copy, num_sentinels=10))}) == 3


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory):
    """What transformers makes of the shipped model: a folder without SentencePiece's file."""
    slow, fast = tmp_path_factory.mktemp("slow"), tmp_path_factory.mktemp("fast")
    shutil.copyfile(TOKENIZER, slow / "spiece.model")
    transformers.T5Tokenizer.from_pretrained(slow).save_pretrained(fast)
    assert [path.name for path in fast.glob("*.model")] == []
    return fast


@pytest.fixture(scope="module")
def from_json(json_folder):
    return Tokenizer(json_folder)


ODD = ["</s>", "<pad> a <unk>", "<extra_id_0>", "a\0b", "\u2581\u2047\u2581", "漢字 and \u2047", "  two  spaces\n", ""]


@pytest.fixture(scope="module")
def likelihood():
    """Of the pieces of ids, in total, without those that SentencePiece's model does not have."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    return lambda ids: sum(pieces.get_score(i) for i in ids if i < pieces.get_piece_size())


@given(
    text=st.one_of(st.sampled_from([*TEXTS, *ODD]), st.text(alphabet="abcdeghnst äöüßTHX.,!?()-8\n漢ﬁ½", max_size=60))
)
@example(text="88?bbb")  # "b" + "bb" is as likely as "bb" + "b"
def test_both_kinds_of_files_give_the_same(text, from_json, likelihood):
    ours = default_tokenizer()
    ids = ours.encode(text)
    assert from_json.decode(ids) == ours.decode(ids)
    marked = f"{text} <extra_id_3> {text}"
    for encoded, sentinels in ((text, False), *([] if "<extra_id_0>" in text else [(marked, True)])):
        expected, found = (each.encode(encoded, sentinels=sentinels) for each in (ours, from_json))
        if found != expected:  # the two libraries break ties between splits of a word in their own ways
            assert likelihood(found) == pytest.approx(likelihood(expected), rel=1e-6)
            assert from_json.decode(found) == ours.decode(expected)


def test_both_kinds_agree_on_the_embedded_text(from_json):
    texts = embedded.packages()["body"][:2000:10]
    assert from_json.encode_batch(texts) == default_tokenizer().encode_batch(texts)
    assert (from_json.vocab_size, from_json.sentinel(0)) == (8192, 8191)


def test_a_folder_gives_sentencepieces_file_first(json_folder, model_path, tmp_path):
    shutil.copyfile(json_folder / "tokenizer.json", tmp_path / "tokenizer.json")
    assert Tokenizer(tmp_path).content_hash == Tokenizer(json_folder / "tokenizer.json").content_hash
    shutil.copyfile(model_path, tmp_path / "spiece.model")
    assert Tokenizer(tmp_path).content_hash == Tokenizer(model_path).content_hash


def test_a_tokenizer_of_another_kind_is_refused(json_folder, tmp_path):
    record = json.loads((json_folder / "tokenizer.json").read_text())
    path = tmp_path / "tokenizer.json"
    for spoiled, said in (
        ({**record, "model": {**record["model"], "type": "BPE"}}, "its model is BPE, and T5's is Unigram"),
        ({**record, "model": {**record["model"], "vocab": [["a", 0.0]]}}, "'<pad>' is not in list"),
        ([], "not a tokenizer.json of a T5"),
    ):
        path.write_text(json.dumps(spoiled))
        with pytest.raises(InputError, match=said) as caught:
            Tokenizer(path)
        assert "\n" not in str(caught.value)


def test_bad_files_end_in_one_clear_line(tmp_path):
    empty, text, other = tmp_path / "empty", tmp_path / "text", tmp_path / "other"
    empty.touch()
    text.write_text("no model at all")
    train(other)
    cases = {
        tmp_path / "missing": "cannot be read",
        tmp_path: "cannot be read",
        empty: "is empty",
        text: "not a SentencePiece model",
        other: "pad_id=0",
    }
    for path, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            Tokenizer(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_shipped_tokenizer_has_8192_ids():
    tokenizer = default_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.sentinel(0), tokenizer.sentinel(99)) == (8192, 8191, 8092)
    text = "This package provides the documentation. Dieses Paket enthält die Dokumentation."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < 25  # frequent words are pieces of their own
