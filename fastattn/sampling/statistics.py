"""What a row of logits says: entropy, perplexity, log-probabilities, with no softmax in memory.

The maximum, the sum of exponentials and their first moment are carried from chunk to chunk of the
vocabulary (online softmax: Milakov and Gimelshein, arXiv:1805.02867), so temporaries are as large
as a chunk. Plain torch is enough: these read the logits a few times, from cache, and nothing
waits for them. Where `torch.compile` sees them they are one chunk, which it fuses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.sampling.arguments import check_flags, check_scores, check_token_range, check_tokens

# Elements of a chunk: in float32 512 KiB, which stays in a CPU core's second cache (2**14 to 2**18
# were tried on an AMD EPYC with 1 MiB of it), and elsewhere 16 MiB, enough to fill a GPU.
_CPU_CHUNK = 2**17
_CHUNK = 2**22
# Columns of a chunk, at least: 4 KiB in a row of float32.
_NARROWEST = 2**10


class Moments(NamedTuple):
    """Sums over the vocabulary of each row, relative to its largest logit.

    `log_sum` is log(sum(exp(x - maximum))), so the log-sum-exp of a row is maximum + log_sum;
    `mean` is that of x - maximum under the softmax, and 0 where it was not asked for. All are
    float64 of the rows' shape: what is summed is float32, but the sums are still to be subtracted.
    """

    maximum: Tensor
    log_sum: Tensor
    mean: Tensor


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of softmax(logits), in nats: log sum exp(x) - sum(p * x).

    Args:
        logits: (..., vocab_size) of any floating dtype. A token at -inf has no share.

    Returns:
        float32 (...), float64 for float64; in 0..log(vocab_size) up to rounding. NaN for a row that
        holds a NaN or +inf, or nothing but -inf. Differentiable.

    Raises:
        TypeError, ValueError: logits are not as described.
    """
    check_scores("logits", logits)
    moments = softmax_moments(logits, with_mean=True)
    return (moments.log_sum - moments.mean).to(wide_dtype(logits))


def log_probabilities(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """log softmax(logits) of one token a row.

    Args:
        logits: (..., vocab_size) of any floating dtype.
        tokens: int32 or int64 (...), in 0..vocab_size - 1.
        mask: bool (...); where it is False tokens and logits may hold anything and the result is 0.
            None: everything counts.

    Returns:
        float32 (...), float64 for float64. NaN for a row that holds a NaN or +inf, or nothing but
        -inf. Differentiable.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. Tokens on a
            GPU are looked at only within `fastattn.testing.debug()`.
    """
    return _log_probabilities(logits, tokens, mask).to(wide_dtype(logits))


def _log_probabilities(logits: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The same in float64."""
    check_scores("logits", logits)
    check_tokens("tokens", tokens, logits.shape[:-1], logits.device)
    if mask is not None:
        check_flags("mask", mask, logits.shape[:-1], logits.device)
    check_token_range("tokens", tokens, mask, logits.shape[-1])
    index = tokens.long() if mask is None else tokens.long().where(mask, 0)
    moments = softmax_moments(logits)
    chosen = logits.gather(-1, index[..., None])[..., 0].double()
    result = (chosen - moments.maximum) - moments.log_sum
    return result if mask is None else result.where(mask, 0)


def perplexity(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """exp of the mean negative log-probability of a row's tokens.

    Args:
        logits: (..., length, vocab_size) of any floating dtype: `logits[..., i, :]` is what the
            model said before `tokens[..., i]` came. For a causal model's output on input_ids that
            is `perplexity(logits[:, :-1], input_ids[:, 1:])`.
        tokens: int32 or int64 (..., length).
        mask: bool (..., length), True = counts. Where it is False tokens (-100, say) and logits may
            hold anything.

    Returns:
        float32 (...), float64 for float64: 1 where every token was certain, NaN for a row without
        tokens. Differentiable.

    Raises:
        TypeError, ValueError: as `log_probabilities`.
    """
    check_scores("logits", logits)
    if logits.dim() < 2:
        raise ValueError(
            f"logits must have shape (..., length, vocab_size), got {tuple(logits.shape)}"
        )
    loss = -_log_probabilities(logits, tokens, mask)
    count = loss.shape[-1] if mask is None else mask.sum(-1)
    return (loss.sum(-1) / count).exp().to(wide_dtype(logits))


def softmax_moments(logits: Tensor, with_mean: bool = False) -> Moments:
    """The sums that entropy and log-probabilities are made of. logits (..., vocab_size)."""
    rows = logits.reshape(-1, logits.shape[-1])
    if rows.shape[0] == 0:
        empty = rows.new_zeros(rows.shape[0], dtype=torch.float64)
        parts = [Moments(empty, empty, empty)]
    else:
        parts = [_moments(block, with_mean) for block in _row_blocks(rows)]
    joined = (torch.cat(part).reshape(logits.shape[:-1]) for part in zip(*parts, strict=True))
    return Moments(*joined)


def _row_blocks(rows: Tensor) -> Iterator[Tensor]:
    if torch.compiler.is_compiling():
        yield rows
    else:
        yield from rows.split(max(1, _chunk_size(rows) // _NARROWEST))


def _column_chunks(rows: Tensor) -> Iterator[Tensor]:
    if torch.compiler.is_compiling():
        yield rows
    else:
        yield from rows.split(max(_NARROWEST, _chunk_size(rows) // rows.shape[0]), dim=1)


def _moments(rows: Tensor, with_mean: bool) -> Moments:
    """`softmax_moments` of (rows, vocab_size), a chunk of the vocabulary after another."""
    largest = rows.new_full((rows.shape[0], 1), -math.inf, dtype=wide_dtype(rows))
    shift = torch.zeros_like(largest)  # the largest so far, or 0 where that is -inf
    total = torch.zeros_like(largest, dtype=torch.float64)  # sum of exp(x - shift)
    moment = torch.zeros_like(total)  # sum of exp(x - shift) * (x - shift)
    for chunk in _column_chunks(rows):
        x = chunk.to(largest.dtype)
        largest = torch.maximum(largest, x.detach().amax(-1, keepdim=True))
        before, shift = shift, largest.masked_fill(largest == -math.inf, 0)
        # Before there was anything, total is 0 and the change of shift is of no consequence.
        change = (before.double() - shift).where(total > 0, 0)
        shrink = change.exp()
        z = x - shift
        weights = z.exp()
        if with_mean:
            # -inf * 0 would be NaN: the lowest finite number stands for -inf.
            here = (weights * z.clamp(min=torch.finfo(z.dtype).min)).sum(-1, keepdim=True)
            moment = shrink * (moment + change * total) + here
        total = shrink * total + weights.sum(-1, keepdim=True)
    return Moments(largest[:, 0].double(), total.log()[:, 0], (moment / total)[:, 0])


def _chunk_size(rows: Tensor) -> int:
    return _CPU_CHUNK if rows.device.type == "cpu" else _CHUNK


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What is computed in: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
