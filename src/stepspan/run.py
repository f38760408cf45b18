"""A training run as its code sees it: what can be logged to a `Run`. `stepspan.start_run` begins one.

Nothing here raises into training, whatever it is given. What goes wrong is counted in `stats()["warnings"]` and logged
once, by local rank 0 (other ranks log it at DEBUG).
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from stepspan.conversion import json_value, preview
from stepspan.deliver.delivery import CLOSE_TIMEOUT_S, Delivery
from stepspan.environment import unquoted
from stepspan.events import Event
from stepspan.journal.writer import SessionWriter
from stepspan.recording.decorators import F
from stepspan.recording.deferred import PENDING, metric_value, refusal
from stepspan.recording.log_store import RunLogStore
from stepspan.recording.nested import flatten, is_nested
from stepspan.recording.open_runs import OPEN_RUNS
from stepspan.recording.outcomes import STATUSES, to_status
from stepspan.recording.past import past_time
from stepspan.recording.recorder import JournalRecorder, NullRecorder
from stepspan.recording.scope import Scope, Step
from stepspan.recording.spelling import nearest_parameter
from stepspan.recording.steps import Amount, Steps
from stepspan.values import error_text, to_float, to_integer, to_text

if TYPE_CHECKING:
    from datetime import datetime

    from typing_extensions import Self

    from stepspan.identity import Identity
    from stepspan.pipeline import Pipeline

T = TypeVar("T")

SPAN_PARAMETERS = ("collective", "cuda")
EVENT_PARAMETERS = ("status",)
"""What attributes may have been meant for, by their type."""
"""How long the end of a run waits for a receiver that answers."""
MAX_INTEGER = 1 << 63


class Run:
    """An open run: a context manager, usable from any thread, asyncio task and forked child.

    `stepspan.start_run` makes one; `stepspan.current_run` finds it. Where stepspan is switched off, and where no run is
    open, the run is one that records nothing: each method may be called all the same.

    What holds a run can be copied and pickled: a copy has the same run, and what was pickled has the `current_run()` of
    the process that unpickles it.

    Attributes:
        identity: Which job and rank this process is.
        job_id: What all ranks of the job have in common.
        directory: Where the journals are.
        trace_id: Of the run's span.
        closed: Whether the run has ended and takes nothing more.

    What begins with an underscore is stepspan's own; its samplers and integrations record through `_recorder`.

    """

    _rests = False
    """Whether it has ended, and takes what is evaluated afterwards."""
    _unused = False
    """Whether `start_run` has just made it: the first use tells whether a `with` block is around it."""

    def __init__(
        self,
        recorder: JournalRecorder | NullRecorder,
        pipeline: Pipeline | None = None,
        delivery: Delivery | None = None,
        *,
        name: str | None = None,
        tags: Sequence[str] = (),
        caller: Mapping[str, Any] = MappingProxyType({}),
        close_timeout: float = CLOSE_TIMEOUT_S,
        at_once: bool = True,
        when_begun: Callable[[Run], None] = lambda run: None,
    ) -> None:
        self._recorder = recorder
        self._pipeline = pipeline
        """The processors, the journal and its followers; None of a run that records nothing."""
        self._delivery = delivery or Delivery()
        self._close_timeout = close_timeout
        self.closed = False
        self._active = recorder.active
        self._scopes = recorder.scopes
        self._emitters = recorder.emitters
        self._lock, self._in_upkeep = threading.Lock(), threading.Lock()
        self._trace_id = ""
        self._handled_before = id(sys.exc_info()[1])
        """Of the exception that was being handled as the run was made: `except ImportError: train()`."""
        self._finalizer: Any = None
        """Closes the run where a worker of multiprocessing ends."""
        self._when_begun: Callable[[Run], None] | None = None
        """What is to be done as the run begins; None: it has begun."""
        if pipeline is not None and isinstance(recorder, JournalRecorder):
            recorder.on_session = self._begin_session
            pipeline.journal.upkeep = self._upkeep
            identity = recorder.identity
            about = {"name": name or identity.job_id, "group": identity.group, "tags": list(tags)}
            self._scope = self._scopes.run({**json_value(about), "attempt": list(identity.attempt), **caller})
            self._when_begun = when_begun
            if at_once:
                self._begin()

    @property
    def identity(self) -> Identity:
        """Which job and rank this process is."""
        return self._recorder.identity

    @property
    def job_id(self) -> str:
        """What all ranks of the job have in common."""
        return self.identity.job_id

    @property
    def directory(self) -> Path:
        """Where the journals are, for `stepspan report`; of a run that records nothing, where they would be."""
        return self._pipeline.journal.directory if self._pipeline else _default_directory()

    @property
    def trace_id(self) -> str:
        """The id of the trace of the run's span in this process, 32 hex digits; "" of a run that records nothing."""
        if self._when_begun is not None:
            self._begin_use()
        return self._trace_id

    def __repr__(self) -> str:
        if not self._active:
            return "<Run: records nothing>"
        me = self.identity
        rank = f"rank {me.rank} of {me.world_size}{me.role and f' ({me.role})'}"
        session = self._session
        where = session.path if session else self.directory
        return f"<Run {me.job_id!r}: {rank}, {self._state}, {where}>"

    @property
    def _state(self) -> str:
        return "closed" if self.closed else "open" if self._recorder.ended is None else self._recorder.ended

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return current_run, ()  # of whoever unpickles it

    def log_metrics(
        self,
        metrics: Mapping[str, Any],
        step: int | None = None,
        *,
        split: str | None = None,
        time: datetime | int | None = None,
    ) -> None:
        """Record one point per key at this instant, each in a series `training.<key>` of its own.

        Args:
            metrics: Key -> number (int, float, bool, or anything with `__float__`), or an array or tensor of one
                element of numpy, torch or JAX, or a list of one number. One that a GPU still computes is not waited
                for. NaN and Infinity are numbers. A mapping among the values is flattened: `{"f1": {"cat": 0.5}}` is
                `f1/cat`. What is no number is left out, with a warning for each key. A prefix of a key names the split
                of that key: `val/loss`, `val.loss` and `val_loss` are the loss of split "val", each a series with the
                whole key as its attribute `key`. Prefixes are train, val, valid and validation (both are "val"), eval
                and test; `valid_` in `valid_loss` only.
            step: The step that the values belong to, of any time: the score of a checkpoint may come late. By default
                the training step that is open or was last, also in a validation.
            split: The split of all keys; by default that of the step that is open, else "train".
            time: When they were measured, if that is not now: a datetime (local if it has no time zone), or Unix
                nanoseconds. Such points go out as they are: a receiver that does not take points of that age refuses
                them, and they are kept as rejected.

        """
        if not self._active:
            return
        if self._unused:
            self._begin_use()
        try:
            if type(metrics) is dict and metrics and split is None and time is None and not self._recorder.deferring:
                for value in metrics.values():
                    if type(value) is not float or value - value != 0.0:
                        break
                else:  # as nearly always
                    is_plain = step is None or (type(step) is int and 0 <= step < MAX_INTEGER)
                    if is_plain and self._scopes.write_metrics(metrics, step):
                        return
            values: dict[str, float | str | None] = {}
            pending: dict[str, Any] = {}
            dropped: list[tuple[str, str, str]] | None = None
            if type(metrics) is not dict and not isinstance(metrics, dict) and is_nested(metrics):  # as OmegaConf's,
                self._log_nested(metrics, step, split, time)
                return
            for key, value in metrics.items():
                if type(value) is float and value - value == 0.0 and type(key) is str:
                    values[key] = value
                    continue
                try:
                    found = metric_value(value)
                except Exception as error:  # a user's __float__ may raise anything, and so may a device
                    if is_nested(value):
                        self._log_nested(metrics, step, split, time)
                        return
                    dropped = [*(dropped or ()), (to_text(key), *refusal(value, error))]
                    continue
                if type(key) is not str:
                    self._log_nested(metrics, step, split, time)
                    return
                values[key] = found
                if found is PENDING:
                    values[key], pending[key] = None, value
            for key, why, shown in dropped or ():
                self._recorder.drop_value("value", key, why, shown)
            if not values:
                return
            number = None if step is None else self._integer("step", step)
            named = split if split is None or type(split) is str else to_text(split)
            event: Event = {"ts": 0, "seq": 0, "tag": "metrics"}
            past = None if time is None else self._past_time(time)
            if past is None:
                written = self._scopes.attribute(event, values, number, named)
            else:  # of no step but their own, and without a say in what is in force
                written = self._scopes.attribute(event, values, None, named)
                event = {**{name: event[name] for name in ("ts", "seq", "tag", "split")}, "time": past}
                if number is not None:
                    event["own_step"] = number
            event["metrics"] = values
            if pending or self._recorder.deferring:
                self._recorder.deferred.write_metrics(event, pending)
            else:
                self._emitters["metrics"](event, written)
        except Exception as error:
            self._recorder.drop_event("metrics", error)

    def _log_nested(self, metrics: Mapping[str, Any], step: int | None, split: str | None, time: Any) -> None:
        """Log metrics that lie in mappings, or whose keys are no text."""
        flat = flatten(metrics)
        for key, why in flat.dropped:
            self._recorder.drop_value("value", key, why)
        if flat.values:
            self.log_metrics(flat.values, step, split=split, time=time)

    def log_scalar(self, key: str, value: Any, step: int | None = None) -> None:
        """Record one point at this instant.

        Args:
            key: Of the series `training.<key>`.
            value: As a value of `log_metrics`.
            step: As of `log_metrics`.

        """
        self.log_metrics({key if type(key) is str else to_text(key): value}, step)

    def log_hyperparams(self, params: Any) -> None:
        """Record hyperparameters, merged with those recorded before.

        Args:
            params: A mapping, a dataclass, a namespace or any object with attributes. They become labels of
                `training.run.info` and attributes of the run's span; what JSON can't hold is written as text.

        """
        if self._unused:
            self._begin_use()
        self._scopes.follow()
        self._recorder.record("hyperparams", lambda: self._recorder.json_fields("hyperparams", "params", params))

    def log_artifact(self, name: str, path: str | os.PathLike[str], *, kind: str = "file") -> None:
        """Record where an artifact lies; the file itself is not read.

        Args:
            name: What it is.
            path: Where it lies. A path, not a URL, at which there is nothing is recorded with a warning.
            kind: Any word. `kind="checkpoint"` feeds `training.run.checkpoint_time`, the metric behind the dashboards'
                age of the last checkpoint and its alert.

        """
        if self._unused:
            self._begin_use()

        def fields() -> Event:
            number = self._scopes.training_step()
            step = {} if number is None else {"step": number}
            where = os.fsdecode(path)
            if "://" not in where and not os.path.exists(where):
                message = f"artifact {to_text(name):.80}: there is no {where:.200}; recorded all the same"
                self._warn_once("artifact", message, key=to_text(name))
            return {"name": to_text(name), "path": where, "kind": to_text(kind), **step}

        self._scopes.follow()
        self._recorder.record("artifact", fields)

    def log_event(self, name: str, /, *, status: str | None = None, **attributes: Any) -> None:
        """Record a named milestone: a log record, and an event of the run's span.

        Args:
            name: What happened.
            status: How it went, in a word.
            attributes: Anything that belongs to it.

        """
        if self._unused:
            self._begin_use()
        state = {} if status is None else {"status": to_text(status)}
        self._check_spelling("event", str, attributes, EVENT_PARAMETERS)
        self._scopes.follow()
        self._recorder.record(
            "event",
            lambda: {"name": to_text(name), **state, **self._recorder.json_fields("event", "attributes", attributes)},
            inside=True,
        )

    def log_error(self, error: BaseException, /, **attributes: Any) -> None:
        """Record an exception with its stack trace; the innermost open span becomes an error.

        An exception that leaves a step, a span or the run is recorded by itself.

        Args:
            error: It counts in `training.run.errors`, by its type.
            attributes: Anything that belongs to it.

        """
        if self._unused:
            self._begin_use()
        self._recorder.record_error(error, attributes)

    def epoch(self, n: int) -> Scope:
        """An epoch, to be entered by `with`: a span, and `training.run.epoch` from then on.

        Args:
            n: Its number, 0 or more.

        """
        if self._unused:
            self._begin_use()
        return self._scopes.epoch(self._integer("epoch", n))

    def step(self, n: int, *, split: str = "train", samples: float | None = None, tokens: float | None = None) -> Scope:
        """A step, to be entered by `with`: its time (s) is measured, and all ranks' steps of one number share a trace.

        Args:
            n: Its number, 0 or more.
            split: What it is of: "train", "val", …
            samples: How many samples this rank's step processes, for `training.throughput`; the scope's attribute of
                this name may also be set while the step is open.
            tokens: How many tokens, in the same way.

        """
        if self._unused:
            self._begin_use()
        if type(split) is not str:
            split = to_text(split)
        if type(n) is not int or not 0 <= n < MAX_INTEGER:
            number = self._integer("step", n)
            n = self._scopes.next_step(split) if number is None else number
        scope = Step(self._scopes, n, split)
        if samples is not None:
            scope.samples = samples
        if tokens is not None:
            scope.tokens = tokens
        return scope

    @overload
    def span(self, name: str, /, *, collective: bool = False, cuda: bool = False, **attributes: Any) -> Scope: ...

    @overload
    def span(self, name: F, /) -> F: ...

    def span(
        self, name: str | Callable[..., Any], /, *, collective: bool = False, cuda: bool = False, **attributes: Any
    ) -> Any:
        """A phase of training: a span, and `training.phase.time` (s). To be entered by `with`, or as a decorator.

        Args:
            name: Of the span, and the metric's attribute `phase`. A function, as of `@run.span`, gives it its own name.
            collective: Whether its time is a wait for other ranks (`training.step.wait`).
            cuda: Whether what the current CUDA stream does in it is timed on the GPU, too: as
                `training.phase.device_time` (s), which then is a collective one's wait. Nothing waits for the GPU.
            attributes: Of the span.

        """
        if callable(name):
            with suppress(Exception):  # what calls itself a function may raise anything
                return self.span(str(name.__qualname__))(name)
        if self._unused:
            self._begin_use()
        begin: Event = {"name": to_text(name)}
        try:
            if collective:
                begin["collective"] = True
            if attributes:
                begin |= self._recorder.json_fields("span", "attributes", attributes)
                self._check_spelling("span", bool, attributes, SPAN_PARAMETERS)
            if cuda and self._active:
                from stepspan.recording.cuda_spans import device_span

                return device_span(self._recorder, begin)
        except Exception as error:  # a user's mapping may raise anything
            message = f"the attributes of a span were lost: {error_text(error)}"
            self._warn_once("span", message, key=type(error).__name__)
        return self._scopes.span(begin)

    def steps(
        self,
        iterable: Iterable[T],
        *,
        start: int | None = None,
        accumulate: int = 1,
        split: str = "train",
        samples: Amount = None,
        tokens: Amount = None,
    ) -> Steps[T]:
        """Iterate over batches, one step for each `accumulate` of them, timing the wait for data and then the step.

        A step ends as the next batch is asked for, and as the loop is left, also where a progress bar holds it. The
        loops in a `zip` make steps side by side; what is logged without a split is of the first.

        Args:
            iterable: The batches. What it raises leaves the loop.
            start: The first step's number, for resuming; by default steps count on across epochs, from 0.
            accumulate: How many batches make one step.
            split: What the steps are of: "train", "val", …
            samples: How many samples a batch holds, or a function of the batch that counts them (`len`, say).
            tokens: How many tokens, in the same way.

        Returns:
            An iterator over the batches, as long as `iterable`.

        """
        if self._unused:
            self._begin_use()
        first = None if start is None else self._integer("start", start)
        each = self._integer("accumulate", accumulate) or 1
        return Steps(
            self._scopes, iterable, start=first, accumulate=each, split=to_text(split), samples=samples, tokens=tokens
        )

    def set_total_steps(self, n: int) -> None:
        """Say how many training steps there will be: gives `training.run.eta` (s).

        Args:
            n: Counted from step 0, whatever step a resumed run starts at.

        """
        if self._unused:
            self._begin_use()
        total = self._integer("total_steps", n)
        if total is not None:
            self._scopes.total_steps = total
            self._recorder.record("progress", lambda: {"total_steps": total})

    def as_log_store(self) -> RunLogStore:
        """The run behind the LogStore contract of evsys (`stepspan.stores`); closing the store leaves the run open."""
        return RunLogStore(self)

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until every destination has taken all events so far.

        Args:
            timeout: Seconds.

        Returns:
            False where that did not suffice, or events wait in memory for a disk that does not take them.

        """
        session = self._session
        try:
            seconds = to_float(timeout)
            if seconds is None:
                self._warn_once("flush", f"timeout={to_text(timeout):.80}: not a number of seconds")
            seconds = max(0.0, seconds or 0.0)
            deadline = time.monotonic() + seconds
            arrived = not self._recorder.deferring or self._recorder.deferred.drain(seconds)
            stored = self._pipeline is None or self._pipeline.journal.stored()
            left = max(0.0, deadline - time.monotonic())
            return (
                (session is None or self._delivery.wait(session.path, session.stored_seq, left)) and arrived and stored
            )
        except Exception as error:
            self._warn_once("flush", f"delivery could not be waited for: {error_text(error)}")
            return False

    def close(self, status: str | None = None) -> None:
        """End the run. Waits for delivery, `close_timeout` seconds at most, and only while the receiver answers.

        What is not delivered then is told in one line: why it waits, who goes on with it, and what sends it.

        Args:
            status: "completed", "failed" or "interrupted". By default "completed", or as the exception says that is on
                its way (in a `finally`) or being handled, where that has ended the training.

        """
        if status is None and self._active:
            self._close(*self._handled_here())
        else:
            self._close("completed" if status is None else status, None)

    def _handled_here(self) -> tuple[str, BaseException | None]:
        """How the run ends by the exception that is being handled here, in a `finally` perhaps; and that exception."""
        error = sys.exc_info()[1]
        try:
            if error is not None and id(error) != self._handled_before and self._scopes.has_ended_by(error):
                return self._scopes.leave(self._scope, error), error
        except Exception as failure:
            self._warn_once("close", f"how the run ended could not be told: {error_text(failure)}")
        return "completed", None

    def _close(self, given: str, error: BaseException | None) -> None:
        """End the run with a status. `error`: what has left it."""
        if self._end(given, error):
            self._wait_for_delivery(self._close_timeout)

    def _end(self, given: str, error: BaseException | None) -> bool:
        """Write the end of the run, and return whether that was still to be done."""
        if not self._active:
            return False
        with self._lock:
            if self.closed:
                return False
            self.closed = True
        self._begin()
        status, is_known = to_status(self._recorder.ended or given)
        try:
            self._recorder.stop_background_tasks()
            if not is_known:
                known = ", ".join(STATUSES)
                self._warn_once("status", f"close(status={preview(given):.40}): not one of {known}; taken as {status}")
            if self._rests:
                self._end_evaluation(error)
            self._recorder.close_warnings()
            self._end_journal(error, status)
            self._recorder.report_journal_errors()
        except Exception as failure:
            self._warn_once("close", f"the run was not closed well: {error_text(failure)}")
        except BaseException:  # Ctrl-C, while a device or a thread is waited for
            OPEN_RUNS.remove(self)
            raise
        finally:
            self._end_journal(error, status)
        return True

    def _wait_for_delivery(self, timeout: float) -> None:
        """Wait until the end of the run is delivered, while the receiver answers; then it is over."""
        try:
            session = self._session
            self._delivery.close(session.path if session else None, timeout)
        except Exception as error:
            self._warn_once("close", f"the run was not closed well: {error_text(error)}")
        finally:
            OPEN_RUNS.remove(self)
            if self._finalizer is not None:
                self._finalizer.cancel()
        self._recorder.warnings.log_summary()

    def _end_journal(self, error: BaseException | None, status: str) -> None:
        """End the run in its journal, and the journal, where that was not done."""
        self._scopes.end(self._scope, error, status)
        self._scopes.closed, self._scopes.usual = True, False
        if self._pipeline is not None:
            self._pipeline.close(status)

    def _rest(self, error: BaseException | None = None, status: str | None = None) -> None:
        """The training has ended; what is evaluated afterwards is taken until the process ends or another run begins.

        Args:
            error: The exception that ended the training, if any.
            status: How it ended; None: by that exception, or well.

        """
        if not self._active:
            return
        with self._lock:
            if self.closed or self._rests:
                return
            self._rests = True
        try:
            self._recorder.rest()
            ended = status or self._scopes.leave(self._scope, error)
            self._scopes.end(self._scope, error, ended, rests=True)
            if self._pipeline is not None:
                self._pipeline.journal.rest(ended)
            OPEN_RUNS.rest(self)
            if ended != "completed":  # an evaluation would be a surprise
                self._park()
        except Exception as failure:
            self._warn_once("close", f"the run was not ended well: {error_text(failure)}")

    def _park(self) -> None:
        """End the session of a run that rests: nobody waits for more. If more comes it opens another one."""
        try:
            OPEN_RUNS.park(self)
            if self._pipeline is not None and self._recorder.ended is not None:
                self._pipeline.journal.close(self._recorder.ended, for_good=False)
                session = self._session
                self._delivery.pause(session.path if session else None, self._close_timeout)
                self._recorder.warnings.log_summary()
        except Exception as error:
            self._warn_once("close", f"the session was not ended well: {error_text(error)}")

    def _end_evaluation(self, error: BaseException | None) -> None:
        """End what is open after the end of the training, and record what has ended the process."""
        for scope in reversed(self._scopes.open()):
            self._scopes.end(scope, error)

    def stats(self) -> dict[str, Any]:
        """The ledgers of the run.

        Returns:
            `journaled` events: those that stand in the journal's files; those `waiting` in memory, for a disk that does
            not take them; and those `lost`. Whether all is `durable`: nothing waits, and the journal does not lie in
            memory. The `journal`'s path, `warnings` by kind and `warning_keys` by kind and key (the metric, the
            parameter, the exception …), and `delivery`: for each destination and signal what became of the lines and
            records.

        """
        if self._when_begun is not None:
            self._begin_use()
        session, delivery = self._session, {}
        try:
            delivery = self._delivery.ledgers(session.path) if session else {}
        except Exception as error:
            self._warn_once("stats", f"the ledgers of delivery cannot be read: {error_text(error)}")
        return {
            "journaled": session.journaled if session else 0,
            "waiting": session.waiting if session else 0,
            "lost": self._recorder.lost_events(),
            "durable": self._pipeline.journal.durable and not (session and session.waiting) if self._pipeline else True,
            "journal": str(session.path) if session else None,
            "warnings": dict(self._recorder.warnings.counts),
            "warning_keys": self._recorder.warnings.key_counts(),
            "delivery": delivery,
        }

    def _warn_once(self, kind: str, message: str, level: int = logging.WARNING, *, key: str = "") -> None:
        """Count something that went wrong, and log it the first time for its kind and key.

        Args:
            kind: What is counted together; `stats()["warnings"]` has the counts.
            message: What happened, and the fix.
            level: Of the log record.
            key: What tells this cause from others of its kind.

        """
        self._recorder.warn_once(kind, message, level, key=key)

    def __enter__(self) -> Self:
        self._unused = False
        OPEN_RUNS.enter(self)
        self._begin()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._close(self._scopes.leave(self._scope, error) if self._active else "", error)
        OPEN_RUNS.leave(self)

    def _end_at_exit(self, error: BaseException | None, of_earlier_line: bool) -> bool:
        """Write the end of the run with its process, and return whether that was still to be done.

        Args:
            error: The exception that ends the process, where it is known.
            of_earlier_line: Whether it is one of an interactive session: only a loop that was left, with nothing
                recorded since, was left by it.

        """
        if not self._active:
            return False
        thread = OPEN_RUNS.thread_of(self)
        if error is not None and thread not in {None, threading.current_thread()}:  # the exception is not of that one
            is_cut_short = thread.is_alive() and not of_earlier_line
            return self._end(*(("interrupted", None) if is_cut_short else self._scopes.exit_here()))
        if error is not None and not (of_earlier_line and not self._scopes.was_left()):
            return self._end(self._scopes.leave(self._scope, error), error)
        return self._end(*self._scopes.exit_here())

    @classmethod
    def _close_at_exit(cls, runs: Iterable[Run], error: BaseException | None, *, of_earlier_line: bool = False) -> None:
        """End runs with their process, which waits for the delivery of all of them as long as for that of one."""
        ended = [run for run in runs if run._end_at_exit(error, of_earlier_line)]
        begun = time.monotonic()
        for run in ended:
            run._wait_for_delivery(max(0.0, begun + run._close_timeout - time.monotonic()))

    def _begin(self) -> None:
        """Write the first event, and start what works beside the run."""
        when_begun, self._when_begun = self._when_begun, None
        if when_begun is not None:
            self._scopes.begin(self._scope)
            self._trace_id = self._scopes.ids(self._scope)[0].hex()
            self._close_with_worker()
            when_begun(self)

    def _begin_use(self) -> None:
        """Be used for the first time, and with no `with` block around it: what such a run replaces ends."""
        self._unused = False
        OPEN_RUNS.end_bare_before(self)
        self._begin()

    def _hold(self, *, is_substitute: bool = False) -> Self:
        """Be looked after by what has started it and will close it: no other run ends it, and it ends no other.

        Args:
            is_substitute: It was begun for want of another one: one that the program starts has the samplers.

        """
        self._unused = False
        if isinstance(self._recorder, JournalRecorder):
            self._recorder.is_substitute = is_substitute
        OPEN_RUNS.hold(self)
        self._begin()
        return self

    def _after_fork(self) -> None:
        """Go on in a forked child, whose first event opens a session of its own."""
        self._lock, self._in_upkeep = threading.Lock(), threading.Lock()
        self._when_begun = self._finalizer = None
        try:
            self._delivery = self._delivery.after_fork()
            self._recorder.after_fork()
        except Exception as error:
            self._warn_once("fork", f"a forked child records nothing: {error_text(error)}")

    @property
    def _session(self) -> SessionWriter | None:
        return self._pipeline.journal.session if self._pipeline else None

    def _upkeep(self) -> None:
        if not self._in_upkeep.acquire(blocking=False):
            return  # another thread is at it, or this one, interrupted by a signal handler that logs
        try:
            if self._pipeline is not None and self._pipeline.journal.clock_event is not None:
                self._trace_id = self._scopes.ids(self._scope)[0].hex()  # its begin may have another time now
            self._recorder.report_journal_errors()
            self._delivery.watch()
        finally:
            self._in_upkeep.release()

    def _begin_session(self) -> None:
        """Another session begins than the run's first one."""
        if self._rests:  # it is evaluated after it was parked
            OPEN_RUNS.rest(self)
            self._delivery = self._delivery.resume()
        if self.identity.role:
            self._close_with_worker()

    def _check_spelling(self, tag: str, kind: type, attributes: Mapping[str, Any], parameters: tuple[str, ...]) -> None:
        """Warn of an attribute of a parameter's type whose name is nearly that of the parameter."""
        for name, value in attributes.items():
            if type(value) is kind and (meant := nearest_parameter(name, parameters)) is not None:
                message = f"{tag} attribute {name}={value!r:.40}: did you mean {meant}={value!r:.40}? Recorded as it is"
                self._warn_once(tag, message, key=name)

    def _close_with_worker(self) -> None:
        """A worker of multiprocessing leaves past atexit: close the run by its own way of ending."""
        # Another thread may be importing them just now: then they lack what would be needed.
        parent = getattr(sys.modules.get("multiprocessing.process"), "parent_process", None)
        finalize = getattr(sys.modules.get("multiprocessing.util"), "Finalize", None)
        if parent and finalize and parent():  # an exception that ends the worker is still on its way
            self._finalizer = finalize(None, lambda: self._close_at_exit([self], sys.exc_info()[1]), exitpriority=0)

    def _past_time(self, time: Any) -> int | None:
        """The time before now that values are given, Unix ns; None where it is the present, or none."""
        try:
            return past_time(time, self._scopes.clock())
        except ValueError as error:
            self._warn_once("time", f"time={to_text(time):.80}: {error}; recorded at the present")
            return None

    def _integer(self, field: str, value: Any) -> int | None:
        if type(value) is int and 0 <= value < MAX_INTEGER:
            return value
        try:
            if isinstance(value, bool):
                raise TypeError("a truth value")
            number = to_integer(value)
            if 0 <= number < MAX_INTEGER:
                return number
            why = "below 0 or beyond 64 bits"
        except Exception as error:  # a user's __index__ may raise anything
            why = f"not a whole number: {to_text(error)}"
        self._warn_once("step", f"{field}={to_text(value):.80}: {why}; recorded without it", key=field)
        return None


def _default_directory() -> Path:
    from stepspan.config import Settings

    return Path(os.path.expanduser(unquoted(os.environ.get("STEPSPAN_DIRECTORY", "")) or Settings().directory))


DISABLED = Run(NullRecorder())
"""The run where none is open, and where stepspan is switched off: it records nothing."""


def current_run() -> Run:
    """The run that is open here, or one that records nothing.

    Several may be open side by side. It goes by context: the innermost `with start_run():` around this code, else the
    latest run that was started here. A thread takes the run of the code that started it; one that has none takes the
    only open run, or the oldest one, with a warning.
    """
    run: Run = OPEN_RUNS.current() or DISABLED
    return run
