"""The disk as a session writer sees it: the system calls that can fail under load, and how much they may fill."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

FREE_BYTES = 1 << 30
FREE_RATIO = 0.02
MAX_SHARE_BYTES = 10 << 30
"""Of a file system's share that is kept free: a large one would be low while there is room for a thousand runs."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a disk a session may take, and how hard it holds on to what it wrote."""

    segment_bytes: int = 64 << 20
    """Size at which a segment is complete and the next one begins."""
    session_bytes: int = 10 << 30
    """Size of a session beyond which its oldest segments are removed."""
    free_bytes: int | None = None
    """A session does not grow while less than this is free; None: 1 GiB, or a tenth of a smaller file system."""
    free_ratio: float | None = None
    """Nor while less than this share of the file system is free; None: 2%, and no more than 10 GiB."""
    sync_every: float | None = None
    """Seconds between fdatasync calls; 0: each event; None: never (survives the process, not a power cut)."""
    group_readable: bool = False
    """Whether the user's group may read the files."""

    def kept_free(self, size: int) -> int:
        """How many bytes are kept free on a file system of `size` bytes: a share, but no more than anybody needs."""
        least = min(FREE_BYTES, size // 10) if self.free_bytes is None else self.free_bytes
        share = min(int(FREE_RATIO * size), MAX_SHARE_BYTES) if self.free_ratio is None else int(self.free_ratio * size)
        return max(least, share)


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

    def free_and_size(self, fd: int) -> tuple[int, int]:
        """Bytes that are free on the file system of `fd`, and its size. OSError."""
        found = os.fstatvfs(fd)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
