"""A training run in a script of its own, since Lightning starts the other ranks by running the script again.

python tests/training/parallel.py FOLDER STRATEGY DEVICES [START]
"""

import json
import sys
from pathlib import Path

import torch

from gqa_exp.config import TrainerConfig
from gqa_exp.model import T5, T5Config
from gqa_exp.training import loop
from gqa_exp.training.loop import Recipe, train
from gqa_exp.training.state import TrainingState

STEPS = 50
GEOMETRY = T5Config(
    vocab_size=160, d_model=128, d_ff=96, num_heads=4, head_dim=32, num_encoder_layers=2, num_decoder_layers=2,
    num_kv_heads=2,
)  # fmt: skip


def batch(step: int) -> dict[str, torch.Tensor]:
    """One to five rows of a copying task: uneven shares, some empty, and of different numbers of tokens."""
    generator = torch.Generator().manual_seed(step)
    rows = 1 + step % 5
    ids = torch.randint(2, 40, (rows, 9), generator=generator)
    lengths = torch.randint(3, 10, (rows, 1), generator=generator)
    mask = (torch.arange(9) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": (ids * mask)[:, :6]}


def main() -> None:
    folder, strategy, devices = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    loop.STEPS_BETWEEN_AGREEMENTS = 1  # a report of every step
    config = TrainerConfig(
        strategy=strategy,
        devices=devices,
        precision="32-true",
        compile=False,
        report_seconds=0.0,
        checkpoint_minutes=0.0,
        micro_batch_tokens=40 if devices > 1 else None,  # parts of two rows or one: of different numbers on the ranks
    )
    recipe = Recipe("pretrain", 0, batch, lambda step: 0.02, stop=STEPS)
    kept = folder / f"{strategy} kept"  # anew after every step but the last
    start = TrainingState.load(Path(sys.argv[4])) if len(sys.argv) > 4 else TrainingState(T5(GEOMETRY))
    state = train(start, recipe, config, label=strategy, resume_folder=kept)
    spread = torch.distributed.is_initialized()
    if not spread or torch.distributed.get_rank() == 0:
        state.save(folder / strategy)
        ranks = torch.distributed.get_world_size() if spread else 1
        (folder / f"{strategy}.json").write_text(json.dumps({**state.record, "ranks": ranks}))


if __name__ == "__main__":
    main()
