"""Speculative verification: what is emitted is distributed as the target, token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.sampling.noise import gumbel
from fastattn.sampling.speculative import Verified, _draw, speculative_verify

ROWS, VOCAB = 120_000, 32


def _tables(seed: int, scale: float) -> list[Tensor]:
    """Logits of three positions, each by the token before it (the first by none)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, VOCAB, generator=generator) * scale for n in (1, VOCAB, VOCAB)]


def _top_k(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores < scores.topk(9).values[..., -1:], -math.inf)


TARGET, DRAFT = _tables(0, 1.5), _tables(1, 1.5)
# Plausible drafts: a model that is like the target, but colder.
DRAFT = [0.8 * t + 0.6 * d for t, d in zip(TARGET, DRAFT, strict=True)]


def _drafts(rows: int, q: list[Tensor], seed: int | None) -> Tensor:
    """Two tokens a row by the tables q of probabilities.

    With a seed they are drawn as `sample` would draw them, with its noise of that seed and step.
    """
    generator = torch.Generator().manual_seed(8)
    tokens = torch.zeros(rows, 0, dtype=torch.int64)
    for position in range(2):
        before = tokens[:, -1] if position else torch.zeros(rows, dtype=torch.int64)
        if seed is None:
            goal = torch.rand(rows, 1, generator=generator)
            sums = q[position].cumsum(-1)
            sums = (sums / sums[:, -1:])[before]  # so that no draw ends past the last token
            token = torch.searchsorted(sums, goal, right=True)
        else:
            keys, step = torch.arange(rows)[:, None] + seed, torch.tensor([[position]])
            noise = gumbel(keys, step, torch.arange(VOCAB))
            token = (q[position].log()[before] + noise).argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, token], 1)
    return tokens


def _target_logits(drafts: Tensor) -> Tensor:
    first = TARGET[0].expand(len(drafts), -1)
    return torch.stack([first, TARGET[1][drafts[:, 0]], TARGET[2][drafts[:, 1]]], 1)


def _improbability(counts: Tensor, p: Tensor) -> float:
    """Chi-square of counts against each row's distribution p, as a standard normal deviation.

    Wilson and Hilferty's approximation. Cells that expect fewer than 5 are joined by row.
    """
    expected = counts.sum(-1, keepdim=True) * p
    assert counts[p == 0].sum() == 0, "a token outside of the target's set"
    large = expected >= 5
    rest = [(x * ~large).sum(-1) for x in (counts, expected)]
    observed = torch.cat([counts[large], rest[0][rest[1] >= 5]]).double()
    expected = torch.cat([expected[large], rest[1][rest[1] >= 5]])
    statistic = float(((observed - expected).square() / expected).sum())
    freedom = len(expected) - int((counts.sum(-1) >= 5).sum())
    assert freedom > 5
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


CASES = {
    "noise of sample": {"draft": "probs", "noise": 1},
    "logits": {"draft": "logits", "temperature": 0.7},
    "filtered target": {"draft": "probs", "temperature": 1.3, "warp": _top_k},
    "filtered both": {"draft": "logits", "warp": _top_k, "draft_warp": _top_k},
    "certain": {"draft": None},
    "certain, filtered, ragged": {"draft": None, "temperature": 0.7, "warp": _top_k, "ragged": 1},
    "ragged": {"draft": "probs", "ragged": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_emits_the_targets_distribution(name: str) -> None:
    case: dict[str, Any] = CASES[name]
    temperature, warp = case.get("temperature", 1.0), case.get("warp", lambda x: x)
    draft_scores = [case.get("draft_warp", lambda x: x)(table) for table in DRAFT]
    q = [table.softmax(-1) for table in draft_scores]
    p = [warp(table / temperature).double().softmax(-1) for table in TARGET]
    seed = 1000 * list(CASES).index(name)
    if case["draft"] is None:  # the draft model is greedy, sometimes from the second best token
        first = q[0][0].topk(3).indices[torch.arange(ROWS) % 3]
        drafts = torch.stack([first, q[1].argmax(-1)[first]], 1)
    else:
        # Those with sample's noise have the same seeds and steps as the verification.
        drafts = _drafts(ROWS, q, seed if case.get("noise") else None)
    kwargs: dict[str, Any] = {}
    if case["draft"] == "probs":
        kwargs["draft_probs"] = torch.stack([q[0].expand(ROWS, -1), q[1][drafts[:, 0]]], 1)
    elif case["draft"] == "logits":
        tables = draft_scores[0].expand(ROWS, -1), draft_scores[1][drafts[:, 0]]
        kwargs["draft_logits"] = torch.stack(tables, 1)
    lengths = torch.full((ROWS,), 2)
    logits = _target_logits(drafts)
    given = drafts
    if case.get("ragged"):
        lengths = torch.arange(ROWS) // 3 % 3
        given = drafts.where(torch.arange(2) < lengths[:, None], -7)
        kwargs["draft_lengths"] = lengths
    result = speculative_verify(
        given, logits, temperature=temperature, warp=case.get("warp"),
        seed=torch.arange(ROWS) + seed, **kwargs,
    )  # fmt: skip
    n, tokens = result

    place = torch.arange(3)
    assert ((tokens >= 0) == (place <= n[:, None])).all() and (n <= lengths).all()
    assert torch.equal(drafts[place[:2] < n[:, None]], tokens[:, :2][place[:2] < n[:, None]])
    for position in range(3):
        reached = n >= position
        before = tokens[reached, position - 1] if position else torch.zeros(ROWS).long()
        pairs = before * VOCAB + tokens[reached, position]
        counts = pairs.bincount(minlength=len(p[position]) * VOCAB).view(-1, VOCAB)
        assert int(counts.sum()) > 1000
        assert abs(_improbability(counts, p[position])) < 4, position
    # No more is rejected than must be: sum of min(p, q) is kept.
    if case["draft"] is not None:
        share = float(torch.minimum(p[0], q[0].double()).sum())
        kept = (n[lengths > 0] > 0).double()
        assert abs(float(kept.mean()) - share) < 4 * (share * (1 - share) / len(kept)) ** 0.5


def _case(rows: int, count: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, count + 1, 50, generator=generator) * 2
    q = (logits[:, :count] + torch.randn(rows, count, 50, generator=generator)).softmax(-1)
    drafts = q.flatten(0, 1).multinomial(1, generator=generator).view(rows, count)
    return {
        "draft_tokens": drafts, "target_logits": logits, "draft_probs": q,
        "seed": torch.arange(rows) * 7 - 20, "step": torch.arange(rows) * 2**33,
    }  # fmt: skip


def _same(a: Verified, b: Verified) -> bool:
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.num_accepted, b.num_accepted)


@pytest.mark.parametrize("certain", [True, False])
def test_greedy_rows_follow_the_largest_logit(certain: bool) -> None:
    case = _case(40)
    logits = case["target_logits"]
    logits[:, :, 7] = logits[:, :, 31] = logits.amax(-1) + 1  # a tie: the lower one counts
    case["draft_tokens"][::2] = 7
    case["draft_tokens"][::3, 2] = 31
    if certain:
        del case["draft_probs"]
    greedy = speculative_verify(**case, temperature=0.0)
    expected = []
    for row in case["draft_tokens"].tolist():
        n = next((i for i, token in enumerate(row) if token != 7), 4)
        expected.append([7] * (n + 1) + [-1] * (4 - n))
    assert greedy.tokens.tolist() == expected
    assert len(set(greedy.num_accepted.tolist())) > 2

    # With greedy and other rows in one batch, each is as it would be alone.
    mixed = torch.tensor([0.0, 0.8]).repeat(20)
    both = speculative_verify(**case, temperature=mixed)
    warm = speculative_verify(**case, temperature=0.8)
    assert torch.equal(both.tokens[::2], greedy.tokens[::2])
    assert torch.equal(both.tokens[1::2], warm.tokens[1::2])
    assert not torch.equal(warm.tokens[::2], greedy.tokens[::2])


def test_a_row_depends_on_nothing_but_itself() -> None:
    case = _case(64)
    whole = speculative_verify(**case)
    assert int((whole.num_accepted > 0).sum()) > 10 and len(whole.num_accepted.unique()) > 3
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:23]
    some = speculative_verify(**{name: value[order] for name, value in case.items()})
    assert torch.equal(some.tokens, whole.tokens[order])
    for changed in ("seed", "step"):
        other = speculative_verify(**{**case, changed: case[changed] + 1})
        assert not _same(other, whole)

    # A draft that is said to be shorter is as one that is shorter.
    lengths = torch.full((64,), 2)
    ragged = speculative_verify(**case, draft_lengths=lengths)
    cut = {name: case[name][:, :2] for name in ("draft_tokens", "draft_probs")}
    short = speculative_verify(**{**case, **cut, "target_logits": case["target_logits"][:, :3]})
    assert torch.equal(ragged.tokens[:, :3], short.tokens)
    assert torch.equal(ragged.num_accepted, short.num_accepted)
    none = speculative_verify(**case, draft_lengths=lengths * 0)
    empty = {name: case[name][:, :0] for name in cut}
    alone = speculative_verify(**{**case, **empty, "target_logits": case["target_logits"][:, :1]})
    assert torch.equal(none.tokens[:, :1], alone.tokens)
    assert (none.tokens[:, 1:] == -1).all() and (none.num_accepted == 0).all()


def test_a_draft_of_the_target_itself_is_kept() -> None:
    case = _case(200)
    case["draft_probs"] = case["target_logits"][:, :4].softmax(-1)
    assert (speculative_verify(**case).num_accepted == 4).all()
    del case["draft_probs"]
    logits = case["target_logits"][:, :4]
    assert (speculative_verify(**case, draft_logits=logits).num_accepted == 4).all()


def test_without_a_seed_torchs_generator_decides() -> None:
    case = {name: value for name, value in _case(50).items() if name != "seed"}

    def draw(seed: int) -> Verified:
        torch.manual_seed(seed)
        return speculative_verify(**case)

    assert _same(draw(1), draw(1)) and not _same(draw(1), draw(2))


@pytest.mark.parametrize("temperature", [0.0, 1.0, torch.tensor([0.0, 1.0, 0.5])])
def test_rows_without_a_distribution_end_in_an_error(temperature: Any) -> None:
    for broken in (math.nan, -math.inf):
        logits = torch.zeros(3, 3, 10)
        logits[..., 4] = 100.0
        logits[1, 1] = broken
        drafts = torch.full((3, 2), 4)
        result = speculative_verify(drafts, logits, temperature=temperature, seed=0)
        assert result.tokens.tolist() == [[4, 4, 4], [4, -1, -1], [4, 4, 4]]
        assert result.num_accepted.tolist() == [2, 1, 2]


def test_half_precision_compile_and_unlikely_tokens() -> None:
    case = _case(30)
    case["target_logits"] = case["target_logits"].bfloat16()
    same = {**case, "target_logits": case["target_logits"].float()}
    result = speculative_verify(**case, warp=_top_k, temperature=0.9)
    assert _same(result, speculative_verify(**same, warp=_top_k, temperature=0.9))
    compiled = torch.compile(speculative_verify, fullgraph=True, backend="eager")
    assert _same(compiled(**case, warp=_top_k, temperature=0.9), result)
    # All mass but exp(-20) on one token, which is drafted and certain: p(x) rounds to 1.
    logits = torch.zeros(1, 2, 2).index_fill(-1, torch.tensor(0), 20.0).expand(5000, -1, -1)
    zero = torch.zeros(5000, 1, dtype=torch.int64)
    assert (speculative_verify(zero, logits, seed=torch.arange(5000)).tokens == 0).all()
    # The other one is drafted: kept once in exp(20) times, and token 0 drawn in its place.
    assert (speculative_verify(zero + 1, logits, seed=torch.arange(5000)).tokens[:, 0] == 0).all()


def test_the_ends_of_a_uniform_draw_tokens_that_have_a_weight() -> None:
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for uniform, token in ((2.0**-53, 1), (0.2499, 1), (0.2501, 3), (0.7501, 4), (1 - 2.0**-53, 4)):
        assert _draw(weights, torch.tensor([[uniform]]).double()) == token
    many = torch.rand(1, 2**18, generator=torch.Generator().manual_seed(0))
    assert _draw(many, torch.tensor([[1 - 2.0**-53]]).double()) == 2**18 - 1
    one = torch.zeros(1, 2**18).index_fill(1, torch.tensor(5), 0.3)
    assert _draw(one, torch.tensor([[2.0**-53]]).double()) == 5  # less than a unit of the sums
    assert _draw(many[:, :1], torch.tensor([[1 - 2.0**-53]]).double()) == 0


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"target_logits": torch.zeros(2, 5)}, ValueError, r"target_logits must have shape"),
        ({"draft_tokens": torch.zeros(2, 3).long()}, ValueError, r"draft_tokens must have shape"),
        ({"draft_tokens": torch.zeros(2, 2)}, TypeError, "draft_tokens must be int32 or int64"),
        ({"draft_tokens": torch.full((2, 2), 5)}, ValueError, r"draft_tokens must lie in 0\.\.4"),
        ({"draft_probs": torch.zeros(2, 3, 5)}, ValueError, r"draft_probs must have shape \(2, 2"),
        (
            {"draft_probs": torch.zeros(2, 2, 5), "draft_logits": torch.zeros(2, 2, 5)},
            ValueError,
            "draft_logits must be None where draft_probs are given",
        ),
        ({"draft_lengths": torch.tensor([1, 3])}, ValueError, r"draft_lengths must lie in 0\.\.2"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and at least 0, got -1"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must have shape \(2,\)"),
        ({"warp": lambda x: x[0]}, ValueError, r"the result of warp must have shape \(6, 5\)"),
        ({"seed": 1.5}, TypeError, "seed must be an int or an int64 tensor, got 1.5"),
        ({"seed": 2**63}, ValueError, "seed must fit into 64 bits"),
        ({"step": torch.zeros(2).int()}, TypeError, "step must be an int or an int64 tensor"),
    ],
)
def test_bad_arguments_are_named(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {
        "draft_tokens": torch.zeros(2, 2, dtype=torch.int64),
        "target_logits": torch.zeros(2, 3, 5),
    }
    with pytest.raises(error, match=message):
        speculative_verify(**{**given, **kwargs})
