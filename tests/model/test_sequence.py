"""The kernels for whole sequences against formulas in float64, on the same bfloat16 inputs."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gqa_exp.model import T5, T5Config, native, sequence
from gqa_exp.model.attention import grouped_attention
from gqa_exp.model.t5 import activate, additive_mask

pytestmark = pytest.mark.skipif(not native.has_bfloat16(), reason="no AVX-512 with bfloat16, or no compiler")
ROUNDING = 0.02
"""Relative error, in the norm, of a few bfloat16 roundings, 2^-9 each: mostly 3e-3."""


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["vectors", "tiles"])
def instructions(request):
    """Of attention's products; skipped on hosts that cannot have them."""
    if native.use_tiles(request.param == "tiles") != (request.param == "tiles"):
        pytest.skip("no AMX")
    yield
    native.use_tiles(True)


with_either = pytest.mark.usefixtures("instructions")


def laid_out(bias_HL, T, S):
    """A bias by distance for each query and key, (H, T, S)."""
    return bias_HL[:, torch.arange(S) - torch.arange(T)[:, None] + T - 1]


def by_formula(q_BTHK, k_BSGK, v_BSGK, bias_HL, mask, factor_BHTS=1.0):
    """Of weights times a factor, as dropout's is."""
    group = q_BTHK.shape[2] // k_BSGK.shape[2]
    scores = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSGK.repeat_interleave(group, 2))
    bias_HTS = None if bias_HL is None else laid_out(bias_HL, *scores.shape[2:])
    for added in (bias_HTS, mask):
        scores = scores if added is None else scores + added
    return torch.einsum("bhts,bshk->bthk", scores.softmax(-1) * factor_BHTS, v_BSGK.repeat_interleave(group, 2))


def with_gradients(attention, tensors, mask, d_out):
    """The output and the gradients of q, k, v and, if there, the bias."""
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = attention(*leaves, mask)
    out.backward(d_out)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def in_float64(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def assert_near(found, expected, tolerance=ROUNDING):
    for ours, exact in zip(found, expected, strict=True):
        assert ours.shape == exact.shape
        assert (ours.double() - exact).norm() <= tolerance * exact.norm() + 1e-6


@st.composite
def cases(draw):
    B, T, G, R = (draw(st.integers(1, high)) for high in (5, 80, 3, 3))
    return B, T, draw(st.integers(8, 80)), G, R, draw(st.sampled_from(native.HEAD_DIMS))


@with_either
@given(
    cases(),
    st.sampled_from(["none", "float32", "bfloat16"]),
    st.booleans(),
    st.integers(1, 5),
    st.integers(0, 999),
)
@example((3, 33, 31, 1, 3, 32), "float32", True, 4, 0)  # threads that share the batch of a bias's gradient
@example((4, 9, 8, 1, 2, 32), "float32", True, 3, 0)  # and one of them has no share left
@example((2, 32, 64, 2, 1, 64), "float32", False, 1, 0)  # nothing padded
@example((2, 49, 70, 1, 2, 64), "float32", False, 1, 0)  # a last block of a single query
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_attention_and_its_gradients_are_the_formula(case, bias_dtype, padded, threads, seed):
    B, T, S, G, R, K = case
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    H = G * R
    q, d_out = (torch.randn(B, T, H, K).bfloat16() for _ in range(2))
    k, v = (torch.randn(B, S, G, K).bfloat16() for _ in range(2))
    q = q / K**0.5
    bias = None if bias_dtype == "none" else torch.randn(H, T + S - 1, dtype=getattr(torch, bias_dtype))
    lengths = torch.randint(S // 2, S + 1, (B, 1))
    mask = additive_mask((torch.arange(S) < lengths).long(), torch.float32) if padded else None
    tensors = (q, k, v, bias)
    found = with_gradients(sequence.attention, tensors, mask, d_out)
    d_k, d_v = found[2:4]
    expected = with_gradients(by_formula, in_float64(*tensors), *in_float64(mask, d_out))
    assert_near([found.pop(3), found.pop(0)], [expected.pop(3), expected.pop(0)])  # of v, and the output
    # Scores' gradients are differences from their mean, which comes from the rounded output: of a single query over few
    # keys they nearly cancel. The worst of 3000 draws of one query: 0.19 with 8 keys, 0.07 with 16, 0.03 with 32.
    assert_near(found, expected, ROUNDING + 2 / S)
    if padded:  # keys that are not attended to
        for gradient in (d_k, d_v):
            assert (gradient[torch.arange(S) >= lengths] == 0).all()


@with_either
@pytest.mark.parametrize("T", [1, 9, 33])
@pytest.mark.parametrize("offset", [-200.0, 200.0])
def test_what_all_scores_of_a_query_have_in_common_does_not_matter(T, offset):
    """Rows that fill up the last block have no such offset."""
    torch.manual_seed(0)
    q, k, v, d_out = (torch.randn(1, n, 2, 32).bfloat16() / 4 for n in (T, 11, 11, T))
    q[..., 0], k[..., 0] = offset / 8, 8
    tensors = (q, k, v, torch.randn(2, T + 10))
    found = with_gradients(sequence.attention, tensors, None, d_out)
    expected = with_gradients(by_formula, in_float64(*tensors), None, d_out.double())
    expected.pop(2)
    assert found.pop(2).isfinite().all()  # the keys': sums of large numbers that nearly cancel
    assert_near(found, expected)


@with_either
def test_a_bias_without_gradient_and_tensors_in_any_layout():
    torch.manual_seed(0)
    q, k, v, d_out = (torch.randn(2, heads, n, 32).bfloat16() / 3 for heads, n in ((4, 9), (2, 13), (2, 13), (4, 9)))
    q, k, v, d_out = (tensor.transpose(1, 2) for tensor in (q, k, v, d_out))
    assert not q.is_contiguous()
    bias = torch.randn(21, 4).t()
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    sequence.attention(*leaves, bias, None).backward(d_out)
    expected = with_gradients(by_formula, in_float64(q, k, v, bias), None, d_out.double())
    assert_near([leaf.grad for leaf in leaves], expected[1:4])


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_operations_keep_torchs_rules(with_bias):
    """What torch.compile and autograd rely on: strides and types of results as promised, nothing written elsewhere."""
    q, k = torch.randn(2, 5, 4, 32).bfloat16().requires_grad_(), torch.randn(2, 7, 2, 32).bfloat16().requires_grad_()
    bias = torch.randn(1, 11).expand(4, 11).requires_grad_() if with_bias else None
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(sequence._attention, (q, k, k.detach(), bias, torch.zeros(2, 7), None, 0), test_utils=checks)
    x = torch.randn(3, 32).bfloat16().requires_grad_()
    torch.library.opcheck(sequence._gated_gelu, (x, x.detach(), None, 0), test_utils=checks)


@pytest.mark.parametrize("shape", [(4, 27), (4, 29), (3, 28), (1, 28), (28,), (1, 4, 9, 20)])
def test_a_bias_that_has_not_a_number_for_each_head_and_distance_is_refused(shape):
    q, k, v = torch.randn(2, 9, 4, 32).bfloat16(), *torch.randn(2, 2, 20, 2, 32).bfloat16()
    with pytest.raises(ValueError, match="4 heads and 28 distances"):
        sequence.attention(q, k, v, torch.randn(shape), None)


@with_either
def test_a_query_that_may_attend_to_nothing_attends_to_all_alike():
    q, k, v = (
        torch.randn(1, 3, 1, 32).bfloat16(),
        torch.randn(1, 5, 1, 32).bfloat16(),
        torch.randn(1, 5, 1, 32).bfloat16(),
    )
    mask = additive_mask(torch.zeros(1, 5, dtype=torch.long), torch.float32)
    expected = v.double().mean(1, keepdim=True).expand(1, 3, 1, 32)
    assert_near([sequence.attention(q, k, v, None, mask)], [expected])


@with_either
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_shows(value):
    """Training looks for it in the loss."""
    q, k, v = (torch.randn(2, 40, 2, 32).bfloat16().requires_grad_() for _ in range(3))
    with torch.no_grad():
        q[1, 7, 0, 3] = value
    out = sequence.attention(q, k, v, None, None)
    out.float().sum().backward()
    assert out[1, 7, 0].isnan().all()
    assert not out[0].isnan().any()
    assert k.grad[1, :, 0].isnan().all()
    x = torch.tensor([[value] * 16, [1.0] * 16], dtype=torch.bfloat16)
    assert not sequence.gated_gelu(x, torch.ones_like(x))[0].isfinite().any()


@with_either
def test_what_an_earlier_call_left_in_memory_does_not_show():
    torch.set_num_threads(1)
    for T, value in ((32, float("nan")), (9, 0.0)):
        q, k, v = (torch.randn(1, n, 2, 32).bfloat16().requires_grad_() for n in (T, 40, 40))
        with torch.no_grad():
            q[0, -1] = value
        sequence.attention(q, k, v, None, None).float().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (q, k, v))


def test_no_memory_is_said_and_not_fatal():
    tensors = [torch.zeros(1, 1, 1, 32, dtype=torch.bfloat16)] * 3
    pointers = (ctypes.c_void_p * 8)(*(t.data_ptr() for t in tensors))
    assert native.library().forward_32_float32(pointers, (ctypes.c_long * 7)(1, 1, 1 << 50, 1, 1, 0, 1)) == 1
    assert_near([sequence.attention(*tensors, None, None)], [torch.zeros(1, 1, 1, 32)])


@given(st.integers(1, 5), st.integers(1, 9), st.floats(0.01, 30), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_gated_gelu_and_its_gradients_are_the_formula(rows, vectors, scale, seed):
    torch.manual_seed(seed)
    x, y, d_out = (torch.randn(rows, 16 * vectors).bfloat16() for _ in range(3))
    x = x * scale
    found = [leaf.requires_grad_() for leaf in (x.clone(), y.clone())]
    out = sequence.gated_gelu(*found)
    out.backward(d_out)
    exact = [leaf.double().requires_grad_() for leaf in (x, y)]
    expected = F.gelu(exact[0], approximate="tanh") * exact[1]
    expected.backward(d_out.double())
    for ours, reference in zip([out, *(f.grad for f in found)], [expected, *(e.grad for e in exact)], strict=True):
        # one rounding of the result, and float32's of what nearly cancels
        torch.testing.assert_close(ours.double(), reference, rtol=2**-8, atol=1e-5 * scale)


def test_gated_gelu_far_from_zero_is_a_step():
    x = torch.tensor([-1e12, 1e12] * 8).bfloat16().requires_grad_()
    out = sequence.gated_gelu(x, torch.ones_like(x))
    out.sum().backward()
    assert torch.equal(out, x.clamp(min=0))
    assert torch.equal(x.grad, (x > 0).to(x.dtype))


def test_what_the_kernels_serve(monkeypatch):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 9, 4, 32).bfloat16(), *torch.randn(2, 2, 2, 9, 32).bfloat16()
    bias, mask = torch.randn(4, 17), additive_mask(torch.ones(2, 9), torch.float32)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    assert sequence.serves_attention(q, keys, values, bias, mask)
    assert sequence.serves_attention(q, keys, values, None, None)
    others = [
        (q.float(), keys.float(), values.float(), bias, mask),
        (q, keys, values.float(), bias, mask),
        (q[..., :16], keys[..., :16], values[..., :16], bias, mask),
        (q, keys, values[:, 1:], None, None),
        (q[:, :, 1:], keys, values, None, None),  # 3 query heads for 2 KV heads
        (q, keys, values, bias.double(), mask),
        (q, keys, values, laid_out(bias, 9, 9).unsqueeze(0), None),
        (q, keys, values, None, mask.expand(2, 1, 9, 9)),
        (q, keys, values, None, mask.clone().requires_grad_()),
    ]
    assert not any(sequence.serves_attention(*other) for other in others)
    torch.set_num_threads(5)  # for 4 KV heads
    assert not sequence.serves_attention(q, keys, values, None, None)
    torch.set_num_threads(2)
    assert sequence.serves_gated_gelu(q, q)
    assert not sequence.serves_gated_gelu(q.float(), q.float())
    assert not sequence.serves_gated_gelu(q, q.float())
    assert not sequence.serves_gated_gelu(q, q[:1])
    assert not sequence.serves_gated_gelu(q[..., :8], q[..., :8])
    ours = grouped_attention(q, k, v, bias, mask)
    monkeypatch.setattr(native, "library", lambda: None)
    assert not sequence.serves_attention(q, keys, values, bias, mask)
    assert not sequence.serves_gated_gelu(q, q)
    torch.testing.assert_close(grouped_attention(q, k, v, bias, mask), ours, rtol=0.02, atol=0.02)


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (3, 21))
    attention_mask = (torch.arange(21) < torch.tensor([[21], [9], [14]])).long()
    return ids * attention_mask, torch.randint(3, 60, (3, 13)), attention_mask


def gradients_of(model, batch, dtype):
    input_ids, labels, attention_mask = batch
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        logits = model(input_ids, model.shift_right(labels), attention_mask)
        F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_the_model_uses_them(calls, batch):
    model = T5(T5Config(64, 64, 96, 4, 32, 2, 1, 2)).train()
    gradients_of(model, batch, torch.bfloat16)
    assert sorted(calls) == sorted(
        [*["forward_32_float32", "backward_32_float32"] * 4, *["gated_gelu", "gated_gelu_backward"] * 3]
    )
    model.set_checkpointing(True)
    calls.clear()
    gradients_of(model, batch, torch.bfloat16)
    assert calls.count("forward_32_float32") == 2 * calls.count("backward_32_float32") == 8
    calls.clear()
    with torch.inference_mode():
        model.eval().bfloat16().encode(batch[0], batch[2])
    assert sorted(calls) == ["forward_32_bfloat16"] * 2 + ["gated_gelu"] * 2
    calls.clear()
    model.float().train().set_dropout(0.1)
    gradients_of(model, batch, torch.bfloat16)
    assert {*calls} == {
        *("forward_32_float32", "backward_32_float32", "gated_gelu", "gated_gelu_backward"),
        *("dropout_float32", "dropout_bfloat16"),
    }


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [False, True])
def test_only_where_the_kernel_reads_them_masks_stay_apart_and_biases_by_distance(dropout, autocast, batch):
    model = T5(T5Config(64, 64, 96, 4, 32, 2, 1, 2)).train()
    model.set_dropout(dropout)
    seen = []
    for stack in (model.encoder, model.decoder):
        stack.layers[0].register_forward_hook(lambda _, inputs, __: seen.append((inputs[1].shape, inputs[-1] is None)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(batch[0], batch[1], batch[2])
    encoder, decoder = ((4, 41), (4, 25)) if autocast else ((3, 4, 21, 21), (1, 4, 13, 13))
    assert seen == [(encoder, not autocast), (decoder, False)]


@pytest.mark.parametrize(("num_kv_heads", "compiled"), [(4, False), (2, False), (1, False), (2, True)])
def test_training_in_bfloat16_follows_float32(num_kv_heads, compiled, batch):
    """Padded samples, every parameter: the gradients point where those of float32, without any kernel, point."""
    torch.manual_seed(0)
    model = T5(T5Config(64, 64, 96, 4, 32, 2, 2, num_kv_heads)).train()
    exact = gradients_of(model, batch, torch.float32)
    if compiled:
        model.compile_layers()
    for name, gradient in gradients_of(model, batch, torch.bfloat16).items():
        assert F.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0) > 0.995, name
        assert 0.9 < gradient.norm() / exact[name].norm() < 1.1, name


def test_activate_is_the_same_with_and_without_the_kernel(monkeypatch):
    x, y = torch.randn(2, 5, 32).bfloat16()
    ours = activate("gated-gelu", x, y)
    monkeypatch.setattr(native, "library", lambda: None)
    torch.testing.assert_close(activate("gated-gelu", x, y), ours, rtol=0.02, atol=0.01)
    assert torch.equal(activate("gated-silu", x, y), F.silu(x) * y)
