"""Options that several verbs of the command line have. It imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_GPU = "A100-80GB"

CatalogueGpu = Annotated[str, typer.Option(help="Which GPU, by its name in the catalogue.")]
LatencyTable = Annotated[
    Path | None, typer.Option(help="Latency table, CSV or JSON; by default the one measured on an A100-80GB.")
]
SkipSuspects = Annotated[
    bool, typer.Option("--skip-suspects", help="Leave out points of the table that look like errors.")
]
