"""One signal of one destination: which session may go on, so that the receiver sees one merge by event time.

- No session runs more than `MAX_LEAD_NS` ahead of the slowest one that is neither held nor at its end: a receiver that
  takes only so much history (Prometheus' out-of-order window) must see five-day journals side by side, not one by one.
- Sessions of one series identity (a job's rank, restarted) go strictly in the order in which they started; one that is
  held lets its successor pass, or an old journal would hide the run that is on.
- A session whose cursor another deliverer has open is passed over, and tried again at each scan.
- When the receiver is away, one session asks, and all others wait for it. From its second try on another one asks, too,
  each time the one that has asked least: the reason may be in the first one's records, and then the others go on.
- A session that cannot be read, or that meets a defect, stops no other one. It is tried again every minute.
- Sessions that stand at their journals' ends are read, and what is new of them goes in one request (`joint`), once in
  `Options.send_interval`; the first line after a pause as soon as it has settled, and what must not wait (`tails`) at
  once. In between they are looked at by `stat` alone. That is for exporters that can join; others are read each time.

A scheduler belongs to one thread, which calls `run_once` again and again. The attributes that are documented below may
be read by others: collections are copied by `list(...)` before they are gone through, entries are replaced, never
changed.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stepspan.deliver.batches import Batch
from stepspan.deliver.isolation import Send
from stepspan.deliver.joint import JointRequests, Prepared
from stepspan.deliver.options import Options
from stepspan.deliver.refused import ReceiverMemory
from stepspan.deliver.shared_exporter import SharedExporter
from stepspan.deliver.task import DeliveryTask
from stepspan.errors import JournalError
from stepspan.exporters import Exporter
from stepspan.exporters.exporter import JoiningExporter
from stepspan.exporters.otlp import OtlpExporter
from stepspan.journal.cursor import CursorInUse, Ledger
from stepspan.journal.layout import SessionPath
from stepspan.journal.reader import SETTLE_S
from stepspan.mapping.records import Signal

log = logging.getLogger("stepspan.deliver")

MAX_LEAD_NS = 600 * 1_000_000_000
NO_LIMIT_NS = 1 << 62
AT_ONCE = -math.inf
"""A time that has come."""
RESCAN_INTERVAL_S = 1.0
REST_FACTOR, MAX_REST_S = 9, 1.0
"""After a run that found every live session at its end a scheduler rests so many times as long as it took, up to so
many seconds: to look at a thousand journals then costs a tenth of a core, and their requests become fuller."""
IN_USE_TIMEOUT_S = 2.5
"""For which a session is waited for that another deliverer sends: it may have been killed just now, or be ending."""
MAX_WOKEN = 64
"""Held sessions that a wake-up lets try again: those that began last. A directory may have thousands."""
UNREADABLE_RETRY_INTERVAL_S = 60.0
"""Until a session that could not be read is looked at again: a disk may have been full, an upgrade may come."""


@dataclass(slots=True)
class _Watch:
    """What is known of a session that stands at its journal's end, by the options' clock."""

    looked_at: float
    """When it was read last, or seen as it was read then."""
    news_at: float | None = None
    """Since when something may stand there that was not read."""
    again_at: float = math.inf
    """When to read it again, whatever the interval."""


class SessionProgress(NamedTuple):
    """How far one session is, as its cursor says."""

    job: str
    started: int
    """When the session began, Unix ns."""
    ledger: Ledger
    moved: bool
    """Whether the cursor has moved since this deliverer began."""
    finished: bool
    found: Ledger
    """The ledger as this deliverer found it."""


class Scheduler:
    """Delivers one signal of all sessions to one destination.

    Args:
        signal: Which records are delivered.
        exporter: Sends them.
        find: Lists the sessions.
        options: What all tasks have in common.

    """

    def __init__(
        self, signal: Signal, exporter: Exporter, find: Callable[[], Iterable[SessionPath]], options: Options
    ) -> None:
        self.signal: Signal = signal
        self.exporter = exporter
        self.tasks: dict[Path, DeliveryTask] = {}
        """The sessions that are not finished."""
        self.progress: dict[Path, SessionProgress] = {}
        """All sessions that could be read, the finished ones included."""
        self.unreadable: dict[Path, str] = {}
        """The sessions that could not be read, or that another deliverer sends, and why."""
        self.seen: set[Path] = set()
        """All sessions that were found."""
        self.listed = False
        """Whether everything that was there at the beginning has been found."""
        self.idle = False
        """Whether every session is at its end for now, or held. As of the last run that moved nothing, as `over` is."""
        self.over = False
        """Whether nothing is left to do that time alone would bring: no session lives, and the rest is held."""
        self.asked_at: float | None = None
        """When the first request began, Unix seconds."""
        self.is_asking = False
        """Whether a request is on its way, or about to be."""
        self.asking_since = 0.0
        """When that began, Unix seconds."""
        self.waiting = threading.Event()
        """Set by `wake`: who waits between two calls of `run_once` waits for this, and clears it."""
        self.woken = 0.0
        """The last `wake` after which every session has had its try."""
        self.answers: bool | None = None
        """Whether the receiver took what was last sent; None: it has not answered yet, or nothing was sent."""
        self.failure = ""
        """Why it took nothing when it was last asked."""
        self.broken = False
        """Whether a defect has ended the thread."""
        self.has_news = False
        """Whether something new has been seen that will be sent within the interval."""
        self.rests_until = 0.0
        """When to call `run_once` again, by the options' clock, if no journal grows until then; 0: soon."""
        self._find = find
        self._options = options
        self._memory = ReceiverMemory(options.clock)
        self._retry_at: dict[Path, float] = {}
        self._in_use_since: dict[Path, float] = {}
        self._defective: set[Path] = set()
        self._living = False
        self._wake = 0.0
        self._woken_at = -math.inf
        self._failing_since: float | None = None
        self._scanned_at: float | None = None
        self._not_before = self._rest_until = 0.0
        self._joint = None
        if options.send_interval > 0 and isinstance(exporter, JoiningExporter):
            self._joint = JointRequests(signal, exporter, options)
        self._watched: dict[Path, _Watch] = {}
        self._sent_at = -math.inf
        """When what was new of all sessions was sent last."""
        self._delivered_at = -math.inf
        """When a session went on last."""
        self._moved = False
        """Whether the last round moved a cursor."""

    def run_once(self) -> bool:
        """Let every session that may go on deliver a batch. Whether any cursor moved."""
        wake = self._wake
        if wake != self.woken:
            self._end_waits()
        if self._options.clock() < self._rest_until:
            return False
        scanned_at = self._scanned_at
        moved = self._dispatch()
        if moved is not None or self._moved or not self.tasks or self._scanned_at != scanned_at:
            self._moved = bool(moved)
            self._update_status(self._moved)
        self.woken = wake
        return self._moved

    def wake(self, at: float) -> None:
        """Let the next `run_once` send what there is, and try once more what was put off. Any thread may call it.

        What a receiver asked for (Retry-After) still holds.

        Args:
            at: When it was called for, Unix seconds; `woken` has it when that is done.

        """
        self._wake = at
        self.waiting.set()

    def receiver_unreachable(self, limit: float) -> bool:
        """Whether no session lives and the receiver has been silent for `limit` seconds."""
        return not self._living and self.silent_for() >= limit

    def silent_for(self) -> float:
        """Seconds since the receiver last took anything although there was something to send; 0 while it does.

        They are counted anew from a wake-up on: a run that ends in an outage leaves it time.
        """
        since = self._failing_since
        return self._options.clock() - max(since, self._woken_at) if since is not None else 0.0

    def has_seen_all(self) -> bool:
        """Whether all sessions that there are now have been found, or a defect has ended that."""
        return self.broken or all(session.path in self.seen for session in self._find())

    def close(self) -> None:
        """Close the files of all tasks."""
        for task in self.tasks.values():
            task.close()
        self.tasks.clear()

    def _end_waits(self) -> None:
        """Look for sessions, and try again, as soon as receivers allow."""
        self._scanned_at, self._rest_until, self._woken_at = None, 0.0, self._options.clock()
        latest = sorted(self.tasks.values(), key=lambda task: int(task.header["started"]), reverse=True)
        held = [task for task in latest if task.held]
        for task in (*(task for task in latest if not task.held), *held[:MAX_WOKEN]):
            task.wake()
        self._not_before = max((task.not_before for task in latest if not task.held), default=0.0)
        for watch in self._watched.values():
            watch.again_at = AT_ONCE

    def _dispatch(self) -> bool | None:
        """Send what is due. Whether any cursor moved; None: nothing was due."""
        now, self.rests_until = self._options.clock(), 0.0
        if self._scanned_at is None or now - self._scanned_at >= RESCAN_INTERVAL_S:
            self._scanned_at = now
            self._scan(now)
            self.listed = True
        if now < self._not_before:
            return False
        due = self.tasks.keys() if self._joint is None else self._due(now)
        if not due:
            return None
        self.is_asking = True
        try:
            moved = self._read_and_send(due, now)
        finally:
            self.is_asking = False
        if self._joint is None and self.tasks and all(task.at_end or task.held for task in self._eligible()):
            ended = self._options.clock()
            self._rest_until = ended + min(REST_FACTOR * (ended - now), MAX_REST_S)
        return moved

    def _read_and_send(self, due: Collection[Path], now: float) -> bool:
        """Let each of some sessions deliver a batch, alone or together. Whether any cursor moved."""
        moved = False
        eligible = self._eligible()
        reached = sorted(task.time for task in eligible if _has_more(task))
        fresh: list[Prepared] = []
        asked_another, queue = False, deque(eligible)
        while queue:
            task = queue.popleft()
            horizon = _horizon(task, reached)
            if task.session.path not in due or task.time > horizon or task.not_before > now:
                continue
            batch = self._prepare(task, horizon, now)
            if batch is None:
                continue
            if self._joint is not None and self._joint.may_join(task, batch):
                fresh.append((task, batch))
                continue
            moved |= self._deliver(task, batch, None)
            if self._is_away(task, now):
                if asked_another or task.failures < 2:
                    return moved
                asked_another, queue = True, deque(sorted(queue, key=lambda task: task.failures))
        for request in self._joint.send(fresh) if self._joint is not None else ():
            is_away = False
            for task, batch, send in request:
                moved |= self._deliver(task, batch, send)
                is_away |= self._is_away(task, now)
            if is_away:
                break
        return moved

    def _due(self, now: float) -> set[Path]:
        """The sessions to read now: those that have more, and of those at their ends whatever may have news."""
        due: set[Path] = set()
        waiting: list[Path] = []
        first_news_at, again_at, is_watched = math.inf, math.inf, True
        for path, task in self.tasks.items():
            watch = self._watched.get(path)
            if watch is None or not task.at_end or task.failing_since is not None:
                due.add(path)
                is_watched = False
                continue
            tail = task.look(now)
            if tail.urgent_at > watch.looked_at or now >= watch.again_at:
                due.add(path)
            elif watch.news_at is None and tail.grew_at > watch.looked_at:
                watch.news_at = now
            if watch.news_at is not None:
                waiting.append(path)
                first_news_at = min(first_news_at, watch.news_at)
            again_at = min(again_at, watch.again_at)
        interval = self._options.send_interval
        send_at = max(self._sent_at + interval, first_news_at + SETTLE_S)
        if now >= send_at:
            self._sent_at = send_at if now < send_at + interval else now  # all signals keep in step
            due.update(waiting)
        self.has_news = bool(waiting)
        if is_watched and not due and self._scanned_at is not None:
            scan_at = self._scanned_at + RESCAN_INTERVAL_S
            if send_at < scan_at + RESCAN_INTERVAL_S / 2:  # to wake up costs more than to look
                scan_at = max(scan_at, send_at)
            self.rests_until = min(send_at, again_at, scan_at)
        return due

    def _prepare(self, task: DeliveryTask, until: int, now: float) -> Batch | None:
        """A session's next batch; and when it is to be read again."""
        self.asking_since = self._options.wall_clock()
        if self.asked_at is None:
            self.asked_at = self.asking_since
        path, tail, watch = task.session.path, None, self._watched.get(task.session.path)
        if self._joint is not None:
            tail = task.look(now, 0.0)  # what is read then was seen, or has grown since
            is_urgent = watch is not None and (tail.urgent_at > watch.looked_at or watch.again_at == AT_ONCE)
            if watch is not None and not is_urgent and now - tail.grew_at < RESCAN_INTERVAL_S:
                task.note_alive()
            watch = self._watched[path] = _Watch(max(now, tail.grew_at, tail.urgent_at))
            if tail.grew_at > now - SETTLE_S:  # the last millisecond may have to wait
                watch.news_at = now
                watch.again_at = tail.grew_at + SETTLE_S if is_urgent else math.inf
        try:
            batch = task.prepare(until, tail)
        except Exception as error:  # also a defect that only this journal meets
            self._give_up(path, error)
            return None
        if watch is not None and (batch.position if batch else task.position).held_until:
            watch.news_at = now  # points whose time is still to come
        return batch

    def _deliver(self, task: DeliveryTask, batch: Batch, send: Send | None) -> bool:
        """Send a batch, or settle what was sent of it with others. Whether the cursor moved."""
        answered, self.asking_since = task.state.answered, self._options.wall_clock()
        try:
            moved = task.deliver(batch, send)
        except Exception as error:
            self._give_up(task.session.path, error)
            return False
        if moved:
            self._delivered_at, self._not_before = self._options.clock(), 0.0
            self._record(task, moved=True)
            if task.state.answered != answered:
                self.answers, self.failure = True, ""
        elif task.failing_since is not None:
            self.answers, self.failure = False, task.state.message
        if task.finished:
            self._retire(task)
        return moved

    def _is_away(self, task: DeliveryTask, now: float) -> bool:
        """Whether the receiver took nothing of a task, and is to be left alone for a while."""
        if task.finished or task.held or task.not_before <= now or not task.receiver_may_be_away:
            return False
        if task.failing_since is not None and self._delivered_at > task.failing_since:  # others have been taken since
            return False
        self._not_before = max(self._not_before, task.not_before)
        return True

    def _scan(self, now: float) -> None:
        """Begin with the sessions that are new, and again with those that could not be read a while ago."""
        found: set[Path] = set()
        for session in self._find():
            path = session.path
            found.add(path)
            if path not in self.seen:
                self.idle = self.over = False  # first: who finds it in `seen` must not find these as of before
                self.seen.add(path)
            if path in self.tasks or self._retry_at.get(path, now) > now:
                continue
            if path in self.progress and self.progress[path].finished:
                continue
            try:
                task = DeliveryTask(session, self.signal, self.exporter, self._options, self._memory)
            except CursorInUse as error:  # may be left to us at any time
                if self.unreadable.get(path) != str(error):
                    log.info("stepspan: %s %s: left alone: %s", path, self.signal, error)
                self.unreadable[path] = str(error)
                self._in_use_since.setdefault(path, now)
                continue
            except Exception as error:
                self._give_up(path, error)
                continue
            self._in_use_since.pop(path, None)
            self.tasks[path] = task
            self._record(task, moved=False)
            self.unreadable.pop(path, None)
            if task.finished:
                self._retire(task)
        for path in self.tasks.keys() - found:
            if path.exists():  # another deliverer sends it: that its files are gone is found out, and said
                self._retire(self.tasks[path])
                del self.progress[path]
        if (
            isinstance(self.exporter, (OtlpExporter, SharedExporter))
            and any(task.state.denied for task in self.tasks.values())
            and self.exporter.has_new_credentials(self.signal)
        ):
            self._end_waits()

    def _record(self, task: DeliveryTask, *, moved: bool) -> None:
        path, started = task.session.path, int(task.header["started"])
        moved = moved or (path in self.progress and self.progress[path].moved)
        found = self.progress[path].found if path in self.progress else task.state.ledger
        self.progress[path] = SessionProgress(task.job, started, task.state.ledger, moved, task.finished, found)

    def _update_status(self, moved: bool) -> None:
        """Say where things stand after a run."""
        tasks = self.tasks.values()
        self._failing_since = min((t.failing_since for t in tasks if t.failing_since is not None), default=None)
        if moved:
            self.idle = self.over = False
            self._living = True
            return
        self._living = False
        for path, task in list(self.tasks.items()):
            try:
                alive = self._has_grown(path, task) or task.alive
                self._living |= alive
                if not alive and path in self._watched:  # its end is to be read
                    self._watched[path].again_at = AT_ONCE
            except Exception as error:  # a task that has something left to send again would never notice
                self._give_up(path, error)
        now = self._options.clock()
        waits = any(now - since < IN_USE_TIMEOUT_S for since in self._in_use_since.values())
        has_news = any(watch.news_at is not None for watch in self._watched.values())
        at_ends = all(task.held or (task.at_end and task.failing_since is None) for task in tasks)
        self.idle = at_ends and not waits and not has_news
        self.over = all(task.held for task in tasks) and not self._living and not waits

    def _has_grown(self, path: Path, task: DeliveryTask) -> bool:
        """Whether a session was written just now, so that nobody needs to ask whether its writer lives."""
        if path not in self._watched:
            return False
        now = self._options.clock()
        tail = task.look(now)
        return now - tail.grew_at < RESCAN_INTERVAL_S and tail.urgent_at <= self._watched[path].looked_at

    def _eligible(self) -> list[DeliveryTask]:
        """The sessions that may go on, the slowest first; of those that share a series identity only the first."""
        eligible: list[DeliveryTask] = []
        busy: set[str] = set()
        for task in sorted(self.tasks.values(), key=lambda task: int(task.header["started"])):
            identity = repr(task.header["resource"].get("service.instance.id"))  # not from our writer: may be a list
            if identity not in busy:
                eligible.append(task)
                if not task.held:
                    busy.add(identity)
        return sorted(eligible, key=lambda task: task.time)

    def _retire(self, task: DeliveryTask) -> None:
        task.close()
        del self.tasks[task.session.path]
        self._forget(task.session.path)

    def _forget(self, path: Path) -> None:
        """Give up what is known of a session that is not followed any more."""
        self._watched.pop(path, None)
        if self._joint is not None:
            self._joint.forget(path)

    def _give_up(self, path: Path, error: Exception) -> None:
        """Leave a session that can't be read, or that meets a defect, until it is tried again."""
        if not isinstance(error, (OSError, JournalError)):
            if path not in self._defective:
                self._defective.add(path)
                log.exception("stepspan: %s %s: cannot be delivered", path, self.signal, exc_info=error)
            error = JournalError(f"a defect in stepspan: {error!r}")
        elif self.unreadable.get(path) != str(error):
            log.error("stepspan: %s %s: cannot be delivered: %s", path, self.signal, error)
        self.unreadable[path] = str(error)
        self._retry_at[path] = self._options.clock() + UNREADABLE_RETRY_INTERVAL_S
        task = self.tasks.pop(path, None)
        if task is not None:
            task.close()
            self._forget(path)


def _has_more(task: DeliveryTask) -> bool:
    return not task.held and not task.at_end


def _horizon(task: DeliveryTask, reached: Sequence[int]) -> int:
    """The event time up to which a session may go. `reached`: where those are that have more to send, ascending."""
    others = reached[1:] if _has_more(task) and reached[0] == task.time else reached
    return others[0] + MAX_LEAD_NS if others else NO_LIMIT_NS
