"""Attention backward: what the kernels of the walk need first, and which of them run.

With weights P, scores S and `delta = rowsum(dO * O) - dlse` (Dao et al., arXiv:2205.14135):

    dV = P.T dO      dS = P * (dO V.T - delta)      dQ = scale * dS K      dK = scale * dS.T Q

`backward_rows` walks along rows of dS (dQ, biases), `backward_keys` along its columns (dK, dV):
seven products a tile to the forward pass's two, none of them atomic. Whatever needs no gradient is
not computed.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention.backward_bias import launch_backward_bias
from fastattn.kernels.attention.backward_keys import launch_backward_keys
from fastattn.kernels.attention.backward_rows import launch_backward_rows
from fastattn.kernels.attention.config import (
    BackwardConfig,
    chip_of,
    padded_dim,
    select_backward_config,
)
from fastattn.kernels.attention.operands import (
    Modifiers,
    masks,
    needs_wide_offsets,
    problem_shape,
    row_scalars,
    rows,
    softmax_rows,
    vector,
)
from fastattn.kernels.attention.tile import (
    LOG2E,
    head_base,
    load_rows,
    load_sequence,
    load_tile,
    sees_one_key,
)

DELTA_BLOCK = 64


@dataclass(frozen=True)
class Gradients:
    """Where gradients go; None where one is not needed.

    `dq`, `dk`, `dv` have the shapes of q, k and v, `dbias` that of the bias and must be zero,
    `drelative` is (num_heads, 2 * radius + 1), `dsinks` (num_heads,).
    """

    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None
    dbias: torch.Tensor | None = None
    drelative: torch.Tensor | None = None
    dsinks: torch.Tensor | None = None


@triton.jit
def _attention_backward_delta_kernel(
    out,
    dout,
    dlse,
    shift,
    log_total,
    delta,
    sinks,
    sink_sums,
    shape,
    masks,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
):
    """delta of each row and, where asked for, the sums of the sinks' gradient by block of rows."""
    num_blocks_m = tl.cdiv(shape.seqlen_q, BLOCK_M)
    program = tl.program_id(0)
    start_m = program % num_blocks_m * BLOCK_M
    head = (program // num_blocks_m) % shape.num_heads
    index = program // num_blocks_m // shape.num_heads
    seq = load_sequence(shape, masks, index)
    local_row = tl.arange(0, BLOCK_M)
    live = seq.live_rows - start_m
    inside = seq.rows - start_m
    begin_m = seq.begin_q + start_m
    base = head_base(out, index, head, begin_m)
    out_tile = load_tile(out, base, local_row, live, HEAD_DIM_V, BLOCK_DV, True, WIDE)
    base = head_base(dout, index, head, begin_m)
    dout_tile = load_tile(dout, base, local_row, live, HEAD_DIM_V, BLOCK_DV, True, WIDE)
    row_delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if sinks is None:
        row_delta = tl.where(sees_one_key(start_m + local_row, seq, masks), 0.0, row_delta)
    if dlse.ptr is not None:
        row_delta -= load_rows(dlse, index, head, begin_m, local_row, inside, 0.0, True)
    pointers = head_base(delta, index, head, begin_m) + local_row * delta.stride_row
    tl.store(pointers, row_delta, mask=local_row < inside)
    if sink_sums is not None:
        # A sink is a key whose value is 0, and the only one that a dead row attends to.
        sink = tl.load(sinks + head).to(tl.float32)
        row_shift = load_rows(shift, index, head, begin_m, local_row, live, sink, True)
        row_log_total = load_rows(log_total, index, head, begin_m, local_row, live, 0.0, True)
        weight = tl.exp2((sink - row_shift) * LOG2E - row_log_total)
        total = tl.sum(tl.where(local_row < inside, -weight * row_delta, 0.0), 0)
        tl.store(sink_sums + program, total)


def launch_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_stats: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    modifiers: Modifiers,
    gradients: Gradients,
    *,
    input_precision: str = "ieee",
    config: BackwardConfig | None = None,
) -> None:
    """Writes the gradients that `gradients` has room for.

    `out` and `softmax_stats` are what the forward pass gave for the same operands, `dout` (any
    strides, also 0) and `dlse` the gradients of its outputs. Beyond inputs and outputs it takes
    8 bytes a row and head, plus partial sums of bias gradients in proportion to the number of rows
    or keys. Arguments are taken as valid: the callers check them.
    """
    g = gradients
    if config is None:
        head_dim = max(q.shape[-1], v.shape[-1])
        config = select_backward_config(
            chip_of(q.device),
            head_dim,
            q.dtype,
            modifiers.backward_count,
            g.drelative is not None,
            modifiers.window_right >= 0,
        )
    delta = None
    if any(x is not None for x in (g.dq, g.dk, g.dbias, g.drelative, g.dsinks)):
        delta = _launch_delta(q, k, out, softmax_stats, dout, dlse, modifiers, g.dsinks)
    operands = (q, k, v, dout, softmax_stats, delta, modifiers)
    plane_sums = _PlaneSums(q, k, modifiers, g.dbias)
    by_distance = None
    if g.drelative is not None:
        by_distance = _by_distance_partials(q, k, modifiers, g.drelative, config.rows.block_m)
    if any(x is not None for x in (g.dq, plane_sums.own, plane_sums.rows, by_distance)):
        launch_backward_rows(
            *operands,
            dq=g.dq,
            dbias=plane_sums.own,
            row_sums=plane_sums.rows,
            by_distance=by_distance,
            input_precision=input_precision,
            config=config.rows,
        )
    if any(x is not None for x in (g.dk, g.dv, plane_sums.cols)):
        launch_backward_keys(
            *operands,
            dk=g.dk,
            dv=g.dv,
            col_sums=plane_sums.cols,
            input_precision=input_precision,
            config=config.keys,
        )
    if plane_sums.shared is not None:
        launch_backward_bias(
            *operands,
            dbias=plane_sums.shared,
            input_precision=input_precision,
            config=config.bias,
        )
    plane_sums.reduce()
    if g.drelative is not None:
        g.drelative.copy_(by_distance.sum((0, 2)))


def _num_sequences(q: torch.Tensor, modifiers: Modifiers) -> int:
    packed = modifiers.cu_seqlens_q is not None
    return modifiers.cu_seqlens_q.numel() - 1 if packed else q.shape[0]


def _launch_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    out: torch.Tensor,
    softmax_stats: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    modifiers: Modifiers,
    dsinks: torch.Tensor | None,
) -> torch.Tensor:
    """delta (the shape of the log-sum-exp), and the sinks' gradient on the way."""
    shape = problem_shape(q, k, modifiers)
    num_blocks = triton.cdiv(shape.seqlen_q, DELTA_BLOCK)
    num_sequences = _num_sequences(q, modifiers)
    delta = torch.empty_like(softmax_stats[0])
    sink_sums = None
    if dsinks is not None:
        sink_sums = delta.new_zeros(num_sequences, shape.num_heads, num_blocks)
    num_programs = num_sequences * shape.num_heads * num_blocks
    if num_programs:
        _attention_backward_delta_kernel[(num_programs,)](
            rows(out),
            rows(dout),
            row_scalars(dlse),
            *softmax_rows(softmax_stats),
            row_scalars(delta),
            vector(modifiers.sinks),
            sink_sums,
            shape,
            masks(modifiers),
            HEAD_DIM_V=out.shape[-1],
            BLOCK_M=DELTA_BLOCK,
            BLOCK_DV=padded_dim(out.shape[-1]),
            WIDE=needs_wide_offsets(out, dout, rows_per_tile=DELTA_BLOCK),
            num_warps=8,
        )
    if dsinks is not None:
        dsinks.copy_(sink_sums.sum((0, 2)))
    return delta


def _by_distance_partials(
    q: torch.Tensor, k: torch.Tensor, modifiers: Modifiers, like: torch.Tensor, block_m: int
) -> torch.Tensor:
    """Room for each program's own sums by distance."""
    shape = problem_shape(q, k, modifiers)
    num_blocks = triton.cdiv(shape.seqlen_q, block_m)
    sizes = (_num_sequences(q, modifiers), shape.num_heads, num_blocks, like.shape[1])
    return like.new_zeros(sizes, dtype=torch.float32)


class _PlaneSums:
    """Which kernel adds up the gradient of a dense bias; it depends on the axes it is broadcast on.

    own: no axis; the gradient of the scores is the bias's own.
    shared: sequences or heads; a kernel of its own.
    rows, cols: each row, or each key, has one value: the walk along it holds the sum, which is left
        to `reduce` over sequences and heads.
    """

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, modifiers: Modifiers, dbias: torch.Tensor | None
    ) -> None:
        self.own = self.shared = self.rows = self.cols = None
        self._dbias = dbias
        if dbias is None or dbias.numel() == 0:
            return
        shape = problem_shape(q, k, modifiers)
        frame = (_num_sequences(q, modifiers), shape.num_heads)
        if dbias.shape[3] == 1:
            self.rows = dbias.new_zeros(*frame, shape.seqlen_q, dtype=torch.float32)
        elif dbias.shape[2] == 1:
            self.cols = dbias.new_zeros(*frame, shape.seqlen_k, dtype=torch.float32)
        elif tuple(dbias.shape[:2]) == frame:
            self.own = dbias
        else:
            self.shared = dbias

    def reduce(self) -> None:
        """Adds up what the walks left in sums of rows or keys."""
        if self.rows is not None:
            self._dbias.copy_(self.rows[..., None].sum_to_size(self._dbias.shape))
        if self.cols is not None:
            self._dbias.copy_(self.cols[:, :, None].sum_to_size(self._dbias.shape))
