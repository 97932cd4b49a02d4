"""The same model in transformers, on the weights of ours: in the same memory where that will do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.models.checkpoint import find_family, split_weight
from fastattn.profiling.subject import hf_config, quiet_transformers


def make_stock(model: Any, dtype: torch.dtype | None = None, attention: str = "sdpa") -> Any:
    """The model of transformers that has the weights of one of `fastattn.models`.

    A weight that lies in memory as transformers would have it is shared, others are copied: all are
    shared but on a CPU in float32, where ours lie transposed.

    Args:
        dtype: of its weights; None: of ours.
        attention: its attention implementation.

    Raises:
        RuntimeError: transformers' model has a weight that ours has not.
    """
    import transformers

    config = model.config
    family = find_family(config.model_type)
    weights = family.weights(config, config.architecture)
    state: dict[str, Tensor] = {}
    for weight in weights:
        for name, part in split_weight(model.get_parameter(weight.ours).detach(), weight):
            if config.architecture == family.bare:
                name = name.removeprefix(family.prefix)
            state[name] = part.to(dtype or part.dtype).contiguous()
    hf = {**family.to_hf(config), "model_type": config.model_type}
    options: dict[str, Any] = {"attn_implementation": attention, "dtype": dtype or _dtype(model)}
    if getattr(model, "pooler", True) is None and config.model_type in _WITH_POOLER:
        options["add_pooling_layer"] = False
    # A skeleton whose weights are one number each, seen as a whole matrix: it takes no memory, and
    # has the buffers that no checkpoint holds.
    one = torch.zeros((), dtype=options["dtype"])
    skeleton = {name: one.expand(part.shape) for name, part in state.items()}
    with quiet_transformers():
        stock, loading = getattr(transformers, config.architecture).from_pretrained(
            None, config=hf_config(hf), state_dict=skeleton, output_loading_info=True, **options
        )
    if loading["missing_keys"]:
        raise RuntimeError(f"{config.architecture} lacks {sorted(loading['missing_keys'])}")
    stock.load_state_dict(state, strict=False, assign=True)
    stock.tie_weights()
    device = next(iter(state.values())).device
    for module in stock.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return stock.requires_grad_(False).eval()


_WITH_POOLER = ("bert", "roberta", "roberta-prelayernorm", "albert")


def _dtype(model: Any) -> torch.dtype:
    return next(iter(model.parameters())).dtype
