"""Pictures of attention: what a head looks at, all heads of a layer, an alignment, a mask.

    tokens = visualize.token_labels(tokenizer, inputs["input_ids"][0])
    seen = visualize.capture(model, inputs, layer=3)      # heads of one layer, one sequence
    visualize.heat_map(seen, tokens, head=5, path="head.png")
    visualize.head_grid(seen, tokens, path="heads.png")

    seen = visualize.capture(model, inputs, layer=-1, kind="cross", average_heads=True)
    visualize.alignment(seen, source, target, path="alignment.png")

    visualize.mask_matrix(Window(128, 0), 512, 512, path="mask.png")

Models are fastattn's own, those of transformers, and whatever else calls `fastattn.attention` or a
cache. A model runs as it always does; only queries and keys of the layer asked for are kept, and
`fastattn.attention_weights` computes the weights of the heads and rows that are drawn. Figures are
matplotlib's, which is optional.
"""

from fastattn.visualize.capture import AttentionMap, capture
from fastattn.visualize.figures import alignment, head_grid, heat_map, mask_matrix
from fastattn.visualize.fonts import MissingGlyphWarning
from fastattn.visualize.labels import token_labels
from fastattn.visualize.recording import AttentionCall, AttentionRecord, record_attention

__all__ = [
    "AttentionCall",
    "AttentionMap",
    "AttentionRecord",
    "MissingGlyphWarning",
    "alignment",
    "capture",
    "head_grid",
    "heat_map",
    "mask_matrix",
    "record_attention",
    "token_labels",
]
