"""Whose sessions a deliverer sends while jobs run; what it leaves is for `stepspan sync`.

A header lists the destinations that its session was begun for, and by which route (`stepspan.deliver.routes`). Those
make a job one that a destination gets, and of such a job a host's deliverer sends

- the sessions of this host that were begun for the destination, and those that were begun for none: a later one of
  their series would otherwise be sent before them. What was begun for another destination stays with that: at a new
  address everything earlier would be sent once more;
- where the job's rank 0 runs here, the dead sessions of earlier launches on hosts that have no part in this one: the
  job was queued again, and nobody is left there. Their cursors are locked while they are used (`journal.cursor`), so a
  deliverer that still works there keeps what it has.

Everything else in the directory is other people's, or was to stay offline.

Each session goes by its own route while its writer lives. Later credentials serve an older session

- of an earlier attempt of the job, once its writer is dead: a token was changed before the job was queued again;
- of another rank or, where the destination has a name, of another job, once it is dead, and nobody sends by its own;
- that was refused for its credentials, of the same job or named destination, at any time.

The deliverer of the older route comes to the same conclusion, for the later one holds its lock, and lets go of the
cursors.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from stepspan.deliver.begun import Begun, is_new, new_text, read_begun
from stepspan.deliver.lock import DeliveryLock
from stepspan.deliver.options import Options
from stepspan.deliver.routes import Route
from stepspan.errors import JournalError
from stepspan.journal.cursor import NAMED, cursor_name, read_cursor
from stepspan.journal.layout import SessionPath, find_sessions, slug
from stepspan.journal.liveness import read_closed, writer_is_dead
from stepspan.mapping.records import SIGNALS

log = logging.getLogger("stepspan.deliver")

ELSEWHERE_INTERVAL_S = 30.0
"""Between looks for sessions of a job that have died on other hosts."""
SYNC = ".sync"
"""After a destination, the name of the lock that `stepspan sync` holds."""


class LiveSessions:
    """The sessions that the deliverer of a host sends, by destination. Called by several threads at once.

    Args:
        directory: The directory of the journals.
        host: The name of this host.
        options: Say when a session of another host counts as dead.
        routes: By which each destination is reached, by its name. This process has their locks.

    """

    def __init__(self, directory: Path, host: str, options: Options, routes: Mapping[str, Route] | None = None) -> None:
        self._directory, self._host, self._options = directory, host, options
        self._routes = routes or {}
        self._begun: dict[Path, Begun] = {}
        self._dead: set[Path] = set()
        self._new: dict[tuple[str, Path], bool] = {}
        self.moved: dict[tuple[str, Path], str] = {}
        """Destination and session -> the lock of who sends it in place of a route whose credentials were refused."""
        self._elsewhere: dict[Path, tuple[float, list[SessionPath]]] = {}
        """Session of a rank 0 here -> when to look again, by the options' clock, and what its job had elsewhere."""
        self._lock = threading.Lock()
        self._left_logged: set[str] = set()
        """The destinations for which it was logged how many sessions they don't get."""

    def __call__(self, destination: str) -> list[SessionPath]:
        """The sessions that go to a destination now."""
        with self._lock:
            route = self._routes.get(destination) or Route(destination)
            here = list(find_sessions(self._directory, host=self._host))
            self._begun = {s.path: found for s in here if (found := self._begun.get(s.path) or read_begun(s))}
            listing = {path: begun for path, begun in self._begun.items() if begun.name_for(route)}
            jobs: dict[Path, dict[Path, Begun]] = {}
            for path, begun in listing.items():
                jobs.setdefault(path.parents[1], {})[path] = begun
            senders = _Senders(self, route, listing)
            chosen = [each for each in here if self._is_sent(each, route, jobs.get(each.path.parents[1]), senders)]
            self._log_left(route, here, chosen)
            for job, begun_for in jobs.items():
                mine = [each for each in begun_for.items() if each[1].is_first_rank and each[1].goes_by(route)]
                if mine and job != self._directory:
                    path, first = max(mine, key=lambda each: each[1].started)
                    chosen += self._look_elsewhere(job, first, path, route)
            return chosen

    def _is_sent(self, session: SessionPath, route: Route, job: Mapping[Path, Begun] | None, senders: _Senders) -> bool:
        """Whether a session of this host goes out by a route.

        Args:
            session: The session.
            route: The route.
            job: The sessions of its job that were begun for the route's destination.
            senders: Who sends those.

        """
        if job is None:
            return False
        begun = self._begun.get(session.path)
        if begun is None or begun.name_for(route) is None:
            latest = max(job.values(), key=lambda other: other.started)
            return latest.goes_by(route) and (begun is None or not self._is_new(session, begun, route))
        return senders.sender(session, begun) == route.lock_name and not self._has_moved(session, begun, route)

    def _look_elsewhere(self, job: Path, first: Begun, path: Path, route: Route) -> list[SessionPath]:
        """What earlier launches of a job have left on other hosts: looked for once, and again while its rank 0 lives.

        Args:
            job: The job's folder.
            first: The latest session of its rank 0 here.
            path: Where that lies.
            route: By which they would go.

        """
        now = self._options.clock()
        look_at, found = self._elsewhere.get(path, (now, []))
        if now < look_at:
            return found
        look_at = math.inf if read_closed(path) else now + ELSEWHERE_INTERVAL_S
        by_host: dict[str, list[tuple[SessionPath, Begun]]] = {}
        for session in find_sessions(job):
            if session.path.parent.name != slug(self._host) and (begun := read_begun(session)):
                by_host.setdefault(session.path.parent.name, []).append((session, begun))
        found = []
        for sessions in by_host.values():
            if all(begun.started < first.started and begun.run_key != first.run_key for _, begun in sessions):
                found += [
                    session
                    for session, begun in sessions
                    if self.is_dead(session, begun)
                    and not (self._is_new if begun.name_for(route) is None else self._has_moved)(session, begun, route)
                ]
        self._elsewhere[path] = look_at, found
        return found

    def is_at_work(self, name: str) -> bool:
        """Whether somebody has a lock of this host."""
        return DeliveryLock(self._directory, self._host, name).is_taken()

    def is_dead(self, session: SessionPath, begun: Begun) -> bool:
        """Whether nobody writes a session any more."""
        if session.path not in self._dead and self._is_found_dead(session, begun):
            self._dead.add(session.path)
        return session.path in self._dead

    def _is_found_dead(self, session: SessionPath, begun: Begun) -> bool:
        if read_closed(session.path) is not None:
            return True
        boot_id, dead_after = self._options.boot_id, self._options.dead_after
        try:
            return writer_is_dead(session, begun.header, boot_id=boot_id, dead_after=dead_after)
        except (OSError, JournalError):
            return False

    def _is_new(self, session: SessionPath, begun: Begun, route: Route) -> bool:
        """Whether a session that was begun for others has never gone to a destination: all of it would."""
        key = route.destination, session.path
        if key not in self._new:
            self._new[key] = is_new(session, begun, route)
        return self._new[key]

    def _has_moved(self, session: SessionPath, begun: Begun, route: Route) -> bool:
        """Whether a session that was begun for an address goes on under a name that this has got."""
        return not route.is_named and os.path.exists(f"{session.path}/cursors/{begun.name_for(route)}{NAMED}")

    def _log_left(self, route: Route, here: Sequence[SessionPath], chosen: Sequence[SessionPath]) -> None:
        """Say once how many sessions a destination does not get."""
        if route.destination in self._left_logged:
            return
        self._left_logged.add(route.destination)
        new = sum(
            self._new.get((route.destination, session.path), False) and self.is_dead(session, begun)
            for session in here
            if (begun := self._begun.get(session.path))
        )
        if new:
            log.warning("stepspan: %s", new_text(new, route, self._directory))
        if left := len(here) - len(chosen) - new:
            log.info(
                "stepspan: %d sessions of others were not begun for %s, or by another route: `stepspan sync`",
                left,
                route.destination,
            )


class _Senders:
    """Who sends the sessions that were begun for a destination: for one call of `LiveSessions`.

    Args:
        sessions: Keeps what is known from earlier calls.
        route: That of this process.
        listing: The sessions of this host that were begun for its destination.

    """

    def __init__(self, sessions: LiveSessions, route: Route, listing: Mapping[Path, Begun]) -> None:
        self._sessions, self._route, self._listing = sessions, route, listing
        self._at_work = {route.lock_name: True}
        self._latest: dict[Path, dict[tuple[str, str], int]] = {}
        """Job -> lock of a route and run -> when the last session of both began; empty where all go by one route."""
        self._of_all: dict[str, dict[str, int]] = {}
        """Of all jobs of a tenant: lock of a route -> the same."""
        if not all(begun.goes_by(route) for begun in listing.values()):
            for path, begun in listing.items():
                lock = begun.lock_names.get(begun.name_for(route) or "")
                if lock is not None:
                    of_job, key = self._latest.setdefault(path.parents[1], {}), (lock, begun.run_key)
                    of_job[key] = max(begun.started, of_job.get(key, 0))
                    of_all = self._of_all.setdefault(self._tenant(begun), {})
                    of_all[lock] = max(begun.started, of_all.get(lock, 0))

    def sender(self, session: SessionPath, begun: Begun) -> str:
        """The name of the lock of whoever sends a session."""
        route, key = self._route, (self._route.destination, session.path)
        name = begun.name_for(route) or route.destination
        own: str | None = begun.lock_names.get(name)
        if own is None:  # of an earlier version
            return route.lock_name
        moved = self._sessions.moved.get(key)
        if moved is not None and self._is_at_work(moved):
            return moved
        of_job, of_others = self._successors(session, begun, own, named=route.is_named and name == route.destination)
        sync = route.destination + SYNC
        if of_job or of_others or self._is_at_work(sync):
            dead = self._sessions.is_dead(session, begun)
            denied = is_denied(session, name)
            candidates = [
                *(of_job if dead or denied else ()),
                *(of_others if denied or (dead and not self._is_at_work(own)) else ()),
                *((sync,) if denied else ()),
            ]
            found: str | None = next(filter(self._is_at_work, candidates), None)
            if found is not None:
                if denied:
                    self._sessions.moved[key] = found
                return found
        if name != route.destination and begun.goes_by(route) and not self._is_at_work(own):
            return route.lock_name  # the address has got a name
        return own

    def _successors(self, session: SessionPath, begun: Begun, own: str, *, named: bool) -> tuple[list[str], list[str]]:
        """The locks of other routes by which later sessions were begun, the latest first.

        Returns:
            Those of later attempts of the job; and those of other ranks of the attempt and, where the destination is
            `named`, of other jobs.

        """
        attempts: dict[str, int] = {}
        others: dict[str, int] = {}
        of_job = self._latest.get(session.path.parents[1], {})
        for (lock, run_key), started in of_job.items():
            if lock != own and started > begun.started:
                found = others if run_key == begun.run_key else attempts
                found[lock] = max(started, found.get(lock, 0))
        if named:
            of_all = self._of_all.get(self._tenant(begun), {})
            others |= {lock: at for lock, at in of_all.items() if lock != own and at > begun.started}
        return _latest_first(attempts), _latest_first(others)

    def _tenant(self, begun: Begun) -> str:
        """Whose data a session is, as far as headers of requests say: nobody sends that of others."""
        return begun.tenants.get(begun.name_for(self._route) or "", "")

    def _is_at_work(self, name: str) -> bool:
        """Whether somebody holds a lock of this host."""
        if name not in self._at_work:
            self._at_work[name] = self._sessions.is_at_work(name)
        return self._at_work[name]


def _latest_first(times: Mapping[str, int]) -> list[str]:
    return sorted(times, key=lambda name: times[name], reverse=True)


def is_denied(session: SessionPath, destination: str) -> bool:
    """Whether a receiver has refused the credentials with which a session was last sent."""
    states = (read_cursor(session.path / "cursors" / cursor_name(destination, signal)) for signal in SIGNALS)
    return any(state is not None and state.denied for state in states)
