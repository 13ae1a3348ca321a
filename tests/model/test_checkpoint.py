import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gqa_exp.errors import InputError
from gqa_exp.model.checkpoint import content_hash, load, load_hf, save, save_hf


def edit_json(path, **changes):
    record = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in {**record, **changes}.items() if value != "removed"}))


def edit_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def assert_same(ours, theirs):
    assert ours.config == theirs.config
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == theirs.state_dict()[name].dtype
        assert torch.equal(tensor, theirs.state_dict()[name]), name


@pytest.mark.parametrize("kv_heads", [None, 1, [4, 2, 1]])
def test_save_and_load_give_the_same_model(tiny_model, tmp_path, kv_heads):
    model = tiny_model(num_kv_heads=kv_heads, layer_norm_epsilon=1e-5, pad_id=3, eos_id=4, decoder_start_id=5)
    save(model, tmp_path / "new" / "folder")
    loaded = load(tmp_path / "new" / "folder")
    assert_same(loaded, model)
    ids = torch.randint(60, (2, 5))
    loaded(ids, ids).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_bfloat16_round_trip(tiny_model, tmp_path):
    model = tiny_model(num_kv_heads=2)
    save(model, tmp_path, torch.bfloat16)
    assert model.embedding.weight.dtype == torch.float32
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    loaded = load(tmp_path, torch.bfloat16)
    assert_same(loaded, model.bfloat16())
    assert_same(load(tmp_path), model.float())


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def poison(value):
    def change(weights):
        weights["decoder.layers.1.cross_attention.k.weight"][0, 0] = value

    return lambda folder: edit_weights(folder / "model.safetensors", change)


BAD_FOLDERS = {
    "missing folder": (shutil.rmtree, "no such checkpoint folder"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("")), "no such checkpoint folder"),
    "missing config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "missing weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "truncated": (truncate, "model.safetensors: truncated or not a safetensors file"),
    "no safetensors": (lambda folder: (folder / "model.safetensors").write_text("hello"), "not a safetensors file"),
    "pickle only": (pickled, r"pickled weights \(pytorch_model.bin\)"),
    "NaN": (poison(float("nan")), r"decoder.layers.1.cross_attention.k.weight holds NaN or Inf"),
    "Inf": (poison(float("-inf")), r"decoder.layers.1.cross_attention.k.weight holds NaN or Inf"),
    "other width": (lambda f: edit_json(f / "config.json", d_model=24), r"has shape \(60, 20\), but .* \(60, 24\)"),
    "other kv heads": (lambda f: edit_json(f / "config.json", num_kv_heads=2), r"k.weight has shape \(24, 20\), but"),
    "more layers": (
        lambda f: edit_json(f / "config.json", num_decoder_layers=4, num_kv_heads=None),
        "decoder.layers.3.* is missing",
    ),
    "fewer layers": (lambda f: edit_json(f / "config.json", num_encoder_layers=1), "encoder.layers.1.* has no place"),
    "bad kv heads": (lambda f: edit_json(f / "config.json", num_kv_heads=3), "num_kv_heads=3 does not divide"),
    "unknown field": (lambda f: edit_json(f / "config.json", d_modle=3), 'unknown field "d_modle"; did you mean "d_mo'),
    "lacking field": (lambda f: edit_json(f / "config.json", d_ff="removed"), "incomplete geometry.*d_ff"),
    "other format": (lambda f: edit_json(f / "config.json", format="removed"), "not a checkpoint of ours"),
    "no JSON": (lambda f: (f / "config.json").write_text('{"d_model": '), "not readable as JSON"),
    "JSON list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_refused_in_one_line(tiny_model, tmp_path, case):
    spoil, message = BAD_FOLDERS[case]
    folder = tmp_path / "checkpoint"
    save(tiny_model(), folder)
    load(folder)
    spoil(folder)
    with pytest.raises(InputError, match=message) as raised:
        load(folder)
    assert str(raised.value).startswith(str(folder)) or case == "bad kv heads"
    assert "\n" not in str(raised.value)


def test_pickles_beside_safetensors_are_ignored(tiny_model, tmp_path):
    save(tiny_model(), tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert_same(load(tmp_path), tiny_model())


def test_a_folder_that_cannot_be_written_is_refused(tiny_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the checkpoint"):
        save(tiny_model(), tmp_path / "file" / "folder")


def test_content_hash_sees_content_only(tiny_model, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    save(tiny_model(), first)
    save(tiny_model(), second)
    record = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps(dict(reversed(record.items()))))
    (second / "notes.txt").write_text("not content")
    same = content_hash(first)
    assert content_hash(second) == same
    hashes = {same}
    for change in (
        lambda: (second / "training.json").write_text('{"step": 1}'),
        lambda: save_file({"slot": torch.zeros(2)}, second / "optimizer.safetensors"),
        lambda: edit_json(second / "config.json", layer_norm_epsilon=1e-5),
        lambda: edit_weights(second / "model.safetensors", lambda weights: weights["lm_head.weight"].neg_()),
    ):
        change()
        hashes.add(content_hash(second))
    assert len(hashes) == 5


# -- transformers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"num_decoder_layers": 1, "pad_id": 3, "eos_id": 4, "decoder_start_id": 3}])
def test_export_to_transformers_and_back_is_the_identity(tiny_model, tmp_path, changes):
    model = tiny_model(relative_buckets=16, relative_max_distance=50, layer_norm_epsilon=1e-5, **changes)
    save_hf(model, tmp_path / "ours")
    assert_same(load_hf(tmp_path / "ours"), model)
    # and through transformers itself, which must take and give every weight
    reference, loading = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reference.save_pretrained(tmp_path / "theirs")
    assert_same(load_hf(tmp_path / "theirs"), model)


def test_reads_sharded_folders(tiny_model, tmp_path):
    save_hf(tiny_model(), tmp_path / "ours")
    reference = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert_same(load_hf(tmp_path / "theirs"), tiny_model())


def test_ignores_weights_that_no_model_uses(tiny_model, tmp_path):
    save_hf(tiny_model(), tmp_path)

    def add(weights):
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"].clone()
        weights["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(32, 4)

    edit_weights(tmp_path / "model.safetensors", add)
    assert_same(load_hf(tmp_path), tiny_model())


def test_reads_in_bfloat16(tiny_model, tmp_path):
    save_hf(tiny_model(), tmp_path)
    assert_same(load_hf(tmp_path, torch.bfloat16), tiny_model().bfloat16())


def test_fewer_kv_heads_cannot_be_exported(tiny_model, tmp_path):
    with pytest.raises(InputError, match=r"num_kv_heads=\[4, 2, 4\].*multi-head"):
        save_hf(tiny_model(num_kv_heads=[4, 2, 4]), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True, but T5.1.1 has False"),
        ({"tie_word_embeddings": "removed"}, "tie_word_embeddings=True"),  # transformers' default
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu', but T5.1.1 has 'gated-gelu'"),
        ({"feed_forward_proj": "removed"}, "feed_forward_proj=None"),
        ({"model_type": "bart"}, "model_type='bart'"),
        ({"d_kv": "removed"}, "field 'd_kv' is missing"),
        ({"d_ff": 29}, "weight .*wi_0.* has shape"),
        ({"num_layers": 3}, "weight encoder.layers.2.* is missing"),
    ],
)
def test_other_transformers_folders_are_refused(tiny_model, tmp_path, changes, message):
    save_hf(tiny_model(), tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        load_hf(tmp_path)


def test_formats_are_not_mixed_up(tiny_model, tmp_path):
    save_hf(tiny_model(), tmp_path / "theirs")
    save(tiny_model(), tmp_path / "ours")
    with pytest.raises(InputError, match="a transformers checkpoint; read it with load_hf"):
        load(tmp_path / "theirs")
    with pytest.raises(InputError, match=r"only T5\.1\.1 fits this model"):
        load_hf(tmp_path / "ours")
