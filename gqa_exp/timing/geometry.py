"""Untrained models to time: which depth of a geometry fits into memory, and its variants with shared encoders."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import psutil
import torch

from gqa_exp.config import TimingConfig
from gqa_exp.errors import InputError
from gqa_exp.model import T5, InferenceT5, T5Config
from gqa_exp.timing.cost import BYTES_PER_ELEMENT, Work
from gqa_exp.timing.timer import to_compile

DEPTHS = ([1, 2, 4], [1, 2])
"""Depths to extend from where the whole does not fit, the first that fits."""
HEADROOM = 0.9
"""Share of the free memory that may be planned with."""


def free_memory(device: str) -> int:
    """Bytes that this process can still allocate on the device."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def bytes_needed(geometries: Sequence[T5Config], config: TimingConfig, dtype: str, depths: Sequence[int] = ()) -> float:
    """Bytes that timing these geometries against each other takes at its peak, within about a tenth.

    All variants' weights at once, the encoder and both embeddings shared; one variant's weights a second time while
    they are packed; the caches and the encoder's activations of the variant that takes most. Where steps are recorded,
    as on a GPU, what they read is kept: of all variants, at each of the depths.

    Args:
        geometries: the variants.
        config: batch and lengths.
        dtype: number format that will run.
        depths: layers that the variants are timed at, up to the deepest; empty: whole.
    """
    element = BYTES_PER_ELEMENT[dtype]
    timed = [[geometry.cut(depth) for geometry in geometries] for depth in depths] or [list(geometries)]
    decoders = [_decoder_parameters(geometry) for geometry in timed[-1]]
    largest = timed[-1][0]
    shared = largest.num_parameters() - decoders[0]
    B, S = config.encoder_batch_size or config.batch_size, config.source_length
    # Input, q, k, v and output of attention, or both halves of the feed-forward and their product; and the bias of all
    # pairs of positions, which the kernel of model/sequence.py does without.
    widest = max(5 * largest.d_model, 2 * largest.d_model + 3 * largest.d_ff)
    activations = B * S * widest + 2 * largest.num_heads * S * S
    states = 2 * config.batch_size * S * largest.d_model
    recorded = config.device == "cuda" and to_compile(config, largest, dtype)
    lengths = config.batch_size, config.source_length, config.output_length
    works = [Work(geometry, *lengths, dtype) for variants in timed for geometry in variants]
    caches = (sum if recorded else max)(work.cache_bytes_per_sample() for work in works) * config.batch_size
    return (shared + sum(decoders) + max(decoders) + activations + states) * element + caches


def _decoder_parameters(geometry: T5Config) -> int:
    """Parameters of the decoder's layers."""
    without = replace(geometry, num_decoder_layers=1, num_kv_heads=1)
    two = replace(geometry, num_decoder_layers=2, num_kv_heads=1)
    layer = two.num_parameters() - without.num_parameters()
    heads = sum(geometry.kv_heads) - len(geometry.kv_heads)
    return layer * len(geometry.kv_heads) + heads * 4 * geometry.head_dim * geometry.d_model


def depths_that_fit(geometries: Sequence[T5Config], config: TimingConfig, dtype: str, free: float) -> list[int]:
    """Depths to time the geometries at; empty where they fit whole.

    Args:
        geometries: the variants.
        config: batch and lengths; with `depths`, these are tried alone.
        dtype: number format that will run.
        free: bytes that may be used.

    Raises:
        InputError: no depth fits; says what the shallowest needs. Nothing has been allocated.
    """
    if config.depths:
        choices = [list(config.depths)]
    else:
        layers = min(geometries[0].num_encoder_layers, geometries[0].num_decoder_layers)
        choices = [[], *([d for d in depths if d <= layers] for depths in DEPTHS)]
        choices = [depths for depths in choices if len(depths) != 1]
    need = 0.0
    for depths in choices:
        need = bytes_needed(geometries, config, dtype, depths)
        if need <= HEADROOM * free:
            return depths
    at = f"at {choices[-1][-1]} layers" if choices[-1] else "whole"
    raise InputError(
        f"the {len(geometries)} variants need {need / 2**30:.1f} GiB {at}, and {free / 2**30:.1f} GiB are free; "
        "give a smaller batch, shorter lengths, an --encoder-batch-size, fewer variants, or two smaller --depths"
    )


def random_models(
    geometries: Mapping[str, T5Config], config: TimingConfig, dtype: str, depth: int | None = None
) -> dict[str, InferenceT5]:
    """Models of random weights, prepared for decoding, the encoder and both embeddings shared between them.

    Args:
        geometries: name to geometry; equal but for their KV heads.
        config: seed, device and cross_kv are used.
        dtype: number format of the weights.
        depth: at most so many layers of each stack.
    """
    torch.manual_seed(config.seed)
    models: dict[str, InferenceT5] = {}
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(config.device):
            for name, whole in geometries.items():
                geometry = whole if depth is None else whole.cut(depth)
                first = next(iter(models.values()), None)
                encoder_layers = geometry.num_encoder_layers if first is None else 0
                model = InferenceT5(
                    T5(replace(geometry, num_encoder_layers=encoder_layers)).eval(),
                    config.cross_kv,
                    compile_step=to_compile(config, whole, dtype),
                )
                if first is not None:
                    model.config = geometry
                    model.encoder, model.embedding, model.lm_head = first.encoder, first.embedding, first.lm_head
                models[name] = model
    finally:
        torch.set_default_dtype(before)
    return models
