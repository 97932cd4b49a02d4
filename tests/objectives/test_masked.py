"""Masked language modeling: rates, shares, whole words, and what is never touched."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastattn.objectives import masked_lm, randomness

VOCAB, MASK, SPECIAL = 40, 4, [0, 1, 2]
TEXT = {"mask_token": MASK, "vocab_size": VOCAB, "special_tokens": SPECIAL}


def texts(batch: int, seqlen: int, seed: int, low: int = 0) -> Tensor:
    """Random tokens, special ones among them unless `low` is above."""
    return torch.randint(low, VOCAB, (batch, seqlen), generator=torch.Generator().manual_seed(seed))


def bound(count: int, probability: float) -> float:
    """Six standard deviations of a binomial: chance exceeds them once in 5e8."""
    return 6 * math.sqrt(count * probability * (1 - probability))


@given(
    batch=st.integers(0, 4), seqlen=st.integers(0, 30), seed=st.integers(-(2**63), 2**63 - 1),
    rate=st.floats(0, 1), exact=st.booleans(), least=st.booleans(), words=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_labels_only_where_something_may_be_corrupted(
    batch: int, seqlen: int, seed: int, rate: float, exact: bool, least: bool, words: bool
) -> None:
    ids = texts(batch, seqlen, seed & 0xFFFF)
    lengths = torch.tensor([(7 * row + 3) % (seqlen + 1) for row in range(batch)]).long()
    starts = texts(batch, seqlen, seed & 0xFF) % 3 == 0 if words else None
    inputs, labels = masked_lm(
        ids, lengths=lengths, word_starts=starts, rate=rate, exact=exact, at_least_one=least,
        seed=seed, **TEXT,
    )  # fmt: skip
    selected = labels != -100
    assert torch.equal(labels[selected], ids[selected])
    assert torch.equal(inputs[~selected], ids[~selected])
    real = torch.arange(seqlen) < lengths[:, None]
    may = real & ~torch.isin(ids, torch.tensor([*SPECIAL, MASK]))
    assert not (selected & ~may).any()
    assert not torch.isin(inputs[selected], torch.tensor(SPECIAL)).any()
    if least:
        assert torch.equal(selected.any(1), may.any(1))
    if exact and not words:
        wanted = [round(rate * count) for count in may.sum(1).tolist()]
        if least:
            wanted = [max(w, min(c, 1)) for w, c in zip(wanted, may.sum(1).tolist(), strict=True)]
        assert selected.sum(1).tolist() == wanted
    if starts is not None:
        for row in range(batch):
            for word in words_of(starts[row].tolist(), may[row].tolist()):
                assert selected[row, word].all() or not selected[row, word].any()
            if exact and not least:
                assert selected[row].sum() <= round(rate * may[row].sum().item())


def words_of(starts: list[bool], may: list[bool]) -> list[list[int]]:
    """Columns of each word, from the definition: tokens that may be selected, up to a start."""
    words: list[list[int]] = []
    for column, (begins, allowed) in enumerate(zip(starts, may, strict=True)):
        if not allowed:
            continue
        if begins or column == 0 or not may[column - 1]:
            words.append([])
        words[-1].append(column)
    return words


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("shares", [(0.8, 0.1), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_rates_are_binomial(words: bool, shares: tuple[float, float]) -> None:
    ids = texts(400, 128, 1, low=5)
    starts = torch.ones_like(ids, dtype=torch.bool)
    if words:
        starts[:, 1::2] = False  # words of two tokens
    inputs, labels = masked_lm(
        ids, word_starts=starts, mask_share=shares[0], random_share=shares[1], seed=5, **TEXT
    )
    selected = labels != -100
    draws = ids.numel() // (2 if words else 1)
    assert abs(selected.sum() / (2 if words else 1) - 0.15 * draws) <= bound(draws, 0.15)
    count = int(selected.sum())
    masked = int((inputs == MASK).sum())
    assert abs(masked - shares[0] * count) <= bound(count, shares[0])
    kept = int((inputs == ids)[selected].sum())
    ordinary = VOCAB - len(SPECIAL) - 1
    chance = 1 - sum(shares) + shares[1] / ordinary  # a random token may be the same
    assert abs(kept - chance * count) <= bound(count, chance)


def test_random_tokens_are_equally_likely_and_not_special() -> None:
    ids = torch.full((300, 200), 7)
    inputs, _ = masked_lm(ids, rate=1.0, mask_share=0.0, random_share=1.0, seed=2, **TEXT)
    counts = torch.bincount(inputs.flatten(), minlength=VOCAB)
    assert counts[[*SPECIAL, MASK]].sum() == 0
    rest = counts[counts > 0]
    assert rest.numel() == VOCAB - 4
    expected = ids.numel() / rest.numel()
    chi_square = ((rest - expected) ** 2 / expected).sum().item()
    freedom = rest.numel() - 1
    assert abs(chi_square - freedom) <= 6 * math.sqrt(2 * freedom)


def test_against_a_plain_statement() -> None:
    ids = texts(5, 40, 3)
    inputs, labels = masked_lm(ids, seed=11, **TEXT)
    key = randomness.seed_tensor(11, ids.device)
    choice, action, token, _ = randomness.words(key, randomness.MASKED, *ids.shape)
    ordinary = [t for t in range(VOCAB) if t not in (*SPECIAL, MASK)]
    for row in range(5):
        for column in range(40):
            at = (row, column)
            original = ids[at].item()
            if original not in ordinary or choice[at] / 2**32 >= 0.15:
                wanted = (original, -100)
            elif action[at] / 2**32 < 0.8:
                wanted = (MASK, original)
            elif action[at] / 2**32 < 0.9:
                wanted = (ordinary[token[at].item() * len(ordinary) // 2**32], original)
            else:
                wanted = (original, original)
            assert (inputs[at].item(), labels[at].item()) == wanted


@pytest.mark.parametrize("least", [False, True])
@pytest.mark.parametrize("rate", [0.01, 0.15, 0.4])
def test_exact_number_of_whole_words_against_a_plain_statement(rate: float, least: bool) -> None:
    ids = texts(6, 50, 3)
    starts = texts(6, 50, 4) % 3 == 0
    selected = (
        masked_lm(
            ids, word_starts=starts, rate=rate, exact=True, at_least_one=least, seed=9, **TEXT
        ).labels
        != -100
    )
    key = randomness.seed_tensor(9, ids.device)
    choice = randomness.words(key, randomness.MASKED, *ids.shape)[0]
    may = ~torch.isin(ids, torch.tensor([*SPECIAL, MASK]))
    for row in range(6):
        words = words_of(starts[row].tolist(), may[row].tolist())
        wanted, taken = round(rate * may[row].sum().item()), []
        for word in sorted(words, key=lambda word: choice[row, word[0]].item()):
            if len(taken) + len(word) > wanted and not (least and not taken):
                break
            taken += word
        assert selected[row].nonzero()[:, 0].tolist() == sorted(taken)


def test_a_seed_fixes_the_result_and_another_changes_it() -> None:
    ids = texts(3, 50, 1)
    assert torch.equal(masked_lm(ids, seed=1, **TEXT)[0], masked_lm(ids, seed=1, **TEXT)[0])
    assert not torch.equal(masked_lm(ids, seed=1, **TEXT)[0], masked_lm(ids, seed=2, **TEXT)[0])
    # A row's corruption does not change with the rows and the padding behind it.
    longer = torch.nn.functional.pad(ids, (0, 9, 0, 2))
    again = masked_lm(longer, seed=1, **TEXT)[0][:3, :50]
    assert torch.equal(again, masked_lm(ids, seed=1, **TEXT)[0])
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    first, second = (masked_lm(ids, seed=generator, **TEXT)[0] for generator in generators)
    assert torch.equal(first, second)
    assert not torch.equal(first, masked_lm(ids, seed=generators[0], **TEXT)[0])
    torch.manual_seed(4)
    first = masked_lm(ids, **TEXT)[0]
    torch.manual_seed(4)
    assert torch.equal(first, masked_lm(ids, **TEXT)[0])


@pytest.mark.cuda
def test_a_gpu_draws_the_same() -> None:
    ids = texts(3, 50, 1)
    on_gpu = masked_lm(ids.cuda(), seed=1, **TEXT)
    assert torch.equal(on_gpu.input_ids.cpu(), masked_lm(ids, seed=1, **TEXT).input_ids)


IDS = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"input_ids": IDS[0]}, ValueError, r"input_ids must be int32 or int64 \(batch, seqlen\)"),
        ({"input_ids": IDS.float()}, ValueError, r"input_ids .* got \(1, 3\) float32"),
        ({"input_ids": IDS + VOCAB}, ValueError, r"input_ids must hold token ids 0\.\.39, got 45"),
        ({"input_ids": [[5]]}, TypeError, r"input_ids must be a torch.Tensor, got \[\[5\]\]"),
        ({"mask_token": VOCAB}, ValueError, r"mask_token must be in 0\.\.39, got 40"),
        ({"vocab_size": 1.5}, TypeError, r"vocab_size must be an int, got 1.5"),
        ({"special_tokens": [-1]}, ValueError, r"special_tokens\[0\] must be in 0\.\.39, got -1"),
        ({"special_tokens": 3}, TypeError, r"special_tokens must be a list of token ids, got 3"),
        ({"special_tokens": range(VOCAB)}, ValueError, r"special_tokens must leave a token"),
        ({"lengths": torch.tensor([4])}, ValueError, r"lengths must lie in 0\.\.3, got 4"),
        ({"word_starts": IDS}, ValueError, r"word_starts must be bool \(1, 3\)"),
        ({"rate": 1.5}, ValueError, r"rate must be in \[0, 1\], got 1.5"),
        ({"rate": math.nan}, ValueError, r"rate must be in \[0, 1\], got nan"),
        ({"rate": True}, TypeError, r"rate must be a number in \[0, 1\], got True"),
        ({"random_share": 0.3}, ValueError, r"mask_share \+ random_share must be at most 1"),
        ({"exact": 1}, TypeError, r"exact must be True or False, got 1"),
        ({"seed": 1.0}, TypeError, r"seed must be an int, a torch.Generator or None, got 1.0"),
        ({"seed": 2**63}, ValueError, r"seed must fit in 64 bits"),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], words: str) -> None:
    arguments = {"input_ids": IDS, "seed": 0, **TEXT, **changes}
    with pytest.raises(error, match=words):
        masked_lm(arguments.pop("input_ids"), **arguments)
