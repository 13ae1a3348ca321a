"""Greedy decoding: what the harness scores and what it times, one function for both."""

import torch
from torch import Tensor

from gqa_exp.model.inference import InferenceT5
from gqa_exp.model.t5 import T5

LOOK_EVERY = {"cpu": 1, "cuda": 8}
"""Steps between two looks at which sequences have ended: on a GPU each look waits for all queued work."""


@torch.inference_mode()
def generate(
    model: T5 | InferenceT5,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    stop_at_eos: bool = True,
) -> Tensor:
    """Greedy generation.

    Args:
        model: the model, in evaluation mode. Who generates for many batches prepares it once, as `InferenceT5(model)`.
        input_ids: (B, S).
        attention_mask: (B, S), 1 for tokens and 0 for padding; None when nothing is padded.
        max_new_tokens: longest output.
        stop_at_eos: after a sequence's end-of-sequence emit padding, and stop when all have ended; when at least half
            have, they leave the batch (unless steps are compiled). False generates exactly `max_new_tokens` tokens for
            each, so that timed variants do equal work.

    Returns:
        ids (B, at most max_new_tokens), without the start token.

    Raises:
        ValueError: `max_new_tokens` is below 1.
        FloatingPointError: with `stop_at_eos`, where outputs count: some logits were not finite.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more")
    if isinstance(model, T5):
        model = InferenceT5(model)
    config = model.config
    state = model.start(model.encode(input_ids, attention_mask), attention_mask, max_new_tokens)
    B = input_ids.shape[0]
    ids_BT = input_ids.new_full((B, max_new_tokens), config.pad_id)
    rows_B = torch.arange(B, device=input_ids.device)  # of the sequences that are still decoded
    token_B = input_ids.new_full((B,), config.decoder_start_id)
    ended_B = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
    sound = torch.ones((), dtype=torch.bool, device=input_ids.device)
    look_every = LOOK_EVERY.get(input_ids.device.type, 1)
    for position in range(max_new_tokens):
        logits_BV = model.step(token_B, state)
        token_B = likeliest(logits_BV)
        if stop_at_eos:
            sound &= logits_BV.gather(1, token_B[:, None]).isfinite().all()  # NaN is found before any number
            token_B = token_B.masked_fill(ended_B, config.pad_id)
            ended_B |= token_B == config.eos_id
        ids_BT[rows_B, position] = token_B
        if stop_at_eos and (position + 1) % look_every == 0:
            going_B = (~ended_B).nonzero().flatten()
            if not len(going_B):
                break
            if 2 * len(going_B) <= len(ended_B) and not model.compiled:  # a graph has a fixed batch
                state.keep(going_B)
                rows_B, token_B, ended_B = rows_B[going_B], token_B[going_B], ended_B[going_B]
    if not sound:
        raise FloatingPointError(f"logits that are not finite in {logits_BV.dtype}")
    return _cut(ids_BT, config.eos_id) if stop_at_eos else ids_BT


def likeliest(logits_BV: Tensor) -> Tensor:
    """The id of the highest of logits (B, V), the first of several, as argmax finds it: (B,).

    On a CPU by NumPy's, which is vectorised where torch's is not: of (64, 8192) in bfloat16 it takes 0.08 ms on one
    thread of a Zen 4, conversion to float32 included, torch's 1.9; of (8, 32128) 0.04 and 0.9.
    """
    if logits_BV.device.type != "cpu":
        return logits_BV.argmax(-1)
    return torch.from_numpy(logits_BV.detach().float().numpy().argmax(-1))


def _cut(ids_BT: Tensor, eos_id: int) -> Tensor:
    """Without the columns after the last sequence's end."""
    is_end_BT = ids_BT == eos_id
    if not bool(is_end_BT.any(1).all()):
        return ids_BT
    return ids_BT[:, : int(is_end_BT.int().argmax(1).max()) + 1]
