"""Whose sessions a deliverer sends while jobs run; what it leaves is for `stepspan sync`.

A header lists the destinations that its session was begun for. Those make a job one that a destination gets, and of
such a job a host's deliverer sends

- every session that was written on this host: also an attempt that was begun for nothing, for a later one of its series
  would otherwise be sent before it;
- where the job's rank 0 runs here, the dead sessions of earlier launches on hosts that have no part in this one: the
  job was queued again, and nobody is left there. Their cursors are locked while they are used (`journal.cursor`), so a
  deliverer that still works there keeps what it has.

Everything else in the directory is other people's, or was to stay offline.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from stepspan.deliver.options import Options
from stepspan.errors import JournalError
from stepspan.journal.layout import SessionPath, find_sessions, slug
from stepspan.journal.liveness import read_closed, writer_is_dead
from stepspan.journal.reader import JournalReader

log = logging.getLogger("stepspan.deliver")

ELSEWHERE_INTERVAL_S = 30.0
"""Between looks for sessions of a job that have died on other hosts."""


class _Begun(NamedTuple):
    """What a session's header says of its beginning."""

    destinations: frozenset[str]
    run_key: str
    started: int
    is_first_rank: bool
    header: Mapping[str, Any]


class LiveSessions:
    """The sessions that the deliverer of a host sends, by destination. Called by several threads at once.

    Args:
        directory: The directory of the journals.
        host: The name of this host.
        options: Say when a session of another host counts as dead.

    """

    def __init__(self, directory: Path, host: str, options: Options) -> None:
        self._directory, self._host, self._options = directory, host, options
        self._begun: dict[Path, _Begun] = {}
        self._elsewhere: dict[Path, tuple[float, list[SessionPath]]] = {}
        """Session of a rank 0 here -> when to look again, by the options' clock, and what its job had elsewhere."""
        self._lock = threading.Lock()
        self._left_logged: set[str] = set()
        """The destinations for which it was logged how many sessions they don't get."""

    def __call__(self, destination: str) -> list[SessionPath]:
        """The sessions that go to a destination now."""
        with self._lock:
            here = list(find_sessions(self._directory, host=self._host))
            self._begun = {s.path: found for s in here if (found := self._begun.get(s.path) or _read_begun(s))}
            first_ranks: dict[Path, tuple[_Begun | None, Path]] = {}
            for path, begun in self._begun.items():
                if destination in begun.destinations:
                    latest, _ = first_ranks.setdefault(path.parents[1], (None, path))
                    if begun.is_first_rank and (latest is None or latest.started < begun.started):
                        first_ranks[path.parents[1]] = begun, path
            chosen = [session for session in here if session.path.parents[1] in first_ranks]
            if destination not in self._left_logged and len(chosen) < len(here):
                left = len(here) - len(chosen)
                log.info(
                    "stepspan: %d sessions of other jobs were not begun for %s: `stepspan sync`", left, destination
                )
            self._left_logged.add(destination)
            for job, (first, path) in first_ranks.items():
                if first is not None and job != self._directory:
                    chosen += self._look_elsewhere(job, first, path)
            return chosen

    def _look_elsewhere(self, job: Path, first: _Begun, path: Path) -> list[SessionPath]:
        """What earlier launches of a job have left on other hosts: looked for once, and again while its rank 0 lives.

        Args:
            job: The job's folder.
            first: The latest session of its rank 0 here.
            path: Where that lies.

        """
        now = self._options.clock()
        look_at, found = self._elsewhere.get(path, (now, []))
        if now < look_at:
            return found
        look_at = math.inf if read_closed(path) else now + ELSEWHERE_INTERVAL_S
        by_host: dict[str, list[tuple[SessionPath, _Begun]]] = {}
        for session in find_sessions(job):
            if session.path.parent.name != slug(self._host) and (begun := _read_begun(session)):
                by_host.setdefault(session.path.parent.name, []).append((session, begun))
        found = []
        for sessions in by_host.values():
            if all(begun.started < first.started and begun.run_key != first.run_key for _, begun in sessions):
                found += [session for session, begun in sessions if self._is_dead(session, begun)]
        self._elsewhere[path] = look_at, found
        return found

    def _is_dead(self, session: SessionPath, begun: _Begun) -> bool:
        if read_closed(session.path) is not None:
            return True
        boot_id, dead_after = self._options.boot_id, self._options.dead_after
        try:
            return writer_is_dead(session, begun.header, boot_id=boot_id, dead_after=dead_after)
        except (OSError, JournalError):
            return False


def _read_begun(session: SessionPath) -> _Begun | None:
    """What the header says; None where it can't be read, or is not from our writer."""
    try:
        with closing(JournalReader(session)) as reader:
            header = reader.header
        listed = header.get("destinations")
        return _Begun(
            destinations=frozenset(d for d in listed if isinstance(d, str))
            if isinstance(listed, list)
            else frozenset(),
            run_key=str(header["run_key"]),
            started=int(header["started"]),
            is_first_rank=header["rank"] == 0 and not header["role"],
            header=header,
        )
    except (OSError, JournalError, KeyError, TypeError, ValueError):
        return None
