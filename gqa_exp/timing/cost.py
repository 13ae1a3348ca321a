"""What decoding must cost: bytes and FLOPs operation by operation, and the least time a device can take for them.

An operation needs at least max(bytes / bandwidth, FLOPs / peak), and a phase at least the sum of that over its
operations, since they run one after the other (the roofline model of Williams et al. 2009, summed). Only bytes that
have to cross the memory bus are counted: weights, caches and encoder states; activations of one step stay on the chip.
The model's only inputs from a device are its bandwidth and peak, fixed before anything is compared with a measurement.

On several devices weights and heads are divided, as tensor parallelism does; a key/value head cannot be divided, so
where there are more devices than KV heads each holds a copy of one (paper, section 2.2). Communication is not counted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gqa_exp.model import T5Config

BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Device:
    """What a cost is computed for: `count` equal devices.

    Attributes:
        name: for tables.
        bandwidth: of one device's memory, bytes per second.
        peak: of one device's matrix products by number format, FLOP/s.
        memory: of one device, bytes.
        source: where the figures are from.
        count: devices that share the work.
    """

    name: str
    bandwidth: float
    peak: dict[str, float]
    memory: float
    source: str
    count: int = 1


DEVICES = {
    device.name: device
    for device in (
        Device(
            "H100", 3.35e12, {"float32": 66.9e12, "bfloat16": 989.4e12, "float16": 989.4e12}, 80e9,
            "NVIDIA H100 Tensor Core GPU data sheet, SXM5, dense",
        ),
        Device(
            "H200", 4.8e12, {"float32": 66.9e12, "bfloat16": 989.4e12, "float16": 989.4e12}, 141e9,
            "NVIDIA H200 Tensor Core GPU data sheet, SXM, dense",
        ),
        Device(
            "A100", 2.039e12, {"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12}, 80e9,
            "NVIDIA A100 Tensor Core GPU data sheet, SXM 80 GB, dense",
        ),
        Device("TPUv4", 1.2e12, {"bfloat16": 275e12}, 32 * 2**30, "cloud.google.com/tpu/docs/v4, per chip"),
    )
}  # fmt: skip
"""Data-sheet figures; what a device reaches in practice is less."""


@dataclass(frozen=True)
class Operation:
    """Bytes that one operation moves through memory and the FLOPs it does, on one device."""

    name: str
    bytes: float
    flops: float

    def bound(self, bandwidth: float, peak: float) -> float:
        """The least seconds it takes."""
        return max(self.bytes / bandwidth, self.flops / peak)


@dataclass(frozen=True)
class Work:
    """What is to be decoded.

    Attributes:
        geometry: the model's, its KV heads included.
        batch_size: samples together.
        source_length: input tokens.
        output_length: generated tokens.
        dtype: number format of weights, caches and matrix products.
        cross_kv: whether cross-attention's keys and values are computed once, or again at each step.
        devices: how many share weights and heads.
    """

    geometry: T5Config
    batch_size: int
    source_length: int
    output_length: int
    dtype: str = "bfloat16"
    cross_kv: str = "cached"
    devices: int = 1

    @property
    def element(self) -> int:
        """Bytes per number."""
        return BYTES_PER_ELEMENT[self.dtype]

    def _heads_per_device(self, heads: int) -> int:
        return math.ceil(heads / self.devices)

    def _product(self, name: str, rows: int, inner: int, outer: float, extra: float = 0.0) -> Operation:
        """(rows, inner) times a weight (inner, outer), `outer` being this device's share; `extra` numbers moved."""
        return Operation(name, (inner * outer + extra) * self.element, 2.0 * rows * inner * outer)

    def _attention(self, name: str, queries: int, keys: int, kv_heads: int, cached: bool) -> Operation:
        """Scores and weighted values of `queries` positions per sample over `keys` positions."""
        B, K = self.batch_size, self.geometry.head_dim
        read = 2.0 * B * keys * self._heads_per_device(kv_heads) * K if cached else 0.0
        heads = self._heads_per_device(self.geometry.num_heads)
        return Operation(name, read * self.element, 4.0 * B * heads * K * queries * keys)

    def _feed_forward(self, rows: int) -> list[Operation]:
        g = self.geometry
        share = g.d_ff / self.devices
        return [
            self._product("wi", rows, g.d_model, (2 if g.gated else 1) * share),
            Operation("wo", share * g.d_model * self.element, 2.0 * rows * share * g.d_model),
        ]

    def encode(self) -> list[Operation]:
        """Operations of the encoder."""
        g, B, S = self.geometry, self.batch_size, self.source_length
        heads = self._heads_per_device(g.num_heads) * g.head_dim
        layer = [
            self._norm(),
            self._product("qkv", B * S, g.d_model, 3 * heads),
            self._attention("attention", S, S, g.num_heads, cached=False),
            self._output(B * S, heads),
            self._norm(),
            *self._feed_forward(B * S),
        ]
        return [self._embedding(B * S), *layer * g.num_encoder_layers, self._norm()]

    def cross_cache(self) -> list[Operation]:
        """Operations that make cross-attention's keys and values: reads the encoder's states, writes the caches."""
        return [self._cross_keys_values(kv_heads) for kv_heads in self.geometry.kv_heads]

    def _cross_keys_values(self, kv_heads: int) -> Operation:
        g, positions = self.geometry, self.batch_size * self.source_length
        outer = 2 * self._heads_per_device(kv_heads) * g.head_dim
        return self._product("cross k, v", positions, g.d_model, outer, positions * (g.d_model + outer))

    def decode_step(self, cache_fill: int) -> list[Operation]:
        """Operations of one decode step.

        Args:
            cache_fill: positions in the self-attention caches, this step's own included.
        """
        g, B = self.geometry, self.batch_size
        heads = self._heads_per_device(g.num_heads) * g.head_dim
        operations = [self._embedding(B)]
        for kv_heads in g.kv_heads:
            kv = self._heads_per_device(kv_heads) * g.head_dim
            operations += [
                self._norm(),
                self._product("qkv", B, g.d_model, heads + 2 * kv),
                self._attention("self-attention", 1, cache_fill, kv_heads, cached=True),
                self._output(B, heads),
                self._norm(),
                self._product("cross q", B, g.d_model, heads),
            ]
            if self.cross_kv == "recomputed":
                operations.append(self._cross_keys_values(kv_heads))
            operations += [
                self._attention("cross-attention", 1, self.source_length, kv_heads, cached=True),
                self._output(B, heads),
                self._norm(),
                *self._feed_forward(B),
            ]
        return [*operations, self._norm(), self._product("output", B, g.d_model, g.vocab_size / self.devices)]

    def _norm(self) -> Operation:
        return Operation("norm", self.geometry.d_model * self.element, 0.0)

    def _output(self, rows: int, heads: float) -> Operation:
        D = self.geometry.d_model
        return Operation("o", heads * D * self.element, 2.0 * rows * heads * D)

    def _embedding(self, rows: int) -> Operation:
        return Operation("embedding", rows * self.geometry.d_model * self.element, 0.0)

    def weight_bytes(self) -> float:
        """Bytes of the weights that one device holds, KV heads copied where there are fewer than devices."""
        g = self.geometry
        copies = sum(self._heads_per_device(h) - h / self.devices for h in g.kv_heads)
        extra = copies * 4 * g.head_dim * g.d_model  # k and v of self- and cross-attention
        return (g.num_parameters() / self.devices + extra) * self.element

    def cache_bytes_per_sample(self) -> float:
        """Bytes of one sample's keys and values on one device, at full length."""
        heads = sum(self._heads_per_device(kv_heads) for kv_heads in self.geometry.kv_heads)
        positions = self.source_length + self.output_length
        return 2.0 * heads * self.geometry.head_dim * positions * self.element


@dataclass(frozen=True)
class Bound:
    """The least time of each phase, in seconds for the whole batch, and what one decode step must move and do."""

    encode: float
    cross_cache: float
    decode: float
    """All steps together."""
    step: float
    """One step at the mean fill of the self-attention caches."""
    step_bytes: float
    step_flops: float

    @property
    def total(self) -> float:
        """Encode to last token."""
        return self.encode + self.cross_cache + self.decode


def bound(work: Work, device: Device) -> Bound:
    """Lower bound on the time of a batch.

    Args:
        work: what is decoded; its `devices` must be the device's count.
        device: bandwidth and peak.

    Raises:
        ValueError: the device states no peak for the number format, or counts differ.
    """
    if work.dtype not in device.peak:
        raise ValueError(f"{device.name} states no peak for {work.dtype}; it has {', '.join(sorted(device.peak))}")
    if work.devices != device.count:
        raise ValueError(f"work for {work.devices} devices, but {device.name} counts {device.count}")
    peak = device.peak[work.dtype]

    def seconds(operations: Sequence[Operation]) -> float:
        return sum(operation.bound(device.bandwidth, peak) for operation in operations)

    steps = [seconds(work.decode_step(fill + 1)) for fill in range(work.output_length)]
    middle = work.decode_step((work.output_length + 1) // 2)
    cached = work.cross_kv == "cached"
    return Bound(
        encode=seconds(work.encode()),
        cross_cache=seconds(work.cross_cache()) if cached else 0.0,
        decode=sum(steps),
        step=seconds(middle),
        step_bytes=sum(operation.bytes for operation in middle),
        step_flops=sum(operation.flops for operation in middle),
    )


def seconds_per_sample(work: Work, device: Device, most: int = 32) -> tuple[int, float]:
    """What the paper reports (section 3.1): seconds per sample and device, at the largest batch that fits.

    Args:
        work: what is decoded; its batch size and device count play no part.
        device: which, and how many.
        most: samples per device at most.

    Returns:
        (batch over all devices, bound on the time of the batch x devices / batch). (0, infinity) where nothing fits.
    """
    work = replace(work, devices=device.count)
    batch = min(largest_batch(work, device), most * device.count)
    if not batch:
        return 0, math.inf
    return batch, bound(replace(work, batch_size=batch), device).total * device.count / batch


def largest_batch(work: Work, device: Device) -> int:
    """The most samples whose caches and encoder states fit beside the weights; 0 where the weights alone do not.

    `work.batch_size` plays no part. Workspace for activations beyond one encoder state per position is not counted.
    """
    states = work.source_length * work.geometry.d_model * work.element
    free = device.memory - work.weight_bytes()
    return max(0, int(free // (work.cache_bytes_per_sample() + states)))
