"""Keeping what attention was called with, while a model runs: queries, keys and the rest.

Every call of a model goes through `fastattn.dispatch`, whatever the model is; hooks on its modules
say where in the model it came from.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import cache_storage, dispatch, functional
from fastattn.cache_problem import CacheProblem
from fastattn.problem import AttentionProblem

KINDS = ("self", "encoder", "decoder", "cross")

_CROSS = re.compile(r"cross|enc_?dec|encoder_attn|encoder_decoder", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention call of a model.

    Attributes:
        kind: "self", of encoder-decoders "encoder", "decoder" or "cross".
        layer: its number among the calls of this kind in its run, from 0.
        run: which pass through the model it belongs to, from 0: a new one starts where an embedding
            is looked up again. Encoder and decoder may be runs of their own.
        module: name of the innermost module that was running, "" where none was.
        implementation: what computed it: "triton", "sdpa" or "reference".
        problems: of each sequence that was kept, what it attended with: a batch axis of 1, keys of
            a cache included; empty where the layer was not asked for.
        packed: whether sequences came without padding.
    """

    kind: str
    layer: int
    run: int
    module: str
    implementation: str
    problems: dict[int, AttentionProblem] = field(repr=False)
    packed: bool = False

    def weights(
        self,
        sequence: int = 0,
        *,
        heads: Sequence[int] | Tensor | None = None,
        rows: Sequence[int] | Tensor | None = None,
        average_heads: bool = False,
    ) -> Tensor:
        """The attention weights, without dropout, by `fastattn.attention_weights`.

        Args:
            sequence: of the batch, or of the packed sequences.
            heads, rows, average_heads: as of `fastattn.attention_weights`.

        Returns:
            float32 (heads, rows, keys), averaged (rows, keys). float64 for a model in float64.

        Raises:
            LookupError: the sequence was not kept, or is not in the batch.
        """
        if sequence not in self.problems:
            kept = sorted(self.problems)
            raise LookupError(f"sequence must be one that was kept, {kept}, got {sequence}")
        problem = self.problems[sequence]
        with torch.no_grad():
            weights = functional.attention_weights(
                problem.q,
                problem.k,
                heads=heads if heads is None or isinstance(heads, Tensor) else list(heads),
                rows=rows if rows is None or isinstance(rows, Tensor) else list(rows),
                average_heads=average_heads,
                mask=problem.mask,
                bias=problem.bias,
                softmax_scale=problem.softmax_scale,
                softcap=problem.softcap,
                sinks=problem.sinks,
            )
        return weights[0]


@dataclass(eq=False)
class AttentionRecord:
    """The calls within `record_attention`, in their order."""

    calls: list[AttentionCall] = field(default_factory=list)

    def find(self, layer: int, kind: str | None = None, run: int | None = None) -> AttentionCall:
        """One call.

        Args:
            layer: its number among those of its kind; negative ones count from the last.
            kind: one of `KINDS`; None where there is only one.
            run: the pass through the model; None takes the last with calls of this kind.

        Raises:
            LookupError: there is no such call; the message says which there are.
        """
        if not self.calls:
            raise LookupError(
                "no attention call was seen: the model must call fastattn (of transformers, see "
                "fastattn.integrations.transformers.enable), and not inside a graph of "
                "torch.compile, which runs without Python"
            )
        counts = Counter(call.kind for call in self.calls)
        if kind is None:
            if len(counts) > 1:
                raise LookupError(f"kind must be one of {list(counts)}, since there are several")
            kind = next(iter(counts))
        if kind not in counts:
            raise LookupError(f"kind must be one that was called, {list(counts)}, got {kind!r}")
        found = [call for call in self.calls if call.kind == kind]
        if run is None:
            run = found[-1].run
        found = [call for call in found if call.run == run]
        if not -len(found) <= layer < len(found):
            raise LookupError(
                f"layer must be in {-len(found)}..{len(found) - 1}, the {kind} attention calls of "
                f"run {run}, got {layer}"
            )
        return found[layer]

    def num_layers(self, call: AttentionCall) -> int:
        """How many calls of its kind the run of `call` has."""
        return sum(other.kind == call.kind and other.run == call.run for other in self.calls)


@contextlib.contextmanager
def record_attention(
    model: nn.Module | None = None,
    *,
    layers: Sequence[int] | None = None,
    kind: str | None = None,
    sequences: Sequence[int] | None = None,
) -> Iterator[AttentionRecord]:
    """Within it, attention calls of this thread are recorded.

        with record_attention(model, layers=[3], sequences=[0]) as record:
            model(input_ids)
        weights = record.find(3).weights(heads=[5])

    Memory: a copy of the queries and keys of what is asked for. A generation has a run for every
    token: to see all of one, run the model once on the whole text. Layers of transformers' models
    are seen where fastattn computes them; `capture` sees to that.

    Args:
        model: whose modules are named in the record, and which says what is encoder, decoder and
            cross-attention; None: everything that calls fastattn, of kind "self" (of a cache that
            nothing is appended to: "cross").
        layers: numbers of calls of a kind to keep queries and keys of, from 0; None: all.
        kind: the only kind to keep them of; None: all.
        sequences: of the batch, to keep; None: all.

    Yields:
        The record, which fills up. Calls that are not kept are in it too, without `problems`.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")
    recorder = _Recorder(model, layers, kind, sequences)
    dispatch.listeners.append(recorder.listen)
    try:
        with recorder.hooks():
            yield recorder.record
    finally:
        dispatch.listeners.remove(recorder.listen)


class _Recorder:
    def __init__(
        self,
        model: nn.Module | None,
        layers: Sequence[int] | None,
        kind: str | None,
        sequences: Sequence[int] | None,
    ) -> None:
        self.record = AttentionRecord()
        self._model, self._layers, self._kind = model, layers, kind
        self._sequences = sequences
        self._two_stacks = model is not None and _is_encoder_decoder(model)
        self._running: list[str] = []
        self._looked_up: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._run = 0
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Within it, `_running` are the names of the modules that run, the innermost last."""
        handles = []
        try:
            for name, module in () if self._model is None else self._model.named_modules():
                enter, leave = self._hooks_of(name, isinstance(module, nn.Embedding))
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks_of(self, name: str, is_embedding: bool) -> tuple[Any, Any]:
        def enter(module: nn.Module, args: Any) -> None:
            if threading.get_ident() != self._thread:
                return
            self._running.append(name)
            if is_embedding:
                if name in self._looked_up:
                    self._run += 1
                    self._counts.clear()
                    self._looked_up.clear()
                self._looked_up.add(name)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            # A hook of somebody else may have raised before `enter`.
            if threading.get_ident() == self._thread and name in self._running:
                while self._running.pop() != name:
                    pass

        return enter, leave

    def listen(self, implementation: str, problem: AttentionProblem | CacheProblem) -> None:
        """Called by `fastattn.dispatch` for everything that is attended."""
        if threading.get_ident() != self._thread or torch.compiler.is_compiling():
            return
        module = self._running[-1] if self._running else ""
        kind = self._kind_of(module, problem)
        layer = self._counts[kind]
        self._counts[kind] += 1
        wanted = self._kind in (None, kind) and (self._layers is None or layer in self._layers)
        packed = isinstance(problem, AttentionProblem) and problem.packed is not None
        problems = _sequences(problem, self._sequences) if wanted else {}
        call = AttentionCall(kind, layer, self._run, module, implementation, problems, packed)
        self.record.calls.append(call)

    def _kind_of(self, name: str, problem: AttentionProblem | CacheProblem) -> str:
        parts = name.split(".")
        if any(_CROSS.search(part) for part in parts):
            return "cross"
        if isinstance(problem, CacheProblem) and problem.k is None:
            return "cross"
        if self._two_stacks:
            for part in parts:  # the outermost: a decoder may have an "encoder" of layers
                for stack in ("encoder", "decoder"):
                    if part.startswith(stack):
                        return stack
        return "self"


def _is_encoder_decoder(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    found = getattr(model, "is_encoder_decoder", getattr(config, "is_encoder_decoder", False))
    return bool(found)


def _sequences(
    problem: AttentionProblem | CacheProblem, wanted: Sequence[int] | None
) -> dict[int, AttentionProblem]:
    """Problems of single sequences, on copies: buffers are written again, caches grow."""
    with torch.no_grad():
        if isinstance(problem, CacheProblem):
            return _rows_of_cache(problem, wanted)
        seqlen_q, seqlen_k = problem.frame_seqlens
        if problem.packed is None:
            slices = [(slice(seqlen_q), slice(seqlen_k))] * problem.num_sequences
        else:
            slices = problem.packed.slices()
        found = {}
        for index, (rows, keys) in enumerate(slices):
            if wanted is not None and index not in wanted:
                continue
            if problem.packed is not None:
                one = problem.sequence(index, rows, keys)
                found[index] = _copied(one, one.q, one.k)
            else:
                batch = slice(index, index + 1)
                mask, bias = problem.mask, problem.bias
                found[index] = _copied(
                    problem,
                    problem.q[batch],
                    problem.k[batch],
                    mask=None if mask is None else mask.at(index, seqlen_q, seqlen_k),
                    bias=None if bias is None else bias.at(index, seqlen_q, seqlen_k),
                )
        return found


def _rows_of_cache(
    problem: CacheProblem, wanted: Sequence[int] | None
) -> dict[int, AttentionProblem]:
    """Rows of a cache with the tokens that the call is about to append."""
    problem = cache_storage.rotate(problem)
    assert problem.q is not None  # only what is attended is listened to
    found = {}
    for index, held in enumerate(problem.cache.lengths()):
        if wanted is not None and index not in wanted:
            continue
        k, _ = cache_storage.gather(problem.cache, index, held, problem.q.dtype)
        if problem.k is not None:
            k = torch.cat((k, problem.k[index]))
        row = problem.row(index, k.shape[0], k, k)
        found[index] = _copied(row, row.q, row.k)
    return found


def _copied(problem: AttentionProblem, q: Tensor, k: Tensor, **changes: Any) -> AttentionProblem:
    """The problem with copies of its queries and keys; values and dropout do not matter."""
    k = k.detach().clone()
    given = {"mask": problem.mask, "bias": problem.bias, **changes}
    return AttentionProblem(
        q=q.detach().clone(),
        k=k,
        v=k,
        packed=None,
        softmax_scale=problem.softmax_scale,
        softcap=problem.softcap,
        sinks=problem.sinks,
        dropout=None,
        return_lse=False,
        **given,
    )
