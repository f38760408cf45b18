"""`stepspan.Telemetry`: cloudmesh-ai's Telemetry, with the calls of its manual and those of its releases.

    from stepspan import Telemetry

    t = Telemetry()
    t.emit(metric="inference_latency", value=0.125, status="completed")
    t.emit(metrics={"tokens_per_sec": 45.2, "gpu_util": 88}, status="completed")
    t.emit(event="model_load_start", status="started")

`stepspan.compat.cloudmesh.records` says what a record holds, `.sqlite` how to query a database. Nothing here raises but
the constructor, on wrong arguments. CLOUDMESH_AI_TELEMETRY_DISABLED (1, true, yes) and STEPSPAN_DISABLED turn all of it
off.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from stepspan.compat.cloudmesh import context
from stepspan.compat.cloudmesh.files import JsonlBackend, TextBackend
from stepspan.compat.cloudmesh.records import Record, edge, measured, span_name, timestamp, unfolded
from stepspan.compat.cloudmesh.track import Tracked
from stepspan.compat.cloudmesh.writing import Emitted, Writing
from stepspan.conversion import json_value
from stepspan.copying import SharedByCopies
from stepspan.environment import switched_off, unquoted
from stepspan.errors import ConfigError, short_repr
from stepspan.identity import Identity, host_facts, resolve
from stepspan.processors.redact import Redact
from stepspan.recording.warnings import WarningSink
from stepspan.values import to_text

if TYPE_CHECKING:
    from typing_extensions import Self

    from stepspan.compat.cloudmesh.otel import OtelBackend

VARIABLE = "CLOUDMESH_AI_TELEMETRY_DISABLED"
MAX_OPEN_SPANS = 1_000
BACKENDS = ("jsonl", "otel", "sqlite", "text")


class Backend(Protocol):
    """Where records go. One of your own is called on a thread where an event loop would have to wait."""

    def emit(self, record: dict[str, Any]) -> None:
        """Take a record, which must not be changed. What this raises is counted, and logged once."""


FILE_BACKENDS: Mapping[str, Callable[[Any], Backend]] = {"jsonl": JsonlBackend, "text": TextBackend}


class Telemetry(SharedByCopies):
    """Emits metrics, events and statuses of a command, with the machine, the user, the job and the rank.

    The calls are those of cloudmesh-ai's Telemetry, as its manual prints them and as its releases take them. Unlike
    there, only the constructor raises, calls may be awaited, names, texts and stack traces are redacted, and any number
    of threads and processes may share a file.

    `emit` and the other calls may be awaited. In an event loop, files and databases are written by a thread, in order,
    so that the loop never waits; elsewhere a record is written when the call returns. The exception is "otel", whose
    journal takes a microsecond: it is written at once. Only its first record may start a run, so start one before the
    loop.

    With "otel", numbers become gauges `training.<metric>`, an event or status a log record, and what is "started" and
    then "completed" or "failed" a span.

    Args:
        command_name: What the records are about; the script's name by default.
        telemetry_file: A JSONL file to append to, in addition to the backends.
        backends: Names of backends, and objects with `emit(record)`.
        backend: "jsonl" (the default), "sqlite", "otel", "text" (for people, on standard output), or an object with
            `emit(record)`; in addition to `backends`.
        path: The file of `backend`: by default "telemetry.jsonl" for "jsonl", "telemetry.db" for "sqlite". With "otel",
            the directory of the journal of a run that it starts itself.
        endpoint: With "otel", the OTLP endpoint of a run that it starts itself; by default the OTEL_EXPORTER_OTLP_*
            variables'. If a run is open already, records go to that one, and `path` and `endpoint` are not used.
        job_id: The run that records belong to; by default the open one's, or the launcher's.
        clock: Gives the Unix time in nanoseconds.

    Raises:
        ConfigError: An argument or a STEPSPAN_* variable is wrong.

    """

    def __init__(
        self,
        command_name: str | None = None,
        telemetry_file: str | os.PathLike[str] | None = None,
        backends: Iterable[str | Backend] | None = None,
        *,
        backend: str | Backend | None = None,
        path: str | os.PathLike[str] | None = None,
        endpoint: str | None = None,
        job_id: str | int | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        if command_name is not None and not isinstance(command_name, str):
            raise ConfigError("command_name", command_name, "give the name as a text")
        script = os.path.splitext(os.path.basename(sys.argv[0] if sys.argv else ""))[0]
        self.command_name = command_name or script or "python"
        if endpoint is not None and backend != "otel":
            raise ConfigError("endpoint", endpoint, 'only backend="otel" sends anything')
        if isinstance(backends, (str, bytes, Mapping)) or not isinstance(backends, (Iterable, type(None))):
            known = ", ".join(BACKENDS)
            raise ConfigError("backends", backends, f"give a list of {known} or objects with emit(record)")
        given = list(backends or ())
        if backend is not None or (backends is None and telemetry_file is None):
            given.insert(0, "jsonl" if backend is None else backend)
        elif path is not None:
            raise ConfigError("path", path, "this is the path of `backend`, which is not given")
        self._identity = resolve({"job_id": job_id}, os.environ, _facts(), earlier_sessions=lambda job, rank: 0)
        self.backends: list[Backend] = []
        self._runs: list[OtelBackend] = []
        for index, each in enumerate(given):
            of_backend = path if index == 0 else None
            if isinstance(each, str) and each == "otel":
                from stepspan.compat.cloudmesh.otel import OtelBackend

                self._runs.append(OtelBackend(of_backend, endpoint=endpoint, job_id=job_id))
            else:
                self.backends.append(_backend(each, of_backend))
        if telemetry_file is not None:
            self.backends.append(JsonlBackend(telemetry_file))
        self._clock = clock
        self._redact = Redact()
        self._pid, self._lock, self._writing = os.getpid(), threading.RLock(), Writing()
        self._open: dict[str, str] = {}
        """Each span that has started and not ended -> its name; the last that started is the last."""
        self._count = 0
        self._warnings = WarningSink(audible=self._identity.local_rank == 0, counted_in="stats()")

    def emit(
        self,
        status: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        message: str | None = None,
        stdout: bool = False,
        *,
        metric: str | None = None,
        value: Any = None,
        event: str | None = None,
        **attributes: Any,
    ) -> Emitted:
        """Emit what was measured, what happened, what state it is in, or any of them together.

        An `event`, or a record without metrics, that is "started" lasts until "completed", "failed" or "interrupted":
        `model_load_start` and `model_load_end` are the ends of the span `model_load`.

        Args:
            status: "started", "completed", "failed", or your own. "failed" is a log record of severity ERROR.
            metrics: Names and values. Values are numbers, or whatever has `__float__`: points of the gauges
                `training.<name>`. Other values are kept as attributes.
            message: A text for people; the body of the log record.
            stdout: Whether to print the record, too, as JSON.
            metric: The name of one more metric, with `value`.
            value: The value of `metric`.
            event: What happened; the name of the log record.
            attributes: Attributes of the event.

        Returns:
            An object that may be awaited until the record is written.

        """
        single: list[tuple[str, Any]] = []
        if metric is not None and value is not None:
            single.append((metric, value))
        elif metric is not None or value is not None:
            self._warn("metric", "a metric was lost: `metric` and `value` belong together")
        return self._record(status, (metrics, single), message, attributes, event=event, stdout=stdout)

    def start(self, message: str | None = None, *, event: str | None = None, **fields: Any) -> Emitted:
        """Emit that the command has started: the begin of a span.

        Args:
            message: A text for people.
            event: What has started, where it is not the command.
            fields: Numbers are metrics, everything else is an attribute.

        Returns:
            An object that may be awaited until the record is written.

        """
        return self._record("started", (), message, {}, event=event, paired=fields)

    def complete(
        self,
        metrics: Mapping[str, Any] | None = None,
        message: str | None = "Command completed successfully",
        *,
        event: str | None = None,
        **fields: Any,
    ) -> Emitted:
        """Emit that the command has completed: the end of the span that `start` began.

        Args:
            metrics: The last metrics.
            message: A text for people.
            event: What has completed, where it is not the command.
            fields: Numbers are metrics, everything else is an attribute.

        Returns:
            An object that may be awaited until the record is written.

        """
        return self._record("completed", (metrics,), message, {}, event=event, paired=fields)

    def fail(
        self,
        error: str | BaseException,
        metrics: Mapping[str, Any] | None = None,
        *,
        event: str | None = None,
        **fields: Any,
    ) -> Emitted:
        """Emit that the command has failed: the end, with status ERROR, of the span that `start` began.

        Args:
            error: What went wrong. With "otel", an exception keeps its stack trace.
            metrics: The last metrics.
            event: What has failed, where it is not the command.
            fields: Numbers are metrics, everything else is an attribute.

        Returns:
            An object that may be awaited until the record is written.

        """
        return self._record("failed", (metrics,), error, {}, event=event, paired=fields)

    def track(
        self,
        message: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        *,
        event: str | None = None,
        **attributes: Any,
    ) -> Tracked:
        """Track a `with` or `async with` block, or, as a decorator, each call of a function or coroutine function.

        It emits "started", and then "completed", or "failed" with the exception, which goes on. Both ends have the
        metric `duration_sec` (s). With "otel" it is a span that holds what happens inside it.

        Args:
            message: A text for people, of the start.
            metrics: Metrics of all its records.
            event: What is tracked, where it is not the command.
            attributes: Attributes of its records.

        Returns:
            A context manager that is a decorator, too.

        """

        def emit(status: str, text: Any, own: Mapping[str, Any], span: str, error: BaseException | None) -> Emitted:
            return self._record(status, (metrics, own), text, attributes, event=event, span=span, error=error)

        return Tracked(emit, message)

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until all records are written and, with "otel", delivered.

        Args:
            timeout: Seconds.

        Returns:
            False where that took longer than `timeout`.

        """
        done = self._writing.wait(timeout)
        return all([done, *(self._guard("otel", run.flush, timeout) for run in self._runs)])

    def close(self) -> None:
        """Write what waits, close databases, and close the run that it started itself, which waits for delivery.

        It blocks: in an event loop, call it in a thread (`await asyncio.to_thread(t.close)`).
        """
        self._writing.close()
        for backend in (*self.backends, *self._runs):
            close = getattr(backend, "close", None)
            if callable(close):
                self._guard("close", close)

    def stats(self) -> dict[str, Any]:
        """Counts since the constructor.

        Returns:
            `records`: how many were emitted; `warnings`: what went wrong -> how often. The first warning of each kind
            is logged to "stepspan".

        """
        return {"records": self._count, "warnings": dict(self._warnings.counts)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(
        self,
        status: str | None,
        metrics: Iterable[Any],
        message: Any,
        attributes: Mapping[str, Any],
        *,
        event: str | None = None,
        stdout: bool = False,
        paired: Mapping[str, Any] | None = None,
        span: str | None = None,
        error: BaseException | None = None,
    ) -> Emitted:
        """Make a record, and give it to the backends. Never raises.

        Args:
            status: As of `emit`.
            metrics: Mappings, lists of pairs, or None: the metrics together.
            message: As of `emit`.
            attributes: As of `emit`.
            event: As of `emit`.
            stdout: As of `emit`.
            paired: Given for the start or the end of a span: numbers among these are metrics, the rest is attributes,
                and a message may be the exception that ended it.
            span: The span of `track`, which pairs start and end itself.
            error: The exception that ended the span of `track`.

        Returns:
            What may be awaited.

        """
        if is_off(os.environ):
            return Emitted()
        if self._pid != os.getpid():
            self._after_fork()
        try:
            fields: Record = {} if status is None else {"status": json_value(status)}
            if event is not None:
                fields["event"] = json_value(event)
            values: dict[Any, Any] = {}
            for each in metrics:
                values.update(each or {})
            if paired is not None:
                measurements = {key: value for key, value in paired.items() if measured(value) is not None}
                values.update(measurements)
                attributes = {key: value for key, value in paired.items() if key not in measurements}
                error = message if isinstance(message, BaseException) else None
            fields["metrics"] = {str(key): _metric_value(value) for key, value in unfolded(values).items()}
            if attributes:
                fields["attributes"] = json_value(attributes)
            if error is not None:
                fields["message"] = to_text(error) or type(error).__name__
            elif message is not None:
                fields["message"] = json_value(message)
            record = {"timestamp": timestamp(self._clock()), "command": self.command_name, **self._redact(fields)}
            if span is not None:
                record["span"] = span
            elif paired is not None or event is not None or not values:
                record.update(self._pair(record))
            return self._hand_over(record, error, inside=span is not None, stdout=stdout)
        except Exception as failure:  # what it is given may raise anything
            self._warn("record", f"a record was lost: {short_repr(failure)}", type(failure).__name__)
            return Emitted()

    def _hand_over(self, record: Record, error: BaseException | None, *, inside: bool, stdout: bool) -> Emitted:
        """Give a record to each backend; none of them keeps it from the others."""
        for run in self._runs:
            self._guard("otel", run.emit, _with_context(record), error=error, inside=inside)
        who = self._who()
        record.update(job_id=who.job_id, rank=who.rank, local_rank=who.local_rank, world_size=who.world_size)
        self._count += 1
        if stdout:
            self._guard("stdout", _print, _with_context(record))
        emitted = Emitted()
        for backend in self.backends:  # one thread writes in order: what is last is written last
            emitted = self._write(backend, record) or emitted
        return emitted

    def _write(self, backend: Backend, record: Record) -> Emitted | None:
        name = type(backend).__name__
        emitted = self._writing.do(lambda: self._guard(name, lambda: backend.emit(_with_context(record))))
        if emitted is None:
            self._warn(name, "too many records wait to be written: one was lost")
        return emitted

    def _pair(self, record: Record) -> dict[str, str]:
        """The field `span` of a record that begins or ends one, if it does."""
        end, name = edge(record), span_name(record)
        with self._lock:
            if end == "begin" and len(self._open) < MAX_OPEN_SPANS:
                span = os.urandom(8).hex()
                self._open[span] = name
                return {"span": span}
            for span in reversed(self._open) if end == "end" else ():
                if self._open[span] == name:
                    del self._open[span]
                    return {"span": span}
        return {}

    def _who(self) -> Identity:
        """The job and rank that a record belongs to: the open run's, or else the launcher's."""
        module = sys.modules.get("stepspan.run")  # where it was never imported, no run is open
        run = module.current_run() if module else None
        return run.identity if run is not None and run._recorder.active else self._identity

    def _guard(self, kind: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            self._warn(kind, f"{kind}: {short_repr(error)}", type(error).__name__)
            return False

    def _after_fork(self) -> None:
        """In a forked child: what waits is the parent's to write."""
        self._pid, self._lock, self._writing = os.getpid(), threading.RLock(), Writing()

    def _warn(self, kind: str, message: str, key: str = "") -> None:
        with self._lock:
            self._warnings.warn_once(kind, f"telemetry of {self.command_name}: {message}", key=key)


def is_off(env: Mapping[str, str]) -> bool:
    """Whether an environment variable turns telemetry off."""
    return unquoted(env.get(VARIABLE, "")).lower() in {"1", "true", "yes"} or switched_off(env)


def _backend(given: str | Backend, path: Any) -> Backend:
    """The backend of that name, or the object that is one. Raises ConfigError."""
    if isinstance(given, str) and given == "sqlite":
        from stepspan.compat.cloudmesh.sqlite import SqliteBackend

        return SqliteBackend(path)
    if isinstance(given, str) and given in FILE_BACKENDS:
        return FILE_BACKENDS[given](path)
    if isinstance(given, (str, type)) or not callable(getattr(given, "emit", None)):
        raise ConfigError("backend", given, f"known are {', '.join(BACKENDS)}; or give an object with emit(record)")
    if path is not None:
        raise ConfigError("path", path, f"{type(given).__name__} has no path: leave it out")
    return given


def _with_context(record: Record) -> Record:
    """A record with the machine and the user. Called where it is written: the first look at GPUs may take seconds."""
    return {**record, "system": dict(context.system()), "user": dict(context.user())}


def _metric_value(value: Any) -> Any:
    number = measured(value)
    return json_value(value) if number is None else number


def _print(record: Record) -> None:
    sys.stdout.write(orjson.dumps(json_value(record)).decode() + "\n")


_facts = lru_cache(maxsize=1)(host_facts)
"""Of this process, read once: where no launcher names the job, all its Telemetries share one generated id."""
