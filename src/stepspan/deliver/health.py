"""What a deliverer reports about itself: one metrics request every `REPORT_INTERVAL_S`, and a last one when it ends.

    resource    service.name=stepspan, service.instance.id=deliverer-<host>, host.name; the digest of its credentials is
                added to the second, for each set of them has a deliverer of its own
    attributes  job_id, destination, and signal where a signal has its own

Sums are the cursors' ledgers, added over the sessions of a job that this deliverer has found: they are durable, so they
go on over a restart. Their start is that of the job's first session here. A job is reported while a session of it is
open (held ones included), and once more after its last one has moved; jobs that were finished before are passed over.
A receiver of deltas gets what has come on since the report before that it took; the first one counts from when this
deliverer found the sessions.

Nothing of this may cost the journal anything. It has a thread and connections of its own, asks nothing of a receiver
that is away, and a request that fails is forgotten: the next one says more.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from stepspan.deliver.ledgers import first_pending_time
from stepspan.deliver.options import Options
from stepspan.deliver.scheduler import Scheduler
from stepspan.events import SECOND_NS
from stepspan.exporters.otlp import OtlpExporter
from stepspan.journal.cursor import Ledger, Position
from stepspan.journal.layout import SessionPath, segment_name
from stepspan.mapping.records import Attributes, Point, Series, Signal, Sum
from stepspan.otlp.outcome import Verdict

log = logging.getLogger("stepspan.deliver")

SERVICE = "stepspan"
REPORT_INTERVAL_S = 10.0
REQUEST_TIMEOUT_S = 3.0
"""For one request, and for the last one."""
RETRY_INTERVAL_S = 60.0
"""After a request that failed."""
MAX_JOBS = 500
"""How many jobs one request reports on."""


class Metric(NamedTuple):
    """One of a deliverer's metrics; `state` is the attribute that names a ledger's field."""

    name: str
    unit: str
    kind: Literal["gauge", "sum"]
    description: str
    state: str = ""

    def series(self, attributes: Attributes) -> Series:
        """The series with these attributes."""
        return Series(self.name, attributes, self.unit, self.kind, self.description)


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
OUTCOMES = ("delivered", "rejected", "filtered", "thinned")
STATES = ("read", "damaged", "dropped", "pruned")


@dataclass(slots=True)
class Totals:
    """One signal of one job, over all of its sessions."""

    started: int
    """When the first of them began, Unix ns."""
    ledger: Ledger
    pending_bytes: int = 0
    pending_since: int = 0
    """The time of the first event that waits, Unix ns; 0: none waits."""
    held: int = 0


Jobs = dict[str, dict[Signal, Totals]]


class Health:
    """Reports to a receiver how the delivery to it goes.

    Args:
        exporter: Of the destination; used over connections of its own.
        schedulers: Those of this exporter.
        host: Names this deliverer.
        options: Whose clocks are used.

    """

    def __init__(self, exporter: OtlpExporter, schedulers: Sequence[Scheduler], host: str, options: Options) -> None:
        self.resource: Attributes = {
            "service.name": SERVICE,
            "service.instance.id": "-".join(filter(None, ("deliverer", host, exporter.digest))),
            "host.name": host,
        }
        self._exporter = exporter.clone(REQUEST_TIMEOUT_S)
        self._schedulers = schedulers
        self._options = options
        self._reported: dict[str, dict[Signal, Ledger]] = {}
        """What the receiver last took, by job."""
        self._not_before = 0.0
        self._is_delta = exporter.mapping_options.temporality == "delta"
        self._began = int(options.wall_clock() * SECOND_NS)
        self._before: dict[str, Point] = {}
        """Of deltas: the sums that the receiver took last, by what makes their series."""

    def run(self, stop: threading.Event) -> None:
        """Report again and again until `stop` is set, then once more where something was delivered. Raises nothing."""
        try:
            while not stop.wait(REPORT_INTERVAL_S):
                self.report()
            if any(progress.moved for s in self._schedulers for progress in list(s.progress.values())):
                self.report()
        except Exception:  # a defect here is no reason to stop anything else
            log.exception("stepspan: health of the delivery to %s is no longer reported", self._exporter.destination)
        finally:
            self._exporter.close()

    def report(self) -> bool:
        """Send one report, if the receiver is there; whether it took it."""
        if not self._receiver_answers():
            return False
        now = int(self._options.wall_clock() * SECOND_NS)
        jobs = self.jobs()
        names = list(jobs)
        for first in range(0, len(names), MAX_JOBS):
            some = {job: jobs[job] for job in names[first : first + MAX_JOBS]}
            points = list(self.points(some, now))
            outcome = self._exporter.export(
                "metrics", self.resource, self._deltas(points) if self._is_delta else points
            )
            if outcome.verdict is not Verdict.DELIVERED:
                log.debug("stepspan: health was not taken: %s", outcome.message)
                self._not_before = self._options.clock() + RETRY_INTERVAL_S
                return False
            self._reported |= {job: _ledgers(totals) for job, totals in some.items()}
            self._before |= {_identity(point[0]): point for point in points if self._is_delta and type(point[2]) is Sum}
        return bool(jobs)

    def _receiver_answers(self) -> bool:
        """Whether a request is worth sending: all sessions were found, and metrics don't wait for the receiver."""
        away = (
            task.failing_since is not None and task.state.state == "retry"
            for scheduler in self._schedulers
            if scheduler.signal == "metrics"
            for task in list(scheduler.tasks.values())
        )
        listed = all(scheduler.listed for scheduler in self._schedulers)
        return listed and self._options.clock() >= self._not_before and not any(away)

    def jobs(self) -> Jobs:
        """The totals of each job that is to be reported now."""
        tasks = [(s.signal, task) for s in self._schedulers for task in list(s.tasks.values()) if not task.finished]
        progress = [(s.signal, entry) for s in self._schedulers for entry in list(s.progress.values())]
        is_open = {task.job for _, task in tasks}
        due = is_open | {entry.job for _, entry in progress if entry.moved}
        jobs: Jobs = {}
        for signal, entry in progress:
            if entry.job in due:
                started = self._began if self._is_delta else entry.started
                totals = jobs.setdefault(entry.job, {}).setdefault(signal, Totals(started, Ledger()))
                totals.started = min(totals.started, started)
                ledger = entry.ledger.minus(entry.found) if self._is_delta else entry.ledger
                totals.ledger = totals.ledger.plus(ledger)
        jobs = {job: t for job, t in jobs.items() if job in is_open or _ledgers(t) != self._reported.get(job)}
        for signal, task in tasks:
            if signal not in jobs.get(task.job, {}):
                continue  # found just now
            totals = jobs[task.job][signal]
            totals.held += task.held
            position = task.position
            waiting = pending_bytes(task.session, position)
            since = first_pending_time(task.session, position) if waiting else 0
            totals.pending_bytes += waiting
            if since:
                totals.pending_since = min(totals.pending_since or since, since)
        return jobs

    def _deltas(self, points: Sequence[Point]) -> list[Point]:
        """Points with deltas in place of sums."""
        deltas: list[Point] = []
        for series, now, value in points:
            if isinstance(value, Sum):
                series = replace(series, kind="delta_sum")
                _, since, before = self._before.get(_identity(series), (series, value.start, None))
                value = Sum(since, value.value - (before.value if isinstance(before, Sum) else 0.0))
            deltas.append((series, now, value))
        return deltas

    def points(self, jobs: Mapping[str, Mapping[Signal, Totals]], now: int) -> Iterator[Point]:
        """The report on some jobs. `now`: Unix ns."""
        for job, signals in jobs.items():
            attributes = {"job_id": job, "destination": self._exporter.destination}
            for signal, totals in signals.items():
                of_signal = {**attributes, "signal": signal}
                yield from _sums(RECORDS, OUTCOMES, [totals], of_signal, now)
                lag = max(0.0, (now - totals.pending_since) / SECOND_NS) if totals.pending_since else 0.0
                for metric, value in ((PENDING, totals.pending_bytes), (LAG, lag), (HELD, totals.held)):
                    yield metric.series(of_signal), now, float(value)
            yield from _sums(LINES, STATES, list(signals.values()), attributes, now)


def _sums(
    metric: Metric, names: Sequence[str], totals: Sequence[Totals], attributes: Attributes, now: int
) -> Iterator[Point]:
    """A point for each of some fields of a ledger: of several ledgers, the greatest."""
    start = min(each.started for each in totals)
    for name in names:
        value = max(getattr(each.ledger, name) for each in totals)
        yield metric.series({**attributes, metric.state: name}), now, Sum(start, float(value))


def _identity(series: Series) -> str:
    return repr((series.name, sorted(series.attributes.items())))


def _ledgers(totals: Mapping[Signal, Totals]) -> dict[Signal, Ledger]:
    return {signal: each.ledger for signal, each in totals.items()}


def pending_bytes(session: SessionPath, position: Position) -> int:
    """Journal bytes after a position."""
    size = 0
    with suppress(OSError):
        for number in session.segments():
            if number >= position.segment:
                size += os.stat(session.path / segment_name(number)).st_size
                size -= position.offset if number == position.segment else 0
    return max(0, size)
