"""What the cursors say, and dead letters: kept with the receiver's words, sent again, moved in the ledger."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest
from harness.delivery import OK, Scripted, Training, assert_true, deliver, options, plain, trained
from harness.journals import closed_of
from harness.processes import under_load
from harness.receiver import HANG, Answer, ScriptedReceiver

from stepspan.deliver import dead_letters
from stepspan.deliver.dead_letters import append, resend
from stepspan.deliver.ledgers import cursors, session_ledger, signal_ledger
from stepspan.deliver.task import DeliveryTask
from stepspan.exporters.otlp import OtlpExporter
from stepspan.journal.cursor import CursorState, Ledger, Position, read_cursor
from stepspan.journal.layout import SessionPath
from stepspan.mapping.records import SIGNALS
from stepspan.otlp.endpoint import PROTOCOLS
from stepspan.otlp.outcome import Outcome, Verdict

ALL = 1 << 62
REFUSED = Outcome(Verdict.ISOLATE, "400: no")


def exporter_to(receiver: ScriptedReceiver, protocol: str = "http/json", **fields: Any) -> Any:
    endpoint = receiver.grpc_target if protocol == "grpc" else receiver.url
    return closing(OtlpExporter(endpoint, protocol=protocol, destination="there", env={}, **fields))


def letters(home: Path) -> list[dict[str, Any]]:
    file = home / "rejected.jsonl"
    return [orjson.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []


def refusing(session: SessionPath, count: int, signals: Any = SIGNALS) -> None:
    """Deliver with the `count` records after the first of each signal refused."""
    for signal in signals:
        whole = Scripted(destination="whole")
        deliver(session, whole, options(), signal)
        bad = [record[1:] for record in whole.taken[1 : count + 1]]
        judge = lambda records, bad=bad: REFUSED if set(bad) & set(plain(records)) else OK  # noqa: E731
        task = deliver(session, Scripted(judge), options(), signal)
        assert task.state.ledger.rejected == count


# ---------------------------------------------------------------- ledgers


def test_a_session_nobody_has_sent(tmp_path: Path) -> None:
    session = trained(tmp_path, 3, destinations=["there"])
    closed = closed_of(session.path)
    assert session_ledger(session) == {
        "session": "00000000000000a0",
        "rank": 0,
        "path": str(session.path),
        "status": "completed",
        "journaled": closed.seq,
        "last_event": closed.ts,
        "begun_for": ["there"],
        "destinations": {},
    }


def test_a_ledger_under_way_says_what_waits_and_how_far_it_lags(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.steps(40)
    session = training.path
    task = DeliveryTask(session, "metrics", Scripted(), options(batch_bytes=2000))
    task.advance(ALL)
    ledger = session_ledger(session)
    found = ledger["destinations"]["there"]["metrics"]
    assert ledger["status"] == "open"
    assert ledger["journaled"] == training.writer.seq
    assert found["read"] + found["pending"] == ledger["journaled"]
    assert found["pending"] > 50
    assert 20 < found["lag"] < 41
    assert (found["state"], found["finished"]) == ("ok", False)
    task.close()
    training.end()


def test_signals_and_destinations_have_ledgers_of_their_own(tmp_path: Path) -> None:
    session = trained(tmp_path, 10)
    deliver(session, Scripted(), options(), "metrics")
    deliver(session, Scripted(), options(), "traces")
    deliver(session, Scripted(destination="elsewhere"), options(), "logs")
    found = cursors(session.path)
    assert {d: set(s) for d, s in found.items()} == {"there": {"metrics", "traces"}, "elsewhere": {"logs"}}
    for states in found.values():
        for state in states.values():
            assert_true(state.ledger, closed_of(session.path).seq)
            assert state.position.finished


def test_files_beside_the_cursors_are_none(tmp_path: Path) -> None:
    session = trained(tmp_path, 3)
    deliver(session, Scripted(), options())
    for name in ("there.state", "junk", "there.metrics.draft", "there.logs"):
        (session.path / "cursors" / name).write_bytes(b"junk" * 2000)
    assert {d: set(s) for d, s in cursors(session.path).items()} == {"there": {"metrics"}}


def test_nothing_waits_where_all_lines_are_counted() -> None:
    state = CursorState(Position(1, 10, 20, 5), Ledger(read=10, damaged=4, pruned=3, dropped=3))
    assert signal_ledger(state, 20, 10)["pending"] == 0
    assert signal_ledger(state, 20, 10)["lag"] == 0.0
    assert signal_ledger(state, 25, 10 + 2 * 10**9)["pending"] == 5


def test_what_has_never_been_sent_lags_since_the_session_began(tmp_path: Path) -> None:
    session = trained(tmp_path, 40)
    deliver(session, Scripted([Outcome(Verdict.HOLD, "404: check the path")]), options())
    ledger = session_ledger(session)
    found = ledger["destinations"]["there"]["metrics"]
    assert (found["delivered"], found["pending"]) == (0, ledger["journaled"])
    assert found["lag"] == pytest.approx(40, abs=2)


# ---------------------------------------------------------------- dead letters, sent again


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_dead_letters_arrive_as_they_would_have_and_the_ledger_moves(tmp_path: Path, protocol: Any) -> None:
    training = Training(tmp_path)
    training.steps(20, value=lambda n: "NaN" if n % 3 == 0 else n / 7)
    session = training.end()
    with ScriptedReceiver() as first, exporter_to(first, protocol) as exporter:
        for signal in SIGNALS:
            deliver(session, exporter, options(state_directory=tmp_path / "first"), signal)
        expected = first.points(), first.spans(), first.logs()
    refusing(session, 2)
    assert len(letters(session.path)) == 6
    with ScriptedReceiver() as second, exporter_to(second, protocol) as exporter:
        assert resend(session.path, exporter) == (6, 0)
        assert second.seen[0].protocol == protocol
        assert len(second.points()) == len(second.spans()) == len(second.logs()) == 2
        assert second.points() < expected[0], "value bits, times and attributes"
        assert all(span in expected[1] for span in second.spans()), "ids"
        assert all(log in expected[2] for log in second.logs())
        assert not (session.path / "rejected.jsonl").exists()
        for state in cursors(session.path)["there"].values():
            assert state.ledger.rejected == 0
            assert_true(state.ledger, closed_of(session.path).seq)
        seen = len(second.seen)
        assert resend(session.path, exporter) == (0, 0)
        assert len(second.seen) == seen


def test_every_kind_of_point_survives_being_a_dead_letter(tmp_path: Path) -> None:
    session = trained(tmp_path, 30)
    whole = Scripted(destination="whole")
    task = DeliveryTask(session, "metrics", whole, options())
    batch = task._batches.read(task.position, ALL, task._end)
    task.close()
    append(session.path, "there", "metrics", task.header["resource"], [(record, "no") for record in batch.records])  # type: ignore[union-attr]
    for protocol in PROTOCOLS:
        with ScriptedReceiver() as straight, exporter_to(straight, protocol) as exporter:
            exporter.export("metrics", task.header["resource"], batch.records)  # type: ignore[union-attr]
            with ScriptedReceiver() as again, exporter_to(again, protocol) as other:
                for letter in letters(session.path):
                    assert other.send_json("metrics", orjson.dumps(letter["request"])).verdict is Verdict.DELIVERED
                assert again.points() == straight.points()
                assert {point.name for point in again.points()} >= {"training.step.duration", "training.run.info"}


def test_what_is_refused_again_stays_as_it_was(tmp_path: Path) -> None:
    session = trained(tmp_path, 10)
    refusing(session, 3, ["metrics"])
    before = (session.path / "rejected.jsonl").read_bytes().splitlines()
    with ScriptedReceiver() as receiver, exporter_to(receiver) as exporter:
        receiver.script("metrics", [Answer(400, "still no"), Answer(), Answer(400, "still no")])
        assert resend(session.path, exporter) == (1, 2)
    assert (session.path / "rejected.jsonl").read_bytes().splitlines() == [before[0], before[2]]
    ledger = cursors(session.path)["there"]["metrics"].ledger
    assert ledger.rejected == 2
    assert_true(ledger, closed_of(session.path).seq)


def test_a_partial_success_that_leaves_the_record_out_is_a_refusal(tmp_path: Path) -> None:
    session = trained(tmp_path, 10)
    refusing(session, 1, ["metrics"])
    with ScriptedReceiver() as receiver, exporter_to(receiver) as exporter:
        receiver.script("metrics", [Answer(rejected=1, text="no")])
        assert resend(session.path, exporter) == (0, 1)
    assert len(letters(session.path)) == 1


def test_a_receiver_that_is_away_is_asked_three_times_a_signal(tmp_path: Path) -> None:
    session = trained(tmp_path, 30)
    refusing(session, 4)
    with ScriptedReceiver() as receiver, exporter_to(receiver) as exporter:
        receiver.script("metrics", lambda _: Answer(503))
        receiver.script("logs", lambda _: Answer(401))
        assert resend(session.path, exporter) == (4, 8)
        assert sorted(seen.signal for seen in receiver.seen) == [*["logs"] * 3, *["metrics"] * 3, *["traces"] * 4]
    with ScriptedReceiver() as receiver, exporter_to(receiver, timeout=under_load(0.3)) as exporter:
        receiver.script("all", lambda _: HANG)
        assert resend(session.path, exporter) == (0, 8)
        assert len(receiver.seen) == 6


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_letter_that_a_receiver_fails_at_is_not_in_the_way_of_others(tmp_path: Path, status: int) -> None:
    session = trained(tmp_path, 30)
    refusing(session, 4, ["metrics"])
    with ScriptedReceiver() as receiver, exporter_to(receiver) as exporter:
        receiver.script("metrics", [Answer(status)])
        assert resend(session.path, exporter) == (3, 1)


def test_other_destinations_letters_and_lines_that_are_none_stay(tmp_path: Path) -> None:
    session = trained(tmp_path, 10)
    refusing(session, 2, ["metrics"])
    file = session.path / "rejected.jsonl"
    ours = file.read_bytes()
    theirs = ours.replace(b'"there"', b'"elsewhere"')
    junk = b'{"destination":"there","signal":"metrics","requ\nnull\n[1]\n{"signal":"pictures"}\n\xff\xfe\n'
    file.write_bytes(theirs + junk + ours)
    with ScriptedReceiver() as receiver, exporter_to(receiver) as exporter:
        assert resend(session.path, exporter) == (2, 0)
    assert file.read_bytes() == theirs + junk


def test_a_letter_whose_request_is_no_otlp_stays(tmp_path: Path) -> None:
    letter = orjson.dumps(
        {"destination": "there", "signal": "metrics", "why": "", "request": {"resourceMetrics": [{"odd": 1}]}}
    )
    (tmp_path / "rejected.jsonl").write_bytes(letter + b"\n")
    with ScriptedReceiver() as receiver, exporter_to(receiver, "http/protobuf") as exporter:
        assert resend(tmp_path, exporter) == (0, 1)
        assert receiver.seen == []
    assert len(letters(tmp_path)) == 1


def test_a_record_that_a_crash_set_aside_twice_is_sent_once(tmp_path: Path) -> None:
    session = trained(tmp_path, 10)
    refusing(session, 2, ["metrics"])
    file = session.path / "rejected.jsonl"
    file.write_bytes(file.read_bytes() * 2)
    with ScriptedReceiver() as receiver, exporter_to(receiver) as exporter:
        assert resend(session.path, exporter) == (2, 0)
        assert len(receiver.seen) == 2
    ledger = cursors(session.path)["there"]["metrics"].ledger
    assert_true(ledger, closed_of(session.path).seq)


def test_nothing_to_send(tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver, exporter_to(receiver) as exporter:
        assert resend(tmp_path, exporter) == (0, 0)
        assert receiver.seen == []


def test_letters_that_come_while_others_are_sent_are_kept(tmp_path: Path) -> None:
    session = trained(tmp_path, 10)
    refusing(session, 2, ["metrics"])
    ours = letters(session.path)

    def meanwhile(request: pytest.FixtureRequest) -> Answer:
        record = (dead_letter_series(), 1, 1.0)
        append(session.path, "elsewhere", "metrics", {}, [(record, "no")])
        return Answer()

    with ScriptedReceiver() as receiver, exporter_to(receiver) as exporter:
        receiver.script("metrics", meanwhile)
        assert resend(session.path, exporter) == (2, 0)
    assert len(ours) == 2
    assert [letter["destination"] for letter in letters(session.path)] == ["elsewhere"] * 2


def dead_letter_series() -> Any:
    from stepspan.mapping.records import Series

    return Series("training.loss", {"split": "train"})


def test_appends_from_all_sides_are_lost_by_no_removal(tmp_path: Path) -> None:
    """Two destinations set records aside while a third's are removed, again and again."""
    each, done = 150, threading.Event()

    def set_aside(destination: Any) -> None:
        for number in range(each):
            append(tmp_path, destination, "metrics", {}, [((dead_letter_series(), number, 1.0), "no")])

    def clear() -> None:
        while not done.is_set():
            whole = (tmp_path / "rejected.jsonl").read_bytes().rpartition(b"\n")[0] if has() else b""
            for letter in whole.splitlines():
                if orjson.loads(letter)["destination"] == "c":
                    dead_letters._remove(tmp_path / "rejected.jsonl", [letter])

    def has() -> Any:
        return (tmp_path / "rejected.jsonl").exists()

    writers = [threading.Thread(target=set_aside, args=(name,)) for name in "abc"]
    remover = threading.Thread(target=lambda: contextlib_suppress(clear))
    for thread in (*writers, remover):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    remover.join()
    found = [(letter["destination"], letter["request"]) for letter in letters(tmp_path)]
    for name in "ab":
        times = [
            int(r["resourceMetrics"][0]["scopeMetrics"][0]["metrics"][0]["gauge"]["dataPoints"][0]["timeUnixNano"])
            for destination, r in found
            if destination == name
        ]
        assert times == [*range(each)]


def contextlib_suppress(work: Any) -> None:
    try:
        work()
    except FileNotFoundError:  # it removed the last letter between two looks
        contextlib_suppress(work)


def test_a_line_that_a_crash_cut_does_not_swallow_the_next(tmp_path: Path) -> None:
    (tmp_path / "rejected.jsonl").write_bytes(b'{"destination":"the')
    append(tmp_path, "there", "metrics", {}, [((dead_letter_series(), 1, 1.0), "no")])
    cut, whole = (tmp_path / "rejected.jsonl").read_bytes().splitlines()
    assert cut == b'{"destination":"the'
    assert orjson.loads(whole)["destination"] == "there"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"")
    os.symlink(tmp_path / "elsewhere", tmp_path / "rejected.jsonl")
    with pytest.raises(OSError, match="rejected"):
        append(tmp_path, "there", "metrics", {}, [((dead_letter_series(), 1, 1.0), "no")])
    assert (tmp_path / "elsewhere").read_bytes() == b""


def test_without_a_cursor_the_letters_still_go(tmp_path: Path) -> None:
    session = trained(tmp_path, 10)
    refusing(session, 1, ["metrics"])
    cursor = session.path / "cursors" / "there.metrics"
    cursor.unlink()
    with ScriptedReceiver() as receiver, exporter_to(receiver) as exporter:
        assert resend(session.path, exporter) == (1, 0)
    assert not cursor.exists()
    assert read_cursor(cursor) is None
