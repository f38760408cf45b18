"""A cursor never goes back further than one move, whatever happens to its file; and reading one makes nothing."""

from __future__ import annotations

import os
import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import orjson
import pytest
from harness.journals import fill, small_file_system
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepspan.journal.cursor import SLOT_BYTES, Cursor, CursorState, Ledger, Position, read_cursor

counts = st.integers(0, 2**63 - 1)
states = st.builds(
    CursorState,
    position=st.builds(Position, counts, counts, counts, counts, st.booleans()),
    ledger=st.builds(Ledger, *[counts] * 8),
    answered=st.floats(0, 1e12),
    state=st.sampled_from(["new", "ok", "retry", "hold"]),
    message=st.text(max_size=100),
    needs=counts,
    session=st.just("0123456789abcdef"),
)


def moved(number: int, **fields: Any) -> CursorState:
    return CursorState(position=Position(1, number * 100, number, number), ledger=Ledger(read=number), **fields)


def write(path: Path, *moves: CursorState) -> None:
    cursor = Cursor(path)
    for state in moves:
        cursor.write(state)
    cursor.close()


def reopened(path: Path) -> CursorState:
    cursor = Cursor(path)
    cursor.close()
    return cursor.state


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(states)
def test_a_move_is_found_again(tmp_path: Path, state: CursorState) -> None:
    path = tmp_path / "c"
    path.unlink(missing_ok=True)
    write(path, state)
    found = read_cursor(path)
    assert found == reopened(path) == replace(state, message=state.message.encode("utf-8", "replace").decode())


def test_the_latest_of_many_moves_holds(tmp_path: Path) -> None:
    path = tmp_path / "c"
    for number in range(1, 6):
        write(path, moved(number))
        assert reopened(path) == read_cursor(path) == moved(number)
    assert path.stat().st_size == 2 * SLOT_BYTES


def test_a_new_cursor_starts_from_zero_and_takes_its_room(tmp_path: Path) -> None:
    path = tmp_path / "c"
    assert reopened(path) == CursorState()
    assert path.stat().st_size == 2 * SLOT_BYTES
    assert path.stat().st_blocks * 512 >= 2 * SLOT_BYTES, "really allocated, not sparse"


@pytest.mark.parametrize("last", [4, 5], ids=["over slot 0", "over slot 1"])
def test_a_move_torn_at_any_byte_leaves_the_one_before(tmp_path: Path, last: int) -> None:
    path = tmp_path / "c"
    write(path, *map(moved, range(1, last)))
    before = path.read_bytes()
    write(path, moved(last))
    after = path.read_bytes()
    start = SLOT_BYTES * (last % 2)
    assert before[SLOT_BYTES - start : 2 * SLOT_BYTES - start] == after[SLOT_BYTES - start : 2 * SLOT_BYTES - start]
    length = 8 + struct.unpack_from("<I", after, start + 4)[0]
    for cut in [*range(length + 2), *range(length + 2, SLOT_BYTES + 1, 97)]:
        torn = (
            before[:start]
            + after[start : start + cut]
            + before[start + cut : start + SLOT_BYTES]
            + before[start + SLOT_BYTES :]
        )
        path.write_bytes(torn)
        found = read_cursor(path)
        assert found == reopened(path)
        complete = cut >= length or torn == after or torn[start : start + length] == after[start : start + length]
        assert found == moved(last if complete else last - 1), cut


def test_every_damaged_byte_of_the_newest_slot_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "c"
    write(path, moved(1), moved(2))
    whole = path.read_bytes()
    for position in range(8 + struct.unpack_from("<I", whole, 4)[0]):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        assert read_cursor(path) == moved(1)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(bytes(2 * SLOT_BYTES), id="zeros"),
        pytest.param(b"x", id="one byte"),
        pytest.param(b'{"position": 7}' * 1000, id="somebody else's"),
        pytest.param(os.urandom(3 * SLOT_BYTES), id="noise"),
        pytest.param(b"\xff" * 2 * SLOT_BYTES, id="ones"),
    ],
)
def test_a_file_that_nobody_can_read_starts_from_zero(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c"
    path.write_bytes(content)
    assert read_cursor(path) is None
    assert reopened(path) == CursorState()
    write(path, moved(1))
    assert read_cursor(path) == reopened(path) == moved(1)


def slot(content: Any) -> bytes:
    raw = orjson.dumps(content)
    rest = struct.pack("<I", len(raw)) + raw
    return (struct.pack("<I", crc32(rest)) + rest).ljust(SLOT_BYTES, b"\0")


def fields(number: int) -> dict[str, Any]:
    return {"generation": number, **asdict(moved(number))}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(17, id="a number"),
        pytest.param([], id="a list"),
        pytest.param({"generation": 9}, id="nothing but a generation"),
        pytest.param({**fields(9), "position": 3}, id="a position that is none"),
        pytest.param({**fields(9), "ledger": {"read": 1}}, id="half a ledger"),
        pytest.param({**fields(9), "generation": "x"}, id="a generation that is none"),
    ],
)
def test_a_slot_with_a_right_checksum_and_a_wrong_content_is_passed_over(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "c"
    path.write_bytes(slot(content) + slot(fields(8)))
    assert read_cursor(path) == reopened(path) == moved(8)


def test_what_a_newer_version_added_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "c"
    newer = fields(9)
    newer["position"]["column"] = 5
    newer["ledger"]["sampled"] = 6
    newer["region"] = "eu"
    path.write_bytes(slot(newer) + slot(fields(8)))
    assert read_cursor(path) == reopened(path) == moved(9)


@pytest.mark.parametrize("length", [SLOT_BYTES, SLOT_BYTES + 1, 2 * SLOT_BYTES - 1])
def test_a_file_cut_to_one_slot_keeps_it(tmp_path: Path, length: int) -> None:
    path = tmp_path / "c"
    write(path, moved(1), moved(2))  # slot 1, then slot 0
    os.truncate(path, length)
    assert read_cursor(path) == reopened(path) == moved(2)
    assert path.stat().st_size == 2 * SLOT_BYTES


@pytest.mark.parametrize("message", ["x" * 10_000_000, "ü" * 5000, '\\"\n\0' * 3000, "\ud800" * 3000])
def test_a_huge_message_is_cut_and_costs_nothing_else(tmp_path: Path, message: str) -> None:
    path = tmp_path / "c"
    write(path, moved(1), moved(2, state="hold", message=message))
    found = read_cursor(path)
    assert found is not None
    assert replace(found, message="") == moved(2, state="hold")
    assert 100 <= len(found.message) <= SLOT_BYTES
    assert message.encode("utf-8", "replace").decode().startswith(found.message)


def test_a_move_that_fails_never_costs_the_good_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    cursor = Cursor(path)
    cursor.write(moved(1))
    cursor.write(moved(2))
    real, broken = os.pwrite, iter([3, 100, 0, 50])

    def half(fd: int, data: bytes, offset: int) -> int:
        written = real(fd, data[: next(broken)], offset)
        raise OSError(5, f"only {written} bytes")

    def short(fd: int, data: bytes, offset: int) -> int:
        return real(fd, data[: next(broken)], offset)

    for number, failing in enumerate([half, short, half, short], 3):
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", failing)
            with pytest.raises(OSError, match=r"bytes|part"):
                cursor.write(moved(number))
        assert read_cursor(path) == moved(2), "what was written last and whole"
    cursor.write(moved(7))
    assert read_cursor(path) == moved(7)
    cursor.close()


def test_a_cursor_moves_on_a_full_disk(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small", "64k") as place:
        cursor = Cursor(place / "c")
        fill(place)
        for number in range(1, 6):
            cursor.write(moved(number, message="m" * 500))
            assert read_cursor(place / "c") == moved(number, message="m" * 500)
        cursor.close()
        with pytest.raises(OSError, match="No space"):
            Cursor(place / "another")


@pytest.mark.parametrize("kind", ["nothing", "no directory", "fifo", "link", "directory"])
def test_reading_makes_nothing_and_follows_nothing(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "cursors"
    path = place / "c"
    if kind != "no directory":
        place.mkdir()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        write(tmp_path / "real", moved(1))
        path.symlink_to(tmp_path / "real")
    elif kind == "directory":
        path.mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert read_cursor(path) is None
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["fifo", "link", "dangling link", "directory"])
def test_a_cursor_is_a_regular_file_or_none(tmp_path: Path, kind: str) -> None:
    path, real = tmp_path / "c", tmp_path / "real"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(real)
        if kind == "link":
            real.write_bytes(b"mine")
    with pytest.raises(OSError):  # noqa: PT011 # which one depends on the kind
        Cursor(path)
    assert not real.exists() or real.read_bytes() == b"mine"


def test_reading_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c"
    write(path, moved(1))
    path.chmod(0o400)
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert read_cursor(path) == moved(1)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_ledgers_add_up() -> None:
    assert Ledger(1, 2, 3, 4, 5, 6, 7, 8).plus(Ledger(10, 20, 30, 40, 50, 60, 70, 80)) == Ledger(
        11, 22, 33, 44, 55, 66, 77, 88
    )
