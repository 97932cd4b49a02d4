"""Parity before speed: a provider whose outputs are wrong gets no figures.

Outputs are held to the rule of `fastattn.testing.tolerance`: error against a wide model at most
twice that of the stock model, plus one rounding unit. The wide model is the stock one with eager
attention in float64, or in float32 where the weights have 16 bits and memory holds no more. Where
it does not hold that either, every token must be the stock model's.

All logits behind one prompt share its rounding errors, by which two right models can be far more
than twice as wrong as each other: so several prompts are judged together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.profiling.batches import Batch
from fastattn.profiling.memory import available_bytes
from fastattn.profiling.providers import Provider, Stock
from fastattn.profiling.results import Parity, describe
from fastattn.profiling.subject import count_parameters
from fastattn.testing.tolerance import compare

STEPS = 8
"""Steps of decoding whose logits are compared, the first token's included."""
PROMPTS = 6
"""Rows that are compared, at least: of as many batches of a case as have them."""


def wide_dtype(model: Any, dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """In what the reference can be computed: float64, float32, or not at all.

    No more than 60% of what memory has left is taken by its weights.
    """
    count, free = count_parameters(model), available_bytes(device)
    for wide in (torch.float64, torch.float32):
        fits = free is None or count * wide.itemsize < 0.6 * free
        if fits and wide.itemsize > dtype.itemsize:
            return wide
    return None


def compared_rows(batch: int) -> list[int]:
    """Up to `PROMPTS` rows of a batch, the first and the last, which is its longest, among them."""
    count = min(batch, PROMPTS)
    return sorted({round(index * (batch - 1) / max(count - 1, 1)) for index in range(count)})


def samples(batch: int) -> int:
    """How many batches have `PROMPTS` rows to compare."""
    return -(-PROMPTS // len(compared_rows(batch)))


@torch.no_grad()
def decoded(
    provider: Provider, prompts: Tensor, steps: int, forced: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (compared, steps, vocab_size), and the tokens (rows, steps) that are chosen.

    Args:
        forced: go on with these tokens instead.
    """
    rows = compared_rows(prompts.shape[0])
    with provider.active():
        logits, decoding = provider.start(prompts, steps)
        kept, chosen = [logits[rows].clone()], [decoding.tokens.clone()]
        for step in range(1, steps):
            if forced is not None:
                decoding.tokens.copy_(forced[:, step - 1 : step])
            kept.append(decoding.step()[rows].clone())
            chosen.append(decoding.tokens.clone())
    return torch.stack(kept, 1), torch.cat(chosen, 1)


@torch.no_grad()
def encoded(provider: Provider, batch: Batch) -> Tensor:
    """Hidden states (tokens, hidden_size) of the compared rows, padding left out."""
    rows = compared_rows(len(batch.lengths))
    with provider.active():
        states = provider.encode(batch.ids, batch.mask)
    return states[rows][batch.mask[rows]]


class References:
    """What the stock model and the wide one give, which providers are compared with.

    Args:
        stock: of transformers.
        wide: the same in a wider dtype, on the same device; None: tokens decide.
        kind: of the model.
    """

    def __init__(self, stock: Stock, wide: Any, kind: str) -> None:
        self._stock, self._wide, self._kind = stock, wide, kind
        dtype = None if wide is None else next(iter(wide.parameters())).dtype
        self.name = "tokens" if dtype is None else str(dtype).removeprefix("torch.")

    def check(
        self, providers: Sequence[Provider], batches: Sequence[Batch], new_tokens: int
    ) -> dict[str, Parity]:
        """The verdict on each provider but the stock one itself, by name.

        A provider that raises has that as its verdict.

        Args:
            batches: of one case, judged together.
        """
        others = [one for one in providers if one.name != self._stock.name]
        steps = min(STEPS, new_tokens)
        baselines, forced, exacts = [], [], []
        for batch in batches:
            if self._kind == "encoder":
                baselines.append(encoded(self._stock, batch))
                exacts.append(self._exact_states(batch))
            else:
                baseline, tokens = decoded(self._stock, batch.ids, steps)
                baselines.append(baseline)
                forced.append(tokens)
                exacts.append(self._exact_logits(batch, tokens))
        wide = [exact for exact in exacts if exact is not None]
        found = (torch.cat(baselines), forced, torch.cat(wide) if wide else None)
        verdicts = {}
        for one in others:
            try:
                verdicts[one.name] = self._verdict(one, batches, *found)
            except Exception as error:
                verdicts[one.name] = Parity(False, describe(error), self.name)
        return verdicts

    def _verdict(
        self,
        provider: Provider,
        batches: Sequence[Batch],
        baseline: Tensor,
        forced: Sequence[Tensor],
        exact: Tensor | None,
    ) -> Parity:
        if self._kind == "encoder":
            actual = torch.cat([encoded(provider, batch) for batch in batches])
            return self._judge(actual, baseline, exact)
        pairs = [
            decoded(provider, batch.ids, tokens.shape[1], tokens)
            for batch, tokens in zip(batches, forced, strict=True)
        ]
        if exact is None:
            chosen = torch.cat([tokens.flatten() for _, tokens in pairs])
            return _judge_tokens(chosen, torch.cat([tokens.flatten() for tokens in forced]))
        return self._judge(torch.cat([logits for logits, _ in pairs]), baseline, exact)

    def _judge(self, actual: Tensor, baseline: Tensor, exact: Tensor | None) -> Parity:
        if exact is None:  # an encoder chooses no tokens
            return Parity(True, "not compared: memory holds no wider model", "none")
        if not bool(torch.isfinite(baseline).all()):
            return Parity(False, "the stock model's outputs are NaN or infinite", self.name)
        comparison = compare(actual, baseline, exact.double())
        return Parity(comparison.passed, str(comparison), self.name)

    @torch.no_grad()
    def _exact_states(self, batch: Batch) -> Tensor | None:
        if self._wide is None:
            return None
        rows = compared_rows(len(batch.lengths))
        ids, mask = batch.ids[rows], batch.mask[rows]
        return Stock(self._wide).encode(ids, mask)[mask]

    @torch.no_grad()
    def _exact_logits(self, batch: Batch, tokens: Tensor) -> Tensor | None:
        if self._wide is None:
            return None
        rows, steps = compared_rows(len(batch.lengths)), tokens.shape[1]
        prompts, before = batch.ids[rows], tokens[rows, :-1]
        if self._kind == "decoder":
            out = self._wide(input_ids=torch.cat((prompts, before), 1), use_cache=False)
            return out.logits[:, -steps:]
        begin = prompts.new_full((len(rows), 1), self._wide.config.decoder_start_token_id)
        out = self._wide(
            input_ids=prompts, decoder_input_ids=torch.cat((begin, before), 1), use_cache=False
        )
        return out.logits


def _judge_tokens(chosen: Tensor, wanted: Tensor) -> Parity:
    same = int((chosen == wanted).sum())
    text = f"{same} of {wanted.numel()} tokens are the stock model's"
    return Parity(same == wanted.numel(), text, "tokens")
