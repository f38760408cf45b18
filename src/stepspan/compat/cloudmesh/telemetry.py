"""`stepspan.Telemetry`: cloudmesh-ai's Telemetry, with the calls of its manual and those of its releases.

    from stepspan import Telemetry

    t = Telemetry()
    t.emit(metric="inference_latency", value=0.125, status="completed")
    t.emit(metrics={"tokens_per_sec": 45.2, "gpu_util": 88}, status="completed")
    t.emit(event="model_load_start", status="started")

`stepspan.compat.cloudmesh.records` says what a record holds, `.sqlite` how a database is asked. Nothing here raises into
the caller but the constructor, on wrong arguments. CLOUDMESH_AI_TELEMETRY_DISABLED (1, true, yes) and STEPSPAN_DISABLED
turn all of it off.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial, wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import orjson

from stepspan.compat.cloudmesh import context
from stepspan.compat.cloudmesh.records import Record, edge, measured, span_name, timestamp, unfolded
from stepspan.compat.cloudmesh.writing import Emitted, Writing
from stepspan.disabled import switched_off
from stepspan.errors import ConfigError
from stepspan.events import plain
from stepspan.identity import HostFacts, Identity, host_facts, resolve
from stepspan.processors.redact import Redact
from stepspan.scopes import is_failure

if TYPE_CHECKING:
    from typing_extensions import Self

    from stepspan.compat.cloudmesh.otel import OtelBackend

F = TypeVar("F", bound=Callable[..., Any])
log = logging.getLogger("stepspan")

DISABLED = "CLOUDMESH_AI_TELEMETRY_DISABLED"
MOST_OPEN = 1_000
NAMED = ("jsonl", "otel", "sqlite", "text")


class Backend(Protocol):
    """A place that records go to. One of your own is called on a thread where an event loop would have to wait."""

    def emit(self, record: dict[str, Any]) -> None:
        """Take a record; it is not to be changed."""
        ...


class Telemetry:
    """Emits metrics, events and statuses of a command, with the machine, the user, the job and the rank.

    `command_name`: who tells; the script's name by default. `backend`: "jsonl" (the default; `path` "telemetry.jsonl"),
    "sqlite" ("telemetry.db"), "otel" (a run of stepspan: the open one, or one of its own whose journal goes to the
    directory `path` and which is sent to `endpoint` or the OTEL_EXPORTER_OTLP_* variables'), "text" (standard output), or
    an object with `emit(record)`. `telemetry_file` is a JSONL file, `backends` a list of such names and objects; what is
    given adds up. `job_id`: the run that records belong to, by default the open run's or the launcher's. `clock` tells
    Unix ns.

    `emit` and its kin may be awaited. In an event loop files and databases are written by a thread, in order, so that
    the loop never waits; elsewhere a record is written when the call returns. The exception is "otel", whose journal
    takes a microsecond: it is written at once, only the first record may start a run, so start one before the loop.

    Raises `ConfigError` for wrong arguments and STEPSPAN_* variables.
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
        job_id: str | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        if command_name is not None and not isinstance(command_name, str):
            raise ConfigError("command_name", command_name, "give the name as a text")
        script = os.path.splitext(os.path.basename(sys.argv[0] if sys.argv else ""))[0]
        self.command_name = command_name or script or "python"
        if endpoint is not None and backend != "otel":
            raise ConfigError("endpoint", endpoint, 'only backend="otel" sends anything')
        if isinstance(backends, (str, bytes, Mapping)) or not isinstance(backends, (Iterable, type(None))):
            raise ConfigError("backends", backends, f"give a list of {', '.join(NAMED)} or objects with emit(record)")
        given = list(backends or ())
        if backend is not None or (backends is None and telemetry_file is None):
            given.insert(0, backend or "jsonl")
        elif path is not None:
            raise ConfigError("path", path, "whose path? say backend=")
        self._identity = resolve({"job_id": job_id}, os.environ, _facts(), earlier_sessions=lambda job, rank: 0)
        make = partial(_backend, endpoint=endpoint, job_id=job_id)
        self.backends = [make(one, path if i == 0 else None) for i, one in enumerate(given)]
        if telemetry_file is not None:
            self.backends.append(make("jsonl", telemetry_file))
        self._clock = clock
        self._redact = Redact()
        self._writing = Writing()
        self._lock = threading.Lock()
        self._open: dict[str, list[str]] = {}
        """What has started -> the spans of that name that have not ended."""
        self._count = 0
        self._troubles: Counter[str] = Counter()

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
        """Tell what was measured (`metric` and `value`, or several `metrics`), what happened (`event`), how it stands
        (`status`: "started", "completed", "failed" or your own), or any of them together.

        Values are numbers, or whatever has `__float__`; other ones are kept as they are and make no point. Of `event`, or
        of no metrics at all, what is "started" lasts until it is "completed" or "failed": `model_load_start` and
        `model_load_end` are the ends of `model_load`. `stdout`: print the record, too.
        """
        try:
            found = dict(metrics or {})
            if metric is not None or value is not None:
                if metric is None or value is None:
                    self._tell("metric", "a metric was lost: `metric` and `value` belong together")
                else:
                    found[metric] = value
            lasts = event is not None or not found
            return self._emit(status, found, message, attributes, event=event, stdout=stdout, lasts=lasts)
        except Exception as error:
            return self._lost(error)

    def start(self, message: str | None = None, *, event: str | None = None, **fields: Any) -> Emitted:
        """That the command, or `event`, has started. Numbers in `fields` are metrics, the rest is attributes."""
        return self._tell_status("started", None, message, event, fields)

    def complete(
        self,
        metrics: Mapping[str, Any] | None = None,
        message: str | None = "Command completed successfully",
        *,
        event: str | None = None,
        **fields: Any,
    ) -> Emitted:
        """That it has completed, with its last metrics."""
        return self._tell_status("completed", metrics, message, event, fields)

    def fail(
        self,
        error: str | BaseException,
        metrics: Mapping[str, Any] | None = None,
        *,
        event: str | None = None,
        **fields: Any,
    ) -> Emitted:
        """That it has failed: an error, which as an exception keeps its stack trace in "otel"."""
        return self._tell_status("failed", metrics, error, event, fields)

    def track(
        self,
        message: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        *,
        event: str | None = None,
        **attributes: Any,
    ) -> Tracked:
        """A `with` or `async with` block, or a decorator of a function or coroutine function: it starts, and then
        completes with metric `duration_sec`, or fails with the exception, which goes on.
        """
        return Tracked(self, message, metrics, event, attributes)

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until all is written and, in "otel", delivered; False where `timeout` seconds did not suffice."""
        done = self._writing.wait(timeout)
        flushes = [backend.flush for backend in self.backends if hasattr(backend, "flush")]
        return all([done, *(self._guard("flush", flush, timeout) is not False for flush in flushes)])

    def close(self) -> None:
        """Write what waits, and close files, databases and a run of our own."""
        self._writing.close()
        for backend in self.backends:
            if hasattr(backend, "close"):
                self._guard("close", backend.close)

    def stats(self) -> dict[str, Any]:
        """How many records were taken, and how often what went wrong; what is first told in the log "stepspan"."""
        return {"records": self._count, "troubles": dict(self._troubles)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tell_status(
        self,
        status: str,
        metrics: Mapping[str, Any] | None,
        message: Any,
        event: str | None,
        fields: Mapping[str, Any],
    ) -> Emitted:
        try:
            further = {key: value for key, value in fields.items() if measured(value) is not None}
            attributes = {key: value for key, value in fields.items() if key not in further}
            error = message if isinstance(message, BaseException) else None
            found = {**(metrics or {}), **further}
            return self._emit(status, found, message, attributes, event=event, lasts=True, error=error)
        except Exception as failure:
            return self._lost(failure)

    def _emit(
        self,
        status: str | None,
        metrics: Mapping[Any, Any],
        message: Any,
        attributes: Mapping[str, Any],
        *,
        event: str | None = None,
        stdout: bool = False,
        lasts: bool = False,
        span: str | None = None,
        error: BaseException | None = None,
    ) -> Emitted:
        """`lasts`: pair what starts with what ends; `span`: it is paired already, by `track`."""
        if is_off(os.environ):
            return Emitted()
        record: Record = {"timestamp": timestamp(self._clock()), "command": self.command_name}
        if status is not None:
            record["status"] = plain(status)
        if event is not None:
            record["event"] = plain(event)
        record["metrics"] = {str(key): _kept(value) for key, value in unfolded(metrics).items()}
        if attributes:
            record["attributes"] = plain(attributes)
        if message is not None:
            record["message"] = plain(message)
        found = span or (self._pair(record) if lasts else None)
        if found is not None:
            record["span"] = found
        identity = self._who()
        record["job_id"], record["rank"] = identity.job_id, identity.rank
        record["local_rank"], record["world_size"] = identity.local_rank, identity.world_size
        record = self._redact(record)
        self._count += 1
        written = [self._hand(backend, record, error, span is not None) for backend in self.backends]
        if stdout:
            self._guard("stdout", _print, _with_context(record))
        waits = [emitted for emitted in written if emitted is not None]
        return waits[-1] if waits else Emitted()  # one thread writes in order: the last is written last

    def _hand(self, backend: Backend, record: Record, error: BaseException | None, inside: bool) -> Emitted | None:
        """Give a record to a backend; None where it needs no waiting for."""
        name = type(backend).__name__
        if name == "OtelBackend":  # told by name, so that nobody has to import it
            emit = cast("OtelBackend", backend).emit
            self._guard(name, lambda: emit(_with_context(record), error=error, inside=inside))
            return None
        emitted = self._writing.do(lambda: self._guard(name, lambda: backend.emit(_with_context(record))))
        if emitted is None:
            self._tell(name, "too many records wait to be written: one was lost")
        return emitted

    def _pair(self, record: Record) -> str | None:
        """The span that a record begins or ends, if it does."""
        end, name = edge(record), span_name(record)
        with self._lock:
            if end == "begin" and sum(map(len, self._open.values())) < MOST_OPEN:
                span = os.urandom(8).hex()
                self._open.setdefault(name, []).append(span)
                return span
            if end == "end" and name in self._open:
                spans = self._open[name]
                span = spans.pop()
                if not spans:
                    del self._open[name]
                return span
        return None

    def _who(self) -> Identity:
        """The open run's identity, or the launcher's."""
        start = sys.modules.get("stepspan.start")  # where nobody imported it, no run is open
        run = start.current_run() if start else None
        return run.identity if run is not None and hasattr(run, "pipeline") else self._identity

    def _guard(self, kind: str, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:
            self._tell(kind, f"{kind}: {error!r}")
            return False

    def _lost(self, error: Exception) -> Emitted:
        self._tell("record", f"a record was lost: {error!r}")
        return Emitted()

    def _tell(self, kind: str, message: str) -> None:
        with self._lock:
            self._troubles[kind] += 1
            first = self._troubles[kind] == 1
        if first:
            level = logging.WARNING if self._identity.local_rank == 0 else logging.DEBUG
            log.log(level, "telemetry of %s: %s (told once; stats() counts)", self.command_name, message)


class Tracked:
    """What `Telemetry.track` returns. One may be entered again once it is left; as a decorator it is made anew."""

    def __init__(
        self,
        telemetry: Telemetry,
        message: str | None,
        metrics: Mapping[str, Any] | None,
        event: str | None,
        attributes: Mapping[str, Any],
    ) -> None:
        self._telemetry = telemetry
        self._given = message, metrics, event, attributes
        self._span = ""
        self._began = 0.0

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end(error)

    async def __aenter__(self) -> Self:
        await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._end(error)

    def __call__(self, function: F) -> F:
        if inspect.iscoroutinefunction(function):

            @wraps(function)
            async def awaiting(*args: Any, **kwargs: Any) -> Any:
                async with Tracked(self._telemetry, *self._given):
                    return await function(*args, **kwargs)

            return cast("F", awaiting)

        @wraps(function)
        def calling(*args: Any, **kwargs: Any) -> Any:
            with Tracked(self._telemetry, *self._given):
                return function(*args, **kwargs)

        return cast("F", calling)

    def _begin(self) -> Emitted:
        self._span, self._began = os.urandom(8).hex(), time.perf_counter()
        return self._emit("started", self._given[0])

    def _end(self, error: BaseException | None) -> Emitted:
        took = {"duration_sec": time.perf_counter() - self._began}
        if error is None or not is_failure(error):
            return self._emit("completed", "Command completed successfully", took)
        return self._emit("failed", error, took, error)

    def _emit(
        self, status: str, message: Any, took: Mapping[str, float] | None = None, error: BaseException | None = None
    ) -> Emitted:
        _, metrics, event, attributes = self._given
        telemetry = self._telemetry
        try:
            if error is not None:
                message = str(plain(error)) or type(error).__name__
            found = {**(metrics or {}), **(took or {})}
            return telemetry._emit(status, found, message, attributes, event=event, span=self._span, error=error)
        except Exception as failure:
            return telemetry._lost(failure)


def is_off(env: Mapping[str, str]) -> bool:
    """Whether the environment turns telemetry off."""
    return env.get(DISABLED, "").strip().lower() in {"1", "true", "yes"} or switched_off(env)


def _backend(given: str | Backend, path: Any, *, endpoint: str | None, job_id: str | None) -> Backend:
    if given == "jsonl":
        from stepspan.compat.cloudmesh.files import JsonlBackend

        return JsonlBackend(path)
    if given == "sqlite":
        from stepspan.compat.cloudmesh.sqlite import SqliteBackend

        return SqliteBackend(path)
    if given == "text":
        from stepspan.compat.cloudmesh.files import TextBackend

        return TextBackend(path)
    if given == "otel":
        from stepspan.compat.cloudmesh.otel import OtelBackend

        return OtelBackend(path, endpoint=endpoint, job_id=job_id)
    if isinstance(given, (str, type)) or not callable(getattr(given, "emit", None)):
        raise ConfigError("backend", given, f"known are {', '.join(NAMED)}; or give an object with emit(record)")
    if path is not None:
        raise ConfigError("path", path, f"{type(given).__name__} has its own place: leave the path out")
    return given


def _with_context(record: Record) -> Record:
    """With the machine and the user: where it is written, because the first look at the GPUs may take seconds."""
    return {**record, "system": dict(context.system()), "user": dict(context.user())}


def _kept(value: Any) -> Any:
    number = measured(value)
    return plain(value) if number is None else number


def _print(record: Record) -> None:
    sys.stdout.write(orjson.dumps(plain(record)).decode() + "\n")


@lru_cache(maxsize=1)
def _facts() -> HostFacts:
    """Of this process: where no launcher names the job, all its Telemetries have one made-up name in common."""
    return host_facts()
