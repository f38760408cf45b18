"""The journals that a command is called for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepspan.errors import ConfigError, JournalError
from stepspan.journal.layout import SessionPath, find_sessions


def journal_directory() -> Path:
    """Where runs keep their journals: what `start_run()` would find. Raises `ConfigError`."""
    import os

    from stepspan.config import load  # takes longer than all of `stepspan tail`

    return load({}, os.environ).directory


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
