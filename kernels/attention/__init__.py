"""Attention kernels: shared tile helpers, forward and backward passes, and weights on demand."""

from fastattn.kernels.attention.append import launch_append as launch_append
from fastattn.kernels.attention.backward import Gradients as Gradients
from fastattn.kernels.attention.backward import (
    launch_attention_backward as launch_attention_backward,
)
from fastattn.kernels.attention.cached_keys import CachedKeys as CachedKeys
from fastattn.kernels.attention.cached_keys import readable as readable
from fastattn.kernels.attention.combine import launch_merge_states as launch_merge_states
from fastattn.kernels.attention.decode import launch_attention_decode as launch_attention_decode
from fastattn.kernels.attention.decode_config import select_decode_config as select_decode_config
from fastattn.kernels.attention.forward import launch_attention_forward as launch_attention_forward
from fastattn.kernels.attention.operands import Modifiers as Modifiers
from fastattn.kernels.attention.weights import launch_attention_weights as launch_attention_weights
