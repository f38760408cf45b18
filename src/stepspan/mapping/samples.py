"""What samplers read, as points: names and units from OpenTelemetry's semantic conventions where it has them.

https://opentelemetry.io/docs/specs/semconv/system/ (host, process) and .../hardware/gpu/. What those count up and down
(memory, files, threads) is a gauge here: it is read, not added up. Where they have none, the name is stepspan's own:
`system.memory.limit` of what a container may use, `hw.gpu.clock`, `hw.gpu.throttled`, and the allocator's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stepspan.events import Event
from stepspan.mapping.attributes import flatten
from stepspan.mapping.records import Attributes, Kind
from stepspan.values import to_float

METRICS: Mapping[str, tuple[str, Kind]] = {
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

OTHER: tuple[str, Kind] = ("", "gauge")


def sampled_values(event: Event) -> Iterator[tuple[str, Attributes, str, Kind, float]]:
    """The values of a `sample` event, in order; what is no number is left out.

    Yields:
        Name, attributes, unit, kind and value of each.

    """
    for name, value, *attributes in event["values"]:
        number: float | None = to_float(value)
        if number is not None:
            flat: dict[str, Any] = flatten(attributes[0]).attributes if attributes else {}
            yield name, flat, *METRICS.get(name, OTHER), number
