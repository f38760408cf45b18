"""The writer's promises: an event whose call returned is in the file, in order, whatever threads and signals do."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness.journals import (
    NOON,
    ROOMY,
    SECOND,
    HandClock,
    Interrupting,
    OpenJournal,
    Scope,
    assert_ordered,
    closed_of,
    handled,
    header,
    lines,
    log,
    logged,
    metrics,
    open_writer,
    session_of,
)
from harness.processes import under_load

from stepspan.journal import writer as writer_module
from stepspan.journal.clock import Clock
from stepspan.journal.disk import Disk
from stepspan.journal.format import decode
from stepspan.journal.layout import SessionPath, find_sessions, segment_name
from stepspan.journal.liveness import Closed, is_alive_here, read_closed
from stepspan.journal.writer import IDLE_THREADS, mostly_idle

# ---------------------------------------------------------------- a line


def test_a_session_is_a_header_then_the_events_then_its_end(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    scope = Scope()
    writer.append({"ts": 0, "seq": 0, "tag": "run_begin", "parent": 0, "name": "demo"}, scope)
    assert (scope.seq, scope.ts) == (2, writer.writer.ts)
    writer.append(metrics(1))
    writer.append({"ts": 0, "seq": 0, "tag": "run_end", "begin": 0, "status": "completed"}, scope)
    assert read_closed(writer.path) is None
    writer.close("completed")
    events = lines(writer.path)
    assert [event["tag"] for event in events] == ["header", "run_begin", "metrics", "run_end"]
    assert events[-1]["begin"] == 2
    assert_ordered(events)
    assert read_closed(writer.path) == Closed(4, events[-1]["ts"], "completed")
    assert sorted(os.listdir(writer.path)) == ["000001.jsonl", "closed.json", "lock"]


def test_every_event_stands_in_the_file_when_its_call_returns(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    for number in range(100):
        writer.append(metrics(number))
        assert logged(lines(writer.path))[-1] == number


def test_files_are_private(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    writer.close("completed")
    assert stat.S_IMODE(writer.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in writer.path.iterdir()} == {0o600}


def test_a_group_may_be_let_in(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        writer = open_writer(tmp_path, limits=replace(ROOMY, group_readable=True))
    finally:
        os.umask(before)
    assert stat.S_IMODE(writer.path.stat().st_mode) == 0o750
    assert stat.S_IMODE((writer.path / "000001.jsonl").stat().st_mode) == 0o640


@pytest.mark.parametrize("jump", [0, -5000, -SECOND], ids=["stands still", "goes back", "goes back a second"])
def test_time_grows_even_where_the_clock_does_not(tmp_path: Path, jump: int) -> None:
    clock = HandClock()
    writer = open_writer(tmp_path, clock=clock)
    for number in range(10):
        clock.now += jump - 1000
        writer.append(metrics(number))
    assert_ordered(lines(writer.path))


def test_the_clock_is_wall_time_that_cannot_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    assert abs(clock() - time.time_ns()) < 50_000_000
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    first = clock()
    assert NOON / 2 < first <= clock()


def test_an_event_that_cannot_be_encoded_leaves_no_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = open_writer(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(writer_module, "encode", lambda event: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            writer.append(metrics(0))
    writer.append(metrics(1))
    assert_ordered(lines(writer.path))


def test_late_calls_are_counted_and_touch_nothing(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    writer.close("completed")
    before = {file.name: file.read_bytes() for file in writer.path.iterdir()}
    log(writer, range(3))
    writer.close("failed")
    assert writer.lost == 3
    assert {file.name: file.read_bytes() for file in writer.path.iterdir()} == before


# ---------------------------------------------------------------- threads, signals, forks


def sleeper(begun: threading.Event, done: threading.Event) -> None:
    with mostly_idle():
        begun.set()
        done.wait()


def stranger(begun: threading.Event, done: threading.Event) -> None:
    begun.set()
    done.wait()


@pytest.mark.any_events
@pytest.mark.parametrize(
    ("others", "keeps"),
    [
        pytest.param([], False, id="alone: os.write"),
        pytest.param([stranger], True, id="beside a thread: PyDLL"),
        pytest.param([sleeper], False, id="beside one that sleeps: os.write"),
        pytest.param([sleeper, stranger], True, id="beside both: PyDLL"),
    ],
)
def test_both_ways_to_write_give_the_same_bytes(tmp_path: Path, others: list[Callable[..., None]], keeps: bool) -> None:
    done = threading.Event()
    beside = []
    for other in others:
        begun = threading.Event()
        beside.append(threading.Thread(target=other, args=(begun, done)))
        beside[-1].start()
        assert begun.wait(10)
    alone = threading.active_count() - len(IDLE_THREADS) == 1 + others.count(stranger)
    try:
        disk, kept = Disk(), []
        keep = disk.write_keeping_gil
        disk.write_keeping_gil = lambda fd, data, length: kept.append(length) or keep(fd, data, length)  # type: ignore[assignment, func-returns-value]
        writer = open_writer(tmp_path, disk=disk)
        writer.append(metrics(1, name="\0 and ü"))
        writer.append(metrics(2, big="x" * 3_000_000))
        assert len(kept) == (2 if keeps or not alone else 0)
    finally:
        done.set()
        for thread in beside:
            thread.join()
    assert [event["seq"] for event in lines(writer.path)] == [1, 2, 3]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_write_that_fails_at_the_system_call_is_seen_either_way(tmp_path: Path) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        assert Disk().write_keeping_gil(fd, b"x", 1) == -1
        with pytest.raises(OSError, match="No space left"):
            Disk().write(fd, b"x")
    finally:
        os.close(fd)


def test_eight_threads_make_one_order(tmp_path: Path) -> None:
    threads, each = 8, 2000
    writer = OpenJournal(tmp_path, header(), limits=replace(ROOMY, segment_bytes=100_000))
    start = threading.Barrier(threads)

    def work(thread: int) -> None:
        start.wait()
        log(writer, range(thread * each, (thread + 1) * each))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(before)
    events = lines(writer.path)
    assert_ordered(events)
    numbers = logged(events)
    assert sorted(numbers) == list(range(threads * each))
    for thread in range(threads):
        own = [number for number in numbers if number // each == thread]
        assert own == sorted(own), "each thread's events stand in the order of its calls"


def test_a_handler_that_logs_in_the_middle_of_a_write_is_written_after_it(tmp_path: Path) -> None:
    writer = OpenJournal(tmp_path, header(), limits=ROOMY, clock=Interrupting({2, 5}))
    scope = Scope()

    def handler(*_: object) -> None:
        writer.append({"ts": 0, "seq": 0, "tag": "span_begin", "parent": 0, "name": "requeue"}, scope)
        writer.append(metrics(1000))
        writer.append({"ts": 0, "seq": 0, "tag": "span_end", "begin": 0}, scope)

    with handled(signal.SIGUSR1, handler):
        log(writer, range(3))
    events = lines(writer.path)
    assert_ordered(events)
    assert [event["tag"] for event in events if event["tag"].startswith("span")] == ["span_begin", "span_end"] * 2
    assert sorted(logged(events)) == [0, 1, 2, 1000, 1000]
    begins = [event["seq"] for event in events if event["tag"] == "span_begin"]
    assert [event["begin"] for event in events if event["tag"] == "span_end"] == begins


HAMMER = """
import os, random, sys
from time import perf_counter
pid, number, until = int(sys.argv[1]), int(sys.argv[2]), perf_counter() + 20
print("ready", flush=True)
while perf_counter() < until:
    os.kill(pid, number)
    pause = perf_counter() + random.uniform(20e-6, 100e-6)  # faster than handlers run, they only nest
    while perf_counter() < pause:
        pass
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("source", ["timer", "kill"])
def test_real_signals_lose_nothing_and_lock_nothing(tmp_path: Path, source: str) -> None:
    writer = OpenJournal(tmp_path, header(), limits=replace(ROOMY, segment_bytes=200_000))
    number = signal.SIGVTALRM if source == "timer" else signal.SIGUSR1
    wanted = 100 if source == "timer" else 1000
    handled_calls = 0

    def handler(*_: object) -> None:
        nonlocal handled_calls
        writer.append(metrics(-1))
        handled_calls += 1

    calls = 0
    with handled(number, handler):
        hammer = None
        if source == "timer":
            signal.setitimer(signal.ITIMER_VIRTUAL, 1e-4, 1e-4)
        else:
            command = [sys.executable, "-c", HAMMER, str(os.getpid()), str(int(number))]
            hammer = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert hammer.stdout is not None
            assert hammer.stdout.readline() == b"ready\n"
        try:
            deadline = time.monotonic() + under_load(3)
            while (handled_calls < wanted or calls < 20_000) and time.monotonic() < deadline:
                writer.append(metrics(calls))
                calls += 1
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            if hammer:
                hammer.kill()
                hammer.communicate()
    assert handled_calls > 50
    events = lines(writer.path)
    assert_ordered(events)
    numbers = logged(events)
    assert [n for n in numbers if n >= 0] == list(range(calls))
    assert numbers.count(-1) == handled_calls


@pytest.mark.parametrize("looks", [set(), {3}], ids=["alone", "a handler logged as the second was crossed"])
def test_upkeep_may_wait_for_a_thread_that_logs(tmp_path: Path, looks: set[int]) -> None:
    passed: list[Any] = []

    def upkeep() -> None:
        beside = threading.Thread(target=writer.append, args=(metrics(2),), daemon=True)
        beside.start()
        beside.join(10)
        passed.append(not beside.is_alive())

    writer = OpenJournal(tmp_path, header(), limits=ROOMY, clock=Interrupting(looks), upkeep=upkeep)
    with handled(signal.SIGUSR1, lambda *_: writer.append(metrics(1000))):
        writer.append(metrics(1))
    assert passed == [True]
    assert logged(lines(writer.path)) == [1, *[1000] * len(looks), 2]


def test_a_handler_that_closes_in_the_middle_of_a_write_ends_the_session_once(tmp_path: Path) -> None:
    writer = OpenJournal(tmp_path, header(), limits=ROOMY, clock=Interrupting({4}))
    with handled(signal.SIGUSR1, lambda *_: writer.close("interrupted")):
        log(writer, range(3))
    assert logged(lines(writer.path)) + [0] * writer.lost == [0, 0, 0]
    closed = read_closed(writer.path)
    assert closed is not None
    assert closed.status == "interrupted"


def test_an_event_that_cannot_be_encoded_as_the_session_ends_costs_that_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Interrupting(set())
    writer = OpenJournal(tmp_path, header(), limits=ROOMY, clock=clock)
    writer.append(metrics(0))
    writer._interrupting.append((metrics(1), None, writer.session))
    monkeypatch.setattr(writer_module, "encode", lambda event: 1 / 0)
    writer.close("completed")
    assert writer.lost == 1
    assert closed_of(writer.path).status == "completed"
    assert writer.writer.closed
    assert not is_alive_here(writer.path)
    assert logged(lines(writer.path)) == [0]


# ---------------------------------------------------------------- segments


def test_segments_follow_each_other_and_each_begins_with_the_header(tmp_path: Path) -> None:
    writer = open_writer(tmp_path, limits=replace(ROOMY, segment_bytes=1000))
    log(writer, range(100))
    writer.close("completed")
    segments = session_of(writer.path).segments()
    assert segments == list(range(1, len(segments) + 1))
    assert len(segments) > 5
    for number in segments:
        first, *_ = (writer.path / segment_name(number)).read_bytes().split(b"\n")
        assert {**decode(first), "ts": 0, "seq": 0, "crc": 0} == {**header(), "crc": 0}
        assert (writer.path / segment_name(number)).stat().st_size < 1000 + 500
    assert_ordered(lines(writer.path))
    assert logged(lines(writer.path)) == list(range(100))


def test_the_oldest_segments_go_when_a_session_is_too_large(tmp_path: Path) -> None:
    writer = open_writer(tmp_path, limits=replace(ROOMY, segment_bytes=2000, session_bytes=10_000))
    log(writer, range(2000))
    segments = session_of(writer.path).segments()
    assert segments[0] > 1
    assert segments == list(range(segments[0], segments[-1] + 1))
    assert 5_000 < sum((writer.path / segment_name(n)).stat().st_size for n in segments) <= 12_500
    numbers = logged(lines(writer.path))
    assert numbers == list(range(numbers[0], 2000))


def test_a_segment_that_cannot_be_made_leaves_the_old_one_in_use(tmp_path: Path) -> None:
    writer = open_writer(tmp_path, limits=replace(ROOMY, segment_bytes=1000))
    obstacle = writer.path / segment_name(2)
    obstacle.mkdir()
    log(writer, range(20))
    assert isinstance(writer.error, (FileExistsError, IsADirectoryError))
    assert logged(decode(line) for line in (writer.path / segment_name(1)).read_bytes().splitlines()) == [*range(20)]
    obstacle.rmdir()
    log(writer, range(20, 23))
    assert session_of(writer.path).segments() == [1, 2]
    assert logged(lines(writer.path)) == list(range(23))


def test_a_sessions_place_is_found_again(tmp_path: Path) -> None:
    writers = [
        open_writer(tmp_path, session=f"{n:016x}", rank=n, role=role) for n, role in [(0, ""), (70000, "worker1")]
    ]
    assert [(found.rank, found.session) for found in find_sessions(tmp_path)] == [
        (0, "0" * 16),
        (70000, f"{70000:016x}"),
    ]
    assert SessionPath.of(writers[0].path) == SessionPath(writers[0].path, 0, "0" * 16)
