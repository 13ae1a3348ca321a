"""A training state as a checkpoint folder: weights, optimizer slots, step and record; written whole or not at all."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gqa_exp.errors import InputError
from gqa_exp.model.checkpoint import OPTIMIZER, TRAINING, load, read_tensors, save
from gqa_exp.model.t5 import T5


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
        # Deleting takes long enough to be interrupted in; moving out of the way does not.
        old = folder.with_name(f"{aside.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> "TrainingState":
        """Read a checkpoint folder together with what training left in it.

        Raises:
            InputError: as `gqa_exp.model.checkpoint.load`, or the training record is missing or unreadable.
        """
        model = load(folder)
        try:
            record = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
            step = int(record.pop("step"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder / TRAINING}: no readable training record ({error}); uptraining needs it"
            ) from error
        slots = read_tensors(folder / OPTIMIZER) if (folder / OPTIMIZER).exists() else {}
        return cls(model, slots, step, record)
