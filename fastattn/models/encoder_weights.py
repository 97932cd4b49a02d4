"""What the encoders' weights are called in Hugging Face's checkpoints: tables, both ways.

A name here stands for a module, and what it has of `weight` and `bias` goes with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fastattn.models.checkpoint import CheckpointError, Weight
from fastattn.models.encoder_config import EncoderConfig

Table = Mapping[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class Names:
    """The names of one family.

    Attributes:
        name: with which architectures start.
        heads: with which they end.
        prefix: of the base model.
        layer: of a layer: {i} is its number, {group} and {inner} are ALBERT's.
        layers: our modules of a layer, and theirs, which come after `layer`.
        base: our other modules of the encoder, and theirs, which come after `prefix`.
        head: our modules of the heads, and theirs.
        decoder, bias: of the masked-LM head.
        unread: regular expression of what checkpoints have for other heads.
    """

    name: str
    heads: tuple[str, ...]
    prefix: str
    layer: str
    layers: Table
    base: Table
    head: Table
    decoder: str
    bias: str
    unread: str

    @property
    def architectures(self) -> tuple[str, ...]:
        """All of them, that without a head first."""
        return tuple(self.name + one for one in ("Model", *self.heads))

    @property
    def ignored(self) -> tuple[str, ...]:
        """Keys that are no error: buffers that were once saved, and heads that are not built."""
        prefix = self.prefix.replace(".", r"\.")
        return (
            r".*embeddings\.(position|token_type)_ids", rf"({prefix})?pooler\..*", self.unread
        )  # fmt: skip


_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_EMBEDDINGS = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}
_TYPED_EMBEDDINGS = {
    **_EMBEDDINGS,
    "embeddings.token_type": "embeddings.token_type_embeddings",
}
_BERT_LAYERS: Table = {
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_DENSE_CLASSIFIER = {"dense": "classifier.dense", "classifier": "classifier.out_proj"}

_BERT = Names(
    name="Bert",
    heads=("ForMaskedLM", "ForNextSentencePrediction", "ForPreTraining", *_CLASSIFIERS),
    prefix="bert.",
    layer="encoder.layer.{i}.",
    layers=_BERT_LAYERS,
    base={**_TYPED_EMBEDDINGS, "pooler": "pooler.dense"},
    head={
        "tokens.dense": "cls.predictions.transform.dense",
        "tokens.norm": "cls.predictions.transform.LayerNorm",
        "sentence": "cls.seq_relationship",
        "classifier": "classifier",
        "span": "qa_outputs",
    },
    decoder="cls.predictions.decoder",
    bias="cls.predictions.bias",
    unread=r"cls\..*",
)
_ROBERTA = Names(
    name="Roberta",
    heads=("ForMaskedLM", *_CLASSIFIERS),
    prefix="roberta.",
    layer="encoder.layer.{i}.",
    layers=_BERT_LAYERS,
    base={**_TYPED_EMBEDDINGS, "pooler": "pooler.dense"},
    head={
        "tokens.dense": "lm_head.dense",
        "tokens.norm": "lm_head.layer_norm",
        "classifier": "classifier",
        "span": "qa_outputs",
    },
    decoder="lm_head.decoder",
    bias="lm_head.bias",
    unread=r"lm_head\..*",
)
_PRE_NORM = Names(
    name="RobertaPreLayerNorm",
    heads=_ROBERTA.heads,
    prefix="roberta_prelayernorm.",
    layer=_ROBERTA.layer,
    layers={
        **_BERT_LAYERS,
        "attention_norm": "attention.LayerNorm",
        "mlp_norm": "intermediate.LayerNorm",
    },
    base={**_ROBERTA.base, "final_norm": "LayerNorm"},
    head=_ROBERTA.head,
    decoder=_ROBERTA.decoder,
    bias=_ROBERTA.bias,
    unread=_ROBERTA.unread,
)
_ALBERT = Names(
    name="Albert",
    heads=("ForMaskedLM", "ForPreTraining", *_CLASSIFIERS),
    prefix="albert.",
    layer="encoder.albert_layer_groups.{group}.albert_layers.{inner}.",
    layers={
        "attention.qkv": ("attention.query", "attention.key", "attention.value"),
        "attention.out": "attention.dense",
        "attention_norm": "attention.LayerNorm",
        "mlp.up": "ffn",
        "mlp.down": "ffn_output",
        "mlp_norm": "full_layer_layer_norm",
    },
    base={
        **_TYPED_EMBEDDINGS,
        "embeddings.projection": "encoder.embedding_hidden_mapping_in",
        "pooler": "pooler",
    },
    head={
        "tokens.dense": "predictions.dense",
        "tokens.norm": "predictions.LayerNorm",
        "sentence": "sop_classifier.classifier",
        "classifier": "classifier",
        "span": "qa_outputs",
    },
    decoder="predictions.decoder",
    bias="predictions.bias",
    unread=r"(predictions|sop_classifier)\..*",
)
_DISTILBERT = Names(
    name="DistilBert",
    heads=("ForMaskedLM", *_CLASSIFIERS),
    prefix="distilbert.",
    layer="transformer.layer.{i}.",
    layers={
        "attention.qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention.out": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "mlp.up": "ffn.lin1",
        "mlp.down": "ffn.lin2",
        "mlp_norm": "output_layer_norm",
    },
    base=_EMBEDDINGS,
    head={
        "tokens.dense": "vocab_transform",
        "tokens.norm": "vocab_layer_norm",
        "dense": "pre_classifier",
        "classifier": "classifier",
        "span": "qa_outputs",
    },
    decoder="vocab_projector",
    bias="vocab_projector.bias",
    unread=r"vocab_(transform|layer_norm|projector)\..*",
)
_ELECTRA = Names(
    name="Electra",
    heads=("ForMaskedLM", "ForPreTraining", *_CLASSIFIERS),
    prefix="electra.",
    layer="encoder.layer.{i}.",
    layers=_BERT_LAYERS,
    base={**_TYPED_EMBEDDINGS, "embeddings.projection": "embeddings_project"},
    head={
        "tokens.dense": "generator_predictions.dense",
        "tokens.norm": "generator_predictions.LayerNorm",
        "classifier": "classifier",
        "span": "qa_outputs",
    },
    decoder="generator_lm_head",
    bias="generator_lm_head.bias",
    unread=r"(discriminator_predictions|generator_predictions|generator_lm_head)\..*",
)
NAMES = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "roberta-prelayernorm": _PRE_NORM,
    "albert": _ALBERT,
    "distilbert": _DISTILBERT,
    "electra": _ELECTRA,
}
# Where one head's modules are called otherwise than those of the family's other heads.
_OF_ONE_HEAD: dict[str, Table] = {
    "RobertaForSequenceClassification": _DENSE_CLASSIFIER,
    "RobertaPreLayerNormForSequenceClassification": _DENSE_CLASSIFIER,
    "ElectraForSequenceClassification": _DENSE_CLASSIFIER,
    "ElectraForPreTraining": {
        "dense": "discriminator_predictions.dense",
        "classifier": "discriminator_predictions.dense_prediction",
    },
}


def find_head(config: EncoderConfig, architecture: str) -> str:
    """With what an architecture's name ends, such as "ForMaskedLM"; "" for the encoder alone.

    Raises:
        CheckpointError: the family has no such architecture.
    """
    names = NAMES[config.model_type]
    if architecture in ("", f"{names.name}Model"):
        return ""
    if architecture not in names.architectures:
        raise CheckpointError(
            f"architecture of a {config.model_type} model must be one of "
            f"{', '.join(names.architectures)}, got {architecture!r}"
        )
    return architecture.removeprefix(names.name)


def find_weights(
    config: EncoderConfig, architecture: str, parameters: Iterable[str]
) -> list[Weight]:
    """What an architecture's parameters are in a checkpoint.

    Args:
        parameters: their names in our model; with a head, those of the encoder are in "encoder.".
    """
    names = NAMES[config.model_type]
    with_head = find_head(config, architecture) != ""
    heads = {**names.head, **_OF_ONE_HEAD.get(architecture, {})}
    table = []
    for parameter in parameters:
        if parameter in ("tokens.weight", "tokens.bias"):
            table.append(_decoder(config, parameter))
            continue
        module, _, kind = parameter.rpartition(".")
        if with_head and not module.startswith("encoder."):
            theirs, before = heads[module], ""
        else:
            module = module.removeprefix("encoder.")
            theirs, before = _in_encoder(config, module)
        modules = (theirs,) if isinstance(theirs, str) else theirs
        also: tuple[str, ...] = ()
        if module == "embeddings.word" and config.tied and with_head:
            also = (f"{names.decoder}.weight",)
        elif isinstance(theirs, str) and theirs.endswith("LayerNorm"):
            # So saved from TensorFlow: bert-base-uncased is.
            also = (f"{before}{theirs}.{'gamma' if kind == 'weight' else 'beta'}",)
        table.append(
            Weight(parameter, tuple(f"{before}{one}.{kind}" for one in modules), also=also)
        )
    return table


def _in_encoder(config: EncoderConfig, module: str) -> tuple[str | tuple[str, ...], str]:
    """Their modules for one of the encoder's, and what comes before them."""
    names = NAMES[config.model_type]
    if not module.startswith("layers."):
        return names.base[module], names.prefix
    _, number, module = module.split(".", 2)
    group, inner = divmod(int(number), config.group_size)
    layer = names.layer.format(i=number, group=group, inner=inner)
    return names.layers[module], names.prefix + layer


def _decoder(config: EncoderConfig, parameter: str) -> Weight:
    """The masked-LM head's decoder; its bias has two names, which only a tied one shares."""
    names = NAMES[config.model_type]
    if parameter == "tokens.weight":
        return Weight(parameter, (f"{names.decoder}.weight",))
    both = dict.fromkeys((names.bias, f"{names.decoder}.bias"))
    first, *also = both if config.tied else reversed(both)
    return Weight(parameter, (first,), also=tuple(also))
