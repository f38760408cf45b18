"""Twenty random SIGKILLs of the deliverer during a run of two ranks: nothing is lost at the receiver, the ledgers are
true, and each time another one takes over."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import psutil
from harness import processes
from harness.delivery import assert_true
from harness.journals import closed_of
from harness.processes import Ranks, until
from harness.receiver import ScriptedReceiver

from stepspan.deliver.ledgers import cursors
from stepspan.journal.cursor import read_cursor
from stepspan.journal.format import decode
from stepspan.journal.layout import SessionPath, find_sessions, segment_name

ranks = processes.ranks
KILLS = 20


def test_twenty_kills_lose_nothing(ranks: Ranks) -> None:
    killed: set[int] = set()
    with ScriptedReceiver() as receiver:
        for rank in range(2):
            ranks.start(rank, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
        while len(killed) < KILLS:
            sent = len(receiver.seen)
            one = until(lambda: [p for p in ranks.at_work() if p.pid not in killed])[0]
            if random.random() < 0.7:  # else as it starts
                until(lambda: len(receiver.seen) > sent or one.status() == psutil.STATUS_ZOMBIE)  # noqa: B023
            time.sleep(random.uniform(0, 0.05))
            one.kill()
            killed.add(one.pid)
            assert_moving_ledgers(ranks.directory)
        counts = ranks.stop()
        until(lambda: not ranks.deliverers(), 40)
        losses = {(p.rank, p.number) for p in receiver.points("training.loss") if p.value is not None}
        assert losses == {(rank, float(step)) for rank, (steps, _) in enumerate(counts) for step in range(steps)}
        assert {span["rank"] for span in receiver.spans("training.run")} == {0, 1}
        spans = receiver.spans("training.step")
        assert len({span["span_id"] for span in spans}) == len(spans), "the same again, not another one"
        for session in find_sessions(ranks.directory):
            ((_, signals),) = cursors(session.path).items()
            assert len(signals) == 3
            for state in signals.values():
                assert_true(state.ledger, closed_of(session.path).seq)
                assert state.ledger.rejected == 0
                assert state.position.finished
            kept = signals["traces"].ledger.delivered
            assert len([s for s in receiver.spans() if s["rank"] == session.rank]) == kept
            assert len([p for p in receiver.points() if p.rank == session.rank]) == signals["metrics"].ledger.delivered


def assert_moving_ledgers(directory: Path) -> None:
    """What a kill leaves: every line up to the cursor is accounted for, and every record."""
    for session in find_sessions(directory):
        seqs = {number: last_seq(session, number) for number in session.segments()}
        for file in (session.path / "cursors").glob("*.*"):
            state = read_cursor(file) if file.suffix in {".metrics", ".traces", ".logs"} else None
            if state is not None:
                assert_true(state.ledger, state.position.seq)
                assert state.position.seq <= max(seqs.values())


def last_seq(session: SessionPath, number: int) -> Any:
    return decode((session.path / segment_name(number)).read_bytes().rpartition(b"\n")[0].rpartition(b"\n")[2])["seq"]
