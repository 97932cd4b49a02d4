"""Who draws tokens: fastattn, the peers installed here, and the floor, one pass over the logits.

A peer that is not there keeps its place, with the reason, as in `providers.py`. Peers convert
logits to float32 first, as FlashInfer's documentation asks and `generate` does: that is part of
what they do for a draw.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import FLOOR
from benchmarks.providers import Provider, find_module
from benchmarks.sampling_cases import SETTINGS, SamplingCase, SamplingInputs
from fastattn import sample
from fastattn.sampling.bits import unpack_mask
from fastattn.version import __version__

AMAX = "logits.amax"
SORT_CHAIN = "torch sort chain"
FLASHINFER = "FlashInfer"
TRANSFORMERS = "transformers"


def find_sampling_providers() -> list[Provider]:
    """Everyone, installed or not; fastattn first."""
    return [
        fastattn_sampling(),
        Provider(AMAX, _amax, f"torch {torch.__version__}", note=lambda _: {"role": FLOOR}),
        flashinfer_sampling(),
        replace(flashinfer_sampling(from_probs=True), name=f"{FLASHINFER}, probabilities"),
        Provider(SORT_CHAIN, _sort_chain, f"torch {torch.__version__}"),
        transformers_sampling(),
    ]


def fastattn_sampling(name: str = "fastattn", impl: str = "triton") -> Provider:
    """The public function, with the config that dispatch chooses; it also marks the state."""

    def prepare(inputs: SamplingInputs) -> Callable[[], Any]:
        params = inputs.params
        return lambda: sample(inputs.logits, params, inputs.state, impl=impl)

    return Provider(name, prepare, __version__, note=_chosen if impl == "triton" else _nothing)


def _chosen(inputs: SamplingInputs) -> dict[str, Any]:
    """The config that dispatch chooses, and what it is predicted to move."""
    from benchmarks.sampling_sweep import config_fields, current_config

    config = current_config(inputs.case, inputs.logits.device)
    return {**config_fields(config), "predicted_bytes": inputs.case.predicted_bytes(*config[:2])}


def _nothing(inputs: SamplingInputs) -> dict[str, Any]:
    return {}


def _amax(inputs: SamplingInputs) -> Callable[[], Tensor]:
    """The floor: the largest logit of each row, which any draw has to read as much for."""
    return lambda: inputs.logits.amax(-1)


def _penalized(inputs: SamplingInputs) -> Callable[[], Tensor]:
    """Logits as float32, after the repetition penalty; what was seen is a dense mask by then."""
    penalty = SETTINGS[inputs.case.setting].get("repetition_penalty", 1.0)
    if penalty == 1.0 or inputs.state is None:
        return inputs.logits.float
    seen = unpack_mask(inputs.state.seen, inputs.case.vocab_size)

    def run() -> Tensor:
        scores = inputs.logits.float()
        return torch.where(
            seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores
        )

    return run


def _sort_chain(inputs: SamplingInputs) -> Callable[[], Tensor]:
    """Sort, softmax, cumulative sum, mask, multinomial; where nothing is cut, no sort."""
    setting, scores_of = SETTINGS[inputs.case.setting], _penalized(inputs)
    temperature = setting.get("temperature", 1.0)
    top_k, top_p = setting.get("top_k", 0), setting.get("top_p", 1.0)
    if temperature == 0.0:
        return lambda: inputs.logits.argmax(-1)

    def run() -> Tensor:
        scores = scores_of()
        if temperature != 1.0:
            # In place where float32 is a copy: the logits are the model's, and not to be changed.
            divided = scores.div_ if scores.data_ptr() != inputs.logits.data_ptr() else scores.div
            scores = divided(temperature)
        if not top_k and top_p == 1.0:
            return torch.multinomial(scores.softmax(-1), 1)[:, 0]
        scores, tokens = scores.sort(-1, descending=True)
        if top_k:
            scores, tokens = scores[:, :top_k], tokens[:, :top_k]
        p = scores.softmax(-1)
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
        return tokens.gather(1, torch.multinomial(p, 1))[:, 0]

    return run


def flashinfer_sampling(*, from_probs: bool = False) -> Provider:
    """FlashInfer 0.6's samplers. Temperature alone it can draw in two ways, which are both timed.

    Args:
        from_probs: with its own softmax, which takes the temperature, and a draw from that.
    """
    library, version, absent = find_module("flashinfer.sampling")
    if not absent:
        _, version, absent = find_module("flashinfer")

    def prepare(inputs: SamplingInputs) -> Callable[[], Tensor]:
        setting, logits = SETTINGS[inputs.case.setting], inputs.logits
        temperature = setting.get("temperature", 1.0)
        # Half precision over float32 of as many dimensions is float32, in one pass.
        heat = torch.full((1, 1), temperature, dtype=torch.float32, device=logits.device)
        # Its draws follow from a seed and an offset that a call uses up: as much as its own
        # generator would go on. A captured graph repeats the numbers it was captured with.
        offsets = itertools.count(0, inputs.case.batch * inputs.case.vocab_size)

        def place() -> dict[str, int]:
            return {"seed": 11, "offset": next(offsets)}

        def top_k_top_p() -> Tensor:
            return library.top_k_top_p_sampling_from_logits(
                logits.float(), setting["top_k"], setting["top_p"], **place()
            )

        def top_p() -> Tensor:
            probs = library.softmax(logits.float())
            return library.top_p_sampling_from_probs(probs, setting["top_p"], **place())

        def from_softmax() -> Tensor:
            probs = library.softmax(logits.float(), temperature=temperature)
            return library.sampling_from_probs(probs, **place())

        def from_logits() -> Tensor:
            return library.sampling_from_logits(logits / heat, **place())

        if "top_k" in setting:
            return top_k_top_p
        if "top_p" in setting:
            return top_p
        return from_softmax if from_probs else from_logits

    def skip(case: SamplingCase) -> str:
        if case.has_state:
            return "it has no penalties"
        if case.setting == "greedy":
            return "it has no greedy draw"
        if from_probs and case.is_filtered:
            return "timed as FlashInfer"
        return ""

    return Provider(FLASHINFER, prepare, version, absent, skip)


def transformers_sampling() -> Provider:
    """transformers' processors and warpers in the order of `generate`, and multinomial."""
    processors, version, absent = find_module("transformers.generation.logits_process")
    if not absent:
        _, version, absent = find_module("transformers")

    def prepare(inputs: SamplingInputs) -> Callable[[], Tensor]:
        setting = SETTINGS[inputs.case.setting]
        steps: list[Any] = []
        for name, processor in (
            ("repetition_penalty", "RepetitionPenaltyLogitsProcessor"),
            ("temperature", "TemperatureLogitsWarper"),
            ("top_k", "TopKLogitsWarper"),
            ("top_p", "TopPLogitsWarper"),
        ):
            if setting.get(name):
                steps.append(getattr(processors, processor)(setting[name]))

        def run() -> Tensor:
            scores = inputs.logits.float()
            for step in steps:
                scores = step(inputs.input_ids, scores)
            if not steps:
                return scores.argmax(-1)
            return torch.multinomial(scores.softmax(-1), 1)[:, 0]

        return run

    return Provider(TRANSFORMERS, prepare, version, absent)
