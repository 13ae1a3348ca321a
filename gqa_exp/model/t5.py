"""T5.1.1 with grouped-query attention in the decoder: gated GELU, untied embeddings, RMSNorm, relative position bias.

Its relatives that differ by configuration alone are covered: T5 1.0 (ReLU, tied embeddings) and UL2 (gated SiLU).
The encoder's self-attention is always multi-head; decoder self- and cross-attention have `num_kv_heads` KV heads
(paper, section 2.2: the encoder runs in parallel, so memory bandwidth is not its bottleneck).

Shape suffixes: B batch, S source length, T target length, D d_model, F d_ff, H query heads, G KV heads, K head_dim,
V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gqa_exp.config import FEED_FORWARDS, ModelConfig, kv_heads_per_layer
from gqa_exp.errors import InputError, suggest
from gqa_exp.model import sequence
from gqa_exp.model.attention import GroupedAttention, RelativePositionBias, by_position
from gqa_exp.model.sequence import Dropout, Linear, linear

RECOMPILE_LIMIT = 128
"""Compiled versions of a layer, or of a decode step, that a process may hold."""
GATED = "gated-"


def gelu(x: Tensor) -> Tensor:
    """GELU in the approximation that T5.1.1 was trained with, x/2 * (1 + tanh(u)), u = sqrt(2/pi) * (x + 0.044715 x^3).

    torch.compile makes of tanh a call that dominates the feed-forward network's elementwise work on CPU. With (1 +
    tanh(u)) / 2 = sigmoid(2u), the same function, forward took 1.4 ms where it took 3.6, and backward 2.2 of 4.0 (7168
    x 768 bfloat16 with the gate, 2 cores).
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    x32 = x.float()
    u = math.sqrt(2 / math.pi) * (x32 + 0.044715 * x32 * x32 * x32)
    return (x32 * torch.sigmoid(2 * u)).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = dict(zip(FEED_FORWARDS, (gelu, F.silu, F.relu), strict=True))


@dataclass(frozen=True)
class T5Config:
    """Geometry of a T5 model, and what follows from it: parameters, cache and decode traffic.

    `num_kv_heads` may be given as None (as many as query heads), an int, or one int per decoder layer; it is kept as
    one int per decoder layer. `tied_embeddings`: the output projection is the embedding, and the decoder's states are
    scaled by 1/sqrt(d_model) before it, as in T5 1.0.

    Raises:
        InputError: `num_kv_heads` does not divide `num_heads`, or has a wrong number of entries; or `feed_forward` is
            unknown.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    num_heads: int
    head_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_kv_heads: Any = None
    feed_forward: str = "gated-gelu"
    tied_embeddings: bool = False
    relative_buckets: int = 32
    relative_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    pad_id: int = 0
    eos_id: int = 1
    decoder_start_id: int = 0

    def __post_init__(self) -> None:
        heads = kv_heads_per_layer(self.num_kv_heads, self.num_heads, self.num_decoder_layers)
        object.__setattr__(self, "num_kv_heads", heads)
        if self.feed_forward not in ACTIVATIONS:
            raise InputError(
                f'feed_forward="{self.feed_forward}" is unknown; {suggest(self.feed_forward, ACTIVATIONS)}'
            )

    @classmethod
    def from_model_config(cls, model: ModelConfig, num_kv_heads: Any = None) -> "T5Config":
        """The geometry of a configured model."""
        names = {spec.name for spec in dataclasses.fields(cls)} & {spec.name for spec in dataclasses.fields(model)}
        return cls(**{name: getattr(model, name) for name in names}, num_kv_heads=num_kv_heads)

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """KV heads of each decoder layer."""
        return tuple(self.num_kv_heads)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward network has two inner projections."""
        return self.feed_forward.startswith(GATED)

    @property
    def feed_forward_weights(self) -> int:
        """Weights of one feed-forward network."""
        return (3 if self.gated else 2) * self.d_model * self.d_ff

    def cut(self, layers: int) -> "T5Config":
        """The same geometry with at most so many layers of encoder and decoder."""
        heads = self.kv_heads[:layers]
        return dataclasses.replace(
            self,
            num_encoder_layers=min(layers, self.num_encoder_layers),
            num_decoder_layers=len(heads),
            num_kv_heads=heads,
        )

    def _decoder_layer_weights(self, kv_heads: int) -> tuple[int, int]:
        """Weights of a decoder layer: (those a decode step reads, those it does not: the cross K/V projections)."""
        D, H, K = self.d_model, self.num_heads, self.head_dim
        query_and_output = 2 * D * H * K
        key_and_value = 2 * D * kv_heads * K
        return 2 * query_and_output + key_and_value + self.feed_forward_weights + 3 * D, key_and_value

    def num_parameters(self) -> int:
        """Parameters of the whole model, embedding and output projection included."""
        D, H, K = self.d_model, self.num_heads, self.head_dim
        encoder_layer = 4 * D * H * K + self.feed_forward_weights + 2 * D
        decoder = sum(sum(self._decoder_layer_weights(kv_heads)) for kv_heads in self.kv_heads)
        matrices = 1 if self.tied_embeddings else 2
        ends = matrices * self.vocab_size * D + 2 * D + 2 * self.relative_buckets * H
        return self.num_encoder_layers * encoder_layer + decoder + ends

    def kv_cache_bytes(self, source_length: int, target_length: int, bytes_per_element: int) -> int:
        """Bytes of one sample's keys and values: 2 G K per position, for cross- and self-attention of each layer."""
        per_position = sum(2 * kv_heads * self.head_dim for kv_heads in self.kv_heads)
        return per_position * (source_length + target_length) * bytes_per_element

    def decode_step_bytes(self, batch_size: int, source_length: int, cache_fill: int, bytes_per_element: int) -> int:
        """Bytes one decode step must read at a given fill of the self-attention cache.

        Decoder weights and output projection once, one embedding row and the caches per sample; not the encoder, not
        the cross K/V projections, whose results are cached.
        """
        weights = sum(self._decoder_layer_weights(kv_heads)[0] for kv_heads in self.kv_heads)
        weights += self.vocab_size * self.d_model + self.d_model
        per_sample = self.kv_cache_bytes(source_length, cache_fill, bytes_per_element)
        return (weights + batch_size * self.d_model) * bytes_per_element + batch_size * per_sample


class RMSNorm(nn.Module):
    """Scale to unit root mean square, in float32, without subtracting the mean (T5's layer norm)."""

    def __init__(self, d_model: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; the result has the dtype of the weight."""
        x32 = x.float()
        scaled = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * scaled.to(self.weight.dtype)


class FeedForward(nn.Module):
    """wo(act(wi_0 x) * wi_1 x) where gated, as in T5.1.1; wo(act(wi x)) otherwise.

    Args:
        d_model: D.
        d_ff: F.
        kind: one of `ACTIVATIONS`.
    """

    def __init__(self, d_model: int, d_ff: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.names = ("wi_0", "wi_1") if kind.startswith(GATED) else ("wi",)
        for name in self.names:
            setattr(self, name, Linear(d_model, d_ff))
        self.wo = Linear(d_ff, d_model)
        self.dropout = 0.0

    @property
    def inner(self) -> list[Linear]:
        """The projections that `activate` takes the results of."""
        return [getattr(self, name) for name in self.names]

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        projected = (projection(x_BTD) for projection in self.inner)
        hidden_BTF = activate(self.kind, *projected, dropout=self.dropout if self.training else 0.0)
        return self.wo(hidden_BTF)  # type: ignore[no-any-return]


def activate(kind: str, x: Tensor, gated: Tensor | None = None, *, dropout: float = 0.0) -> Tensor:
    """act(x), times `gated` where there is one, by the `ACTIVATIONS` of a kind; then dropout of this probability."""
    if gated is not None and ACTIVATIONS[kind] is gelu and sequence.serves_gated_gelu(x, gated):
        return sequence.gated_gelu(x, gated, dropout)
    x = ACTIVATIONS[kind](x)
    return sequence.dropout(x if gated is None else x * gated, dropout)


class EncoderLayer(nn.Module):
    """Multi-head self-attention and feed-forward, each normalised before and added to the residual."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        D, epsilon = config.d_model, config.layer_norm_epsilon
        self.self_attention_norm = RMSNorm(D, epsilon)
        self.self_attention = GroupedAttention(D, config.num_heads, config.num_heads, config.head_dim)
        self.feed_forward_norm = RMSNorm(D, epsilon)
        self.feed_forward = FeedForward(D, config.d_ff, config.feed_forward)
        self.dropout = Dropout(0.0)

    def forward(self, x_BSD: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """(B, S, D) to (B, S, D); `bias` is as `grouped_attention` takes it, `mask` (B, 1, 1, S)."""
        normed = self.self_attention_norm(x_BSD)
        x_BSD = x_BSD + self.dropout(self.self_attention(normed, normed, bias, mask))
        return x_BSD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BSD)))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Grouped self-attention, grouped cross-attention and feed-forward."""

    def __init__(self, config: T5Config, num_kv_heads: int) -> None:
        super().__init__()
        D, epsilon = config.d_model, config.layer_norm_epsilon
        self.self_attention_norm = RMSNorm(D, epsilon)
        self.self_attention = GroupedAttention(D, config.num_heads, num_kv_heads, config.head_dim)
        self.cross_attention_norm = RMSNorm(D, epsilon)
        self.cross_attention = GroupedAttention(D, config.num_heads, num_kv_heads, config.head_dim)
        self.feed_forward_norm = RMSNorm(D, epsilon)
        self.feed_forward = FeedForward(D, config.d_ff, config.feed_forward)
        self.dropout = Dropout(0.0)

    def forward(self, x_BTD: Tensor, bias: Tensor, encoded_BSD: Tensor, cross_mask: Tensor | None) -> Tensor:
        """(B, T, D) to (B, T, D); `bias` is as `grouped_attention` takes it, `cross_mask` (B, 1, 1, S)."""
        normed = self.self_attention_norm(x_BTD)
        x_BTD = x_BTD + self.dropout(self.self_attention(normed, normed, bias))
        normed = self.cross_attention_norm(x_BTD)
        x_BTD = x_BTD + self.dropout(self.cross_attention(normed, encoded_BSD, mask=cross_mask))
        return x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """The encoder stack with its position bias and final norm."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.relative_bias = RelativePositionBias(
            config.num_heads, config.relative_buckets, config.relative_max_distance, bidirectional=True
        )
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))
        self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = Dropout(0.0)
        self.checkpointing = False

    def forward(self, x_BSD: Tensor, mask: Tensor | None) -> Tensor:
        """Embedded inputs (B, S, D) to encoded states (B, S, D); `mask` is additive, (B, 1, 1, S)."""
        S = x_BSD.shape[1]
        bias = self.relative_bias(S, S)
        x_BSD = self.dropout(x_BSD)
        first = self.layers[0]
        assert isinstance(first, EncoderLayer)
        if not first.self_attention.by_kernel(x_BSD):  # laid out and added here, rather than in each layer
            bias = by_position(bias, S)
            bias, mask = (bias if mask is None else bias + mask), None
        for layer in self.layers:
            x_BSD = _run(layer, self.checkpointing and self.training, x_BSD, bias, mask)
        return self.dropout(self.final_norm(x_BSD))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """The decoder stack with its position bias and final norm."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.relative_bias = RelativePositionBias(
            config.num_heads, config.relative_buckets, config.relative_max_distance, bidirectional=False
        )
        self.layers = nn.ModuleList(DecoderLayer(config, kv_heads) for kv_heads in config.kv_heads)
        self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = Dropout(0.0)
        self.checkpointing = False

    def forward(self, x_BTD: Tensor, encoded_BSD: Tensor, cross_mask: Tensor | None) -> Tensor:
        """Embedded targets (B, T, D), teacher-forced, to states (B, T, D)."""
        T = x_BTD.shape[1]
        bias = self.relative_bias(T, T)
        future = torch.arange(2 * T - 1, device=bias.device) >= T
        bias = bias.masked_fill(future, torch.finfo(bias.dtype).min)
        x_BTD = self.dropout(x_BTD)
        first = self.layers[0]
        assert isinstance(first, DecoderLayer)
        if not first.self_attention.by_kernel(x_BTD):
            bias = by_position(bias, T)
        for layer in self.layers:
            x_BTD = _run(layer, self.checkpointing and self.training, x_BTD, bias, encoded_BSD, cross_mask)
        return self.dropout(self.final_norm(x_BTD))  # type: ignore[no-any-return]


def _run(layer: nn.Module, checkpointing: bool, *inputs: Tensor | None) -> Tensor:
    """A layer's output; with checkpointing its inner activations are not kept, but computed again for the gradient."""
    output: Tensor = checkpoint(layer, *inputs, use_reentrant=False) if checkpointing else layer(*inputs)
    return output


class T5(nn.Module):
    """Encoder-decoder of the given geometry, initialised as the T5 code does."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.lm_head = None if config.tied_embeddings else Linear(config.d_model, config.vocab_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights as the Mesh TensorFlow T5 code does, the output projection with std d_model^-0.5."""
        config = self.config
        for name, parameter in self.named_parameters():
            if parameter.device.type == "meta":
                continue
            owner, _, leaf = name.rpartition(".")
            if "norm" in owner:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, initial_std(f"{owner.rpartition('.')[2]}.{leaf}", config))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def set_dropout(self, probability: float) -> None:
        """Set every dropout: residual, feed-forward and attention weights (0 in pre-training, 0.1 in fine-tuning)."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = probability
            elif isinstance(module, (GroupedAttention, FeedForward)):
                module.dropout = probability

    def set_checkpointing(self, on: bool) -> None:
        """Whether training keeps one activation per layer only, and computes the others again."""
        self.encoder.checkpointing = self.decoder.checkpointing = on

    def compile_layers(self) -> None:
        """torch.compile each layer: layers of a stack share one compiled function, so compiling stays short.

        Layers of one kind, of all models of a process, share torch's limit of compiled versions, 8 by default, beyond
        which they run uncompiled. A sweep needs one per number of KV heads, kind of mask and mode: the limit is raised.
        """
        allow_many_versions()
        for layer in (*self.encoder.layers, *self.decoder.layers):
            layer.compile()

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (B, S) to encoded states (B, S, D)."""
        (source_BSD,) = self._embed(input_ids)
        return self.encoder(source_BSD, additive_mask(attention_mask, self.embedding.weight.dtype))  # type: ignore[no-any-return]

    def decode(self, decoder_input_ids: Tensor, encoded_BSD: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Teacher-forced decoding: (B, T) ids and encoded states (B, S, D) to decoder states (B, T, D)."""
        (target_BTD,) = self._embed(decoder_input_ids)
        return self.decoder(target_BTD, encoded_BSD, additive_mask(attention_mask, self.embedding.weight.dtype))  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of every target position.

        Args:
            input_ids: (B, S).
            decoder_input_ids: (B, T), the targets shifted right by one (see `shift_right`).
            attention_mask: (B, S), 1 for tokens and 0 for padding; None when nothing is padded.
        """
        mask = additive_mask(attention_mask, self.embedding.weight.dtype)
        source_BSD, target_BTD = self._embed(input_ids, decoder_input_ids)
        return self.logits(self.decoder(target_BTD, self.encoder(source_BSD, mask), mask))

    def _embed(self, *ids: Tensor) -> list[Tensor]:
        """Rows of the embedding for ids of any shape, together: each lookup has a gradient of the whole's size."""
        rows = self.embedding(torch.cat([each.flatten() for each in ids]))
        found = rows.split([each.numel() for each in ids])
        return [part.view(*each.shape, rows.shape[1]) for part, each in zip(found, ids, strict=True)]

    def logits(self, decoded_BTD: Tensor) -> Tensor:
        """Decoder states (B, T, D) to logits (B, T, V)."""
        if self.lm_head is None:
            return linear(decoded_BTD * self.config.d_model**-0.5, self.embedding.weight)
        return self.lm_head(decoded_BTD)  # type: ignore[no-any-return]

    def shift_right(self, labels: Tensor) -> Tensor:
        """Decoder inputs (B, T) that predict `labels` (B, T): the start token, then the labels but the last."""
        start = labels.new_full((labels.shape[0], 1), self.config.decoder_start_id)
        return torch.cat([start, labels[:, :-1]], dim=1)


def allow_many_versions() -> None:
    """Let a function have `RECOMPILE_LIMIT` compiled versions in a process; beyond torch's 8 it runs uncompiled."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)


def additive_mask(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(B, S) of ones and zeros to an additive mask (B, 1, 1, S); None stays None.

    What hides is finite in bfloat16 too, which autocast may make of it: of minus infinity alone softmax is NaN.
    """
    if attention_mask is None:
        return None
    hidden = (attention_mask == 0)[:, None, None, :]
    least = max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, least)


def initial_std(parameter: str, config: T5Config) -> float:
    """Standard deviation of a fresh parameter, by its last two name parts (mesh_tensorflow/transformer/t5 defaults).

    The query's includes the 1/sqrt(head_dim) that T5 leaves out of attention.
    """
    D, K = config.d_model, config.head_dim
    stds: dict[str, float] = {
        "embedding.weight": 1.0,
        "lm_head.weight": D**-0.5,
        "relative_bias.weight": D**-0.5,
        "q.weight": (D * K) ** -0.5,
        "k.weight": D**-0.5,
        "v.weight": D**-0.5,
        "o.weight": (config.num_heads * K) ** -0.5,
        "wi.weight": D**-0.5,
        "wi_0.weight": D**-0.5,
        "wi_1.weight": D**-0.5,
        "wo.weight": config.d_ff**-0.5,
    }
    return stds[parameter]
