"""`stepspan import`: files of other systems become journals."""

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
    """Import each path, and print what it was recognised as. The exit code: 1 if a path could not be imported."""
    if system != "auto" and system not in READERS:
        raise ConfigError("--from", system, f"known are auto, {', '.join(READERS)}")
    failed = 0
    for path in paths:
        try:
            reader = _reader(path, system)
            for imported in reader.read_sessions(path, job_id=job_id):
                journal, events = write_session(directory, imported)
                result = f"{events} events" if events else "imported before"
                print(f"{imported.job_id} rank {imported.rank}: {result}: {journal}")
        except (OSError, ValueError, StepspanError) as error:
            print(f"stepspan: {path}: {error}", file=sys.stderr)
            failed += 1
    if failed < len(paths):
        print(f"send it: stepspan sync {directory} --endpoint http://localhost:4318")
    return 1 if failed else 0


def _reader(path: Path, system: str) -> Any:
    """The module that reads a path. Raises ValueError unless exactly one recognises it."""
    if not path.exists():
        raise ValueError("no such file or directory")
    if system != "auto":
        return import_module(READERS[system])
    found = {}
    for name, module in READERS.items():
        reader = import_module(module)
        kind = reader.detect(path)
        if kind is not None:
            found[name] = (reader, kind)
    if len(found) != 1:
        problem = f"could be {' or '.join(kind for _, kind in found.values())}" if found else "not recognised"
        raise ValueError(f"{problem}: say which system it is of with --from {'|'.join(READERS)}")
    ((name, (reader, kind)),) = found.items()
    print(f"{path}: {kind} ({name})")
    return reader
