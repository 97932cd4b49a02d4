"""torch's scaled_dot_product_attention, served by fastattn: results, interception, what passes."""

import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as early_bound
from torch.overrides import TorchFunctionMode

import fastattn.integrations.sdpa as shim
from fastattn.testing import assert_parity
from tests.integrations.devices import on

TORCH = torch._C._nn.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shim.reset_calls()
        yield
    assert F.scaled_dot_product_attention is TORCH, "the attribute was not put back"
    assert torch.backends.mha.get_fastpath_enabled()


def operands(shape_q, shape_k, shape_v=None, dtype=torch.float32):
    shape_v = shape_k if shape_v is None else shape_v
    return [torch.randn(shape, dtype=dtype) for shape in (shape_q, shape_k, shape_v)]


def grads(function, tensors, **options):
    """Output and gradients, `options` holding a float mask that wants one too."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options["attn_mask"] = mask.detach().requires_grad_()
        leaves.append(options["attn_mask"])
    out = function(*leaves[:3], **options)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def math_in(dtype):
    """torch's own function by its math backend, with operands in `dtype`."""

    def run(*tensors, **options):
        mask = options.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            options["attn_mask"] = mask.to(dtype)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return TORCH(*(t.to(dtype) for t in tensors), **options)

    return run


def check(tensors, *, impl="auto", device="cpu", **options):
    """Output and gradients by the parity rule; what was called must have been served."""
    dtype = tensors[0].dtype
    with shim.use_impl(impl):
        actual = grads(on(device, shim.scaled_dot_product_attention), tensors, **options)
    assert not shim.calls().passed_on
    baseline = grads(math_in(dtype), tensors, **options)
    exact = grads(math_in(torch.float64), tensors, **options)
    names = ("out", "query.grad", "key.grad", "value.grad", "attn_mask.grad")
    for name, a, b, e in zip(names, actual, baseline, exact, strict=False):
        assert a.shape == b.shape, name
        if (
            dtype == torch.float64
        ):  # the truth itself: equal up to the rounding of a few dozen steps
            assert (a - e).abs().max() <= 100 * torch.finfo(dtype).eps * e.abs().max(), name
        else:
            assert_parity(a, b, e.double(), name=name)
    return actual[0]


SHAPES = {
    "4-D": ((2, 4, 40, 16), (2, 4, 33, 16), (2, 4, 33, 24)),
    "3-D": ((3, 40, 16), (3, 33, 16), None),
    "2-D": ((40, 16), (33, 16), None),
    "5-D": ((2, 3, 4, 40, 16), (2, 3, 4, 33, 16), (2, 3, 4, 33, 8)),
    "one batch of keys": ((3, 4, 40, 16), (1, 4, 33, 16), None),
    "one batch of queries": ((1, 4, 40, 16), (3, 4, 33, 16), None),
    "one head of keys": ((2, 4, 40, 16), (2, 1, 33, 16), None),
    "one head of queries": ((2, 1, 40, 16), (2, 4, 33, 16), None),
    "one head of values": ((2, 4, 40, 16), (2, 4, 33, 16), (2, 1, 33, 16)),
    "keys without a batch": ((2, 4, 40, 16), (4, 33, 16), None),
}


@pytest.mark.parametrize("name", SHAPES)
def test_any_leading_dimensions(name):
    shape_q, shape_k, shape_v = SHAPES[name]
    check(operands(shape_q, shape_k, shape_v))
    check(operands(shape_q, shape_k, shape_v), attn_mask=torch.rand(40, 33) > 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("seqlens", [(8, 8), (5, 9), (9, 5), (2, 6), (6, 2)])
def test_causal_is_aligned_at_the_top_left(seqlens, dtype):
    seqlen_q, seqlen_k = seqlens
    tensors = operands((2, 4, seqlen_q, 16), (2, 4, seqlen_k, 16), dtype=dtype)
    check(tensors, is_causal=True)
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).tril()
    spelled_out = TORCH(*(t.double() for t in tensors), attn_mask=visible)
    out = shim.scaled_dot_product_attention(*tensors, is_causal=True)
    assert (out - spelled_out).abs().max() <= 4 * torch.finfo(dtype).eps * spelled_out.abs().max()


@pytest.mark.parametrize(
    "shape", [(9, 7), (1, 7), (4, 9, 7), (4, 1, 7), (3, 1, 9, 7), (1, 4, 9, 7), (3, 4, 9, 7)]
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(shape, kind):
    mask = torch.rand(shape) > 0.4
    mask[..., 0] = True
    if kind == "float":
        mask = torch.randn(shape).masked_fill(~mask, float("-inf"))
    check(operands((3, 4, 9, 16), (3, 4, 7, 16)), attn_mask=mask)


@pytest.mark.parametrize("shape", [(2, 3, 4, 9, 7), (2, 1, 1, 9, 7), (1, 1, 4, 9, 7), (3, 1, 1, 7)])
def test_masks_of_five_dimensional_operands(shape):
    mask = torch.rand(shape) > 0.4
    mask[..., 0] = True
    tensors = operands((2, 3, 4, 9, 16), (2, 3, 4, 7, 16))
    check(tensors, attn_mask=mask)
    check(tensors, attn_mask=torch.randn(shape))


def test_float_mask_beside_half_precision():
    tensors = operands((2, 4, 9, 16), (2, 4, 7, 16), dtype=torch.bfloat16)
    mask = torch.randn(9, 7)
    out = shim.scaled_dot_product_attention(*tensors, attn_mask=mask)
    exact = math_in(torch.float64)(*tensors, attn_mask=mask)
    assert_parity(out, math_in(torch.bfloat16)(*tensors, attn_mask=mask), exact)


def test_masked_rows_are_zero():
    tensors = operands((2, 4, 9, 16), (2, 4, 7, 16))
    mask = torch.ones(9, 7, dtype=torch.bool)
    mask[3] = False
    for attn_mask in (mask, torch.zeros(9, 7).masked_fill(~mask, float("-inf"))):
        for impl in ("auto", "reference"):
            with shim.use_impl(impl):
                out, *gradients = grads(
                    shim.scaled_dot_product_attention, tensors, attn_mask=attn_mask
                )
            assert (out[:, :, 3] == 0).all()
            assert (out[:, :, 2] != 0).all()
            assert all(g.isfinite().all() for g in gradients[:3])


@pytest.mark.parametrize("scale", [0.3, 1, -0.5, 0.0])
def test_scale(scale):
    check(operands((2, 4, 9, 16), (2, 4, 7, 16)), scale=scale)


@pytest.mark.parametrize("lead", [(2,), (), (2, 3)])
def test_grouped_heads(lead):
    tensors = operands((*lead, 6, 9, 16), (*lead, 2, 7, 16))
    check(tensors, enable_gqa=True)
    check(tensors, enable_gqa=True, attn_mask=torch.rand(6, 9, 7) > 0.3)


@pytest.mark.parametrize("shapes", [((2, 4, 0, 16), (2, 4, 7, 16)), ((2, 4, 9, 16), (2, 4, 0, 16))])
def test_no_rows_or_no_keys(shapes):
    for is_causal in (False, True):
        tensors = operands(*shapes)
        out = shim.scaled_dot_product_attention(*tensors, is_causal=is_causal)
        assert torch.equal(out, torch.zeros(*shapes[0][:3], 16))


def test_views_are_not_copied():
    seen = []

    class Copies(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in (Tensor.contiguous, Tensor.clone) or (
                func is Tensor.reshape and out.data_ptr() != args[0].data_ptr()
            ):
                seen.append(func)
            return out

    Tensor = torch.Tensor
    qkv = torch.randn(2, 9, 3, 4, 16)
    tensors = [t.transpose(1, 2) for t in qkv.unbind(2)]
    with Copies():
        out = shim.scaled_dot_product_attention(*tensors)
    assert not seen
    assert out.stride() == (9 * 4 * 16, 16, 4 * 16, 1)


def test_dropout_without_training():
    tensors = operands((1, 2, 64, 32), (1, 2, 64, 32), (1, 2, 64, 64))
    tensors[2] = torch.eye(64).expand(1, 2, 64, 64)  # the output is the weights
    weights = shim.scaled_dot_product_attention(*tensors)
    out = shim.scaled_dot_product_attention(*tensors, dropout_p=0.25)
    dropped = out == 0
    # 8192 draws with standard deviation 0.0048.
    assert abs(dropped.double().mean() - 0.25) < 5 * 0.0048
    torch.testing.assert_close(out[~dropped], weights[~dropped] / 0.75)
    again = shim.scaled_dot_product_attention(*tensors, dropout_p=0.25)
    assert not torch.equal(again == 0, dropped)
    assert shim.calls().served == {"sdpa": 3}


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("query must have at least 2", {"query": torch.randn(16)}),
        ("key must have at least 3", {"key": torch.randn(7, 16), "enable_gqa": True}),
        ("key must have the head_dim of query", {"key": torch.randn(2, 4, 7, 8)}),
        ("value must have the sequence length", {"value": torch.randn(2, 4, 8, 16)}),
        ("key must have the dtype", {"key": torch.randn(2, 4, 7, 16).half()}),
        ("value must have the dtype", {"value": torch.randn(2, 4, 7, 16).double()}),
        ("leading dimensions of key", {"key": torch.randn(2, 2, 7, 16)}),
        ("leading dimensions of value", {"value": torch.randn(3, 4, 7, 16)}),
        ("num_heads of key must divide", {"key": torch.randn(2, 3, 7, 16), "enable_gqa": True}),
        ("num_heads of value must divide", {"value": torch.randn(2, 8, 7, 16), "enable_gqa": True}),
        ("attn_mask must broadcast", {"attn_mask": torch.ones(9, 6, dtype=torch.bool)}),
        ("attn_mask must broadcast", {"attn_mask": torch.ones(3, 1, 9, 7, dtype=torch.bool)}),
        ("attn_mask must be bool", {"attn_mask": torch.ones(9, 7, dtype=torch.int)}),
        ("attn_mask must be bool", {"attn_mask": torch.ones(9, 7, dtype=torch.double)}),
        ("dropout_p", {"dropout_p": 1.5}),
        ("dropout_p", {"dropout_p": -0.1}),
    ],
)  # fmt: skip
def test_errors_name_the_argument(message, change):
    query, key, value = operands((2, 4, 9, 16), (2, 4, 7, 16))
    arguments = {"query": query, "key": key, "value": value, **change}
    with pytest.raises(ValueError, match=message):
        shim.scaled_dot_product_attention(**arguments)
    with pytest.raises(RuntimeError, match=message):  # what torch raises, and callers catch
        shim.scaled_dot_product_attention(**arguments)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_not_served_goes_on_with_a_reason():
    q, k, v = operands((2, 4, 9, 16), (2, 4, 9, 16))
    mask = torch.ones(9, 9, dtype=torch.bool)
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 5, 8)])
    wide = torch.randn(1, 1, 3, 300)
    per_value = torch.randn(2, 2, 9, 16)
    for tensors, options, reason in [
        ((q.to("meta"),) * 3, {}, "device meta"),
        ((wide,) * 3, {}, "head_dim 300"),
        ((q, k, v), {"dropout_p": 1.0}, "dropout_p = 1"),
        ((q, k, v), {"attn_mask": mask, "is_causal": True}, "attn_mask together with is_causal"),
        ((q, k, per_value), {"enable_gqa": True}, "different numbers of heads in key and value"),
        ((Sub(q), k, v), {}, "Sub is not a plain tensor"),
    ]:
        shim.reset_calls()
        out = shim.scaled_dot_product_attention(*tensors, **options)
        assert shim.calls().passed_on == {reason: 1}
        assert shim.calls().served == {}
        if reason != "device meta":
            torch.testing.assert_close(out, TORCH(*tensors, **options))
    shim.reset_calls()
    shim.scaled_dot_product_attention(nested, nested, nested)
    assert shim.calls().passed_on == {"a nested tensor": 1}
    shim.reset_calls()
    batched = torch.vmap(shim.scaled_dot_product_attention)(q[:, None], k[:, None], v[:, None])
    torch.testing.assert_close(batched[:, 0], TORCH(q, k, v))
    assert shim.calls().passed_on == {"a transform of torch.func": 1}
    assert str(shim.calls()).splitlines() == [
        "0 served, 1 passed on", "  passed on, a transform of torch.func: 1",
    ]  # fmt: skip
    with pytest.raises(TypeError):  # torch's own error
        shim.scaled_dot_product_attention(q, None, v)


class Sub(torch.Tensor):
    """A tensor subclass, whose own handling torch's function asks for."""

    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_subclass(cls, tensor)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_traces_and_exports_hold_torch_s_own_operator():
    q = torch.randn(2, 4, 9, 16)
    with shim.replace_sdpa():
        traced = torch.jit.trace(lambda x: F.scaled_dot_product_attention(x, x, x), q)
    assert "aten::scaled_dot_product_attention" in str(traced.graph)
    assert shim.calls().passed_on["torch.jit.trace"]


def test_float64_and_a_named_implementation():
    tensors = operands((2, 4, 9, 16), (2, 4, 7, 16), dtype=torch.float64)
    check(tensors)
    with shim.use_impl("triton"), pytest.raises(NotImplementedError, match="float64"):
        shim.scaled_dot_product_attention(*tensors)
    with pytest.raises(ValueError, match="impl must be"), shim.use_impl("cuda"):
        pass


@pytest.mark.parametrize("seqlens", [(40, 70), (70, 40)])
def test_kernels(seqlens, device):
    seqlen_q, seqlen_k = seqlens
    tensors = operands((1, 2, seqlen_q, 32), (1, 2, seqlen_k, 32))
    check(tensors, impl="triton", device=device, is_causal=True)
    mask = torch.randn(2, seqlen_q, seqlen_k)
    check(tensors, impl="triton", device=device, attn_mask=mask)
    visible = mask > 0
    visible[0, 3] = False
    out = check(tensors, impl="triton", device=device, attn_mask=visible)
    assert (out[0, 0, 3] == 0).all()
    assert shim.calls().served == {"triton": 3}


# What intercepts.


def both_names(x):
    return F.scaled_dot_product_attention(x, x, x), early_bound(x, x, x)


def test_replace_catches_both_names():
    x = torch.randn(2, 4, 9, 16)
    plain = both_names(x)
    with shim.replace_sdpa():
        replaced = both_names(x)
    assert shim.calls().served == {"sdpa": 2}
    both_names(x)
    assert shim.calls().served == {"sdpa": 2}
    for a, b in zip(plain, replaced, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_passed_on_is_counted_once():
    x = torch.randn(2, 4, 9, 16)
    with shim.replace_sdpa(), shim.replace_sdpa():
        F.scaled_dot_product_attention(x, x, x, dropout_p=1.0)
        early_bound(x, x, x, dropout_p=1.0)
    assert shim.calls() == shim.Calls({}, {"dropout_p = 1": 2})


def test_fx_keeps_torch_s_own_function():
    class Model(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    with shim.replace_sdpa():
        graph = torch.fx.symbolic_trace(Model()).graph
    assert TORCH in [node.target for node in graph.nodes]
    assert shim.calls().passed_on == {"Proxy is not a plain tensor": 1}


def test_replace_without_early_bound_names():
    x = torch.randn(2, 4, 9, 16)
    with shim.replace_sdpa(early_bound=False):
        both_names(x)
    assert shim.calls().served == {"sdpa": 1}


def test_nested_switches_count_each_call_once():
    x = torch.randn(2, 4, 9, 16)
    shim.install()
    try:
        assert shim.installed()
        shim.install()
        F.scaled_dot_product_attention(x, x, x)
        with shim.replace_sdpa(), shim.replace_sdpa():
            both_names(x)
        assert F.scaled_dot_product_attention is not TORCH
    finally:
        shim.uninstall()
    assert not shim.installed()
    shim.uninstall()
    assert shim.calls().served == {"sdpa": 3}


def test_an_error_within_puts_everything_back():
    with pytest.raises(KeyError), shim.replace_sdpa():
        raise KeyError
    x = torch.randn(2, 4, 9, 16)
    both_names(x)
    assert shim.calls().served == {}


def test_all_threads_are_served():
    x = torch.randn(2, 4, 9, 16)
    with shim.replace_sdpa():
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(x, x, x))
        thread.start()
        thread.join()
    assert shim.calls().served == {"sdpa": 1}


def test_another_replacement_is_left_alone():
    def another(*args, **kwargs):
        return TORCH(*args, **kwargs)

    x = torch.randn(2, 4, 9, 16)
    shim.install()
    F.scaled_dot_product_attention = another
    try:
        with pytest.warns(RuntimeWarning, match="left as it is"):
            shim.uninstall()
        assert F.scaled_dot_product_attention is another
        # One that was there before gets what is passed on.
        with shim.replace_sdpa(early_bound=False):
            F.scaled_dot_product_attention(x, x, x, dropout_p=1.0)
        assert F.scaled_dot_product_attention is another
    finally:
        F.scaled_dot_product_attention = TORCH
    assert shim.calls().passed_on == {"dropout_p = 1": 1}


@pytest.mark.parametrize(("backend", "early"), [("eager", True), ("aot_eager", False)])
def test_compiled(backend, early):
    torch._dynamo.reset()
    function = early_bound if early else F.scaled_dot_product_attention
    attend = torch.compile(
        (lambda x: early_bound(x, x, x, is_causal=True) + 1)
        if early
        else (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True) + 1),
        backend=backend,
        fullgraph=True,
    )
    x = torch.randn(2, 4, 9, 16)
    expected = function(x, x, x, is_causal=True) + 1
    torch.testing.assert_close(attend(x), expected)  # compiled without, then within
    with shim.replace_sdpa(), shim.use_impl("reference"):
        torch.testing.assert_close(attend(x), expected)
        grad = torch.autograd.grad(attend(y := x.clone().requires_grad_()).sum(), y)[0]
    plain = torch.autograd.grad(function(y, y, y, is_causal=True).sum(), y)[0]
    torch.testing.assert_close(grad, plain)
    torch.testing.assert_close(attend(x), expected)


def test_compiled_graphs_hold_fastattn():
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    torch._dynamo.reset()
    x = torch.randn(2, 4, 9, 16)
    attend = torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x), backend=keep)
    with shim.replace_sdpa(early_bound=False), shim.use_impl("reference"):
        attend(x)
    assert len(graphs) == 1
    assert "scaled_dot_product_attention" not in graphs[0]
    assert "einsum" in graphs[0]


def test_autocast():
    tensors = operands((2, 4, 9, 16), (2, 4, 7, 16))
    mask = torch.randn(9, 7)
    with torch.autocast("cpu", torch.bfloat16):
        plain = TORCH(*tensors, attn_mask=mask)
        with shim.replace_sdpa():
            out = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    assert out.dtype == plain.dtype == torch.bfloat16
    exact = math_in(torch.float64)(*(t.bfloat16() for t in tensors), attn_mask=mask)
    assert_parity(out, plain, exact)
    assert shim.calls().served == {"sdpa": 1}


def test_inside_torch_s_modules():
    x = torch.randn(2, 9, 32)
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0), 2
    )
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    for module, run in (
        (attention, lambda: attention(x, x, x, need_weights=False)[0]),
        (encoder, lambda: encoder(x, src_key_padding_mask=padding)),
    ):
        for training in (True, False):
            module.train(training)
            with torch.set_grad_enabled(training):
                plain = run()
                shim.reset_calls()
                for switch in (shim.replace_sdpa(), shim.replace_sdpa(early_bound=False)):
                    with switch:
                        out = run()
                    rows = slice(None) if module is attention else ~padding
                    torch.testing.assert_close(out[rows], plain[rows])
            count = 1 if module is attention else 2
            assert shim.calls().served == {"sdpa": 2 * count}
            assert not shim.calls().passed_on


def test_inside_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    ids = torch.randint(60, (2, 9))
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[1, 6:] = 0
    with torch.no_grad():
        plain = model(ids, attention_mask=padding).last_hidden_state
        with shim.replace_sdpa(), shim.use_impl("reference"):
            out = model(ids, attention_mask=padding).last_hidden_state
    torch.testing.assert_close(out[padding.bool()], plain[padding.bool()])
    assert shim.calls().served == {"reference": 2}


def test_backward_within_checkpoint():
    x = torch.randn(2, 4, 9, 16, requires_grad=True)
    plain = torch.autograd.grad(TORCH(x, x, x).sum(), x)[0]
    with shim.replace_sdpa():
        out = torch.utils.checkpoint.checkpoint(
            lambda x: F.scaled_dot_product_attention(x, x, x), x, use_reentrant=False
        )
        out.sum().backward()
    torch.testing.assert_close(x.grad, plain)
    assert shim.calls().served == {"sdpa": 2}
