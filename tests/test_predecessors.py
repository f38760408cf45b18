"""Sessions of one instance that follow one another closely: the later one's points lie behind the earlier one's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from harness import runs
from harness.events_of import key_of
from harness.journals import NOON, lay_down, metrics
from harness.processes import until
from harness.runs import events, path_of

from stepspan.events import MILLISECOND_NS as MS
from stepspan.events import SECOND_NS as SECOND
from stepspan.events import Event
from stepspan.journal.layout import find_sessions
from stepspan.mapping.records import MAX_LEAD_MS
from stepspan.reading.sessions import read_session
from stepspan.recording.predecessors import first_free_time
from stepspan.run import Run

start = runs.start
Start = Callable[..., Run]


def header(where: Run | Path) -> Event:
    return events(where)[0]


def points(directory: Path) -> list[list[tuple[Any, int, Any]]]:
    """The points of each session, in the order in which they began."""
    sessions = sorted((read_session(path) for path in find_sessions(directory)), key=lambda s: s.header["started"])
    return [
        [(key_of(series), ts // MS, value) for series, ts, value in cast("Any", session.records("metrics"))]
        for session in sessions
    ]


def assert_apart(directory: Path) -> None:
    """No point of a session lies before or beside one of a session before it."""
    before = 0
    for found in points(directory):
        assert min(ts for _, ts, _ in found) > before
        before = max(ts for _, ts, _ in found)


@pytest.mark.parametrize("count", [0, 3, 200, MAX_LEAD_MS + 500])
def test_a_run_that_follows_at_once_begins_behind_the_one_before(start: Start, tmp_path: Path, count: int) -> None:
    for _ in range(3):
        with start(job_id="j", directory=tmp_path) as run:
            for number in range(count):
                run.log_metrics({"loss": float(number)}, step=number)
    assert_apart(tmp_path)
    for found in points(tmp_path):
        losses = [value for name, _, value in found if name[0] == "training.loss" and value is not None]
        assert losses[-1:] == [float(count - 1)][:count]
        assert len(losses) >= min(count, MAX_LEAD_MS)


def test_a_killed_run_that_is_started_again_at_once_begins_behind_itself(start: Start, tmp_path: Path) -> None:
    code = """
        import stepspan
        run = stepspan.start_run(job_id="j", directory=".")
        for number in range(1 << 60):
            run.log_metrics({"loss": number}, step=number)
    """
    script = tmp_path / "train.py"
    script.write_text(
        "\n".join(line.strip() if "log" not in line else "    " + line.strip() for line in code.split("\n"))
    )
    env = {**{n: v for n, v in os.environ.items() if not runs.is_ours(n)}, "STEPSPAN_SAMPLERS": "none"}
    with subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, env=env, stderr=subprocess.DEVNULL) as process:
        until(lambda: any(s.path.joinpath("000001.jsonl").stat().st_size > 1 << 20 for s in find_sessions(tmp_path)))
        process.send_signal(signal.SIGKILL)
    (killed,) = find_sessions(tmp_path)
    with start(job_id="j", directory=tmp_path) as run:
        run.log_metrics({"loss": 1.0})
        began = header(run)
    session = read_session(killed)
    last = max(ts for _, ts, _ in cast("Any", session.records("metrics")))
    assert last > session.events[-1]["ts"]
    assert last < began["not_before"] < began["started"] + 15 * SECOND


def test_a_run_that_follows_later_begins_with_its_first_line(start: Start, tmp_path: Path) -> None:
    with start(job_id="j", directory=tmp_path) as run:
        run.log_metrics({"loss": 1.0})
        path = path_of(run)
    now = header(path)["started"] + SECOND
    assert first_free_time(tmp_path, "j", 0, "", now) is None


def test_another_instance_is_in_nobodys_way(start: Start, tmp_path: Path) -> None:
    with start(job_id="j", directory=tmp_path) as run:
        for number in range(100):
            run.log_metrics({"loss": float(number)})
    now = events(path_of(run))[-1]["ts"]
    assert first_free_time(tmp_path, "j", 0, "", now) is not None
    for job, rank, role in (("k", 0, ""), ("j", 1, ""), ("j", 0, "worker1")):
        assert first_free_time(tmp_path, job, rank, role, now) is None


def test_a_session_that_ran_slowly_is_not_far_ahead_however_long_it_is(tmp_path: Path) -> None:
    begin = metrics(0)
    lines = [{**begin, "ts": NOON + SECOND + number * 2 * MS, "seq": number + 2} for number in range(8000)]
    session = lay_down(
        tmp_path / "j" / "node", lines[:4000], [{**line, "seq": line["seq"] + 1} for line in lines[4000:]]
    )
    assert session.segments() == [1, 2]
    last = lines[-1]["ts"]
    found = first_free_time(tmp_path, "j", 0, "", last)
    assert found is not None
    assert last < found < last + 10 * MS


def test_a_last_line_of_any_length_is_read(tmp_path: Path) -> None:
    begin = NOON + SECOND
    long = {**metrics(0), "ts": begin, "seq": 2, "metrics": {"k" * 300_000: 1.0}}
    lay_down(tmp_path / "j" / "node", [long])
    found = first_free_time(tmp_path, "j", 0, "", begin)
    assert found is not None
    assert begin < found < begin + 10 * MS


@pytest.mark.parametrize("behind", [300, 86_400])
def test_a_session_whose_clock_was_far_ahead_moves_nothing(tmp_path: Path, behind: int) -> None:
    lay_down(tmp_path / "j" / "node", [{**metrics(0), "ts": NOON + MS, "seq": 2}])
    assert first_free_time(tmp_path, "j", 0, "", NOON - behind * SECOND) is None


def test_what_is_no_journal_is_in_nobodys_way(tmp_path: Path) -> None:
    session = lay_down(tmp_path / "j" / "node", [b"no line\n", b'{"ts":1'])
    assert session.segments() == [1]
    assert first_free_time(tmp_path, "j", 0, "", 1) is None
    assert first_free_time(tmp_path / "nowhere", "j", 0, "", 1) is None
