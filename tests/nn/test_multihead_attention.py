"""MultiheadAttention against torch's own module, in everything that a caller can see."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastattn.nn import MultiheadAttention
from fastattn.testing import assert_parity
from tests.nn.multihead_cases import Arguments, check_parity, plain, stock_of

# ---- any arguments


@st.composite
def arguments(draw: Callable[..., Any]) -> Arguments:
    same = draw(st.sampled_from(["all", "keys", "none"]))
    seqlen_q = draw(st.integers(1, 9))
    seqlen_k = seqlen_q if same == "all" else draw(st.integers(1, 9))
    dims: tuple[int | None, int | None] = (None, None)
    if same == "keys":
        dims = draw(st.sampled_from([(None, None), (6, 6)]))
    elif same == "none":
        dims = draw(st.sampled_from([(None, None), (6, None), (None, 10), (6, 10)]))
    attn_mask = draw(
        st.sampled_from(
            [None, "2-D bool", "2-D float", "3-D bool", "3-D float", "causal bool", "causal float"]
        )
    )
    causal = attn_mask is not None and attn_mask.startswith("causal")
    flags = ["bias", "add_bias_kv", "add_zero_attn", "batch_first"]
    return Arguments(
        seed=draw(st.integers(0, 2**16)),
        batch=draw(st.sampled_from([None, 1, 2, 3])),
        seqlens=(seqlen_q, seqlen_k),
        num_heads=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([2, 4, 8])),
        options={name: draw(st.booleans()) for name in flags},
        dims=dims,
        same=same,
        attn_mask=attn_mask,
        padding=draw(st.sampled_from([None, "bool", "float"])),
        need_weights=draw(st.booleans()),
        average=draw(st.booleans()),
        is_causal=causal and draw(st.booleans()),
        training=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
    )


@settings(
    max_examples=400, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(arguments())
def test_any_arguments(case: Arguments) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
        try:
            check_parity(case.module(), partial(case.calls, 8), case.dtype)
        except AssertionError:  # eight inputs may be those on which torch does uncommonly well
            check_parity(case.module(), partial(case.calls, 64), case.dtype)


# ---- through the kernels

KERNEL_CASES = {
    "causal by hint, fewer keys, padding": plain(
        batch=1, seqlens=(90, 70), num_heads=2, head_dim=16, same="none", attn_mask="causal float",
        padding="bool", is_causal=True, training=True,
    ),
    "causal by hint, more keys, weights": plain(
        batch=1, seqlens=(66, 100), num_heads=2, head_dim=16, same="keys", attn_mask="causal bool",
        padding="float", is_causal=True, need_weights=True, average=False,
    ),
    "3-D mask, added keys, averaged weights": plain(
        batch=1, seqlens=(70, 90), num_heads=2, head_dim=16, same="none", dims=(12, 20),
        attn_mask="3-D float", padding="bool", need_weights=True,
        options={"add_bias_kv": True, "add_zero_attn": True, "batch_first": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_through_the_kernels(name: str, device: str) -> None:
    case = KERNEL_CASES[name]
    module = case.module(device)
    module.impl = "triton"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
        check_parity(module, partial(case.calls, 1), case.dtype)


def test_weights_of_the_kernel(device: str) -> None:
    """Without a gradient to take, the weights are the kernel's too."""
    module = plain(num_heads=2, head_dim=16).module(device)
    module.impl = "triton"

    def call(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        x = torch.randn(1, 70, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        with torch.no_grad():
            return dict(zip(("out", "weights"), module(x, x[:, :66], x[:, :66]), strict=True))

    check_parity(module, call, torch.float32)


# ---- what differs from torch


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("where", ["attn_mask", "key_padding_mask"])
def test_rows_that_see_nothing(where: str, kind: str, training: bool) -> None:
    module = plain(training=training).module()
    stock = stock_of(module, torch.float32)
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hidden = torch.zeros((6, 6) if where == "attn_mask" else (2, 6), dtype=torch.bool)
    hidden[1] = True  # one row of queries, or all those of one sequence
    mask = hidden
    if kind == "float":
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    empty = (slice(None), 1) if where == "attn_mask" else (1,)
    for average in (False, True):
        out, weights = module(x, x, x, average_attn_weights=average, **{where: mask})
        fast, _ = module(x, x, x, need_weights=False, **{where: mask})
        rows = weights.transpose(1, 2) if not average else weights
        assert torch.equal(rows[empty], torch.zeros_like(rows[empty]))
        for result in (out, fast):
            assert torch.equal(result[empty], module.out_proj.bias.expand_as(result[empty]))
        (out.sum() + fast.sum() + weights.square().sum()).backward()
        for leaf in (x, *module.parameters()):
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()
        theirs, theirs_weights = stock(x, x, x, average_attn_weights=average, **{where: mask})
        assert theirs[empty].isnan().all()  # what is documented about torch
        seen = ~theirs.isnan()
        exact = stock.double()(
            x.double(),
            x.double(),
            x.double(),
            average_attn_weights=average,
            **{where: mask if kind == "bool" else mask.double()},
        )
        stock.float()
        assert_parity(out[seen], theirs[seen], exact[0][seen])
        assert_parity(
            weights.masked_fill(theirs_weights.isnan(), 0.0),
            theirs_weights.nan_to_num(),
            exact[1].nan_to_num(),
        )


def test_the_hint_is_taken_in_place_of_the_mask() -> None:
    """What is_causal promises is not read: a mask of NaN changes nothing."""
    module = plain().module()
    x = torch.randn(2, 6, 32)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    for options in ({"need_weights": False}, {}, {"key_padding_mask": padding}):
        wanted = module(x, x, x, attn_mask=causal, is_causal=True, **options)
        unread = module(x, x, x, attn_mask=torch.full((6, 6), torch.nan), is_causal=True, **options)
        assert torch.equal(wanted[0], unread[0])
        if wanted[1] is not None:
            assert torch.equal(wanted[1], unread[1])
    with pytest.raises(RuntimeError, match="attn_mask must be given where is_causal"):
        module(x, x, x, is_causal=True, need_weights=False)
    with pytest.raises(RuntimeError, match=r"[Nn]eed attn_mask"):
        stock_of(module, torch.float32)(x, x, x, is_causal=True, need_weights=False)


# ---- dropout


def test_returned_weights_are_those_that_were_applied() -> None:
    module = plain(training=True).module()
    module.dropout = 0.4
    x = torch.randn(3, 20, 32)
    torch.manual_seed(1)
    out, weights = module(x, x, x, average_attn_weights=False)
    torch.manual_seed(1)
    _, mean = module(x, x, x)
    assert torch.equal(mean, weights.mean(1))
    dropped = (weights == 0).double().mean().item()
    assert abs(dropped - 0.4) < 5 * (0.4 * 0.6 / weights.numel()) ** 0.5

    def value_heads(dtype: torch.dtype) -> Tensor:
        projected = nn.functional.linear(
            x.to(dtype), module.in_proj_weight[64:].to(dtype), module.in_proj_bias[64:].to(dtype)
        )
        return projected.unflatten(-1, (4, 8)).transpose(1, 2)

    results = []
    for dtype in (torch.float32, torch.float64):
        heads = (weights.to(dtype) @ value_heads(dtype)).transpose(1, 2).flatten(-2)
        results.append(
            nn.functional.linear(
                heads, module.out_proj.weight.to(dtype), module.out_proj.bias.to(dtype)
            )
        )
    assert_parity(out, *results)
    undropped = weights.where(weights > 0, 1.0) * 0.6
    module.eval()
    _, whole = module(x, x, x, average_attn_weights=False)
    assert_parity(undropped.where(weights > 0, whole), whole, whole.double())


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_only_in_training(need_weights: bool) -> None:
    module = MultiheadAttention(32, 4, dropout=0.5, bias=False, batch_first=True)
    x = torch.randn(64, 1, 32)
    with torch.no_grad():  # of a single key, each head gives its value, whole
        module.out_proj.weight.copy_(torch.eye(32))
        whole = module.eval()(x, x, x, need_weights=need_weights)[0].unflatten(-1, (4, 8))
        half = module.train()(x, x, x, need_weights=need_weights)[0].unflatten(-1, (4, 8))
    kept = (half != 0).any(-1, keepdim=True)
    torch.testing.assert_close(half, torch.where(kept, 2 * whole, 0.0))
    assert abs(kept.double().mean().item() - 0.5) < 5 * (0.25 / kept.numel()) ** 0.5
    value = x @ module.in_proj_weight[64:].T
    torch.testing.assert_close(whole.flatten(-2), value)


@pytest.mark.parametrize("need_weights", [False, True])
def test_all_dropped(need_weights: bool) -> None:
    module = plain(training=True).module()
    module.dropout = 1.0
    x = torch.randn(2, 6, 32)
    results = module(x, x, x, need_weights=need_weights)
    theirs = stock_of(module, torch.float32)(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(results, theirs, rtol=0, atol=0)


# ---- as an object


@pytest.mark.parametrize(
    "options", [{}, {"kdim": 6, "vdim": 10, "add_bias_kv": True}, {"bias": False}]
)
def test_parameters_are_those_of_torch(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    mine = MultiheadAttention(32, 4, dtype=torch.float64, device="cpu", **options)
    torch.manual_seed(3)
    stock = nn.MultiheadAttention(32, 4, dtype=torch.float64, device="cpu", **options)
    assert isinstance(mine, nn.MultiheadAttention)
    assert repr(mine) == repr(stock)
    assert list(mine.state_dict()) == list(stock.state_dict())
    for name, tensor in stock.state_dict().items():
        assert torch.equal(mine.state_dict()[name], tensor), name  # and the same initialization
    other = nn.MultiheadAttention(32, 4, dtype=torch.float64, **options)
    mine.load_state_dict(other.state_dict(), strict=True)
    stock.load_state_dict(mine.state_dict(), strict=True)
    for name, tensor in other.state_dict().items():
        assert torch.equal(stock.state_dict()[name], tensor), name
    on_meta = MultiheadAttention(32, 4, device="meta", **options)
    assert all(parameter.is_meta for parameter in on_meta.parameters())


def test_from_torch_shares_everything() -> None:
    stock = nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True, add_bias_kv=True).eval()
    stock.in_proj_weight.requires_grad_(False)
    heard: list[str] = []
    handle = stock.register_forward_hook(lambda *args: heard.append("after"))
    before = dict(stock.named_parameters())
    mine = MultiheadAttention.from_torch(stock)
    assert type(mine) is MultiheadAttention
    assert {name: id(p) for name, p in mine.named_parameters()} == {
        name: id(p) for name, p in before.items()
    }
    assert not mine.training
    assert mine.dropout == 0.1
    assert len(stock._forward_pre_hooks) == 0  # it is as fast as before when it is put back
    x = torch.randn(2, 6, 32)
    mine(x, x, x)
    assert heard == ["after"]
    handle.remove()
    mine(x, x, x)
    assert heard == ["after"]
    replaced = {name: torch.randn_like(tensor) for name, tensor in stock.state_dict().items()}
    mine.load_state_dict(replaced, assign=True)
    assert torch.equal(stock.in_proj_bias, replaced["in_proj_bias"])
    assert MultiheadAttention.from_torch(mine) is mine


def test_what_from_torch_refuses() -> None:
    class Other(nn.MultiheadAttention):
        pass

    with pytest.raises(TypeError, match=r"torch.nn.MultiheadAttention itself, got .*Other"):
        MultiheadAttention.from_torch(Other(8, 2))
    with pytest.raises(TypeError, match=r"got torch\.nn\.modules\.linear\.Linear"):
        MultiheadAttention.from_torch(nn.Linear(2, 2))  # type: ignore[arg-type]
    patched = nn.MultiheadAttention(8, 2)
    patched.forward = patched.forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="forward of its own"):
        MultiheadAttention.from_torch(patched)
    compiled = nn.MultiheadAttention(8, 2)
    compiled.compile()
    with pytest.raises(ValueError, match=r"compile\(\)"):
        MultiheadAttention.from_torch(compiled)
    with pytest.raises(ValueError, match="head_dim must be 1 to 256, got 512"):
        MultiheadAttention.from_torch(nn.MultiheadAttention(512, 1))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim must be 1 to 256, got 260"):
        MultiheadAttention(260, 1)
    module = plain().module()
    x = torch.randn(2, 6, 32)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    for error, message, arguments in [
        (TypeError, r"attn_mask must be bool .* int64", {"attn_mask": mask.long()}),
        (ValueError, r"attn_mask .* or \(8, 6, 6\), got \(5, 6\)", {"attn_mask": mask[:5]}),
        (ValueError, r"key_padding_mask .* \(2, 6\), got \(6, 6\)", {"key_padding_mask": mask}),
        (ValueError, "query must have 32 features", {"query": x[..., :16]}),
        (ValueError, "key must have 3 dimensions", {"key": x[0]}),
        (ValueError, "value must agree with key", {"value": x[:, :5]}),
        (ValueError, "key must have the batch size of query, 2", {"key": x[:1], "value": x[:1]}),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            module(**{"query": x, "key": x, "value": x, **arguments})
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        module(x, x, x, attn_mask=mask, key_padding_mask=torch.zeros(2, 6))


def test_results_have_torchs_shapes_and_strides() -> None:
    for batch_first in (False, True):
        module = plain(options={"batch_first": batch_first}).module()
        x = torch.randn(3, 5, 32)
        out, _ = module(x, x, x)
        assert (
            out.is_contiguous()
        )  # with batch_first=False torch's is too, and callers may use view


def test_copies_compute_the_same() -> None:
    module = plain(training=True).module()
    x = torch.randn(2, 6, 32)
    wanted = module(x, x, x)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), saved):
        assert type(other) is MultiheadAttention
        assert other.in_proj_weight is not module.in_proj_weight
        assert len(other._forward_pre_hooks) == 1
        torch.testing.assert_close(other(x, x, x), wanted, rtol=0, atol=0)


AS_A_GRAPH = {
    "plain": {},
    "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(6), "is_causal": True},
    "masks": {
        "attn_mask": torch.arange(6) > torch.arange(6)[:, None] + 2,
        "key_padding_mask": torch.tensor([[0.0] * 6, [0.0] * 4 + [-torch.inf] * 2]),
        "average_attn_weights": False,
    },
}


@pytest.mark.parametrize("name", AS_A_GRAPH)
def test_compile(name: str) -> None:
    """As one graph, with gradients."""
    module, x = plain(training=True).module(), torch.randn(2, 6, 32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for need_weights in (False, True):
        kwargs = {**AS_A_GRAPH[name], "need_weights": need_weights}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = [run(x, x, x, **kwargs) for run in (compiled, module)]
        gradients = [
            torch.autograd.grad(r[0].square().sum(), module.in_proj_weight) for r in results
        ]
        exact_module = copy.deepcopy(module).double()
        wide = {
            key: value.double()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for key, value in kwargs.items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exact = exact_module(x.double(), x.double(), x.double(), **wide)
        (exact_gradient,) = torch.autograd.grad(
            exact[0].square().sum(), exact_module.in_proj_weight
        )
        assert_parity(results[0][0], results[1][0], exact[0])
        assert_parity(gradients[0][0], gradients[1][0], exact_gradient)
        if need_weights:
            assert_parity(results[0][1], results[1][1], exact[1])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", AS_A_GRAPH)
def test_export(name: str, strict: bool) -> None:
    module, x = plain().module(), torch.randn(2, 6, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, (x, x, x), AS_A_GRAPH[name], strict=strict)
        other = torch.randn(2, 6, 32)
        results = exported.module()(other, other, other, **AS_A_GRAPH[name])
        wanted = module(other, other, other, **AS_A_GRAPH[name])
    torch.testing.assert_close(results, wanted)


@pytest.mark.parametrize("training", [False, True])
def test_autocast(training: bool) -> None:
    module = plain(training=training).module()
    stock = stock_of(module, torch.float32)
    x = torch.randn(2, 6, 32)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.autocast("cpu", torch.bfloat16):
        results = module(x, x, x, key_padding_mask=padding)
        theirs = stock(x, x, x, key_padding_mask=padding)
    exact = stock.double()(x.double(), x.double(), x.double(), key_padding_mask=padding)
    for mine, plain_torch, truth in zip(results, theirs, exact, strict=True):
        assert mine.dtype == plain_torch.dtype == torch.bfloat16
        assert_parity(mine, plain_torch, truth)
