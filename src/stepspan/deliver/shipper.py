"""One signal of one destination: which session may go on, so that the receiver sees one merge by event time.

- No session runs more than `AHEAD` before the slowest one that is neither held nor at its end: a receiver that takes
  only so much history (Prometheus' out-of-order window) must see five-day journals side by side, not one by one.
- Sessions of one series identity (a job's rank, restarted) go strictly in the order in which they started; one that is
  held lets its successor pass, or an old journal would hide the run that is on.
- When the receiver is away, everybody waits for the one that asks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from stepspan.deliver.lane import Lane, Options
from stepspan.errors import JournalError
from stepspan.exporters import Exporter
from stepspan.journal.layout import SessionPath
from stepspan.otlp.records import Signal

log = logging.getLogger("stepspan.deliver")

AHEAD = 600 * 1_000_000_000
FOREVER = 1 << 62
RESCAN = 1.0


class Shipper:
    """Delivers one signal of all sessions that `find` lists."""

    def __init__(
        self, signal: Signal, exporter: Exporter, find: Callable[[], Iterable[SessionPath]], options: Options
    ) -> None:
        self.signal: Signal = signal
        self.exporter = exporter
        self.lanes: dict[Path, Lane] = {}
        """The sessions that are not finished."""
        self.unreadable: dict[Path, str] = {}
        self.rounds = 0
        """In which nothing moved."""
        self.broken = False
        self._find = find
        self._options = options
        self._finished: set[Path] = set()
        self._scanned: float | None = None
        self._not_before = 0.0

    def round(self) -> bool:
        """Give every session that may go on its turn; whether anything moved."""
        now = self._options.clock()
        if self._scanned is None or now - self._scanned >= RESCAN:
            self._scanned = now
            self._scan()
        if now < self._not_before:
            return False
        moved = False
        horizon = self._horizon()
        for lane in self._in_turn():
            if lane.time > horizon or lane.not_before > now:
                continue
            try:
                moved |= lane.advance(horizon)
            except (OSError, JournalError) as error:
                self._give_up(lane.session.path, error)
                continue
            if lane.finished:
                self._retire(lane)
            elif lane.not_before > now and not lane.held:
                self._not_before = lane.not_before
                break
        return moved

    @property
    def idle(self) -> bool:
        """Whether every session is at its end for now, or held."""
        return all(lane.held or (lane.at_end and lane.failing_since is None) for lane in self.lanes.values())

    @property
    def over(self) -> bool:
        """Whether nothing is left to do that time alone would bring: no session lives, and the rest is held."""
        return all(lane.held and not lane.alive for lane in self.lanes.values())

    def abandoned(self, patience: float) -> bool:
        """Whether no session lives and the receiver has been silent for `patience` seconds."""
        return self.silent_for() >= patience and not any(lane.alive for lane in self.lanes.values())

    def silent_for(self) -> float:
        """Seconds since a receiver that we have something for last took anything; 0 while it takes."""
        since = [lane.failing_since for lane in self.lanes.values() if lane.failing_since is not None]
        return self._options.clock() - min(since) if since else 0.0

    def close(self) -> None:
        """Release all files."""
        for lane in self.lanes.values():
            lane.close()
        self.lanes.clear()

    def _scan(self) -> None:
        for session in self._find():
            path = session.path
            if path in self.lanes or path in self._finished or path in self.unreadable:
                continue
            try:
                lane = Lane(session, self.signal, self.exporter, self._options)
            except (OSError, JournalError) as error:
                self._give_up(path, error)
                continue
            self.lanes[path] = lane
            if lane.finished:
                self._retire(lane)

    def _horizon(self) -> int:
        """The event time up to which anyone may go."""
        behind = [lane.time for lane in self.lanes.values() if not lane.held and not lane.at_end]
        return min(behind) + AHEAD if len(behind) > 1 else FOREVER

    def _in_turn(self) -> list[Lane]:
        """The sessions that may go on, the slowest first; of those that share a series identity only the first."""
        turn: list[Lane] = []
        taken: set[object] = set()
        for lane in sorted(self.lanes.values(), key=lambda lane: int(lane.header["started"])):
            identity = lane.header["resource"].get("service.instance.id")
            if identity not in taken:
                turn.append(lane)
                if not lane.held:
                    taken.add(identity)
        return sorted(turn, key=lambda lane: lane.time)

    def _retire(self, lane: Lane) -> None:
        lane.close()
        del self.lanes[lane.session.path]
        self._finished.add(lane.session.path)

    def _give_up(self, path: Path, error: Exception) -> None:
        """A session that can't be read stops nobody else."""
        log.error("%s %s: cannot be delivered: %s", path, self.signal, error)
        self.unreadable[path] = str(error)
        lane = self.lanes.pop(path, None)
        if lane is not None:
            lane.close()
