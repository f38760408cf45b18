"""PyTorch: values and times of a GPU without waiting for it, and the wait for other ranks in DDP.

Nothing here imports torch: who has a tensor or a model has imported it.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import suppress
from sys import modules
from typing import TYPE_CHECKING, Any, cast

from stepspan.events import Event
from stepspan.scopes import Scope
from stepspan.tensors import Copying, resolver_of, whole

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from stepspan.run import Run

__all__ = ["watch_collectives", "watched"]

ROWS, NUMBERS = 2048, 16
"""Of the pinned memory for copies from one device: 256 KiB."""
LARGEST = 8
"""Bytes of a number."""
RELAXED = 2
"""cudaStreamCaptureModeRelaxed"""
MILLISECONDS = 1000.0


# ---------------------------------------------------------------------------------------------- values of a device


def copying(values: Mapping[str, Any]) -> list[tuple[list[str], Copying]]:
    """Begin to copy tensors of one element from their devices: the keys of those that come together, and their copy.

    The current stream takes a snapshot of them, because what it does next may change them; a stream of our own, which
    waits for that and for nothing else, copies it to pinned memory. This thread only launches.
    """
    groups: dict[Any, list[tuple[str, Any]]] = {}
    for key, value in values.items():
        tensor = (whole(value) if hasattr(value, "placements") else value).detach()
        groups.setdefault((tensor.device, tensor.dtype), []).append((key, tensor.reshape(())))
    found: list[tuple[list[str], Copying]] = []
    for (device, _), entries in groups.items():
        place = _places.get(device) or _places.setdefault(device, Place(modules["torch"], device))
        for first in range(0, len(entries), NUMBERS):
            keys, tensors = zip(*entries[first : first + NUMBERS], strict=True)
            found.append((list(keys), place.copy(tensors)))
    return found


class Place:
    """Where numbers of one device arrive: pinned memory, and a stream."""

    def __init__(self, torch: Any, device: Any, api: Any = None, *, pinned: bool = True) -> None:
        self._torch = torch
        self._device = device
        self._api = cast("Any", api or getattr(torch, device.type, None))
        self._streams = all(hasattr(self._api, name) for name in ("Stream", "Event", "current_stream", "stream"))
        if self._streams:
            with torch.inference_mode(False):  # otherwise nobody could write to it outside inference
                size = NUMBERS * LARGEST
                self._rows = torch.empty((ROWS, size), dtype=torch.uint8, device="cpu", pin_memory=pinned)
            self._stream = self._api.Stream(device)
            self._free = deque(range(ROWS))

    def copy(self, tensors: Collection[Any]) -> Copying:
        """Begin to copy tensors of no dimension and one type. RuntimeError."""
        torch, api = self._torch, self._api
        capturing = getattr(api, "is_current_stream_capturing", None)
        if capturing is not None and capturing():
            raise RuntimeError("a graph is being captured, which would only copy this value again and again")
        with torch.inference_mode(False), torch.no_grad():
            snapshot = torch.stack(list(tensors))
            if not self._streams:
                return Fetched(snapshot)
            if not self._free:
                raise RuntimeError("too many values are on their way")
            number = self._free.popleft()
            row = self._rows[number, : len(tensors) * snapshot.element_size()].view(snapshot.dtype)
            self._stream.wait_stream(api.current_stream(self._device))
            with api.stream(self._stream):
                row.copy_(snapshot, non_blocking=True)
                arrived = api.Event()
                arrived.record(self._stream)
        return Copy(snapshot, row, arrived, lambda: self._free.append(number))


_places: dict[Any, Place] = {}


class Copy:
    """Holds on to the snapshot until it has been copied, so that the allocator does not give its memory away.

    Its row is free again when nobody holds on to it: what is copied there next comes behind it in the same stream.
    """

    def __init__(self, snapshot: Any, row: Any, arrived: Any, free: Callable[[], None]) -> None:
        self._snapshot = snapshot
        self._row = row
        self._arrived = arrived
        self._free = free

    def ready(self) -> bool:
        """Whether the copy has arrived."""
        _leave_captures_alone()
        return bool(self._arrived.query())

    def numbers(self) -> list[Any]:
        """What has arrived."""
        numbers: list[Any] = self._row.tolist()
        return numbers

    def __del__(self) -> None:
        self._free()


class Fetched:
    """Numbers of a device that has no streams to speak of (MPS): whoever resolves them waits for them."""

    def __init__(self, snapshot: Any) -> None:
        self._snapshot = snapshot

    def ready(self) -> bool:
        """As ready as can be told."""
        return True

    def numbers(self) -> list[Any]:
        """They. Waits, without the GIL."""
        numbers: list[Any] = self._snapshot.tolist()
        return numbers


_thread = threading.local()


def _leave_captures_alone() -> None:
    """Once for each thread that asks: a query must not spoil a CUDA graph that another thread captures.

    https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__STREAM.html: cudaThreadExchangeStreamCaptureMode
    """
    if getattr(_thread, "relaxed", False):
        return
    _thread.relaxed = True
    with suppress(AttributeError, OSError):  # no CUDA, or one that is linked in another way
        version = modules["torch"].version.cuda.partition(".")[0]
        runtime = ctypes.CDLL(f"libcudart.so.{version}")  # the one that torch has loaded
        runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(RELAXED)))


# ----------------------------------------------------------------------------------------------- times of a device


def device_span(run: Run, begin: Event) -> Scope:
    """A span that is timed on the GPU as well; on the host alone, and told once, where CUDA is not at work."""
    cuda = getattr(modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        run.tell("cuda", f"span {begin['name']:.80}: cuda=True, but torch has no CUDA at work: timed on the host")
        return run._scopes.span(begin)
    span = DeviceSpan(run._scopes, "span", {**NOT_YET, **begin, "cuda": True})
    span.timer = Timer(run, cuda)
    return span


NOT_YET: Event = {"ts": 0, "seq": 0, "tag": "span_begin", "parent": 0}


class DeviceSpan(Scope):
    """A span between two CUDA events of the stream that is current where it is entered and left."""

    __slots__ = ("timer",)
    timer: Timer

    def __enter__(self) -> Self:
        self.owner.begin(self)
        self.timer.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        home = self.home
        self.timer.end()
        self.owner.end(self, error)
        self.timer.follow(self.seq, home)


class Timer:
    """How long a stream takes from one point to another. Nothing here raises."""

    series: Collection[Hashable] = ()

    def __init__(self, run: Run, cuda: Any) -> None:
        self._run = run
        self._cuda = cuda
        self._events: list[Any] = []
        self._begin = 0
        self._home: Any = None

    def begin(self) -> None:
        """The stream's work until here comes before."""
        self._mark()

    def end(self) -> None:
        """The stream's work until here belongs to it."""
        self._mark()

    def follow(self, begin: int, home: Any) -> None:
        """Have the time follow: of the span that began with line `begin` of session `home`."""
        self._begin, self._home = begin, home
        if home is not None:
            resolver_of(self._run).add(self)

    def _mark(self) -> None:
        try:
            if not self._cuda.is_current_stream_capturing():
                event = self._cuda.Event(enable_timing=True)
                event.record()
                self._events.append(event)
        except Exception as error:
            self._run.tell("cuda", f"a span could not be timed on the device: {error!s:.200}")

    def ready(self) -> bool:
        """Whether the device has got there."""
        _leave_captures_alone()
        return len(self._events) != 2 or bool(self._events[1].query())

    def event(self) -> Event:
        """Its seconds."""
        seconds = self._events[0].elapsed_time(self._events[1]) / MILLISECONDS if len(self._events) == 2 else None
        return self._written(seconds)

    def lost(self) -> Event:
        """That they are not known: what waits for them need not."""
        return self._written(None)

    def _written(self, seconds: float | None) -> Event:
        here = self._home is self._run.pipeline.journal.home  # otherwise the number is another line's
        return {"ts": 0, "seq": 0, "tag": "device_time", "begin": self._begin if here else 0, "seconds": seconds}


# ------------------------------------------------------------------------------------------------ the wait in DDP


def watch_collectives(model: Any, run: Run | None = None) -> None:
    """Time how long DDP waits for other ranks, as span "all_reduce" and in `training.step.wait`.

    `model`: a `DistributedDataParallel` without a communication hook; it gets one that all-reduces as DDP does without.
    A model with a hook of its own: `model.register_comm_hook(state, watched(hook))`. `run`: the current one.

    What is timed: from where this rank hands over its last bucket of gradients, when its backward pass has nothing else
    to do, until all buckets are reduced. That is the communication that computing does not hide, and the wait for the
    slowest rank: the one with the least wait is the one that the others wait for. On CUDA both ends are events of the
    streams, resolved off the training thread.

    What is not: collectives outside DDP's backward pass, such as SyncBatchNorm, those of FSDP, or your own. Put
    `run.span("all_gather", collective=True)` around those that wait, with `cuda=True` on a GPU.

    Raises what `register_comm_hook` raises: RuntimeError where there is a hook, AttributeError where it is no DDP.
    """
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (  # type: ignore[import-not-found,unused-ignore]
        allreduce_hook,
    )

    model.register_comm_hook(model.process_group, watched(allreduce_hook, run))


def watched(hook: Callable[[Any, Any], Any], run: Run | None = None) -> Callable[[Any, Any], Any]:
    """A DDP communication hook that does what `hook` does, and is timed as `watch_collectives` says."""
    watch = Watch()

    def timed(state: Any, bucket: Any) -> Any:
        nonlocal watch
        if bucket.index() == 0:  # the first one; of a pass before, which may have failed, nothing is left over
            watch = Watch()
        watch.launch(bucket, run)
        return hook(state, bucket).then(watch.arrived)

    # DDP checks both, and does not take them for what `from __future__ import annotations` makes of them.
    torch = modules["torch"]
    timed.__annotations__ = {
        "state": Any, "bucket": torch.distributed.GradBucket, "return": torch.futures.Future[torch.Tensor]
    }  # fmt: skip
    return timed


class Watch:
    """The buckets of one backward pass."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._missing = 0
        """Buckets that are on their way."""
        self._wait: Wait | None = None

    def launch(self, bucket: Any, run: Run | None) -> None:
        """A bucket is handed over."""
        with self._lock:
            self._missing += 1
        if bucket.is_last():
            self._wait = Wait.begun(run, bucket.buffer())

    def arrived(self, future: Any) -> Any:
        """A bucket has been reduced: DDP goes on only after this."""
        with self._lock:
            self._missing -= 1
            wait = self._wait if self._missing == 0 else None
            if wait is not None:
                self._wait = None
        if wait is not None:
            wait.end()
        return future.value()


class Aside(Scope):
    """Begins in one thread and ends in another."""

    __slots__ = ()
    aside = True


class Wait:
    """From the last bucket's launch to the last one's arrival."""

    def __init__(self, run: Run, scope: Scope, timer: Timer | None) -> None:
        self._run = run
        self._scope = scope
        self._timer = timer

    @classmethod
    def begun(cls, given: Run | None, buffer: Any) -> Wait | None:
        """It, from now on; None where nobody records it."""
        from stepspan.start import current_run

        run = given or current_run()
        try:
            scopes = getattr(run, "_scopes", None)
            if scopes is None:
                return None
            fields: Event = {**NOT_YET, "name": "all_reduce", "collective": True}
            timer = None
            if buffer.device.type == "cuda":
                fields["cuda"], timer = True, Timer(run, modules["torch"].cuda)
                timer.begin()
            scope = Aside(scopes, "span", fields)
            scopes.begin(scope)
            return cls(run, scope, timer)
        except Exception as error:
            run.tell("collectives", f"the wait for other ranks is not timed: {error!r}")
            return None

    def end(self) -> None:
        """Here, or on CUDA where the current stream gets to: the one that DDP's future has given us waits for it."""
        home = self._scope.home
        if self._timer is not None:
            self._timer.end()
        self._scope.owner.end(self._scope, None)
        if self._timer is not None:
            self._timer.follow(self._scope.seq, home)
