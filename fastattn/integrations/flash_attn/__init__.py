"""The functions of the flash_attn package, version 2.8, computed by fastattn.

    from fastattn.integrations.flash_attn import flash_attn_func     # in code of one's own

    import fastattn.integrations.flash_attn as shim                  # for other people's code:
    shim.install()                                                   # before it imports flash_attn
    from flash_attn import flash_attn_func, flash_attn_varlen_func
    from flash_attn.bert_padding import pad_input, unpad_input

Names, argument names, their order, defaults and shapes are those of flash_attn 2.8 (Dao-AILab,
github.com/Dao-AILab/flash-attention), and so are the semantics: the causal mask and windows are
aligned at the bottom right, a row without keys gives 0, and only new tokens are written to a cache,
in place. Beyond it, they run on CPUs and on any GPU that Triton compiles for, take float32 (and
float64 on CPUs), any head_dim up to 256, a head_dim of v of its own, softcap together with dropout,
and pages of any size. `use_impl` names an implementation.

Where results differ:

| | flash_attn | here |
|---|---|---|
| log-sum-exp of a row without keys | +inf, in split kernels -inf | -inf |
| log-sum-exp with `alibi_slopes`, causal | of scores shifted, row by row | of the scores |
| `S_dmask`, returned with dropout | scaled in some way, sizes rounded up to 128 | see below |
| which weights are dropped | its random numbers | fastattn's, from torch's generator |
| dtype, under autocast | that of the inputs | that of autocast |

`return_attn_probs=True` returns (out, softmax_lse, S_dmask). Without dropout `S_dmask` is an empty
tensor, as in flash_attn. With it, it is float32 (batch, num_heads, seqlen_q, seqlen_k), the exact
softmax before dropout, negative where the weight was dropped: the whole score matrix in memory.

Two arguments change nothing: `deterministic`, since gradients here are the same in each run anyway,
and `num_splits`, for which fastattn has its own choice. There is no gradient to `alibi_slopes` and
none through `flash_attn_with_kvcache`, as in flash_attn.

Not here are flash_attn's layers, losses, models and fused operators, and the private functions of
`flash_attn_interface` (`_flash_attn_forward` and its kin): importing them raises ImportError.
"""

from fastattn.integrations.flash_attn import bert_padding, flash_attn_interface
from fastattn.integrations.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from fastattn.integrations.flash_attn.installation import install, installed, uninstall
from fastattn.integrations.flash_attn.version import __version__
from fastattn.integrations.impl_choice import use_impl

__all__ = [
    "__version__",
    "bert_padding",
    "flash_attn_func",
    "flash_attn_interface",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "installed",
    "uninstall",
    "use_impl",
]
