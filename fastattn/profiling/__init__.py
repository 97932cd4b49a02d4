"""Profiling a model: latency, throughput, utilization, memory, and where the time goes.

    case = Case(batch=4, prompt=128, new_tokens=64)
    profile = fastattn.profiling.profile("path/to/llama", cases=[case])
    profile.save("llama.json")
    fastattn.profiling.write_html(profile, "llama.html")

Not imported by `import fastattn`. `fastattn profile` is the same from the command line.
"""

from fastattn.profiling.plots import plot
from fastattn.profiling.presets import PRESETS
from fastattn.profiling.report import write_html
from fastattn.profiling.results import Case, Profile
from fastattn.profiling.run import profile
from fastattn.profiling.sweep import make_cases, parse_sweep

__all__ = [
    "PRESETS", "Case", "Profile", "make_cases", "parse_sweep", "plot", "profile", "write_html"
]  # fmt: skip
