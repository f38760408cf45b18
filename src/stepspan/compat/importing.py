"""Files of other systems become journals: what every reader gives, and how it is written.

A reader turns a file into `ImportedSession`s, whose lines are events with their original times. The journal's own
writer writes them, so the result is delivered, shown and repeated like any other journal. A session's id is a hash of
where it comes from, so importing twice gives the same lines and ids, and what was imported to its end is skipped.

An import that was cut short is written again from its beginning. The lines come out as before, so its cursors are kept:
what was written is `.<session>.partial` until its cursors have moved into the new journal, whenever that is cut short.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

from stepspan.events import SCHEMA, Event
from stepspan.journal.disk import Limits
from stepspan.journal.layout import session_name, slug
from stepspan.journal.liveness import read_closed
from stepspan.journal.writer import SessionWriter
from stepspan.processors import Redact


@dataclass(slots=True)
class BeginLine:
    """Where a begin event was written: events inside its scope have `seq` as their `parent`, its end as `begin`."""

    seq: int = 0
    ts: int = 0


Line: TypeAlias = "tuple[int, Event, BeginLine | None]"
"""Time (Unix ns), event, and the begin line of a begin or end event, which the writer fills in and reads."""


def event(tag: str, **fields: Any) -> Event:
    """An event that is yet to be written: the writer fills in `ts`, `seq` and the `begin` of an end event."""
    return {"ts": 0, "seq": 0, "tag": tag, **fields}


def default_job_id(path: Path, name: str) -> str:
    """The job id of a file that names none: `name` and 6 hex digits of the file's path."""
    return f"{name}-{_digest(str(path.resolve()), size=3)}"


@dataclass(slots=True)
class ImportedSession:
    """One session of another system's files: one process's part in one run."""

    system: str
    source: Path
    job_id: str
    name: str
    """The name of the run's span."""
    started: int
    """When the run began, Unix ns; before the first line."""
    ended: int | None
    """Unix ns of the run's end, not before the last line; None where the run's end is not known."""
    lines: Callable[[BeginLine], Iterable[Line]]
    """Makes the events between the run's begin and end, by time, given the run's begin line. They are written while
    this generator runs, so a begin line's `seq` is known once the next line is asked for."""
    key: str = ""
    """Tells this session from others of the same source."""
    tags: tuple[str, ...] = ()
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    host: str = "imported"
    pid: int = -1
    boot_id: str = ""
    """Of the host where the import goes on; "" for a session that is imported in one go."""
    status: str = "completed"
    """How the session ended: completed, failed, or interrupted."""
    resource: dict[str, Any] = field(default_factory=dict)

    @property
    def session(self) -> str:
        """The session's id: 16 hex digits, the same at each import of the same source."""
        return _digest(self.system, str(self.source.resolve()), self.key, self.job_id, str(self.rank), size=8)

    def header(self) -> Event:
        """The header line of the session's journal."""
        identity = {name: getattr(self, name) for name in ("job_id", "rank", "local_rank", "world_size")}
        return event(
            "header",
            schema=SCHEMA,
            session=self.session,
            run_key=_digest(self.system, self.job_id, size=16),
            **identity,
            role="",
            attempt=[0, 0],
            launcher=f"import from {self.system}",
            started=self.started,
            pid=self.pid,
            host=self.host,
            boot_id=self.boot_id,
            destinations=[],
            resource={
                "service.name": "training",
                **self.resource,
                "service.instance.id": f"{self.job_id}-{self.rank}",
                **identity,
                "host.name": self.host,
                "import.system": self.system,
                "import.source": str(self.source),
            },
        )


class SessionImport:
    """The journal of one imported session while it is written, the run's begin first. Raises OSError.

    Call `write` with the lines as they become known, then `close`; neither where `complete` is true.
    """

    def __init__(self, directory: Path, imported: ImportedSession) -> None:
        parent = directory / slug(imported.job_id) / slug(imported.host)
        self.path = parent / session_name(imported.rank, "", imported.session)
        self.complete = read_closed(self.path) is not None
        """Whether it was imported before, to its end."""
        self.run = BeginLine()
        self.written = 0
        """How many events were written, without the header."""
        if self.complete:
            return
        self._now = imported.started
        self._redact = Redact()
        partial = parent / f".{self.path.name}.partial"
        if (partial / "cursors").exists():
            shutil.rmtree(self.path, ignore_errors=True)
        elif self.path.exists():
            shutil.rmtree(partial, ignore_errors=True)
            self.path.rename(partial)
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        limits = Limits(session_bytes=1 << 62, free_bytes=0, free_ratio=0.0)
        header = self._redact(imported.header())
        self._writer = SessionWriter(parent, header, limits=limits, clock=lambda: self._now)
        self._writer.open()
        if (partial / "cursors").exists():
            (partial / "cursors").rename(self.path / "cursors")
        shutil.rmtree(partial, ignore_errors=True)
        about = {"name": imported.name, "group": None, "tags": list(imported.tags), "attempt": [0, 0]}
        self.write([(imported.started, event("run_begin", parent=0, **about), self.run)])

    def write(self, lines: Iterable[Line]) -> None:
        """Write lines, whose times must not go back. Raises OSError."""
        before = self._writer.seq
        for self._now, each, begin in lines:
            redacted = self._redact(each) if each["tag"] in self._redact.tags else each
            self._writer.write(redacted, self._now, begin)
        if self._writer.lost or self._writer.error is not None:
            raise self._writer.error or OSError(f"{self.path}: {self._writer.lost} events could not be written")
        self.written += self._writer.seq - before

    def close(self, status: str, ended: int | None) -> None:
        """End the session, and the run at `ended` (Unix ns), if that is known."""
        if ended is not None:
            self.write([(ended, event("run_end", begin=0, status=status), self.run)])
        self._writer.close(status)


def write_session(directory: Path, imported: ImportedSession) -> tuple[Path, int]:
    """Write one session below a directory of journals.

    Args:
        directory: The directory of journals, as `start_run` takes it.
        imported: What a reader's `read_sessions` gave.

    Returns:
        The path of the session's journal, and how many events were written: 0 where it was imported before.

    Raises:
        RecordError: The source is not as its system writes it.
        OSError: The source cannot be read, or the journal not written.

    """
    session = SessionImport(directory, imported)
    if not session.complete:
        session.write(imported.lines(session.run))
        session.close(imported.status, imported.ended)
    return session.path, session.written


def _digest(*parts: str, size: int) -> str:
    return blake2b("\0".join(parts).encode("utf-8", "replace"), digest_size=size).hexdigest()
