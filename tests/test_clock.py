"""A wall clock that is wrong as a run starts, and is set later: event time is right soon, never goes back, and is told.

On the side of a receiver: `tests/test_mapping_clock.py` has what durations and spans are made of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.journals import (
    NOON,
    ROOMY,
    SECOND,
    HandClock,
    OpenJournal,
    assert_ordered,
    header,
    lines,
    logged,
    metrics,
)
from harness.processes import status_of_child
from harness.runs import all_spans, events, path_of
from harness.stack import Prometheus

from stepspan import JsonlExporter
from stepspan.events import Event
from stepspan.journal.clock import Clock
from stepspan.journal.cursor import Cursor, CursorState, Position
from stepspan.journal.journal import Journal
from stepspan.journal.layout import find_sessions
from stepspan.journal.liveness import Closed, write_closed
from stepspan.mapping.clock import EventTime
from stepspan.run import Run

start = runs.start
Start = Callable[..., Run]
HOUR = 3600.0


class Machine:
    """A machine whose wall clock is `wrong` by so many seconds; `clock` is a journal's on it."""

    def __init__(self, wrong: float = 0.0) -> None:
        self.since, self.wrong, self.compared, self.slow = HandClock(), wrong, 0, 0.0
        self.clock = Clock(self.since, self._wall)

    def _wall(self) -> int:
        self.compared += 1
        self.since.skip(self.slow)
        return self.since.now + int(self.wrong * SECOND)

    def journal(self, place: Path, **about: Any) -> OpenJournal:
        return OpenJournal(place, header(started=self.clock(), **about), limits=ROOMY, clock=self.clock)


def clock_lines(found: list[Event]) -> list[Event]:
    return [event for event in found if event["tag"] == "clock"]


def by_number(found: list[Event]) -> dict[int, int]:
    """The number that a metrics line logged -> its time (ns since noon)."""
    return {event["metrics"]["n"]: event["ts"] - NOON for event in found if event["tag"] == "metrics"}


def near(seconds: float) -> Any:
    return pytest.approx(seconds * SECOND, abs=0.01 * SECOND)


def test_a_clock_that_was_behind_is_set_forward_at_once(tmp_path: Path) -> None:
    machine = Machine(wrong=-72 * HOUR)
    journal = machine.journal(tmp_path)
    machine.since.skip(5)
    journal.append(metrics(0))
    machine.wrong = 0.0
    machine.since.skip(60)
    journal.append(metrics(1))
    machine.since.skip(1)
    journal.append(metrics(2))
    journal.close("completed")
    found = lines(journal.path)
    assert_ordered(found)
    assert by_number(found) == {0: near(5 - 72 * HOUR), 1: near(65), 2: near(66)}
    (line,) = clock_lines(found)
    assert line["forward"] == near(72 * HOUR)
    assert line["ts"] - NOON == near(65)


def test_a_clock_that_is_ahead_runs_at_half_speed_until_it_is_right(tmp_path: Path) -> None:
    machine = Machine(wrong=20.0)
    journal = machine.journal(tmp_path)
    machine.since.skip(5)
    journal.append(metrics(0))
    machine.wrong = 0.0
    for number in range(1, 61):
        machine.since.skip(2)
        journal.append(metrics(number))
    journal.close("completed")
    found = lines(journal.path)
    assert_ordered(found)
    (line,) = clock_lines(found)
    begins = line["ts"] - NOON
    assert line["ahead"] == near(20)
    times = by_number(found)
    first = next(n for n in times if times[n] > begins)
    assert [times[n] - times[n - 1] for n in range(first + 1, first + 19)] == [near(1)] * 18
    assert times[60] == near(5 + 60 * 2), "it is right again"
    time_of = EventTime()
    time_of.set(line)
    elapsed = time_of.elapsed
    assert [elapsed(times[n] + NOON, times[n + 3] + NOON) for n in range(57)] == [near(6)] * 57


def test_a_small_difference_is_none(tmp_path: Path) -> None:
    machine = Machine()
    journal = machine.journal(tmp_path)
    for wrong in (0.4, -0.4, 0.0, 0.3):
        machine.wrong = wrong
        machine.since.skip(61)
        journal.append(metrics(0))
    assert clock_lines(lines(journal.path)) == []


def test_it_is_compared_each_second_in_the_first_minutes_and_then_once_a_minute(tmp_path: Path) -> None:
    machine = Machine()
    journal = machine.journal(tmp_path)
    compared = []
    for _ in range(3600):
        machine.since.skip(1)
        before = machine.compared
        journal.append(metrics(0))
        if machine.compared > before:
            compared.append((machine.since.now - NOON) // SECOND)
    assert compared[:500] == list(range(1, 501))
    assert [later - earlier for earlier, later in pairwise(compared[-40:])] == [60] * 39
    assert len(compared) < 660


def test_a_clock_that_is_set_while_another_correction_is_under_way(tmp_path: Path) -> None:
    machine = Machine(wrong=1000.0)
    journal = machine.journal(tmp_path)
    machine.since.skip(5)
    journal.append(metrics(0))
    machine.wrong = 0.0
    machine.since.skip(60)
    journal.append(metrics(1))
    machine.since.skip(100)
    machine.wrong = 1200.0  # somebody set it again
    journal.append(metrics(2))
    machine.since.skip(61)
    journal.append(metrics(3))
    assert [set(line) & {"forward", "ahead"} for line in clock_lines(lines(journal.path))] == [{"ahead"}, {"forward"}]
    assert by_number(lines(journal.path))[3] == near(226 + 1200)
    assert_ordered(lines(journal.path))


def test_a_process_that_is_paused_while_it_compares_takes_no_clock_for_wrong(tmp_path: Path) -> None:
    machine = Machine()
    journal = machine.journal(tmp_path)
    machine.since.skip(5)
    machine.slow = 3.0  # SIGSTOP between two readings
    journal.append(metrics(0))
    machine.slow = 0.0
    machine.since.skip(60)
    journal.append(metrics(1))
    assert clock_lines(lines(journal.path)) == []


def test_the_next_session_goes_on_at_half_speed_and_says_so(tmp_path: Path) -> None:
    machine, numbers = Machine(wrong=100.0), iter(range(10))
    journal = Journal(tmp_path, limits=ROOMY, clock=machine.clock)
    journal.open(lambda: header(f"{next(numbers):016x}", started=machine.clock()), job_id="job", host="node")
    machine.since.skip(5)
    journal.append(metrics(0))
    machine.wrong = 0.0
    machine.since.skip(60)
    journal.append(metrics(1))
    machine.since.skip(60)
    first = journal.session
    assert first is not None
    path = first.path
    write_closed(path, Closed(first.seq, first.ts, "interrupted"), by="deliverer")
    journal.append(metrics(2))
    assert journal.session is not None
    second = lines(journal.session.path)
    assert journal.session.path != path
    assert [event["tag"] for event in second] == ["header", "clock", "metrics"]
    assert second[1]["ahead"] == near(70)


def test_a_forked_child_has_right_times_at_once(tmp_path: Path) -> None:
    machine, numbers = Machine(wrong=100.0), iter(range(10))
    journal = Journal(tmp_path, limits=ROOMY, clock=machine.clock)
    journal.open(lambda: header(f"{next(numbers):016x}", started=machine.clock()), job_id="job", host="node")
    machine.since.skip(5)
    journal.append(metrics(0))
    machine.wrong = 0.0
    machine.since.skip(60)
    journal.append(metrics(1))
    pid = os.fork()
    if not pid:
        try:
            journal.after_fork()
            machine.since.skip(20)
            journal.append(metrics(2))
            journal.close("completed")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(status_of_child(pid)) == 0
    sessions = [lines(session.path) for session in find_sessions(tmp_path)]
    (child,) = [found for found in sessions if logged(found) == [2]]
    assert [event["tag"] for event in child] == ["header", "metrics"]
    assert by_number(child) == {2: near(85)}


def test_a_journal_that_is_opened_by_its_first_event_has_right_times_at_once(tmp_path: Path) -> None:
    machine = Machine(wrong=20 * 60.0)
    journal = Journal(tmp_path, limits=ROOMY, clock=machine.clock)
    journal.open(lambda: header(started=machine.clock()), job_id="job", host="node", at_once=False)
    machine.wrong = 0.0
    machine.since.skip(5)
    journal.append(metrics(0))
    assert journal.session is not None
    found = lines(journal.session.path)
    assert [event["tag"] for event in found] == ["header", "metrics"]
    assert found[0]["started"] - NOON == near(5)
    assert by_number(found) == {0: near(5)}


# ---------------------------------------------------------------- wrong only as the run began


@pytest.mark.parametrize("wrong", [-72 * HOUR, 20 * 60.0, -300.0], ids="{} s".format)
def test_a_clock_that_is_set_at_once_has_never_been_wrong(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong: float
) -> None:
    machine = Machine(wrong=wrong)
    run = start(exporters=[JsonlExporter(tmp_path / "runs", limits=ROOMY, clock=machine.clock)])
    with run.epoch(0):
        machine.since.skip(0.25)
        scope = run.step(0)
        with scope:
            machine.since.skip(0.25)
            machine.wrong = 0.0
            run.log_metrics({"n": 0})
    machine.since.skip(2)
    run.log_metrics({"n": 1})
    run.close()
    (session,) = find_sessions(tmp_path / "runs")
    assert session.path == path_of(run)
    assert not [name for name in os.listdir(session.path.parent) if name.startswith(".rank")]
    found = lines(session.path)
    assert_ordered(found)
    assert abs(found[0]["started"] - NOON) < SECOND
    assert by_number(found) == {0: near(0.5), 1: near(2.5)}
    (line,) = clock_lines(found)
    assert line["before"] == near(wrong)
    (step,) = [event for event in found if event["tag"] == "step_begin"]
    assert (scope.seq, scope.ts) == (step["seq"], step["ts"]), "what will be known of it by its ids"
    spans = all_spans(session.path)
    assert [span.end - span.start for span in spans if span.name == "training.step"] == [near(0.25)]
    assert not [span for span in spans if span.error]
    (told,) = [
        r.getMessage() for r in caplog.records if "clock" in r.getMessage() and "warnings of" not in r.getMessage()
    ]
    assert ("ahead" if wrong > 0 else "behind") in told
    assert run.stats()["lost"] == 0
    assert run.trace_id == next(span.trace_id.hex() for span in spans if span.name == "training.run")


def test_what_was_delivered_before_is_not_written_again(tmp_path: Path) -> None:
    machine = Machine(wrong=20 * 60.0)
    journal = machine.journal(tmp_path)
    journal.append(metrics(0))
    (journal.path / "cursors").mkdir()
    with closing(Cursor(journal.path / "cursors" / "a.metrics")) as cursor:
        cursor.write(CursorState(position=Position(1, 10, 2, 3)))
    machine.wrong = 0.0
    machine.since.skip(0.1)
    path = journal.path
    journal.append(metrics(1))
    assert journal.path == path
    assert clock_lines(lines(path))[0]["ahead"] == near(20 * 60)
    assert_ordered(lines(path))


def test_a_clock_of_a_test_is_never_set(tmp_path: Path) -> None:
    clock = HandClock()
    journal = OpenJournal(tmp_path, header(), limits=ROOMY, clock=clock)
    for number in range(10):
        clock.skip(61)
        journal.append(metrics(number))
    assert clock_lines(lines(journal.path)) == []


# ---------------------------------------------------------------- into a real Prometheus


@pytest.fixture
def wall_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the wall clock of this process wrong by so many seconds."""
    real = time.time_ns

    def set_wrong(seconds: float) -> None:
        monkeypatch.setattr(time, "time_ns", lambda: real() + int(seconds * SECOND))

    return set_wrong


@pytest.mark.stack
@pytest.mark.parametrize("late", [False, True], ids=["set at once", "set after a while"])
@pytest.mark.parametrize("wrong", [-72 * HOUR, 20 * 60.0, -300.0], ids="{} s".format)
def test_a_clock_that_is_set_costs_no_point_after_that(
    start: Start, prometheus: Prometheus, monkeypatch: pytest.MonkeyPatch, wall_clock: Any, wrong: float, late: bool
) -> None:
    """A clock that was ahead for a while goes on at half speed: those points come when the store has got there."""
    job = f"clock {wrong} {late}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"{prometheus.otlp_endpoint}/v1/metrics")
    wall_clock(wrong)
    run = start(job_id=job)
    assert run._pipeline is not None
    journal: Any = run._pipeline.journal
    if late:
        journal._young = None
        run.log_metrics({"early": 1.0})
    wall_clock(0.0)
    journal._next_check = journal.clock._compare_at = 0  # it is time to
    for number in range(10):
        run.log_metrics({"loss": float(number)})
        time.sleep(0.02)
    if late and wrong > 0:
        assert clock_lines(events(run))[0]["ahead"] == near(wrong)
        return
    assert run.flush(20)
    run.close()
    found = prometheus.series(f'training_loss{{job_id="{job}"}}[1h]')
    assert [value for _, samples in found for _, value in samples if value == value] == [float(n) for n in range(10)]
