"""`stepspan import`: foreign files become journals."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from stepspan.compat.importing import write_session
from stepspan.errors import ConfigError, StepspanError

READERS: Mapping[str, str] = {
    "stormlog": "stepspan.compat.stormlog.reader",
    "evsys": "stepspan.compat.evsys.reader",
    "qmlhc": "stepspan.compat.qmlhc.reader",
    "cloudmesh": "stepspan.compat.cloudmesh.reader",
}
"""System -> the module with its `detect` and `read_sessions`."""


def import_paths(paths: Sequence[Path], system: str, job_id: str | None, directory: Path) -> int:
    """Import each path, and say what it was taken for. The exit code."""
    if system != "auto" and system not in READERS:
        raise ConfigError("--from", system, f"known are auto, {', '.join(READERS)}")
    failed = 0
    for path in paths:
        try:
            reader = _reader(path, system)
            for imported in reader.read_sessions(path, job_id=job_id):
                journal, events = write_session(directory, imported)
                done = f"{events} events" if events else "imported before"
                print(f"{imported.job_id} rank {imported.rank}: {done}: {journal}")
        except (OSError, ValueError, StepspanError) as error:
            print(f"stepspan import: {path}: {error}", file=sys.stderr)
            failed += 1
    if failed < len(paths):
        print(f"send it: stepspan sync {directory} --endpoint http://localhost:4318")
    return 1 if failed else 0


def _reader(path: Path, system: str) -> Any:
    """The module that reads a path."""
    if not path.exists():
        raise ValueError("there is nothing here")
    if system != "auto":
        return import_module(READERS[system])
    found = {}
    for name, module in READERS.items():
        reader = import_module(module)
        told = reader.detect(path)
        if told is not None:
            found[name] = (reader, told)
    if len(found) != 1:
        what = " or ".join(told for _, told in found.values()) or "nothing that is known"
        raise ValueError(f"this could be {what}: say which with --from {'|'.join(READERS)}")
    ((name, (reader, told)),) = found.items()
    print(f"{path}: {told} ({name})")
    return reader
