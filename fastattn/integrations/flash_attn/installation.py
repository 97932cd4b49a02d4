"""The shim under the name `flash_attn`, for libraries that import that."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from fastattn.integrations.flash_attn.version import __version__

_SHIM = "fastattn.integrations.flash_attn"
_SUBMODULES = ("flash_attn_interface", "bert_padding")


class _Loader:
    """Gives a module the public contents of one of ours."""

    def __init__(self, source: str) -> None:
        self._source = source

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        source = importlib.import_module(self._source)
        hidden = ("install", "installed", "uninstall", "use_impl")
        names = [name for name in source.__all__ if name not in (*hidden, *_SUBMODULES)]
        module.__dict__.update({name: getattr(source, name) for name in names})
        module.__doc__ = source.__doc__
        module.__file__ = source.__file__
        if "__getattr__" in source.__dict__:
            module.__dict__["__getattr__"] = source.__dict__["__getattr__"]


class _Metadata(importlib.metadata.Distribution):
    """What pip would have written down about flash_attn."""

    def read_text(self, filename: str) -> str | None:
        if filename in ("METADATA", "PKG-INFO"):
            summary = "served by fastattn.integrations.flash_attn"
            return (
                f"Metadata-Version: 2.1\nName: flash_attn\nVersion: {__version__}\n"
                f"Summary: {summary}\n"
            )
        return "flash_attn\n" if filename == "top_level.txt" else None

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        raise FileNotFoundError(f"flash_attn is served by fastattn and has no file {path}")


class _Finder:
    """Says so to `importlib.metadata`, which asks the finders of sys.meta_path."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        return None  # modules are in sys.modules

    @staticmethod
    def find_distributions(
        context: importlib.metadata.DistributionFinder.Context | None = None,
    ) -> Iterable[importlib.metadata.Distribution]:
        name = None if context is None else context.name
        if name is None or re.sub(r"[-_.]+", "-", name).lower() == "flash-attn":
            return [_Metadata()]
        return []


_finder: _Finder | None = None


def installed() -> bool:
    """Whether `import flash_attn` gives the shim."""
    return isinstance(_loader_of(sys.modules.get("flash_attn")), _Loader)


def install(*, metadata: bool = True) -> bool:
    """From here on `import flash_attn` gives this shim, unless the real package is there.

    `import flash_attn`, `flash_attn.flash_attn_interface` and `flash_attn.bert_padding` work, and
    `importlib.util.find_spec` finds them. Everything else below `flash_attn` raises
    ModuleNotFoundError. Libraries look for flash_attn once, when they are imported or first used:
    install before that.

    Hugging Face transformers takes the shim for flash_attn, for attn_implementation=
    "flash_attention_2", only where torch.cuda.is_available(): without a GPU it refuses, whatever is
    installed. Its calls themselves are right: the tests run a model and `generate` on a CPU with
    that check answered for it. `fastattn.integrations.transformers` knows no such condition.

    Args:
        metadata: also let `importlib.metadata` know a distribution flash_attn, by which many
            libraries check its version. It has no files, and pip, in a process of its own, does not
            see it.

    Returns:
        True if the shim is installed, now or before; False if the real package can be imported,
        which is left alone.
    """
    global _finder
    if not installed():
        if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None:
            return False
        package = _new_module("flash_attn", _SHIM, is_package=True)
        for name in _SUBMODULES:
            setattr(package, name, _new_module(f"flash_attn.{name}", f"{_SHIM}.{name}"))
    if metadata and _finder is None:
        _finder = _Finder()
        sys.meta_path.append(_finder)
    return True


def uninstall() -> None:
    """Takes back `install`; without one, does nothing. What was imported stays with its owner."""
    global _finder
    if installed():
        for name in ("flash_attn", *(f"flash_attn.{part}" for part in _SUBMODULES)):
            sys.modules.pop(name, None)
    if _finder is not None:
        sys.meta_path.remove(_finder)
        _finder = None


def _new_module(name: str, source: str, is_package: bool = False) -> ModuleType:
    loader: Any = _Loader(source)
    spec = ModuleSpec(name, loader, origin=source, is_package=is_package)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    return module


def _loader_of(module: ModuleType | None) -> object:
    spec = getattr(module, "__spec__", None)
    return getattr(spec, "loader", None)
