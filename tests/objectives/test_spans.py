"""T5's span corruption: invertible, and spans as the paper's code draws them."""

import collections
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.objectives import noise_spans, shift_right, span_corruption

FIRST = 199  # <extra_id_0>


def restored(inputs: list[int], targets: list[int]) -> list[int]:
    """The text, from what is left of it and from what was taken out: plain Python."""
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token > FIRST - 100:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    text: list[int] = []
    for token in inputs:
        text.extend(spans[token] if token > FIRST - 100 else [token])
    return text


@given(data=st.data(), seqlen=st.integers(0, 60), batch=st.integers(0, 4))
@settings(max_examples=150, deadline=None)
def test_is_invertible(data: st.DataObject, seqlen: int, batch: int) -> None:
    lengths = data.draw(st.lists(st.integers(0, seqlen), min_size=batch, max_size=batch))
    ids = torch.randint(2, 90, (batch, seqlen))
    eos, final = data.draw(st.sampled_from([1, None])), data.draw(st.booleans())
    rate, mean_span = data.draw(st.floats(0, 1)), data.draw(st.floats(1, 10))
    noise = torch.rand(batch, seqlen) < rate if data.draw(st.booleans()) else None
    out = span_corruption(
        ids, first_sentinel=FIRST, lengths=torch.tensor(lengths, dtype=torch.int64), rate=rate,
        mean_span=mean_span, noise=noise, eos_token=eos, final_sentinel=final,
        seed=data.draw(st.integers(0, 99)),
    )  # fmt: skip
    assert out.input_ids.shape == (batch, max(out.input_lengths.tolist(), default=0))
    assert out.labels.shape == (batch, max(out.label_lengths.tolist(), default=0))
    for row in range(batch):
        inputs = out.input_ids[row, : out.input_lengths[row]].tolist()
        targets = out.labels[row, : out.label_lengths[row]].tolist()
        assert (out.input_ids[row, out.input_lengths[row] :] == 0).all()
        assert (out.labels[row, out.label_lengths[row] :] == -100).all()
        if eos is not None:
            assert inputs.pop() == targets.pop() == eos
        sentinels = [token for token in targets if token > FIRST - 100]
        assert sentinels == list(range(FIRST, FIRST - len(sentinels), -1))
        if final:
            assert targets.pop() == FIRST - len(sentinels) + 1
            sentinels.pop()
        assert [token for token in inputs if token > FIRST - 100] == sentinels
        assert restored(inputs, targets) == ids[row, : lengths[row]].tolist()
        assert out.noise[row].sum() == len(targets) - len(sentinels)


@given(length=st.integers(0, 300), rate=st.floats(0, 1), mean=st.floats(1, 20))
@settings(max_examples=150, deadline=None)
def test_amount_of_noise(length: int, rate: float, mean: float) -> None:
    lengths = torch.tensor([length, length // 2])
    for n, row in zip(
        lengths.tolist(), noise_spans(lengths, 300, rate=rate, mean_span=mean, seed=3), strict=True
    ):
        noise = max(min(max(round(n * rate), 1), n - 1), 0)
        assert row.sum() == noise and not row[n:].any() and not row[:1].any()
        spans = min(max(round(noise / mean), 1), noise, n - noise) if n > 1 else 0
        runs = [taken for taken, _ in itertools.groupby(row.tolist()) if taken]
        assert len(runs) == spans


def statement(n: int, noise: int, spans: int) -> set[tuple[bool, ...]]:
    """Every mask that T5's segmentation can draw, all equally likely: plain Python."""

    def pieces(items: int) -> list[tuple[int, ...]]:
        cuts = itertools.combinations(range(1, items), spans - 1)
        return [tuple(map(int.__sub__, (*cut, items), (0, *cut))) for cut in cuts]

    masks = set()
    for kept, taken in itertools.product(pieces(n - noise), pieces(noise)):
        mask: list[bool] = []
        for text, span in zip(kept, taken, strict=True):
            mask += [False] * text + [True] * span
        masks.add(tuple(mask))
    return masks


@pytest.mark.parametrize(("n", "rate", "mean", "spans"), [(10, 0.4, 2.0, 2), (13, 0.31, 1.5, 3)])
def test_distribution_of_spans(n: int, rate: float, mean: float, spans: int) -> None:
    rows = 30_000
    drawn = noise_spans(torch.full((rows,), n), n + 2, rate=rate, mean_span=mean, seed=1)[:, :n]
    counts = collections.Counter(map(tuple, drawn.tolist()))
    masks = statement(n, round(n * rate), spans)
    assert set(counts) == masks  # each appears in 30,000 rows, and no other
    expected = rows / len(masks)
    chi_square = sum((counts[mask] - expected) ** 2 / expected for mask in masks)
    freedom = len(masks) - 1
    assert abs(chi_square - freedom) <= 6 * math.sqrt(2 * freedom)


def test_the_example_of_the_paper() -> None:
    text = torch.arange(2, 12)[None]  # Thank you for inviting me to your party last week
    noise = torch.zeros(1, 10, dtype=torch.bool)
    noise[0, [2, 3, 8]] = True
    out = span_corruption(text, first_sentinel=FIRST, noise=noise, final_sentinel=True)
    assert out.input_ids.tolist() == [[2, 3, FIRST, 6, 7, 8, 9, FIRST - 1, 11, 1]]
    assert out.labels.tolist() == [[FIRST, 4, 5, FIRST - 1, 10, FIRST - 2, 1]]


def test_rows_do_not_depend_on_their_padding() -> None:
    ids = torch.randint(2, 90, (2, 50))
    lengths = torch.tensor([31, 50])
    out = span_corruption(ids, first_sentinel=FIRST, lengths=lengths, seed=8)
    alone = span_corruption(ids[:1, :31], first_sentinel=FIRST, seed=8)
    assert torch.equal(out.noise[:1, :31], alone.noise)
    assert torch.equal(out.input_ids[:1, : out.input_lengths[0]], alone.input_ids)


def test_shift_right() -> None:
    labels = torch.tensor([[5, 6, 1], [7, 1, -100], [1, -100, -100]])
    assert shift_right(labels, 0).tolist() == [[0, 5, 6], [0, 7, 1], [0, 1, 0]]
    assert shift_right(labels, 9, 3).tolist() == [[9, 5, 6], [9, 7, 1], [9, 1, 3]]
    assert shift_right(labels[:, :0], 0).shape == (3, 0)


IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"input_ids": IDS + 150}, ValueError, r"input_ids must not hold sentinels, 100\.\.199"),
        ({"first_sentinel": 3, "num_sentinels": 5}, ValueError, r"first_sentinel must be at least"),
        ({"num_sentinels": 0}, ValueError, r"num_sentinels must be at least 1, got 0"),
        (
            {"num_sentinels": 1, "noise": torch.tensor([[True, False, True, False]])},
            ValueError,
            r"num_sentinels must be at least the spans of the longest row, 2, got 1",
        ),
        ({"noise": IDS}, ValueError, r"noise must be bool \(1, 4\)"),
        ({"lengths": torch.tensor([5])}, ValueError, r"lengths must lie in 0\.\.4, got 5"),
        ({"rate": -0.1}, ValueError, r"rate must be in \[0, 1\], got -0.1"),
        ({"mean_span": 0.5}, ValueError, r"mean_span must be a number of at least 1, got 0.5"),
        ({"eos_token": -1}, ValueError, r"eos_token must be at least 0, got -1"),
        ({"final_sentinel": None}, TypeError, r"final_sentinel must be True or False, got None"),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], words: str) -> None:
    arguments = {"input_ids": IDS, "first_sentinel": FIRST, "seed": 0, **changes}
    with pytest.raises(error, match=words):
        span_corruption(arguments.pop("input_ids"), **arguments)
