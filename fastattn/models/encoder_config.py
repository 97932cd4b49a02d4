"""What distinguishes BERT, RoBERTa, ALBERT, DistilBERT and ELECTRA: a config, and no code.

`EncoderConfig` says it in one spelling; `SPELLINGS` say how the `config.json` of each Hugging Face
`model_type` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fastattn.models.checkpoint import CheckpointError, expect
from fastattn.models.layers import find_activation

POOLINGS = ("first", "mean", "pooler")


@dataclass(frozen=True)
class EncoderConfig:
    """An encoder of the BERT family. The defaults are BERT-base's.

    Attributes:
        model_type: as Hugging Face calls the family: "bert", "roberta", "roberta-prelayernorm",
            "albert", "distilbert" or "electra".
        architecture: encoder and head, such as "BertForMaskedLM"; "" is the encoder alone.
        vocab_size: tokens.
        hidden_size: features of a token in a layer; a multiple of num_heads.
        num_layers: blocks that a token runs through (of `group_size` layers each).
        num_heads: attention heads.
        intermediate_size: features inside the MLP.
        activation: of the MLP, by a name of `fastattn.models.layers.ACTIVATIONS`.
        max_positions: rows of the table of positions.
        token_types: rows of the table of token types; 0: there is none (DistilBERT).
        embedding_size: features of the embeddings; None: hidden_size. Where it differs, a linear
            layer leads from one to the other (ALBERT, ELECTRA).
        always_projected: that layer is there even where the sizes are equal (ALBERT).
        norm_eps: added to the variance in every layer norm.
        pre_norm: layers norm what they read, and a last norm follows the layers; else they norm
            what they have computed.
        num_groups: blocks share the weights of this many groups (ALBERT); None: none are shared.
        group_size: layers of a group, which run one after the other (ALBERT).
        counts_tokens: positions count the tokens that are not padding, from pad_token + 1 on
            (RoBERTa); else they are columns, from 0 on.
        pad_token: the token that padding is made of; its embedding is not trained.
        pooler: the encoder alone has a pooler, tanh of a linear layer of the first token.
        hidden_dropout, attention_dropout: in training, probability in [0, 1).
        tied: the masked-LM head's decoder is the table of embeddings.
        masked_lm_activation: of that head; None: `activation`.
        sequence_head: between first token and classes: "pooler", or the activation of a linear
            layer of the head's own.
        sequence_head_drops_input: that layer's input has dropout too.
        sequence_dropout, token_dropout: before the classes, of a sequence and of a token; None:
            hidden_dropout.
        span_dropout: before the scores of a span.
        num_labels: classes of a classification head.
        other: what else `config.json` says, which means nothing here and is saved again.
    """

    model_type: str = "bert"
    architecture: str = ""
    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    activation: str = "gelu"
    max_positions: int = 512
    token_types: int = 2
    embedding_size: int | None = None
    always_projected: bool = False
    norm_eps: float = 1e-12
    pre_norm: bool = False
    num_groups: int | None = None
    group_size: int = 1
    counts_tokens: bool = False
    pad_token: int | None = 0
    pooler: bool = True
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    tied: bool = True
    masked_lm_activation: str | None = None
    sequence_head: str = "pooler"
    sequence_head_drops_input: bool = False
    sequence_dropout: float | None = None
    token_dropout: float | None = None
    span_dropout: float = 0.0
    num_labels: int = 2
    other: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size",
                 "max_positions", "group_size", "num_labels")  # fmt: skip
        for name in (*sizes, "embedding_size", "num_groups"):
            _check_count(name, getattr(self, name), least=1, optional=name not in sizes)
        _check_count("token_types", self.token_types, least=0)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads = {self.num_heads}, got "
                f"{self.hidden_size}"
            )
        if self.num_groups is not None and self.num_groups > self.num_layers:
            raise ValueError(
                f"num_groups must be at most num_layers = {self.num_layers}, got {self.num_groups}"
            )
        for name in ("hidden", "attention", "sequence", "token", "span"):
            p = getattr(self, f"{name}_dropout")
            if p is not None and not 0 <= p < 1:
                raise ValueError(f"{name}_dropout must be a probability in [0, 1), got {p!r}")
        if self.counts_tokens and self.pad_token is None:
            raise ValueError("pad_token must be given where counts_tokens is True, got None")
        if self.pad_token is not None and not 0 <= self.pad_token < self.vocab_size:
            raise ValueError(
                f"pad_token must lie in 0..{self.vocab_size - 1}, the vocabulary, or be None, got "
                f"{self.pad_token}"
            )
        if self.max_seqlen < 1:
            raise ValueError(
                f"max_positions must leave a position after pad_token = {self.pad_token}, got "
                f"{self.max_positions}"
            )
        for activation in (self.activation, self.masked_lm_activation, self.sequence_head):
            if activation not in (None, "pooler"):
                find_activation(activation)

    @property
    def head_dim(self) -> int:
        """Features of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def embedded_size(self) -> int:
        """Features of an embedding."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def projected(self) -> bool:
        """Whether a linear layer follows the embeddings."""
        return self.always_projected or self.embedded_size != self.hidden_size

    @property
    def max_seqlen(self) -> int:
        """Tokens that a sequence may have."""
        first = 0 if self.pad_token is None or not self.counts_tokens else self.pad_token + 1
        return self.max_positions - first

    @property
    def layer_order(self) -> tuple[int, ...]:
        """Which layer's weights are used, one after the other: ALBERT's come up again."""
        if self.num_groups is None:
            return tuple(range(self.num_layers))
        # Rounded as transformers rounds: it differs from exact division in a few sizes.
        blocks_per_group = self.num_layers / self.num_groups
        return tuple(
            int(block / blocks_per_group) * self.group_size + layer
            for block in range(self.num_layers)
            for layer in range(self.group_size)
        )


def _check_count(name: str, value: Any, least: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class Spelling:
    """How the `config.json` of one `model_type` says what an `EncoderConfig` says.

    Attributes:
        names: for each of our fields the key, and the value that is meant where there is none.
        fixed: our fields that the family never varies.
    """

    names: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any]


_BERT: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 30522),
    "hidden_size": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "intermediate_size": ("intermediate_size", 3072),
    "activation": ("hidden_act", "gelu"),
    "max_positions": ("max_position_embeddings", 512),
    "token_types": ("type_vocab_size", 2),
    "norm_eps": ("layer_norm_eps", 1e-12),
    "pad_token": ("pad_token_id", 0),
    "hidden_dropout": ("hidden_dropout_prob", 0.1),
    "attention_dropout": ("attention_probs_dropout_prob", 0.1),
    "sequence_dropout": ("classifier_dropout", None),
    "token_dropout": ("classifier_dropout", None),
    "tied": ("tie_word_embeddings", True),
}
_ROBERTA = {
    **_BERT,
    "vocab_size": ("vocab_size", 50265),
    "pad_token": ("pad_token_id", 1),
}
_ALBERT = {
    **_BERT,
    "vocab_size": ("vocab_size", 30000),
    "embedding_size": ("embedding_size", 128),
    "hidden_size": ("hidden_size", 4096),
    "num_groups": ("num_hidden_groups", 1),
    "num_heads": ("num_attention_heads", 64),
    "intermediate_size": ("intermediate_size", 16384),
    "group_size": ("inner_group_num", 1),
    "activation": ("hidden_act", "gelu_new"),
    "hidden_dropout": ("hidden_dropout_prob", 0.0),
    "attention_dropout": ("attention_probs_dropout_prob", 0.0),
    "sequence_dropout": ("classifier_dropout_prob", 0.1),
    "token_dropout": ("classifier_dropout_prob", 0.1),
}
_DISTILBERT: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 30522),
    "hidden_size": ("dim", 768),
    "num_layers": ("n_layers", 6),
    "num_heads": ("n_heads", 12),
    "intermediate_size": ("hidden_dim", 3072),
    "activation": ("activation", "gelu"),
    "max_positions": ("max_position_embeddings", 512),
    "pad_token": ("pad_token_id", 0),
    "hidden_dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "sequence_dropout": ("seq_classif_dropout", 0.2),
    "span_dropout": ("qa_dropout", 0.1),
    "tied": ("tie_word_embeddings", True),
}
_ELECTRA = {
    **_BERT,
    "embedding_size": ("embedding_size", 128),
    "hidden_size": ("hidden_size", 256),
    "num_heads": ("num_attention_heads", 4),
    "intermediate_size": ("intermediate_size", 1024),
}
_ROBERTA_FIXED = {
    "counts_tokens": True,
    "masked_lm_activation": "gelu",
    "sequence_head": "tanh",
    "sequence_head_drops_input": True,
}

SPELLINGS: dict[str, Spelling] = {
    "bert": Spelling(_BERT, {}),
    "roberta": Spelling(_ROBERTA, _ROBERTA_FIXED),
    "roberta-prelayernorm": Spelling(_ROBERTA, {**_ROBERTA_FIXED, "pre_norm": True}),
    "albert": Spelling(_ALBERT, {"always_projected": True}),
    "distilbert": Spelling(
        _DISTILBERT, {"token_types": 0, "pooler": False, "sequence_head": "relu"}
    ),
    "electra": Spelling(
        _ELECTRA,
        {
            "pooler": False,
            "masked_lm_activation": "gelu",
            "sequence_head": "gelu",
            "sequence_head_drops_input": True,
        },
    ),
}

# Of a config.json: written anew when saving, or of a version of transformers.
_NOT_KEPT = (
    "model_type", "architectures", "dtype", "torch_dtype", "transformers_version",
    "_name_or_path", "num_labels", "_num_labels",
)  # fmt: skip


def read_config(hf: Mapping[str, Any]) -> EncoderConfig:
    """An `EncoderConfig` from a `config.json`, by its `model_type`; absent entries are defaults.

    Raises:
        CheckpointError: an option that these encoders do not have, or impossible sizes.
    """
    hf = dict(hf)
    expect(hf, "model_type", *SPELLINGS)
    for name in ("is_decoder", "add_cross_attention"):
        expect(hf, name, False, None)
    expect(hf, "position_embedding_type", "absolute", None)
    spelling = SPELLINGS[hf["model_type"]]
    values = {ours: hf.get(key, default) for ours, (key, default) in spelling.names.items()}
    known = {*_NOT_KEPT, *(key for key, _ in spelling.names.values())}
    labels = hf.get("id2label")
    try:
        return EncoderConfig(
            model_type=hf["model_type"],
            architecture=next(iter(hf.get("architectures") or ()), ""),
            num_labels=hf.get("num_labels", 2) if labels is None else len(labels),
            other={key: value for key, value in hf.items() if key not in known},
            **values,
            **spelling.fixed,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json of {hf['model_type']}: {error}") from error


def write_config(config: EncoderConfig) -> dict[str, Any]:
    """The `config.json` that `read_config` makes `config` of, without `architectures`.

    Raises:
        CheckpointError: `config` is not of its `model_type`: a field that this family never varies.
    """
    expect({"model_type": config.model_type}, "model_type", *SPELLINGS)
    spelling = SPELLINGS[config.model_type]
    hf: dict[str, Any] = {**config.other, "model_type": config.model_type}
    for ours, (key, _) in spelling.names.items():
        value = getattr(config, ours)
        if key in hf and key not in config.other and hf[key] != value:
            raise CheckpointError(
                f"{ours} must be {hf[key]!r} in a {config.model_type} model, whose config.json has "
                f"one {key!r} for both, got {value!r}"
            )
        hf[key] = value
    for one in fields(EncoderConfig):
        if one.name in spelling.names or one.name in _FREE:
            continue
        value, expected = getattr(config, one.name), spelling.fixed.get(one.name, one.default)
        if value != expected:
            raise CheckpointError(
                f"{one.name} must be {expected!r} in a {config.model_type} model, got {value!r}"
            )
    if len(hf.get("id2label", (0, 1))) != config.num_labels:
        hf["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
        hf["label2id"] = {label: int(i) for i, label in hf["id2label"].items()}
    return hf


_FREE = ("model_type", "architecture", "num_labels", "other")
