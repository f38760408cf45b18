"""A journal that is taken away under its writer: the run goes on in a new session, says so and counts the loss."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import runs
from harness.journals import ROOMY, HandClock, header, lines, logged, metrics, open_writer
from harness.runs import events, path_of, python

from stepspan import JsonlExporter
from stepspan.journal import layout
from stepspan.journal.journal import Journal
from stepspan.journal.layout import find_sessions
from stepspan.journal.liveness import is_alive_here, read_closed
from stepspan.journal.writer import SessionWriter
from stepspan.run import Run

start = runs.start
Start = Callable[..., Run]


def deleted(writer: SessionWriter) -> None:
    shutil.rmtree(writer.path.parents[2])


def closed(writer: SessionWriter) -> None:
    for fd in writer._descriptors._opened:
        os.close(fd)


@pytest.mark.parametrize("takes_away", [deleted, closed])
def test_a_run_whose_journal_is_taken_away_goes_on_in_a_new_session(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture, takes_away: Callable[[SessionWriter], None]
) -> None:
    clock = HandClock()
    journal = JsonlExporter(tmp_path / "runs", limits=ROOMY, clock=clock)
    run = start(exporters=[journal])
    first = journal.journal.session
    assert first is not None
    clock.skip(2)
    run.log_metrics({"n": 0})
    run.log_metrics({"n": 1})
    takes_away(first)
    clock.skip(2)
    for number in range(2, 5):
        run.log_metrics({"n": number})
    assert path_of(run) != first.path
    assert is_alive_here(path_of(run))
    clock.skip(2)
    run.close()
    _, gap, *others = events(run)
    assert gap["tag"] == "gap"
    assert gap["dropped"] == run.stats()["lost"] == 2, "what was written since the files were last seen"
    assert logged(others) == [2, 3, 4]
    closed = read_closed(path_of(run))
    assert closed is not None
    assert closed.status == "completed"
    told, summary = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert summary.endswith("warnings of this run: journal_gone 1")
    assert str(first.path) in told
    assert gap["why"] in told


@pytest.mark.parametrize("seconds", [0, 2], ids=["closed before it is noticed", "closed after it is noticed"])
def test_a_descriptor_that_is_somebody_elses_by_now_is_not_closed(tmp_path: Path, seconds: float) -> None:
    clock = HandClock()
    exporter = Journal(tmp_path / "runs", limits=ROOMY, clock=clock)
    numbers = iter(range(10))
    exporter.open(lambda: header(f"{next(numbers):016x}"), job_id="job", host="node")
    exporter.append(metrics(0))
    assert exporter.session is not None
    ours = set(exporter.session._descriptors._opened)
    closed(exporter.session)
    theirs: list[int] = []
    while not ours <= set(theirs):  # the numbers are given again
        theirs.append(os.open(tmp_path / str(len(theirs)), os.O_WRONLY | os.O_CREAT))
    clock.skip(seconds)
    if seconds:
        exporter.append(metrics(1))
    exporter.close("completed")
    for fd in theirs:
        os.write(fd, b"theirs")
        os.close(fd)
    assert [(tmp_path / str(number)).read_text() for number in range(len(theirs))] == ["theirs"] * len(theirs)
    assert len(list(find_sessions(tmp_path / "runs"))) == (2 if seconds else 1)


def test_a_journal_that_is_gone_when_the_run_ends_is_told_and_counted(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = start(exporters=[JsonlExporter(tmp_path / "runs", limits=ROOMY, clock=HandClock())])
    run.log_metrics({"n": 0})
    shutil.rmtree(tmp_path / "runs")
    run.close()
    assert run.stats()["lost"] == 3, "the run's begin, the metrics and the run's end"
    assert [r.getMessage() for r in caplog.records if "was deleted" in r.getMessage()]


def test_a_file_system_that_does_not_answer_for_a_while_has_deleted_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int) -> tuple[int, int, bool]:
        raise OSError(errno.EIO, "Input/output error")

    clock = HandClock()
    writer = open_writer(tmp_path, clock=clock)
    with monkeypatch.context() as patched:
        patched.setattr(layout, "_leads_to", broken)
        writer.append(metrics(0))
    clock.skip(2)
    writer.append(metrics(1))
    assert logged(lines(writer.path)) == [0, 1]


def test_what_is_printed_without_a_stdout_does_not_land_in_the_journal(start: Start, tmp_path: Path) -> None:
    done = python(
        """
        import contextlib, os
        os.closerange(0, 3)
        import stepspan
        with stepspan.start_run() as run:
            for fd in range(3):
                with contextlib.suppress(OSError):
                    os.write(fd, b"printed")
            run.log_metrics({"n": 1})
        """,
        tmp_path,
    )
    assert done.returncode == 0
    (session,) = find_sessions(tmp_path / "stepspan-runs")
    assert logged(lines(session.path)) == [1]
    assert (session.path / "lock").read_bytes() == b""
