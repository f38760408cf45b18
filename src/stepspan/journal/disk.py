"""The disk as a session writer sees it: the system calls that can fail under load, and how much they may fill."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a disk a session may take, and how hard it holds on to what it wrote."""

    segment_bytes: int = 64 << 20
    """Size at which a segment is complete and the next one begins."""
    session_bytes: int = 10 << 30
    """Size of a session beyond which its oldest segments are removed."""
    free_bytes: int = 1 << 30
    """Nothing is written while less than this is free."""
    free_ratio: float = 0.02
    """Nor while less than this share of the file system is free."""
    sync_every: float | None = None
    """Seconds between fdatasync calls; 0: each event; None: never (survives the process, not a power cut)."""
    group_readable: bool = False
    """Whether the user's group may read the files."""


class Disk:
    """The system calls that can fail under load; tests inject faults here."""

    write = staticmethod(os.write)
    """(fd, data) -> bytes written by one call; OSError. Gives up the GIL."""

    def __init__(self) -> None:
        self.write_keeping_gil = ctypes.PyDLL(None).write
        """(fd, data, length) -> bytes written by one call, -1 for an error."""
        self.write_keeping_gil.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)
        self.write_keeping_gil.restype = ctypes.c_ssize_t

    def sync(self, fd: int) -> None:
        """Wait until the data of a file is on the disk. OSError."""
        getattr(os, "fdatasync", os.fsync)(fd)

    def low(self, fd: int, limits: Limits) -> bool:
        """Whether less is free on the file system of `fd` than the limits allow. OSError."""
        found = os.fstatvfs(fd)
        free = found.f_bavail * found.f_frsize
        return free < max(limits.free_bytes, limits.free_ratio * found.f_blocks * found.f_frsize)
