"""Arguments and options that several commands take, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepspan.cli.journals import journal_directory

DEFAULT_DIRECTORY = "what STEPSPAN_DIRECTORY says, else stepspan-runs"

JournalPaths = Annotated[list[Path], typer.Argument(help="Journal directories: all runs, one job, or one session.")]
JournalPath = Annotated[
    Path,
    typer.Argument(
        default_factory=journal_directory,
        show_default=DEFAULT_DIRECTORY,
        help="A journal directory: all runs, one job, or one session.",
    ),
]
Directory = Annotated[
    Path,
    typer.Option(default_factory=journal_directory, show_default=DEFAULT_DIRECTORY, help="Where to write journals."),
]
Endpoint = Annotated[
    str | None,
    typer.Option(help="OTLP endpoint, such as http://localhost:4318. By default the OTEL_EXPORTER_OTLP_* variables."),
]
StateDirectory = Annotated[
    Path | None,
    typer.Option(help="Where to keep the cursors of journals that this user may not write to."),
]
DeadAfter = Annotated[
    float, typer.Option(min=1.0, help="Seconds of silence after which a session of another host counts as dead.")
]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]
