"""One session's signal on its way to one destination: read, process, map, send, move the cursor.

The cursor moves when every record of a batch is accounted for: taken, filtered or rejected. What is in between is sent
again after a crash, the same as before. The mapper's state is rebuilt by reading on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import orjson

from stepspan.deliver import dead_letters
from stepspan.deliver.isolation import Isolation
from stepspan.errors import JournalError
from stepspan.events import Event
from stepspan.exporters import Exporter
from stepspan.journal.cursor import Cursor, CursorState, Ledger, Position, cursor_name
from stepspan.journal.layout import SessionPath, open_directory, open_file, read_file, segment_name, writable_by_us
from stepspan.journal.liveness import Closed, is_dead, quiet_for, read_closed, write_closed
from stepspan.journal.reader import JournalReader, last_event
from stepspan.mapping.mapper import VERSION, Mapper, mapper
from stepspan.mapping.records import Point, Record, Signal
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.processors import specs

log = logging.getLogger("stepspan.deliver")

BATCH = 512 << 10
CHECKPOINT = 16 << 20
LOOK, LIVENESS = 0.1, 1.0
"""Seconds between looks for the word that a session has ended, and at its writer's lock."""
RETRY_FIRST, RETRY_LONGEST = 0.25, 30.0
HOLD_FIRST, HOLD_LONGEST = 15.0, 300.0
"""Seconds between tries; a receiver that asks for more than the longest of them is asked again after that."""
PATIENCE = 5
"""Failures of the "retry, then hold" kind before it is a hold."""
HEADER = {"run_key": str, "rank": int, "world_size": int, "role": str, "started": int, "resource": dict}
"""What mapping and merging rely on."""
FRESH = 3600 * 1_000_000_000
"""Points that are older than this, or in the future, may be refused for their time alone."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the lanes of a deliverer have in common."""

    boot_id: str
    dead_after: float = 900.0
    state_directory: Path | None = None
    batch: int = BATCH
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    jitter: Callable[[], float] = random.SystemRandom().random


@dataclass(frozen=True, slots=True)
class Parcel:
    """A batch as records, where the cursor will stand, and what the ledger gains besides the receiver's answer."""

    records: Sequence[Record]
    position: Position
    counts: Ledger


class DeliveryTask:
    """A session's signal. Raises OSError or `JournalError` where the session can't be read."""

    def __init__(self, session: SessionPath, signal: Signal, exporter: Exporter, options: Options) -> None:
        self.session = session
        self.signal: Signal = signal
        self.at_end = False
        """Nothing more stood there when we last looked."""
        self.not_before = 0.0
        """When to try again, by the options' clock."""
        self.failing_since: float | None = None
        self._exporter = exporter
        self._options = options
        self._failures = self._stubborn = 0
        self._waits = ""
        self._told: set[str] = set()
        self._witness: Record | None = None
        self._since_checkpoint = 0
        self._looked = self._listened = -LIVENESS
        self._parcel: Parcel | None = None
        self._next = 0
        self._closed: Closed | None = None
        self._reader = JournalReader(session, clock=options.clock)
        try:
            self._begin()
        except BaseException:  # it is tried again and again: descriptors must not pile up
            self._reader.close()
            if hasattr(self, "_cursor"):
                self._cursor.close()
            raise

    def _begin(self) -> None:
        session, exporter, signal, options = self.session, self._exporter, self.signal, self._options
        self.header: Event = self._reader.header
        wrong = [name for name, kind in HEADER.items() if type(self.header.get(name)) is not kind]
        if wrong:
            raise JournalError(f"{session.path}: its header lacks {', '.join(wrong)}")
        self.home = session.path
        if options.state_directory is not None:
            self.home = options.state_directory / session.path.name
        elif not writable_by_us(session.path):
            raise JournalError(f"{session.path}: not ours to write in: name a --state-directory for the cursors")
        place = self.home / "cursors"
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._cursor = Cursor(place / cursor_name(exporter.destination, signal))
        self._checkpoint = place / f"{cursor_name(exporter.destination, signal)}.state"
        self._mapper: Mapper | None
        self.position, self._mapper = self._restore()

    @property
    def state(self) -> CursorState:
        """The cursor's."""
        return self._cursor.state

    @property
    def held(self) -> bool:
        """Whether it waits for a person."""
        return self._cursor.state.state == "hold"

    @property
    def finished(self) -> bool:
        """Whether the session has ended and all of it has been delivered."""
        return self.position.finished

    @property
    def time(self) -> int:
        """The event time that delivery has reached, Unix ns: of the next event, once that is known."""
        return self._next or self.position.ts or int(self.header["started"])

    @property
    def alive(self) -> bool:
        """Whether more may come: nobody has said that the session ended, and its writer is not dead."""
        return self._look() is None and not self._find_dead()

    def advance(self, until: int) -> bool:
        """Deliver the next batch, of events no later than `until` (ns). Whether the cursor moved."""
        parcel = self._parcel or self._read(until)
        if parcel is None:
            return False
        isolation = Isolation(self._send, witness=self._witness, untimely=self._untimely)
        outcome = isolation.run(parcel.records) if parcel.records else Outcome(Verdict.DELIVERED)
        if outcome.verdict is Verdict.DELIVERED:
            self._parcel = None
            if isolation.rejected:
                self._set_aside(isolation.rejected)
            self._move(parcel, isolation, outcome.message)
            return True
        self._wait(outcome)
        self._parcel = None if self.held else parcel
        self._mapper = None if self.held else self._mapper
        return False

    def _read(self, until: int) -> Parcel | None:
        """The next batch as records."""
        if self._mapper is None:
            self.position, self._mapper = self._restore()
        closed = self._look()
        batch = self._reader.read(self.position, size=self._options.batch, until=until, closed=closed)
        if batch.at_end and closed is None and self._find_dead():
            closed = self._closed
            batch = self._reader.read(self.position, size=self._options.batch, until=until, closed=closed)
        self.at_end, self._next = batch.at_end, batch.beyond
        finishing = batch.at_end and closed is not None and not self.finished
        if not batch.events and not finishing:
            return None
        before = self._mapper.filtered
        records: Sequence[Record] = self._mapper.map(self._process(batch.events))
        counts, position = batch.counts, batch.position
        if finishing and closed is not None:
            records = [*records, *self._mapper.finish(closed)]
            counts.damaged += max(0, closed.seq - position.seq)  # the end was damaged: no later line shows the hole
            position = replace(position, seq=max(closed.seq, position.seq), finished=True)
        counts.filtered = self._mapper.filtered - before
        counts.mapped = len(records) + counts.filtered
        return Parcel(records, position, counts)

    def close(self) -> None:
        """Release the files."""
        self._reader.close()
        self._cursor.close()

    def _process(self, events: list[Event]) -> list[Event]:
        """The events after the exporter's own processors."""
        for processor in self._exporter.processors:
            kept: list[Event] = []
            for event in events:
                processed: Event | None = event
                if event["tag"] in processor.tags:
                    try:
                        made: Any = processor(event)
                        if made is not None and not (isinstance(made, dict) and "tag" in made):
                            raise TypeError(f"{made!r:.100} is no event")
                        processed = made
                    except Exception as error:  # somebody else's code: the event goes on without it
                        self._tell_processor(processor, error)
                if processed is not None:
                    kept.append(processed)
            events = kept
        return events

    def _tell_processor(self, processor: object, error: Exception) -> None:
        name = type(processor).__name__
        if name not in self._told:
            self._told.add(name)
            log.warning("%s %s: processor %s failed: %r", self.session.path, self.signal, name, error)

    def _send(self, records: Sequence[Record]) -> Outcome:
        try:
            return self._exporter.export(self.signal, self.header["resource"], records)
        except Exception as error:  # somebody else's code: it may pass, and must not stop the other sessions
            return Outcome(Verdict.RETRY_THEN_HOLD, f"{type(self._exporter).__name__} failed: {error!r}")

    def _move(self, parcel: Parcel, isolation: Isolation, message: str) -> None:
        """Everything in a parcel is accounted for."""
        state, position = self._cursor.state, parcel.position
        if state.state in {"retry", "hold"}:
            log.info("%s %s: delivering again", self.session.path, self.signal)
        self._since_checkpoint += max(0, position.offset - self.position.offset)
        due = position.segment != self.position.segment or self._since_checkpoint >= CHECKPOINT
        rejected = len(isolation.rejected) + isolation.dropped
        self.position, self._witness = position, isolation.witness
        self._failures, self._stubborn, self.not_before, self.failing_since = 0, 0, 0.0, None
        self._cursor.write(
            replace(
                state,
                position=position,
                ledger=state.ledger.plus(replace(parcel.counts, delivered=isolation.delivered, rejected=rejected)),
                answered=self._options.wall() if parcel.records else state.answered,
                state="ok",
                message=message or state.message if rejected else state.message if state.state == "ok" else "",
                session=self.session.session,
            )
        )
        if due and not position.finished:  # after the cursor: a checkpoint that is ahead of it helps nobody
            self._save(position)

    def _wait(self, outcome: Outcome) -> None:
        """The batch was not taken: when to try again, and what to say."""
        now = self._options.clock()
        self._stubborn = self._stubborn + 1 if outcome.verdict is Verdict.RETRY_THEN_HOLD else 0
        hold = outcome.verdict is Verdict.HOLD or self._stubborn >= PATIENCE
        state = "hold" if hold else "retry"
        self._failures = self._failures + 1 if state == self._waits else 1
        self._waits = state
        first, longest = (HOLD_FIRST, HOLD_LONGEST) if hold else (RETRY_FIRST, RETRY_LONGEST)
        delay = min(longest, first * 2 ** min(self._failures - 1, 16)) * (0.5 + self._options.jitter() / 2)
        asked, message = outcome.retry_after or 0.0, outcome.message
        wait = max(delay, min(asked, HOLD_LONGEST))
        if asked > RETRY_LONGEST:
            message += f"; it asks for a wait of {asked:,.0f} s: the next try is in {wait:,.0f} s"
        self.not_before = now + wait
        if self.failing_since is None:
            self.failing_since = now
        if (state, message) != (self.state.state, self.state.message):
            log.warning("%s %s: %s: %s", self.session.path, self.signal, state, message)
        self._cursor.write(replace(self.state, state=state, message=message, session=self.session.session))

    def _look(self) -> Closed | None:
        """The session's end, if somebody has said it."""
        now = self._options.clock()
        if self._closed is None and now - self._looked >= LOOK:
            self._looked = now
            self._closed = read_closed(self.session.path)
            if self._closed is None and self.home != self.session.path:
                self._closed = read_closed(self.home)
        return self._closed

    def _find_dead(self) -> bool:
        """At the end of what is there: has the writer died? Who finds that says so, for everyone."""
        now = self._options.clock()
        if self._closed is not None:
            return True
        if now - self._listened < LIVENESS:
            return False
        self._listened = now
        if not self._is_dead():
            return False
        seq, ts = last_event(self.session)
        self._closed = write_closed(self.home, Closed(seq, ts, "interrupted"), by="deliverer")
        return True

    def _is_dead(self) -> bool:
        segments = self.session.segments()
        if not segments:
            raise JournalError(f"{self.session.path}: it is gone")
        silence = quiet_for(self.session.path / segment_name(segments[-1]))
        options = self._options
        return is_dead(
            self.session.path, self.header, boot_id=options.boot_id, quiet_for=silence, dead_after=options.dead_after
        )

    def _untimely(self, record: Record) -> bool:
        """Whether a receiver may refuse a record for its time alone."""
        if self.signal != "metrics":
            return False
        age = int(self._options.wall() * 1e9) - cast("Point", record)[1]
        return age > FRESH or age < 0

    def _set_aside(self, rejected: list[tuple[Record, str]]) -> None:
        """Keep what was refused."""
        resource = self.header["resource"]
        dead_letters.append(self.home, self._exporter.destination, self.signal, resource, rejected)
        log.warning("%s %s: %d refused for good: %s", self.session.path, self.signal, len(rejected), rejected[-1][1])

    def _save(self, position: Position) -> None:
        """A checkpoint: the mapper's state at a position. Without one a restart reads from the beginning."""
        assert self._mapper is not None
        content = orjson.dumps({**self._key(), "position": position, "mapper": self._mapper.state()})
        name, draft = self._checkpoint.name, self._checkpoint.with_suffix(".draft").name
        with contextlib.suppress(OSError), _directory(self._checkpoint.parent) as directory:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            with open(open_file(draft, flags, dir_fd=directory), "wb") as file:
                file.write(b"%08x %b" % (crc32(content), content))
            os.rename(draft, name, src_dir_fd=directory, dst_dir_fd=directory)
            self._cursor.state.needs = position.segment
            self._since_checkpoint = 0

    def _restore(self) -> tuple[Position, Mapper]:
        """Where the cursor stands, and a mapper that has seen everything before."""
        state = self._cursor.state
        if state.session not in {"", self.session.session} or not self._fits(state.position):
            log.warning(
                "%s %s: the cursor is of another journal: starting anew",
                self.session.path,
                self.signal,
            )
            self._cursor.state = state = CursorState()
        target = state.position
        fold = mapper(self.signal, self.header)
        if target.finished:
            return target, fold
        position = Position()
        checkpoint = self._load()
        if checkpoint and checkpoint[0].seq <= target.seq:
            position = checkpoint[0]
            fold.restore(checkpoint[1])
        while position.seq < target.seq:
            batch = self._reader.read(position, size=BATCH, closed=Closed(target.seq, target.ts, ""))
            if not batch.events:
                break
            fold.map(self._process(batch.events))
            position = batch.position
        return target, fold

    def _fits(self, position: Position) -> bool:
        """Whether a position lies at the beginning of a line of this journal."""
        if not position.offset:
            return True
        with _directory(self.session.path) as directory:
            try:
                with open(open_file(segment_name(position.segment), os.O_RDONLY, dir_fd=directory), "rb") as file:
                    file.seek(position.offset - 1)
                    return file.read(1) == b"\n"
            except FileNotFoundError:  # pruned
                return True

    def _load(self) -> tuple[Position, dict[str, Any]] | None:
        try:
            checksum, _, content = (read_file(self._checkpoint) or b"").partition(b" ")
            found = orjson.loads(content) if int(checksum or b"0", 16) == crc32(content) else None
            if found and {key: found[key] for key in self._key()} == self._key():
                return Position(**found["position"]), found["mapper"]
        except (ValueError, TypeError, KeyError):
            pass
        return None

    def _key(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        processors = blake2b(orjson.dumps(specs(self._exporter.processors)), digest_size=8).hexdigest()
        return {"version": VERSION, "session": self.session.session, "processors": processors}


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    descriptor = open_directory(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
