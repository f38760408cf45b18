"""Spans that are timed on the GPU as well, without waiting for it.

A timer marks the stream where a span is entered and left. When the device has passed the last mark, the time between
the marks follows the span's end as a `device_time` event (`stepspan.recording.deferred`).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Hashable
from sys import modules
from typing import Any

from typing_extensions import Self

from stepspan.events import Event
from stepspan.recording.cuda_captures import leave_captures_alone
from stepspan.recording.recorder import Recorder
from stepspan.recording.scope import Scope

MILLISECONDS_PER_SECOND = 1000.0
SPAN_BEGIN: Event = {"ts": 0, "seq": 0, "tag": "span_begin", "parent": 0}


def device_span(recorder: Recorder, begin: Event) -> Scope:
    """A span that is timed on the GPU as well.

    Args:
        recorder: Of the run.
        begin: The fields of the begin event.

    Returns:
        The span, not open yet; it is timed on the host alone, with a warning, if CUDA is not initialised by then.

    """
    span = DeviceSpan(recorder.scopes, "span", {**SPAN_BEGIN, **begin})
    span.recorder = recorder
    return span


class DeviceSpan(Scope):
    """A span between two CUDA events of the stream that is current where it is entered and left."""

    __slots__ = ("recorder", "timer")
    recorder: Recorder
    timer: Timer | None

    def __enter__(self) -> Self:
        cuda = getattr(modules.get("torch"), "cuda", None)
        if cuda is not None and cuda.is_initialized():
            self.timer, self.begin["cuda"] = DeviceTimer(self.recorder, cuda), True
        else:
            self.timer = None
            message = f"span {self.begin['name']:.80}: cuda=True, but torch has not initialised CUDA: timed on the host"
            self.recorder.warn_once("cuda", message, key=self.begin["name"])
        self.owner.begin(self)
        if self.timer is not None:
            self.timer.mark()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self.timer is None:
            self.owner.end(self, error)
        else:
            self.timer.mark()
            self.timer.end(self, error)

    def renewed(self) -> Scope:
        """A scope like this one, not open yet."""
        span = self._like(DeviceSpan)
        assert isinstance(span, DeviceSpan)
        span.recorder = self.recorder
        return span


class Timer:
    """Measures the thread from each odd mark to the next, and has the sum follow a span's end. Never raises."""

    series: Collection[Hashable] = ()
    keys: Collection[str] = ("training.phase.device_time",)
    lost_keys = keys

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._marks: list[Any] = []
        self._begin = 0
        self._session: object | None = None

    def mark(self) -> None:
        """Start or stop measuring."""
        self._marks.append(time.perf_counter())

    def end(self, span: Scope, error: BaseException | None = None) -> None:
        """End a span, and have the time follow its end line when it is known."""
        self._begin, self._session = span.seq, span.session
        span.owner.end(span, error)
        if self._session is not None:
            self._recorder.deferred.add(self)

    def ready(self) -> bool:
        """Whether all marks have been passed."""
        return True

    def seconds(self) -> float | None:
        """The sum of the measured times; None where it could not be measured."""
        return float(sum(self._marks[1::2]) - sum(self._marks[::2]))

    def event(self) -> Event:
        """The line with the time."""
        return self._device_time(self.seconds())

    def lost(self) -> Event:
        """The line that says that there will be no time: readers need not wait for it."""
        return self._device_time(None)

    def _device_time(self, seconds: float | None) -> Event:
        same_session = self._session is self._recorder.session  # otherwise the number is another line's
        begin = self._begin if same_session else 0
        return {"ts": 0, "seq": 0, "tag": "device_time", "begin": begin, "seconds": seconds}


class DeviceTimer(Timer):
    """Measures the CUDA stream that is current where it is marked, by the device's clock."""

    def __init__(self, recorder: Recorder, cuda: Any) -> None:
        super().__init__(recorder)
        self._cuda = cuda
        self._complete = True

    def mark(self) -> None:
        """Start or stop measuring when the stream has done its work until here."""
        try:
            if self._cuda.is_current_stream_capturing():
                self._complete = False
                return
            event = self._cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        except Exception as error:
            self._complete = False
            message = f"a span could not be timed on the device: {error!s:.200}"
            self._recorder.warn_once("cuda", message, key=type(error).__name__)

    def ready(self) -> bool:
        """Whether the device has passed all marks."""
        leave_captures_alone()
        return not self._complete or all(mark.query() for mark in self._marks[-1:])

    def seconds(self) -> float | None:
        """The sum of the measured times; None where the stream was being captured, or CUDA failed."""
        if not self._complete:
            return None
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        return float(sum(begin.elapsed_time(end) for begin, end in pairs)) / MILLISECONDS_PER_SECOND
