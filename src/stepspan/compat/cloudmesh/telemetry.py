"""`stepspan.Telemetry`: cloudmesh-ai's Telemetry, with the calls of its manual and those of its releases.

    from stepspan import Telemetry

    t = Telemetry()
    t.emit(metric="inference_latency", value=0.125, status="completed")
    t.emit(metrics={"tokens_per_sec": 45.2, "gpu_util": 88}, status="completed")
    t.emit(event="model_load_start", status="started")

`stepspan.compat.cloudmesh.records` says what a record holds, `.sqlite` how a database is asked. Nothing here raises
into the caller but the constructor, on wrong arguments. CLOUDMESH_AI_TELEMETRY_DISABLED (1, true, yes) and
STEPSPAN_DISABLED turn all of it off.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from stepspan.compat.cloudmesh import context
from stepspan.compat.cloudmesh.files import JsonlBackend, TextBackend
from stepspan.compat.cloudmesh.records import Record, edge, measured, span_name, timestamp, unfolded
from stepspan.compat.cloudmesh.track import Tracked
from stepspan.compat.cloudmesh.writing import Emitted, Writing
from stepspan.disabled import DISABLED, switched_off
from stepspan.errors import ConfigError
from stepspan.identity import HostFacts, Identity, host_facts, resolve
from stepspan.processors.redact import Redact
from stepspan.values import json_value

if TYPE_CHECKING:
    from typing_extensions import Self

    from stepspan.compat.cloudmesh.otel import OtelBackend

log = logging.getLogger("stepspan")

VARIABLE = "CLOUDMESH_AI_TELEMETRY_DISABLED"
MOST_OPEN = 1_000
NAMED = ("jsonl", "otel", "sqlite", "text")


class Backend(Protocol):
    """A place that records go to. One of your own is called on a thread where an event loop would have to wait."""

    def emit(self, record: dict[str, Any]) -> None:
        """Take a record; it is not to be changed."""
        ...


FILES: Mapping[str, Callable[[Any], Backend]] = {"jsonl": JsonlBackend, "text": TextBackend}


class Telemetry:
    """Emits metrics, events and statuses of a command, with the machine, the user, the job and the rank.

    `command_name`: who tells; the script's name by default. `backend`: "jsonl" (the default; `path` "telemetry.jsonl"),
    "sqlite" ("telemetry.db"), "otel" (a run of stepspan: the open one, or one of its own whose journal goes to the
    directory `path` and which is sent to `endpoint` or to the OTEL_EXPORTER_OTLP_* variables'), "text" (standard
    output), or an object with `emit(record)`. `telemetry_file` is a JSONL file, `backends` a list of such names and
    objects; what is given adds up. `job_id`: the run that records belong to, by default the open one or the launcher's.
    `clock` tells Unix ns.

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
            given.insert(0, "jsonl" if backend is None else backend)
        elif path is not None:
            raise ConfigError("path", path, "whose path? say backend=")
        self._identity = resolve({"job_id": job_id}, os.environ, _facts(), earlier_sessions=lambda job, rank: 0)
        self.backends: list[Backend] = []
        self._runs: list[OtelBackend] = []
        for i, one in enumerate(given):
            place = path if i == 0 else None
            if isinstance(one, str) and one == "otel":
                from stepspan.compat.cloudmesh.otel import OtelBackend

                self._runs.append(OtelBackend(place, endpoint=endpoint, job_id=job_id))
            else:
                self.backends.append(_backend(one, place))
        if telemetry_file is not None:
            self.backends.append(_backend("jsonl", telemetry_file))
        self._clock = clock
        self._redact = Redact()
        self._pid, self._lock, self._writing = os.getpid(), threading.RLock(), Writing()
        self._open: dict[str, list[str]] = {}
        """What has started -> the spans of that name that have not ended."""
        self._count = 0
        self._warnings: Counter[str] = Counter()

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

        Values are numbers, or whatever has `__float__`; other ones are kept and make no point. An `event`, or a record
        without metrics, that is "started" lasts until it is "completed" or "failed": `model_load_start` and
        `model_load_end` are the ends of `model_load`. `stdout`: print the record, too.
        """
        try:
            found = dict(metrics or {})
            if metric is not None or value is not None:
                if metric is None or value is None:
                    self._warn("metric", "a metric was lost: `metric` and `value` belong together")
                else:
                    found[metric] = value
            lasts = event is not None or not found
            return self.record(status, found, message, attributes, event=event, stdout=stdout, lasts=lasts)
        except Exception as error:
            return self.lost(error)

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
        return all([done, *(self._guard("otel", run.flush, timeout) for run in self._runs)])

    def close(self) -> None:
        """Write what waits, and close databases and a run of our own. In an event loop, call it in a thread."""
        self._writing.close()
        for backend in (*self.backends, *self._runs):
            close = getattr(backend, "close", None)
            if callable(close):
                self._guard("close", close)

    def stats(self) -> dict[str, Any]:
        """How many records were taken, and how often what went wrong; what is first told in the log "stepspan"."""
        return {"records": self._count, "warnings": dict(self._warnings)}

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
            return self.record(status, found, message, attributes, event=event, lasts=True, error=error)
        except Exception as failure:
            return self.lost(failure)

    def record(
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
        """Make a record, and give it to the backends. `lasts`: pair what starts with what ends; `span`: `track` has
        done so. What it is given may raise.
        """
        if is_off(os.environ):
            return Emitted()
        if self._pid != os.getpid():
            self._after_fork()
        told: Record = {} if status is None else {"status": json_value(status)}
        if event is not None:
            told["event"] = json_value(event)
        told["metrics"] = {str(key): _kept(value) for key, value in unfolded(metrics).items()}
        if attributes:
            told["attributes"] = json_value(attributes)
        if message is not None:
            told["message"] = json_value(message)
        record = {"timestamp": timestamp(self._clock()), "command": self.command_name, **self._redact(told)}
        paired = self._pair(record) if lasts else span
        if paired is not None:
            record["span"] = paired
        for run in self._runs:
            self._guard("otel", run.emit, _with_context(record), error=error, inside=span is not None)
        who = self._who()
        record.update(job_id=who.job_id, rank=who.rank, local_rank=who.local_rank, world_size=who.world_size)
        self._count += 1
        if stdout:
            self._guard("stdout", _print, _with_context(record))
        emitted = Emitted()
        for backend in self.backends:  # one thread writes in order: what is last is written last
            emitted = self._hand(backend, record) or emitted
        return emitted

    def lost(self, error: Exception) -> Emitted:
        """Count a record that could not be made."""
        self._warn("record", f"a record was lost: {error!r}")
        return Emitted()

    def _hand(self, backend: Backend, record: Record) -> Emitted | None:
        name = type(backend).__name__
        emitted = self._writing.do(lambda: self._guard(name, lambda: backend.emit(_with_context(record))))
        if emitted is None:
            self._warn(name, "too many records wait to be written: one was lost")
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
        run = start.current_run() if start else DISABLED
        return self._identity if run is DISABLED else run.identity

    def _guard(self, kind: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            self._warn(kind, f"{kind}: {error!r}")
            return False

    def _after_fork(self) -> None:
        """In a forked child: what waits is the parent's to write."""
        self._pid, self._lock, self._writing = os.getpid(), threading.RLock(), Writing()

    def _warn(self, kind: str, message: str) -> None:
        with self._lock:
            self._warnings[kind] += 1
            first = self._warnings[kind] == 1
        if first:
            level = logging.WARNING if self._identity.local_rank == 0 else logging.DEBUG
            log.log(level, "telemetry of %s: %s (told once; stats() counts)", self.command_name, message)


def is_off(env: Mapping[str, str]) -> bool:
    """Whether the environment turns telemetry off."""
    return env.get(VARIABLE, "").strip().lower() in {"1", "true", "yes"} or switched_off(env)


def _backend(given: str | Backend, path: Any) -> Backend:
    """The backend of that name, or one that is somebody's own."""
    if isinstance(given, str) and given == "sqlite":
        from stepspan.compat.cloudmesh.sqlite import SqliteBackend

        return SqliteBackend(path)
    if isinstance(given, str) and given in FILES:
        return FILES[given](path)
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
    return json_value(value) if number is None else number


def _print(record: Record) -> None:
    sys.stdout.write(orjson.dumps(json_value(record)).decode() + "\n")


@lru_cache(maxsize=1)
def _facts() -> HostFacts:
    """Of this process: where no launcher names the job, all its Telemetries have one made-up name in common."""
    return host_facts()
