"""The sampling kernel: the token of the reference, whatever the tiles; one launch, one read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import SamplerState, SamplingParams, torch_sample_ops
from fastattn.sampling import ERROR_TOKEN, Sample, pack_mask, reference
from fastattn.testing import WorkMeter, debug

BATCH = 6
VOCAB = 1301  # three tiles of 512


@pytest.fixture(autouse=True)
def _small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles to a row of few tokens, which the interpreter gets through quickly."""
    if "whole_tiles" not in request.keywords:
        with_config(monkeypatch, block=512)


def with_config(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    from fastattn.kernels.sampling import sampler

    select = sampler.select_sample_config
    monkeypatch.setattr(
        sampler, "select_sample_config", lambda *args: replace(select(*args), **changes)
    )


def draw_logits(vocab_size: int, scale: float, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(BATCH, vocab_size, generator=generator) * scale).to(device)


def seeds(device: str, batch: int = BATCH) -> Tensor:
    return torch.arange(batch, device=device) * 1_000_003 + 2**33


def settings(vocab_size: int, device: str) -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    some = (torch.rand(BATCH, vocab_size, generator=generator) < 0.5).to(device)

    def a_row(*values: float) -> Tensor:
        return torch.tensor(values, device=device)

    return {
        "softmax": {},
        "greedy": {"temperature": 0.0},
        "temperature": {"temperature": 1.7},
        "top-k": {"temperature": 0.8, "top_k": 40},
        "top-k of one": {"top_k": 1},
        "top-k of many": {"top_k": vocab_size - 3},
        "top-k of all": {"top_k": vocab_size},
        "top-p": {"top_p": 0.9},
        "a tiny top-p": {"top_p": 1e-9},
        "top-p of nearly all": {"top_p": 0.9999},
        "top-k and top-p": {"top_k": 50, "top_p": 0.8, "temperature": 0.7},
        "top-k and top-p, joint": {"top_k": 50, "top_p": 0.3, "joint": True},
        "min-p": {"min_p": 0.1},
        "all cuts": {"top_k": 30, "top_p": 0.95, "min_p": 0.02, "temperature": 1.3},
        "tokens to keep": {"top_p": 0.01, "min_p": 0.9, "min_tokens_to_keep": 5},
        "bans": {"banned": [0, 5, vocab_size - 1], "top_p": 0.9},
        "allowed": {"allowed": pack_mask(some), "top_k": 20},
        "bias": {"logit_bias": {3: 4.0, vocab_size - 2: -100.0}, "min_p": 0.05},
        "a setting a row": {
            "temperature": a_row(0.0, 0.5, 1.0, 2.0, 1.0, 1.0),
            "top_k": torch.tensor([0, 7, 0, vocab_size, 3, 0], device=device),
            "top_p": a_row(1.0, 1.0, 0.9, 0.5, 0.9, 1.0),
            "min_p": a_row(0.0, 0.1, 0.0, 0.0, 0.3, 0.0),
            "min_tokens_to_keep": torch.tensor([1, 1, 4, 1, 2, 1], device=device),
        },
    }


NAMES = tuple(settings(100, "cpu"))


def both(logits: Tensor, **options: Any) -> tuple[Sample, Sample]:
    """The kernel's draw and the reference's."""
    params = SamplingParams(seed=seeds(str(logits.device)), logprobs=3, **options)
    with debug():
        pair = [fastattn.sample(logits, params, impl=impl) for impl in ("triton", "reference")]
    assert isinstance(pair[0], Sample) and isinstance(pair[1], Sample)
    return pair[0], pair[1]


def assert_alike(drawn: Sample, wanted: Sample) -> None:
    assert torch.equal(drawn.tokens, wanted.tokens)
    for one, two in (
        (drawn.logprobs, wanted.logprobs),
        (drawn.top_logprobs, wanted.top_logprobs),
    ):
        assert one is not None and two is not None
        # Sums of float32 in another order: not a parity of a kernel, but of log-probabilities.
        torch.testing.assert_close(one, two)
    assert drawn.top_tokens is not None and wanted.top_tokens is not None
    assert torch.equal(drawn.top_tokens, wanted.top_tokens)


def test_raw_log_probabilities_of_rows_with_infinities(device: str) -> None:
    logits = draw_logits(200, 2.0, device)[:3].clone()
    logits[0, [7, 90]] = torch.inf
    logits[1, 3:] = -torch.inf
    params = SamplingParams(seed=3, logprobs=5, logprobs_of="raw")
    drawn, wanted = (fastattn.sample(logits, params, impl=impl) for impl in ("triton", "reference"))
    assert isinstance(drawn, Sample) and isinstance(wanted, Sample)
    assert_alike(drawn, wanted)
    assert drawn.tokens[0] == 7 and drawn.logprobs is not None and drawn.logprobs[0] == 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [3.0, 0.3], ids=["peaked", "flat"])
def test_draws_the_token_of_the_reference(name: str, scale: float, device: str) -> None:
    """At 0.3 most cuts lie below what the tiles keep, and rows are searched again."""
    logits = draw_logits(VOCAB, scale, device)
    assert_alike(*both(logits, **settings(VOCAB, device)[name]))


@pytest.mark.parametrize("vocab_size", [1, 2, 31, 33, 512, 513])
@pytest.mark.parametrize("name", ["softmax", "all cuts", "a setting a row"])
def test_vocabularies_of_any_size(name: str, vocab_size: int, device: str) -> None:
    options = settings(max(vocab_size, 2), device)[name]
    logits = draw_logits(vocab_size, 2.0, device)
    params = SamplingParams(seed=seeds(device), **options)
    drawn, wanted = (fastattn.sample(logits, params, impl=i) for i in ("triton", "reference"))
    assert torch.equal(drawn, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_with_any_row_stride(dtype: torch.dtype, device: str) -> None:
    logits = draw_logits(VOCAB, 3.0, device).to(dtype)
    wide = torch.full((BATCH, VOCAB + 100), float("nan"), dtype=dtype, device=device)
    wide[:, 50:-50] = logits
    assert_alike(*both(wide[:, 50:-50], top_k=30, top_p=0.9))


def test_ties_masses_and_infinities(device: str) -> None:
    vocab_size = VOCAB
    logits = torch.zeros(BATCH, vocab_size, device=device)
    logits[1] = float("-inf")
    logits[1, 1234] = -3.0  # all that may be drawn
    logits[2, 17] = 60.0  # all of the mass
    logits[3, [5, 1300]] = float("inf")
    logits[4] = torch.arange(vocab_size, device=device) // 130
    logits[5, ::2] = -0.0
    for options in (
        {},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"top_p": 0.5},
        {"min_p": 0.5},
        {"top_k": 700},
    ):
        drawn, wanted = both(logits, **options)
        assert_alike(drawn, wanted)
        assert drawn.tokens[1] == 1234 and drawn.tokens[2] == 17 and drawn.tokens[3] == 5


def test_rows_without_a_distribution_are_marked(device: str) -> None:
    logits = draw_logits(VOCAB, 2.0, device)
    logits[1] = float("-inf")
    logits[3, 1250] = float("nan")
    logits[4, 7] = float("nan")
    params = SamplingParams(seed=seeds(device), top_p=0.9, banned=[7], logprobs=2, temperature=0.9)
    state = SamplerState.make(BATCH, VOCAB, device)
    drawn = fastattn.sample(logits, params, state, impl="triton")
    assert isinstance(drawn, Sample) and drawn.logprobs is not None
    failed = drawn.tokens == ERROR_TOKEN
    assert failed.tolist() == [
        False,
        True,
        False,
        True,
        False,
        False,
    ]  # a NaN that is banned is none
    assert torch.equal(drawn.logprobs.isnan(), failed)
    assert torch.equal((state.seen != 0).any(1), ~failed)
    with debug(), pytest.raises(ValueError, match=r"rows \[1, 3\] without a distribution"):
        fastattn.sample(logits, params, impl="triton")


def test_numbers_out_of_range_on_the_device_are_brought_into_it(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `SamplingParams` says of tensors that the host does not look at."""
    from fastattn.sampling import params as checks

    monkeypatch.setattr(checks, "values_readable", lambda tensor: False)
    nan, inf = float("nan"), float("inf")

    def a_row(*values: float) -> Tensor:
        return torch.tensor(values, device=device)

    strange = {
        "temperature": a_row(nan, -1.0, inf, 1e-30, 1.0, 1.0),
        "top_k": torch.tensor([-5, 3, 2**40, 0, 10, -1], device=device),
        "top_p": a_row(nan, 2.0, -1.0, 0.5, 0.9, inf),
        "min_p": a_row(nan, -1.0, 3.0, 0.0, 0.1, 0.0),
        "min_tokens_to_keep": torch.tensor([-1, 0, 2, 1, 1, 1], device=device),
        "repetition_penalty": a_row(nan, 0.0, -2.0, 1.5, inf, 1.0),
        "presence_penalty": a_row(nan, inf, 0.5, 0.0, 0.0, 0.0),
        "frequency_penalty": a_row(0.0, nan, 0.1, -inf, 0.0, 0.0),
    }
    params = SamplingParams(seed=seeds(device), **strange)
    results = []
    for impl in ("triton", "reference"):
        state = SamplerState.from_prompt(torch.tensor([[3, 5]] * BATCH), VOCAB, counts=True)
        assert state.counts is not None
        state.counts[:, 9] = 2
        results.append(fastattn.sample(draw_logits(VOCAB, 2.0, device), params, state, impl=impl))
    assert torch.equal(*results)


@pytest.mark.whole_tiles
@pytest.mark.parametrize("name", ["softmax", "top-k and top-p", "min-p"])
def test_whole_tiles_draw_the_token_of_the_reference(name: str, device: str) -> None:
    logits = draw_logits(9001, 3.0, device)
    assert_alike(*both(logits, **settings(9001, device)[name]))


# The state.


@pytest.mark.parametrize("counts", [False, True])
def test_the_state_follows_many_steps(counts: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randint(0, 300, (BATCH, 12), generator=generator).to(device)
    penalties = {"presence_penalty": 0.4, "frequency_penalty": 0.3} if counts else {}
    params = SamplingParams(seed=11, repetition_penalty=1.3, temperature=0.8, top_k=40, **penalties)
    states = [SamplerState.from_prompt(prompt, 300, counts=counts) for _ in range(2)]
    for step in range(8):
        logits = draw_logits(300, 2.0, device, seed=step)
        tokens = [
            fastattn.sample(logits, params, state, impl=impl)
            for state, impl in zip(states, ("triton", "reference"), strict=True)
        ]
        assert torch.equal(*tokens)
    one, two = states
    assert torch.equal(one.seen, two.seen)
    assert torch.equal(one.step, two.step)
    assert one.step.tolist() == [8] * BATCH
    if counts:
        assert one.counts is not None and two.counts is not None
        assert torch.equal(one.counts, two.counts)


# Bits.


@pytest.mark.parametrize("tile", [(1024, 64), (512, 16), (2048, 256), (256, 4)], ids=str)
@pytest.mark.parametrize(
    "name", ["softmax", "top-k and top-p", "top-p", "all cuts", "tokens to keep"]
)
def test_the_same_token_whatever_the_tiles(
    name: str, tile: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = draw_logits(VOCAB, 2.0, device)
    options = settings(VOCAB, device)[name]
    with_config(monkeypatch, block=tile[0], capacity=tile[1])
    assert_alike(*both(logits, **options))


def test_the_same_token_whatever_the_batch(device: str) -> None:
    logits = draw_logits(VOCAB, 2.0, device)
    options = {"top_k": 50, "top_p": 0.9}
    params = SamplingParams(seed=seeds(device), **options)
    together = fastattn.sample(logits, params, impl="triton")
    assert isinstance(together, Tensor)
    order = [4, 0, 5, 2, 1, 3]
    other = SamplingParams(seed=seeds(device)[order], **options)
    shuffled = fastattn.sample(logits[order], other, impl="triton")
    assert torch.equal(shuffled, together[order])
    for row in range(BATCH):
        alone = SamplingParams(seed=seeds(device)[row : row + 1], **options)
        token = fastattn.sample(logits[row : row + 1], alone, impl="triton")
        assert torch.equal(token, together[row : row + 1])


def test_draws_follow_the_distribution(device: str) -> None:
    """A chi-square of rows that differ in their seed alone.

    Few, since the interpreter is slow; but each is the reference's token, whose distribution
    `test_distribution.py` measures with 200,000.
    """
    rows = 240
    logits = draw_logits(60, 1.5, device)[:1].expand(rows, -1)
    options: dict[str, Any] = {"temperature": 0.8, "top_k": 7, "top_p": 0.95}
    exact = reference.probabilities(logits[:1], SamplingParams(**options))[0].double()
    params = SamplingParams(seed=torch.arange(rows, device=device), **options)
    tokens = fastattn.sample(logits, params, impl="triton")
    assert isinstance(tokens, Tensor)
    assert torch.equal(tokens, fastattn.sample(logits, params, impl="reference"))
    assert bool((exact[tokens] > 0).all())
    kept = exact > 0
    expected = exact[kept] * rows
    count = torch.bincount(tokens, minlength=60).double()[kept]
    statistic = float(((count - expected) ** 2 / expected).sum())
    freedom = int(kept.sum()) - 1
    # Wilson and Hilferty: within four standard deviations of the statistic's cube root.
    third = (statistic / freedom) ** (1 / 3)
    assert abs(third - (1 - 2 / (9 * freedom))) < 4 * (2 / (9 * freedom)) ** 0.5


# Work.


@pytest.mark.whole_tiles
@pytest.mark.interpreter
def test_one_launch_reads_the_logits_once() -> None:
    vocab_size = 32768
    # As peaked as a language model: what is drawn from is what the tiles keep.
    logits = draw_logits(vocab_size, 3.0, "cpu").to(torch.bfloat16)
    state = SamplerState.from_prompt(torch.tensor([[1, 2, 3]] * BATCH), vocab_size)
    params = SamplingParams(
        seed=seeds("cpu"), temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.2
    )
    with WorkMeter(logits=logits, seen=state.seen) as work:
        fastattn.sample(logits, params, state, impl="triton")
    size = logits.numel() * 2
    assert work.launches == 1
    assert work.loaded["logits"] == size
    # A bit a token, and the word of the token that was drawn.
    assert work.loaded["seen"] == BATCH * (vocab_size // 8 + 4)
    assert work.bytes_loaded <= 1.05 * size + BATCH * vocab_size / 8
    assert work.dots == 0


@pytest.mark.whole_tiles
@pytest.mark.interpreter
def test_an_unfiltered_row_keeps_nothing() -> None:
    logits = draw_logits(9000, 1.0, "cpu")
    params = SamplingParams(seed=seeds("cpu"))
    with WorkMeter(logits=logits) as work:
        fastattn.sample(logits, params, impl="triton")
    assert work.launches == 1
    assert work.loaded["logits"] == logits.numel() * 4
    assert work.bytes_loaded <= 1.01 * logits.numel() * 4


# The operator.


def test_operator_is_what_its_schema_says(device: str) -> None:
    logits = draw_logits(300, 2.0, device)
    numbers = [0.8, 40.0, 0.9, 0.0, 1.0, 1.2, 0.0, 0.0]
    state = SamplerState.make(BATCH, 300, device, counts=True)
    arguments = (
        logits, state.seen, state.counts, state.step, seeds(device), 0, None, None, [None] * 8,
        numbers, False, 2,
    )  # fmt: skip
    assert torch_sample_ops is not None
    operator = torch.ops.fastattn.sample.default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.cuda
def test_a_draw_replays_in_a_cuda_graph() -> None:
    device, vocab_size = "cuda", 5000
    logits = draw_logits(vocab_size, 2.0, device)
    params = SamplingParams(seed=seeds(device), top_k=50, top_p=0.9, repetition_penalty=1.1)
    state = SamplerState.make(BATCH, vocab_size, device)
    expected = [fastattn.sample(logits, params, state, impl="triton") for _ in range(5)]
    state = SamplerState.make(BATCH, vocab_size, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = fastattn.sample(logits, params, state, impl="triton")
    for wanted in expected:
        graph.replay()
        assert torch.equal(tokens, wanted)
