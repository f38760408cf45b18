"""Foreign files become journals: what every reader gives, and how it is written.

A reader turns a file into sessions of events with their original times. The journal's own writer writes them, so the
result is delivered, shown and repeated like any other journal. A session's id is a hash of where it comes from, so
importing twice gives the same lines and ids; what was imported whole is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

from stepspan.events import SCHEMA, Event
from stepspan.journal.layout import SessionPath, segment_name, session_name, slug
from stepspan.journal.liveness import CLOSED, LOCK, read_closed
from stepspan.journal.writer import JournalWriter, Limits
from stepspan.processors import Redact


@dataclass(slots=True)
class Mark:
    """What a begin line leaves behind: an event inside it names `seq` as its `parent`, its end event passes it on."""

    seq: int = 0
    ts: int = 0


Line: TypeAlias = "tuple[int, Event, Mark | None]"
"""Time (Unix ns), event, and the mark of a begin or end event."""


@dataclass(slots=True)
class Imported:
    """One session of a foreign source.

    `lines()` makes its events in the order of their times. It is a generator that is written as it goes, so a mark's
    `seq` is known once the line after it is made.
    """

    system: str
    source: Path
    job_id: str
    started: int
    """Unix ns."""
    lines: Callable[[], Iterable[Line]]
    key: str = ""
    """Tells this session from others of the same source."""
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    host: str = "imported"
    pid: int = -1
    boot_id: str = ""
    """Of the host where it goes on being imported; "" for a session that is imported whole."""
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
            "boot_id": self.boot_id,
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


class SessionImport:
    """The journal of one imported session, while it is written. OSError where it can't be."""

    def __init__(self, directory: Path, imported: Imported) -> None:
        place = directory / slug(imported.job_id) / slug(imported.host)
        self.path = place / session_name(imported.rank, "", imported.session)
        self.whole = read_closed(self.path) is not None
        """It was imported before, to its end."""
        if self.whole:
            return
        self._now = imported.started
        self._redact = Redact()
        kept = self._clear()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        limits = Limits(session_bytes=1 << 62, free_bytes=0, free_ratio=0.0)
        header = self._redact(imported.header())
        self._writer = JournalWriter(place, header, limits=limits, clock=lambda: self._now)
        if kept is not None:
            kept.rename(self.path / "cursors")

    def write(self, lines: Iterable[Line]) -> int:
        """Write some; how many."""
        before = self._writer.seq
        for self._now, event, mark in lines:
            self._writer.append(self._redact(event) if event["tag"] in self._redact.tags else event, mark)
        if self._writer.lost or self._writer.trouble is not None:
            raise self._writer.trouble or OSError(f"{self.path}: {self._writer.lost} events could not be written")
        return self._writer.seq - before

    def close(self, status: str) -> None:
        """The end of the session."""
        self._writer.close(status)

    def _clear(self) -> Path | None:
        """Make room for an import that was cut short. The lines come out as before, so its cursors still hold."""
        session = SessionPath.of(self.path)
        if session is None or not self.path.exists():
            return None
        kept = self.path.with_name(f".{self.path.name}.cursors")
        if (self.path / "cursors").exists():
            (self.path / "cursors").rename(kept)
        for name in (*map(segment_name, session.segments()), LOCK, CLOSED, "rejected.jsonl"):
            (self.path / name).unlink(missing_ok=True)
        self.path.rmdir()
        return kept if kept.exists() else None


def write_session(directory: Path, imported: Imported) -> tuple[Path, int]:
    """Write one session below `directory`, whole; its path, and how many events were written. OSError."""
    session = SessionImport(directory, imported)
    if session.whole:
        return session.path, 0
    written = session.write(imported.lines())
    session.close(imported.status)
    return session.path, written


def _digest(*parts: str, size: int) -> str:
    return blake2b("\0".join(parts).encode("utf-8", "replace"), digest_size=size).hexdigest()
