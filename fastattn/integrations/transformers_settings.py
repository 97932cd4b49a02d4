"""What a Hugging Face GenerationConfig says, as SamplingParams."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from fastattn.sampling import SamplingParams

_OFF: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0,),
    "top_k": (0,),
    "top_p": (1.0,),
    "min_p": (),
    "repetition_penalty": (1.0,),
}
"""With which values a setting does nothing; None is one for all."""

_LATE = {
    "typical_p": ("fastattn.sampling.filters.typical_filter", lambda value: value < 1.0),
    "epsilon_cutoff": ("fastattn.sampling.filters.epsilon_filter", lambda value: 0.0 < value < 1.0),
    "eta_cutoff": ("fastattn.sampling.filters.eta_filter", lambda value: 0.0 < value < 1.0),
    "top_h": (None, lambda value: True),
    "watermarking_config": (None, lambda value: True),
}
"""What `generate` does after top_p and min_p: what serves them instead, when they are on."""

_PROCESSORS: dict[str, tuple[Any, ...]] = {
    "guidance_scale": (1, 1.0),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "begin_suppress_tokens": ([],),
}
"""What depends on more than the logits and the tokens seen, with the values that are off."""


def params_of(generation_config: GenerationConfig) -> SamplingParams:
    """The settings that draw as `generate` does with this config.

        params = params_of(GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9))

    Served: do_sample (off: temperature 0), temperature, top_k, top_p, min_p, repetition_penalty,
    bad_words_ids and sequence_bias of single tokens, suppress_tokens. None stands for the default
    that `generate` fills in: do_sample alone means top_k=50. What only says how long and in what
    form to generate is passed over, and so is renormalize_logits, which changes no draw.

    Raises:
        ValueError: the config has what cannot be said so; the message gives every reason.
    """
    reasons = _mode_reasons(generation_config)
    for name, off in _PROCESSORS.items():
        value = getattr(generation_config, name, None)
        if value is not None and value not in off:
            reasons.append(
                f"{name} = {value!r} depends on more than the logits and the tokens seen: leave it "
                "to generate, whose processors run before the draw"
            )
    banned = _single_tokens(generation_config, reasons)
    bias = _single_biases(generation_config, reasons)
    if bias and is_on(generation_config, "repetition_penalty"):
        reasons.append(
            "sequence_bias and repetition_penalty: generate adds the bias first, SamplingParams "
            "apply the penalty first"
        )
    _refuse(reasons)
    cuts = warper_params(generation_config)
    penalty = generation_config.repetition_penalty
    return SamplingParams(
        temperature=cuts.temperature,
        top_k=cuts.top_k,
        top_p=cuts.top_p,
        min_p=cuts.min_p,
        repetition_penalty=1.0 if penalty is None else penalty,
        logit_bias=bias or None,
        banned=banned or None,
    )


def warper_params(config: GenerationConfig) -> SamplingParams:
    """Of do_sample, temperature, top_k, top_p and min_p alone."""
    if not config.do_sample:
        return SamplingParams(temperature=0.0)
    defaults = GenerationConfig._get_default_generation_params()
    values = {}
    for name in ("temperature", "top_k", "top_p", "min_p"):
        value = getattr(config, name)
        value = defaults.get(name) if value is None else value
        if value is not None:
            values[name] = value
    return SamplingParams(**values)


def check_mode(config: GenerationConfig) -> None:
    """Raises ValueError, with every reason, where tokens are not drawn one by one from cuts that
    `SamplingParams` have."""
    _refuse(_mode_reasons(config))


def check_params(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is SamplingParams."""
    if not isinstance(value, SamplingParams):
        raise TypeError(f"{name} must be SamplingParams, got {value!r} ({type(value).__name__})")


def is_on(config: GenerationConfig, name: str) -> bool:
    """Whether a setting of `_OFF` does something."""
    value = getattr(config, name)
    return value is not None and value not in _OFF[name]


def _mode_reasons(config: GenerationConfig) -> list[str]:
    reasons = []
    mode = config.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        reasons.append(f"its mode is {mode}, which does not draw token by token")
    for name, (instead, on) in _LATE.items():
        value = getattr(config, name, None)
        used = config.do_sample or name == "watermarking_config"
        if used and value is not None and on(value):
            hint = f"; see {instead}" if instead else ""
            reasons.append(f"{name} = {value!r} is nothing that SamplingParams have{hint}")
    return reasons


def _refuse(reasons: list[str]) -> None:
    if reasons:
        listed = "\n".join(f"- {reason}" for reason in reasons)
        raise ValueError(f"generation_config cannot be served by SamplingParams:\n{listed}")


def _single_tokens(config: GenerationConfig, reasons: list[str]) -> list[int]:
    """The token ids that are never drawn."""
    eos = config.eos_token_id
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    banned = [int(token) for token in config.suppress_tokens or []]
    for word in config.bad_words_ids or []:
        if len(word) != 1:
            reasons.append(f"bad_words_ids has {word}: only words of one token can be banned")
        elif word[0] not in ends:  # generate lets a sequence end all the same
            banned.append(int(word[0]))
    return banned


def _single_biases(config: GenerationConfig, reasons: list[str]) -> dict[int, float]:
    """What is added to logits, by token id."""
    given = config.sequence_bias or {}
    bias = {}
    for words, value in given.items() if isinstance(given, dict) else given:
        if len(words) != 1:
            reasons.append(f"sequence_bias has {list(words)}: only single tokens can be biased")
        else:
            bias[int(words[0])] = float(value)
    return bias
