"""Mask-predict: filling in masked tokens with an encoder, a few at a time.

Not a language model that goes from left to right: an encoder with a masked-LM head sees both sides
of a gap, and gives no probability of a text as a whole. What comes out depends on the number of
iterations, and the log-probabilities are of single tokens, given those that stood there then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.generation.prompts import make_prompts
from fastattn.sampling import log_probabilities
from fastattn.sampling.arguments import check_count, check_scores

Logits = Callable[[Tensor, Tensor | None], Tensor]


class MaskPredicted(NamedTuple):
    """What `mask_predict` fills in.

    Attributes:
        sequences: int64 (batch, seqlen), the input with its masks filled in.
        logprobs: float32 (batch, seqlen), of each token that was filled in, when it was last
            predicted; 0 elsewhere.
        iterations: how many were run.
    """

    sequences: Tensor
    logprobs: Tensor
    iterations: int


@torch.no_grad()
def mask_predict(
    logits_of: Logits,
    input_ids: Tensor,
    mask_token: int,
    *,
    attention_mask: Tensor | None = None,
    iterations: int = 10,
    suppress_tokens: Sequence[int] = (),
) -> MaskPredicted:
    """Fills in masked tokens by iterations of predicting all and masking the least sure again.

    Ghazvininejad et al., arXiv:1904.09324: the first iteration predicts every masked token; each of
    the others masks those again that were predicted with the least probability, of N in iteration
    t of T the last N * (T - t) / T rounded down, and predicts them anew, given all that stay.

    Args:
        logits_of: the encoder: takes tokens (batch, seqlen) and the attention mask as given, and
            returns logits (batch, seqlen, vocab_size).
        input_ids: int32 or int64 (batch, seqlen), with `mask_token` where something is to come.
        mask_token: its id, which is never predicted.
        attention_mask: bool or integer (batch, seqlen), non-zero for real tokens; None: all are.
        iterations: at least 1. No more are run than have something to mask again.
        suppress_tokens: ids that are never predicted, such as the other special tokens.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    check_count("iterations", iterations)
    check_count("mask_token", mask_token, lowest=0)
    # The vocabulary is known when the logits are.
    prompts = make_prompts("input_ids", input_ids, "attention_mask", attention_mask, 2**62)
    tokens = prompts.given.clone()
    gaps = tokens == mask_token
    if attention_mask is not None:
        gaps &= attention_mask != 0
    total = gaps.sum(1, keepdim=True)
    if int(total.min()) == 0:
        raise ValueError(
            f"input_ids must hold mask_token = {mask_token} in every row, row "
            f"{int(total.argmin())} has none"
        )
    never = torch.tensor(sorted({mask_token, *suppress_tokens}), device=tokens.device)
    logprobs = torch.zeros(tokens.shape, device=tokens.device)
    masked, done = gaps, 0
    for iteration in range(1, iterations + 1):
        logits = logits_of(tokens.masked_fill(masked, mask_token), attention_mask)
        check_scores("the result of logits_of", logits, ("batch", "seqlen", "vocab_size"))
        if logits.shape[:2] != tokens.shape or int(never.max()) >= logits.shape[-1]:
            raise ValueError(
                f"the result of logits_of must be {tuple(tokens.shape)} by a vocabulary with "
                f"mask_token and suppress_tokens, up to {int(never.max())}, got "
                f"{tuple(logits.shape)}"
            )
        scores = logits.index_fill(-1, never, -torch.inf)
        best = scores.argmax(-1)
        tokens = torch.where(masked, best, tokens)
        logprobs = torch.where(masked, log_probabilities(scores, best).float(), logprobs)
        done = iteration
        again = total * (iterations - iteration) // iterations
        if int(again.max()) == 0:
            break
        masked = _least_sure(logprobs.masked_fill(~gaps, torch.inf), again)
    return MaskPredicted(tokens, logprobs, done)


def _least_sure(logprobs: Tensor, count: Tensor) -> Tensor:
    """The `count` (batch, 1) lowest of each row, bool (batch, seqlen); the first ones on a tie."""
    rank = logprobs.argsort(dim=-1, stable=True).argsort(dim=-1)
    return rank < count
