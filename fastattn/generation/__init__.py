"""Decoding: what turns a model's logits into sequences, for any `GenerativeModel`.

from fastattn.generation import GenerationConfig, generate

out = generate(model, input_ids, GenerationConfig(max_new_tokens=64, num_beams=4))
print(out.sequences)
"""

from fastattn.generation.compare import StrategyRow, StrategyTable, compare_strategies
from fastattn.generation.config import Contrast, GenerationConfig
from fastattn.generation.generate import generate
from fastattn.generation.mask_predict import MaskPredicted, mask_predict
from fastattn.generation.result import Generated, Speculation

__all__ = [
    "generate",
    "GenerationConfig",
    "Contrast",
    "Generated",
    "Speculation",
    "compare_strategies",
    "StrategyTable",
    "StrategyRow",
    "mask_predict",
    "MaskPredicted",
]
