"""The limits of the cgroup that this process runs in, and what is used of them: v2, or v1 as older hosts have it.

A limit holds for everything below it, so the tightest one between this process's cgroup and the root counts, and what
is used of it is what its own level says. Inside a container the path may be the host's: then it is the mount itself.

Files: https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MOUNT = "sys/fs/cgroup"


class Memory(NamedTuple):
    """Bytes. `cached` are file pages not used of late: the kernel takes them back before it kills anybody."""

    limit: int
    used: int
    cached: int


class Cpu(NamedTuple):
    """How many CPUs may be used, and the seconds of them used so far, by whom."""

    limit: float
    used: float
    where: Path


class Cgroup:
    """Nothing is kept but where the files are: limits may change."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._unified = (root / MOUNT / "cgroup.controllers").exists()

    def memory(self) -> Memory | None:
        """None: no limit."""
        limit_file, used_file, cached_key = (
            ("memory.max", "memory.current", "inactive_file")
            if self._unified
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        limits = [(limit, level) for level in self._levels("memory") if (limit := _number(level / limit_file))]
        if not limits:
            return None
        limit, level = min(limits)
        used = _number(level / used_file)
        if used is None:
            return None
        cached = min(used, _table(level / "memory.stat").get(cached_key, 0))
        return Memory(limit, used - cached, cached)

    def cpu(self) -> Cpu | None:
        """None: no quota."""
        quotas = [(quota, level) for level in self._levels("cpu") if (quota := self._quota(level))]
        if not quotas:
            return None
        limit, level = min(quotas)
        if self._unified:
            used = _table(level / "cpu.stat").get("usage_usec")
            return None if used is None else Cpu(limit, used / 1e6, level)
        mount = self._root / MOUNT
        used = _number(mount / "cpuacct" / level.relative_to(mount / "cpu") / "cpuacct.usage")
        return None if used is None else Cpu(limit, used / 1e9, level)

    def cpus(self) -> frozenset[int] | None:
        """The numbers of the CPUs that may be used; None: nobody says."""
        for level in self._levels("cpuset"):
            for file in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
                if listed := _text(level / file):
                    return frozenset(_expanded(listed))
        return None

    def _quota(self, level: Path) -> float | None:
        if self._unified:
            quota, _, period = (_text(level / "cpu.max") or "max").partition(" ")
        else:
            quota, period = _text(level / "cpu.cfs_quota_us") or "-1", _text(level / "cpu.cfs_period_us") or ""
        return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None

    def _levels(self, controller: str) -> list[Path]:
        """From this process's cgroup up to the root of the mount."""
        mount = self._root / MOUNT if self._unified else self._root / MOUNT / controller
        path = ""
        for line in (_text(self._root / "proc/self/cgroup") or "").splitlines():
            _, controllers, found = line.split(":", 2)
            if controllers == "" if self._unified else controller in controllers.split(","):
                path = found
        parts = [part for part in path.split("/") if part]
        if ".." in parts or not mount.joinpath(*parts).is_dir():
            parts = []
        return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _number(file: Path) -> int | None:
    text = _text(file) or ""
    return int(text) if text.isdigit() else None  # "max": no limit


def _table(file: Path) -> dict[str, int]:
    """`key value` lines."""
    rows = (line.split() for line in (_text(file) or "").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def _expanded(ranges: str) -> Iterator[int]:
    """The numbers of `0-3,8`."""
    for piece in ranges.split(","):
        first, _, last = piece.partition("-")
        yield from range(int(first), int(last or first) + 1)
