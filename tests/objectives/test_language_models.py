"""Causal, prefix and permutation language models: labels, and who may see whom."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from fastattn.objectives import causal_lm, noise_spans, permutation_lm, prefix_lm

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def test_causal_labels() -> None:
    assert causal_lm(IDS).tolist() == [[6, 7, 8, -100], [10, 11, 12, -100]]
    lengths = torch.tensor([2, 0])
    assert causal_lm(IDS, lengths=lengths).tolist() == [[6, -100, -100, -100], [-100] * 4]
    assert causal_lm(IDS, lengths=lengths, shift=False).tolist() == [
        [-100, 6, -100, -100],
        [-100] * 4,
    ]
    packed = causal_lm(IDS[:1], cu_seqlens=torch.tensor([0, 1, 1, 4]))
    assert packed.tolist() == [[-100, 7, 8, -100]]
    unshifted = causal_lm(IDS[:1], cu_seqlens=torch.tensor([0, 1, 4]), shift=False)
    assert unshifted.tolist() == [[-100, -100, 7, 8]]
    assert causal_lm(IDS[:, :0]).shape == (2, 0)


def test_causal_labels_are_what_transformers_shifts_to() -> None:
    loss = pytest.importorskip("transformers.loss.loss_utils").ForCausalLMLoss
    logits = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([4, 3])
    theirs = loss(logits, causal_lm(IDS, lengths=lengths, shift=False), vocab_size=20)
    ours = fastattn_loss(logits, causal_lm(IDS, lengths=lengths))
    assert theirs.item() == ours.item()


def fastattn_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@given(seqlen=st.integers(0, 12), batch=st.integers(0, 3), data=st.data())
@settings(max_examples=80, deadline=None)
def test_prefix_lm(seqlen: int, batch: int, data: st.DataObject) -> None:
    ids = torch.randint(1, 50, (batch, seqlen))
    ends = data.draw(st.lists(st.integers(0, seqlen), min_size=batch, max_size=batch))
    prefixes = data.draw(
        st.one_of(st.none(), st.lists(st.integers(0, seqlen), min_size=batch, max_size=batch))
    )
    given_prefixes = None if prefixes is None else torch.tensor(prefixes, dtype=torch.int64)
    out = prefix_lm(
        ids, prefix_lengths=given_prefixes, lengths=torch.tensor(ends, dtype=torch.int64), seed=4
    )
    visible = out.mask.dense(seqlen, seqlen).expand(batch, 1, -1, -1)[:, 0]
    assert torch.equal(out.loss_mask, out.labels != -100)
    for row in range(batch):
        prefix, end = int(out.prefix_lengths[row]), ends[row]
        if prefixes is None:
            assert prefix == end if end < 2 else 1 <= prefix < end
        for i, j in itertools.product(range(seqlen), range(seqlen)):
            assert bool(visible[row, i, j]) == (i < end and j < end and (j < prefix or j <= i))
        for i in range(seqlen):
            predicts = max(prefix, 1) <= i + 1 < end
            assert out.labels[row, i] == (ids[row, i + 1] if predicts else -100)


def test_prefixes_are_equally_likely() -> None:
    rows = 12_000
    drawn = prefix_lm(torch.ones(rows, 7, dtype=torch.int64), seed=1).prefix_lengths
    counts = torch.bincount(drawn, minlength=8)
    assert counts[0] == counts[7] == 0
    assert (abs(counts[1:7] - rows / 6) <= 6 * math.sqrt(rows * 5 / 36)).all()


def test_prefix_mask_runs() -> None:
    out = prefix_lm(IDS, prefix_lengths=torch.tensor([2, 1]), lengths=torch.tensor([4, 3]))
    q, k, v = torch.randn(3, 2, 4, 2, 8, generator=torch.Generator().manual_seed(0))
    got = fastattn.attention(q, k, v, mask=out.mask)
    assert torch.isfinite(got).all() and (got[1, 3] == 0).all()


@given(seqlen=st.integers(0, 10), batch=st.integers(0, 3), data=st.data())
@settings(max_examples=80, deadline=None)
def test_permutation_lm(seqlen: int, batch: int, data: st.DataObject) -> None:
    ids = torch.randint(0, 50, (batch, seqlen))
    ends = data.draw(st.lists(st.integers(0, seqlen), min_size=batch, max_size=batch))
    rate = data.draw(st.sampled_from([0.0, 1 / 6, 0.5, 1.0]))
    special = list(range(10))
    out = permutation_lm(
        ids, lengths=torch.tensor(ends, dtype=torch.int64), rate=rate, special_tokens=special,
        seed=data.draw(st.integers(0, 99)),
    )  # fmt: skip
    assert out.content_mask.shape == out.query_mask.shape == (batch, 1, seqlen, seqlen)
    for row in range(batch):
        order = out.order[row].tolist()
        candidates = [i for i in range(ends[row]) if int(ids[row, i]) not in special]
        targets = [i for i in range(seqlen) if order[i] > 0]
        assert set(targets) <= set(candidates)
        wanted = max(round(len(candidates) * rate), 1) if candidates else 0
        assert sorted(order[i] for i in targets) == list(range(1, wanted + 1))
        assert order[ends[row] :] == [-1] * (seqlen - ends[row])
        for i in range(seqlen):
            assert out.labels[row, i] == (ids[row, i] if i in targets else -100)
        for i, j in itertools.product(range(seqlen), range(seqlen)):
            real = i < ends[row] and j < ends[row]
            context = j < ends[row] and j not in targets
            before = i in targets and j in targets and order[j] < order[i]
            assert bool(out.query_mask[row, 0, i, j]) == (real and (context or before))
            content = real and (context or before or i == j)
            assert bool(out.content_mask[row, 0, i, j]) == content


def test_permutation_masks_are_those_of_transformers_collator() -> None:
    """The formula of DataCollatorForPermutationLanguageModeling, from an order and targets."""
    ids = torch.arange(20).reshape(2, 10)
    targets = noise_spans(torch.tensor([10, 10]), 10, rate=0.4, seed=1)
    out = permutation_lm(ids, targets=targets, seed=3)
    assert torch.equal(out.order > 0, targets)
    for row in range(2):
        # There: context has index -1, and i may not attend j where perm[i] <= perm[j] of a target.
        perm = torch.where(targets[row], out.order[row], -1)
        hidden = (perm[:, None] <= perm[None, :]) & targets[row][None, :]
        assert torch.equal(~hidden, out.query_mask[row, 0])


def test_orders_are_equally_likely() -> None:
    rows = 12_000
    order = permutation_lm(torch.ones(rows, 3, dtype=torch.int64), rate=1.0, seed=2).order
    for permutation in itertools.permutations((1, 2, 3)):
        count = (order == torch.tensor(permutation)).all(1).sum()
        assert abs(count - rows / 6) <= 6 * math.sqrt(rows * 5 / 36)
    one = permutation_lm(torch.ones(rows, 3, dtype=torch.int64), rate=0.3, seed=2).order
    counts = (one == 1).sum(0)
    assert counts.sum() == rows
    assert (abs(counts - rows / 3) <= 6 * math.sqrt(rows * 2 / 9)).all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: causal_lm(IDS, shift=1), TypeError, r"shift must be True or False, got 1"),
        (
            lambda: causal_lm(IDS, cu_seqlens=torch.tensor([0, 8])),
            ValueError,
            r"cu_seqlens goes with input_ids of one row and without lengths, got 2 rows",
        ),
        (
            lambda: causal_lm(IDS[:1], cu_seqlens=torch.tensor([0, 3])),
            ValueError,
            r"cu_seqlens must end at the number of packed rows, 4, got 3",
        ),
        (
            lambda: prefix_lm(IDS, prefix_lengths=torch.tensor([5, 1])),
            ValueError,
            r"prefix_lengths must lie in 0\.\.4, got 1\.\.5",
        ),
        (
            lambda: permutation_lm(IDS, targets=IDS),
            ValueError,
            r"targets must be bool \(2, 4\) on cpu like input_ids, got \(2, 4\) int64",
        ),
        (lambda: permutation_lm(IDS, rate=7), ValueError, r"rate must be in \[0, 1\], got 7"),
        (
            lambda: permutation_lm(IDS, special_tokens=[1.5]),
            TypeError,
            r"special_tokens\[0\] must be an int, got 1.5",
        ),
    ],
)
def test_bad_arguments(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
