"""Processes that start at one instant under one job and rank: each has series of its own, whatever host it is on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.runs import is_ours

from stepspan.journal import liveness
from stepspan.journal.liveness import exclusive

PROCESS = """
import errno, fcntl, os, socket, sys
from pathlib import Path
import stepspan, stepspan.config, stepspan.deliver.delivery, stepspan.identity
directory, host, locks = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
socket.gethostname = lambda: host
if locks == "none":
    flock = fcntl.flock
    def refused(fd, how):
        if os.readlink(f"/proc/self/fd/{fd}").startswith(str(directory)):
            raise OSError(errno.ENOLCK, "no locks available")
        return flock(fd, how)
    fcntl.flock = refused
print("ready", flush=True)
while not (directory / "go").exists():
    pass
run = stepspan.start_run(job_id="job", rank=3, world_size=8, directory=directory / "runs")
print(run.identity.instance, flush=True)
sys.stdin.readline()
run.close()
"""


def instances(directory: Path, hosts: list[str], locks: str) -> list[str]:
    """What as many processes go by that begin a run at once, all of them alive."""
    inherited = {name: value for name, value in os.environ.items() if not is_ours(name)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(directory), host, locks],
            env={**inherited, "STEPSPAN_SAMPLERS": "none", "TMPDIR": str(directory.parent)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for host in hosts
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        (directory / "go").touch()
        return [process.stdout.readline().strip() for process in processes if process.stdout is not None]
    finally:
        for process in processes:
            process.communicate("\n", timeout=60)


@pytest.mark.parametrize(
    ("hosts", "locks"),
    [(["one", "two", "three"] * 2, "flock"), (["one"] * 5, "none")],
    ids=["three hosts on one file system", "a file system without locks"],
)
def test_no_two_have_one_instance(tmp_path: Path, hosts: list[str], locks: str) -> None:
    (tmp_path / "shared").mkdir()
    found = instances(tmp_path / "shared", hosts, locks)
    duplicates = {f"job-3-twin{number}" for number in range(1, len(hosts))}
    assert sorted(found) == sorted({"job-3", *duplicates})


def held_in_child(path: Path) -> tuple[int, int]:
    """The pid of a process that has the file to itself, and the descriptor that ends it once it is closed."""
    is_held, held = os.pipe()
    may_end, end = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.close(end)
            with exclusive(path):
                os.write(held, b".")
                os.read(may_end, 1)
        finally:
            os._exit(0)
    os.close(held)
    os.close(may_end)
    os.read(is_held, 1)
    os.close(is_held)
    return child, end


def test_what_fails_within_a_claim_fails(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), exclusive(tmp_path / "claim"):
        raise OSError("full")
    with exclusive(tmp_path / "claim"):
        pass


def test_one_holder_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "EXCLUSIVE_TIMEOUT_S", 0.2)
    child, end = held_in_child(tmp_path / "claim")
    begun = time.monotonic()
    with exclusive(tmp_path / "claim"):
        assert time.monotonic() - begun >= 0.2
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it still has it"
    os.close(end)
    os.waitpid(child, 0)


def test_many_that_take_turns_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "EXCLUSIVE_TIMEOUT_S", 1.0)
    read_end, write_end = os.pipe()
    waiting = []
    for _ in range(6):
        if (pid := os.fork()) == 0:
            with exclusive(tmp_path / "claim"):
                os.write(write_end, b"(")
                time.sleep(0.25)
                os.write(write_end, b")")
            os._exit(0)
        waiting.append(pid)
    for pid in waiting:
        os.waitpid(pid, 0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as file:
        assert file.read() == b"()" * 6, "each at its time, though the last waited for longer than one may"
