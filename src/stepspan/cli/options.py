"""Arguments and options that several commands take, declared once; and the journals that such an argument names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from stepspan.errors import ConfigError, JournalError
from stepspan.journal.layout import SessionPath, find_sessions


def journal_directory() -> Path:
    """Where runs keep their journals: what `start_run()` would find. Raises `ConfigError`."""
    from stepspan.config import load  # takes longer than all of `stepspan tail`

    return load({}, os.environ).directory


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
AllRanks = Annotated[
    bool, typer.Option("--all-ranks", help="Also what is left out by rank: metrics_ranks, traces_ranks, logs_ranks.")
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


def require_directories(paths: Sequence[Path]) -> None:
    """Raises `ConfigError` for a path that is no directory."""
    for path in paths:
        if not path.is_dir():
            raise ConfigError("PATH", str(path), "not a directory: name a journal, a job or a session")


def require_sessions(*paths: Path) -> list[SessionPath]:
    """All sessions at or below some paths, each once. Raises `JournalError` if there is none."""
    sessions = {session.path: session for path in paths for session in find_sessions(path)}
    if not sessions:
        raise JournalError(f"no journal at or below {', '.join(map(str, paths))}")
    return list(sessions.values())
