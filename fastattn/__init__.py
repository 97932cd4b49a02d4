"""fastattn: fused attention kernels in Triton, as drop-in functions and modules for PyTorch."""

from fastattn.biases import ALiBi, T5Bias, alibi_slopes
from fastattn.functional import attention, attention_weights, explain
from fastattn.masks import Causal, Lengths, Packed, Prefix, Window
from fastattn.version import __version__

__all__ = [
    "ALiBi",
    "Causal",
    "Lengths",
    "Packed",
    "Prefix",
    "T5Bias",
    "Window",
    "__version__",
    "alibi_slopes",
    "attention",
    "attention_weights",
    "explain",
]
