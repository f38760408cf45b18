"""Ranks as processes of their own, and the deliverers that they start: found by their directory, ended by their pid."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.runs import is_ours

RANK = """
import os, sys, time
from pathlib import Path
import stepspan
from stepspan.deliver.delivery import ProcessDelivery

directory, rank, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
ProcessDelivery.check_interval_s = 0.05
run = stepspan.start_run(directory=directory, job_id="job", rank=rank, local_rank=rank, world_size=2)
step, closing = 0, time.monotonic()
try:
    with run:
        while step < count or (not count and not (directory / "stop").exists()):
            with run.step(step):
                run.log_metrics({"loss": step})
            step += 1
            time.sleep(0.002)
            run._delivery.watch()
        closing = time.monotonic()
finally:
    print(f"{step} {time.monotonic() - closing}", flush=True)
"""
"""Logs steps until `stop` lies in the directory, or so many; prints how many, and the seconds that the end took."""


class Ranks:
    """Ranks that write below `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.running: list[subprocess.Popen[str]] = []

    def start(self, rank: int = 0, *, count: int = 0, **env: str) -> subprocess.Popen[str]:
        inherited = {name: value for name, value in os.environ.items() if not is_ours(name)}
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", RANK, str(self.directory), str(rank), str(count)],
            env={**inherited, "NO_PROXY": "*", **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.running.append(process)
        return process

    def stop(self) -> list[tuple[int, float]]:
        """Let all of them end; the steps of each, and the seconds that its end took."""
        (self.directory / "stop").touch()
        return [self.ended(process) for process in self.running]

    def ended(self, process: subprocess.Popen[str]) -> tuple[int, float]:
        out, err = process.communicate(timeout=under_load(30))
        assert process.returncode == 0, err
        steps, seconds = out.split()
        return int(steps), float(seconds)

    def deliverers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                ours = "stepspan.deliver.process" in line and str(self.directory) in line
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def at_work(self) -> list[psutil.Process]:
        """The deliverers that hold a lock: one that finds it taken ends by itself."""
        found = []
        for process in self.deliverers():
            with contextlib.suppress(psutil.Error):
                if len(process.threads()) > 1:
                    found.append(process)
        return found


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    """Asked for by `ranks = processes.ranks`; nothing of them is left running."""
    (tmp_path / "runs").mkdir()
    found = Ranks(tmp_path / "runs")
    yield found
    for process in found.running:
        if process.poll() is None:
            process.kill()
        process.communicate()
    for deliverer in found.deliverers():
        with contextlib.suppress(psutil.NoSuchProcess):
            deliverer.kill()
    until(lambda: not found.deliverers())


def under_load(seconds: float) -> float:
    """The time that something may take here which takes at most `seconds` where no other work waits for a processor."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def status_of_child(pid: int) -> int:
    """What `os.waitpid` says of a forked child that ends; one that hangs is killed, and the test fails."""
    try:
        return int(until(lambda: [status for done, status in (os.waitpid(pid, os.WNOHANG),) if done])[0])
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What the condition says, once it says something; it has `seconds`, and more where the machine is busy."""
    deadline = time.monotonic() + under_load(seconds)
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)
    return found
