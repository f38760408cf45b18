"""Foreign files become journals: what every reader gives, and how it is written.

A reader turns a file into sessions of events with their original times. The journal's own writer writes them, so
the result is delivered, shown and repeated like any other journal. A session's id is a hash of where it comes from, so
importing twice gives the same ids, and what was imported whole is passed over.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from stepspan.events import SCHEMA, Event
from stepspan.journal.layout import session_name, slug
from stepspan.journal.liveness import read_closed
from stepspan.journal.writer import JournalWriter, Limits
from stepspan.processors import Redact


@dataclass(slots=True)
class Mark:
    """What a begin line leaves behind: an event inside it names `seq` as its `parent`, its end event passes it on."""

    seq: int = 0
    ts: int = 0


@dataclass(slots=True)
class Imported:
    """One session of a foreign source.

    `lines()` makes its events: (time in Unix ns, event, mark of a begin or end event or None), in the order of their
    times. It is a generator that is written as it goes, so a mark's `seq` is known once the line after it is made.
    """

    system: str
    source: Path
    job_id: str
    started: int
    """Unix ns."""
    lines: Callable[[], Iterable[tuple[int, Event, Mark | None]]]
    key: str = ""
    """Tells this session from others of the same source."""
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    host: str = "imported"
    pid: int = -1
    status: str = "completed"
    """How it ended: completed, failed, or interrupted."""
    resource: dict[str, Any] = field(default_factory=dict)

    @property
    def session(self) -> str:
        """Its id: 16 hex digits."""
        parts = (self.system, str(self.source.resolve()), self.key, self.job_id, str(self.rank))
        return _digest(*parts, size=8)

    def header(self) -> Event:
        """The header of its journal."""
        return {
            "ts": 0,
            "seq": 0,
            "tag": "header",
            "schema": SCHEMA,
            "session": self.session,
            "run_key": _digest(self.system, self.job_id, size=16),
            "job_id": self.job_id,
            "rank": self.rank,
            "local_rank": self.local_rank,
            "world_size": self.world_size,
            "role": "",
            "attempt": [0, 0],
            "launcher": f"import from {self.system}",
            "started": self.started,
            "pid": self.pid,
            "host": self.host,
            "boot_id": "",
            "resource": {
                "service.name": "training",
                **self.resource,
                "service.instance.id": f"{self.job_id}-{self.rank}",
                "job_id": self.job_id,
                "rank": self.rank,
                "local_rank": self.local_rank,
                "world_size": self.world_size,
                "host.name": self.host,
                "import.system": self.system,
                "import.source": str(self.source),
            },
        }


def write_session(directory: Path, imported: Imported) -> tuple[Path, int]:
    """Write one session below `directory`; its path, and how many events were written. Raises OSError."""
    place = directory / slug(imported.job_id) / slug(imported.host)
    path = place / session_name(imported.rank, "", imported.session)
    if read_closed(path) is not None:
        return path, 0
    if path.exists():  # an import that was cut short is made anew, with the same ids
        shutil.rmtree(path)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    now = imported.started
    redact = Redact()
    limits = Limits(session_bytes=1 << 62, free_bytes=0, free_ratio=0.0)
    writer = JournalWriter(place, redact(imported.header()), limits=limits, clock=lambda: now)
    for ts, event, mark in imported.lines():
        now = ts
        writer.append(redact(event) if event["tag"] in redact.tags else event, mark)
    written = writer.seq - 1
    writer.close(imported.status)
    if writer.lost or writer.trouble is not None:
        raise writer.trouble or OSError(f"{path}: {writer.lost} events could not be written")
    return path, written


def _digest(*parts: str, size: int) -> str:
    return blake2b("\0".join(parts).encode("utf-8", "replace"), digest_size=size).hexdigest()
