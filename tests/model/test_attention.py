from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.models.t5.modeling_t5 import T5Attention

from gqa_exp.model import native
from gqa_exp.model.attention import GroupedAttention, KVCache, RelativePositionBias, by_position, grouped_attention


def naive_attention(q_BTHK, k_BGSK, v_BGSK, bias):
    """One sample, one query head and one query at a time."""
    B, T, H, K = q_BTHK.shape
    G, S = k_BGSK.shape[1:3]
    bias = torch.zeros(B, H, T, S) if bias is None else bias.expand(B, H, T, S)
    rows = []
    for b in range(B):
        for t in range(T):
            for h in range(H):
                g = h // (H // G)
                scores = torch.stack([q_BTHK[b, t, h].dot(k_BGSK[b, g, s]) + bias[b, h, t, s] for s in range(S)])
                weights = scores.exp() / scores.exp().sum()
                rows.append(sum(weights[s] * v_BGSK[b, g, s] for s in range(S)))
    return torch.stack(rows).view(B, T, H, K)


@st.composite
def attention_cases(draw):
    B, T, S, G, R, K = (draw(st.integers(1, high)) for high in (2, 3, 4, 3, 3, 4))
    H = G * R
    shape = draw(st.sampled_from([None, (B, 1, 1, S), (1, H, T, S), (B, H, T, S), (B, 1, T, S), (1, H, 1, S)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    bias = None
    if shape is not None:
        bias = normal(*shape)
        if draw(st.booleans()):
            hidden = torch.rand(shape, generator=generator) < 0.5
            hidden[..., 0] = False
            bias = bias.masked_fill(hidden, -1e9)
    return normal(B, T, H, K), normal(B, G, S, K), normal(B, G, S, K), bias


@given(attention_cases())
@settings(max_examples=60, deadline=None)
def test_both_paths_equal_a_loop_over_heads(case):
    q, k, v, bias = case
    expected = naive_attention(q, k, v, bias)
    for fused in (True, False):
        with patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as sdpa:
            out = grouped_attention(q.clone().requires_grad_(not fused), k, v, bias)
        assert sdpa.called == fused
        torch.testing.assert_close(out.detach(), expected, rtol=1e-10, atol=1e-10)


@given(attention_cases())
@settings(max_examples=20, deadline=None)
def test_gradients_equal_those_of_a_loop_over_heads(case):
    given_ = [tensor for tensor in case if tensor is not None]
    gradients = []
    for attention in (grouped_attention, naive_attention):
        leaves = [tensor.clone().requires_grad_() for tensor in given_]
        out = attention(*leaves, *[None] * (4 - len(leaves)))
        weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()
        gradients.append(torch.autograd.grad((out * weights).sum(), leaves))
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_module_projects_each_head(kv_heads):
    torch.manual_seed(0)
    H, K, D = 4, 3, 10
    attention = GroupedAttention(D, H, kv_heads, K).double()
    x, source = torch.randn(2, 3, D, dtype=torch.float64), torch.randn(2, 5, D, dtype=torch.float64)

    def heads(tensor, projection, count):
        return torch.stack([tensor @ projection.weight[h * K : (h + 1) * K].t() for h in range(count)], dim=1)

    q_BTHK = heads(x, attention.q, H).transpose(1, 2)
    k, v = heads(source, attention.k, kv_heads), heads(source, attention.v, kv_heads)
    expected = naive_attention(q_BTHK, k, v, None).flatten(2) @ attention.o.weight.t()
    torch.testing.assert_close(attention(x, source), expected, rtol=1e-10, atol=1e-10)
    assert attention.k.weight.shape == attention.v.weight.shape == (kv_heads * K, D)


def test_attention_dropout_acts_in_training_only():
    torch.manual_seed(0)
    attention = GroupedAttention(8, 4, 2, 3)
    x = torch.randn(2, 5, 8)
    plain = attention.train()(x, x)
    attention.dropout = 0.5
    assert torch.equal(attention.eval()(x, x), plain)
    assert not torch.allclose(attention.train()(x, x), plain)


@pytest.fixture(params=["native", "native without AVX-512", "torch"])
def kernel(request, monkeypatch):
    """Caches served by the compiled kernels, and by torch's products, as on hosts that cannot have them."""
    if request.param == "torch":
        monkeypatch.setattr("gqa_exp.model.native.library", lambda: None)
    elif "without" in request.param:
        request.getfixturevalue("without_avx512")
    elif native.library() is None:
        pytest.skip("no such instructions, or no compiler")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_keeps_what_is_filled_in(kernel, dtype):
    cache = KVCache(5, 2, 7, 32, like=torch.zeros((), dtype=dtype))
    assert cache.native == (kernel != "torch" and (dtype == torch.float32 or native.has_bfloat16()))
    k, v = torch.randn(2, 5, 2, 7, 32, dtype=dtype)
    cache.fill(k[:, :, :4], v[:, :, :4])
    for position in (4, 5, 6):
        cache.put(k[:, :, position], v[:, :, position], torch.tensor([position]))
        assert torch.equal(cache.k_BGSK[:, :, : position + 1], k[:, :, : position + 1])
        assert torch.equal(cache.v_BGSK[:, :, : position + 1], v[:, :, : position + 1])
    assert cache.nbytes == 2 * 5 * 2 * 7 * 32 * dtype.itemsize  # keys and values, B, G, capacity, K
    rows = torch.tensor([3, 0])
    cache.keep(rows)
    assert torch.equal(cache.k_BGSK, k[rows])
    assert torch.equal(cache.v_BGSK, v[rows])


def attention_by_heads(q, k, v, bias):
    """In float64, KV heads repeated for each of their queries."""
    B, G, R, K = q.shape
    k, v = (t.double().repeat_interleave(R, dim=1) for t in (k, v))
    scores = torch.einsum("bhk,bhsk->bhs", q.double().reshape(B, G * R, K), k)
    if bias is not None:
        scores = scores + bias.double().expand(B, G, R, k.shape[2]).reshape(scores.shape)
    return torch.einsum("bhs,bhsk->bhk", scores.softmax(-1), v).reshape(q.shape)


# Scores of up to 4 are rounded to bfloat16 by up to 0.016, and weights change by as much; 0.021 has been seen.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@given(
    sizes=st.tuples(
        st.integers(1, 3), st.integers(1, 3), st.integers(1, 23), st.integers(1, 70), st.sampled_from([8, 32, 64, 128])
    ),
    threads=st.sampled_from([1, 2, 3, 5, 16]),
    seed=st.integers(0, 999),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_step_over_the_cache_is_attention_with_repeated_heads(kernel, dtype, tolerance, sizes, threads, seed, data):
    B, G, R, S, K = sizes
    torch.set_num_threads(threads)  # beyond the KV heads they share a head's queries
    torch.manual_seed(seed)
    cache = KVCache(B, G, S, K, like=torch.zeros((), dtype=dtype))
    end = data.draw(st.integers(1, S))
    k, v = torch.randn(2, B, G, S, K, dtype=dtype)
    cache.fill(k, v)
    packed = torch.randn(B, 2 * G * R * K) / K**0.5  # scores of about 1
    q = packed.to(dtype)[:, : G * R * K].view(B, G, R, K)
    own = torch.randn(G * R, S, dtype=dtype)[:, S - end :].view(G, R, end)
    mask = torch.zeros(B, 1, 1, end, dtype=dtype).masked_fill(torch.rand(B, 1, 1, end) < 0.3, torch.finfo(dtype).min)
    mask[..., 0] = 0
    for bias in (None, own, mask):
        expected = attention_by_heads(q, k[:, :, :end], v[:, :, :end], bias)
        torch.testing.assert_close(cache.attend(q, end, bias).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 64), (8, 20), (64, 1000)])
def test_buckets_equal_those_of_transformers(bidirectional, num_buckets, max_distance):
    ours = RelativePositionBias(2, num_buckets, max_distance, bidirectional)
    distance = torch.arange(-1500, 1501)
    expected = T5Attention._relative_position_bucket(distance, bidirectional, num_buckets, max_distance)
    assert torch.equal(ours.bucket(distance), expected)
    # Bucket num_buckets // 2 of a bidirectional stack stands for 0 steps into the future, which the past's 0 covers.
    unused = {num_buckets // 2} if bidirectional else set()
    assert set(ours.bucket(distance).tolist()) == set(range(num_buckets)) - unused


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (5, 5), (200, 200), (3, 9), (9, 3)])
def test_bias_is_that_of_each_distance(bidirectional, T, S):
    relative = RelativePositionBias(3, 32, 128, bidirectional)
    torch.nn.init.normal_(relative.weight)
    distance_TS = torch.arange(S) - torch.arange(T)[:, None]
    expected = relative.weight[relative.bucket(distance_TS)].permute(2, 0, 1)
    assert torch.equal(by_position(relative(T, S), S), expected[None])
    assert torch.equal(relative.of_distances(distance_TS[0]), expected[:, 0])


def test_half_precision_is_near_full_precision():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 4, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    bias = torch.randn(1, 4, 6, 9)
    exact = grouped_attention(q, k, v, bias)
    for needs_gradient in (False, True):
        halves = [tensor.bfloat16().requires_grad_(needs_gradient) for tensor in (q, k, v)]
        out = grouped_attention(*halves, bias)
        assert out.dtype == torch.bfloat16
        assert (out.float() - exact).abs().max() < 0.1


@pytest.mark.parametrize(("T", "S"), [(3, 7), (7, 3), (5, 5)])
def test_a_bias_by_distance_is_the_same_laid_out_row_by_row(T, S):
    bias_HL = torch.randn(4, T + S - 1)
    laid_out = by_position(bias_HL, S)
    assert laid_out.shape == (1, 4, T, S)
    assert laid_out.is_contiguous()
    for t in range(T):
        for s in range(S):
            assert torch.equal(laid_out[0, :, t, s], bias_HL[:, s - t + T - 1])
    q, k, v = torch.randn(2, T, 4, 8), torch.randn(2, 2, S, 8), torch.randn(2, 2, S, 8)
    assert torch.equal(grouped_attention(q, k, v, bias_HL), grouped_attention(q, k, v, laid_out))
    for wrong in (bias_HL[:, 1:], bias_HL[:, :S], bias_HL[:1], bias_HL.t()):
        with pytest.raises(ValueError, match=f"4 heads and {T + S - 1} distances"):
            grouped_attention(q, k, v, wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_bias_by_distance_is_the_sum_over_its_positions(dtype):
    """By the kernel or, with more threads than KV heads, without it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, *shape).to(dtype) for shape in ((9, 4, 32), (1, 12, 32), (1, 12, 32)))
    bias_HL, threads = torch.randn(4, 20), torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaf = bias_HL.clone().requires_grad_()
            grouped_attention(q / 6, k, v, leaf).float().square().sum().backward()
            found.append(leaf.grad)
    finally:
        torch.set_num_threads(threads)
    exact = by_position(bias_HL, 12).double().requires_grad_()
    grouped_attention(q.double() / 6, k.double(), v.double(), exact).square().sum().backward()
    expected = torch.stack([exact.grad[0].diagonal(n, 1, 2).sum(-1) for n in range(-8, 12)], dim=1)
    for gradient in found:
        assert (gradient - expected).norm() < (1e-5 if dtype == torch.float32 else 0.05) * expected.norm()
