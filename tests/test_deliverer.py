"""The deliverer: threads, a process of its own that a run starts, and the same set at the receiver however it goes."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from harness import processes
from harness.delivery import OK, Scripted, Time, Training, assert_true, copy, everything, options, trained
from harness.journals import closed_of
from harness.processes import Ranks, under_load, until
from harness.receiver import Answer, ScriptedReceiver

from stepspan.deliver import deliverer as deliverers
from stepspan.deliver import lock, process
from stepspan.deliver.deliverer import Deliverer, caught_up, run_is_over
from stepspan.deliver.ledgers import cursors
from stepspan.deliver.lock import DELIVERERS_DIRECTORY, UNKNOWN, DeliveryLock, Outlook
from stepspan.deliver.options import Options
from stepspan.deliver.routes import route_of
from stepspan.deliver.scheduler import MAX_WOKEN, Scheduler
from stepspan.exporters.otlp import OtlpExporter
from stepspan.identity import host_facts
from stepspan.journal.layout import find_sessions
from stepspan.mapping.records import SIGNALS
from stepspan.otlp.endpoint import PROTOCOLS
from stepspan.otlp.outcome import Outcome, Verdict

ranks = processes.ranks


def sync(directory: Path, exporter: Any, **fields: Any) -> None:
    """`stepspan sync` without its command line."""
    deliverer = Deliverer([exporter], lambda _: find_sessions(directory), Options(boot_id="boot", **fields))
    deliverer.start()
    deliverer.wait(caught_up)
    deliverer.stop()
    assert not any(scheduler.broken for scheduler in deliverer.schedulers)


def exporter_to(receiver: ScriptedReceiver, protocol: str = "http/protobuf", **fields: Any) -> OtlpExporter:
    endpoint = receiver.grpc_target if protocol == "grpc" else receiver.url
    return OtlpExporter(endpoint, protocol=protocol, destination="there", env={}, **fields)


def assert_ledgers(directory: Path) -> None:
    for session in find_sessions(directory):
        for state in cursors(session.path)["there"].values():
            assert_true(state.ledger, closed_of(session.path).seq)
            assert state.position.finished


# ---------------------------------------------------------------- threads


def test_all_signals_of_all_sessions_reach_all_destinations(tmp_path: Path) -> None:
    sessions = [trained(tmp_path, 20, rank=rank, session=f"00000000000000a{rank}") for rank in range(3)]
    exporters = [Scripted(signals=SIGNALS), Scripted(signals=["traces"], destination="elsewhere")]
    deliverer = Deliverer(exporters, lambda _: find_sessions(tmp_path), Options(boot_id="boot"))
    deliverer.start()
    deliverer.wait(caught_up)
    deliverer.stop()
    assert all(exporter.closed for exporter in exporters)
    assert [scheduler.signal for scheduler in deliverer.schedulers] == [*SIGNALS, "traces"]
    for session in sessions:
        whole = [record for records in everything(session).values() for record in records]
        taken = [record for record in exporters[0].taken if record[0] == session.rank]
        assert sorted(map(repr, taken)) == sorted(map(repr, whole))
    assert len(exporters[1].taken) == 3 * 21


def test_a_signal_that_hangs_stops_no_other(tmp_path: Path) -> None:
    trained(tmp_path, 5)
    hanging, released = Scripted(signals=["traces"]), threading.Event()
    hanging.answer = lambda _: released.wait(20) and OK  # type: ignore[assignment, return-value]
    other = Scripted(destination="other")
    deliverer = Deliverer([hanging, other], lambda _: find_sessions(tmp_path), Options(boot_id="boot"))
    deliverer.start()
    until(lambda: other.taken)
    before = time.monotonic()
    deliverer.stop(timeout=0.2)
    assert time.monotonic() - before < under_load(2)
    assert not hanging.closed, "it is in use"
    released.set()


def test_a_defect_in_one_signal_stops_no_other_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path, 5)
    broken, other = Scripted(signals=["traces"]), Scripted(destination="other")
    deliverer = Deliverer([broken, other], lambda _: find_sessions(tmp_path), Options(boot_id="boot"))
    deliverer.schedulers[0].run_once = lambda: 1 / 0  # type: ignore[assignment, method-assign, return-value]
    deliverer.start()
    deliverer.wait(caught_up)
    deliverer.stop()
    assert other.taken
    assert [scheduler.broken for scheduler in deliverer.schedulers] == [True, False]
    assert "delivery of traces to there has stopped" in caplog.text


def test_it_ends_when_the_receiver_stays_silent_and_nobody_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliverers, "SILENCE_LIMIT_S", 0.5)
    living = Training(tmp_path)
    living.steps(3)
    exporter = Scripted(lambda _: Outcome(Verdict.RETRY, "no connection"))
    deliverer = Deliverer([exporter], lambda _: find_sessions(tmp_path), Options(boot_id="boot"))
    deliverer.start()
    deadline = time.monotonic() + 1.5
    deliverer.wait(lambda d: run_is_over(d) or time.monotonic() > deadline)
    assert time.monotonic() > deadline, "while somebody lives it stays"
    living.die()
    deliverer.wait(run_is_over)
    deliverer.stop()


def test_pace_is_told_the_cpu_time_of_each_round(tmp_path: Path) -> None:
    trained(tmp_path, 50)
    told: list[Any] = []
    deliverer = Deliverer([Scripted()], lambda _: find_sessions(tmp_path), Options(boot_id="boot"), pace=told.append)
    deliverer.start()
    deliverer.wait(caught_up)
    deliverer.stop()
    assert max(told) > 0.0001


def test_what_is_known_of_a_receiver(tmp_path: Path) -> None:
    trained(tmp_path, 5)
    released = threading.Event()
    answer = OK

    def wait(_: object) -> Outcome:
        released.wait(under_load(20))
        return answer

    def delivering(*, signals: Any = ("metrics",)) -> Deliverer:
        deliverer = Deliverer(
            [Scripted(wait, signals=signals)], lambda _: find_sessions(tmp_path), Options(boot_id="boot")
        )
        deliverer.start()
        return deliverer

    deliverer = delivering(signals=("metrics", "traces"))
    until(lambda: deliverer.outlook("there").state == "asking")
    assert abs(deliverer.outlook("there").since - time.time()) < under_load(5)
    answer = Outcome(Verdict.RETRY, "away")
    released.set()
    until(lambda: deliverer.outlook("there").state == "away")
    deliverer.stop()
    answer = OK
    deliverer = delivering()
    until(lambda: deliverer.outlook("there").state == "answering")
    deliverer.stop()


def test_a_wake_up_is_one_try_at_once_and_no_more_often_than_the_receiver_asks(tmp_path: Path) -> None:
    time_, asked = Time(), [Outcome(Verdict.RETRY, "away"), Outcome(Verdict.RETRY, "away", retry_after=20.0)]
    trained(tmp_path, 5)
    exporter = Scripted(asked)
    one = Scheduler("metrics", exporter, lambda: find_sessions(tmp_path), options(time_))
    one.run_once()
    one.run_once()
    assert len(exporter.requests) == 1, "it waits for its next try"
    one.wake(1.0)
    one.run_once()
    assert (len(exporter.requests), one.woken) == (2, 1.0)
    one.wake(2.0)
    one.run_once()
    assert (len(exporter.requests), one.woken) == (2, 2.0), "the receiver asked for 20 s"
    time_.skip(20.1)
    one.run_once()
    assert [outcome.verdict for *_, outcome in exporter.requests][2:] == [Verdict.DELIVERED]


def test_a_wake_up_lets_held_sessions_try_again_those_that_began_last(tmp_path: Path) -> None:
    for number in range(MAX_WOKEN + 10):
        trained(tmp_path, 1, rank=number, session=f"{number:016x}", started=float(number))
    exporter = Scripted(lambda _: Outcome(Verdict.HOLD, "no token"))
    one = Scheduler("metrics", exporter, lambda: find_sessions(tmp_path), options())
    one.run_once()
    assert len(exporter.requests) == MAX_WOKEN + 10
    exporter.answer = lambda _: OK
    one.wake(1.0)
    while one.run_once():
        pass
    assert {rank for rank, *_ in exporter.taken} == set(range(10, MAX_WOKEN + 10))


def test_whoever_rings_is_heard_and_answered_by_the_holder_of_the_lock(tmp_path: Path) -> None:
    holder, other = DeliveryLock(tmp_path, "node", "a"), DeliveryLock(tmp_path, "node", "a")
    assert holder.acquire()
    assert not holder.was_rung()
    for _ in range(2):
        rung = other.ring()
        assert holder.was_rung()
        assert not holder.was_rung()
    holder.report(Outlook("away", 1.5, rung, rung, 77))
    assert other.outlook() == Outlook("away", 1.5, rung, rung, 77)
    holder.release()
    assert other.outlook() == UNKNOWN


@pytest.mark.skipif(sys.platform != "linux", reason="names without files are Linux's")
def test_who_rings_wakes_the_holder_at_once(tmp_path: Path) -> None:
    holder, other = DeliveryLock(tmp_path, "node", "a"), DeliveryLock(tmp_path, "node", "a")
    other.ring()  # nobody sleeps there
    assert holder.acquire()
    bell = holder.bell()
    assert holder.bell() == bell >= 0
    assert not select.select([bell], [], [], 0)[0]
    other.ring()
    assert select.select([bell], [], [], 0)[0]
    assert holder.was_rung()
    holder.release()
    other.ring()
    second = DeliveryLock(tmp_path, "node", "b")
    assert second.acquire()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as somebody_else:
        somebody_else.bind(lock._bell_address(second.fileno()))
        assert second.bell() == -1
        DeliveryLock(tmp_path, "node", "b").ring()
        assert second.was_rung(), "by the file"
    assert all(path.is_file() for path in (tmp_path / ".deliverers").iterdir()), "nothing that hangs who reads it"
    second.release()


def test_one_lock_a_host_and_destination(tmp_path: Path) -> None:
    first, second = DeliveryLock(tmp_path, "node", "a"), DeliveryLock(tmp_path, "node", "a")
    assert first.acquire()
    assert not second.acquire()
    assert DeliveryLock(tmp_path, "node", "b").acquire()
    assert DeliveryLock(tmp_path, "other", "a").acquire()
    first.release()
    assert second.acquire()
    second.release()


# ---------------------------------------------------------------- the process


def test_two_ranks_share_one_deliverer_that_outlives_them_and_ends(ranks: Ranks) -> None:
    with ScriptedReceiver() as receiver:
        for rank in range(2):
            ranks.start(rank, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
        until(lambda: {point.rank for point in receiver.points("training.loss")} == {0, 1})
        (one,) = ranks.at_work()
        assert os.getsid(one.pid) == one.pid, "a session of its own"
        assert one.nice() > 0
        counts = ranks.stop()
        assert len(ranks.at_work()) <= 1
        until(lambda: not ranks.deliverers())
        for rank, (steps, _) in enumerate(counts):
            arrived = {point.number for point in receiver.points("training.loss") if point.rank == rank and point.value}
            assert arrived == {float(step) for step in range(1, steps)}, "0.0 has no bits"
        ended = [span for span in receiver.spans("training.run") if span["attributes"]["status"] == "completed"]
        assert {span["rank"] for span in ended} == {0, 1}


def test_it_outlives_a_run_whose_receiver_is_away_and_delivers_when_it_is_back(ranks: Ranks) -> None:
    with ScriptedReceiver() as receiver:
        receiver.stop()
        rank = ranks.start(count=100, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
        steps, seconds = ranks.ended(rank)
        assert seconds < under_load(1.0)
        assert ranks.deliverers()
        receiver.start()
        until(lambda: receiver.spans("training.run"))
        until(lambda: len({p for p in receiver.points("training.loss") if p.value is not None}) == steps)
        until(lambda: not ranks.deliverers())


def test_ctrl_c_ends_the_run_and_not_the_delivery(ranks: Ranks) -> None:
    with ScriptedReceiver() as receiver:
        receiver.stop()
        rank = ranks.start(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
        (one,) = until(ranks.at_work)
        os.killpg(rank.pid, signal.SIGINT)
        _, err = rank.communicate(timeout=under_load(20))
        assert rank.returncode == -signal.SIGINT
        assert "KeyboardInterrupt" in err
        assert ranks.at_work() == [one]
        receiver.start()
        (span,) = until(lambda: receiver.spans("training.run"))
        assert (span["attributes"]["status"], span["status"]) == ("interrupted", "UNSET")
        until(lambda: not ranks.deliverers())


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_stops_between_two_requests_when_asked_to(ranks: Ranks, how: Any) -> None:
    with ScriptedReceiver() as receiver:
        ranks.start(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
        (one,) = until(ranks.at_work)
        until(receiver.spans)
        one.send_signal(how)
        until(lambda: not one.is_running() or one.status() == "zombie")
        (again,) = until(ranks.at_work)
        assert again != one
        ranks.stop()


def test_headers_are_seen_in_no_argument_and_no_file(ranks: Ranks) -> None:
    with ScriptedReceiver() as receiver:
        headers = "authorization=Bearer%20s3cr3t-t0ken,x-scope-orgid=team-z9z9"
        ranks.start(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url, OTEL_EXPORTER_OTLP_HEADERS=headers)
        until(receiver.spans)
        (one,) = ranks.at_work()
        assert receiver.seen[0].headers["authorization"] == "Bearer s3cr3t-t0ken"
        receiver.script("all", lambda _: Answer(401))
        until(lambda: any(seen.answer.status == 401 for seen in receiver.seen))
        shown = " ".join(one.cmdline())
        ranks.stop()
        files = [path for path in ranks.directory.rglob("*") if path.is_file()]
        assert any(path.parent.name == DELIVERERS_DIRECTORY for path in files)
        for path in files:
            content = path.read_bytes()
            assert b"s3cr3t" not in content, path
            assert b"z9z9" not in content, path
        assert "s3cr3t" not in shown
        assert all(path.stat().st_mode & 0o077 == 0 for path in files if path.name not in {"stop", ".gitignore"})


def test_no_deliverer_without_an_endpoint_or_where_it_is_switched_off(ranks: Ranks) -> None:
    ranks.ended(ranks.start(count=20))
    with ScriptedReceiver() as receiver:
        off = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_SDK_DISABLED": "true"}
        ranks.ended(ranks.start(1, count=20, **off))
        assert ranks.deliverers() == []
        assert receiver.connections == 0


# ---------------------------------------------------------------- purity: the same set at the receiver


def rich(directory: Path, pause: Any = lambda: None) -> None:
    """Two sessions of some two thousand events: one that completes, one whose process dies in a step."""
    for rank in range(2):
        # Of this boot, or nobody could tell that the second is dead.
        training = Training(directory, rank=rank, session=f"00000000000000a{rank}")
        training.emit("hyperparams", params={"lr": 0.5, "model": {"width": 8}, "seed": 7})
        for epoch in range(3):
            begun = training.emit("epoch_begin", parent=training.run, epoch=epoch)
            for lap in range(2):
                for number in range(40):
                    training.now += 70_000_000
                    place = {"epoch": epoch, "split": "val" if lap else "train"}
                    step = training.emit("step_begin", parent=begun, step=number, **place)
                    span = training.emit("span_begin", parent=step, name="sync", collective=number % 2 == 0)
                    training.now += 3_000_000
                    training.emit("span_end", begin=span)
                    loss = {0: "NaN", 1: "Infinity", 2: "-Infinity"}.get(number % 10, number / 7)
                    training.emit(
                        "metrics", step=number, split="train", metrics={"loss": loss, "val/loss": 1, "🔥": -0.0}
                    )
                    if number == 17:
                        training.emit("error", parent=step, type="ValueError", message="m", stack="s", attributes={})
                    training.now += 1_000_000 * (number % 5)
                    status = {"status": "error"} if number == 17 else {}
                    training.emit("step_end", begin=step, data_wait=0.125, **status)
                pause()
            training.emit("artifact", name="ckpt", path=f"/tmp/{epoch}.pt", kind="checkpoint", step=40)
            training.emit("epoch_end", begin=begun)
        training.steps(5)
        if rank:
            training.emit("step_begin", parent=training.run, step=99, split="train")
            training.die()
        else:
            training.end()


def found_at(receiver: ScriptedReceiver) -> tuple[Any, ...]:
    """Everything at a receiver, comparable."""
    return receiver.points(), {repr(s) for s in receiver.spans()}, {repr(log) for log in receiver.logs()}


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """A journal that was delivered while it was written, and what arrived."""
    directory = tmp_path_factory.mktemp("live")
    with ScriptedReceiver() as receiver, closing(exporter_to(receiver)) as exporter:
        deliverer = Deliverer([exporter], lambda _: find_sessions(directory), Options(boot_id="boot", batch_bytes=5000))
        deliverer.start()

        def a_request_later() -> None:
            sent = len(receiver.seen)
            until(lambda: len(receiver.seen) > sent)

        rich(directory, a_request_later)
        deliverer.wait(lambda d: d.has_seen_all() and run_is_over(d))
        deliverer.stop()
        assert_ledgers(directory)
        assert len(receiver.seen) > 40
        return directory, found_at(receiver)


def fresh(journal: Path, tmp_path: Path) -> Any:
    for session in find_sessions(journal):
        copy(session, tmp_path)
    return tmp_path


def test_live_delivery_has_everything(journal: tuple[Any, ...]) -> None:
    directory, (points, spans, logs) = journal
    for rank, session in enumerate(find_sessions(directory)):
        whole = everything(session)
        assert len({p for p in points if p.rank == rank}) == len(whole["metrics"])
        assert len(spans) > len(whole["traces"]) > 300
        assert len(logs) > len(whole["logs"]) > 3


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sync_in_one_go_over_each_protocol_gives_the_same_set(
    journal: tuple[Any, ...], tmp_path: Path, protocol: Any
) -> None:
    directory, expected = journal
    with ScriptedReceiver() as receiver, closing(exporter_to(receiver, protocol)) as exporter:
        sync(fresh(directory, tmp_path), exporter, batch_bytes=1 << 22)
        assert found_at(receiver) == expected
    assert_ledgers(tmp_path)


@pytest.mark.parametrize("batch", [600, 20_000])
def test_sync_in_many_interrupted_pieces_gives_the_same_set(
    journal: tuple[Any, ...], tmp_path: Path, batch: int
) -> None:
    directory, expected = journal
    fresh(directory, tmp_path)
    with ScriptedReceiver() as receiver:
        for _ in range(12):
            sent = len(receiver.seen)
            with closing(exporter_to(receiver)) as exporter:
                deliverer = Deliverer(
                    [exporter], lambda _: find_sessions(tmp_path), Options(boot_id="boot", batch_bytes=batch)
                )
                deliverer.start()
                deliverer.wait(lambda d: caught_up(d) or len(receiver.seen) > sent + 7)  # noqa: B023
                deliverer.stop()
        with closing(exporter_to(receiver)) as exporter:
            sync(tmp_path, exporter)
        assert found_at(receiver) == expected
    assert_ledgers(tmp_path)


def test_repeated_from_zero_it_is_the_same_set_and_a_second_sync_sends_nothing(
    journal: tuple[Any, ...], tmp_path: Path
) -> None:
    directory, expected = journal
    fresh(directory, tmp_path)
    with ScriptedReceiver() as receiver:
        for protocol, state in (("http/json", "a"), ("http/protobuf", "b"), ("grpc", "c")):
            with closing(exporter_to(receiver, protocol)) as exporter:
                sync(tmp_path, exporter, state_directory=tmp_path / state)
                assert found_at(receiver) == expected
                sent = len(receiver.seen)
                sync(tmp_path, exporter, state_directory=tmp_path / state)
                assert len(receiver.seen) == sent


def test_this_machine_is_the_boot_that_the_deliverer_goes_by() -> None:
    assert host_facts().boot_id


def test_a_run_that_comes_and_goes_while_it_ends_is_delivered_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path, 3, destinations=["there"])
    stop, stops = Deliverer.stop, []

    def just_then(self: Any, *arguments: Any) -> None:
        stops.append(self)
        if len(stops) == 1:
            trained(tmp_path, 3, rank=1, session="00000000000000b1", destinations=["there"])
        stop(self, *arguments)

    monkeypatch.setattr(Deliverer, "stop", just_then)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    with ScriptedReceiver() as receiver:
        task = [{"endpoint": receiver.url, "destination": "there", "processors": []}]
        try:
            process.serve(tmp_path, "node", task, "boot")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        assert {span["rank"] for span in receiver.spans("training.run")} == {0, 1}
    assert len(stops) == 2
    lock = route_of(OtlpExporter(receiver.url, destination="there", env={}), tmp_path).lock_name
    assert DeliveryLock(tmp_path, "node", lock).outlook() == UNKNOWN, "no other rank waits for it"
    assert_ledgers(tmp_path)
