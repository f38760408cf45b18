"""One session's signal: wherever delivery is cut, it goes on with the same records, and the ledger stays true."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import orjson
import pytest
from harness.delivery import (
    OK,
    Scripted,
    Time,
    Training,
    assert_true,
    copy,
    deliver,
    everything,
    options,
    plain,
    trained,
)
from harness.journals import NOON, SECOND, closed_of, cursor_of, header, lay_down, metrics

from stepspan.deliver.backoff import MAX_HOLD_DELAY_S, MAX_SERVER_ERRORS, PASSING_TIMEOUT_S
from stepspan.deliver.refused import ReceiverMemory
from stepspan.deliver.task import DeliveryTask
from stepspan.errors import JournalError, NewerSchema
from stepspan.events import Event
from stepspan.journal.cursor import SLOT_BYTES, Cursor, read_cursor
from stepspan.journal.disk import Limits
from stepspan.journal.format import encode
from stepspan.journal.layout import SessionPath, segment_name
from stepspan.journal.liveness import read_closed
from stepspan.mapping.records import SIGNALS, Signal
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.processors import Drop, SampleSteps

ALL = 1 << 62
SMALL = Limits(segment_bytes=4096, free_bytes=0, free_ratio=0.0)
"""Some ten segments for a hundred steps, hence as many checkpoints."""
TINY = 700  # bytes a batch


class Crash(BaseException):
    pass


def cursor_file(session: SessionPath, signal: str = "metrics") -> Path:
    return session.path / "cursors" / f"there.{signal}"


def checkpoint_file(session: SessionPath, signal: str = "metrics") -> Path:
    return session.path / "cursors" / f"there.{signal}.state"


# ---------------------------------------------------------------- crashes


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_crash_after_each_request_sends_it_again_as_it_was(tmp_path: Path, signal: Signal) -> None:
    session = trained(tmp_path, 60, limits=SMALL)
    expected = everything(session)[signal]
    crashed: set[int] = set()

    class Crashing(Scripted):
        def export(self, *request: Any) -> Any:
            outcome = super().export(*request)
            if hash(tuple(self.sent[-1])) not in crashed:
                crashed.add(hash(tuple(self.sent[-1])))
                raise Crash
            return outcome

    exporter = Crashing()
    task = DeliveryTask(session, signal, exporter, options(batch_bytes=TINY))
    while not task.finished:
        try:
            task.advance(ALL)
        except Crash:
            task.close()
            task = DeliveryTask(session, signal, exporter, options(batch_bytes=TINY))
    task.close()
    assert exporter.sent[::2] == exporter.sent[1::2], "each request went out twice, with the same records"
    assert exporter.taken[: len(exporter.sent[0])] == expected[: len(exporter.sent[0])]
    assert [(0, *record) for request in exporter.sent[::2] for record in request] == expected
    assert_true(task.state.ledger, closed_of(session.path).seq)
    assert task.state.ledger.delivered == len(expected), "counted once"


@pytest.mark.parametrize("signal", SIGNALS)
def test_any_cursor_with_any_checkpoint_goes_on_with_the_same_records(tmp_path: Path, signal: Signal) -> None:
    session = trained(tmp_path, 60, limits=SMALL)
    expected = everything(session)[signal]
    exporter = Scripted()
    task = DeliveryTask(session, signal, exporter, options(batch_bytes=4 * TINY))
    kept: list[tuple[int, bytes, bytes]] = []
    while task.advance(ALL):
        files = cursor_file(session, signal), checkpoint_file(session, signal)
        kept.append((len(exporter.taken), *(file.read_bytes() if file.exists() else b"" for file in files)))  # type: ignore[arg-type]
    task.close()
    states = [*dict.fromkeys(state for _, _, state in kept), b""]
    assert len(states) > 4, "there were several checkpoints"
    for sent, cursor, _ in kept[:: max(1, len(kept) // 12)]:
        for state in states:
            cursor_file(session, signal).write_bytes(cursor)
            checkpoint_file(session, signal).write_bytes(state)
            rest = Scripted()
            deliver(session, rest, options(), signal)
            assert rest.taken == expected[sent:]


def test_a_checkpoint_is_never_ahead_of_its_cursor(tmp_path: Path) -> None:
    session = trained(tmp_path, 100, limits=SMALL)
    task = DeliveryTask(session, "metrics", Scripted(), options(batch_bytes=TINY))
    seen = 0
    while task.advance(ALL):
        if checkpoint_file(session).exists():
            position = orjson.loads(checkpoint_file(session).read_bytes().partition(b" ")[2])["position"]
            assert position["seq"] <= cursor_of(cursor_file(session)).position.seq
            seen += 1
    task.close()
    assert seen > 5


def test_after_a_restart_only_what_a_checkpoint_needs_is_read(tmp_path: Path) -> None:
    session = trained(tmp_path, 100, limits=SMALL)
    expected = everything(session)["metrics"]
    exporter = Scripted()
    task = DeliveryTask(session, "metrics", exporter, options(batch_bytes=4 * TINY))
    while task.position.segment < 5:
        task.advance(ALL)
    task.advance(ALL)
    needs = cursor_of(cursor_file(session)).needs
    task.close()
    assert needs >= 4
    for number in range(1, needs):
        (session.path / segment_name(number)).unlink()
    task = deliver(session, exporter, options())
    assert exporter.taken == expected, "cumulative sums and open steps included"
    assert_true(task.state.ledger, closed_of(session.path).seq)
    assert task.state.ledger.pruned == 0, "what was pruned had been read"


# ---------------------------------------------------------------- strange files


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("more", [False, True], ids=["a burst", "a burst, and more"])
def test_points_ahead_of_their_lines_go_out_when_their_time_has_come(
    tmp_path: Path, restarts: bool, more: bool
) -> None:
    training, exporter = Training(tmp_path), Scripted()
    for number in range(50):
        training.emit("metrics", split="train", step=number, metrics={"loss": float(number)})
    clock, wall = Time(), Time(training.now / SECOND)
    how = options(clock, wall_clock=wall)
    task = DeliveryTask(training.path, "metrics", exporter, how)
    task.advance(ALL)
    clock.skip(1.0)  # the newest millisecond has settled
    for number in range(60):
        while task.advance(ALL):
            pass
        assert (task.position.held_until > 0) == (number < 49)
        wall.skip(0.001)
        if restarts:
            task.close()
            task = DeliveryTask(training.path, "metrics", exporter, how)
        if more and number == 10:
            training.now += SECOND // 100
            training.emit("metrics", split="train", step=50, metrics={"loss": 50.0})
            break
    task.close()
    task = deliver(training.end(), exporter, options())
    points = {(name, attributes, ts // 10**6): value for _, name, attributes, ts, value in exporter.taken}
    losses = [value for (name, *_), value in points.items() if name == "training.loss"]
    assert losses == [*(f"{float(number)}" for number in range(50 + more)), "None"]
    times = [(min(ts for *_, ts, _ in records), max(ts for *_, ts, _ in records)) for records in exporter.sent]
    assert all(before[1] // 10**6 <= after[0] // 10**6 for before, after in pairwise(times)) or restarts
    repeated = len(exporter.taken) - len(points)
    assert repeated == 0 or (restarts and more)
    assert_true(task.state.ledger, training.writer.seq)


def half_delivered(tmp_path: Path) -> tuple[SessionPath, Scripted, list[Any]]:
    session = trained(tmp_path, 60, limits=SMALL)
    exporter = Scripted()
    task = DeliveryTask(session, "metrics", exporter, options(batch_bytes=TINY))
    for _ in range(20):
        task.advance(ALL)
    task.close()
    return session, exporter, everything(session)["metrics"]


def foreign_version(raw: bytes) -> bytes:
    content = orjson.dumps({**orjson.loads(raw.partition(b" ")[2]), "version": 999})
    return b"%08x %b" % (crc32(content), content)


def newer_position(raw: bytes) -> bytes:
    content = orjson.loads(raw.partition(b" ")[2])
    content["position"]["shard"] = 3
    content = orjson.dumps(content)
    return b"%08x %b" % (crc32(content), content)


CHECKPOINTS = {
    "missing": lambda raw: b"",
    "not JSON": lambda raw: b"\xff" * 100,
    "cut": lambda raw: raw[: len(raw) // 2],
    "one digit flipped": lambda raw: raw.replace(b'"boundary":1', b'"boundary":2', 1),
    "a list": lambda raw: b"%08x []" % crc32(b"[]"),
    "another mapping's": foreign_version,
    "a newer one's": newer_position,
}


@pytest.mark.parametrize("change", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_that_does_not_hold_is_rebuilt_from_the_journal(tmp_path: Path, change: Any) -> None:
    session, exporter, expected = half_delivered(tmp_path)
    file = checkpoint_file(session)
    raw = file.read_bytes()
    assert change(raw) != raw
    file.write_bytes(change(raw))
    task = deliver(session, exporter, options())
    assert exporter.taken == expected
    assert_true(task.state.ledger, closed_of(session.path).seq)


def test_another_sessions_checkpoint_is_not_used(tmp_path: Path) -> None:
    session, exporter, expected = half_delivered(tmp_path / "a")
    other = Training(tmp_path / "b", session="00000000000000b0", limits=SMALL)
    other.steps(30, value=lambda n: 99.0)
    other_path = other.end()
    deliver(other_path, Scripted(), options(batch_bytes=TINY))
    shutil.copy(checkpoint_file(other_path), checkpoint_file(session))
    deliver(session, exporter, options())
    assert exporter.taken == expected


CURSORS = {
    "missing": lambda raw: b"",
    "zeros": lambda raw: bytes(len(raw)),
    "garbage": lambda raw: b"\xa5" * len(raw),
    "cut": lambda raw: raw[:100],
}


@pytest.mark.parametrize("change", CURSORS.values(), ids=CURSORS)
def test_a_damaged_cursor_delivers_all_again(tmp_path: Path, change: Any) -> None:
    session, _, expected = half_delivered(tmp_path)
    cursor_file(session).write_bytes(change(cursor_file(session).read_bytes()))
    again = Scripted()
    task = deliver(session, again, options())
    assert again.taken == expected
    assert_true(task.state.ledger, closed_of(session.path).seq)


def test_a_torn_move_costs_that_move(tmp_path: Path) -> None:
    session, exporter, expected = half_delivered(tmp_path)
    raw = bytearray(cursor_file(session).read_bytes())
    newest = max((0, 1), key=lambda slot: orjson.loads(raw[slot * SLOT_BYTES + 8 :].split(b"\0")[0])["generation"])
    raw[newest * SLOT_BYTES + 50] ^= 0xFF
    cursor_file(session).write_bytes(raw)
    deliver(session, exporter, options())
    assert exporter.sent[20][: len(exporter.sent[19])] == exporter.sent[19]
    assert list(dict.fromkeys(exporter.taken)) == expected


def test_another_sessions_cursor_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    session, _, expected = half_delivered(tmp_path / "a")
    other = trained(tmp_path / "b", 5, session="00000000000000b0")
    deliver(other, Scripted(), options())
    shutil.copy(cursor_file(other), cursor_file(session))
    again = Scripted()
    task = deliver(session, again, options())
    assert again.taken == expected
    assert "another journal" in caplog.text
    assert_true(task.state.ledger, closed_of(session.path).seq)


@pytest.mark.parametrize("offset", [17, 10**9], ids=["within a line", "past the end"])
def test_a_cursor_that_stands_nowhere_is_not_used(tmp_path: Path, offset: int) -> None:
    session, _, expected = half_delivered(tmp_path)
    cursor = Cursor(cursor_file(session))
    cursor.write(replace(cursor.state, position=replace(cursor.state.position, offset=offset)))
    cursor.close()
    again = Scripted()
    deliver(session, again, options())
    assert again.taken == expected


def test_a_finished_session_is_not_sent_again(tmp_path: Path) -> None:
    session = trained(tmp_path)
    deliver(session, Scripted(), options())
    again = Scripted()
    task = DeliveryTask(session, "metrics", again, options())
    assert task.finished
    assert not task.advance(ALL)
    assert again.requests == []
    task.close()


def test_changed_processors_rebuild_the_mapper_and_hold_from_here_on(tmp_path: Path) -> None:
    session, exporter, expected = half_delivered(tmp_path)
    sent = len(exporter.taken)
    without_lr = Scripted(processors=[Drop(metrics=["lr"])])
    deliver(session, without_lr, options())
    rest = [record for record in expected[sent:] if record[1] != "training.lr"]
    assert without_lr.taken == rest


def test_what_a_processor_changes_for_one_destination_changes_it_for_no_other(tmp_path: Path) -> None:
    class ChangesInPlace:
        tags = frozenset({"metrics"})

        def __call__(self, event: Event) -> Event:
            event["metrics"]["renamed"] = event["metrics"].pop("loss")
            return event

    session, how = trained(tmp_path, 5), options()
    changing = Scripted(processors=[ChangesInPlace()], destination="changed")
    plain_one = Scripted(destination="plain")
    with (
        closing(DeliveryTask(session, "metrics", changing, how)) as first,
        closing(DeliveryTask(session, "metrics", plain_one, how)) as second,
    ):
        while first.advance(ALL) | second.advance(ALL):
            pass
    changed, unchanged = ({name for _, name, *_ in exporter.taken} for exporter in (changing, plain_one))
    assert changed ^ unchanged == {"training.loss", "training.renamed"}


def test_an_exporters_own_processors_hold_for_it_alone(tmp_path: Path) -> None:
    session = trained(tmp_path, 12)
    sampled, whole = Scripted(processors=[SampleSteps(every=4)]), Scripted(destination="elsewhere")
    task = deliver(session, sampled, options())
    deliver(session, whole, options())
    numbers = [
        [float(value) for _, name, _, _, value in exporter.taken if name == "training.step.number" and value != "None"]
        for exporter in (whole, sampled)
    ]
    assert numbers == [[*range(12)], [0, 4, 8]]
    assert_true(task.state.ledger, closed_of(session.path).seq)


@pytest.mark.parametrize("made", [True, "loss", {}])
def test_an_event_goes_on_without_a_processor_that_makes_none_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, made: Any
) -> None:
    class Confused:
        tags = frozenset({"metrics"})
        spec = None

        def __call__(self, event: Event) -> Any:
            return made

    session = trained(tmp_path, 12)
    exporter = Scripted(processors=[Confused()])
    task = deliver(session, exporter, options())
    assert exporter.taken == everything(session)["metrics"]
    assert caplog.text.count("processor Confused failed") == 1
    assert_true(task.state.ledger, closed_of(session.path).seq)


# ---------------------------------------------------------------- ledgers of lines


def test_damaged_dropped_and_pruned_lines_are_counted_as_such(tmp_path: Path) -> None:
    lines = [{**metrics(number), "seq": number + 2, "ts": NOON + number * SECOND} for number in range(20)]
    damaged = encode(lines[5])[:30] + b"\n"
    gap = {"ts": NOON + 30 * SECOND, "seq": 26, "tag": "gap", "dropped": 4, "why": "disk full"}
    first = [*lines[:5], damaged, *lines[6:]]
    second = [{**header(), "seq": 27, "ts": NOON + 31 * SECOND}, {**metrics(99), "seq": 28, "ts": NOON + 32 * SECOND}]
    session = lay_down(tmp_path, [{**header(world_size=1), "ts": NOON - SECOND}, *first, gap], second)  # type: ignore[list-item]
    (session.path / "closed.json").write_bytes(b'{"seq":31,"ts":%d,"status":"interrupted"}' % (NOON + 33 * SECOND))
    task = deliver(session, Scripted(), options())
    ledger = task.state.ledger
    assert (ledger.read, ledger.damaged, ledger.dropped, ledger.pruned) == (23, 1 + 3, 4, 0)
    assert_true(ledger, 31)


def test_a_pruned_beginning_is_counted_and_the_rest_delivered(tmp_path: Path) -> None:
    session = trained(tmp_path, 100, limits=SMALL)
    for number in (1, 2, 3):
        (session.path / segment_name(number)).unlink()
    exporter = Scripted()
    task = deliver(session, exporter, options())
    assert task.state.ledger.pruned > 20
    assert task.state.ledger.damaged == 0
    assert_true(task.state.ledger, closed_of(session.path).seq)
    assert [r for r in exporter.taken if r[1] == "training.loss"], "and what is left has been delivered"


@pytest.mark.parametrize("signal", SIGNALS)
def test_at_every_move_the_lines_that_wait_are_those_not_read(tmp_path: Path, signal: Signal) -> None:
    session = trained(tmp_path, 40)
    journaled = closed_of(session.path).seq
    task = DeliveryTask(session, signal, Scripted(), options(batch_bytes=TINY))
    while task.advance(ALL):
        state = read_cursor(cursor_file(session, signal))
        assert_true(state.ledger, journaled, pending=journaled - state.position.seq)  # type: ignore[union-attr]
    task.close()


def test_partial_success_counts_as_rejected_but_never_more_than_there_is(tmp_path: Path) -> None:
    session = trained(tmp_path, 5)
    task = deliver(session, Scripted([Outcome(Verdict.DELIVERED, "3 rejected by the receiver", rejected=3)]), options())
    assert task.state.ledger.rejected == 3
    assert task.state.message == "3 rejected by the receiver"
    assert_true(task.state.ledger, closed_of(session.path).seq)

    other = trained(tmp_path / "b", 5)
    task = deliver(other, Scripted([Outcome(Verdict.DELIVERED, rejected=10**6)]), options(batch_bytes=1 << 20))
    assert task.state.ledger.delivered == 0
    assert_true(task.state.ledger, closed_of(other.path).seq)


# ---------------------------------------------------------------- verdicts, by an injected clock


def test_retry_backs_off_twofold_and_forgets_it_when_the_receiver_is_back(tmp_path: Path) -> None:
    time = Time()
    session = trained(tmp_path, 60)
    exporter = Scripted(lambda _: Outcome(Verdict.RETRY, "busy"))
    task = DeliveryTask(session, "metrics", exporter, options(time, batch_bytes=TINY))
    waits = []
    for _ in range(10):
        assert not task.advance(ALL)
        waits.append(task.not_before - time.now)
        time.now = task.not_before
    assert waits == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert cursor_of(cursor_file(session)).state == "retry"
    assert not task.held
    assert len(exporter.sent) == 10, "one request a try"
    assert exporter.sent[3] == exporter.sent[0], "the same again, before a part of it is tried"
    exporter.answer = lambda _: OK
    assert task.advance(ALL)
    assert sorted(exporter.taken) == sorted((0, *record) for record in exporter.sent[0])
    assert (task.state.state, task.state.message, task.failing_since) == ("ok", "", None)
    exporter.answer = lambda _: Outcome(Verdict.RETRY)
    task.advance(ALL)
    assert task.not_before - time.now == 0.25
    task.close()


def test_jitter_takes_up_to_half_of_a_wait(tmp_path: Path) -> None:
    time = Time()
    exporter = Scripted([Outcome(Verdict.RETRY)])
    task = DeliveryTask(trained(tmp_path, 5), "metrics", exporter, options(time, jitter=lambda: 0.0))
    task.advance(ALL)
    assert task.not_before - time.now == 0.125
    task.close()


@pytest.mark.parametrize("verdict", [Verdict.RETRY, Verdict.RETRY_THEN_HOLD, Verdict.HOLD])
def test_what_a_receiver_asks_to_wait_is_waited(tmp_path: Path, verdict: Any) -> None:
    time = Time()
    exporter = Scripted([Outcome(verdict, retry_after=120.0)])
    task = DeliveryTask(trained(tmp_path, 5), "metrics", exporter, options(time))
    task.advance(ALL)
    assert task.not_before - time.now == 120.0
    task.close()


PASSING = Outcome(Verdict.HOLD, "404: no receiver there", may_pass=True)


def state_after(task: DeliveryTask, time: Time, seconds: float) -> str:
    """The cursor's state after tries for so long."""
    until = time.now + seconds
    while True:
        task.advance(ALL)
        if task.not_before > until or not task.failing_since:
            return task.state.state
        time.now = task.not_before


def test_what_may_pass_is_retried_for_minutes_where_the_receiver_has_answered_well_before(tmp_path: Path) -> None:
    time = Time()
    exporter = Scripted(lambda _: OK if len(exporter.requests) < 2 else PASSING)
    task = DeliveryTask(trained(tmp_path, 60), "metrics", exporter, options(time, batch_bytes=TINY))
    assert task.advance(ALL)
    assert task.advance(ALL)
    assert state_after(task, time, PASSING_TIMEOUT_S - 31) == "retry"
    assert state_after(task, time, 62) == "hold"
    exporter.answer = lambda _: OK
    assert task.advance(ALL)
    exporter.answer = lambda _: PASSING
    assert state_after(task, time, 60) == "retry", "it has answered well again, and so it begins anew"
    task.close()


def test_what_may_pass_holds_at_once_where_the_receiver_has_never_answered(tmp_path: Path) -> None:
    task = DeliveryTask(trained(tmp_path, 5), "metrics", Scripted([PASSING]), options(Time()))
    assert not task.advance(ALL)
    assert task.held
    task.close()


def test_what_may_not_pass_holds_at_once(tmp_path: Path) -> None:
    exporter = Scripted(lambda _: Outcome(Verdict.HOLD, "401") if exporter.requests else OK)
    task = DeliveryTask(trained(tmp_path, 60), "metrics", exporter, options(Time(), batch_bytes=TINY))
    while task.advance(ALL):
        pass
    assert task.held
    task.close()


def test_one_replica_of_two_that_refuses_every_other_request_stops_nothing(tmp_path: Path) -> None:
    time = Time()
    exporter = Scripted(lambda _: PASSING if len(exporter.requests) % 2 else OK)
    task = DeliveryTask(trained(tmp_path, 60), "metrics", exporter, options(time, batch_bytes=TINY))
    while not task.finished:
        task.advance(ALL)
        time.now = max(time.now, task.not_before)
        assert len(exporter.requests) < 500
    assert task.state.ledger.rejected == 0
    task.close()


def test_a_restarted_deliverer_knows_that_the_receiver_has_answered(tmp_path: Path) -> None:
    session = trained(tmp_path, 60)
    task = DeliveryTask(session, "metrics", Scripted(), options(batch_bytes=TINY))
    assert task.advance(ALL)
    task.close()
    task = DeliveryTask(session, "metrics", Scripted([PASSING]), options(Time(), batch_bytes=TINY))
    assert not task.advance(ALL)
    assert task.state.state == "retry"
    task.close()


def test_sessions_know_what_the_receiver_has_answered_to_others(tmp_path: Path) -> None:
    time = Time()
    memory = ReceiverMemory(time)
    first, second = (trained(tmp_path / name, 60) for name in "ab")
    exporter = Scripted([OK])
    one = DeliveryTask(first, "metrics", exporter, options(time, batch_bytes=TINY), memory)
    other = DeliveryTask(second, "metrics", exporter, options(time, batch_bytes=TINY), memory)
    assert one.advance(ALL)
    exporter.answer = lambda _: PASSING
    assert not other.advance(ALL)
    assert other.state.state == "retry"
    assert state_after(one, time, PASSING_TIMEOUT_S + 30) == "hold"
    other.advance(ALL)
    assert other.held, "they don't wait for minutes one after the other"
    one.close()
    other.close()


def test_a_session_alone_that_is_refused_holds_though_others_go_on(tmp_path: Path) -> None:
    time = Time()
    memory = ReceiverMemory(time)
    refusing, taking = Scripted(lambda _: PASSING), Scripted()
    one = DeliveryTask(trained(tmp_path / "a", 60), "metrics", refusing, options(time, batch_bytes=TINY), memory)
    other = DeliveryTask(trained(tmp_path / "b", 5000), "metrics", taking, options(time, batch_bytes=TINY), memory)
    assert other.advance(ALL)
    began = time.now
    while not one.held:
        assert time.now < began + 2 * PASSING_TIMEOUT_S
        one.advance(ALL)
        assert other.advance(ALL)
        time.now = one.not_before
    assert time.now >= began + PASSING_TIMEOUT_S
    one.close()
    other.close()


def test_a_receiver_that_asks_to_wait_for_ages_is_asked_again_after_five_minutes(tmp_path: Path) -> None:
    time = Time()
    exporter = Scripted([Outcome(Verdict.RETRY, "503: busy", retry_after=99_999_999_999.0)])
    task = DeliveryTask(trained(tmp_path, 5), "metrics", exporter, options(time))
    task.advance(ALL)
    assert task.not_before - time.now == MAX_HOLD_DELAY_S
    assert task.state.message == "503: busy; the receiver asks to wait 27777777 h 46 min: next try in 5 min 0 s"
    task.close()


def test_a_receiver_that_keeps_failing_is_held_at_the_fifth_time_and_nothing_is_rejected(tmp_path: Path) -> None:
    time = Time()
    exporter = Scripted(lambda _: Outcome(Verdict.RETRY_THEN_HOLD, "500: its disk"))
    task = DeliveryTask(trained(tmp_path, 5), "metrics", exporter, options(time))
    states = []
    for _ in range(MAX_SERVER_ERRORS + 1):
        task.advance(ALL)
        states.append(task.state.state)
        time.now = task.not_before
    assert states == ["retry"] * (MAX_SERVER_ERRORS - 1) + ["hold"] * 2
    assert task.state.ledger.rejected == 0
    exporter.answer = lambda _: OK
    assert task.advance(ALL)
    assert task.state.state == "ok"
    task.close()


def _always(verdict: Verdict) -> Any:
    return lambda _: Outcome(verdict)


def test_an_absence_does_not_count_towards_a_hold(tmp_path: Path) -> None:
    time = Time()
    exporter = Scripted()
    task = DeliveryTask(trained(tmp_path, 5), "metrics", exporter, options(time))
    for verdict in [Verdict.RETRY] * 10 + [Verdict.RETRY_THEN_HOLD] * 4:
        exporter.answer = _always(verdict)
        task.advance(ALL)
        assert not task.held
    exporter.answer = lambda _: Outcome(Verdict.HOLD)
    task.advance(ALL)
    assert task.held
    assert task.not_before - time.now == 15.0, "a hold begins with its own first wait"
    task.close()


def test_a_hold_is_told_once_tried_slowly_and_ends_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    time = Time()
    session = trained(tmp_path, 60)
    expected = everything(session)["metrics"]
    exporter = Scripted()
    task = DeliveryTask(session, "metrics", exporter, options(time, batch_bytes=TINY))
    task.advance(ALL)
    task.advance(ALL)
    waits = []
    exporter.answer = lambda _: Outcome(Verdict.HOLD, "404: check the path")
    for _ in range(7):
        assert not task.advance(ALL)
        assert task.held
        waits.append(task.not_before - time.now)
        time.now = task.not_before
    assert waits == [15.0, 30.0, 60.0, 120.0, 240.0, 300.0, 300.0]
    assert caplog.text.count("404: check the path") == 1
    assert cursor_of(cursor_file(session)).message == "404: check the path"
    exporter.answer = lambda _: OK
    while task.advance(ALL):
        pass
    assert (task.state.state, task.state.message) == ("ok", "")
    taken = list(dict.fromkeys(exporter.taken))
    assert taken == expected, "as if nothing had been: the mapper was rebuilt"
    assert len(exporter.taken) == len(expected) + 1, "what had been taken before went ahead"
    assert "delivering again" in caplog.text
    assert task.finished
    task.close()


def test_a_hold_survives_a_restart_and_is_not_told_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    session = trained(tmp_path, 5)
    exporter = Scripted([Outcome(Verdict.HOLD, "401: credentials")] * 2)
    task = DeliveryTask(session, "metrics", exporter, options())
    task.advance(ALL)
    task.close()
    task = DeliveryTask(session, "metrics", exporter, options())
    assert task.held
    assert task.not_before == 0.0, "a new deliverer asks at once: a person may have seen to it"
    task.advance(ALL)
    assert caplog.text.count("401: credentials") == 1
    assert task.advance(ALL)
    assert not task.held
    task.close()  # type: ignore[unreachable]


def test_one_bad_record_costs_one_record_and_is_kept_with_the_receivers_words(tmp_path: Path) -> None:
    session = trained(tmp_path, 40)
    expected = everything(session)["metrics"]
    bad = next(record for record in expected if record[1] == "training.loss" and record[4] == repr(1.0 / 11))

    def answer(records: Any) -> Any:
        refused = bad[1:] in plain(records)
        return Outcome(Verdict.ISOLATE, "400: duplicate sample") if refused else OK

    exporter = Scripted(answer)
    task = deliver(session, exporter, options())
    assert exporter.taken == [record for record in expected if record != bad]
    assert task.state.ledger.rejected == 1
    assert_true(task.state.ledger, closed_of(session.path).seq)
    (line,) = (session.path / "rejected.jsonl").read_bytes().splitlines()
    letter = orjson.loads(line)
    assert (letter["destination"], letter["signal"], letter["why"]) == ("there", "metrics", "400: duplicate sample")
    (resource,) = letter["request"]["resourceMetrics"]
    (metric,) = resource["scopeMetrics"][0]["metrics"]
    (point,) = metric["gauge"]["dataPoints"]
    assert (metric["name"], point["asDouble"], point["timeUnixNano"]) == ("training.loss", 1 / 11, str(bad[3]))
    assert {"key": "rank", "value": {"intValue": "0"}} in resource["resource"]["attributes"]
    assert (session.path / "rejected.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_receiver_that_refuses_everything_holds_with_nothing_rejected(tmp_path: Path) -> None:
    session = trained(tmp_path, 40)
    exporter = Scripted(lambda _: Outcome(Verdict.ISOLATE, "400: no such tenant"))
    task = DeliveryTask(session, "metrics", exporter, options())
    while task.advance(ALL):
        assert task.position.seq == 0, "it goes on, and moves nothing"
    assert task.held
    assert "no such tenant" in task.state.message
    assert task.state.ledger.rejected == 0
    assert not (session.path / "rejected.jsonl").exists()
    task.close()


AGES = {
    "fresh": (100.0, False),
    "almost an hour old": (3500.0, False),
    "over an hour old": (3700.0 + 60, True),
    "in the future": (-100.0, True),
}


@pytest.mark.parametrize(("age", "held"), AGES.values(), ids=AGES)
@pytest.mark.parametrize("reason_hidden", [True, False], ids=["reason_hidden", "with a reason"])
def test_an_opaque_refusal_of_an_old_or_future_point_holds_instead_of_rejecting(
    tmp_path: Path, age: Any, held: Any, reason_hidden: bool
) -> None:
    session = trained(tmp_path, 10)
    time = Time(closed_of(session.path).ts / SECOND + age)
    refusal = Outcome(Verdict.ISOLATE, "400: responded with HTTP Status Code 400", reason_hidden=reason_hidden)
    exporter = Scripted(lambda records: refusal if any(r[0].name == "training.lr" for r in records) else OK)
    task = DeliveryTask(session, "metrics", exporter, options(time))
    task.advance(ALL)
    if held and reason_hidden:
        assert task.held
        assert task.state.ledger.rejected == 0
        assert "storage.tsdb.out_of_order_time_window" in task.state.message
        assert "look in the backend's log" in task.state.message
        assert "responded with HTTP Status Code 400" in task.state.message
        assert not (session.path / "rejected.jsonl").exists()
    else:
        assert not task.held
        assert task.state.ledger.rejected == 10 + 1, "ten values and the end of their series"
    task.close()


@pytest.mark.parametrize("signal", ["traces", "logs"])
def test_only_points_are_judged_by_their_time(tmp_path: Path, signal: Signal) -> None:
    session = trained(tmp_path, 20)
    time = Time(NOON / SECOND + 10 * 86_400)
    bad = everything(session)[signal][0][1:]
    reason_hidden = Outcome(Verdict.ISOLATE, "400: reason_hidden", reason_hidden=True)
    exporter = Scripted(lambda records: reason_hidden if bad in plain(records) else OK)
    task = deliver(session, exporter, options(time), signal)
    assert task.state.ledger.rejected == 1


# ---------------------------------------------------------------- the end of a session


def test_a_dead_writers_session_is_closed_and_its_open_step_delivered(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.steps(3)
    training.emit("step_begin", parent=training.run, step=3, split="train")
    session = training.die()
    exporter = Scripted()
    task = deliver(session, exporter, options(), "traces")
    closed = closed_of(session.path)
    assert closed.status == "interrupted"
    assert task.finished
    assert_true(task.state.ledger, closed.seq)
    assert sum("interrupted" in record[1] for record in exporter.taken) >= 2, "the step and the run"


def test_a_living_writers_session_waits_at_its_end(tmp_path: Path) -> None:
    time = Time()
    training = Training(tmp_path)
    training.steps(3)
    exporter = Scripted()
    task = DeliveryTask(training.path, "metrics", exporter, options(time))
    while task.advance(ALL):
        pass
    time.skip(5)
    task.advance(ALL)
    assert task.at_end
    assert task.alive
    assert not task.finished
    training.steps(1)
    assert task.advance(ALL)
    training.end()
    time.skip(5)
    while task.advance(ALL):
        pass
    assert task.finished
    assert_true(task.state.ledger, closed_of(training.path.path).seq)  # type: ignore[unreachable]
    assert exporter.taken == everything(training.path)["metrics"]
    task.close()


def test_a_session_that_is_gone_does_not_keep_a_deliverer_waiting(tmp_path: Path) -> None:
    time = Time()
    training = Training(tmp_path)
    training.steps(3)
    task = DeliveryTask(training.path, "metrics", Scripted(), options(time))
    task.advance(ALL)
    shutil.rmtree(training.path.path)
    time.skip(5)
    with pytest.raises(JournalError, match="gone"):
        task.advance(ALL)
    task.close()
    training.die()


def test_another_boots_session_is_dead_only_after_silence(tmp_path: Path) -> None:
    time = Time()
    training = Training(tmp_path, boot_id="another")
    training.steps(3)
    session = training.die()
    task = DeliveryTask(session, "metrics", Scripted(), options(time, dead_after=900.0))
    task.advance(ALL)
    time.skip(5)
    task.advance(ALL)
    assert task.alive
    last = session.path / segment_name(session.segments()[-1])
    os.utime(last, (last.stat().st_mtime - 1000,) * 2)
    time.skip(5)
    while task.advance(ALL):
        pass
    assert task.finished
    task.close()


# ---------------------------------------------------------------- other people's journals


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_journal_that_is_not_ours_is_read_and_never_written(tmp_path: Path) -> None:
    session = trained(tmp_path / "theirs", 10)
    expected = everything(copy(session, tmp_path / "copy"))["metrics"]
    for path in [session.path, *session.path.iterdir()]:
        os.chown(path, 12345, 12345)
    with pytest.raises(JournalError, match="--state-directory"):
        DeliveryTask(session, "metrics", Scripted(), options())
    before = {path: path.stat().st_mtime_ns for path in [session.path, *session.path.rglob("*")]}
    exporter = Scripted(lambda records: Outcome(Verdict.ISOLATE, "no") if len(records) == 1 else OK)
    task = deliver(session, exporter, options(state_directory=tmp_path / "state"))
    assert exporter.taken == expected
    assert task.finished
    assert {path: path.stat().st_mtime_ns for path in [session.path, *session.path.rglob("*")]} == before
    assert [path.name for path in (tmp_path / "state").iterdir()] == [session.path.name]
    again = Scripted()
    deliver(session, again, options(state_directory=tmp_path / "state"))
    assert again.requests == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_the_end_of_a_dead_session_that_is_not_ours_is_kept_with_our_cursors(tmp_path: Path) -> None:
    training = Training(tmp_path / "theirs")
    training.steps(3)
    session = training.die()
    for path in [session.path, *session.path.iterdir()]:
        os.chown(path, 12345, 12345)
    task = deliver(session, Scripted(), options(state_directory=tmp_path / "state"))
    assert task.finished
    assert read_closed(session.path) is None
    assert closed_of(tmp_path / "state" / session.path.name).status == "interrupted"


def test_a_journal_of_a_newer_schema_is_not_touched_and_the_version_named(tmp_path: Path) -> None:
    session = lay_down(tmp_path, [header(schema="2.0"), metrics(1)])
    with pytest.raises(NewerSchema, match=r"schema 2\.0.*upgrade stepspan"):
        DeliveryTask(session, "metrics", Scripted(), options())
    assert not (session.path / "cursors").exists()
