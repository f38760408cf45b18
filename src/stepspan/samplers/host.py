"""The host and this process, through psutil; in a container, by what its cgroup allows and not by what the host has.

Names: https://opentelemetry.io/docs/specs/semconv/system/system-metrics/ and .../process-metrics/. Of memory, `used` is
what cannot be had back, `cached` what can, `free` what nobody uses; together they are the limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from stepspan.samplers.cgroup import Cgroup
from stepspan.samplers.sampling import Emit, Growth, Share, Source, Value

ROOT = Path("/")


def host(local_rank: int, emit: Emit, *, root: Path = ROOT) -> Source:
    """CPU, memory, disk and network of this host, or of what this container may use of it."""
    reading = _Host(root)
    return Source(
        "host",
        {"cpu": reading.cpu, "memory": reading.memory, "disk": reading.disk, "network": reading.network},
    )


def process(local_rank: int, emit: Emit, *, root: Path = ROOT) -> Source:
    """CPU, memory, open files and threads of this process."""
    reading = _Process(root)
    return Source(
        "process",
        {
            "cpu": reading.cpu,
            "memory": lambda now: [("process.memory.usage", reading.process.memory_info().rss)],
            "files": lambda now: [("process.unix.file_descriptor.count", reading.process.num_fds())],
            "threads": lambda now: [("process.thread.count", reading.process.num_threads())],
        },
    )


class _Host:
    def __init__(self, root: Path) -> None:
        self._cgroup = Cgroup(root)
        self._sys = root / "sys"
        self._busy = Share()
        self._bytes = Growth()

    def cpu(self, now: float) -> Iterator[Value]:
        usable = _usable(self._cgroup.cpus())
        quota = self._cgroup.cpu()
        if quota is not None and quota.limit < len(usable):
            shares = self._busy(quota[::2], quota.used, now * quota.limit)
        elif len(usable) == (psutil.cpu_count() or 1):
            shares = self._busy("all", *_busy_and_whole([psutil.cpu_times()]))
        else:
            each = psutil.cpu_times(percpu=True)
            shares = self._busy(usable, *_busy_and_whole([each[cpu] for cpu in sorted(usable) if cpu < len(each)]))
        return (("system.cpu.utilization", share) for share in shares)

    def memory(self, now: float) -> Iterator[Value]:
        memory = psutil.virtual_memory()
        limit, used, cached = memory.total, memory.total - memory.available, max(0, memory.available - memory.free)
        own = self._cgroup.memory()
        if own is not None and own.limit < limit:
            limit, used, cached = own
        for state, size in {"used": used, "cached": cached, "free": max(0, limit - used - cached)}.items():
            yield "system.memory.usage", size, {"system.memory.state": state}
        yield "system.memory.limit", limit
        yield "system.memory.utilization", used / limit

    def disk(self, now: float) -> Iterator[Value]:
        # Without psutil's correction of wrapped numbers: it keeps a lock, which a fork could inherit held.
        disks: dict[str, Any] = psutil.disk_io_counters(perdisk=True, nowrap=False) or {}
        for name in self._real(disks, "block"):
            read = self._bytes("read", disks[name].read_bytes, of=name)
            written = self._bytes("write", disks[name].write_bytes, of=name)
        if disks:
            yield "system.disk.io", read, {"disk.io.direction": "read"}
            yield "system.disk.io", written, {"disk.io.direction": "write"}

    def network(self, now: float) -> Iterator[Value]:
        cards: dict[str, Any] = psutil.net_io_counters(pernic=True, nowrap=False) or {}
        cards = {name: card for name, card in cards.items() if name not in {"lo", "lo0"}}
        for name in self._real(cards, "class/net"):
            received = self._bytes("receive", cards[name].bytes_recv, of=name)
            sent = self._bytes("transmit", cards[name].bytes_sent, of=name)
        if cards:
            yield "system.network.io", received, {"network.io.direction": "receive"}
            yield "system.network.io", sent, {"network.io.direction": "transmit"}

    def _real(self, names: dict[str, Any], kind: str) -> list[str]:
        """Those that are devices, so that no byte counts twice: not RAID sets, bridges, loops. None of them: all."""
        return [name for name in names if (self._sys / kind / name / "device").exists()] or list(names)


class _Process:
    def __init__(self, root: Path) -> None:
        self.process = psutil.Process()
        self._cgroup = Cgroup(root)
        self._busy = Share()

    def cpu(self, now: float) -> Iterator[Value]:
        quota = self._cgroup.cpu()
        usable: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
        if quota is not None:
            usable = min(usable, quota.limit)
        times = self.process.cpu_times()
        shares = self._busy(usable, times.user + times.system, now * usable)
        return (("process.cpu.utilization", share) for share in shares)


def _usable(allowed: frozenset[int] | None) -> frozenset[int]:
    every = frozenset(range(psutil.cpu_count() or 1))
    return (allowed & every or every) if allowed is not None else every


def _busy_and_whole(times: list[Any]) -> tuple[float, float]:
    """Seconds; a guest's time is in `user` already."""
    whole = sum(sum(each) - getattr(each, "guest", 0.0) - getattr(each, "guest_nice", 0.0) for each in times)
    return whole - sum(each.idle + getattr(each, "iowait", 0.0) for each in times), whole
