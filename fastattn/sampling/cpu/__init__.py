"""The sampler on the CPU."""

from fastattn.sampling.cpu.path import run, unsupported_reasons

__all__ = ["run", "unsupported_reasons"]
