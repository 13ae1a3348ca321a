"""A decode step's attention on a GPU: each KV head's cache read once, by as many blocks as keep the GPU busy.

All R query heads of a group are one tile of queries, so a cached key or value is read once for all of them. With few KV
heads there are fewer (sample, head) pairs than multiprocessors: then the positions are divided between blocks, whose
partial results, each with the maximum and the sum of its softmax, a second kernel joins (Flash-Decoding, Dao et al.
2023; softmax in one pass, Milakov and Gimelshein 2018). torch's SDPA does that only where there is no bias. On an H200,
whose memory a plain sum reads at 4,460 GB/s, for heads of 64 in bfloat16 and caches that the L2 cache does not hold, in
microseconds (GB/s); before queries were read in place:

                                               SDPA          here
    MHA (64 heads)   batch 32, 2048 keys   237 (4537)    238 (4514)
    GQA-8                                   45 (3019)     38 (3493)
    MQA                                     23  (727)     11 (1494)
    MHA              batch 8                64 (4182)     64 (4170)
    GQA-8                                   24 (1417)     14 (2402)
    MQA                                     23  (187)      7  (622)
    MHA, with bias   batch 32, 256 keys     95 (1411)     40 (3383)
    MQA, with bias                          20  (106)      8  (260)

The two with a bias take 66 and 13 microseconds written out as products and softmax.

Shape suffixes: B batch, G KV heads, R query heads per KV head, S keys, K head_dim.
"""

import functools
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_GROUP = 128
"""Query heads per KV head that one block holds; half as many in float32."""
BLOCKS_PER_MULTIPROCESSOR = 2
"""That positions are divided for."""
MOST_PARTS = 64
TILE, LONG_TILE = 64, 128
"""Positions that a block reads at a time; the longer one where nothing is divided and blocks are many."""
MOST_BYTES = 256
"""Of a head's key. Long tiles take keys of half as many, and none in float32. So all tiles fit into 99 KiB, the least
shared memory of GPUs that this serves, as of compute capability 8.6: compiled for it by Triton 3.9, none takes more."""


def serves(dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Whether the kernel takes heads of this size, and so many query heads per KV head."""
    fits = head_dim in (16, 32, 64, 128) and head_dim * dtype.itemsize <= MOST_BYTES
    largest = LARGEST_GROUP if dtype.itemsize < 4 else LARGEST_GROUP // 2
    return fits and dtype in (torch.float32, torch.bfloat16, torch.float16) and group <= largest


def attend(q_BGRK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of one query position per sequence, without the 1/sqrt(K) scale: (B, G, R, K).

    Args:
        q_BGRK: the queries of each group, contiguous but for the step between sequences.
        k_BGSK: keys; the last axis must be contiguous.
        v_BGSK: values, likewise.
        bias: added to the scores, broadcastable to (B, G, R, S), finite; or None.
    """
    B, G, R, K = q_BGRK.shape
    S = k_BGSK.shape[2]
    out_BGRK = q_BGRK.new_empty(q_BGRK.shape)
    pairs, multiprocessors = B * G, _multiprocessors(q_BGRK.device)
    parts = min(-(-BLOCKS_PER_MULTIPROCESSOR * multiprocessors // pairs), -(-S // (2 * TILE)), MOST_PARTS)
    length = -(-S // (parts * TILE)) * TILE  # of a part, whole tiles
    parts = -(-S // length)
    many = parts == 1 and S >= 1024 and pairs >= 8 * multiprocessors
    tile = LONG_TILE if many and q_BGRK.element_size() < 4 and 2 * K * q_BGRK.element_size() <= MOST_BYTES else TILE
    sums, ends = out_BGRK, out_BGRK  # not written where nothing is divided
    if parts > 1:
        sums = torch.empty(pairs * parts * R, K, dtype=torch.float32, device=q_BGRK.device)
        ends = torch.empty(pairs * parts * R, 2, dtype=torch.float32, device=q_BGRK.device)
    added = q_BGRK if bias is None else bias.expand(B, G, R, S)
    rows = max(16, triton.next_power_of_2(R))  # a tile of a product has 16 rows at least
    # Triton starts kernels on the current device; interpreted, it takes tensors of a CPU.
    with torch.cuda.device(q_BGRK.device) if q_BGRK.is_cuda else nullcontext():
        _part[(pairs, parts)](
            q_BGRK, k_BGSK, v_BGSK, added, sums, ends, out_BGRK, S, length, G, R,
            q_BGRK.stride(0), *k_BGSK.stride()[:3], *v_BGSK.stride()[:3], *added.stride(),
            HAS_BIAS=bias is not None, WHOLE=parts == 1, ROWS=rows, K=K, TILE=tile, num_warps=4,
        )  # fmt: skip
        if parts > 1:
            most = triton.next_power_of_2(parts)
            warps = max(1, most * K // 2048)
            _join[(pairs, R)](sums, ends, out_BGRK, R, parts, PARTS=most, K=K, num_warps=warps)
    return out_BGRK


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["S", "length"])  # type: ignore[untyped-decorator]
def _part(  # type: ignore[no-untyped-def]
    q, k, v, bias, sums, ends, out, S, length, G, R,
    q_b, k_b, k_g, k_s, v_b, v_g, v_s, bias_b, bias_g, bias_r, bias_s,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One part of the positions of one (sample, KV head): their weighted values; divided, with maximum and sum."""
    pair, part = tl.program_id(0), tl.program_id(1)
    b, g = (pair // G).to(tl.int64), pair % G
    row, column = tl.arange(0, ROWS), tl.arange(0, K)
    real = row < R
    q += b * q_b + g * R * K
    q_tile = tl.load(q + row[:, None] * K + column[None, :], mask=real[:, None], other=0.0)
    k += b * k_b + g * k_g
    v += b * v_b + g * v_g
    bias += b * bias_b + g * bias_g
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS, K), tl.float32)
    start = part * length
    stop = tl.minimum(start + length, S)
    for first in range(start, stop, TILE):
        at = first + tl.arange(0, TILE)
        there = at < stop
        k_tile = tl.load(k + at[:, None] * k_s + column[None, :], mask=there[:, None], other=0.0)
        v_tile = tl.load(v + at[:, None] * v_s + column[None, :], mask=there[:, None], other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if HAS_BIAS:
            where = bias + row[:, None] * bias_r + at[None, :] * bias_s
            scores += tl.load(where, mask=real[:, None] & there[None, :], other=0.0).to(tl.float32)
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        weighted = weighted * shrink[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        highest = higher
    if WHOLE:
        result = (weighted / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + (pair * R + row[:, None]) * K + column[None, :], result, mask=real[:, None])
    else:
        line = (pair * tl.num_programs(1) + part) * R + row
        tl.store(sums + line[:, None] * K + column[None, :], weighted, mask=real[:, None])
        tl.store(ends + line * 2, highest, mask=real)
        tl.store(ends + line * 2 + 1, total, mask=real)


@triton.jit(do_not_specialize=["parts"])  # type: ignore[untyped-decorator]
def _join(sums, ends, out, R, parts, PARTS: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """One query head's result from those of the parts."""
    pair, r = tl.program_id(0), tl.program_id(1)
    part, column = tl.arange(0, PARTS), tl.arange(0, K)
    there = part < parts
    line = (pair * parts + part) * R + r
    highest = tl.load(ends + line * 2, mask=there, other=float("-inf"))
    total = tl.load(ends + line * 2 + 1, mask=there, other=0.0)
    weight = tl.exp(highest - tl.max(highest, 0))
    weighted = tl.load(sums + line[:, None] * K + column[None, :], mask=there[:, None], other=0.0)
    result = tl.sum(weighted * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + (pair * R + r) * K + column, result.to(out.dtype.element_ty))
