"""The host and this process, through psutil; in a container, by what its cgroup allows and not by what the host has.

Names: https://opentelemetry.io/docs/specs/semconv/system/system-metrics/ and .../process-metrics/. Of memory, `used` is
what cannot be reclaimed, `cached` what can, `free` what nothing uses; together they are the limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from stepspan.samplers.cgroup import Cgroup
from stepspan.samplers.sampling import CumulativeSum, Emit, Observation, Sampler, Utilization

ROOT = Path("/")
LOOPBACK = frozenset({"lo", "lo0"})
IO: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "disk": ("block", {"read": "read_bytes", "write": "write_bytes"}),
    "network": ("class/net", {"receive": "bytes_recv", "transmit": "bytes_sent"}),
}
"""Of `system.<device>.io`: where /sys lists the devices, and `<device>.io.direction` -> psutil's counter (bytes)."""


def host(local_rank: int, emit: Emit, *, root: Path = ROOT) -> Sampler:
    """Open the sampler of this host, or of what this container may use of it: CPU, memory, disk and network.

    Args:
        local_rank: Not used: `sampled_by` decides which rank samples the host.
        emit: Not used.
        root: Where `proc` and `sys` are.

    """
    reader = _Host(root)
    return Sampler(
        "host",
        {"cpu": reader.cpu, "memory": reader.memory, "disk": reader.disk, "network": reader.network},
    )


def process(local_rank: int, emit: Emit, *, root: Path = ROOT) -> Sampler:
    """Open the sampler of this process: CPU, memory, open files and threads.

    Args:
        local_rank: Not used.
        emit: Not used.
        root: Where `proc` and `sys` are.

    """
    itself = psutil.Process()
    cgroup, utilization = Cgroup(root), Utilization()

    def cpu(now: float) -> Iterator[Observation]:
        quota = cgroup.cpu()
        usable: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
        if quota is not None:
            usable = min(usable, quota.limit)
        times = itself.cpu_times()
        for value in utilization(usable, times.user + times.system, now * usable):
            yield "process.cpu.utilization", value

    return Sampler(
        "process",
        {
            "cpu": cpu,
            "memory": lambda now: [("process.memory.usage", itself.memory_info().rss)],
            "files": lambda now: [("process.unix.file_descriptor.count", itself.num_fds())],
            "threads": lambda now: [("process.thread.count", itself.num_threads())],
        },
    )


class _Host:
    def __init__(self, root: Path) -> None:
        self._cgroup = Cgroup(root)
        self._sys = root / "sys"
        self._utilization = Utilization()
        self._bytes = CumulativeSum()

    def cpu(self, now: float) -> Iterator[Observation]:
        every = frozenset(range(psutil.cpu_count() or 1))
        usable = every & (self._cgroup.cpus() or every) or every
        quota = self._cgroup.cpu()
        if quota is not None and quota.limit < len(usable):
            values = self._utilization((quota.limit, quota.level), quota.used, now * quota.limit)
        elif usable == every:
            values = self._utilization("all", *_busy_and_total([psutil.cpu_times()]))
        else:
            each = psutil.cpu_times(percpu=True)
            times = [each[cpu] for cpu in sorted(usable) if cpu < len(each)]
            values = self._utilization(usable, *_busy_and_total(times))
        return (("system.cpu.utilization", value) for value in values)

    def memory(self, now: float) -> Iterator[Observation]:
        memory = psutil.virtual_memory()
        limit, used, cached = memory.total, memory.total - memory.available, max(0, memory.available - memory.free)
        allowed = self._cgroup.memory()
        if allowed is not None and allowed.limit < limit:
            limit, used, cached = allowed
        for state, size in {"used": used, "cached": cached, "free": max(0, limit - used - cached)}.items():
            yield "system.memory.usage", size, {"system.memory.state": state}
        yield "system.memory.limit", limit
        yield "system.memory.utilization", used / limit

    def disk(self, now: float) -> Iterator[Observation]:
        # Without psutil's correction of wrapped numbers: it keeps a lock, which a fork could inherit held.
        return self._io("disk", psutil.disk_io_counters(perdisk=True, nowrap=False) or {})

    def network(self, now: float) -> Iterator[Observation]:
        return self._io("network", psutil.net_io_counters(pernic=True, nowrap=False) or {})

    def _io(self, device: str, found: Mapping[str, Any]) -> Iterator[Observation]:
        folder, directions = IO[device]
        counters = {name: counter for name, counter in found.items() if name not in LOOPBACK}
        # Only devices, so that no byte counts twice: RAID sets, bridges and loops count where there is nothing else.
        real = [name for name in counters if (self._sys / folder / name / "device").exists()] or list(counters)
        for direction, field in directions.items() if real else ():
            for name in real:
                total = self._bytes(direction, getattr(counters[name], field), of=name)
            yield f"system.{device}.io", total, {f"{device}.io.direction": direction}


def _busy_and_total(times: list[Any]) -> tuple[float, float]:
    """Seconds of these CPUs so far; a guest's time is in `user` already."""
    total = sum(sum(each) - getattr(each, "guest", 0.0) - getattr(each, "guest_nice", 0.0) for each in times)
    return total - sum(each.idle + getattr(each, "iowait", 0.0) for each in times), total
