"""The JSONL exporter: keeps the journal, and keeps a session open in it whatever happens.

A session ends early when the process forks (the child begins one of its own on first use) or when somebody found it
silent and closed it, or deleted it. A directory that cannot be written costs the run its durability, not its telemetry:
the journal goes to shared memory instead, bounded, with one warning.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from stepspan.errors import ConfigError
from stepspan.events import Event
from stepspan.journal.layout import slug, writable_by_us
from stepspan.journal.writer import Clock, Disk, JournalWriter, Limits, Scope, SessionTaken

SHARED_MEMORY = "/dev/shm"
BOUNDED = 256 << 20  # bytes of a journal that lies in memory
SHARE = 16  # it takes no more than this part of the memory's file system, and leaves as much free


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
        self.directory = _followed(Path(os.path.abspath(os.path.expanduser(directory))))
        self.limits = limits or Limits()
        self.durable = True
        self.upkeep: Callable[[], None] | None = None
        """Called about once a second of event time, by the thread that logs."""
        self.clock = clock or Clock()
        self._disk = disk
        self._lock = threading.RLock()
        self._opening = False
        self._pending: deque[tuple[Event, Scope | None]] = deque()
        self.home: JournalWriter | _Unopened = _Unopened(self)
        """The session that events go to now; what began in another one cannot end in it."""
        self._header: Callable[[], Event] | None = None
        self._place = (".", ".")
        self.prepare()

    def prepare(self) -> None:
        """Make the directory. Falls back to memory where it can't be written."""
        for parent in (self.directory, *self.directory.parents):
            if os.path.exists(parent):
                if not os.path.isdir(parent):
                    raise ConfigError("directory", str(self.directory), f"{parent} is a file: name a directory")
                break
        try:
            fresh = not os.path.exists(self.directory)
            self.directory.mkdir(mode=self._mode, parents=True, exist_ok=True)
            if fresh:
                (self.directory / ".gitignore").write_text("*\n")
        except ValueError as error:
            raise ConfigError("directory", str(self.directory), f"no path: {error}") from None
        except OSError:
            pass
        if not _takes_files(self.directory):
            self._to_memory()

    def _to_memory(self) -> None:
        refused = str(self.directory)
        self.durable = False
        places = (SHARED_MEMORY, os.environ.get("TMPDIR") or "/tmp")
        for base in places:
            for name in (f"stepspan-{os.geteuid()}", f"stepspan-{os.geteuid()}-{os.urandom(4).hex()}"):
                self.directory = Path(base, name)
                with contextlib.suppress(OSError):
                    self.directory.mkdir(mode=0o700, exist_ok=True)
                if _takes_files(self.directory):
                    found = os.statvfs(self.directory)
                    bound = min(BOUNDED, self.limits.session_bytes, found.f_blocks * found.f_frsize // SHARE)
                    segment = min(bound // 4, self.limits.segment_bytes)
                    self.limits = replace(
                        self.limits, session_bytes=bound, segment_bytes=segment, free_bytes=0, free_ratio=1 / SHARE
                    )
                    return
        raise ConfigError("directory", refused, f"cannot be written, nor can {' or '.join(places)}: name one that can")

    def start(self, header: Callable[[], Event], *, job_id: str, host: str) -> None:
        """Open the first session. `header()` gives the header of a new one, with a session id of its own. OSError."""
        self._header, self._place = header, (slug(job_id), slug(host))
        self._open()

    def append(self, event: Event, scope: Scope | None = None) -> None:
        """Write one event."""
        home = self.home
        try:
            home.append(event, scope)
        except SessionTaken:
            if "begin" not in event:  # what began in a closed session ended with it
                if "parent" in event:
                    event["parent"] = 0
                self._append_anew(home, event, scope)

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
        self._lock = threading.RLock()
        self._opening = False
        self._pending.clear()
        self.home = _Unopened(self)

    @property
    def _mode(self) -> int:
        return 0o750 if self.limits.group_readable else 0o700

    def _append_anew(self, home: object, event: Event, scope: Scope | None) -> None:
        """Write an event to the session that follows `home`, which whoever comes first opens."""
        with self._lock:
            if self._opening:  # by this thread, in which a signal handler logs
                self._pending.append((event, scope))
                return
            if self.home is home:
                self._opening = True
                try:
                    self._open()
                finally:
                    self._opening = False
        self.home.append(event, scope)
        while self._pending:
            self.append(*self._pending.popleft())

    def _open(self) -> None:
        assert self._header is not None, "start() comes first"
        self.directory.mkdir(mode=self._mode, parents=True, exist_ok=True)
        place = self.directory
        for name in self._place:
            place /= name
            place.mkdir(mode=self._mode, exist_ok=True)
        fresh = JournalWriter(
            place, self._header(), limits=self.limits, clock=self.clock, disk=self._disk, upkeep=self.upkeep
        )
        if self.writer:
            fresh.take_over(self.writer)
        self.home = fresh


class _Unopened:
    """Stands where a writer will be: the first event opens it."""

    def __init__(self, exporter: JsonlExporter) -> None:
        self._exporter = exporter

    def append(self, event: Event, scope: Scope | None = None) -> None:
        self._exporter._append_anew(self, event, scope)


def _followed(directory: Path) -> Path:
    """Where a directory really is, if it is a link of our own or root's; nobody else decides where we write."""
    try:
        ours = directory.lstat().st_uid in {0, os.geteuid()}
    except (OSError, ValueError):
        return directory
    return directory.resolve() if ours else directory


def _takes_files(directory: Path) -> bool:
    """Whether a directory is ours and takes a file: permissions don't know of a full disk."""
    if not writable_by_us(directory):
        return False
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
    except OSError:
        return False
    return True
