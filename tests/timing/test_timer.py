"""The protocol against a clock that only moves when told to, so every expected number is known exactly."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_exp.config import TimingConfig
from gqa_exp.errors import InputError
from gqa_exp.model import T5, InferenceT5, T5Config, generate
from gqa_exp.results import TIME_FIELDS
from gqa_exp.timing import timer
from gqa_exp.timing.cli import read_model_config
from gqa_exp.timing.cost import Bound, Device
from gqa_exp.timing.timer import (
    TWIN,
    Cost,
    ModelRunner,
    Round,
    Sample,
    TimingReport,
    interleave,
    median_interval,
    run_protocol,
    time_variants,
    to_compile,
)

HOST = Device("test", 1e10, {"bfloat16": 1e12}, 1e9, "made up")


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeRunner:
    """Takes the seconds it is given, run after run, and logs when it ran."""

    composition = None

    def __init__(self, name: str, clock: FakeClock, seconds: Iterator[float], log: list[tuple[str, str]]) -> None:
        self.name, self.clock, self.seconds, self.log = name, clock, seconds, log

    def end_to_end(self, clock: FakeClock) -> Sample:
        self.log.append(("end_to_end", self.name))
        start = clock()
        self.clock.now += next(self.seconds)
        return {"end_to_end": [clock() - start]}

    def phases(self, clock: FakeClock) -> Sample:
        self.log.append(("phases", self.name))
        step = {"MHA": 0.4, "MQA": 0.1}[self.name]
        self.clock.now += 4.0
        return {"encode": [1.0], "cross_cache": [0.5], "first_token": [0.3], "decode_step": [step, step, 9.0]}

    def natural(self, clock: FakeClock) -> Sample:
        self.log.append(("natural", self.name))
        return {"natural": [3.0]} if self.name == "MQA" else {}

    def cost(self) -> Cost:
        predicted = Bound(encode=1.0, cross_cache=0.5, decode=2.5, step=0.25, step_bytes=1e9, step_flops=1e9)
        return Cost(800, False, predicted, 64, 6 if self.name == "MQA" else None)


def report_of(mha: Iterator[float], mqa: Iterator[float], **overrides: object) -> tuple[TimingReport, list]:
    """MHA is the reference, so it runs twice a round and draws two of its times."""
    clock, log = FakeClock(), []
    runners = {"MHA": FakeRunner("MHA", clock, mha, log), "MQA": FakeRunner("MQA", clock, mqa, log)}
    config = TimingConfig(batch_size=2, **{"min_rounds": 6, "min_seconds": 0.0, **overrides})
    report = run_protocol(runners, config, reference="MHA", dtype="bfloat16", clock=clock, host=HOST, warnings=[])
    return report, log


@given(seed=st.integers(0, 10_000), variants=st.integers(1, 5), rounds=st.integers(1, 8), warmup=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_every_variant_runs_once_per_round(seed: int, variants: int, rounds: int, warmup: int) -> None:
    ran: list[int] = []
    runs = {str(i): lambda i=i: (ran.append(i), {"end_to_end": [1.0]})[1] for i in range(variants)}
    series = interleave(
        runs,
        warmup_rounds=warmup,
        min_rounds=rounds,
        min_seconds=0.0,
        max_seconds=1e9,
        rng=np.random.default_rng(seed),
    )
    assert (len(series.warmup), len(series.rounds)) == (warmup, rounds)
    passes = [ran[i : i + variants] for i in range(0, len(ran), variants)]
    assert all(sorted(one) == list(range(variants)) for one in passes)
    assert [[int(name) for name in r.order] for r in series.warmup + series.rounds] == passes


def test_order_is_random_and_seeded() -> None:
    def orders(seed: int) -> list[list[str]]:
        report, _ = report_of(itertools.repeat(1.0), itertools.repeat(1.0), seed=seed, min_rounds=20)
        return [round_.order for round_ in report.end_to_end.rounds]

    first = orders(0)
    assert first == orders(0) != orders(1)
    assert len({tuple(order) for order in first}) == 6, "20 rounds of 3 contestants should meet all 6 orders"


def test_phases_never_share_a_run_with_end_to_end() -> None:
    _, log = report_of(itertools.repeat(1.0), itertools.repeat(1.0))
    kinds = [kind for kind, _ in log]
    assert kinds == sorted(kinds, key=["end_to_end", "phases", "natural"].index)
    assert kinds.count("phases") == 3 * 3, "half as many rounds of MHA, its twin and MQA"
    assert ("natural", "MHA") not in log, "it has no real inputs"


def test_warmup_is_kept_apart_and_not_counted() -> None:
    cold = itertools.chain([500.0, 500.0], itertools.repeat(2.0))
    report, _ = report_of(cold, itertools.chain([700.0], itertools.repeat(1.0)))
    assert report.end_to_end.warmup[0].samples["MQA"] == {"end_to_end": [700.0]}
    assert report.fields("MHA")["per_sample_p99"] == 1.0
    assert report.fields("MHA")["rounds"] == 6


@pytest.mark.parametrize(
    ("minima", "rounds"),
    [
        ({"min_rounds": 7, "min_seconds": 10.0}, 7),  # 3 s a round: the rounds decide
        ({"min_rounds": 2, "min_seconds": 30.0}, 10),  # the seconds decide
        ({"min_rounds": 50, "min_seconds": 0.0, "max_seconds": 12.0}, 4),  # the bound decides
    ],
)
def test_minima_and_bound(minima: dict[str, float], rounds: int) -> None:
    report, _ = report_of(itertools.repeat(1.0), itertools.repeat(1.0), **minima)
    assert len(report.end_to_end.rounds) == rounds
    assert ("max_seconds" in (report.warning or "")) == ("max_seconds" in minima)


def test_ratio_is_taken_within_the_round() -> None:
    """The machine slows down tenfold over the run; MQA is always twice as fast as MHA in the same round."""
    drift = [1.0, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0]  # warm-up first
    mha = (2 * d for d in drift for _ in range(2))
    report, _ = report_of(mha, iter(drift))
    speedup = report.speedup("MQA")
    assert speedup is not None
    assert (speedup.median, speedup.low, speedup.high) == (2.0, 2.0, 2.0)
    assert report.noise_floor == 0.0
    assert report.verdict("MQA") == "faster"
    assert report.fields("MQA")["per_sample"] == np.median(drift[1:]) / 2


def test_noise_floor_is_the_farthest_the_twin_strays() -> None:
    pairs = [(1.0, 1.0), (1.0, 1.1), (1.0, 0.95), (1.02, 1.0), (1.0, 1.05), (1.0, 0.9), (1.0, 1.0)]
    report, _ = report_of(itertools.chain.from_iterable(pairs), itertools.repeat(0.97))
    ratios = [r.samples["MHA"]["end_to_end"][0] / r.samples[TWIN]["end_to_end"][0] for r in report.end_to_end.rounds]
    low, high = _bootstrap(ratios)
    assert report.noise_floor == pytest.approx(max(abs(low - 1), abs(high - 1)), abs=0.02)
    assert report.noise_floor >= abs(np.median(ratios) - 1)
    assert "noise floor" not in (report.warning or "")
    assert report.verdict("MQA") == "none", "a 3 % difference under this floor is none"


def test_noise_above_a_fifth_warns() -> None:
    report, _ = report_of(itertools.cycle([1.0, 1.6, 1.0, 1.0, 1.5]), itertools.repeat(1.0))
    assert report.noise_floor > 0.2
    assert "noise floor" in report.fields("MQA")["warning"]


def test_backward_clock_warns_and_spoils_only_its_round() -> None:
    mqa = itertools.chain([1.0, 1.0, -5.0], itertools.repeat(1.0))
    report, _ = report_of(itertools.repeat(2.0), mqa)
    assert "ran backwards" in report.fields("MHA")["warning"]
    assert len(report.end_to_end.rounds) == 7
    assert report.fields("MQA")["rounds"] == 6, "the minimum is of sound rounds"
    assert report.fields("MQA")["speedup"] == 2.0
    assert [r.samples["MQA"]["end_to_end"][0] for r in report.end_to_end.rounds][1] == -5.0, "raw times are kept"


def test_frozen_clock_ends_with_a_warning() -> None:
    report, _ = report_of(itertools.repeat(0.0), itertools.repeat(0.0))
    fields = report.fields("MQA")
    assert fields["per_sample"] is None
    assert fields["speedup"] is None
    assert fields["rounds"] == 0
    assert report.verdict("MQA") == "unknown"
    assert "stood still" in fields["warning"]
    json.dumps(report.to_dict(), allow_nan=False)


def test_what_is_faster_than_its_bound_is_doubted() -> None:
    report, _ = report_of(itertools.repeat(2.0), itertools.repeat(1.0))  # steps of 0.4 and 0.1 s, bound 0.25 s
    assert report.warning == (
        "decode steps of MQA took 0.40 of the least time at the probed bandwidth: memory has become faster since, or a "
        "cache served them"
    )


@pytest.mark.parametrize(("seconds", "warned"), [(0.4, False), (0.34, False), (0.2, True), (0.8, True)])
def test_bandwidth_is_what_memory_gave_beside_the_runs(
    monkeypatch: pytest.MonkeyPatch, seconds: float, warned: bool
) -> None:
    phases, cost = FakeRunner.phases, FakeRunner.cost
    reads = {"memory_read": [seconds, seconds, 30.0]}
    monkeypatch.setattr(FakeRunner, "phases", lambda self, clock: {**phases(self, clock), **reads})
    monkeypatch.setattr(FakeRunner, "cost", lambda self: dataclasses.replace(cost(self), plain_read_bytes=4 * 10**9))
    report, _ = report_of(itertools.repeat(1.0), itertools.repeat(1.0))
    assert report.fields("MQA")["memory_bandwidth"] == pytest.approx(4e9 / seconds)
    assert ("memory was read at" in str(report.warning)) == warned
    assert report.fields("MQA")["predicted_decode_step"] == 0.25, "fixed before anything was timed"


def test_share_of_the_bandwidth_is_taken_within_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of 0.75, 0.5 and 1.25, where the median step and the median read, apart, would make 1.25."""
    rounds = iter([(0.1, 0.3), (0.05, 0.1), (0.06, 0.3)])

    def phases(self: FakeRunner, clock: FakeClock) -> Sample:
        step, read = next(rounds) if self.name == "MQA" else (1.0, 1.0)
        clock.now += 1.0
        found = {"encode": [1.0], "cross_cache": [1.0], "first_token": [1.0]}
        return {**found, "decode_step": [step], "memory_read": [read, read, 9.0]}

    cost = FakeRunner.cost
    monkeypatch.setattr(FakeRunner, "phases", phases)
    monkeypatch.setattr(
        FakeRunner, "cost",
        lambda self: dataclasses.replace(cost(self), decode_step_bytes=10**9, plain_read_bytes=4 * 10**9),
    )  # fmt: skip
    report, _ = report_of(itertools.repeat(1.0), itertools.repeat(1.0))
    assert report.bandwidth_share("MQA") == pytest.approx(0.75)
    assert report.fields("MHA")["bandwidth_share"] == pytest.approx(0.25)


def test_an_output_of_one_token_has_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"encode": [1.0], "cross_cache": [1.0], "first_token": [1.0], "decode_step": [], "memory_read": [1.0] * 3}
    monkeypatch.setattr(FakeRunner, "phases", lambda self, clock: found)
    report, _ = report_of(itertools.repeat(1.0), itertools.repeat(1.0))
    fields = report.fields("MQA")
    assert fields["bandwidth_share"] is fields["decode_bandwidth"] is None


def test_bandwidth_is_the_probe_s_where_nothing_was_read_beside() -> None:
    report, _ = report_of(itertools.repeat(1.0), itertools.repeat(1.0))
    assert report.fields("MHA")["memory_bandwidth"] == HOST.bandwidth
    assert report.fields("MQA")["bandwidth_share"] == pytest.approx(800 / 0.1 / HOST.bandwidth)


def test_fields_are_the_schema_s() -> None:
    report, _ = report_of(itertools.repeat(2.0), itertools.repeat(1.0))
    fields = report.fields("MQA")
    assert list(fields) == list(TIME_FIELDS)
    assert fields["decode_step"] == 0.1
    assert fields["decode_step_speedup"] == 4.0
    assert fields["decode_bandwidth"] == 8000.0
    assert fields["natural_length_per_sample"] == 0.5
    assert report.fields("MHA")["natural_length_per_sample"] is None
    with pytest.raises(KeyError):
        report.fields(TWIN)


@pytest.mark.parametrize(
    ("model", "setting", "device", "kernels", "dtype", "compiled"),
    [
        ("mini", "auto", "cpu", "none", "bfloat16", True),
        ("mini", "auto", "cpu", "all", "bfloat16", False),
        ("mini", "auto", "cpu", "all", "float16", True),  # they do not serve it
        ("mini", "auto", "cpu", "float32", "bfloat16", True),
        ("mini", "auto", "cpu", "float32", "float32", False),
        ("t5_large", "auto", "cpu", "none", "bfloat16", False),  # 1.5 GB a step: 50 ms at 30 GB/s
        ("t5_large", "auto", "cuda", "all", "bfloat16", True),
        ("t5_large", "on", "cpu", "all", "bfloat16", True),
        ("mini", "off", "cuda", "none", "bfloat16", False),
    ],
)
def test_what_is_compiled_unasked(
    monkeypatch: pytest.MonkeyPatch, model: str, setting: str, device: str, kernels: str, dtype: str, compiled: bool
) -> None:
    built = {"none": None, "all": SimpleNamespace(linear_bfloat16=...), "float32": object()}[kernels]
    monkeypatch.setattr("gqa_exp.model.native.library", lambda: built)
    geometry = T5Config.from_model_config(read_model_config(model))
    config = TimingConfig(compile=setting, device=device, batch_size=8, source_length=512, output_length=64)
    assert to_compile(config, geometry, dtype) is compiled


def test_raw_times_survive_json() -> None:
    report, _ = report_of(itertools.repeat(2.0), itertools.repeat(1.0))
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    rounds = data["raw"]["phases"]["rounds"]
    assert rounds[0]["samples"]["MQA"]["decode_step"] == [0.1, 0.1, 9.0]
    assert sorted(rounds[0]["order"]) == sorted(["MHA", "MQA", TWIN])
    assert data["variants"]["MQA"]["allocated_cache_bytes_per_sample"] == 64


def test_bad_names() -> None:
    runner = FakeRunner("MHA", FakeClock(), itertools.repeat(1.0), [])
    common = {"dtype": "float32", "clock": FakeClock(), "host": HOST}
    with pytest.raises(InputError, match='did you mean "MHA"'):
        run_protocol({"MHA": runner}, TimingConfig(), reference="MHAA", **common)
    with pytest.raises(InputError, match="second time"):
        run_protocol({TWIN: runner}, TimingConfig(), reference=TWIN, **common)


def _bootstrap(values: list[float]) -> tuple[float, float]:
    interval = scipy.stats.bootstrap(
        (values,), np.median, n_resamples=5000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    return interval.low, interval.high


def test_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(3).lognormal(0, 0.3, 60).tolist()
    estimate = median_interval(values)
    assert estimate is not None
    assert estimate.median == np.median(values)
    assert (estimate.low, estimate.high) == pytest.approx(_bootstrap(values), abs=0.02)
    assert estimate == median_interval(values)
    assert median_interval([]) is None


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_percentiles_and_interval_are_ordered(seconds: list[float]) -> None:
    estimate = median_interval(seconds)
    assert estimate is not None
    assert min(seconds) <= estimate.low <= estimate.median <= estimate.high <= max(seconds)


def test_negative_time_does_not_count_as_elapsed() -> None:
    assert Round(["a"], {"a": {"x": [2.0, -3.0]}}).seconds == 2.0


# -- the real model under the protocol

TINY = {
    "vocab_size": 128,
    "d_model": 16,
    "d_ff": 32,
    "num_heads": 4,
    "head_dim": 4,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
}
SMALL = TimingConfig(
    batch_size=3,
    source_length=7,
    output_length=5,
    min_rounds=2,
    min_seconds=0.0,
    device="cpu",
    dtype="float32",
    compile="off",
)


def tiny(num_kv_heads: int) -> T5:
    torch.manual_seed(num_kv_heads)
    return T5(T5Config(**TINY, num_kv_heads=num_kv_heads)).eval()


def test_phases_do_what_generate_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The phased run decodes the very tokens of `generate`, reads the clock at each boundary and no more."""
    picked: list[torch.Tensor] = []
    real_step = InferenceT5.step

    def spy(model: InferenceT5, token_B: torch.Tensor, state: object) -> torch.Tensor:
        logits = real_step(model, token_B, state)
        picked.append(logits.argmax(-1))
        return logits

    monkeypatch.setattr(InferenceT5, "step", spy)
    model, readings = tiny(2), itertools.count()
    input_ids = torch.randint(0, 128, (3, 7), generator=torch.Generator().manual_seed(0))
    runner = ModelRunner(InferenceT5(model), SMALL, input_ids)
    with torch.inference_mode():
        sample = runner.phases(lambda: float(next(readings)))
    assert {phase: len(seconds) for phase, seconds in sample.items()} == {
        "encode": 1,
        "cross_cache": 1,
        "first_token": 1,
        "decode_step": 4,
    }
    assert next(readings) == 8
    monkeypatch.undo()
    expected = generate(model, input_ids, max_new_tokens=5, stop_at_eos=False)
    assert torch.equal(torch.stack(picked, dim=1), expected)


def test_allocated_caches_and_step_bytes_follow_the_formula() -> None:
    model = tiny(1)
    runner = ModelRunner(InferenceT5(model), SMALL, torch.zeros(3, 7, dtype=torch.long))
    with torch.inference_mode():
        runner.phases(lambda: 0.0)
    cost = runner.cost()
    # 2 layers, K and V, 1 KV head of 4 float32, at 7 source and 5 target positions
    assert cost.allocated_cache_bytes_per_sample == 2 * 2 * 1 * 4 * 4 * (7 + 5)
    # steps 2 to 5 read 2, 3, 4 and 5 cached tokens: 3.5 on average, 3 in whole tokens
    assert cost.decode_step_bytes == model.config.decode_step_bytes(3, 7, 3, 4)


def test_models_are_timed_in_the_stated_dtype_and_left_alone() -> None:
    mha, mqa = tiny(4), tiny(1)
    mha.train()
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    real = (torch.randint(3, 128, (4, 6)), torch.ones(4, 6, dtype=torch.long))
    report = time_variants({"MHA": mha, "MQA": mqa}, config, reference="MHA", natural={"MQA": real})
    assert mha.training
    assert mha.embedding.weight.dtype == torch.float32
    element = 2 if report.dtype == "bfloat16" else 4
    assert report.costs["MQA"].decode_step_bytes == mqa.config.decode_step_bytes(3, 7, 3, element)
    assert report.fields("MQA")["natural_length_per_sample"] > 0
    assert report.fields("MHA")["natural_length_per_sample"] is None
    assert set(report.end_to_end.rounds[0].order) == {"MHA", "MQA", TWIN}


def test_unsupported_dtype_runs_float32_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer, "supports_dtype", lambda dtype, device: False)
    report = time_variants({"MHA": tiny(4)}, dataclasses.replace(SMALL, dtype="bfloat16"), reference="MHA")
    assert report.fields("MHA")["dtype"] == "float32"
    assert "bfloat16 is not supported" in report.fields("MHA")["warning"]


def test_vocabularies_must_agree() -> None:
    other = T5(T5Config(**{**TINY, "vocab_size": 256})).eval()
    with pytest.raises(InputError, match="vocabulary"):
        time_variants({"MHA": tiny(4), "other": other}, SMALL, reference="MHA")


def test_default_group_is_the_dataclass() -> None:
    path = Path(__file__).parents[2] / "conf" / "timing" / "default.yaml"
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == dataclasses.asdict(TimingConfig())
