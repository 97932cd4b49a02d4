"""Caches and the sampler that decoders are built of."""

from fastattn.nn.base_cache import BaseKVCache
from fastattn.nn.block_allocator import CacheFullError
from fastattn.nn.kv_cache import KVCache
from fastattn.nn.paged_kv_cache import PagedKVCache
from fastattn.nn.sampler import Sampler

__all__ = ["BaseKVCache", "CacheFullError", "KVCache", "PagedKVCache", "Sampler"]
