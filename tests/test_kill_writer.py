"""SIGKILL at any moment costs no event whose call has returned: a hundred writers under back-to-back load are killed.

This file is also the nursery of those writers, run as a program: it forks them, warm, waits until each has had 1,000
calls return, kills it a random moment later, and prints what it had acknowledged. The count of calls that returned lies
in shared memory, where the kill cannot take it away.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from harness.journals import SECOND, batches, logged
from harness.processes import under_load

import stepspan
from stepspan.journal.layout import SessionPath, find_sessions
from stepspan.journal.liveness import Closed, is_dead
from stepspan.journal.reader import JournalReader, last_event

KILLS, KILLS_BESIDE_A_CHILD = 100, 10
LEAST = 1000
END = Closed(10**18, 10**19, "")


# ---------------------------------------------------------------- the nursery


def write(directory: Path, shared: memoryview, *, with_child: bool, with_thread: bool) -> None:
    """Log as fast as it goes: `shared[0]` counts the calls that returned, `shared[1]` is the forked child.

    Beside a thread the writer takes its other way to the disk.
    """
    if with_thread:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    run = stepspan.start_run(directory=directory, job_id="kill")
    number = 0
    with run.epoch(0):
        for step in count():
            with run.step(step):
                for _ in range(5):
                    run.log_metrics({"n": number})
                    number += 1
                    shared[0] = number
            if with_child and step == 20:
                child = os.fork()
                if not child:
                    run.log_metrics({"n": -1})
                    shared[1] = os.getpid()
                    time.sleep(60)
                    os._exit(0)


def kill_one(directory: Path, *, with_child: bool, with_thread: bool) -> dict[str, Any]:
    with mmap.mmap(-1, 16) as memory, memoryview(memory) as raw, raw.cast("Q") as shared:
        writer = os.fork()
        if not writer:
            try:
                write(directory, shared, with_child=with_child, with_thread=with_thread)
            finally:
                os._exit(1)
        deadline = time.monotonic() + under_load(20)
        while shared[0] < LEAST or (with_child and not shared[1]):
            if time.monotonic() > deadline or os.waitpid(writer, os.WNOHANG)[0]:
                raise SystemExit("the writer does not write")
            time.sleep(0.0005)
        moment = time.perf_counter() + random.uniform(0, 0.01)
        while time.perf_counter() < moment:
            pass
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        return {"directory": str(directory), "acknowledged": shared[0], "child": shared[1]}


def nursery(place: Path, kills: int, with_child: bool) -> None:
    with stepspan.start_run(directory=place / "warm", job_id="warm") as run:  # so that no writer has to import
        run.log_metrics({"n": 0})
    for number in range(kills):
        with_thread = bool(number % 2) and not with_child
        found = kill_one(place / f"{number:03}", with_child=with_child, with_thread=with_thread)
        print(json.dumps(found), flush=True)  # noqa: T201 # its report


# ---------------------------------------------------------------- the test


def killed(place: Path, kills: int, *, with_child: bool) -> Iterator[tuple[Path, int, int]]:
    """(directory, acknowledged, pid of the child) of each killed writer, as soon as it is dead."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "STEPSPAN_"))}
    command = [sys.executable, __file__, str(place), str(kills), str(int(with_child))]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            found = json.loads(line)
            yield Path(found["directory"]), found["acknowledged"], found["child"]
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def assert_nothing_acknowledged_is_missing(session: SessionPath, acknowledged: int) -> None:
    reader = JournalReader(session)
    events = [event for batch in batches(reader, closed=END) for event in batch.events]
    damaged = sum(batch.counts.damaged for batch in batches(reader, closed=END))
    reader.close()
    assert acknowledged >= LEAST
    numbers = logged(events)
    assert numbers == list(range(len(numbers)))
    assert acknowledged <= len(numbers) <= acknowledged + 1, "one call at most was under way"
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert damaged == 0
    assert last_event(session) == (events[-1]["seq"], events[-1]["ts"])

    assert [event["tag"] for event in events[:3]] == ["header", "run_begin", "epoch_begin"]
    begun = [event for event in events if event["tag"] == "step_begin"]
    ended = {event["begin"] for event in events if event["tag"] == "step_end"}
    assert [event["step"] for event in begun] == list(range(len(begun)))
    assert {event["step"] for event in events if event["tag"] == "metrics"} <= {event["step"] for event in begun}
    assert len(begun) - len(ended) in {0, 1}
    assert {event["seq"] for event in begun[:-1]} <= ended, "only the last step may be open"
    assert events[-1]["ts"] - events[0]["ts"] < 30 * SECOND
    assert is_dead(session.path, reader.header, boot_id=reader.header["boot_id"], quiet_for=0, dead_after=900)


def test_a_hundred_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    kills = 0
    for directory, acknowledged, _ in killed(tmp_path, KILLS, with_child=False):
        (session,) = find_sessions(directory)
        assert_nothing_acknowledged_is_missing(session, acknowledged)
        kills += 1
    assert kills == KILLS


def test_a_forked_child_that_outlives_the_writer_changes_nothing(tmp_path: Path) -> None:
    kills = 0
    for directory, acknowledged, child in killed(tmp_path, KILLS_BESIDE_A_CHILD, with_child=True):
        try:
            os.kill(child, 0)  # it lives on
            session, childs = sorted(find_sessions(directory), key=lambda found: "worker" in found.path.name)
            assert_nothing_acknowledged_is_missing(session, acknowledged)
            reader = JournalReader(childs)
            header = reader.header
            assert logged(event for batch in batches(reader, closed=END) for event in batch.events) == [-1]
            reader.close()
            assert header["pid"] == child
            assert not is_dead(childs.path, header, boot_id=header["boot_id"], quiet_for=10_000, dead_after=900)
        finally:
            os.kill(child, signal.SIGKILL)
        kills += 1
    assert kills == KILLS_BESIDE_A_CHILD


if __name__ == "__main__":
    nursery(Path(sys.argv[1]), int(sys.argv[2]), bool(int(sys.argv[3])))
