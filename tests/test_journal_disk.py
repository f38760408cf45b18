"""A disk that is full, low, broken or strange: what cannot be written waits, and what cannot wait is counted."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from harness import runs
from harness.journals import (
    ROOMY,
    FaultyDisk,
    HandClock,
    assert_ordered,
    closed_of,
    fill,
    header,
    lines,
    log,
    logged,
    metrics,
    open_writer,
    session_of,
    small_file_system,
)
from harness.runs import path_of

from stepspan import JsonlExporter
from stepspan.journal import writer as writer_module
from stepspan.journal.cursor import Cursor, CursorState
from stepspan.journal.disk import Disk, Limits
from stepspan.journal.format import decode
from stepspan.journal.layout import find_sessions, open_directory, open_file, read_file, segment_name, slug
from stepspan.journal.liveness import Closed, write_closed
from stepspan.journal.writer import SessionWriter
from stepspan.reading.session_summary import SessionSummary
from stepspan.run import Run

start = runs.start
Start = Callable[..., Run]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "small", "256k") as place:
        yield place


# ---------------------------------------------------------------- a disk that fails


def test_a_short_write_is_completed(tmp_path: Path) -> None:
    class Nibbling(FaultyDisk):
        def write(self, fd: int, data: bytes) -> int:  # type: ignore[override]
            return os.write(fd, data[:7])

    writer = open_writer(tmp_path, disk=Nibbling())
    log(writer, range(20))
    assert logged(lines(writer.path)) == list(range(20))
    assert writer.error is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("room", [0, 1, 40], ids="{} bytes of the line fit".format)
def test_lines_wait_for_a_disk_that_fails_for_a_while(tmp_path: Path, code: int, room: int) -> None:
    disk, clock = FaultyDisk(code), HandClock()
    writer = open_writer(tmp_path, disk=disk, clock=clock)
    log(writer, range(3))
    disk.space = room
    log(writer, range(3, 10))
    assert writer.error is not None
    assert writer.error.errno == code
    raw = (writer.path / segment_name(1)).read_bytes()
    torn = raw.rpartition(b"\n")[2]
    assert len(torn) == room
    clock.skip(1.1)  # still no room
    log(writer, range(10, 12))
    assert (writer.path / segment_name(1)).read_bytes() == raw
    disk.space = None
    clock.skip(1.1)
    log(writer, range(12, 15))
    after = (writer.path / segment_name(1)).read_bytes()[len(raw) :]
    assert after.startswith(b"\n{" if room else b"{"), "a torn line is ended, and written again whole"
    events = [decode(line) for line in (raw[: len(raw) - room] + after[bool(room) :]).splitlines()]
    assert logged(events) == list(range(15))
    assert_ordered(events)
    assert writer.lost == 0


def test_a_catching_up_that_is_torn_again_goes_on_later(tmp_path: Path) -> None:
    disk, clock = FaultyDisk(), HandClock()
    writer = open_writer(tmp_path, disk=disk, clock=clock)
    numbers = iter(range(1000))
    for room in [0, 5, 0, 150, 33, 1, 400, 90]:
        disk.space = room
        clock.skip(1.1)
        for _ in range(5):
            writer.append(metrics(next(numbers)))
    disk.space = None
    writer.close("completed")
    whole = []
    for line in (writer.path / segment_name(1)).read_bytes().splitlines():
        try:
            whole.append(decode(line))
        except Exception:  # a torn line, as many as there were faults at most
            continue
    assert logged(whole) == list(range(40))
    assert_ordered(whole)


def test_what_does_not_fit_in_memory_is_counted_to_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MAX_BACKLOG_BYTES", 2000)
    disk, clock = FaultyDisk(), HandClock()
    writer = open_writer(tmp_path, disk=disk, clock=clock)
    log(writer, range(5))
    disk.space = 0
    log(writer, range(5, 100))
    assert writer.error is not None
    writer.writer.error = None  # as the run does when it has told it
    disk.space = None
    clock.skip(1.1)
    log(writer, range(100, 105))
    events = lines(writer.path)
    kept = logged(events)
    gap = next(event for event in events if event["tag"] == "gap")
    before = [event for event in events if event["seq"] < gap["seq"]]
    assert gap["dropped"] == writer.lost == 105 - len(kept)
    assert gap["seq"] - before[-1]["seq"] - 1 == gap["dropped"], "the hole in seq is what the gap says"
    assert "No space left" in gap["why"]
    assert kept == [*range(5 + len(logged(before)) - 5), *range(100, 105)]
    assert sum(len(str(event)) for event in before[6:]) > 1500


@pytest.mark.any_events
def test_a_line_larger_than_the_memory_is_dropped_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MAX_BACKLOG_BYTES", 2000)
    disk, clock = FaultyDisk(), HandClock()
    writer = open_writer(tmp_path, disk=disk, clock=clock)
    disk.space = 0
    writer.append(metrics(0))
    writer.append(metrics(1, big="x" * 5000))
    disk.space = None
    clock.skip(1.1)
    writer.append(metrics(2))
    assert logged(lines(writer.path)) == [0, 2]
    assert [event["dropped"] for event in lines(writer.path) if event["tag"] == "gap"] == [1]


def test_what_waits_at_the_end_is_written_or_counted(tmp_path: Path) -> None:
    disk = FaultyDisk()
    writer = open_writer(tmp_path, disk=disk)
    disk.space = 0
    log(writer, range(3))
    disk.space = None
    writer.close("completed")
    assert logged(lines(writer.path)) == [0, 1, 2]
    (tmp_path / "second").mkdir()
    writer = open_writer(tmp_path / "second", disk=disk)
    disk.space = 0
    log(writer, range(3))
    writer.close("completed")
    assert writer.lost == 3


def test_a_rotation_on_a_full_disk_keeps_order_and_sizes(tmp_path: Path) -> None:
    disk, clock = FaultyDisk(), HandClock()
    writer = open_writer(tmp_path, disk=disk, clock=clock, limits=replace(ROOMY, segment_bytes=1000))
    for number in range(20):
        disk.space = 130  # a line fits, and the next segment's header does not
        writer.append(metrics(number))
    assert session_of(writer.path).segments() == [1], "the old one goes on"
    assert sorted(os.listdir(writer.path)) == ["000001.jsonl", "lock"]
    last = 40
    disk.space = None
    log(writer, range(20, last + 1))
    assert len(session_of(writer.path).segments()) > 1
    writer.close("completed")
    raw = b"".join((writer.path / segment_name(n)).read_bytes() for n in session_of(writer.path).segments())
    events = [decode(line) for line in raw.splitlines() if line.endswith(b"}")]
    assert logged(events) == list(range(last + 1))
    assert_ordered(events)
    for number, size in list(writer.writer._sizes.items())[:-1]:
        assert abs(size - (writer.path / segment_name(number)).stat().st_size) <= 140


# ---------------------------------------------------------------- a disk that is low


GIB, TIB, PIB = 1 << 30, 1 << 40, 1 << 50


@pytest.mark.parametrize(
    ("size", "free", "low"),
    [
        pytest.param(2 * TIB, 30 * GIB, False, id="2 TB with 30 GiB free"),
        pytest.param(2 * TIB, 9 * GIB, True, id="2 TB with 9 GiB free"),
        pytest.param(10 * PIB, 150 * TIB, False, id="10 PB with 150 TB free"),
        pytest.param(10 * PIB, 11 * GIB, False, id="10 PB with 11 GiB free"),
        pytest.param(100 * 10**9, 15 * 10**8, True, id="100 GB with 1.5 GB free"),
        pytest.param(100 * 10**9, 3 * 10**9, False, id="100 GB with 3 GB free"),
        pytest.param(20 * GIB, GIB - 1, True, id="20 GiB with less than 1 GiB free"),
        pytest.param(1 * GIB, 200 << 20, False, id="1 GiB with 200 MiB free"),
        pytest.param(64 << 20, 60 << 20, False, id="64 MiB of shared memory"),
        pytest.param(64 << 20, 6 << 20, True, id="64 MiB of shared memory with 6 MiB free"),
    ],
)
def test_what_is_kept_free_is_a_share_with_a_cap(size: int, free: int, low: bool) -> None:
    assert (free < Limits().kept_free(size)) == low


def test_what_a_user_wants_to_be_kept_free_is_kept_free() -> None:
    assert Limits(free_ratio=0.1).kept_free(2 * TIB) == pytest.approx(0.1 * 2 * TIB, abs=1)
    assert Limits(free_bytes=5 * GIB).kept_free(GIB) == 5 * GIB
    assert Limits(free_bytes=0, free_ratio=0.0).kept_free(PIB) == 0


def test_what_is_free_is_measured_on_the_real_disk(tmp_path: Path) -> None:
    fd = open_directory(tmp_path)
    try:
        found = os.statvfs(tmp_path)
        free, size = Disk().free_and_size(fd)
        assert size == found.f_blocks * found.f_frsize
        assert abs(free - found.f_bavail * found.f_frsize) < GIB
    finally:
        os.close(fd)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> int:
    """How much of a session is always written, here."""
    monkeypatch.setattr(writer_module, "ALWAYS_BYTES", 8000)
    return 8000


def test_the_first_bytes_of_a_session_are_written_however_little_is_free(tmp_path: Path, always: int) -> None:
    disk, clock = FaultyDisk(), HandClock()
    disk.is_low = True
    writer = open_writer(tmp_path, disk=disk, clock=clock)
    number = 0
    while writer.writer._size() < always:
        writer.append(metrics(number))
        assert logged(lines(writer.path))[-1] == number
        number += 1
    assert writer.error is None
    assert writer.writer.journaled == len(lines(writer.path)) == writer.seq
    log(writer, range(number, number + 10))
    assert writer.writer.waiting == 10
    assert writer.writer.journaled == len(lines(writer.path)) == writer.seq - 10
    clock.skip(1.1)
    writer.append(metrics(number + 10))
    assert "are kept free" in str(writer.error)
    assert writer.writer.waiting == 11
    disk.is_low = False
    clock.skip(1.1)
    log(writer, range(number + 11, number + 13))
    assert logged(lines(writer.path)) == list(range(number + 13))
    assert_ordered(lines(writer.path))
    assert writer.lost == 0


def test_a_session_that_is_large_when_the_disk_becomes_low_stops_growing(tmp_path: Path, always: int) -> None:
    disk, clock = FaultyDisk(), HandClock()
    writer = open_writer(tmp_path, disk=disk, clock=clock)
    log(writer, range(200))
    size = writer.writer._size()
    assert size > always
    disk.is_low = True
    clock.skip(1.1)
    log(writer, range(200, 300))
    assert writer.writer._size() < size + 600, "a header at most"
    assert writer.writer.waiting == 100
    for _ in range(5):
        clock.skip(1.1)
        writer.append(metrics(0))
    assert len(session_of(writer.path).segments()) == 2, "it waits quietly"


def test_on_a_low_disk_delivered_segments_make_room_for_what_comes(tmp_path: Path, always: int) -> None:
    """A run that is delivered as it goes loses nothing while the disk is low, and its session does not grow."""
    disk, clock = FaultyDisk(), HandClock()
    writer = open_writer(tmp_path, disk=disk, clock=clock)
    log(writer, range(200))
    largest = writer.writer._size() + 600
    disk.is_low = True
    (writer.path / "cursors").mkdir()
    cursor = Cursor(writer.path / "cursors" / "a.metrics")
    seen: dict[int, None] = {}
    waited = []
    for number in range(200, 1200):
        writer.append(metrics(number))
        waited.append(writer.writer.waiting)
        if number % 20 == 0:
            clock.skip(1.1)
            seen |= dict.fromkeys(logged(lines(writer.path)))
            cursor.write(CursorState(needs=session_of(writer.path).segments()[-1]))
            assert writer.writer._size() < largest
    cursor.close()
    writer.close("completed")
    seen |= dict.fromkeys(logged(lines(writer.path)))
    assert list(seen) == list(range(1200))
    assert writer.lost == 0
    assert sum(1 for waiting in waited[100:] if waiting) < len(waited) / 2, "room is made before it is needed"


def test_a_low_disk_takes_delivered_segments_first(tmp_path: Path) -> None:
    class FullUntilSegmentsGo(FaultyDisk):
        def free_and_size(self, fd: int) -> tuple[int, int]:
            return 3 - len([name for name in os.listdir(fd) if name.endswith(".jsonl")]), 1 << 50

    clock = HandClock()
    writer = open_writer(tmp_path, disk=FullUntilSegmentsGo(), clock=clock, limits=replace(ROOMY, segment_bytes=1000))
    log(writer, range(50))
    most = len(session_of(writer.path).segments())
    assert most > 5
    clock.skip(1.1)
    writer.append(metrics(50))
    assert len(session_of(writer.path).segments()) == most, "nobody has delivered anything"
    (writer.path / "cursors").mkdir()
    for name, needs in [("a.traces", most - 1), ("a.metrics", most)]:
        cursor = Cursor(writer.path / "cursors" / name)
        cursor.write(CursorState(needs=needs))
        cursor.close()
    os.mkfifo(writer.path / "cursors" / "a.logs")  # stops nobody
    clock.skip(1.1)
    writer.append(metrics(51))
    assert session_of(writer.path).segments()[:2] == [most - 1, most]
    assert logged(lines(writer.path))[-2:] == [50, 51]


def test_a_disk_that_cannot_be_asked_is_written_to(tmp_path: Path) -> None:
    class Stale(FaultyDisk):
        def free_and_size(self, fd: int) -> tuple[int, int]:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    writer = open_writer(tmp_path, disk=Stale())
    log(writer, range(3))
    assert logged(lines(writer.path)) == [0, 1, 2]
    assert writer.error is not None
    assert writer.error.errno == errno.ESTALE


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    clock = HandClock()
    writer = open_writer(small_disk, clock=clock, disk=Disk())
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(200_000))
    log(writer, range(2000))
    assert writer.error is not None
    assert writer.error.errno == errno.ENOSPC
    ballast.unlink()
    clock.skip(1.1)
    writer.append(metrics(2000))
    writer.close("completed")
    raw = (writer.path / segment_name(1)).read_bytes()
    events = [decode(line) for line in raw.splitlines() if line.endswith(b"}")]
    assert raw.count(b"\n") <= len(events) + 1, "one torn line at most"
    assert logged(events) == list(range(2001))
    assert_ordered(events)


def test_a_session_on_a_full_disk_leaves_nothing_behind(small_disk: Path) -> None:
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        SessionWriter(small_disk, header(), limits=ROOMY, clock=HandClock()).open()
    assert os.listdir(small_disk) == ["ballast"]
    with pytest.raises(OSError, match="No space left"):
        write_closed(small_disk, Closed(1, 1, "interrupted"), by="test")
    assert os.listdir(small_disk) == ["ballast"]


# ---------------------------------------------------------------- durability `disk`


def test_sync_after_each_event(tmp_path: Path) -> None:
    disk = FaultyDisk()
    writer = open_writer(tmp_path, disk=disk, limits=replace(ROOMY, sync_every=0, segment_bytes=1000))
    assert writer.path.parent.stat().st_ino in disk.synced, "the directory that the session was renamed in"
    assert writer.path.stat().st_ino in disk.synced
    for number in range(20):
        segment = writer.path / segment_name(session_of(writer.path).segments()[-1])
        disk.synced.clear()
        writer.append(metrics(number))
        assert segment.stat().st_ino in disk.synced, "also the event that ended a segment"
    assert len(session_of(writer.path).segments()) > 1


def test_sync_on_a_cadence(tmp_path: Path) -> None:
    disk, clock = FaultyDisk(), HandClock()
    writer = open_writer(tmp_path, disk=disk, clock=clock, limits=replace(ROOMY, sync_every=0.25))
    disk.synced.clear()
    for number in range(1000):
        writer.append(metrics(number))
        clock.skip(0.01)
    assert 35 <= len(disk.synced) <= 40
    disk.synced.clear()
    writer.close("completed")
    assert disk.synced == [(writer.path / segment_name(1)).stat().st_ino]


def test_no_sync_by_default(tmp_path: Path) -> None:
    disk = FaultyDisk()
    writer = open_writer(tmp_path, disk=disk, limits=replace(ROOMY, segment_bytes=1000))
    log(writer, range(50))
    writer.close("completed")
    assert disk.synced == []


def test_a_sync_that_fails_is_a_trouble_and_no_error(tmp_path: Path) -> None:
    class Unsynced(FaultyDisk):
        def sync(self, fd: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    writer = open_writer(tmp_path, disk=Unsynced(), limits=replace(ROOMY, sync_every=0, segment_bytes=1000))
    log(writer, range(20))
    assert logged(lines(writer.path)) == list(range(20))
    assert writer.error is not None


def test_the_real_sync_reaches_files_and_directories(tmp_path: Path) -> None:
    writer = open_writer(tmp_path, disk=Disk(), limits=replace(ROOMY, sync_every=0, segment_bytes=1000))
    log(writer, range(20))
    writer.close("completed")
    assert writer.error is None


# ---------------------------------------------------------------- links and strange files


@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo", "directory"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "strange"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        target = tmp_path / "target"
        if kind == "link":
            target.write_text("secret")
        path.symlink_to(target)
    directory = open_directory(tmp_path)
    try:
        for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_APPEND | os.O_CREAT):
            with pytest.raises(OSError):  # noqa: PT011 # which one depends on the kind
                open_file("strange", flags, dir_fd=directory)
    finally:
        os.close(directory)
    assert read_file(path) is None
    assert not (tmp_path / "target").exists() or (tmp_path / "target").read_text() == "secret"


def test_a_directory_that_is_a_link_is_not_entered(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(NotADirectoryError):
        open_directory(tmp_path / "link")
    assert list(find_sessions(tmp_path)) == []


def test_a_link_in_the_place_of_the_next_segment_is_not_followed(tmp_path: Path) -> None:
    writer = open_writer(tmp_path, limits=replace(ROOMY, segment_bytes=1000))
    (writer.path / segment_name(2)).symlink_to(tmp_path / "elsewhere")
    log(writer, range(20))
    assert not (tmp_path / "elsewhere").exists()
    assert logged(decode(line) for line in (writer.path / segment_name(1)).read_bytes().splitlines()) == [*range(20)]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../../etc", "/", "a/b", "a:b", "ü", "x" * 300, "\ud800", "-", ".hidden"]
)
def test_any_name_makes_one_harmless_folder(tmp_path: Path, name: str) -> None:
    found = slug(name)
    assert found == slug(name)
    assert found not in {"", ".", ".."}
    assert not found.startswith((".", "-"))
    assert len(found) <= 80
    (tmp_path / found).mkdir()
    assert os.listdir(tmp_path) == [found]


def test_names_that_differ_lie_apart() -> None:
    names = ["a/b", "a:b", "a-b", "a b", "..", ".", "", "x" * 300, "x" * 301, "x" * 64, "A", "ü", "ö"]
    assert len({slug(name) for name in names}) == len(names)


# ---------------------------------------------------------------- what a run says of it


def test_what_waits_in_memory_is_not_journaled_and_not_durable(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk, clock = FaultyDisk(), HandClock()
    run = start(exporters=[JsonlExporter(tmp_path / "runs", limits=ROOMY, clock=clock, disk=disk)])
    run.log_metrics({"n": 0})
    before = run.stats()
    assert (before["journaled"], before["waiting"], before["lost"], before["durable"]) == (3, 0, 0, True)
    assert run.flush(0)
    disk.space = 0
    for number in range(1, 6):
        run.log_metrics({"n": number})
    full = run.stats()
    assert (full["journaled"], full["waiting"], full["lost"], full["durable"]) == (3, 5, 0, False)
    assert len(lines(path_of(run))) == 3, "what a SIGKILL would leave"
    assert not run.flush(0), "there is no destination, but they would not survive the process"
    clock.skip(1.1)
    run.log_metrics({"n": 6})
    assert [r.getMessage() for r in caplog.records if "6 lines wait in memory" in r.getMessage()]
    disk.space = None
    assert run.flush(0), "and it sees to it, if the disk takes them again"
    after = run.stats()
    assert (after["journaled"], after["waiting"], after["durable"]) == (9, 0, True)
    assert logged(lines(path_of(run))) == list(range(7))


def test_what_is_lost_at_the_end_is_told_by_the_run_its_journal_and_its_report(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FaultyDisk()
    run = start(exporters=[JsonlExporter(tmp_path / "runs", limits=ROOMY, clock=HandClock(), disk=disk)])
    run.log_metrics({"n": 0})
    disk.space = 0
    run.log_metrics({"n": 1})
    run.close()
    stats = run.stats()
    assert (stats["journaled"], stats["waiting"], stats["lost"]) == (3, 0, 2)
    assert [r.getMessage() for r in caplog.records if "2 events could not be written" in r.getMessage()]
    assert closed_of(path_of(run)).lost == 2
    summary = SessionSummary.read(session_of(path_of(run)), boot_id="")
    assert (summary.lines.dropped, summary.lines.damaged) == (2, 0)


def test_a_gap_in_the_middle_is_not_journaled(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MAX_BACKLOG_BYTES", 300)
    disk, clock = FaultyDisk(), HandClock()
    run = start(exporters=[JsonlExporter(tmp_path / "runs", limits=ROOMY, clock=clock, disk=disk)])
    disk.space = 0
    for number in range(10):
        run.log_metrics({"n": number})
    disk.space = None
    clock.skip(1.1)
    run.log_metrics({"n": 10})
    stats = run.stats()
    assert stats["journaled"] == len(lines(path_of(run)))
    assert stats["lost"] == next(e["dropped"] for e in lines(path_of(run)) if e["tag"] == "gap") > 0
