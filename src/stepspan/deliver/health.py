"""What a deliverer tells of itself: one metrics request every `EVERY` seconds, and a last one when it ends.

    resource    service.name=stepspan, service.instance.id=deliverer-<host>, host.name
    attributes  job_id, destination, and signal where a signal has its own

Sums are the cursors' ledgers, added over the sessions of a job that this deliverer has met: they are durable, so they
go on over a restart. Their start is that of the job's first session here. A job is told while a session of it is open
(held ones included), and once more after its last one has moved; jobs that were finished before are passed over.

Nothing of this may cost the journal anything. It has a thread and connections of its own, asks nothing of a receiver
that is away, and a request that fails is forgotten: the next one tells more.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from stepspan.events import Event
from stepspan.journal.cursor import Ledger, Position
from stepspan.journal.layout import SessionPath, segment_name
from stepspan.mapping.records import Attributes, Point, Series, Signal, Sum
from stepspan.otlp.outcome import Verdict

if TYPE_CHECKING:
    from stepspan.deliver.scheduler import Scheduler
    from stepspan.deliver.task import DeliveryTask, Options
    from stepspan.exporters.otlp import OtlpExporter

log = logging.getLogger("stepspan.deliver")

SERVICE = "stepspan"
EVERY = 10.0
TIMEOUT = 3.0
"""Seconds for one request, and for the last one."""
ASK_AGAIN = 60.0
"""Seconds after a request that failed."""
JOBS = 500
"""In one request."""
LOOK = 4096
"""Bytes in which the next line's time is looked for."""
TIME = re.compile(rb'^\{"ts":(\d+),', re.MULTILINE)
SECOND = 1_000_000_000


class Metric(NamedTuple):
    """One of our metrics; `state` is the attribute that tells the fields of a ledger apart."""

    name: str
    unit: str
    kind: Literal["gauge", "sum"]
    description: str
    state: str = ""


RECORDS = Metric(
    "stepspan.delivery.records", "{record}", "sum", "Records by what became of them at the destination.", "outcome"
)
PENDING = Metric("stepspan.delivery.pending", "By", "gauge", "Journal that is not delivered yet.")
LAG = Metric("stepspan.delivery.lag", "s", "gauge", "Age of the oldest event that is not delivered yet; 0: none waits.")
HELD = Metric("stepspan.delivery.held", "{session}", "gauge", "Sessions that wait for a person.")
LINES = Metric(
    "stepspan.journal.lines", "{line}", "sum", "Journal lines by what a reader found; of several signals, the most.",
    "state",
)  # fmt: skip
OUTCOMES = ("delivered", "rejected", "filtered")
STATES = ("read", "damaged", "dropped", "pruned")


@dataclass(frozen=True, slots=True)
class Tally:
    """One job's ledger for one signal, over all sessions that were met."""

    started: int
    """When the first of them began, Unix ns."""
    ledger: Ledger = field(default_factory=Ledger)
    moves: int = 0
    """Of cursors, since this deliverer began."""


class Book:
    """One signal's tallies by job. Its shipper writes, anybody reads: an entry is replaced, never changed."""

    def __init__(self) -> None:
        self.jobs: dict[str, Tally] = {}
        self._counted: dict[Path, Ledger] = {}
        """What the tallies hold of each session that is not finished."""

    def count(self, lane: DeliveryTask, *, moved: bool) -> None:
        """Bring a session's part up to date, when it is met and whenever its cursor has moved."""
        path, ledger, started = lane.session.path, lane.state.ledger, int(lane.header["started"])
        job = job_of(lane.header)
        tally = self.jobs.get(job) or Tally(started)
        before = self._counted.pop(path, Ledger())
        grown = [getattr(ledger, f.name) - getattr(before, f.name) for f in fields(Ledger)]
        self.jobs[job] = Tally(min(tally.started, started), tally.ledger.plus(Ledger(*grown)), tally.moves + moved)
        if not lane.finished:
            self._counted[path] = ledger


def job_of(header: Event) -> str:
    """The job of a session."""
    return str(header["resource"].get("job_id") or header.get("job_id", ""))


@dataclass(slots=True)
class Waiting:
    """What waits of one job and signal."""

    size: int = 0
    oldest: int = 0
    """The time of the first event, Unix ns; 0: none waits."""
    held: int = 0


class Health:
    """Tells `exporter`'s receiver how the delivery to it goes. `host` names this deliverer."""

    def __init__(self, exporter: OtlpExporter, shippers: Sequence[Scheduler], host: str, options: Options) -> None:
        self.resource: Attributes = {
            "service.name": SERVICE,
            "service.instance.id": f"deliverer-{host}",
            "host.name": host,
        }
        self._exporter = exporter.clone(TIMEOUT)
        self._shippers = shippers
        self._options = options
        self._series: dict[tuple[str, ...], Series] = {}
        self._told: dict[str, int] = {}
        """Job -> its moves when the receiver last took what we told of it."""
        self._oldest: dict[tuple[Path, Signal], tuple[Position, int]] = {}
        self._not_before = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"stepspan-{exporter.destination}-health", daemon=True)

    def start(self) -> None:
        """Begin to tell, on a thread."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Tell once more where something was delivered, for at most `timeout` seconds."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while not self._stop.wait(EVERY):
                self.warn_once()
            if any(tally.moves for shipper in self._shippers for tally in list(shipper.book.jobs.values())):
                self.warn_once()
        except Exception:  # a defect here is no reason to stop anything else
            log.exception("nothing more is told of the delivery to %s", self._exporter.destination)
        finally:
            self._exporter.close()

    def warn_once(self) -> bool:
        """One report, if the receiver is there; whether it took it."""
        if not self._answers():
            return False
        now = int(self._options.wall() * SECOND)
        jobs = self._jobs()
        names = list(jobs)
        for first in range(0, len(names), JOBS):
            some = {job: jobs[job] for job in names[first : first + JOBS]}
            moves = {job: self._moves(job) for job in some}  # before the points: what comes in between is told again
            outcome = self._exporter.export("metrics", self.resource, list(self.points(some, now)))
            if outcome.verdict is not Verdict.DELIVERED:
                log.debug("health was not taken: %s", outcome.message)
                self._not_before = self._options.clock() + ASK_AGAIN
                return False
            self._told |= moves
        return bool(jobs)

    def _answers(self) -> bool:
        """Whether a request is worth sending: everyone has been listed, and metrics don't wait for the receiver."""
        away = (
            lane.failing_since is not None and lane.state.state == "retry"
            for shipper in self._shippers
            if shipper.signal == "metrics"
            for lane in list(shipper.lanes.values())
        )
        listed = all(shipper.listed for shipper in self._shippers)
        return listed and self._options.clock() >= self._not_before and not any(away)

    def _moves(self, job: str) -> int:
        return sum(shipper.book.jobs[job].moves for shipper in self._shippers if job in shipper.book.jobs)

    def _jobs(self) -> dict[str, dict[Signal, Waiting]]:
        """What is to be told: for each job and signal what waits."""
        sizes: dict[Path, Sizes] = {}
        oldest: dict[tuple[Path, Signal], tuple[Position, int]] = {}
        found: dict[str, dict[Signal, Waiting]] = {}
        for shipper in self._shippers:
            for path, lane in list(shipper.lanes.items()):
                if lane.finished:
                    continue
                job = found.setdefault(job_of(lane.header), {})
                waiting = job.setdefault(shipper.signal, Waiting())
                waiting.held += lane.held
                position = lane.position
                size = sizes.setdefault(path, Sizes(lane.session)).after(position)
                if not size:
                    continue
                waiting.size += size
                key = (path, shipper.signal)
                known = self._oldest.get(key)
                if known is None or known[0] != position or not known[1]:
                    known = position, next_time(lane, position)
                oldest[key] = known
                if known[1]:
                    waiting.oldest = min(waiting.oldest or known[1], known[1])
        self._oldest = oldest
        for shipper in self._shippers:
            for name in list(shipper.book.jobs):
                if self._moves(name) > self._told.get(name, 0):
                    found.setdefault(name, {})
        return found

    def points(self, jobs: Mapping[str, Mapping[Signal, Waiting]], now: int) -> Iterator[Point]:
        """The report on some jobs."""
        for job, waiting in jobs.items():
            tallies = {s.signal: s.book.jobs[job] for s in self._shippers if job in s.book.jobs}
            for signal, tally in tallies.items():
                yield from self._sums(RECORDS, OUTCOMES, [tally], now, job, signal)
                state = waiting.get(signal, Waiting())
                lag = max(0.0, (now - state.oldest) / SECOND) if state.oldest else 0.0
                for metric, value in ((PENDING, state.size), (LAG, lag), (HELD, state.held)):
                    yield self._of(metric, job, signal), now, float(value)
            yield from self._sums(LINES, STATES, tallies.values(), now, job)

    def _sums(
        self, metric: Metric, names: Sequence[str], tallies: Iterable[Tally], now: int, job: str, *signal: str
    ) -> Iterator[Point]:
        tallies = list(tallies)
        start = min(tally.started for tally in tallies)
        for name in names:
            most = max(getattr(tally.ledger, name) for tally in tallies)
            yield self._of(metric, job, *signal, **{metric.state: name}), now, Sum(start, float(most))

    def _of(self, metric: Metric, job: str, *signal: str, **state: str) -> Series:
        identity = (metric.name, job, *signal, *state.values())
        series = self._series.get(identity)
        if series is None:
            about = {"job_id": job, "destination": self._exporter.destination}
            if signal:
                about["signal"] = signal[0]
            series = Series(metric.name, {**about, **state}, metric.unit, metric.kind, metric.description)
            self._series[identity] = series
        return series


class Sizes:
    """The sizes of a session's segments, each looked up once."""

    def __init__(self, session: SessionPath) -> None:
        self._session = session
        self._known: dict[int, int] = {}

    def after(self, position: Position) -> int:
        """Journal bytes after a position."""
        number, size = position.segment, -position.offset
        if not number or self._of(number) < 0:  # nothing was read yet, or it has been pruned
            with contextlib.suppress(OSError):
                return sum(max(0, self._of(n)) for n in self._session.segments() if n > number)
            return 0
        while (more := self._of(number)) >= 0:
            size += more
            number += 1
        return max(0, size)

    def _of(self, number: int) -> int:
        """The size of a segment, -1 for one that is not there."""
        if number not in self._known:
            try:
                self._known[number] = os.stat(self._session.path / segment_name(number)).st_size
            except OSError:
                self._known[number] = -1
        return self._known[number]


def next_time(lane: DeliveryTask, position: Position) -> int:
    """The time of the first whole line after a position, Unix ns; 0 where no line is whole yet."""
    number, offset = position.segment, position.offset
    for here, start in ((number, offset), (None, 0)):
        data = b""
        with contextlib.suppress(OSError):
            if here is None:
                here = min((n for n in lane.session.segments() if n > number), default=0)
            if here:
                data = lane.session.read(here, start, LOOK)
        match = TIME.search(data) if b"\n" in data or len(data) == LOOK else None
        if match:
            return int(match[1])
        if len(data) == LOOK:  # damaged
            return position.ts or int(lane.header["started"])
    return 0
