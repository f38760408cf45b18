"""A training run as its code sees it: what a `Run` can be told. `stepspan.start` makes one.

Nothing here raises into training. What goes wrong is counted in `stats()` and told once, by local rank 0 (other ranks
say it at DEBUG).
"""

from __future__ import annotations

import logging
import operator
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from stepspan.deliver.delivery import Delivery
from stepspan.events import SCHEMA, Event
from stepspan.journal.writer import SessionGone
from stepspan.recording.deferred import LATER, Resolver, number_of, resolver_of
from stepspan.recording.scopes import Scope, Scopes, is_failure
from stepspan.recording.steps import Amount, Steps
from stepspan.values import error_fields, fields_of, json_value, to_text

if TYPE_CHECKING:
    from typing_extensions import Self

    from stepspan.compat.evsys.run_store import RunLogStore
    from stepspan.identity import Identity
    from stepspan.pipeline import Pipeline

T = TypeVar("T")
log = logging.getLogger("stepspan")

CLOSE_WAIT = 5.0
LARGEST = 1 << 63


class BackgroundTask(Protocol):
    """What works beside a run, on a thread of its own, until the run ends."""

    def stop(self) -> None:
        """Say what is left to say, and end."""
        ...


class Run:
    """An open run: a context manager, usable from any thread, asyncio task and forked child."""

    def __init__(
        self,
        identity: Identity,
        resource: Mapping[str, Any],
        pipeline: Pipeline,
        delivery: Delivery,
        *,
        boot_id: str,
        name: str | None = None,
        tags: Sequence[str] = (),
        propagate: bool | None = None,
    ) -> None:
        self.identity = identity
        self.pipeline = pipeline
        self.delivery = delivery
        self.closed = False
        self.background_tasks: list[BackgroundTask] = []
        """Stopped before the run ends; a forked child has none."""
        self.background_events = 0
        """How many events came from companions."""
        self._late: Resolver | None = None
        self._resource = dict(resource)
        self._boot_id = boot_id
        self._journal = pipeline.journal
        self._emit = pipeline.emit
        self._warns = identity.local_rank == 0
        self._warnings: Counter[str] = Counter()
        self._lock, self._keeping_up = threading.Lock(), threading.Lock()
        self._scopes = Scopes(identity, pipeline, warn=self.warn_once, record_error=self.log_error, propagate=propagate)
        self._journal.upkeep = self._upkeep
        self._journal.start(self._header, job_id=identity.job_id, host=identity.host)
        about = {"name": name or identity.job_id, "group": identity.group, "tags": list(tags)}
        self._scope = self._scopes.run({**json_value(about), "attempt": list(identity.attempt)})
        self._scopes.begin(self._scope)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None, *, split: str | None = None) -> None:
        """One point per key at this instant.

        `metrics`: key -> number (int, float, bool, or anything with `__float__`), or an array or tensor of one element
        of numpy, torch or JAX. One that a GPU still computes is not waited for: `stepspan.recording.deferred`.
        `step`: the current step's number unless given. `split`: the current step's split unless given, else "train";
        a leading `train/`, `val/`, `eval/` or `test/` of a key names the split of that key.
        """
        try:
            values: dict[str, float | str | None] = {}
            late: dict[str, Any] = {}
            for key, value in metrics.items():
                if type(value) is float and value - value == 0.0 and type(key) is str:
                    values[key] = value
                else:
                    number = number_of(key, value, self.warn_once)
                    name = key if type(key) is str else to_text(key)
                    if number is LATER:
                        values[name], late[name] = None, value
                    elif number is not None:
                        values[name] = number
            if not values:
                return
            scope = self._scopes.innermost()
            if scope is not None:
                split = split or scope.split
                number = scope.step if step is None else self._whole("step", step)
            else:
                number = None if step is None else self._whole("step", step)
            event: Event = {"ts": 0, "seq": 0, "tag": "metrics", "split": to_text(split) if split else "train"}
            if number is not None:
                event["step"] = number
            event["metrics"] = values
            if late or (self._late is not None and self._late.busy):
                resolver_of(self).metrics(event, late)
            else:
                self._emit(event)
        except Exception as error:
            self.warn_once("metrics", f"metrics were lost: {error!r}")

    def log_scalar(self, key: str, value: Any, step: int | None = None) -> None:
        """One point at this instant."""
        self.log_metrics({key: value}, step)

    def log_hyperparams(self, params: Any) -> None:
        """Hyperparameters (a mapping, or an object with attributes), merged with those logged before.

        Values that JSON can't hold are written as text.
        """
        self._record("hyperparams", lambda: {"params": json_value(fields_of(params))})

    def log_artifact(self, name: str, path: str | os.PathLike[str], *, kind: str = "file") -> None:
        """That an artifact (a checkpoint, a plot) lies at `path`; the file itself is not read."""
        scope = self._scopes.innermost()
        step = {} if scope is None or scope.step is None else {"step": scope.step}
        self._record(
            "artifact", lambda: {"name": to_text(name), "path": os.fsdecode(path), "kind": to_text(kind), **step}
        )

    def log_event(self, name: str, /, *, status: str | None = None, **attributes: Any) -> None:
        """A named milestone."""
        state = {} if status is None else {"status": to_text(status)}
        self._record(
            "event", lambda: {"name": to_text(name), **state, "attributes": json_value(attributes)}, inside=True
        )

    def log_error(self, error: BaseException, /, **attributes: Any) -> None:
        """An exception with its stack trace; the innermost open span becomes an error."""
        self._record("error", lambda: {**error_fields(error), "attributes": json_value(attributes)}, inside=True)
        self._scopes.recorded(error)

    def epoch(self, n: int) -> Scope:
        """A context manager: epoch `n`."""
        return self._scopes.epoch(self._whole("epoch", n))

    def step(self, n: int, *, split: str = "train", samples: float | None = None, tokens: float | None = None) -> Scope:
        """A context manager: step `n`. All ranks' steps of one number share a trace.

        `samples`, `tokens`: how many this rank's step processes, for `training.throughput`; the scope's attributes of
        these names may also be set while the step is open.
        """
        number: int | None = n
        if type(n) is not int or n < 0 or n >= LARGEST:
            number = self._whole("step", n)
        scope = self._scopes.step(number, split if type(split) is str else to_text(split))
        scope.samples, scope.tokens = samples, tokens
        return scope

    def span(self, name: str, /, *, collective: bool = False, cuda: bool = False, **attributes: Any) -> Scope:
        """A context manager: a phase. `collective=True`: its time is a wait for other ranks (`training.step.wait`).

        `cuda=True`: what the current CUDA stream does in it is timed on the GPU, too, as `training.phase.device_time`
        (s), and that is a collective one's wait. Nothing waits for the GPU.
        """
        begin: Event = {"name": to_text(name)}
        if collective:
            begin["collective"] = True
        if attributes:
            try:
                begin["attributes"] = json_value(attributes)
            except Exception as error:  # a user's mapping may raise anything
                self.warn_once("span", f"the attributes of a span were lost: {error!r}")
        if cuda:
            from stepspan.integrations.torch.times import device_span

            return device_span(self, begin)
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

        The number goes on across epochs; `start` sets it, for resuming. What the iterable raises gets out of the loop.
        `samples`, `tokens`: how many a batch holds, or a function of the batch that counts them (`len`, say).
        """
        first = None if start is None else self._whole("start", start)
        each = self._whole("accumulate", accumulate) or 1
        return Steps(
            self._scopes, iterable, start=first, accumulate=each, split=to_text(split), samples=samples, tokens=tokens
        )

    def set_total_steps(self, n: int) -> None:
        """How many training steps there will be, counted from step 0: gives `training.run.eta` (s)."""
        total = self._whole("total_steps", n)
        if total is not None:
            self._record("progress", lambda: {"total_steps": total})

    def as_log_store(self) -> RunLogStore:
        """The run behind the LogStore contract of evsys (`stepspan.stores`); closing the store leaves the run open."""
        from stepspan.compat.evsys.run_store import RunLogStore

        return RunLogStore(self)

    def emit_background(self, event: Event) -> None:
        """Write an event of a companion: one that does not show that training goes on."""
        try:
            self.background_events += (
                1  # before it is written: a stall watch that looks now must not take it for training's
            )
            if not self._emit(event):
                self.background_events -= 1
        except Exception as error:
            self.warn_once(event["tag"], f"{event['tag']} was lost: {error!r}")

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until every destination has taken all events so far; False where `timeout` seconds did not suffice."""
        deadline = time.monotonic() + timeout
        arrived = self._late is None or self._late.drain(timeout)
        writer = self._journal.writer
        try:
            left = max(0.0, deadline - time.monotonic())
            return (writer is None or self.delivery.wait(writer.path, writer.seq, left)) and arrived
        except Exception as error:
            self.warn_once("flush", f"delivery could not be waited for: {error!r}")
            return False

    def close(self, status: str = "completed") -> None:
        """End the run: "completed", "failed" or "interrupted". Waits for delivery only while the receiver answers."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
        self._stop_background_tasks()
        try:
            self._scopes.end(self._scope, None, to_text(status))
            self._scopes.closed = True
            writer = self._journal.writer
            self.pipeline.close(to_text(status))
            self._tell_trouble()
            self.delivery.close(writer.path if writer else None, CLOSE_WAIT)
        except Exception as error:
            self.warn_once("close", f"the run was not closed well: {error!r}")

    def stats(self) -> dict[str, Any]:
        """The ledgers: what was journaled, what was lost or refused, and what each destination has taken."""
        writer, delivery = self._journal.writer, {}
        try:
            delivery = self.delivery.ledgers(writer.path) if writer else {}
        except Exception as error:
            self.warn_once("stats", f"the ledgers of delivery cannot be read: {error!r}")
        return {
            "journaled": writer.seq if writer else 0,
            "lost": writer.lost if writer else 0,
            "durable": self._journal.durable,
            "journal": str(writer.path) if writer else None,
            "warnings": dict(self._warnings),
            "delivery": delivery,
        }

    def warn_once(self, kind: str, message: str, level: int = logging.WARNING) -> None:
        """Count a trouble, and say it the first time."""
        self._warnings[kind] += 1
        if self._warnings[kind] == 1:
            log.log(level if self._warns else logging.DEBUG, "%s (told once; run.stats() counts)", message)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failed = error is not None and is_failure(error)
        if failed:
            self._stop_background_tasks()
            self._scopes.end(self._scope, error)
        self.close("failed" if failed else "completed")

    def after_fork(self, number: int) -> None:
        """In a forked child, the parent's `number`-th, whose first event begins a session of its own."""
        self._lock, self._keeping_up = threading.Lock(), threading.Lock()
        self._warns = False
        self.background_tasks, self.background_events = [], 0
        self._late = None
        self.identity = self.identity.for_worker(number)
        self._scopes.before_fork_child(self.identity)
        self._journal.after_fork()
        self.delivery = Delivery(self.delivery.targets)  # the parent's deliverer finds this session too

    def _stop_background_tasks(self) -> None:
        while self.background_tasks:
            task = self.background_tasks.pop()
            try:
                task.stop()
            except Exception as error:
                self.warn_once("companion", f"{type(task).__name__} did not stop well: {error!r}")

    def _upkeep(self) -> None:
        if not self._keeping_up.acquire(blocking=False):
            return  # another thread is at it, or this one, interrupted by a signal handler that logs
        try:
            self._tell_trouble()
            self.delivery.watch()
        finally:
            self._keeping_up.release()

    def _tell_trouble(self) -> None:
        writer = self._journal.writer
        if writer is None or writer.trouble is None:
            return
        trouble, writer.trouble = writer.trouble, None
        if isinstance(trouble, SessionGone):
            self.warn_once("journal_gone", f"{trouble}: its latest lines are counted as lost")
        else:
            self.warn_once(
                "journal", f"the journal at {writer.path} cannot be written: {trouble}; lines wait in memory"
            )

    def _record(self, tag: str, fields: Any, *, inside: bool = False) -> None:
        """Emit an event. `fields()` may run a user's code, so it runs where nothing it raises gets out."""
        try:
            parent = {"parent": self._scopes.parent()} if inside else {}
            self._emit({"ts": 0, "seq": 0, "tag": tag, **parent, **fields()})
        except Exception as error:
            self.warn_once(tag, f"{tag} was lost: {error!r}")

    def _whole(self, field: str, value: Any) -> int | None:
        if type(value) is int and 0 <= value < LARGEST:
            return value
        try:
            number = int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
            if 0 <= number < LARGEST:
                return number
            why = "below 0 or beyond 64 bits"
        except Exception as error:  # a user's __index__ may raise anything
            why = f"not a whole number: {to_text(error)}"
        self.warn_once("step", f"{field}={to_text(value):.80}: {why}; recorded without it")
        return None

    def _header(self) -> Event:
        """The header of a session that begins now, in this process."""
        me = self.identity
        if me.role and (util := sys.modules.get("multiprocessing.util")):
            util.Finalize(None, self.close, exitpriority=0)  # a worker of multiprocessing leaves past atexit
        header: Event = {
            "ts": 0,
            "seq": 0,
            "tag": "header",
            "schema": SCHEMA,
            "session": os.urandom(8).hex(),
            "run_key": me.run_key,
            "job_id": me.job_id,
            "rank": me.rank,
            "local_rank": me.local_rank,
            "world_size": me.world_size,
            "role": me.role,
            "attempt": list(me.attempt),
            "launcher": me.launcher,
            "started": self._journal.clock(),
            "pid": os.getpid(),
            "host": me.host,
            "boot_id": self._boot_id,
            "resource": {**self._resource, "service.instance.id": me.instance},
        }
        return self.pipeline.process(header) or header
