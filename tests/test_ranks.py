"""Which ranks send what: settings for each signal; journals stay whole, and what was left out can be sent later."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.delivery import Scripted, assert_true, deliver, options
from harness.journals import closed_of
from harness.processes import until
from harness.receiver import ScriptedReceiver
from harness.runs import command

import stepspan
from stepspan import start as starting
from stepspan.config import Settings, sends
from stepspan.deliver.ledgers import cursors
from stepspan.deliver.left_out import chooser
from stepspan.errors import ConfigError
from stepspan.journal.cursor import CursorState
from stepspan.journal.layout import SessionPath, find_sessions
from stepspan.mapping.records import SIGNALS
from stepspan.run import Run

start = runs.start


def train(directory: Path, ranks: int = 4, **settings: Any) -> Path:
    """A run of several ranks, offline; where its journals are."""
    for rank in range(ranks):
        starting._numbers.clear()  # as in a process of its own
        with stepspan.start_run(
            directory=directory,
            job_id="job",
            rank=rank,
            local_rank=rank,
            world_size=ranks,
            samplers="none",
            **{"delivery": "off", **settings},
        ) as run:
            for _ in run.steps(range(2)):
                with run.span("forward"):
                    run.log_metrics({"loss": float(rank)})
            run.log_event("milestone")
    return directory


def states(session: SessionPath) -> dict[str, CursorState]:
    """Those at the end."""
    found = cursors(session.path).values()
    return {signal: state for signals in found for signal, state in signals.items() if state.position.finished}


def arrived(receiver: ScriptedReceiver) -> dict[str, set[Any]]:
    """Signal -> the ranks that have sent any of it."""
    found: dict[str, set[Any]] = defaultdict(set)
    found["metrics"] = {point.rank for point in receiver.points()}
    found["traces"] = {span["rank"] for span in receiver.spans()}
    found["logs"] = {log["rank"] for log in receiver.logs()}
    return found


@pytest.mark.parametrize("delivery", ["sync", "process", "thread"])
def test_each_signal_is_sent_by_its_ranks_and_the_rest_is_filtered(
    start: Callable[..., Run], tmp_path: Path, delivery: str
) -> None:
    settings: dict[str, Any] = {"metrics_ranks": "rank0", "traces_ranks": [2], "logs_ranks": "1-2"}
    with ScriptedReceiver() as receiver:
        if delivery == "sync":
            train(tmp_path / "runs", **settings)
            done = command("sync", tmp_path / "runs", "--endpoint", receiver.url)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            train(tmp_path / "runs", **settings, delivery=delivery, endpoint=receiver.url)
            until(lambda: all(len(states(session)) == 3 for session in find_sessions(tmp_path / "runs")))
        assert arrived(receiver) == {"metrics": {0}, "traces": {0, 2}, "logs": {1, 2}}
        roots = {span["span_id"]: span for span in receiver.spans() if span["rank"] == 0}
        assert {span["name"] for span in roots.values()} == {"training.step"}
        steps = [span for span in receiver.spans("training.step") if span["rank"] == 2]
        assert {span["parent_id"] for span in steps} == set(roots)
    for session in find_sessions(tmp_path / "runs"):
        for signal, state in states(session).items():
            assert_true(state.ledger, closed_of(session.path).seq)
            left_out = session.rank not in {"metrics": {0}, "traces": {2}, "logs": {1, 2}}[signal]
            assert (state.ledger.filtered == state.left_out > 0) == left_out, (session, signal)


def test_what_was_left_out_can_be_sent_later_once(start: Callable[..., Run], tmp_path: Path) -> None:
    train(tmp_path / "runs", metrics_ranks="rank0", traces_ranks="rank1", logs_ranks="rank3")
    with ScriptedReceiver() as receiver, ScriptedReceiver() as everything:
        train(tmp_path / "all")
        assert command("sync", tmp_path / "all", "--endpoint", everything.url).returncode == 0
        done = command("sync", tmp_path / "runs", "--endpoint", receiver.url)
        assert "left out by rank (`--all-ranks` sends them)" in done.stdout
        status = command("status", tmp_path / "runs").stdout
        assert "`stepspan sync --all-ranks` sends them" in status
        doctor = command("doctor", "--directory", tmp_path / "new", STEPSPAN_METRICS_RANKS="1-3", STEPSPAN_RANK="0")
        assert "not sent of rank 0: metrics_ranks is 1-3" in doctor.stdout
        sent = len(receiver.seen)
        assert command("sync", tmp_path / "runs", "--endpoint", receiver.url).returncode == 0
        assert len(receiver.seen) == sent
        done = command("sync", tmp_path / "runs", "--endpoint", receiver.url, "--all-ranks")
        assert done.returncode == 0, done.stdout + done.stderr
        assert arrived(receiver) == {signal: {0, 1, 2, 3} for signal in SIGNALS}
        assert len(receiver.points("training.loss")) == len(everything.points("training.loss"))
        assert len({span["span_id"] for span in receiver.spans()}) == len(everything.spans())
        sent = len(receiver.seen)
        done = command("sync", tmp_path / "runs", "--endpoint", receiver.url, "--all-ranks")
        assert len(receiver.seen) == sent, "once"
        assert "left out" not in done.stdout


def test_an_export_leaves_out_what_a_sync_does_and_says_so(start: Callable[..., Run], tmp_path: Path) -> None:
    train(tmp_path / "runs", metrics_ranks="rank0", logs_ranks="rank1")
    some = command("export", tmp_path / "runs", "--output", tmp_path / "some.jsonl")
    assert "; left out by rank " in some.stderr
    every = command("export", tmp_path / "runs", "--output", tmp_path / "every.jsonl", "--all-ranks")
    assert "left out" not in every.stderr
    values = [(tmp_path / f"{name}.jsonl").read_text().count('"name":"training.loss"') for name in ("some", "every")]
    assert 0 < values[0] < values[1]


def test_no_roots_are_sent_for_ranks_that_the_run_has_not(start: Callable[..., Run], tmp_path: Path) -> None:
    with start(
        directory=tmp_path / "runs", job_id="job", rank=0, world_size=2, traces_ranks="5", delivery="off"
    ) as run:
        run.log_metrics({"loss": 1.0})
    (session,) = find_sessions(tmp_path / "runs")
    (header, *_) = runs.events(run)
    assert header["left_out"] == ["traces"]
    assert "step_roots" not in header, "rank 5 is none of the run's"
    exporter = Scripted(signals=["traces"])
    task = deliver(session, exporter, options(), "traces")
    assert exporter.requests == []
    assert task.state.left_out == task.state.ledger.filtered == 1


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("all", "all"), ("rank0", "0"), ("ALL", "all"), ("3, 1,1", "1,3"), ("0-3,8", "0-3,8"), (7, "7"), ([], None),
        ("", None), ({2, 0}, "0,2"), (range(3), "0,1,2"),
        ("rank0, rank8", "0,8"), ("none", None), ("3-1", None), ("-1", None),
        ([True], None), (True, None), (1.5, None), ("all,1", None), (["all"], "all"), ("0-", None), ("1,,2", "1,2"),
    ],
)  # fmt: skip
def test_how_ranks_are_given(given: Any, meant: str | None) -> None:
    if meant is None:
        with pytest.raises(ConfigError, match="give all, rank0, or ranks as in 0,8,16-23"):
            stepspan.config.load({"metrics_ranks": given}, {"STEPSPAN_DIRECTORY": "x"})
    else:
        assert stepspan.config.load({"metrics_ranks": given}, {}).metrics_ranks == meant


def test_which_ranks_are_named() -> None:
    assert [rank for rank in range(12) if sends("0,3-5,8", rank)] == [0, 3, 4, 5, 8]
    assert sends(Settings().metrics_ranks, 10_000)


@pytest.mark.parametrize("left_out", [None, "metrics", 5, ["else"], {}])
def test_a_header_that_is_not_ours_leaves_nothing_out(left_out: Any) -> None:
    assert chooser({"left_out": left_out}, "metrics", all_ranks=False) is None
