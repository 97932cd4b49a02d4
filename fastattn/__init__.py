"""fastattn: fused attention kernels in Triton, as drop-in functions and modules for PyTorch."""

from fastattn.biases import ALiBi, T5Bias, alibi_slopes
from fastattn.decoding import (
    append_to_kv_cache,
    attention_with_kv_cache,
    explain_with_kv_cache,
    merge_attention_states,
)
from fastattn.functional import attention, attention_weights, explain
from fastattn.masks import Causal, Lengths, Packed, Prefix, Window
from fastattn.quantized import Quantized
from fastattn.replacement import replace_attention
from fastattn.rotary import Rotary
from fastattn.sampling import SamplerState, SamplingParams, sample
from fastattn.version import __version__

__all__ = [
    "ALiBi",
    "Causal",
    "Lengths",
    "Packed",
    "Prefix",
    "Quantized",
    "Rotary",
    "SamplerState",
    "SamplingParams",
    "T5Bias",
    "Window",
    "__version__",
    "alibi_slopes",
    "append_to_kv_cache",
    "attention",
    "attention_weights",
    "attention_with_kv_cache",
    "explain",
    "explain_with_kv_cache",
    "merge_attention_states",
    "replace_attention",
    "sample",
]
