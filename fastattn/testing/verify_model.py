"""Numerical parity of a Hugging Face model with and without fastattn: `fastattn verify --model`.

The same weights compute a padded batch of sentences three times: in a dtype with the model's eager
attention (the baseline), in that dtype with fastattn, and in float64 with eager attention. Hidden
states of every layer, and logits where the model has a head, are held to the parity rule of
`fastattn.testing.tolerance`. Positions that are padding are left out: nobody reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.testing.tolerance import Comparison, compare
from fastattn.testing.verify import DTYPES

__all__ = ["SENTENCES", "ModelResult", "verify_model"]

# Of very different lengths, so that most of the batch is padding.
SENTENCES = (
    "Yes.",
    "The cat sat on the mat.",
    "Where is the nearest railway station, and when does the next train to the coast leave?",
    "In the spring of that year the river rose higher than anyone in the village could remember; "
    "it carried away the mill, two bridges and the old ferry, flooded the lower meadows for weeks, "
    "and left behind a bank of gravel on which, to everybody's surprise, willows began to grow.",
    "Press any key to continue.",
)
_RANDOM_LENGTHS = (3, 8, 20, 70, 6)


@dataclass(frozen=True)
class ModelResult:
    """A model in one dtype.

    Attributes:
        model: name of its class.
        dtype: "fp32", "fp16" or "bf16".
        parts: comparisons of "hidden state 0" (the embeddings) to "hidden state L", for encoder and
            decoder apart if there are both, and of "logits".
        argmax: share of positions where the largest logit is that of float64, with fastattn; None
            without logits.
        baseline_argmax: the same with eager attention.
        report: the text of `fastattn.integrations.transformers.report`.
        layers_served, layers_total: attention layers that fastattn computed, and all.
    """

    model: str
    dtype: str
    parts: Mapping[str, Comparison]
    argmax: float | None
    baseline_argmax: float | None
    report: str
    layers_served: int
    layers_total: int

    @property
    def passed(self) -> bool:
        """Whether the parity rule holds for every part, and every layer was served."""
        served = self.layers_served == self.layers_total
        return served and all(part.passed for part in self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        parts = {name: {**asdict(part), "passed": part.passed} for name, part in self.parts.items()}
        return {**asdict(self), "parts": parts, "passed": self.passed}


def verify_model(
    name_or_folder: str,
    device: torch.device | str = "cpu",
    dtype: str = "fp32",
    impl: str = "auto",
) -> ModelResult:
    """Compares a model with and without fastattn on a padded batch.

    Args:
        name_or_folder: of a Hugging Face model, as `from_pretrained` takes it. Without a tokenizer,
            the batch is random token ids.
        device: where to run.
        dtype: "fp32", "fp16" or "bf16", of the weights.
        impl: what fastattn runs, as in `fastattn.attention`.

    Raises:
        ValueError: the dtype is unknown.
        OSError: transformers finds no such model.
        UnservedModelError: the model does not use transformers' attention interface.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}")
    from fastattn.integrations import transformers as fastattn_hf

    model = _load(name_or_folder, DTYPES[dtype]).to(device).eval()
    inputs = {key: value.to(device) for key, value in _batch(name_or_folder, model).items()}
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        baseline = _outputs(model, inputs, valid)
        fastattn_hf.enable(model)
        with fastattn_hf.use_impl(impl):
            actual = _outputs(model, inputs, valid)
        report = fastattn_hf.report(model)
        fastattn_hf.disable(model)  # gives back "eager", and what adapters replaced
        exact = _outputs(model.double(), inputs, valid)
    return ModelResult(
        model=type(model).__name__,
        dtype=dtype,
        parts={name: compare(actual[name], baseline[name], exact[name]) for name in exact},
        argmax=_argmax_agreement(actual, exact),
        baseline_argmax=_argmax_agreement(baseline, exact),
        report=str(report),
        layers_served=report.layers_served,
        layers_total=report.layers_total,
    )


def _load(name_or_folder: str, dtype: torch.dtype) -> Any:
    """The model with the head it was saved with, and eager attention."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(name_or_folder)
    architectures = getattr(config, "architectures", None) or []
    known = [name for name in architectures if hasattr(transformers, name)]
    cls = getattr(transformers, known[0]) if known else transformers.AutoModel
    return cls.from_pretrained(name_or_folder, dtype=dtype, attn_implementation="eager")


def _batch(name_or_folder: str, model: Any) -> dict[str, Tensor]:
    """Token ids and attention mask, for a decoder too where there is one."""
    vocab_size = model.config.get_text_config().vocab_size
    batch = _sentences(name_or_folder, vocab_size) or _random_batch(vocab_size)
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
        batch["decoder_attention_mask"] = batch["attention_mask"]
    return batch


def _sentences(name_or_folder: str, vocab_size: int) -> dict[str, Tensor] | None:
    """The sentences, padded; None without a tokenizer that knows them."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
    except (OSError, ValueError):
        return None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    encoded = tokenizer(list(SENTENCES), padding=True, truncation=True, return_tensors="pt")
    ids = encoded["input_ids"]
    # Without its files, transformers may still make a tokenizer, which knows no word.
    if ids.unique().numel() < 20 or int(ids.max()) >= vocab_size:
        return None
    return {"input_ids": ids, "attention_mask": encoded["attention_mask"]}


def _random_batch(vocab_size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (len(_RANDOM_LENGTHS), max(_RANDOM_LENGTHS))
    lengths = torch.tensor(_RANDOM_LENGTHS)[:, None]
    return {
        "input_ids": torch.randint(vocab_size, shape, generator=generator),
        "attention_mask": (torch.arange(shape[1]) < lengths).long(),
    }


def _outputs(model: Any, inputs: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
    """Hidden states and logits by name, (positions that are no padding, features)."""
    options = {"use_cache": False} if _has_cache(model) else {}
    outputs = model(**inputs, output_hidden_states=True, **options)
    found = {}
    for kind in ("", "encoder ", "decoder "):
        states = outputs.get(f"{kind.strip()}_hidden_states".lstrip("_"))
        for index, state in enumerate(states or ()):
            found[f"{kind}hidden state {index}"] = state[valid]
    logits = outputs.get("logits")
    if logits is not None:
        per_position = logits.shape[:2] == valid.shape
        found["logits"] = logits[valid] if per_position else logits
    return found


def _has_cache(model: Any) -> bool:
    return bool(getattr(model.config.get_text_config(), "use_cache", False))


def _argmax_agreement(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> float | None:
    if "logits" not in exact:
        return None
    same = actual["logits"].argmax(-1) == exact["logits"].argmax(-1)
    return same.double().mean().item()
