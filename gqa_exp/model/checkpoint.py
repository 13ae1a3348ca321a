"""Checkpoint folders: ours (safetensors + config.json), and transformers' T5 folders in and out.

A folder of ours holds `config.json` (the geometry), `model.safetensors`, and, where training goes on from it,
`optimizer.safetensors` and `training.json`. Nothing is ever unpickled. Weights are read one tensor at a time into a
model without any, so that memory holds a checkpoint once.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gqa_exp.errors import InputError, one_line, suggest
from gqa_exp.model.convert import expand_heads
from gqa_exp.model.t5 import ACTIVATIONS, T5, T5Config

FORMAT = "gqa_exp.t5"
WEIGHTS, CONFIG, OPTIMIZER, TRAINING = "model.safetensors", "config.json", "optimizer.safetensors", "training.json"
HF_INDEX = "model.safetensors.index.json"


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
    except (OSError, SafetensorError) as error:
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
    config = _own_config(folder)
    return _build(config, stored_tensors([folder / WEIGHTS]), dtype, folder / WEIGHTS)


def load_weights(folder: Path, weights: Mapping[str, Tensor]) -> T5:
    """A model of the geometry that a folder of ours states and of given weights, which become its own.

    Raises:
        InputError: as `load`.
    """
    stored = {name: Given(tensor) for name, tensor in weights.items()}
    return _build(_own_config(folder), stored, torch.float32, folder)


def _own_config(folder: Path) -> T5Config:
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
        return T5Config(**record)
    except TypeError as error:
        raise InputError(f"{folder / CONFIG}: incomplete geometry ({error})") from error


class Readable(Protocol):
    """A weight that has a shape, and is brought into memory when it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor, in that number format."""


@dataclass(frozen=True)
class Given:
    """A weight that is in memory already."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.tensor.shape)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor itself where the number format is its own."""
        return self.tensor.to(dtype)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, of which only the shape has been read."""

    file: Any
    """The open file."""
    name: str
    shape: tuple[int, ...]

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor in memory of its own."""
        tensor: Tensor = self.file.get_tensor(self.name)  # mapped from the file
        return tensor.to(dtype, copy=True)


def stored_tensors(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """What safetensors files hold.

    Raises:
        InputError: a file is missing, truncated, or no safetensors file; or two of them hold the same tensor.
    """
    found: dict[str, StoredTensor] = {}
    holders: dict[str, Path] = {}
    for path in paths:
        try:
            file: Any = safe_open(path, "pt")
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no dict
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file; the weights must be stored as safetensors") from error
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: truncated or not a safetensors file ({error})") from error
        for name, shape in shapes.items():
            if name in found:
                raise InputError(f"{path}: weight {name} is in {holders[name].name} too; only one of them can be right")
            found[name], holders[name] = StoredTensor(file, name, shape), path
    return found


def _build(config: T5Config, stored: Mapping[str, Readable], dtype: torch.dtype, where: Path) -> T5:
    """A model of the given weights, after checking that they are exactly those the geometry needs."""
    with torch.device("meta"):
        model = T5(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in stored:
            raise InputError(f"{where}: weight {name} of shape {shape} is missing; the file is of another geometry")
        if stored[name].shape != shape:
            raise InputError(f"{where}: weight {name} has shape {stored[name].shape}, but {CONFIG} asks for {shape}")
    for name in stored:
        if name not in expected:
            raise InputError(f"{where}: weight {name} has no place in the model; the file is of another geometry")
    weights = {}
    for name in expected:
        weights[name] = stored[name].read(dtype)
        # In pieces: the check needs several numbers per weight.
        if not all(bool(torch.isfinite(piece).all()) for piece in torch.split(weights[name].flatten(), 2**16)):
            raise InputError(f"{where}: weight {name} holds NaN or Inf; use a checkpoint from before it diverged")
    model.load_state_dict(weights, assign=True)
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
    """Hash of what a checkpoint folder says: its geometry, weights, optimizer slots and training position.

    Raises:
        InputError: the folder or a file of it is missing.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(read_config(folder), sort_keys=True).encode())
    files = _hf_files(folder) if is_hf(folder) else [folder / name for name in (WEIGHTS, OPTIMIZER, TRAINING)]
    for path in files:
        if not path.exists() and is_hf(folder):
            raise InputError(f"{path}: no such file; the weights must be stored as safetensors")
        if path.exists():
            digest.update(path.name.encode())
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def is_hf(folder: Path) -> bool:
    """Whether a checkpoint folder is one of transformers.

    Raises:
        InputError: the folder or its configuration is missing.
    """
    record = read_config(folder)
    return "model_type" in record and "format" not in record


def load_any(folder: Path, dtype: torch.dtype = torch.float32) -> T5:
    """A checkpoint folder of ours or of transformers; see `load` and `load_hf`."""
    return load_hf(folder, dtype) if is_hf(folder) else load(folder, dtype)


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


FAMILIES = {"t5": "relu", "mt5": "gated-gelu"}
"""Families that fit, with the feed-forward network of configurations that name none."""
OTHER_FAMILIES = {
    "umt5": "each of its layers has a position bias of its own",
    "longt5": "its encoder attends to neighbours only",
    "switch_transformers": "its feed-forward networks are mixtures of experts",
}
HF_FILES = (CONFIG, "*.safetensors", HF_INDEX, "spiece.model", "tokenizer.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def hf_folder(source: Path | str) -> Path:
    """Where a transformers checkpoint is: a folder as it is given, or a hub id (ORGANISATION/NAME), downloaded once.

    Raises:
        InputError: neither a folder nor in the hub's cache, and the hub cannot be reached or does not know it.
    """
    folder = Path(source)
    if folder.exists() or not HUB_ID.fullmatch(str(source)):
        return folder
    import huggingface_hub  # here, since it takes a second, and only hub ids need it

    try:
        folder = Path(huggingface_hub.snapshot_download(str(source), allow_patterns=list(HF_FILES)))
    except Exception as error:  # of several libraries, by version
        raise InputError(
            f"{source}: no such folder, and not to be had from the Hugging Face hub ({one_line(error)[:120]}); "
            f"download {CONFIG}, the safetensors files with their index, and spiece.model into a folder, and give that"
        ) from error
    if not list(folder.glob("*.safetensors")):
        raise InputError(
            f"{source}: its repository holds no safetensors, and pickles are not loaded; convert it once by "
            f'transformers, T5ForConditionalGeneration.from_pretrained("{source}").save_pretrained(FOLDER), put its '
            "spiece.model there, and give FOLDER"
        )
    return folder


def load_hf(source: Path | str, dtype: torch.dtype = torch.float32) -> T5:
    """Read a transformers T5 (config.json + safetensors, sharded or not): T5.1.1, Flan-T5, mT5, T5 1.0, or UL2.

    Args:
        source: a folder, or a hub id; see `hf_folder`.
        dtype: number format of the weights in memory.

    Raises:
        InputError: as `load` and `hf_folder`; or the model is none of these: says in what.
    """
    folder = hf_folder(source)
    record = read_config(folder)
    stored = stored_tensors(_hf_files(folder))
    config = _hf_config(folder / CONFIG, record, stored)
    with torch.device("meta"):
        ours = {hf_name(name): name for name in T5(config).state_dict()}
    weights = {ours.get(name, name): tensor for name, tensor in stored.items() if name not in _UNUSED}
    if config.tied_embeddings:
        weights.pop(_HEAD, None)  # the same as the embedding
    elif _tied_by(record) and _SHARED in stored:
        weights.setdefault(_HEAD, stored[_SHARED])
    return _build(config, weights, dtype, folder)


_HEAD, _SHARED = "lm_head.weight", "shared.weight"
_UNUSED = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", _CROSS_BIAS}
"""Transformers may store the input embedding a second time under the stacks' names, and early conversions hold a
position bias of cross-attention, which no model uses."""


def _hf_files(folder: Path) -> list[Path]:
    """The files of a transformers folder that hold its weights."""
    index = folder / HF_INDEX
    if (folder / WEIGHTS).exists() or not index.exists():
        parts = [] if (folder / WEIGHTS).exists() else sorted(folder.glob("*-of-*.safetensors"))
        return parts or [folder / WEIGHTS]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not readable as an index of safetensors files ({error})") from error
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: missing, though {HF_INDEX} names it; download it too")
    return [folder / name for name in names]


def _tied_by(record: Mapping[str, Any]) -> bool:
    """Whether a configuration lets the output matrix be the embedding where none is stored."""
    return bool(record.get("tie_word_embeddings", True))


def _hf_config(where: Path, record: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> T5Config:
    """The geometry that a configuration of transformers describes."""
    family = record.get("model_type")
    if family not in FAMILIES:
        why = OTHER_FAMILIES.get(str(family), f"known: {', '.join(FAMILIES)}")
        raise InputError(f"{where}: model_type={family!r} does not fit this model: {why}")
    feed_forward = record.get("feed_forward_proj", FAMILIES[family])
    if feed_forward not in ACTIVATIONS:
        raise InputError(f"{where}: feed_forward_proj={feed_forward!r} does not fit; known: {', '.join(ACTIVATIONS)}")
    # T5 1.0 scales the decoder's states and uses the embedding as output matrix; T5.1.1 does neither. transformers 4
    # tells them apart by tie_word_embeddings; transformers 5 writes true for both, and scale_decoder_outputs beside it.
    # mT5 is never scaled.
    scaled = family == "t5" and record.get("scale_decoder_outputs", _tied_by(record))
    if scaled and _HEAD in stored and not _equal(stored[_HEAD], stored.get(_SHARED)):
        raise InputError(
            f"{where}: decoder states are scaled, as in T5 1.0, but the output matrix is not the embedding, as in "
            "T5.1.1; this model has both or neither (tie_word_embeddings=false makes it a T5.1.1)"
        )
    try:
        layers = record["num_layers"]
        return T5Config(
            vocab_size=record["vocab_size"],
            d_model=record["d_model"],
            d_ff=record["d_ff"],
            num_heads=record["num_heads"],
            head_dim=record["d_kv"],
            num_encoder_layers=layers,
            num_decoder_layers=record.get("num_decoder_layers") or layers,
            num_kv_heads=record.get("num_kv_heads"),
            feed_forward=feed_forward,
            tied_embeddings=bool(scaled),
            relative_buckets=record.get("relative_attention_num_buckets", 32),
            relative_max_distance=record.get("relative_attention_max_distance", 128),
            layer_norm_epsilon=record.get("layer_norm_epsilon", 1e-6),
            **{name: _one_id(where, record, key, default) for name, (key, default) in _IDS.items()},
        )
    except KeyError as error:
        raise InputError(f"{where}: field {error} is missing") from error


_IDS = {
    "pad_id": ("pad_token_id", 0),
    "eos_id": ("eos_token_id", 1),
    "decoder_start_id": ("decoder_start_token_id", 0),
}


def _one_id(where: Path, record: Mapping[str, Any], key: str, default: int) -> int:
    """A special id; transformers allows none, and several."""
    value = record.get(key)
    if value is None:
        return default
    if not isinstance(value, int):
        raise InputError(f"{where}: {key}={value!r} must be one id")
    return value


def _equal(a: StoredTensor, b: StoredTensor | None) -> bool:
    return b is not None and a.shape == b.shape and torch.equal(a.file.get_tensor(a.name), b.file.get_tensor(b.name))


def save_hf(model: T5, folder: Path | str, *, expand: bool = False) -> None:
    """Write a model as a transformers T5 folder.

    Args:
        model: the model. With fewer KV heads than query heads, `config.json` says how many, `load_hf` reads them, and
            transformers refuses the folder, since it has no such T5.
        folder: created if missing.
        expand: write each KV head once for every query head that reads it: a plain T5 of the same function.

    Raises:
        InputError: the folder cannot be written.
    """
    if expand:
        model = expand_heads(model)
    config, folder = model.config, Path(folder)
    weights = {hf_name(name): tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    record: dict[str, Any] = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "feed_forward_proj": config.feed_forward,
        "tie_word_embeddings": config.tied_embeddings,
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
    if set(config.kv_heads) != {config.num_heads}:
        record["num_kv_heads"] = list(config.kv_heads)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot write the checkpoint ({error})") from error
