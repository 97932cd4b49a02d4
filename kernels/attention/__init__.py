"""Attention kernels: shared tile helpers, forward and backward passes, and weights on demand."""

from fastattn.kernels.attention.backward import Gradients as Gradients
from fastattn.kernels.attention.backward import (
    launch_attention_backward as launch_attention_backward,
)
from fastattn.kernels.attention.forward import launch_attention_forward as launch_attention_forward
from fastattn.kernels.attention.operands import Modifiers as Modifiers
from fastattn.kernels.attention.weights import launch_attention_weights as launch_attention_weights
