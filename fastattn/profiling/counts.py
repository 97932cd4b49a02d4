"""Bytes and FLOPs of a pass, from the shapes of a model: what it needs, whoever computes it.

    counts = count(model)                       # on the meta device too
    counts.prefill([128, 128])                  # prompts of 128 tokens to their first token
    counts.step([128, 128], position=160)       # one more token of each

FLOPs are those of matrix products, 2 a multiply-add: linear layers of all tokens, the head where
logits are needed (behind a prompt's last token), and q @ k.T and p @ v of the pairs of a query and
a key that the mask lets through. Bytes are each weight once, and keys and values that are in the
cache once for each of their heads; activations are left out, which a pass may keep on the chip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastattn.models.decoder_config import DecoderConfig
from fastattn.models.encoder_config import EncoderConfig
from fastattn.models.seq2seq_config import Seq2SeqConfig, StackConfig
from fastattn.profiling.results import Work


class Counts(Protocol):
    """What passes of a model need; `prompts` are the real tokens of each row."""

    source: str

    def prefill(self, prompts: Sequence[int]) -> Work:
        """Prompts to the logits behind each; of an encoder its forward pass."""
        ...

    def step(self, prompts: Sequence[int], position: int) -> Work:
        """One token for each row, whose decoder has `position` tokens cached."""
        ...

    def cached(self, prompt: int) -> int:
        """Tokens that the decoder has cached behind a prompt."""
        ...


def count(model: Any) -> Counts:
    """The counts of a model of `fastattn.models`, from its config and its parameters' shapes.

    Raises:
        TypeError: it is none.
    """
    kinds: dict[type, Callable[[Any], Counts]] = {
        DecoderConfig: DecoderCounts, EncoderConfig: EncoderCounts, Seq2SeqConfig: Seq2SeqCounts
    }  # fmt: skip
    found = kinds.get(type(getattr(model, "config", None)))
    if found is None:
        raise TypeError(f"model must be one of fastattn.models, got {type(model).__name__}")
    return found(model)


def causal_pairs(tokens: int, before: int = 0, window: int | None = None) -> int:
    """Pairs of a query and a key that it sees: `tokens` new ones behind `before`, itself included.

    Args:
        window: how many of the last tokens a token sees; None: all.
    """
    total = tokens * before + tokens * (tokens + 1) // 2
    if window is None:
        return total
    # Query i (from 1) has before + i keys up to itself: those beyond its window are unseen.
    unseen = before + tokens - window
    if unseen <= 0:
        return total
    first = max(unseen - tokens, 0)  # of the first query, less 1
    return total - (unseen * (unseen + 1) - first * (first + 1)) // 2


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Of tensors that do not overlap; the same one counts once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def step_bytes(model: nn.Module, unread: Iterable[nn.Module], tables: Iterable[nn.Module]) -> int:
    """Bytes of the weights that every step reads.

    Args:
        unread: modules that a step does not run.
        tables: embeddings, of which a step reads a row a token.
    """
    skipped = {id(p) for module in (*unread, *tables) for p in module.parameters()}
    return tensor_bytes(p for p in model.parameters() if id(p) not in skipped)


class DecoderCounts:
    """Of a `Decoder` whose head is over tokens."""

    source = "formulas"

    def __init__(self, model: Any) -> None:
        config: DecoderConfig = model.config
        self.config = config
        inner, inner_kv = (n * config.head_dim for n in (config.num_heads, config.num_heads_kv))
        mlp = (3 if config.gated else 2) * config.hidden_size * config.intermediate_size
        attention = config.hidden_size * (inner + 2 * inner_kv) + inner * config.hidden_size
        self.linear = config.num_layers * (attention + mlp)
        self.head = config.hidden_size * config.vocab_size
        self.per_pair = 4 * inner
        self.itemsize = model.embedding.weight.element_size()
        self.per_token = 2 * inner_kv * self.itemsize  # of a layer's cache
        tables = [] if config.tied else [model.embedding]
        if config.rope is None:
            tables.append(model.positions)
        self.row_bytes = self.itemsize * config.hidden_size * len(tables)
        self.weights = step_bytes(model, [], tables)

    def _work(self, tokens: int, rows: int, pairs: int, cached: int) -> Work:
        flops = 2 * self.linear * tokens + 2 * self.head * rows + self.per_pair * pairs
        return Work(flops, self.weights + self.row_bytes * tokens, self.per_token * cached)

    def _windows(self) -> list[int | None]:
        return [self.config.window(layer) for layer in range(self.config.num_layers)]

    def prefill(self, prompts: Sequence[int]) -> Work:
        """Prompts to the logits behind each."""
        pairs = sum(causal_pairs(n, window=window) for n in prompts for window in self._windows())
        written = sum(prompts) * self.config.num_layers
        return self._work(sum(prompts), len(prompts), pairs, written)

    def cached(self, prompt: int) -> int:
        """All of the prompt."""
        return prompt

    def step(self, prompts: Sequence[int], position: int) -> Work:
        """One token for each row, of which `position` are cached; reads those, writes one."""
        rows = len(prompts)
        seen = [min(position + 1, window or position + 1) for window in self._windows()]
        # What was there is read, the new token written: as many as are attended to.
        return self._work(rows, rows, rows * sum(seen), rows * sum(seen))


class EncoderCounts:
    """Of an `Encoder` without a head."""

    source = "formulas"

    def __init__(self, model: Any) -> None:
        config: EncoderConfig = model.config
        size, layers = config.hidden_size, len(config.layer_order)
        self.linear = layers * (4 * size * size + 2 * size * config.intermediate_size)
        if config.projected:
            self.linear += config.embedded_size * size
        self.pooler = 0 if model.pooler is None else size * size
        self.per_pair = 4 * size * layers
        embeddings = model.embeddings
        tables = [one for one in (embeddings.word, embeddings.token_type, embeddings.position)
                  if one is not None]  # fmt: skip
        self.row_bytes = sum(one.weight.element_size() * one.embedding_dim for one in tables)
        self.weights = step_bytes(model, [], tables)

    def prefill(self, prompts: Sequence[int]) -> Work:
        """The forward pass over texts of these lengths."""
        tokens, pairs = sum(prompts), sum(n * n for n in prompts)
        flops = 2 * self.linear * tokens + 2 * self.pooler * len(prompts) + self.per_pair * pairs
        return Work(flops, self.weights + self.row_bytes * tokens, 0)

    def step(self, prompts: Sequence[int], position: int) -> Work:
        """There is none."""
        raise TypeError("an encoder has no steps of decoding")

    def cached(self, prompt: int) -> int:
        """Nothing."""
        return 0


class Seq2SeqCounts:
    """Of a `Seq2Seq` that reads tokens and has a head."""

    source = "formulas"

    def __init__(self, model: Any) -> None:
        config: Seq2SeqConfig = model.config
        self.config = config
        self.encoder_linear, self.encoder_pair = self._stack(config.encoder)
        self.decoder_linear, self.decoder_pair = self._stack(config.decoder)
        decoder = config.decoder
        inner = decoder.num_heads * decoder.head_dim
        self.decoder_linear += decoder.num_layers * 2 * config.dim * inner  # cross: q and out
        self.memory_linear = decoder.num_layers * 2 * config.dim * inner  # cross: k and v, once
        self.head = config.dim * config.vocab_size
        itemsize = model.embedding.weight.element_size()
        self.per_token = 2 * inner * itemsize * decoder.num_layers  # of each of the two caches
        positions = [stack.positions for stack in (model.encoder, model.decoder)]
        tables = [one for one in (model.encoder_embedding, *positions) if one is not None]
        if not config.tied_head:
            tables.append(model.embedding)
        crosses = [layer.cross.vk for layer in model.decoder.layers]
        self.step_weights = step_bytes(model, [model.encoder, *crosses], tables)
        self.start_weights = step_bytes(model, [], tables)
        # Rows of tables that are not read as a whole by the head.
        own_tables = int(not config.tied_head)
        reads = int(model.encoder_embedding is not None or bool(own_tables))
        self.encoder_row, self.decoder_row = (
            config.dim * itemsize * (count + (stack.max_positions is not None))
            for count, stack in ((reads, config.encoder), (own_tables, config.decoder))
        )

    def _stack(self, sizes: StackConfig) -> tuple[int, int]:
        """Multiply-adds of a token in the linear layers, and FLOPs of a pair in all layers."""
        dim, inner = self.config.dim, sizes.num_heads * sizes.head_dim
        mlp = (3 if self.config.gated else 2) * dim * sizes.hidden
        return sizes.num_layers * (4 * dim * inner + mlp), 4 * inner * sizes.num_layers

    def _step_flops(self, prompts: Sequence[int], position: int) -> int:
        rows = len(prompts)
        pairs = rows * (position + 1) + sum(prompts)
        return 2 * (self.decoder_linear + self.head) * rows + self.decoder_pair * pairs

    def prefill(self, prompts: Sequence[int]) -> Work:
        """The encoder, keys and values of its output, and the decoder's start token."""
        tokens, pairs = sum(prompts), sum(n * n for n in prompts)
        flops = 2 * (self.encoder_linear + self.memory_linear) * tokens + self.encoder_pair * pairs
        flops += self._step_flops(prompts, 0)
        read = self.encoder_row * tokens + self.decoder_row * len(prompts)
        # Keys and values of the encoder are written, and read by the start token's attention.
        cached = self.per_token * (2 * tokens + len(prompts))
        return Work(flops, self.start_weights + read, cached)

    def cached(self, prompt: int) -> int:
        """The start token."""
        return 1

    def step(self, prompts: Sequence[int], position: int) -> Work:
        """One token for each row, whose decoder has `position` cached."""
        cached = sum(prompts) + len(prompts) * (position + 1)
        weights = self.step_weights + self.decoder_row * len(prompts)
        return Work(self._step_flops(prompts, position), weights, self.per_token * cached)


class MeasuredCounts:
    """Of a model that only transformers has: FLOPs as torch counts them while it runs.

    Attention counts in full, masked or not. Bytes are those of all parameters but embeddings, which
    a step reads a row of, and of an encoder; and those of the cache that is there.

    Args:
        provider: of transformers, with its own attention.
        device: where it is.
    """

    source = "torch.utils.flop_counter, attention in full"

    def __init__(self, provider: Any, device: torch.device) -> None:
        self._provider, self._device = provider, device
        model = provider.model
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        output = model.get_output_embeddings()
        head = None if output is None else output.weight
        tables = [
            m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not head
        ]
        encoder = [model.get_encoder()] if self.is_encoder_decoder else []
        self.start_weights = step_bytes(model, [], tables)
        self.step_weights = step_bytes(model, encoder, tables)
        self._of: dict[tuple[int, ...], tuple[Work, Work, Work]] = {}

    def cached(self, prompt: int) -> int:
        """All of a decoder's prompt; of an encoder-decoder the start token."""
        return 1 if self.is_encoder_decoder else prompt

    def prefill(self, prompts: Sequence[int]) -> Work:
        """One pass, counted while it runs."""
        return self._counted(tuple(prompts))[0]

    def step(self, prompts: Sequence[int], position: int) -> Work:
        """By the first two steps: FLOPs and bytes grow by as much in each."""
        _, first, second = self._counted(tuple(prompts))
        steps = position - self.cached(max(prompts))
        return Work(
            first.flops + steps * (second.flops - first.flops),
            self.step_weights,
            first.cache_bytes + steps * (second.cache_bytes - first.cache_bytes),
        )

    @torch.no_grad()
    def _counted(self, prompts: tuple[int, ...]) -> tuple[Work, Work, Work]:
        if prompts in self._of:
            return self._of[prompts]
        ids = torch.ones(len(prompts), max(prompts), dtype=torch.int64, device=self._device)
        model = self._provider.model
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")  # which fused kernels are not counted as
        try:
            found = self._count_passes(ids, torch.tensor(prompts, device=self._device))
        finally:
            model.set_attn_implementation(before)
        self._of[prompts] = found
        return found

    def _count_passes(self, ids: Tensor, lengths: Tensor) -> tuple[Work, Work, Work]:
        if self._provider.generates:
            with FlopCounterMode(display=False) as counter:
                _, decoding = self._provider.start(ids, 3)
            cache = tensor_bytes(decoding.cache_tensors())
            works = [Work(counter.get_total_flops(), self.start_weights, cache)]
            for _ in range(2):
                with FlopCounterMode(display=False) as counter:
                    decoding.step()
                cache = tensor_bytes(decoding.cache_tensors())
                works.append(Work(counter.get_total_flops(), self.step_weights, cache))
            return works[0], works[1], works[2]
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        with FlopCounterMode(display=False) as counter:
            self._provider.encode(ids, mask)
        work = Work(counter.get_total_flops(), self.start_weights, 0)
        return work, work, work
