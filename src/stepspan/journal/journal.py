"""A run's journal: keeps a session open whatever happens, and gives each event its time and its place in it.

One lock orders everything: under it an event gets its `ts` and `seq` and is written, so that file order is `seq` order
is time order. What a session can come to is one state machine, in one class:

    UNOPENED ──► OPEN ──► CLOSED                 by `close`; what comes later is counted as lost
       ▲          │
       │          ├─────► ENDED ──► OPEN         others closed it, or deleted it, or its run rests: the next event
       │          │                              opens another one
       └──────────┘                              by `after_fork`, in a child: its first event opens one of its own

- What began in a session that has ended, ended with it: its end line is not written to the next session, and what would
  lie in it lies in nothing there (`parent` 0).
- A thread that is interrupted in here by a signal handler that logs would wait for itself: the handler's event waits in
  a list, and the thread that was interrupted writes it before its own call returns.
- A handler that raises (Ctrl-C, an alarm) may do so at any call in here. What it interrupted is done all the same, by
  `SessionWriter.settle` and a second try, before the exception goes on its way.
- Maintenance (is the session still ours, is the disk filling up, do lines wait) is done at most once a second of event
  time, by the call that crosses it; there is no thread. The owner's `upkeep` comes once the lock is released, because
  it may take others' locks.
- The journal's clock is compared with the wall clock by the same call: each second in the first minutes, then once a
  minute (`journal.clock`). A `clock` line says when it was set.
"""

from __future__ import annotations

import enum
import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from zlib import crc32

from stepspan.events import SECOND_NS, Event
from stepspan.journal.clock import Clock
from stepspan.journal.disk import Disk, Limits
from stepspan.journal.format import from_template
from stepspan.journal.layout import slug
from stepspan.journal.liveness import exclusive, write_resting
from stepspan.journal.location import choose_location, directory_mode
from stepspan.journal.writer import IDLE_THREADS, UNSETTLED, WAITING, Begun, SessionWriter

YOUNG_NS = SECOND_NS
"""For so long a clock that turns out to be wrong is taken for one that was set as the run began."""
MAX_YOUNG = 1000
"""Events that are remembered meanwhile."""
MAX_INTERRUPTIONS = 10
"""Exceptions that the end of a session outlasts."""


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
        self.clock_event: Event | None = None
        """How the clock was set, until whoever reports it clears it."""
        self.ended: str | None = None
        """How the run has ended, where it rests and takes what is evaluated."""
        self._since: Callable[[], int] = self.clock
        self._offset = 0
        """What gives the time of an event, and what is added to it; set anew as an event is looked at more closely."""
        self._disk = disk
        self._header: Callable[[], Event] | None = None
        self._job = self._host = ""
        self._claim = ""
        self._first = False
        """Whether the next session is the first one of its run."""
        self._lock = threading.RLock()
        self._busy = self._due = self._upkeep_due = False
        """Whether a call is at work on the session; whether one has more to do before it returns, such as the owner's
        upkeep."""
        self._interrupting: deque[tuple[Event, Begun | None, SessionWriter | None]] = deque()
        self._next_check = self._next_maintenance = 0
        """When an event is looked at more closely (0: the next one, as where lines can't simply be written); when the
        session and its disk are. Unix ns."""
        self._clock_line: Event | None = None
        """What is to be written of the clock."""
        self._young: list[tuple[Event, Begun | None]] | None = None
        """What was written in the first moments; None once they are over."""
        self._young_until = 0
        self._anew: tuple[str, Event] | None = None
        """The id of the session that is written anew, and its `clock` event."""

    def open(
        self, header: Callable[[], Event], *, job_id: str, host: str, claim: str = "", at_once: bool = True
    ) -> None:
        """Open the first session.

        Args:
            header: Makes the header of a new session, with a session id of its own; called again for each later one.
                For the first one, nobody else who has the same claim is at the first session of a run meanwhile.
            job_id: Names the directory of the job.
            host: Names the directory of the host in it.
            claim: What the run is of the job: its rank. Runs that have it in common look for one another.
            at_once: False: the first event opens it.

        Raises:
            OSError: No session can be made.

        """
        self._header, self._job, self._host, self._first = header, slug(job_id), slug(host), True
        self._claim = f".{claim or 'start'}"
        if not at_once:
            return
        with self._lock:
            self._busy = True
            try:
                self._open_session()
                if isinstance(self.clock, Clock):
                    self._young, self._young_until = [], self.clock.since() + YOUNG_NS
            finally:
                self._busy = False

    def append_line(
        self, line: bytes, first: int, second: int | bytes, session: SessionWriter, begun: Begun | None = None
    ) -> None:
        """Write one event that is a line already, but for its numbers: what `append` does, in fewer steps.

        Args:
            line: A template (`format.template`) with two values of its own.
            first: The first of them.
            second: The second one.
            session: The journal's session as the event was made.
            begun: What begins by this event, or has to know its `seq` and `ts`.

        Raises:
            OSError: The session has ended, and no other one can be opened.

        """
        if self._busy:  # another thread is at work, or this one, in which a signal handler logs
            self.append(from_template(line, 0, 0, first, second), begun, session)
            return
        event, seq = None, 0
        with self._lock:
            self._busy = True
            try:
                since = self._since
                ts = since() + self._offset
                if ts >= self._next_check or session is not self.session:
                    event = from_template(line, 0, 0, first, second)
                    self._write(event, begun, session, ts)
                else:
                    if ts <= session.ts:
                        ts = session.ts + 1
                    session.ts = ts
                    seq = session.seq + 1
                    body = line % (ts, seq, first, second)
                    if begun is not None:
                        begun.seq = seq
                        begun.ts = ts
                    data = b'%b,"crc":%d}\n' % (body, crc32(body))
                    try:
                        if IDLE_THREADS.others:
                            written = session.write_keeping_gil(session.fd, data, len(data))
                        else:
                            write = session.write_file
                            written = write(session.fd, data)
                    except OSError as error:
                        if error.errno is None:  # of a signal handler, which may raise any exception of its own
                            raise
                        written = -1
                    if written == len(data):
                        session.seq = seq  # not before the line has its place: `settle` can tell
                        session.room = room = session.room - written
                        if room <= 0:
                            session.rotate()
                            self._next_check = 0
                    else:
                        self._next_check = 0
                        session.complete(data, max(written, 0), seq)
            except BaseException:
                self._next_check = 0
                self._recover(event or from_template(line, 0, seq, first, second), begun, session)
                raise
            finally:
                self._busy = False
        if self._due:
            self._finish_call()

    def append(self, event: Event, begun: Begun | None = None, session: SessionWriter | None = None) -> bool:
        """Write one event; when this returns it survives the process, unless it waits for a disk (`stored`).

        Args:
            event: Gets its `ts` and `seq`, and an end event its `begin`.
            begun: What begins or ends by this event: it keeps the `seq` and `ts` of its begin line.
            session: That the event was made in; None: the one that is open now.

        Returns:
            True: nothing here drops an event, as a processor may.

        Raises:
            OSError: The session has ended, and no other one can be opened.

        """
        session = session or self.session
        if self._busy and self._lock._is_owned():  # type: ignore[attr-defined] # a signal handler of this thread logs
            self._interrupting.append((event, begun, session))
            self._due = True
            return True
        with self._lock:
            self._busy = True
            try:
                self._write(event, begun, session, self._since() + self._offset)
            except BaseException:
                self._recover(event, begun, session)
                raise
            finally:
                self._busy = False
        if self._due:
            self._finish_call()
        return True

    def _write(self, event: Event, begun: Begun | None, session: SessionWriter | None, ts: int) -> None:
        """Write an event, with a closer look at the session where that is due."""
        if ts >= self._next_check or session is not self.session:
            ts = self._admit(event, begun, session, ts)
        if ts:
            writer = self.session
            assert writer is not None, "`_admit` sees to it"
            writer.write(event, ts, begun)
            if writer.hindrances or writer.syncs_each:
                self._next_check = 0

    def _finish_call(self) -> None:
        """Do what is due as a call has done its work: what signal handlers have logged meanwhile, and the upkeep."""
        if self._lock._is_owned():  # type: ignore[attr-defined] # by a caller
            return
        if self._interrupting:
            with self._lock:
                busy, self._busy = self._busy, True
                try:
                    self._write_all_interrupting()
                finally:
                    self._busy = busy
        self._due = False
        if self._upkeep_due and self.upkeep:
            self._upkeep_due = False
            self.upkeep()

    def stored(self) -> bool:
        """Write what waits for the disk, if that takes it now.

        Returns:
            Whether nothing waits, so that all events survive the process.

        """
        with self._lock:
            if self._busy or self.session is None:
                return not (self.session and self.session.waiting)
            self._busy = True
            try:
                if self.state is State.OPEN and self.session.hindrances & (WAITING | UNSETTLED):
                    self.session.maintain()
            except BaseException:
                self.session.hindrances |= UNSETTLED
                raise
            finally:
                self._busy, self._next_check = False, 0
            return not self.session.waiting

    def rest(self, status: str) -> None:
        """Say that the run has ended so, while its session goes on; what comes after it closes may open another one."""
        with self._lock:
            self.ended = status
            self._mark_resting()

    def close(self, status: str, *, for_good: bool = True) -> None:
        """End the session, if one is open.

        Args:
            status: "completed", "failed" or "interrupted"; `closed.json` keeps it.
            for_good: Take nothing more. False: the next event opens another session.

        """
        with self._lock:
            session = self.session
            if session is None or session.closed:
                return
            busy, self._busy, self._next_check = self._busy, True, 0
            self.state = State.CLOSED if for_good else State.ENDED
            if busy:  # a handler ends the run in the midst of a write
                session.hindrances |= UNSETTLED
            interruption: BaseException | None = None
            try:
                for _ in range(MAX_INTERRUPTIONS):
                    try:
                        while self._interrupting:
                            self._write_interrupting(closing=True)
                        session.finish(status)
                        session.forget()
                        break
                    except BaseException as error:  # Ctrl-C: the end is written all the same
                        interruption, session.hindrances = interruption or error, session.hindrances | UNSETTLED
            finally:  # whatever it was: a free lock says that the session has ended
                session.lost += len(self._interrupting)
                self._interrupting.clear()
                session.forget()
                self._busy = busy
            if interruption is not None:
                raise interruption

    def after_fork(self) -> None:
        """In a forked child: release the parent's session; the first event opens another one."""
        if self.session is not None:
            self.session.forget()
        self._lock = threading.RLock()
        self._busy = self._due = self._upkeep_due = False
        self._young = None
        self._interrupting.clear()
        self._first = False
        self.session, self.state, self._next_check, self._next_maintenance = None, State.UNOPENED, 0, 0

    def _admit(self, event: Event, begun: Begun | None, session: SessionWriter | None, ts: int) -> int:
        """See to it that a session is open for an event that was made in `session`.

        Returns:
            The time of the event; 0 where it must not be written.

        """
        if self.state is State.CLOSED:
            self.session.lost += 1  # type: ignore[union-attr] # it was open once
            return 0
        clock = self.clock if isinstance(self.clock, Clock) else None
        if clock is not None:
            self._finish_anew(clock)
            clock.compare_if_due(now=self._young is not None)
        if self.state is State.OPEN and ts >= self._next_maintenance:
            self._check(ts)
        if session is not None and (self.state is State.ENDED or session is not self.session):
            if "begin" in event:  # what began in a session that has ended, ended with it
                return 0
            if "parent" in event:
                event["parent"] = 0
        if self.state is not State.OPEN:
            if clock is not None and self.session is None:  # no time of this process stands anywhere
                clock.set_back()
            self._open_session()
            self._check(self.clock())
            if clock is not None:
                self._write_clock(clock, clock.ahead)
        elif clock is not None and clock.correction and not self._begin_anew(clock):
            self._write_clock(clock, clock.correction)
        ts = self.clock()
        self._next_check = self._next_maintenance if clock is None else min(self._next_maintenance, ts + clock.interval)
        if clock is not None and self._young is not None:
            self._young.append((event, begun))
            self._next_check = 0
            if clock.since() > self._young_until or len(self._young) > MAX_YOUNG:
                self._young = None
        if clock is not None:
            self._since, self._offset = clock.steady
        return ts

    def _check(self, ts: int) -> None:
        """Once a second: is the session still ours, and what does its disk say."""
        session = self.session
        assert session is not None
        if session.is_taken() or session.is_gone():
            self.state, self._next_check, self._next_maintenance = State.ENDED, 0, 0
            return
        self._next_maintenance = ts + min(SECOND_NS, int((self.limits.sync_every or 1) * SECOND_NS))
        session.maintain()
        self._due = self._upkeep_due = True

    def _write_clock(self, clock: Clock, ahead: int) -> None:
        """Write down that the clock is ahead by so many ns or, negative, was behind; nothing for 0."""
        if ahead and self._clock_line is None:
            self._clock_line = _clock_event(**{"ahead": ahead} if ahead > 0 else {"forward": -ahead})
        event, self._young = self._clock_line, None
        assert self.session is not None
        if event is not None and not 0 < event["seq"] <= self.session.seq:  # or it was, before an exception came
            self.session.write(event, clock())
        if clock.correction:
            self.clock_event, self._due, self._upkeep_due = event, True, True
        clock.correction, self._clock_line = 0, None

    def _begin_anew(self, clock: Clock) -> bool:
        """Write all that was written until now again, in a session with right times, if nothing of it was delivered.

        Returns:
            Whether that could be done.

        """
        session, ahead, young, self._young = self.session, clock.correction, self._young, None
        assert session is not None
        if young is None or session.hindrances & (WAITING | UNSETTLED) or session.is_delivered():
            return False
        started = session.header["started"] - ahead
        header = {**session.header, "session": os.urandom(8).hex(), "started": started}
        if ahead > 0:
            header.pop("not_before", None)  # of the session that goes
        fresh = SessionWriter(session.path.parent, header, limits=self.limits, clock=lambda: started, disk=self._disk)
        try:
            fresh.open()
            for event, begun in young:
                if event["seq"]:
                    event.update((name, event[name] - ahead) for name in ("at", "ended") if name in event)
                    fresh.write(event, event["ts"] - ahead, None if "begin" in event else begun)
            if (fresh.seq, fresh.waiting) != (session.seq, 0):
                raise OSError(errno.EIO, "not all of it could be written")
            event = _clock_event(before=ahead)
            fresh.write(event, clock() - clock.ahead)
            self._anew = fresh.id, event
            session.become(fresh)
        except BaseException as error:
            if session.id != fresh.id:
                fresh.discard()
                if isinstance(error, OSError):
                    return False
            raise
        self._finish_anew(clock)
        return True

    def _finish_anew(self, clock: Clock) -> None:
        """Set the clock right at once, if the session has become one whose times are."""
        if self._anew is not None:
            session, event = self._anew
            if self.session is not None and self.session.id == session:
                clock.set_back()
                self.clock_event, self._due, self._upkeep_due, self._next_maintenance = event, True, True, 0
                self._mark_resting()
            self._anew = None

    def _recover(self, event: Event, begun: Begun | None, session: SessionWriter | None) -> None:
        """Write an event whose call was left by an exception, unless that came after it was written, or comes again."""
        writer, self._next_check = self.session, 0
        if writer is None or self.state is not State.OPEN:
            return
        writer.hindrances |= UNSETTLED
        with suppress(BaseException):  # the first one is on its way
            writer.settle()
            self._write_once(event, begun, session)
            self._write_all_interrupting()

    def _write_once(self, event: Event, begun: Begun | None, session: SessionWriter | None) -> None:
        """Write an event unless that was done before an exception came."""
        if not (self.session and 0 < event["seq"] <= self.session.seq):
            self._next_check = 0
            self._write(event, begun, session, self.clock())

    def _open_session(self) -> None:
        assert self._header is not None, "open() comes first"
        host_directory = self._make_directory(self._job, self._host)
        with exclusive(host_directory.parent / self._claim) if self._first else nullcontext():
            fresh = SessionWriter(host_directory, self._header(), limits=self.limits, clock=self.clock, disk=self._disk)
            try:
                fresh.open()
                if self.session is not None:
                    fresh.take_over(self.session)
                self.session, self.state, self._first = fresh, State.OPEN, False
                self._mark_resting()
            except BaseException:
                if self.session is not fresh:
                    fresh.discard()
                raise

    def _mark_resting(self) -> None:
        if self.ended is not None and self.session is not None:
            with suppress(OSError):  # readers take it for running, as long as it does
                write_resting(self.session.path, self.ended, mode=0o640 if self.limits.group_readable else 0o600)

    def _make_directory(self, job: str, host: str) -> Path:
        """Make the directory of a host in a job, where it is missing. OSError."""
        mode = directory_mode(self.limits)
        self.directory.mkdir(mode=mode, parents=True, exist_ok=True)
        directory = self.directory
        for name in (job, host):
            directory /= name
            directory.mkdir(mode=mode, exist_ok=True)
        return directory

    def _write_all_interrupting(self) -> None:
        while self._interrupting:
            self._write_interrupting()

    def _write_interrupting(self, *, closing: bool = False) -> None:
        """Write the next event of a signal handler, which stays in the list until it has its place.

        Args:
            closing: Whether the session is about to end: nothing more is admitted, and no other one is opened.

        """
        event, begun, session = self._interrupting[0]
        assert self.session is not None
        try:
            if session is not self.session and "parent" in event:
                event["parent"] = 0
            if not closing:
                self._write_once(event, begun, session)
            elif not 0 < event["seq"] <= self.session.seq:
                self.session.write(event, self.clock(), begun)
        except Exception:  # it cannot be encoded: its handler has returned
            self.session.lost += 1
        self._interrupting.popleft()


def _clock_event(**fields: int) -> Event:
    return {"ts": 0, "seq": 0, "tag": "clock", **fields}
