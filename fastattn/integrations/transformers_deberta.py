"""DeBERTa and DeBERTa-v2/v3, which compute attention by themselves: position terms as a bias.

Disentangled attention (He et al., arXiv:2006.03654) adds to the score of content with content
those of content with relative position ("c2p", "p2c"). They depend on the content of query and
key, so that no table holds them: the model's own code builds them, (batch, num_heads, seqlen,
seqlen), and they are added as a dense bias. What is not built any more is the scores, the masked
scores, the weights and the weights after dropout.

Not served: `query_states` (the enhanced mask decoder of version 1's pretraining) and version 1's
`talking_head`, which mixes the weights of heads. Rows of padding give 0.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastattn.integrations.transformers_call import attend


class DebertaV2Attention(nn.Module):
    """Mixed into version 2's `DisentangledSelfAttention`."""

    query_proj: nn.Linear
    key_proj: nn.Linear
    value_proj: nn.Linear
    dropout: nn.Dropout
    pos_dropout: nn.Dropout
    disentangled_attention_bias: Any
    num_attention_heads: int
    relative_attention: bool
    pos_att_type: list[str]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of one layer.

        Args:
            hidden_states: (batch, seqlen, hidden_size); queries are of `query_states` if given.
            attention_mask: (batch, 1, seqlen, seqlen), not 0 where a key is visible.
            output_attentions: also return the weights (batch, num_heads, seqlen, seqlen).
            relative_pos, rel_embeddings: as of the model's own attention.

        Returns:
            (batch, seqlen, hidden_size), and None or the weights.
        """
        asking = hidden_states if query_states is None else query_states
        heads = (self.num_attention_heads, -1)
        q = self.query_proj(asking).unflatten(-1, heads)
        k = self.key_proj(hidden_states).unflatten(-1, heads)
        v = self.value_proj(hidden_states).unflatten(-1, heads)
        terms = 1 + sum(term in self.pos_att_type for term in ("c2p", "p2c"))
        bias = None
        if self.relative_attention and terms > 1:
            bias = self.disentangled_attention_bias(
                q.transpose(1, 2).flatten(0, 1),
                k.transpose(1, 2).flatten(0, 1),
                relative_pos,
                self.pos_dropout(rel_embeddings),
                terms,
            ).unflatten(0, (-1, self.num_attention_heads))
        out, weights = attend(
            self, q, k, v, mask=attention_mask.bool(), bias=bias,
            softmax_scale=(q.shape[-1] * terms) ** -0.5,
            dropout_p=self.dropout.p if self.training else 0.0, weights=output_attentions,
        )  # fmt: skip
        return out.flatten(2), weights


class DebertaAttention(nn.Module):
    """Mixed into version 1's `DisentangledSelfAttention`."""

    in_proj: nn.Linear
    q_bias: Tensor
    v_bias: Tensor
    dropout: nn.Dropout
    pos_dropout: nn.Dropout
    disentangled_att_bias: Any
    num_attention_heads: int
    relative_attention: bool
    talking_head: bool
    pos_att_type: list[str]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `DebertaV2Attention.forward`; the model's own code where that is not served."""
        if self.talking_head or query_states is not None:
            return super().forward(  # type: ignore[misc]
                hidden_states, attention_mask, output_attentions, query_states, relative_pos,
                rel_embeddings,
            )  # fmt: skip
        heads = (self.num_attention_heads, -1)
        q, k, v = self.in_proj(hidden_states).unflatten(-1, heads).chunk(3, dim=-1)
        terms = 1 + len(self.pos_att_type)
        # The model's code for the position terms wants its queries scaled.
        q = (q + self.q_bias.unflatten(-1, heads)) / (q.shape[-1] * terms) ** 0.5
        v = v + self.v_bias.unflatten(-1, heads)
        bias = None
        if self.relative_attention and rel_embeddings is not None and relative_pos is not None:
            bias = self.disentangled_att_bias(
                q.transpose(1, 2), k.transpose(1, 2), relative_pos,
                self.pos_dropout(rel_embeddings), terms,
            )  # fmt: skip
        out, weights = attend(
            self, q, k, v, mask=attention_mask.bool(), softmax_scale=1.0,
            bias=bias if isinstance(bias, Tensor) else None,
            dropout_p=self.dropout.p if self.training else 0.0, weights=output_attentions,
        )  # fmt: skip
        return out.flatten(2), weights
