"""Being offline is a cursor that lags: a run ends at once, and what it logged arrives later, by itself or by a sync."""

from __future__ import annotations

import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from harness import processes
from harness.processes import Ranks, under_load, until
from harness.receiver import HANG, Answer, ScriptedReceiver

from stepspan.deliver.deliverer import Deliverer, caught_up
from stepspan.deliver.ledgers import session_ledger
from stepspan.deliver.options import Options
from stepspan.exporters.otlp import OtlpExporter
from stepspan.identity import host_facts
from stepspan.journal.layout import find_sessions

ranks = processes.ranks


def sync(directory: Path, receiver: ScriptedReceiver) -> Any:
    with closing(OtlpExporter(receiver.url, env={})) as exporter:
        deliverer = Deliverer([exporter], lambda _: find_sessions(directory), Options(boot_id=host_facts().boot_id))
        deliverer.start()
        deliverer.wait(caught_up)
        deliverer.stop()
        return exporter.destination


def assert_delivered(directory: Path, receiver: ScriptedReceiver, steps: Any) -> None:
    losses = {point.number for point in receiver.points("training.loss") if point.value is not None}
    assert losses == {float(step) for step in range(steps)}
    for session in find_sessions(directory):
        ledger = session_ledger(session)
        ((_, signals),) = ledger["destinations"].items()
        thinned = signals["traces"]["filtered"]
        assert len(receiver.spans("training.step")) + thinned == steps
        for found in signals.values():
            assert (found["pending"], found["rejected"], found["state"]) == (0, 0, "ok")
            assert found["mapped"] == found["delivered"] + found["filtered"]


@pytest.mark.parametrize("where", ["dead port", "black hole"])
def test_a_run_without_a_receiver_ends_at_once_and_a_later_sync_delivers_all(ranks: Ranks, where: str) -> None:
    with ScriptedReceiver() as receiver:
        if where == "dead port":
            receiver.stop()
        else:
            receiver.script("all", lambda _: HANG)
        rank = ranks.start(count=200, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
        steps, seconds = ranks.ended(rank)
        assert steps == 200
        assert seconds < under_load(1.0)
        for deliverer in ranks.deliverers():
            deliverer.send_signal(signal.SIGKILL)
        until(lambda: not ranks.deliverers())
        assert receiver.points() == set()
        receiver.stop()
        receiver.script("all", [])
        receiver.start()
        sync(ranks.directory, receiver)
        assert_delivered(ranks.directory, receiver, steps)
        sent = len(receiver.seen)
        sync(ranks.directory, receiver)
        assert len(receiver.seen) == sent, "a second one sends nothing"


def test_a_receiver_that_dies_and_returns_twice_loses_nothing_and_needs_no_human(ranks: Ranks) -> None:
    with ScriptedReceiver() as receiver:
        rank = ranks.start(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
        for _ in range(2):
            arrived = len(receiver.points("training.loss"))
            until(lambda arrived=arrived: len(receiver.points("training.loss")) > arrived)  # type: ignore[misc]
            receiver.stop()
            failed = until(lambda: states(ranks.directory) >= {"retry"})
            assert failed
            receiver.start()
        arrived = len(receiver.points("training.loss"))
        until(lambda: len(receiver.points("training.loss")) > arrived)
        ((steps, _),) = ranks.stop()
        until(lambda: not ranks.deliverers())
        assert rank.returncode == 0
        assert_delivered(ranks.directory, receiver, steps)


def states(directory: Path) -> set[Any]:
    return {
        found["state"]
        for session in find_sessions(directory)
        for signals in session_ledger(session)["destinations"].values()
        for found in signals.values()
    }


def test_a_traces_endpoint_that_is_not_there_stops_traces_only(ranks: Ranks) -> None:
    with ScriptedReceiver() as receiver:
        receiver.script("traces", lambda _: Answer(404))
        ranks.start(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
        until(lambda: len(receiver.points("training.loss")) > 20)
        ((steps, seconds),) = ranks.stop()
        assert seconds < under_load(2.0), "nobody waits for what is held"
        until(lambda: not ranks.deliverers(), 30)
        losses = {p.number for p in receiver.points("training.loss") if p.value is not None}
        assert losses == set(map(float, range(steps)))
        (session,) = find_sessions(ranks.directory)
        ((_, signals),) = session_ledger(session)["destinations"].items()
        assert signals["metrics"]["finished"]
        assert signals["logs"]["finished"]
        traces = signals["traces"]
        assert (traces["state"], traces["delivered"], traces["rejected"]) == ("hold", 0, 0)
        assert "no OTLP receiver at" in traces["message"]
        assert "check the path" in traces["message"]
        receiver.script("traces", [])
        sync(ranks.directory, receiver)
        assert receiver.spans("training.run"), "and a sync brings them"
        assert_delivered(ranks.directory, receiver, steps)


def test_without_an_endpoint_there_is_no_network_and_a_sync_sends_it_later(ranks: Ranks) -> None:
    steps, seconds = ranks.ended(ranks.start(count=50))
    assert seconds < under_load(1.0)
    assert ranks.deliverers() == []
    with ScriptedReceiver() as receiver:
        sync(ranks.directory, receiver)
        assert_delivered(ranks.directory, receiver, steps)
