"""Attention modules, and the caches and the sampler that decoders are built of."""

from fastattn.nn.base_cache import BaseKVCache
from fastattn.nn.block_allocator import CacheFullError
from fastattn.nn.kv_cache import KVCache
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.paged_kv_cache import PagedKVCache
from fastattn.nn.sampler import Sampler
from fastattn.nn.self_attention import (
    CrossAttention,
    ProjectedMemory,
    RelativeBias,
    ScoreOptions,
    SelfAttention,
)

__all__ = [
    "BaseKVCache",
    "CacheFullError",
    "CrossAttention",
    "KVCache",
    "MultiheadAttention",
    "PagedKVCache",
    "ProjectedMemory",
    "RelativeBias",
    "Sampler",
    "ScoreOptions",
    "SelfAttention",
]
