"""The command line as a user meets it: what it prints, and its exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.receiver import Answer, ScriptedReceiver
from harness.runs import command as run

import stepspan
from stepspan.cli.sync import Sync
from stepspan.exporters.jsonl import JsonlExporter
from stepspan.testing import FixedClock


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Two runs that have ended, offline."""
    for job in ("first", "second"):
        with stepspan.start_run(directory=tmp_path / "runs", job_id=job) as a_run:
            a_run.log_hyperparams({"lr": 0.1})
            for _ in a_run.steps(range(3)):
                a_run.log_metrics({"loss": 0.5})
    return tmp_path / "runs"


@pytest.mark.parametrize("command", ["demo", "sync", "status", "tail", "report", "export", "import", "doctor"])
def test_every_command_explains_itself(command: str) -> None:
    told = run(command, "--help")
    assert told.returncode == 0
    assert "Usage: stepspan " + command in told.stdout
    assert told.stdout.count(".") >= 3, "sentences, not a list of flags"


def test_sync_delivers_everything_once(journal: Path) -> None:
    with ScriptedReceiver() as receiver:
        first = run("sync", journal, "--endpoint", receiver.url)
        assert first.returncode == 0, first.stderr
        assert first.stdout.partition("\n")[0].endswith("rejected 0; 0 lines wait")
        assert {point.job for point in receiver.points("training.loss")} == {"first", "second"}
        requests = sum(map(len, receiver.requests.values()))
        second = run("sync", journal, "--endpoint", receiver.url)
        told = second.stdout.partition("\n")[0]
        assert told == "delivered 0 metrics, 0 traces, 0 logs; rejected 0; 0 lines wait"
        assert sum(map(len, receiver.requests.values())) == requests


def test_what_was_thinned_is_in_every_summary(tmp_path: Path) -> None:
    clock = FixedClock(step_ns=10)
    with stepspan.start_run(job_id="j", exporters=[JsonlExporter(tmp_path / "runs", clock=clock)]) as a_run:
        for number in range(10_103):
            a_run.log_metrics({"loss": float(number)})
    exported = run("export", tmp_path / "runs", "--output", tmp_path / "out.jsonl")
    assert "; thinned 101 (logged faster than one a millisecond, for over 10 s)" in exported.stderr
    with ScriptedReceiver() as receiver:
        done = run("sync", tmp_path / "runs", "--endpoint", receiver.url)
        assert "rejected 0; thinned 101 (" in done.stdout
        assert "0 lines wait" in done.stdout
        assert len(receiver.points("training.loss")) == 10_103 - 101 + 1  # and the end of the series
        assert ", thinned" not in run("sync", tmp_path / "runs", "--endpoint", receiver.url).stdout
    assert "101" in run("status", tmp_path / "runs").stdout
    (session,) = json.loads(run("status", "--json", tmp_path / "runs").stdout)["sessions"]
    (signals,) = session["destinations"].values()
    assert signals["metrics"]["thinned"] == 101
    assert "thinned" in run("report", tmp_path / "runs").stdout


def test_sync_says_of_everything_that_did_not_go_out_why_and_what_can_be_done(journal: Path) -> None:
    for session in journal.glob("second/*/rank-*"):
        segment = session / "000001.jsonl"
        lines = segment.read_bytes().splitlines(keepends=True)
        lines[-2] = b"x" * (len(lines[-2]) - 1) + b"\n"
        segment.write_bytes(b"".join(lines))

    def partly(request: Any) -> Answer:
        is_first = not any(seen.signal == "metrics" for seen in receiver.seen)
        return Answer(rejected=2, text="too many series") if is_first else Answer()

    with ScriptedReceiver() as receiver:
        receiver.script("metrics", partly)
        receiver.script("traces", lambda _: Answer(404))
        for _ in range(2):  # it does not depend on which call it was
            done = run("sync", journal, "--endpoint", receiver.url)
            assert done.returncode == 1, "traces are held"
            text = done.stdout
            assert "did not go out, of these journals in all: " in text
            assert "2 rejected in part of a request" in text
            assert "1 lines damaged in the journal" in text
            assert "traces: hold: 404" in text
            assert " lines in 2 sessions wait)" in text
        receiver.script("traces", [])
        done = run("sync", journal, "--endpoint", receiver.url)
        assert done.returncode == 0, "nothing waits"
        assert "2 rejected in part of a request" in done.stdout
        assert "wait)" not in done.stdout


def test_sync_says_what_this_user_may_not_read_and_leaves_to_other_hosts(
    journal: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if "/second" in str(path):
            raise PermissionError(13, "not yours")
        return scandir(path)

    with ScriptedReceiver() as receiver:
        monkeypatch.setattr(os, "scandir", guarded)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        (journal / "first" / "elsewhere").mkdir()
        (mine,) = journal.glob("first/*/rank-*")
        shutil.copytree(mine, journal / "first" / "elsewhere" / "rank-00000-00000000000000ee")
        about: dict[str, Any] = {"endpoint": None, "protocol": None, "destination": None, "state_directory": None}
        command = Sync([journal], **about, this_host=True, dead_after=900.0)
        assert command.run(follow=False) == 1
        assert {point.job for point in receiver.points("training.loss")} == {"first"}
    out = capsys.readouterr().out
    assert f"{journal / 'second'}: passed over: this user may not read it" in out
    assert "sessions of other hosts, left alone (--this-host): 1" in out


def test_sync_of_one_job_leaves_the_others(journal: Path) -> None:
    with ScriptedReceiver() as receiver:
        run("sync", journal / "second", "--endpoint", receiver.url)
        assert {point.job for point in receiver.points("training.loss")} == {"second"}


def test_sync_without_an_endpoint_names_the_fix(journal: Path) -> None:
    told = run("sync", journal)
    assert told.returncode == 2
    assert "--endpoint" in told.stderr
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in told.stderr
    assert "Traceback" not in told.stderr


def test_sync_of_what_is_not_there_names_it(tmp_path: Path) -> None:
    told = run("sync", tmp_path / "nowhere", "--endpoint", "http://127.0.0.1:1")
    assert told.returncode == 2
    assert "nowhere" in told.stderr


def test_sync_says_what_holds_it_and_fails(journal: Path) -> None:
    with ScriptedReceiver() as receiver:
        receiver.script("traces", lambda _: Answer(404))
        told = run("sync", journal, "--endpoint", receiver.url)
    assert told.returncode == 1
    assert "traces: hold: 404" in told.stdout
    assert {point.job for point in receiver.points("training.loss")} == {"first", "second"}, "metrics went all the same"


def test_dry_run_sends_nothing_and_says_how_old_it_is(journal: Path) -> None:
    with ScriptedReceiver() as receiver:
        told = run("sync", journal, "--dry-run", "--endpoint", receiver.url)
        assert told.returncode == 0
        assert "metrics: 13 lines wait" in told.stdout
        assert "the oldest pending point is " in told.stdout
        assert receiver.connections == 0
        run("sync", journal, "--endpoint", receiver.url)
        assert run("sync", journal, "--dry-run", "--endpoint", receiver.url).stdout == "nothing waits\n"


def test_sync_where_no_lock_can_be_kept_asks_for_a_state_directory(journal: Path, tmp_path: Path) -> None:
    (journal / ".deliverers").write_text("no directory")
    with ScriptedReceiver() as receiver:
        refused = run("sync", journal, "--endpoint", receiver.url)
        assert refused.returncode == 2
        assert "name a --state-directory for the cursors" in refused.stderr
        assert "Traceback" not in refused.stderr
        told = run("sync", journal, "--endpoint", receiver.url, "--state-directory", tmp_path / "state")
        assert told.returncode == 0, told.stdout + told.stderr


def test_sync_of_a_session_that_lies_at_the_top_of_a_disk(journal: Path) -> None:
    session = next((journal / "first").glob("*/*"))
    top = Path("/tmp", session.name)  # two below the root: too high for a job's and a host's folder
    shutil.copytree(session, top)
    try:
        with ScriptedReceiver() as receiver:
            told = run("sync", top, "--endpoint", receiver.url)
            assert told.returncode == 0, told.stdout + told.stderr
            assert receiver.points("training.loss")
    finally:
        shutil.rmtree(top)


def test_state_directory_keeps_the_journal_untouched(journal: Path, tmp_path: Path) -> None:
    before = sorted(str(path) for path in journal.rglob("*"))
    with ScriptedReceiver() as receiver:
        told = run("sync", journal, "--endpoint", receiver.url, "--state-directory", tmp_path / "state")
        assert told.returncode == 0, told.stdout + told.stderr
        assert sorted(str(path) for path in journal.rglob("*")) == before
        again = run("sync", journal, "--endpoint", receiver.url, "--state-directory", tmp_path / "state")
        assert again.stdout.startswith("delivered 0 metrics")


def test_status_as_json_balances(journal: Path) -> None:
    with ScriptedReceiver() as receiver:
        run("sync", journal, "--endpoint", receiver.url)
    told = run("status", journal, "--json")
    sessions = json.loads(told.stdout)["sessions"]
    assert [session["status"] for session in sessions] == ["completed", "completed"]
    for session in sessions:
        (signals,) = session["destinations"].values()
        assert set(signals) == {"metrics", "traces", "logs"}
        for ledger in signals.values():
            lines = ("read", "damaged", "pruned", "dropped", "pending")
            assert session["journaled"] == sum(ledger[name] for name in lines)
            assert ledger["mapped"] == ledger["delivered"] + ledger["rejected"] + ledger["filtered"]
            assert ledger["finished"]


def test_status_shows_every_session(journal: Path) -> None:
    told = run("status", journal)
    assert told.returncode == 0
    *parts, (note,) = [part.splitlines() for part in told.stdout.split("\n\n")]
    assert note == "begun for no destination: 2; `stepspan sync PATH` sends what no run does"
    assert [(job, len(rows)) for job, _, *rows in parts] == [("first", 1), ("second", 1)]
    assert told.stdout.count("not sent") == 2


@pytest.mark.parametrize("command", ["status", "report", "tail"])
def test_journals_are_looked_for_where_runs_put_them(journal: Path, tmp_path: Path, command: str) -> None:
    told = run(command, STEPSPAN_DIRECTORY=str(journal))
    assert told.returncode == 0, told.stderr
    assert "second" in told.stdout
    nowhere = run(command, STEPSPAN_DIRECTORY=str(tmp_path / "nowhere"))
    assert nowhere.returncode == 2
    assert str(tmp_path / "nowhere") in nowhere.stderr


def test_the_version() -> None:
    assert run("--version").stdout == f"stepspan {stepspan.__version__}\n"


def test_help_fills_its_lines_and_offers_no_negations() -> None:
    told = run("sync", "--help", COLUMNS="80").stdout
    assert "is held or cannot be read" in told
    assert "--follow" in told
    assert "--no-" not in told


def test_an_interrupted_sync_goes_on_where_it_was(journal: Path) -> None:
    """Two calls at once: the second waits for the first one's lock, and finds nothing left to do."""
    with ScriptedReceiver() as receiver:
        env = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}
        command = [sys.executable, "-m", "stepspan", "sync", str(journal)]
        both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        printed = sorted(process.communicate(timeout=60)[0] for process in both)
        assert [process.returncode for process in both] == [0, 0]
        assert printed[0].startswith("delivered 0 metrics")
        assert len(receiver.spans("training.run")) == 2
