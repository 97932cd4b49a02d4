"""Perplexity of a text of any length, by a window that slides over it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fastattn.models.layers import check_token_ids

_LOGIT_BYTES = 256 * 2**20  # logits of about this size are held at a time


@torch.no_grad()
def perplexity(
    model: Callable[[Tensor], Tensor],
    input_ids: Tensor,
    context: int,
    stride: int | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first.

    The text is read in windows of `context` tokens, each `stride` behind the one before. A window
    predicts those of its tokens that no window before it has, so each token counts once, and has at
    least context - stride tokens before it (fewer at the beginning of the text). The windows are
    those of transformers' guide to perplexity:

        0 1 2 3 4 5 . . .    context 6, stride 2: 1 to 5 are predicted
        . . 2 3 4 5 6 7 .    6 and 7 are
        . . . . 4 5 6 7 8    8 is

    Args:
        model: logits (1, seqlen, vocab_size) of token ids (1, seqlen); a `Decoder`, for instance.
        input_ids: int64 (seqlen,) or (1, seqlen), at least 2 tokens.
        context: tokens of a window, at least 2, at most what the model can read.
        stride: 1 to context - 1; default half of the context. Smaller is slower, and lower.
        progress: called with how many tokens are done, and of how many.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    ids = input_ids[None] if isinstance(input_ids, Tensor) and input_ids.dim() == 1 else input_ids
    check_token_ids("input_ids", ids, getattr(model, "vocab_size", 2**62))
    longest = getattr(model, "max_positions", None)
    if context < 2 or (longest is not None and context > longest):
        raise ValueError(f"context must be at least 2 and at most {longest}, got {context}")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride < context:
        raise ValueError(f"stride must lie in 1..{context - 1}, got {stride}")
    total = ids.shape[1]
    if ids.shape[0] != 1 or total < 2:
        raise ValueError(
            f"input_ids must be one text of at least 2 tokens, got shape {tuple(input_ids.shape)}"
        )
    loss, done = 0.0, 1
    for start in range(0, total, stride):
        end = min(total, start + context)
        window = ids[:, start:end]
        loss += _negative_log_likelihood(model(window)[0], window[0], end - done)
        done = end
        if progress is not None:
            progress(done, total)
        if done == total:
            break
    return math.exp(loss / (total - 1))


def _negative_log_likelihood(logits: Tensor, ids: Tensor, count: int) -> float:
    """Of the last `count` of `ids`, each by the logits before it; summed in float64."""
    logits, targets = logits[-count - 1 : -1], ids[-count:]
    rows = max(1, _LOGIT_BYTES // (4 * logits.shape[-1]))
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    losses = (
        functional.cross_entropy(part.float(), target, reduction="none").double().sum()
        for part, target in parts
    )
    return float(sum(losses))
