"""Measurements of fastattn beside its peers. Run from a checkout; not part of the package.

| command | does |
|---|---|
| ``python -m benchmarks.gpu`` (``make gpu``) | parity and speed on a CUDA device, into one JSON |
| ``python -m benchmarks.plots FILE.json`` | draws PNGs from such a file |
| ``python -m benchmarks.decode_sweep FILE.json`` | its best decoding configs, as source |
"""
