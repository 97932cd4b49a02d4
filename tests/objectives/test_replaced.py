"""Replaced-token detection, and the losses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.objectives import masked_lm, replaced_token_loss, replaced_tokens, token_loss
from fastattn.testing import assert_parity

VOCAB = 12


@given(batch=st.integers(0, 3), seqlen=st.integers(0, 12), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_labels_say_what_differs(batch: int, seqlen: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (batch, seqlen), generator=generator)
    lengths = torch.tensor([(5 * row + seed) % (seqlen + 1) for row in range(batch)]).long()
    masked = masked_lm(ids, mask_token=0, vocab_size=VOCAB, lengths=lengths, rate=0.5, seed=seed)
    logits = torch.randn(batch, seqlen, VOCAB, generator=generator)
    out = replaced_tokens(*masked, logits, lengths=lengths, seed=seed)
    selected = masked.labels != -100
    real = torch.arange(seqlen) < lengths[:, None]
    # Whatever was masked, random or kept is filled by the generator; the rest is the text.
    assert torch.equal(out.input_ids[~selected], ids[~selected])
    assert torch.equal(out.labels[real], (out.input_ids != ids)[real].long())
    assert (out.labels[~real] == -100).all()
    again = replaced_tokens(*masked, logits[selected], lengths=lengths, seed=seed)
    assert all(map(torch.equal, out, again))


def test_tokens_are_drawn_from_the_generators_softmax() -> None:
    rows = 12_000
    ids, labels = torch.zeros(rows, 1, dtype=torch.int64), torch.full((rows, 1), 3)
    one = torch.randn(1, 1, VOCAB, generator=torch.Generator().manual_seed(1))
    for temperature in (1.0, 0.5):
        out = replaced_tokens(
            ids, labels, one.expand(rows, 1, VOCAB), temperature=temperature, seed=7
        )
        counts = torch.bincount(out.input_ids[:, 0], minlength=VOCAB)
        expected = (one[0, 0].double() / temperature).softmax(0) * rows
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi_square - (VOCAB - 1)) <= 6 * math.sqrt(2 * (VOCAB - 1))
        assert out.labels.sum() == rows - counts[3]  # right by chance is original
    greedy = replaced_tokens(ids[:5], labels[:5], one.expand(5, 1, VOCAB), temperature=0.0)
    assert (greedy.input_ids == one.argmax()).all()


def test_no_gradient_flows_to_the_generator() -> None:
    logits = torch.randn(1, 2, VOCAB, requires_grad=True)
    out = replaced_tokens(torch.tensor([[1, 2]]), torch.tensor([[1, -100]]), logits, seed=1)
    assert not out.input_ids.requires_grad and out.labels[0, 1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_loss(dtype: torch.dtype, reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, VOCAB, generator=generator).to(dtype)
    labels = torch.randint(0, VOCAB, (3, 7), generator=generator)
    labels[torch.rand(3, 7, generator=generator) < 0.6] = -100
    results = []
    for wide in (torch.float32, torch.float64):
        log_probabilities = logits.to(wide).log_softmax(-1)
        each = -log_probabilities[labels != -100, labels[labels != -100]]
        results.append(each if reduction == "none" else getattr(each, reduction)())
    actual = token_loss(logits, labels, reduction=reduction)
    assert actual.dtype == torch.float32
    assert_parity(actual, *results)
    assert token_loss(logits.double(), labels).dtype == torch.float64


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_replaced_token_loss(reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, generator=generator)
    labels = torch.randint(-1, 2, (3, 7), generator=generator)
    labels[labels < 0] = -100
    results = []
    for wide in (torch.float32, torch.float64):
        x = logits.to(wide)
        probability = torch.where(labels == 1, x.sigmoid(), (-x).sigmoid())
        each = -probability[labels != -100].log()
        results.append(each if reduction == "none" else getattr(each, reduction)())
    assert_parity(replaced_token_loss(logits, labels, reduction=reduction), *results)


def test_without_labels_the_loss_is_zero_with_a_gradient_of_zero() -> None:
    for loss, shape in ((token_loss, (2, 3, VOCAB)), (replaced_token_loss, (2, 3))):
        logits = torch.randn(shape, requires_grad=True)
        value = loss(logits, torch.full((2, 3), -100))
        value.backward()
        assert value == 0 and logits.grad is not None and (logits.grad == 0).all()


IDS, LABELS, LOGITS = torch.ones(1, 2).long(), torch.tensor([[1, -100]]), torch.zeros(1, 2, VOCAB)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: replaced_tokens(IDS, LABELS.int(), LOGITS), r"labels must be int64 \(1, 2\), got"),
        (lambda: replaced_tokens(IDS, LABELS, LOGITS[0, 0]), r"generator_logits must be floating"),
        (lambda: replaced_tokens(IDS, LABELS, LOGITS[0]), r"generator_logits must be \(1, 'vocab"),
        (lambda: replaced_tokens(IDS, LABELS, LOGITS * math.nan), r"generator_logits .* -inf"),
        (lambda: replaced_tokens(IDS, LABELS, LOGITS, temperature=-1), r"temperature must be"),
        (lambda: token_loss(LOGITS, IDS[0]), r"labels must be int64 \(1, 2\) for logits"),
        (lambda: token_loss(LOGITS, IDS + VOCAB), r"labels must be -100 or in 0\.\.11, got 13"),
        (lambda: token_loss(LOGITS, IDS, reduction="max"), r"reduction must be one of"),
        (lambda: replaced_token_loss(LOGITS, IDS), r"labels must be int64 \(1, 2, 12\)"),
    ],
)
def test_bad_arguments(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
