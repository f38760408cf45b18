"""Whose data goes where: a live run sends what was begun for its destination, and its own job; the rest is a sync's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.delivery import Scripted, options, run_to_end, trained
from harness.processes import until
from harness.receiver import ScriptedReceiver, losses
from harness.runs import command, python

from stepspan.deliver.ledgers import cursors
from stepspan.deliver.scheduler import Scheduler
from stepspan.deliver.sessions import LiveSessions
from stepspan.deliver.task import DeliveryTask
from stepspan.exporters.memory import MemoryExporter
from stepspan.exporters.otlp import OtlpExporter
from stepspan.journal.cursor import CursorInUse
from stepspan.journal.layout import find_sessions
from stepspan.run import Run

start = runs.start

RUN = """
import os, signal, socket, sys
import stepspan
socket.gethostname = lambda: host
with stepspan.start_run(job_id=job, directory="runs", rank=rank, world_size=2, local_rank=0) as run:
    for value in values:
        run.log_metrics({"loss": value})
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    assert run.flush(20) or not endpoint
"""


def run(
    place: Path, job: str, *values: float, endpoint: str = "", host: str = "a", rank: int = 0, killed: bool = False
) -> None:
    """A run of one rank, whose deliverer has gone when this returns."""
    about = f"job, values, endpoint, host, rank, killed = {(job, values, endpoint, host, rank, killed)!r}\n"
    found = python(about + RUN, place, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, STEPSPAN_SAMPLERS="none")
    assert found.returncode == (-9 if killed else 0), found.stderr
    if endpoint and not killed:
        destination = OtlpExporter(endpoint, env={}).destination
        until(lambda: _finished(place / "runs" / job / host, destination))


def _finished(where: Path, destination: str) -> bool:
    signals = [cursors(session.path).get(destination, {}) for session in find_sessions(where)]
    return any(states and all(state.position.finished for state in states.values()) for states in signals)


def test_what_was_recorded_offline_stays_offline_until_a_sync(tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver:
        run(tmp_path, "private", 1.0)
        run(tmp_path, "today", 2.0, endpoint=receiver.url)
        assert losses(receiver) == {"today": {2.0}}
        assert {each["attributes"].get("job_id") for each in receiver.spans()} <= {None}
        shown = command("status", tmp_path / "runs").stdout
        private, today = shown.split("today\n")
        assert "not sent" in private
        assert "not sent" not in today
        assert "begun for no destination: 1; `stepspan sync PATH` sends what no run does" in today
        assert not [*(tmp_path / "runs" / "private").glob("*/*/cursors")]
        synced = command("sync", tmp_path / "runs", "--endpoint", receiver.url)
        assert synced.returncode == 0, synced.stdout + synced.stderr
        assert losses(receiver) == {"today": {2.0}, "private": {1.0}}


def test_an_attempt_without_a_destination_goes_with_a_later_one_of_its_job(tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver:
        run(tmp_path, "job", 1.0)
        run(tmp_path, "job", 2.0, endpoint=receiver.url)
        until(lambda: losses(receiver) == {"job": {1.0, 2.0}})


def test_what_a_receiver_missed_goes_to_it_with_the_next_run_and_to_no_other(tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver, ScriptedReceiver() as other:
        destination = OtlpExporter(receiver.url, env={}).destination
        trained(tmp_path / "runs", 2, destinations=[destination])
        run(tmp_path, "elsewhere", 7.0, endpoint=other.url, host="node")
        assert losses(other) == {"elsewhere": {7.0}}
        run(tmp_path, "next", 8.0, endpoint=receiver.url, host="node")
        until(lambda: losses(receiver) == {"job": {1.0, 0.5}, "next": {8.0}})
        assert losses(other) == {"elsewhere": {7.0}}


def test_a_job_that_was_queued_again_elsewhere_loses_nothing(tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver:
        run(tmp_path, "job", 1.0, killed=True)
        run(tmp_path, "job", 2.0, rank=1, killed=True)
        run(tmp_path, "other", 3.0, killed=True)
        run(tmp_path, "job", 4.0, endpoint=receiver.url, host="b", rank=1)
        assert losses(receiver) == {"job": {4.0}}, "rank 0 takes it"
        run(tmp_path, "job", 5.0, endpoint=receiver.url, host="b")
        until(lambda: losses(receiver) == {"job": {1.0, 2.0, 4.0, 5.0}})


# ---------------------------------------------------------------- which sessions


def on_host(host: str, directory: Path, **fields: Any) -> Path:
    """A whole session of one step, moved to another host's folder; where it then lies."""
    session = trained(directory / "written", 1, **{"destinations": [], **fields})
    place = directory / "runs" / "job" / host
    place.mkdir(parents=True, exist_ok=True)
    return session.path.rename(place / session.path.name)


def test_on_which_hosts_it_looks_for_dead_sessions(tmp_path: Path) -> None:
    here = on_host("here", tmp_path, session="00000000000000a0", run_key="new", started=100, destinations=["there"])
    gone = on_host("gone", tmp_path, session="00000000000000a1", run_key="old", rank=1)
    on_host("at-work", tmp_path, session="00000000000000a2", run_key="old", rank=2)
    on_host("at-work", tmp_path, session="00000000000000a3", run_key="new", rank=2, started=101)
    on_host("later", tmp_path, session="00000000000000a4", run_key="next", started=200)
    sessions = LiveSessions(tmp_path / "runs", "here", options())
    assert {session.path for session in sessions("there")} == {here, gone}
    assert sessions("elsewhere") == []


def test_a_silent_session_of_another_host_counts_as_dead_after_a_while(tmp_path: Path) -> None:
    on_host("here", tmp_path, session="00000000000000a0", run_key="new", started=100, destinations=["there"])
    (tmp_path / "runs" / "job" / "here" / "rank-00000-00000000000000a0" / "closed.json").unlink()  # it lives
    gone = on_host("gone", tmp_path, session="00000000000000a1", run_key="old", boot_id="another")
    (gone / "closed.json").unlink()
    how = options()
    sessions = LiveSessions(tmp_path / "runs", "here", how)
    assert len(sessions("there")) == 1
    for segment in gone.glob("*.jsonl"):
        os.utime(segment, (time.time() - how.dead_after - 1,) * 2)
    assert len(sessions("there")) == 1, "it looks again only after a while"
    how.clock.skip(60)  # type: ignore[attr-defined]
    assert {session.path.parent.name for session in sessions("there")} == {"here", "gone"}


def test_a_header_that_cannot_be_read_is_nobodys_but_its_jobs(tmp_path: Path) -> None:
    damaged = on_host("here", tmp_path, session="00000000000000a0")
    (damaged / "000001.jsonl").write_bytes(b"what\n")
    sessions = LiveSessions(tmp_path / "runs", "here", options())
    assert sessions("there") == []
    named = on_host("here", tmp_path, session="00000000000000a1", destinations=["there"])
    assert {session.path for session in sessions("there")} == {damaged, named}, "its scheduler says what is wrong"


@pytest.mark.any_events
@pytest.mark.parametrize("listed", [None, "there", 7, [["there"]], {"there": 1}])
def test_a_list_of_destinations_that_is_none_lists_nothing(tmp_path: Path, listed: Any) -> None:
    on_host("here", tmp_path, destinations=listed)
    assert LiveSessions(tmp_path / "runs", "here", options())("there") == []


# ---------------------------------------------------------------- two deliverers


def test_a_session_that_another_deliverer_sends_is_left_to_it_while_it_lasts(tmp_path: Path) -> None:
    session = trained(tmp_path, 3)
    first, second = Scripted(), Scripted()
    how = options()
    with closing(DeliveryTask(session, "metrics", first, how)) as task:
        with pytest.raises(CursorInUse, match="another deliverer is at work on it"):
            DeliveryTask(session, "metrics", second, how)
        scheduler = Scheduler("metrics", second, lambda: [session], how)
        run_to_end(scheduler)
        assert not scheduler.idle, "it may be left at any moment"
        how.clock.skip(3)  # type: ignore[attr-defined]
        run_to_end(scheduler)
        assert scheduler.over
        assert "another deliverer" in scheduler.unreadable[session.path]
        assert second.taken == []
        assert task.advance(1 << 62)
    how.clock.skip(1)  # type: ignore[attr-defined]
    run_to_end(scheduler)
    assert scheduler.unreadable == {}
    assert first.taken
    assert not set(first.taken) & set(second.taken)


def test_threads_send_what_the_forked_workers_of_their_rank_have_logged(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    exporter = MemoryExporter()
    with start(job_id="job", exporters=[exporter]) as run:
        if (child := os.fork()) == 0:
            run.log_metrics({"child": 1.0})
            run.close()
            os._exit(0)
        os.waitpid(child, 0)
        until(lambda: "training.child" in {record[0].name for _, record in exporter.records["metrics"]})  # type: ignore[index, union-attr]


def test_a_forked_worker_does_not_keep_its_parents_cursors(start: Callable[..., Run], tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    with start(job_id="job", exporters=[MemoryExporter()]) as run:
        run.log_metrics({"loss": 1.0})
        (session,) = find_sessions(tmp_path / "stepspan-runs")
        until(lambda: cursors(session.path))
        if (child := os.fork()) == 0:
            os.close(write_end)
            os.read(read_end, 1)  # until the test ends
            os._exit(0)
    os.close(read_end)
    with closing(DeliveryTask(session, "metrics", MemoryExporter(), options())):
        os.close(write_end)
    os.waitpid(child, 0)
