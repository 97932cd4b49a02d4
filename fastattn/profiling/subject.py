"""What is profiled: a folder, a GGUF file, known shapes with random weights, or a model in memory.

Opening reads a config and allocates nothing, so that whatever does not fit is told first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastattn.models.checkpoint import FAMILY_MODULES, CheckpointError, find_family, read_config
from fastattn.models.checkpoint import load as load_checkpoint
from fastattn.models.layers import initialize
from fastattn.profiling.memory import available_bytes, format_bytes
from fastattn.profiling.presets import find_preset, nearest
from fastattn.profiling.results import Case

KINDS = {"decoder": "decoder", "encoder": "encoder", "seq2seq": "encoder-decoder"}
"""Of a profile, by the module of `fastattn.models`."""


class TooLargeError(ValueError):
    """Memory will not do."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is to be profiled, as far as its config tells.

    Attributes:
        name: to show.
        kind: "decoder", "encoder" or "encoder-decoder".
        hf: its `config.json`.
        path: folder or GGUF file; None for random weights, or a model in memory.
        model: in memory, of fastattn or of transformers; else None.
        why_not_ours: why `fastattn.models` does not have it; "" where it does.
    """

    name: str
    kind: str
    hf: Mapping[str, Any]
    path: Path | None = None
    model: nn.Module | None = None
    why_not_ours: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether `fastattn.models` has it."""
        return not self.why_not_ours

    @property
    def vocab_size(self) -> int:
        """Tokens that prompts are drawn from."""
        return int(self.hf["vocab_size"])

    def meta(self) -> Any:
        """The model without memory, of `fastattn.models` or else of transformers."""
        if self.model is not None:
            return self.model
        with torch.device("meta"):
            if not self.is_ours:
                return _auto_class(self.hf)._from_config(hf_config(self.hf))
            family = find_family(self.hf["model_type"])
            config = family.config(dict(self.hf))
            return without_head(family.build(config, config.architecture))

    def limits(self) -> tuple[int | None, int | None]:
        """Tokens that a prompt can have, and prompt and new tokens together (new tokens alone of an
        encoder-decoder, with its start token); None: any number."""
        if not self.is_ours:
            config = hf_config(self.hf)
            text = config.get_text_config()
            longest = getattr(text, "max_position_embeddings", None)
            return longest, longest
        config = self.meta().config
        if self.kind == "encoder-decoder":
            return config.encoder.max_positions, config.decoder.max_positions
        longest = config.max_seqlen if self.kind == "encoder" else config.max_positions
        return longest, longest

    def check(self, case: Case) -> None:
        """Raises ValueError where a case is longer than the model's positions."""
        prompt, total = self.limits()
        if prompt is not None and case.prompt > prompt:
            raise ValueError(
                f"prompt must be at most {prompt} tokens, the positions that {self.name} has, got "
                f"{case.prompt}"
            )
        asked = case.new_tokens + (1 if self.kind == "encoder-decoder" else case.prompt)
        if self.kind != "encoder" and total is not None and asked > total:
            what = "new_tokens + 1" if self.kind == "encoder-decoder" else "prompt + new_tokens"
            raise ValueError(
                f"{what} must be at most {total}, the positions that {self.name} has, got {asked}"
            )

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The model of `fastattn.models` in `dtype` on `device`, without a second copy of it."""
        if self.model is not None:
            return self.model
        if self.path is not None:
            return without_head(load_checkpoint(self.path, dtype=dtype, device=device))
        return make_random(self.hf, dtype, device)

    def load_stock(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The model of transformers from its folder, where `fastattn.models` does not have it."""
        if self.model is not None:
            return self.model
        with quiet_transformers():
            cls = _auto_class(self.hf)
            return cls.from_pretrained(self.path, dtype=dtype).to(device).eval()


def open_subject(
    model: str | os.PathLike[str] | nn.Module | None = None, *, random: str | None = None
) -> Subject:
    """Finds out what is to be profiled; allocates nothing.

    Args:
        model: a Hugging Face folder, a GGUF file, or a model in memory of `fastattn.models` or of
            transformers.
        random: instead, the name of known shapes (`fastattn.profiling.PRESETS`).

    Raises:
        ValueError: neither or both are given, the name is unknown (lists the nearest), or nothing
            can be profiled of the model.
        FileNotFoundError: there is no such folder or file, or no checkpoint in it.
    """
    if (model is None) == (random is None):
        raise ValueError(
            "model or random must be given, one of them and not both: a folder, a GGUF file or a "
            f"model, or the name of known shapes; got {model!r} and {random!r}"
        )
    if random is not None:
        hf = find_preset(random)
        return Subject(f"{random} (random weights)", KINDS[FAMILY_MODULES[hf["model_type"]]], hf)
    if isinstance(model, nn.Module):
        return _of_module(model)
    path = Path(os.fspath(model))  # type: ignore[arg-type]
    if not path.exists():
        raise FileNotFoundError(
            f"model must be a Hugging Face folder or a GGUF file, and {str(path)!r} does not "
            f"exist; for random weights of known shapes name them as random{nearest(path.name)}"
        )
    if path.suffix == ".gguf":
        from fastattn.models.gguf import GGUFSource

        return _of_config(path.stem, GGUFSource(path).config, path)
    return _of_config(path.resolve().name, read_config(path), path)


def _of_config(name: str, hf: Mapping[str, Any], path: Path) -> Subject:
    model_type = hf.get("model_type")
    hf = dict(hf)
    if model_type not in FAMILY_MODULES:
        reason = f"model_type {model_type!r} is none of {', '.join(FAMILY_MODULES)}"
        return Subject(name, _kind_of_hf(name, hf), hf, path, why_not_ours=reason)
    family = find_family(model_type)
    hf["architectures"] = hf.get("architectures") or [family.bare]
    kind = KINDS[FAMILY_MODULES[model_type]]
    try:
        config = family.config(hf)
    except CheckpointError as error:
        return Subject(name, _kind_of_hf(name, hf), hf, path, why_not_ours=str(error))
    _check_profitable(name, kind, config)
    return Subject(name, kind, hf, path)


def _check_profitable(name: str, kind: str, config: Any) -> None:
    """Raises ValueError where a model does not generate, or reads sound."""
    if kind == "decoder" and config.head != "tokens":
        raise ValueError(
            f"{name} is a {config.architecture}, which has no head over tokens: nothing is decoded"
        )
    if kind == "encoder-decoder" and config.num_mel_bins:
        raise ValueError(f"{name} reads sound: only models that read tokens can be profiled")
    if kind == "encoder-decoder" and not (config.has_head and config.start_token is not None):
        raise ValueError(
            f"{name} must have a head over tokens and a decoder_start_token_id to decode, got a "
            f"{config.architecture} with {config.start_token}"
        )


def _kind_of_hf(name: str, hf: Mapping[str, Any]) -> str:
    """Of a model that only transformers has, by its architecture's name."""
    architecture = (hf.get("architectures") or [""])[0]
    if hf.get("is_encoder_decoder") and architecture.endswith("ForConditionalGeneration"):
        return "encoder-decoder"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "decoder"
    if architecture.endswith(("Model", "ForMaskedLM")) and not hf.get("is_encoder_decoder"):
        return "encoder"
    raise ValueError(
        f"{name} must be a model that decodes (...ForCausalLM, ...ForConditionalGeneration) or an "
        f"encoder (...Model, ...ForMaskedLM), got {architecture or 'no architecture'!r}"
    )


def _of_module(model: nn.Module) -> Subject:
    config: Any = getattr(model, "config", None)
    name = type(model).__name__
    model_type = getattr(config, "model_type", None)
    if hasattr(config, "to_dict"):  # of transformers
        hf = {**config.to_dict(), "model_type": model_type, "architectures": [name]}
        reason = "it is a model of transformers"
        return Subject(name, _kind_of_hf(name, hf), hf, model=model, why_not_ours=reason)
    if model_type not in FAMILY_MODULES:
        raise ValueError(f"model must be one of fastattn.models or of transformers, got {name}")
    kind = KINDS[FAMILY_MODULES[model_type]]
    _check_profitable(name, kind, config)
    hf = {**find_family(model_type).to_hf(config), "model_type": model_type,
          "architectures": [config.architecture]}  # fmt: skip
    return Subject(f"{model_type} ({name})", kind, hf, model=without_head(model))


def without_head(model: Any) -> Any:
    """The encoder of a model with a head of `fastattn.models.encoder_heads`; others as they are."""
    return getattr(model, "encoder", model) if hasattr(model, "needs_pooler") else model


def _auto_class(hf: Mapping[str, Any]) -> Any:
    import transformers

    architecture = (hf.get("architectures") or [None])[0]
    if architecture is None or not hasattr(transformers, architecture):
        raise ValueError(f"transformers has no architecture {architecture!r}")
    return getattr(transformers, architecture)


def hf_config(hf: Mapping[str, Any]) -> Any:
    """The config object of transformers."""
    from transformers import AutoConfig

    options = dict(hf)
    return AutoConfig.for_model(options.pop("model_type"), **options)


# ---- memory


def make_random(hf: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """A model of these shapes, its weights drawn where they belong, in their dtype: one copy."""
    family = find_family(hf["model_type"])
    config = family.config(dict(hf))
    with torch.device("meta"):
        model = family.build(config, config.architecture)
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            # As `fastattn.models.load` has them in memory: transposed for a CPU in float32 alone.
            kept = dtype == torch.float32 and device.type == "cpu"
            order = torch.preserve_format if kept else torch.contiguous_format
            values = torch.empty_like(old, dtype=dtype, device=device, memory_format=order)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    torch.manual_seed(0)
    return without_head(initialize(model, getattr(config, "initializer_range", 0.02)).eval())


def check_memory(
    subject: Subject, dtype: torch.dtype, device: torch.device, copies: int, cache: float
) -> None:
    """Raises TooLargeError where weights and cache will not fit.

    Args:
        copies: of the weights that are held at once.
        cache: bytes of keys and values of the largest case.
    """
    free = available_bytes(device)
    if subject.model is not None or free is None:
        return
    size = count_parameters(subject.meta()) * dtype.itemsize
    needed = size * copies + cache
    if needed > 0.95 * free:
        of = f"{format_bytes(size)} of weights in {str(dtype).removeprefix('torch.')}"
        twice = " for each of the two models" if copies > 1 else ""
        raise TooLargeError(
            f"{subject.name} needs {of}{twice} and {format_bytes(cache)} of cache on {device}, "
            f"together {format_bytes(needed)}, and {format_bytes(free)} are free: choose a smaller "
            "model, batch or dtype" + (", or one provider" if copies > 1 else "")
        )


def count_parameters(model: nn.Module) -> int:
    """Of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the bars and warnings of loading."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
