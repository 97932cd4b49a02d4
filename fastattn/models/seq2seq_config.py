"""What makes an encoder-decoder a T5, a BART or a Whisper, as data, and their names for weights.

| | T5 1.0 | T5 1.1, mT5 | BART | Whisper |
|---|---|---|---|---|
| positions | relative, by table | relative, by table | learned, from row 2 on | learned |
| norm | RMS, before | RMS, before | layer, after, and of the embeddings | layer, before |
| MLP | ReLU | gated GELU | GELU | GELU |
| scores | not scaled | not scaled | head_dim ** -0.5 | head_dim ** -0.5 |
| biases | none | none | all | all but the keys' |
| logits | tied, scaled | own weights | tied, and a bias | tied |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastattn.models.checkpoint import CheckpointError, Weight, expect, layers


@dataclass(frozen=True)
class StackConfig:
    """Sizes of the encoder or of the decoder.

    Attributes:
        num_layers, num_heads, head_dim: of its attention.
        hidden: inside of its MLPs.
        max_positions: tokens that it has positions for; None: any number (relative positions).
    """

    num_layers: int
    num_heads: int
    head_dim: int
    hidden: int
    max_positions: int | None = None


@dataclass(frozen=True)
class Seq2SeqConfig:
    """An encoder-decoder. The defaults are BART's way.

    Attributes:
        model_type, architecture: by Hugging Face's names.
        vocab_size, dim: tokens, and features of a token.
        encoder, decoder: sizes of the two stacks.
        activation: of the MLPs, see `fastattn.models.layers.ACTIVATIONS`.
        gated: MLPs are act(gate(x)) * up(x).
        bias: linear layers have biases; with `key_bias` False all but the projections of keys.
        rms_norm: RMS norms without bias, instead of layer norms.
        norm_eps: of the norms.
        norm_first: norms stand before each sublayer and at the end, instead of after each sublayer.
        embedding_norm: the sum of token and position embeddings is normalized.
        embedding_scale: factor on token embeddings.
        position_offset: rows of the position tables before that of position 0.
        num_buckets, max_distance: of the tables of relative position biases; 0: there are none.
        softmax_scale: factor on scores; None: head_dim ** -0.5.
        logits_scale: factor on hidden states before the head.
        logits_bias: the head has a bias, which is not trained.
        tied_embeddings: encoder and decoder share token embeddings.
        tied_head: the head's weights are the decoder's token embeddings.
        num_mel_bins: the encoder reads sound, in so many bands; 0: it reads tokens.
        dropout, attention_dropout, activation_dropout: probabilities, in training.
        output_dropout: `dropout` also behind the last norm.
        start_token: with which the decoder starts; None: the caller says.
        eos_tokens, pad_token: of the vocabulary.
        other: what else `config.json` says, which means nothing here and is saved again.
    """

    model_type: str
    architecture: str
    vocab_size: int
    dim: int
    encoder: StackConfig
    decoder: StackConfig
    activation: str = "gelu"
    gated: bool = False
    bias: bool = True
    key_bias: bool = True
    rms_norm: bool = False
    norm_eps: float = 1e-5
    norm_first: bool = False
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    position_offset: int = 0
    num_buckets: int = 0
    max_distance: int = 128
    softmax_scale: float | None = None
    logits_scale: float = 1.0
    logits_bias: bool = False
    tied_embeddings: bool = True
    tied_head: bool = True
    num_mel_bins: int = 0
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    output_dropout: bool = False
    start_token: int | None = None
    eos_tokens: tuple[int, ...] = ()
    pad_token: int | None = None
    other: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def has_head(self) -> bool:
        """Whether there are logits."""
        return self.architecture.endswith("ForConditionalGeneration")


_TOKENS = {"decoder_start_token_id", "eos_token_id", "pad_token_id"}
_T5_OPTIONS = {
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads",
    "relative_attention_num_buckets", "relative_attention_max_distance", "dropout_rate",
    "layer_norm_epsilon", "feed_forward_proj", "tie_word_embeddings", "scale_decoder_outputs",
    "dense_act_fn", "is_gated_act", *_TOKENS,
}  # fmt: skip
_BART_OPTIONS = {
    "vocab_size", "d_model", "encoder_layers", "encoder_ffn_dim", "encoder_attention_heads",
    "decoder_layers", "decoder_ffn_dim", "decoder_attention_heads", "activation_function",
    "dropout", "attention_dropout", "activation_dropout", "tie_word_embeddings", *_TOKENS,
}  # fmt: skip
_NOT_WRITTEN = {"architectures", "model_type", "dtype", "torch_dtype", "transformers_version"}


# ---- T5 1.0, T5 1.1, mT5


def t5_config(hf: dict[str, Any]) -> Seq2SeqConfig:
    """From a `config.json` of T5 or mT5."""
    expect(hf, "is_decoder", False)
    expect(hf, "is_encoder_decoder", True)
    is_mt5 = hf["model_type"] == "mt5"
    kind = hf.get("feed_forward_proj", "gated-gelu" if is_mt5 else "relu")
    first, _, activation = kind.rpartition("-")
    if first not in ("", "gated"):
        raise CheckpointError(
            f'config.json: feed_forward_proj must be "gated-{{name}}" or "{{name}}", got {kind!r}'
        )
    dim, num_layers = hf.get("d_model", 512), hf.get("num_layers", 8 if is_mt5 else 6)
    num_decoder_layers = hf.get("num_decoder_layers")
    sizes = {
        "num_heads": hf.get("num_heads", 6 if is_mt5 else 8),
        "head_dim": hf.get("d_kv", 64),
        "hidden": hf.get("d_ff", 1024 if is_mt5 else 2048),
    }
    # Version 1.1 says that its head is not tied, by which it also means that it is not scaled.
    tied = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings") is not False)
    tied = tied and not is_mt5
    return Seq2SeqConfig(
        model_type=hf["model_type"],
        architecture=hf["architectures"][0],
        vocab_size=hf.get("vocab_size", 250112 if is_mt5 else 32128),
        dim=dim,
        encoder=StackConfig(num_layers, **sizes),
        decoder=StackConfig(
            num_layers if num_decoder_layers is None else num_decoder_layers, **sizes
        ),
        activation="gelu_new" if kind == "gated-gelu" else activation,
        gated=first == "gated",
        bias=False,
        rms_norm=True,
        norm_eps=hf.get("layer_norm_epsilon", 1e-6),
        norm_first=True,
        num_buckets=hf.get("relative_attention_num_buckets", 32),
        max_distance=hf.get("relative_attention_max_distance", 128),
        softmax_scale=1.0,
        logits_scale=dim**-0.5 if tied else 1.0,
        tied_head=tied,
        dropout=hf.get("dropout_rate", 0.1),
        attention_dropout=hf.get("dropout_rate", 0.1),
        activation_dropout=hf.get("dropout_rate", 0.1),
        output_dropout=True,
        **_special_tokens(hf, start=0 if is_mt5 else None, eos=1, pad=0),
        other=_other(hf, _T5_OPTIONS),
    )


def t5_to_hf(config: Seq2SeqConfig) -> dict[str, Any]:
    """The `config.json` that `t5_config` reads."""
    activation = "gelu" if config.activation == "gelu_new" else config.activation
    return {
        **config.other,
        "vocab_size": config.vocab_size,
        "d_model": config.dim,
        "d_kv": config.encoder.head_dim,
        "d_ff": config.encoder.hidden,
        "num_layers": config.encoder.num_layers,
        "num_decoder_layers": config.decoder.num_layers,
        "num_heads": config.encoder.num_heads,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": f"gated-{activation}" if config.gated else config.activation,
        "tie_word_embeddings": config.tied_head,
        **_special_tokens_to_hf(config),
    }


def t5_weights(config: Seq2SeqConfig, architecture: str) -> list[Weight]:
    """The names of T5's weights, which have no prefix."""
    copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    if config.tied_head:
        copies.append("lm_head.weight")
    weights = [Weight("embedding.weight", ("shared.weight",), also=tuple(copies))]
    if config.has_head and not config.tied_head:
        # transformers ties them if the file has none of its own, whatever the config says.
        weights += [
            Weight("head.weight", ("lm_head.weight",), also=("shared.weight",), fallback=True)
        ]
    for stack, sizes in (("encoder", config.encoder), ("decoder", config.decoder)):
        block = f"{stack}.block.{{i}}.layer"
        attention, mlp = f"{block}.0.SelfAttention", "1" if stack == "encoder" else "2"
        up = ("wi_0", "wi_1") if config.gated else ("wi",)
        one = [
            Weight("attention.qvk.weight", tuple(f"{attention}.{x}.weight" for x in "qvk")),
            Weight("attention.out.weight", (f"{attention}.o.weight",)),
            Weight("attention_norm.weight", (f"{block}.0.layer_norm.weight",)),
            Weight("mlp.up.weight", tuple(f"{block}.{mlp}.DenseReluDense.{x}.weight" for x in up)),
            Weight("mlp.down.weight", (f"{block}.{mlp}.DenseReluDense.wo.weight",)),
            Weight("mlp_norm.weight", (f"{block}.{mlp}.layer_norm.weight",)),
        ]
        if stack == "decoder":
            cross = f"{block}.1.EncDecAttention"
            one += [
                Weight("cross.q.weight", (f"{cross}.q.weight",)),
                Weight("cross.vk.weight", (f"{cross}.v.weight", f"{cross}.k.weight")),
                Weight("cross.out.weight", (f"{cross}.o.weight",)),
                Weight("cross_norm.weight", (f"{block}.1.layer_norm.weight",)),
            ]
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        weights += [
            Weight(f"{stack}.relative_bias.weight", (table,)),
            Weight(f"{stack}.norm.weight", (f"{stack}.final_layer_norm.weight",)),
            *_of_stack(stack, sizes, one),
        ]
    return weights


# ---- BART and Whisper


def bart_config(hf: dict[str, Any]) -> Seq2SeqConfig:
    """From a `config.json` of BART."""
    for option, value in _BART_ONLY.items():
        expect(hf, option, value)
    dim, positions = hf.get("d_model", 1024), hf.get("max_position_embeddings", 1024)
    sizes = [_bart_stack(hf, stack, 12, 16, 4096, dim, positions) for stack in _STACKS]
    return Seq2SeqConfig(
        model_type="bart",
        architecture=hf["architectures"][0],
        vocab_size=hf.get("vocab_size", 50265),
        dim=dim,
        encoder=sizes[0],
        decoder=sizes[1],
        embedding_norm=True,
        embedding_scale=dim**0.5 if hf.get("scale_embedding", False) else 1.0,
        position_offset=2,
        logits_bias=True,
        tied_embeddings=hf.get("tie_word_embeddings", True),
        **_bart_options(hf, dropout=0.1),
        **_special_tokens(hf, start=2, eos=2, pad=1),
        other=_other(hf, {*_BART_OPTIONS, "max_position_embeddings", "scale_embedding"}),
    )


def bart_to_hf(config: Seq2SeqConfig) -> dict[str, Any]:
    """The `config.json` that `bart_config` reads."""
    return {
        **_bart_options_to_hf(config),
        "max_position_embeddings": config.encoder.max_positions,
        "scale_embedding": config.embedding_scale != 1.0,
    }


def bart_weights(config: Seq2SeqConfig, architecture: str) -> list[Weight]:
    """The names of BART's weights."""
    head = ("lm_head.weight",) if config.has_head else ()
    own = tuple(f"model.{stack}.embed_tokens.weight" for stack in _STACKS)
    if config.tied_embeddings:
        weights = [Weight("embedding.weight", ("model.shared.weight",), also=(*own, *head))]
    else:
        shared = ("model.shared.weight",)  # as versions saved it that tied these nevertheless
        weights = [
            Weight("encoder_embedding.weight", own[:1], also=shared, fallback=True),
            Weight("embedding.weight", own[1:], also=shared, fallback=True),
        ]
        weights += [Weight("head.weight", head)] if head else []
    if config.has_head:
        weights.append(Weight("logits_bias", ("final_logits_bias",)))
    for stack in _STACKS:
        weights += [
            *_pair(f"{stack}.embedding_norm", f"model.{stack}.layernorm_embedding"),
            *_bart_stack_weights(config, stack),
        ]
    return weights


def whisper_config(hf: dict[str, Any]) -> Seq2SeqConfig:
    """From a `config.json` of Whisper. It has a `scale_embedding` that transformers ignores."""
    expect(hf, "is_encoder_decoder", True)
    dim, defaults = hf.get("d_model", 384), (4, 6, 1536)
    source, target = hf.get("max_source_positions", 1500), hf.get("max_target_positions", 448)
    positions = ("max_source_positions", "max_target_positions")
    return Seq2SeqConfig(
        model_type="whisper",
        architecture=hf["architectures"][0],
        vocab_size=hf.get("vocab_size", 51865),
        dim=dim,
        encoder=_bart_stack(hf, "encoder", *defaults, dim, source),
        decoder=_bart_stack(hf, "decoder", *defaults, dim, target),
        key_bias=False,
        norm_first=True,
        tied_embeddings=False,
        num_mel_bins=hf.get("num_mel_bins", 80),
        **_bart_options(hf, dropout=0.0),
        **_special_tokens(hf, start=50257, eos=50256, pad=50256),
        other=_other(hf, {*_BART_OPTIONS, "num_mel_bins", *positions}),
    )


def whisper_to_hf(config: Seq2SeqConfig) -> dict[str, Any]:
    """The `config.json` that `whisper_config` reads."""
    return {
        **_bart_options_to_hf(config),
        "num_mel_bins": config.num_mel_bins,
        "max_source_positions": config.encoder.max_positions,
        "max_target_positions": config.decoder.max_positions,
    }


def whisper_weights(config: Seq2SeqConfig, architecture: str) -> list[Weight]:
    """The names of Whisper's weights."""
    head = ("proj_out.weight",) if config.has_head else ()
    tied = head if config.tied_head else ()
    weights = [Weight("embedding.weight", ("model.decoder.embed_tokens.weight",), also=tied)]
    if head and not config.tied_head:
        weights.append(Weight("head.weight", head))
    for name in ("conv1", "conv2"):
        weights += _pair(f"sound.{name}", f"model.encoder.{name}")
    for stack in _STACKS:
        weights += [
            *_pair(f"{stack}.norm", f"model.{stack}.layer_norm"),
            *_bart_stack_weights(config, stack),
        ]
    return weights


_STACKS = ("encoder", "decoder")
_BART_ONLY = {
    "is_decoder": False, "is_encoder_decoder": True, "normalize_before": False,
    "normalize_embedding": True, "add_final_layer_norm": False, "add_bias_logits": False,
    "static_position_embeddings": False,
}  # fmt: skip
"""Options of models that were derived from BART, in old files of BART itself too."""


def _bart_stack(
    hf: dict[str, Any], stack: str, depth: int, heads: int, hidden: int, dim: int, positions: int
) -> StackConfig:
    num_heads = hf.get(f"{stack}_attention_heads", heads)
    if dim % num_heads:
        raise CheckpointError(
            f"config.json: d_model must be a multiple of {stack}_attention_heads, got {dim} and "
            f"{num_heads}"
        )
    return StackConfig(
        num_layers=hf.get(f"{stack}_layers", depth),
        num_heads=num_heads,
        head_dim=dim // num_heads,
        hidden=hf.get(f"{stack}_ffn_dim", hidden),
        max_positions=positions,
    )


def _bart_options(hf: dict[str, Any], dropout: float) -> dict[str, Any]:
    return {
        "activation": hf.get("activation_function", "gelu"),
        "tied_head": hf.get("tie_word_embeddings", True),
        "dropout": hf.get("dropout", dropout),
        "attention_dropout": hf.get("attention_dropout", 0.0),
        "activation_dropout": hf.get("activation_dropout", 0.0),
    }


def _bart_options_to_hf(config: Seq2SeqConfig) -> dict[str, Any]:
    sizes = {}
    for name, stack in zip(_STACKS, (config.encoder, config.decoder), strict=True):
        sizes[f"{name}_layers"] = stack.num_layers
        sizes[f"{name}_attention_heads"] = stack.num_heads
        sizes[f"{name}_ffn_dim"] = stack.hidden
    return {
        **config.other,
        "vocab_size": config.vocab_size,
        "d_model": config.dim,
        **sizes,
        "activation_function": config.activation,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
        "tie_word_embeddings": config.tied_head,
        **_special_tokens_to_hf(config),
    }


def _bart_stack_weights(config: Seq2SeqConfig, stack: str) -> list[Weight]:
    layer = f"model.{stack}.layers.{{i}}"
    own, cross = f"{layer}.self_attn", f"{layer}.encoder_attn"
    # Queries and values before keys: Whisper's keys have no bias, and so it is the end that lacks.
    biased = "qvk" if config.key_bias else "qv"
    one = [
        Weight("attention.qvk.weight", tuple(f"{own}.{x}_proj.weight" for x in "qvk")),
        Weight("attention.qvk.bias", tuple(f"{own}.{x}_proj.bias" for x in biased)),
        *_pair("attention.out", f"{own}.out_proj"),
        *_pair("attention_norm", f"{layer}.self_attn_layer_norm"),
        *_pair("mlp.up", f"{layer}.fc1"),
        *_pair("mlp.down", f"{layer}.fc2"),
        *_pair("mlp_norm", f"{layer}.final_layer_norm"),
    ]
    if stack == "decoder":
        one += [
            *_pair("cross.q", f"{cross}.q_proj"),
            Weight("cross.vk.weight", tuple(f"{cross}.{x}_proj.weight" for x in "vk")),
            Weight("cross.vk.bias", tuple(f"{cross}.{x}_proj.bias" for x in biased[1:])),
            *_pair("cross.out", f"{cross}.out_proj"),
            *_pair("cross_norm", f"{layer}.encoder_attn_layer_norm"),
        ]
    sizes = config.encoder if stack == "encoder" else config.decoder
    positions = Weight(f"{stack}.positions.weight", (f"model.{stack}.embed_positions.weight",))
    return [positions, *_of_stack(stack, sizes, one)]


# ---- shared


def _pair(ours: str, theirs: str) -> list[Weight]:
    return [Weight(f"{ours}.{name}", (f"{theirs}.{name}",)) for name in ("weight", "bias")]


def _of_stack(stack: str, sizes: StackConfig, one: list[Weight]) -> list[Weight]:
    named = [Weight(f"{stack}.layers.{{i}}.{weight.ours}", weight.theirs) for weight in one]
    return layers(sizes.num_layers, named)


def _special_tokens(hf: dict[str, Any], start: int | None, eos: int, pad: int) -> dict[str, Any]:
    ends = hf.get("eos_token_id", eos)
    if ends is None:
        ends = ()
    return {
        "start_token": hf.get("decoder_start_token_id", start),
        "eos_tokens": tuple(ends) if isinstance(ends, (list, tuple)) else (ends,),
        "pad_token": hf.get("pad_token_id", pad),
    }


def _special_tokens_to_hf(config: Seq2SeqConfig) -> dict[str, Any]:
    ends = list(config.eos_tokens)
    return {
        "decoder_start_token_id": config.start_token,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": config.pad_token,
    }


def _other(hf: dict[str, Any], known: set[str]) -> dict[str, Any]:
    return {name: value for name, value in hf.items() if name not in known | _NOT_WRITTEN}
