"""One signal of one destination: which session may go on, so that the receiver sees one merge by event time.

- No session runs more than `AHEAD` before the slowest one that is neither held nor at its end: a receiver that takes
  only so much history (Prometheus' out-of-order window) must see five-day journals side by side, not one by one.
- Sessions of one series identity (a job's rank, restarted) go strictly in the order in which they started; one that is
  held lets its successor pass, or an old journal would hide the run that is on.
- When the receiver is away, everybody waits for the one that asks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from stepspan.deliver.health import Book
from stepspan.deliver.task import DeliveryTask, Options
from stepspan.errors import JournalError
from stepspan.exporters import Exporter
from stepspan.journal.layout import SessionPath
from stepspan.mapping.records import Signal

log = logging.getLogger("stepspan.deliver")

AHEAD = 600 * 1_000_000_000
FOREVER = 1 << 62
RESCAN = 1.0
REST, LONGEST_REST = 9, 1.0
"""After a round that found every live session at its end a shipper rests so many times as long as it took, and so many
seconds at most: to look at a thousand journals then costs a tenth of a core, and their requests become fuller."""
TRY_AGAIN = 60.0
"""Seconds until a session that could not be read is looked at again: a disk may have been full, an upgrade may come."""


class Scheduler:
    """Delivers one signal of all sessions that `find` lists."""

    def __init__(
        self, signal: Signal, exporter: Exporter, find: Callable[[], Iterable[SessionPath]], options: Options
    ) -> None:
        self.signal: Signal = signal
        self.exporter = exporter
        self.lanes: dict[Path, DeliveryTask] = {}
        """The sessions that are not finished."""
        self.unreadable: dict[Path, str] = {}
        """The sessions that could not be read, and why."""
        self.met: set[Path] = set()
        """All sessions that have been listed so far."""
        self.book = Book()
        """What became of lines and records, by job."""
        self.listed = False
        """Whether all that was there has been met, and stands in the book."""
        self.rounds = 0
        """In which nothing moved. What follows is as of the last one, for other threads to look at."""
        self.idle = False
        """Whether every session is at its end for now, or held."""
        self.over = False
        """Whether nothing is left to do that time alone would bring: no session lives, and the rest is held."""
        self.broken = False
        self._find = find
        self._options = options
        self._finished: set[Path] = set()
        self._try_again: dict[Path, float] = {}
        self._defective: set[Path] = set()
        self._living = False
        self._failing_since: float | None = None
        self._scanned: float | None = None
        self._not_before = self._rests_until = 0.0

    def round(self) -> bool:
        """Give every session that may go on its turn; whether anything moved."""
        if self._options.clock() < self._rests_until:
            return False
        moved = self._give_turns()
        self._survey(moved)
        return moved

    def _give_turns(self) -> bool:
        now = self._options.clock()
        if self._scanned is None or now - self._scanned >= RESCAN:
            self._scanned = now
            self._scan(now)
            self.listed = True
        if now < self._not_before:
            return False
        moved = False
        turn = self._in_turn()
        behind = sorted(lane.time for lane in turn if not lane.held and not lane.at_end)
        for lane in turn:
            horizon = _horizon(lane, behind)
            if lane.time > horizon or lane.not_before > now:
                continue
            try:
                if lane.advance(horizon):
                    moved = True
                    self.book.count(lane, moved=True)
            except Exception as error:  # also a defect that only this journal meets
                self._give_up(lane.session.path, error)
                continue
            if lane.finished:
                self._retire(lane)
            elif lane.not_before > now and not lane.held:
                self._not_before = lane.not_before
                return moved
        if self.lanes and all(lane.at_end or lane.held for lane in turn):
            over = self._options.clock()
            self._rests_until = over + min(REST * (over - now), LONGEST_REST)
        return moved

    def abandoned(self, patience: float) -> bool:
        """Whether no session lives and the receiver has been silent for `patience` seconds."""
        return not self._living and self.silent_for() >= patience

    def silent_for(self) -> float:
        """Seconds since a receiver that we have something for last took anything; 0 while it takes."""
        since = self._failing_since
        return self._options.clock() - since if since is not None else 0.0

    def close(self) -> None:
        """Release all files."""
        for lane in self.lanes.values():
            lane.close()
        self.lanes.clear()

    def _scan(self, now: float) -> None:
        for session in self._find():
            path = session.path
            self.met.add(path)
            if path in self.lanes or path in self._finished or self._try_again.get(path, now) > now:
                continue
            try:
                lane = DeliveryTask(session, self.signal, self.exporter, self._options)
            except Exception as error:
                self._give_up(path, error)
                continue
            self.lanes[path] = lane
            self.book.count(lane, moved=False)
            self.unreadable.pop(path, None)
            if lane.finished:
                self._retire(lane)

    def _survey(self, moved: bool) -> None:
        """Where things stand after a round."""
        lanes = self.lanes.values()
        since = [lane.failing_since for lane in lanes if lane.failing_since is not None]
        self._failing_since = min(since, default=None)
        if moved:
            self.idle = self.over = False
            self._living = True
            return
        self._living = False
        for path, lane in list(self.lanes.items()):
            try:
                self._living |= lane.alive
            except Exception as error:  # a turn that has something left to send again would never notice
                self._give_up(path, error)
        self.idle = all(lane.held or (lane.at_end and lane.failing_since is None) for lane in lanes)
        self.over = all(lane.held for lane in lanes) and not self._living
        self.rounds += 1

    def _in_turn(self) -> list[DeliveryTask]:
        """The sessions that may go on, the slowest first; of those that share a series identity only the first."""
        turn: list[DeliveryTask] = []
        taken: set[str] = set()
        for lane in sorted(self.lanes.values(), key=lambda lane: int(lane.header["started"])):
            identity = repr(lane.header["resource"].get("service.instance.id"))  # somebody's journal: may be a list
            if identity not in taken:
                turn.append(lane)
                if not lane.held:
                    taken.add(identity)
        return sorted(turn, key=lambda lane: lane.time)

    def _retire(self, lane: DeliveryTask) -> None:
        lane.close()
        del self.lanes[lane.session.path]
        self._finished.add(lane.session.path)

    def _give_up(self, path: Path, error: Exception) -> None:
        """A session that can't be read, or that a defect of ours meets, stops nobody else."""
        if not isinstance(error, (OSError, JournalError)):
            if path not in self._defective:
                self._defective.add(path)
                log.exception("%s %s: cannot be delivered", path, self.signal, exc_info=error)
            error = JournalError(f"a defect met it: {error!r}")
        elif self.unreadable.get(path) != str(error):
            log.error("%s %s: cannot be delivered: %s", path, self.signal, error)
        self.unreadable[path] = str(error)
        self._try_again[path] = self._options.clock() + TRY_AGAIN
        lane = self.lanes.pop(path, None)
        if lane is not None:
            lane.close()


def _horizon(lane: DeliveryTask, behind: Sequence[int]) -> int:
    """The event time up to which a session may go. `behind`: where those are that have more to send, ascending."""
    among_them = not lane.held and not lane.at_end
    others = behind[1:] if among_them and behind[0] == lane.time else behind
    return others[0] + AHEAD if others else FOREVER
