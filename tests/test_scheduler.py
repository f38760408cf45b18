"""The order in which sessions are delivered: one merge by event time, and who waits for whom."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from harness.delivery import DAY, OK, Scripted, Time, Training, assert_true, everything, options, run_to_end, trained
from harness.journals import NOON, SECOND, closed_of, cursor_of, header, lay_down, metrics

from stepspan.deliver.scheduler import (
    MAX_LEAD_NS,
    MAX_REST_S,
    RESCAN_INTERVAL_S,
    REST_FACTOR,
    UNREADABLE_RETRY_INTERVAL_S,
    Scheduler,
)
from stepspan.events import Event
from stepspan.journal.format import encode
from stepspan.journal.layout import find_sessions
from stepspan.otlp.outcome import Outcome, Verdict

HOLD = Outcome(Verdict.HOLD, "too old: widen the window")


def scheduler(directory: Path, exporter: Any, how: Any = None) -> Scheduler:
    return Scheduler("metrics", exporter, lambda: find_sessions(directory), how or options())


def order(exporter: Any) -> list[Any]:
    """(rank, Unix ns) of each point that was taken, in order of arrival."""
    return [(rank, ts) for rank, _, _, ts, _ in exporter.taken]


def assert_merged(taken: Any, every: Any) -> None:
    """No session runs more than ten minutes, and a step of `every` seconds, before the slowest with more to come."""
    last = {rank: max(ts for r, ts in taken if r == rank) for rank in {rank for rank, _ in taken}}
    reached = dict.fromkeys(last, NOON)
    for rank, ts in taken:
        behind = [at for other, at in reached.items() if other != rank and at < last[other]]
        assert ts - min(behind, default=ts) <= MAX_LEAD_NS + int(every * SECOND)
        reached[rank] = max(reached[rank], ts)


def test_two_five_day_journals_interleave(tmp_path: Path) -> None:
    every = 5 * DAY / 1000
    for rank in range(2):
        trained(tmp_path, 1000, every=every, rank=rank, session=f"00000000000000a{rank}")
    exporter = Scripted()
    run_to_end(one := scheduler(tmp_path, exporter, options(batch_bytes=8192)))
    taken = order(exporter)
    assert_merged(taken, every)
    assert {rank for rank, _ in taken} == {0, 1}
    assert one.tasks == {}, "both are finished"
    for session in find_sessions(tmp_path):
        expected = everything(session)["metrics"]
        assert [record for record in exporter.taken if record[0] == session.rank] == expected


def test_a_dense_and_a_sparse_session_stay_side_by_side(tmp_path: Path) -> None:
    trained(tmp_path, 3000, every=2.0, rank=0, session="00000000000000a0")
    trained(tmp_path, 20, every=300.0, rank=1, session="00000000000000a1")
    exporter = Scripted()
    run_to_end(scheduler(tmp_path, exporter, options(batch_bytes=4096)))
    assert_merged(order(exporter), 300.0)


def test_a_lone_session_is_not_cut_at_ten_minutes(tmp_path: Path) -> None:
    trained(tmp_path, 100, every=3600.0)
    exporter = Scripted()
    run_to_end(scheduler(tmp_path, exporter))
    assert len(exporter.requests) == 1


def test_live_data_waits_for_the_backlog_it_would_shut_out(tmp_path: Path) -> None:
    time = Time()
    old = trained(tmp_path, 400, every=30.0, rank=0, session="00000000000000a0", started=-5 * DAY)
    live = Training(tmp_path, rank=1, session="00000000000000a1")
    exporter = Scripted()
    one = scheduler(tmp_path, exporter, options(time, batch_bytes=4096))
    one.run_once()
    live.steps(20)
    run_to_end(one)
    ranks = [rank for rank, _ in order(exporter)]
    last_old = len(ranks) - 1 - ranks[::-1].index(0)
    first_live = ranks.index(1)
    assert closed_of(old.path)
    assert first_live > last_old - 200, "but for the last ten minutes"
    live.die()


def test_sessions_of_one_rank_go_strictly_in_the_order_of_their_start(tmp_path: Path) -> None:
    for number, started in enumerate((7200.0, 0.0, 3600.0)):
        trained(tmp_path, 50, rank=0, session=f"00000000000000a{number}", started=started)
    exporter = Scripted()
    run_to_end(scheduler(tmp_path, exporter, options(batch_bytes=2048)))
    times = [ts for _, ts in order(exporter) if True]
    runs = [int((ts - NOON) // (3600 * SECOND)) for ts in times]
    assert runs == sorted(runs)
    assert set(runs) == {0, 1, 2}


def test_overlapping_sessions_of_one_rank_go_one_after_the_other(tmp_path: Path) -> None:
    trained(tmp_path, 50, rank=0, session="00000000000000a0", started=0.0)
    trained(tmp_path, 50, rank=0, session="00000000000000a1", started=20.0)
    exporter = Scripted()
    run_to_end(scheduler(tmp_path, exporter, options(batch_bytes=2048)))
    first = everything(next(s for s in find_sessions(tmp_path) if s.session.endswith("a0")))["metrics"]
    assert exporter.taken[: len(first)] == first


def test_a_held_session_lets_its_successor_pass(tmp_path: Path) -> None:
    time = Time()
    trained(tmp_path, 50, rank=0, session="00000000000000a0", started=-5 * DAY)
    trained(tmp_path, 50, rank=0, session="00000000000000a1")
    too_old = NOON - int(2 * DAY * SECOND)
    exporter = Scripted(lambda records: HOLD if records[0][1] < too_old else OK)
    one = scheduler(tmp_path, exporter, options(time, batch_bytes=2048))
    run_to_end(one)
    assert min(ts for _, ts in order(exporter)) >= NOON
    (held,) = one.tasks.values()
    assert held.held
    assert held.state.message == HOLD.message
    assert held.state.ledger.rejected == 0
    assert one.idle
    exporter.answer = lambda _: OK
    time.now = held.not_before
    run_to_end(one)
    assert one.tasks == {}, "and recovers by itself"


def test_a_held_session_holds_no_other_rank_back(tmp_path: Path) -> None:
    trained(tmp_path, 50, rank=0, session="00000000000000a0", started=-5 * DAY)
    trained(tmp_path, 500, rank=1, every=30.0, session="00000000000000a1")
    too_old = NOON - int(2 * DAY * SECOND)
    exporter = Scripted(lambda records: HOLD if records[0][1] < too_old else OK)
    run_to_end(one := scheduler(tmp_path, exporter, options(batch_bytes=2048)))
    assert [task.session.rank for task in one.tasks.values()] == [0]
    assert {rank for rank, _ in order(exporter)} == {1}


def test_a_successor_that_waits_for_a_living_session_holds_no_other_rank_back(tmp_path: Path) -> None:
    first = Training(tmp_path, rank=0, session="00000000000000a0")
    first.steps(5)
    trained(tmp_path, 50, rank=0, session="00000000000000a1", started=100.0)
    other = trained(tmp_path, 500, rank=1, every=30.0, session="00000000000000a2")
    exporter = Scripted()
    run_to_end(one := scheduler(tmp_path, exporter))
    assert other.path not in one.tasks, "delivered to its end"
    assert len(one.tasks) == 2
    first.die()


def test_while_the_receiver_is_away_one_session_asks_for_all(tmp_path: Path) -> None:
    time = Time()
    for rank in range(8):
        trained(tmp_path, 5, rank=rank, session=f"00000000000000a{rank}")
    away = Outcome(Verdict.RETRY, "no connection")
    exporter = Scripted(lambda _: away)
    one = scheduler(tmp_path, exporter, options(time))
    for _ in range(100):
        one.run_once()
        time.skip(0.1)
    assert len(exporter.requests) <= 11, "after 0.25, 0.5, 1, 2, 4 s, and from the second try on of another one, too"
    assert not one.idle
    assert 9.0 < one.silent_for() < 11.0
    exporter.answer = lambda _: OK
    time.skip(30)
    run_to_end(one)
    assert one.tasks == {}
    assert one.silent_for() == 0.0


@pytest.mark.parametrize("verdict", [Verdict.RETRY, Verdict.RETRY_THEN_HOLD])
def test_a_session_that_fails_for_what_it_holds_stops_no_other(tmp_path: Path, verdict: Verdict) -> None:
    time = Time()
    for rank in range(8):
        trained(tmp_path, 5, rank=rank, session=f"00000000000000a{rank}")
    exporter = Scripted()
    exporter.export = lambda signal, resource, records: Outcome(verdict) if resource["rank"] == 0 else OK  # type: ignore[method-assign]
    one = scheduler(tmp_path, exporter, options(time))
    for _ in range(10):
        one.run_once()
        time.skip(0.1)
    assert [task.header["rank"] for task in one.tasks.values()] == [0]


def test_a_hold_of_one_session_is_not_the_receivers_absence(tmp_path: Path) -> None:
    for rank in range(3):
        trained(tmp_path, 5, rank=rank, session=f"00000000000000a{rank}")
    exporter = Scripted()
    exporter.export = lambda signal, resource, records: HOLD if resource["rank"] == 0 else OK  # type: ignore[method-assign]
    run_to_end(one := scheduler(tmp_path, exporter))
    assert [task.session.rank for task in one.tasks.values()] == [0]


def test_new_sessions_are_found_within_a_second(tmp_path: Path) -> None:
    time = Time()
    exporter = Scripted()
    one = scheduler(tmp_path, exporter, options(time))
    assert not one.run_once()
    assert one.over, "there is nothing"
    trained(tmp_path, 5)
    assert not one.run_once()
    time.skip(RESCAN_INTERVAL_S)
    run_to_end(one)
    assert exporter.taken


def test_over_means_that_no_session_lives_and_the_rest_is_held(tmp_path: Path) -> None:
    time = Time()
    living = Training(tmp_path)
    living.steps(3)
    one = scheduler(tmp_path, Scripted(), options(time))
    run_to_end(one)
    assert (one.idle, one.over) == (True, False)
    living.end()
    time.skip(2)
    assert one.run_once()
    assert (one.idle, one.over) == (False, False), "as of a round in which something moved"
    run_to_end(one)
    assert (one.idle, one.over) == (True, True)


def test_over_is_taken_back_before_another_session_counts_as_seen(tmp_path: Path) -> None:
    time = Time()
    one = scheduler(tmp_path, Scripted(), options(time))
    one.run_once()
    assert one.over
    session = trained(tmp_path, 5)
    one._scan(time.now)
    assert session.path in one.seen
    assert (one.idle, one.over) == (False, False), "or a deliverer would end with it undelivered"
    one.close()


def test_a_receiver_that_stays_silent_is_abandoned_only_when_nobody_lives(tmp_path: Path) -> None:
    time = Time()
    living = Training(tmp_path)
    living.steps(3)
    one = scheduler(tmp_path, Scripted(lambda _: Outcome(Verdict.RETRY)), options(time))
    for _ in range(120):
        one.run_once()
        time.skip(0.5)
    assert one.silent_for() > 30
    assert not one.receiver_unreachable(30.0)
    living.die()
    for _ in range(4):
        one.run_once()
        time.skip(0.5)
    assert one.receiver_unreachable(30.0)
    assert not one.over


# ---------------------------------------------------------------- sessions that can't be read


def test_a_damaged_and_a_newer_session_stop_nobody_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "job" / "node"
    newer = lay_down(place, [header("00000000000000b1", schema="9.0"), metrics(1)], session="00000000000000b1")
    damaged = lay_down(place, [b"\x00" * 500 + b"\n"], session="00000000000000b2")
    bare = {"ts": 1, "seq": 1, "tag": "header", "schema": "1.0"}
    foreign = lay_down(place, [encode(bare)], session="00000000000000b3")
    good = trained(tmp_path, 20)
    exporter = Scripted()
    run_to_end(one := scheduler(tmp_path, exporter))
    assert exporter.taken == everything(good)["metrics"]
    assert one.unreadable.keys() == {newer.path, damaged.path, foreign.path}
    assert "schema 9.0" in one.unreadable[newer.path]
    assert "upgrade stepspan" in one.unreadable[newer.path]
    assert "header lacks" in one.unreadable[foreign.path]
    assert caplog.text.count("cannot be delivered") == 3


UNHEARD_OF = {
    "an instance that is a list": [header(resource={"service.instance.id": [1]}, world_size=1), metrics(1)],
    "a gap without a number": [
        header(world_size=1),
        {"ts": NOON + SECOND, "seq": 9, "tag": "gap", "dropped": "some", "why": ""},
    ],
    "a time before 1970": [header(world_size=1), metrics(1, ts=-5)],
}


def unheard_of(directory: Path, which: Any) -> Any:
    session = lay_down(directory / "job" / "node", UNHEARD_OF[which])
    (session.path / "closed.json").write_bytes(b'{"seq":20,"ts":%d,"status":"completed"}' % (NOON + 9 * SECOND))
    return session


@pytest.mark.parametrize("which", UNHEARD_OF)
def test_a_journal_that_no_writer_would_write_stops_nobody_else(tmp_path: Path, which: Any) -> None:
    unheard_of(tmp_path, which)
    good = trained(tmp_path, 20, rank=1)
    exporter = Scripted()
    run_to_end(scheduler(tmp_path, exporter))
    assert [record for record in exporter.taken if record[0] == 1] == everything(good)["metrics"]


def test_a_defect_that_one_session_meets_is_told_once_and_stops_nobody_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    time = Time()
    bad, good = (trained(tmp_path, 20, rank=rank, session=f"00000000000000a{rank}") for rank in range(2))
    exporter = Scripted()
    exporter.export = lambda signal, resource, records: OK if resource["rank"] else None  # type: ignore[assignment, method-assign, return-value]
    one = scheduler(tmp_path, exporter, options(time))
    for _ in range(3):
        run_to_end(one)
        assert one.tasks == {}
        assert one.unreadable.keys() == {bad.path}
        time.skip(UNREADABLE_RETRY_INTERVAL_S + RESCAN_INTERVAL_S)
    assert cursor_of(good.path / "cursors" / "there.metrics").position.finished
    assert caplog.text.count("Traceback") == 1


def test_an_exporter_that_fails_is_asked_again_and_held_at_last(tmp_path: Path) -> None:
    time = Time()
    trained(tmp_path, 5)
    exporter = Scripted(lambda _: [][0])
    one = scheduler(tmp_path, exporter, options(time))
    for _ in range(10):
        one.run_once()
        time.skip(30)
    (task,) = one.tasks.values()
    assert task.held
    assert task.state.message == "Scripted failed: IndexError('list index out of range')"
    exporter.answer = lambda _: OK
    time.now = task.not_before
    run_to_end(one)
    assert one.tasks == {}, "and nothing is lost"
    assert task.state.ledger.rejected == 0


def test_a_session_that_is_gone_while_its_records_wait_is_waited_for_no_longer(tmp_path: Path) -> None:
    time = Time()
    training = Training(tmp_path)
    training.steps(3)
    one = scheduler(tmp_path, Scripted(lambda _: Outcome(Verdict.RETRY, "no connection")), options(time))
    one.run_once()
    assert not one.over, "it lives"
    training.die()
    shutil.rmtree(training.path.path)
    time.skip(5)
    one.run_once()
    assert one.over
    assert "gone" in one.unreadable[training.path.path]  # type: ignore[unreachable]


def test_a_session_that_could_not_be_read_is_tried_again_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    time = Time()
    good = trained(tmp_path, 20)
    first = good.path / "000001.jsonl"
    whole = first.read_bytes()
    first.write_bytes(b"")
    exporter = Scripted()
    one = scheduler(tmp_path, exporter, options(time))
    for _ in range(3):
        run_to_end(one)
        assert one.unreadable
        time.skip(UNREADABLE_RETRY_INTERVAL_S + RESCAN_INTERVAL_S)
    assert caplog.text.count("cannot be delivered") == 1
    first.write_bytes(whole)
    run_to_end(one)
    assert one.unreadable == {}
    assert exporter.taken


def test_a_session_that_is_removed_under_way_stops_nobody_else(tmp_path: Path) -> None:
    time = Time()
    gone = Training(tmp_path, rank=0, session="00000000000000a0")
    gone.steps(3)
    stays = Training(tmp_path, rank=1, session="00000000000000a1")
    stays.steps(3)
    exporter = Scripted()
    one = scheduler(tmp_path, exporter, options(time))
    run_to_end(one)
    shutil.rmtree(gone.path.path)
    stays.steps(3)
    stays_path = stays.end()
    for _ in range(5):
        time.skip(2)
        run_to_end(one)
    assert one.over, "nobody waits for it"
    assert [r for r in exporter.taken if r[0] == 1] == everything(stays_path)["metrics"]
    gone.die()


# ---------------------------------------------------------------- processors that fail


def test_a_processor_that_raises_costs_nothing_but_its_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Bad:
        tags = frozenset({"metrics"})

        def __call__(self, event: Event) -> None:
            raise ValueError("no")

    session = trained(tmp_path, 20)
    exporter = Scripted(processors=[Bad()])
    run_to_end(scheduler(tmp_path, exporter))
    assert exporter.taken == everything(session)["metrics"]
    assert caplog.text.count("processor Bad failed") == 1


# ---------------------------------------------------------------- whatever the batches


@pytest.mark.parametrize("batch", [300, 5000, 1 << 20])
def test_many_sessions_arrive_whole_whatever_the_batches(tmp_path: Path, batch: int) -> None:
    sessions = [
        trained(tmp_path, 30, rank=rank, session=f"0000000000000{attempt}a{rank}", started=attempt * 1000.0, every=40.0)
        for rank in range(3)
        for attempt in range(2)
    ]
    exporter = Scripted()
    one = scheduler(tmp_path, exporter, options(batch_bytes=batch))
    tasks = {}
    while one.run_once() or one.tasks:
        tasks.update(one.tasks)
    found = defaultdict(list)
    for record in exporter.taken:
        found[record[0]].append(record)
    for rank in range(3):
        expected = [r for s in sessions if s.rank == rank for r in everything(s)["metrics"]]
        assert found[rank] == expected
    for task in tasks.values():
        assert_true(task.state.ledger, closed_of(task.session.path).seq)


# ---------------------------------------------------------------- live sessions


@pytest.mark.parametrize(("took", "rests"), [(0.01, REST_FACTOR * 0.01), (60.0, MAX_REST_S)], ids=["short", "long"])
def test_after_a_round_that_found_live_sessions_at_their_end_it_rests(tmp_path: Path, took: float, rests: Any) -> None:
    time = Time()

    def answer(_: object) -> Any:
        time.skip(took)
        return OK

    training = Training(tmp_path, boot_id="elsewhere")
    exporter = Scripted(answer)
    one = scheduler(tmp_path, exporter, options(time))
    training.steps(3)
    assert one.run_once()
    training.steps(3)
    time.skip(0.9 * rests)
    assert not one.run_once(), "it looks at no journal"
    time.skip(0.2 * rests)
    assert one.run_once()
    assert len(exporter.requests) == 2, "the steps of meanwhile came in one"


def test_it_does_not_rest_when_nobody_lives(tmp_path: Path) -> None:
    time = Time()

    def answer(_: object) -> Any:
        time.skip(60)
        return OK

    trained(tmp_path, 20)
    one = scheduler(tmp_path, Scripted(answer), options(time))
    assert one.run_once()
    one.run_once()
    assert one.idle, "it has looked again at once, and found nothing"
