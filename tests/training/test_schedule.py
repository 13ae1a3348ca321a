import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_exp.errors import InputError
from gqa_exp.training.schedule import learning_rate


@given(st.integers(0, 2_000_000))
def test_is_the_schedule_of_t5(step):
    assert learning_rate(step, peak=0.01, flat_steps=10_000) == pytest.approx(
        1 / math.sqrt(max(step, 10_000)), rel=1e-12
    )


@given(st.integers(1, 500), st.integers(0, 5000), st.floats(1e-6, 1.0))
def test_flat_then_continuous_and_falling(flat_steps, step, peak):
    now = learning_rate(step, peak=peak, flat_steps=flat_steps)
    following = learning_rate(step + 1, peak=peak, flat_steps=flat_steps)
    if step <= flat_steps:
        assert now == peak
    assert (following < now) == (step >= flat_steps)
    # a fourfold step count past the flat part halves the rate
    later = learning_rate(4 * max(step, flat_steps), peak=peak, flat_steps=flat_steps)
    assert later == pytest.approx(now / 2)


@pytest.mark.parametrize(
    ("step", "peak", "flat_steps", "named"),
    [(-1, 0.01, 10, "step=-1"), (0, 0.0, 10, "peak=0.0"), (0, math.nan, 10, "peak=nan"), (0, 0.01, 0, "flat_steps=0")],
)
def test_bad_input_is_named(step, peak, flat_steps, named):
    with pytest.raises(InputError, match=named):
        learning_rate(step, peak=peak, flat_steps=flat_steps)
