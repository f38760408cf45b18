"""Values of a GPU without waiting for it: copied beside its work, and read when they have arrived."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from sys import modules
from typing import Any, cast

from stepspan.recording.cuda_captures import leave_captures_alone

ROWS, NUMBERS_PER_ROW = 2048, 16
"""Of the pinned memory for copies from one device: 256 KiB."""
MAX_NUMBER_BYTES = 8


def start_copies(values: Mapping[str, Any]) -> list[tuple[list[str], PinnedCopy | BlockingCopy]]:
    """Begin to copy tensors of one element from their devices.

    The current stream takes a snapshot of them, because what it does next may change them; a stream of our own, which
    waits for that and for nothing else, copies it to pinned memory. The calling thread only launches.

    Args:
        values: Key -> tensor.

    Returns:
        For each copy the keys of the values that it brings, in its order.

    Raises:
        RuntimeError: A CUDA graph is being captured, or too many copies are pending.

    """
    groups: dict[Any, list[tuple[str, Any]]] = {}
    for key, value in values.items():
        tensor = (local_tensor(value) if hasattr(value, "placements") else value).detach()
        groups.setdefault((tensor.device, tensor.dtype), []).append((key, tensor.reshape(())))
    copies: list[tuple[list[str], PinnedCopy | BlockingCopy]] = []
    for (device, _), entries in groups.items():
        buffer = _buffers.get(device) or _buffers.setdefault(device, PinnedBuffer(modules["torch"], device))
        for first in range(0, len(entries), NUMBERS_PER_ROW):
            keys, tensors = zip(*entries[first : first + NUMBERS_PER_ROW], strict=True)
            copies.append((list(keys), buffer.copy(tensors)))
    return copies


def local_tensor(value: Any) -> Any:
    """A torch DTensor's tensor, where each rank has all of it.

    Raises:
        ValueError: The tensor is in parts: to gather it would be a collective, which all ranks must call.

    """
    if all(placement.is_replicate() for placement in value.placements):
        return value.to_local()
    raise ValueError("a DTensor in parts: log its full_tensor(), which all ranks must call")


class PinnedBuffer:
    """Where numbers of one device arrive: pinned memory, and a stream that copies to it.

    Args:
        torch: The module.
        device: A torch device.
        api: What has the device's streams and events; `torch.cuda` for CUDA.
        pinned: Whether the memory is pinned; tests run without.

    """

    def __init__(self, torch: Any, device: Any, api: Any = None, *, pinned: bool = True) -> None:
        self._torch = torch
        self._device = device
        self._api = cast("Any", api or getattr(torch, device.type, None))
        self._streams = all(hasattr(self._api, name) for name in ("Stream", "Event", "current_stream", "stream"))
        if self._streams:
            with torch.inference_mode(False):  # otherwise it could be written only in inference mode
                size = NUMBERS_PER_ROW * MAX_NUMBER_BYTES
                self._rows = torch.empty((ROWS, size), dtype=torch.uint8, device="cpu", pin_memory=pinned)
            self._stream = self._api.Stream(device)
            self._free = deque(range(ROWS))

    def copy(self, tensors: Collection[Any]) -> PinnedCopy | BlockingCopy:
        """Begin to copy tensors of no dimension and one type. RuntimeError."""
        torch, api = self._torch, self._api
        capturing = getattr(api, "is_current_stream_capturing", None)
        if capturing is not None and capturing():
            raise RuntimeError("a graph is being captured, which would only copy this value again and again")
        with torch.inference_mode(False), torch.no_grad():
            snapshot = torch.stack(list(tensors))
            if not self._streams:
                return BlockingCopy(snapshot)
            if not self._free:
                raise RuntimeError("too many values are pending")
            number = self._free.popleft()
            row = self._rows[number, : len(tensors) * snapshot.element_size()].view(snapshot.dtype)
            self._stream.wait_stream(api.current_stream(self._device))
            with api.stream(self._stream):
                row.copy_(snapshot, non_blocking=True)
                arrived = api.Event()
                arrived.record(self._stream)
        return PinnedCopy(snapshot, row, arrived, lambda: self._free.append(number))


_buffers: dict[Any, PinnedBuffer] = {}


@dataclass(eq=False)
class PinnedCopy:
    """Numbers on their way to a row of pinned memory.

    Holds the snapshot until it has been copied, so that the allocator does not give its memory away. The row is free
    again when nothing refers to this object: what is copied there next comes behind it in the same stream.
    """

    snapshot: Any
    row: Any
    arrived: Any
    """The event of the stream that has passed when the copy has arrived."""
    free: Callable[[], None]
    """Called when the row may be used for another copy."""

    def ready(self) -> bool:
        """Whether the copy has arrived."""
        leave_captures_alone()
        return bool(self.arrived.query())

    def numbers(self) -> list[Any]:
        """The numbers that have arrived."""
        return list(self.row.tolist())

    def __del__(self) -> None:
        self.free()


@dataclass(eq=False)
class BlockingCopy:
    """Numbers of a device that has no streams to speak of (MPS): reading them waits for the device."""

    snapshot: Any

    def ready(self) -> bool:
        """Always: the device can't be asked."""
        return True

    def numbers(self) -> list[Any]:
        """The numbers; waits for the device, without the GIL."""
        return list(self.snapshot.tolist())
