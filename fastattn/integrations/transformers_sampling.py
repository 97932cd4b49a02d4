"""`fastattn.sample` as the draw of Hugging Face's `generate`.

    from fastattn.integrations.transformers_sampling import FastattnSampler, sample_generate

    params = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.2)
    model.generate(**inputs, do_sample=False, custom_generate=sample_generate,
                   sampling_params=params)
    model.generate(**inputs, do_sample=False,
                   logits_processor=LogitsProcessorList([FastattnSampler(params)]))

Both emit the tokens that a loop around `fastattn.nn.Sampler` draws from the same logits.
`sample_generate` reads the logits once; behind a logits processor `generate` still makes float32
scores and looks for the largest.

What must not be set twice. `generate` runs, in this order: its own processors (repetition_penalty,
no_repeat_ngram_size, bad_words_ids, min_length, ...), the caller's, then, with do_sample=True, its
warpers (temperature, top_k, top_p, min_p, typical_p, ...). So

- what its processors do comes before the draw, and adds to it: repetition_penalty in both would be
  applied twice, which raises where it can be seen;
- what its warpers do comes after `FastattnSampler` has drawn, and changes nothing: temperature,
  top_k, top_p and min_p belong into `SamplingParams`. do_sample=False leaves them out.

A model's own `generation_config` counts too: some set repetition_penalty, many temperature.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastattn.integrations.transformers_settings import (
    check_mode,
    check_params,
    is_on,
    params_of,
    warper_params,
)
from fastattn.sampling import Sample, SamplerState, SamplingParams, sample
from fastattn.validation import check_tensor, describe

__all__ = ["FastattnSampler", "params_of", "sample_generate"]

_WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
"""What `generate` makes of these settings, where do_sample is on."""


class FastattnSampler(LogitsProcessor):  # type: ignore[misc]
    """A logits processor that draws: the token drawn gets score 0, all others -inf.

    `generate` then emits that token, with do_sample False or True, `fastattn.sample`'s token for
    the scores it is given. It must be the last processor, and must not meet beams or an assistant,
    which draw otherwise. The module's description says what must not be set twice.

    Penalties and the noise's step follow from the `input_ids` of each call: what the first call
    shows is the prompt, what is appended afterwards the output. A call whose `input_ids` do not
    continue those of the last one begins anew, as another `generate` does; a `generate` of exactly
    what the last one returned goes on, unless `reset()` is called. The comparison makes the host
    wait for the device, as `generate` does anyway.

    Args:
        params: how to draw. A `seed` that is a number is that of every row: with
            num_return_sequences > 1 give a tensor of one a sequence, or None.
        pad_token_id: tokens of this id that lead a prompt are padding, which was not seen; but
            for the last of a prompt, which T5 and its kin start with.
        attention_mask: (batch, seqlen), or (batch / num_return_sequences, seqlen), non-zero for
            the real tokens of the prompt; instead of `pad_token_id`, for a single prompt.
        generation_config: that of the call, to be checked against `params`.
        impl: as for `sample`.

    Raises:
        ValueError: `generation_config` sets what `params` set, or beams or the like; both
            `pad_token_id` and `attention_mask` are given.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        params: SamplingParams | None = None,
        *,
        pad_token_id: int | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        impl: str = "auto",
    ) -> None:
        self.params = SamplingParams() if params is None else params
        check_params("params", self.params)
        if pad_token_id is not None and attention_mask is not None:
            raise ValueError("attention_mask must be None where pad_token_id is given, got both")
        if generation_config is not None:
            check_mode(generation_config)
            _check_set_once(self.params, generation_config, None)
        self.pad_token_id = pad_token_id
        self.attention_mask = attention_mask
        self.impl = impl
        self.samples: list[Sample] = []
        """What was drawn since the prompt, a `Sample` a step, where `params.logprobs` is set."""
        self.reset()

    def reset(self) -> None:
        """Forgets what was generated: the next call shows a prompt."""
        self._state: SamplerState | None = None
        # The prompt's length, and the ids that the next call shows unless a row has finished.
        self._prompt_length = 0
        self._expected: Tensor | None = None
        self.samples = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Draws a token for each row of `scores`.

        Args:
            input_ids: int64 (batch, seqlen), prompt and output so far.
            scores: (batch, vocab_size).

        Returns:
            `scores` with -inf for all but the drawn token, and 0 for it: a new tensor.

        Raises:
            ValueError: a row's scores hold NaN, or nothing above -inf; besides, as `sample`.
        """
        state = self._follow(input_ids, scores.shape[-1])
        drawn = sample(scores, self.params, state, impl=self.impl)
        if isinstance(drawn, Sample):
            self.samples.append(drawn)
        tokens = drawn.tokens if isinstance(drawn, Sample) else drawn
        failed = (tokens < 0).nonzero()[:, 0].tolist()
        if failed:
            raise ValueError(_no_distribution("scores", failed))
        column = tokens[:, None]
        self._expected = torch.cat([input_ids, column.to(input_ids.device)], 1)
        return torch.full_like(scores, -math.inf).scatter_(1, column, 0.0)

    def _follow(self, input_ids: Tensor, vocab_size: int) -> SamplerState:
        """The state that `input_ids` say."""
        expected = self._expected
        goes_on = (
            self._state is not None
            and expected is not None
            and self._state.vocab_size == vocab_size
            and (expected.shape, expected.device) == (input_ids.shape, input_ids.device)
            and torch.equal(expected[:, :-1], input_ids[:, :-1])
        )
        if goes_on and torch.equal(expected[:, -1], input_ids[:, -1]):  # type: ignore[index]
            return self._state  # type: ignore[return-value]
        if not goes_on:
            self.reset()
            self._prompt_length = input_ids.shape[1]
        # A row that has finished gets padding, not what was drawn.
        self._state = self._read(input_ids, vocab_size)
        return self._state

    def _read(self, input_ids: Tensor, vocab_size: int) -> SamplerState:
        real = torch.ones_like(input_ids, dtype=torch.bool)
        prompt, output = input_ids.tensor_split([self._prompt_length], 1)
        if self.attention_mask is not None:
            real[:, : self._prompt_length] = _mask_of_rows(self.attention_mask, prompt)
        elif self.pad_token_id is not None:
            leading = (prompt != self.pad_token_id).cumsum(1) == 0
            leading[:, -1] = False
            real[:, : self._prompt_length] = ~leading
        state = SamplerState.from_prompt(input_ids, vocab_size, real, self.params.needs_counts)
        state.step.fill_(output.shape[1])
        if state.counts is not None:
            ones = torch.ones_like(output, dtype=torch.int32)
            state.counts.scatter_add_(1, output, ones)
        return state


def sample_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: Any = None,
    generation_config: GenerationConfig | None = None,
    synced_gpus: bool = False,
    streamer: Any = None,
    sampling_params: SamplingParams | None = None,
    token_streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """The decoding loop of `generate` with `fastattn.sample` for its draw.

        model.generate(**inputs, custom_generate=sample_generate, sampling_params=params)

    `generate` prepares inputs, cache, processors and stopping criteria, and calls this; the
    arguments above `sampling_params` are what it passes. Its processors run first, on float32
    scores. Where there are none, the logits are read in place, in their own dtype.

    Args:
        sampling_params: how to draw, instead of the temperature, top_k, top_p and min_p of the
            model's own generation config. None: those of the call's config; greedy unless
            do_sample is on.
        token_streamer: a streamer; it is given the prompt, then each token. It is not called
            `streamer`, because `generate` keeps that one from what it calls: with
            `generate(streamer=...)` only the prompt arrives.

    Returns:
        int64 (batch, seqlen + new). With return_dict_in_generate what `generate` returns, made by
        its own loop around `FastattnSampler`: `scores` are -inf but for the drawn token. With
        `sampling_params.logprobs` it has `logprobs`, float32 (batch, new), also `top_tokens` and
        `top_logprobs` (batch, new, n); those of a row that has finished mean nothing.

    Raises:
        ValueError: beams, an assistant or a cut that is not served; something is set twice; a
            single seed for several sequences of a prompt; a row's logits have no distribution.
    """
    if generation_config is None or stopping_criteria is None:
        raise ValueError(
            "generation_config and stopping_criteria must be given: pass sample_generate to "
            "model.generate(custom_generate=...), which makes them"
        )
    if synced_gpus:
        raise ValueError("synced_gpus must be off: sample_generate does not wait for other ranks")
    processors = logits_processor if logits_processor is not None else LogitsProcessorList()
    params, processors = _settings(model, sampling_params, generation_config, processors)
    wants_dict = generation_config.return_dict_in_generate
    if params.logprobs is not None and not wants_dict:
        raise ValueError("return_dict_in_generate must be True where logprobs are asked for")
    if token_streamer is not None:
        streamer = token_streamer
        streamer.put(input_ids.cpu())

    encoder_decoder = model.config.is_encoder_decoder
    mask = model_kwargs.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
    if mask is not None and mask.shape != input_ids.shape:
        mask = None  # of embeddings, or of what a cache holds
    if wants_dict:
        sampler = FastattnSampler(params, attention_mask=mask)
        config = copy.copy(generation_config)
        config.do_sample = False
        output = model._sample(
            input_ids,
            LogitsProcessorList([*processors, sampler]),
            stopping_criteria,
            config,
            streamer=streamer,
            **model_kwargs,
        )
        return _with_logprobs(output, sampler.samples, input_ids.shape[1])
    return _loop(
        model, input_ids, params, processors, stopping_criteria, generation_config, streamer, mask,
        model_kwargs,
    )  # fmt: skip


def _loop(
    model: Any,
    input_ids: Tensor,
    params: SamplingParams,
    processors: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    streamer: Any,
    mask: Tensor | None,
    model_kwargs: dict[str, Any],
) -> Tensor:
    pad = generation_config._pad_token_tensor if _has_eos(stopping_criteria) else None
    pad = None if pad is None else pad.to(input_ids.device)
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    compiles = model._valid_auto_compile_criteria(model_kwargs, generation_config)
    forward = model.get_compiled_call(generation_config.compile_config) if compiles else model
    state: SamplerState | None = None
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    with model._optimize_model_for_decode():
        while True:
            model_kwargs = model._update_model_kwargs_for_generation(
                outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
            )
            logits = outputs.logits[:, -1].to(input_ids.device)
            del outputs  # the prompt's logits are large
            if processors or logits.dtype == torch.float64:
                logits = processors(input_ids, logits.to(torch.float32, copy=True))
            if state is None:
                vocab_size, counts = logits.shape[1], params.needs_counts
                state = SamplerState.from_prompt(input_ids, vocab_size, mask, counts)
            tokens = sample(logits, params, state)
            assert isinstance(tokens, Tensor)
            failed = unfinished & (tokens < 0)
            tokens = tokens.clamp(min=0) if pad is None else torch.where(unfinished, tokens, pad)
            input_ids = torch.cat([input_ids, tokens[:, None]], 1)
            unfinished = unfinished & ~stopping_criteria(input_ids, None)
            # One wait for the device a step.
            has_failed, go_on = torch.stack([failed.any(), unfinished.any()]).tolist()
            if has_failed:
                raise ValueError(_no_distribution("logits", failed.nonzero()[:, 0].tolist()))
            if streamer is not None:
                streamer.put(tokens.cpu())
            if not go_on:
                break
            model_inputs = model.prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=1 if model_kwargs["use_cache"] else None,
                **model_kwargs,
            )
            outputs = forward(**model_inputs, return_dict=True)
    if streamer is not None:
        streamer.end()
    return input_ids


def _settings(
    model: Any,
    sampling_params: SamplingParams | None,
    config: GenerationConfig,
    processors: LogitsProcessorList,
) -> tuple[SamplingParams, LogitsProcessorList]:
    """How to draw, and the processors that are left to run before."""
    check_mode(config)
    if any(isinstance(processor, FastattnSampler) for processor in processors):
        raise ValueError(
            "logits_processor must not hold a FastattnSampler: sample_generate draws itself"
        )
    params = warper_params(config) if sampling_params is None else sampling_params
    check_params("sampling_params", params)
    if sampling_params is not None:
        _check_set_once(params, config, model.generation_config)
    sequences = config.num_return_sequences or 1
    if sequences > 1 and isinstance(params.seed, int):
        raise ValueError(
            f"seed must be a tensor of one a sequence, or None, where num_return_sequences is "
            f"{sequences}: with seed={params.seed} all sequences of a prompt would be alike"
        )
    left = LogitsProcessorList(processors)
    if config.do_sample:
        for name, warper in _WARPERS.items():
            if is_on(config, name):
                # The last of its kind is the one that generate made of the config.
                places = [i for i, processor in enumerate(left) if type(processor) is warper]
                if places:
                    del left[places[-1]]
    repeats = any(type(one) is RepetitionPenaltyLogitsProcessor for one in left)
    if params.needs_seen and repeats:
        raise ValueError(_twice("repetition_penalty", "a logits processor of generate"))
    return params, left


def _check_set_once(
    params: SamplingParams, config: GenerationConfig, own: GenerationConfig | None
) -> None:
    """Raises where the config of a call sets what `params` say.

    `own` is the model's, whose warpers, and those that are defaults, are nobody's wish.
    """
    if params.needs_seen and is_on(config, "repetition_penalty"):
        raise ValueError(_twice("repetition_penalty", "the generation config"))
    if not config.do_sample:
        return
    defaults = GenerationConfig._get_default_generation_params()
    for name in _WARPERS:
        value = getattr(config, name)
        usual = (defaults.get(name), None if own is None else getattr(own, name))
        if is_on(config, name) and value not in usual:
            raise ValueError(
                f"{name} = {value} of the generation config would have no effect: set it in "
                "SamplingParams, or pass do_sample=False"
            )


def _twice(name: str, where: str) -> str:
    return f"{name} must be set once, in SamplingParams or by {where}: it would be applied twice"


def _has_eos(stopping_criteria: Any) -> bool:
    return any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)


def _no_distribution(name: str, rows: list[int]) -> str:
    return (
        f"{name} must have a number above -inf and no NaN, got rows {rows} without a distribution"
    )


def _mask_of_rows(mask: Tensor, prompt: Tensor) -> Tensor:
    """The mask of a prompt whose rows `generate` may have repeated for several sequences."""
    check_tensor("attention_mask", mask)
    batch, length = prompt.shape
    if mask.dim() != 2 or mask.shape[1] != length or not mask.shape[0] or batch % mask.shape[0]:
        raise ValueError(
            f"attention_mask must be of shape ({batch}, {length}) like the prompt, got "
            f"{describe(mask)}; for prompts of any shape give pad_token_id instead"
        )
    return (mask != 0).repeat_interleave(batch // mask.shape[0], 0).to(prompt.device)


def _with_logprobs(output: Any, samples: list[Sample], prompt_length: int) -> Any:
    if samples:
        steps = output.sequences.shape[1] - prompt_length
        for name in ("logprobs", "top_tokens", "top_logprobs"):
            columns = [getattr(one, name) for one in samples[:steps]]
            if columns[0] is not None:
                output[name] = torch.stack(columns, 1)
    return output
