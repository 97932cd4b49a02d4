"""No n-gram twice: which tokens would complete one that a row already has.

    no_repeat_ngram(input_ids, 3, vocab_size)      a mask, for SamplingParams(banned=...)
    ban_repeated_ngrams_(logits, input_ids, 3)     the same in place, without a mask

Plain torch is enough: the work is in proportion to the length of the rows, not to the vocabulary,
and it is two comparisons and a scatter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.sampling.arguments import check_count, check_flags, check_scores, check_tokens
from fastattn.validation import check_lengths, check_tensor, describe


def no_repeat_ngram(
    input_ids: Tensor,
    n: int,
    vocab_size: int,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The tokens that would complete an n-gram which the row already has.

        input_ids = [5, 7, 9, 5, 7], n = 3      5 7 stood there before, 9 came next: 9 is banned

    The rule of Hugging Face's `no_repeat_ngram_size` (fairseq; Paulus et al., arXiv:1705.04304),
    except that padding, where it is pointed out, is not a token here.

    Args:
        input_ids: int32 or int64 (batch, length), prompt and output of each row. Ids past the
            vocabulary, or negative, take part in n-grams and are never banned.
        n: size of the n-grams, at least 1. With 1, no token comes twice.
        vocab_size: number of tokens.
        mask: bool (batch, length), True = a real token; None: all are. n-grams that contain any
            other are none, so it may be padded on the left, on the right, or with gaps.
        lengths: int32 or int64 (batch,), instead of a mask: the first `lengths[b]` are real, as in
            a buffer that is being filled.

    Returns:
        bool (batch, vocab_size), contiguous, True = banned, for `SamplingParams(banned=...)`. Rows
        of fewer than n tokens have none.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    check_count("vocab_size", vocab_size)
    tokens, repeats = _completions(input_ids, n, mask, lengths)
    batch = tokens.shape[0]
    # What is not banned goes to a spare element at the end, where it cannot undo a ban.
    spare = batch * vocab_size
    rows = torch.arange(batch, device=tokens.device)[:, None] * vocab_size
    hit = repeats & (tokens >= 0) & (tokens < vocab_size)
    places = torch.where(hit, rows + tokens, spare).flatten()
    banned = torch.zeros(spare + 1, dtype=torch.bool, device=tokens.device)
    return banned.index_fill(0, places, 1)[:spare].view(batch, vocab_size)


def ban_repeated_ngrams_(
    logits: Tensor,
    input_ids: Tensor,
    n: int,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Sets the logits of those tokens to -inf, in place: traffic of O(length), not O(vocab_size).

    Args:
        logits: (batch, vocab_size) of any floating dtype and strides; changed. A NaN stays one.
        input_ids, n, mask, lengths: as for `no_repeat_ngram`, on the device of logits.

    Returns:
        logits.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    check_scores("logits", logits, ("batch", "vocab_size"))
    tokens, repeats = _completions(input_ids, n, mask, lengths)
    if input_ids.device != logits.device or input_ids.shape[0] != logits.shape[0]:
        raise ValueError(
            f"input_ids must have the {logits.shape[0]} rows of logits and be on {logits.device}, "
            f"got {describe(input_ids)}"
        )
    vocab_size = logits.shape[-1]
    hit = repeats & (tokens >= 0) & (tokens < vocab_size)
    # The minimum with +inf changes nothing, and a minimum does not depend on the order of writes.
    ceiling = torch.where(hit, -math.inf, math.inf).to(logits.dtype)
    return logits.scatter_reduce_(1, tokens.clamp(0, vocab_size - 1), ceiling, "amin")


def _completions(
    input_ids: Tensor, n: int, mask: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The last token of each n-gram, int64 (batch, windows), and whether the next would repeat it.

    The next token completes an n-gram whose first n - 1 tokens are the last n - 1 of the row.
    """
    check_count("n", n)
    check_tensor("input_ids", input_ids)
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have shape (batch, length), got {describe(input_ids)}")
    check_tokens("input_ids", input_ids, input_ids.shape, input_ids.device)
    batch, length = input_ids.shape
    device = input_ids.device
    places = torch.arange(length, device=device)
    real = None
    if mask is not None:
        if lengths is not None:
            raise ValueError("lengths must be None where a mask is given, got both")
        check_flags("mask", mask, input_ids.shape, device)
        real = mask
    elif lengths is not None:
        check_lengths("lengths", lengths, batch, length, device)
        real = places < lengths[:, None]

    tokens = input_ids.long()
    if length < n:
        return tokens[:, :0], tokens[:, :0] != 0
    windows = tokens.unfold(1, n, 1)
    if real is None:
        suffix = tokens[:, length - n + 1 :]
        return windows[..., -1], (windows[..., :-1] == suffix[:, None]).all(-1)
    ends = torch.where(real, places + 1, 0).amax(1, keepdim=True)
    # Rows of fewer than n - 1 tokens have no whole n-gram, so where these indices are clamped
    # does not matter.
    last = (ends - n + 1 + torch.arange(n - 1, device=device)).clamp(min=0)
    whole = real.unfold(1, n, 1).all(-1) & real.gather(1, last).all(-1, keepdim=True)
    return windows[..., -1], (windows[..., :-1] == tokens.gather(1, last)[:, None]).all(-1) & whole
