"""Reading sessions: the same while they are written, after their end and after a crash; and nothing is changed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from harness.delivery import Training, trained
from harness.journals import header, lay_down, metrics

from stepspan.errors import JournalError
from stepspan.identity import host_facts
from stepspan.journal.cursor import Position
from stepspan.journal.layout import segment_name
from stepspan.journal.liveness import Closed, write_closed
from stepspan.journal.reader import JournalReader
from stepspan.reading.runs import delivery_totals, summarise
from stepspan.reading.sessions import ALL_LINES, SessionReader, job_folder, read_batches, read_session


def test_a_session_in_batches_is_the_same_as_whole(tmp_path: Path) -> None:
    path = trained(tmp_path, 300)
    with SessionReader(path) as reader:
        batches = list(reader.batches(size=4096))
    assert len(batches) > 3
    session = read_session(path)
    assert [event for batch in batches for event in batch.events] == session.events
    assert session.header == session.events[0]
    assert session.closed == Closed(session.events[-1]["seq"], session.events[-1]["ts"], "completed")


def test_reading_can_go_on_where_it_stopped(tmp_path: Path) -> None:
    with closing(JournalReader(trained(tmp_path, 50))) as reader:
        first = next(read_batches(reader, Position(), closed=None, size=1024))
        rest = [event for batch in read_batches(reader, first.position, closed=ALL_LINES) for event in batch.events]
    assert rest[0]["seq"] == first.events[-1]["seq"] + 1


def test_a_session_that_is_still_written_is_read_to_its_last_whole_line(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.emit("metrics", step=0, split="train", metrics={"loss": 0.5})
    with open(training.path.path / segment_name(1), "ab") as segment:
        segment.write(b'{"ts":1')
    session = read_session(training.path)
    assert session.events[-1]["tag"] == "metrics"
    assert session.closed is None
    assert [record[0].name for record in session.records("metrics")].count("training.loss") == 1  # type: ignore[index, union-attr]


def test_the_records_of_a_session_that_has_ended_include_its_end(tmp_path: Path) -> None:
    session = read_session(trained(tmp_path, 2))
    assert [span.name for span in session.records("traces")] == ["training.step"] * 2 + ["training.run"]  # type: ignore[union-attr]
    assert session.records("metrics")[-1][2] is None  # type: ignore[index]


def test_how_a_session_ended(tmp_path: Path) -> None:
    boot_id = host_facts().boot_id
    training = Training(tmp_path / "a", boot_id=boot_id)
    with SessionReader(training.path) as running:
        assert running.status(boot_id) == "running"
    training.die()
    with SessionReader(training.path) as dead:
        assert dead.status(boot_id) == "interrupted"
        assert dead.status("another boot") == "running", "only silence tells, and it has just been written"
    with SessionReader(trained(tmp_path / "b", 1)) as completed:
        assert completed.status("") == "completed"


def test_the_end_may_stand_in_a_state_directory(tmp_path: Path) -> None:
    training = Training(tmp_path)
    path = training.die()
    (tmp_path / "state" / path.path.name).mkdir(parents=True)
    write_closed(tmp_path / "state" / path.path.name, Closed(2, training.now, "interrupted"), by="deliverer")
    with SessionReader(path, tmp_path / "state") as reader:
        assert reader.status("") == "interrupted"
    with SessionReader(path) as reader:
        assert reader.closed is None


def test_a_session_without_a_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no segment begins with a header"):
        read_session(lay_down(tmp_path, [b"nothing\n"]))


def test_steps_that_end_in_one_millisecond_all_count(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for number in range(100):
        step = training.emit("step_begin", parent=training.run, step=number, split="train")
        span = training.emit("span_begin", parent=step, name="all_reduce", collective=True)
        training.now += 7000 if number == 50 else 0
        training.emit("span_end", begin=span)
        training.emit("step_end", begin=step)
    (run,) = summarise([training.end()], boot_id="")
    (session,) = run["sessions"]
    assert session["steps"] == 100
    assert session["step_time"] == pytest.approx({"p50": 3e-6, "p99": 3e-6, "max": 10e-6})
    assert session["collective_wait"] == pytest.approx(1e-6)


def test_sessions_of_one_job_are_one_run_wherever_they_lie(tmp_path: Path) -> None:
    paths = [
        lay_down(
            tmp_path / str(number), [header(f"{number:016}", job_id=job), metrics(number)], session=f"{number:016}"
        )
        for number, job in enumerate(("a", "b", "a"))
    ]
    runs = summarise(paths, boot_id="")
    assert [(run["job"], len(run["sessions"])) for run in runs] == [("a", 2), ("b", 1)]


def test_the_job_folder_of_a_session(tmp_path: Path) -> None:
    assert job_folder(Path("/runs/job/host/rank-00000-0123456789abcdef")) == "job"
    assert job_folder(Path("/rank-00000-0123456789abcdef")) == ""


def test_delivery_is_summed_over_sessions() -> None:
    state = {"delivered": 5, "rejected": 0, "filtered": 1, "thinned": 3, "pending": 2, "finished": False, "lag": 1.5}
    held = {**state, "lag": 3.0, "finished": True, "state": "hold", "message": "404"}
    ledgers = [
        {"destinations": {"d": {"metrics": {**state, "state": "ok", "message": ""}}}},
        {"destinations": {"d": {"metrics": held}}},
        {"destinations": {}},
    ]
    assert delivery_totals(ledgers) == [  # type: ignore[arg-type]
        {"destination": "d", "signal": "metrics", "delivered": 10, "rejected": 0, "filtered": 2, "thinned": 6,
         "pending": 4,
         "sessions": 2, "finished": 1, "held": 1, "lag": 3.0, "messages": ["404"]}
    ]  # fmt: skip


def test_a_step_that_fails_is_counted(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for status in ({}, {"status": "error"}, {"status": "skipped"}):
        step = training.emit("step_begin", parent=training.run, step=0, split="train")
        training.emit("step_end", begin=step, **status)
    (run,) = summarise([training.end()], boot_id="")
    assert run["sessions"][0]["failed_steps"] == 1
