"""A model prepared for decoding: its layers packed, see `packed.py`, and what their steps need from the past.

Shape suffixes: B batch, S source length, T cached positions, L distances, D d_model, H query heads, G KV heads,
K head_dim, V vocabulary.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch._inductor.config as inductor
from torch import Tensor, nn

from gqa_exp.host import can_compile
from gqa_exp.model.attention import KVCache
from gqa_exp.model.decode_step import DecodeStep
from gqa_exp.model.graphs import RecordedSteps
from gqa_exp.model.packed import PackedDecoderLayer, PackedLinear
from gqa_exp.model.t5 import T5, DecoderLayer, additive_mask, allow_many_versions

STRETCH = 128
"""A step compiled on a CPU attends to a multiple of so many cached positions: one graph for each, not for each step."""
GPU_STRETCH = 32
"""The same on a GPU, where nothing is compiled anew for a further graph."""
KEPT = 2
"""States whose steps are recorded, of different shapes, that a model keeps: each with its caches."""


@dataclass
class DecodingState:
    """Everything a decode step needs from the past."""

    self_caches: list[KVCache]
    cross_caches: list[KVCache]
    encoded_BSD: Tensor | None
    """The encoder's states, where each step computes cross-attention's keys and values from them."""
    cross_mask: Tensor | None
    """Additive (B, 1, 1, S), or None when nothing is padded."""
    bias_HL: Tensor
    """Self-attention bias by distance, farthest first and then as many that hide what is to come: the bias of a step is
    a view."""
    positions: Tensor
    length: int = 0
    """Tokens in the self-attention caches."""
    recorded: RecordedSteps | None = None
    """Its steps as CUDA graphs, where they are compiled for a GPU."""
    native_step: DecodeStep | None = None
    """What runs all kernels of a step in one call, where there are kernels for all of it."""

    def self_cache_bytes(self) -> int:
        """Bytes allocated for self-attention, all samples and layers."""
        return sum(cache.nbytes for cache in self.self_caches)

    def cross_cache_bytes(self) -> int:
        """Bytes allocated for cross-attention, all samples and layers."""
        return sum(cache.nbytes for cache in self.cross_caches)

    def fill_self_caches(self) -> None:
        """Fill the self-attention caches with noise, to time a step at any fill: unwritten memory may hold NaN."""
        for cache in self.self_caches:
            cache.keys.normal_()
            cache.v_BGSK.normal_()

    def bias(self, position: int | Tensor, end: int) -> Tensor:
        """Bias (H, end) of a token's scores with the first `end` positions; those behind its own are hidden.

        Args:
            position: the token's, as `KVCache.put` takes it.
            end: positions attended to.
        """
        first = len(self.positions) - 1 - position
        if isinstance(first, Tensor):
            return self.bias_HL.index_select(1, first + self.positions[:end])
        return self.bias_HL[:, first : first + end]

    def keep(self, rows_B: Tensor) -> None:
        """Keep only the sequences of these indices, in their order."""
        assert self.recorded is None, "graphs would go on writing to the memory that this gives up"
        parts = None if self.native_step is None else self.native_step.parts
        self.native_step = None  # it holds the memory that this gives up
        for cache in (*self.self_caches, *self.cross_caches):
            cache.keep(rows_B)
        self.encoded_BSD = None if self.encoded_BSD is None else self.encoded_BSD[rows_B]
        self.cross_mask = None if self.cross_mask is None else self.cross_mask[rows_B]
        if parts is not None:
            self.native_step = DecodeStep(*parts, self.self_caches, self.cross_caches, self.cross_mask)

    def renew(self, encoded_BSD: Tensor, cross_mask: Tensor | None) -> None:
        """Begin again, in the same memory, with another batch of the same shape."""
        if cross_mask is not None and self.cross_mask is not None:
            self.cross_mask.copy_(cross_mask)
        if self.encoded_BSD is not None:
            self.encoded_BSD.copy_(encoded_BSD)
        self.clear_self_caches()
        self.length = 0

    def clear_self_caches(self) -> None:
        """Make all their positions numbers: compiled steps read those to come too, and the bias hides no NaN."""
        for cache in self.self_caches:
            cache.keys.zero_()
            cache.v_BGSK.zero_()


class InferenceT5(nn.Module):
    """A T5 prepared for decoding. Changes of the model made later do not reach its packed copies: prepare it anew.

    Args:
        model: the model, in the number format and on the device to decode with. Its encoder is shared, not copied.
        cross_kv: "cached" or "recomputed", see `gqa_exp.config.CROSS_KV`.
        compile_step: torch.compile the decode step, anew for each batch, source length and `STRETCH` of the output: 8 s
            for 4 layers, 15 s for 12, on 2 cores. Where `decode_step.py` does not serve, it halves the time of small
            models, whose steps are mostly overhead; steps that read gigabytes gain nothing. On a GPU the products are
            compiled with what stands around them, and the step is recorded as a CUDA graph, see `graphs.py`: then
            `start` gives the state of an earlier batch of the same shape again, and `step` the same logits' memory.
            Ignored where there is no compiler.
    """

    def __init__(self, model: T5, cross_kv: str = "cached", *, compile_step: bool = False) -> None:
        super().__init__()
        self.training = model.training
        self.config = model.config
        self.cross_kv = cross_kv
        self.on_gpu = model.device.type == "cuda"
        self.compiled = compile_step = compile_step and can_compile("gpu" if self.on_gpu else "cpu")
        # Parts, not the model itself: its own decoder can then be given up, which matters where it is large.
        self.embedding = model.embedding
        self.encoder = model.encoder
        self.relative_bias = model.decoder.relative_bias
        self.layers = nn.ModuleList(
            PackedDecoderLayer(layer, compiled=compile_step)
            for layer in model.decoder.layers
            if isinstance(layer, DecoderLayer)
        )
        norm, weight = model.decoder.final_norm, model.embedding.weight
        if model.lm_head is not None:
            weight = model.lm_head.weight
        else:  # scaled before the product, so in the norm's weight
            norm = copy.deepcopy(norm)
            norm.weight.data *= self.config.d_model**-0.5
        self.lm_head = PackedLinear(weight, norm=norm, compiled=compile_step)
        self._prepare_step()

    def _prepare_step(self) -> None:
        self._decode_once = self._decode
        self._kept: dict[tuple[int, int, int, bool, bool], DecodingState] = {}
        if self.compiled:
            allow_many_versions()
        if self.compiled and not self.on_gpu:
            self._decode_once = torch.compile(self._decode, dynamic=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (B, S) to encoded states (B, S, D)."""
        mask = additive_mask(attention_mask, self.embedding.weight.dtype)
        return self.encoder(self.embedding(input_ids), mask)  # type: ignore[no-any-return]

    def shallow(self, layers: int) -> "InferenceT5":
        """The same model cut to its first layers of encoder and decoder, weights shared; for timing, not for text."""
        other = copy.copy(self)
        other._modules = {**self._modules, "layers": self.layers[:layers], "encoder": copy.copy(self.encoder)}
        other.encoder._modules = {**self.encoder._modules, "layers": self.encoder.layers[:layers]}
        other.config = self.config.cut(layers)
        other._prepare_step()
        return other

    def start(self, encoded_BSD: Tensor, attention_mask: Tensor | None, max_new_tokens: int) -> DecodingState:
        """Allocate the caches and fill those of cross-attention.

        Where steps are recorded, the state may be one that was given before, of as many sequences, source positions and
        tokens, with a mask or without: it begins again, whoever still holds it.

        Args:
            encoded_BSD: encoded source states.
            attention_mask: (B, S) of ones and zeros, or (1, S) for all; None when nothing is padded.
            max_new_tokens: capacity of the self-attention caches.
        """
        cross_mask = additive_mask(attention_mask, self.embedding.weight.dtype)
        B, S, _ = encoded_BSD.shape
        if cross_mask is not None:
            cross_mask = cross_mask.expand(B, -1, -1, -1).contiguous()
        # What is made in inference mode cannot be written to outside of it.
        shape = (B, S, max_new_tokens, cross_mask is None, torch.is_inference_mode_enabled())
        state = self._kept.pop(shape, None)
        if state is None:
            if len(self._kept) == KEPT:
                del self._kept[next(iter(self._kept))]  # used longest ago
            state = self._new_state(encoded_BSD, cross_mask, max_new_tokens)
        else:
            state.renew(encoded_BSD, cross_mask)
        if state.recorded is not None:
            self._kept[shape] = state
        if self.cross_kv == "cached":
            self._fill_cross(state, encoded_BSD)
        return state

    def _new_state(self, encoded_BSD: Tensor, cross_mask: Tensor | None, max_new_tokens: int) -> DecodingState:
        B, S, _ = encoded_BSD.shape
        recording = self.compiled and self.on_gpu
        self_caches = [layer.cache(B, max_new_tokens, encoded_BSD) for layer in self._layers]
        cross_caches = [layer.cache(B, S, encoded_BSD) for layer in self._layers]
        distances = torch.arange(-(max_new_tokens - 1), 1, device=encoded_BSD.device)
        bias_HL = self.relative_bias.of_distances(distances).detach()
        hidden_HL = torch.full_like(bias_HL, torch.finfo(bias_HL.dtype).min)
        read_BSD = encoded_BSD if self.cross_kv == "recomputed" else None  # by each step
        if recording and read_BSD is not None:
            read_BSD = read_BSD.clone()
        state = DecodingState(
            self_caches,
            cross_caches,
            read_BSD,
            cross_mask,
            torch.cat([bias_HL, hidden_HL], dim=1),
            torch.arange(max_new_tokens, device=encoded_BSD.device),
        )
        if self.compiled:
            state.clear_self_caches()
        if recording:
            state.recorded = RecordedSteps(B, encoded_BSD.device)
        if not self.compiled and DecodeStep.serves(self._layers, self.lm_head, (*self_caches, *cross_caches)):
            state.native_step = DecodeStep(self._layers, self.lm_head, self_caches, cross_caches, cross_mask)
        return state

    def step(self, token_B: Tensor, state: DecodingState) -> Tensor:
        """Feed one token per sequence and return the logits (B, V) of the next; advances `state`.

        A later step of the same state may overwrite them.

        Raises:
            IndexError: the caches are full.
            ValueError: not one token for each sequence of the state.
        """
        for cache in state.self_caches[:1]:  # there are none in a model cut to no layers
            if token_B.shape != cache.v_BGSK.shape[:1]:
                raise ValueError(f"tokens {tuple(token_B.shape)} for {len(cache.v_BGSK)} sequences")
        position, capacity = state.length, len(state.positions)
        if position >= capacity:
            raise IndexError(f"the decoding caches hold {capacity} tokens and are full")
        end = position + 1
        if self.compiled:  # a graph has fixed shapes: a few of them, and the bias hides what lies behind the token
            stretch = GPU_STRETCH if self.on_gpu else STRETCH
            end = min(capacity, -(-end // stretch) * stretch)
        if state.recorded is not None:
            logits_BV = state.recorded(functools.partial(self._decode_at, state, end), token_B, position, end)
        elif self.compiled:
            at, bias_HT = state.positions[position : position + 1], state.bias(position, end).contiguous()
            # Not as an option of torch.compile, which tracing does not see; not globally, or training would freeze too.
            with inductor.patch(freezing=True):
                logits_BV = self._decode_once(token_B, at, bias_HT, state)
        elif state.native_step is not None:
            if state.encoded_BSD is not None:
                self._fill_cross(state, state.encoded_BSD)
            logits_BV = state.native_step(self.embedding(token_B), position, state.bias(position, end))
        else:
            logits_BV = self._decode(token_B, position, state.bias(position, end), state)
        state.length += 1
        return logits_BV

    def _decode_at(self, state: DecodingState, end: int, token_B: Tensor, position: Tensor) -> Tensor:
        return self._decode(token_B, position, state.bias(position, end), state)

    def _decode(self, token_B: Tensor, position: int | Tensor, bias_HT: Tensor, state: DecodingState) -> Tensor:
        x_BD = self.embedding(token_B)
        for layer, own, cross in zip(self._layers, state.self_caches, state.cross_caches, strict=True):
            if state.encoded_BSD is not None:
                layer.fill_cross(cross, state.encoded_BSD)
            x_BD = layer(x_BD, position, bias_HT, own, cross, state.cross_mask)
        return self.lm_head(x_BD)  # type: ignore[no-any-return]

    def _fill_cross(self, state: DecodingState, encoded_BSD: Tensor) -> None:
        for layer, cache in zip(self._layers, state.cross_caches, strict=True):
            layer.fill_cross(cache, encoded_BSD)

    @property
    def _layers(self) -> Sequence[PackedDecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, PackedDecoderLayer)]
