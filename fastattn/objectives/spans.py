"""T5's span corruption: spans of tokens are taken out, and are to be predicted."""

from __future__ import annotations

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
)
from fastattn.validation import check_flag, check_integers, check_lengths, check_number


class SpanCorruption(NamedTuple):
    """A batch of `span_corruption`. Rows are as long as the longest one needs.

    Attributes:
        input_ids: int64 (batch, longest input), padded with `pad_token`.
        input_lengths: int64 (batch,).
        labels: int64 (batch, longest target), padded with `ignore_index`.
        label_lengths: int64 (batch,).
        noise: bool (batch, seqlen), which tokens of the text were taken out.
    """

    input_ids: Tensor
    input_lengths: Tensor
    labels: Tensor
    label_lengths: Tensor
    noise: Tensor


def span_corruption(
    input_ids: Tensor,
    *,
    first_sentinel: int,
    num_sentinels: int = 100,
    lengths: Tensor | None = None,
    rate: float = 0.15,
    mean_span: float = 3.0,
    noise: Tensor | None = None,
    eos_token: int | None = 1,
    final_sentinel: bool = False,
    pad_token: int = 0,
    seed: randomness.Seed = None,
    ignore_index: int = IGNORE,
) -> SpanCorruption:
    """T5's objective (Raffel et al., arXiv:1910.10683, section 3.1.4).

        text       Thank you for inviting me to your party last week
        input_ids  Thank you <0> me to your party <1> week </s>
        labels     <0> for inviting <1> last </s>

    Args:
        input_ids: int32 or int64 (batch, seqlen), the text without its end-of-sequence token,
            padded on the right.
        first_sentinel: id of <extra_id_0>; the next ones count down. Of T5, the vocabulary's last.
        num_sentinels: how many there are.
        lengths: int32 or int64 (batch,), real tokens of each row; None: all.
        rate, mean_span: see `noise_spans`.
        noise: bool (batch, seqlen), which tokens to take out, in place of random ones.
        eos_token: ends inputs and labels; None: nothing does.
        final_sentinel: end the labels with one more sentinel, as the figures of the paper do; the
            released checkpoints were trained without.
        pad_token: fills `input_ids`.
        seed: an int, which fixes the result, or a generator; None draws from torch's.
        ignore_index: fills `labels`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. A text may not
            hold sentinels, nor need more than there are. On a GPU the host waits once, for the
            lengths.
    """
    ids = check_ids("input_ids", input_ids)
    check_int("num_sentinels", num_sentinels, 1)
    check_int("first_sentinel", first_sentinel, num_sentinels - 1)
    check_flag("final_sentinel", final_sentinel)
    check_int("pad_token", pad_token, 0)
    if eos_token is not None:
        check_int("eos_token", eos_token, 0)
    ends = row_lengths(lengths, ids)
    real = real_tokens(ends, ids.shape[1])
    if noise is None:
        noise = noise_spans(ends, ids.shape[1], rate=rate, mean_span=mean_span, seed=seed)
    noise = check_flags("noise", noise, ids) & real
    starts = noise & ~torch.nn.functional.pad(noise, (1, 0))[:, :-1]
    number = starts.cumsum(1)
    _check_sentinels(ids, real, number, first_sentinel, num_sentinels, final_sentinel)
    sentinel = first_sentinel + 1 - number

    inputs = torch.where(starts, sentinel, ids)
    # A span's sentinel goes before its first token: two columns for each place.
    targets = torch.stack((sentinel, ids), 2).flatten(1)
    keep_inputs, keep_targets = real & (~noise | starts), torch.stack((starts, noise), 2).flatten(1)
    if final_sentinel:
        last = first_sentinel - starts.sum(1)
        targets, keep_targets = _with_last(targets, keep_targets, last)
    if eos_token is not None:
        inputs, keep_inputs = _with_last(inputs, keep_inputs, eos_token)
        targets, keep_targets = _with_last(targets, keep_targets, eos_token)
    return SpanCorruption(
        *_compacted(inputs, keep_inputs, pad_token),
        *_compacted(targets, keep_targets, ignore_index),
        noise,
    )


def noise_spans(
    lengths: Tensor,
    seqlen: int,
    *,
    rate: float = 0.15,
    mean_span: float = 3.0,
    seed: randomness.Seed = None,
) -> Tensor:
    """Random spans of noise, as T5 draws them.

    A row of n tokens has m = round(rate * n) of noise (1 to n - 1) in s = round(m / mean_span)
    spans (1 to min(m, n - m)). The text alternates, starting without noise, and all ways to cut m
    and n - m tokens into s pieces that are not empty are equally likely. A row of fewer than two
    tokens has none.

    Args:
        lengths: int32 or int64 (batch,), tokens of each row.
        seqlen: columns of the result.
        rate: share of noise, in [0, 1].
        mean_span: mean length of a span, at least 1.
        seed: an int, which fixes the result, or a generator; None draws from torch's.

    Returns:
        bool (batch, seqlen), True in spans of noise.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    check_int("seqlen", seqlen, 0)
    check_integers("lengths", lengths, lengths.device)
    check_lengths("lengths", lengths, lengths.numel(), seqlen, lengths.device)
    rate = check_share("rate", rate)
    mean_span = check_number("mean_span", mean_span, "a number of at least 1", low=1.0)
    total = lengths.to(torch.int64)
    zero = torch.zeros_like(total)
    # Half to even, as NumPy rounds in T5's own code; in float64 for that.
    noise = (total.to(torch.float64) * rate).round().to(torch.int64).clamp(min=1)
    noise = torch.maximum(torch.minimum(noise, total - 1), zero)
    spans = (noise.to(torch.float64) / mean_span).round().to(torch.int64).clamp(min=1)
    spans = torch.minimum(spans, torch.minimum(noise, total - noise))

    key = randomness.seed_tensor(seed, lengths.device)
    of_noise, of_text, _, _ = randomness.words(key, randomness.SPANS, total.numel(), seqlen)
    pieces = (_cut(total - noise, spans, of_text), _cut(noise, spans, of_noise))
    ends = torch.stack(pieces, 2).flatten(1).cumsum(1)
    # Each end flips between text and noise; those of pieces that do not exist lie past the row.
    flips = torch.zeros(total.numel(), seqlen + 1, dtype=torch.int64, device=lengths.device)
    flips.scatter_add_(1, ends, torch.ones_like(ends))
    inside = flips.cumsum(1)[:, :seqlen] % 2 == 1
    return inside & real_tokens(total, seqlen)


def shift_right(labels: Tensor, start_token: int, pad_token: int = 0) -> Tensor:
    """What the decoder reads to predict `labels`: the start token, then all but the last.

    Args:
        labels: int64 (batch, seqlen); -100 and other negative ones become `pad_token`.
        start_token: first token of every row; of T5, its padding.

    Returns:
        int64 (batch, seqlen).
    """
    check_int("start_token", start_token, 0)
    check_int("pad_token", pad_token, 0)
    width = min(1, labels.shape[1])
    shifted = torch.nn.functional.pad(labels[:, : labels.shape[1] - width], (width, 0))
    shifted = shifted.masked_fill(shifted < 0, pad_token)
    shifted[:, :width] = start_token
    return shifted


def _cut(items: Tensor, pieces: Tensor, word: Tensor) -> Tensor:
    """Lengths (batch, most pieces) of `pieces` random pieces of `items` each; 0 where none is."""
    batch, seqlen = word.shape
    column = torch.arange(seqlen, device=word.device)
    inner = column < (items - 1)[:, None]  # a cut may lie behind every item but the last
    cuts = inner & (randomness.ranks(word, inner) < (pieces - 1)[:, None])
    piece = torch.nn.functional.pad(cuts, (1, 0)).cumsum(1)[:, :seqlen]
    exists = (column < items[:, None]) & (pieces > 0)[:, None]
    # At most every second token starts a span, and all tokens of a row are in its first pieces.
    lengths = torch.zeros(batch, seqlen // 2 + 1, dtype=torch.int64, device=word.device)
    return lengths.scatter_add_(1, torch.where(exists, piece, 0), exists.to(torch.int64))


def _check_sentinels(
    ids: Tensor,
    real: Tensor,
    number: Tensor,
    first_sentinel: int,
    num_sentinels: int,
    final_sentinel: bool,
) -> None:
    if ids.numel() == 0:
        return
    last = first_sentinel - num_sentinels
    used = real & (ids > last) & (ids <= first_sentinel)
    needed, found = torch.stack((number.max(), torch.where(used, ids, -1).max())).tolist()
    if found >= 0:
        raise ValueError(
            f"input_ids must not hold sentinels, {last + 1}..{first_sentinel}, got {found}"
        )
    if needed + final_sentinel > num_sentinels:
        raise ValueError(
            f"num_sentinels must be at least the spans of the longest row, "
            f"{needed + final_sentinel}, got {num_sentinels}"
        )


def _with_last(values: Tensor, keep: Tensor, last: Tensor | int) -> tuple[Tensor, Tensor]:
    """The values with one more column, which is kept in every row."""
    column = values.new_empty(values.shape[0], 1)
    column[:, 0] = last
    return torch.cat((values, column), 1), torch.nn.functional.pad(keep, (0, 1), value=True)


def _compacted(values: Tensor, keep: Tensor, fill: int) -> tuple[Tensor, Tensor]:
    """The values that are kept, moved together to the left of each row, and how many they are."""
    lengths = keep.sum(1)
    width = int(lengths.max()) if lengths.numel() else 0
    place = torch.where(
        keep, keep.cumsum(1) - 1, width
    )  # the others share a column that is cut off
    out = values.new_full((values.shape[0], width + 1), fill).scatter_(1, place, values)
    return out[:, :width].contiguous(), lengths
