"""The decoders against transformers' on random configurations, and against themselves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastattn.models import layers, load, save
from fastattn.models.decoder import Decoder
from fastattn.models.decoder_config import DecoderConfig, Rope
from fastattn.models.layers import initialize
from fastattn.models.perplexity import perplexity
from fastattn.testing import assert_parity
from tests.models import hf

VOCAB = 67
LENGTHS = (13, 4, 9)
TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **TOKENS, "hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 37, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {**TOKENS, "n_embd": 60, "n_layer": 2, "n_head": 12, "n_positions": 50}


def rope(kind: str, **options: Any) -> dict[str, Any]:
    """`rope_parameters` of transformers 5."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **options}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-odd-head-dim": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", {**GPT2, "tie_word_embeddings": False, "n_inner": 31}),
    "gpt2-by-layer": (
        "GPT2LMHeadModel",
        {**GPT2, "n_layer": 3, "n_head": 4, "scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt2-unscaled-relu": (
        "GPT2LMHeadModel",
        {**GPT2, "scale_attn_weights": False, "activation_function": "relu",
         "layer_norm_epsilon": 1e-3, "reorder_and_upcast_attn": False},
    ),
    "gpt2-bare": ("GPT2Model", {**GPT2, "n_head": 1, "n_embd": 22}),
    "gpt2-classes": ("GPT2ForSequenceClassification", {**GPT2, "num_labels": 3}),
    "llama-2": ("LlamaForCausalLM", {**LLAMA, "num_key_value_heads": 6}),
    "llama-3": ("LlamaForCausalLM", {**LLAMA, **LLAMA3, "head_dim": 22}),
    "llama-linear-bias": (
        "LlamaForCausalLM",
        {**LLAMA, **rope("linear", factor=3.0), "attention_bias": True, "mlp_bias": True},
    ),
    "llama-yarn-one-head": (
        "LlamaForCausalLM",
        {**LLAMA, **rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0),
         "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True},
    ),
    "llama-dynamic-gelu": (
        "LlamaForCausalLM",
        {**LLAMA, **rope("dynamic", factor=2.0), "hidden_act": "gelu_pytorch_tanh",
         "rms_norm_eps": 1e-3, "num_hidden_layers": 3},
    ),
    "llama-bare": ("LlamaModel", {**LLAMA, "head_dim": 6}),
    "llama-classes": ("LlamaForSequenceClassification", {**LLAMA, "num_labels": 5}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen2-all-windows-tied": (
        "Qwen2ForCausalLM",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 1, "max_window_layers": 0,
         "tie_word_embeddings": True, "num_attention_heads": 10},
    ),
    "qwen2-layer-types": (
        "Qwen2ForCausalLM",
        {**LLAMA, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 6,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
         **rope("yarn", factor=2.0, truncate=False, mscale=0.8, mscale_all_dim=1.3)},
    ),
    "qwen2-classes": ("Qwen2ForSequenceClassification", {**LLAMA, "num_labels": 1}),
    "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 14}),
    "qwen3-tied": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 22, "tie_word_embeddings": True}),
    "qwen3-window": (
        "Qwen3ForCausalLM",
        {**LLAMA, "head_dim": 10, "use_sliding_window": True, "sliding_window": 5,
         "max_window_layers": 1},
    ),
    "qwen3-bias": (
        "Qwen3ForCausalLM",
        {**LLAMA, **rope("default"), "head_dim": 8, "attention_bias": True, "rms_norm_eps": 1e-3},
    ),
    "qwen3-bare": ("Qwen3Model", {**LLAMA, "head_dim": 12, "num_key_value_heads": 3}),
}  # fmt: skip


def make_theirs(name: str) -> Any:
    model, options = CASES[name]
    config = model.split("For")[0].removesuffix("LMHeadModel").removesuffix("Model") + "Config"
    return hf.make(model, getattr(transformers, config)(**options))


def make_prompts(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Ids padded on the right with 0, and their lengths."""
    lengths = torch.tensor(LENGTHS)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(LENGTHS), max(LENGTHS)), generator=generator)
    return ids * (torch.arange(max(LENGTHS)) < lengths[:, None]), lengths


def results(model: Any, is_ours: bool) -> dict[str, Tensor]:
    """Logits and hidden states at real tokens, by name."""
    ids, lengths = make_prompts()
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    if is_ours:
        result, states = model(ids, lengths, hidden_states=True)
    else:
        output = model(ids, attention_mask=real.long(), output_hidden_states=True)
        states = output.hidden_states
        result = output.logits if "logits" in output else output.last_hidden_state
    result = result[real] if result.dim() == 3 else result
    return {"result": result, **{f"state {i}": state[real] for i, state in enumerate(states)}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_parity_with_transformers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = make_theirs(name)
    ours = load(hf.save(theirs, tmp_path), dtype=dtype)
    hf.assert_models_agree(ours, theirs, dtype, results)


@pytest.mark.parametrize("name", CASES)
def test_saved_here_and_loaded_there_is_equal(name: str, tmp_path: Path) -> None:
    theirs = make_theirs(name)
    ours = load(hf.save(theirs, tmp_path / "theirs"))
    save(ours, tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert again.dtype == torch.float32
    with torch.no_grad():
        before, after = results(theirs, False), results(again.eval(), False)
    assert all(torch.equal(before[key], after[key]) for key in before)
    back = load(tmp_path / "ours")
    assert back.config == ours.config
    for key, value in ours.state_dict().items():
        assert torch.equal(value, back.state_dict()[key]), key


def test_older_spelling_of_rope(tmp_path: Path) -> None:
    import json

    theirs = make_theirs("llama-3")
    hf.save(theirs, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = {**parameters, "type": parameters.pop("rope_type")}
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
    hf.assert_models_agree(load(tmp_path), theirs, torch.float32, results)


# ---- decoding


def make_ours(**changes: Any) -> Decoder:
    """A decoder of two layers with random weights."""
    config = DecoderConfig(
        "qwen3", "Qwen3ForCausalLM", VOCAB, hidden_size=60, intermediate_size=37, num_layers=2,
        num_heads=6, num_heads_kv=2, head_dim=10, max_positions=64, qk_norm=True,
        eos_tokens=(2,), pad_token=0,
    )  # fmt: skip
    torch.manual_seed(3)
    return initialize(Decoder(dataclasses.replace(config, **changes)), 0.2).eval()


DECODERS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gpt2": {
        "model_type": "gpt2", "architecture": "GPT2LMHeadModel", "rope": None, "rms_norm": False,
        "gated": False, "qk_norm": False, "num_heads_kv": 6, "tied": True, "qkv_bias": True,
        "out_bias": True, "mlp_bias": True,
    },
    "window": {"windows": (4, None), "rope": Rope(100.0, "linear", {"factor": 2.0})},
}  # fmt: skip


def assert_same(actual: Tensor, model: Decoder, rows: list[Tensor], n: int = 1) -> None:
    """The last n logits of each row, as one forward of the row alone gives them (2x rule)."""
    exact = initialize(Decoder(model.config).double())
    exact.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    with torch.no_grad():
        plain, truth = (
            torch.cat([one(row[None])[0, -n:] for row in rows]) for one in (model, exact)
        )
    assert len(actual) == len(rows)
    assert_parity(actual.reshape(plain.shape), plain, truth)


@pytest.mark.parametrize("kind", DECODERS)
def test_steps_through_the_cache_equal_one_forward(kind: str) -> None:
    model = make_ours(**DECODERS[kind])
    ids, lengths = make_prompts()
    rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    logits, session = model.start(ids, lengths, max_seqlen=40)
    assert session.lengths == LENGTHS and logits.shape == (3, VOCAB)
    assert_same(logits, model, rows)
    for n in (1, 1, 3):
        tokens = torch.randint(3, VOCAB, (3, n))
        rows = [torch.cat(pair) for pair in zip(rows, tokens, strict=True)]
        logits = model.step(tokens, session, all_logits=True)
        assert logits.shape == (3, n, VOCAB)
        assert_same(logits, model, rows, n)
    assert session.lengths == tuple(length + 5 for length in LENGTHS)
    # Ragged: some rows take fewer tokens, one takes none.
    tokens, counts = torch.randint(3, VOCAB, (3, 4)), [4, 0, 2]
    logits = model.step(tokens, session, counts)
    rows = [torch.cat((row, more[:n])) for row, more, n in zip(rows, tokens, counts, strict=True)]
    assert_same(logits[[0, 2]], model, [rows[0], rows[2]])
    # What row 1 was given and not counted is forgotten.
    logits = model.step(tokens[:, :1], session)
    rows = [torch.cat((row, more[:1])) for row, more in zip(rows, tokens, strict=True)]
    assert_same(logits, model, rows)


@pytest.mark.parametrize("kind", DECODERS)
def test_rollback_reorder_and_copies(kind: str) -> None:
    model = make_ours(**DECODERS[kind])
    ids, lengths = make_prompts()
    logits, session = model.start(ids, lengths, max_seqlen=40, copies=2)
    assert session.lengths == (13, 13, 4, 4, 9, 9)
    rows = [row[:n] for row, n in zip(ids, LENGTHS, strict=True) for _ in range(2)]
    assert_same(logits, model, rows)
    tokens = torch.randint(3, VOCAB, (6, 3))
    model.step(tokens, session)
    session.rollback([0, 1, 2, 3, 0, 3])
    kept = [3, 2, 1, 0, 3, 0]
    rows = [torch.cat((row, more[:n])) for row, more, n in zip(rows, tokens, kept, strict=True)]
    order = [1, 1, 5, 0, 2, 4]
    session.reorder(order)
    rows = [rows[index] for index in order]
    assert session.lengths == tuple(len(row) for row in rows)
    tokens = torch.randint(3, VOCAB, (6, 1))
    logits = model.step(tokens, session)
    assert_same(logits, model, [torch.cat(pair) for pair in zip(rows, tokens, strict=True)])


def test_a_full_row_can_idle_while_others_go_on() -> None:
    model = make_ours(max_positions=15)
    ids, lengths = make_prompts()
    _, session = model.start(ids, lengths, max_seqlen=15)
    tokens = torch.randint(3, VOCAB, (3, 5))
    model.step(tokens, session, [2, 5, 5])
    logits = model.step(tokens[:, :1], session, [0, 1, 1])
    assert session.lengths == (15, 10, 15)
    assert_same(logits[1:2], model, [torch.cat((ids[1, :4], tokens[1], tokens[1, :1]))])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 64, 65])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["transposed", "large", "row-major", "neither"])
def test_linear_layers_of_few_rows(
    threads: int, rows: int, bias: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those paths of `linear` that only weights of some size take."""
    torch.manual_seed(0)
    layer = layers.Linear(264, 400, bias)
    assert layer.weight.numel() >= layers.SMALL_WEIGHT
    if kind == "large":
        monkeypatch.setattr(layers, "LARGE_WEIGHT", layer.weight.numel())
    elif kind == "row-major":
        layer.weight.data = layer.weight.data.contiguous()
    elif kind == "neither":
        layer.weight.data = layer.weight.data.repeat_interleave(2, 1)[:, ::2]
    x = torch.randn(rows, 1, 264)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            actual, plain = layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)
    finally:
        torch.set_num_threads(before)
    exact = layer.double()(x.double())
    # oneDNN and MKL sum in other orders: either may be the nearer one. On a row-major weight oneDNN
    # adds one product after the other, where MKL's sums are by parts.
    assert_parity(actual, plain, exact.detach(), factor=8.0 if kind == "row-major" else 4.0)


def test_gradients_flow_as_in_transformers(tmp_path: Path) -> None:
    theirs = make_theirs("qwen3-window").double()
    ours = load(hf.save(theirs, tmp_path), dtype=torch.float64)
    ids = make_prompts()[0][:1]  # without padding, whose embedding gets no gradient there
    ours(ids).logsumexp(-1).sum().backward()
    theirs(ids).logits.logsumexp(-1).sum().backward()
    gradient = theirs.model.layers[0].self_attn.v_proj.weight.grad
    own = ours.layers[0].attention.qkv.weight.grad[-gradient.shape[0] :]
    # The rotary tables are float32 in both.
    assert (own - gradient).norm() <= 1e-5 * gradient.norm()
    gradient = theirs.model.embed_tokens.weight.grad
    assert (ours.embedding.weight.grad - gradient).norm() <= 1e-5 * gradient.norm()


def test_classes_without_lengths_go_by_the_pad_token(tmp_path: Path) -> None:
    theirs = make_theirs("llama-classes")
    ours = load(hf.save(theirs, tmp_path))
    ids, lengths = make_prompts()
    assert ours.config.labels == tuple(f"LABEL_{i}" for i in range(5))
    assert torch.equal(ours(ids), ours(ids, lengths))
    with pytest.raises(ValueError, match="only a head over tokens can generate"):
        ours.start(ids, max_seqlen=20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.full((3, 13), VOCAB)}, r"input_ids must lie in 0\.\.66"),
        ({"input_ids": torch.full((3, 13), -1)}, "input_ids must lie in"),
        ({"input_ids": torch.zeros(3, 0, dtype=torch.int64)}, "at least one row and one token"),
        ({"input_ids": torch.zeros(3, 65, dtype=torch.int64)}, "at most 64 tokens a row"),
        ({"lengths": torch.tensor([13, 0, 9])}, r"lengths must lie in 1\.\.13"),
        ({"lengths": torch.tensor([13, 4])}, "one entry a row"),
        ({"max_seqlen": 12}, r"max_seqlen must lie in 13\.\.64"),
        ({"max_seqlen": 65}, r"max_seqlen must lie in 13\.\.64"),
        ({"copies": 0}, "copies must be at least 1"),
        ({"decoder_input_ids": torch.zeros(3, 1, dtype=torch.int64)}, "None for a decoder"),
    ],
)
def test_bad_prompts(change: dict[str, Any], message: str) -> None:
    ids, lengths = make_prompts()
    arguments = {"input_ids": ids, "lengths": lengths, "max_seqlen": 30, **change}
    if "input_ids" in change:
        arguments["lengths"] = None
    with pytest.raises(ValueError, match=message):
        make_ours().start(**arguments)


def test_bad_steps() -> None:
    model = make_ours()
    ids, lengths = make_prompts()
    _, session = model.start(ids, lengths, max_seqlen=30)
    for tokens, counts, message in (
        (torch.full((3, 1), VOCAB), None, "tokens must lie in"),
        (torch.zeros(2, 1, dtype=torch.int64), None, "a row for each of the session, 3"),
        (torch.zeros(3, 1, dtype=torch.int64), [1, 2, 1], r"numbers in 0\.\.1"),
        (torch.zeros(3, 40, dtype=torch.int64), None, "seqlen_new must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            model.step(tokens, session, counts)
    assert session.lengths == LENGTHS


# ---- perplexity


@pytest.mark.parametrize(("context", "stride"), [(8, 3), (8, 7), (5, 1), (40, 20)])
def test_perplexity_of_a_long_text(context: int, stride: int) -> None:
    model = make_ours().double()
    ids = torch.randint(3, VOCAB, (23,), generator=torch.Generator().manual_seed(0))
    loss = 0.0
    for place in range(1, 23):  # token by token: the first window that has it
        start = next(i for i in range(0, 23, stride) if place < i + context)
        with torch.no_grad():
            scores = model(ids[None, start:place])[0, -1].log_softmax(-1)
        loss -= scores[ids[place]].item()
    exact = torch.tensor(loss / 22).exp().item()
    assert perplexity(model, ids, context, stride) == pytest.approx(exact, rel=1e-5)


def test_bad_arguments_of_perplexity() -> None:
    model, ids = make_ours(), torch.zeros(9, dtype=torch.int64)
    for arguments, message in (
        ((ids, 65), "context must be"), ((ids, 1), "context must be"),
        ((ids, 8, 8), "stride must lie in"), ((ids[:1], 8), "one text of at least 2 tokens"),
        ((ids + VOCAB, 8), "input_ids must lie in"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            perplexity(model, *arguments)
