"""The command line: `fastattn demo`, `explain`, `profile`, `verify`.

Needs the extra "cli" (typer, rich).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def make_app() -> typer.Typer:
    """The application with all its commands."""
    import typer

    from fastattn.cli.demo import demo
    from fastattn.cli.explain import explain
    from fastattn.cli.profile import profile
    from fastattn.cli.verify import verify

    app = typer.Typer(
        help="Fused attention kernels in Triton, as drop-in functions for PyTorch.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command()(demo)
    app.command()(explain)
    app.command()(profile)
    app.command()(verify)
    return app


def main() -> None:
    """Entry point of the console script `fastattn`."""
    try:
        app = make_app()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"fastattn: the command line needs {error.name}: pip install 'fastattn[cli]'")
    app()
