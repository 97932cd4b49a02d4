"""Mask-predict against its plain statement, a row and a token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastattn.generation import mask_predict
from tests.bad_arguments import check

MASK, PAD, VOCAB = 4, 0, 37


def _encoder() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=32, initializer_range=0.4,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).double().eval()


def _texts() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCAB, (4, 14), generator=generator)
    ids[torch.rand(4, 14, generator=generator) < 0.6] = MASK
    ids[:, 0] = MASK
    mask = (torch.arange(14) < torch.tensor([14, 9, 12, 4])[:, None]).long()
    return ids.masked_fill(mask == 0, PAD), mask


def _plain(model: Any, ids: list[int], iterations: int, never: list[int]) -> tuple[list[int], int]:
    gaps = [place for place, token in enumerate(ids) if token == MASK]
    tokens, sure, masked = list(ids), dict.fromkeys(gaps, 0.0), gaps
    for iteration in range(1, iterations + 1):
        given = [MASK if place in masked else token for place, token in enumerate(tokens)]
        with torch.no_grad():
            logits = model(torch.tensor([given])).logits[0]
        logits[:, never] = -torch.inf
        for place in masked:
            best = int(logits[place].argmax())
            tokens[place], sure[place] = best, float(logits[place].softmax(-1)[best])
        n = len(gaps) * (iterations - iteration) // iterations
        if n == 0:
            break
        masked = sorted(gaps, key=sure.__getitem__)[:n]
    return tokens, iteration


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_mask_predict(iterations: int) -> None:
    model = _encoder()
    ids, mask = _texts()

    def logits_of(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        logits: Tensor = model(tokens, attention_mask=attention_mask).logits
        return logits

    never = [PAD, 9]
    out = mask_predict(
        logits_of, ids, MASK, attention_mask=mask, iterations=iterations, suppress_tokens=never
    )
    done = []
    for row in range(4):
        real = int(mask[row].sum())
        wanted, count = _plain(model, ids[row, :real].tolist(), iterations, [MASK, *never])
        assert out.sequences[row].tolist() == wanted + [PAD] * (14 - real)
        done.append(count)
    assert out.iterations == max(done)
    gaps = ids == MASK
    assert (out.logprobs[gaps] < 0).all() and (out.logprobs[~gaps] == 0).all()
    if iterations > 1:
        once = mask_predict(logits_of, ids, MASK, attention_mask=mask, iterations=1)
        assert not torch.equal(once.sequences, out.sequences)


def _flat(tokens: Tensor, mask: Tensor | None) -> Tensor:
    return torch.zeros(*tokens.shape, 5)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"iterations": 0}, ValueError, ("iterations", "at least 1", "0")),
        ({"input_ids": torch.ones(1, 3).long()}, ValueError, ("input_ids", "mask_token = 4", "0")),
        ({"input_ids": torch.ones(1, 3)}, TypeError, ("input_ids", "int32 or int64", "float32")),
        ({"suppress_tokens": [7]}, ValueError, ("logits_of", "up to 7", "(1, 2, 5)")),
        ({"logits_of": lambda ids, mask: ids}, TypeError, ("logits_of", "floating", "int64")),
    ],
)
def test_bad_calls(changed: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    given = {"logits_of": _flat, "input_ids": torch.tensor([[4, 1]]), "mask_token": 4, **changed}
    check(lambda: mask_predict(**given), error, words)
