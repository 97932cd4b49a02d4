"""SelfAttention and CrossAttention against their definition in plain torch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn import Rotary
from fastattn.biases import t5_bucket
from fastattn.nn import (
    BaseKVCache,
    CrossAttention,
    KVCache,
    PagedKVCache,
    RelativeBias,
    ScoreOptions,
    SelfAttention,
)
from fastattn.nn.self_attention import _rotary_on
from fastattn.testing import assert_parity

EMBED, SEQLEN = 48, 12


def rotary_of(head_dim: int, interleaved: bool = False) -> Rotary:
    return Rotary.make(head_dim, 64, base=100.0, interleaved=interleaved)


CONFIGS: dict[str, Callable[[], dict[str, Any]]] = {
    "multi-head": dict,
    "grouped, causal, rotary": lambda: {
        "num_heads_kv": 2, "head_dim": 8, "causal": True, "rotary": rotary_of(8), "bias": False,
    },
    "part of a head rotated, interleaved, window": lambda: {
        "num_heads_kv": 1, "causal": True, "rotary": rotary_of(6, True), "window": (4, 0),
        "out_bias": False,
    },
    "normalized, softcap, sinks": lambda: {
        "num_heads_kv": 2, "causal": True, "rotary": rotary_of(12),
        "scores": ScoreOptions(softmax_scale=0.7, softcap=3.0, sinks=True, qk_norm=True),
    },
    "window to both sides": lambda: {"window": (2, 3), "num_heads_kv": 2},
    "T5": lambda: {
        "scores": ScoreOptions(softmax_scale=1.0), "bias": False, "causal": True,
        "relative_bias": RelativeBias(4, num_buckets=8, bidirectional=False, max_distance=9),
    },
}  # fmt: skip
CAUSAL = [name for name, make in CONFIGS.items() if make().get("causal")]


def make_attention(config: str, **changes: Any) -> SelfAttention:
    torch.manual_seed(0)
    module = SelfAttention(EMBED, 4, **{**CONFIGS[config](), **changes})
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1 or "relative" in name:
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.5)
    return module.eval()


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turned(rotary: Rotary, x: Tensor, positions: Tensor) -> Tensor:
    """Pairs of dimensions as complex numbers, times exp(i angle)."""
    pairs = rotary.rotary_dim // 2
    angle = torch.complex(rotary.cos.to(x.dtype), rotary.sin.to(x.dtype))[positions][:, :, None]
    rotated, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    axis = -1 if rotary.interleaved else -2
    shape = (pairs, 2) if rotary.interleaved else (2, pairs)
    a, b = rotated.unflatten(-1, shape).unbind(axis)
    product = torch.complex(a, b) * angle
    return torch.cat([torch.stack([product.real, product.imag], axis).flatten(-2), rest], -1)


def definition(
    module: SelfAttention | CrossAttention,
    x: Tensor,
    dtype: torch.dtype,
    *,
    memory: Tensor | None = None,
    visible: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """What the module is to give, computed in `dtype`; `visible` is (batch, seqlen_q, seqlen_k)."""
    own = {name: parameter.to(dtype) for name, parameter in module.named_parameters()}

    def project(name: str, x: Tensor) -> Tensor:
        projected = nn.functional.linear(
            x, own[f"{name}_proj.weight"], own.get(f"{name}_proj.bias")
        )
        return projected.unflatten(-1, (-1, module.head_dim)) if name != "out" else projected

    x = x.to(dtype)
    source = x if memory is None else memory.to(dtype)
    q, k, v = project("q", x), project("k", source), project("v", source)
    scores = module.scores
    if scores.qk_norm:
        q, k = (
            t * (t.square().mean(-1, keepdim=True) + scores.qk_norm_eps).rsqrt() * own[name]
            for t, name in ((q, "q_norm.weight"), (k, "k_norm.weight"))
        )
    rotary = getattr(module, "rotary", None)
    if rotary is not None:
        if positions is None:
            positions = torch.arange(x.shape[1]).expand(x.shape[:2])
        q, k = turned(rotary, q, positions), turned(rotary, k, positions)
    group = module.num_heads // module.num_heads_kv
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scale = module.head_dim**-0.5 if scores.softmax_scale is None else scores.softmax_scale
    score = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * scale
    if scores.softcap:
        score = scores.softcap * torch.tanh(score / scores.softcap)
    distance = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None]
    shown = torch.ones_like(distance, dtype=torch.bool)
    if memory is None:
        assert isinstance(module, SelfAttention)
        table = own.get("relative_bias.weight")
        if table is not None:
            bias = module.relative_bias
            assert bias is not None
            buckets = t5_bucket(distance, bias.bidirectional, len(table), bias.max_distance)
            score = score + table[buckets].permute(2, 0, 1)
        left, right = module.test_window  # type: ignore[misc]
        shown = (distance >= -left) & (distance <= right)
    if visible is not None:
        shown = shown & visible[:, None]
    score = score.masked_fill(~shown, -torch.inf)
    if "sinks" in own:
        sinks = own["sinks"][:, None, None].expand(*score.shape[:-1], 1)
        score = torch.cat([score, sinks], -1)
    weights = score.softmax(-1)[..., : k.shape[1]]
    return project("out", (weights @ v.transpose(1, 2)).transpose(1, 2).flatten(-2))


def windowed(module: SelfAttention, config: str) -> SelfAttention:
    """With what the configuration asked for, as the definition reads it: (left, right)."""
    settings = CONFIGS[config]()
    left, right = settings.get("window", (None, None))
    right = 0 if settings.get("causal") else right
    module.test_window = (  # type: ignore[assignment]
        100 if left is None else left,
        100 if right is None else right,
    )
    return module


def check(
    module: SelfAttention | CrossAttention, out: Tensor, x: Tensor, where: Any = ..., **options: Any
) -> None:
    baseline = definition(module, x, torch.float32, **options)
    exact = definition(module, x, torch.float64, **options)
    assert_parity(out[where], baseline[where], exact[where])


@pytest.mark.parametrize("config", CONFIGS)
def test_output_and_gradients(config: str) -> None:
    module = windowed(make_attention(config), config)
    x = inputs(2, SEQLEN, EMBED).requires_grad_()
    toward = inputs(2, SEQLEN, EMBED, seed=2)
    leaves = {"x": x, **dict(module.named_parameters())}
    results = [
        module(x),
        definition(module, x, torch.float32),
        definition(module, x, torch.float64),
    ]
    assert_parity(*results)
    gradients = [
        torch.autograd.grad((out * toward.to(out.dtype)).sum(), list(leaves.values()))
        for out in results
    ]
    for name, mine, baseline in zip(leaves, *gradients[:2], strict=True):
        assert mine.isfinite().all(), name
        assert (mine != 0).any() or name == "k_proj.bias", name
        assert mine.shape == baseline.shape
    # float32 leaves receive float64's gradient rounded; so the definition is run on wide ones.
    wide = windowed(copy.deepcopy(module), config).double()
    wide.rotary = module.rotary
    wide_x = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(
        (definition(wide, wide_x, torch.float64) * toward.double()).sum(),
        [wide_x, *wide.parameters()],
    )
    together = [
        torch.cat(
            [
                (g / t.abs().max().clamp(min=1.0).to(g.dtype)).flatten()
                for g, t in zip(own, exact, strict=True)
            ]
        )
        for own in (*gradients[:2], exact)
    ]
    assert_parity(*together)


@pytest.fixture(params=["contiguous", "paged"])
def make_cache(request: pytest.FixtureRequest) -> Callable[..., BaseKVCache]:
    def make(module: SelfAttention, rows: int = 2) -> BaseKVCache:
        shape = (module.num_heads_kv, module.head_dim)
        if request.param == "contiguous":
            return KVCache(2, rows, 24, *shape, dtype=torch.float32)
        return PagedKVCache(
            2, 8 * rows, 4, *shape, max_batch=rows, max_seqlen=24, dtype=torch.float32
        )

    return make


def in_steps(module: SelfAttention, cache: BaseKVCache, x: Tensor, sizes: list[int]) -> Tensor:
    """The output of two layers that are the same module, chunk by chunk."""
    pieces = []
    with torch.no_grad():
        for chunk in x.split(sizes, 1):
            out = module(chunk, cache=cache, layer=0)
            again = module(chunk, cache=cache, layer=1)
            assert torch.equal(out, again)
            pieces.append(out)
            cache.advance(chunk.shape[1])
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("sizes", [[1] * SEQLEN, [5, 3, 1, 1, 2]], ids=["tokens", "chunks"])
@pytest.mark.parametrize("config", CAUSAL)
def test_decoding(config: str, sizes: list[int], make_cache: Callable[..., BaseKVCache]) -> None:
    module = windowed(make_attention(config), config)
    x = inputs(2, SEQLEN, EMBED)
    check(module, in_steps(module, make_cache(module), x, sizes), x)


def test_decoding_of_prompts_of_several_lengths(make_cache: Callable[..., BaseKVCache]) -> None:
    """Padded on the right; then one row alone goes on."""
    config = "normalized, softcap, sinks"
    module = windowed(make_attention(config), config)
    x, lengths = inputs(3, SEQLEN, EMBED), torch.tensor([4, 6, 2])
    cache = make_cache(module, 3)
    with torch.no_grad():
        for layer in (0, 1):
            prompt = module(x[:, :6], cache=cache, layer=layer, lengths=lengths)
        cache.advance(lengths)
        for row, length in enumerate(lengths.tolist()):
            check(module, prompt[row : row + 1, :length], x[row : row + 1, :length])
            bias = module.out_proj.bias
            assert torch.equal(prompt[row, length:], bias.expand_as(prompt[row, length:]))
        rows, chosen = [2, 0], torch.tensor([2, 0])
        more = inputs(2, 3, EMBED, seed=5)
        for layer in (0, 1):
            out = module(more, cache=cache, layer=layer, rows=rows, lengths=torch.tensor([3, 1]))
        cache.advance([3, 1], rows=rows)
    for index, row in enumerate(chosen.tolist()):
        whole = torch.cat([x[row, : lengths[row]], more[index]])[None]
        count = 3 if index == 0 else 1
        part = slice(int(lengths[row]), int(lengths[row]) + count)
        baseline, exact = (
            definition(module, whole, t)[:, part] for t in (torch.float32, torch.float64)
        )
        assert_parity(out[index : index + 1, :count], baseline, exact)


def test_padding_costs_nothing_and_gives_the_bias() -> None:
    module = windowed(
        make_attention("grouped, causal, rotary", bias=True), "grouped, causal, rotary"
    )
    x, lengths = inputs(3, SEQLEN, EMBED), torch.tensor([12, 5, 0])
    out = module(x, lengths=lengths)
    real = torch.arange(SEQLEN) < lengths[:, None]
    assert torch.equal(out[~real], module.out_proj.bias.expand_as(out[~real]))
    check(module, out, x, where=real)
    x[~real] = torch.nan
    assert torch.equal(module(x, lengths=lengths)[real], out[real])


def test_positions_mask_and_bias() -> None:
    """A batch that is padded on its left."""
    config = "grouped, causal, rotary"
    module = windowed(make_attention(config), config)
    x, starts = inputs(2, SEQLEN, EMBED), torch.tensor([0, 5])
    positions = (torch.arange(SEQLEN) - starts[:, None]).clamp(min=0)
    real = torch.arange(SEQLEN) >= starts[:, None]
    mask = fastattn.Lengths(torch.tensor([SEQLEN] * 2), starts_k=starts)
    options = {"positions": positions, "visible": real[:, None, :].expand(-1, SEQLEN, -1)}
    check(module, module(x, positions=positions, mask=mask), x, where=real, **options)
    check(
        module, module(x, positions=positions, mask=real[:, None, None]), x, where=real, **options
    )
    hidden = torch.zeros(2, 1, 1, SEQLEN).masked_fill(~real[:, None, None], -torch.inf)
    check(module, module(x, positions=positions, bias=hidden), x, where=real, **options)
    cache = KVCache(1, 2, SEQLEN, module.num_heads_kv, module.head_dim, dtype=torch.float32)
    with torch.no_grad():
        out = module(x, cache=cache, layer=0, positions=positions, mask=mask)
    check(module, out, x, where=real, **options)


def test_a_table_that_layers_share() -> None:
    table = RelativeBias(4, num_buckets=8, max_distance=9)
    layers = nn.ModuleList([SelfAttention(EMBED, 4, relative_bias=table) for _ in range(2)])
    assert sum(parameter is table.weight for parameter in layers.parameters()) == 1
    x = inputs(2, SEQLEN, EMBED)
    (both,) = torch.autograd.grad(sum(layer(x).square().sum() for layer in layers), table.weight)
    wide = copy.deepcopy(layers).double()
    assert wide[0].relative_bias is wide[1].relative_bias
    truth = torch.zeros_like(table.weight, dtype=torch.float64)
    plain = torch.zeros_like(table.weight)
    for layer, own in zip(layers, wide, strict=True):
        layer.test_window = own.test_window = (100, 100)
        for module, dtype, total in ((layer, torch.float32, plain), (own, torch.float64, truth)):
            out = definition(module, x, dtype).square().sum()
            total += torch.autograd.grad(out, module.relative_bias.weight)[0]
    assert_parity(both, plain, truth)


def test_a_bias_joins_the_table() -> None:
    module = windowed(make_attention("T5"), "T5")
    x, hidden = inputs(2, SEQLEN, EMBED), torch.arange(SEQLEN) % 4 == 1
    bias = torch.zeros(SEQLEN).masked_fill(hidden, -torch.inf)
    visible = ~hidden.expand(2, SEQLEN, SEQLEN)
    check(module, module(x, bias=bias), x, visible=visible)


# ---- cross-attention


@pytest.fixture
def cross() -> Iterator[CrossAttention]:
    torch.manual_seed(0)
    scores = ScoreOptions(qk_norm=True, softcap=4.0)
    yield CrossAttention(EMBED, 4, memory_dim=20, num_heads_kv=2, scores=scores).eval()


def test_cross_attention(cross: CrossAttention) -> None:
    x, memory, lengths = inputs(3, 5, EMBED), inputs(3, 9, 20, seed=2), torch.tensor([9, 4, 1])
    visible = (torch.arange(9) < lengths[:, None])[:, None].expand(-1, 5, -1)
    out = cross(x, memory, lengths=lengths)
    check(cross, out, x, memory=memory, visible=visible)
    check(cross, cross(x, memory), x, memory=memory)
    check(cross, cross(x, memory, mask=visible[:, None]), x, memory=memory, visible=visible)
    leaves = dict(cross.named_parameters())
    gradients = torch.autograd.grad(out.square().sum(), list(leaves.values()))
    wide = copy.deepcopy(cross).double()
    exact = torch.autograd.grad(
        definition(wide, x, torch.float64, memory=memory, visible=visible).square().sum(),
        list(wide.parameters()),
    )
    baseline = torch.autograd.grad(
        definition(cross, x, torch.float32, memory=memory, visible=visible).square().sum(),
        list(leaves.values()),
    )
    together = [torch.cat([g.flatten() for g in own]) for own in (gradients, baseline, exact)]
    assert_parity(*together)


def test_memory_is_projected_once(cross: CrossAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    x, memory, lengths = inputs(3, 5, EMBED), inputs(3, 9, 20, seed=2), torch.tensor([9, 4, 1])
    whole = cross(x, memory, lengths=lengths)
    projected = cross.project(memory, lengths)
    assert projected.k.shape == (3, 9, 2, 12)
    monkeypatch.setattr(cross, "k_proj", None)  # not needed any more
    monkeypatch.setattr(cross, "v_proj", None)
    assert torch.equal(cross(x, projected), whole)
    steps = torch.cat([cross(x[:, i : i + 1], projected) for i in range(5)], 1)
    torch.testing.assert_close(steps, whole)
    beams = torch.tensor([2, 0, 0])
    torch.testing.assert_close(cross(x[beams], projected.select(beams)), whole[beams])
    with pytest.raises(ValueError, match="lengths must be None where memory is projected"):
        cross(x, projected, lengths=lengths)


# ---- the kernels


@pytest.mark.parametrize("config", ["part of a head rotated, interleaved, window", "T5"])
def test_through_the_kernels(config: str, device: str) -> None:
    """A prompt, then tokens; with gradients where there is no cache."""
    module = windowed(make_attention(config), config)
    x = inputs(1, 70, EMBED)
    if module.rotary is not None:
        module.rotary = Rotary.make(module.rotary.rotary_dim, 80, interleaved=True)
    wanted = [definition(module, x, dtype) for dtype in (torch.float32, torch.float64)]
    weight = module.k_proj.weight
    gradients = [
        torch.autograd.grad(out.square().sum(), weight, retain_graph=True)[0] for out in wanted
    ]
    module, x = module.to(device), x.to(device)
    module.impl = "triton"
    out = module(x)
    assert_parity(out.cpu(), *wanted)
    (gradient,) = torch.autograd.grad(out.square().sum(), module.k_proj.weight)
    assert_parity(gradient.cpu(), gradients[0], gradients[1].double())
    shape = (module.num_heads_kv, module.head_dim)
    cache = KVCache(1, 1, 80, *shape, dtype=torch.float32, device=device)
    with torch.no_grad():
        for chunk in x.split([66, 3, 1], 1):
            last = module(chunk, cache=cache, layer=0)
            cache.advance(chunk.shape[1])
    assert_parity(last.cpu(), wanted[0][:, -1:].detach(), wanted[1][:, -1:].detach())


# ---- as an object


def test_tables_keep_their_dtype_and_are_moved_once() -> None:
    rotary = rotary_of(8)
    layers = [SelfAttention(EMBED, 4, head_dim=8, rotary=rotary) for _ in range(2)]
    for layer in layers:
        layer.to(torch.bfloat16)
        assert layer.rotary is rotary
        assert layer(inputs(1, 3, EMBED).bfloat16()).dtype == torch.bfloat16
    assert rotary.cos.dtype == torch.float32
    moved = _rotary_on(rotary, torch.device("meta"))
    assert moved.cos.is_meta
    assert _rotary_on(rotary, torch.device("meta")) is moved
    assert not any("rotary" in name for name in layers[0].state_dict())


@pytest.mark.parametrize("config", CONFIGS)
def test_compile_copies_and_checkpoints(config: str) -> None:
    module, x = make_attention(config), inputs(2, SEQLEN, EMBED)
    wanted = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), wanted)
    fresh = SelfAttention(EMBED, 4, **CONFIGS[config]()).eval()
    fresh.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(fresh(x), wanted)


def test_dropout_in_training() -> None:
    module = make_attention("multi-head", dropout=0.5)
    x = inputs(2, SEQLEN, EMBED)
    whole = module(x)
    assert torch.equal(module(x), whole)
    module.train()
    torch.manual_seed(1)
    first = module(x)
    assert not torch.equal(first, module(x))
    torch.manual_seed(1)
    assert torch.equal(module(x), first)
    cache = KVCache(1, 2, SEQLEN, 4, 12, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"cache must be None in training with dropout 0\.5"):
        module(x, cache=cache, layer=0)


def test_what_constructors_refuse() -> None:
    for error, message, arguments in [
        (ValueError, "num_heads_kv, got 4 and 3", {"num_heads_kv": 3}),
        (ValueError, "embed_dim must be a multiple of num_heads .* 50 and 4", {"embed_dim": 50}),
        (ValueError, "head_dim must be 1 to 256, got 300", {"head_dim": 300}),
        (TypeError, r"head_dim must be an int, got 2\.5", {"head_dim": 2.5}),
        (ValueError, r"dropout must be a probability in \[0, 1\), got 1\.0", {"dropout": 1.0}),
        (TypeError, r"window must be \(left, right\) or None, got 4", {"window": 4}),
        (ValueError, "at most head_dim = 12 dimensions, got 14", {"rotary": rotary_of(14)}),
        (TypeError, r"rotary must be a fastattn\.Rotary, got 3", {"rotary": 3}),
        (ValueError, "num_heads = 4 heads, got 8", {"relative_bias": RelativeBias(8)}),
        (TypeError, "relative_bias must be a RelativeBias, got True", {"relative_bias": True}),
        (TypeError, "scores must be ScoreOptions, got None", {"scores": None}),
    ]:
        with pytest.raises(error, match=message):
            SelfAttention(**{"embed_dim": EMBED, "num_heads": 4, **arguments})
    with pytest.raises(ValueError, match="memory_dim must be >= 1, got 0"):
        CrossAttention(EMBED, 4, memory_dim=0)
    with pytest.raises(ValueError, match="at least 4 buckets, got 2"):
        RelativeBias(4, num_buckets=2)


def test_what_forward_refuses() -> None:
    module, x = make_attention("multi-head"), inputs(2, SEQLEN, EMBED)
    rotated = make_attention("grouped, causal, rotary")
    cache = KVCache(1, 2, SEQLEN, 4, 12, dtype=torch.float32)
    positions = torch.zeros(2, SEQLEN, dtype=torch.int64)
    for attention, message, arguments in [
        (module, r"x must be \(batch, seqlen, 48\), got \(2, 12\)", {"x": x[..., 0]}),
        (module, "layer must be given with a cache", {"cache": cache}),
        (module, "layer must be given with a cache", {"layer": 0}),
        (module, "positions must be None in a module without rotary", {"positions": positions}),
        (rotated, r"positions must have shape .* \(2, 12\)", {"positions": positions[:, 1:]}),
        (rotated, r"positions must lie in 0\.\.63", {"positions": positions + 64}),
        (rotated, "x must have at most 64 tokens", {"x": inputs(1, 65, EMBED)}),
    ]:
        with pytest.raises(ValueError, match=message):
            attention(**{"x": x, **arguments})
    with pytest.raises(ValueError, match=r"memory must be \(batch, seqlen, 20\)"):
        CrossAttention(EMBED, 4, memory_dim=20)(x, x)
