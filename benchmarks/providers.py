"""Who is measured: fastattn, torch's SDPA with each backend forced, and the peers installed here.

A peer that is not there keeps its place, with the reason. None of them is required.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import Case, Inputs
from benchmarks.decode_cases import DecodeCase
from benchmarks.sampling_cases import SamplingCase
from fastattn import attention
from fastattn.version import __version__

SDPA_BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
# Scores that SDPA's MATH backend may hold in memory: 2**31 of them are 4 GiB in bf16, and it keeps
# a few such tensors at a time, some in float32; more where they are saved for the backward pass.
MATH_SCORES = {"forward": 2**31, "training": 2**29}


@dataclass(frozen=True)
class Provider:
    """One implementation of attention, or of the draw of a token.

    Attributes:
        name: how rows call it.
        prepare: from the inputs of a case, of whichever kind, to the function that is timed; it
            returns the output (batch, seqlen, num_heads, head_dim), or tokens (batch,).
        version: of the library.
        absent: why it cannot run here at all; "" if it can.
        skip: why it does not run a case; "" if it does.
        trains: whether it has a backward pass.
        note: fields that a row keeps of how a case is run.
    """

    name: str
    prepare: Callable[[Any], Callable[[], Any]]
    version: str = ""
    absent: str = ""
    skip: Callable[[Any], str] = lambda case: ""
    trains: bool = True
    note: Callable[[Any], dict[str, Any]] = lambda inputs: {}

    def reason_to_skip(self, case: Case | DecodeCase | SamplingCase) -> str:
        """Why it has no time for a case; "" if it is to have one."""
        if self.absent:
            return self.absent
        if case.part == "training" and not self.trains:
            return "it has no backward pass"
        return self.skip(case)

    @property
    def is_ours(self) -> bool:
        """Whether it is fastattn, and not one of its peers."""
        return self.name.startswith("fastattn")


def find_providers() -> list[Provider]:
    """Everyone, installed or not; fastattn first."""
    return [
        fastattn_provider(),
        *(sdpa_provider(backend) for backend in SDPA_BACKENDS),
        _flash_attn("flash-attn 2", "flash_attn"),
        _flash_attn("flash-attn 3", "flash_attn_interface"),
        replace(_flash_attn("fa3-fwd", "fa3_fwd_interface"), trains=False),
        _flashinfer(),
    ]


def fastattn_provider() -> Provider:
    """The Triton kernels, asked for by name: they run or raise."""

    def prepare(inputs: Inputs) -> Callable[[], Any]:
        return lambda: attention(inputs.q, inputs.k, inputs.v, impl="triton", **inputs.kwargs)

    return Provider("fastattn", prepare, __version__)


def sdpa_provider(backend: str) -> Provider:
    """torch's scaled_dot_product_attention with one backend forced, by its name in SDPBackend.

    It takes the same memory as fastattn, by strides; masks and biases as dense tensors, which are
    there before the clock starts. Only a bias whose table is trained it has to make in each call.
    """

    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, backend)
        case = inputs.case

        def run() -> Tensor:
            # In the call, since autograd's graph must be of one call alone.
            q, k, v = (tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))
            with sdpa_kernel(chosen):
                out = scaled_dot_product_attention(
                    q, k, v, attn_mask=inputs.attn_mask(), is_causal=case.causal,
                    dropout_p=case.dropout_p, enable_gqa=case.num_heads != case.num_heads_kv,
                )  # fmt: skip
            return out.transpose(1, 2)

        return explained(run)

    def skip(case: Case) -> str:
        scores = case.batch * case.num_heads * case.seqlen**2
        if backend == "MATH" and scores > MATH_SCORES[case.part]:
            return "its score matrix is too large to be worth the time"
        if backend == "FLASH_ATTENTION" and case.feature not in ("plain", "dropout"):
            return "it takes no mask and no bias"
        return ""

    name = f"SDPA {backend.removesuffix('_ATTENTION')}"
    return Provider(name, prepare, f"torch {torch.__version__}", skip=skip)


def explained(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A run whose first call puts the warnings before an error into its message.

    SDPA says there why a backend does not take a call.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run()
        except RuntimeError as error:
            hints = [str(warning.message).split(" (Triggered")[0].strip() for warning in caught]
            text = "; ".join(dict.fromkeys([str(error), *hints]))
            raise type(error)(text) from error
    return run


def find_module(module: str) -> tuple[Any, str, str]:
    """A module, its version, and why it is absent."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        return None, "", f"not installed ({error})" if error.name != module else "not installed"
    except Exception as error:  # a wheel for another torch fails in many ways
        return None, "", f"cannot be imported: {type(error).__name__}: {error}"
    version = getattr(found, "__version__", None) or _distribution_version(module)
    return found, str(version), ""


def _distribution_version(module: str) -> str:
    try:
        names = importlib.metadata.packages_distributions().get(module, [])
        return importlib.metadata.version(names[0]) if names else "unknown version"
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def only_plain(case: Case) -> str:
    """Why a peer that knows causal and grouped heads, and no more, does not run a case."""
    return "" if case.feature == "plain" else f"no {case.feature} in its dense interface"


def _flash_attn(name: str, module: str) -> Provider:
    """flash-attn 2 and 3: `flash_attn_func` on our layout."""
    library, version, absent = find_module(module)

    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        def run() -> Tensor:
            out = library.flash_attn_func(inputs.q, inputs.k, inputs.v, causal=inputs.case.causal)
            # Releases of flash-attn 3 differ in whether the log-sum-exp comes with it.
            return out[0] if isinstance(out, tuple) else out

        return run

    return Provider(name, prepare, version, absent, only_plain)


def _flashinfer() -> Provider:
    """FlashInfer's batch prefill: sequences laid end to end, planned before the clock starts."""
    library, version, absent = find_module("flashinfer")

    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        case, q = inputs.case, inputs.q
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
        wrapper = library.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        ends = torch.arange(case.batch + 1, dtype=torch.int32, device=q.device) * case.seqlen
        wrapper.plan(
            ends, ends, case.num_heads, case.num_heads_kv, case.head_dim,
            causal=case.causal, q_data_type=q.dtype,
        )  # fmt: skip
        flat = [tensor.flatten(0, 1) for tensor in (inputs.q, inputs.k, inputs.v)]
        return lambda: wrapper.run(*flat).view_as(q)

    return Provider("FlashInfer", prepare, version, absent, only_plain)
