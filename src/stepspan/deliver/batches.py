"""One session's events as batches of one signal's records: read, process, map, and the checkpoints of the mapper.

A mapper is a fold, so it must have seen every event before a batch. Where it has not (after a restart, or when a batch
was given up) it is rebuilt: from the last checkpoint that is not ahead of the position, by reading on from there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson

from stepspan.deliver.left_out import chooser
from stepspan.deliver.open_sessions import SharedReader
from stepspan.deliver.options import BATCH_BYTES, Options
from stepspan.deliver.session_end import SessionEnd
from stepspan.events import SECOND_NS, Event
from stepspan.exporters import Exporter
from stepspan.journal.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from stepspan.journal.cursor import Ledger, Position
from stepspan.journal.liveness import Closed
from stepspan.mapping.mapper import VERSION, Mapper, mapper
from stepspan.mapping.options import DEFAULT_OPTIONS, MappingOptions
from stepspan.mapping.records import Record, Signal
from stepspan.processors import apply, specs

log = logging.getLogger("stepspan.deliver")

CHECKPOINT_BYTES = 16 << 20
"""Journal bytes between checkpoints; each new segment has one as well."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Records to be sent, where the cursor will stand, and what the ledger gains besides the receiver's answer."""

    records: Sequence[Record]
    position: Position
    counts: Ledger
    left_out: int = 0
    """Of those that `counts` has as filtered: what is not sent for its rank."""


class BatchReader:
    """Reads the batches of one signal of a session, one after the other.

    Args:
        reader: Of the session.
        signal: Which records are made.
        exporter: Its processors see the events before they are mapped.
        checkpoint: Where the checkpoint lies.
        options: Clock and size of a batch.

    """

    def __init__(
        self, reader: SharedReader, signal: Signal, exporter: Exporter, checkpoint: Path, options: Options
    ) -> None:
        self.at_end = False
        """Whether nothing more stood there at the last look."""
        self.next_ts = 0
        """The time of the event that `until` kept out of the last batch, Unix ns; 0: none."""
        self._reader = reader
        self._signal: Signal = signal
        self._processors = exporter.processors
        self._mapping_options: MappingOptions = getattr(exporter, "mapping_options", DEFAULT_OPTIONS)
        self._checkpoint = checkpoint
        self._batch_bytes = options.batch_bytes
        self._wall_clock = options.wall_clock
        self._choose = chooser(reader.header, signal, all_ranks=options.all_ranks)
        self._skips_events = signal != "metrics" and all(hasattr(each, "spec") for each in self._processors)
        """Whether what the mapper passes over need not be processed: to points every event says the time, and only
        stepspan's own processors are known to make no event another one."""
        self._mapper: Mapper | None = None
        self._since_checkpoint = 0
        self._failed_processors: set[str] = set()

    def read(self, position: Position, until: int, end: SessionEnd) -> Batch | None:
        """The next batch.

        Args:
            position: Where the cursor stands: the end of the last batch; anywhere at first, and after `forget`.
            until: The time of the last event that may be in it, Unix ns.
            end: The session's end; its records follow those of the last event.

        Returns:
            The batch; None where there is nothing to deliver now.

        """
        fold = self._mapper = self._mapper or self._rebuild(position)
        closed = end.read()
        batch = self._reader.read(position, size=self._batch_bytes, until=until, closed=closed)
        if batch.at_end and closed is None and (closed := end.probe()) is not None:
            batch = self._reader.read(position, size=self._batch_bytes, until=until, closed=closed)
        self.at_end, self.next_ts = batch.at_end, batch.beyond
        finishing = batch.at_end and closed is not None and not position.finished
        if not batch.events and not finishing:
            return self._release(fold, position)
        filtered, thinned = fold.filtered, fold.thinned
        records = fold.map(self._process(batch.events, fold))
        counts, position = batch.counts, replace(batch.position, held_until=fold.held_until)
        if finishing and closed is not None:
            records = [*records, *fold.finish(closed)]
            missing = max(0, closed.seq - position.seq)  # at the end, where no later line shows the hole
            counts.dropped += min(missing, closed.lost)
            counts.damaged += max(0, missing - closed.lost)
            position = replace(position, seq=max(closed.seq, position.seq), finished=True, held_until=0)
        counts.filtered, counts.thinned = fold.filtered - filtered, fold.thinned - thinned
        counts.mapped = len(records) + counts.filtered + counts.thinned
        return self._chosen(Batch(records, position, counts))

    def _release(self, fold: Mapper, position: Position) -> Batch | None:
        """The points that were held back, and whose time has come."""
        now = int(self._wall_clock() * SECOND_NS)
        records = fold.release(now) if position.held_until else ()
        if not records:
            return None
        position = replace(position, held_until=fold.held_until, released=now)
        return self._chosen(Batch(records, position, Ledger(mapped=len(records))))

    def _chosen(self, batch: Batch) -> Batch:
        """The batch without what is not sent of its session."""
        if self._choose is None:
            return batch
        records = self._choose(batch.records)
        left_out = len(batch.records) - len(records)
        batch.counts.filtered += left_out
        return Batch(records, batch.position, batch.counts, left_out)

    def wrong_before(self, position: Position) -> int:
        """The time before which the clock is known to have been wrong, by what follows a position; 0: it is not known.

        Unix ns. It lies in the middle of what event time skipped: rows of points may run a little ahead of their lines.
        """
        if self._signal != "metrics":
            return 0
        jump = self._reader.next_jump(position)
        return int(jump["ts"]) - int(jump["forward"]) // 2 if jump else 0

    def forget(self) -> None:
        """Give up the last batch: it will be read again, from the position where it began."""
        self._mapper = None

    def save_if_due(self, before: Position, position: Position) -> bool:
        """Save a checkpoint where one is due, after the cursor has moved on from `before`. Whether it was saved."""
        self._since_checkpoint += max(0, position.offset - before.offset)
        due = position.segment != before.segment or self._since_checkpoint >= CHECKPOINT_BYTES
        if not due or position.finished or self._mapper is None:
            return False
        with suppress(OSError):  # without it a restart reads more
            save_checkpoint(self._checkpoint, Checkpoint(position, self._mapper.state()), self._key())
            self._since_checkpoint = 0
            return True
        return False

    def _rebuild(self, target: Position) -> Mapper:
        """A mapper that has seen everything before a position."""
        fold = mapper(self._signal, self._reader.header, self._mapping_options)
        if target.finished:
            return fold
        position = Position()
        checkpoint = load_checkpoint(self._checkpoint, self._key())
        if checkpoint and checkpoint.position.seq <= target.seq:
            position = checkpoint.position
            fold.restore(checkpoint.mapper)
        while position.seq < target.seq:
            batch = self._reader.read(position, size=BATCH_BYTES, closed=Closed(target.seq, target.ts, ""))
            if not batch.events:
                break
            fold.map(self._process(batch.events, fold))
            position = batch.position
        if target.released:
            fold.release(target.released)
        return fold

    def _key(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        processors = blake2b(orjson.dumps(specs(self._processors)), digest_size=8).hexdigest()
        key = {"version": VERSION, "session": self._reader.session.session, "processors": processors}
        return {**key, "options": self._mapping_options.key()}

    def _process(self, events: list[Event], fold: Mapper) -> list[Event]:
        """The events after the exporter's own processors, which get copies: others have the same events."""
        if not self._processors:
            return events
        tags = frozenset[str]().union(*(processor.tags for processor in self._processors))
        if self._skips_events:
            events = [event for event in events if event["tag"] in fold.tags]
        events = [orjson.loads(orjson.dumps(event)) if event["tag"] in tags else event for event in events]
        for processor in self._processors:
            kept: list[Event] = []
            for event in events:
                processed = apply(processor, event, self._log_once) if event["tag"] in processor.tags else event
                if processed is not None:
                    kept.append(processed)
            events = kept
        return events

    def _log_once(self, name: str, message: str) -> None:
        if name not in self._failed_processors:
            self._failed_processors.add(name)
            log.warning("stepspan: %s %s: processor %s", self._reader.session.path, self._signal, message)
