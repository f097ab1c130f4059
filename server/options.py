"""Options that several verbs of the command line have. It imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_GPU = "A100-80GB"


def flag(name: str, help: str) -> Any:
    """One that takes no value, which the help must not show one for."""
    return typer.Option(name, help=help, metavar=" ")


CatalogueGpu = Annotated[str, typer.Option(help="Which GPU, by its name in the catalogue.")]
LatencyTable = Annotated[
    Path | None, typer.Option(help="Latency table, CSV or JSON; by default the one measured on an A100-80GB.")
]
SkipSuspects = Annotated[bool, flag("--skip-suspects", "Leave out points of the table that look like errors.")]
