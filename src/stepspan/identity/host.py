"""What the host says about this process: the one part of identity that reads anything itself."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stepspan.identity.launchers import MARKS


class Process(NamedTuple):
    """An ancestor of this process. Pid and start time name it as long as its host is up.

    Args:
        pid: Its process id.
        start: Its start time, in whatever unit the system has.
        marks: The launchers' marks in its environment; none if we may not read it.

    """

    pid: int
    start: str
    marks: frozenset[str] = frozenset()


class HostFacts(NamedTuple):
    """Where and when `start_run` was called: all that `resolve` may know in addition to arguments and environment.

    Args:
        host: The host's name.
        boot_id: Names the host's time since it was booted.
        ancestors: The parent process first, then its parent, and so on.
        script: `sys.argv[0]`.
        now_ns: Unix time in nanoseconds.
        token: 32 random hexadecimal digits, new for each `start_run`.

    """

    host: str
    boot_id: str
    ancestors: tuple[Process, ...]
    script: str
    now_ns: int
    token: str


def host_facts() -> HostFacts:
    """Read the facts of this call. Of other processes' environments only the names of launchers' marks are kept."""
    boot_file = Path("/proc/sys/kernel/random/boot_id")
    linux = boot_file.exists()
    return HostFacts(
        host=socket.gethostname(),
        boot_id=boot_file.read_text().strip() if linux else _boot_time(),
        ancestors=tuple(_from_proc(os.getppid(), MARKS) if linux else _from_psutil(MARKS)),
        script=sys.argv[0] if sys.argv else "",
        now_ns=time.time_ns(),
        token=secrets.token_hex(16),
    )


def _from_proc(pid: int, marks: frozenset[str]) -> Iterator[Process]:
    """From `pid` up to the first process of this PID namespace, or to one that we may not see."""
    while pid:
        try:
            # After the program's name, which may hold spaces and brackets: state, parent, ..., start time (field 22).
            stat = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:  # of another user
            environ = b""
        names = {os.fsdecode(variable.partition(b"=")[0]) for variable in environ.split(b"\0")}
        yield Process(pid, stat[19].decode(), marks & names)
        pid = int(stat[1])


def _from_psutil(marks: frozenset[str]) -> Iterator[Process]:
    """The same where there is no /proc (macOS)."""
    import psutil

    for process in psutil.Process().parents():
        try:
            names = set(process.environ())
        except psutil.Error:
            names = set()
        yield Process(process.pid, str(process.create_time()), marks & names)


def _boot_time() -> str:
    import psutil

    return str(int(psutil.boot_time()))
