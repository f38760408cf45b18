"""The hooks of a training loop, the loggers that keep a row of each, and the callback that records them in a run."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from stepspan.compat.row_writer import RowWriter, to_scalar
from stepspan.conversion import json_value

if TYPE_CHECKING:
    from stepspan.recording.scope import Scope
    from stepspan.run import Run

FLUSH_INTERVAL_S = 5.0
RESERVED = frozenset({"self", "error"})
"""The names of `log_error`'s own arguments, which no attribute can have."""


class Callback:
    """Five hooks that do nothing; derive from it, and override what you need.

    The training loop calls them, in the thread that trains. `context` is whatever the loop has to say at that point, a
    mapping such as `{"loss": 0.5}`; here its values may also be numpy scalars and 0-d tensors.
    """

    def on_step_begin(self, step: int, context: Mapping[str, Any]) -> None:
        """Called before a step.

        Args:
            step: The step's number, from 0.
            context: Anything that is known of it already.

        """

    def on_step_end(self, step: int, context: Mapping[str, Any]) -> None:
        """Called after a step.

        Args:
            step: The step's number, from 0.
            context: Its results, such as `{"loss": 0.5}`.

        """

    def on_epoch_begin(self, epoch: int, context: Mapping[str, Any]) -> None:
        """Called before an epoch.

        Args:
            epoch: The epoch's number, from 0.
            context: Anything that is known of it already.

        """

    def on_epoch_end(self, epoch: int, context: Mapping[str, Any]) -> None:
        """Called after an epoch.

        Args:
            epoch: The epoch's number, from 0.
            context: Its results.

        """

    def on_error(self, error: Exception, context: Mapping[str, Any]) -> None:
        """Called when the loop has caught an exception, which need not end the training.

        Args:
            error: The exception.
            context: Where it happened, such as `{"epoch": 3}`.

        """


class CallbackList(Callback):
    """Passes each hook on to several callbacks, in order.

    As in qmlhc, what a callback raises reaches the training loop, and the later callbacks are not called.

    Args:
        callbacks: The callbacks; `append` adds one at the end.

    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self.callbacks = list(callbacks)

    def append(self, callback: Callback) -> None:
        """Add a callback at the end.

        Args:
            callback: Called after those that are there.

        """
        self.callbacks.append(callback)

    def __iter__(self) -> Iterator[Callback]:
        return iter(self.callbacks)

    def __len__(self) -> int:
        return len(self.callbacks)

    def on_step_begin(self, step: int, context: Mapping[str, Any]) -> None:
        """Call `on_step_begin` of each callback."""
        for callback in self.callbacks:
            callback.on_step_begin(step, context)

    def on_step_end(self, step: int, context: Mapping[str, Any]) -> None:
        """Call `on_step_end` of each callback."""
        for callback in self.callbacks:
            callback.on_step_end(step, context)

    def on_epoch_begin(self, epoch: int, context: Mapping[str, Any]) -> None:
        """Call `on_epoch_begin` of each callback."""
        for callback in self.callbacks:
            callback.on_epoch_begin(epoch, context)

    def on_epoch_end(self, epoch: int, context: Mapping[str, Any]) -> None:
        """Call `on_epoch_end` of each callback."""
        for callback in self.callbacks:
            callback.on_epoch_end(epoch, context)

    def on_error(self, error: Exception, context: Mapping[str, Any]) -> None:
        """Call `on_error` of each callback."""
        for callback in self.callbacks:
            callback.on_error(error, context)


class _RowLogger(Callback):
    """Makes a row of each hook. Nothing here raises."""

    def _log(self, tag: str, **fields: Any) -> None:
        raise NotImplementedError

    def on_step_begin(self, step: int, context: Mapping[str, Any]) -> None:
        """Log a row `{"tag": "step_begin", "step": step}`."""
        self._log("step_begin", step=_to_int(step))

    def on_step_end(self, step: int, context: Mapping[str, Any]) -> None:
        """Log a row `{"tag": "step_end", "step": step, "context": context}`."""
        self._log("step_end", step=_to_int(step), context=_to_dict(context))

    def on_epoch_begin(self, epoch: int, context: Mapping[str, Any]) -> None:
        """Log a row `{"tag": "epoch_begin", "epoch": epoch}`."""
        self._log("epoch_begin", epoch=_to_int(epoch))

    def on_epoch_end(self, epoch: int, context: Mapping[str, Any]) -> None:
        """Log a row `{"tag": "epoch_end", "epoch": epoch, "context": context}`."""
        self._log("epoch_end", epoch=_to_int(epoch), context=_to_dict(context))

    def on_error(self, error: Exception, context: Mapping[str, Any]) -> None:
        """Log a row `{"tag": "error", "type": the exception's class name, "message": its text}`."""
        self._log("error", type=type(error).__name__, message=json_value(error))


class TelemetryLogger(_RowLogger):
    """Appends a JSON row to a file for each hook, with `ts`, the Unix time in seconds, before its other fields.

    The rows are those of qmlhc's own logger; `stepspan import` makes a journal of them. Unlike qmlhc's, this one never
    raises into training, loses no row at the interpreter's exit and writes none twice, whatever the file system does:
    rows wait in memory while the file cannot be written, which is logged once. Values that JSON cannot hold are written
    as numbers where they are numbers (numpy scalars, 0-d tensors), and as text otherwise.

    Args:
        path: The file. It is created, with its directories, at the first flush, and only ever appended to.
        flush_interval: How many rows are written at once; after 5 s the next row is written, and what waits.
        clock: Gives the Unix time in seconds.
        write: `os.write`, or what a test puts in its place.

    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "telemetry.jsonl",
        flush_interval: int = 1,
        *,
        clock: Callable[[], float] = time.time,
        write: Callable[[int, bytes], int] = os.write,
    ) -> None:
        self._interval = max(1, int(flush_interval))
        self._rows = RowWriter(path, write=write)
        self._clock = clock
        self._since = 0
        self._flushed = clock()
        weakref.finalize(self, self._rows.flush)

    def flush(self) -> None:
        """Write the rows that wait. Never raises."""
        self._rows.flush()
        self._since = 0
        self._flushed = self._clock()

    _flush = flush  # qmlhc's own name

    def _log(self, tag: str, **fields: Any) -> None:
        now = self._clock()
        self._rows.add({"ts": now, "tag": tag, **fields})
        self._since += 1
        if self._since >= self._interval or now - self._flushed > FLUSH_INTERVAL_S:
            self.flush()


class MemoryLogger(_RowLogger):
    """Keeps the rows in the list `records`, as qmlhc's does: without `ts`, values as they were given."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def _log(self, tag: str, **fields: Any) -> None:
        self.records.append({"tag": tag, **fields})


class RunCallback(Callback):
    """Records the hooks in a run; qmlhc has no such callback.

    Steps and epochs become spans (`training.step`, `training.epoch`), the numbers in the `context` of an end become
    gauges `training.<key>` of that step or epoch, exceptions become `exception` log records and `training.run.errors`.
    Everything else in `context` is ignored. Nothing here raises.

    Args:
        run: The run, as `stepspan.start_run` returned it. It stays open: the code that started it closes it.

    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._open: dict[str, Scope] = {}
        """What is open: "step", "epoch", both or neither."""

    def on_step_begin(self, step: int, context: Mapping[str, Any]) -> None:
        """Begin a step's span, in the open epoch if there is one; a step that was never ended ends here."""
        self._end("step")
        self._open["step"] = self.run.step(step).__enter__()

    def on_step_end(self, step: int, context: Mapping[str, Any]) -> None:
        """Log the numbers in `context` at `step`, and end the step's span."""
        self.run.log_metrics(_numbers(context), step)
        self._end("step")

    def on_epoch_begin(self, epoch: int, context: Mapping[str, Any]) -> None:
        """Begin an epoch's span; an epoch or step that was never ended ends here."""
        self._end("step", "epoch")
        self._open["epoch"] = self.run.epoch(epoch).__enter__()

    def on_epoch_end(self, epoch: int, context: Mapping[str, Any]) -> None:
        """Log the numbers in `context`, and end the epoch's span."""
        self._end("step")
        self.run.log_metrics(_numbers(context))
        self._end("epoch")

    def on_error(self, error: Exception, context: Mapping[str, Any]) -> None:
        """Record the exception on the innermost open span, with the texts and numbers in `context` as attributes."""
        attributes = {
            key: value
            for key, value in _to_dict(context).items()
            if issubclass(type(key), str) and key not in RESERVED and issubclass(type(value), (str, int, float))
        }
        self.run.log_error(error, **attributes)

    def _end(self, *kinds: str) -> None:
        for kind in kinds:
            if kind in self._open:
                self._open.pop(kind).__exit__(None, None, None)


def _to_int(value: Any) -> Any:
    """A step or epoch as an integer, or as JSON where it is not one."""
    try:
        return int(value)
    except Exception:  # a user's `__int__` may raise anything
        return json_value(value)


def _to_dict(context: Any) -> dict[Any, Any]:
    """A copy of a context, one level deep; what is no mapping becomes one with the key `context`."""
    try:
        return dict(context) if context is not None else {}
    except Exception:  # not a mapping, or a user's own one
        return {"context": json_value(context)}


def _numbers(context: Any) -> dict[Any, float]:
    numbers = {key: to_scalar(value) for key, value in _to_dict(context).items()}
    return {key: number for key, number in numbers.items() if number is not None}
