"""The learning rate as a function of the base's step alone, so that uptraining continues the base's schedule.

T5 trains flat, then with the reciprocal square root of the step, without a warm-up. A function of the absolute step has
no state to restore: a run that resumes, or uptraining that starts at the base's last step, just asks for its step.
"""

import math

from gqa_exp.errors import InputError


def learning_rate(step: int, *, peak: float, flat_steps: int) -> float:
    """Learning rate of one optimizer step: flat at the peak, then falling as 1/sqrt(step).

    T5's 1/sqrt(max(step, 10000)) (t5x/utils.py, `create_learning_rate_scheduler`, factors "constant * rsqrt_decay") is
    peak=0.01, flat_steps=10000.

    Args:
        step: optimizer steps done since the base's pre-training began: 0 at its first step; uptraining counts on.
        peak: the rate of the flat part.
        flat_steps: steps that the flat part lasts.

    Raises:
        InputError: a negative step, a peak that is not a positive number, or flat_steps below 1.
    """
    if step < 0:
        raise InputError(f"learning rate: step={step} is negative; steps count from 0 at the base's first step")
    if not (math.isfinite(peak) and peak > 0):
        raise InputError(f"learning rate: peak={peak} must be a positive number")
    if flat_steps < 1:
        raise InputError(f"learning rate: flat_steps={flat_steps} must be 1 or more")
    return peak * math.sqrt(flat_steps / max(step, flat_steps))
