import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gqa_exp.errors import InputError
from gqa_exp.model import T5, T5Config, generate
from gqa_exp.model.checkpoint import content_hash, load, load_hf, save, save_hf
from gqa_exp.timing.cli import read_model_config


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


RELATIVES = {
    "T5.1.1": {},
    "other ids": {"num_decoder_layers": 1, "pad_id": 3, "eos_id": 4, "decoder_start_id": 3},
    "T5 1.0": {"feed_forward": "relu", "tied_embeddings": True},
    "UL2": {"feed_forward": "gated-silu", "head_dim": 10},
}


@pytest.mark.parametrize("relative", RELATIVES)
def test_export_to_transformers_and_back_is_the_identity(tiny_model, padded_batch, tmp_path, relative):
    model = tiny_model(relative_buckets=16, relative_max_distance=50, layer_norm_epsilon=1e-5, **RELATIVES[relative])
    save_hf(model, tmp_path / "ours")
    assert_same(load_hf(tmp_path / "ours"), model)
    # and through transformers itself, which must take and give every weight
    reference, loading = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    input_ids, mask = padded_batch([9, 4], model.config.vocab_size)
    with torch.no_grad():
        theirs = reference.eval()(input_ids=input_ids, attention_mask=mask, decoder_input_ids=input_ids).logits
        torch.testing.assert_close(model(input_ids, input_ids, mask), theirs, rtol=1e-4, atol=1e-4)
    reference.save_pretrained(tmp_path / "theirs")
    assert_same(load_hf(tmp_path / "theirs"), model)


def test_mt5_is_a_t5_that_is_never_scaled(tiny_model, padded_batch, tmp_path):
    save_hf(tiny_model(), tmp_path / "t5")
    edit_json(tmp_path / "t5" / "config.json", model_type="mt5", architectures=["MT5ForConditionalGeneration"])
    reference = transformers.MT5ForConditionalGeneration.from_pretrained(tmp_path / "t5").eval()
    reference.save_pretrained(tmp_path / "mt5")
    assert json.loads((tmp_path / "mt5" / "config.json").read_text())["tie_word_embeddings"] is True
    model = load_hf(tmp_path / "mt5")
    assert_same(model, tiny_model())
    input_ids, mask = padded_batch([9, 4], model.config.vocab_size)
    with torch.no_grad():
        theirs = reference(input_ids=input_ids, attention_mask=mask, decoder_input_ids=input_ids).logits
        torch.testing.assert_close(model(input_ids, input_ids, mask), theirs, rtol=1e-4, atol=1e-4)


def test_an_output_matrix_that_transformers_tied_is_the_embedding(tiny_model, padded_batch, tmp_path):
    """What transformers 5 makes of a new T5.1.1: not scaled, one matrix, stored once."""
    save_hf(tiny_model(), tmp_path / "t5")
    config = transformers.T5Config.from_pretrained(tmp_path / "t5")
    reference = transformers.T5ForConditionalGeneration(config).eval()
    reference.save_pretrained(tmp_path / "theirs")
    assert "lm_head.weight" not in load_file(tmp_path / "theirs" / "model.safetensors")
    model = load_hf(tmp_path / "theirs")
    assert not model.config.tied_embeddings
    input_ids, mask = padded_batch([9, 4], model.config.vocab_size)
    with torch.no_grad():
        theirs = reference(input_ids=input_ids, attention_mask=mask, decoder_input_ids=input_ids).logits
        torch.testing.assert_close(model(input_ids, input_ids, mask), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [2, pytest.param(24, marks=pytest.mark.slow, id="whole")])
@pytest.mark.parametrize("shape", ["small", "base"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_logits_of_public_shapes_equal_transformers(padded_batch, tmp_path, shape, dtype, tolerance, layers):
    config = T5Config.from_model_config(read_model_config(f"t5_{shape}")).cut(layers)
    torch.manual_seed(0)
    save_hf(T5(config), tmp_path)
    reference = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
    input_ids, mask = padded_batch([33, 20, 7], config.vocab_size)
    with torch.no_grad():
        theirs = reference(input_ids=input_ids, attention_mask=mask, decoder_input_ids=input_ids[:, :12]).logits
        ours = load_hf(tmp_path, dtype)(input_ids, input_ids[:, :12], mask)
    assert ours.dtype == theirs.dtype == dtype
    apart = float((ours - theirs).abs().max())
    print(f"t5_{shape}, {config.num_encoder_layers} layers, {dtype}: largest difference of a logit {apart:.1e}")
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_fewer_kv_heads_are_carried_and_reload(tiny_model, tmp_path):
    model = tiny_model(num_kv_heads=[4, 2, 1])
    save_hf(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_kv_heads"] == [4, 2, 1]
    assert_same(load_hf(tmp_path), model)
    with pytest.raises(RuntimeError, match="mismatch"):  # rather than decode with heads that are not there
        transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("kv_heads", [1, 2, [4, 1]])
def test_expanded_heads_give_a_plain_t5_of_the_same_function(tiny_model, padded_batch, tmp_path, kv_heads):
    model = tiny_model(num_kv_heads=kv_heads, num_decoder_layers=2)
    save_hf(model, tmp_path, expand=True)
    assert "num_kv_heads" not in json.loads((tmp_path / "config.json").read_text())
    reference = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    input_ids, mask = padded_batch([9, 4], model.config.vocab_size)
    decoder_ids = torch.randint(model.config.vocab_size, (2, 7))
    with torch.no_grad():
        theirs = reference(input_ids=input_ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
        torch.testing.assert_close(model(input_ids, decoder_ids, mask), theirs, rtol=1e-4, atol=1e-4)
    reference.generation_config.eos_token_id = None
    generated = reference.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    ours = generate(model, input_ids, mask, max_new_tokens=12, stop_at_eos=False)
    assert generated[:, 1:].tolist() == ours.tolist()


def shard(model, folder):
    save_hf(model, folder / "whole")
    reference = transformers.T5ForConditionalGeneration.from_pretrained(folder / "whole")
    reference.save_pretrained(folder / "shards", max_shard_size="20KB")
    shards = sorted((folder / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    return shards


def test_reads_sharded_folders(tiny_model, tmp_path):
    shard(tiny_model(), tmp_path)
    save_file({"another": torch.zeros(2)}, tmp_path / "shards" / "beside.safetensors")  # which the index does not name
    assert_same(load_hf(tmp_path / "shards"), tiny_model())


def test_shards_that_do_not_fit_together_are_refused(tiny_model, tmp_path):
    first, second, *_ = shard(tiny_model(), tmp_path)
    name = sorted(load_file(first))[0]
    edit_weights(second, lambda weights: weights.update({name: load_file(first)[name]}))
    with pytest.raises(InputError, match=f"{second.name}: weight {name} is in {first.name} too"):
        load_hf(tmp_path / "shards")
    second.unlink()
    with pytest.raises(InputError, match=f"{second.name}: missing, though model.safetensors.index.json names it"):
        load_hf(tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match="not readable as an index"):
        load_hf(tmp_path / "shards")


def test_a_hub_id_is_read_from_the_hubs_cache(tiny_model, tmp_path, monkeypatch):
    from huggingface_hub import constants

    cache = tmp_path / "hub" / "models--someone--tiny"
    save_hf(tiny_model(), cache / "snapshots" / "0123")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert_same(load_hf("someone/tiny"), tiny_model())
    with pytest.raises(InputError, match=r"someone/other: no such folder.*download config.json") as raised:
        load_hf("someone/other")
    assert "\n" not in str(raised.value)


def test_a_hub_repository_without_safetensors_says_how_to_make_them(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds no safetensors.*from_pretrained\(\"google/t5\"\).save_pretrained"):
        load_hf("google/t5")


MEMORY = """
import re, sys, threading, time
import torch, safetensors.torch
from gqa_exp.model.checkpoint import load_hf

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

torch.zeros(1).to(torch.bfloat16)
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
model = load_hf(sys.argv[1], getattr(torch, sys.argv[2]))
done = True
watcher.join()
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak - before) / weights)
"""


@pytest.mark.parametrize("shape", ["small", pytest.param("large", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_holds_a_checkpoint_once(tmp_path, shape, dtype):
    if not sys.platform.startswith("linux"):
        pytest.skip("memory is told apart by Linux alone")
    with torch.device("meta"):
        model = T5(T5Config.from_model_config(read_model_config(f"t5_{shape}")))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    save_hf(model, tmp_path)
    del model
    found = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), dtype], capture_output=True, text=True, check=True
    )
    ratio = float(found.stdout)
    print(f"t5_{shape} in {dtype}: peak anonymous memory {ratio:.3f} of the weights")
    assert 0.95 < ratio < 1.15


def test_reads_in_bfloat16(tiny_model, tmp_path):
    save_hf(tiny_model(), tmp_path)
    assert_same(load_hf(tmp_path, torch.bfloat16), tiny_model().bfloat16())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": True}, "decoder states are scaled.*not the embedding"),
        ({"tie_word_embeddings": "removed"}, "decoder states are scaled"),  # transformers' default
        ({"feed_forward_proj": "relu"}, "weight encoder.layers.0.feed_forward.wi.weight .* is missing"),
        ({"feed_forward_proj": "removed"}, r"feed_forward.wi.weight .* is missing"),  # T5's default is ReLU
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj='gelu' does not fit; known: gated-gelu, gated-silu, relu"),
        ({"model_type": "bart"}, "model_type='bart' does not fit this model: known: t5, mt5"),
        ({"model_type": "umt5"}, "model_type='umt5' does not fit .*position bias of its own"),
        ({"d_kv": "removed"}, "field 'd_kv' is missing"),
        ({"d_ff": 29}, "weight .*wi_0.* has shape"),
        ({"num_layers": 3}, "weight encoder.layers.2.* is missing"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\] must be one id"),
    ],
)
def test_other_transformers_folders_are_refused(tiny_model, tmp_path, changes, message):
    save_hf(tiny_model(), tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        load_hf(tmp_path)


def test_special_ids_that_are_null_are_t5s(tiny_model, tmp_path):
    save_hf(tiny_model(), tmp_path)
    edit_json(tmp_path / "config.json", decoder_start_token_id=None, pad_token_id=None, eos_token_id=None)
    assert_same(load_hf(tmp_path), tiny_model())


def test_an_output_matrix_that_is_missing_is_said(tiny_model, tmp_path):
    save_hf(tiny_model(), tmp_path)
    edit_weights(tmp_path / "model.safetensors", lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"weight lm_head.weight .* is missing"):
        load_hf(tmp_path)


def test_formats_are_not_mixed_up(tiny_model, tmp_path):
    save_hf(tiny_model(), tmp_path / "theirs")
    save(tiny_model(), tmp_path / "ours")
    with pytest.raises(InputError, match="a transformers checkpoint; read it with load_hf"):
        load(tmp_path / "theirs")
    with pytest.raises(InputError, match=r"model_type=None does not fit"):
        load_hf(tmp_path / "ours")
