"""Alive, dead or unknown: what the lock says, when only silence can tell, and that one end is said and read by all."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.journals import ROOMY, header, metrics, open_writer
from harness.processes import under_load

from stepspan.journal import liveness
from stepspan.journal.journal import Journal
from stepspan.journal.liveness import (
    CLOSED,
    LOCK,
    Closed,
    is_alive_here,
    is_dead,
    lock_is_held,
    quiet_for,
    read_closed,
    take_lock,
    write_closed,
)

HERE = {"boot_id": "boot"}


def dead(directory: Path, *, quiet: float = 0.0, boot_id: str = "boot") -> bool:
    return is_dead(directory, HERE, boot_id=boot_id, quiet_for=quiet, dead_after=900.0)


# ---------------------------------------------------------------- the lock


def test_a_writer_is_alive_until_it_lets_go(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    assert is_alive_here(writer.path)
    assert not dead(writer.path, quiet=10_000), "it may be silent for as long as it likes"
    writer.forget()
    assert not is_alive_here(writer.path)
    assert dead(writer.path), "at once"


@pytest.mark.parametrize(("quiet", "expected"), [(0, False), (899, False), (900, True), (10_000, True)])
@pytest.mark.parametrize("held", [True, False], ids=["lock held", "lock free"])
def test_of_another_boot_only_silence_tells(tmp_path: Path, quiet: float, expected: bool, held: bool) -> None:
    writer = open_writer(tmp_path)
    if not held:
        writer.forget()
    assert dead(writer.path, quiet=quiet, boot_id="another") is expected


@pytest.mark.parametrize("kind", ["missing", "link", "fifo", "directory"])
def test_without_a_lock_to_ask_only_silence_tells(tmp_path: Path, kind: str) -> None:
    lock = tmp_path / LOCK
    if kind == "link":
        (tmp_path / "free").touch()
        lock.symlink_to(tmp_path / "free")
    elif kind == "fifo":
        os.mkfifo(lock)
    elif kind == "directory":
        lock.mkdir()
    assert not dead(tmp_path, quiet=899)
    assert dead(tmp_path, quiet=900)
    assert not is_alive_here(tmp_path)
    assert kind != "missing" or os.listdir(tmp_path) == [], "asking makes nothing"


def test_a_file_system_without_locks_leaves_only_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    writer = open_writer(tmp_path)
    writer.append(metrics(1))
    writer.forget()
    assert not dead(writer.path, quiet=899)
    assert dead(writer.path, quiet=900)


def test_two_who_ask_at_once_do_not_take_each_other_for_the_writer(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    writer.forget()
    asking = os.open(writer.path / LOCK, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH | fcntl.LOCK_NB)
    try:
        assert not lock_is_held(writer.path)
        assert dead(writer.path)
    finally:
        os.close(asking)


def test_a_lock_is_made_once(tmp_path: Path) -> None:
    fd = take_lock(tmp_path)
    with pytest.raises(FileExistsError):
        take_lock(tmp_path)
    os.close(fd)


def test_a_link_in_the_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=LOCK):
        take_lock(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


# ---------------------------------------------------------------- the end


def test_the_first_word_holds(tmp_path: Path) -> None:
    first, second = Closed(5, 500, "interrupted"), Closed(9, 900, "completed")
    assert write_closed(tmp_path, first, by="a") == first
    assert write_closed(tmp_path, second, by="b") == first
    assert read_closed(tmp_path) == first
    assert os.listdir(tmp_path) == [CLOSED], "no drafts"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"seq": 1}', b'{"seq": "x", "ts": 1, "status": ""}', b"\xff" * 100, b"null"],
    ids=repr,
)
def test_an_end_that_cannot_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CLOSED).write_bytes(content)
    assert read_closed(tmp_path) is None


def test_there_is_no_end_in_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b'{"seq": 1, "ts": 1, "status": "completed"}')
    (tmp_path / CLOSED).symlink_to(tmp_path / "real")
    assert read_closed(tmp_path) is None
    assert read_closed(tmp_path / "gone") is None


CLOSER = """
import sys
from pathlib import Path
from stepspan.journal.liveness import Closed, write_closed
number = int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for session in sorted(Path(sys.argv[1]).iterdir()):
    print(session.name, write_closed(session, Closed(number, number, "interrupted"), by=str(number)).seq)
"""


def test_of_many_racing_closers_one_wins_and_all_agree(tmp_path: Path) -> None:
    sessions = [tmp_path / f"{n:03}" for n in range(50)]
    for session in sessions:
        session.mkdir()
    closers = [
        subprocess.Popen(
            [sys.executable, "-c", CLOSER, str(tmp_path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(1, 7)
    ]
    try:
        for closer in closers:
            assert closer.stdout is not None
            assert closer.stdout.readline() == "ready\n"
        for closer in closers:
            assert closer.stdin is not None
            closer.stdin.write("\n")
            closer.stdin.flush()
        answers = [closer.communicate(timeout=under_load(20))[0].split() for closer in closers]
    finally:
        for closer in closers:
            closer.kill()
            closer.communicate()
    said = [dict(zip(answer[::2], map(int, answer[1::2]), strict=True)) for answer in answers]
    for session in sessions:
        closed = read_closed(session)
        assert closed is not None
        assert {one[session.name] for one in said} == {closed.seq}
        assert os.listdir(session) == [CLOSED]


# ---------------------------------------------------------------- a child that outlives its parent


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def write_with_a_worker(directory: Path, warn: int) -> None:
    """A writer that has forked a worker; both wait to be killed."""
    try:
        exporter = Journal(directory, limits=ROOMY)
        exporter.open(header, job_id="job", host="node")
        exporter.append(metrics(1))
        if not os.fork():
            exporter.after_fork()
            os.write(warn, str(os.getpid()).encode())
        while True:
            signal.pause()
    finally:
        os._exit(1)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # other tests' threads don't matter to the child
def test_a_forked_child_that_outlives_a_killed_writer_does_not_keep_it_alive(
    tmp_path: Path, pipe: tuple[int, int]
) -> None:
    read_end, write_end = pipe
    writer = os.fork()
    if not writer:
        write_with_a_worker(tmp_path, write_end)
    worker = int(os.read(read_end, 100))
    try:
        (session,) = tmp_path.glob("job/node/rank-*")
        assert not dead(session)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        os.kill(worker, 0)  # it lives on
        assert dead(session)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_silence_is_the_age_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "000001.jsonl"
    path.touch()
    assert 0 <= quiet_for(path) < 10
    os.utime(path, (time.time() - 1000,) * 2)
    assert 999 < quiet_for(path) < 1010
    os.utime(path, (time.time() + 1000,) * 2)
    assert quiet_for(path) == 0.0, "another host's clock may be ahead"
    assert quiet_for(tmp_path / "gone") == 0.0


def test_the_rule_is_a_quarter_of_an_hour() -> None:
    assert liveness.DEAD_AFTER_S == 15 * 60
