"""What the decoders differ in, as values: configurations, rotary frequencies, names of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastattn.models.checkpoint import CheckpointError, Weight, expect, layers

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Options without which a kind means nothing."""


@dataclass(frozen=True)
class Rope:
    """How positions are rotated (Su et al., arXiv:2104.09864), and how that is scaled.

    Attributes:
        theta: base of the wavelengths.
        kind: "default", "linear" (positions are divided by a factor), "llama3" (only long
            wavelengths are), "yarn" (Peng et al., arXiv:2309.00071), or "dynamic", which is the
            default as long as a sequence is within `max_positions`, and a longer one is refused.
        options: of the kind, by Hugging Face's names: factor, low_freq_factor, beta_fast, ...
    """

    theta: float = 10000.0
    kind: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of any of the families.

    Attributes:
        model_type, architecture: Hugging Face's, e.g. "llama" and "LlamaForCausalLM".
        vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_heads_kv, head_dim:
            sizes; `num_heads` is a multiple of `num_heads_kv`.
        max_positions: tokens that a sequence can have.
        activation: of the MLP, by Hugging Face's name.
        norm_eps: of all norms.
        rms_norm: RMS norms, and not layer norms with a bias.
        gated: the MLP has a gate.
        rope: None where positions are learned embeddings.
        qkv_bias, out_bias, mlp_bias: which linear layers have one.
        qk_norm: an RMS norm over each head of q and k.
        windows: of each layer, how many of the last tokens a token sees (itself included); None:
            all. () where no layer has one.
        scaled: scores are divided by sqrt(head_dim).
        scaled_by_layer: and by the layer's number, from 1.
        tied: the head is the embedding.
        labels: names of the classes of a classifier.
        initializer_range: deviation of weights at the start of training.
        bos_token, eos_tokens, pad_token: as in the checkpoint.
    """

    model_type: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_heads_kv: int
    head_dim: int
    max_positions: int
    activation: str = "silu"
    norm_eps: float = 1e-6
    rms_norm: bool = True
    gated: bool = True
    rope: Rope | None = field(default_factory=Rope)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    scaled: bool = True
    scaled_by_layer: bool = False
    tied: bool = False
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    initializer_range: float = 0.02
    bos_token: int | None = None
    eos_tokens: tuple[int, ...] = ()
    pad_token: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_heads_kv:
            raise CheckpointError(
                f"num_heads must be a multiple of num_heads_kv, got {self.num_heads} and "
                f"{self.num_heads_kv}"
            )
        if self.rope is not None and self.head_dim % 2:
            raise CheckpointError(f"head_dim must be even to be rotated, got {self.head_dim}")
        if self.windows and len(self.windows) != self.num_layers:
            raise CheckpointError(
                f"windows must be one a layer, {self.num_layers}, got {len(self.windows)}"
            )

    @property
    def head(self) -> str | None:
        """What follows the last norm: "tokens", "classes" or nothing."""
        if self.architecture.endswith("ForSequenceClassification"):
            return "classes"
        return "tokens" if self.architecture.endswith(("ForCausalLM", "LMHeadModel")) else None

    def window(self, layer: int) -> int | None:
        """How many of the last tokens a token sees in a layer, None: all."""
        return self.windows[layer] if self.windows else None

    def softmax_scale(self, layer: int) -> float:
        """The factor on q @ k.T in a layer."""
        scale = self.head_dim**-0.5 if self.scaled else 1.0
        return scale / (layer + 1) if self.scaled_by_layer else scale


# ---- rotary frequencies


def rope_frequencies(rope: Rope, dim: int, max_positions: int) -> tuple[Tensor, float]:
    """Angles by which a position turns each pair of dimensions, and a factor on cosine and sine.

    In float32 operation by operation, as those who trained the checkpoints computed them.

    Args:
        dim: of a head.
        max_positions: of the model, which some kinds fall back to.

    Returns:
        float32 (dim / 2,) on the CPU, and the factor.
    """
    options = rope.options
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return plain / options["factor"], 1.0
    if rope.kind == "llama3":
        return _llama3_frequencies(plain, options, max_positions), 1.0
    if rope.kind == "yarn":
        return _yarn_frequencies(plain, rope.theta, options, dim, max_positions)
    return plain, 1.0


def _llama3_frequencies(plain: Tensor, options: Mapping[str, Any], max_positions: int) -> Tensor:
    """Short wavelengths stay, long ones are scaled, those between are interpolated."""
    factor, low, high = (options[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = options.get("original_max_position_embeddings") or max_positions
    wavelengths = 2 * math.pi / plain
    smooth = (trained / wavelengths - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    scaled = torch.where(wavelengths > trained / low, plain / factor, between)
    return torch.where(wavelengths < trained / high, plain, scaled)


def _yarn_frequencies(
    plain: Tensor, theta: float, options: Mapping[str, Any], dim: int, max_positions: int
) -> tuple[Tensor, float]:
    """Pairs that turn often within the trained length stay, others are scaled, with a ramp."""
    trained = options.get("original_max_position_embeddings") or max_positions
    factor = options.get("factor") or max_positions / trained

    def pair_that_turns(times: float) -> float:
        return dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = pair_that_turns(options.get("beta_fast") or 32)
    last = pair_that_turns(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first if last != first else 0.001  # no division by zero
    scaled = ((torch.arange(dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    frequencies = plain / factor * scaled + plain * (1 - scaled)

    def magnitude(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = options.get("attention_factor")
    if attention is None:
        one, other = options.get("mscale"), options.get("mscale_all_dim")
        attention = magnitude(one) / magnitude(other) if one and other else magnitude(1)
    return frequencies, float(attention)


def _read_rope(hf: dict[str, Any]) -> Rope:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of older ones."""
    found = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    if any(isinstance(value, dict) for value in found.values()):
        raise CheckpointError(
            f"config.json: rope_parameters must be the same for all layers, got {found}"
        )
    kind = found.pop("rope_type", None) or found.pop("type", None) or "default"
    found.pop("type", None)
    theta = found.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    partial = found.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or 1.0
    if kind not in ROPE_KINDS or partial != 1.0:
        raise CheckpointError(
            f"config.json: rope_type must be one of {list(ROPE_KINDS)} over whole heads, got "
            f"{kind!r} with partial_rotary_factor {partial}"
        )
    for name in ROPE_NEEDS.get(kind, ()):
        if not isinstance(found.get(name), (int, float)):
            raise CheckpointError(
                f"config.json: {name} of rope_type {kind!r} must be a number, got "
                f"{found.get(name)!r}"
            )
    return Rope(float(theta), kind, found)


# ---- config.json


def _common(hf: dict[str, Any], bos: int | None, eos: int | None) -> dict[str, Any]:
    """What all families have under the same names; defaults are the family's."""
    eos_tokens = hf.get("eos_token_id", eos)
    if isinstance(eos_tokens, int):
        eos_tokens = (eos_tokens,)
    labels = hf.get("id2label")
    if labels is None:
        labels = {str(i): f"LABEL_{i}" for i in range(hf.get("num_labels", 2))}
    return {
        "model_type": hf["model_type"],
        "architecture": hf["architectures"][0],
        "vocab_size": hf["vocab_size"],
        "initializer_range": hf.get("initializer_range", 0.02),
        "labels": tuple(labels[key] for key in sorted(labels, key=int)),
        "bos_token": hf.get("bos_token_id", bos),
        "eos_tokens": tuple(eos_tokens or ()),
        "pad_token": hf.get("pad_token_id"),
    }


def read_gpt2(hf: dict[str, Any]) -> DecoderConfig:
    """GPT-2's `config.json`."""
    expect(hf, "add_cross_attention", False)
    hidden, heads = hf["n_embd"], hf["n_head"]
    if hidden % heads:
        raise CheckpointError(
            f"config.json: n_embd must be a multiple of n_head, got {hidden} and {heads}"
        )
    return DecoderConfig(
        **_common(hf, 50256, 50256), hidden_size=hidden,
        intermediate_size=hf.get("n_inner") or 4 * hidden, num_layers=hf["n_layer"],
        num_heads=heads, num_heads_kv=heads, head_dim=hidden // heads,
        max_positions=hf.get("n_positions", 1024),
        activation=hf.get("activation_function", "gelu_new"),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5), rms_norm=False, gated=False, rope=None,
        qkv_bias=True, out_bias=True, mlp_bias=True, scaled=hf.get("scale_attn_weights", True),
        scaled_by_layer=hf.get("scale_attn_by_inverse_layer_idx", False),
        tied=hf.get("tie_word_embeddings", True),
    )  # fmt: skip


def read_llama(hf: dict[str, Any]) -> DecoderConfig:
    """The `config.json` of LLaMA, Qwen2 or Qwen3."""
    kind, heads, hidden = hf["model_type"], hf["num_attention_heads"], hf["hidden_size"]
    bias = hf.get("attention_bias", False)
    head_dim = hf.get("head_dim") or (128 if kind == "qwen3" else hidden // heads)
    tokens = (1, 2) if kind == "llama" else (None, None)
    return DecoderConfig(
        **_common(hf, *tokens), hidden_size=hidden, intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"], num_heads=heads,
        num_heads_kv=hf.get("num_key_value_heads") or heads, head_dim=head_dim,
        max_positions=hf.get("max_position_embeddings", 2048 if kind == "llama" else 32768),
        activation=hf.get("hidden_act", "silu"), norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope=_read_rope(hf), qkv_bias=True if kind == "qwen2" else bias,
        out_bias=False if kind == "qwen2" else bias,
        mlp_bias=hf.get("mlp_bias", False) if kind == "llama" else False,
        qk_norm=kind == "qwen3", windows=() if kind == "llama" else _read_windows(hf),
        tied=hf.get("tie_word_embeddings", False),
    )  # fmt: skip


def _read_windows(hf: dict[str, Any]) -> tuple[int | None, ...]:
    count, window = hf["num_hidden_layers"], hf.get("sliding_window", 4096)
    if not hf.get("use_sliding_window", False) or window is None:
        return ()
    kinds = hf.get("layer_types")
    if kinds is None:
        full = hf.get("max_window_layers", 28)
        kinds = ["full_attention"] * min(full, count) + ["sliding_attention"] * (count - full)
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise CheckpointError(
                f"config.json: layer_types must be full_attention or sliding_attention, got {kind}"
            )
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def _write_common(config: DecoderConfig) -> dict[str, Any]:
    eos = config.eos_tokens
    return {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "initializer_range": config.initializer_range,
        "id2label": {str(i): label for i, label in enumerate(config.labels)},
        "label2id": {label: i for i, label in enumerate(config.labels)},
        "bos_token_id": config.bos_token,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token,
    }


def write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    """GPT-2's `config.json`."""
    return {
        **_write_common(config),
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_positions,
        "activation_function": config.activation,
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.scaled,
        "scale_attn_by_inverse_layer_idx": config.scaled_by_layer,
    }


def write_llama(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of LLaMA, Qwen2 or Qwen3, that old and new transformers read."""
    assert config.rope is not None  # these families have no learned positions
    rope = config.rope
    scaling = {"rope_type": rope.kind, **rope.options}
    hf = {
        **_write_common(config),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads_kv,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
    }
    if config.model_type != "qwen2":
        hf["attention_bias"] = config.qkv_bias
    if config.model_type == "llama":
        hf["mlp_bias"] = config.mlp_bias
        return hf
    windows = config.windows or (None,) * config.num_layers
    widths = [window for window in windows if window is not None]
    hf["use_sliding_window"] = bool(widths)
    hf["sliding_window"] = widths[0] if widths else None
    hf["max_window_layers"] = next((i for i, w in enumerate(windows) if w), config.num_layers)
    hf["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    return hf


# ---- names of weights


def gpt2_weights(config: DecoderConfig, architecture: str) -> list[Weight]:
    """GPT-2's; its linear layers are stored as (in, out)."""
    pairs = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
    linear = {
        "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }  # fmt: skip
    block = [
        Weight(f"layers.{{i}}.{ours}.{part}", (f"transformer.h.{{i}}.{theirs}.{part}",),
               transpose=theirs in linear.values() and part == "weight")
        for ours, theirs in {**pairs, **linear}.items()
        for part in ("weight", "bias")
    ]  # fmt: skip
    return [
        Weight("embedding.weight", ("transformer.wte.weight",), also=_tied_names(config)),
        Weight("positions.weight", ("transformer.wpe.weight",)),
        *layers(config.num_layers, block),
        Weight("norm.weight", ("transformer.ln_f.weight",)),
        Weight("norm.bias", ("transformer.ln_f.bias",)),
        *_head_weights(config),
    ]


def llama_weights(config: DecoderConfig, architecture: str) -> list[Weight]:
    """Those of LLaMA, Qwen2 and Qwen3."""
    at, ours = "model.layers.{i}.", "layers.{i}."
    rows = (
        config.num_heads * config.head_dim,
        config.num_heads_kv * config.head_dim,
        config.num_heads_kv * config.head_dim,
    )

    def parts(bias: bool) -> tuple[str, ...]:
        return ("weight", "bias") if bias else ("weight",)

    block = [
        Weight(ours + "attention_norm.weight", (at + "input_layernorm.weight",)),
        Weight(ours + "mlp_norm.weight", (at + "post_attention_layernorm.weight",)),
    ]
    for part in parts(config.qkv_bias):
        names = tuple(f"{at}self_attn.{one}_proj.{part}" for one in "qkv")
        block.append(Weight(f"{ours}attention.qkv.{part}", names, rows=rows))
    for part in parts(config.out_bias):
        block.append(Weight(f"{ours}attention.out.{part}", (f"{at}self_attn.o_proj.{part}",)))
    for part in parts(config.mlp_bias):
        names = (f"{at}mlp.gate_proj.{part}", f"{at}mlp.up_proj.{part}")
        block.append(Weight(f"{ours}mlp.gate_up.{part}", names))
        block.append(Weight(f"{ours}mlp.down.{part}", (f"{at}mlp.down_proj.{part}",)))
    if config.qk_norm:
        block += [
            Weight(f"{ours}attention.{one}_norm.weight", (f"{at}self_attn.{one}_norm.weight",))
            for one in "qk"
        ]
    return [
        Weight("embedding.weight", ("model.embed_tokens.weight",), also=_tied_names(config)),
        *layers(config.num_layers, block),
        Weight("norm.weight", ("model.norm.weight",)),
        *_head_weights(config),
    ]


def _tied_names(config: DecoderConfig) -> tuple[str, ...]:
    return ("lm_head.weight",) if config.tied and config.head == "tokens" else ()


def _head_weights(config: DecoderConfig) -> list[Weight]:
    if config.head == "classes":
        return [Weight("head.weight", ("score.weight",))]
    if config.head == "tokens" and not config.tied:
        return [Weight("head.weight", ("lm_head.weight",))]
    return []
