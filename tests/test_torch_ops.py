"""The `fastattn::` operators as torch sees them: schemas, fakes, torch.compile and torch.export."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import fastattn
from fastattn import ALiBi, Lengths, Packed, T5Bias, Window, alibi_slopes, torch_ops
from fastattn.problem import make_problem
from fastattn.testing import make_qkv
from fastattn.testing.features import FEATURES, Feature
from fastattn.testing.inputs import make_packed_qkv

ROWS = {
    row.name: row
    for row in FEATURES
    if row.name
    in {"causal, seqlen_q > seqlen_k", "Lengths with seqlens_q", "Packed", "everything", "no keys"}
}


def operator_arguments(feature: Feature, device: str) -> tuple[Any, ...]:
    """The flat arguments that a row's call gives to `fastattn::attention_forward`."""
    case = feature.case(torch.float16, device)
    problem = make_problem(case.q, case.k, case.v, return_lse=True, **case.kwargs)
    return (problem.q, problem.k, problem.v, True, True, *torch_ops.flat_modifiers(problem))


@pytest.mark.parametrize("name", ROWS)
def test_opcheck_of_the_forward(name: str, device: str) -> None:
    opcheck(torch.ops.fastattn.attention_forward.default, operator_arguments(ROWS[name], device))


@pytest.mark.parametrize("average", [False, True], ids=["per head", "averaged"])
@pytest.mark.parametrize("name", ["Packed", "Lengths with seqlens_q"])
def test_opcheck_of_the_weights(name: str, average: bool, device: str) -> None:
    q, k, v, _, _, *modifiers = operator_arguments(ROWS[name], device)
    _, lse, _ = torch.ops.fastattn.attention_forward(q, k, v, True, False, *modifiers)
    heads, rows = torch.tensor([1], device=device), torch.tensor([0, 9, 3], device=device)
    opcheck(
        torch.ops.fastattn.attention_weights.default,
        (q, k, lse, heads, rows, average, *modifiers),
    )


@pytest.mark.parametrize("flags", [(False, False), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_fakes_have_the_shapes_of_the_real_ones(
    name: str, flags: tuple[bool, bool], device: str
) -> None:
    arguments = list(operator_arguments(ROWS[name], device))
    arguments[3:5] = flags
    real = torch.ops.fastattn.attention_forward(*arguments)
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments]
        fake = torch.ops.fastattn.attention_forward(*given)
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_outputs_are_contiguous_whatever_the_strides(device: str) -> None:
    case = next(row for row in FEATURES if row.layout == "gaps").case(torch.float32, device)
    out, lse = fastattn.attention(case.q, case.k, case.v, return_lse=True, impl="triton")
    assert out.is_contiguous()
    assert lse.is_contiguous()


# torch.compile and torch.export. Each block sees masks and biases being made inside of the graph.


def causal_block(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = fastattn.attention(q * 2, k, v, causal=True, return_lse=True, impl="triton")
    return out + 1, lse


def padded_block(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor) -> Tensor:
    return fastattn.attention(
        q,
        k,
        v,
        mask=Lengths(lengths) & Window(40, 40),
        bias=T5Bias(table) + ALiBi(alibi_slopes(4, q.device)),
        softcap=3.0,
        impl="triton",
    ).sin()


def packed_block(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, mask: Tensor) -> Tensor:
    packed = Packed(cu_seqlens, max_seqlen_q=70)
    return fastattn.attention(q, k, v, mask=packed & mask, causal=True, impl="triton").cos()


def weights_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    _, lse = fastattn.attention(q, k, v, return_lse=True, impl="triton")
    return fastattn.attention_weights(q, k, lse, rows=[0, 5], average_heads=True, impl="triton") * 2


def block_arguments(block: Callable[..., Any], device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    q, k, v = make_qkv(2, 70, 70, 4, 2, 16, device=device)
    if block is padded_block:
        table = torch.randn(8, 4, generator=generator).to(device)
        return q, k, v, torch.tensor([70, 33], device=device), table
    if block is packed_block:
        packed = make_packed_qkv([70, 20], [70, 20], 4, 2, 16, device=device)
        mask = (torch.rand(1, 1, 70, 70, generator=generator) < 0.8).to(device)
        return *packed, torch.tensor([0, 70, 90], device=device), mask
    return q, k, v


# Inductor needs a C++ compiler for what stands around a kernel on the CPU.
CODE_BACKEND = "inductor" if shutil.which(os.environ.get("CXX", "g++")) else "aot_eager"
BLOCKS = [causal_block, padded_block, packed_block, weights_block]


def assert_equal(actual: Any, wanted: Any) -> None:
    actual, wanted = (x if isinstance(x, tuple) else (x,) for x in (actual, wanted))
    for one, other in zip(actual, wanted, strict=True):
        # The same kernel on the same inputs; what stands around it is compiled anew.
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_compile_without_graph_breaks(block: Callable[..., Any], device: str) -> None:
    torch._dynamo.reset()
    arguments = block_arguments(block, device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*arguments), block(*arguments))


def test_compile_to_code(device: str) -> None:
    torch._dynamo.reset()
    arguments = block_arguments(causal_block, device)
    compiled = torch.compile(causal_block, fullgraph=True, backend=CODE_BACKEND)
    assert_equal(compiled(*arguments), causal_block(*arguments))


@pytest.mark.parametrize(
    "modifiers",
    [
        lambda lengths, mask, bias: {"mask": Lengths(lengths) & mask},
        lambda lengths, mask, bias: {"mask": mask & Window(5, 5)},
        lambda lengths, mask, bias: {"bias": ALiBi(bias[:, 0, 0]) + bias},
        lambda lengths, mask, bias: {"bias": bias + ALiBi(bias[:, 0, 0])},
    ],
    ids=["Lengths & tensor", "tensor & Window", "ALiBi + tensor", "tensor + ALiBi"],
)
def test_compile_of_values_joined_with_tensors(modifiers: Callable[..., dict[str, Any]]) -> None:
    """torch.compile takes `mask & tensor` for an operation of the graph at first."""
    torch._dynamo.reset()

    def block(q: Tensor, lengths: Tensor, mask: Tensor, bias: Tensor) -> Any:
        return fastattn.attention(q, q, q, **modifiers(lengths, mask, bias), impl="reference")

    q, k, _ = make_qkv(2, 30, 30, 4, head_dim=30)
    arguments = (q, torch.tensor([30, 11]), k[0, :, 0] > 0, k[0].transpose(0, 1))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*arguments), block(*arguments))


def test_compile_once_for_all_lengths(device: str) -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(causal_block, fullgraph=True, dynamic=True, backend=count)
    for seqlen_q, seqlen_k in ((70, 60), (33, 80), (5, 129)):
        q, k, v = make_qkv(2, seqlen_q, seqlen_k, 2, head_dim=16, device=device)
        assert_equal(compiled(q, k, v), causal_block(q, k, v))
    assert graphs == 1


class Attend(torch.nn.Module):
    """A block as a module, which is what torch.export takes."""

    def __init__(self, block: Callable[..., Any]) -> None:
        super().__init__()
        self.block = block

    def forward(self, *arguments: Tensor) -> Any:
        """The block."""
        return self.block(*arguments)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_export(block: Callable[..., Any], device: str) -> None:
    arguments = block_arguments(block, device)
    program = torch.export.export(Attend(block), arguments)
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "fastattn.attention_forward.default" in operators
    assert_equal(program.module()(*arguments), block(*arguments))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compile_of_the_torch_implementations(impl: str) -> None:
    torch._dynamo.reset()
    q, k, v = make_qkv(2, 30, 30, 2, head_dim=16)

    def block(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Any:
        return fastattn.attention(q, k, v, mask=Lengths(lengths), causal=True, impl=impl)

    lengths = torch.tensor([30, 11])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(q, k, v, lengths), block(q, k, v, lengths))
