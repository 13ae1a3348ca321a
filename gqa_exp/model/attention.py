"""Grouped-query attention and its key/value cache: the file this project is about.

H query heads share G key/value heads. Query heads of a group are contiguous: query head h reads KV head h // R with
R = H / G. Multi-head attention (MHA) is G = H and multi-query attention (MQA) is G = 1; there is one code path.

Keys and values exist, in projections and in caches, for G heads only. Instead of repeating them R times, the R query
heads of a group are folded into the query-length axis: q (B, T, H, K) becomes (B, G, R*T, K), which attends to k
(B, G, S, K) as if it were R*T queries. The result is the same, nothing is copied, and a decode step reads each cached
key and value once, which is the whole point of fewer KV heads.

Shape suffixes: B batch, S source (key) length, T target (query) length, D d_model, H query heads, G KV heads,
R = H/G query heads per KV head, K head_dim; `q_BTHK` says what it holds.
"""

import functools
import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gqa_exp.host import can_compile
from gqa_exp.model import native, sequence
from gqa_exp.model.sequence import Linear


def grouped_attention(
    q_BTHK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of H query heads over G key/value heads, without the 1/sqrt(K) scale (T5 folds it into initialisation).

    Args:
        q_BTHK: queries.
        k_BGSK: keys, G dividing H.
        v_BGSK: values.
        bias: added to the scores, of four axes, broadcastable to (B, H, T, S): position bias, mask (large negative), or
            both; or of two, by distance, (H, T+S-1), see `by_position`, as the kernel of `sequence.py` takes it.
        mask: added too, (B|1, 1, 1, S), without gradient: apart from the bias, as that kernel takes it.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, T, H, K), the weighted values of each query head.

    Raises:
        ValueError: a bias by distance has not one number for each head and distance.
    """
    k_BSGK, v_BSGK = k_BGSK.transpose(1, 2), v_BGSK.transpose(1, 2)
    if sequence.serves_attention(q_BTHK, k_BSGK, v_BSGK, bias, mask):
        return sequence.attention(q_BTHK, k_BSGK, v_BSGK, bias, mask, dropout)
    B, T, H, K = q_BTHK.shape
    G, S = k_BGSK.shape[1:3]
    if bias is not None and bias.dim() == 2:
        sequence.check_distances(bias, H, T, S)
        bias = by_position(bias, S)
    if mask is not None:
        bias = mask if bias is None else bias + mask
    R = H // G
    q_BGLK = q_BTHK.view(B, T, G, R, K).permute(0, 2, 3, 1, 4).reshape(B, G, R * T, K)  # L = R*T folded queries
    bias_BGLS = None if bias is None else _fold_bias(bias, G, R, T, S)
    needs_bias_gradient = bias_BGLS is not None and bias_BGLS.requires_grad
    if needs_bias_gradient or (q_BTHK.device.type == "cpu" and q_BTHK.requires_grad):
        # Written out where SDPA's fused kernels do not serve: none takes a bias that needs a gradient, and backwards
        # those for CPU are slower than this.
        scores_BGLS = q_BGLK @ k_BGSK.transpose(-1, -2)
        if bias_BGLS is not None:
            scores_BGLS = scores_BGLS + bias_BGLS.to(scores_BGLS.dtype)
        weights_BGLS = scores_BGLS.softmax(dim=-1)  # accumulates in float32 whatever the dtype
        out_BGLK = sequence.dropout(weights_BGLS, dropout) @ v_BGSK
    else:
        added = None if bias_BGLS is None else bias_BGLS.to(q_BGLK.dtype)
        out_BGLK = F.scaled_dot_product_attention(q_BGLK, k_BGSK, v_BGSK, added, dropout, scale=1.0)
    return out_BGLK.view(B, G, R, T, K).permute(0, 3, 1, 2, 4).reshape(B, T, H, K)


def by_position(bias_HL: Tensor, S: int) -> Tensor:
    """A bias by distance laid out for each query and key, (1, H, T, S), a Toeplitz matrix per head.

    Args:
        bias_HL: of the distances (key minus query position) from -(T-1) to S-1, when both start at the same position.
        S: keys; T follows.
    """
    # Contiguous, as the matrix: with the heads innermost, laying it out takes 40 times as long, and all layers read
    # it for all samples.
    return bias_HL.contiguous().unfold(1, S, 1).flip(1).contiguous().unsqueeze(0)


def _fold_bias(bias: Tensor, G: int, R: int, T: int, S: int) -> Tensor:
    """(B|1, H|1, T|1, S) to (B|1, G|1, R*T|1, S), keeping broadcast axes broadcast where the fold allows it."""
    batch, heads, rows = bias.shape[:3]
    if heads == 1 and rows == 1:
        return bias
    if heads == 1 or rows == 1:
        bias = bias.expand(batch, G * R, T, S)
    return bias.reshape(batch, G, R * T, S)


class GroupedAttention(nn.Module):
    """The four projections of one attention site; `num_kv_heads` = `num_heads` is MHA.

    Q, K and V are separate parameters because Adafactor scales, clips and factors per tensor.
    """

    def __init__(self, d_model: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.q = Linear(d_model, num_heads * head_dim)
        self.k = Linear(d_model, num_kv_heads * head_dim)
        self.v = Linear(d_model, num_kv_heads * head_dim)
        self.o = Linear(num_heads * head_dim, d_model)
        self.dropout = 0.0

    def keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, S, K) of the given states."""
        B, S, _ = x_BSD.shape
        shape = (B, S, self.num_kv_heads, self.head_dim)
        return self.k(x_BSD).view(shape).transpose(1, 2), self.v(x_BSD).view(shape).transpose(1, 2)

    def attend(
        self,
        x_BTD: Tensor,
        k_BGSK: Tensor,
        v_BGSK: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from x (B, T, D) to given keys and values, with what `grouped_attention` adds; returns (B, T, D)."""
        B, T, _ = x_BTD.shape
        q_BTHK = self.q(x_BTD).view(B, T, self.num_heads, self.head_dim)
        out_BTHK = grouped_attention(q_BTHK, k_BGSK, v_BGSK, bias, mask, self.dropout if self.training else 0.0)
        return self.o(out_BTHK.reshape(B, T, self.num_heads * self.head_dim))  # type: ignore[no-any-return]

    def by_kernel(self, x_BTD: Tensor) -> bool:
        """Whether the kernel of `sequence.py` attends, which reads a bias by distance, and a mask apart.

        But for fewer KV heads of all samples than threads, where `grouped_attention` lays the bias out after all.
        """
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_BTD.dtype
        return sequence.serves(dtype, x_BTD.device, self.head_dim)

    def forward(
        self, x_BTD: Tensor, source_BSD: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attend from x (B, T, D) to source (B, S, D), x itself for self-attention; returns (B, T, D)."""
        return self.attend(x_BTD, *self.keys_values(source_BSD), bias, mask)


def cache_attention(q_BGRK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias: Tensor | None, compiled: bool) -> Tensor:
    """A decode step's attention on CPU, (B, G, R, K); SDPA takes four times as long for MHA's one query per head.

    Args:
        q_BGRK: the queries of each group.
        k_BGSK: the keys to attend to.
        v_BGSK: their values.
        bias: added to the scores, broadcastable to (B, G, R, S), or None.
        compiled: by the kernel of `native.py`.
    """
    if compiled:
        return native.attend(q_BGRK, k_BGSK, v_BGSK, bias)
    if q_BGRK.dtype == torch.float32:
        scores_BGRS = q_BGRK @ k_BGSK.transpose(-1, -2)
    else:
        scores_BGRS = (k_BGSK @ q_BGRK.transpose(-1, -2)).transpose(-1, -2)
    if bias is not None:
        scores_BGRS = scores_BGRS + bias
    return scores_BGRS.softmax(dim=-1) @ v_BGSK  # softmax accumulates in float32 whatever the dtype


# As an operation of its own for torch.compile, which would turn the products with MHA's single query into loops that
# read half as fast.
torch.library.custom_op("gqa_exp::cache_attention", cache_attention, mutates_args=()).register_fake(
    lambda q_BGRK, k_BGSK, v_BGSK, bias, compiled: torch.empty_like(q_BGRK, memory_format=torch.contiguous_format)
)


def _gpu_attention(q_BGRK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias: Tensor | None) -> Tensor:
    """A decode step's attention on a GPU: by the kernel of `gpu_attention.py`, or by SDPA what it does not take."""
    if _has_triton(q_BGRK.device):
        from gqa_exp.model import gpu_attention  # not at the top: Triton comes with torch's builds for GPUs alone

        if gpu_attention.serves(q_BGRK.dtype, q_BGRK.shape[3], q_BGRK.shape[2]):
            return gpu_attention.attend(q_BGRK, k_BGSK, v_BGSK, bias)
    if bias is not None:  # a view of the bias by distance may begin anywhere, which SDPA's kernels do not take
        bias = bias.clone(memory_format=torch.contiguous_format)
    return F.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSK, bias, scale=1.0)


@functools.cache
def _has_triton(device: torch.device) -> bool:
    """Whether Triton compiles kernels for this device: from compute capability 8 on, all that compute in bfloat16."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return importlib.util.find_spec("triton") is not None and can_compile("gpu")


class KVCache:
    """Preallocated keys and values of one attention site while decoding, and the attention of a step over them.

    Values lie as (B, G, capacity, K). Keys lie so too where the kernel of `native.py` serves, and otherwise as torch's
    products read them fastest: for float32 on CPU transposed, (B, G, K, capacity). On 2 cores that read 50 GB/s, caches
    of 2048 positions and 64 heads of 64 at batch 8, larger than all processor caches, were read at (GB/s):

        query heads per KV head           1     2     4     8    16    64
        bfloat16, torch                22.4  21.3  19.5  17.1  12.3   4.2
        bfloat16, native               47.3  41.2  40.9  32.2  21.2   6.4
        float32, torch, transposed     33.3  27.9  21.3  16.5  12.5   4.6
        float32, native                45.5  41.3  44.6  37.5  27.5   8.1

    With AVX2 alone and 29 GB/s the kernel reads MHA's caches at 18 to 24, torch's products at 14 to 20.

    Args:
        batch: sequences B.
        num_kv_heads: G.
        capacity: positions.
        head_dim: K.
        like: gives dtype and device.
    """

    def __init__(self, batch: int, num_kv_heads: int, capacity: int, head_dim: int, like: Tensor) -> None:
        rows, columns = (batch, num_kv_heads, capacity, head_dim), (batch, num_kv_heads, head_dim, capacity)
        on_cpu = like.device.type == "cpu"
        self.native = on_cpu and native.serves_attention(like.dtype, head_dim)
        self.keys_transposed = on_cpu and like.dtype == torch.float32 and not self.native
        self.keys = like.new_empty(columns if self.keys_transposed else rows)
        self.v_BGSK = like.new_empty(rows)

    @property
    def k_BGSK(self) -> Tensor:  # noqa: N802
        """The keys as rows, a view."""
        return self.keys.transpose(-1, -2) if self.keys_transposed else self.keys

    def fill(self, k_BGTK: Tensor, v_BGTK: Tensor, start: int = 0) -> None:
        """Store the keys and values of T positions from `start` on."""
        end = start + k_BGTK.shape[2]
        self.k_BGSK[:, :, start:end] = k_BGTK
        self.v_BGSK[:, :, start:end] = v_BGTK

    def put(self, k_BGK: Tensor, v_BGK: Tensor, position: int | Tensor) -> None:
        """Store the keys and values of one position, a number or, for graphs, a tensor of one."""
        if isinstance(position, int):
            self.fill(k_BGK.unsqueeze(2), v_BGK.unsqueeze(2), position)
            return
        axis = 3 if self.keys_transposed else 2
        self.keys.index_copy_(axis, position, k_BGK.unsqueeze(axis))
        self.v_BGSK.index_copy_(2, position, v_BGK.unsqueeze(2))

    def attend(self, q_BGRK: Tensor, end: int, bias: Tensor | None = None) -> Tensor:
        """Attention of one query position per sequence over the first `end` cached positions.

        Args:
            q_BGRK: the queries of each group; its R heads take the place of query positions.
            end: positions to attend to.
            bias: added to the scores, broadcastable to (B, G, R, end).

        Returns:
            (B, G, R, K).
        """
        k_BGSK, v_BGSK = self.k_BGSK[:, :, :end], self.v_BGSK[:, :, :end]
        if q_BGRK.device.type != "cpu":
            return _gpu_attention(q_BGRK, k_BGSK, v_BGSK, bias)
        if torch.compiler.is_compiling():
            return torch.ops.gqa_exp.cache_attention(q_BGRK, k_BGSK, v_BGSK, bias, self.native)  # type: ignore[no-any-return]
        return cache_attention(q_BGRK, k_BGSK, v_BGSK, bias, self.native)

    def keep(self, rows_B: Tensor) -> None:
        """Keep only the sequences of these indices, in their order."""
        self.keys, self.v_BGSK = self.keys[rows_B], self.v_BGSK[rows_B]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values together."""
        return self.keys.nbytes + self.v_BGSK.nbytes


class RelativePositionBias(nn.Module):
    """T5's learned bias per relative distance bucket and query head, shared by the layers of a stack.

    Distances fall into `num_buckets` buckets: the nearer half one per distance, the farther half logarithmic up to
    `max_distance` (Raffel et al. 2020, section 2.1). A bidirectional stack splits the buckets between past and future.
    """

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int, bidirectional: bool) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads))

    def bucket(self, distance: Tensor) -> Tensor:
        """Bucket index of key position minus query position."""
        buckets = self.num_buckets
        offset = torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            offset = (distance > 0).long() * buckets
            magnitude = distance.abs()
        else:
            magnitude = (-distance).clamp(min=0)
        exact = buckets // 2
        # Same order of float32 operations as the T5 code, so that distances on a bucket's edge fall on the same side.
        ratio = torch.log(magnitude.float().clamp(min=1) / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return offset + torch.where(magnitude < exact, magnitude, far)

    def of_distances(self, distance_L: Tensor) -> Tensor:
        """Bias (H, L) of each relative distance (key minus query position)."""
        return self.weight[self.bucket(distance_L)].t()

    def forward(self, T: int, S: int) -> Tensor:
        """Bias (H, T+S-1) by distance, of T queries and S keys that start at the same position."""
        return self.of_distances(torch.arange(-(T - 1), S, device=self.weight.device)).contiguous()
