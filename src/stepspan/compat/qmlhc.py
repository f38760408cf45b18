"""qmlhc callbacks: the hooks, the loggers with qmlhc's own rows, the bridge to a run, and the reader of the rows.

A row of `telemetry.jsonl` is `{"ts": Unix seconds, "tag": …}` and then, by tag: step_begin `step`; step_end `step,
context`; epoch_begin `epoch`; epoch_end `epoch, context`; error `type, message`.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepspan.compat.importing import Imported, Line, Mark
from stepspan.compat.jsonl import dumps, first_row, harmless, nanoseconds, number, rows, scalar, whole
from stepspan.compat.lines import Lines
from stepspan.events import Event

if TYPE_CHECKING:
    from stepspan.recording.scopes import Scope
    from stepspan.run import Run

FLUSH_SECONDS = 5.0
MICROSECOND = 1_000


class Callback:
    """Five hooks that do nothing. `context` is whatever the training loop has to say."""

    def on_step_begin(self, step: int, context: Mapping[str, Any]) -> None:
        """Before a step."""

    def on_step_end(self, step: int, context: Mapping[str, Any]) -> None:
        """After it."""

    def on_epoch_begin(self, epoch: int, context: Mapping[str, Any]) -> None:
        """Before an epoch."""

    def on_epoch_end(self, epoch: int, context: Mapping[str, Any]) -> None:
        """After it."""

    def on_error(self, error: Exception, context: Mapping[str, Any]) -> None:
        """When the loop has caught an exception."""


class CallbackList(Callback):
    """Passes each hook on to its callbacks, in order. What one raises gets out, and the later ones are not called."""

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self.callbacks = list(callbacks)

    def append(self, callback: Callback) -> None:
        """Add one at the end."""
        self.callbacks.append(callback)

    def __iter__(self) -> Iterator[Callback]:
        return iter(self.callbacks)

    def __len__(self) -> int:
        return len(self.callbacks)

    def on_step_begin(self, step: int, context: Mapping[str, Any]) -> None:
        """To each."""
        for callback in self.callbacks:
            callback.on_step_begin(step, context)

    def on_step_end(self, step: int, context: Mapping[str, Any]) -> None:
        """To each."""
        for callback in self.callbacks:
            callback.on_step_end(step, context)

    def on_epoch_begin(self, epoch: int, context: Mapping[str, Any]) -> None:
        """To each."""
        for callback in self.callbacks:
            callback.on_epoch_begin(epoch, context)

    def on_epoch_end(self, epoch: int, context: Mapping[str, Any]) -> None:
        """To each."""
        for callback in self.callbacks:
            callback.on_epoch_end(epoch, context)

    def on_error(self, error: Exception, context: Mapping[str, Any]) -> None:
        """To each."""
        for callback in self.callbacks:
            callback.on_error(error, context)


class _Rows(Callback):
    """Makes a row of each hook. Nothing here raises."""

    def _row(self, tag: str, fields: dict[str, Any]) -> None:
        raise NotImplementedError

    def on_step_begin(self, step: int, context: Mapping[str, Any]) -> None:
        """A row `step`."""
        self._row("step_begin", {"step": _whole(step)})

    def on_step_end(self, step: int, context: Mapping[str, Any]) -> None:
        """A row `step, context`."""
        self._row("step_end", {"step": _whole(step), "context": _shallow(context)})

    def on_epoch_begin(self, epoch: int, context: Mapping[str, Any]) -> None:
        """A row `epoch`."""
        self._row("epoch_begin", {"epoch": _whole(epoch)})

    def on_epoch_end(self, epoch: int, context: Mapping[str, Any]) -> None:
        """A row `epoch, context`."""
        self._row("epoch_end", {"epoch": _whole(epoch), "context": _shallow(context)})

    def on_error(self, error: Exception, context: Mapping[str, Any]) -> None:
        """A row `type, message`."""
        self._row("error", {"type": type(error).__name__, "message": harmless(error)})


class TelemetryLogger(_Rows):
    """Appends a row to the file at `path` for each hook, after each `flush_interval` rows or 5 s.

    Rows are never lost at the interpreter's exit, nor written twice, whatever the file system does. What JSON can't
    take is written as text. A file that cannot be written is logged once.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "telemetry.jsonl",
        flush_interval: int = 1,
        *,
        clock: Callable[[], float] = time.time,
        write: Callable[[int, bytes], int] = os.write,
    ) -> None:
        self._path = Path(path)
        self._interval = max(1, int(flush_interval))
        self._lines = Lines(path, write=write)
        self._clock = clock
        self._since = 0
        self._flushed = clock()
        weakref.finalize(self, self._lines.flush)

    def flush(self) -> None:
        """Write the rows that wait."""
        self._lines.flush()
        self._since = 0
        self._flushed = self._clock()

    _flush = flush  # qmlhc's own name

    def _row(self, tag: str, fields: dict[str, Any]) -> None:
        now = self._clock()
        self._lines.add(f"{dumps({'ts': now, 'tag': tag, **fields})}\n".encode())
        self._since += 1
        if self._since >= self._interval or now - self._flushed > FLUSH_SECONDS:
            self.flush()


class MemoryLogger(_Rows):
    """Keeps the rows, without `ts`, in `records`."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def _row(self, tag: str, fields: dict[str, Any]) -> None:
        self.records.append({"tag": tag, **fields})


class RunCallback(Callback):
    """Turns the hooks into a run's own: steps and epochs into spans, exceptions into exceptions.

    The numbers of an end's `context` become metrics of that step or epoch; all else in it is passed over. The run stays
    open; who started it closes it. Nothing here raises.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._epoch: Scope | None = None
        self._step: Scope | None = None

    def on_step_begin(self, step: int, context: Mapping[str, Any]) -> None:
        """Begin a step's span; one that was never ended ends here."""
        self._end_step()
        self._step = self.run.step(step)
        self._step.__enter__()

    def on_step_end(self, step: int, context: Mapping[str, Any]) -> None:
        """Metrics, and the end of the span."""
        self.run.log_metrics(_numbers(context), step)
        self._end_step()

    def on_epoch_begin(self, epoch: int, context: Mapping[str, Any]) -> None:
        """Begin an epoch's span; one that was never ended ends here."""
        self._end_epoch()
        self._epoch = self.run.epoch(epoch)
        self._epoch.__enter__()

    def on_epoch_end(self, epoch: int, context: Mapping[str, Any]) -> None:
        """Metrics, and the end of the span."""
        self._end_step()
        self.run.log_metrics(_numbers(context))
        self._end_epoch()

    def on_error(self, error: Exception, context: Mapping[str, Any]) -> None:
        """The exception, with its stack trace, on the innermost open span."""
        simple = {k: v for k, v in _shallow(context).items() if isinstance(v, (str, int, float))}
        self.run.log_error(error, **{k: v for k, v in simple.items() if isinstance(k, str) and k not in _TAKEN})

    def _end_step(self) -> None:
        scope, self._step = self._step, None
        if scope is not None:
            scope.__exit__(None, None, None)

    def _end_epoch(self) -> None:
        self._end_step()
        scope, self._epoch = self._epoch, None
        if scope is not None:
            scope.__exit__(None, None, None)


_TAKEN = frozenset({"self", "error"})  # names of `log_error`'s own arguments


def _whole(value: Any) -> Any:
    try:
        return int(value)
    except Exception:  # a user's `__int__` may raise anything
        return harmless(value)


def _shallow(context: Any) -> dict[Any, Any]:
    try:
        return dict(context) if context is not None else {}
    except Exception:  # no mapping, or a user's own one
        return {"context": harmless(context)}


def _numbers(context: Any) -> dict[Any, float]:
    found = {key: scalar(value) for key, value in _shallow(context).items()}
    return {key: value for key, value in found.items() if value is not None}


# ------------------------------------------------------------------------------------------------------- the reader

NUMBERED = {"step_begin": "step", "step_end": "step", "epoch_begin": "epoch", "epoch_end": "epoch"}
TAGS = frozenset({*NUMBERED, "error"})


def detect(path: Path) -> str | None:
    """What a path is taken for, in words; None where it is no telemetry of qmlhc's. Never raises."""
    row = first_row(path)
    if nanoseconds(row.get("ts")) is None or "crc" in row or "seq" in row:
        return None
    tag = row.get("tag")
    if not isinstance(tag, str) or tag not in TAGS:
        return None
    expected = {"ts", "tag", *(("type", "message") if tag == "error" else (NUMBERED[tag],))}
    if tag.endswith("_end"):
        expected.add("context")
    return f"qmlhc telemetry that begins with {tag}" if row.keys() == expected else None


def read(path: Path, *, job_id: str | None = None) -> Iterator[Imported]:
    """The one session of a telemetry file. Its job id is, unless given, the file's name and a hash of its whole path.

    Rows that go back in time are moved up to the row before them. A step or epoch without an end row ends, interrupted,
    with the last row before what begins next. A file that ends with an error is a run that failed; one that ends inside
    a step or epoch, one that was interrupted. Raises ValueError naming file and line for a row that is none of qmlhc's;
    OSError.
    """
    first = last = 0
    story = _Story()
    for ts, _, row in _timed(path):
        first, last = first or ts, ts
        story.take(row)
    if not first:
        raise ValueError(f"{path}: no rows")
    place = str(path.resolve())
    job = job_id or f"{path.stem}-{blake2b(place.encode('utf-8', 'replace'), digest_size=3).hexdigest()}"
    started = first - MICROSECOND
    status = story.outcome

    def lines() -> Iterator[Line]:
        return _events(path, started, last, job, status)

    yield Imported("qmlhc", path, job, started, lines, status=status)


class _Story:
    """How a file's rows end."""

    def __init__(self) -> None:
        self._open: set[str] = set()
        self._failed = False

    def take(self, row: Mapping[str, Any]) -> None:
        scope, _, edge = row["tag"].partition("_")
        if scope == "error":
            self._failed = True
        elif edge == "begin":
            self._open.add(scope)
            self._failed = False
        else:
            self._open -= {"step", "epoch"} if scope == "epoch" else {"step"}
            self._failed = False

    @property
    def outcome(self) -> str:
        return "failed" if self._failed else "interrupted" if self._open else "completed"


def _timed(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(Unix ns, line number, row) in the order of the file."""
    last = 0
    for line, row in rows(path):
        ts, tag = nanoseconds(row.get("ts")), row.get("tag")
        if ts is None or not isinstance(tag, str) or tag not in TAGS:
            raise ValueError(f"{path}, line {line}: not a row of qmlhc's: ts={row.get('ts')!r:.40}, tag={tag!r:.40}")
        field = NUMBERED.get(tag)
        if field and whole(row.get(field)) is None:
            raise ValueError(f"{path}, line {line}: {tag}: {field}={row.get(field)!r:.40} is no number of one")
        last = max(ts, last)
        yield last, line, row


def _events(path: Path, started: int, last: int, job: str, status: str) -> Iterator[Line]:
    run, opened = Mark(), dict[str, Mark]()
    epoch: int | None = None
    place, lap, before = (-1, -1), 0, started

    def end(scope: str, ts: int, **fields: Any) -> Iterator[Line]:
        if scope in opened:
            yield ts, _event(f"{scope}_end", begin=0, **fields), opened.pop(scope)

    def parent() -> int:
        return (opened.get("step") or opened.get("epoch") or run).seq

    yield started, _event("run_begin", parent=0, name=job, group=None, tags=[], attempt=[0, 0]), run
    for ts, _, row in _timed(path):
        tag, scope = row["tag"], row["tag"].partition("_")[0]
        if tag == "error":
            told = {"type": str(row.get("type")), "message": str(row.get("message"))}
            yield ts, _event("error", parent=parent(), **told, stack="", attributes={}), None
        elif tag.endswith("_begin"):
            yield from end("step", before, status="interrupted")
            if tag == "epoch_begin":
                yield from end("epoch", before, status="interrupted")
                epoch = whole(row["epoch"])
                begin = _event(tag, parent=run.seq, epoch=epoch)
            else:
                here = (-1 if epoch is None else epoch, whole(row["step"]) or 0)
                place, lap = here, lap + (here <= place)  # as a run counts its laps
                begin = _event(tag, parent=parent(), step=here[1], split="train")
                begin.update({} if epoch is None else {"epoch": epoch}, **({"lap": lap} if lap else {}))
            opened[scope] = Mark()
            yield ts, begin, opened[scope]
        else:
            if tag == "epoch_end":
                yield from end("step", before, status="interrupted")
            values = _metrics(row.get("context"))
            if values:
                of_step = {"step": whole(row["step"])} if scope == "step" else {}
                yield ts, _event("metrics", split="train", **of_step, metrics=values), None
            yield from end(scope, ts)
            if scope == "epoch":
                epoch = None
        before = ts
    left = "error" if status == "failed" else "interrupted"
    yield from end("step", last, status=left)
    yield from end("epoch", last, status=left)
    yield last, _event("run_end", begin=0, status=status), run


def _event(tag: str, **fields: Any) -> Event:
    return {"ts": 0, "seq": 0, "tag": tag, **fields}


def _metrics(context: Any) -> dict[str, float | str]:
    """The numbers of a context, as `RunCallback` takes them."""
    if not isinstance(context, dict):
        return {}
    found = {key: number(value) for key, value in context.items() if not isinstance(value, bool)}
    return {key: value for key, value in found.items() if value is not None}
