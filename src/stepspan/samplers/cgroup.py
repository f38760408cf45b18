"""The limits of the cgroup that this process runs in, and how much of them is used: v2, or v1 as older hosts have it.

A limit holds for everything below it, so the tightest one between this process's cgroup and the root counts, and its
usage is read at the same level. Inside a container the path may be the host's: then the root of the mount is read.
Nothing is cached: limits may change while a process runs.

Files: https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MOUNT = "sys/fs/cgroup"


class MemoryUse(NamedTuple):
    """Bytes. `cached` are file pages not used recently, which the kernel reclaims before it kills a process."""

    limit: int
    used: int
    cached: int


class Cpu(NamedTuple):
    """How many CPUs may be used, the seconds of CPU used so far, and the folder of the cgroup that has the quota."""

    limit: float
    used: float
    level: Path


class Cgroup:
    """The cgroup of this process. `root`: where `proc` and `sys` are."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._unified = (root / MOUNT / "cgroup.controllers").exists()

    def memory(self) -> MemoryUse | None:
        """The tightest memory limit and its usage; None where there is no limit."""
        limit_file, used_file, cached_key = (
            ("memory.max", "memory.current", "inactive_file")
            if self._unified
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        limits = [(limit, level) for level in self._levels("memory") if (limit := _read_int(level / limit_file))]
        if not limits:
            return None
        limit, level = min(limits)
        used = _read_int(level / used_file)
        if used is None:
            return None
        cached = min(used, _read_table(level / "memory.stat").get(cached_key, 0))
        return MemoryUse(limit, used - cached, cached)

    def cpu(self) -> Cpu | None:
        """The tightest CPU quota and its usage; None where there is no quota."""
        quotas = [(quota, level) for level in self._levels("cpu") if (quota := self._quota(level))]
        if not quotas:
            return None
        limit, level = min(quotas)
        if self._unified:
            used = _read_table(level / "cpu.stat").get("usage_usec")
            return None if used is None else Cpu(limit, used / 1e6, level)
        mount = self._root / MOUNT
        used = _read_int(mount / "cpuacct" / level.relative_to(mount / "cpu") / "cpuacct.usage")
        return None if used is None else Cpu(limit, used / 1e9, level)

    def cpus(self) -> frozenset[int] | None:
        """The numbers of the CPUs that may be used; None where no cpuset is readable."""
        for level in self._levels("cpuset"):
            for file in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
                if listed := _read_text(level / file):
                    return frozenset(_parse_ranges(listed))
        return None

    def _quota(self, level: Path) -> float | None:
        """How many CPUs a cgroup allows; None where it sets no quota."""
        if self._unified:
            quota, _, period = _read_text(level / "cpu.max").partition(" ")
        else:
            quota, period = _read_text(level / "cpu.cfs_quota_us"), _read_text(level / "cpu.cfs_period_us")
        return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None

    def _levels(self, controller: str) -> list[Path]:
        """The folders from this process's cgroup up to the root of the mount."""
        mount = self._root / MOUNT if self._unified else self._root / MOUNT / controller
        path = ""
        for line in _read_text(self._root / "proc/self/cgroup").splitlines():
            _, controllers, found = line.split(":", 2)
            if controllers == "" if self._unified else controller in controllers.split(","):
                path = found
        parts = [part for part in path.split("/") if part]
        if ".." in parts or not mount.joinpath(*parts).is_dir():
            parts = []
        return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _read_text(file: Path) -> str:
    """The text of a file; "" where it cannot be read."""
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _read_int(file: Path) -> int | None:
    """The number in a file; None where there is none."""
    text = _read_text(file)
    return int(text) if text.isdigit() else None  # "max" means no limit


def _read_table(file: Path) -> dict[str, int]:
    """The numbers of a file of `key value` lines."""
    rows = (line.split() for line in _read_text(file).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def _parse_ranges(ranges: str) -> Iterator[int]:
    """The numbers of `0-3,8`."""
    for piece in ranges.split(","):
        first, _, last = piece.partition("-")
        yield from range(int(first), int(last or first) + 1)
