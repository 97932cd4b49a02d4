"""Next-sentence and sentence-order pairs: what the segments are, and how they are laid out."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.objectives import Documents, next_sentence_pairs, sentence_order_pairs

CLS, SEP, PAD = 1, 2, 0
AROUND = {"cls_token": CLS, "sep_token": SEP, "pad_token": PAD}


def library(count: int, seed: int) -> list[list[list[int]]]:
    """Documents whose tokens are all different, so that a token says where it is from."""
    draw = random.Random(seed)
    token = iter(range(10, 10**6))
    sizes = [[draw.randint(1, 8) for _ in range(draw.randint(1, 6))] for _ in range(count)]
    sizes[0] = [3, 4, *sizes[0]]
    return [[[next(token) for _ in range(size)] for size in document] for document in sizes]


def taken_apart(ids: list[int], types: list[int], length: int) -> tuple[list[int], list[int]]:
    """Both segments, once the layout has been checked."""
    assert ids[0] == CLS and ids[length - 1] == SEP
    assert all(token == PAD for token in ids[length:])
    middle = ids.index(SEP)
    assert types == [0] * (middle + 1) + [1] * (length - middle - 1) + [0] * (len(ids) - length)
    return ids[1:middle], ids[middle + 1 : length - 1]


@given(
    seed=st.integers(0, 999), max_seqlen=st.integers(5, 60), short=st.sampled_from([0.0, 0.5, 1.0]),
    order=st.booleans(),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_segments(seed: int, max_seqlen: int, short: float, order: bool) -> None:
    nested = library(4, seed)
    make = sentence_order_pairs if order else next_sentence_pairs
    pairs = make(
        Documents.of(nested), 12, max_seqlen=max_seqlen, short_share=short, seed=seed, **AROUND
    )
    assert pairs.input_ids.shape == (12, max_seqlen)
    sentences = [sentence for document in nested for sentence in document]
    firsts = {sentence[0]: i for i, sentence in enumerate(sentences)}
    document_of = {t: d for d, doc in enumerate(nested) for sentence in doc for t in sentence}
    for ids, types, length, label in zip(*(part.tolist() for part in pairs), strict=True):
        a, b = taken_apart(ids, types, length)
        # Runs of a text, from the beginning of a sentence on.
        for segment in (a, b):
            assert segment == list(range(segment[0], segment[0] + len(segment)))
            assert segment[0] in firsts
            assert len({document_of[token] for token in segment}) == 1
        same = document_of[a[0]] == document_of[b[0]]
        if order:
            a, b = (b, a) if label else (a, b)
            assert same and a[0] < b[0]
        else:
            assert same == (label == 0)
        if label == 0 or order:
            # B is the next sentence after A, or after what was cut off A's end.
            assert firsts[b[0]] > firsts[a[0]]
            if length < max_seqlen:
                assert b[0] == a[-1] + 1
        if length < max_seqlen:  # nothing was cut: segments end with a sentence
            assert a[-1] + 1 in firsts or a[-1] == sentences[-1][-1]
            assert b[-1] + 1 in firsts or b[-1] == sentences[-1][-1]


def test_as_much_as_fits_is_taken() -> None:
    documents = Documents.of([[[10, 11], [12], [13, 14], [15]], [[20]]])
    pairs = sentence_order_pairs(
        documents, starts=torch.tensor([0] * 50), max_seqlen=8, short_share=0.0,
        swapped_share=0.0, seed=1, **AROUND,
    )  # fmt: skip
    rows = {tuple(row) for row in pairs.input_ids.tolist()}
    # Five tokens of the four sentences fit, cut in two behind the first or the second of three.
    assert rows == {(1, 10, 11, 2, 12, 13, 14, 2), (1, 10, 11, 12, 2, 13, 14, 2)}


@pytest.mark.parametrize(
    ("sizes", "room", "kept"),
    [((10, 2), 8, (6, 2)), ((2, 10), 8, (2, 6)), ((9, 9), 8, (4, 4)), ((9, 9), 7, (4, 3)),
     ((3, 9), 7, (3, 4)), ((9, 3), 7, (4, 3)), ((1, 1), 8, (1, 1))],
)  # fmt: skip
def test_the_longer_segment_is_cut_first(sizes: tuple, room: int, kept: tuple) -> None:
    a, b = [list(range(base, base + size)) for base, size in zip((10, 50), sizes, strict=True)]
    pairs = sentence_order_pairs(
        Documents.of([[a, b]]), 1, max_seqlen=room + 3, swapped_share=0.0, **AROUND
    )
    found = taken_apart(
        pairs.input_ids[0].tolist(), pairs.token_types[0].tolist(), int(pairs.lengths)
    )
    assert found == (a[: kept[0]], b[: kept[1]])
    # From the definition: a token at a time, from the longer one, from B where both are equal.
    size_a, size_b = sizes
    while size_a + size_b > room:
        size_a, size_b = (size_a - 1, size_b) if size_a > size_b else (size_a, size_b - 1)
    assert kept == (size_a, size_b)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
def test_shares_are_binomial(share: float) -> None:
    documents = Documents.of(library(6, 1))
    count = 5000
    bound = 6 * math.sqrt(count * share * (1 - share))
    nsp = next_sentence_pairs(documents, count, random_share=share, max_seqlen=16, seed=1, **AROUND)
    assert abs(nsp.labels.sum() - share * count) <= bound
    sop = sentence_order_pairs(
        documents, count, swapped_share=share, max_seqlen=16, seed=1, **AROUND
    )
    assert abs(sop.labels.sum() - share * count) <= bound


def test_other_documents_and_their_sentences_are_equally_likely() -> None:
    nested = [[[10], [11]], [[20], [21], [22]], [[30]], [[40], [41]]]
    count = 12_000
    pairs = next_sentence_pairs(
        Documents.of(nested), starts=torch.zeros(count, dtype=torch.int64), random_share=1.0,
        max_seqlen=5, seed=3, **AROUND,
    )  # fmt: skip
    second = torch.bincount(pairs.input_ids[:, 3], minlength=50)
    for document in nested[1:]:
        for (token,) in document:
            chance = 1 / 3 / len(document)
            deviation = math.sqrt(count * chance * (1 - chance))
            assert abs(second[token] - chance * count) <= 6 * deviation
    assert second.sum() == count and second[10:12].sum() == 0


def test_a_seed_fixes_the_result() -> None:
    documents = Documents.of(library(5, 2))
    for make in (next_sentence_pairs, sentence_order_pairs):
        one, same, other = (make(documents, 20, seed=seed, **AROUND) for seed in (1, 1, 2))
        assert all(map(torch.equal, one, same))
        assert not torch.equal(one.input_ids, other.input_ids)


DOCUMENTS = Documents.of([[[5], [6]], [[7]]])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"documents": [[[5]]]}, TypeError, r"documents must be Documents, got list"),
        ({"documents": Documents.of([[[5], [6]]])}, ValueError, r"documents must be at least two"),
        ({"documents": Documents.of([[[5]], [[6]]])}, ValueError, r"one of at least two sentences"),
        ({"num_pairs": None}, ValueError, r"num_pairs or starts must be given, and not both"),
        ({"num_pairs": -1}, ValueError, r"num_pairs must be at least 0, got -1"),
        ({"max_seqlen": 4}, ValueError, r"max_seqlen must be at least 5, got 4"),
        ({"random_share": 2}, ValueError, r"random_share must be in \[0, 1\], got 2"),
        ({"cls_token": None}, TypeError, r"cls_token must be an int, got None"),
        (
            {"num_pairs": None, "starts": torch.tensor([0, 1])},
            ValueError,
            r"starts must be sentences that another of their document follows, got 1",
        ),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], words: str) -> None:
    arguments = {"documents": DOCUMENTS, "num_pairs": 2, "seed": 0, **AROUND, **changes}
    with pytest.raises(error, match=words):
        next_sentence_pairs(**arguments)


def test_bad_documents() -> None:
    with pytest.raises(ValueError, match=r"documents\[1\] must have sentences .* no sentences"):
        Documents.of([[[1]], []])
    with pytest.raises(ValueError, match=r"documents\[0\] must have .* got an empty sentence"):
        Documents.of([[[1], []]])
    tokens = torch.arange(4)
    with pytest.raises(ValueError, match=r"sentences must end at .* 4, got 3"):
        Documents(tokens, torch.tensor([0, 3]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"documents must not be empty"):
        Documents(tokens, torch.tensor([0, 4]), torch.tensor([0, 0, 1]))
