"""Conversion of a whole training state, so that uptraining goes on where pre-training stopped.

Converting the weights alone would leave optimizer slots of the old shapes behind; here model and slots change together.
"""

import copy
from typing import Any

from gqa_exp.model.convert import convert
from gqa_exp.training.adafactor import pool_slots
from gqa_exp.training.state import TrainingState


def convert_state(
    state: TrainingState, num_kv_heads: Any, method: str = "mean", seed: int = 0, slots: str = "pool"
) -> TrainingState:
    """A training state with fewer KV heads in the decoder; the given one is not changed.

    Step and record stay: the converted model continues the schedule and the data of the one it came from.

    Args:
        state: the state to convert, usually multi-head.
        num_kv_heads: an int, or one per decoder layer.
        method: "mean", "first" or "random"; see `gqa_exp.model.convert.convert`.
        seed: of fresh weights; only "random" uses it.
        slots: "pool" or "reset", for the second moments of pooled projections; see `pool_slots`.

    Raises:
        InputError: as `convert` and `pool_slots`.
    """
    model = convert(state.model, num_kv_heads, method, seed)
    shapes_before, shapes_after = (
        {name: parameter.shape for name, parameter in each.named_parameters()} for each in (state.model, model)
    )
    pooled = pool_slots(state.slots, shapes_before, shapes_after, state.model.config.head_dim, slots)
    return TrainingState(model, pooled, state.step, copy.deepcopy(state.record))
