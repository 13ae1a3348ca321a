import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_exp.host import can_compile
from gqa_exp.training.loss import summed_nll, token_loss


@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(2, 9),
    st.sampled_from([0.0, 1e-4, 0.3]),
    st.integers(0, 1),
    st.integers(0, 999),
)
@settings(deadline=None, max_examples=50)
def test_is_cross_entropy_plus_the_mean_squared_log_normaliser(B, T, V, z_loss, pad_id, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(B, T, V, generator=generator, dtype=torch.float64) + 1
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, 0] = 1 - pad_id  # at least one token counts
    counted = [(b, t) for b in range(B) for t in range(T) if labels[b, t] != pad_id]
    nlls = [-math.log(float(logits[b, t].softmax(-1)[labels[b, t]])) for b, t in counted]
    log_zs = [math.log(sum(math.exp(x) for x in logits[b, t].tolist())) for b, t in counted]
    mean_nll = sum(nlls) / len(counted)
    loss, nll = token_loss(logits, labels, z_loss, pad_id)
    assert float(nll) == pytest.approx(mean_nll, rel=1e-4, abs=1e-6)
    squared = z_loss * sum(z * z for z in log_zs) / len(counted)
    assert float(loss) == pytest.approx(mean_nll + squared, rel=1e-4, abs=1e-6)
    total, tokens = summed_nll(logits, labels, pad_id)
    assert tokens == len(counted)
    assert total == pytest.approx(sum(nlls), rel=1e-4, abs=1e-5)


def test_gradient_is_that_of_cross_entropy_and_of_the_penalty():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[0] = 0
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    token_loss(leaves[0], labels, 0.1)[0].backward()
    penalty = leaves[1].logsumexp(-1)[labels != 0].square().mean()
    (F.cross_entropy(leaves[1].flatten(0, 1), labels.flatten(), ignore_index=0) + 0.1 * penalty).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_padding_does_not_count():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 6), torch.tensor([[2, 3, 0, 0], [4, 0, 0, 0]])
    changed = torch.where((labels == 0)[..., None], 100 * torch.randn(2, 4, 6), logits).requires_grad_()
    for ours, theirs in zip(token_loss(logits, labels, 0.1), token_loss(changed, labels, 0.1), strict=True):
        assert torch.equal(ours.detach(), theirs.detach())
    token_loss(changed, labels, 0.1)[0].backward()
    assert (changed.grad.abs().sum(-1) > 0).tolist() == (labels != 0).tolist()


def test_all_padding_gives_zero_and_a_finite_gradient():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss, nll = token_loss(logits, torch.zeros(2, 3, dtype=torch.long), 0.1)
    loss.backward()
    assert float(loss.detach()) == float(nll) == 0.0
    assert not logits.grad.any()


def test_computes_in_float32():
    torch.manual_seed(0)
    logits, labels = 10 * torch.randn(4, 8, 300), torch.randint(1, 300, (4, 8))
    halved = logits.bfloat16().requires_grad_()
    loss, nll = token_loss(halved, labels, 1e-4)
    assert loss.dtype == nll.dtype == torch.float32
    exact = token_loss(halved.detach().float(), labels, 1e-4)
    assert (float(loss.detach()), float(nll)) == (float(exact[0]), float(exact[1]))
    assert not nll.requires_grad


@pytest.mark.skipif(not can_compile("cpu"), reason="no compiler")
def test_compiled_it_is_the_same_for_batches_of_any_shape():
    compiled = torch.compile(token_loss)
    for B, T, padded in ((2, 5, 1), (3, 4, 0), (1, 7, 3), (2, 5, 5)):  # in the last, all is padding
        logits = (3 * torch.randn(B, T, 40)).bfloat16().requires_grad_()
        labels = torch.randint(1, 40, (B, T))
        labels[:, T - padded :] = 0
        results = [function(logits, labels, 1e-2) for function in (compiled, token_loss)]
        gradients = [torch.autograd.grad(loss, logits)[0] for loss, _ in results]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-5)  # a last digit of bfloat16


def test_padding_need_not_be_an_id_and_any_other_label_has_to_be_one():
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 3, 6), torch.tensor([[2, 0, 5]])
    expected = F.cross_entropy(logits[0, [0, 2]], labels[0, [0, 2]])
    for pad_id in (0, -100):
        padded = torch.where(labels == 0, pad_id, labels)
        assert float(token_loss(logits, padded, 0.0, pad_id)[1]) == pytest.approx(float(expected))
    with pytest.raises(IndexError):
        token_loss(logits, torch.tensor([[2, -100, 5]]), 0.0)
