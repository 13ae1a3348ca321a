"""Streamed text: every token once and in order, whatever the ranks are, and on from where it stopped."""

import gzip
import json

import numpy as np
import pytest
import torch

from gqa_exp.config import CorpusConfig
from gqa_exp.data.stream import Lane, Position, TextStream, c4_files, stream_identity
from gqa_exp.data.tokenizer import default_tokenizer
from gqa_exp.errors import InputError

TOKENIZER = default_tokenizer()
TEXTS = [[f"Document {d} of file {f}. " * (1 + (d * 7 + f) % 5) for d in range(70 + f)] for f in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight files of C4's layout, each of a little more than one portion of documents."""
    folder = tmp_path_factory.mktemp("c4") / "en"
    folder.mkdir()
    for f, texts in enumerate(TEXTS):
        lines = [json.dumps({"text": t, "timestamp": "2019-04-25T12:57:54Z", "url": "http://example"}) for t in texts]
        name = f"c4-train.{f:05}-of-01024.json.gz"
        (folder / name).write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))
    (folder / "c4-validation.00000-of-00008.json.gz").write_bytes(gzip.compress(b"not read"))
    return folder


def config(folder, **changes):
    return CorpusConfig(name="c4", input_length=44, target_length=10, data_dir=str(folder), **changes)


def expected_tokens(files):
    return [token for f in files for text in TEXTS[f] for token in TOKENIZER.encode(text)]


def test_a_lane_is_its_documents_joined_over_and_over(folder):
    files = c4_files(config(folder))
    assert len(files) == 8
    lane = Lane([files[3], files[5]], TOKENIZER, Position(0, 0, 0))
    once = expected_tokens([3, 5])
    taken = np.concatenate([lane.take(n) for n in (1, 7, 500, 0 + 1, len(once), 333)])
    assert taken.tolist() == (once * 3)[: len(taken)]


def test_a_lane_goes_on_from_every_position(folder):
    files = c4_files(config(folder))[:2]
    lane, tokens = Lane(files, TOKENIZER, Position(0, 0, 0)), expected_tokens([0, 1]) * 4
    taken = 0
    for count in (1, 3, 40, 1000, 9, 2500, 17, 17, 4000):
        lane.take(count)
        taken += count
        again = Lane(files, TOKENIZER, lane.position)
        assert again.take(50).tolist() == tokens[taken : taken + 50]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_batches_do_not_depend_on_the_number_of_ranks(folder):
    alone = TextStream(config(folder), TOKENIZER, seed=3, batch_size=8)
    assert alone.lanes == 8
    batches = [alone.batch(step) for step in range(5)]
    assert batches[0]["input_ids"].shape == (8, 44)
    assert batches[0]["labels"].shape == (8, 10)
    for ranks in (2, 4):
        streams = [TextStream(config(folder), TOKENIZER, seed=3, batch_size=8) for _ in range(ranks)]
        for step in range(5):
            for rank, stream in enumerate(streams):
                share = stream.batch(step, rank, ranks)
                assert same(share, {name: tensor[rank::ranks] for name, tensor in batches[step].items()})
    other = TextStream(config(folder), TOKENIZER, seed=4, batch_size=8)
    assert not same(other.batch(0), batches[0])


def test_a_run_goes_on_where_it_stopped_on_other_ranks(folder):
    straight = TextStream(config(folder), TOKENIZER, seed=0, batch_size=8)
    batches = [straight.batch(step) for step in range(9)]
    ranks = [TextStream(config(folder), TOKENIZER, seed=0, batch_size=8) for _ in range(2)]
    for step in range(6):  # one ahead of the five that were trained on
        for rank, stream in enumerate(ranks):
            stream.batch(step, rank, 2)
    kept = json.loads(json.dumps({**ranks[0].positions(5), **ranks[1].positions(5)}))
    assert len(kept) == 9
    resumed = TextStream(config(folder), TOKENIZER, seed=0, batch_size=8, positions=kept)
    assert all(same(resumed.batch(step), batches[step]) for step in range(5, 9))


def test_positions_of_another_order_or_of_other_files_do_not_count(folder, tmp_path):
    stream = TextStream(config(folder), TOKENIZER, seed=0, batch_size=8)
    stream.batch(0)
    kept = stream.positions(1)
    for changes in ({"seed": 1}, {"batch_size": 4}, {"config": config(tmp_path)}):
        (tmp_path / "c4-train.0.jsonl").write_text(json.dumps({"text": "Other text. " * 99}) + "\n")
        settings = {"config": config(folder), "tokenizer": TOKENIZER, "seed": 0, "batch_size": 8, **changes}
        assert same(TextStream(**settings, positions=kept).batch(0), TextStream(**settings).batch(0))


def test_a_position_beyond_its_document_is_that_of_the_next(folder):
    files = c4_files(config(folder))[:1]
    after = Lane(files, TOKENIZER, Position(0, 1, 0)).take(20)
    assert Lane(files, TOKENIZER, Position(0, 0, 10_000)).take(20).tolist() == after.tolist()


def test_the_identity_follows_names_and_sizes(folder, tmp_path):
    first = stream_identity(config(folder), TOKENIZER)
    for path in folder.glob("*train*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert stream_identity(config(tmp_path), TOKENIZER) == first
    path = tmp_path / "c4-train.00000-of-01024.json.gz"
    data = path.read_bytes()
    path.write_bytes(data + b"\0")
    assert stream_identity(config(tmp_path), TOKENIZER) != first
    path.write_bytes(data)
    assert stream_identity(config(tmp_path), TOKENIZER) == first
    path.unlink()
    assert stream_identity(config(tmp_path), TOKENIZER) != first
    assert len(c4_files(CorpusConfig(name="c4"))) == 1024


def test_what_is_wrong_is_said_in_one_line(tmp_path, folder):
    with pytest.raises(InputError, match=r"no files named like c4-train"):
        TextStream(config(tmp_path), TOKENIZER, 0, 1)
    with pytest.raises(InputError, match="3 ranks cannot share the 8 lanes"):
        TextStream(config(folder), TOKENIZER, 0, 8).batch(0, 0, 3)
    path = tmp_path / "c4-train.00000-of-00001.json"
    for text, said in (
        ('{"text": "a"}\nhello\n', r"json: line 2 is no JSON object"),
        ('{"txt": "a"}\n', r"json: line 1 is no JSON object with a \"text\" \('text'\)"),
        ('{"text": null}\n', r"json: line 1 is no JSON object with a \"text\" \(text is None"),
        ("", "no documents"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            TextStream(config(tmp_path), TOKENIZER, 0, 1).batch(0)
    path.with_suffix(".json.gz").write_bytes(b"no gzip at all")
    path.unlink()
    with pytest.raises(InputError, match=r"cannot be read .* give that as corpus.data_dir"):
        TextStream(config(tmp_path), TOKENIZER, 0, 1).batch(0)
