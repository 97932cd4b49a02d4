"""Random configs and batches for the encoders, and transformers' models of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from fastattn.models.encoder import FAMILIES
from fastattn.models.encoder_config import EncoderConfig
from tests.integrations.families import KeepFloat64

SMALL = EncoderConfig(
    vocab_size=37, hidden_size=15, num_heads=3, num_layers=2, intermediate_size=11, max_positions=19
)
"""A BERT of little use."""

# For each option the values that the configs go through; all are odd where they can be.
_BERT: dict[str, tuple[Any, ...]] = {
    "vocab_size": (53, 71, 47, 61),
    "hidden_size": (21, 15, 33),
    "num_attention_heads": (3,),
    "num_hidden_layers": (2, 1, 3, 4),
    "intermediate_size": (19, 37, 11),
    "hidden_act": ("gelu", "relu", "gelu_new", "silu", "gelu_pytorch_tanh", "tanh"),
    "max_position_embeddings": (23, 27, 31),
    "type_vocab_size": (2, 1, 3),
    "layer_norm_eps": (1e-12, 1e-5),
    "pad_token_id": (0, 1, 3),
    "tie_word_embeddings": (True, False),
    "num_labels": (2, 5, 1),
    "classifier_dropout": (None, 0.3),
    "hidden_dropout_prob": (0.1, 0.0, 0.2),
    "attention_probs_dropout_prob": (0.1, 0.0),
}
_DISTILBERT = {
    "vocab_size": _BERT["vocab_size"],
    "dim": _BERT["hidden_size"],
    "n_heads": (3,),
    "n_layers": _BERT["num_hidden_layers"],
    "hidden_dim": _BERT["intermediate_size"],
    "activation": _BERT["hidden_act"],
    "max_position_embeddings": _BERT["max_position_embeddings"],
    "sinusoidal_pos_embds": (False, True),
    "pad_token_id": _BERT["pad_token_id"],
    "tie_word_embeddings": _BERT["tie_word_embeddings"],
    "num_labels": _BERT["num_labels"],
    "seq_classif_dropout": (0.2, 0.0),
    "qa_dropout": (0.1, 0.0),
}
_ALBERT = {
    **{name: values for name, values in _BERT.items() if name != "classifier_dropout"},
    "embedding_size": (9, 21, 5),
    "num_hidden_layers": (3, 5, 4),
    "num_hidden_groups": (1, 3, 2),
    "inner_group_num": (1, 2),
    "classifier_dropout_prob": (0.1, 0.0),
}
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "roberta-prelayernorm": _BERT,
    "albert": _ALBERT,
    "distilbert": _DISTILBERT,
    "electra": {**_BERT, "embedding_size": (9, 21, 15)},
}
_CONFIGS = {
    "bert": transformers.BertConfig,
    "roberta": transformers.RobertaConfig,
    "roberta-prelayernorm": transformers.RobertaPreLayerNormConfig,
    "albert": transformers.AlbertConfig,
    "distilbert": transformers.DistilBertConfig,
    "electra": transformers.ElectraConfig,
}
# Those read the first column, where a batch that is padded on the left has no token.
_OF_ROWS = ("Model", "ForNextSentencePrediction", "ForPreTraining", "ForSequenceClassification")


def first_options(model_type: str) -> dict[str, Any]:
    """A config's options, without the number of classes."""
    options = {name: values[0] for name, values in OPTIONS[model_type].items()}
    del options["num_labels"]
    return options


@dataclass(frozen=True)
class Case:
    """A random config of a family, an architecture, and where the batch is padded."""

    model_type: str
    number: int

    @property
    def architecture(self) -> str:
        architectures = FAMILIES[self.model_type].architectures
        return architectures[self.number % len(architectures)]

    @property
    def padding(self) -> str:
        kinds = ("right", "holes", "none")
        if not self.architecture.endswith(_OF_ROWS):
            kinds = ("left", "right", "holes", "none")
        return kinds[self.number % len(kinds)]

    def options(self) -> dict[str, Any]:
        values = {
            name: choices[(self.number + shift) % len(choices)]
            for shift, (name, choices) in enumerate(OPTIONS[self.model_type].items())
        }
        if self.architecture.endswith("ForQuestionAnswering"):
            values["num_labels"] = 2
        return values

    def model(self) -> Any:
        """transformers' model in eval mode, with biases and norms that differ from 0 and 1."""
        return make_model(self.model_type, self.architecture, seed=self.number, **self.options())

    def batch(self, model: Any) -> dict[str, Tensor]:
        # Of few numbers the errors may be next to nothing by chance: more rows where they are few.
        rows = 31 if self.architecture.endswith(_OF_ROWS) else 7
        batch = make_batch(model.config, self.padding, seed=self.number, rows=rows)
        if self.number % 5 == 1:
            batch.pop("token_type_ids", None)
        return batch

    def __str__(self) -> str:
        return f"{self.architecture}-{self.number}-{self.padding}"


def make_model(model_type: str, architecture: str, seed: int = 0, **options: Any) -> Any:
    """transformers' model in eval mode, whose attention is not all but even."""
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(_CONFIGS[model_type](**options)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(6)
            else:
                weight.add_(torch.randn_like(weight), alpha=0.2)
    return model


def make_batch(config: Any, padding: str, seed: int = 0, rows: int = 7) -> dict[str, Tensor]:
    """Random tokens and types (rows, seqlen), and where the tokens are."""
    generator = torch.Generator().manual_seed(seed)
    pad = config.pad_token_id
    seqlen = config.max_position_embeddings - pad - 2
    ids = torch.randint(pad + 1, config.vocab_size, (rows, seqlen), generator=generator)
    mask = torch.ones(rows, seqlen, dtype=torch.int64)
    columns = torch.arange(seqlen)
    lengths = torch.randint(1, seqlen + 1, (rows, 1), generator=generator)
    lengths[1] = 1
    if padding == "right":
        mask = (columns < lengths).long()
    elif padding == "left":
        mask = (columns >= seqlen - lengths).long()
    elif padding == "holes":  # and the padding token among the others
        mask = torch.randint(0, 2, (rows, seqlen), generator=generator)
        mask[:, 0] = 1
        ids[:, 2] = pad
    if padding in ("left", "right"):
        ids = ids.masked_fill(mask == 0, pad)
    batch = {"input_ids": ids, "attention_mask": mask}
    types = getattr(config, "type_vocab_size", 0)
    if types:
        batch["token_type_ids"] = torch.randint(0, types, ids.shape, generator=generator)
    return batch


CASES = [
    Case(model_type, number)
    for model_type, family in FAMILIES.items()
    for number in range(2 * len(family.architectures))
]


def theirs(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model of transformers gives, by our names; tokens without padding."""
    output = model(**inputs, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    found = {"hidden states": torch.cat([state[real] for state in output.hidden_states])}
    for name, value in output.items():
        if name not in ("hidden_states", "last_hidden_state"):
            found[name] = value[real] if value.shape[:2] == real.shape else value
    return found


_THEIR_NAMES = {
    "tokens": "prediction_logits",
    "start": "start_logits",
    "end": "end_logits",
}


def ours(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same of ours."""
    real = inputs["attention_mask"].bool()
    encoder = getattr(model, "encoder", model)
    output = encoder(**inputs, hidden_states=True)
    found = {"hidden states": torch.cat([state[real] for state in output.hidden_states])}
    if encoder is model:
        assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
        if output.pooler_output is not None:
            found["pooler_output"] = output.pooler_output
        return found
    result = model(**inputs)
    if isinstance(result, Tensor):
        result = {"logits": result}
    else:
        names = dict(_THEIR_NAMES)
        albert = model.config.model_type == "albert"
        names["sentence"] = "sop_logits" if albert else "seq_relationship_logits"
        result = {names[name]: value for name, value in result._asdict().items()}
    for name, value in result.items():
        found[name] = value[real] if value.shape[:2] == real.shape else value
    return found


def in_float64(model: Any) -> Any:
    """A copy with eager attention, in float64."""
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    return exact


def theirs_exact(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`theirs` in float64 throughout."""
    with KeepFloat64():
        return theirs(in_float64(model), inputs)
