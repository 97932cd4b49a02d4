"""Sampling kernels: penalties, temperature, top-k, top-p, min-p and the draw in one launch."""

from fastattn.kernels.sampling.operands import Sampling as Sampling
from fastattn.kernels.sampling.sampler import launch_sample as launch_sample
