"""What is planned against what exists: bytes of real tensors, depths against memory that is set."""

import dataclasses

import pytest
import torch

from gqa_exp.config import TimingConfig
from gqa_exp.errors import InputError
from gqa_exp.model import T5, InferenceT5, T5Config
from gqa_exp.timing.geometry import _decoder_parameters, bytes_needed, depths_that_fit, random_models

CONFIG = TimingConfig(batch_size=3, source_length=16, output_length=4, dtype="float32", compile="off")


def geometry(kv_heads: object, layers: int = 6) -> T5Config:
    return T5Config(
        vocab_size=90, d_model=32, d_ff=48, num_heads=4, head_dim=8, num_encoder_layers=layers,
        num_decoder_layers=layers, num_kv_heads=kv_heads,
    )  # fmt: skip


@pytest.mark.parametrize("kv_heads", [1, 4, [4, 2, 1]])
def test_decoder_parameters_are_those_of_its_layers(kv_heads: object) -> None:
    model = T5(geometry(kv_heads, layers=3))
    assert _decoder_parameters(model.config) == sum(p.numel() for p in model.decoder.layers.parameters())


def storage(models: dict[str, InferenceT5]) -> int:
    """Bytes of all distinct weights of the models, packed ones included."""
    seen = {}
    for model in models.values():
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if isinstance(tensor, torch.Tensor):
                    seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def test_weights_are_shared_but_for_the_decoders() -> None:
    geometries = {"MHA": geometry(4), "MQA": geometry(1)}
    models = random_models(geometries, CONFIG, "float32")
    decoders = [_decoder_parameters(g) for g in geometries.values()]
    own = 32 * 4  # position bias of the second decoder
    expected = geometry(4).num_parameters() - decoders[0] + sum(decoders) + own
    assert storage(models) == 4 * expected
    assert {name: model.config for name, model in models.items()} == geometries
    assert models["MHA"].encoder is models["MQA"].encoder
    assert models["MQA"].layers[0].qkv.norm.weight.dtype == torch.float32
    assert models["MQA"].encode(torch.ones(1, 2, dtype=torch.long)).shape == (1, 2, 32)
    assert random_models(geometries, CONFIG, "bfloat16", depth=2)["MQA"].config == geometry(1).cut(2)
    assert torch.get_default_dtype() == torch.float32


def test_what_is_needed_covers_weights_and_caches() -> None:
    one = bytes_needed([geometry(4)], CONFIG, "float32")
    weights = geometry(4).num_parameters() + _decoder_parameters(geometry(4))
    caches = 3 * geometry(4).kv_cache_bytes(16, 4, 4)
    assert one > 4 * weights + caches
    assert one < 4 * weights + caches + 4 * (3 * 16 * 6 * 48 + 2 * 4 * 16 * 16 + 2 * 3 * 16 * 32)
    two = bytes_needed([geometry(4), geometry(1)], CONFIG, "float32")
    assert two - one == 4 * _decoder_parameters(geometry(1))
    assert bytes_needed([geometry(4)], CONFIG, "bfloat16") == one / 2
    less = dataclasses.replace(CONFIG, encoder_batch_size=1)
    assert bytes_needed([geometry(4)], less, "float32") < one


@pytest.mark.parametrize(("compiled", "kept"), [("auto", True), ("on", True), ("off", False)])
def test_caches_of_recorded_steps_are_there_together(compiled: str, kept: bool) -> None:
    both = [geometry(4), geometry(2)]
    on_cpu = bytes_needed(both, CONFIG, "float32")
    on_gpu = bytes_needed(both, dataclasses.replace(CONFIG, device="cuda", compile=compiled), "float32")
    assert on_gpu - on_cpu == (3 * geometry(2).kv_cache_bytes(16, 4, 4) if kept else 0)
    gpu = dataclasses.replace(CONFIG, device="cuda", compile=compiled)
    three = bytes_needed([geometry(4)], gpu, "float32", [1, 2, 4])
    one = bytes_needed([geometry(4).cut(4)], gpu, "float32")
    assert three - one == (3 * geometry(4).cut(3).kv_cache_bytes(16, 4, 4) if kept else 0)  # 1 + 2 layers


def test_the_deepest_depths_that_fit_are_taken_and_too_little_memory_is_said() -> None:
    variants = [geometry(4), geometry(1)]

    def need(depth: int) -> float:
        return bytes_needed([g.cut(depth) for g in variants], CONFIG, "float32")

    def fitting(free: float, **changes: object) -> list[int]:
        return depths_that_fit(variants, dataclasses.replace(CONFIG, **changes), "float32", free / 0.9 + 1)

    assert fitting(need(6)) == []
    assert fitting(need(6) - 9) == [1, 2, 4]
    assert fitting(need(4)) == [1, 2, 4]
    assert fitting(need(4) - 9) == [1, 2]
    assert fitting(need(3), depths=[1, 3]) == [1, 3]
    for changes, free, depth in (({}, need(2), 2), ({"depths": [2, 3]}, need(3), 3)):
        with pytest.raises(InputError, match=rf"2 variants need .* at {depth} layers, and .* are free"):
            fitting(free - 9, **changes)
    with pytest.raises(InputError, match="whole"):
        depths_that_fit([geometry(4, layers=1)], CONFIG, "float32", 1000)
