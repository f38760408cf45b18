"""What records a run: the one thing that samplers, the stall watch, deferred values and integrations need of it.

`Recorder` is the contract. `JournalRecorder` takes a run's events through its pipeline to the journal; `NullRecorder`
takes everything and does nothing, which is all that makes a run a disabled one.

Nothing here raises into training: what goes wrong is counted, and logged once for its kind and key.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from stepspan.conversion import MAX_ENTRIES, Conversion
from stepspan.events import SCHEMA, Event
from stepspan.journal.layout import SessionPath, session_name, slug
from stepspan.journal.liveness import exclusive
from stepspan.journal.numbers import WorkerNumber, take_worker_number
from stepspan.journal.writer import Begun, Emit, SessionGone
from stepspan.mapping.clock import clock_text
from stepspan.recording.deferred import DeferredMetrics
from stepspan.recording.outcomes import Outcomes
from stepspan.recording.predecessors import first_free_time
from stepspan.recording.scopes import NullScopes, Scopes
from stepspan.recording.warnings import DroppedValues, WarningSink
from stepspan.values import error_fields, error_text

if TYPE_CHECKING:
    from stepspan.identity import Identity
    from stepspan.journal.journal import Journal


METRIC_KINDS = frozenset({"value", "late"})
"""Kinds of dropped values that are metrics': their keys say so themselves."""


class BackgroundTask(Protocol):
    """What works beside training, on a thread of its own, until the run ends."""

    def stop(self) -> None:
        """Write what is left to write, and end."""


class Recorder(Protocol):
    """What the parts of a run, and what is attached to it, need in order to record."""

    active: bool
    """False where nothing is recorded: what is costly to find out need not be found out."""
    is_substitute: bool
    """Whether the run was begun for want of another one: a program's own has the samplers before it."""
    scopes: Scopes
    """What is open: run, epoch, step, spans."""

    @property
    def identity(self) -> Identity:
        """Which job and rank this process is."""

    @property
    def session(self) -> object | None:
        """The journal session that events go to now: what began in another one cannot end in it."""

    @property
    def deferred(self) -> DeferredMetrics:
        """Writes events whose values a device still computes, when it has got there."""

    def emit(self, event: Event, begun: Begun | None = None) -> bool:
        """Write one event of training; False where a processor dropped it. May raise."""

    def emit_background(self, event: Event) -> None:
        """Write one event that does not show that training goes on."""

    def record(self, tag: str, fields: Callable[[], Event], *, inside: bool = False) -> None:
        """Write an event of training.

        Args:
            tag: Of the event.
            fields: Makes its fields; may run a user's code, so it is called where nothing it raises gets out.
            inside: Whether the event carries the innermost open scope as its `parent`.

        """

    def record_error(self, error: BaseException, attributes: Mapping[str, Any] | None = None) -> None:
        """Write an exception, once for all the scopes that it passes through."""

    def warn_once(self, kind: str, message: str, level: int = logging.WARNING, *, key: str = "") -> None:
        """Count something that went wrong, and log it the first time for its kind and key."""

    def drop_value(self, kind: str, key: str, why: str, shown: str = "") -> None:
        """Warn of a value that was logged and cannot be recorded, and write to the journal that it was dropped."""

    def json_fields(self, tag: str, field: str, value: Any) -> Event:
        """What a user logged as a field of an event, as JSON, after warnings of what of it is lost."""

    def add_background_task(self, task: BackgroundTask) -> None:
        """Have a task stopped before the run ends; a forked child has none."""

    def training_events(self) -> tuple[object | None, int]:
        """The session, and how many events of training it holds: whether training goes on."""

    def lost_events(self) -> int:
        """How many events of the session could not be kept."""


class JournalRecorder:
    """Records a run in `journal`.

    Args:
        identity: Which job and rank this process is.
        resource: Attributes of the OpenTelemetry Resource, for the header of each session.
        journal: Where the events end up.
        emitters: What takes the events of a tag there, through the processors.
        process: Takes a header through the processors; None where one dropped it.
        leaves_alone: Whether the processors write an event as it is, whenever it comes.
        warnings: Counts what goes wrong.
        boot_id: Of the host's kernel.
        destinations: The names of those that the run is delivered to.
        left_out: The fields of the header that say what is not sent of this rank.
        routes: Of those, what the header says of how they are reached.
        propagate: Whether steps become parents of the user's own OpenTelemetry spans; None: unless a global
            TracerProvider is installed.
        outcomes: Tells which exceptions are failures.
        deduplicate: Gives the identity of the first session, so that no other live one has its series.

    """

    active = True
    is_substitute = False

    def __init__(
        self,
        identity: Identity,
        resource: Mapping[str, Any],
        journal: Journal,
        emitters: Mapping[str, Emit],
        process: Callable[[Event], Event | None],
        *,
        leaves_alone: Callable[[Event], bool] = lambda event: False,
        warnings: WarningSink,
        boot_id: str,
        destinations: Iterable[str] = (),
        left_out: Event | None = None,
        routes: Iterable[Mapping[str, str]] = (),
        propagate: bool | None = None,
        outcomes: Outcomes | None = None,
        deduplicate: Callable[[Identity], Identity] | None = None,
    ) -> None:
        self.identity = identity
        """Of this process. A forked worker has its own from its first event on."""
        self._origin = identity
        """Of the process that began the run."""
        self._deduplicate = deduplicate
        self._is_worker = False
        self._worker_number: WorkerNumber | None = None
        self.emitters = emitters
        self.clock = journal.clock
        self.warn_once = warnings.warn_once
        self.background_tasks: list[BackgroundTask] = []
        """Stopped before the run ends; a forked child has none."""
        self.background_events = 0
        """How many events of the session came from background tasks."""
        self.on_session: Callable[[], None] = lambda: None
        """Called as another session is opened: by a forked worker, or where the one before has ended."""
        self.scopes = Scopes(
            identity,
            journal,
            emitters,
            leaves_alone=leaves_alone,
            warn=self.warn_once,
            record_error=self.record_error,
            outcomes=outcomes or Outcomes(),
            propagate=propagate,
        )
        self._journal = journal
        self._process = process
        self._resource = dict(resource)
        self.warnings = warnings
        self._dropped = DroppedValues(self.emit_background)
        self._boot_id = boot_id
        self._destinations = sorted(set(destinations))
        self._left_out = left_out or {}
        self._routes = [dict(route) for route in routes]
        self._deferred: DeferredMetrics | None = None
        self.deferring: Collection[object] = ()
        """Values of earlier calls that a device still computes."""
        self._lost_reported = 0

    def open(self, *, at_once: bool = True) -> None:
        """Open the journal. OSError where none can be kept. `at_once`: False: with the first event."""
        me = self.identity
        claim = session_name(me.rank, "", "").rstrip("-")
        self._journal.open(self._header, job_id=me.job_id, host=me.host, claim=claim, at_once=at_once)

    @property
    def ended(self) -> str | None:
        """How the run has ended, where it rests."""
        return self._journal.ended

    @property
    def session(self) -> object | None:
        """The journal session that events go to now."""
        return self._journal.session

    @property
    def deferred(self) -> DeferredMetrics:
        """Made when it is first needed."""
        if self._deferred is None:
            self._deferred = DeferredMetrics(self.emit, self.emit_background, self.drop_value)
            self.deferring = self._deferred.queue
            self.add_background_task(self._deferred)
        return self._deferred

    def emit(self, event: Event, begun: Begun | None = None) -> bool:
        """Write one event of training; False where a processor dropped it. May raise."""
        return self.emitters[event["tag"]](event, begun)

    def emit_background(self, event: Event) -> None:
        """Write one event that does not show that training goes on."""
        try:
            self.background_events += 1  # before it is written: the stall watch may look at any time
            if not self.emit(event):
                self.background_events -= 1
        except Exception as error:
            self.warn_once(event["tag"], f"{event['tag']} was lost: {error_text(error)}", key=type(error).__name__)

    def record(self, tag: str, fields: Callable[[], Event], *, inside: bool = False) -> None:
        """Write an event of training, whose `fields()` may raise anything."""
        try:
            if inside:
                parent = {"parent": self.scopes.parent_seq()}
                self.emit({"ts": 0, "seq": 0, "tag": tag, **parent, **fields()}, self.scopes.open_loop())
            else:
                self.emit({"ts": 0, "seq": 0, "tag": tag, **fields()})
        except Exception as error:
            self.drop_event(tag, error)

    def json_fields(self, tag: str, field: str, value: Any) -> Event:
        """What a user logged as a field of an event, as JSON, after warnings of what of it is lost.

        Args:
            tag: Of the event.
            field: Its name in the event.
            value: A mapping, or any object with named values.

        Returns:
            The field; and `cut` where there were too many entries.

        Raises:
            Exception: There are no named values; whatever a user's mapping raises.

        """
        conversion = Conversion(MAX_ENTRIES)
        event: Event = {field: conversion.fields(value)}
        for key, why in conversion.lost.items():
            self.drop_value(tag, key, why)
        if conversion.cut:
            event["cut"] = conversion.cut
            self.warn_cut(tag, conversion.cut)
        return event

    def warn_cut(self, tag: str, count: int) -> None:
        """Warn of entries that were left out because there were too many."""
        message = f"{tag}: {count:,} entries beyond the first {MAX_ENTRIES:,} were left out: log fewer at once"
        self.warn_once(tag, message, key="too many entries")

    def record_error(self, error: BaseException, attributes: Mapping[str, Any] | None = None) -> None:
        """Write an exception, once for all the scopes that it passes through."""
        self.record(
            "error",
            lambda: {**error_fields(error), **self.json_fields("error", "attributes", attributes or {})},
            inside=True,
        )
        self.scopes.mark_recorded(error)

    def add_background_task(self, task: BackgroundTask) -> None:
        """Have a task stopped before the run ends."""
        self.background_tasks.append(task)

    def stop_background_tasks(self) -> None:
        """Stop all of them, the latest first."""
        while self.background_tasks:
            task = self.background_tasks.pop()
            try:
                task.stop()
            except Exception as error:
                name = type(task).__name__
                self.warn_once("background", f"{name} did not stop well: {error_text(error)}", key=name)
            except BaseException:  # Ctrl-C, while this one is waited for
                self.stop_background_tasks()
                raise

    def drop_value(self, kind: str, key: str, why: str, shown: str = "") -> None:
        """Warn of a value that was logged and cannot be recorded, and write to the journal that it was dropped.

        Args:
            kind: "value" of a metric, "late" of one that a device computed, else the tag of the event.
            key: Of the metric, or the name of another value.
            why: What is wrong with it, and the fix.
            shown: The value itself, for the log alone: it may be a secret, which no processor would know here.

        """
        is_metric = kind in METRIC_KINDS
        message = f"{'metric' if is_metric else kind} {key:.80}{'=' if shown else ''}{shown}: {why:.300}"
        key = self.warnings.count(kind, message, key=key)
        self._dropped.add(key if is_metric else f"{kind}.{key}", why[:300])

    def drop_event(self, tag: str, error: Exception) -> None:
        """Warn that what was logged by one call is lost as a whole, and write that to the journal."""
        why = error_text(error)
        message = f"{tag} {'were' if tag == 'metrics' else 'was'} lost: {why}"
        self.warnings.count(tag, message, key=type(error).__name__)
        self._dropped.add(tag, why[:300])

    def close_warnings(self) -> None:
        """Write to the journal how many values were dropped in all."""
        self._dropped.close()

    def rest(self) -> None:
        """Do what is due as the training ends, so that an evaluation may follow."""
        self.stop_background_tasks()
        self._deferred, self.deferring = None, ()
        self._dropped.flush()

    def training_events(self) -> tuple[object | None, int]:
        """The session, and how many of its events came from training."""
        session = self._journal.session
        return session, (session.seq if session else 0) - self.background_events

    def lost_events(self) -> int:
        """How many events of the session could not be kept."""
        return self._journal.session.lost if self._journal.session else 0

    def report_journal_errors(self) -> None:
        """Warn of what the journal has met since the last time."""
        journal, session = self._journal, self._journal.session
        if journal.clock_event is not None:
            event, journal.clock_event = journal.clock_event, None
            self.warn_once("clock", f"{clock_text(event)}; see that this host's clock is set before a run starts")
        if session is None:
            return
        error, session.error = session.error, None
        if isinstance(error, SessionGone):
            self.warn_once("journal_gone", f"{error}: its latest lines are counted as lost")
            self._lost_reported = session.lost
        elif error is not None:
            waiting = f"; {session.waiting} lines wait in memory, and would not survive the process"
            problem = f"the journal at {session.path} cannot be written: {error}"
            key = error.strerror or type(error).__name__
            self.warn_once("journal", problem + (waiting if session.waiting else ""), key=key)
        if session.closed and session.lost > self._lost_reported:
            lost = f"{session.lost - self._lost_reported} events could not be written to {session.path}, and are lost"
            self.warn_once("lost", lost)

    def after_fork(self) -> None:
        """In a forked child, whose first event opens a session of its own, and takes a worker's number."""
        self.warnings.after_fork()
        self._dropped = DroppedValues(self.emit_background)
        self.background_tasks, self.background_events = [], 0
        self._deferred, self.deferring = None, ()
        if self._worker_number is not None:
            self._worker_number.forget()
        self._worker_number, self._is_worker = None, True
        self.scopes.after_fork()
        self._journal.after_fork()

    def _header(self) -> Event:
        """The header of a session that begins now, in this process."""
        session = os.urandom(8).hex()
        before = self._become_worker(session) if self._is_worker else None
        if self._deduplicate is not None and not self._is_worker:
            self.identity = self.scopes.identity = self._origin = self._deduplicate(self.identity)
        self._deduplicate = None
        me = self.identity
        if me.role or self._journal.session is not None:
            self.on_session()
        header: Event = {
            "ts": 0,
            "seq": 0,
            "tag": "header",
            "schema": SCHEMA,
            "session": session,
            "run_key": me.run_key,
            "job_id": me.job_id,
            "rank": me.rank,
            "local_rank": me.local_rank,
            "world_size": me.world_size,
            "role": me.role,
            "attempt": list(me.attempt),
            "launcher": me.launcher,
            "started": self.clock(),
            "pid": os.getpid(),
            "host": me.host,
            "boot_id": self._boot_id,
            "destinations": self._destinations,
            **self._left_out,
            "routes": self._routes,
            "resource": {**self._resource, "service.instance.id": me.instance},
        }
        directory, started = self._journal.directory, header["started"]
        not_before = first_free_time(directory, me.job_id, me.rank, me.role, started, among=before)
        if not_before is not None:
            header["not_before"] = not_before
        return self._process(header) or header

    def _become_worker(self, session: str) -> list[SessionPath] | None:
        """Go by a worker's number, which is kept while this process lives.

        Returns:
            The last session here that went by it: there are many, and each one begins behind the one before it. None
            where there is none.

        """
        origin, number = self._origin, self._worker_number
        if number is None or not number.is_held:
            directory = self._journal.directory / slug(origin.job_id) / slug(origin.host)
            # A number that another worker looks at seems to be taken.
            with exclusive(directory / f".{session_name(origin.rank, '', '')}workers"):
                number = self._worker_number = take_worker_number(directory, origin.rank, origin.role)
            self.identity = self.scopes.identity = origin.for_worker(number.number if number else os.getpid())
        before = None
        if number is not None:
            with suppress(OSError):  # a full disk: then there will be no session either
                before = number.begin(session_name(origin.rank, self.identity.role, session))
        return [before] if before else None


class NullRecorder:
    """Records nothing: of a run that is switched off, and of a process where none is open."""

    active = False
    is_substitute = False
    deferring: Collection[object] = ()
    ended: str | None = None
    session = None
    warnings = WarningSink(audible=False)
    emitters: Mapping[str, Emit] = {}
    """Nothing is taken anywhere."""
    scopes: Scopes = NullScopes()

    @cached_property
    def identity(self) -> Identity:
        """Which process this would be by its launcher alone; looked up only when it is asked for."""
        from stepspan.identity import host_facts, resolve

        env = {name: value for name, value in os.environ.items() if not name.startswith("STEPSPAN_")}
        return resolve({}, env, host_facts(), earlier_sessions=lambda job, rank: 0)

    @property
    def deferred(self) -> DeferredMetrics:
        """Takes values and loses them."""
        return DeferredMetrics(self.emit, self.emit_background, self.drop_value)

    def emit(self, event: Event, begun: Begun | None = None) -> bool:
        """Drop an event of training, and say so."""
        return False

    def emit_background(self, event: Event) -> None:
        """Drop an event of a background task."""

    def record(self, tag: str, fields: Callable[[], Event], *, inside: bool = False) -> None:
        """Make no event: `fields` is not called."""

    def record_error(self, error: BaseException, attributes: Mapping[str, Any] | None = None) -> None:
        """Leave the exception to the program."""

    def warn_once(self, kind: str, message: str, level: int = logging.WARNING, *, key: str = "") -> None:
        """Count and log nothing."""

    def drop_value(self, kind: str, key: str, why: str, shown: str = "") -> None:
        """Write and log nothing."""

    def drop_event(self, tag: str, error: Exception) -> None:
        """Write and log nothing."""

    def json_fields(self, tag: str, field: str, value: Any) -> Event:
        """Nothing: it would not be written."""
        return {}

    def close_warnings(self) -> None:
        """Write nothing: nothing was counted."""

    def add_background_task(self, task: BackgroundTask) -> None:
        """Leave the task alone: it has nothing to write at the end."""

    def stop_background_tasks(self) -> None:
        """Do nothing: there are no background tasks."""

    def rest(self) -> None:
        """Do nothing: there is nothing to stop, and nothing to begin anew."""

    def report_journal_errors(self) -> None:
        """Do nothing: there is no journal."""

    def after_fork(self) -> None:
        """A child has nothing to record either."""

    def training_events(self) -> tuple[object | None, int]:
        """No session, and no events."""
        return None, 0

    def lost_events(self) -> int:
        """None: none was to be kept."""
        return 0
