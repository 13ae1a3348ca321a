"""Dropout by the kernels: what is kept against a generator written out, the rest against formulas in float64."""

import ctypes

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy import stats
from test_sequence import assert_near, by_formula, in_float64, instructions, with_either, with_gradients

from gqa_exp.model import T5, T5Config, native, sequence
from gqa_exp.model.attention import grouped_attention
from gqa_exp.model.sequence import NUMBERS
from gqa_exp.model.t5 import additive_mask

__all__ = ["instructions"]  # a fixture
pytestmark = pytest.mark.skipif(not native.has_bfloat16(), reason="no AVX-512 with bfloat16, or no compiler")
LOW = np.uint64(0xFFFFFFFF)


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011), for any number of counters, four words each, and a key of two."""
    c, (k0, k1) = [np.asarray(word, dtype=np.uint64) for word in counter], key
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high = [(product >> np.uint64(32)) for product in (first, second)]
        c = [high[1] ^ c[1] ^ np.uint64(k0), second & LOW, high[0] ^ c[3] ^ np.uint64(k1), first & LOW]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_generator_written_out_here_gives_its_published_numbers(counter, key, expected):
    """The known answers that come with its authors' library, Random123."""
    assert tuple(int(word) for word in philox(counter, key)) == expected


def kept_by_formula(seed, dropped, count):
    """Which of so many elements, a multiple of 64, are kept."""
    counters = np.arange(count // 64 * 8, dtype=np.uint64)
    words = philox((counters & LOW, counters >> np.uint64(32), 0 * counters, 0 * counters), (seed % 2**32, seed >> 32))
    halves = np.stack([part for word in words for part in (word & np.uint64(0xFFFF), word >> np.uint64(16))], axis=1)
    blocks = halves.reshape(-1, 8, 2, 4).transpose(0, 2, 1, 3)  # two of four words come first, of all eight counters
    return torch.from_numpy(blocks.reshape(-1) >= dropped)


seeds = st.integers(0, (1 << 62) - 1)
numbers = st.integers(1, NUMBERS - 1)


@given(st.integers(1, 700), seeds, numbers, st.sampled_from([torch.float32, torch.bfloat16]))
@example(64, (1 << 62) - 1, NUMBERS - 1, torch.float32)
@example(100_000, 1 << 32, 6554, torch.bfloat16)
@settings(max_examples=60, deadline=None)
def test_what_dropout_keeps_and_how_it_scales(count, seed, dropped, dtype):
    x = torch.randn(count, dtype=dtype)
    kept = kept_by_formula(seed, dropped, (count + 63) // 64 * 64)[:count]
    scale = torch.tensor(NUMBERS / (NUMBERS - dropped))
    expected = torch.where(kept, (x.float() * scale).to(dtype), 0)
    assert torch.equal(sequence._dropout(x, torch.tensor([seed]), dropped), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_dropped_where_the_element_is(dtype):
    x = torch.randn(3, 5, 7, dtype=dtype).transpose(0, 2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = sequence.dropout(x, 0.5)
    assert out.dtype == dtype
    d_out = torch.randn_like(out)
    out.backward(d_out)
    kept = out != 0
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(x.grad, torch.where(kept, 2 * d_out, 0))


def test_elements_are_dropped_alike_often_and_each_by_itself():
    """By a binomial distribution: all in all, by place within 64, and of neighbours both."""
    torch.manual_seed(0)
    kept = sequence.dropout(torch.ones(1 << 20).bfloat16(), 0.1) > 0
    dropped = (~kept).view(-1, 64).long()
    share = round(0.1 * NUMBERS) / NUMBERS

    def fits(found, trials, probability):
        return stats.binomtest(int(found), trials, probability).pvalue > 1e-4

    assert fits(dropped.sum(), dropped.numel(), share)
    assert all(fits(column.sum(), len(column), share) for column in dropped.t())
    for distance in (1, 2, 4, 16, 32, 64, 4096):
        flat = dropped.flatten()
        assert fits((flat[:-distance] & flat[distance:]).sum(), len(flat) - distance, share**2)


def test_seeds_come_from_torchs_generator():
    x = torch.ones(640).bfloat16()
    torch.manual_seed(1)
    first, second = (sequence.dropout(x, 0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(sequence.dropout(x, 0.5), first)
    assert not torch.equal(first, second)


def test_what_the_kernel_serves(monkeypatch):
    x = torch.randn(3, 5)
    assert sequence.serves_dropout(x.bfloat16())
    assert not any(sequence.serves_dropout(other) for other in (x, x.half(), x.double(), x.bfloat16().to("meta")))
    with torch.autocast("cpu", torch.bfloat16):
        assert sequence.serves_dropout(x)
        assert not sequence.serves_dropout(x.double())
    with torch.autocast("cpu", torch.float16):
        assert not sequence.serves_dropout(x)
    torch.manual_seed(0)
    ours = sequence.dropout(x, 0.3)
    torch.manual_seed(0)
    assert torch.equal(ours, F.dropout(x, 0.3))
    assert sequence.dropout(x, 0.0) is x
    monkeypatch.setattr(native, "library", lambda: None)
    assert not sequence.serves_dropout(x.bfloat16())


@pytest.mark.parametrize("probability", [1e-6, 0.9, 1 - 1e-6])
def test_the_ends_of_the_range(probability):
    out = sequence.dropout(torch.ones(6400).bfloat16(), probability)
    assert out.isfinite().all()
    assert abs((out == 0).float().mean() - probability) < 0.02


@pytest.mark.parametrize("probability", [-0.1, 1.0, 1.5, float("nan")])
def test_what_is_no_probability_is_refused(probability):
    with pytest.raises(ValueError, match="must be 0 or more, and below 1"):
        sequence.dropout(torch.ones(64).bfloat16(), probability)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_shows_though_it_is_dropped(value):
    """As with torch's, which multiplies by zero: training looks for it in the loss."""
    x = torch.full((640,), value).bfloat16()
    assert not sequence.dropout(x, 0.5).isfinite().any()
    assert not sequence.gated_gelu(x, torch.ones_like(x), 0.5).isfinite().any()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_seeds_are_drawn_where_the_kernel_reads_them(device):
    x = torch.ones(640).bfloat16()
    with torch.device(device):
        assert 0 < sequence.dropout(x, 0.5).count_nonzero() < 640


def test_attention_written_out_drops_by_the_kernel_too(calls):
    torch.set_num_threads(3)  # more than there are KV heads, which the kernel for attention does not serve
    q, k, v = torch.randn(1, 9, 4, 32).bfloat16().requires_grad_(), *torch.randn(2, 1, 1, 9, 32).bfloat16()
    grouped_attention(q, k, v, dropout=0.1)
    assert calls == ["dropout_bfloat16"]


@given(st.integers(1, 5), st.integers(1, 9), seeds, numbers)
@settings(max_examples=30, deadline=None)
def test_gated_gelu_with_dropout_and_its_gradients_are_the_formula(rows, vectors, seed, dropped):
    torch.manual_seed(0)
    count = 16 * rows * vectors
    x, y, d_out = (torch.randn(rows, 16 * vectors).bfloat16() for _ in range(3))
    factor = kept_by_formula(seed, dropped, (count + 63) // 64 * 64)[:count].view(rows, -1).double()
    factor *= NUMBERS / (NUMBERS - dropped)

    def by_gelu(x, y):
        return F.gelu(x, approximate="tanh") * y * factor

    def ours(x, y):
        return sequence._gated_gelu(x, y, torch.tensor([seed]), dropped)

    found, expected = [], []
    for results, function, given_ in ((found, ours, (x, y, d_out)), (expected, by_gelu, in_float64(x, y, d_out))):
        leaves = [tensor.clone().requires_grad_() for tensor in given_[:2]]
        out = function(*leaves)
        out.backward(given_[2])
        results += [out, *(leaf.grad for leaf in leaves)]
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=2**-7, atol=1e-5 * float(factor.max()))
        assert not mine[factor == 0].any()


@with_either
@given(
    st.tuples(*(st.integers(1, high) for high in (4, 70)), st.integers(8, 200), *(st.integers(1, 3),) * 2),
    st.sampled_from(native.HEAD_DIMS),
    st.integers(1, NUMBERS // 2),
    st.sampled_from([None, torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(1, 3),
    seeds,
)
@example((2, 33, 65, 2, 2), 32, 6554, torch.float32, True, 2, 1)  # a block of 64 keys of which there is one
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_attention_with_dropout_and_its_gradients_are_the_formula(case, K, dropped, bias, padded, threads, seed):
    B, T, S, G, R = case
    torch.set_num_threads(threads)
    torch.manual_seed(seed % 1000)
    H, line = G * R, (S + 63) // 64 * 64
    q, d_out = (torch.randn(B, T, H, K).bfloat16() for _ in range(2))
    k, v = (torch.randn(B, S, G, K).bfloat16() for _ in range(2))
    q = q / K**0.5
    kept = kept_by_formula(seed, dropped, B * H * T * line).view(B, H, T, line)[..., :S]
    factor = kept.double() * NUMBERS / (NUMBERS - dropped)

    def ours(q, k, v, bias, mask):
        return sequence._attention(q, k, v, bias, mask, torch.tensor([seed]), dropped)[0]

    def formula(q, k, v, bias, mask):
        return by_formula(q, k, v, bias, mask, factor)

    there = torch.arange(S) < torch.randint(S // 2, S + 1, (B, 1))
    mask_BS = additive_mask(there.long(), torch.float32)[:, 0, 0] if padded else None
    tensors = (q, k, v, None if bias is None else torch.randn(H, T + S - 1, dtype=bias))
    found = with_gradients(ours, tensors, mask_BS, d_out)
    mask = None if mask_BS is None else mask_BS[:, None, None].double()
    expected = with_gradients(formula, in_float64(*tensors), mask, d_out.double())
    d_k, d_v = found[2:4]
    assert_near([found.pop(3), found.pop(0)], [expected.pop(3), expected.pop(0)])
    # As without dropout, gradients of scores nearly cancel where a query has few keys, here those that it keeps.
    assert_near(found, expected, 0.02 + 4 / S)
    if padded:
        assert not any(gradient[~there].any() for gradient in (d_k, d_v))


def model_and_batch():
    torch.manual_seed(0)
    model = T5(T5Config(64, 64, 96, 4, 32, 2, 2, 2)).train()
    model.set_dropout(0.1)
    return model, torch.randint(3, 60, (3, 21)), torch.randint(3, 60, (3, 13))


def logits_of(model, *ids):
    with torch.autocast("cpu", torch.bfloat16):
        return model(*ids)


@pytest.fixture
def drawn(monkeypatch):
    """The seed and what is dropped of 65536 at each call of a kernel, in order."""
    found, kernel = [], sequence._kernel

    def spy(name):
        def call(*arguments):
            if name.startswith(("forward", "backward")):
                pointer, dropped = arguments[0][5], arguments[1][5]
            else:
                pointer, dropped = arguments[0] and arguments[0].value, arguments[1].value
            found.append((pointer and ctypes.c_int64.from_address(pointer).value, dropped))
            return kernel(name)(*arguments)

        return kernel(name) if name.startswith("linear") else call

    monkeypatch.setattr(sequence, "_kernel", spy)
    return found


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_drops_anew_at_each_site_and_step_and_the_same_from_the_same_seed(compiled, drawn):
    model, *ids = model_and_batch()
    if compiled:
        model.compile_layers()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.clear()
        logits = logits_of(model, *ids)
        forward = [seed for seed, _ in drawn]
        # of a layer's attention and feed-forward: weights, residual; of the stacks' ends
        assert len(set(forward)) == len(forward) == 2 * 4 + 2 * 6 + 2 * 2
        logits.float().square().mean().backward()
        assert {seed for seed, _ in drawn[len(forward) :]} == set(forward)
        assert {dropped for _, dropped in drawn} == {6554}
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        results.append((forward, [logits.detach(), *gradients]))
    (first, ours), (again, same), (other, others) = results
    assert first == again
    assert not set(first) & set(other)
    assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))
    assert not torch.equal(ours[0], others[0])


def test_compiled_layers_follow_when_dropout_changes_and_stay_one_graph(drawn):
    """As from uptraining to fine-tuning, where torch.compile makes of the probability a variable."""
    model, *_ = model_and_batch()
    x, bias = torch.randn(2, 9, 64, requires_grad=True), torch.zeros(4, 17)
    encoder, decoder = (torch.compile(stack.layers[0], fullgraph=True) for stack in (model.encoder, model.decoder))
    for probability in (0.0, 0.1, 0.2, 0.1, 0.0):
        model.set_dropout(probability)
        drawn.clear()
        with torch.autocast("cpu", torch.bfloat16):
            encoded = encoder(x, bias, None)
            (encoded.sum() + decoder(x, bias, encoded, None).sum()).backward()
        assert {dropped for _, dropped in drawn} == {round(probability * NUMBERS)}
        assert len(drawn) == (20 if probability else 10)


def test_on_average_dropout_changes_little():
    """The scale makes up for what is dropped: logits average to those without dropout, nearly."""
    model, *ids = model_and_batch()
    with torch.no_grad():
        dropped = torch.stack([logits_of(model, *ids).float() for _ in range(60)])
        model.set_dropout(0.0)
        plain = logits_of(model, *ids).float()
    deviation = dropped.std(0).mean()
    assert (dropped.mean(0) - plain).abs().mean() < 0.5 * deviation


def test_kernels_drop_as_often_as_torch_does(monkeypatch):
    model, *ids = model_and_batch()
    spread = {}
    for name, library in (("ours", native.library()), ("torch", None)):
        monkeypatch.setattr(native, "library", lambda found=library: found)
        with torch.no_grad():
            logits = torch.stack([logits_of(model, *ids).float() for _ in range(100)])
        spread[name] = (logits - logits.mean(0)).square().mean().sqrt()
    assert spread["ours"] == pytest.approx(float(spread["torch"]), rel=0.05)


def test_the_operations_keep_torchs_rules():
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    seed = torch.tensor([5])
    x = torch.randn(3, 32).bfloat16().requires_grad_()
    q, k = torch.randn(2, 5, 4, 32).bfloat16().requires_grad_(), torch.randn(2, 7, 2, 32).bfloat16().requires_grad_()
    torch.library.opcheck(sequence._dropout, (x, seed, 6554), test_utils=checks)
    torch.library.opcheck(sequence._gated_gelu, (x, x.detach(), seed, 6554), test_utils=checks)
    torch.library.opcheck(sequence._attention, (q, k, k.detach(), None, None, seed, 6554), test_utils=checks)
