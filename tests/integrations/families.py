"""Hugging Face models of every family that fastattn serves: small, random, of odd sizes.

A `Family` makes a model and inputs for it. `three_of` gives the same weights three times: with
fastattn, with eager attention, and with eager attention in float64, for the parity rule.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fastattn.integrations.transformers as fastattn_hf
from fastattn.testing import assert_parity

VOCAB = 60
LENGTHS = (13, 5, 9)


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        name: for the test's name; the configuration's options follow the family.
        make: the model, random weights.
        inputs: what it is called with, padded on "left" or "right" or not at all ("none").
        paddings: on which sides its batches are padded.
        layers: how many attention layers it has.
        generates: whether it has `generate`.
        interpreted: whether its kernels are tested too, which is slow.
    """

    name: str
    make: Callable[[], Any]
    inputs: Callable[[str], dict[str, Tensor]]
    paddings: tuple[str, ...]
    layers: int
    generates: bool = False
    interpreted: bool = False

    def __str__(self) -> str:
        return self.name


def tokens(padding: str) -> dict[str, Tensor]:
    """Token ids and attention mask, three sequences."""
    longest = max(LENGTHS)
    ids = torch.randint(3, VOCAB, (len(LENGTHS), longest))
    visible = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    if padding == "left":
        visible = visible.flip(1)
    if padding == "none":
        visible = torch.ones_like(visible)
    return {"input_ids": ids * visible, "attention_mask": visible.long()}


def token_pairs(padding: str) -> dict[str, Tensor]:
    """The same of an encoder and a decoder, whose lengths differ."""
    rows = torch.randint(3, VOCAB, (len(LENGTHS), 7))
    return {**tokens(padding), "decoder_input_ids": rows}


def tokens_and_states(padding: str) -> dict[str, Tensor]:
    """For decoders with cross-attention: an encoder's hidden states, padded on the right."""
    visible = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    return {
        **tokens(padding),
        "encoder_hidden_states": torch.randn(len(LENGTHS), 6, 60),
        "encoder_attention_mask": visible.long(),
    }


def segments(padding: str) -> dict[str, Tensor]:
    """Tokens of two segments."""
    inputs = tokens(padding)
    return {**inputs, "token_type_ids": (inputs["input_ids"] % 3 == 0).long()}


def permuted(padding: str) -> dict[str, Tensor]:
    """XLNet's pretraining: an order of the tokens, and targets that are not to see themselves."""
    inputs = segments(padding)
    batch, length = inputs["input_ids"].shape
    order = torch.stack([torch.randperm(length) for _ in range(batch)])
    perm_mask = (order[:, :, None] <= order[:, None, :]).float()
    perm_mask[:, :, :2] = 0  # these are no targets, and everybody sees them
    targets = torch.nn.functional.one_hot(torch.tensor([[3, 4]] * batch), length).float()
    return {**inputs, "perm_mask": perm_mask, "target_mapping": targets}


def tokens_alone(padding: str) -> dict[str, Tensor]:
    """Tokens without a mask."""
    return {"input_ids": tokens("none")["input_ids"]}


def pixels(padding: str) -> dict[str, Tensor]:
    """Two images of 15 by 20."""
    return {"pixel_values": torch.randn(2, 3, 15, 20)}


def sound(padding: str) -> dict[str, Tensor]:
    """Mel spectra of 46 frames, and tokens of the decoder."""
    return {
        "input_features": torch.randn(3, 8, 46),
        "decoder_input_ids": torch.randint(3, VOCAB, (3, 7)),
    }


def images_and_text(padding: str) -> dict[str, Tensor]:
    """Square images, and captions."""
    return {**tokens(padding), "pixel_values": torch.randn(2, 3, 15, 15)}


def _maker(model: str, config: str | None = None, **options: Any) -> Callable[[], Any]:
    """Makes a model of transformers from a configuration."""
    config = config or re.sub("(Model|For[A-Z]|LMHead).*", "", model) + "Config"
    # Dropout is tested where it is meant; training mode is for gradients alone.
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**options))


_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {
    **_TOKENS, "hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 5,
    "intermediate_size": 37, "max_position_embeddings": 60,
}  # fmt: skip
_DECODER = {**_ENCODER, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}


def _bert_to_bert() -> Any:
    """An encoder and a decoder of BERT's, with cross-attention."""
    config = transformers.EncoderDecoderConfig(
        encoder=transformers.BertConfig(**_ENCODER).to_dict(),
        decoder=transformers.BertConfig(
            **_ENCODER, is_decoder=True, add_cross_attention=True
        ).to_dict(),
        decoder_start_token_id=1, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return transformers.EncoderDecoderModel(config)


_T5 = {
    "vocab_size": VOCAB, "d_model": 45, "d_kv": 11, "d_ff": 37, "num_layers": 2, "num_heads": 3,
    "num_decoder_layers": 1,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_SEQ2SEQ = {
    **_TOKENS, "d_model": 60, "encoder_layers": 2, "decoder_layers": 1,
    "encoder_attention_heads": 5, "decoder_attention_heads": 3, "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 41, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_GPT2 = {**_TOKENS, "n_embd": 60, "n_layer": 2, "n_head": 5, "n_positions": 60}
_XLNET = {**_TOKENS, "d_model": 60, "n_layer": 2, "n_head": 5, "d_inner": 37}
_DEBERTA = {**_ENCODER, "relative_attention": True, "type_vocab_size": 0}
_VIT = {
    "hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 37,
    "image_size": (15, 20), "patch_size": 5,
}  # fmt: skip

BOTH, LEFT, RIGHT, NONE = ("right", "left"), ("left",), ("right",), ("none",)

FAMILIES = (
    Family("bert", _maker("BertModel", **_ENCODER), tokens, (*BOTH, "none"), 2, interpreted=True),
    Family(
        "bert-decoder",
        _maker("BertLMHeadModel", **_ENCODER, is_decoder=True, add_cross_attention=True),
        tokens_and_states, LEFT, 4,
    ),
    Family("bert-to-bert", _bert_to_bert, token_pairs, RIGHT, 6, generates=True),
    Family("roberta", _maker("RobertaModel", **_ENCODER), tokens, BOTH, 2, interpreted=True),
    Family(
        "roberta-decoder", _maker("RobertaForCausalLM", **_ENCODER, is_decoder=True), tokens, LEFT,
        2, generates=True,
    ),
    Family(
        "albert", _maker("AlbertModel", **_ENCODER, embedding_size=17), tokens, BOTH, 1,
        interpreted=True,
    ),
    Family(
        "albert-groups",
        _maker("AlbertModel", **_ENCODER, num_hidden_groups=2, inner_group_num=2), segments, RIGHT,
        4,
    ),
    Family(
        "distilbert",
        _maker("DistilBertModel", config="DistilBertConfig", vocab_size=VOCAB, dim=60, n_layers=2,
               n_heads=5, hidden_dim=37, max_position_embeddings=60),
        tokens, BOTH, 2, interpreted=True,
    ),
    Family(
        "distilbert-sinusoidal",
        _maker("DistilBertForMaskedLM", config="DistilBertConfig", vocab_size=VOCAB, dim=24,
               n_layers=1, n_heads=3, hidden_dim=9, max_position_embeddings=60,
               sinusoidal_pos_embds=True, tie_word_embeddings=False),
        tokens, RIGHT, 1,
    ),
    Family(
        "electra", _maker("ElectraModel", **_ENCODER, embedding_size=17), segments, BOTH, 2,
        interpreted=True,
    ),
    Family(
        "electra-decoder", _maker("ElectraForCausalLM", **_ENCODER, is_decoder=True), tokens, LEFT,
        2, generates=True,
    ),
    Family("gpt2", _maker("GPT2LMHeadModel", **_GPT2), tokens, BOTH, 2, True, interpreted=True),
    Family(
        "gpt2-cross",
        _maker("GPT2LMHeadModel", **_GPT2, add_cross_attention=True,
               scale_attn_by_inverse_layer_idx=True),
        tokens_and_states, LEFT, 4, generates=True,
    ),
    Family("llama", _maker("LlamaForCausalLM", **_DECODER), tokens, BOTH, 2, True, True),
    Family(
        "llama-bias",
        _maker("LlamaForCausalLM", **{**_DECODER, "num_key_value_heads": 1}, attention_bias=True),
        tokens, LEFT, 2, generates=True,
    ),
    Family(
        "qwen2", _maker("Qwen2ForCausalLM", **_DECODER), tokens, BOTH, 2, True, interpreted=True
    ),
    Family(
        "qwen2-window",
        _maker("Qwen2ForCausalLM", **_DECODER, use_sliding_window=True, sliding_window=4,
               max_window_layers=1),
        tokens, BOTH, 2, True, interpreted=True,
    ),
    Family("qwen3", _maker("Qwen3ForCausalLM", **_DECODER), tokens, BOTH, 2, True, True),
    Family(
        "qwen3-window",
        _maker("Qwen3ForCausalLM", **_DECODER, use_sliding_window=True, sliding_window=5,
               max_window_layers=0),
        tokens, LEFT, 2, generates=True,
    ),
    Family(
        "t5", _maker("T5ForConditionalGeneration", **_T5), token_pairs, BOTH, 4, True,
        interpreted=True,
    ),
    Family(
        "t5-buckets",
        _maker("T5ForConditionalGeneration", **{**_T5, "num_heads": 5, "num_decoder_layers": 2},
               relative_attention_num_buckets=7, relative_attention_max_distance=11),
        token_pairs, RIGHT, 6, generates=True,
    ),
    Family("t5-encoder", _maker("T5EncoderModel", config="T5Config", **_T5), tokens, BOTH, 2),
    Family(
        "mt5", _maker("MT5ForConditionalGeneration", **{**_T5, "num_layers": 1}), token_pairs,
        RIGHT, 3, True,
        interpreted=True,
    ),
    Family("umt5", _maker("UMT5ForConditionalGeneration", **_T5), token_pairs, RIGHT, 4, True),
    Family(
        "bart",
        _maker("BartForConditionalGeneration", **_SEQ2SEQ, max_position_embeddings=60),
        token_pairs, BOTH, 4, True, interpreted=True,
    ),
    Family(
        "bart-scaled",
        _maker("BartModel", **{**_SEQ2SEQ, "decoder_layers": 2}, max_position_embeddings=60,
               scale_embedding=True),
        token_pairs, RIGHT, 6,
    ),
    Family(
        "whisper",
        _maker("WhisperForConditionalGeneration", **_SEQ2SEQ, num_mel_bins=8,
               max_source_positions=23, max_target_positions=60, suppress_tokens=None,
               begin_suppress_tokens=None),
        sound, NONE, 4, True, interpreted=True,
    ),
    Family("vit", _maker("ViTModel", **_VIT), pixels, NONE, 2, interpreted=True),
    Family(
        "vit-no-bias",
        _maker("ViTForImageClassification", **{**_VIT, "num_attention_heads": 3}, qkv_bias=False),
        pixels, NONE, 2,
    ),
    Family(
        "clip",
        _maker(
            "CLIPModel", projection_dim=11,
            text_config={**_ENCODER, "eos_token_id": 2},
            vision_config={**_VIT, "image_size": 15},
        ),
        images_and_text, RIGHT, 4, interpreted=True,
    ),
    Family(
        "clip-text", _maker("CLIPTextModel", config="CLIPTextConfig", **_ENCODER), tokens, BOTH, 2
    ),
    Family("xlnet", _maker("XLNetModel", **_XLNET), segments, BOTH, 2, interpreted=True),
    Family(
        "xlnet-lm", _maker("XLNetLMHeadModel", **_XLNET, mem_len=20),
        tokens, LEFT, 2, generates=True,
    ),
    Family("xlnet-permuted", _maker("XLNetModel", **_XLNET), permuted, RIGHT, 2),
    Family(
        "xlnet-causal",
        _maker("XLNetLMHeadModel", **{**_XLNET, "n_head": 3}, attn_type="uni", clamp_len=5),
        tokens_alone, NONE, 2,
    ),
    Family(
        "deberta-v2",
        _maker("DebertaV2Model", **_DEBERTA, pos_att_type=["c2p", "p2c"], position_buckets=4,
               share_att_key=True),
        tokens, BOTH, 2, interpreted=True,
    ),
    Family(
        "deberta-v2-c2p", _maker("DebertaV2Model", **_DEBERTA, pos_att_type=["c2p"]), tokens,
        RIGHT, 2,
    ),
    Family("deberta-v2-absolute", _maker("DebertaV2Model", **_ENCODER), segments, RIGHT, 2),
    Family(
        "deberta", _maker("DebertaModel", **_DEBERTA, pos_att_type=["c2p", "p2c"]), tokens, BOTH, 2,
        interpreted=True,
    ),
    Family("deberta-absolute", _maker("DebertaModel", **_ENCODER), tokens, RIGHT, 2),
)  # fmt: skip


def family(name: str) -> Family:
    """A family by its name."""
    return next(one for one in FAMILIES if one.name == name)


def three_of(model: Any) -> tuple[Any, Any, Any]:
    """The same weights with fastattn, with eager attention, and with eager attention in float64."""
    model = model.eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:  # with weights as small as they start, attention is all but even
                weight.mul_(4)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    for part in (*eager.modules(), *exact.modules()):
        if isinstance(part, transformers.PreTrainedModel):
            part.set_attn_implementation("eager")
    return fastattn_hf.enable(model), eager, exact


class KeepFloat64(TorchFunctionMode):
    """Leaves out the casts to float32 in a model's softmax, norms and rotary angles.

    Without it a "float64" model is exact to float32 only, and of mask numbers that only float64 can
    hold its softmax in float32 makes NaN.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def run_three(models: tuple[Any, ...], call: Callable[[Any], Any]) -> list[Any]:
    """What `call` makes of each of the models, the last one in float64 throughout."""
    results = [call(model) for model in models[:-1]]
    with KeepFloat64():
        return [*results, call(models[-1])]


_RESULTS = (
    "logits", "last_hidden_state", "encoder_last_hidden_state", "logits_per_text", "text_embeds",
    "image_embeds",
)  # fmt: skip


def results(output: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model gives, by name, without the positions that are padding."""
    found = {}
    visible = inputs.get("attention_mask")
    for name in _RESULTS:
        if name not in output:
            continue
        result = output[name]
        of_tokens = name.startswith("encoder") or "decoder_input_ids" not in inputs
        if of_tokens and visible is not None and result.shape[:2] == visible.shape:
            result = result[visible.bool()]
        found[name] = result
    return found


def hidden_states(output: Any) -> Tensor:
    """Logits, or the last hidden states."""
    return output.logits if "logits" in output else output.last_hidden_state


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results of a model, and gradients of all its parameters, by name of the layer.

    The gradients of a layer are one vector: a bias of the keys has the gradient 0, and its rounding
    errors say nothing. A T5 table has its own.
    """
    inputs = in_dtype_of(model, inputs)
    found = results(model(**inputs), inputs)
    generator = torch.Generator().manual_seed(1)
    starts = [
        torch.randn(result.shape, generator=generator, dtype=torch.float64).to(model.dtype)
        for result in found.values()
    ]
    model.zero_grad()
    torch.autograd.backward(list(found.values()), starts)
    by_layer: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        layer = re.match(r"(.*?\.\d+)?", name)[0] or name.split(".")[0]
        if "relative_attention_bias" in name:
            layer = name
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        by_layer.setdefault(layer, []).append(gradient.flatten())
    return {
        **{name: result.detach() for name, result in found.items()},
        **{f"gradient of {layer}": torch.cat(parts) for layer, parts in by_layer.items()},
    }


def assert_parity_of_all(ours: Any, eager: Any, exact: Any) -> None:
    """The 2x rule for every result by name."""
    assert ours.keys() == eager.keys() == exact.keys()
    for name in ours:
        comparison = assert_parity(ours[name], eager[name], exact[name], name=name)
        # A baseline that computes something else allows everything.
        assert comparison.baseline_rms_error <= 1e-4 * exact[name].square().mean().sqrt(), name


def in_dtype_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating inputs in the dtype of the model."""
    return {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def assert_parity_of_models(models: Any, inputs: dict[str, Tensor], real: Tensor) -> None:
    """The 2x rule on hidden states or logits, at positions where `real` is True."""
    assert_parity(*run_three(models, lambda model: hidden_states(model(**inputs))[real]))
