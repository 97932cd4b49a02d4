"""The backward pass as torch sees it: operators, torch.compile, checkpointing, autocast, refusals.

What the gradients are worth is in `test_gradients.py` and `test_parity.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import ALiBi, Lengths, T5Bias, alibi_slopes, torch_ops
from fastattn.problem import AttentionProblem, make_problem
from fastattn.testing import make_qkv
from fastattn.testing.features import FEATURES

ROWS = {
    row.name: row
    for row in FEATURES
    if row.name in {"everything", "everything, packed", "dropout", "bias, broadcast over rows"}
}


def problem_of(name: str, device: str) -> AttentionProblem:
    """A row's problem, every tensor of it a leaf that requires a gradient."""
    case = ROWS[name].case(torch.float32, device)
    case = case.with_tensors(lambda name, tensor: tensor.detach().requires_grad_())
    return make_problem(case.q, case.k, case.v, return_lse=True, **case.kwargs)


def forward_arguments(problem: AttentionProblem) -> tuple[Any, ...]:
    return (problem.q, problem.k, problem.v, True, True, *torch_ops.flat_modifiers(problem))


def backward_arguments(problem: AttentionProblem, needed: list[bool]) -> tuple[Any, ...]:
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in forward_arguments(problem)]
    q, k, v, _, _, *modifiers = arguments
    out, lse, stats = torch.ops.fastattn.attention_forward(*arguments)
    present = (True, True, True, *(x is not None for x in map(modifiers.__getitem__, DIFFERENT)))
    needed = [need and there for need, there in zip(needed, present, strict=True)]
    dlse = torch.ones_like(lse)
    return (torch.ones_like(out), dlse, q, k, v, out, stats, needed, *modifiers)


DIFFERENT = [torch_ops.NAMES.index(name) for name in ("bias", "relative_bias", "sinks")]
NEEDS = {"all": [True] * 6, "dv": [False, False, True, False, False, False]}


@pytest.mark.parametrize("name", ROWS)
def test_opcheck_of_the_forward_in_training(name: str, device: str) -> None:
    opcheck(
        torch.ops.fastattn.attention_forward.default, forward_arguments(problem_of(name, device))
    )


@pytest.mark.parametrize("needed", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("name", ROWS)
def test_opcheck_of_the_backward(name: str, needed: list[bool], device: str) -> None:
    opcheck(
        torch.ops.fastattn.attention_backward.default,
        backward_arguments(problem_of(name, device), needed),
    )


@pytest.mark.parametrize("name", ROWS)
def test_fakes_of_the_backward_are_like_the_real_ones(name: str, device: str) -> None:
    arguments = backward_arguments(problem_of(name, device), NEEDS["all"])
    real = torch.ops.fastattn.attention_backward(*arguments)
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments]
        fake = torch.ops.fastattn.attention_backward(*given)
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_an_operator_that_saved_nothing_says_so(device: str) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 5, 5, 1, head_dim=16, device=device))
    modifiers = torch_ops.flat_modifiers(make_problem(q, k, v))
    out, _, _ = torch.ops.fastattn.attention_forward(q, k, v, False, False, *modifiers)
    with pytest.raises(RuntimeError, match="save_softmax=True"):
        out.sum().backward()


# A training step: compiled, checkpointed, under autocast.


def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor, sinks: Tensor, p: float) -> Tensor:
    """Attention with a bias that is made inside of the graph, and dropout."""
    bias = T5Bias(table, max_distance=20) + ALiBi(alibi_slopes(4, q.device))
    out = fastattn.attention(
        q * 2, k, v, causal=True, bias=bias, sinks=sinks, dropout_p=p, impl="triton"
    )
    assert isinstance(out, Tensor)
    return out.sin()


def leaves(device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(8, 4, generator=generator).to(device)
    sinks = torch.randn(4, generator=generator).to(device)
    tensors = (*make_qkv(2, 70, 70, 4, 2, 16, device=device), table, sinks)
    return tuple(tensor.requires_grad_() for tensor in tensors)


def gradients(function: Callable[..., Tensor], device: str, p: float) -> tuple[Tensor, ...]:
    """The output and gradients of a step from fixed leaves and a fixed state of the generator."""
    tensors = leaves(device)
    torch.manual_seed(0)
    out = function(*tensors, p)
    return out.detach(), *torch.autograd.grad(out.square().sum(), tensors)


def assert_same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)
    assert all(tensor.isfinite().all() and tensor.count_nonzero() for tensor in one)


@pytest.mark.parametrize("p", [0.0, 0.2], ids=["", "dropout"])
def test_compile_of_a_training_step(p: float, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, device, p), gradients(attend, device, p))


def test_checkpointing_draws_the_same_dropout_again(device: str) -> None:
    def checkpointed(*arguments: Any) -> Tensor:
        out = checkpoint(attend, *arguments, use_reentrant=False)
        assert isinstance(out, Tensor)
        return out

    plain, again = gradients(attend, device, 0.3), gradients(checkpointed, device, 0.3)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_dropout_with_a_seed_leaves_torchs_generator_alone(device: str) -> None:
    q, k, v = make_qkv(1, 5, 5, 1, head_dim=16, device=device)
    before = torch.get_rng_state()
    seed = torch.tensor([3], device=device)
    fastattn.attention(q, k, v, dropout_p=0.5, dropout_seed=seed, impl="triton")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", ["triton", "auto", "reference"])
def test_autocast_casts_as_torchs_attention_does(
    impl: str, dtype: torch.dtype, device: str
) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 40, 40, 2, head_dim=16, device=device))
    half = v.detach().to(dtype)  # torch casts whatever is not of the dtype yet
    with torch.autocast(device, dtype=dtype):
        out = fastattn.attention(q, k, half, causal=True, impl=impl)
        wanted = scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, half)), is_causal=True
        )
        in_double = fastattn.attention(q.double(), k.double(), v.double(), impl="reference")
    assert isinstance(out, Tensor) and isinstance(in_double, Tensor)
    assert out.dtype == wanted.dtype == dtype
    assert in_double.dtype == torch.float64
    gradient, _ = torch.autograd.grad(out.float().square().sum(), (q, k))
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all() and gradient.count_nonzero()


# Only what is needed.


def spying(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backward walks that are launched from now on, with what they write."""
    from fastattn.kernels.attention import backward

    seen: list[str] = []

    def spy(name: str) -> None:
        launch = getattr(backward, name)

        def spied(*args: Any, **kwargs: Any) -> Any:
            outputs = [k for k, x in kwargs.items() if isinstance(x, Tensor)]
            seen.append(f"{name.removeprefix('launch_backward_')}: {', '.join(outputs)}")
            return launch(*args, **kwargs)

        monkeypatch.setattr(backward, name, spied)

    for name in ("launch_backward_rows", "launch_backward_keys", "launch_backward_bias"):
        spy(name)
    return seen


@pytest.mark.parametrize(
    ("trained", "walks"),
    [
        ("q", ["rows: dq"]),
        ("k", ["keys: dk"]),
        ("v", ["keys: dv"]),
        ("qv", ["rows: dq", "keys: dv"]),
        ("qkv", ["rows: dq", "keys: dk, dv"]),
        ("t", ["rows: by_distance"]),
        ("b", ["bias: dbias"]),
        ("s", []),
    ],
)
def test_what_is_frozen_costs_nothing(
    trained: str, walks: list[str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spying(monkeypatch)
    q, k, v = make_qkv(2, 70, 70, 2, head_dim=16, device=device)
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "t": torch.zeros(8, 2, device=device),
        "b": torch.zeros(2, 70, 70, device=device),
        "s": torch.zeros(2, device=device),
    }
    for name in trained:
        tensors[name].requires_grad_()
    bias = T5Bias(tensors["t"], max_distance=20) + tensors["b"]
    out = fastattn.attention(q, k, v, bias=bias, sinks=tensors["s"], impl="triton")
    assert isinstance(out, Tensor)
    out.square().sum().backward()
    assert seen == walks
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) == (name in trained)


@pytest.mark.parametrize(
    ("shape", "walks"),
    [
        ((2, 4, 70, 90), ["rows: dbias"]),
        ((1, 4, 70, 90), ["bias: dbias"]),
        ((2, 1, 70, 90), ["bias: dbias"]),
        ((2, 4, 1, 90), ["keys: col_sums"]),
        ((4, 1, 90), ["keys: col_sums"]),
        ((2, 1, 70, 1), ["rows: row_sums"]),
        ((4, 1, 1), ["rows: row_sums"]),
    ],
    ids=str,
)
def test_the_walk_that_adds_up_a_dense_bias(
    shape: tuple[int, ...], walks: list[str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spying(monkeypatch)
    q, k, v = make_qkv(2, 70, 90, 4, 2, 16, device=device)
    bias = torch.zeros(shape, device=device, requires_grad=True)
    mask = Lengths(torch.tensor([90, 40], device=device))
    out = fastattn.attention(q, k, v, bias=bias, mask=mask, impl="triton")
    assert isinstance(out, Tensor)
    out.square().sum().backward()
    assert seen == walks


def test_no_graph_is_kept_without_gradients(device: str) -> None:
    tensors = leaves(device)
    with torch.no_grad():
        assert not attend(*tensors, 0.0).requires_grad
    q, k, v = (tensor.detach() for tensor in tensors[:3])
    out = fastattn.attention(q, k, v, impl="triton")
    assert isinstance(out, Tensor)
    assert not out.requires_grad


def test_a_gradient_has_the_layout_of_its_tensor(device: str) -> None:
    q, k, v = make_qkv(2, 40, 40, 2, head_dim=16, device=device)
    q = q.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    out = fastattn.attention(q, k, v, impl="triton")
    assert isinstance(out, Tensor)
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient.stride() == q.stride()


# What the kernels have no derivative for: refused by name, served by plain torch.


def test_double_backward_is_refused_and_plain_torch_has_it(device: str) -> None:
    def second(impl: str) -> Tensor:
        q, k, v = (x.requires_grad_() for x in make_qkv(1, 9, 9, 1, head_dim=16, device=device))
        out = fastattn.attention(q, k, v, causal=True, impl=impl)
        assert isinstance(out, Tensor)
        (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), k)[0]

    with pytest.raises(NotImplementedError, match=r'double backward.*impl="reference"'):
        second("triton")
    assert second("reference").count_nonzero()


@pytest.fixture
def tangent() -> Iterator[Callable[[Tensor], Tensor]]:
    with forward_ad.dual_level():
        yield lambda tensor: forward_ad.make_dual(tensor, torch.ones_like(tensor))


def test_forward_mode_is_refused_and_plain_torch_has_it(
    tangent: Callable[[Tensor], Tensor], device: str
) -> None:
    q, k, v = make_qkv(1, 9, 9, 1, head_dim=16, device=device)
    for impl in ("triton", "sdpa"):
        with pytest.raises(NotImplementedError, match=r'forward-mode[^"]*impl="auto".*"reference"'):
            fastattn.attention(tangent(q), k, v, impl=impl)
    for impl in ("auto", "reference"):
        out = fastattn.attention(tangent(q), k, v, impl=impl)
        assert isinstance(out, Tensor)
        assert forward_ad.unpack_dual(out).tangent.count_nonzero()


def test_function_transforms_are_refused_and_torch_has_them(device: str) -> None:
    q, k, v = make_qkv(1, 9, 9, 1, head_dim=16, device=device)

    def loss(q: Tensor, impl: str) -> Tensor:
        out = fastattn.attention(q, k, v, impl=impl)
        assert isinstance(out, Tensor)
        return out.square().sum()

    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(loss)(q, "triton")
    wanted = torch.func.grad(loss)(q, "reference")
    torch.testing.assert_close(torch.func.grad(loss)(q, "auto"), wanted)


def test_alibi_slopes_that_require_grad_are_refused(device: str) -> None:
    q, k, v = make_qkv(1, 9, 9, 2, head_dim=16, device=device)
    slopes = alibi_slopes(2, device).requires_grad_()
    with pytest.raises(NotImplementedError, match="ALiBi slopes have no gradient"):
        fastattn.attention(q, k, v, bias=ALiBi(slopes) + T5Bias(q.new_zeros(8, 2)), impl="triton")
    out = fastattn.attention(q, k, v, bias=ALiBi(slopes), impl="reference")
    assert isinstance(out, Tensor)
    out.square().sum().backward()
    assert slopes.grad is not None and slopes.grad.count_nonzero()


def test_weights_of_the_kernel_are_for_looking_at(device: str) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 9, 9, 1, head_dim=16, device=device))
    _, lse = fastattn.attention(q, k, v, return_lse=True, impl="triton")
    with pytest.raises(NotImplementedError, match="no_grad"):
        fastattn.attention_weights(q, k, lse, impl="triton")
    with pytest.raises(NotImplementedError, match="no_grad"):
        fastattn.attention_weights(q.detach(), k.detach(), lse, impl="triton")
    with torch.no_grad():
        looked_at = fastattn.attention_weights(q, k, lse, impl="triton")
    assert not looked_at.requires_grad
    weights = fastattn.attention_weights(q, k)
    assert torch.autograd.grad(weights.square().sum(), q)[0].count_nonzero()
