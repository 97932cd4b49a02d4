"""Who computes: `fastattn.models`, transformers, or transformers with fastattn's attention.

All are driven by the same loop, token by token and greedily, so that what is compared is models and
caches, and not what `generate` of either does around them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastattn.nn import BaseKVCache
from fastattn.profiling.memory import storage_bytes

NAMES = ("fastattn", "transformers", "transformers+fastattn")
"""Of all providers."""

_WARM_UP = 2  # steps before a capture, for what is initialized at its first use


class Decoding(Protocol):
    """Rows that one provider is decoding."""

    tokens: Tensor

    def prepare(self) -> None:
        """What is done once between the first token and the second, and not timed."""
        ...

    def step(self) -> Tensor:
        """Appends `tokens` (rows, 1) to all rows and writes the next ones there; their logits."""
        ...

    def cache_tensors(self) -> list[Tensor]:
        """Keys and values."""
        ...


class Provider(Protocol):
    """A model that can be run."""

    name: str
    model: nn.Module

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Within, the model is this provider's: two may share one."""
        ...

    def start(self, prompts: Tensor, new_tokens: int) -> tuple[Tensor, Decoding]:
        """Prompts int64 (rows, n): logits (rows, vocab_size) behind each, and the rows."""
        ...

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """An encoder's last hidden states (rows, n, hidden_size) of ids and bool mask (rows, n)."""
        ...


# ---- fastattn.models


class Ours:
    """A model of `fastattn.models`. On a GPU a decoder's step is captured in a CUDA graph."""

    name = "fastattn"

    def __init__(self, model: Any) -> None:
        self.model = model

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing needs to be done."""
        return contextlib.nullcontext()

    def start(self, prompts: Tensor, new_tokens: int) -> tuple[Tensor, OurDecoding]:
        """See `Provider`."""
        room = new_tokens if self.model.is_encoder_decoder else prompts.shape[1] + new_tokens
        logits, session = self.model.start(prompts, max_seqlen=room + self.model.is_encoder_decoder)
        return logits, OurDecoding(self.model, session, logits.argmax(-1, keepdim=True))

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See `Provider`. Runs on packed tokens."""
        return self.model(ids, None if bool(mask.all()) else mask).last_hidden_state


class OurDecoding:
    """Rows of a session of `fastattn.models`."""

    def __init__(self, model: Any, session: Any, tokens: Tensor) -> None:
        self.model, self.session, self.tokens = model, session, tokens
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    def prepare(self) -> None:
        """On a GPU: runs a few steps, takes them back, and captures one."""
        cache = getattr(self.session, "cache", None)
        if not (getattr(self.session, "replayable", False) and isinstance(cache, BaseKVCache)):
            return
        if cache.device.type != "cuda":
            return
        first = self.tokens.clone()
        steps = min(_WARM_UP, cache.max_seqlen - max(cache.lengths))
        for _ in range(steps):
            self._forward()
        self.session.rollback([steps] * cache.max_batch)
        self.tokens.copy_(first)
        cache.reserve(1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self._forward()
        self.graph = graph

    def step(self) -> Tensor:
        """See `Decoding`."""
        if self.graph is None or self.logits is None:
            return self._forward()
        self.session.cache.reserve(1)
        self.graph.replay()
        self.session.cache.advance(1, replayed=True)
        return self.logits

    def _forward(self) -> Tensor:
        logits = self.model.step(self.tokens, self.session)
        self.tokens.copy_(logits.argmax(-1, keepdim=True))
        return logits

    def cache_tensors(self) -> list[Tensor]:
        """Keys and values of the rows, and of what an encoder read."""
        caches = [self.session.cache, getattr(self.session, "memory", None)]
        return [store.values for cache in caches if cache is not None
                for store in (cache.keys, cache.values)]  # fmt: skip


# ---- transformers


class Stock:
    """A model of transformers, with the cache that it would make by itself.

    Args:
        model: of transformers.
        with_fastattn: run it with fastattn's attention, and an encoder without its padding.
    """

    def __init__(self, model: Any, with_fastattn: bool = False) -> None:
        self.model, self.with_fastattn = model, with_fastattn
        self.name = "transformers+fastattn" if with_fastattn else "transformers"
        taken = inspect.signature(model.forward).parameters
        # The name of the argument changed with transformers 5.24.
        self._cache_name = "cache" if "cache" in taken else "past_key_values"
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.generates = self._is_encoder_decoder or _is_decoder(model)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """With fastattn's attention, if it is to be had, and then without it."""
        if not self.with_fastattn:
            yield
            return
        from fastattn.integrations.transformers import disable, enable
        from fastattn.integrations.transformers_unpad import repad, unpad

        packs = not self.generates
        if packs:
            with contextlib.suppress(TypeError):  # an encoder that cannot run on packed tokens
                unpad(self.model)
        enable(self.model)
        try:
            yield
        finally:
            if packs:
                repad(self.model)
            disable(self.model)

    def start(self, prompts: Tensor, new_tokens: int) -> tuple[Tensor, StockDecoding]:
        """See `Provider`. `new_tokens` is not needed: the cache grows."""
        from transformers import DynamicCache, EncoderDecoderCache

        config = self.model.config
        if not self._is_encoder_decoder:
            decoding = StockDecoding(self.model, DynamicCache(config=config), self._cache_name)
            return decoding.append({"input_ids": prompts, **self._last_only}), decoding
        encoded = self.model.get_encoder()(input_ids=prompts)
        decoder = config.get_text_config(decoder=True)
        cache = EncoderDecoderCache(DynamicCache(config=decoder), DynamicCache(config=decoder))
        decoding = StockDecoding(self.model, cache, self._cache_name, encoded)
        begin = prompts.new_full((prompts.shape[0], 1), config.decoder_start_token_id)
        return decoding.append({"decoder_input_ids": begin}), decoding

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See `Provider`."""
        out = self.model(input_ids=ids, attention_mask=mask.long())
        found = out.get("last_hidden_state")
        return out[0] if found is None else found


def _is_decoder(model: Any) -> bool:
    names = getattr(model.config, "architectures", None) or [type(model).__name__]
    return names[0].endswith(("ForCausalLM", "LMHeadModel"))


class StockDecoding:
    """Rows of a model of transformers, and their cache."""

    tokens: Tensor

    def __init__(self, model: Any, cache: Any, cache_name: str, encoded: Any = None) -> None:
        self.model, self.cache, self._cache_name, self._encoded = model, cache, cache_name, encoded

    def append(self, inputs: dict[str, Any]) -> Tensor:
        """Logits behind the last token of each row."""
        if self._encoded is not None:
            inputs = {**inputs, "encoder_outputs": self._encoded}
        out = self.model(**inputs, **{self._cache_name: self.cache}, use_cache=True)
        logits = out.logits[:, -1]
        self.tokens = logits.argmax(-1, keepdim=True)
        return logits

    def prepare(self) -> None:
        """Nothing."""

    def step(self) -> Tensor:
        """See `Decoding`."""
        name = "input_ids" if self._encoded is None else "decoder_input_ids"
        return self.append({name: self.tokens})

    def cache_tensors(self) -> list[Tensor]:
        """Keys and values."""
        parts = [self.cache]
        if self._encoded is not None:
            parts = [self.cache.self_attention_cache, self.cache.cross_attention_cache]
        tensors = [
            getattr(layer, name, None)
            for part in parts
            for layer in part.layers
            for name in ("keys", "values")
        ]
        return [tensor for tensor in tensors if tensor is not None]


def weight_bytes(model: nn.Module) -> int:
    """Memory that a model's parameters and buffers lie in."""
    return storage_bytes([*model.parameters(), *model.buffers()])


def check_names(names: Sequence[str], is_ours: bool, reason: str) -> None:
    """Raises ValueError unless these are providers that a model can have."""
    for name in names:
        if name not in NAMES:
            raise ValueError(f"provider must be one of {', '.join(NAMES)}, got {name!r}")
    if "fastattn" in names and not is_ours:
        raise ValueError(
            "provider must be transformers or transformers+fastattn, since fastattn.models has no "
            f"such model ({reason}); got 'fastattn'"
        )
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"provider must be given once each, at least one, got {list(names)}")
