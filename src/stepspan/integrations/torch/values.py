"""Values of a GPU without waiting for it: copied beside its work, and read when they have arrived."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from sys import modules
from typing import Any, cast

from stepspan.integrations.torch.captures import leave_captures_alone
from stepspan.recording.deferred import AsyncCopy, local_tensor

ROWS, NUMBERS = 2048, 16
"""Of the pinned memory for copies from one device: 256 KiB."""
LARGEST = 8
"""Bytes of a number."""


def start_copies(values: Mapping[str, Any]) -> list[tuple[list[str], AsyncCopy]]:
    """Begin to copy tensors of one element from their devices: the keys of those that come together, and their copy.

    The current stream takes a snapshot of them, because what it does next may change them; a stream of our own, which
    waits for that and for nothing else, copies it to pinned memory. This thread only launches.
    """
    groups: dict[Any, list[tuple[str, Any]]] = {}
    for key, value in values.items():
        tensor = (local_tensor(value) if hasattr(value, "placements") else value).detach()
        groups.setdefault((tensor.device, tensor.dtype), []).append((key, tensor.reshape(())))
    found: list[tuple[list[str], AsyncCopy]] = []
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

    def copy(self, tensors: Collection[Any]) -> AsyncCopy:
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
        leave_captures_alone()
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
