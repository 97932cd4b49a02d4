"""Calls of MultiheadAttention, and the rule by which they are compared with torch's module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.nn import MultiheadAttention
from fastattn.testing import assert_parity

Call = Callable[[nn.Module, torch.dtype], dict[str, Tensor]]


def stock_of(module: nn.MultiheadAttention, dtype: torch.dtype) -> nn.MultiheadAttention:
    """torch's module with the same parameters in another dtype."""
    has_bias = module.in_proj_bias is not None
    stock = nn.MultiheadAttention(
        module.embed_dim, module.num_heads, module.dropout, has_bias, module.bias_k is not None,
        module.add_zero_attn, module.kdim, module.vdim, module.batch_first,
        module.out_proj.weight.device, dtype,
    )  # fmt: skip
    stock.load_state_dict(module.state_dict(), strict=True)
    return stock.train(module.training)


def check_parity(module: MultiheadAttention, call: Call, dtype: torch.dtype) -> None:
    """What `call` gives with this module, by the parity rule.

    All results of a call are held to it together, each relative to its size: of a few numbers alone
    it is a matter of luck how well torch does.
    """
    actual = call(module, dtype)
    exact = call(stock_of(module, torch.float64), torch.float64)
    factor = 2.0
    if dtype == torch.float64:
        # Nothing is more exact. torch errs by as many units as in float32; so does what stands for
        # exact here, and that comes on top.
        single = call(stock_of(module, torch.float32), torch.float32)
        unit = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        baseline = {name: x + (single[name].double() - x) * unit for name, x in exact.items()}
        factor = 3.0
    else:
        baseline = call(stock_of(module, dtype), dtype)
    assert actual.keys() == baseline.keys() == exact.keys()
    for name, result in actual.items():
        assert (result.shape, result.dtype) == (baseline[name].shape, dtype), name
    results = [
        torch.cat([one[name].double().flatten() for name in exact])
        for one in (actual, baseline, exact)
    ]
    size = torch.cat([x.abs().max().clamp(min=1.0).expand(x.numel()) for x in exact.values()])
    scaled = [x / size for x in results]
    assert_parity(scaled[0].to(dtype), scaled[1].to(dtype), scaled[2], factor=factor)


@dataclass(frozen=True)
class Arguments:
    """One call: a module's settings, inputs and masks, all made from a seed."""

    seed: int
    batch: int | None
    seqlens: tuple[int, int]
    num_heads: int
    head_dim: int
    options: dict[str, bool]
    dims: tuple[int | None, int | None]
    same: str
    attn_mask: str | None
    padding: str | None
    need_weights: bool
    average: bool
    is_causal: bool
    training: bool
    dtype: torch.dtype

    def module(self, device: str = "cpu") -> MultiheadAttention:
        torch.manual_seed(self.seed)
        embed_dim, (kdim, vdim) = self.num_heads * self.head_dim, self.dims
        module = MultiheadAttention(
            embed_dim, self.num_heads, kdim=kdim, vdim=vdim, device=device, dtype=self.dtype,
            **self.options,
        )  # fmt: skip
        with torch.no_grad():
            for parameter in module.parameters():  # biases are made as zeros
                if parameter.dim() == 1:
                    parameter.normal_()
        return module.train(self.training)

    def calls(self, count: int, module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """The results of several inputs."""
        calls = [replace(self, seed=self.seed + i).call(module, dtype) for i in range(count)]
        return {f"{name} {i}": x for i, call in enumerate(calls) for name, x in call.items()}

    def call(self, module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """Output, weights, and the gradients of parameters, inputs and floating masks."""
        generator = torch.Generator().manual_seed(self.seed)
        assert isinstance(module, nn.MultiheadAttention)
        device = module.out_proj.weight.device

        def random(*shape: int) -> Tensor:
            # Rounded to the dtype under test, so that all see the same numbers.
            return torch.randn(shape, generator=generator).to(self.dtype).to(device, dtype)

        def sequence(seqlen: int, features: int) -> Tensor:
            shape: tuple[int, ...] = (seqlen, features)
            if self.batch is not None:
                batch_first = self.options["batch_first"]
                shape = (self.batch, *shape) if batch_first else (seqlen, self.batch, features)
            return random(*shape).requires_grad_()

        seqlen_q, seqlen_k = self.seqlens
        query = sequence(seqlen_q, module.embed_dim)
        key = query if self.same == "all" else sequence(seqlen_k, module.kdim)
        value = key if self.same != "none" else sequence(seqlen_k, module.vdim)
        attn_mask, padding = self._masks(generator, device, dtype)
        out, weights = module(
            query, key, value, key_padding_mask=padding, need_weights=self.need_weights,
            attn_mask=attn_mask, average_attn_weights=self.average, is_causal=self.is_causal,
        )  # fmt: skip
        assert (weights is None) == (not self.need_weights)
        results = {"out": out}
        loss = (out * random(*out.shape)).sum()
        if weights is not None:
            results["weights"] = weights
            loss = loss + (weights * random(*weights.shape)).sum()
        leaves = {"query": query, "key": key, "value": value, **dict(module.named_parameters())}
        for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", padding)):
            if mask is not None and mask.requires_grad and not self.is_causal:
                leaves[name] = mask
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            results[f"gradient of {name}"] = (
                torch.zeros_like(leaf) if gradient is None else gradient
            )
        return {name: result.detach() for name, result in results.items()}

    def _masks(
        self, generator: torch.Generator, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        seqlen_q, seqlen_k = self.seqlens
        batch = 1 if self.batch is None else self.batch

        def make(kind: str, *shape: int) -> Tensor:
            hidden = torch.rand(shape, generator=generator) < 0.4
            hidden[..., 0] = False  # a row without keys is not compared to torch's NaN
            if kind.startswith("causal"):
                hidden = torch.ones(shape, dtype=torch.bool).triu(1)
            if kind.endswith("bool"):
                return hidden.to(device)
            if kind.startswith("causal"):
                return torch.zeros(shape, dtype=dtype).masked_fill(hidden, -torch.inf).to(device)
            added = torch.randn(shape, generator=generator).to(self.dtype).to(dtype)
            return added.masked_fill(hidden, -torch.inf).to(device).requires_grad_()

        attn_mask, padding = None, None
        if self.attn_mask is not None:
            heads = (batch * self.num_heads,) if self.attn_mask.startswith("3-D") else ()
            attn_mask = make(self.attn_mask, *heads, seqlen_q, seqlen_k)
        if self.padding is not None:
            rows = () if self.batch is None else (batch,)
            padding = make(self.padding, *rows, seqlen_k)
        return attn_mask, padding


def plain(**changes: Any) -> Arguments:
    """A case of the usual kind, with changes."""
    options = {"bias": True, "add_bias_kv": False, "add_zero_attn": False, "batch_first": True}
    options.update(changes.pop("options", {}))
    case = Arguments(
        seed=0, batch=2, seqlens=(6, 6), num_heads=4, head_dim=8, options=options,
        dims=(None, None), same="all", attn_mask=None, padding=None, need_weights=False,
        average=True, is_causal=False, training=False, dtype=torch.float32,
    )  # fmt: skip
    return replace(case, **changes)
