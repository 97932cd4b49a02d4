"""What the encoders' heads do beyond transformers' logits: spans, chosen tokens, padding, names."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.models.checkpoint import CheckpointError
from fastattn.models.encoder import FAMILIES, build
from fastattn.models.encoder_heads import (
    MaskedLM,
    NextSentence,
    QuestionAnswering,
    ReplacedTokens,
    SequenceClassifier,
    best_span,
)
from fastattn.models.layers import initialize
from tests.models.encoder_cases import SMALL

IDS = torch.randint(1, 37, (4, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(9) < torch.tensor([9, 1, 6, 4])[:, None]


def small(head, **options):
    torch.manual_seed(0)
    return initialize(head(replace(SMALL, **options)), std=0.4).eval()


def brute_force(start, end, mask, max_length):
    """The same by its definition: every pair of places of one row, in float64."""
    allowed = [place for place in range(len(start)) if mask[place]]
    if not allowed:
        return -1, -1, 0.0
    sums = [sum(math.exp(float(x[i])) for i in allowed) for x in (start, end)]
    best = (-1, -1, 0.0)
    for first in allowed:
        for last in allowed:
            if first <= last < first + max_length:
                p = math.exp(float(start[first])) / sums[0] * math.exp(float(end[last])) / sums[1]
                if p > best[2]:
                    best = (first, last, p)
    return best


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), seqlen=st.integers(1, 12), max_length=st.integers(1, 14))
def test_best_span_by_its_definition(seed, seqlen, max_length):
    generator = torch.Generator().manual_seed(seed)
    start, end = 3 * torch.randn(2, 3, seqlen, generator=generator)
    mask = torch.rand(3, seqlen, generator=generator) < 0.7
    span = best_span(start, end, mask, max_length)
    for row in range(3):
        first, last, probability = brute_force(start[row], end[row], mask[row], max_length)
        assert (span.start[row], span.end[row]) == (first, last)
        assert span.probability[row] == pytest.approx(probability, rel=1e-5)


def test_best_span_is_valid_where_the_best_ends_are_not():
    """The likeliest end lies before the likeliest start."""
    start = torch.tensor([[-0.5, 1.0, 5.0, 0.0]])
    end = torch.tensor([[6.0, 2.0, 0.0, 1.0]])
    free = best_span(start, end)
    assert (free.start.item(), free.end.item()) == (2, 3)
    short = best_span(start, end, max_length=1)
    assert (short.start.item(), short.end.item()) == (0, 0)
    total = start.softmax(-1)[0, 2] * end.softmax(-1)[0, 3]
    torch.testing.assert_close(free.probability, total[None])


def test_best_span_of_equal_ones_is_the_first_and_shortest():
    zeros = torch.zeros(2, 5)
    mask = torch.tensor([[True] * 5, [False, False, True, True, False]])
    span = best_span(zeros, zeros, mask)
    assert span.start.tolist() == span.end.tolist() == [0, 2]
    torch.testing.assert_close(span.probability, torch.tensor([1 / 25, 1 / 4]))


def test_best_span_of_a_model_never_lies_in_padding():
    model = small(QuestionAnswering)
    with torch.no_grad():
        start, end = model(IDS, MASK)
        assert start[~MASK].eq(-torch.inf).all() and end[~MASK].eq(-torch.inf).all()
        span = model.best_span(start, end)
    lengths = MASK.sum(1)
    assert (span.start >= 0).all() and (span.start <= span.end).all()
    assert (span.end < lengths).all()
    assert span.probability[1] == 1  # a row of one token
    nothing = best_span(start, end, torch.zeros_like(MASK))
    assert nothing.start.tolist() == nothing.end.tolist() == [-1] * 4
    assert nothing.probability.tolist() == [0.0] * 4


def test_span_logits_train():
    """-inf at padding is no score, and has no gradient."""
    model = small(QuestionAnswering)
    start, end = model(IDS, MASK)
    last = MASK.sum(1) - 1
    loss = sum(torch.nn.functional.cross_entropy(logits, last) for logits in (start, end))
    loss.backward()
    assert loss.isfinite()
    assert all(
        parameter.grad.isfinite().all()
        for parameter in model.parameters()
        if parameter.grad is not None
    )
    assert model.span.weight.grad.any()


def test_only_selected_tokens_are_decoded():
    model = small(MaskedLM)
    select = MASK & (torch.arange(9) % 2 == 0)
    rows = []
    model.tokens.dense.register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))
    with torch.no_grad():
        every = model(IDS, MASK)
        chosen = model(IDS, MASK, select=select)
        without_padding = model(IDS, select=select)
    assert chosen.shape == (int(select.sum()), 37)
    torch.testing.assert_close(chosen, every[select])
    assert without_padding.shape == chosen.shape
    assert rows == [int(MASK.sum()), int(select.sum()), int(select.sum())]
    loss = torch.nn.functional.cross_entropy(model(IDS, MASK, select=select), IDS[select])
    loss.backward()
    assert model.encoder.embeddings.word.weight.grad.any()


def test_logits_are_0_at_padding():
    for architecture in ("BertForMaskedLM", "BertForTokenClassification"):
        logits = initialize(build(SMALL, architecture), std=0.4).eval()(IDS, MASK)
        assert not logits[~MASK].any()
        assert logits[MASK].any(-1).all()
    logits = small(ReplacedTokens, model_type="electra", pooler=False)(IDS, MASK)
    assert logits.shape == IDS.shape
    assert not logits[~MASK].any()
    assert logits[MASK].all()


def test_a_tied_decoder_is_the_table_of_embeddings():
    tied, own = small(MaskedLM), small(MaskedLM, tied=False)
    names = {name for name, _ in own.named_parameters()} - {
        name for name, _ in tied.named_parameters()
    }
    assert names == {"tokens.weight"}
    assert own.tokens.weight.shape == own.encoder.embeddings.word.weight.shape
    narrow = small(MaskedLM, model_type="albert", always_projected=True, embedding_size=7)
    assert narrow.tokens.dense.out_features == 7
    assert narrow(IDS, MASK).shape == (4, 9, 37)


def test_heads_know_their_architecture():
    assert small(SequenceClassifier).config.architecture == "BertForSequenceClassification"
    assert small(MaskedLM).encoder.config.architecture == "BertModel"
    config = replace(SMALL, model_type="electra", pooler=False)
    assert ReplacedTokens(config).config.architecture == "ElectraForPreTraining"
    for model_type, family in FAMILIES.items():
        for architecture in family.architectures:
            model = build(replace(SMALL, model_type=model_type), architecture)
            assert model.config.architecture == architecture
            assert model.config.model_type == model_type


def test_heads_that_a_family_does_not_have():
    with pytest.raises(CheckpointError, match="architecture of a distilbert model must be one of"):
        NextSentence(replace(SMALL, model_type="distilbert"))
    with pytest.raises(CheckpointError, match="got 'BertForPreTraining'"):
        build(replace(SMALL, model_type="electra"), "BertForPreTraining")


_LOGITS = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((_LOGITS[0], _LOGITS[0]), r"start must be floating \(batch, seqlen\), seqlen > 0"),
        ((_LOGITS, _LOGITS.long()), "end must be floating"),
        ((_LOGITS[:, :0], _LOGITS[:, :0]), "start must be floating"),
        ((_LOGITS, _LOGITS[:, :4]), "start and end must have one shape"),
        ((_LOGITS, [0.0]), "end must be a torch.Tensor"),
        ((_LOGITS, _LOGITS, _LOGITS), "mask must be bool, got"),
        ((_LOGITS, _LOGITS, _LOGITS[:1] > 0), r"mask must be bool \(2, 5\) on cpu, got \(1, 5\)"),
        ((_LOGITS, _LOGITS, None, 0), "max_length must be at least 1, or None, got 0"),
        ((_LOGITS, _LOGITS, None, 2.0), "max_length must be an int, at least 1, or None, got 2.0"),
    ],
)
def test_bad_spans_are_told(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        best_span(*arguments)


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (torch.ones(4, 9), "select must be bool, got"),
        (MASK[:, :8], r"select must be bool \(4, 9\) on cpu, got \(4, 8\) bool"),
        (torch.ones_like(MASK), "select must be False at padding, got 16 places without a token"),
    ],
)
def test_bad_selection_is_told(select, message):
    with pytest.raises((TypeError, ValueError), match=message):
        small(MaskedLM)(IDS, MASK, select=select)
