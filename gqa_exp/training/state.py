"""A training state as a checkpoint folder: weights, optimizer slots, step and record; written whole or not at all.

Where ranks hold parts of the weights, each can write its own (`save_shards`); such a folder is read as any other.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gqa_exp.errors import InputError
from gqa_exp.model.checkpoint import (
    CONFIG,
    FORMAT,
    OPTIMIZER,
    TRAINING,
    WEIGHTS,
    load,
    load_weights,
    read_tensors,
    save,
)
from gqa_exp.model.t5 import T5, T5Config

SHARD = re.compile(r"shard-(\d{5})-of-(\d{5})\.safetensors")


@dataclass
class TrainingState:
    """All that training needs to go on exactly: nothing else is carried from step to step."""

    model: T5
    slots: dict[str, Tensor] = field(default_factory=dict)
    """Adafactor's second moments by parameter name (see `gqa_exp.training.adafactor.named_slots`)."""
    step: int = 0
    """Optimizer steps done; also the position in the data, which is a function of the step."""
    record: dict[str, Any] = field(default_factory=dict)
    """What the run left on the way: tokens, seconds, loss curve, best score; JSON-able."""

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the state as `folder`, replacing it as a whole.

        Args:
            folder: the checkpoint folder.
            dtype: number format of the weights; None keeps float32, which alone resumes bitwise.
        """
        aside = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        save(self.model, aside, dtype)
        save_file({name: slot.contiguous() for name, slot in self.slots.items()}, aside / OPTIMIZER)
        training = {"step": self.step, **self.record}
        (aside / TRAINING).write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")
        _swap(aside, folder)

    @classmethod
    def load(cls, folder: Path) -> "TrainingState":
        """Read a checkpoint folder together with what training left in it.

        Raises:
            InputError: as `gqa_exp.model.checkpoint.load`, or the training record is missing or unreadable.
        """
        shards = _read_shards(folder)
        model = load(folder) if shards is None else load_weights(folder, shards[0])
        try:
            record = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
            step = int(record.pop("step"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder / TRAINING}: no readable training record ({error}); uptraining needs it"
            ) from error
        if shards is not None:
            slots = shards[1]
        else:
            slots = read_tensors(folder / OPTIMIZER) if (folder / OPTIMIZER).exists() else {}
        return cls(model, slots, step, record)


def _swap(aside: Path, folder: Path) -> None:
    """Put a folder in the place of another. Deleting takes long enough to be interrupted in; moving does not."""
    old = folder.with_name(f"{aside.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save_shards(
    folder: Path,
    config: T5Config,
    rows: Mapping[str, Tensor],
    slots: Mapping[str, Tensor],
    step: int,
    record: Mapping[str, Any],
    rank: int,
    ranks: int,
    barrier: Callable[[], None],
) -> None:
    """Write a state of which every rank holds a part, each its own file; all ranks must call it.

    Args:
        folder: the checkpoint folder, on a file system that all ranks share; replaced as a whole.
        config: the model's geometry.
        rows: this rank's rows of each weight; those of all ranks in turn make the weight.
        slots: this rank's rows of Adafactor's moments (`named_slots` without gathering), and what all ranks hold alike.
        step: optimizer steps done.
        record: what the run left on the way.
        rank: which this is.
        ranks: how many there are.
        barrier: returns when all ranks have called it.
    """
    aside = folder.with_name(f".{folder.name}.shards")
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        geometry = {"format": FORMAT, **dataclasses.asdict(config)}
        (aside / CONFIG).write_text(json.dumps(geometry, indent=1) + "\n", encoding="utf-8")
        (aside / TRAINING).write_text(json.dumps({"step": step, **record}, indent=1) + "\n", encoding="utf-8")
    barrier()
    own = {f"{WEIGHTS}/{name}": tensor for name, tensor in rows.items()}
    own |= {f"{OPTIMIZER}/{name}": slot for name, slot in slots.items() if rank == 0 or not _alike(name)}
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in own.items()},
        aside / f"shard-{rank:05}-of-{ranks:05}.safetensors",
    )
    barrier()
    if rank == 0:
        _swap(aside, folder)


def _alike(slot: str) -> bool:
    """Whether all ranks hold a slot alike."""
    return slot.endswith((".col", ".step"))


def _read_shards(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Weights and slots of a folder that `save_shards` wrote; None for other folders."""
    found = {int(m[1]): (int(m[2]), path) for path in folder.glob("shard-*") if (m := SHARD.fullmatch(path.name))}
    if not found:
        return None
    ranks = next(iter(found.values()))[0]
    for rank in range(ranks):
        if rank not in found or found[rank][0] != ranks:
            raise InputError(f"{folder}: shard {rank} of {ranks} is missing; a state is complete with all of them")
    parts = [read_tensors(found[rank][1]) for rank in range(ranks)]
    joined: dict[str, dict[str, Tensor]] = {WEIGHTS: {}, OPTIMIZER: {}}
    for key, first in parts[0].items():
        file, _, name = key.partition("/")
        alike = file == OPTIMIZER and _alike(name)
        joined[file][name] = first if alike else torch.cat([part[key] for part in parts])
    return joined[WEIGHTS], joined[OPTIMIZER]
