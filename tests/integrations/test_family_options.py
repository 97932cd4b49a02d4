"""Caches, chunks, packed sequences, attention weights and position biases of Hugging Face models.

Each on the families that it tells most about; see test_families.py for what all families do.
"""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import fastattn.integrations.transformers as fastattn_hf
from fastattn import functional
from fastattn.biases import DenseBias, T5Bias
from fastattn.integrations import transformers_adapters as adapters
from fastattn.integrations import transformers_t5
from fastattn.integrations.transformers_masks import LazyMask
from fastattn.integrations.transformers_t5 import LazyBias
from fastattn.masks import Causal, Packed, find_packed
from fastattn.testing import assert_parity
from tests.integrations.families import (
    VOCAB,
    assert_parity_of_all,
    assert_parity_of_models,
    family,
    gradients,
    in_dtype_of,
    results,
    run_three,
    three_of,
)


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def models_of(name: str):
    return three_of(family(name).make())


# --- caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 5], ids=["whole", "chunks"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "qwen3-window", "gpt2"])
@torch.no_grad()
def test_generation_with_every_cache(name, cache, chunk):
    """Windows of 4 and 5 in sequences of 13 + 8: the sliding layers drop keys on the way."""
    ours, eager, _ = models_of(name)
    inputs = family(name).inputs("left")
    options = {
        "max_new_tokens": 8, "do_sample": False, "cache_implementation": cache,
        "prefill_chunk_size": chunk, "no_repeat_ngram_size": 2, "disable_compile": True,
    }  # fmt: skip
    expected = eager.generate(**inputs, **options)
    assert torch.equal(ours.generate(**inputs, **options), expected)
    assert expected.shape[1] == 13 + 8


@pytest.mark.parametrize("name", ["t5", "umt5", "bart"])
@torch.no_grad()
def test_encoder_decoders_with_a_static_cache(name):
    """Keys past the last query: T5's bias is not aligned as a table's, and is taken as a tensor."""
    ours, eager, _ = models_of(name)
    inputs = family(name).inputs("right")
    del inputs["decoder_input_ids"]
    options = {
        "max_new_tokens": 8, "do_sample": False, "cache_implementation": "static",
        "no_repeat_ngram_size": 2, "disable_compile": True,
    }  # fmt: skip
    assert torch.equal(ours.generate(**inputs, **options), eager.generate(**inputs, **options))


@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
@torch.no_grad()
def test_second_chunk_equals_eager(name):
    models = models_of(name)
    inputs = family(name).inputs("left")
    ids, visible = inputs["input_ids"], inputs["attention_mask"]
    positions = (visible.cumsum(1) - 1).clamp(min=0)

    def second_chunk(model):
        first = model(
            input_ids=ids[:, :8], attention_mask=visible[:, :8], position_ids=positions[:, :8]
        )
        return model(
            input_ids=ids[:, 8:], attention_mask=visible, position_ids=positions[:, 8:],
            past_key_values=first.past_key_values,
        ).logits  # fmt: skip

    real = visible[:, 8:].bool()
    assert_parity(*run_three(models, lambda model: second_chunk(model)[real]))


# --- packed sequences -----------------------------------------------------------------------------

PACKED_LENGTHS = (6, 1, 9)


def packed_inputs(cu_seq_lens: bool) -> dict:
    positions = torch.cat([torch.arange(length) for length in PACKED_LENGTHS])[None]
    ids = torch.randint(3, VOCAB, positions.shape)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    if cu_seq_lens:
        ends = torch.tensor([0, *PACKED_LENGTHS]).cumsum(0).int()
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        inputs |= {"max_length_q": max(PACKED_LENGTHS), "max_length_k": max(PACKED_LENGTHS)}
    return inputs


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
@pytest.mark.interpreter
@torch.no_grad()
def test_packed_positions_keep_sequences_apart(name, impl, monkeypatch):
    models = models_of(name)
    inputs = packed_inputs(cu_seq_lens=False)
    real = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    monkeypatch.setattr(fastattn_hf, "_FLOPS_PER_SEQUENCE", -1)  # worth it, however small
    monkeypatch.setattr(fastattn_hf, "_FLOPS_PER_WINDOWED_SEQUENCE", -1)
    with fastattn_hf.use_impl(impl):
        assert_parity_of_models(models, inputs, real)
    explanations = {
        str(e) for layer in fastattn_hf.report(models[0]).layers for e in layer.explanations
    }
    assert explanations and all("Packed" in text for text in explanations)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_cumulative_lengths_keep_sequences_apart(name):
    """Eager attention does not know them: it is told by the positions, fastattn by both or one."""
    models = models_of(name)
    inputs = packed_inputs(cu_seq_lens=True)
    told = {
        key: value
        for key, value in inputs.items()
        if key in ("input_ids", "position_ids", "use_cache")
    }

    def run(model):
        return model(**(inputs if model is models[0] else told)).logits

    assert_parity(*run_three(models, run))


@torch.no_grad()
def test_cumulative_lengths_without_positions():
    """Positions that go on through the row: only the lengths tell where a sequence ends."""
    ours, _, _ = models_of("gpt2")
    inputs = packed_inputs(cu_seq_lens=True)
    inputs["position_ids"] = torch.arange(sum(PACKED_LENGTHS))[None]
    together = ours(**inputs).logits
    for start, length in zip((0, 6, 7), PACKED_LENGTHS, strict=True):
        part = slice(start, start + length)
        alone = ours(
            input_ids=inputs["input_ids"][:, part], position_ids=inputs["position_ids"][:, part]
        ).logits
        torch.testing.assert_close(together[:, part], alone)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_mask_is_exact(window):
    config = transformers.Qwen2Config(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=1, sliding_window=window,
        use_sliding_window=True,
    )  # fmt: skip
    config._attn_implementation = "fastattn"
    kind = "create_causal_mask" if window is None else "create_sliding_window_causal_mask"
    make = getattr(transformers.masking_utils, kind)
    positions = packed_inputs(cu_seq_lens=False)["position_ids"]
    arguments = {
        "config": config, "inputs_embeds": torch.zeros(1, 16, 8), "attention_mask": None,
        "past_key_values": None, "position_ids": positions,
    }  # fmt: skip
    mask = make(**arguments)
    config._attn_implementation = "sdpa"
    expected = make(**arguments)
    assert isinstance(mask, LazyMask) and isinstance(find_packed(mask.structure), Packed)
    assert torch.equal(mask.structure.dense(16, 16), expected)
    assert torch.equal(mask & True, expected)
    assert mask.pieces == 3 and mask.keys_within_bounds == (36 + 1 + 81) / 16


def test_a_bias_on_packed_sequences_is_of_the_whole_row(monkeypatch):
    monkeypatch.setattr(fastattn_hf, "_FLOPS_PER_WINDOWED_SEQUENCE", -1)
    numbers = torch.repeat_interleave(torch.arange(3), torch.tensor(PACKED_LENGTHS))[None]
    mask = LazyMask((1, 1, 16, 16), torch.device("cpu"), (Causal(),), None, True, numbers)
    q, bias = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 16)
    layer = torch.nn.Identity()
    out, _ = fastattn_hf.attention_forward(layer, q, q, q, mask, position_bias=bias)
    added = bias.masked_fill(~mask.build(), float("-inf"))
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=added)
    torch.testing.assert_close(out.transpose(1, 2), expected)


# --- attention weights ----------------------------------------------------------------------------

WEIGHTS = {
    "bert": ["attentions"],
    "bert-decoder": ["attentions", "cross_attentions"],
    "gpt2-cross": ["attentions", "cross_attentions"],
    "qwen2-window": ["attentions"],
    "t5": ["encoder_attentions", "decoder_attentions", "cross_attentions"],
    "whisper": ["encoder_attentions", "decoder_attentions", "cross_attentions"],
    "vit": ["attentions"],
    "xlnet": ["attentions"],
    "deberta-v2": ["attentions"],
    "deberta": ["attentions"],
}


@pytest.mark.parametrize("name", list(WEIGHTS))
@torch.no_grad()
def test_attention_weights_only_when_asked_for(name, monkeypatch):
    models = models_of(name)
    inputs = family(name).inputs(family(name).paddings[0])
    asked = []
    weights_of = functional.attention_weights

    def counted(*args, **kwargs):
        asked.append(args)
        return weights_of(*args, **kwargs)

    monkeypatch.setattr(functional, "attention_weights", counted)
    models[0](**inputs)
    assert not asked
    outputs = run_three(
        models, lambda model: model(**in_dtype_of(model, inputs), output_attentions=True)
    )
    assert len(asked) == family(name).layers
    # What padding attends to is nobody's business.
    real = torch.ones(1, 1, 1, dtype=torch.bool)
    if "attention_mask" in inputs and "attentions" in WEIGHTS[name]:
        real = inputs["attention_mask"].bool()[:, None]
    for kind in WEIGHTS[name]:
        assert len(outputs[0][kind]) > 0
        for layers in zip(*(output[kind] for output in outputs), strict=True):
            # Rows without a key are 0 here and uniform in eager attention, which masks by a number.
            rows = (layers[0].sum(-1) > 0) & real
            assert_parity(*(weights[rows] for weights in layers), name=kind)
            assert rows.float().mean() > 0.4


# --- T5's position bias ---------------------------------------------------------------------------


@pytest.fixture
def biases(monkeypatch) -> list:
    """Every `LazyBias` that is made, and every bias that attention is given."""
    made = []
    new = LazyBias.__new__

    def record(cls, *args):
        made.append(new(cls, *args))
        return made[-1]

    monkeypatch.setattr(LazyBias, "__new__", record)
    return made


@pytest.fixture
def given(monkeypatch) -> list:
    """The bias of every call of `fastattn.attention`."""
    calls = []
    attention = functional.attention

    def record(*args, **kwargs):
        calls.append(kwargs["bias"])
        return attention(*args, **kwargs)

    monkeypatch.setattr(functional, "attention", record)
    return calls


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["t5", "mt5", "umt5"])
@torch.no_grad()
def test_kernels_get_tables_and_no_bias_is_built(name, biases, given, monkeypatch):
    ours, _, _ = models_of(name)
    zeros = torch.zeros

    def no_zeros(*size, **kwargs):
        assert len(size[0] if isinstance(size[0], tuple) else size) < 4
        return zeros(*size, **kwargs)

    monkeypatch.setattr(torch, "zeros", no_zeros)  # of which cross-attention's bias used to be
    with fastattn_hf.use_impl("triton"):
        ours(**family(name).inputs("right"))
    self_attention = [bias for bias in given if bias is not None]
    layers = {"t5": 3, "mt5": 2, "umt5": 3}[name]
    assert len(self_attention) == layers and len(given) == family(name).layers
    assert all(isinstance(bias, T5Bias) for bias in self_attention)
    assert len(biases) == (layers if name == "umt5" else 2)  # T5's layers share the first one's
    assert not any(bias.materialized for bias in biases)


@pytest.mark.parametrize("name", ["t5", "umt5"])
@torch.no_grad()
def test_on_a_cpu_the_bias_is_built_once_for_all_layers(name, biases, given):
    ours, _, _ = models_of(name)
    ours(**family(name).inputs("right"))
    dense = [bias for bias in given if bias is not None]
    assert all(isinstance(bias, DenseBias) for bias in dense) and len(dense) == 3
    distinct = {id(bias.tensor) for bias in dense}
    assert len(distinct) == len(biases) == (3 if name == "umt5" else 2)
    assert given.count(None) == 1  # cross-attention's zeros


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (7, 11)])
def test_lazy_bias_is_the_tensor_of_the_model(bidirectional, buckets, distance):
    config = transformers.T5Config(
        d_model=12, d_kv=5, num_heads=3, is_decoder=not bidirectional,
        relative_attention_num_buckets=buckets, relative_attention_max_distance=distance,
    )  # fmt: skip
    layer = transformers.models.t5.modeling_t5.T5Attention(config, True, layer_idx=0)
    expected = layer.compute_bias(9, 150, past_seen_tokens=141)
    layer.config._attn_implementation = "fastattn"
    assert adapters.adapt(layer)
    bias = layer.compute_bias(9, 150, past_seen_tokens=141)
    assert isinstance(bias, LazyBias) and not bias.materialized
    assert bias.shape == expected.shape and bias.dtype == expected.dtype and bias.dim() == 4
    torch.testing.assert_close(bias.structure.dense(9, 150), expected, rtol=0, atol=0)
    assert not bias.materialized
    assert torch.equal(bias + 0, expected) and bias.materialized and bias.touched
    # Keys past the last query, and lengths that are not read: the tensor of the model.
    for past in (5, torch.tensor(141)):
        assert not isinstance(layer.compute_bias(9, 150, past_seen_tokens=past), LazyBias)
    layer.config._attn_implementation = "eager"
    assert not isinstance(layer.compute_bias(9, 150, past_seen_tokens=141), LazyBias)


def test_a_position_bias_of_the_users_own_is_added():
    models = models_of("t5")
    layers = [model.encoder.block[0].layer[0].SelfAttention for model in models]
    states, bias = torch.randn(2, 7, 45), torch.randn(2, 3, 7, 7)

    def run(layer):
        dtype = layer.q.weight.dtype
        return layer(states.to(dtype), position_bias=bias.to(dtype))[0]

    assert_parity(*run_three(layers, run))


def test_a_model_that_enable_has_not_seen_gets_there_by_itself(biases):
    """Loaded with attn_implementation="fastattn": dense in the first pass, tables from then on."""
    models = models_of("t5")
    state = models[1].state_dict()
    loaded = transformers.T5ForConditionalGeneration._from_config(
        models[1].config, attn_implementation="fastattn"
    )
    loaded.load_state_dict(state)
    models = (loaded.eval(), *models[1:])
    inputs = family("t5").inputs("right")
    for passes in range(2):
        assert_parity_of_all(*run_three(models, lambda model: gradients(model, inputs)))
        assert len(biases) == 2 * passes


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.interpreter
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_keeps_the_gradient_of_the_table(reentrant):
    models = models_of("t5-encoder")
    inputs = family("t5-encoder").inputs("right")
    models[0].gradient_checkpointing_enable({"use_reentrant": reentrant})
    for module in models[0].modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    models[0].train()
    with fastattn_hf.use_impl("triton"):
        assert_parity_of_all(*run_three(models, lambda model: gradients(model, inputs)))


@torch.no_grad()
def test_compiled_t5_has_no_graph_break():
    models = models_of("t5-encoder")
    inputs = family("t5-encoder").inputs("right")
    torch._dynamo.reset()
    # The backend decides about speed, dynamo about graphs: the slow code generation is left out.
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
    assert_parity_of_models((compiled, *models[1:]), inputs, inputs["attention_mask"].bool())


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "xlnet", "deberta-v2", "deberta", "bert"])
@torch.no_grad()
def test_disable_gives_the_model_back(name):
    model = family(name).make().eval()
    inputs = family(name).inputs("right")
    before = results(model(**inputs), inputs)
    classes = [type(module) for module in model.modules()]
    implementations = [
        part.config._attn_implementation
        for part in model.modules()
        if isinstance(part, transformers.PreTrainedModel)
    ]
    fastattn_hf.enable(fastattn_hf.enable(model))
    model(**inputs)
    assert fastattn_hf.report(model).layers_served == family(name).layers
    fastattn_hf.disable(model)
    assert [type(module) for module in model.modules()] == classes
    assert implementations == [
        part.config._attn_implementation
        for part in model.modules()
        if isinstance(part, transformers.PreTrainedModel)
    ]
    after = results(model(**inputs), inputs)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["t5", "xlnet", "deberta-v2", "deberta"])
@torch.no_grad()
def test_adapted_models_are_copied_and_pickled(name):
    ours, _, _ = models_of(name)
    inputs = family(name).inputs("right")
    expected = results(ours(**inputs), inputs)
    for model in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        found = results(model(**inputs), inputs)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        assert fastattn_hf.report(model).layers_served == family(name).layers
        assert model.state_dict().keys() == ours.state_dict().keys()


@torch.no_grad()
def test_xlnet_keeps_memories():
    models = models_of("xlnet-lm")
    ids = torch.randint(3, VOCAB, (2, 18))

    def second(model):
        mems = model(input_ids=ids[:, :11], use_mems=True).mems
        return model(input_ids=ids[:, 11:], mems=mems, use_mems=True).logits

    assert_parity(*run_three(models, second))


@pytest.mark.parametrize("name", ["xlnet", "deberta-v2", "deberta", "t5"])
def test_weights_are_dropped_in_training(name):
    ours, _, _ = models_of(name)
    inputs = family(name).inputs("right")
    for module in ours.modules():  # all but that of attention
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for module in ours.modules():
        if adapters.is_adapted(module):
            if isinstance(module.dropout, torch.nn.Dropout):
                module.dropout = torch.nn.Dropout(0.5)
            else:
                module.dropout = 0.5
    with torch.no_grad():
        plain = results(ours(**inputs), inputs)
        ours.train()
        first, second = (results(ours(**inputs), inputs) for _ in range(2))
    name = next(iter(plain))
    assert not torch.allclose(first[name], second[name])
    assert not torch.allclose(first[name], plain[name])


def test_deberta_that_mixes_heads_is_not_served():
    config = transformers.DebertaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, talking_head=True,
    )  # fmt: skip
    model = fastattn_hf.enable(transformers.DebertaModel(config).eval())
    with pytest.raises(fastattn_hf.UnservedModelError, match="adapter does not serve"):
        fastattn_hf.report(model, input_ids=torch.randint(3, VOCAB, (2, 5)))


def test_without_its_adapter_a_model_says_what_to_do():
    model = family("xlnet").make()
    message = r"2 x XLNetRelativeAttention.*enable\(model\) gives it an adapter"
    with pytest.raises(fastattn_hf.UnservedModelError, match=message):
        fastattn_hf.report(model, **family("xlnet").inputs("right"))


def test_t5_family_adapters_are_of_classes_with_the_same_methods():
    """What the mixin overrides is what the classes have."""
    for known_as, (_, _, mixin) in adapters._BASES.items():
        base = getattr(adapters, known_as).__mro__[2]
        for method in vars(mixin):
            if callable(getattr(mixin, method)) and not method.startswith("_"):
                assert method in vars(base), (known_as, method)
    assert transformers_t5.TableBias in adapters.UMT5Attention.__mro__
