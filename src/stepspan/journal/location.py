"""Where journals go: the directory that was asked for or, where it takes no files, shared memory.

A directory that cannot be written costs a run its durability, not its telemetry. What lies in memory is bounded.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from stepspan.errors import ConfigError
from stepspan.journal.disk import Limits
from stepspan.journal.layout import writable_by_us

SHARED_MEMORY = "/dev/shm"
MAX_MEMORY_BYTES = 256 << 20
"""Of a journal that lies in memory, and of what it leaves free there."""
MEMORY_SHARE = 16
"""Such a journal takes at most this part of the memory's file system, and leaves as much free."""


class Location(NamedTuple):
    """Where a journal goes, within which limits, and whether that outlives the machine."""

    directory: Path
    limits: Limits
    durable: bool


def choose_location(directory: str | Path, limits: Limits) -> Location:
    """Make the directory, or fall back to memory where it can't be written.

    Args:
        directory: What was asked for; `~` and links of our own (or of root's) are followed.
        limits: What a journal may take there.

    Raises:
        ConfigError: `directory` is no path, lies below a file, or can't be written and neither can memory.

    """
    wanted = _followed(Path(os.path.abspath(os.path.expanduser(directory))))
    for parent in (wanted, *wanted.parents):
        if os.path.exists(parent):
            if not os.path.isdir(parent):
                raise ConfigError("directory", str(wanted), f"{parent} is a file: name a directory")
            break
    try:
        fresh = not os.path.exists(wanted)
        wanted.mkdir(mode=directory_mode(limits), parents=True, exist_ok=True)
        if fresh:
            (wanted / ".gitignore").write_text("*\n")
    except ValueError as error:
        raise ConfigError("directory", str(wanted), f"not a path: {error}") from None
    except OSError:
        pass
    if _takes_files(wanted):
        return Location(wanted, limits, durable=True)
    return _in_memory(wanted, limits)


def directory_mode(limits: Limits) -> int:
    """The permissions of the directories of a journal."""
    return 0o750 if limits.group_readable else 0o700


def _in_memory(wanted: Path, limits: Limits) -> Location:
    bases = (SHARED_MEMORY, os.environ.get("TMPDIR") or "/tmp")
    for base in bases:
        for name in (f"stepspan-{os.geteuid()}", f"stepspan-{os.geteuid()}-{os.urandom(4).hex()}"):
            directory = Path(base, name)
            with contextlib.suppress(OSError):
                directory.mkdir(mode=0o700, exist_ok=True)
            if _takes_files(directory):
                found = os.statvfs(directory)
                share = min(MAX_MEMORY_BYTES, found.f_blocks * found.f_frsize // MEMORY_SHARE)
                size = min(share, limits.session_bytes)
                segment = min(size // 4, limits.segment_bytes)
                bounded = replace(limits, session_bytes=size, segment_bytes=segment, free_bytes=share, free_ratio=0.0)
                return Location(directory, bounded, durable=False)
    fix = f"cannot be written, nor can {' or '.join(bases)}: name one that can"
    raise ConfigError("directory", str(wanted), fix)


def _followed(directory: Path) -> Path:
    """Where a directory really is, if it is a link of our own or root's; nobody else decides where we write."""
    try:
        trusted = directory.lstat().st_uid in {0, os.geteuid()}
    except (OSError, ValueError):
        return directory
    return directory.resolve() if trusted else directory


def _takes_files(directory: Path) -> bool:
    """Whether a directory is our own and takes a file: permissions don't know of a full disk."""
    if not writable_by_us(directory):
        return False
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
    except OSError:
        return False
    return True
