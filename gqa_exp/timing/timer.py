"""Decode time that can be trusted: variants interleaved in one process, compared round by round, with a noise floor.

Machines drift: clocks throttle, neighbours come and go. Timing variant A for a minute and then variant B would book
the drift to one of them. So every round runs every variant once, in a fresh random order, and what is reported is the
median over rounds of the ratio within a round. The reference takes part twice under two names (A/A); how far that ratio
strays from 1 is the noise floor, and a difference below it is called none (DESIGN.md, "Timing that can be trusted").

The protocol (`interleave`, `run_protocol`) knows nothing of models: it times `Runner` objects by an injected clock.
`time_variants` is the protocol applied to T5 models.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gqa_exp.config import TimingConfig
from gqa_exp.errors import InputError, suggest
from gqa_exp.host import check_device, resolve_dtype, supports_dtype
from gqa_exp.model import T5, InferenceT5, T5Config, generate, native
from gqa_exp.model.generate import likeliest
from gqa_exp.results import TIME_FIELDS, Scalar
from gqa_exp.timing.compose import Composition, Sample, at_depth
from gqa_exp.timing.cost import BYTES_PER_ELEMENT, Bound, Device, Work, bound
from gqa_exp.timing.environment import environment, hardware_id
from gqa_exp.timing.hostlock import timing_alone
from gqa_exp.timing.probe import PlainRead, local_device, synchronised_clock

Clock = Callable[[], float]
"""Seconds; on a GPU it waits for queued work before each reading."""
Progress = Callable[[str], None]

WHOLE = ", whole"
"""Added to the name of a variant that is timed whole beside its parts."""
TWIN = "A/A"
"""The name under which the reference takes part a second time."""
NOISY = 0.2
"""A noise floor above this is worth a warning."""
BELOW_BOUND = 0.95
"""A decode step below so much of its bound is worth a warning: the bound rests on a bandwidth that was another then."""
WORTH_COMPILING = 500e6
"""Bytes of a decode step below which compiling is worth it on a CPU without kernels of our own: at 30 GB/s a step of so
many takes 17 ms, against 1 to 2 ms that Python and small operations take in 12 layers. Beside the kernels, compiled
steps of mini to T5-Base took 1.05 to 1.23 times as long as eager ones. A GPU reads as many bytes in less than 1 ms."""
STEP_REPEATS = 3
"""Where steps are sampled, at each fill: so many, or as many as it took to settle, if that is more."""
SETTLING_SECONDS, SETTLING_STEPS = 0.1, 200
"""Before steps are sampled, so many seconds of them pass unrecorded, or so many steps. Right after an encoder's matrix
products, steps of a few ms took up to 20 % longer than from some 50 ms on: a whole run has that once, a sample had it
throughout."""
READ_REPEATS = 3
"""Plain reads of memory beside each phased run."""
NATURAL_ROUNDS = 3
"""The natural length is shown beside the stated length, never compared, so a few rounds are enough."""
RESAMPLES = 2000
CONFIDENCE = 0.95


class Runner(Protocol):
    """One variant, as the protocol sees it."""

    @property
    def composition(self) -> Composition | None:
        """How a whole run is composed of what `end_to_end` times; None where that is a whole run."""

    def end_to_end(self, clock: Clock) -> Sample:
        """One batch from inputs to outputs, read by the clock at its two ends only: {"end_to_end": [seconds]}.

        With a composition: the parts that it wants.
        """

    def phases(self, clock: Clock) -> Sample:
        """The same work with the clock read between phases: encode, cross_cache, first_token, decode_step.

        And memory_read, a plain read of memory right after: what the decode steps are measured by, since a neighbour
        can take half of a host's bandwidth at any time.
        """

    def natural(self, clock: Clock) -> Sample:
        """{"natural": [seconds]} of a batch of real inputs decoded until end-of-sequence; {} if there are none."""

    def cost(self) -> "Cost":
        """Sizes, asked for after the runs."""


@dataclass(frozen=True)
class Cost:
    """What one variant reads and allocates, and how many real inputs its natural length is per."""

    decode_step_bytes: int
    """Bytes a decode step must read, at the mean cache fill of the steps after the first."""
    compiled: bool = False
    """Whether decode steps were compiled."""
    predicted: Bound | None = None
    """The cost model's lower bound on this host, fixed by two probes before anything was timed."""
    allocated_cache_bytes_per_sample: int | None = None
    """Cross- and self-attention caches as the runs found them allocated; None before any phased run."""
    natural_batch_size: int | None = None
    plain_read_bytes: int = 0
    """Bytes that `memory_read` reads."""


@dataclass(frozen=True)
class Estimate:
    """A median with its bootstrap interval (95 %)."""

    median: float
    low: float
    high: float


@dataclass
class Round:
    """One pass over all variants: in which order they ran, and what each took."""

    order: list[str]
    samples: dict[str, Sample]

    @property
    def seconds(self) -> float:
        """Time the clock saw pass in this round; backward steps do not count."""
        return sum(max(0.0, s) for sample in self.samples.values() for times in sample.values() for s in times)

    @property
    def sound(self) -> bool:
        """Whether the clock moved forward in every reading."""
        return all(s > 0 for sample in self.samples.values() for times in sample.values() for s in times)


@dataclass
class Series:
    """The rounds of one kind of run. Statistics use sound rounds only; all are kept."""

    warmup: list[Round] = field(default_factory=list)
    """Not counted. The first one is the cold run."""
    rounds: list[Round] = field(default_factory=list)
    compositions: dict[str, Composition] = field(default_factory=dict)
    """Of the variants that were timed in parts."""

    @property
    def sound(self) -> list[Round]:
        """The counted rounds in which the clock moved forward."""
        return [round_ for round_ in self.rounds if round_.sound]

    def per_round(self, name: str, phase: str) -> list[float]:
        """Seconds of a phase in each sound round (the median where it repeats); empty if the phase never ran."""
        return [float(np.median(seconds)) for sample in self.samples(name) if (seconds := sample.get(phase))]

    def samples(self, name: str) -> list[Sample]:
        """What the sound rounds found of a variant, composed where it was timed in parts."""
        samples = [round_.samples[name] for round_ in self.sound if name in round_.samples]
        composition = self.compositions.get(name)
        return samples if composition is None else [composition(sample) for sample in samples]


def interleave(
    runs: Mapping[str, Callable[[], Sample]],
    *,
    warmup_rounds: int,
    min_rounds: int,
    min_seconds: float,
    max_seconds: float,
    rng: np.random.Generator,
    progress: Progress = lambda text: None,
) -> Series:
    """Run every variant once per round, in a fresh random order each time.

    Args:
        runs: variant name to one timed run of it.
        warmup_rounds: rounds before those that count.
        min_rounds: counted sound rounds at least.
        min_seconds: seconds of counted rounds at least; both minima must be reached.
        max_seconds: no further round starts once counted rounds have taken so long, whatever the minima.
        rng: draws the orders.
        progress: told after each round.

    Returns:
        All rounds. A clock that does not move ends the series after twice the minimum of rounds.
    """
    names, series = list(runs), Series()

    def one_round() -> Round:
        order = [names[i] for i in rng.permutation(len(names))]
        return Round(order, {name: runs[name]() for name in order})

    for index in range(warmup_rounds):
        series.warmup.append(one_round())
        progress(f"warm-up round {index + 1} of {warmup_rounds}")
    seconds, sound = 0.0, 0
    while (sound < min_rounds or seconds < min_seconds) and seconds < max_seconds:
        if len(series.rounds) - sound >= 2 * min_rounds:
            break
        series.rounds.append(one_round())
        seconds += series.rounds[-1].seconds
        sound += series.rounds[-1].sound
        progress(f"round {len(series.rounds)}, {seconds:.0f} s (at least {min_rounds} rounds and {min_seconds:g} s)")
    return series


def median_interval(values: Iterable[float], seed: int = 0) -> Estimate | None:
    """Median and its percentile bootstrap interval (95 %, 2000 resamples, seeded).

    Returns:
        None for no values. For few values the interval can only reach their extremes, so it says little below five.
    """
    data: NDArray[np.float64] = np.fromiter(values, dtype=np.float64)
    if not data.size:
        return None
    picks = np.random.default_rng(seed).integers(0, data.size, size=(RESAMPLES, data.size))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.median(data[picks], axis=1), [tail, 100 - tail])
    return Estimate(float(np.median(data)), float(low), float(high))


@dataclass
class TimingReport:
    """Everything one timing job measured, raw times included."""

    config: TimingConfig
    reference: str
    dtype: str
    """What ran: differs from the configured one where the device does not support that."""
    hardware: str
    """`environment.hardware_id`: times join rows by architecture and this."""
    host: Device
    """Bytes per second of a plain read, and FLOP/s of a large matrix product, before anything was timed."""
    costs: dict[str, Cost]
    end_to_end: Series
    phases: Series
    natural: Series
    warnings: list[str]
    environment: dict[str, Scalar]

    @property
    def names(self) -> list[str]:
        """The variants, the reference's twin left out."""
        return list(self.costs)

    @property
    def warning(self) -> str | None:
        """All that calls for caution, as one line; None if nothing does."""
        return "; ".join(self.warnings) or None

    def per_sample(self, name: str) -> Estimate | None:
        """Seconds per sample end to end; None if the clock spoilt every round."""
        return median_interval(self._seconds_per_sample(name), self.config.seed)

    def speedup(self, name: str) -> Estimate | None:
        """Time of the reference over time of this variant, within each round."""
        return self._ratio(self.end_to_end, self.reference, name, "end_to_end")

    def ratio(self, name: str, other: str) -> Estimate | None:
        """End-to-end time of one variant over that of another, within each round."""
        return self._ratio(self.end_to_end, name, other, "end_to_end")

    def decode_step_speedup(self, name: str) -> Estimate | None:
        """The same of one further decode step (its median within the round).

        None where one of the two was timed in parts and the other was not.
        """
        composed = self.end_to_end.compositions
        if (name in composed) != (self.reference in composed):
            return None
        series = self.end_to_end if name in composed else self.phases
        return self._ratio(series, self.reference, name, "decode_step")

    @property
    def noise_floor(self) -> float | None:
        """The farthest from 1 that the interval of the A/A run's median ratio reaches, end to end."""
        return _farthest_from_one(self.speedup(TWIN))

    @property
    def decode_step_noise_floor(self) -> float | None:
        """The same of the decode step."""
        return _farthest_from_one(self.decode_step_speedup(TWIN))

    def verdict(self, name: str) -> str:
        """How the variant's end-to-end time compares with the reference's.

        Returns:
            "none" where the median ratio differs from 1 by no more than the noise floor or its interval holds 1;
            else "faster" or "slower"; "unknown" where nothing could be measured.
        """
        speedup, floor = self.speedup(name), self.noise_floor
        if speedup is None or floor is None:
            return "unknown"
        if abs(speedup.median - 1) <= floor or speedup.low <= 1 <= speedup.high:
            return "none"
        return "faster" if speedup.median > 1 else "slower"

    def fit_error(self, name: str) -> float | None:
        """Median over rounds of how far a timed depth lies from the line through all; None where there is no such."""
        composition = self.end_to_end.compositions.get(name)
        if composition is None:
            return None
        errors = [composition.fit_error(round_.samples[name]) for round_ in self.end_to_end.sound]
        known = [error for error in errors if error is not None]
        return float(np.median(known)) if known else None

    def allocated_cache_bytes_per_sample(self, name: str) -> int | None:
        """Bytes of one sample's cross- and self-attention caches, as allocated."""
        return self.costs[name].allocated_cache_bytes_per_sample

    def memory_bandwidth(self, name: str) -> float:
        """Bytes per second of the plain reads beside a variant's runs; before all runs where there were none."""
        seconds = self._phase(name, "memory_read")
        return self.costs[name].plain_read_bytes / seconds if seconds else self.host.bandwidth

    def bandwidth_share(self, name: str) -> float | None:
        """Bandwidth of a decode step as a share of the plain read's beside it, median over rounds.

        Within the round, since memory shared with neighbours has been seen to give 50 GB/s in one and 75 in the next.
        """
        cost, series = self.costs[name], self._phased(name)
        steps, reads = series.per_round(name, "decode_step"), series.per_round(name, "memory_read")
        if not steps:  # an output of one token has no further step
            return None
        given = [cost.plain_read_bytes / seconds for seconds in reads] or [self.host.bandwidth] * len(steps)
        shares = [cost.decode_step_bytes / step / read for step, read in zip(steps, given, strict=True)]
        return float(np.median(shares))

    def fields(self, name: str) -> dict[str, Scalar]:
        """The entries of `Result.time` for one variant: exactly the names of `results.TIME_FIELDS`.

        Raises:
            KeyError: no such variant.
        """
        cost, raw = self.costs[name], self._seconds_per_sample(name)
        per_sample, per_sample_low, per_sample_high = _numbers(self.per_sample(name))
        speedup, speedup_low, speedup_high = _numbers(self.speedup(name))
        step = self._phase(name, "decode_step")
        natural = self.natural.per_round(name, "natural")
        composition = self.end_to_end.compositions.get(name)
        values: dict[str, Scalar] = {
            "per_sample": per_sample,
            "per_sample_low": per_sample_low,
            "per_sample_high": per_sample_high,
            "per_sample_p90": float(np.percentile(raw, 90)) if raw else None,
            "per_sample_p99": float(np.percentile(raw, 99)) if raw else None,
            "speedup": speedup,
            "speedup_low": speedup_low,
            "speedup_high": speedup_high,
            "noise_floor": self.noise_floor,
            "encode": self._phase(name, "encode"),
            "cross_cache": self._phase(name, "cross_cache"),
            "first_token": self._phase(name, "first_token"),
            "decode_step": step,
            "decode_step_speedup": _numbers(self.decode_step_speedup(name))[0],
            "decode_step_bytes": cost.decode_step_bytes,
            "decode_bandwidth": cost.decode_step_bytes / step if step else None,
            "memory_bandwidth": self.memory_bandwidth(name),
            "bandwidth_share": self.bandwidth_share(name),
            "predicted_per_sample": cost.predicted.total / self.config.batch_size if cost.predicted else None,
            "predicted_decode_step": cost.predicted.step if cost.predicted else None,
            "natural_length_per_sample": (
                float(np.median(natural)) / cost.natural_batch_size if natural and cost.natural_batch_size else None
            ),
            "batch_size": self.config.batch_size,
            "source_length": self.config.source_length,
            "output_length": self.config.output_length,
            "dtype": self.dtype,
            "rounds": len(self.end_to_end.sound),
            "device": self.config.device,
            "hardware": self.hardware,
            "threads": self.environment.get("threads"),
            "compiled": cost.compiled,
            "cross_kv": self.config.cross_kv,
            "composed": composition.describe() if composition else None,
            "fit_error": self.fit_error(name),
            "warning": self.warning,
        }
        return {entry: values[entry] for entry in TIME_FIELDS}

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON-able data: configuration, fields per variant, and every raw time in seconds."""
        return {
            "config": dataclasses.asdict(self.config),
            "reference": self.reference,
            "hardware": self.hardware,
            "warning": self.warning,
            "noise_floor": self.noise_floor,
            "decode_step_noise_floor": self.decode_step_noise_floor,
            "variants": {
                name: {
                    "fields": self.fields(name),
                    "verdict": self.verdict(name),
                    "allocated_cache_bytes_per_sample": self.allocated_cache_bytes_per_sample(name),
                }
                for name in self.names
            },
            "host": dataclasses.asdict(self.host),
            "raw": {
                kind: {"warmup": list(map(vars, series.warmup)), "rounds": list(map(vars, series.rounds))}
                for kind, series in (
                    ("end_to_end", self.end_to_end),
                    ("phases", self.phases),
                    ("natural", self.natural),
                )
            },
            "environment": self.environment,
        }

    def _seconds_per_sample(self, name: str) -> list[float]:
        return [s / self.config.batch_size for s in self.end_to_end.per_round(name, "end_to_end")]

    def _phased(self, name: str) -> Series:
        """Where the variant's phases were timed."""
        return self.end_to_end if name in self.end_to_end.compositions else self.phases

    def _phase(self, name: str, phase: str) -> float | None:
        """Median seconds of a phase over all its repetitions in sound rounds."""
        seconds = [s for sample in self._phased(name).samples(name) for s in sample.get(phase, [])]
        return float(np.median(seconds)) if seconds else None

    def _ratio(self, series: Series, name: str, other: str, phase: str) -> Estimate | None:
        pairs = zip(series.per_round(name, phase), series.per_round(other, phase), strict=True)
        return median_interval((own / others for own, others in pairs), self.config.seed)


def phase_rounds(config: TimingConfig) -> int:
    """Rounds of phased runs: half as many as end to end, since each repeats its decode step many times."""
    return max(2, (config.min_rounds + 1) // 2)


def run_protocol(
    runners: Mapping[str, Runner],
    config: TimingConfig,
    *,
    reference: str,
    dtype: str,
    clock: Clock,
    host: Device,
    warnings: Iterable[str] = (),
    progress: Progress = lambda text: None,
) -> TimingReport:
    """The timing protocol on any runners: end to end, then phases apart, then natural length.

    Args:
        runners: variant name to its runner.
        config: rounds, lengths, seed.
        reference: the variant that the others are compared with.
        dtype: number format that runs, for the record.
        clock: see `Clock`.
        host: what the probes found, for the record.
        warnings: known beforehand.
        progress: told what goes on, a line at a time.

    Raises:
        InputError: the reference is no variant, or a variant bears the twin's name.
    """
    if TWIN in runners:
        raise InputError(f'a variant cannot be called "{TWIN}"; that name is the reference timed a second time')
    if reference not in runners:
        raise InputError(f'the reference "{reference}" is not among the variants; {suggest(reference, runners)}')
    rng = np.random.default_rng(config.seed)
    contestants = {**runners, TWIN: runners[reference]}
    load = environment()

    def series(kind: str, runs: Mapping[str, Callable[[], Sample]], warmup: int, rounds: int, least: float) -> Series:
        return interleave(
            runs,
            warmup_rounds=warmup,
            min_rounds=rounds,
            min_seconds=least,
            max_seconds=config.max_seconds,
            rng=rng,
            progress=lambda text: progress(f"timing {kind}: {text}"),
        )

    def bind(method: str) -> dict[str, Callable[[], Sample]]:
        return {name: functools.partial(getattr(runner, method), clock) for name, runner in contestants.items()}

    # The end-to-end runs have warmed up what the phased runs use, so those count from the first.
    end_to_end = series("end to end", bind("end_to_end"), config.warmup_rounds, config.min_rounds, config.min_seconds)
    compositions = {name: runner.composition for name, runner in contestants.items() if runner.composition}
    end_to_end.compositions = compositions
    whole = {name: run for name, run in bind("phases").items() if name not in compositions}
    phases = series("phases", whole, 0, phase_rounds(config), 0.0) if whole else Series()
    costs = {name: runner.cost() for name, runner in runners.items()}
    real_inputs = {
        name: run for name, run in bind("natural").items() if name in costs and costs[name].natural_batch_size
    }
    natural = series("natural length", real_inputs, 1, NATURAL_ROUNDS, 0.0) if real_inputs else Series()
    report = TimingReport(
        config, reference, dtype, hardware_id(config.device), host, costs, end_to_end, phases, natural,
        list(warnings), load,
    )  # fmt: skip
    report.warnings += _cautions(report)
    return report


def time_variants(
    variants: Mapping[str, T5 | InferenceT5],
    config: TimingConfig,
    *,
    reference: str,
    natural: Mapping[str, tuple[Tensor, Tensor | None]] | None = None,
    geometries: Mapping[str, T5Config] | None = None,
    prove: bool = False,
    progress: Progress = lambda text: None,
) -> TimingReport:
    """Time models against each other, alone on the host (waits until nothing trains; see `hostlock`).

    Args:
        variants: name to model. They are not changed: what runs is a copy in the configured dtype and on the
            configured device, where they differ. Architectures that are equal should be given once.
        config: the protocol's settings.
        reference: the variant that the others are compared with, MHA as a rule.
        natural: for variants that have them, real task inputs: ids (B, S) and their mask (B, S) or None.
        geometries: of variants that are cut to the deepest of `config.depths`: what they are to be extended to.
        prove: where the configuration takes shortcuts, time each variant whole as well, as "NAME, whole".
        progress: told what goes on, a line at a time.

    Raises:
        InputError: no such reference; no GPU where one is asked for; vocabularies that differ.
    """
    check_device(config.device, 'timing.device="cuda"')
    vocab_sizes = {model.config.vocab_size for model in variants.values()}
    if len(vocab_sizes) > 1:
        raise InputError(
            f"variants of different vocabulary sizes {sorted(vocab_sizes)} cannot be timed on the same input"
        )
    dtype, warnings = runnable_dtype(config)
    shortcuts = bool(config.depths or config.fills or config.encoder_batch_size)
    with timing_alone(), torch.inference_mode():
        host = local_device(config.device, dtype)
        read = PlainRead(config.device)
        generator = torch.Generator().manual_seed(config.seed)
        shape = (config.batch_size, config.source_length)
        input_ids = torch.randint(0, min(vocab_sizes, default=1), shape, generator=generator).to(config.device)
        runners: dict[str, Runner] = {}
        for name, model in variants.items():
            prepared = _prepared(model, dtype, config)
            geometry = (geometries or {}).get(name, prepared.config)
            predicted = bound(_work(geometry, config, dtype), host)
            if shortcuts:
                runners[name] = PartsRunner(prepared, config, input_ids, geometry, predicted, read)
            if not shortcuts or prove:
                whole = f"{name}{WHOLE}" if shortcuts else name
                runners[whole] = ModelRunner(prepared, config, input_ids, predicted, (natural or {}).get(name), read)
        return run_protocol(
            runners,
            config,
            reference=reference,
            dtype=dtype,
            clock=synchronised_clock(config.device),
            host=host,
            warnings=warnings,
            progress=progress,
        )


def runnable_dtype(config: TimingConfig) -> tuple[str, list[str]]:
    """The number format that will run, and a warning where it is not the configured one."""
    dtype = resolve_dtype(config.dtype, config.device)
    if supports_dtype(dtype, config.device):
        return dtype, []
    return "float32", [f"{dtype} is not supported on this {config.device}: timed in float32 instead"]


def to_compile(config: TimingConfig, geometry: T5Config, dtype: str) -> bool:
    """Whether decode steps of a geometry are to be compiled, see `TimingConfig.compile`."""
    if config.compile != "auto":
        return config.compile == "on"
    if config.device != "cpu":
        return True
    small = _step_bytes(geometry, config, BYTES_PER_ELEMENT[dtype]) < WORTH_COMPILING
    return small and not native.serves_attention(getattr(torch, dtype), geometry.head_dim)


def _work(geometry: T5Config, config: TimingConfig, dtype: str) -> Work:
    return Work(
        geometry, config.batch_size, config.source_length, config.output_length, dtype, cross_kv=config.cross_kv
    )


def _step_bytes(geometry: T5Config, config: TimingConfig, element: int) -> int:
    """Bytes of a further decode step at the mean fill of its cache.

    Step t reads t cached tokens, its own among them; those after the first are t = 2 ... output_length.
    """
    mean_fill = (2 + max(2, config.output_length)) // 2
    return geometry.decode_step_bytes(config.batch_size, config.source_length, mean_fill, element)


class ModelRunner:
    """A whole model on fixed inputs, as a `Runner`.

    Args:
        model: in the dtype and on the device to be timed.
        config: lengths.
        input_ids: (B, S) on the model's device.
        predicted: the cost model's bound.
        natural: real inputs (B, S) and their mask, or None.
        read: the plain read of memory beside phased runs.
    """

    composition = None

    def __init__(
        self,
        model: InferenceT5,
        config: TimingConfig,
        input_ids: Tensor,
        predicted: Bound | None = None,
        natural: tuple[Tensor, Tensor | None] | None = None,
        read: PlainRead | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.input_ids = input_ids
        self.predicted = predicted
        self.read = read
        self.real: tuple[Tensor, Tensor | None] | None = None
        if natural is not None:
            ids, mask = natural
            self.real = ids.to(model.device), None if mask is None else mask.to(model.device)
        self._allocated: int | None = None

    def end_to_end(self, clock: Clock) -> Sample:
        """One `generate` of the stated lengths."""
        start = clock()
        generate(self.model, self.input_ids, max_new_tokens=self.config.output_length, stop_at_eos=False)
        return {"end_to_end": [clock() - start]}

    def phases(self, clock: Clock) -> Sample:
        """The steps of `generate`, each between two readings; picking the next token belongs to its step."""
        readings = [clock()]
        encoded_BSD = self.model.encode(self.input_ids)
        readings.append(clock())
        state = self.model.start(encoded_BSD, None, self.config.output_length)
        readings.append(clock())
        token_B = self.input_ids.new_full((self.input_ids.shape[0],), self.model.config.decoder_start_id)
        for _ in range(self.config.output_length):
            token_B = likeliest(self.model.step(token_B, state))
            readings.append(clock())
        self._allocated = (state.cross_cache_bytes() + state.self_cache_bytes()) // self.input_ids.shape[0]
        encode, cross_cache, first_token, *steps = np.diff(readings).tolist()
        return {
            "encode": [encode],
            "cross_cache": [cross_cache],
            "first_token": [first_token],
            "decode_step": steps,
            **_plain_reads(self.read, clock),
        }

    def natural(self, clock: Clock) -> Sample:
        """One `generate` of the real inputs that stops at end-of-sequence."""
        if self.real is None:
            return {}
        start = clock()
        generate(self.model, *self.real, max_new_tokens=self.config.output_length, stop_at_eos=True)
        return {"natural": [clock() - start]}

    def cost(self) -> Cost:
        """Sizes at the stated lengths."""
        element = self.model.embedding.weight.element_size()
        real = None if self.real is None else self.real[0].shape[0]
        step_bytes = _step_bytes(self.model.config, self.config, element)
        read = self.read.nbytes if self.read else 0
        return Cost(step_bytes, self.model.compiled, self.predicted, self._allocated, real, plain_read_bytes=read)


class PartsRunner:
    """A model timed in parts, from which a whole run of its geometry is composed, as a `Runner`.

    Args:
        model: in the dtype and on the device to be timed; as deep as the deepest part at least.
        config: lengths and shortcuts.
        input_ids: (B, S) on the model's device.
        geometry: the whole model's.
        predicted: the cost model's bound for the geometry.
        read: the plain read of memory beside each depth.
    """

    def __init__(
        self,
        model: InferenceT5,
        config: TimingConfig,
        input_ids: Tensor,
        geometry: T5Config,
        predicted: Bound,
        read: PlainRead | None = None,
    ) -> None:
        self.config = config
        self.input_ids = input_ids
        self.geometry = geometry
        self.predicted = predicted
        self.read = read
        self.composition = Composition(config, geometry.num_encoder_layers, geometry.num_decoder_layers)
        self.parts = {depth: model.shallow(depth) for depth in self.composition.depths}
        self.rng = np.random.default_rng(config.seed)

    def end_to_end(self, clock: Clock) -> Sample:
        """The phases at each depth, depths in a fresh random order."""
        sample: dict[str, list[float]] = {}
        for depth in self.rng.permutation(list(self.parts)):
            for phase, seconds in self._phases(self.parts[depth], clock).items():
                sample[at_depth(phase, depth)] = seconds
        return sample

    def _phases(self, model: InferenceT5, clock: Clock) -> Sample:
        config, B = self.config, self.config.batch_size
        encoder_batch = config.encoder_batch_size or B
        start = clock()
        encoded_BSD = model.encode(self.input_ids[:encoder_batch])
        encode = clock() - start
        # Each sample's states are its own, as in a whole run: what is not copied could stay in the processor's cache.
        encoded_BSD = encoded_BSD.repeat(-(-B // encoder_batch), 1, 1)[:B]
        start = clock()
        state = model.start(encoded_BSD, None, config.output_length)
        cross_cache = clock() - start
        state.fill_self_caches()
        token_B = self.input_ids.new_full((B,), model.config.decoder_start_id)

        def step(fill: int) -> float:
            state.length = fill - 1
            start = clock()
            likeliest(model.step(token_B, state))
            return clock() - start

        repeats = 1
        if config.fills:
            settling: list[float] = []
            while sum(settling) < SETTLING_SECONDS and len(settling) < SETTLING_STEPS:
                settling.append(step(config.fills[0]))
            repeats = max(STEP_REPEATS, len(settling))
        steps = [step(fill) for fill in self.composition.fills for _ in range(repeats)]
        found = {"encode": [encode], "cross_cache": [cross_cache], "decode_step": steps}
        return {**found, **_plain_reads(self.read, clock)}

    def phases(self, clock: Clock) -> Sample:
        """Not asked for: end to end is timed in phases already."""
        return {}

    def natural(self, clock: Clock) -> Sample:
        """None: part of a model does not end its sentences where the whole one would."""
        return {}

    def cost(self) -> Cost:
        """Sizes of the whole geometry at the stated lengths."""
        part = next(iter(self.parts.values()))
        step_bytes = _step_bytes(self.geometry, self.config, part.embedding.weight.element_size())
        read = self.read.nbytes if self.read else 0
        return Cost(step_bytes, part.compiled, self.predicted, plain_read_bytes=read)


def _plain_reads(read: PlainRead | None, clock: Clock) -> Sample:
    return {"memory_read": read.seconds(clock, READ_REPEATS)} if read else {}


def _prepared(model: T5 | InferenceT5, dtype: str, config: TimingConfig) -> InferenceT5:
    """The model prepared for decoding in that dtype on the configured device; a copy where it is not so already."""
    if isinstance(model, InferenceT5):
        return model
    wanted: torch.dtype = getattr(torch, dtype)
    right = all(p.dtype == wanted and p.device.type == config.device for p in model.parameters())
    if not right or model.training:
        model = copy.deepcopy(model).to(device=config.device, dtype=wanted).eval()
    return InferenceT5(model, config.cross_kv, compile_step=to_compile(config, model.config, dtype))


def _cautions(report: TimingReport) -> list[str]:
    """Reasons to doubt the times, found in the times themselves."""
    found, config = [], report.config
    broken = sum(
        len(series.rounds) - len(series.sound) for series in (report.end_to_end, report.phases, report.natural)
    )
    if broken:
        found.append(f"the clock ran backwards or stood still in {broken} rounds, which are not counted")
    for what, floor in (("", report.noise_floor), (" of the decode step", report.decode_step_noise_floor)):
        if floor is not None and floor > NOISY:
            found.append(f"noise floor{what} {floor:.0%}: the reference differs that much from itself")
    for name in report.names:
        step, predicted = report._phase(name, "decode_step"), report.costs[name].predicted
        if step and predicted and step < BELOW_BOUND * predicted.step:
            found.append(
                f"decode steps of {name} took {step / predicted.step:.2f} of the least time at the probed bandwidth: "
                "memory has become faster since, or a cache served them"
            )
    beside = float(np.median([report.memory_bandwidth(name) for name in report.names])) if report.names else 0.0
    if abs(beside / report.host.bandwidth - 1) > NOISY:
        found.append(
            f"memory was read at {beside / 1e9:.1f} GB/s beside the runs, and at {report.host.bandwidth / 1e9:.1f} "
            "before them, which is what the least times are computed from"
        )
    in_parts = report.end_to_end.compositions.keys() >= set(report.names)  # then nothing is phased apart
    for kind, series, least in (
        ("end-to-end", report.end_to_end, config.min_rounds),
        ("phased", report.phases, 0 if in_parts else phase_rounds(config)),
    ):
        if not broken and len(series.rounds) < least:
            done = len(series.rounds)
            found.append(f"max_seconds={config.max_seconds:g} ended the {kind} runs after {done} of {least} rounds")
    return found


def _numbers(estimate: Estimate | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if estimate is None else (estimate.median, estimate.low, estimate.high)


def _farthest_from_one(ratio: Estimate | None) -> float | None:
    return None if ratio is None else max(abs(edge - 1) for edge in (ratio.median, ratio.low, ratio.high))
