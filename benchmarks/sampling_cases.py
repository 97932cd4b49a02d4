"""Draws that are measured: shapes, settings, what they must read, and logits like a model's."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn import SamplerState, SamplingParams
from fastattn.sampling.bits import num_words

# Most telling first: the filtered draw, of batches that fill a chip and of one row.
SETTINGS: dict[str, dict[str, Any]] = {
    "top-k + top-p": {"top_k": 50, "top_p": 0.9},
    "top-p": {"top_p": 0.9},
    "temperature": {"temperature": 0.7},
    "penalty, top-k + top-p": {"repetition_penalty": 1.2, "top_k": 50, "top_p": 0.9},
    "greedy": {"temperature": 0.0},
}
BATCHES = (64, 1, 512, 256, 16, 4)
VOCAB_SIZES = (128256, 32000)
DTYPES = ("bfloat16", "float32")
PROMPT = 256  # tokens that a penalty finds in the state
_TILE_RECORD = 32  # bytes that a tile says of itself: three floats, five integers
_SEED_STEP = 1_000_003


@dataclass(frozen=True)
class SamplingCase:
    """A token for each row of logits.

    Attributes:
        batch, vocab_size: of the logits.
        setting: a key of SETTINGS.
        dtype: of the logits, a name in torch.
        family: "peaked", as a model's, or "flat", whose nucleus is most of the vocabulary.
        part: what is timed.
    """

    batch: int
    vocab_size: int
    setting: str
    dtype: str = "bfloat16"
    family: str = "peaked"
    part: str = "sampling"

    @property
    def flops(self) -> float:
        """None that count: a draw is bound by what it reads."""
        return 0.0

    @property
    def bytes(self) -> float:
        """Of the logits: the least that a draw reads."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return float(self.batch * self.vocab_size * itemsize)

    @property
    def memory_bytes(self) -> float:
        """Of the logits, what peers make of them in float32, and what the check makes of its rows:
        about 20 tensors of 8 bytes a token.
        """
        tokens = float(self.vocab_size)
        return self.bytes + 8 * 4 * self.batch * tokens + 20 * 8 * min(self.batch, 128) * tokens

    @property
    def has_state(self) -> bool:
        """Whether there is a penalty, which needs to know what was seen."""
        return "repetition_penalty" in SETTINGS[self.setting]

    @property
    def is_filtered(self) -> bool:
        """Whether tiles keep candidates."""
        return "top_p" in SETTINGS[self.setting]

    def predicted_bytes(self, block: int, capacity: int) -> float:
        """What fastattn's kernel reads and writes at most, if no row is searched again.

        The logits once; of each tile its record and `capacity` candidates of 6 bytes, written and
        read; a bit a token of the state, and the word and the step of the token that is drawn.
        """
        tiles = -(-self.vocab_size // block)
        tile = _TILE_RECORD + (6 * capacity if self.is_filtered else 0)
        # A tile reads the seed, and counts itself; the last one resets the counter.
        row = tiles * (2 * tile + 8 + 2 * 4) + 4 + 8
        if self.has_state:
            row += 4 * num_words(self.vocab_size) + tiles * 8 + 8 + 2 * 4
        return self.bytes + float(self.batch * row)

    def __str__(self) -> str:
        dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[self.dtype]
        text = f"{self.batch} x {self.vocab_size}, {self.setting}, {dtype}"
        return text if self.family == "peaked" else f"{text}, {self.family}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "label": str(self), "flops": self.flops, "bytes": self.bytes}


@dataclass(frozen=True, eq=False)
class SamplingInputs:
    """A case's tensors.

    Attributes:
        logits: (batch, vocab_size).
        seeds: int64 (batch,).
        input_ids: int64 (batch, PROMPT), what the state has seen, for those who have no state.
        state: where the setting has a penalty.
    """

    case: SamplingCase
    logits: Tensor
    seeds: Tensor
    input_ids: Tensor
    state: SamplerState | None

    @property
    def params(self) -> SamplingParams:
        """The setting, for `fastattn.sample`."""
        return SamplingParams(seed=self.seeds, **SETTINGS[self.case.setting])

    def rewind(self) -> None:
        """The state as before anything was drawn, and other seeds, in the same tensors: a draw from
        the same distribution with other noise.
        """
        self.seeds.add_(_SEED_STEP)
        fresh = _state(self.case, self.input_ids)
        if self.state is not None and fresh is not None:
            self.state.seen.copy_(fresh.seen)
            self.state.step.copy_(fresh.step)


def make_sampling_inputs(case: SamplingCase, device: torch.device, seed: int = 0) -> SamplingInputs:
    """Draws a case's tensors on the device, in pieces: float32 of the largest is 263 MB."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    logits = torch.empty(case.batch, case.vocab_size, dtype=dtype, device=device)
    for piece in logits.split(64):
        piece.copy_(draw_logits(case.family, tuple(piece.shape), generator))
    seeds = torch.arange(case.batch, device=device) * 7919 + seed * 104_729
    input_ids = torch.randint(
        0, case.vocab_size, (case.batch, PROMPT), generator=generator, device=device
    )
    return SamplingInputs(case, logits, seeds, input_ids, _state(case, input_ids))


def _state(case: SamplingCase, input_ids: Tensor) -> SamplerState | None:
    return SamplerState.from_prompt(input_ids, case.vocab_size) if case.has_state else None


def draw_logits(family: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Logits in float32, on the generator's device.

    "peaked" ones fall with the logarithm of a token's rank, twice as steep as Zipf's law, with
    noise, as a language model's do: a rank is a uniform number times the vocabulary. "flat" ones
    are normal with deviation 1.
    """
    device = generator.device
    noise = torch.randn(shape, generator=generator, device=device)
    if family == "flat":
        return noise
    rank = torch.rand(shape, generator=generator, device=device).mul_(shape[-1]).add_(1.0)
    return noise.mul_(0.5).sub_(rank.log_().mul_(2.0)).add_(10.0)


def sampling_cases(quick: bool = False) -> list[SamplingCase]:
    """The matrix, dtype by dtype and the larger vocabulary first, and some rows of flat logits."""

    def block(vocab_size: int, dtype: str) -> list[SamplingCase]:
        return [
            SamplingCase(batch, vocab_size, setting, dtype)
            for setting in SETTINGS
            for batch in BATCHES
        ]

    large, small = VOCAB_SIZES
    half, single = DTYPES
    cases = block(large, half)
    if quick:
        return cases
    cases += [SamplingCase(batch, large, "top-p", half, "flat") for batch in (64, 1)]
    return cases + block(large, single) + block(small, half) + block(small, single)


def sampling_sweep_cases(quick: bool = False) -> list[SamplingCase]:
    """The shapes on which configs are compared: of either class of batches, filtered and not."""
    large, half = VOCAB_SIZES[0], DTYPES[0]
    filtered = [SamplingCase(batch, large, "top-k + top-p", half) for batch in (64, 1, 256, 4)]
    if quick:
        return filtered[:2]
    return [*filtered, *(replace(case, setting="temperature") for case in filtered[:2])]
