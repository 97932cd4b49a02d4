"""The results file: one JSON, rewritten whole and atomically after every row."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = 1
FOLDER = Path(__file__).resolve().parent / "results"


class Results:
    """A document on disk that is valid JSON at any moment.

    Args:
        path: of the file; its folder is made.
        **head: what comes before the stages: environment, settings.
    """

    def __init__(self, path: Path, **head: Any) -> None:
        self.path = path
        self.document: dict[str, Any] = {
            "format": FORMAT,
            "status": "running",
            **head,
            "ceilings": {},
            "stages": {},
            "summary": {},
            "rows": [],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return self.document["rows"]

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Adds a row, without its fields that are None, and saves."""
        row = {name: value for name, value in row.items() if value is not None}
        self.rows.append(row)
        self.save()
        return row

    def save(self) -> None:
        """Writes a new file beside the old one, and puts it in its place."""
        text = json.dumps(_plain(self.document), indent=1, allow_nan=False)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            os.chmod(name, 0o644)
            os.replace(name, self.path)
        except BaseException:
            os.unlink(name)
            raise


def _plain(value: Any) -> Any:
    """Values that JSON has: infinities and NaN become text, numbers keep six digits."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def slug(text: str) -> str:
    """Text for a file name: lower case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def default_path(environment: dict[str, Any], folder: Path = FOLDER) -> Path:
    """<device>-<date>-<commit>.json, with a number where there is such a file already."""
    commit = environment.get("commit") or "nocommit"
    commit += "-dirty" if environment.get("dirty") else ""
    stem = f"{slug(environment['device'])}-{environment['date'][:10]}-{commit}"
    path, number = folder / f"{stem}.json", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.json", number + 1
    return path


def command_output(*command: str) -> str:
    """What a short command prints, or "" where it is not there or fails."""
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=10, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""


def describe_environment(device: Any, run: Callable[..., str] = command_output) -> dict[str, Any]:
    """Device, clocks, versions, commit and date: all that a number depends on."""
    import torch

    environment: dict[str, Any] = {
        "device": platform.processor() or platform.machine() or "cpu",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": run("git", "rev-parse", "--short=10", "HEAD"),
        "dirty": bool(run("git", "status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        environment |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / 2**30,
            "l2_mib": getattr(properties, "L2_cache_size", 0) / 2**20,
            "driver": read_smi(["driver_version"], device, run).get("driver_version", ""),
            "cudnn": torch.backends.cudnn.version(),
        }
    return environment


_CLOCKS = (
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


def read_clocks(device: Any, run: Callable[..., str] = command_output) -> dict[str, str]:
    """Clocks, power and temperature by nvidia-smi, which is only asked; {} where it is silent."""
    return read_smi(list(_CLOCKS), device, run) if device.type == "cuda" else {}


def read_smi(fields: list[str], device: Any, run: Callable[..., str]) -> dict[str, str]:
    """Fields of nvidia-smi for a device."""
    import torch

    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    # The device that torch uses need not be nvidia-smi's first; without its name, take the first.
    chosen = [] if uuid is None else [f"--id=GPU-{str(uuid).removeprefix('GPU-')}"]
    text = run(*command, *chosen) or run(*command)
    values = text.splitlines()[:1]
    parts = [part.strip() for part in values[0].split(",")] if values else []
    return dict(zip(fields, parts, strict=True)) if len(parts) == len(fields) else {}


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
