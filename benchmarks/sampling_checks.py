"""What must be right before sampling is timed, as tasks for the pool, beside those of `parity.py`.

Groups of settings that share a compiled kernel, on logits with rows of every kind; steps that
follow each other with a state; every config that dispatch may choose; a step as a replayed graph;
rows alone and among others.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.accuracy import WrongResult
from benchmarks.chosen import changed_choice
from benchmarks.decode_replay import captured
from benchmarks.parity import DTYPES, Row
from benchmarks.sampling_accuracy import check_draw, check_tokens
from benchmarks.sampling_cases import VOCAB_SIZES as TIMED_VOCAB_SIZES
from benchmarks.sampling_cases import draw_logits
from benchmarks.sampling_logprobs import check_logprobs
from fastattn import SamplerState, SamplingParams, sample
from fastattn.sampling import pack_mask
from fastattn.sampling.problem import make_sample_problem
from fastattn.torch_sample_ops import kernels

Config = tuple[int, int, int]
"""A SampleConfig as plain values, in the order of its fields."""
Settings = dict[str, Any]

VOCAB_SIZES = (128256, 32000, 50257, 151936)  # 50257 is no multiple of anything
SMALL_VOCAB_SIZES = (100, 200, 300, 600, 1300)  # each with a tile of its own
BATCHES = (7, 1, 64)
_PROMPT = 40
# Near ties among the draws of a check: one may happen, and one in a hundred is not chance.
_FEW, _SHARE = 1, 100


def as_config(values: Config) -> Any:
    """The SampleConfig of plain values."""
    kernels()
    from fastattn.kernels.sampling.config import SampleConfig

    return SampleConfig(*values)


def chosen(config: Config | None) -> contextlib.AbstractContextManager[Any]:
    """Within it sampling runs with a config; None is what dispatch chooses."""
    if config is None:
        return contextlib.nullcontext()
    kernels()
    sampler = importlib.import_module("fastattn.kernels.sampling.sampler")
    return changed_choice(sampler, "select_sample_config", lambda _: as_config(config), "sampling")


# --- settings


def _numbers(batch: int, vocab_size: int, device: torch.device) -> list[Settings]:
    return [
        {},
        {"temperature": 0.0},
        {"temperature": 1.7},
        {"temperature": 0.8, "top_k": 40},
        {"top_k": 1},
        {"top_k": vocab_size - 3},
        {"top_p": 0.9},
        {"top_p": 1e-9},
        {"top_p": 0.9999},
        {"top_k": 50, "top_p": 0.9, "temperature": 0.7},
        {"min_p": 0.1},
        {"top_k": 30, "top_p": 0.95, "min_p": 0.02, "temperature": 1.3},
        {"top_p": 0.01, "min_p": 0.9, "min_tokens_to_keep": 5},
    ]


def _joint(batch: int, vocab_size: int, device: torch.device) -> list[Settings]:
    cuts = [{"top_k": 50, "top_p": 0.3}, {"top_k": 9, "top_p": 0.8}]
    return [{**cut, "joint": True} for cut in cuts]


def _rows(batch: int, vocab_size: int, device: torch.device) -> list[Settings]:
    """Another setting in each row, in turns: greedy and all cuts side by side."""

    def in_turns(*values: float) -> Tensor:
        turns = itertools.islice(itertools.cycle(values), batch)
        return torch.tensor(list(turns), device=device)

    return [
        {
            "temperature": in_turns(1.0, 0.5, 0.0, 2.0, 1.0),
            "top_k": in_turns(0, 7, 0, vocab_size, 3, 50).long(),
            "top_p": in_turns(1.0, 1.0, 0.9, 0.5),
            "min_p": in_turns(0.0, 0.1, 0.0, 0.0, 0.3),
            "min_tokens_to_keep": in_turns(1, 1, 4).long(),
        }
    ]


def _masks(batch: int, vocab_size: int, device: torch.device) -> list[Settings]:
    generator = torch.Generator(device).manual_seed(3)
    some = torch.rand(batch, vocab_size, generator=generator, device=device) < 0.5
    some[:, 3] = True
    bias = {3: 4.0, 1: -100.0, vocab_size // 2: float("-inf")}
    masks = {"allowed": pack_mask(some), "banned": [0, 5, vocab_size - 1], "logit_bias": bias}
    return [{**masks, "top_k": 20}, {**masks, "top_p": 0.9}, masks]


def _repetition(batch: int, vocab_size: int, device: torch.device) -> list[Settings]:
    cuts: list[Settings] = [{"top_k": 50, "top_p": 0.9}, {"temperature": 0.0}, {}]
    return [{**cut, "repetition_penalty": 1.2} for cut in cuts]


def _penalties(batch: int, vocab_size: int, device: torch.device) -> list[Settings]:
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
    return [{**penalties, "temperature": 0.8, "top_k": 40}, {**penalties, "top_p": 0.9}]


def _logprobs(batch: int, vocab_size: int, device: torch.device) -> list[Settings]:
    cuts: list[Settings] = [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.0}]
    found = [{**cut, "logprobs": 5} for cut in cuts]
    return [*found, {"logprobs": 5, "logprobs_of": "raw", "top_k": 50}]


GROUPS: dict[str, Callable[[int, int, torch.device], list[Settings]]] = {
    "numbers": _numbers,
    "repetition": _repetition,
    "a setting a row": _rows,
    "penalties": _penalties,
    "log-probabilities": _logprobs,
    "masks": _masks,
    "joint": _joint,
}
_WITH_STATE = {"repetition": False, "penalties": True}  # whether it counts
_STEPS = 3  # with a state


def make_rows(batch: int, vocab_size: int, dtype: str, device: torch.device) -> Tensor:
    """Logits, peaked and flat in turns; 7 rows are of every other kind, too.

    They are then: all -inf; all of the mass on one token; +inf twice; ties in masses; NaN; zeros of
    both signs, but for one token that is all.
    """
    generator = torch.Generator(device).manual_seed(batch)
    logits = torch.cat(
        [
            draw_logits(("peaked", "flat")[row % 2], (1, vocab_size), generator)
            for row in range(batch)
        ]
    )
    if batch == 7:
        tokens = torch.arange(vocab_size, device=device)
        logits[1] = float("-inf")
        logits[2, vocab_size // 3] = 60.0
        logits[3, [vocab_size // 2, vocab_size - 1]] = float("inf")
        logits[4] = (tokens % 10).float()
        logits[5, vocab_size - 2] = float("nan")
        logits[6] = torch.where(tokens % 2 == 0, -0.0, 0.0)
    return logits.to(DTYPES[dtype])


def _make_state(batch: int, vocab_size: int, counts: bool, device: torch.device) -> SamplerState:
    generator = torch.Generator(device).manual_seed(5)
    shape = (batch, _PROMPT)
    prompt = torch.randint(0, vocab_size, shape, generator=generator, device=device)
    state = SamplerState.from_prompt(prompt, vocab_size, counts=counts)
    if state.counts is not None:
        state.counts.scatter_add_(1, prompt, torch.ones_like(prompt, dtype=torch.int32))
    return state


def _seeds(batch: int, device: torch.device) -> Tensor:
    return torch.arange(batch, device=device) * 1_000_003 + 2**33


# --- checks


@dataclass(frozen=True)
class SampleCheck:
    """The sampling kernel beside the reference, one group of settings.

    Attributes:
        group: a key of GROUPS.
        dtype: of the logits, a key of DTYPES.
        vocab_size: tokens.
        batches: each is drawn from.
        config: values of a SampleConfig; None is what dispatch chooses.
    """

    group: str
    dtype: str
    vocab_size: int
    batches: tuple[int, ...] = BATCHES
    config: Config | None = None
    kind: ClassVar[str] = "sampler"

    def __str__(self) -> str:
        how = "" if self.config is None else f", {as_config(self.config)}"
        batches = ", ".join(map(str, self.batches))
        return f"sampler: {self.group}, {self.dtype}, V{self.vocab_size}, B {batches}{how}"

    def run(self, device: torch.device) -> Row:
        """Draws are the reference's but for near ties; states and log-probabilities are right.

        Raises:
            WrongResult: something is not; or near ties are too many to be that.
        """
        near_ties = draws = 0
        with chosen(self.config):
            for batch in self.batches:
                logits = make_rows(batch, self.vocab_size, self.dtype, device)
                for settings in GROUPS[self.group](batch, self.vocab_size, device):
                    ties, count = self._draw(logits, settings)
                    near_ties, draws = near_ties + ties, draws + count
        if near_ties > _FEW + draws // _SHARE:
            raise WrongResult(f"{near_ties} of {draws} draws are near ties: that is not chance")
        return {"draws": draws, "near_ties": near_ties}

    def _draw(self, logits: Tensor, settings: Settings) -> tuple[int, int]:
        """Near ties and draws of one setting; with a state, of some steps in a row."""
        batch, vocab_size = logits.shape
        state = None
        if self.group in _WITH_STATE:
            state = _make_state(batch, vocab_size, _WITH_STATE[self.group], logits.device)
        params = SamplingParams(seed=_seeds(batch, logits.device), **settings)
        near_ties, steps = 0, 1 if state is None else _STEPS
        for step in range(steps):
            try:
                drawn, problem, ties = check_draw(
                    logits, params, state, lambda: sample(logits, params, state, impl="triton")
                )
                if params.logprobs is not None:
                    check_logprobs(problem, drawn)
            except WrongResult as error:
                shown = {name: x for name, x in settings.items() if not isinstance(x, Tensor)}
                raise WrongResult(f"B {batch}, step {step}, {shown}: {error}") from error
            near_ties += ties
        return near_ties, steps * batch


@dataclass(frozen=True)
class SampleGraphCheck:
    """A step with state, captured once and replayed: the tokens of calls, and the state advances.

    Attributes:
        dtype, vocab_size, batch: of the logits.
        steps: replays.
    """

    dtype: str
    vocab_size: int = 128256
    batch: int = 7
    steps: int = 6
    kind: ClassVar[str] = "sampler graph"

    def __str__(self) -> str:
        return f"{self.steps} replays of a draw, {self.dtype}, V{self.vocab_size}, B {self.batch}"

    def run(self, device: torch.device) -> Row:
        """Replays beside calls, bit for bit.

        Raises:
            WrongResult: a token or the state differs.
        """
        logits = make_rows(self.batch, self.vocab_size, self.dtype, device)
        (settings, *_) = GROUPS["repetition"](self.batch, self.vocab_size, device)
        params = SamplingParams(seed=_seeds(self.batch, device), **settings)
        states = [_make_state(self.batch, self.vocab_size, False, device) for _ in range(2)]
        expected = [self._step(logits, params, states[0])() for _ in range(self.steps)]
        changes = [states[1].seen, states[1].step]
        replay = captured(self._step(logits, params, states[1]), changes)
        for number, own in enumerate(expected):
            if not torch.equal(replay(), own):
                raise WrongResult(f"replay {number} drew other tokens than the call")
        for name in ("seen", "step"):
            if not torch.equal(*(getattr(state, name) for state in states)):
                raise WrongResult(f"{name} after replays differs from that after calls")
        if int(states[1].step.min()) != self.steps:
            raise WrongResult(f"the step should be {self.steps}, got {states[1].step.tolist()}")
        return {"draws": self.steps * self.batch}

    @staticmethod
    def _step(logits: Tensor, params: SamplingParams, state: SamplerState) -> Callable[[], Tensor]:
        def run() -> Tensor:
            drawn: Any = sample(logits, params, state, impl="triton")
            return drawn

        return run


@dataclass(frozen=True)
class SampleInvarianceCheck:
    """Rows of a batch of 64, alone and in other batches and orders: the same tokens.

    Where batches have configs of their own, a row may differ if it is a near tie.

    Attributes:
        dtype, vocab_size: of the logits.
        group: a key of GROUPS without a state.
    """

    dtype: str
    vocab_size: int = 128256
    group: str = "numbers"
    kind: ClassVar[str] = "sampler, any batch"

    def __str__(self) -> str:
        return f"rows in batches of 1, 7 and 64, {self.dtype}, V{self.vocab_size}, {self.group}"

    def run(self, device: torch.device) -> Row:
        """Batches of some rows beside the whole.

        Raises:
            WrongResult: a token differs.
        """
        logits = make_rows(64, self.vocab_size, self.dtype, device)
        seeds = _seeds(64, device)
        near_ties = 0
        for settings in GROUPS[self.group](64, self.vocab_size, device):
            together = self._tokens(logits, SamplingParams(seed=seeds, **settings))
            for rows in ((3,), (40,), (63, 1, 17, 2, 33, 8, 50)):
                index = torch.tensor(rows, device=device)
                params = SamplingParams(seed=seeds[index], **settings)
                own = self._tokens(logits[index], params)
                try:
                    near_ties += self._compare(logits[index], params, own, together[index])
                except WrongResult as error:
                    raise WrongResult(f"in a batch of {len(rows)}, {settings}: {error}") from error
        return {"near_ties": near_ties}

    def _tokens(self, logits: Tensor, params: SamplingParams) -> Tensor:
        drawn: Any = sample(logits, params, impl="triton")
        return drawn

    def _compare(
        self, logits: Tensor, params: SamplingParams, own: Tensor, together: Tensor
    ) -> int:
        """Near ties, which there are only where configs differ."""
        from fastattn.kernels.sampling.config import MEASURED_SAMPLE

        if MEASURED_SAMPLE:
            return check_tokens(make_sample_problem(logits, params, None), own, together)
        if not torch.equal(own, together):
            place = int((own != together).nonzero()[0])
            raise WrongResult(
                f"row {place} of it drew {int(own[place])}, and {int(together[place])} among 64"
            )
        return 0


# --- which


def sampling_checks(dtype: str) -> list[Any]:
    """All checks of sampling in one dtype; bfloat16 with all vocabularies, others take turns.

    Configs follow from the vocabulary, and from whether rows are few, and from nothing else.
    """
    checks: list[Any] = []
    for place, group in enumerate(GROUPS):
        sizes: tuple[int, ...] = (VOCAB_SIZES[place % len(VOCAB_SIZES)],)
        if dtype == "bf16":
            sizes = VOCAB_SIZES if group == "numbers" else (*sizes, 50257)
        if group in ("numbers", "repetition") and dtype != "fp16":
            # These are timed, and are to be found compiled then.
            sizes = (*TIMED_VOCAB_SIZES, *sizes)
        checks += [SampleCheck(group, dtype, size) for size in dict.fromkeys(sizes)]
    checks += [SampleGraphCheck(dtype), SampleInvarianceCheck(dtype)]
    if dtype == "bf16":
        checks += [SampleCheck("numbers", dtype, size) for size in SMALL_VOCAB_SIZES]
    return checks
