"""A session whatever happens: a fork, a session closed under its writer, a place that takes no files."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from harness.journals import (
    NOON,
    ROOMY,
    FaultyDisk,
    HandClock,
    Interrupting,
    Scope,
    assert_ordered,
    fill,
    handled,
    header,
    lines,
    logged,
    metrics,
    small_file_system,
)
from harness.processes import status_of_child

from stepspan.errors import ConfigError
from stepspan.events import Event
from stepspan.journal import location
from stepspan.journal.journal import Journal
from stepspan.journal.layout import find_sessions
from stepspan.journal.liveness import Closed, read_closed, write_closed
from stepspan.journal.writer import SessionWriter


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; its exit code."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(status_of_child(pid))


sessions = count()


def exporter_in(directory: Path, **arguments: Any) -> Journal:
    """An exporter whose sessions are numbered."""
    exporter = Journal(directory, **{"limits": ROOMY, **arguments})
    exporter.open(lambda: header(f"{os.getpid():08x}{next(sessions):08x}"), job_id="job", host="node")
    return exporter


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "small", "256k") as place:
        yield place


@pytest.mark.parametrize("below", ["", "runs", "runs/deep"])
def test_a_file_where_a_directory_should_be_is_a_wrong_setting(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file: name a directory") as caught:
        Journal(tmp_path / "file" / below)
    assert caught.value.field == "directory"
    assert caught.value.value == str(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_path_that_is_none_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match="null byte"):
        Journal("runs\0")


def test_a_fresh_directory_is_private_and_ignored_by_git(tmp_path: Path) -> None:
    exporter = exporter_in(tmp_path / "a" / "runs")
    assert (tmp_path / "a" / "runs" / ".gitignore").read_text() == "*\n"
    assert exporter.session is not None
    made = [exporter.session.path, *exporter.session.path.parents][:4]
    assert [path.name for path in made][1:] == ["node", "job", "runs"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o700] * 4
    exporter_in(tmp_path)
    assert not (tmp_path / ".gitignore").exists(), "a directory of the user's own is left as it is"


def test_a_link_of_our_own_to_the_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to("scratch")
    exporter = exporter_in(tmp_path / "runs")
    assert exporter.durable
    assert exporter.directory == (tmp_path / "scratch").resolve()


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for shared memory."""
    place = tmp_path / "shm"
    place.mkdir()
    monkeypatch.setattr(location, "SHARED_MEMORY", str(place))
    return place


def refuse(monkeypatch: pytest.MonkeyPatch, *refused: Path) -> None:
    monkeypatch.setattr(
        location,
        "_takes_files",
        lambda path: not any(path.is_relative_to(place) for place in refused) and path.is_dir(),
    )


def test_a_directory_that_cannot_be_written_is_replaced_by_memory(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, tmp_path / "runs")
    exporter = exporter_in(tmp_path / "runs")
    assert not exporter.durable
    assert exporter.directory == memory / f"stepspan-{os.geteuid()}"
    exporter.append(metrics(1))
    assert exporter.session is not None
    assert logged(lines(exporter.session.path)) == [1]
    size = os.statvfs(memory).f_blocks * os.statvfs(memory).f_frsize
    assert exporter.limits.session_bytes <= min(256 << 20, size // 16)
    assert exporter.limits.segment_bytes * 4 <= exporter.limits.session_bytes


def test_a_place_in_memory_that_is_somebody_elses_is_not_used(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir()
    (memory / f"stepspan-{os.geteuid()}").symlink_to(tmp_path / "theirs")
    judged = location._takes_files
    monkeypatch.setattr(location, "_takes_files", lambda path: path != tmp_path / "runs" and judged(path))
    exporter = exporter_in(tmp_path / "runs")
    assert exporter.directory.parent == memory
    assert exporter.directory.name.startswith(f"stepspan-{os.geteuid()}-")
    assert os.listdir(tmp_path / "theirs") == []


def test_nowhere_to_write_is_said_at_once(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "_takes_files", lambda path: False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot be written, nor can .*: name one that can") as caught:
        Journal(tmp_path / "runs")
    assert caught.value.value == str(tmp_path / "runs")


def test_a_read_only_file_system_is_seen(small_disk: Path, memory: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for directory in (small_disk, small_disk / "runs"):
        assert exporter_in(directory).directory.parent == memory
    assert os.listdir(small_disk) == []


def test_a_full_file_system_is_seen_before_the_first_event(small_disk: Path, memory: Path) -> None:
    fill(small_disk)
    assert not exporter_in(small_disk).durable
    assert os.listdir(small_disk) == ["ballast"]


def test_a_directory_of_somebody_elses_is_not_written(tmp_path: Path, memory: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving a directory away needs root")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    theirs.chmod(0o777)
    assert not exporter_in(theirs).durable
    assert os.listdir(theirs) == []
    (tmp_path / "link").symlink_to(tmp_path)
    os.chown(tmp_path / "link", 12345, 12345, follow_symlinks=False)
    assert not exporter_in(tmp_path / "link").durable, "nor do we follow somebody else's link"


def taken(writer: SessionWriter) -> None:
    """What a deliverer does that found the session silent."""
    write_closed(writer.path, Closed(writer.seq, writer.ts, "interrupted"), by="deliverer")


def of_sessions(directory: Path) -> list[list[Event]]:
    """The events of all sessions, by the time of their first."""
    return sorted((lines(session.path) for session in find_sessions(directory)), key=lambda events: events[0]["ts"])


def test_a_writer_whose_session_was_closed_goes_on_in_a_new_one(tmp_path: Path) -> None:
    clock = HandClock()
    exporter = exporter_in(tmp_path, clock=clock)
    first = exporter.session
    assert first is not None
    scope = Scope()
    exporter.append({"ts": 0, "seq": 0, "tag": "run_begin", "parent": 0, "name": "demo"}, scope)
    exporter.append(metrics(1))
    taken(first)
    clock.skip(900)
    exporter.append({"ts": 0, "seq": 0, "tag": "step_begin", "parent": scope.seq, "step": 7, "split": "train"}, Scope())
    exporter.append(metrics(2))
    assert exporter.session is not first
    exporter.close("completed")
    old, new = of_sessions(tmp_path)
    assert logged(old) == [1]
    assert read_closed(first.path) == Closed(old[-1]["seq"], old[-1]["ts"], "interrupted")
    assert [event["tag"] for event in new] == ["header", "step_begin", "metrics"]
    assert new[1]["parent"] == 0, "what it lay in has ended with the old session"
    assert_ordered(new)
    assert first.closed
    assert logged(lines(first.path)) == [1]


def test_the_end_of_what_began_in_a_closed_session_is_not_written_to_the_next(tmp_path: Path) -> None:
    clock = HandClock()
    exporter = exporter_in(tmp_path, clock=clock)
    scope = Scope()
    exporter.append({"ts": 0, "seq": 0, "tag": "span_begin", "parent": 0, "name": "x"}, scope)
    assert exporter.session is not None
    taken(exporter.session)
    clock.skip(900)
    exporter.append({"ts": 0, "seq": 0, "tag": "span_end", "begin": 0}, scope)
    exporter.append(metrics(1))
    assert [[event["tag"] for event in events] for events in of_sessions(tmp_path)] == [
        ["header", "span_begin"],
        ["header", "metrics"],
    ]


def test_threads_that_find_their_session_closed_meet_in_one_new_session(tmp_path: Path) -> None:
    exporter = exporter_in(tmp_path)
    threads, each, rounds = 8, 5, 10
    meet = threading.Barrier(threads)

    def close_session() -> None:
        assert exporter.session is not None
        taken(exporter.session)
        exporter._next_check = exporter._next_maintenance = 0  # due

    def work(thread: int) -> None:
        for turn in range(rounds):
            if meet.wait() == 0:
                close_session()
            meet.wait()
            for number in range(each):
                exporter.append(metrics((turn * threads + thread) * each + number))

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
    first, *others = of_sessions(tmp_path)
    assert logged(first) == []
    assert len(others) == rounds
    for turn, events in enumerate(others):
        assert sorted(logged(events)) == list(range(turn * threads * each, (turn + 1) * threads * each))
        assert_ordered(events)


def test_what_waited_in_a_closed_session_is_counted_in_the_next(tmp_path: Path) -> None:
    clock, disk = HandClock(), FaultyDisk()
    exporter = exporter_in(tmp_path, clock=clock, disk=disk)
    exporter.append(metrics(0))
    first = exporter.session
    assert first is not None
    disk.space = 0
    for number in range(1, 4):
        exporter.append(metrics(number))
    write_closed(first.path, Closed(2, NOON, "interrupted"), by="deliverer")
    disk.space = None
    clock.skip(900)
    exporter.append(metrics(4))
    _, new = of_sessions(tmp_path)
    assert [event["tag"] for event in new] == ["header", "gap", "metrics"]
    assert new[1]["dropped"] == 3
    assert "No space left" in new[1]["why"]
    assert exporter.session is not None
    assert exporter.session.lost == 3


@pytest.mark.parametrize("occasion", ["first use", "closed session"])
def test_a_handler_that_logs_while_a_session_is_opened_lands_in_it(tmp_path: Path, occasion: str) -> None:
    clock = HandClock()
    exporter = Journal(tmp_path, limits=ROOMY, clock=clock)
    made = iter(range(10))

    def header_amid_signals() -> Event:
        number = next(made)
        if number:
            signal.raise_signal(signal.SIGUSR1)
        return header(f"{number:016x}")

    exporter.open(header_amid_signals, job_id="job", host="node")
    assert exporter.session is not None
    if occasion == "first use":
        exporter.after_fork()
    else:
        taken(exporter.session)
        clock.skip(900)
    with handled(signal.SIGUSR1, lambda *_: exporter.append(metrics(1000))):
        exporter.append(metrics(1))
    assert [logged(events) for events in of_sessions(tmp_path)] == [[], [1, 1000]]


def test_a_handler_that_logged_when_the_session_was_found_closed_is_not_lost(tmp_path: Path) -> None:
    clock = Interrupting(set())
    exporter = exporter_in(tmp_path, clock=clock)
    assert exporter.session is not None
    exporter.append(metrics(0))
    taken(exporter.session)
    clock.clock.skip(900)
    clock.looks = {clock.count + 1}
    with handled(signal.SIGUSR1, lambda *_: exporter.append(metrics(1000))):
        exporter.append(metrics(1))
    assert [logged(events) for events in of_sessions(tmp_path)] == [[0], [1, 1000]]


def test_upkeep_comes_about_once_a_second_of_event_time(tmp_path: Path) -> None:
    clock = HandClock()
    exporter = Journal(tmp_path, limits=ROOMY, clock=clock)
    calls: list[int] = []
    exporter.upkeep = lambda: calls.append(clock.now)
    exporter.open(header, job_id="job", host="node")
    for number in range(1000):
        exporter.append(metrics(number))
        clock.skip(0.01)
    assert 9 <= len(calls) <= 11


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forking beside a thread is what we test
def test_a_fork_while_another_thread_writes_leaves_two_whole_sessions(tmp_path: Path) -> None:
    exporter = exporter_in(tmp_path)
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        assert exporter.session is not None
        with exporter._lock:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert inside.wait(10)

        def child() -> None:
            exporter.after_fork()
            for number in range(100, 110):
                exporter.append(metrics(number))
            exporter.close("completed")

        assert in_child(child) == 0
    finally:
        leave.set()
        thread.join()
    exporter.append(metrics(1))
    exporter.close("completed")
    assert sorted(logged(lines(session.path)) for session in find_sessions(tmp_path)) == [[1], [*range(100, 110)]]
