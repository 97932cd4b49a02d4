"""Drawing tokens from logits: settings and state as values, and what stands around the draw."""

from fastattn.sampling.beams import BeamStep, beam_step
from fastattn.sampling.bits import pack_mask, unpack_mask
from fastattn.sampling.contrastive import contrastive_scores
from fastattn.sampling.filters import epsilon_filter, eta_filter, typical_filter
from fastattn.sampling.functional import sample
from fastattn.sampling.ngrams import ban_repeated_ngrams_, no_repeat_ngram
from fastattn.sampling.params import SamplingParams
from fastattn.sampling.problem import ERROR_TOKEN, Sample
from fastattn.sampling.speculative import Verified, speculative_verify
from fastattn.sampling.state import SamplerState
from fastattn.sampling.statistics import entropy, log_probabilities, perplexity

__all__ = [
    "ERROR_TOKEN",
    "BeamStep",
    "Sample",
    "SamplerState",
    "SamplingParams",
    "Verified",
    "ban_repeated_ngrams_",
    "beam_step",
    "contrastive_scores",
    "entropy",
    "epsilon_filter",
    "eta_filter",
    "log_probabilities",
    "no_repeat_ngram",
    "pack_mask",
    "perplexity",
    "sample",
    "speculative_verify",
    "typical_filter",
    "unpack_mask",
]
