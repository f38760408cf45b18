"""The machine and the user: read once per process, attached to each record. What cannot be read is None."""

from __future__ import annotations

import getpass
import os
import platform
import re
import socket
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

CPU_MODEL = re.compile(r"^(?:model name|Hardware)\s*:\s*(.+)$", re.MULTILINE)


@lru_cache(maxsize=1)
def system() -> Mapping[str, Any]:
    """CPU model and count, total memory in bytes, GPU presence, model and count, host, platform, Python's version.

    cloudmesh's own four keys are among them: cpu, gpu_present, gpu_model, memory_total. Never raises. Where GPUs are
    powered down, the driver may take seconds to answer, the first time.
    """
    gpus = gpu_models()
    return {
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "memory_total": memory_total(),
        "gpu_present": bool(gpus),
        "gpu_model": gpus[0] if gpus else None,
        "gpu_count": len(gpus),
        "host": socket.gethostname(),
        "platform": sys.platform,
        "python": platform.python_version(),
    }


@lru_cache(maxsize=1)
def user() -> Mapping[str, Any]:
    """The user's name and the script that runs. Never raises."""
    try:
        name: str | None = getpass.getuser()
    except Exception:  # no variable and no entry in the password database: a container's bare uid
        name = str(os.geteuid()) if hasattr(os, "geteuid") else None
    return {"name": name, "script": os.path.basename(sys.argv[0]) if sys.argv else None}


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The processor's name as the system reports it; None where it does not."""
    try:
        found = CPU_MODEL.search(cpuinfo.read_text(errors="replace"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine() or None


def memory_total() -> int | None:
    """The machine's memory in bytes; None where it cannot be read."""
    try:
        import psutil

        return int(psutil.virtual_memory().total)
    except Exception:  # no psutil for this platform, or no /proc in this container
        return None


def gpu_models() -> list[str]:
    """The names of NVIDIA's GPUs; empty without a GPU, a driver or the library."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
            names = [pynvml.nvmlDeviceGetName(handle) for handle in handles]
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # ImportError, or NVMLError in one of its dozens of kinds
        return []
    return [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names]


RESOURCE: Mapping[str, tuple[str, str]] = {
    "host.cpu.model.name": ("system", "cpu"),
    "host.cpu.count": ("system", "cpu_count"),
    "host.memory.total": ("system", "memory_total"),
    "host.gpu.present": ("system", "gpu_present"),
    "host.gpu.model": ("system", "gpu_model"),
    "host.gpu.count": ("system", "gpu_count"),
    "user.name": ("user", "name"),
}
"""Resource attribute -> the record's part and key."""


def resource(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's system and user as attributes of a Resource."""
    found = {attribute: (record.get(part) or {}).get(key) for attribute, (part, key) in RESOURCE.items()}
    return {attribute: value for attribute, value in found.items() if isinstance(value, (str, bool, int, float))}
