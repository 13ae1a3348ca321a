"""Composed times against times that are linear by construction, so that the whole is known exactly."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gqa_exp.config import TimingConfig
from gqa_exp.model import T5, InferenceT5, T5Config
from gqa_exp.timing.compose import Composition, at_depth
from gqa_exp.timing.timer import PartsRunner, time_variants

SECONDS = st.floats(1e-6, 10.0)


def made_up(config, depths, encode, cross, step):
    """A sample of a machine whose phases are linear in depth and a step's also in the cache's fill.

    Args:
        encode: (fixed, per layer) seconds of each sample.
        cross: (fixed, per layer) seconds.
        step: the same, a layer's growing with the fill.
    """
    sample = {}
    samples = config.encoder_batch_size or config.batch_size
    for d in depths:
        sample[at_depth("encode", d)] = [(encode[0] + encode[1] * d) * samples]
        sample[at_depth("cross_cache", d)] = [cross[0] + cross[1] * d]
        sample[at_depth("decode_step", d)] = [
            step[0] + step[1] * d * (10 + fill) for fill in config.fills or range(1, config.output_length + 1)
        ]
    return sample


@given(
    encode=st.tuples(SECONDS, SECONDS), cross=st.tuples(SECONDS, SECONDS), step=st.tuples(SECONDS, SECONDS),
    depths=st.sampled_from([[], [1, 2], [1, 2, 4], [2, 5]]), fills=st.sampled_from([[], [1, 9], [1, 4, 9]]),
    encoder_batch=st.sampled_from([0, 1, 3]),
)  # fmt: skip
def test_linear_times_are_composed_exactly(encode, cross, step, depths, fills, encoder_batch):
    config = TimingConfig(batch_size=6, output_length=9, depths=depths, fills=fills, encoder_batch_size=encoder_batch)
    composition = Composition(config, encoder_layers=12, decoder_layers=7)
    timed = depths or [12]
    reads = {at_depth("memory_read", d): [float(d), 0.5] for d in timed}
    whole = composition(made_up(config, timed, encode, cross, step) | reads)
    encoder_depth, decoder_depth = (12, 7) if depths else (12, 12)  # one depth alone stands for the whole
    steps = [step[0] + step[1] * decoder_depth * (10 + fill) for fill in range(1, 10)]
    expected = {
        "encode": (encode[0] + encode[1] * encoder_depth) * 6,
        "cross_cache": cross[0] + cross[1] * decoder_depth,
        "first_token": steps[0],
        "decode_step": np.mean(steps[1:]),
    }
    for phase, seconds in expected.items():
        assert whole[phase] == [pytest.approx(seconds, rel=1e-6)]
    total = expected["encode"] + expected["cross_cache"] + sum(steps)
    assert whole["end_to_end"] == [pytest.approx(total, rel=1e-6)]
    assert whole["memory_read"] == [seconds for d in timed for seconds in (d, 0.5)], "the same at any depth"


def test_error_of_the_fit_is_the_farthest_depth() -> None:
    config = TimingConfig(batch_size=1, output_length=1, depths=[1, 2, 3])
    composition = Composition(config, 10, 10)
    sample = {at_depth("cross_cache", d): [0.0] for d in (1, 2, 3)} | {
        at_depth("decode_step", d): [0.0] for d in (1, 2, 3)
    }
    # The line through 1, 4, 4 is 1.5 d: it misses them by 0.5, 1 and 0.5.
    sample |= {at_depth("encode", 1): [1.0], at_depth("encode", 2): [4.0], at_depth("encode", 3): [4.0]}
    assert composition.fit_error(sample) == pytest.approx(0.5)
    two = Composition(dataclasses.replace(config, depths=[1, 2]), 10, 10)
    assert two.fit_error(sample) is None


def test_a_repeated_step_counts_by_its_median() -> None:
    config = TimingConfig(batch_size=1, output_length=3, fills=[1, 3])
    sample = {
        at_depth("encode", 2): [0.0], at_depth("cross_cache", 2): [0.0],
        at_depth("decode_step", 2): [1.0, 9.0, 1.0, 3.0, 3.0, 0.0],
    }  # fmt: skip
    assert Composition(config, 2, 2)(sample)["end_to_end"] == [1.0 + 2.0 + 3.0]


def test_what_was_shortened_is_said() -> None:
    config = TimingConfig(output_length=8, depths=[1, 2], fills=[1, 8], encoder_batch_size=1)
    text = Composition(config, 24, 24).describe()
    assert text == (
        "extended from 1, 2 to 24 + 24 layers; decode steps sampled at cache fills 1, 8; "
        "encoder timed at batch 1 and scaled"
    )
    assert Composition(TimingConfig(), 24, 24).describe() == ""


def geometry(kv_heads: int) -> T5Config:
    return T5Config(
        vocab_size=60, d_model=16, d_ff=24, num_heads=4, head_dim=4, num_encoder_layers=3, num_decoder_layers=5,
        num_kv_heads=kv_heads,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("step_seconds", "settling", "repeats"), [(0.04, 3, 3), (1.0, 1, 3), (0.011, 10, 10), (0.0, 200, 200)]
)
def test_parts_do_the_work_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, step_seconds: float, settling: int, repeats: int
) -> None:
    """Depths of encoder and decoder, the encoder's batch, and the fills at which steps run are those asked for."""
    torch.manual_seed(0)
    model = InferenceT5(T5(geometry(2)).eval())
    config = TimingConfig(
        batch_size=3, source_length=7, output_length=5, depths=[1, 4], fills=[1, 5], encoder_batch_size=2
    )
    seen, now = [], [0.0]
    real_encode, real_start, real_step = InferenceT5.encode, InferenceT5.start, InferenceT5.step

    def encode(self, ids):
        encoded = real_encode(self, ids)
        seen.append(("encode", len(self.encoder.layers), len(ids)))
        return encoded

    def start(self, encoded, mask, capacity):
        state = real_start(self, encoded, mask, capacity)
        seen.append(("start", len(state.cross_caches), len(encoded)))
        return state

    def step(self, token, state):
        fill = state.length + 1
        logits = real_step(self, token, state)
        assert logits.isfinite().all()
        seen.append(("step", len(self.layers), len(token), fill))
        now[0] += step_seconds
        return logits

    for name, spy in (("encode", encode), ("start", start), ("step", step)):
        monkeypatch.setattr(InferenceT5, name, spy)
    runner = PartsRunner(model, config, torch.randint(0, 60, (3, 7)), model.config, predicted=None)
    with torch.inference_mode():
        sample = runner.end_to_end(lambda: now[0])
    assert set(sample) == {at_depth(p, d) for p in ("encode", "cross_cache", "decode_step") for d in (1, 4)}
    for depth in (1, 4):
        assert ("encode", min(depth, 3), 2) in seen
        assert ("start", depth, 3) in seen
        assert seen.count(("step", depth, 3, 1)) == settling + repeats, "some pass until times have settled"
        assert seen.count(("step", depth, 3, 5)) == repeats
        assert sample[at_depth("decode_step", depth)] == pytest.approx([step_seconds] * 2 * repeats)


def test_composed_and_whole_are_timed_side_by_side() -> None:
    config = TimingConfig(
        batch_size=2, source_length=6, output_length=4, min_rounds=2, min_seconds=0.0, dtype="float32", compile="off",
        depths=[1, 2], fills=[1, 4], encoder_batch_size=1,
    )  # fmt: skip
    torch.manual_seed(0)
    models = {name: T5(geometry(heads)).eval() for name, heads in (("MHA", 4), ("MQA", 1))}
    report = time_variants(models, config, reference="MHA", prove=True)
    assert report.names == ["MHA", "MHA, whole", "MQA", "MQA, whole"]
    composed, whole = report.fields("MQA"), report.fields("MQA, whole")
    assert composed["composed"].startswith("extended from 1, 2 to 3 + 5 layers")
    assert whole["composed"] is None
    assert composed["decode_step_bytes"] == whole["decode_step_bytes"] == geometry(1).decode_step_bytes(2, 6, 3, 4)
    assert composed["predicted_per_sample"] == whole["predicted_per_sample"] > 0
    assert report.ratio("MQA", "MQA, whole") is not None
    assert report.speedup("MQA") is not None
    assert report.decode_step_speedup("MQA") is not None
    assert report.decode_step_speedup("MQA, whole") is None, "the reference was timed in parts, this one was not"


def test_a_cut_model_is_the_first_layers() -> None:
    torch.manual_seed(0)
    model = InferenceT5(T5(geometry(2)).eval())
    short = model.shallow(2)
    assert short.config == geometry(2).cut(2)
    assert (len(short.encoder.layers), len(short.layers)) == (2, 2)
    assert (len(model.encoder.layers), len(model.layers)) == (3, 5)
    assert short.layers[1] is model.layers[1]
    assert short.encoder.layers[1] is model.encoder.layers[1]
    deep = model.shallow(4)
    assert (len(deep.encoder.layers), len(deep.layers)) == (3, 4)
