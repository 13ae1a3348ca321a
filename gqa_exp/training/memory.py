"""What training needs of a device's memory, said before it starts: a run that cannot fit should not take hours to fail.

Weights are float32, and so are gradients and Adafactor's moments; activations are those that the backward pass needs,
counted from torch's operations run one by one; torch.compile keeps less, and on a CPU so do the kernels of
`gqa_exp.model.sequence`. Not counted: the allocator's slack, workspaces, and what the process holds beside.
"""

from dataclasses import dataclass

from gqa_exp.model import T5, T5Config
from gqa_exp.training.adafactor import slot_shapes


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: float32, and where products are bfloat16 the copies that the backward pass needs.
        gradients: float32; with DDP once more, in the buckets in which they are exchanged.
        moments: Adafactor's.
        activations: of one pass.
    """

    weights: float
    gradients: float
    moments: float
    activations: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.moments + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "moments", "activations")
        listed = ", ".join(f"{name} {getattr(self, name) / 2**30:.2f}" for name in parts)
        return f"{self.total / 2**30:.2f} GiB ({listed})"


def training_memory(
    model: T5,
    rows: int,
    source: int,
    target: int,
    *,
    bfloat16: bool,
    checkpointing: bool = False,
    ddp: bool = False,
    shards: int = 1,
) -> Memory:
    """An estimate of what a device holds while it trains.

    Args:
        model: whose geometry and parameters count; it may be without any weights (meta).
        rows: samples that it computes at a time.
        source: their input tokens, padding included.
        target: their target tokens, padding included.
        bfloat16: whether matrix products are; weights stay float32.
        checkpointing: whether inner activations of layers are computed again.
        ddp: whether gradients are exchanged in buckets.
        shards: ranks that weights, gradients and moments are divided between.
    """
    shapes = [parameter.shape for parameter in model.parameters()]
    parameters = sum(shape.numel() for shape in shapes)
    moments = sum(slot.numel() for shape in shapes for slot in slot_shapes(shape).values())
    copied = parameters
    if checkpointing:  # of one layer at a time, and of the output projection
        stacks = sum(p.numel() for stack in (model.encoder, model.decoder) for p in stack.layers.parameters())
        copied = stacks // (len(model.encoder.layers) + len(model.decoder.layers)) + model.embedding.weight.numel()
    return Memory(
        weights=4.0 * parameters / shards + (2.0 * copied if bfloat16 else 0.0),
        gradients=4.0 * parameters / shards * (2 if ddp else 1),
        moments=4.0 * moments / shards,
        activations=_activations(model.config, rows, source, target, bfloat16, checkpointing),
    )


def _activations(g: T5Config, B: int, S: int, T: int, bfloat16: bool, checkpointing: bool) -> float:
    """Bytes kept for the backward pass, and the logits' gradient, with which it begins.

    A sub-layer keeps its input and the scaled input (norm, float32), the normed input (of its products), and what its
    products and attention need: q, k, v, softmax and the values' sum; or the halves of the feed-forward network.
    """
    D, F, H, K = g.d_model, g.d_ff, g.num_heads, g.head_dim
    wide = 2.0 if bfloat16 else 4.0  # of what products take and give

    def attention(queries: int, keys: int, kv_heads: int, sources: int) -> float:
        kept = wide * B * K * (2 * H * queries + 2 * kv_heads * keys)  # q, the values' sum; k, v
        kept += wide * B * H * queries * keys  # softmax
        norm = 8.0 * B * queries * D + wide * B * queries * D  # its input and the scaled one; the normed one
        return kept + norm + sources * wide * B * keys * D

    def feed_forward(tokens: int) -> float:
        inner = 4 if g.gated else 2  # gelu's input, its result, the other half, their product
        return 8.0 * B * tokens * D + wide * B * tokens * (D + inner * F)

    encoder = attention(S, S, H, 0) + feed_forward(S)
    decoders = [
        attention(T, T, kv_heads, 0) + attention(T, S, kv_heads, 1 if bfloat16 else 0) + feed_forward(T)
        for kv_heads in g.kv_heads
    ]
    states = 4.0 * B * D * (g.num_encoder_layers * S + g.num_decoder_layers * T)
    layers = states + max(encoder, *decoders) if checkpointing else g.num_encoder_layers * encoder + sum(decoders)
    logits = B * T * g.vocab_size * (4.0 + 4.0 + (2.0 if bfloat16 else 0.0))  # they and their gradient, and its copy
    return layers + logits
