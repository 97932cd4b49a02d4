"""The version of flash_attn whose interface this is."""

# Without a suffix that tells them apart: libraries take it apart as three numbers.
__version__ = "2.8.3"
