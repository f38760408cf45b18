"""Times of a GPU without waiting for it, and spans that have them."""

from __future__ import annotations

import time
from collections.abc import Collection, Hashable
from sys import modules
from typing import TYPE_CHECKING, Any

from stepspan.events import Event
from stepspan.integrations.torch.captures import leave_captures_alone
from stepspan.recording.scopes import Scope

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from stepspan.run import Run

MILLISECONDS = 1000.0
NOT_YET: Event = {"ts": 0, "seq": 0, "tag": "span_begin", "parent": 0}


def device_span(run: Run, begin: Event) -> Scope:
    """A span that is timed on the GPU as well; on the host alone, and told once, where CUDA is not at work."""
    cuda = getattr(modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        run.warn_once("cuda", f"span {begin['name']:.80}: cuda=True, but torch has no CUDA at work: timed on the host")
        return run.recorder.scopes.span(begin)
    span = DeviceSpan(run.recorder.scopes, "span", {**NOT_YET, **begin, "cuda": True})
    span.timer = DeviceTimer(run, cuda)
    return span


class DeviceSpan(Scope):
    """A span between two CUDA events of the stream that is current where it is entered and left."""

    __slots__ = ("timer",)
    timer: Timer

    def __enter__(self) -> Self:
        self.owner.begin(self)
        self.timer.mark()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        home = self.session
        self.timer.mark()
        self.owner.end(self, error)
        self.timer.follow(self.seq, home)


class Timer:
    """How long something takes from a mark to the next, for each two of them, which follows a span's end as a line.

    Nothing here raises into who is timed.
    """

    series: Collection[Hashable] = ()

    def __init__(self, run: Run) -> None:
        self._run = run
        self._marks: list[Any] = []
        self._begin = 0
        self._home: Any = None

    def mark(self) -> None:
        """Begin, or end."""
        raise NotImplementedError

    def follow(self, begin: int, home: Any) -> None:
        """Have the time follow: of the span that began with line `begin` of session `home`."""
        self._begin, self._home = begin, home
        if home is not None:
            self._run.recorder.deferred.add(self)

    def ready(self) -> bool:
        """Whether all marks have been reached."""
        return True

    def seconds(self) -> float | None:
        """Between each two of the marks, added up; None where it is not known."""
        raise NotImplementedError

    def event(self) -> Event:
        """The line."""
        return self._written(self.seconds())

    def lost(self) -> Event:
        """That it is not known: what waits for it need not."""
        return self._written(None)

    def _written(self, seconds: float | None) -> Event:
        here = self._home is self._run.recorder.session  # otherwise the number is another line's
        return {"ts": 0, "seq": 0, "tag": "device_time", "begin": self._begin if here else 0, "seconds": seconds}


class HostTimer(Timer):
    """Of the thread that marks."""

    def mark(self) -> None:
        """Now."""
        self._marks.append(time.perf_counter())

    def seconds(self) -> float | None:
        """As it says."""
        return float(sum(self._marks[1::2]) - sum(self._marks[::2]))


class DeviceTimer(Timer):
    """Of the CUDA stream that is current where it is marked."""

    def __init__(self, run: Run, cuda: Any) -> None:
        super().__init__(run)
        self._cuda = cuda
        self._whole = True

    def mark(self) -> None:
        """The stream's work until here comes before."""
        try:
            if self._cuda.is_current_stream_capturing():
                self._whole = False
                return
            event = self._cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        except Exception as error:
            self._whole = False
            self._run.warn_once("cuda", f"a span could not be timed on the device: {error!s:.200}")

    def ready(self) -> bool:
        """Whether the device has got there."""
        leave_captures_alone()
        return not self._whole or all(mark.query() for mark in self._marks[-1:])

    def seconds(self) -> float | None:
        """By the device's clock."""
        if not self._whole:
            return None
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        return float(sum(begin.elapsed_time(end) for begin, end in pairs)) / MILLISECONDS
