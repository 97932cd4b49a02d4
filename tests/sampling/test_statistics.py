"""Entropy, perplexity and log-probabilities: parity, edges, and nothing large in memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.sampling.statistics import entropy, log_probabilities, perplexity
from fastattn.testing import assert_parity

SHAPES = [((3, 129), 1.0), ((2, 3, 2500), 8.0), ((70, 70001), 3.0)]


def _logits(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
    """With rows far from 0, banned tokens, and whole chunks of them at the start of a row."""
    generator = torch.Generator().manual_seed(shape[-1])
    logits = torch.randn(shape, generator=generator) * scale
    logits[0] += 500
    logits[1, ..., : shape[-1] // 2] = -math.inf
    logits[-1, ..., ::3] = -math.inf
    return logits.to(dtype)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).nansum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "scale"), SHAPES)
def test_parity(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> None:
    """Half precision in, float32 out: the baseline is plain torch in float32."""
    logits = _logits(shape, scale, dtype)
    exact = torch.log_softmax(logits.double(), -1)
    plain = torch.log_softmax(logits.float(), -1)
    assert_parity(entropy(logits), _entropy(plain), _entropy(exact), name="entropy")
    tokens = logits.argsort(-1)[..., -5]
    chosen = tokens[..., None]
    assert_parity(
        log_probabilities(logits, tokens.int()),
        plain.gather(-1, chosen)[..., 0],
        exact.gather(-1, chosen)[..., 0],
        name="log-probabilities",
    )
    assert_parity(
        perplexity(logits, tokens),
        (-plain.gather(-1, chosen)[..., 0].mean(-1)).exp(),
        (-exact.gather(-1, chosen)[..., 0].mean(-1)).exp(),
        name="perplexity",
    )


def test_edges_of_entropy() -> None:
    certain = torch.full((5000,), -math.inf)
    certain[4321] = -3.0
    assert entropy(certain) == 0
    flat = entropy(torch.full((2, 5000), 1e4, dtype=torch.float64))
    torch.testing.assert_close(flat, torch.full((2,), math.log(5000), dtype=torch.float64))
    nothing = torch.full((3, 10), -math.inf)
    nothing[1, 3], nothing[2, 3] = math.nan, math.inf
    assert entropy(nothing).isnan().all()
    assert entropy(torch.zeros(0, 4)).shape == (0,)


def test_perplexity_counts_what_the_mask_shows() -> None:
    logits = torch.randn(3, 6, 50, generator=torch.Generator().manual_seed(3))
    tokens = torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(4))
    mask = torch.arange(6) < torch.tensor([6, 4, 0])[:, None]
    hidden = logits.clone()
    hidden[~mask] = math.nan
    result = perplexity(hidden, tokens.masked_fill(~mask, -100), mask)
    short = perplexity(logits[1:2, :4], tokens[1:2, :4])
    assert torch.equal(result[:1], perplexity(logits[:1], tokens[:1]))
    torch.testing.assert_close(result[1:2], short)
    assert result[2].isnan()
    assert (log_probabilities(hidden, tokens, mask)[~mask] == 0).all()
    loss = torch.nn.functional.cross_entropy(logits[0], tokens[0])
    torch.testing.assert_close(result[0], loss.exp())


class _Largest(TorchDispatchMode):
    """The largest tensor in bytes that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.size = max(self.size, tensor.numel() * tensor.element_size())
        return out


@pytest.mark.parametrize("rows", [1, 300])
def test_no_softmax_in_memory(rows: int) -> None:
    """The softmax of a row alone would be 560 KB, of all of them 168 MB."""
    logits = torch.zeros(1, dtype=torch.bfloat16).expand(rows, 140_000)
    tokens = torch.zeros(rows, dtype=torch.int64)
    with _Largest() as largest:
        entropy(logits)
        log_probabilities(logits, tokens)
    assert 0 < largest.size <= 2**19


def test_gradients() -> None:
    logits = torch.randn(3, 2100, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    logits[:, :5] = -math.inf
    logits.requires_grad_()
    tokens = torch.tensor([9, 1000, 2099])
    weight = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad(
        (entropy(logits) + log_probabilities(logits, tokens)) @ weight, logits
    )
    log_p = torch.log_softmax(logits[:, 5:], -1)
    plain = _entropy(log_p) + log_p.gather(1, tokens[:, None] - 5)[:, 0]
    (expected,) = torch.autograd.grad(plain @ weight, logits)
    torch.testing.assert_close(grad, expected)


def test_compiles_in_one_graph() -> None:
    logits = _logits((2, 3, 2500), 4.0, torch.bfloat16)
    tokens = torch.full((2, 3), 2000)
    for function, args in ((entropy, (logits,)), (perplexity, (logits, tokens))):
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*args), function(*args))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4).int()}, TypeError, "logits must have a floating dtype"),
        ({"logits": torch.zeros(4)}, ValueError, r"logits must have shape \(\.\.\., length, vocab"),
        ({"tokens": torch.zeros(2, 3)}, TypeError, "tokens must be int32 or int64"),
        ({"tokens": torch.zeros(2, 4).int()}, ValueError, r"tokens must have shape \(2, 3\)"),
        ({"tokens": torch.full((2, 3), 4)}, ValueError, r"tokens must lie in 0\.\.3, got 4\.\.4"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool"),
    ],
)
def test_bad_arguments_are_named(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"logits": torch.zeros(2, 3, 4), "tokens": torch.zeros(2, 3, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        perplexity(**{**given, **kwargs})
