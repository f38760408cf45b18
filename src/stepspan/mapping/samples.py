"""What samplers read, as points: names and units from OpenTelemetry's semantic conventions where it has them.

https://opentelemetry.io/docs/specs/semconv/system/ (host, process) and .../hardware/gpu/. What those count up and down
(memory, files, threads) is a gauge here: it is read, not added up. Our own, for want of theirs: `system.memory.limit`
of what a container may use, `hw.gpu.clock`, `hw.gpu.throttled`, and the allocator's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from stepspan.events import Event
from stepspan.mapping.records import Attributes
from stepspan.mapping.values import flat, number

METRICS: Mapping[str, tuple[str, Literal["gauge", "sum"]]] = {
    "system.cpu.utilization": ("1", "gauge"),
    "system.memory.usage": ("By", "gauge"),
    "system.memory.limit": ("By", "gauge"),
    "system.memory.utilization": ("1", "gauge"),
    "system.disk.io": ("By", "sum"),
    "system.network.io": ("By", "sum"),
    "process.cpu.utilization": ("1", "gauge"),
    "process.memory.usage": ("By", "gauge"),
    "process.unix.file_descriptor.count": ("{file_descriptor}", "gauge"),
    "process.thread.count": ("{thread}", "gauge"),
    "hw.gpu.utilization": ("1", "gauge"),
    "hw.gpu.memory.usage": ("By", "gauge"),
    "hw.gpu.memory.limit": ("By", "gauge"),
    "hw.gpu.memory.utilization": ("1", "gauge"),
    "hw.gpu.io": ("By", "sum"),
    "hw.gpu.clock": ("Hz", "gauge"),
    "hw.gpu.throttled": ("1", "gauge"),
    "hw.power": ("W", "gauge"),
    "hw.energy": ("J", "sum"),
    "hw.temperature": ("Cel", "gauge"),
    "hw.errors": ("{error}", "sum"),
    "training.memory.alloc_retries": ("{retry}", "sum"),
    "training.memory.ooms": ("{error}", "sum"),
}
"""Name -> unit and kind. A sum is cumulative and monotonic since the sampler's start. A name that is not here is a
gauge without a unit."""

UNKNOWN: tuple[str, Literal["gauge"]] = ("", "gauge")


def sampled(event: Event) -> Iterator[tuple[str, Attributes, str, Literal["gauge", "sum"], float]]:
    """Name, attributes, unit, kind and value of each of a `sample` event's values; what is no number is left out."""
    for name, value, *more in event["values"]:
        read: float | None = number(value)
        if read is not None:
            attributes: dict[str, Any] = flat(more[0]) if more else {}
            yield name, attributes, *METRICS.get(name, UNKNOWN), read
