"""Permutation language modeling: tokens are predicted in a random order of their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.objectives import randomness
from fastattn.objectives.arguments import (
    IGNORE,
    check_flags,
    check_ids,
    check_share,
    real_tokens,
    row_lengths,
    token_set,
)


class PermutationLM(NamedTuple):
    """A batch of `permutation_lm`.

    Attributes:
        order: int64 (batch, seqlen): 0 of the context, which is known from the start; 1, 2, ... the
            turn in which a target is predicted; -1 of padding.
        content_mask: bool (batch, 1, seqlen, seqlen), True = attend, for the stream that knows the
            tokens: each sees the context, the targets before its turn, and itself.
        query_mask: the same for the stream that knows only places: a target does not see itself.
            `(~query_mask[:, 0]).float()` is the `perm_mask` of transformers' XLNet.
        labels: int64 (batch, seqlen), the token at targets, `ignore_index` elsewhere.
    """

    order: Tensor
    content_mask: Tensor
    query_mask: Tensor
    labels: Tensor


def permutation_lm(
    input_ids: Tensor,
    *,
    lengths: Tensor | None = None,
    special_tokens: Sequence[int] = (),
    rate: float = 1 / 6,
    targets: Tensor | None = None,
    seed: randomness.Seed = None,
    ignore_index: int = IGNORE,
) -> PermutationLM:
    """XLNet's objective (Yang et al., arXiv:1906.08237), as masks for two-stream attention.

    The last `rate` of a random order of factorization is predicted, which the paper calls partial
    prediction; the tokens before are context, whose order among themselves does not matter, since
    all of it is seen. rate=1 predicts everything.

    Args:
        input_ids: int32 or int64 (batch, seqlen), padded on the right.
        lengths: int32 or int64 (batch,), real tokens of each row; None: all.
        special_tokens: ids that are always context.
        rate: share of the other tokens that are targets: round(rate * candidates) of each row, at
            least one.
        targets: bool (batch, seqlen), the targets, in place of random ones; padding is none. Spans,
            for instance, of `noise_spans`.
        seed: an int, which fixes the result, or a generator; None draws from torch's.
        ignore_index: label where there is nothing to predict.

    Returns:
        `PermutationLM`. A target whose turn is first, in a row without context, sees nothing in the
        query stream: `fastattn.attention` gives 0 there. So do rows of padding.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    ids = check_ids("input_ids", input_ids)
    rate = check_share("rate", rate)
    special = token_set("special_tokens", special_tokens, None, ids.device)
    batch, seqlen = ids.shape
    real = real_tokens(row_lengths(lengths, ids), seqlen)
    key = randomness.seed_tensor(seed, ids.device)
    choice, turn, _, _ = randomness.words(key, randomness.PERMUTATION, batch, seqlen)
    if targets is None:
        may = real & ~torch.isin(ids, special)
        wanted = (may.sum(1, keepdim=True).to(torch.float64) * rate).round().clamp(min=1)
        chosen = may & (randomness.ranks(choice, may) < wanted)
    else:
        chosen = check_flags("targets", targets, ids) & real
    order = torch.where(chosen, 1 + randomness.ranks(turn, chosen), 0)
    order = torch.where(real, order, -1)
    context = real & ~chosen
    # A row sees what came before its turn, and the context, whose own rows see all of it.
    before = (order[:, :, None] > order[:, None, :]) | context[:, None, :]
    query = before & real[:, :, None] & real[:, None, :]
    itself = torch.eye(seqlen, dtype=torch.bool, device=ids.device) & real[:, :, None]
    labels = torch.where(chosen, ids, ignore_index)
    return PermutationLM(order, (query | itself)[:, None], query[:, None], labels)
