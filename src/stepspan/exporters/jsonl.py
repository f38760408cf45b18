"""The JSONL exporter: keeps the journal, and keeps a session open in it whatever happens.

A session ends early when the process forks (the child begins one of its own on first use) or when somebody found it
silent and closed it. A directory that cannot be written costs the run its durability, not its telemetry: the journal
goes to shared memory instead, bounded, with one warning.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from stepspan.errors import ConfigError
from stepspan.events import Event
from stepspan.journal.layout import slug, writable_by_us
from stepspan.journal.writer import Clock, Disk, JournalWriter, Limits, Scope, SessionTaken

BOUNDED = 256 << 20  # bytes of a journal that lies in memory


class JsonlExporter:
    """Writes each event to the journal below `directory` before the call returns.

    Raises `ConfigError` where `directory` is, or lies below, something that is not a directory.
    """

    def __init__(
        self,
        directory: str | Path = "stepspan-runs",
        *,
        limits: Limits | None = None,
        clock: Callable[[], int] | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.directory = Path(os.path.abspath(directory))
        self.limits = limits or Limits()
        self.durable = True
        self.upkeep: Callable[[], None] | None = None
        """Called about once a second of event time, by the thread that logs."""
        self.clock = clock or Clock()
        self._disk = disk
        self._lock = threading.Lock()
        self.home: JournalWriter | _Unopened = _Unopened(self)
        """The session that events go to now; what began in another one cannot end in it."""
        self._header: Callable[[], Event] | None = None
        self._place = (".", ".")
        self.prepare()

    def prepare(self) -> None:
        """Make the directory. Falls back to memory where it can't be written."""
        for parent in (self.directory, *self.directory.parents):
            if parent.exists():
                if not parent.is_dir():
                    raise ConfigError("directory", str(self.directory), f"{parent} is a file: name a directory")
                break
        mode = 0o750 if self.limits.group_readable else 0o700
        try:
            fresh = not self.directory.exists()
            self.directory.mkdir(mode=mode, parents=True, exist_ok=True)
            if fresh:
                (self.directory / ".gitignore").write_text("*\n")
        except OSError:
            pass
        if not writable_by_us(self.directory):
            shared = Path("/dev/shm")
            base = shared if shared.is_dir() else Path(tempfile.gettempdir())
            self.directory = base / f"stepspan-{os.geteuid()}"
            self.directory.mkdir(mode=0o700, exist_ok=True)
            self.durable = False
            bound = min(BOUNDED, self.limits.session_bytes)
            self.limits = replace(
                self.limits,
                session_bytes=bound,
                segment_bytes=min(bound // 4, self.limits.segment_bytes),
                free_bytes=0,
                free_ratio=0.0,
            )

    def start(self, header: Callable[[], Event], *, job_id: str, host: str) -> None:
        """Open the first session. `header()` gives the header of a new one, with a session id of its own. OSError."""
        self._header, self._place = header, (slug(job_id), slug(host))
        self._open()

    def append(self, event: Event, scope: Scope | None = None) -> None:
        """Write one event."""
        try:
            self.home.append(event, scope)
        except SessionTaken:
            self._open(instead_of=self.home)
            self.home.append(event, scope)

    @property
    def writer(self) -> JournalWriter | None:
        """The open session, if there is one."""
        return self.home if isinstance(self.home, JournalWriter) else None

    def close(self, status: str) -> None:
        """End the session."""
        if self.writer:
            self.writer.close(status)

    def after_fork(self) -> None:
        """In a forked child: let go of the parent's session; the first event opens one."""
        if self.writer:
            self.writer.forget()
        self._lock = threading.Lock()
        self.home = _Unopened(self)

    def _open(self, instead_of: object = None) -> None:
        with self._lock:
            if instead_of is not None and self.home is not instead_of:
                return  # another thread was faster
            assert self._header is not None, "start() comes first"
            if self.writer:
                self.writer.forget()
            place = self.directory.joinpath(*self._place)
            place.mkdir(mode=0o750 if self.limits.group_readable else 0o700, parents=True, exist_ok=True)
            self.home = JournalWriter(
                place, self._header(), limits=self.limits, clock=self.clock, disk=self._disk, upkeep=self.upkeep
            )


class _Unopened:
    """Stands where a writer will be: the first event opens it."""

    def __init__(self, exporter: JsonlExporter) -> None:
        self._exporter = exporter

    def append(self, event: Event, scope: Scope | None = None) -> None:
        self._exporter._open(instead_of=self)
        self._exporter.append(event, scope)
