"""Checkpoint folders: ours (safetensors + config.json), and transformers' T5.1.1 folders in and out.

A folder of ours holds `config.json` (the geometry), `model.safetensors`, and, where training goes on from it,
`optimizer.safetensors` and `training.json`. Nothing is ever unpickled.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gqa_exp.errors import InputError, suggest
from gqa_exp.model.t5 import T5, T5Config

FORMAT = "gqa_exp.t5"
WEIGHTS, CONFIG, OPTIMIZER, TRAINING = "model.safetensors", "config.json", "optimizer.safetensors", "training.json"


def save(model: T5, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a model as a checkpoint folder.

    Args:
        model: the model.
        folder: created if missing.
        dtype: number format of the stored weights; None keeps the model's.

    Raises:
        InputError: the folder cannot be written.
    """
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    config = {"format": FORMAT, **dataclasses.asdict(model.config)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot write the checkpoint ({error})") from error


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> T5:
    """Read a checkpoint folder of ours.

    Args:
        folder: holds `config.json` and `model.safetensors`.
        dtype: number format of the weights in memory.

    Raises:
        InputError: the folder is missing, not ours, holds a pickle instead, or its weights are truncated, of another
            geometry than its config.json says, or not finite.
    """
    folder = Path(folder)
    record = read_config(folder)
    if record.pop("format", None) != FORMAT:
        hint = (
            "a transformers checkpoint; read it with load_hf" if "model_type" in record else "not a checkpoint of ours"
        )
        raise InputError(f"{folder / CONFIG}: no format={FORMAT!r}: {hint}")
    known = {spec.name for spec in dataclasses.fields(T5Config)}
    for name in record:
        if name not in known:
            raise InputError(f'{folder / CONFIG}: unknown field "{name}"; {suggest(name, known)}')
    try:
        config = T5Config(**record)
    except TypeError as error:
        raise InputError(f"{folder / CONFIG}: incomplete geometry ({error})") from error
    weights = read_tensors(folder / WEIGHTS)
    return _build(config, weights, dtype, folder / WEIGHTS)


def _build(config: T5Config, weights: dict[str, Tensor], dtype: torch.dtype, where: Path) -> T5:
    """A model of the given weights, after checking that they are exactly those the geometry needs."""
    with torch.device("meta"):
        model = T5(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in weights:
            raise InputError(f"{where}: weight {name} of shape {shape} is missing; the file is of another geometry")
        if tuple(weights[name].shape) != shape:
            raise InputError(
                f"{where}: weight {name} has shape {tuple(weights[name].shape)}, but {CONFIG} asks for {shape}"
            )
        if not bool(torch.isfinite(weights[name]).all()):
            raise InputError(f"{where}: weight {name} holds NaN or Inf; use a checkpoint from before it diverged")
    for name in weights:
        if name not in expected:
            raise InputError(f"{where}: weight {name} has no place in the model; the file is of another geometry")
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
    return model.requires_grad_(True)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint folder.

    Raises:
        InputError: the folder or the file is missing, or not JSON; says so when the folder holds a pickle.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint folder; it must hold {CONFIG} and {WEIGHTS}")
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for path in folder.glob(pattern)]
    if pickles and not list(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder}: holds only pickled weights ({pickles[0]}), which are not loaded; convert to safetensors"
        )
    try:
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no {CONFIG}; a checkpoint folder holds {CONFIG} and {WEIGHTS}") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{folder / CONFIG}: not readable as JSON ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f"{folder / CONFIG}: must hold a JSON object")
    return record


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        InputError: the file is missing, truncated, or no safetensors file.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; the weights must be stored as safetensors") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: truncated or not a safetensors file ({error})") from error


def content_hash(folder: Path) -> str:
    """Hash of what a checkpoint folder says: its geometry, weights, optimizer slots and training position."""
    digest = hashlib.sha256()
    digest.update(json.dumps(read_config(folder), sort_keys=True).encode())
    for name in (WEIGHTS, OPTIMIZER, TRAINING):
        path = folder / name
        if path.exists():
            digest.update(name.encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


# -- transformers ------------------------------------------------------------------------------------------------------

_STACK_LAYERS = {
    "encoder": {"self_attention": (0, "SelfAttention"), "feed_forward": (1, "DenseReluDense")},
    "decoder": {
        "self_attention": (0, "SelfAttention"),
        "cross_attention": (1, "EncDecAttention"),
        "feed_forward": (2, "DenseReluDense"),
    },
}
_TOP = {
    "embedding.weight": "shared.weight",
    "lm_head.weight": "lm_head.weight",
    "encoder.final_norm.weight": "encoder.final_layer_norm.weight",
    "decoder.final_norm.weight": "decoder.final_layer_norm.weight",
    "encoder.relative_bias.weight": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "decoder.relative_bias.weight": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
}
_CROSS_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def hf_name(name: str) -> str:
    """The name transformers gives to one of our weights."""
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(\w+?)(_norm)?\.(\w+)(\.weight)?", name)
    assert match is not None, name
    stack, layer, site, norm, leaf, _ = match.groups()
    index, hf_site = _STACK_LAYERS[stack][site]
    inner = "layer_norm" if norm else f"{hf_site}.{leaf}"
    return f"{stack}.block.{layer}.layer.{index}.{inner}.weight"


def load_hf(folder: Path | str, dtype: torch.dtype = torch.float32) -> T5:
    """Read a transformers T5.1.1 folder (config.json + safetensors, sharded or not).

    Raises:
        InputError: as `load`; or the model is not T5.1.1 (tied embeddings, another feed-forward, another family).
    """
    folder = Path(folder)
    record = read_config(folder)
    # transformers 5 writes tie_word_embeddings=true into every T5 folder; this field keeps T5.1.1's false.
    tied = record.get("tie_word_embeddings", True) and record.get("scale_decoder_outputs", True)
    wanted = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    for name, value in wanted.items():
        found = tied if name == "tie_word_embeddings" else record.get(name)
        if found != value:
            raise InputError(
                f"{folder / CONFIG}: {name}={found!r}, but T5.1.1 has {value!r}; only T5.1.1 fits this model"
            )
    try:
        layers = record["num_layers"]
        config = T5Config(
            vocab_size=record["vocab_size"],
            d_model=record["d_model"],
            d_ff=record["d_ff"],
            num_heads=record["num_heads"],
            head_dim=record["d_kv"],
            num_encoder_layers=layers,
            num_decoder_layers=record.get("num_decoder_layers") or layers,
            relative_buckets=record.get("relative_attention_num_buckets", 32),
            relative_max_distance=record.get("relative_attention_max_distance", 128),
            layer_norm_epsilon=record.get("layer_norm_epsilon", 1e-6),
            num_kv_heads=record.get("num_kv_heads"),
            pad_id=record.get("pad_token_id", 0),
            eos_id=record.get("eos_token_id", 1),
            decoder_start_id=record.get("decoder_start_token_id", 0),
        )
    except KeyError as error:
        raise InputError(f"{folder / CONFIG}: field {error} is missing") from error
    files = sorted(folder.glob("*.safetensors"))
    stored: dict[str, Tensor] = {}
    for path in files or [folder / WEIGHTS]:
        stored.update(read_tensors(path))
    with torch.device("meta"):
        ours = {hf_name(name): name for name in T5(config).state_dict()}
    # transformers may store the input embedding a second time under the stacks' names, and early conversions hold a
    # position bias of cross-attention, which no model uses.
    unused = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", _CROSS_BIAS}
    weights = {ours.get(name, name): tensor for name, tensor in stored.items() if name not in unused}
    return _build(config, weights, dtype, folder)


def save_hf(model: T5, folder: Path | str) -> None:
    """Write a model as a transformers T5.1.1 folder.

    Raises:
        InputError: the model has fewer KV heads than query heads, which transformers' T5 cannot express.
    """
    config = model.config
    if set(config.kv_heads) != {config.num_heads}:
        raise InputError(f"num_kv_heads={list(config.kv_heads)}: transformers' T5 knows multi-head attention only")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {hf_name(name): tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    record = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.head_dim,
        "d_ff": config.d_ff,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "dropout_rate": 0.0,
        "pad_token_id": config.pad_id,
        "eos_token_id": config.eos_id,
        "decoder_start_token_id": config.decoder_start_id,
    }
    (folder / CONFIG).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
