"""Ctrl-C at any moment of a journal's work, caught as a notebook does: nothing is lost, doubled or left half done.

An exception of a signal handler (KeyboardInterrupt, SystemExit, an alarm's TimeoutError) comes where the interpreter
looks for signals: as a Python function begins, and after a call of a C function has returned. A profile function is
called at the same places and may raise; so each place of a scenario is tried, one after the other. That real signals
come there, too, the last test shows.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from harness import runs
from harness.journals import (
    ROOMY,
    SECOND,
    FaultyDisk,
    HandClock,
    assert_ordered,
    closed_of,
    handled,
    header,
    lines,
    logged,
    metrics,
    session_of,
)
from harness.receiver import ScriptedReceiver
from harness.runs import path_of

from stepspan import JsonlExporter
from stepspan.events import Event
from stepspan.journal import layout
from stepspan.journal import writer as writer_module
from stepspan.journal.clock import Clock
from stepspan.journal.cursor import Position
from stepspan.journal.disk import Limits
from stepspan.journal.format import decode, template
from stepspan.journal.journal import Journal
from stepspan.journal.layout import find_sessions
from stepspan.journal.liveness import is_alive_here, read_closed
from stepspan.journal.reader import JournalReader
from stepspan.reading.sessions import read_batches
from stepspan.run import Run

start = runs.start
Start = Callable[..., Run]
SMALL = replace(ROOMY, segment_bytes=700)


LINE = template("metrics", b',"split":"train","step":%d,"metrics":%b')


class Interrupter:
    """Raises at the `place`-th place where a signal's handler could, counted over all blocks it is used for."""

    def __init__(self, place: int, error: type[BaseException]) -> None:
        self.place, self.error = place, error
        self.passed = 0
        self.where = ""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        sys.setprofile(self._look)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        if event in {"call", "c_return"} and argument is not sys.setprofile and frame.f_code.co_name != "__call__":
            self.passed += 1
            if self.passed == self.place:
                name = getattr(argument, "__name__", "")
                self.where = f"{event} {name} in {frame.f_code.co_name}:{frame.f_lineno}"
                raise self.error


@dataclass
class Outcome:
    """What a scenario did."""

    journal: Journal
    appended: list[int] = field(default_factory=list)
    """Calls that returned."""
    interrupted: list[int] = field(default_factory=list)
    read: list[Event] = field(default_factory=list)
    """What a reader saw that read on after each call."""


class LiveReader:
    """Reads what is there, again and again, as a deliverer does."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._reader: JournalReader | None = None
        self._position = Position()

    def read(self, journal: Journal) -> None:
        assert journal.session is not None
        if self._reader is None or self._reader.session.path != journal.session.path:
            self.close()
            self._reader = JournalReader(session_of(journal.session.path), clock=count(step=1).__next__)
            self.events, self._position = [], Position()
        for _ in range(2):  # the newest millisecond settles
            for batch in read_batches(self._reader, self._position, closed=None, size=1 << 16):
                self._position = batch.position
                self.events += batch.events

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()


class Machine(FaultyDisk):
    """A disk, and the clock beside it."""

    clock_ahead = 20 * SECOND


def write_all(interrupter: Interrupter, place: Path, disk: Machine, limits: Limits, work: Any) -> Outcome:
    """Open a journal, append, close; again where an exception came."""
    numbers, clock, live = count(), HandClock(), LiveReader()
    wrong = Clock(clock, lambda: clock.now + disk.clock_ahead) if work is set_the_clock else clock
    journal = Journal(place, limits=limits, clock=wrong, disk=disk)
    outcome = Outcome(journal)
    while journal.session is None:
        with suppress(interrupter.error), interrupter():
            journal.open(lambda: header(f"{next(numbers):016x}"), job_id="job", host="node")
    for number in range(12):
        clock.skip(0.3)
        work(number, disk)
        event, values, session = metrics(number), b'{"n":%d}' % number, journal.session
        try:
            with interrupter():
                if number % 2:
                    journal.append(event)
                else:
                    journal.append_line(LINE, 0, values, session)
            outcome.appended.append(number)
        except interrupter.error:
            outcome.interrupted.append(number)
        live.read(journal)
    for _ in range(2):
        with suppress(interrupter.error), interrupter():
            journal.close("completed")
    live.read(journal)
    live.close()
    outcome.read = live.events
    return outcome


def nothing(number: int, disk: Machine) -> None:
    """The disk takes everything."""


def full_for_a_while(number: int, disk: Machine) -> None:
    """It cuts a line, takes none for a second, and then all."""
    if number == 3:
        disk.space = 50
    if number == 9:
        disk.space = None


def low_for_a_while(number: int, disk: Machine) -> None:
    disk.is_low = 3 <= number < 9


def set_the_clock(number: int, disk: Machine) -> None:
    """It was ahead as the run began; later it turns out to be behind, and then to be ahead."""
    disk.clock_ahead = 0 if number < 5 else 30 * SECOND if number < 8 else 0


SCENARIOS: dict[str, tuple[Limits, Callable[[int, Machine], None]]] = {
    "plain": (SMALL, nothing),
    "synced": (replace(SMALL, sync_every=0), nothing),
    "the oldest go": (replace(SMALL, session_bytes=1500), nothing),
    "full": (SMALL, full_for_a_while),
    "low": (replace(ROOMY, segment_bytes=100_000), low_for_a_while),
    "clock": (SMALL, set_the_clock),
}


STRIDE = 13
"""Each case tries every so many-th place, and together they try all that they have in common."""
CASES = [(scenario, error) for error in (KeyboardInterrupt, TimeoutError) for scenario in SCENARIOS]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that were just being opened
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: f"{CASES[case][0]}, {CASES[case][1].__name__}")
def test_an_exception_at_any_place_of_a_journals_work_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: int
) -> None:
    monkeypatch.setattr(writer_module, "ALWAYS_BYTES", 900)
    scenario, error = CASES[case]
    limits, work = SCENARIOS[scenario]
    for place in count(case + 1, STRIDE):
        interrupter = Interrupter(place, error)
        directory = tmp_path / str(place)
        outcome = write_all(interrupter, directory, Machine(), limits, work)
        check(outcome, interrupter, directory, scenario)
        if interrupter.passed < place:
            break
    assert place > 300


def check(outcome: Outcome, interrupter: Interrupter, directory: Path, scenario: str) -> None:
    where, journal = interrupter.where, outcome.journal
    assert journal.session is not None
    assert not journal._lock._is_owned(), where  # type: ignore[attr-defined]
    found = list(find_sessions(directory))
    assert [session.path for session in found] == [journal.session.path], where
    assert not is_alive_here(journal.session.path), where
    if scenario == "the oldest go":
        return
    raw = b"".join((journal.session.path / f"{n:06d}.jsonl").read_bytes() for n in found[0].segments())
    events = lines(journal.session.path) if scenario != "full" else whole_lines(raw)
    assert_ordered(events)
    values = logged(events)
    assert values == sorted(set(values)), where
    assert set(values) >= set(outcome.appended), where
    if not where.startswith("call  in append"):  # it had begun
        assert set(values) >= set(outcome.interrupted), where
    assert journal.session.lost == 0, where
    closed = read_closed(journal.session.path)
    assert closed is not None, where
    assert (closed.seq, closed.status, closed.lost) == (events[-1]["seq"], "completed", 0), where
    assert logged(outcome.read) == values, where
    if scenario == "clock":
        set_by = [set(event) & {"before", "forward", "ahead"} for event in events if event["tag"] == "clock"]
        assert set_by[0] <= {"before", "ahead"}, where  # the latter where nothing could be written again
        assert set_by[1:] == [{"forward"}, {"ahead"}], where


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_signals_at_random_moments_cost_nothing(start: Start, tmp_path: Path) -> None:
    """Real signals, through the whole of a run: only a call that had not come to the journal yet may be lost."""
    run = start(exporters=[JsonlExporter(tmp_path / "runs", limits=replace(ROOMY, segment_bytes=5000))])
    chance = random.Random(56)
    returned, interrupted, number = [], 0, 0

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with handled(signal.SIGALRM, interrupt), no_garbage_collection():  # whose callbacks pass no exception on
        while interrupted < 200:
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, 0.002))
                for _ in range(1000):  # then the timer is set again, should an object's __del__ have met the signal
                    number += 1
                    run.log_metrics({"n": number})
                    returned.append(number)
            except KeyboardInterrupt:
                interrupted += 1
    run.close()
    values = logged(lines(path_of(run)))
    assert values == sorted(set(values))
    assert set(values) >= set(returned)
    assert_ordered(lines(path_of(run)))
    assert closed_of(path_of(run)).seq == len(lines(path_of(run))) == run.stats()["journaled"]
    assert run.stats()["lost"] == 0


def test_a_run_whose_end_is_interrupted_has_ended(start: Start, tmp_path: Path) -> None:
    """While a device or a thread is waited for; afterwards nobody would end it."""

    class Slow:
        def stop(self) -> None:
            raise KeyboardInterrupt

    run = start(exporters=[JsonlExporter(tmp_path / "runs", limits=ROOMY)])
    run.log_metrics({"n": 1})
    run._recorder.add_background_task(Slow())
    with pytest.raises(KeyboardInterrupt):
        run.close()
    assert closed_of(path_of(run)).status == "completed"
    assert not is_alive_here(path_of(run))
    assert [event["tag"] for event in lines(path_of(run))] == ["header", "run_begin", "metrics", "run_end"]


def test_a_rotation_that_ctrl_c_interrupts_is_delivered_whole(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes just after the next segment's file was made: from then on a reader takes the old one for complete."""
    interrupted: list[int] = []

    def open_file(name: str, *arguments: Any, **named: Any) -> int:
        fd = layout.open_file(name, *arguments, **named)
        if name == "000003.jsonl" and not interrupted:
            interrupted.append(fd)
            raise KeyboardInterrupt
        return fd

    monkeypatch.setattr(writer_module, "open_file", open_file)
    monkeypatch.setenv("STEPSPAN_SEGMENT_BYTES", "4096")
    with ScriptedReceiver() as receiver:
        run = start(endpoint=receiver.url)
        for number in range(200):
            with suppress(KeyboardInterrupt):
                run.log_metrics({"n": number})
            time.sleep(0.0011)
        assert run.flush(20)
        run.close()
        assert interrupted
        received = sorted(p.number for p in receiver.points("training.n") if p.value is not None)
    assert received == list(range(200))
    os.close(interrupted[0])


def whole_lines(raw: bytes) -> list[Event]:
    """The events of a journal with a torn line."""
    found = []
    for line in raw.split(b"\n"):
        with suppress(Exception):
            found.append(decode(line))
    return found
