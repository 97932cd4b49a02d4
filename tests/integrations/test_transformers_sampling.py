"""fastattn's draw within Hugging Face's generate, against its own and a loop written by hand."""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import GenerationConfig, LogitsProcessorList

from fastattn.integrations.transformers_sampling import (
    FastattnSampler,
    params_of,
    sample_generate,
)
from fastattn.nn import Sampler
from fastattn.sampling import SamplerState, SamplingParams, reference

VOCAB = 60
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(
    temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.3, presence_penalty=0.2,
    frequency_penalty=0.1, seed=11,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        yield


def make(kind: str) -> Any:
    torch.manual_seed(3)
    ids = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=128,
            tie_word_embeddings=False, **ids,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "t5":
        config = transformers.T5Config(
            vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4,
            decoder_start_token_id=0, tie_word_embeddings=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=64, **ids,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    # Freshly made, a model gives all tokens about the same probability.
    torch.nn.init.normal_(model.lm_head.weight, std=0.6 if kind != "t5" else 0.3)
    return model.eval()


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return make("llama")


def padded() -> dict[str, torch.Tensor]:
    input_ids = torch.tensor([[0, 0, 0, 5, 6, 7], [9, 8, 7, 6, 5, 4], [0, 3, 40, 41, 42, 43]])
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}


def by_processor(model: Any, params: SamplingParams, inputs: dict[str, Any], **options: Any) -> Any:
    processor = FastattnSampler(params, pad_token_id=options.get("pad_token_id", 0))
    return model.generate(**inputs, logits_processor=LogitsProcessorList([processor]), **options)


def by_loop(model: Any, params: SamplingParams, inputs: dict[str, Any], **options: Any) -> Any:
    return model.generate(
        **inputs, custom_generate=sample_generate, sampling_params=params, **options
    )


def by_hand(
    model: Any, params: SamplingParams, inputs: dict[str, Any], max_new_tokens: int = 20
) -> torch.Tensor:
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    sampler = Sampler(params)
    sampler.start(tokens, mask)
    for _ in range(max_new_tokens):
        position = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(tokens, attention_mask=mask, position_ids=position).logits[:, -1]
        tokens = torch.cat([tokens, sampler(logits)[:, None]], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return tokens


WAYS = [by_processor, by_loop]
Way = Callable[..., Any]


def ends_of(model: Any, params: SamplingParams = GREEDY, step: int = 4) -> int:
    """A token that ends one sequence of the padded batch there, before the others."""
    return int(by_loop(model, params, padded(), max_new_tokens=20)[1, 6 + step])


# ---- the same tokens


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_greedy_is_generate(model: Any, way: Way, do_sample: bool) -> None:
    for eos in (None, ends_of(model)):
        options = {"max_new_tokens": 20, "eos_token_id": eos, "pad_token_id": 0}
        wanted = model.generate(**padded(), do_sample=False, **options)
        got = way(model, GREEDY, padded(), do_sample=do_sample, **options)
        assert got.tolist() == wanted.tolist()
    assert (wanted[1, -3:] == 0).all()  # that row ended


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("do_sample", [False, True])
def test_seeds_draw_as_a_loop_by_hand(model: Any, way: Way, do_sample: bool) -> None:
    wanted = by_hand(model, SAMPLED, padded())
    assert len(set(wanted[0, 6:].tolist())) > 8
    got = way(model, SAMPLED, padded(), max_new_tokens=20, do_sample=do_sample)
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_end_leave_the_others_alone(llama: Any, way: Way) -> None:
    wanted = by_hand(llama, SAMPLED, padded())
    eos = int(wanted[1, 9])
    got = way(llama, SAMPLED, padded(), max_new_tokens=20, eos_token_id=eos, pad_token_id=0)
    for one, all_of_it in zip(got[:, 6:].tolist(), wanted[:, 6:].tolist(), strict=True):
        end = all_of_it.index(eos) + 1 if eos in all_of_it else 20
        assert one == (all_of_it[:end] + [0] * 20)[: len(one)]
    assert got[1, 10:].eq(0).all()
    assert got.shape[1] > 12


@pytest.mark.parametrize("way", WAYS)
def test_repetition_penalty_is_that_of_transformers(model: Any, way: Way) -> None:
    inputs = {"input_ids": torch.tensor([[9, 8, 7, 6, 5, 4]])}
    free = model.generate(**inputs, max_new_tokens=30)
    wanted = model.generate(**inputs, max_new_tokens=30, repetition_penalty=1.7)
    assert wanted.tolist() != free.tolist()
    params = SamplingParams(temperature=0.0, repetition_penalty=1.7)
    assert way(model, params, inputs, max_new_tokens=30).tolist() == wanted.tolist()


@pytest.mark.parametrize("way", WAYS)
def test_padding_was_not_seen(llama: Any, way: Way) -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=3.0)
    alone = {"input_ids": torch.tensor([[5, 6, 7]])}
    wanted = way(llama, params, alone, max_new_tokens=5)
    pad = int(wanted[0, 3])  # what the model would say first
    assert pad not in (5, 6, 7)
    inputs = padded()
    inputs["input_ids"][inputs["attention_mask"] == 0] = pad
    got = way(llama, params, inputs, max_new_tokens=5, pad_token_id=pad)
    assert got[0, 3:].tolist() == wanted[0].tolist()
    seen = LogitsProcessorList([FastattnSampler(params)])
    careless = llama.generate(**inputs, max_new_tokens=5, logits_processor=seen)
    assert careless[0, 6] != pad
    mask = inputs["attention_mask"]
    masked = LogitsProcessorList([FastattnSampler(params, attention_mask=mask)])
    assert torch.equal(llama.generate(**inputs, max_new_tokens=5, logits_processor=masked), got)


@pytest.mark.parametrize("way", WAYS)
def test_a_seed_for_each_row(llama: Any, way: Way) -> None:
    row = torch.tensor([[9, 8, 7, 6, 5, 4]])
    seeds = torch.tensor([4, 5, 4])
    inputs = {"input_ids": row.repeat(3, 1)}
    params = SamplingParams(seed=seeds, repetition_penalty=1.2)
    got = way(llama, params, inputs, max_new_tokens=12)
    assert torch.equal(got[0], got[2]) and not torch.equal(got[0], got[1])
    for seed, tokens in zip((4, 5), got, strict=False):
        alone = way(
            llama,
            SamplingParams(seed=seed, repetition_penalty=1.2),
            {"input_ids": row},
            max_new_tokens=12,
        )
        assert alone[0].tolist() == tokens.tolist()


@pytest.mark.parametrize("way", WAYS)
def test_without_a_seed_torch_seeds(llama: Any, way: Way) -> None:
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(way(llama, SamplingParams(), padded(), max_new_tokens=12).tolist())
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("way", WAYS)
def test_several_sequences_of_a_prompt(llama: Any, way: Way) -> None:
    params = SamplingParams(seed=torch.arange(6), repetition_penalty=1.3)
    got = way(llama, params, padded(), max_new_tokens=10, num_return_sequences=2, do_sample=True)
    expanded = {name: value.repeat_interleave(2, 0) for name, value in padded().items()}
    assert got.tolist() == by_hand(llama, params, expanded, 10).tolist()
    assert got[0].tolist() != got[1].tolist()


def test_a_mask_of_the_prompts_serves_all_their_sequences(llama: Any) -> None:
    params = SamplingParams(seed=torch.arange(6), repetition_penalty=1.3)
    inputs = padded()
    processor = FastattnSampler(params, attention_mask=inputs["attention_mask"])
    options = {"max_new_tokens": 10, "num_return_sequences": 2, "do_sample": True}
    got = llama.generate(**inputs, logits_processor=LogitsProcessorList([processor]), **options)
    assert torch.equal(got, by_processor(llama, params, inputs, **options))


def test_bfloat16_and_an_encoder_with_decoder(llama: Any) -> None:
    half = make("llama").bfloat16()
    translator = make("t5")
    for one in (half, translator):
        ways = [way(one, SAMPLED, padded(), max_new_tokens=10).tolist() for way in WAYS]
        assert ways[0] == ways[1]


# ---- a processor's memory


def test_another_generate_begins_anew(llama: Any) -> None:
    processor = FastattnSampler(SAMPLED)
    options = {"logits_processor": LogitsProcessorList([processor])}
    first = torch.tensor([[5, 6, 7]])
    # The second prompt is as long as the first with its output; the third is as the first.
    for prompt in (first, torch.tensor([[9, 9, 9, 9, 8]]), first, torch.tensor([[5, 6], [7, 8]])):
        got = llama.generate(input_ids=prompt, max_new_tokens=2, **options)
        fresh = LogitsProcessorList([FastattnSampler(SAMPLED)])
        wanted = llama.generate(input_ids=prompt, max_new_tokens=2, logits_processor=fresh)
        assert got.tolist() == wanted.tolist()
        assert processor._state.step.tolist() == [2] * len(prompt)


def test_what_was_returned_goes_on_unless_reset(llama: Any) -> None:
    prompt = torch.tensor([[5, 6, 7]])
    processor = FastattnSampler(SAMPLED)

    def generate(input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        return llama.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),  # or else drawn 0s pass for padding
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([processor]),
        )

    whole = generate(prompt, 12)
    assert torch.equal(generate(generate(prompt, 7), 5), whole)
    part = generate(prompt, 7)
    processor.reset()
    again = generate(part, 5)
    inputs = {"input_ids": part, "attention_mask": torch.ones_like(part)}
    assert torch.equal(again, by_loop(llama, SAMPLED, inputs, max_new_tokens=5))
    assert not torch.equal(again, whole)


def test_memory_follows_what_was_appended() -> None:
    processor = FastattnSampler(SamplingParams(seed=1, frequency_penalty=0.5))
    prompt = torch.tensor([[5, 6], [7, 8]])
    processor(prompt, torch.zeros(2, VOCAB))
    # Row 1 has ended: 0 is appended, whatever was drawn.
    first = int(processor._expected[0, -1])
    appended = torch.cat([prompt, torch.tensor([[first], [0]])], 1)
    state = processor._follow(appended, VOCAB)
    wanted = torch.zeros(2, VOCAB, dtype=torch.int32)
    wanted[0, first] = wanted[1, 0] = 1
    assert torch.equal(state.counts, wanted)
    assert torch.equal(state.seen, SamplerState.from_prompt(appended, VOCAB).seen)
    assert state.step.tolist() == [1, 1]


def test_scores_are_of_the_drawn_token_alone() -> None:
    scores = torch.randn(2, VOCAB, dtype=torch.float32)
    before = scores.clone()
    got = FastattnSampler(GREEDY)(torch.tensor([[1], [2]]), scores)
    assert torch.equal(scores, before)
    assert got.isfinite().sum().item() == 2
    assert got.gather(1, before.argmax(1, keepdim=True)).tolist() == [[0.0], [0.0]]


# ---- the loop's manners


class Collect(transformers.generation.streamers.BaseStreamer):
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("as_dict", [False, True])
def test_streamers(llama: Any, as_dict: bool) -> None:
    inputs = {"input_ids": torch.tensor([[9, 8, 7]])}
    wanted, got = Collect(), Collect()
    processor = LogitsProcessorList([FastattnSampler(SAMPLED)])
    llama.generate(**inputs, max_new_tokens=6, logits_processor=processor, streamer=wanted)
    by_loop(
        llama, SAMPLED, inputs, max_new_tokens=6, token_streamer=got,
        return_dict_in_generate=as_dict,
    )  # fmt: skip
    assert got.got == wanted.got
    assert len(got.got) == 7 and got.ended and wanted.ended


def test_stopping_criteria(llama: Any) -> None:
    def stop(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 10)

    criteria = transformers.StoppingCriteriaList([stop])
    got = by_loop(llama, SAMPLED, padded(), max_new_tokens=20, stopping_criteria=criteria)
    assert got.tolist() == by_hand(llama, SAMPLED, padded(), 4).tolist()


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}]
)
def test_caches(llama: Any, options: dict[str, Any]) -> None:
    got = by_loop(llama, SAMPLED, padded(), max_new_tokens=6, **options)
    assert got.tolist() == by_hand(llama, SAMPLED, padded(), 6).tolist()


def test_processors_run_before_the_draw(llama: Any) -> None:
    free = by_loop(llama, SAMPLED, padded(), max_new_tokens=15)
    end = int(free[0, 7])
    options = {"max_new_tokens": 15, "min_new_tokens": 9, "eos_token_id": end, "pad_token_id": 0}
    for way in WAYS:
        got = way(llama, SAMPLED, padded(), **options)
        assert not (got[:, 6:15] == end).any()
        assert got[0, 6] == free[0, 6] and got[0, 7] != end


def test_the_config_speaks_where_there_are_no_params(llama: Any) -> None:
    settings = {"temperature": 0.6, "top_k": 7, "top_p": 0.8, "min_p": 0.05}
    torch.manual_seed(5)
    got = llama.generate(
        **padded(), max_new_tokens=15, do_sample=True, custom_generate=sample_generate, **settings
    )
    torch.manual_seed(5)
    wanted = by_loop(llama, SamplingParams(**settings), padded(), max_new_tokens=15)
    assert got.tolist() == wanted.tolist()
    greedy = llama.generate(**padded(), max_new_tokens=15, custom_generate=sample_generate)
    assert greedy.tolist() == llama.generate(**padded(), max_new_tokens=15).tolist()


def test_dicts_hold_logprobs(llama: Any) -> None:
    params = SamplingParams(seed=3, logprobs=2, logprobs_of="raw")
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    made = by_loop(llama, params, padded(), **options)
    new = made.sequences[:, 6:]
    assert (
        made.sequences.tolist()
        == by_loop(llama, SamplingParams(seed=3), padded(), max_new_tokens=8).tolist()
    )
    log_p = torch.stack(made.logits, 1).log_softmax(-1)
    torch.testing.assert_close(made.logprobs, log_p.gather(2, new[..., None])[..., 0])
    assert torch.equal(made.top_tokens, log_p.topk(2).indices)
    assert made.top_logprobs.shape == (3, 8, 2)
    processor = FastattnSampler(params, pad_token_id=0)
    llama.generate(**padded(), max_new_tokens=8, logits_processor=LogitsProcessorList([processor]))
    assert torch.equal(torch.stack([one.logprobs for one in processor.samples], 1), made.logprobs)


def test_the_readme_runs(llama: Any) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    section = text.split("## Sample with it\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    prompt = torch.tensor([[9, 8, 7], [6, 5, 4]])
    known = {"torch": torch, "model": llama, "input_ids": prompt, "inputs": {"input_ids": prompt}}
    known["tokenizer"] = SimpleNamespace(pad_token_id=0)
    exec(blocks[0], known)
    looped = known["input_ids"]
    assert looped.shape == (2, 3 + 64)
    known["inputs"]["max_new_tokens"] = 64
    first, second = blocks[1].split("draw = ")
    for lines in (first, "draw = " + second):
        exec(lines, known)
        assert known["out"].tolist() == looped.tolist()
    assert known["params"].temperature == 0.0  # that model's config is greedy


# ---- params_of


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "top_k": 0, "temperature": 0.5, "repetition_penalty": 1.6},
        {"do_sample": True, "top_k": 9, "top_p": 0.7, "bad_words_ids": [[4], [5], [2]]},
        {"do_sample": True, "min_p": 0.1, "suppress_tokens": [6, 7], "renormalize_logits": True},
        {"do_sample": True, "top_k": 20, "sequence_bias": {(9,): 5.0, (8,): -5.0}},
    ],
    ids=str,
)
def test_params_of_keep_what_generate_keeps(llama: Any, settings: dict[str, Any]) -> None:
    config = GenerationConfig(eos_token_id=2, pad_token_id=0, **settings)
    params = params_of(config)
    input_ids = torch.randint(3, VOCAB, (4, 8))
    out = llama.generate(
        input_ids, generation_config=config, max_new_tokens=1, return_dict_in_generate=True,
        output_scores=True, output_logits=True,
    )  # fmt: skip
    state = SamplerState.from_prompt(input_ids, VOCAB)
    probabilities = reference.probabilities(out.logits[0], params, state)
    if settings:
        wanted = out.scores[0].softmax(-1)
        assert torch.equal(probabilities > 0, wanted > 0)
        torch.testing.assert_close(probabilities.to(torch.float32), wanted)
    else:
        assert torch.equal(probabilities.argmax(1), out.sequences[:, -1])


def test_a_sequence_may_end_though_its_end_is_a_bad_word() -> None:
    words = [[4], [2], [3]]
    assert params_of(GenerationConfig(eos_token_id=2, bad_words_ids=words)).banned == [4, 3]
    assert params_of(GenerationConfig(eos_token_id=[2, 3], bad_words_ids=words)).banned == [4]
    assert params_of(GenerationConfig(bad_words_ids=words)).banned == [4, 2, 3]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"typical_p": 0.9}, "typical_filter"),
        ({"epsilon_cutoff": 3e-4}, "epsilon_filter"),
        ({"eta_cutoff": 3e-4}, "eta_filter"),
        ({"top_h": 0.4}, "top_h"),
        ({"num_beams": 4}, "beam_sample"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size = 3"),
        ({"min_new_tokens": 3}, "min_new_tokens = 3"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"bad_words_ids": [[4, 5]]}, "words of one token"),
        ({"sequence_bias": {(4, 5): 1.0}}, "single tokens"),
        ({"sequence_bias": {(4,): 1.0}, "repetition_penalty": 1.1}, "the bias first"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_params_of_refuse_with_reasons(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match="cannot be served by SamplingParams") as caught:
        params_of(GenerationConfig(do_sample=True, **settings))
    assert reason in str(caught.value)


# ---- errors


def test_what_is_set_twice_raises(llama: Any) -> None:
    repeats = SamplingParams(repetition_penalty=1.2)
    for options, message in [
        ({"repetition_penalty": 1.1}, "repetition_penalty must be set once"),
        ({"do_sample": True, "temperature": 0.7}, r"temperature = 0\.7 .* no effect"),
        ({"do_sample": True, "top_k": 10}, "top_k = 10"),
        ({"do_sample": True, "top_p": 0.5}, r"top_p = 0\.5"),
        ({"do_sample": True, "typical_p": 0.5}, r"typical_p = 0\.5"),
        ({"num_beams": 2}, "beam_search"),
    ]:
        with pytest.raises(ValueError, match=message):
            by_loop(llama, repeats, padded(), max_new_tokens=2, **options)
        with pytest.raises(ValueError, match=message):
            FastattnSampler(repeats, generation_config=GenerationConfig(**options))
    FastattnSampler(repeats, generation_config=GenerationConfig(temperature=0.7))
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.1)
    with pytest.raises(ValueError, match="repetition_penalty must be set once"):
        by_loop(
            llama, repeats, padded(), max_new_tokens=2,
            logits_processor=LogitsProcessorList([processor]),
        )  # fmt: skip


def test_a_models_own_cuts_give_way() -> None:
    model = make("llama")
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.2, top_p=0.3, top_k=3, pad_token_id=0
    )
    wanted = by_hand(model, SAMPLED, padded())
    for way in WAYS:
        assert way(model, SAMPLED, padded(), max_new_tokens=20).tolist() == wanted.tolist()


def test_errors(llama: Any) -> None:
    with pytest.raises(ValueError, match=r"seed must be a tensor.*num_return_sequences is 2"):
        by_loop(llama, SAMPLED, padded(), max_new_tokens=2, do_sample=True, num_return_sequences=2)
    with pytest.raises(ValueError, match="must not hold a FastattnSampler"):
        by_loop(
            llama, GREEDY, padded(), max_new_tokens=2, logits_processor=[FastattnSampler(GREEDY)]
        )
    with pytest.raises(ValueError, match="return_dict_in_generate must be True"):
        by_loop(llama, SamplingParams(logprobs=0), padded(), max_new_tokens=2)
    with pytest.raises(TypeError, match="sampling_params must be SamplingParams"):
        by_loop(llama, {"top_k": 3}, padded(), max_new_tokens=2)
    with pytest.raises(ValueError, match="generation_config and stopping_criteria must be given"):
        sample_generate(llama, padded()["input_ids"])
    with pytest.raises(ValueError, match="synced_gpus must be off"):
        llama.generate(
            **padded(),
            max_new_tokens=2,
            custom_generate=functools.partial(sample_generate, synced_gpus=True),
        )
    with pytest.raises(TypeError, match="params must be SamplingParams"):
        FastattnSampler(0.7)
    with pytest.raises(ValueError, match="attention_mask must be None where pad_token_id"):
        FastattnSampler(pad_token_id=0, attention_mask=torch.ones(1, 2))
    other = FastattnSampler(SAMPLED, attention_mask=torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"attention_mask must be of shape \(3, 6\)"):
        llama.generate(**padded(), max_new_tokens=2, logits_processor=LogitsProcessorList([other]))


@pytest.mark.parametrize("way", WAYS)
def test_rows_without_a_distribution_raise(way: Way) -> None:
    model = make("llama")
    model.lm_head.weight[7] = torch.nan
    with pytest.raises(ValueError, match=r"no NaN, got rows \[0, 1, 2\]"):
        way(model, SAMPLED, padded(), max_new_tokens=2)
