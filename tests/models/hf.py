"""Models of transformers: random ones of odd sizes, as folders, and thrice for the parity rule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastattn.testing import assert_parity


def make(model: str, config: Any, seed: int = 0) -> Any:
    """A model of transformers by its class's name, float32, in eval mode, random weights.

    Matrices are four times what they start with: else attention is all but even, and hides errors.
    Biases and norms are random too.
    """
    torch.manual_seed(seed)
    made = getattr(transformers, model)(config).eval()
    made.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def save(model: Any, folder: Path, **options: Any) -> Path:
    """`save_pretrained`, quietly."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    return folder


class KeepFloat64(TorchFunctionMode):
    """Leaves out a model's casts to float32: without it "float64" is exact to float32 only."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def assert_models_agree(
    ours: Any, theirs: Any, dtype: torch.dtype, call: Callable[[Any, bool], dict[str, Tensor]]
) -> None:
    """The 2x rule for all that `call(model, is_ours)` gives, by name.

    Args:
        ours: our model, already in `dtype`.
        theirs: the one of transformers, float32: cast for the plain result, and to float64.
        call: runs a model; is told whether it is ours.
    """
    with torch.no_grad():
        # Weights as `dtype` has them: the rule is about arithmetic.
        plain = copy.deepcopy(theirs).to(dtype)
        exact = copy.deepcopy(plain).double()
        mine, baseline = call(ours, True), call(plain, False)
        with KeepFloat64():
            truth = call(exact, False)
    assert mine.keys() == baseline.keys() == truth.keys()
    for name, value in mine.items():
        assert value.dtype == dtype, name
        comparison = assert_parity(value, baseline[name], truth[name].double(), name=name)
        # A baseline that computes something else allows everything.
        scale = truth[name].double().square().mean().sqrt()
        assert comparison.baseline_rms_error <= 60 * torch.finfo(dtype).eps * scale, name
