"""One session's signal on its way to one destination: read a batch, send it, move the cursor.

Invariants. The cursor moves when every record of a batch is accounted for: delivered, filtered or rejected; position
and ledger move in one write. Dead letters are written before the cursor moves, the checkpoint after it. Batches of one
task go out in the journal's order, one request at a time.

A crash leaves: before the cursor moved, a batch that is sent again, with the same records, and perhaps its dead letters
twice; after that, nothing to be done again. A cursor that cannot be written, or is lost, costs sending again what was
delivered, which is harmless: the mapping gives the same points.

A batch of which something is refused is delivered in parts, over several calls if need be (`isolation.py`); until all
of it is accounted for, only memory knows what was taken.

A task belongs to the thread of its scheduler; other threads may read its properties. `advance` is called again and
again, never before `not_before`; when it raises, the task is closed and a new one starts from the cursor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import cast

from stepspan.deliver import dead_letters
from stepspan.deliver.backoff import MAX_HOLD_DELAY_S, Backoff
from stepspan.deliver.batches import Batch, BatchReader
from stepspan.deliver.isolation import MAX_TRIES, Isolation, Send
from stepspan.deliver.ledgers import THINNED
from stepspan.deliver.open_sessions import SharedReader
from stepspan.deliver.options import Options
from stepspan.deliver.refused import ReceiverMemory
from stepspan.deliver.session_end import SessionEnd
from stepspan.deliver.tails import LOOK_INTERVAL_S, Tail
from stepspan.errors import JournalError
from stepspan.events import Event
from stepspan.exporters import Exporter
from stepspan.journal.cursor import CHECKPOINT, Cursor, CursorState, Position, cursor_name, rename_cursor
from stepspan.journal.layout import SessionPath, writable_by_us
from stepspan.mapping.records import Attributes, Point, Record, Signal
from stepspan.otlp.outcome import Outcome, Verdict

log = logging.getLogger("stepspan.deliver")

HEADER_FIELDS = {"run_key": str, "rank": int, "world_size": int, "role": str, "started": int, "resource": dict}
"""What mapping and merging rely on."""
WINDOW_NS = 3600 * 1_000_000_000
"""Points that are older than this, or in the future, may be refused for their time alone."""

MAX_ROUND_REQUESTS = 64
MAX_ROUND_S = 0.5
"""What a task may take to find what is refused, before other sessions have their turn."""


class DeliveryTask:
    """Delivers one signal of a session to one destination.

    Args:
        session: Where the session lies.
        signal: Which records of it are delivered.
        exporter: Sends them.
        options: What all tasks have in common.
        memory: What is known of the receiver; None: nothing.

    Raises:
        JournalError: The session cannot be read, or its cursors cannot be kept.
        OSError: The same, in the file system's words.

    """

    def __init__(
        self,
        session: SessionPath,
        signal: Signal,
        exporter: Exporter,
        options: Options,
        memory: ReceiverMemory | None = None,
    ) -> None:
        self.session = session
        self.signal: Signal = signal
        self.not_before = 0.0
        """When to try again, by the options' clock."""
        self.asked_until = 0.0
        """Before which the receiver has asked not to be tried, by the options' clock."""
        self.failing_since: float | None = None
        """Since when nothing was delivered although something is there, by the options' clock."""
        self.failures = 0
        """Tries in a row of which nothing was taken."""
        self.refused_separately = False
        """Whether all that was refused of the last batch of which anything was travels apart by now."""
        self.receiver_may_be_away = False
        """Whether the last try says nothing good of the receiver."""
        self._exporter = exporter
        self._options = options
        self._known_good_record: Record | None = None
        self._wrong_before = 0
        """The time (Unix ns) before which the journal's clock is known to have been wrong."""
        self._batch: Batch | None = None
        """The one that was prepared, and is not delivered yet."""
        self._isolation: Isolation | None = None
        """How far the delivery of `_batch` has come, over rounds."""
        self._delivered = 0
        """How many of its records have been taken."""
        self._named = 0
        """How many of the things that it has found to be refused have been named."""
        self._memory = memory or ReceiverMemory(options.clock)
        self._backoff = Backoff(options.jitter, self._memory.history)
        with ExitStack() as files:  # it is tried again and again: descriptors must not pile up
            name = cursor_name(exporter.destination, signal)
            reader = self._reader = files.enter_context(closing(options.sessions.open(session, name, options.clock)))
            self.header = _checked_header(reader)
            self._owner = repr(self.header["resource"].get("service.instance.id"))
            self.state_directory = _state_directory(session, options)
            directory = self.state_directory / "cursors"
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (address := getattr(exporter, "address", exporter.destination)) != exporter.destination:
                rename_cursor(directory, address, exporter.destination, signal)
            self._cursor = files.enter_context(closing(Cursor(directory / name)))
            self._memory.history.has_answered |= self._cursor.state.answered > 0
            if not self._cursor_fits():
                log.warning("stepspan: %s %s: the cursor is of another journal: starting anew", session.path, signal)
                self._cursor.state = CursorState()
            elif options.all_ranks and self.state.left_out:
                log.info("stepspan: %s %s: from its beginning, with what was left out", session.path, signal)
                self._cursor.state = CursorState()
            self._end = reader.end(lambda: SessionEnd(session, self.header, self.state_directory, options))
            self._batches = BatchReader(reader, signal, exporter, directory / f"{name}{CHECKPOINT}", options)
            self._files = files.pop_all()

    @property
    def state(self) -> CursorState:
        """What the cursor keeps: position, ledger, and how the last request went."""
        return self._cursor.state

    @property
    def position(self) -> Position:
        """Where the cursor stands."""
        return self._cursor.state.position

    @property
    def job(self) -> str:
        """The id of the session's job."""
        return str(self.header["resource"].get("job_id") or self.header.get("job_id", ""))

    @property
    def resource(self) -> Attributes:
        """The attributes of the session's Resource."""
        resource: Attributes = self.header["resource"]
        return resource

    @property
    def held(self) -> bool:
        """Whether it waits for a person."""
        return self._cursor.state.state == "hold"

    @property
    def finished(self) -> bool:
        """Whether the session has ended and all of it has been delivered."""
        return self.position.finished

    @property
    def at_end(self) -> bool:
        """Whether nothing more stood in the journal at the last look."""
        return self.reaches_end and not self._is_under_way

    @property
    def reaches_end(self) -> bool:
        """Whether nothing more stood in the journal behind the batch that was prepared last."""
        return self._batches.at_end

    @property
    def _is_under_way(self) -> bool:
        """Whether a part of a batch was sent, and the rest has yet to be."""
        return self._isolation is not None and self.failing_since is None

    @property
    def time(self) -> int:
        """The event time that delivery has reached, Unix ns: of the next event, once that is known."""
        return self._batches.next_ts or self.position.ts or int(self.header["started"])

    @property
    def alive(self) -> bool:
        """Whether more may come: the session has no end yet, and its writer is not dead. OSError, `JournalError`."""
        return self._end.read() is None and self._end.probe() is None

    def look(self, now: float, max_age: float = LOOK_INTERVAL_S) -> Tail:
        """How the journal ends, by a look that costs little. Arguments as of `TailWatch.look`."""
        return self._reader.look(now, max_age)

    def note_alive(self) -> None:
        """The session was written just now, and has not ended."""
        self._end.note_alive()

    def advance(self, until: int) -> bool:
        """Deliver the next batch.

        Args:
            until: The time of the last event that may be in it, Unix ns.

        Returns:
            Whether the cursor moved. False: there is nothing now, or it was not taken (`not_before`, `held`).

        Raises:
            JournalError: The session cannot be read any more.
            OSError: The same, or the cursor cannot be written.

        """
        batch = self.prepare(until)
        return batch is not None and self.deliver(batch)

    def prepare(self, until: int, tail: Tail | None = None) -> Batch | None:
        """The next batch to deliver: the last one again, if that was not taken, or what is read now.

        Args:
            until: The time of the last event that may be in it, Unix ns.
            tail: How the journal's end was seen last: since when it has been quiet.

        Returns:
            The batch, for `deliver`, without what the receiver is known to refuse; None where there is nothing now.

        Raises:
            JournalError: The session cannot be read any more.
            OSError: The same.

        """
        if self._batch is None:
            if tail is not None:
                self._reader.note_end(tail.number, tail.size, tail.grew_at)
            self._batch = self._batches.read(self.position, until, self._end)
        if self._batch is None:
            return None
        if self._isolation is None:
            self._isolation = self._isolate(self._batch)
        if self._isolation.first_request is self._batch.records:
            return self._batch
        return replace(self._batch, records=self._isolation.first_request)

    @property
    def goes_alone(self) -> bool:
        """Whether the batch that was prepared cannot go in one request with others'.

        So it is where something travels apart: a probe of what the receiver has refused, points whose time the user
        gave; and where a part was sent before.
        """
        return self._isolation is not None and self._isolation.goes_alone

    def deliver(self, batch: Batch, send: Send | None = None) -> bool:
        """Send a batch, and move the cursor or put off the next try.

        Args:
            batch: What `prepare` has returned last.
            send: Sends records; None: alone, in requests of this session. What a request of several sessions has
                become is given by a function that returns its outcome.

        Returns:
            Whether it went on: the cursor moved, or a part was sent. False: it was not taken (`not_before`, `held`).

        Raises:
            OSError: The cursor cannot be written.

        """
        isolation = self._isolation
        if self._batch is None or isolation is None:
            raise ValueError("deliver() was called without prepare()")
        judge = self._memory.history.judge
        isolation.send = lambda records: judge((send if send and records is batch.records else self._send)(records))
        outcome = isolation.run(goes_on=self._budget())
        if (
            outcome is not None
            and outcome.verdict is Verdict.HOLD
            and (wrong := self._batches.wrong_before(self.position)) > self._wrong_before
        ):
            self._wrong_before = wrong  # no window is too small for these: they need not be waited for
            self._isolation = isolation = self._isolate(self._batch)
            outcome = isolation.run(goes_on=self._budget())
        if isolation.delivered > self._delivered:
            self._delivered = isolation.delivered
            self._backoff.reset()
            self._memory.history.delivered()
            self.failing_since = None
        if isolation.accepted and isolation.known_good_record is not None:
            self._memory.known_good = self.header["resource"], isolation.known_good_record
        for name in isolation.refused_traits[self._named :]:
            log.warning(
                "stepspan: %s is refused by %s (%s): its records are rejected while it is, and all others go on",
                name, self._exporter.destination, isolation.rejected[-1][1],
            )  # fmt: skip
        self._named = len(isolation.refused_traits)
        if outcome is None:
            self.not_before, self.failing_since = 0.0, None
            return True
        if outcome.verdict is Verdict.DELIVERED:
            batch, self._batch, self._isolation = self._batch, None, None
            if isolation.rejected:
                self.refused_separately = len(isolation.rejected) == isolation.rejected_again
                self._dead_letter(isolation.rejected, isolation.rejected_again)
            self._commit(batch, isolation, outcome.message)
            return True
        self.failures = isolation.failures
        self.receiver_may_be_away = not isolation.receiver_takes
        self._back_off(outcome)
        if self.held:  # for minutes, maybe: others need the memory
            self._batch = self._isolation = None
            self._batches.forget()
        return False

    def wake(self) -> None:
        """Let the next try be as soon as the receiver allows it."""
        self.not_before = min(self.not_before, self.asked_until)
        self._end.look_again()

    def close(self) -> None:
        """Close the journal's and the cursor's files; the next task goes on from the cursor."""
        self._files.close()

    def _isolate(self, batch: Batch) -> Isolation:
        isolation = Isolation(
            self._send,
            self._known_good_record,
            self._maybe_out_of_window,
            self._wrong_before,
            self._memory,
            self._owner,
            self._send_known_good,
            failures=max(self.failures, MAX_TRIES) if self.held else 0,
        )
        isolation.begin(batch.records)
        self._named = self._delivered = 0
        return isolation

    def _budget(self) -> Callable[[], bool]:
        """Whether another request may be sent before other sessions have their turn."""
        numbers, until = iter(range(MAX_ROUND_REQUESTS)), self._options.clock() + MAX_ROUND_S
        return lambda: next(numbers, None) is not None and self._options.clock() <= until

    def _send(self, records: Sequence[Record]) -> Outcome:
        return self._export(self.header["resource"], records)

    def _send_known_good(self) -> Outcome | None:
        good = self._memory.known_good
        return self._export(good[0], [good[1]]) if good else None

    def _export(self, resource: Attributes, records: Sequence[Record]) -> Outcome:
        try:
            return self._exporter.export(self.signal, resource, records)
        except Exception as error:  # a user's exporter: it may pass, and must not stop the other sessions
            return Outcome(Verdict.RETRY_THEN_HOLD, f"{type(self._exporter).__name__} failed: {error!r}")

    def _commit(self, batch: Batch, isolation: Isolation, message: str) -> None:
        """Move the cursor: everything in the batch is accounted for."""
        state = self._cursor.state
        if state.state in {"retry", "hold"}:
            log.info("stepspan: %s %s: delivering again", self.session.path, self.signal)
        self._known_good_record = isolation.known_good_record
        self._backoff.reset()
        self.not_before, self.asked_until, self.failing_since = 0.0, 0.0, None
        rejected = len(isolation.rejected) + isolation.dropped
        if not rejected or not message:
            message = state.message if rejected or state.state == "ok" else ""
        self._cursor.write(
            replace(
                state,
                position=batch.position,
                ledger=state.ledger.plus(replace(batch.counts, delivered=isolation.delivered, rejected=rejected)),
                answered=self._options.wall_clock() if batch.records else state.answered,
                state="ok",
                denied=False,
                message=message,
                asked_until=0.0,
                partial=state.partial + isolation.dropped,
                left_out=state.left_out + batch.left_out,
                session=self.session.session,
            )
        )
        if batch.counts.thinned and not state.ledger.thinned:
            log.warning("stepspan: %s: %s", self.session.path, THINNED)
        if self._batches.save_if_due(state.position, batch.position):
            self._cursor.state.needs = batch.position.segment

    def _back_off(self, outcome: Outcome) -> None:
        """Put off the next try of a batch that was not taken, and say why."""
        now = self._options.clock()
        state, delay, message = self._backoff.next_try(outcome, now)
        asked = min(outcome.retry_after or 0.0, MAX_HOLD_DELAY_S)
        self.not_before, self.asked_until = now + delay, now + asked
        if self.failing_since is None:
            self.failing_since = now
        if (state, message) != (self.state.state, self.state.message):
            log.warning("stepspan: %s %s: %s: %s", self.session.path, self.signal, state, message)
        until = self._options.wall_clock() + asked if asked else 0.0
        self._cursor.write(
            replace(
                self.state,
                state=state,
                denied=outcome.denied,
                message=message,
                asked_until=until,
                session=self.session.session,
            )
        )

    def _maybe_out_of_window(self, record: Record) -> bool:
        """Whether a receiver may refuse a record for its time alone."""
        if self.signal != "metrics":
            return False
        age = int(self._options.wall_clock() * 1e9) - cast("Point", record)[1]
        return age > WINDOW_NS or age < 0

    def _dead_letter(self, rejected: list[tuple[Record, str]], rejected_again: int) -> None:
        """Keep what was refused, and say so of what is not like what was refused before."""
        dead_letters.append(self.state_directory, self._exporter.destination, self.signal, self.resource, rejected)
        if new := len(rejected) - rejected_again:
            where, why = f"{self.session.path} {self.signal}", rejected[-1][1]
            log.warning("stepspan: %s: %d refused for good: %s", where, new, why)

    def _cursor_fits(self) -> bool:
        """Whether the cursor is this session's, and stands at the beginning of a line. OSError."""
        state, position = self.state, self.position
        if state.session not in {"", self.session.session}:
            return False
        if not position.offset:
            return True
        try:
            return self.session.read(position.segment, position.offset - 1, 1) == b"\n"
        except FileNotFoundError:  # pruned
            return True


def _checked_header(reader: SharedReader) -> Event:
    missing = [name for name, kind in HEADER_FIELDS.items() if type(reader.header.get(name)) is not kind]
    if missing:
        raise JournalError(f"{reader.session.path}: its header lacks {', '.join(missing)}")
    return reader.header


def _state_directory(session: SessionPath, options: Options) -> Path:
    """Where cursors and dead letters of a session lie."""
    if options.state_directory is not None:
        return options.state_directory / session.path.name
    if not writable_by_us(session.path):
        raise JournalError(f"{session.path}: not writable by this user: name a --state-directory for the cursors")
    return session.path
