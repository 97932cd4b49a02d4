"""XLNet, which computes attention by itself: its position and segment terms as a dense bias.

XLNet's score of query i and key j (Yang et al., arXiv:1906.08237, after Transformer-XL,
arXiv:1901.02860) is

    (q_i + w) . k_j  +  (q_i + r) . R_(i-j)  +  (q_i + s) . segment(i, j)

The first term is attention with shifted queries. The other two depend on the query's content, so
that no table holds them: they are built, (batch, num_heads, seqlen_q, seqlen_k) as in the model's
own attention, and added as a bias. What is not built any more is the scores, the weights and the
weights after dropout. Both streams go this way.

A row of the query stream that may see nothing (the first token of a permutation) gives 0; the
model's own attention gives it the mean of all values, padding and the token itself included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.integrations.transformers_call import attend


class XLNetAttention(nn.Module):
    """Mixed into `XLNetRelativeAttention`: the core of both streams by `fastattn.attention`."""

    r_w_bias: Tensor
    r_r_bias: Tensor
    r_s_bias: Tensor
    seg_embed: Tensor
    scale: float
    dropout: nn.Dropout

    def rel_attn_core(
        self,
        q_head: Tensor,
        k_head_h: Tensor,
        v_head_h: Tensor,
        k_head_r: Tensor,
        seg_mat: Tensor | None = None,
        attn_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of one stream.

        Args:
            q_head: (seqlen_q, batch, num_heads, head_dim).
            k_head_h, v_head_h: (seqlen_k, batch, num_heads, head_dim), memories first.
            k_head_r: (positions, batch, num_heads, head_dim), from the farthest past on.
            seg_mat: (seqlen_q, seqlen_k, batch, 2), one-hot: same segment or another.
            attn_mask: (seqlen_q, seqlen_k, batch or 1, 1), 1 where a key is hidden.
            output_attentions: also return the weights.

        Returns:
            (seqlen_q, batch, num_heads, head_dim), and the weights (seqlen_q, seqlen_k, batch,
            num_heads) if asked for.
        """
        q, k, v = (t.transpose(0, 1) for t in (q_head + self.r_w_bias, k_head_h, v_head_h))
        bias = self._position_term(q_head, k_head_r, k.shape[1])
        if seg_mat is not None:
            by_segment = torch.einsum(
                "ibnd,snd->bnis", (q_head + self.r_s_bias) * self.scale, self.seg_embed
            )
            bias = bias + torch.einsum("ijbs,bnis->bnij", seg_mat, by_segment)
        visible = None if attn_mask is None else (attn_mask == 0).permute(2, 3, 0, 1)
        out, weights = attend(
            self, q, k, v, mask=visible, bias=bias, softmax_scale=self.scale,
            dropout_p=self.dropout.p if self.training else 0.0, weights=output_attentions,
        )  # fmt: skip
        out = out.transpose(0, 1)
        return out if weights is None else (out, weights.permute(2, 3, 0, 1))

    def _position_term(self, q_head: Tensor, k_head_r: Tensor, seqlen_k: int) -> Tensor:
        """(batch, num_heads, seqlen_q, seqlen_k), scaled; a view wherever that is possible."""
        by_position = torch.einsum(
            "ibnd,jbnd->bnij", (q_head + self.r_r_bias) * self.scale, k_head_r
        ).contiguous()
        batch, heads, seqlen_q, positions = by_position.shape
        # Row i starts at position seqlen_q - i: in memory, one element less than a row further on.
        flat = by_position.reshape(batch, heads, seqlen_q * positions)[..., seqlen_q:]
        rows = flat.unflatten(-1, (seqlen_q, positions - 1))
        return rows[..., :seqlen_k]
