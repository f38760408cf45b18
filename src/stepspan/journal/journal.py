"""A run's journal: keeps a session open whatever happens, and gives each event its time and its place in it.

One lock orders everything: under it an event gets its `ts` and `seq` and is written, so that file order is `seq` order
is time order. What a session can come to is one state machine, in one class:

    UNOPENED ──► OPEN ──► CLOSED                 by `close`; what comes later is counted as lost
       ▲          │
       │          ├─────► ENDED ──► OPEN         others closed it, or deleted it: the next event opens another one
       └──────────┘                              by `after_fork`, in a child: its first event opens one of its own

- What began in a session that has ended, ended with it: its end line is not written to the next session, and what would
  lie in it lies in nothing there (`parent` 0).
- A thread that is interrupted in here by a signal handler that logs would wait for itself: the handler's event waits in
  a list, and the thread that was interrupted writes it before its own call returns.
- Maintenance (is the session still ours, is the disk filling up, do lines wait) is done at most once a second of event
  time, by the call that crosses it; there is no thread. The owner's `upkeep` comes once the lock is released, because
  it may take others' locks.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from stepspan.events import SECOND_NS, Event
from stepspan.journal.disk import Disk, Limits
from stepspan.journal.layout import slug
from stepspan.journal.liveness import exclusive
from stepspan.journal.location import choose_location, directory_mode
from stepspan.journal.writer import Begun, SessionWriter


class Clock:
    """The wall clock when it was made plus the time since, a laptop's sleep included: never goes back, never jumps."""

    def __init__(self) -> None:
        with_sleep = getattr(time, "CLOCK_BOOTTIME", None)
        self._since = time.monotonic_ns if with_sleep is None else partial(time.clock_gettime_ns, with_sleep)
        self._offset = time.time_ns() - self._since()

    def __call__(self) -> int:
        """The time now, in Unix nanoseconds."""
        return self._offset + self._since()


class State(enum.Enum):
    """Of the journal's current session."""

    UNOPENED = enum.auto()
    OPEN = enum.auto()
    ENDED = enum.auto()
    CLOSED = enum.auto()


class Journal:
    """Writes each event to a session below `directory` before the call returns.

    Args:
        directory: Where journals go; falls back to memory where it can't be written (`durable` says so).
        limits: How much of the disk a session may take.
        clock: Gives Unix ns.
        disk: The system calls; tests inject faults here.

    Raises:
        ConfigError: `directory` is, or lies below, something that is not a directory.

    """

    def __init__(
        self,
        directory: str | Path,
        *,
        limits: Limits | None = None,
        clock: Callable[[], int] | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.directory, self.limits, self.durable = choose_location(directory, limits or Limits())
        self.clock = clock or Clock()
        self.upkeep: Callable[[], None] | None = None
        """Called about once a second of event time, by a thread that logs; must not raise."""
        self.session: SessionWriter | None = None
        """The session that events go to now; None where the next event opens the first one of this process."""
        self.state = State.UNOPENED
        self._disk = disk
        self._header: Callable[[], Event] | None = None
        self._job = self._host = ""
        self._lock = threading.RLock()
        self._busy = self._upkeep_due = False
        self._interrupting: deque[tuple[Event, Begun | None, SessionWriter | None]] = deque()
        self._next_check = 0

    def open(self, header: Callable[[], Event], *, job_id: str, host: str) -> None:
        """Open the first session.

        Args:
            header: Makes the header of a new session, with a session id of its own; called again for each later one.
            job_id: Names the directory of the job.
            host: Names the directory of the host in it.

        Raises:
            OSError: No session can be made.

        """
        self._header, self._job, self._host = header, slug(job_id), slug(host)
        with self._lock:
            self._busy = True
            try:
                self._open_session()
            finally:
                self._busy = False

    @contextmanager
    def claim(self, job_id: str, host: str) -> Iterator[None]:
        """Keep others on this host out who claim the job, while one looks who is alive in it and opens a session.

        Args:
            job_id: Names the directory of the job.
            host: Names the directory of the host in it.

        """
        with suppress(OSError):  # where it cannot be made, no session will be either
            self._make_directory(slug(job_id), slug(host))
        with exclusive(self.directory / slug(job_id) / slug(host)):
            yield

    def append(self, event: Event, begun: Begun | None = None) -> None:
        """Write one event; when this returns it survives the process.

        Args:
            event: Gets its `ts` and `seq`, and an end event its `begin`.
            begun: What begins or ends by this event: it keeps the `seq` and `ts` of its begin line.

        Raises:
            OSError: The session has ended, and no other one can be opened.

        """
        session = self.session
        with self._lock:
            if self._busy:  # by this thread, in which a signal handler logs
                self._interrupting.append((event, begun, session))
                return
            self._busy = True
            try:
                ts = self.clock()
                if ts >= self._next_check or session is not self.session:
                    ts = self._admit(event, session, ts)
                if ts:
                    self.session.write(event, ts, begun)  # type: ignore[union-attr] # `_admit` sees to it
            finally:
                self._busy = False
            while self._interrupting:  # after `_busy` is down: a handler that comes now writes for itself
                self._append_interrupting(*self._interrupting.popleft())
        if self._upkeep_due and self.upkeep and not self._lock._is_owned():  # type: ignore[attr-defined] # by a caller
            self._upkeep_due = False
            self.upkeep()

    def close(self, status: str) -> None:
        """End the session, if one is open, and take nothing more.

        Args:
            status: "completed", "failed" or "interrupted"; `closed.json` keeps it.

        """
        with self._lock:
            if self.session is None or self.session.closed:
                return
            busy, self._busy, self.state, self._next_check = self._busy, True, State.CLOSED, 0
            try:
                self.session.close(status, self._drain())
            finally:  # an event of a signal handler may be one that cannot be encoded
                self.session.lost += len(self._interrupting)
                self._interrupting.clear()
                self._busy = busy

    def after_fork(self) -> None:
        """In a forked child: release the parent's session; the first event opens another one."""
        if self.session is not None:
            self.session.forget()
        self._lock = threading.RLock()
        self._busy = self._upkeep_due = False
        self._interrupting.clear()
        self.session, self.state, self._next_check = None, State.UNOPENED, 0

    def _admit(self, event: Event, session: SessionWriter | None, ts: int) -> int:
        """See to it that a session is open for an event that was made in `session`.

        Returns:
            The time of the event; 0 where it must not be written.

        """
        if self.state is State.CLOSED:
            self.session.lost += 1  # type: ignore[union-attr] # it was open once
            return 0
        if self.state is State.OPEN and ts >= self._next_check:
            self._check(ts)
        if session is not None and (self.state is State.ENDED or session is not self.session):
            if "begin" in event:  # what began in a session that has ended, ended with it
                return 0
            if "parent" in event:
                event["parent"] = 0
        if self.state is not State.OPEN:
            self._open_session()
            self._check(self.clock())
        return self.clock()

    def _check(self, ts: int) -> None:
        """Once a second: is the session still ours, and what does its disk say."""
        session = self.session
        assert session is not None
        if session.is_taken() or session.is_gone():
            self.state, self._next_check = State.ENDED, 0
            return
        self._next_check = ts + min(SECOND_NS, int((self.limits.sync_every or 1) * SECOND_NS))
        session.maintain()
        self._upkeep_due = True

    def _open_session(self) -> None:
        assert self._header is not None, "open() comes first"
        host_directory = self._make_directory(self._job, self._host)
        fresh = SessionWriter(host_directory, self._header(), limits=self.limits, clock=self.clock, disk=self._disk)
        if self.session is not None:
            fresh.take_over(self.session)
        self.session, self.state = fresh, State.OPEN

    def _make_directory(self, job: str, host: str) -> Path:
        """Make the directory of a host in a job, where it is missing. OSError."""
        mode = directory_mode(self.limits)
        self.directory.mkdir(mode=mode, parents=True, exist_ok=True)
        directory = self.directory
        for name in (job, host):
            directory /= name
            directory.mkdir(mode=mode, exist_ok=True)
        return directory

    def _drain(self) -> Iterator[tuple[Event, Begun | None]]:
        while self._interrupting:
            event, begun, _ = self._interrupting.popleft()
            yield event, begun

    def _append_interrupting(self, event: Event, begun: Begun | None, session: SessionWriter | None) -> None:
        if session is not self.session and "parent" in event:
            event["parent"] = 0
        self.append(event, begun)
