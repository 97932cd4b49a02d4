"""Reference models of the three families, which load and save Hugging Face checkpoints.

    model = fastattn.models.load("path/to/folder")

Not imported by `import fastattn`. The families: `decoder`, `encoder`, `seq2seq`, each one file.
"""

from fastattn.models.checkpoint import CheckpointError, load, save

__all__ = ["CheckpointError", "load", "save"]
