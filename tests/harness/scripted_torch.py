"""A `torch` with a GPU that gets somewhere only when a test says so, and that notices who waits for it.

gpu = Gpu()
monkeypatch.setitem(sys.modules, "torch", gpu.torch)
run.log_metrics({"loss": gpu.tensor(0.5)})
gpu.catch_up()              # all that has been launched is done
assert gpu.waits == []      # and nobody waited for it
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NoReturn


class Gpu:
    """One stream of work, whatever the number of its streams. `now`: its clock, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[tuple[str, str]] = []
        """Thread and call of whoever waited for work that was not done."""
        self.capturing = False
        self.fails: Exception | None = None
        """What every question is answered with."""
        self.queue: deque[Callable[[], None]] = deque()
        cuda = SimpleNamespace(
            Stream=lambda device=None: Stream(self),
            Event=lambda enable_timing=False: Event(self),
            current_stream=lambda device=None: Stream(self),
            stream=lambda stream: nullcontext(),
            is_current_stream_capturing=lambda: self.capturing,
            is_initialized=lambda: True,
        )
        self.torch: Any = SimpleNamespace(
            cuda=cuda,
            uint8="uint8",
            version=SimpleNamespace(cuda="13.2"),
            stack=lambda tensors: self.tensor(*[tensor._values[0] for tensor in tensors]),
            empty=lambda size, *, dtype, device, pin_memory: Rows(self, pinned=pin_memory and device == "cpu"),
            distributed=SimpleNamespace(GradBucket=Bucket),
            futures=SimpleNamespace(Future=list),
            Tensor=Tensor,
            inference_mode=lambda on: nullcontext(),
            no_grad=nullcontext,
        )

    def tensor(self, *values: float, shape: tuple[int, ...] | None = None, kind: str = "cuda") -> Tensor:
        return Tensor(self, list(values), shape or (() if len(values) == 1 else (len(values),)), kind)

    def catch_up(self, launches: int | None = None) -> None:
        """Do what has been launched; or only the first of it."""
        for _ in range(len(self.queue) if launches is None else launches):
            self.queue.popleft()()

    def ask(self, done: bool) -> bool:
        if self.fails:
            raise self.fails
        return done

    def waited(self, call: str) -> NoReturn:
        self.waits.append((threading.current_thread().name, call))
        raise AssertionError(f"{call} waits for the GPU")


class Tensor:
    """What is on the GPU. A snapshot (`stack`) keeps the values of its time."""

    def __init__(self, gpu: Gpu, values: list[float], shape: tuple[int, ...], kind: str) -> None:
        self._gpu, self._values, self.shape = gpu, values, shape
        self.device = _Device(kind)
        self.dtype = "float32"

    def add_(self, value: float) -> None:
        self._values = [one + value for one in self._values]

    def detach(self) -> Tensor:
        return self

    def reshape(self, shape: tuple[int, ...]) -> Tensor:
        return Tensor(self._gpu, self._values, shape, self.device.type)

    def element_size(self) -> int:
        return 4

    def item(self) -> float:
        return self._gpu.waited("item")

    def tolist(self) -> list[float]:
        return self._gpu.waited("tolist")

    def __float__(self) -> float:
        return self._gpu.waited("float")

    def __repr__(self) -> str:
        return self._gpu.waited("repr")

    __bool__ = __int__ = cpu = numpy = to = __repr__


Tensor.__module__ = "torch"


class _Device(str):
    @property
    def type(self) -> str:
        return str(self)


class Stream:
    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def wait_stream(self, other: Stream) -> None:
        """On the GPU; nobody here waits."""

    def synchronize(self) -> None:
        self._gpu.waited("synchronize")


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.at: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._gpu.queue.append(self._reached)

    def _reached(self) -> None:
        self.at = self._gpu.now

    def query(self) -> bool:
        return self._gpu.ask(self.at is not None)

    def elapsed_time(self, end: Event) -> float:
        assert self.at is not None
        assert end.at is not None
        return (end.at - self.at) * 1000

    def synchronize(self) -> None:
        self._gpu.waited("synchronize")


class Rows:
    """Pinned memory: `rows[number, :bytes].view(dtype)`."""

    def __init__(self, gpu: Gpu, *, pinned: bool) -> None:
        assert pinned, "a copy to other memory waits"
        self._gpu = gpu

    def __getitem__(self, place: tuple[int, slice]) -> Rows:
        return Rows(self._gpu, pinned=True)

    def view(self, dtype: str) -> Row:
        return Row(self._gpu)


class Row:
    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._values: list[float] | None = None

    def copy_(self, source: Tensor, *, non_blocking: bool) -> None:
        assert non_blocking
        self._gpu.queue.append(lambda: self._arrive(source))

    def _arrive(self, source: Tensor) -> None:
        self._values = list(source._values)

    def tolist(self) -> list[float]:
        assert self._values is not None, "read before it has arrived"
        return self._values


class Bucket:
    """A bucket of DDP's gradients, the `number`-th of `of`, and the future of its reduction, which a test completes."""

    def __init__(self, gpu: Gpu, number: int, of: int) -> None:
        self._gpu, self._number, self._of = gpu, number, of
        self.complete: Callable[[], Any] = lambda: None

    def index(self) -> int:
        return self._number

    def is_last(self) -> bool:
        return self._number == self._of - 1

    def buffer(self) -> Tensor:
        return self._gpu.tensor(0.0)

    def then(self, callback: Callable[[Any], Any]) -> Bucket:
        self.complete = lambda: callback(self)
        return self

    def value(self) -> Tensor:
        return self.buffer()


class JaxArray:
    """A JAX array that is ready when a test says so, and so are its copies; one that is donated is deleted."""

    def __init__(
        self, value: complex, *, ready: bool = False, shape: tuple[int, ...] = (), copied: JaxArray | None = None
    ) -> None:
        self.value, self.ready, self.shape = value, ready, shape
        self.copying = False
        self.donated = False
        self._copied = copied

    def addressable_data(self, index: int) -> JaxArray:
        return self

    def copy(self) -> JaxArray:
        self._alive()
        return JaxArray(self.value, shape=self.shape, copied=self)

    def is_ready(self) -> bool:
        self._alive()
        return self._copied.ready if self._copied else self.ready

    def copy_to_host_async(self) -> None:
        self._alive()
        (self._copied or self).copying = True

    def item(self) -> complex:
        assert self.is_ready(), "item() waits"
        return self.value

    def _alive(self) -> None:
        if self.donated:
            raise RuntimeError("Array has been deleted")

    def __repr__(self) -> str:
        raise AssertionError("repr() waits")


JaxArray.__module__ = "jaxlib._jax"
