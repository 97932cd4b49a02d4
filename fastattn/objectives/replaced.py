"""Replaced-token detection: a generator fills the gaps, a discriminator finds what it changed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.objectives import randomness
from fastattn.objectives.arguments import IGNORE, check_ids, real_tokens, row_lengths
from fastattn.sampling import SamplingParams, sample
from fastattn.validation import check_number, check_tensor, describe


class ReplacedTokens(NamedTuple):
    """A batch for the discriminator.

    Attributes:
        input_ids: int64 (batch, seqlen), with the generator's tokens where some were selected.
        labels: int64 (batch, seqlen), 1 where a token is not the original one, 0 where it is,
            `ignore_index` past each row's length.
    """

    input_ids: Tensor
    labels: Tensor


def replaced_tokens(
    input_ids: Tensor,
    labels: Tensor,
    generator_logits: Tensor,
    *,
    lengths: Tensor | None = None,
    temperature: float = 1.0,
    seed: randomness.Seed = None,
    ignore_index: int = IGNORE,
) -> ReplacedTokens:
    """ELECTRA's replaced-token detection (Clark et al., arXiv:2003.10555).

    A token is drawn from the generator's softmax wherever one was selected. One that the generator
    got right counts as original.

        masked = masked_lm(input_ids, ...)
        logits = generator(masked.input_ids)
        batch = replaced_tokens(*masked, logits)
        loss = (token_loss(logits, masked.labels)
                + 50 * replaced_token_loss(discriminator(batch.input_ids), batch.labels))

    Args:
        input_ids, labels: of `masked_lm`: corrupted tokens, and the originals where selected.
        generator_logits: floating (batch, seqlen, vocab_size), or of the selected places alone
            (num_selected, vocab_size), row by row. No gradient flows through the draw.
        lengths: int32 or int64 (batch,), real tokens of each row; None: all.
        temperature: divides the logits; 0 takes the likeliest token.
        seed: an int, which fixes the result, or a generator; None draws from torch's.
        ignore_index: label of places that were not selected in `labels`, and of padding.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    ids = check_ids("input_ids", input_ids)
    check_tensor("labels", labels)
    if labels.dtype != torch.int64 or labels.shape != ids.shape:
        raise ValueError(f"labels must be int64 {tuple(ids.shape)}, got {describe(labels)}")
    temperature = check_number("temperature", temperature, "a number of at least 0", low=0.0)
    selected = labels != ignore_index
    original = torch.where(selected, labels, ids)
    row, column = selected.nonzero(as_tuple=True)
    logits = _of_selected(generator_logits, selected, row.numel())
    filled = original.clone()
    if row.numel():
        key = randomness.seed_tensor(seed, ids.device)
        low, high, _, _ = randomness.words(key, randomness.REPLACED, *ids.shape)
        seeds = (low | (high << 32))[row, column]
        drawn = sample(logits, SamplingParams(temperature=temperature, seed=seeds))
        assert isinstance(drawn, Tensor)  # no log-probabilities were asked for
        if bool((drawn < 0).any()):
            raise ValueError("generator_logits must be numbers above -inf, got a row without")
        filled[row, column] = drawn
    replaced = (filled != original).to(torch.int64)
    real = real_tokens(row_lengths(lengths, ids), ids.shape[1])
    return ReplacedTokens(filled, torch.where(real, replaced, ignore_index))


def _of_selected(logits: Tensor, selected: Tensor, number: int) -> Tensor:
    """Logits (num_selected, vocab_size), without a gradient."""
    check_tensor("generator_logits", logits)
    if not logits.is_floating_point() or logits.dim() not in (2, 3):
        raise ValueError(
            "generator_logits must be floating (batch, seqlen, vocab_size) or (num_selected, "
            f"vocab_size), got {describe(logits)}"
        )
    expected = (number,) if logits.dim() == 2 else tuple(selected.shape)
    if tuple(logits.shape[:-1]) != expected:
        raise ValueError(
            f"generator_logits must be {(*expected, 'vocab_size')}, got {describe(logits)}"
        )
    return (logits if logits.dim() == 2 else logits[selected]).detach()
