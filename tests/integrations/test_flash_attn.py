"""The functions of the flash_attn package, against a plain statement of what they compute."""

import inspect
import math
from collections.abc import Iterator

import pytest
import torch

import fastattn.integrations.flash_attn as shim
from fastattn.integrations.flash_attn import bert_padding
from fastattn.testing import assert_parity
from tests.integrations.devices import on
from tests.integrations.flash_attn_statement import plain_batch, plain_varlen


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def grads(function, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out, lse = function(*leaves)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape).to(out.dtype))
    return [out.detach(), lse.detach(), *(leaf.grad for leaf in leaves)]


def check(function, statement, tensors, impl="auto"):
    """Output, log-sum-exp and gradients by the parity rule."""
    with shim.use_impl(impl):
        actual = grads(lambda *t: function(*t, return_attn_probs=True)[:2], tensors)
        bare = function(*(t.detach().requires_grad_() for t in tensors))
    dtype = tensors[0].dtype
    baseline = grads(statement, tensors)
    exact = grads(statement, [t.double() for t in tensors])
    names = ["out", "lse", *(f"gradient {n}" for n in range(len(tensors)))]
    for name, a, b, e in zip(names, actual, baseline, exact, strict=True):
        assert_parity(a, b, e, name=name)
    assert actual[1].dtype == torch.float32
    assert bare.dtype == dtype
    assert_parity(bare.detach(), baseline[0], exact[0], name="out without lse")


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "scale": {"softmax_scale": 0.3},
    "window": {"window_size": (7, 3)},
    "left window": {"window_size": (5, -1)},
    "right window": {"window_size": (-1, 4)},
    "causal window": {"causal": True, "window_size": (6, 9)},
    "softcap": {"softcap": 1.5, "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0]), "causal": True},
    "alibi of each sequence": {"alibi_slopes": torch.rand(2, 4)},
}


@pytest.mark.parametrize("seqlens", [(40, 40), (25, 50), (50, 25)])
@pytest.mark.parametrize("name", OPTIONS)
def test_func(name, seqlens):
    options = OPTIONS[name]
    seqlen_q, seqlen_k = seqlens
    tensors = [
        randn(2, seqlen_q, 4, 32), randn(2, seqlen_k, 2, 32), randn(2, seqlen_k, 2, 32)
    ]  # fmt: skip
    check(
        lambda *t, **more: shim.flash_attn_func(*t, **options, **more),
        lambda *t: plain_batch(*t, **options),
        tensors,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_func_in_half_precision(dtype):
    tensors = [randn(2, 40, n, 32, dtype=dtype) for n in (4, 2, 2)]
    check(
        lambda *t, **more: shim.flash_attn_func(*t, causal=True, **more),
        lambda *t: plain_batch(*t, causal=True),
        tensors,
    )


def test_rows_without_keys_are_zero():
    q, k = randn(1, 9, 2, 16), randn(1, 4, 2, 16)
    out, lse, _ = shim.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert (out[:, :5] == 0).all()
    assert (out[:, 5:] != 0).all()
    assert (lse[..., :5] == -math.inf).all()
    assert lse[..., 5:].isfinite().all()
    assert (shim.flash_attn_func(q, k, k, causal=True)[:, :5] == 0).all()


CU_Q = torch.tensor([0, 30, 30, 53, 60], dtype=torch.int32)
CU_K = torch.tensor([0, 40, 45, 60, 80], dtype=torch.int32)


@pytest.mark.parametrize("name", [name for name in OPTIONS if "each" not in name])
def test_varlen_func(name):
    options = OPTIONS[name]
    check(
        lambda *t, **more: shim.flash_attn_varlen_func(*t, CU_Q, CU_K, 30, 40, **options, **more),
        lambda *t: plain_varlen(*t, CU_Q, CU_K, **options),
        [randn(60, 4, 32), randn(80, 2, 32), randn(80, 2, 32)],
    )


def test_kernels(device):
    for options in (OPTIONS["causal window"], OPTIONS["alibi of each sequence"]):
        check(
            lambda *t, options=options, **more: on(device, shim.flash_attn_func)(
                *t, **options, **more
            ),
            lambda *t, options=options: plain_batch(*t, **options),
            [randn(2, 40, 4, 32), randn(2, 70, 2, 32), randn(2, 70, 2, 32)],
            impl="triton",
        )
    options = {"causal": True, "softcap": 2.0}
    check(
        lambda *t, **more: on(device, shim.flash_attn_varlen_func)(
            *t, CU_Q, CU_K, 30, 40, **options, **more
        ),
        lambda *t: plain_varlen(*t, CU_Q, CU_K, **options),
        [randn(60, 4, 32), randn(80, 2, 32), randn(80, 2, 32)],
        impl="triton",
    )


def test_packed_operands():
    options = {"causal": True, "window_size": (9, 0), "softmax_scale": 0.2, "softcap": 3.0}
    check(
        lambda qkv, **more: shim.flash_attn_qkvpacked_func(qkv, **options, **more),
        lambda qkv: plain_batch(*qkv.unbind(2), **options),
        [randn(2, 40, 3, 4, 32)],
    )
    check(
        lambda q, kv, **more: shim.flash_attn_kvpacked_func(q, kv, **options, **more),
        lambda q, kv: plain_batch(q, *kv.unbind(2), **options),
        [randn(2, 40, 4, 32), randn(2, 50, 2, 2, 32)],
    )
    check(
        lambda qkv, **more: shim.flash_attn_varlen_qkvpacked_func(qkv, CU_Q, 30, **options, **more),
        lambda qkv: plain_varlen(*qkv.unbind(1), CU_Q, CU_Q, **options),
        [randn(60, 3, 4, 32)],
    )
    check(
        lambda q, kv, **more: shim.flash_attn_varlen_kvpacked_func(
            q, kv, CU_Q, CU_K, 30, 40, **options, **more
        ),
        lambda q, kv: plain_varlen(q, *kv.unbind(1), CU_Q, CU_K, **options),
        [randn(60, 4, 32), randn(80, 2, 2, 32)],
    )


def test_positional_arguments_mean_the_same():
    """Each one different from its default, in flash_attn's order."""
    q, k, v = (randn(2, 20, 4, 16) for _ in range(3))
    slopes = torch.rand(4)
    want = plain_batch(
        q, k, v, softmax_scale=0.3, causal=True, window_size=(4, -1), softcap=2.0,
        alibi_slopes=slopes,
    )[0]  # fmt: skip
    rest = (0.0, 0.3, True, (4, -1), 2.0, slopes, True, False)
    cu_seqlens = torch.tensor([0, 20, 40], dtype=torch.int32)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    qkv, kv = torch.stack((q, k, v), 2), torch.stack((k, v), 2)
    qkv_flat, kv_flat = qkv.flatten(0, 1), kv.flatten(0, 1)
    both = (cu_seqlens, cu_seqlens, 20, 20)
    for out in (
        shim.flash_attn_func(q, k, v, *rest),
        shim.flash_attn_qkvpacked_func(qkv, *rest),
        shim.flash_attn_kvpacked_func(q, kv, *rest),
        shim.flash_attn_varlen_func(*flat, *both, *rest, None),
        shim.flash_attn_varlen_qkvpacked_func(qkv_flat, cu_seqlens, 20, *rest),
        shim.flash_attn_varlen_kvpacked_func(flat[0], kv_flat, *both, *rest),
    ):
        torch.testing.assert_close(out.reshape(want.shape), want)


# The signatures of flash_attn 2.8.
_TAIL = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic " + (
    "return_attn_probs"
)
SIGNATURES = {
    "flash_attn_func": f"q k v {_TAIL}",
    "flash_attn_qkvpacked_func": f"qkv {_TAIL}",
    "flash_attn_kvpacked_func": f"q kv {_TAIL}",
    "flash_attn_varlen_func": (
        f"q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {_TAIL} block_table"
    ),
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {_TAIL}",
    "flash_attn_varlen_kvpacked_func": (
        f"q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {_TAIL}"
    ),
    "flash_attn_with_kvcache": (
        "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad "
        "block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes "
        "num_splits return_softmax_lse"
    ),
}
DEFAULTS = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1),
    "softcap": 0.0, "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
    "block_table": None, "rotary_interleaved": True, "num_splits": 0, "return_softmax_lse": False,
    "rotary_cos": None, "rotary_sin": None, "cache_seqlens": None, "cache_batch_idx": None,
    "cache_leftpad": None,
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(shim, name)).parameters
    assert list(parameters) == SIGNATURES[name].split()
    for parameter in parameters.values():
        if parameter.name in DEFAULTS:
            assert parameter.default == DEFAULTS[parameter.name]


def test_signatures_of_bert_padding():
    for name, parameters in {
        "unpad_input": "hidden_states attention_mask unused_mask",
        "pad_input": "hidden_states indices batch seqlen",
        "unpad_input_for_concatenated_sequences": "hidden_states attention_mask_in_length",
    }.items():
        assert list(inspect.signature(getattr(bert_padding, name)).parameters) == parameters.split()


# Dropout.


def test_dropout_and_its_signs():
    q, k = randn(2, 33, 4, 16), randn(2, 29, 2, 16)
    v = torch.eye(32)[:29].expand(2, 2, 29, 32).transpose(1, 2)  # the output is the weights
    out, lse, signed = shim.flash_attn_func(
        q, k, v, dropout_p=0.3, causal=True, softcap=2.0, return_attn_probs=True
    )
    weights = out.transpose(1, 2)[..., :29]
    assert signed.shape == weights.shape == (2, 4, 33, 29)
    assert signed.dtype == torch.float32
    torch.testing.assert_close(weights, signed.clamp(min=0) / 0.7)
    exact, exact_lse = plain_batch(*(t.double() for t in (q, k, v)), causal=True, softcap=2.0)
    baseline, baseline_lse = plain_batch(q, k, v, causal=True, softcap=2.0)
    assert_parity(
        signed.abs(), baseline.transpose(1, 2)[..., :29], exact.transpose(1, 2)[..., :29]
    )  # fmt: skip
    assert_parity(lse, baseline_lse, exact_lse)
    visible = signed != 0
    share = (signed[visible] < 0).double().mean()
    assert abs(share - 0.3) < 5 * (0.21 / int(visible.sum())) ** 0.5
    again = shim.flash_attn_func(q, k, v, 0.3, causal=True, softcap=2.0)
    assert not torch.equal(again, out)


def test_dropout_of_packed_sequences():
    q, k = randn(60, 4, 16), randn(80, 2, 16)
    v = torch.eye(40)[torch.cat([torch.arange(n) for n in CU_K.diff()])][:, None].expand(-1, 2, -1)
    out, _, signed = shim.flash_attn_varlen_func(
        q, k, v, CU_Q, CU_K, 30, 40, dropout_p=0.3, return_attn_probs=True
    )
    assert signed.shape == (4, 4, 30, 40)
    for index, (a, b) in enumerate(zip(CU_Q[:-1].tolist(), CU_Q[1:].tolist(), strict=True)):
        kept = signed[index, :, : b - a].clamp(min=0) / 0.7
        torch.testing.assert_close(out[a:b].transpose(0, 1), kept)


def test_without_dropout_there_is_no_score_matrix():
    q = randn(2, 33, 4, 16)
    out, lse, empty = shim.flash_attn_func(q, q, q, return_attn_probs=True)
    assert empty.shape == (0,)
    assert lse.shape == (2, 4, 33)
    packed = shim.flash_attn_varlen_func(
        q.flatten(0, 1), q.flatten(0, 1), q.flatten(0, 1), *[torch.tensor([0, 33, 66])] * 2, 33, 33,
        return_attn_probs=True,
    )  # fmt: skip
    assert packed[1].shape == (4, 66)
    torch.testing.assert_close(packed[0].reshape(out.shape), out)


# Pages.


def in_pages(k, v, cu_k, block_size, seed=0):
    """Keys laid end to end as pages in random order, and the table."""
    lengths = cu_k.diff().tolist()
    counts = [-(-n // block_size) for n in lengths]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sum(counts) + 2, generator=generator)
    pages = [torch.full((len(order), block_size, *t.shape[1:]), math.nan) for t in (k, v)]
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    used = 0
    for index, (start, length) in enumerate(zip(cu_k[:-1].tolist(), lengths, strict=True)):
        for j in range(counts[index]):
            block = int(order[used])
            used += 1
            table[index, j] = block
            some = slice(start + j * block_size, start + min((j + 1) * block_size, length))
            for page, t in zip(pages, (k, v), strict=True):
                page[block, : some.stop - some.start] = t[some]
    return *pages, table


@pytest.mark.parametrize("decoding", [False, True])
def test_varlen_with_a_block_table(decoding):
    cu_q = torch.arange(5, dtype=torch.int32) if decoding else CU_Q
    q, k, v = randn(int(cu_q[-1]), 4, 32), randn(80, 2, 32), randn(80, 2, 32)
    k_pages, v_pages, table = in_pages(k, v, CU_K, 16)
    longest = int(cu_q.diff().max())
    options = {"causal": True, "window_size": (20, -1)}

    def function(q, **more):
        return shim.flash_attn_varlen_func(
            q, k_pages, v_pages, cu_q, CU_K, longest, 40, block_table=table, **options, **more
        )

    check(function, lambda q: plain_varlen(q, k.to(q.dtype), v.to(q.dtype), cu_q, CU_K, **options),
          [q])  # fmt: skip
    with torch.no_grad():
        out, lse, _ = function(q, return_attn_probs=True)
        bare = function(q)
    want = plain_varlen(q, k, v, cu_q, CU_K, **options)
    exact = plain_varlen(q.double(), k.double(), v.double(), cu_q, CU_K, **options)
    assert_parity(out, want[0], exact[0])
    assert_parity(bare, want[0], exact[0])
    assert_parity(lse, want[1], exact[1])


# Errors.


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("q must be", lambda t: shim.flash_attn_func(t[0], t, t)),
        ("v must be", lambda t: shim.flash_attn_func(t, t, None)),
        ("k must have the head_dim", lambda t: shim.flash_attn_func(t, t[..., :8], t)),
        ("qkv must be", lambda t: shim.flash_attn_qkvpacked_func(t)),
        ("qkv must be .*3", lambda t: shim.flash_attn_qkvpacked_func(t[:, :, None])),
        ("kv must be .*2", lambda t: shim.flash_attn_kvpacked_func(t, t[:, :, None])),
        ("window_size", lambda t: shim.flash_attn_func(t, t, t, window_size=3)),
        ("window_size", lambda t: shim.flash_attn_func(t, t, t, window_size=(1.0, 2))),
        ("causal must be", lambda t: shim.flash_attn_func(t, t, t, causal=None)),
        ("dropout_p must be", lambda t: shim.flash_attn_func(t, t, t, 1.0)),
        ("softcap must be", lambda t: shim.flash_attn_func(t, t, t, softcap=None)),
        ("softmax_scale must be", lambda t: shim.flash_attn_func(t, t, t, softmax_scale=math.nan)),
        ("alibi_slopes must", lambda t: shim.flash_attn_func(t, t, t, alibi_slopes=t[0, :3, 0, 0])),
        (
            "cu_seqlens_q must",
            lambda t: shim.flash_attn_varlen_func(*[t[0]] * 3, [0, 6], CU_K, 6, 6),
        ),
        (
            "cu_seqlens_k",
            lambda t: shim.flash_attn_varlen_func(*[t[0]] * 3, *pair(6), *pair(5), 6, 6),
        ),
        ("max_seqlen", lambda t: shim.flash_attn_varlen_func(*[t[0]] * 3, *pair(6) * 2, 6, None)),
        (
            "max_seqlen",
            lambda t: shim.flash_attn_varlen_func(*[t[0]] * 3, *pair(6) * 2, 5, 5),
        ),
        (
            "block_table must",
            lambda t: shim.flash_attn_varlen_func(
                t[0], t, t, *pair(6) * 2, 6, 6, block_table=torch.zeros(3, 1, dtype=torch.int32)
            ),
        ),
        ("k_cache must", lambda t: shim.flash_attn_with_kvcache(t, t[0], t)),
        ("cache_seqlens must", lambda t: shim.flash_attn_with_kvcache(t, t, t, t, t)),
        ("cache_seqlens must", lambda t: shim.flash_attn_with_kvcache(t, t, t, cache_seqlens=7)),
        ("k and v", lambda t: shim.flash_attn_with_kvcache(t, t, t, t, cache_seqlens=0)),
        ("rotary_sin", lambda t: shim.flash_attn_with_kvcache(t, t, t, rotary_cos=t[0, :, 0])),
        (
            "k must be given",
            lambda t: shim.flash_attn_with_kvcache(t, t, t, None, None, t[0, :, 0], t[0, :, 0]),
        ),
        (
            "cache_batch_idx must lie",
            lambda t: shim.flash_attn_with_kvcache(t, t, t, cache_batch_idx=torch.tensor([2, 0])),
        ),
        (
            "cache_batch_idx must be None",
            lambda t: shim.flash_attn_with_kvcache(
                t, t, t, cache_batch_idx=torch.tensor([1, 0]), block_table=torch.ones(2, 1).int()
            ),
        ),
        (
            "cache_leftpad must",
            lambda t: shim.flash_attn_with_kvcache(t, t, t, cache_leftpad=torch.tensor([7, 0])),
        ),
        ("num_splits", lambda t: shim.flash_attn_with_kvcache(t, t, t, num_splits=-1)),
        ("attention_mask must", lambda t: bert_padding.unpad_input(t, t[:, :3, 0, 0])),
        ("unused_mask must", lambda t: bert_padding.unpad_input(t, t[..., 0, 0] > 0, t)),
        ("values must", lambda t: bert_padding.pad_input(t[0], torch.arange(3), 2, 6)),
        ("indices must", lambda t: bert_padding.index_first_axis(t, t[0, 0, 0])),
    ],
)  # fmt: skip
def test_errors_name_the_argument(message, call):
    with pytest.raises((ValueError, TypeError), match=message):
        call(randn(2, 6, 4, 16))


def pair(length):
    return (torch.tensor([0, length], dtype=torch.int32),)


def test_a_named_implementation_runs_or_raises():
    q = randn(1, 6, 2, 16)
    with shim.use_impl("sdpa"), pytest.raises(NotImplementedError, match="softcap"):
        shim.flash_attn_func(q, q, q, softcap=1.0)


def test_func_compiles_as_one_graph():
    torch._dynamo.reset()
    q = randn(1, 20, 4, 16)

    def attend(q, slopes):
        return shim.flash_attn_func(
            q, q, q, causal=True, window_size=(5, 0), alibi_slopes=slopes, softcap=2.0
        )

    slopes = torch.rand(4)
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, slopes), attend(q, slopes))
