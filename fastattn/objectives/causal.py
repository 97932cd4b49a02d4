"""Predicting the next token: of a text, and of a text behind a prefix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.masks import Lengths, Mask, Prefix
from fastattn.objectives import randomness
from fastattn.objectives.arguments import IGNORE, check_ids, real_tokens, row_lengths
from fastattn.validation import check_cu_seqlens, check_flag, check_lengths


class PrefixLM(NamedTuple):
    """A batch of `prefix_lm`.

    Attributes:
        mask: for `fastattn.attention`: the prefix sees itself whole, the rest what came before.
        labels: int64 (batch, seqlen), the next token, `ignore_index` within the prefix.
        loss_mask: bool (batch, seqlen), where there is a label.
        prefix_lengths: int64 (batch,).
    """

    mask: Mask
    labels: Tensor
    loss_mask: Tensor
    prefix_lengths: Tensor


def causal_lm(
    input_ids: Tensor,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = IGNORE,
) -> Tensor:
    """The labels of a causal language model.

    Args:
        input_ids: int32 or int64 (batch, seqlen), padded on the right; packed (1, total).
        lengths: int32 or int64 (batch,), real tokens of each row; None: all.
        cu_seqlens: int32 or int64 (num_sequences + 1,), where packed sequences end: the last token
            of one does not predict the first of the next.
        shift: True: the label of a place is the token after it. False: the token itself, as models
            of transformers want it, which shift on their own.
        ignore_index: label where there is nothing to predict.

    Returns:
        int64 (batch, seqlen).

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    check_flag("shift", shift)
    ids = check_ids("input_ids", input_ids)
    if cu_seqlens is not None:
        if ids.shape[0] != 1 or lengths is not None:
            raise ValueError(
                "cu_seqlens goes with input_ids of one row and without lengths, got "
                f"{ids.shape[0]} rows{'' if lengths is None else ' and lengths'}"
            )
        check_cu_seqlens("cu_seqlens", cu_seqlens, ids.shape[1], ids.shape[1], ids.device)
    real = real_tokens(row_lengths(lengths, ids), ids.shape[1])
    first = torch.zeros_like(real)
    first[:, :1] = True
    if cu_seqlens is not None:
        inner = torch.zeros(ids.shape[1] + 1, dtype=torch.bool, device=ids.device)
        first |= inner.index_fill(0, cu_seqlens.to(torch.int64), True)[:-1]
    predicted = torch.where(real & ~first, ids, ignore_index)
    return (
        _shifted(predicted, ignore_index) if shift else torch.where(real, predicted, ignore_index)
    )


def prefix_lm(
    input_ids: Tensor,
    *,
    prefix_lengths: Tensor | None = None,
    lengths: Tensor | None = None,
    seed: randomness.Seed = None,
    ignore_index: int = IGNORE,
) -> PrefixLM:
    """Sequence-to-sequence by one stack (UniLM, Dong et al., arXiv:1905.03197; prefix LM of T5).

    Args:
        input_ids: int32 or int64 (batch, seqlen), prefix and continuation, padded on the right.
        prefix_lengths: int32 or int64 (batch,), tokens of each row's prefix; None draws them, each
            from 1 to one less than the row's length equally likely.
        lengths: int32 or int64 (batch,), real tokens of each row; None: all.
        seed: an int, which fixes the result, or a generator; None draws from torch's.
        ignore_index: label where there is nothing to predict.

    Returns:
        `PrefixLM`: the prefix's last place predicts the first token after it.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    ids = check_ids("input_ids", input_ids)
    batch, seqlen = ids.shape
    ends = row_lengths(lengths, ids)
    if prefix_lengths is None:
        key = randomness.seed_tensor(seed, ids.device)
        word = randomness.words(key, randomness.PREFIX, batch, 1)[0][:, 0]
        prefix = torch.minimum(1 + randomness.below(word, (ends - 1).clamp(min=0)), ends)
    else:
        check_lengths("prefix_lengths", prefix_lengths, batch, seqlen, ids.device)
        prefix = prefix_lengths.to(torch.int64)
    mask: Mask = Prefix(prefix)
    if lengths is not None:
        mask = mask & Lengths(ends, seqlens_q=ends)
    behind = real_tokens(ends, seqlen) & ~real_tokens(prefix, seqlen)
    labels = _shifted(torch.where(behind, ids, ignore_index), ignore_index)
    return PrefixLM(mask, labels, _shifted(behind, False), prefix)


def _shifted(values: Tensor, fill: int | bool) -> Tensor:
    """Each place gets what stands after it, the last one `fill`."""
    return torch.nn.functional.pad(values[:, 1:], (0, min(1, values.shape[1])), value=fill)
