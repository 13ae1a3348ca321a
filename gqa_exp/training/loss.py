"""The training loss: cross-entropy per target token plus T5's z-loss."""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_loss(logits_BTV: Tensor, labels_BT: Tensor, z_loss: float, pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Mean loss over the target tokens that are not padding, in nats.

    Args:
        logits_BTV: any floating dtype; computed in float32.
        labels_BT: target ids.
        z_loss: weight of log(Z)^2, which keeps the softmax normaliser Z near 1 (T5: 1e-4).
        pad_id: labels that do not count.

    Returns:
        (cross-entropy + z-loss, to train on; cross-entropy alone, detached, to report). Zero when all is padding.
    """
    logits_NV, labels_N = logits_BTV.flatten(0, 1).float(), labels_BT.flatten()
    counted_N = labels_N != pad_id
    tokens = counted_N.sum().clamp(min=1)
    # Both terms from log Z: with F.cross_entropy the compiled backward pass goes over the vocabulary once more. And the
    # labels' logits by nll_loss, which negates them: compiled, the gradient of gather would be a scatter into zeros of
    # the logits' size. Padding is not looked up, since it may be no id, as -100; any other label has to be one.
    log_z_N = logits_NV.logsumexp(dim=1)
    nll_N = log_z_N + F.nll_loss(logits_NV, labels_N, reduction="none", ignore_index=pad_id)
    nll = torch.where(counted_N, nll_N, 0.0).sum() / tokens
    return nll + z_loss * torch.where(counted_N, log_z_N.square(), 0.0).sum() / tokens, nll.detach()


def summed_nll(logits_BTV: Tensor, labels_BT: Tensor, pad_id: int = 0) -> tuple[float, int]:
    """Sum of the cross-entropy (nats) and number of target tokens of a batch, for averages over many batches."""
    total = F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=pad_id, reduction="sum")
    return float(total), int((labels_BT != pad_id).sum())
