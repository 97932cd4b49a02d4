"""Masked language modeling: some tokens are hidden, and are to be predicted."""

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
    check_int,
    check_share,
    real_tokens,
    row_lengths,
    token_set,
)
from fastattn.validation import check_flag


class MaskedLM(NamedTuple):
    """A batch of `masked_lm`.

    Attributes:
        input_ids: int64 (batch, seqlen), corrupted.
        labels: int64 (batch, seqlen), the token that was there, `ignore_index` where none was
            selected.
    """

    input_ids: Tensor
    labels: Tensor


def masked_lm(
    input_ids: Tensor,
    *,
    mask_token: int,
    vocab_size: int,
    special_tokens: Sequence[int] = (),
    lengths: Tensor | None = None,
    word_starts: Tensor | None = None,
    rate: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    exact: bool = False,
    at_least_one: bool = False,
    seed: randomness.Seed = None,
    ignore_index: int = IGNORE,
) -> MaskedLM:
    """BERT's corruption (Devlin et al., arXiv:1810.04805): 15% selected, of these 80/10/10.

    A selected token becomes `mask_token`, or a random one, or stays as it is. Special tokens and
    padding are never selected, nor drawn as random ones.

    Args:
        input_ids: int32 or int64 (batch, seqlen), padded on the right or not.
        mask_token: id of [MASK]; a special token too.
        vocab_size: random tokens are drawn from 0..vocab_size - 1 without the special ones.
        special_tokens: ids that are left alone: [CLS], [SEP], [PAD].
        lengths: int32 or int64 (batch,), real tokens of each row; None: all.
        word_starts: bool (batch, seqlen), True at the first token of each word: words are selected
            as a whole, and their tokens corrupted each by itself. Special tokens end a word.
        rate: share of the tokens that may be selected which are.
        mask_share, random_share: of the selected tokens, those that become `mask_token` and those
            that become random; the rest stays.
        exact: False selects each token (or word) by itself, with probability `rate`: the number
            varies as a binomial's does. True selects round(rate * candidates) of each row; of words
            as many, in random order, as fit into that number.
        at_least_one: in every row with a token that may be selected, one (one word) is.
        seed: an int, which fixes the result, or a generator; None draws from torch's.
        ignore_index: label of tokens that were not selected.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    check_int("vocab_size", vocab_size, 1)
    check_int("mask_token", mask_token, 0, vocab_size - 1)
    check_flag("exact", exact)
    check_flag("at_least_one", at_least_one)
    rate, mask_share, random_share = (
        check_share(name, value)
        for name, value in (
            ("rate", rate), ("mask_share", mask_share), ("random_share", random_share),
        )
    )  # fmt: skip
    if mask_share + random_share > 1 + 1e-9:  # what sums of decimal fractions may be off by
        raise ValueError(
            f"mask_share + random_share must be at most 1, got {mask_share} + {random_share}"
        )
    ids = check_ids("input_ids", input_ids, vocab_size)
    special = token_set("special_tokens", special_tokens, vocab_size, ids.device, mask_token)
    if random_share > 0 and special.numel() == vocab_size:
        raise ValueError("special_tokens must leave a token to draw at random, got the whole vocab")
    may = real_tokens(row_lengths(lengths, ids), ids.shape[1]) & ~torch.isin(ids, special)
    starts = None
    if word_starts is not None:
        starts = check_flags("word_starts", word_starts, ids)

    key = randomness.seed_tensor(seed, ids.device)
    choice, action, token, _ = randomness.words(key, randomness.MASKED, *ids.shape)
    selected = _select(may, _first_of_word(may, starts), choice, rate, exact, at_least_one)
    labels = torch.where(selected, ids, ignore_index)
    masked = selected & randomness.chance(action, mask_share)
    random = selected & ~masked & randomness.chance(action, min(mask_share + random_share, 1.0))
    corrupted = torch.where(random, _ordinary(token, special, vocab_size), ids)
    return MaskedLM(torch.where(masked, mask_token, corrupted), labels)


def _first_of_word(may: Tensor, starts: Tensor | None) -> Tensor:
    """The column where each column's word begins; without words, the column itself."""
    column = torch.arange(may.shape[1], device=may.device).expand_as(may)
    if starts is None or may.shape[1] == 0:
        return column
    after_special = torch.nn.functional.pad(~may[:, :-1], (1, 0), value=True)
    begins = starts | ~may | after_special
    return torch.where(begins, column, 0).cummax(1).values


def _select(
    may: Tensor, first: Tensor, word: Tensor, rate: float, exact: bool, at_least_one: bool
) -> Tensor:
    """Which columns are selected, whole words each."""
    if may.shape[1] == 0:
        return may
    word = word.gather(1, first)  # all tokens of a word share a draw
    rank_of_first = first
    if exact or at_least_one:
        rank_of_first = randomness.ranks(word, may).gather(1, first)
    if exact:
        size = torch.zeros_like(first).scatter_add_(1, first, may.to(torch.int64)).gather(1, first)
        wanted = (may.sum(1, keepdim=True).to(torch.float64) * rate).round()
        selected = rank_of_first + size <= wanted
    else:
        selected = randomness.chance(word, rate)
    if at_least_one:
        selected = selected | (rank_of_first == 0)
    return selected & may


def _ordinary(word: Tensor, special: Tensor, vocab_size: int) -> Tensor:
    """A token for each random word, equally likely among those that are not special."""
    number = randomness.below(word, vocab_size - special.numel())
    # Ordinary token number n lies behind as many special ones as have at most n ordinary before.
    before = special - torch.arange(special.numel(), device=special.device)
    return number + torch.searchsorted(before, number, right=True)
