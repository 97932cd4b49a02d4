"""Training objectives: what is hidden or shuffled, and what is to be predicted, a batch at a time.

    batch = masked_lm(input_ids, mask_token=103, vocab_size=30522, special_tokens=[0, 101, 102],
                      seed=step)
    loss = token_loss(model(batch.input_ids), batch.labels)

| function | objective | of |
|---|---|---|
| `masked_lm` | hidden tokens | BERT, RoBERTa, ALBERT |
| `causal_lm` | the next token | GPT-2, LLaMA |
| `prefix_lm` | the next token after a prefix that sees itself | UniLM, T5 |
| `span_corruption` | spans behind sentinels | T5 |
| `next_sentence_pairs` | does B follow A | BERT |
| `sentence_order_pairs` | are A and B swapped | ALBERT |
| `replaced_tokens` | which tokens a generator replaced | ELECTRA |
| `permutation_lm` | tokens in a random order | XLNet |

Everything is tensor work on the device of the tokens. What is random follows from `seed` and the
place in the batch alone (Philox, `fastattn.philox`): the same on every device. A label is
`ignore_index`, -100, where nothing is to be predicted; the losses leave those out.
"""

from fastattn.objectives.causal import PrefixLM, causal_lm, prefix_lm
from fastattn.objectives.losses import replaced_token_loss, token_loss
from fastattn.objectives.masked import MaskedLM, masked_lm
from fastattn.objectives.pairs import (
    Documents,
    SentencePairs,
    next_sentence_pairs,
    sentence_order_pairs,
)
from fastattn.objectives.permutation import PermutationLM, permutation_lm
from fastattn.objectives.replaced import ReplacedTokens, replaced_tokens
from fastattn.objectives.spans import SpanCorruption, noise_spans, shift_right, span_corruption

__all__ = [
    "Documents",
    "MaskedLM",
    "PermutationLM",
    "PrefixLM",
    "ReplacedTokens",
    "SentencePairs",
    "SpanCorruption",
    "causal_lm",
    "masked_lm",
    "next_sentence_pairs",
    "noise_spans",
    "permutation_lm",
    "prefix_lm",
    "replaced_token_loss",
    "replaced_tokens",
    "sentence_order_pairs",
    "shift_right",
    "span_corruption",
    "token_loss",
]
