import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_exp.config import (
    Config,
    bounded,
    check,
    check_ranges,
    kv_heads_per_layer,
    variant_label,
)
from gqa_exp.errors import InputError

MANY = st.integers(1, 64)


@given(MANY, st.integers(-3, 70), st.integers(1, 6))
def test_accepts_exactly_the_divisors(num_heads, kv_heads, layers):
    if kv_heads > 0 and num_heads % kv_heads == 0:
        assert kv_heads_per_layer(kv_heads, num_heads, layers) == (kv_heads,) * layers
    else:
        with pytest.raises(InputError, match=f"num_kv_heads={kv_heads} does not divide num_heads={num_heads}"):
            kv_heads_per_layer(kv_heads, num_heads, layers)


@given(st.lists(st.integers(-1, 13), min_size=1, max_size=4), st.integers(1, 4), st.sampled_from([list, tuple]))
def test_accepts_one_divisor_per_layer(kv_heads, layers, sequence):
    if len(kv_heads) == layers and all(g in (1, 2, 3, 4, 6, 12) for g in kv_heads):
        assert kv_heads_per_layer(sequence(kv_heads), 12, layers) == tuple(kv_heads)
    else:
        with pytest.raises(InputError, match=r"does not divide num_heads=12|entries, but the decoder has"):
            kv_heads_per_layer(sequence(kv_heads), 12, layers)


@given(MANY, st.integers(1, 6))
def test_null_means_multi_head(num_heads, layers):
    assert kv_heads_per_layer(None, num_heads, layers) == (num_heads,) * layers
    assert variant_label(kv_heads_per_layer(None, num_heads, layers), num_heads) == "MHA"


@pytest.mark.parametrize("wrong", [2.0, "2", True, {"a": 2}, [2, "4"], [2, True], [2, 2.0], [2, None]])
def test_other_types_are_refused(wrong):
    with pytest.raises(InputError, match="num_kv_heads="):
        kv_heads_per_layer(wrong, 4, 2)


@pytest.mark.parametrize(
    ("kv_heads", "label"),
    [
        ((8, 8), "MHA"),
        ((2, 2), "GQA-2"),
        ((4, 4, 4), "GQA-4"),
        ((1, 1), "MQA"),
        ((8, 4, 2, 1), "GQA-[8,4,2,1]"),
        ((8, 1), "GQA-[8,1]"),
    ],
)
def test_labels(kv_heads, label):
    assert variant_label(kv_heads, 8) == label


def test_a_single_head_is_multi_head():
    assert variant_label((1, 1), 1) == "MHA"


def changed(**values):
    """The default configuration with some fields changed; double underscores stand for dots."""
    config = Config()
    for path, value in values.items():
        *sections, name = path.split("__")
        section = config
        for part in sections:
            section = getattr(section, part)
        assert hasattr(section, name), path
        setattr(section, name, value)
    return config


def test_the_default_is_valid():
    check(Config())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"proportion": 1.5}, r"^proportion=1.5 is out of range; it must be between 0 and 1$"),
        ({"proportion": -0.1}, r"^proportion=-0.1 is out of range"),
        ({"proportion": math.nan}, r"^proportion=nan is out of range"),
        ({"proportion": None}, r"^proportion=None is out of range"),
        ({"seed": 2**31}, r"^seed=2147483648 is out of range"),
        ({"finetune__lr": math.inf}, r"^finetune.lr=inf is out of range"),
        ({"finetune__dropout": math.nan}, r"^finetune.dropout=nan is out of range; it must be between 0 and 0.9$"),
        ({"pretrain__steps": 0}, r"^pretrain.steps=0 is out of range; it must be 1 or more$"),
        ({"timing__min_rounds": 1}, r"^timing.min_rounds=1 is out of range; it must be 2 or more$"),
        ({"timing__dtype": "float64"}, r'^timing.dtype="float64" is unknown; did you mean "float16"'),
        ({"method": "maen"}, r'^method="maen" is unknown; did you mean "mean"\? \(known: first, mean, random\)$'),
        ({"trainer__precision": "16"}, r'^trainer.precision="16" is unknown'),
        ({"num_kv_heads": 3}, r"^num_kv_heads=3 does not divide num_heads=8; use one of \[1, 2, 4, 8\]$"),
        ({"num_kv_heads": [8, 4]}, r"has 2 entries, but the decoder has 4 layers"),
        ({"corpus__input_length": 8, "corpus__target_length": 7}, r"^corpus: .* at least 16 tokens$"),
        (
            {"finetune__batch_tokens": 575},
            r"^finetune.batch_tokens=575 cannot hold one example of task debian_synopsis",
        ),
        ({"task__passages": 2}, r"^task.passages=2 has no meaning for task debian_synopsis$"),
    ],
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(InputError, match=message):
        check(changed(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"proportion": 0.0},
        {"proportion": 1.0},
        {"seed": 2**31 - 1},
        {"finetune__dropout": 0.9},
        {"finetune__batch_tokens": 576},  # 512 + 64
        {"corpus__input_length": 8, "corpus__target_length": 8},
        {"num_kv_heads": [8, 4, 2, 1]},
        {"task__name": "debian_cloze", "task__passages": 2},
    ],
)
def test_limits_are_within_range(values):
    check(changed(**values))


def test_output_must_not_be_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        check(changed(output=str(tmp_path / "file")))
    check(changed(output=str(tmp_path)))
    check(changed(output=str(tmp_path / "not yet there")))


@given(st.floats(allow_nan=True), st.floats(-5, 5), st.floats(0, 5))
def test_ranges_include_their_ends(value, low, width):
    made = dataclasses.make_dataclass("Made", [("field", float, bounded(0.0, low, low + width))])
    if low <= value <= low + width:
        check_ranges(made(value))
    else:
        with pytest.raises(InputError, match=r"^here\.field=.* must be between"):
            check_ranges(made(value), "here.")
