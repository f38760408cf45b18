"""The reader's promises: every whole line once and in order, nothing torn, nothing unsettled; what is missing is
counted for what it is; and the batches a journal is read in change nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import pytest
from harness.journals import (
    MILLISECOND,
    NOON,
    ROOMY,
    SESSION,
    HandClock,
    batches,
    header,
    lay_down,
    logged,
    metrics,
    open_writer,
    session_of,
)
from harness.processes import under_load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepspan.deliver.open_sessions import OpenSessions
from stepspan.errors import Damaged, NewerSchema
from stepspan.events import Event
from stepspan.journal import chunks
from stepspan.journal import reader as reader_module
from stepspan.journal.cursor import Ledger, Position
from stepspan.journal.format import decode_sequence, encode
from stepspan.journal.layout import SessionPath, find_sessions, segment_name
from stepspan.journal.liveness import Closed
from stepspan.journal.reader import SETTLE_S, EventBatch, JournalReader, last_event

END = Closed(10**9, NOON * 2, "completed")
WHOLE = 1 << 20


class Watch:
    """The reader's clock, moved by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def read_all(session: SessionPath, *, size: int = WHOLE, closed: Closed | None = END) -> tuple[list[Event], Ledger]:
    reader = JournalReader(session)
    events, ledger = [], Ledger()
    try:
        for batch in batches(reader, size=size, closed=closed):
            events += batch.events
            ledger = ledger.plus(batch.counts)
    finally:
        reader.close()
    return events, ledger


def at(milliseconds: float, number: int, seq: int = 0) -> Event:
    return {**metrics(number), "ts": NOON + int(milliseconds * MILLISECOND), "seq": seq}


# ---------------------------------------------------------------- batches


@st.composite
def journals(draw: st.DrawFn) -> list[list[Any]]:
    """Segments of events with times close together, among them damage, copies, gaps and lines of any length."""
    segments: list[list[Any]] = []
    ts, seq = NOON, 0
    for _ in range(draw(st.integers(1, 4))):
        ts, seq = ts + draw(st.integers(1, 3 * MILLISECOND)), seq + 1
        content: list[Any] = [{**header(), "ts": ts, "seq": seq}]
        kinds = st.sampled_from(["event"] * 8 + ["long", "damaged", "copy", "foreign", "gap"])
        for kind in draw(st.lists(kinds, max_size=12)):
            if kind == "foreign":
                content.append(b'{"loss": 0.5}\n')
                continue
            dropped = draw(st.integers(1, 5)) if kind == "gap" else 0
            ts += draw(st.sampled_from([1, 100_000, 400_000, MILLISECOND, 5 * MILLISECOND]))
            seq += 1 + dropped
            event = {**metrics(seq), "ts": ts, "seq": seq}
            if kind == "gap":
                content.append({"ts": ts, "seq": seq, "tag": "gap", "dropped": dropped, "why": "full"})
            elif kind == "damaged":
                line = bytearray(encode(event))
                line[draw(st.integers(0, len(line) - 2))] ^= 1
                content.append(bytes(line))
            elif kind == "long":
                content.append({**event, "pad": "x" * draw(st.integers(0, 3000))})
            else:
                content += [event, encode(event)] if kind == "copy" else [event]
        segments.append(content)
    return segments


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(segments=journals(), sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=50))
def test_the_size_of_the_batches_changes_nothing(tmp_path: Path, segments: list[list[Any]], sizes: list[int]) -> None:
    shutil.rmtree(tmp_path / "j", ignore_errors=True)
    session = lay_down(tmp_path / "j", *segments)
    written = [item["seq"] for content in segments for item in content if isinstance(item, dict)]
    events, ledger = read_all(session)
    assert [event["seq"] for event in events] == written
    assert ledger.read == len(written)
    assert ledger.read + ledger.damaged + ledger.dropped == written[-1]
    assert ledger.dropped == sum(event.get("dropped", 0) for event in events)

    reader = JournalReader(session)
    found: list[Event] = []
    sums, position = Ledger(), Position()
    try:
        for size in cycle(sizes):
            batch = reader.read(position, size=size, closed=END)
            if found and batch.events:
                assert found[-1]["ts"] // MILLISECOND < batch.events[0]["ts"] // MILLISECOND, "cut within a millisecond"
            found += batch.events
            sums = sums.plus(batch.counts)
            position = batch.position
            if batch.at_end:
                break
    finally:
        reader.close()
    assert found == events
    assert sums == ledger


def test_a_batch_ends_between_two_milliseconds_however_small(tmp_path: Path) -> None:
    session = lay_down(tmp_path, [at(0, 0), at(0.1, 1), at(0.2, 2), at(3, 3), at(7, 4), at(7.9, 5)])
    reader = JournalReader(session)
    first, *rest = (logged(batch.events) for batch in batches(reader, size=1, closed=END))
    reader.close()
    assert first in ([], [0, 1, 2], [0, 1, 2, 3])
    assert rest
    assert rest[-1] == [4, 5]


def test_a_line_larger_than_a_batch_is_read_whole(tmp_path: Path) -> None:
    big = {**at(1, 1), "pad": "x" * 10_000_000}
    session = lay_down(tmp_path, [at(0, 0), big, at(2, 2)])
    events, ledger = read_all(session, size=1000)
    assert logged(events) == [0, 1, 2]
    assert (ledger.read, ledger.damaged) == (4, 0)


def test_nothing_later_than_until(tmp_path: Path) -> None:
    session = lay_down(tmp_path, [at(0, 0), at(1, 1), at(2.0, 2), at(2.5, 3), at(3, 4)])
    reader = JournalReader(session)

    def until(milliseconds: float, start: Position) -> EventBatch:
        return reader.read(start, size=WHOLE, until=NOON + int(milliseconds * MILLISECOND), closed=END)

    first = until(1.5, Position())
    assert logged(first.events) == [0, 1]
    assert not first.at_end
    cut = until(2.2, first.position)
    assert cut.events == [], "a millisecond is never cut"
    assert cut.position == first.position
    assert logged(until(2.5, first.position).events) == [2, 3]
    last = until(9, first.position)
    assert logged(last.events) == [2, 3, 4]
    assert last.at_end
    reader.close()


def test_nothing_beyond_the_end_that_was_said(tmp_path: Path) -> None:
    session = lay_down(tmp_path, [at(0, 0), at(1, 1)], [at(5, 2), at(6, 3)])
    events, _ = read_all(session, closed=Closed(3, NOON + MILLISECOND, "interrupted"))
    assert logged(events) == [0, 1]
    events, _ = read_all(session, size=1, closed=Closed(5, NOON + 5 * MILLISECOND, "interrupted"))
    assert logged(events) == [0, 1, 2]


def test_what_a_minor_version_adds_is_handed_on(tmp_path: Path) -> None:
    new = {"ts": 0, "seq": 0, "tag": "weather", "rain": True}
    session = lay_down(tmp_path, [header(schema="1.7", wind="west"), new, {**metrics(1), "unit": "s"}])
    events, _ = read_all(session)
    assert [event["tag"] for event in events] == ["header", "weather", "metrics"]


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("rubbish", "holes"),
    [
        pytest.param(b'{"loss": 0.5}\n', 0, id="a foreign line"),
        pytest.param(b"\n\n\n", 0, id="empty lines"),
        pytest.param(bytes(5000) + b"\n", 0, id="zeros"),
        pytest.param(os.urandom(5000).replace(b"\n", b"x") + b"\n", 0, id="noise"),
        pytest.param(encode({**at(2, 2), "seq": 4})[:-30] + b"\n", 1, id="a torn line that was ended"),
        pytest.param(encode({**at(2, 2), "seq": 4}).replace(b'"n":2', b'"n":3'), 1, id="a changed value"),
        pytest.param(encode({**at(1, 1), "seq": 3}), 0, id="a copy"),
        pytest.param(encode({**at(0, 0), "seq": 2}), 0, id="an older line"),
    ],
)
@pytest.mark.parametrize("size", [1, 100, WHOLE])
def test_damage_costs_the_line(tmp_path: Path, rubbish: bytes, holes: int, size: int) -> None:
    session = lay_down(tmp_path, [at(0, 0, 2), at(1, 1, 3), rubbish, at(3, 3, 4 + holes), at(4, 4, 5 + holes)])
    events, ledger = read_all(session, size=size)
    assert logged(events) == [0, 1, 3, 4]
    assert ledger == Ledger(read=5, damaged=holes)


def test_a_line_lost_to_a_full_disk_is_dropped_and_not_damaged(tmp_path: Path) -> None:
    gap = {"ts": NOON + 5 * MILLISECOND, "seq": 13, "tag": "gap", "dropped": 7, "why": "full"}
    session = lay_down(tmp_path, [at(0, 0, 2), at(1, 1, 3), gap, at(6, 2, 14)])
    _, ledger = read_all(session)
    assert ledger == Ledger(read=5, dropped=7, damaged=2)


def test_a_torn_tail_waits(tmp_path: Path) -> None:
    line = encode({**at(2, 2), "seq": 4})
    session = lay_down(tmp_path, [at(0, 0), at(1, 1), line[:25]])
    for closed in (None, END):
        reader = JournalReader(session)
        assert logged(reader.read(Position(), size=WHOLE, closed=END).events) == [0, 1], closed
        reader.close()
    with open(session.path / segment_name(1), "ab") as file:
        file.write(line[25:])
    assert logged(read_all(session)[0]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("missing", "numbers", "pruned"),
    [
        pytest.param([1], [2, 3, 4, 5], 3, id="the first"),
        pytest.param([1, 2], [4, 5], 6, id="the first two"),
        pytest.param([2], [0, 1, 4, 5], 3, id="the middle"),
        pytest.param([3], [0, 1, 2, 3], 0, id="the last, which shows only at the end"),
    ],
)
@pytest.mark.parametrize("size", [1, WHOLE])
def test_a_missing_segment_counts_as_pruned(
    tmp_path: Path, missing: Sequence[int], numbers: list[int], pruned: int, size: int
) -> None:
    session = lay_down(tmp_path, [at(0, 0), at(1, 1)], [at(3, 2), at(4, 3)], [at(6, 4), at(7, 5)])
    for number in missing:
        (session.path / segment_name(number)).unlink()
    events, ledger = read_all(session, size=size)
    assert logged(events) == numbers
    assert ledger == Ledger(read=len(events), pruned=pruned)


def test_a_segment_that_is_pruned_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    session = lay_down(tmp_path, [at(0, 0), at(1, 1), at(2, 2)], [at(4, 3)], [at(6, 4)])
    reader = JournalReader(session)
    first = reader.read(Position(), size=WHOLE, until=NOON + MILLISECOND)
    for number in (1, 2):
        (session.path / segment_name(number)).unlink()
    rest = reader.read(first.position, size=WHOLE, closed=END)
    reader.close()
    assert logged([*first.events, *rest.events]) == [0, 1, 2, 4]
    assert rest.counts.pruned == 2


def test_a_position_in_a_pruned_segment_goes_on_in_the_next(tmp_path: Path) -> None:
    session = lay_down(tmp_path, [at(0, 0), at(1, 1), at(2, 2)], [at(4, 3)])
    reader = JournalReader(session)
    first = reader.read(Position(), size=WHOLE, until=NOON + MILLISECOND)
    reader.close()
    (session.path / segment_name(1)).unlink()
    reader = JournalReader(session)
    rest = reader.read(first.position, size=WHOLE, closed=END)
    reader.close()
    assert logged(rest.events) == [3]
    assert rest.counts == Ledger(read=2, pruned=1)


@pytest.mark.parametrize("schema", ["2.0", "10.3"])
def test_a_newer_major_schema_is_refused_with_the_version(tmp_path: Path, schema: str) -> None:
    session = lay_down(tmp_path, [header(schema=schema), at(1, 1)])
    with pytest.raises(NewerSchema, match=f"journal schema {schema}, this stepspan reads up to 1: upgrade stepspan"):
        JournalReader(session)


@pytest.mark.parametrize(
    "segment",
    [
        pytest.param([b""], id="an empty file"),
        pytest.param([b'{"loss": 0.5}\n'], id="somebody else's file"),
        pytest.param([encode(header())[:-10]], id="a torn header"),
        pytest.param([encode({**at(1, 1), "seq": 1})], id="another event first"),
        pytest.param([header(schema="new")], id="a schema that is no version"),
        pytest.param([header(schema=None)], id="no schema"),
    ],
)
def test_a_journal_without_a_header_is_damaged(tmp_path: Path, segment: list[Any]) -> None:
    session = lay_down(tmp_path, segment)
    with pytest.raises(Damaged, match=SESSION):
        JournalReader(session)


def test_any_segments_header_will_do(tmp_path: Path) -> None:
    session = lay_down(tmp_path, [b"rubbish\n", at(1, 0)], [at(3, 1)])
    reader = JournalReader(session)
    assert reader.header["session"] == SESSION
    assert logged(reader.read(Position(), size=WHOLE, closed=END).events) == [0, 1]
    reader.close()


def test_a_header_may_be_long(tmp_path: Path) -> None:
    session = lay_down(tmp_path, [header(resource={"argv": "x" * 3_000_000}), at(1, 0)])
    assert logged(read_all(session)[0]) == [0]


def test_no_session_is_no_journal(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        JournalReader(SessionPath(tmp_path / "gone", 0, SESSION))
    (tmp_path / "empty").mkdir()
    with pytest.raises(Damaged):
        JournalReader(SessionPath(tmp_path / "empty", 0, SESSION))


def test_a_segment_that_is_a_link_is_refused(tmp_path: Path) -> None:
    session = lay_down(tmp_path, [at(1, 0)], [at(3, 1)])
    (session.path / segment_name(2)).rename(tmp_path / "elsewhere")
    (session.path / segment_name(2)).symlink_to(tmp_path / "elsewhere")
    reader = JournalReader(session)
    with pytest.raises(OSError, match=segment_name(2)):
        reader.read(Position(), size=WHOLE, closed=END)
    reader.close()


def test_strange_files_beside_the_segments_are_passed_over(tmp_path: Path) -> None:
    session = lay_down(tmp_path, [at(1, 0)], [at(3, 1)])
    for name in ("notes.txt", "1.jsonl", "000003.jsonl.gz", "x000003.jsonl", "rejected.jsonl"):
        (session.path / name).write_bytes(b"mine\n")
    assert logged(read_all(session)[0]) == [0, 1]


# ---------------------------------------------------------------- the live tail


def test_the_newest_millisecond_waits_until_it_is_settled(tmp_path: Path) -> None:
    watch = Watch()
    session = lay_down(tmp_path, [at(0, 0), at(1, 1), at(1.5, 2)])
    reader = JournalReader(session, clock=watch)
    first = reader.read(Position(), size=WHOLE)
    assert logged(first.events) == [0]
    assert first.at_end
    watch.now += SETTLE_S / 2
    assert reader.read(first.position, size=WHOLE).events == []
    with open(session.path / segment_name(1), "ab") as file:  # a sibling of the same millisecond
        file.write(encode({**at(1.7, 3), "seq": 5}))
    watch.now += SETTLE_S / 2
    assert reader.read(first.position, size=WHOLE).events == [], "the file has grown, so the wait begins again"
    watch.now += SETTLE_S
    second = reader.read(first.position, size=WHOLE)
    assert logged(second.events) == [1, 2, 3]
    assert reader.read(second.position, size=WHOLE).events == []
    reader.close()


def test_a_later_line_settles_what_is_before_it(tmp_path: Path) -> None:
    session = lay_down(tmp_path, [at(0, 0), at(1, 1), at(1.5, 2)])
    reader = JournalReader(session, clock=Watch())
    first = reader.read(Position(), size=WHOLE)
    with open(session.path / segment_name(1), "ab") as file:
        file.write(encode({**at(2, 3), "seq": 5}))
    assert logged(reader.read(first.position, size=WHOLE).events) == [1, 2]
    reader.close()


def test_the_end_of_the_session_settles_everything(tmp_path: Path) -> None:
    session = lay_down(tmp_path, [at(0, 0), at(1, 1)])
    reader = JournalReader(session, clock=Watch())
    assert logged(reader.read(Position(), size=WHOLE).events) == [0]
    assert logged(reader.read(Position(), size=WHOLE, closed=Closed(3, NOON + MILLISECOND, "completed")).events) == [
        0,
        1,
    ]
    reader.close()


def test_a_successor_that_appears_between_two_reads(tmp_path: Path) -> None:
    writer = open_writer(tmp_path, limits=replace(ROOMY, segment_bytes=1000))
    writer.append(metrics(0))
    watch = Watch()
    reader = JournalReader(session_of(writer.path), clock=watch)
    reader.read(Position(), size=WHOLE)
    watch.now += SETTLE_S
    first = reader.read(Position(), size=WHOLE)
    assert logged(first.events) == [0]
    number = 1
    while session_of(writer.path).segments()[-1] < 4:  # the end of the first, two whole ones, and a beginning
        writer.append(metrics(number))
        number += 1
    writer.close("completed")
    rest = reader.read(first.position, size=WHOLE, closed=END)
    reader.close()
    assert logged(rest.events) == list(range(1, number))
    assert rest.counts == Ledger(read=len(rest.events))


def test_what_is_written_between_a_look_at_the_file_and_its_rotation_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = HandClock()
    writer = open_writer(tmp_path, limits=replace(ROOMY, segment_bytes=1000), clock=clock)
    reader = JournalReader(session_of(writer.path))
    numbers, real = count(), os.pread

    def read_then_rotate(fd: int, size: int, offset: int) -> bytes:
        data = real(fd, size, offset)
        monkeypatch.setattr(os, "pread", real)
        for _ in range(15):  # into the next segment
            clock.skip(0.01)
            writer.append(metrics(next(numbers)))
        return data

    position, found = Position(), []
    for _ in range(5):
        monkeypatch.setattr(os, "pread", read_then_rotate)
        batch = reader.read(position, size=WHOLE)
        position = batch.position
        found += batch.events
        assert batch.counts.damaged == 0
    writer.close("completed")
    last = reader.read(position, size=WHOLE, closed=END)
    reader.close()
    assert logged([*found, *last.events]) == list(range(next(numbers)))
    assert last.counts.damaged == 0


WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from harness.journals import ROOMY, OpenJournal, header, metrics
from dataclasses import replace
from itertools import count, cycle, islice

writer = OpenJournal(Path(sys.argv[1]), header(), limits=replace(ROOMY, segment_bytes=2_000_000))
until, number = time.monotonic() + 1.5, 0
while time.monotonic() < until:
    for _ in range(100):
        writer.append(metrics(number, pad="x" * (number % 300)))
        number += 1
writer.close("completed")
print(number, flush=True)
"""


def test_a_reader_beside_a_writer_at_full_speed_sees_every_line_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + under_load(20)
        while not (found := list(find_sessions(tmp_path))):
            assert time.monotonic() < deadline
        reader = JournalReader(found[0])
        position, numbers, ledger, reads, seqs = Position(), [], Ledger(), 0, []
        while process.poll() is None and time.monotonic() < deadline:
            batch = reader.read(position, size=50_000)
            numbers += logged(batch.events)
            seqs += [event["seq"] for event in batch.events]
            ledger = ledger.plus(batch.counts)
            reads += bool(batch.events)
            position = batch.position
        assert process.returncode == 0
        assert reads > 20, "we have read while it wrote"
        batch = EventBatch([], position, Ledger(), False)
        while not batch.at_end:
            batch = reader.read(batch.position, size=1 << 20, closed=END)
            numbers += logged(batch.events)
            seqs += [event["seq"] for event in batch.events]
            ledger = ledger.plus(batch.counts)
        reader.close()
        assert process.stdout is not None
        assert numbers == list(range(int(process.stdout.read())))
        assert seqs == list(range(1, len(seqs) + 1))
        assert ledger == Ledger(read=len(seqs))
        assert len(found[0].segments()) > 1
    finally:
        process.kill()
        process.communicate()


# ---------------------------------------------------------------- the last event


@pytest.mark.parametrize(
    "tail",
    [
        pytest.param([], id="the last line"),
        pytest.param([b"x" * 20], id="before a torn line"),
        pytest.param([bytes(300_000)], id="before zeros"),
        pytest.param([b"x" * 40_000 + b"\n"] * 5, id="before damaged lines"),
        pytest.param([b"\n"] * 100_000, id="before empty lines"),
    ],
)
def test_the_last_event_is_the_last_whole_line(tmp_path: Path, tail: list[bytes]) -> None:
    session = lay_down(tmp_path, [at(0, 0)], [at(3, 1), {**at(4, 2), "pad": "y" * 100_000}, *tail])
    assert last_event(session) == (5, NOON + 4 * MILLISECOND)


def test_the_last_event_may_stand_in_an_earlier_segment(tmp_path: Path) -> None:
    session = lay_down(tmp_path, [at(0, 0), at(1, 1)], [b"torn"])
    assert last_event(session) == (3, NOON + MILLISECOND)
    (session.path / segment_name(2)).unlink()
    (session.path / segment_name(2)).symlink_to("000001.jsonl")
    assert last_event(session) == (3, NOON + MILLISECOND)


def test_there_may_be_no_last_event(tmp_path: Path) -> None:
    assert last_event(lay_down(tmp_path, [b"torn"])) == (0, 0)


# ---------------------------------------------------------------- several who read one session


class Follower:
    """One of several readers of a session, and what it has got."""

    def __init__(self, sessions: OpenSessions, session: SessionPath, name: str) -> None:
        self.reader = sessions.open(session, name, time.monotonic)
        self.events: list[Event] = []
        self.ledger = Ledger()
        self.position = Position()
        self.at_end = False

    def read(self, size: int, until: int | None = None, closed: Closed | None = END) -> None:
        batch = self.reader.read(self.position, size=size, until=until, closed=closed)
        self.events += batch.events
        self.ledger = self.ledger.plus(batch.counts)
        self.position, self.at_end = batch.position, batch.at_end


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), segments=journals())
def test_each_who_reads_along_gets_what_it_would_get_alone(
    tmp_path: Path, data: st.DataObject, segments: list[list[Any]]
) -> None:
    shutil.rmtree(tmp_path / "j", ignore_errors=True)
    session = lay_down(tmp_path / "j", *segments)
    events, ledger = read_all(session)
    sessions = OpenSessions()
    followers = [Follower(sessions, session, name) for name in "abc"]
    sizes, untils = st.integers(1, 5000), st.none() | st.integers(0, 60).map(lambda ms: NOON + ms * MILLISECOND)
    for turn, size, until in data.draw(st.lists(st.tuples(st.integers(0, 2), sizes, untils), max_size=40)):
        followers[turn].read(size, until)
    for follower in followers:
        while not follower.at_end:
            follower.read(700)
        assert follower.events == events
        assert follower.ledger == ledger
        follower.reader.close()


def test_a_line_is_parsed_once_for_all_who_read_it_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = lay_down(tmp_path, [at(n, n) for n in range(2000)], [at(n, n) for n in range(2000, 4000)])
    parsed = []

    def counted(lines: Sequence[bytes], seq: int) -> list[Event] | None:
        parsed.append(len(lines))
        return decode_sequence(lines, seq)

    monkeypatch.setattr(reader_module, "decode_sequence", counted)
    sessions = OpenSessions()
    followers = [Follower(sessions, session, name) for name in "abc"]
    while not all(follower.at_end for follower in followers):
        for follower in followers:
            follower.read(1 << 14)
    again = len([size for size in parsed if size])  # at most the last line of each chunk is read twice
    assert [logged(follower.events) for follower in followers] == [list(range(4000))] * 3
    assert sum(parsed) <= 4000 + 2 + again
    for follower in followers:
        follower.reader.close()


def test_lines_are_parsed_once_while_they_are_written_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = lay_down(tmp_path, [at(0, 0)])
    parsed = []

    def counted(lines: Sequence[bytes], seq: int) -> list[Event] | None:
        parsed.append(len(lines))
        return decode_sequence(lines, seq)

    monkeypatch.setattr(reader_module, "decode_sequence", counted)
    sessions, numbers = OpenSessions(), count(1)
    followers = [Follower(sessions, session, name) for name in "abc"]

    def write(some: int) -> None:
        with open(session.path / segment_name(1), "ab") as file:
            for number in islice(numbers, some):
                file.write(encode({**at(number, number), "seq": number + 2}))

    for turn in range(20):
        write(30)
        for follower in followers[turn % 3 :] + followers[: turn % 3]:  # whoever comes later sees more
            follower.read(WHOLE, closed=None)
            write(1)
    for follower in followers:
        follower.read(WHOLE)
        assert logged(follower.events) == list(range(20 * 33 + 1))
        follower.reader.close()
    assert sum(parsed) < 1.1 * (20 * 33 + 2)


def test_what_is_kept_for_others_is_bounded_and_one_that_hangs_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(chunks, "STANDSTILL_S", 0.01)
    session = lay_down(tmp_path, [at(n, n) for n in range(5000)])
    sessions = OpenSessions()
    ahead, hanging = Follower(sessions, session, "ahead"), Follower(sessions, session, "hanging")
    hanging.read(1 << 12)
    kept = []
    waited = -time.monotonic()
    while not ahead.at_end:
        ahead.read(1 << 12)
        kept.append(sum(chunk.end - chunk.start[1] for chunk in ahead.reader._opened.reader.lines.chunks))
    waited += time.monotonic()
    assert logged(ahead.events) == list(range(5000))
    assert 0 < max(kept) <= 1 << 16
    assert waited < chunks.SLOW_THREAD_S, "it was waited for at each batch"
    while not hanging.at_end:
        hanging.read(1 << 14)
    assert hanging.events == ahead.events
    for follower in (ahead, hanging):
        follower.reader.close()


def test_the_last_who_reads_a_session_closes_its_files(tmp_path: Path) -> None:
    session = lay_down(tmp_path, [at(0, 0)])
    opened = set(os.listdir("/dev/fd"))
    sessions = OpenSessions()
    followers = [Follower(sessions, session, name) for name in "abc"]
    for follower in followers:
        follower.read(WHOLE)
        follower.reader.close()
        follower.reader.close()  # twice is once
    assert set(os.listdir("/dev/fd")) == opened
    with pytest.raises(OSError, match="Bad file descriptor"):
        followers[0].read(WHOLE)
