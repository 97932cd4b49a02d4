"""Dropout: which weights it drops. `test_parity.py` has the parity of what it gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.philox import philox
from fastattn.testing import make_qkv


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_dropout_draws_philox(counter: int, seed: int, words: tuple[int, ...]) -> None:
    """Known answers of Philox4x32-10, published with Random123."""
    counters = tuple(torch.tensor(counter) for _ in range(4))
    assert tuple(int(word) for word in philox(torch.tensor([seed]), counters)) == words


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_dropout_drops_the_share_it_says_and_scales_the_rest(impl: str, device: str) -> None:
    """Values of 1: the output is the share of a row that is kept, over 1 - p."""
    q, k, v = make_qkv(2, 100, 200, 2, head_dim=16, device=device)
    p, seed = 0.3, torch.tensor([5], device=device)
    kwargs: dict[str, Any] = {"softmax_scale": 0.0, "dropout_p": p, "impl": impl}
    out = fastattn.attention(q, k, torch.ones_like(v), dropout_seed=seed, **kwargs)
    kept = out[..., 0].double() * (1 - p)
    # Each row keeps a binomial number of its 200 keys; all rows together are 80000 draws.
    draws = 2 * 100 * 2 * 200
    deviation = (p * (1 - p)) ** 0.5
    assert abs(float(kept.mean()) - (1 - p)) < 5 * deviation / draws**0.5
    assert 0.8 < float(kept.std()) / (deviation / 200**0.5) < 1.2
    other = fastattn.attention(q, k, torch.ones_like(v), dropout_seed=seed + 1, **kwargs)
    assert not torch.equal(out, other)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_dropout_without_a_seed_follows_torchs_generator(impl: str, device: str) -> None:
    q, k, v = make_qkv(1, 70, 70, 2, head_dim=16, device=device)

    def drop(seed: int) -> Tensor:
        torch.manual_seed(seed)
        out = fastattn.attention(q, k, v, dropout_p=0.5, impl=impl)
        assert isinstance(out, Tensor)
        return out

    assert torch.equal(drop(0), drop(0))
    assert not torch.equal(drop(0), drop(1))
