"""One request for what is fresh of several sessions: whose batches go together, and what its outcome means for each.

Together goes what a receiver has no reason to refuse for its age: records of the last minutes, not ahead of the clock,
of sessions of one host, in batches that reach the journals' ends. What catches up goes alone.

The outcome of a joint request is each session's own. A refusal or a hold is not: then each batch goes alone, at once,
and what is refused again is found by `isolation`. That session travels alone for `ALONE_S`, or until all that is
refused of it travels apart anyway: its neighbours don't pay for it.
A partial success says how many records were not taken, and not of whom: they are counted for the sessions by the number
of their records, and nothing is sent again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from stepspan.deliver.batches import Batch
from stepspan.deliver.isolation import Send
from stepspan.deliver.options import Options
from stepspan.deliver.task import DeliveryTask
from stepspan.events import SECOND_NS
from stepspan.exporters.exporter import JoiningExporter
from stepspan.mapping.columns import Points
from stepspan.mapping.records import PastPoint, Record, Signal, Span
from stepspan.otlp.outcome import Outcome, Verdict

MAX_REQUEST_BYTES = 512 << 10
FRESH_NS = 300 * SECOND_NS
"""Records that are older go alone."""
AHEAD_NS = 2 * SECOND_NS
"""So do those that are further ahead of the clock: two clocks of one host differ by less."""
ALONE_S = 600.0
"""For which a session travels alone after a refusal, and a size that was refused is kept to."""

Prepared: TypeAlias = "tuple[DeliveryTask, Batch]"
Sent: TypeAlias = "tuple[DeliveryTask, Batch, Send | None]"
"""A task, its batch, and what `DeliveryTask.deliver` sends it by: None: alone."""


class JointRequests:
    """Sends one signal's fresh batches to one destination, those of a host together.

    Args:
        signal: Which records they hold.
        exporter: Sends them.
        options: What all tasks have in common.

    """

    def __init__(self, signal: Signal, exporter: JoiningExporter, options: Options) -> None:
        self._signal: Signal = signal
        self._exporter = exporter
        self._options = options
        self._alone_until: dict[Path, float] = {}
        self._max_bytes, self._max_bytes_until = MAX_REQUEST_BYTES, 0.0

    def may_join(self, task: DeliveryTask, batch: Batch) -> bool:
        """Whether a batch that was prepared just now may travel with others."""
        if not task.reaches_end or task.failing_since is not None or task.goes_alone or not batch.records:
            return False
        if self._alone_until.get(task.session.path, 0.0) > self._options.clock() and not task.refused_separately:
            return False
        now = int(self._options.wall_clock() * SECOND_NS)
        return _all_within(batch.records, now - FRESH_NS, now + AHEAD_NS)

    def send(self, prepared: Sequence[Prepared]) -> Iterator[list[Sent]]:
        """Send batches in as few requests as their size and their hosts allow.

        Each list that is yielded is what became of one request. It must be delivered, by `DeliveryTask.deliver`, before
        the next one is asked for.
        """
        by_host: defaultdict[str, list[Prepared]] = defaultdict(list)
        for task, batch in prepared:
            by_host[task.session.path.parent.name].append((task, batch))
        for together in by_host.values():
            if len(together) == 1:
                yield [(*together[0], None)]
                continue
            parts: list[tuple[Prepared, bytes]] = []
            for task, batch in together:
                try:
                    parts.append(((task, batch), self._exporter.encode(self._signal, task.resource, batch.records)))
                except Exception:  # not OTLP, or a defect that only this one meets
                    yield [(task, batch, None)]
            while parts:
                count = self._count_that_fits(parts)
                yield from self._send(parts[:count])
                parts = parts[count:]

    def forget(self, path: Path) -> None:
        """A session is not followed any more."""
        self._alone_until.pop(path, None)

    def _count_that_fits(self, parts: Sequence[tuple[Prepared, bytes]]) -> int:
        """How many of the first parts make one request; at least one."""
        if self._max_bytes_until <= self._options.clock():
            self._max_bytes = MAX_REQUEST_BYTES
        size = count = 0
        for _, part in parts:
            size += len(part)
            if size > self._max_bytes and count:
                break
            count += 1
        return count

    def _send(self, parts: Sequence[tuple[Prepared, bytes]]) -> Iterator[list[Sent]]:
        if len(parts) == 1:
            yield [(*parts[0][0], None)]
            return
        outcome = self._export([part for _, part in parts])
        size = sum(len(part) for _, part in parts)
        if outcome.verdict is Verdict.HALVE:
            yield from self._send(parts[: len(parts) // 2])
            yield from self._send(parts[len(parts) // 2 :])
        elif outcome.verdict in (Verdict.ISOLATE, Verdict.HOLD):
            refused: list[DeliveryTask] = []
            for (task, batch), _ in parts:
                rejected = task.state.ledger.rejected
                yield [(task, batch, None)]
                if task.held or task.state.ledger.rejected > rejected:
                    refused.append(task)
            until = self._options.clock() + ALONE_S
            if not refused:  # so it was that they went together
                self._max_bytes, self._max_bytes_until = size // 2, until
            elif not all(task.held for (task, _), _ in parts):  # all: it is not of any of them
                self._alone_until |= {task.session.path: until for task in refused}
        else:
            counts = [len(batch.records) for (_, batch), _ in parts]
            shares = _shares(outcome.rejected, counts)
            yield [(*each, _answer(outcome._replace(rejected=n))) for (each, _), n in zip(parts, shares, strict=True)]

    def _export(self, parts: Sequence[bytes]) -> Outcome:
        try:
            return self._exporter.export_encoded(self._signal, parts)
        except Exception as error:
            return Outcome(Verdict.RETRY_THEN_HOLD, f"{type(self._exporter).__name__} failed: {error!r}")


def _answer(outcome: Outcome) -> Callable[[Sequence[Record]], Outcome]:
    return lambda _: outcome


def _shares(total: int, counts: Sequence[int]) -> list[int]:
    """A number divided by counts: integers that add up to it, or to the sum of the counts where that is less."""
    of_all = sum(counts)
    total = min(total, of_all)
    shares, before, counted = [], 0, 0
    for count in counts:
        counted += count
        upto = (2 * total * counted + of_all) // (2 * of_all)
        shares.append(upto - before)
        before = upto
    return shares


def _all_within(records: Sequence[Record], oldest: int, newest: int) -> bool:
    """Whether all records are of a time between two (Unix ns), and none has a time that the user gave."""
    single: Sequence[Any] = records.points if isinstance(records, Points) else records
    for record in single:
        if type(record) is PastPoint:
            return False
        time = record[1] if type(record) is tuple else record.end if type(record) is Span else record.time
        if not oldest <= time <= newest:
            return False
    columns = records.columns if isinstance(records, Points) else ()
    return all(oldest <= times[0] and times[-1] <= newest for _, times, _ in columns)
