"""One checked call on a key/value cache: what every implementation is given.

Row b has `seqlens[b]` tokens in the cache before the call. New tokens are written behind them, at
`seqlens[b] + j`, and then all of `total = seqlens[b] + seqlen_new` can be attended. Query row i
stands at `total - seqlen_q + i`: the last query with the last key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import biases, masks
from fastattn.biases import Bias
from fastattn.masks import Frame, Mask
from fastattn.problem import (
    AttentionProblem,
    autocast,
    check_dtype,
    check_head_dim,
    check_modifiers,
    check_softcap,
    check_softmax_scale,
    check_values_match,
    join_causal,
)
from fastattn.quantized import Quantized
from fastattn.rotary import Rotary, check_position_values
from fastattn.validation import (
    check_flag,
    check_integers,
    check_tensor,
    describe,
    values_readable,
)


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values in memory: contiguous (batch, max_seqlen, num_heads_kv, dim), or paged.

    Paged is (num_blocks, block_size, num_heads_kv, dim): token j of row b lies in block
    `block_table[b, j // block_size]`, at `j % block_size`. `seqlens` None is a full cache.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    seqlens: Tensor | None
    block_table: Tensor | None
    host_seqlens: list[int] | None
    """The lengths as ints, where they were at hand without waiting for a device."""

    @property
    def is_paged(self) -> bool:
        """Whether tokens are found through a block table."""
        return self.block_table is not None

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.k.shape[0] if self.block_table is None else self.block_table.shape[0]

    @property
    def block_size(self) -> int | None:
        """Tokens in a block; None if the cache is contiguous."""
        return None if self.block_table is None else self.k.shape[1]

    @property
    def capacity(self) -> int:
        """How many tokens a row has room for."""
        if self.block_table is None:
            return self.k.shape[1]
        return self.block_table.shape[1] * self.k.shape[1]

    @property
    def num_heads_kv(self) -> int:
        """Heads of keys and values."""
        return self.k.shape[2]

    def lengths(self) -> list[int]:
        """Tokens of each row before the call. On a GPU this may wait for the device."""
        if self.host_seqlens is not None:
            return self.host_seqlens
        assert self.seqlens is not None  # a full cache's lengths are always at hand
        return self.seqlens.tolist()


@dataclass(frozen=True, eq=False)
class CacheProblem:
    """Arguments of one call on a cache, validated and with defaults filled in.

    `q` is None where tokens are only appended, `k` and `v` where none are.
    """

    q: Tensor | None
    cache: Cache
    k: Tensor | None
    v: Tensor | None
    rotary: Rotary | None
    mask: Mask | None
    bias: Bias | None
    softmax_scale: float
    softcap: float
    sinks: Tensor | None
    batch_invariant: bool
    return_lse: bool

    @property
    def device(self) -> torch.device:
        """Where it all lies."""
        return self.cache.k.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the queries, or of the new tokens where there are no queries."""
        operand = self.k if self.q is None else self.q
        assert operand is not None  # a problem without both does not exist
        return operand.dtype

    @property
    def seqlen_q(self) -> int:
        """Query rows."""
        return 0 if self.q is None else self.q.shape[1]

    @property
    def seqlen_new(self) -> int:
        """Tokens that are appended to each row."""
        return 0 if self.k is None else self.k.shape[1]

    def totals(self) -> list[int]:
        """Tokens of each row after appending. On a GPU this may wait for the device."""
        new = self.seqlen_new
        return [length + new for length in self.cache.lengths()]

    def positions(self, seqlen: int) -> Tensor:
        """Places of each row's last `seqlen` tokens in the cache: integer (batch, seqlen)."""
        new, seqlens = self.seqlen_new, self.cache.seqlens
        if seqlen == 1 and seqlens is not None:
            return (seqlens + (new - 1))[:, None]
        token = torch.arange(new - seqlen, new, device=self.device)
        if seqlens is None:
            return (token + self.cache.capacity).expand(self.cache.batch, -1)
        return seqlens[:, None] + token

    def rotary_positions(self, seqlen: int) -> Tensor:
        """By which positions the last `seqlen` tokens of each row are rotated."""
        given = None if self.rotary is None else self.rotary.positions
        return self.positions(seqlen) if given is None else given

    def with_tensors(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        k_cache: Tensor | Quantized,
        v_cache: Tensor | Quantized,
    ) -> CacheProblem:
        """The same call on other operands and caches, of shapes and dtypes that were checked."""
        (k_values, k_scale), (v_values, v_scale) = (
            (x.values, x.scale) if isinstance(x, Quantized) else (x, None)
            for x in (k_cache, v_cache)
        )
        own = self.cache
        cache = Cache(
            k_values, v_values, k_scale, v_scale, own.seqlens, own.block_table, own.host_seqlens
        )
        return CacheProblem(
            q, cache, k, v, self.rotary, self.mask, self.bias, self.softmax_scale, self.softcap,
            self.sinks, self.batch_invariant, self.return_lse,
        )  # fmt: skip

    def row(self, index: int, total: int, k: Tensor, v: Tensor) -> AttentionProblem:
        """Row `index` as a problem without a cache; k and v are its (total, heads, dim) tokens."""
        assert self.q is not None  # only a problem with queries is attended
        seqlen_q = self.seqlen_q
        return AttentionProblem(
            q=self.q[index : index + 1],
            k=k[None],
            v=v[None],
            mask=None if self.mask is None else self.mask.at(index, seqlen_q, total),
            bias=None if self.bias is None else self.bias.at(index, seqlen_q, total),
            packed=None,
            softmax_scale=self.softmax_scale,
            softcap=self.softcap,
            sinks=self.sinks,
            dropout=None,
            return_lse=self.return_lse,
        )


def make_cache_problem(
    q: Tensor | None,
    k_cache: Tensor | Quantized,
    v_cache: Tensor | Quantized,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int | None = None,
    block_table: Tensor | None = None,
    rotary: Rotary | None = None,
    causal: bool = False,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
) -> CacheProblem:
    """Checks the arguments of `fastattn.attention_with_kv_cache` and fills in defaults.

    With q None, those of `append_to_kv_cache`. Nothing is written.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, its value and what was expected.
    """
    for name, flag in (
        ("causal", causal), ("batch_invariant", batch_invariant), ("return_lse", return_lse),
    ):  # fmt: skip
        check_flag(name, flag)
    q, k, v = (None if tensor is None else autocast(tensor) for tensor in (q, k, v))
    _check_operands(q, k, v)
    like_name, like = ("q", q) if q is not None else ("k", k)
    assert like is not None  # append_to_kv_cache is not called without k
    cache = _check_cache(
        k_cache, v_cache, like_name, like, cache_seqlens, block_table,
        None if k is None else k.shape[1],
    )  # fmt: skip
    _check_heads(q, k, v, cache)
    problem = CacheProblem(
        q=q,
        cache=cache,
        k=k,
        v=v,
        rotary=rotary,
        mask=join_causal(mask, causal),
        bias=None if bias is None else biases.as_bias(bias),
        softmax_scale=check_softmax_scale(softmax_scale, like.shape[-1]),
        softcap=check_softcap(softcap),
        sinks=sinks,
        batch_invariant=batch_invariant,
        return_lse=return_lse,
    )
    if cache.host_seqlens is not None and block_table is not None:
        _check_block_values(block_table, problem)
    if rotary is not None:
        _check_rotary(rotary, problem, like)
    if q is not None:
        _check_modifiers(problem, q)
    if torch.is_grad_enabled():
        _refuse_gradients(problem)
    return problem


def _check_operands(q: Tensor | None, k: Tensor | None, v: Tensor | None) -> None:
    """q, k and v by themselves and with each other."""
    if (k is None) != (v is None):
        given, missing = ("k", "v") if v is None else ("v", "k")
        raise ValueError(f"k and v must be given both or neither, got {given} without {missing}")
    first: tuple[str, Tensor] | None = None
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor is None:
            continue
        check_tensor(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must be (batch, seqlen, num_heads, head_dim), got {describe(tensor)}"
            )
        check_dtype(name, tensor)
        check_head_dim(name, tensor)
        if first is None:
            first = (name, tensor)
        elif tensor.dtype != first[1].dtype or tensor.device != first[1].device:
            raise TypeError(
                f"{name} must have the dtype and device of {first[0]} ({describe(first[1])}), got "
                f"{describe(tensor)}"
            )
    if k is not None and v is not None:
        check_values_match("k", k, "v", v)


def _check_cache(
    k_cache: Tensor | Quantized,
    v_cache: Tensor | Quantized,
    like_name: str,
    like: Tensor,
    cache_seqlens: Tensor | int | None,
    block_table: Tensor | None,
    seqlen_new: int | None,
) -> Cache:
    parts: list[tuple[Tensor, Tensor | None]] = []
    layout = "(batch, max_seqlen, num_heads_kv, head_dim)"
    if block_table is not None:
        layout = "(num_blocks, block_size, num_heads_kv, head_dim)"
    for name, given in (("k_cache", k_cache), ("v_cache", v_cache)):
        if isinstance(given, Quantized):
            values, scale = given.values, given.scale
        elif isinstance(given, Tensor):
            values, scale = given, None
        else:
            raise TypeError(f"{name} must be a torch.Tensor or a Quantized, got {given!r}")
        if values.dim() != 4:
            raise ValueError(f"{name} must be {layout}, got {describe(values)}")
        if (scale is None and values.dtype != like.dtype) or values.device != like.device:
            raise TypeError(
                f"{name} must have the dtype and device of {like_name} ({describe(like)}; within "
                f"torch.autocast, what it casts to), or be a Quantized, got {describe(values)}"
            )
        parts.append((values, scale))
    (k_values, k_scale), (v_values, v_scale) = parts
    check_values_match("k_cache", k_values, "v_cache", v_values)
    batch, device = like.shape[0], like.device
    if block_table is None:
        if k_values.shape[0] != batch:
            raise ValueError(
                f"k_cache must have the batch size of {like_name}, {batch}, or come with a "
                f"block_table, got {describe(k_values)}"
            )
        capacity = k_values.shape[1]
    else:
        _check_block_table(block_table, batch, device)
        if k_values.shape[1] == 0:
            raise ValueError(f"block_size of k_cache must be at least 1, got {describe(k_values)}")
        capacity = block_table.shape[1] * k_values.shape[1]
    if seqlen_new:
        for name, values in (("k_cache", k_values), ("v_cache", v_values)):
            if any(
                n > 1 and step == 0 for n, step in zip(values.shape, values.stride(), strict=True)
            ):
                raise ValueError(
                    f"{name} must have memory of its own for each token where tokens are appended, "
                    f"got strides {values.stride()} for {describe(values)}: an expanded tensor"
                )
    seqlens, on_host = _check_seqlens(cache_seqlens, batch, capacity, seqlen_new, device)
    return Cache(k_values, v_values, k_scale, v_scale, seqlens, block_table, on_host)


def _check_block_table(block_table: Tensor, batch: int, device: torch.device) -> None:
    check_tensor("block_table", block_table)
    if block_table.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"block_table must be int32 or int64, got {describe(block_table)}")
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise ValueError(
            f"block_table must have shape (batch, max_blocks) with batch {batch}, got "
            f"{describe(block_table)}"
        )
    if block_table.device != device:
        raise ValueError(f"block_table must be on {device} like q, got {describe(block_table)}")


def _check_seqlens(
    value: Tensor | int | None,
    batch: int,
    capacity: int,
    seqlen_new: int | None,
    device: torch.device,
) -> tuple[Tensor | None, list[int] | None]:
    """The lengths as a tensor, and as ints where that costs no wait."""
    if value is None:
        if seqlen_new is not None:
            raise ValueError(
                "cache_seqlens must be given where k and v are appended, got None, which is a "
                f"full cache of {capacity} tokens without room for them"
            )
        return None, [capacity] * batch
    room = capacity - (seqlen_new or 0)
    on_host: list[int] | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        seqlens = torch.full((batch,), value, dtype=torch.int32, device=device)
        on_host = [value] * batch
    elif isinstance(value, Tensor):
        seqlens = value
        check_integers("cache_seqlens", value, device)
        if value.shape != (batch,):
            raise ValueError(
                f"cache_seqlens must have one entry a row, shape ({batch},), got "
                f"{tuple(value.shape)}"
            )
        if values_readable(value):
            on_host = value.tolist()
    else:
        raise TypeError(
            f"cache_seqlens must be an int32 or int64 tensor (batch,), an int or None, got "
            f"{value!r}"
        )
    if on_host and not 0 <= min(on_host) <= max(on_host) <= room:
        new = f" ({seqlen_new} new tokens into room for {capacity})" if seqlen_new else ""
        raise ValueError(
            f"cache_seqlens must lie in 0..{max(room, 0)}{new}, got {min(on_host)}..{max(on_host)}"
        )
    return seqlens, on_host


def _check_block_values(block_table: Tensor, problem: CacheProblem) -> None:
    if not values_readable(block_table) or block_table.numel() == 0:
        return
    num_blocks, block_size = problem.cache.k.shape[:2]
    low, high = block_table.aminmax()
    if int(low) >= 0 and int(high) < num_blocks:
        return
    # Entries past a row's last token may hold anything.
    for index, (entries, total) in enumerate(
        zip(block_table.tolist(), problem.totals(), strict=True)
    ):
        used = entries[: -(-total // block_size)]
        if used and not 0 <= min(used) <= max(used) < num_blocks:
            raise ValueError(
                f"block_table must hold blocks 0..{num_blocks - 1} of k_cache where a row has "
                f"tokens, got {min(used)}..{max(used)} in row {index} of {total} tokens"
            )


def _check_heads(q: Tensor | None, k: Tensor | None, v: Tensor | None, cache: Cache) -> None:
    """Batch, heads and head_dim of q, k and v against the cache's."""
    if cache.num_heads_kv == 0:
        raise ValueError(f"num_heads_kv of k_cache must be at least 1, got {describe(cache.k)}")
    check_head_dim("v_cache", cache.v)
    for name, tensor, of_cache, stored in (
        ("k", k, "k_cache", cache.k),
        ("v", v, "v_cache", cache.v),
    ):
        if tensor is not None and tensor.shape[2:] != stored.shape[2:]:
            raise ValueError(
                f"{name} must have the heads and head_dim of {of_cache}, {tuple(stored.shape[2:])},"
                f" got {describe(tensor)}"
            )
    if q is None:
        return
    if k is not None and k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have the batch size of q, {q.shape[0]}, got {describe(k)}")
    if q.shape[-1] != cache.k.shape[-1]:
        raise ValueError(
            f"k_cache must have the head_dim of q, {q.shape[-1]}, got {describe(cache.k)}"
        )
    if q.shape[2] % cache.num_heads_kv:
        raise ValueError(
            f"num_heads of q must be a multiple of num_heads_kv of k_cache, got {q.shape[2]} and "
            f"{cache.num_heads_kv}"
        )


def _check_rotary(rotary: Rotary, problem: CacheProblem, like: Tensor) -> None:
    if not isinstance(rotary, Rotary):
        raise TypeError(f"rotary must be a fastattn.Rotary or None, got {rotary!r}")
    if rotary.rotary_dim > like.shape[-1]:
        raise ValueError(
            f"rotary must turn at most head_dim = {like.shape[-1]} dimensions, got tables of "
            f"{rotary.rotary_dim // 2} angles for {rotary.rotary_dim}"
        )
    if rotary.cos.device != like.device:
        raise ValueError(f"rotary must be on {like.device} like q, got cos {describe(rotary.cos)}")
    if rotary.positions is None:
        totals = problem.totals() if problem.cache.host_seqlens is not None else []
        used = problem.seqlen_q or problem.seqlen_new
        if used and max(totals, default=0) > rotary.max_position:
            raise ValueError(
                f"rotary must have tables for positions 0..{max(totals) - 1}, the longest row's, "
                f"got {rotary.max_position} positions"
            )
        return
    both = problem.q is not None and problem.k is not None
    if both and problem.seqlen_q != problem.seqlen_new:
        raise ValueError(
            "rotary with positions must have as many new keys as queries, got seqlen_q "
            f"{problem.seqlen_q} and seqlen_new {problem.seqlen_new}"
        )
    positions = rotary.positions
    if positions.shape != like.shape[:2] or positions.device != like.device:
        raise ValueError(
            f"rotary positions must have shape (batch, seqlen) = {tuple(like.shape[:2])} on "
            f"{like.device}, got {describe(positions)}"
        )
    check_position_values("rotary positions", positions, rotary.max_position)


def _check_modifiers(problem: CacheProblem, q: Tensor) -> None:
    """Mask, bias and sinks against the frame: a column for each position in the cache."""
    if masks.find_packed(problem.mask) is not None:
        raise ValueError(
            "mask must not be or contain Packed where there is a cache, got one: give each "
            "sequence a row of the cache, and their lengths as cache_seqlens"
        )
    frame = Frame(q.shape[0], q.shape[2], q.shape[1], problem.cache.capacity, q.device)
    check_modifiers(frame, problem.mask, problem.bias, problem.sinks)


def _refuse_gradients(problem: CacheProblem) -> None:
    cache, rotary = problem.cache, problem.rotary
    operands: list[tuple[str, Tensor | None]] = [
        ("q", problem.q), ("k", problem.k), ("v", problem.v), ("k_cache", cache.k),
        ("v_cache", cache.v), ("k_cache scale", cache.k_scale), ("v_cache scale", cache.v_scale),
        ("sinks", problem.sinks),
    ]  # fmt: skip
    if rotary is not None:
        operands += [("rotary cos", rotary.cos), ("rotary sin", rotary.sin)]
    if problem.bias is not None:
        operands += [("bias", tensor) for tensor in problem.bias.tensors()]
    for name, tensor in operands:
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{name} requires grad ({describe(tensor)}), and attention with a cache has no "
                "gradient: run within torch.no_grad(), or train with fastattn.attention"
            )
