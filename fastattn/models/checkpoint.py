"""Checkpoints: a Hugging Face folder or a GGUF file in, a Hugging Face folder out.

    model = load("path/to/folder", dtype=torch.bfloat16, device="cuda")
    save(model, "path/to/another")

What a family's weights are called there, and which of them are one tensor here, is data: a list of
`Weight`s. Every key of a file is accounted for.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint that is not what was asked for: names the part, and what was expected."""


@dataclass(frozen=True)
class Weight:
    """One parameter of ours, and what it is in a Hugging Face checkpoint.

    Attributes:
        ours: name in our model's `state_dict`. `{i}` stands for a layer, see `layers`.
        theirs: names in the checkpoint, which joined along dimension 0 are ours. They have the
            base model's prefix, which a file may lack or have.
        transpose: each of theirs is transposed first (GPT-2's Conv1D).
        rows: rows that each of theirs has here; () where they are all equal.
        also: other names that a file may have for the very same tensor (tied weights). Where none
            of `theirs` is in the file, the first of these that is there is read instead.
        fallback: `also` are tensors of their own, which are only read instead.
    """

    ours: str
    theirs: tuple[str, ...]
    transpose: bool = False
    rows: tuple[int, ...] = ()
    also: tuple[str, ...] = ()
    fallback: bool = False


def layers(count: int, weights: Sequence[Weight]) -> list[Weight]:
    """The weights of `count` layers from those of one, in whose names `{i}` is the layer."""

    def number(names: tuple[str, ...], i: int) -> tuple[str, ...]:
        return tuple(name.replace("{i}", str(i)) for name in names)

    return [
        replace(
            weight,
            ours=weight.ours.replace("{i}", str(i)),
            theirs=number(weight.theirs, i),
            also=number(weight.also, i),
        )
        for i in range(count)
        for weight in weights
    ]


@dataclass(frozen=True)
class Family:
    """What is known of one `model_type` of Hugging Face.

    Attributes:
        config: our frozen dataclass from a `config.json`, which always has `architectures` (see
            `bare`). The dataclass has `model_type` and `architecture`. Raises CheckpointError for
            options that the model does not have.
        to_hf: a `config.json` from it; `model_type`, `architectures` and `dtype` are added.
        build: the model, for an architecture such as "BertForMaskedLM"; has `config`. Called on the
            meta device.
        weights: all its parameters, for an architecture.
        bare: the architecture without a head, which is meant where a config names none.
        prefix: of the base model's weights within an architecture with a head, e.g. "bert.".
        architectures: all that `build` knows, `bare` included.
        ignored: regular expressions; keys that match one as a whole are no error, and not read
            (buffers that older versions saved).
    """

    config: Callable[[dict[str, Any]], Any]
    to_hf: Callable[[Any], dict[str, Any]]
    build: Callable[[Any, str], nn.Module]
    weights: Callable[[Any, str], list[Weight]]
    bare: str
    prefix: str
    architectures: tuple[str, ...]
    ignored: tuple[str, ...] = ()


def expect(hf: dict[str, Any], name: str, *allowed: Any) -> None:
    """Raises CheckpointError unless a config's option is one of `allowed`; absent is the first."""
    value = hf.get(name, allowed[0])
    if value not in allowed:
        listed = " or ".join(repr(one) for one in allowed)
        raise CheckpointError(f"config.json: {name} must be {listed}, got {value!r}")


FAMILY_MODULES = {
    **dict.fromkeys(("gpt2", "llama", "qwen2", "qwen3"), "decoder"),
    **dict.fromkeys(
        ("bert", "roberta", "roberta-prelayernorm", "albert", "distilbert", "electra"), "encoder"
    ),
    **dict.fromkeys(("t5", "mt5", "bart", "whisper"), "seq2seq"),
}
"""In which module of this package a family is found, by Hugging Face's `model_type`."""


def find_family(model_type: Any) -> Family:
    """The family of a `model_type`.

    Raises:
        CheckpointError: there is none; lists those that there are.
    """
    if model_type not in FAMILY_MODULES:
        raise CheckpointError(
            f"model_type must be one of {list(FAMILY_MODULES)}, got {model_type!r}"
        )
    module = importlib.import_module(f"fastattn.models.{FAMILY_MODULES[model_type]}")
    return module.FAMILIES[model_type]


# ---- reading


class Source(Protocol):
    """What a checkpoint's weights are read from, one at a time."""

    @property
    def place(self) -> str:
        """File or folder, for messages."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all weights by Hugging Face's names; nothing is read."""
        ...

    def read(self, name: str) -> Tensor:
        """One weight, on the CPU. Not to be written to."""
        ...


def load(
    path: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """A model from a Hugging Face folder or a GGUF file, in eval mode.

    Weights are read one at a time and put where they belong, in `dtype` on `device`: memory never
    holds a second copy of the model.

    Args:
        path: a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`, whole or
            in shards with an index; or a `.gguf` file (needs the package gguf).
        architecture: which head; default the config's first. A folder must have just its weights.
        dtype: of the weights; default the config's, or that of the first weight.
        device: default torch's.

    Returns:
        The family's model, e.g. a `fastattn.models.decoder.Decoder`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: its family or an option is not known here, a weight is missing, has another
            shape, or is one that the model does not have: lists them, with the nearest names.
    """
    path = Path(path)
    hf, source = _open(path)
    family = find_family(hf.get("model_type"))
    known = hf.get("architectures") or [family.bare]
    hf = {**hf, "architectures": [architecture or known[0]]}
    if hf["architectures"][0] not in family.architectures:
        raise CheckpointError(
            f"{path}: the architecture of a {hf['model_type']} must be one of "
            f"{list(family.architectures)}, got {hf['architectures'][0]!r}"
        )
    try:
        config = family.config(hf)
    except KeyError as error:
        raise CheckpointError(f"{path}: config.json has no {error}") from None
    with torch.device("meta"):
        model = family.build(config, config.architecture)
    dtype = dtype or _find_dtype(hf, source)
    _fill(model, family, source, dtype, torch.get_default_device() if device is None else device)
    return model.eval()


def _open(path: Path) -> tuple[dict[str, Any], Source]:
    """The checkpoint's `config.json`, and where its weights are read."""
    if path.suffix != ".gguf":
        return read_config(path), find_weights(path)
    from fastattn.models.gguf import GGUFSource

    source = GGUFSource(path)
    return source.config, source


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's `config.json`; special tokens are those that `generation_config.json` has, if any.

    Raises:
        FileNotFoundError: there is none.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no config.json")
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    generation = folder / "generation_config.json"
    if generation.is_file():
        chosen = json.loads(generation.read_text(encoding="utf-8"))
        for name in ("eos_token_id", "pad_token_id", "decoder_start_token_id"):
            if chosen.get(name) is not None:
                hf[name] = chosen[name]
    return hf


def _find_dtype(hf: dict[str, Any], source: Source) -> torch.dtype:
    name = hf.get("dtype") or hf.get("torch_dtype")
    dtype = getattr(torch, str(name).removeprefix("torch."), None) if name else None
    if isinstance(dtype, torch.dtype):
        return dtype
    found = (source.read(name).dtype for name in source.shapes())
    return next((dtype for dtype in found if dtype.is_floating_point), torch.float32)


def _fill(
    model: nn.Module,
    family: Family,
    source: Source,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Gives the parameters of a model on the meta device their place in memory, and reads them."""
    config: Any = model.config
    weights = family.weights(config, config.architecture)
    names = _match(model, weights, family, source)
    _check_twins(weights, names, family, source)
    for weight in weights:
        owner, _, name = weight.ours.rpartition(".")
        module = model.get_submodule(owner)
        old = module.get_parameter(name)
        # How a matrix lies in memory is the model's choice where it was made for: see `Linear`.
        kept = dtype == torch.float32 and torch.device(device).type == "cpu"
        order = torch.preserve_format if kept else torch.contiguous_format
        values = torch.empty_like(old, dtype=dtype, device=device, memory_format=order)
        start = 0
        for key in names[weight.ours]:
            part = source.read(key)
            part = part.t() if weight.transpose else part
            values[start : start + part.shape[0]].copy_(part)
            start += part.shape[0]
        setattr(module, name, nn.Parameter(values, requires_grad=old.requires_grad))
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if tensor.is_meta]  # fmt: skip
    if left:
        raise RuntimeError(f"the table of weights of {config.architecture} lacks {left}")


def _match(
    model: nn.Module, weights: Sequence[Weight], family: Family, source: Source
) -> dict[str, list[str]]:
    """The source's names for each of our weights. Raises CheckpointError on any misfit."""
    shapes = source.shapes()
    missing, wrong, used = [], [], set()
    names: dict[str, list[str]] = {}

    find = functools.partial(_find, family=family, shapes=shapes)
    for weight in weights:
        wanted = tuple(model.get_parameter(weight.ours).shape)
        found = [find(name) for name in weight.theirs]
        others = [key for name in weight.also if (key := find(name))]
        used.update(others)
        if others and not any(found):
            found = [others[0]]
        missing += [name for name, key in zip(weight.theirs, found, strict=True) if key is None]
        keys = [key for key in found if key is not None]
        used.update(keys)
        names[weight.ours] = keys
        if len(keys) < len(found):
            continue
        got = [shapes[key][::-1] if weight.transpose else shapes[key] for key in keys]
        rows = weight.rows or (wanted[0] // len(keys),) * len(keys)
        for key, shape, count in zip(keys, got, rows, strict=True):
            if shape != (count, *wanted[1:]):
                expected = (count, *wanted[1:])[:: -1 if weight.transpose else 1]
                wrong.append(f"{key}: expected {expected}, got {shapes[key]}")
    ignored = [re.compile(pattern) for pattern in family.ignored]
    unexpected = [
        key
        for key in shapes
        if key not in used and not any(pattern.fullmatch(key) for pattern in ignored)
    ]
    if missing or unexpected or wrong:
        lines = [
            *_describe("missing", missing, unexpected or list(shapes)),
            *_describe("unexpected", unexpected, missing),
            *(f"  of another shape: {line}" for line in wrong[:LISTED]),
        ]
        config: Any = model.config
        raise CheckpointError(
            f"{source.place} does not have the weights of a {config.architecture} of this "
            "configuration:\n" + "\n".join(lines)
        )
    return names


def _find(name: str, family: Family, shapes: Mapping[str, Any]) -> str | None:
    """The source's spelling of a weight's name: with the family's prefix, or without."""
    bare = name.removeprefix(family.prefix)
    return next((one for one in (name, bare, family.prefix + name) if one in shapes), None)


def _check_twins(
    weights: Sequence[Weight], names: dict[str, list[str]], family: Family, source: Source
) -> None:
    """Raises CheckpointError where a file has two matrices for one, tied, and they differ.

    Of a vector, transformers itself saves a stale second one: the bias of an untied masked-LM head.
    """
    shapes = source.shapes()
    for weight in weights:
        for other in () if weight.fallback else weight.also:
            key, kept = _find(other, family, shapes), names[weight.ours][0]
            if key is None or key == kept or len(shapes[kept]) < 2:
                continue
            if shapes[key] != shapes[kept] or not torch.equal(source.read(key), source.read(kept)):
                raise CheckpointError(
                    f"{source.place}: {key} must equal {kept}, since config.json ties the two, and "
                    "it does not: tie_word_embeddings should be false, or one of them is stale"
                )


LISTED = 10
"""How many names of a kind an error lists."""


def _describe(what: str, names: list[str], others: list[str]) -> list[str]:
    lines = []
    for name in names[:LISTED]:
        near = difflib.get_close_matches(name, others, n=2)
        lines.append(f"  {what}: {name}" + (f" (nearest: {', '.join(near)})" if near else ""))
    if len(names) > LISTED:
        lines.append(f"  and {len(names) - LISTED} more that are {what}")
    return lines


def find_weights(folder: Path) -> Source:
    """The weights of a folder: safetensors before `.bin`, whole before shards.

    Raises:
        FileNotFoundError: there are none.
    """
    for stem, suffix, kind in (
        ("model", ".safetensors", SafetensorsSource), ("pytorch_model", ".bin", BinSource),
    ):  # fmt: skip
        if (folder / f"{stem}{suffix}").is_file():
            return kind(folder, [folder / f"{stem}{suffix}"])
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return kind(folder, [folder / shard for shard in sorted(set(shards))])
    raise FileNotFoundError(
        f"{folder} has neither model.safetensors nor pytorch_model.bin, nor an index of their "
        "shards"
    )


class SafetensorsSource:
    """Weights in `.safetensors` files, which are mapped and not read as a whole."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        from safetensors import safe_open

        self.place = str(folder)
        self._files = [safe_open(_existing(file), framework="pt", device="cpu") for file in files]
        self._of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(f.get_slice(name).get_shape()) for name, f in self._of.items()}

    def read(self, name: str) -> Tensor:
        return self._of[name].get_tensor(name)


class BinSource:
    """Weights in `.bin` files of torch.save. Nothing but tensors is unpickled."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.place = str(folder)
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
            # Files from before torch 1.6 are no zip archives and cannot be mapped.
            mapped = zipfile.is_zipfile(_existing(file))
            self._tensors.update(torch.load(file, mmap=mapped, **options))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the index of the shards names it")
    return file


# ---- writing


def save(model: Any, folder: str | os.PathLike[str], *, shard_bytes: int = 5 * 10**9) -> None:
    """Writes a model as a folder that transformers' `from_pretrained` loads, and `load`.

    Args:
        model: of one of the families.
        folder: made where it does not exist; its `config.json` and `model.safetensors` are written
            over.
        shard_bytes: a file's size at most (or one weight); more than that is cut into shards, of
            which memory holds one copy at a time.
    """
    from safetensors.torch import save_file

    folder, config = Path(folder), model.config
    family = find_family(config.model_type)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for weight in family.weights(config, config.architecture):
        for name, part in split_weight(model.get_parameter(weight.ours).detach(), weight):
            if config.architecture == family.bare:
                name = name.removeprefix(family.prefix)
            if size and size + part.nbytes > shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = part
            size += part.nbytes
    where = {}
    for number, shard in enumerate(shards, 1):
        of = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{of}.safetensors"
        # A copy of its own for each: parts of one tensor cannot be saved.
        tensors = {n: t.to("cpu", copy=True).contiguous() for n, t in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    hf = {
        **family.to_hf(config),
        "model_type": config.model_type,
        "architectures": [config.architecture],
        "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch."),
    }
    text = json.dumps(hf, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def split_weight(values: Tensor, weight: Weight) -> Iterator[tuple[str, Tensor]]:
    """One parameter of ours as the checkpoint's weights: their names, and views of it."""
    rows = weight.rows or (values.shape[0] // len(weight.theirs),) * len(weight.theirs)
    for name, part in zip(weight.theirs, values.split(rows), strict=True):
        yield name, part.t() if weight.transpose else part
