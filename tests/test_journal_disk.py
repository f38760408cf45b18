"""A disk that is full, low, broken or strange: what cannot be written waits, and what cannot wait is counted."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from harness.journals import (
    ROOMY,
    FaultyDisk,
    HandClock,
    assert_ordered,
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

from stepspan.journal import writer as writer_module
from stepspan.journal.cursor import Cursor, CursorState
from stepspan.journal.disk import Disk, Limits
from stepspan.journal.format import decode
from stepspan.journal.layout import find_sessions, open_directory, open_file, read_file, segment_name, slug
from stepspan.journal.liveness import Closed, write_closed
from stepspan.journal.writer import SessionWriter


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
    numbers = iter(range(1000))
    while session_of(writer.path).segments() == [1]:
        disk.space = 130  # a line fits, and the next segment's header does not
        writer.append(metrics(next(numbers)))
    writer.append(metrics(last := next(numbers)))
    disk.space = None
    writer.close("completed")
    raw = b"".join((writer.path / segment_name(n)).read_bytes() for n in session_of(writer.path).segments())
    events = [decode(line) for line in raw.splitlines() if line.endswith(b"}")]
    assert logged(events) == list(range(last + 1))
    assert_ordered(events)
    for number, size in list(writer.writer._sizes.items())[:-1]:
        assert abs(size - (writer.path / segment_name(number)).stat().st_size) <= 140


def test_low_free_disk_stops_writing_before_the_disk_is_full(tmp_path: Path) -> None:
    disk, clock = FaultyDisk(), HandClock()
    writer = open_writer(tmp_path, disk=disk, clock=clock, limits=Limits(free_bytes=1 << 30))
    log(writer, range(3))
    disk.is_low = True
    clock.skip(1.1)
    log(writer, range(3, 6))
    assert logged(lines(writer.path)) == [0, 1, 2]
    assert "less free disk than max(1073741824 B, 2%)" in str(writer.error)
    disk.is_low = False
    clock.skip(1.1)
    log(writer, range(6, 8))
    assert logged(lines(writer.path)) == list(range(8))
    assert_ordered(lines(writer.path))


def test_low_free_disk_is_measured_on_the_real_disk(tmp_path: Path) -> None:
    fd = open_directory(tmp_path)
    try:
        found = os.statvfs(tmp_path)
        free, size = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
        assert Disk().low(fd, Limits(free_bytes=2 * free))
        assert not Disk().low(fd, Limits(free_bytes=free // 2, free_ratio=0.0))
        assert Disk().low(fd, Limits(free_bytes=0, free_ratio=min(1.0, 1.5 * free / size)))
    finally:
        os.close(fd)


def test_a_low_disk_takes_delivered_segments_first(tmp_path: Path) -> None:
    class FullUntilSegmentsGo(FaultyDisk):
        def low(self, fd: int, limits: Limits) -> bool:
            return len([name for name in os.listdir(fd) if name.endswith(".jsonl")]) > 3

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
        def low(self, fd: int, limits: Limits) -> bool:
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
        SessionWriter(small_disk, header(), limits=ROOMY, clock=HandClock())
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
