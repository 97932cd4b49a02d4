"""Tile configurations, and which one a problem gets. Constants say why, and where they were measured."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ForwardConfig:
    """Tile sizes and launch options of the forward kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def padded_dim(head_dim: int) -> int:
    """The power of two that a tile's head dimension is padded to; tensor cores want 16 or more."""
    return max(16, 1 << (head_dim - 1).bit_length())


def select_forward_config(
    head_dim: int, head_dim_v: int, dtype: torch.dtype, seqlen_q: int, device: torch.device
) -> ForwardConfig:
    return ForwardConfig(64, 64, 4, 2)


@dataclass(frozen=True)
class WeightsConfig:
    """Tile sizes and launch options of the weights kernel."""

    block_m: int
    block_n: int
    num_warps: int


def select_weights_config(head_dim: int, dtype: torch.dtype) -> WeightsConfig:
    """One square tile a program: it is bound by the bytes it writes."""
    return WeightsConfig(64, 64, 4)
