"""The n-gram ban, against Hugging Face's processor row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastattn.sampling.ngrams import ban_repeated_ngrams_, no_repeat_ngram

VOCAB = 6


def _peer(row: Tensor, n: int) -> Tensor:
    """What Hugging Face bans after the real tokens of one row."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.NoRepeatNGramLogitsProcessor(n)
    return processor(row[None].long(), torch.zeros(1, VOCAB))[0] == -math.inf


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(0, VOCAB + 1), max_size=14), min_size=1, max_size=4),
    n=st.integers(1, 4),
    side=st.sampled_from(["left", "right", "both", "lengths"]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_bans_what_hugging_face_bans_in_each_row_without_its_padding(
    rows: list[list[int]], n: int, side: str, dtype: torch.dtype
) -> None:
    """A small vocabulary, so that rows repeat themselves; ids past it are in the rows too."""
    width = max(map(len, rows)) + 3
    ids = torch.full((len(rows), width), 1, dtype=dtype)  # padding that looks like a token
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        start = {"left": width - len(row), "both": 2}.get(side, 0)
        ids[index, start : start + len(row)] = torch.tensor(row, dtype=dtype)
        mask[index, start : start + len(row)] = True
    real: dict[str, Any] = {"mask": mask}
    if side == "lengths":
        real = {"lengths": mask.sum(1)}
    banned = no_repeat_ngram(ids, n, VOCAB, **real)
    expected = torch.stack([_peer(torch.tensor(row, dtype=dtype), n) for row in rows])
    assert banned.is_contiguous() and torch.equal(banned, expected)

    logits = torch.randn(len(rows), 2 * VOCAB)[:, ::2].bfloat16()  # rows and tokens with strides
    after = logits.clone()
    assert ban_repeated_ngrams_(after, ids, n, **real) is after
    assert torch.equal(after, logits.masked_fill(expected, -math.inf))


@pytest.mark.parametrize("n", [1, 2, 3, 20])
def test_rows_without_padding_need_no_mask(n: int) -> None:
    ids = torch.randint(0, 3, (5, 19), generator=torch.Generator().manual_seed(n))
    expected = torch.stack([_peer(row, n) for row in ids])
    assert torch.equal(no_repeat_ngram(ids, n, VOCAB), expected)
    assert bool(expected.any()) == (n < 20)
    whole = torch.ones_like(ids, dtype=torch.bool)
    assert torch.equal(no_repeat_ngram(ids, n, VOCAB, mask=whole), expected)


def test_an_ngram_does_not_reach_over_a_gap() -> None:
    ids = torch.tensor([[1, 2, 0, 3, 1, 2]])
    gap = torch.tensor([[True, True, False, True, True, True]])
    assert no_repeat_ngram(ids, 3, VOCAB, mask=gap).sum() == 0  # 1 2 0 holds the gap
    assert no_repeat_ngram(ids, 3, VOCAB)[0].nonzero().tolist() == [[0]]
    ends = torch.tensor([[True, True, True, True, False, True]])
    assert no_repeat_ngram(ids, 3, VOCAB, mask=ends).sum() == 0  # so does the end of the row


def test_bans_in_place_leave_errors_and_beat_infinity() -> None:
    ids = torch.tensor([[0, 1, 2]])
    logits = torch.tensor([[math.inf, math.nan, 1.0, 2.0]])
    ban_repeated_ngrams_(logits, ids, 1)
    assert logits[0, 0] == -math.inf and logits[0, 1].isnan()
    assert logits[0, 2:].tolist() == [-math.inf, 2.0]


def test_compiles_in_one_graph() -> None:
    ids = torch.randint(0, VOCAB, (3, 30))
    lengths = torch.tensor([0, 17, 30])
    compiled = torch.compile(no_repeat_ngram, fullgraph=True, backend="eager")
    expected = no_repeat_ngram(ids, 2, VOCAB, lengths=lengths)
    assert torch.equal(compiled(ids, 2, VOCAB, lengths=lengths), expected)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"n": 0}, ValueError, "n must be at least 1, got 0"),
        ({"n": 2.0}, TypeError, "n must be an int, got 2.0"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ({"input_ids": torch.zeros(3)}, ValueError, r"input_ids must have shape \(batch, length\)"),
        ({"input_ids": torch.zeros(2, 3)}, TypeError, "input_ids must be int32 or int64"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool"),
        ({"mask": torch.ones(2, 4) > 0}, ValueError, r"mask must have shape \(2, 3\)"),
        ({"lengths": torch.tensor([1, 4])}, ValueError, r"lengths must lie in 0\.\.3, got 1\.\.4"),
        (
            {"lengths": torch.tensor([1, 3]), "mask": torch.ones(2, 3) > 0},
            ValueError,
            "lengths must be None where a mask is given",
        ),
    ],
)
def test_bad_arguments_are_named(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(error, match=message):
        no_repeat_ngram(**{"input_ids": ids, "n": 2, "vocab_size": VOCAB, **kwargs})


def test_logits_of_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="input_ids must have the 4 rows of logits"):
        ban_repeated_ngrams_(torch.zeros(4, VOCAB), torch.zeros(2, 3, dtype=torch.int64), 2)
