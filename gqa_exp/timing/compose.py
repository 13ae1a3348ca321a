"""Times of geometries that are too large or too slow to be timed whole, composed of parts that were timed.

Three shortcuts, each marked wherever its result is shown, and compared with a whole run by `gqa-time --prove`: a stack
of equal layers is timed at a few depths and extended linearly to its own; decode steps are timed at a few fills of the
self-attention caches and taken to change linearly between them; the encoder, whose work is proportional to the samples,
is timed with a few and scaled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gqa_exp.config import TimingConfig

Sample = Mapping[str, list[float]]
"""What one run of one variant took: seconds of each phase, a list because a phase such as a decode step repeats."""


def at_depth(phase: str, depth: int) -> str:
    """What a sample calls a phase that was timed at a depth."""
    return f"{phase}@{depth}"


@dataclass(frozen=True)
class Composition:
    """How the parts that were timed make up a whole run of one geometry.

    Attributes:
        config: batch, lengths and shortcuts.
        encoder_layers: of the geometry.
        decoder_layers: of the geometry.
    """

    config: TimingConfig
    encoder_layers: int
    decoder_layers: int

    @property
    def depths(self) -> Sequence[int]:
        """Depths that are timed; the whole stack where nothing is extended."""
        return self.config.depths or [max(self.encoder_layers, self.decoder_layers)]

    @property
    def fills(self) -> Sequence[int]:
        """Cache fills, the step's own token included, at which steps are timed."""
        return self.config.fills or range(1, self.config.output_length + 1)

    def __call__(self, sample: Sample) -> Sample:
        """The phases of a whole run from what was timed.

        Args:
            sample: encode, cross_cache and decode_step at each depth, named by `at_depth`; of decode_step equally many
                seconds for each fill, fills ascending. Of memory_read there may be any number.

        Returns:
            end_to_end, encode, cross_cache, first_token, and decode_step, the mean of the further steps; memory_read
            as it was at all depths.
        """
        encode = self._line([self._encode(sample, d) for d in self.depths], self.encoder_layers)
        cross = self._line([sample[at_depth("cross_cache", d)][0] for d in self.depths], self.decoder_layers)
        at_fills = np.array([self._steps(sample, d) for d in self.depths])
        steps = self._interpolated([self._line(column, self.decoder_layers) for column in at_fills.T.tolist()])
        phases = {"encode": [encode], "cross_cache": [cross], "first_token": [float(steps[0])]}
        if len(steps) > 1:
            phases["decode_step"] = [float(steps[1:].mean())]
        if reads := [s for d in self.depths for s in sample.get(at_depth("memory_read", d), [])]:
            phases["memory_read"] = reads
        return {"end_to_end": [encode + cross + float(steps.sum())], **phases}

    def fit_error(self, sample: Sample) -> float | None:
        """How far a timed depth lies from the line, at most, as a share of its time end to end.

        Returns:
            None where nothing is extended, or for two depths, through which there always is a line.
        """
        if len(self.config.depths) < 3:
            return None
        measured = [
            self._encode(sample, d)
            + sample[at_depth("cross_cache", d)][0]
            + float(self._interpolated(self._steps(sample, d)).sum())
            for d in self.depths
        ]
        return max(abs(self._line(measured, d) / m - 1) for d, m in zip(self.depths, measured, strict=True))

    def describe(self) -> str:
        """Which shortcuts were taken, for tables and warnings."""
        config, parts = self.config, []
        if config.depths:
            depths = ", ".join(map(str, config.depths))
            parts.append(f"extended from {depths} to {self.encoder_layers} + {self.decoder_layers} layers")
        if config.fills:
            parts.append(f"decode steps sampled at cache fills {', '.join(map(str, config.fills))}")
        if config.encoder_batch_size:
            parts.append(f"encoder timed at batch {config.encoder_batch_size} and scaled")
        return "; ".join(parts)

    def _encode(self, sample: Sample, depth: int) -> float:
        samples = self.config.encoder_batch_size or self.config.batch_size
        return sample[at_depth("encode", depth)][0] * self.config.batch_size / samples

    def _steps(self, sample: Sample, depth: int) -> list[float]:
        """Median seconds of a step at each fill."""
        seconds = np.array(sample[at_depth("decode_step", depth)]).reshape(len(self.fills), -1)
        return [float(value) for value in np.median(seconds, axis=1)]

    def _line(self, seconds: Sequence[float], layers: int) -> float:
        """Least-squares line through the depths, at `layers`; the value itself where only one depth was timed."""
        if len(self.depths) == 1:
            return seconds[0]
        slope, intercept = np.polyfit(self.depths, seconds, 1)
        return float(intercept + slope * layers)

    def _interpolated(self, seconds: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Seconds of every step from those at the fills."""
        return np.interp(np.arange(1, self.config.output_length + 1), self.fills, seconds)
