"""One request for what is fresh of a host's sessions: who travels in it, how often, what its outcome means for each.

Time is moved by hand, in steps of a tenth of a second, as often as a deliverer looks."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness.delivery import OK, Scripted, Time, Training, assert_true, everything, options, plain
from harness.journals import NOON, SECOND, closed_of, cursor_of
from harness.received import attributes, logs, points, spans
from harness.receiver import Answer, ScriptedReceiver

from stepspan.deliver import joint
from stepspan.deliver.joint import ALONE_S, MAX_REQUEST_BYTES
from stepspan.deliver.scheduler import Scheduler
from stepspan.exporters.exporter import JoiningExporter
from stepspan.exporters.otlp import OtlpExporter
from stepspan.journal.cursor import read_cursor
from stepspan.journal.layout import find_sessions
from stepspan.mapping.records import SIGNALS, Attributes, Record, Signal
from stepspan.otlp.endpoint import PROTOCOLS
from stepspan.otlp.outcome import Outcome, Verdict

POLL_S = 0.1
RECORDS: dict[Signal, Callable[[Any], Iterable[Any]]] = {"metrics": points, "traces": spans, "logs": logs}


class Host:
    """The ranks of a host, and the schedulers of a deliverer that sends what they write."""

    def __init__(
        self, place: Path, exporter: Any, ranks: int = 3, *, signals: Sequence[Signal] = ("metrics",), **how: Any
    ) -> None:
        self.place, self.exporter, self.time = place, exporter, Time()
        self.ranks = [self.new_rank(number) for number in range(ranks)]
        self._how = how
        self.signals = signals
        self.restart()

    def new_rank(self, number: int, **fields: Any) -> Training:
        return Training(self.place, rank=number, session=f"{number:016x}", **fields)

    def restart(self) -> None:
        """Another deliverer, as after a kill of this one."""
        how = options(self.time, **self._how)
        self.schedulers = [
            Scheduler(signal, self.exporter, lambda: find_sessions(self.place), how) for signal in self.signals
        ]

    def wait(self, seconds: float = 0.0) -> None:
        """Let time pass. The ranks' clocks follow."""
        for _ in range(max(1, round(seconds / POLL_S))):
            self.time.skip(POLL_S if seconds else 0.0)
            for scheduler in self.schedulers:
                while scheduler.run_once():
                    pass
        for rank in self.ranks:
            rank.now = max(rank.now, int(self.time.now * SECOND))

    def steps(self, count: int = 1, *, of: Sequence[int] | None = None) -> None:
        """Each rank logs a step, a second passes; again."""
        for _ in range(count):
            for rank in self.ranks if of is None else [self.ranks[number] for number in of]:
                rank.steps(1, every=0.0)
            self.wait(1.0)

    def end(self) -> None:
        for rank in self.ranks:
            rank.end()
        self.wait(1.0)

    def state(self, number: int, signal: Signal = "metrics") -> Any:
        return cursor_of(self.ranks[number].path.path / "cursors" / f"there.{signal}")

    def assert_all_delivered(self, taken: Callable[[int, Signal], list[Any]] | None = None) -> None:
        """Each rank's session is finished, and its ledgers are true."""
        for number, rank in enumerate(self.ranks):
            for signal in self.signals:
                state = self.state(number, signal)
                assert_true(state.ledger, closed_of(rank.path.path).seq)
                assert state.position.finished
                if taken is not None:
                    assert len(taken(number, signal)) == state.ledger.delivered


@contextmanager
def host(
    place: Path, receiver: ScriptedReceiver, ranks: int = 3, protocol: str = "http/protobuf", **how: Any
) -> Iterator[Host]:
    endpoint = receiver.grpc_target if protocol == "grpc" else receiver.url
    exporter = OtlpExporter(endpoint, protocol=protocol, destination="there", env={})
    yield Host(place, exporter, ranks, **how)
    exporter.close()


def ranks_of(request: Any) -> list[Any]:
    """The rank of each resource of a request, of any signal."""
    ((_, resources),) = request.ListFields()
    return [attributes(each.resource)["rank"] for each in resources]


def requests(receiver: ScriptedReceiver, signal: Signal = "metrics") -> list[list[Any]]:
    return [ranks_of(seen.request) for seen in receiver.seen if seen.signal == signal]


class Joining(Scripted):
    """A scripted exporter that joins: one answer a request, by the records of all of its sessions."""

    def __init__(self, *arguments: Any, **fields: Any) -> None:
        super().__init__(*arguments, **fields)
        self.joint: list[tuple[list[Any], Outcome]] = []
        """Ranks and outcome of each request of several sessions."""
        self.part_bytes = 100
        self._parts: dict[bytes, tuple[Attributes, Sequence[Record]]] = {}

    def encode(self, signal: Signal, resource: Attributes, records: Sequence[Record]) -> bytes:
        part = b"%d " % len(self._parts)
        self._parts[part.ljust(self.part_bytes)] = resource, records
        return part.ljust(self.part_bytes)

    def export_encoded(self, signal: Signal, parts: Sequence[bytes]) -> Outcome:
        found = [self._parts.pop(part) for part in parts]
        outcome = self.answer([record for _, records in found for record in records])
        self.joint.append(([resource["rank"] for resource, _ in found], outcome))
        if outcome.verdict is Verdict.DELIVERED:
            self.requests += [(resource, plain(records), outcome) for resource, records in found]
        return outcome


# ---------------------------------------------------------------- who travels together, and how often


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_eight_sessions_are_one_request_an_interval(tmp_path: Path, protocol: Any) -> None:
    with ScriptedReceiver() as receiver, host(tmp_path, receiver, 8, protocol, signals=SIGNALS) as ranks:
        ranks.steps(2)
        receiver.seen.clear()
        ranks.steps(10)
        for signal in ("metrics", "traces"):
            sent = requests(receiver, signal)
            assert all(sorted(request) == [*range(8)] for request in sent)
            assert len(sent) == 10
        ranks.end()
        known = {"metrics": receiver.points(), "traces": receiver.spans(), "logs": receiver.logs()}
        ranks.assert_all_delivered(lambda n, signal: [r for r in known[signal] if rank_of(r) == n])
        whole = {(rank.step, len(everything(rank.path)["metrics"])) for rank in ranks.ranks}
        assert whole == {(12, ranks.state(0).ledger.delivered)}


def always(value: float) -> Callable[[int], float]:
    return lambda _: value


def rank_of(record: Any) -> Any:
    return record["rank"] if isinstance(record, dict) else record.rank


def test_a_request_of_several_sessions_is_their_requests(tmp_path: Path) -> None:
    for protocol in ("http/protobuf", "http/json"):
        with ScriptedReceiver() as receiver:
            exporter = OtlpExporter(receiver.url, protocol=protocol, env={})
            for signal in SIGNALS:
                parts = [exporter.encode(signal, {"rank": number}, ()) for number in range(3)]
                assert exporter.export_encoded(signal, parts).verdict is Verdict.DELIVERED
                assert requests(receiver, signal) == [[0, 1, 2]]
            exporter.close()


def test_nothing_new_is_sent_before_the_interval_is_over(tmp_path: Path) -> None:
    ranks = Host(tmp_path, exporter := Joining(), send_interval=5.0)
    ranks.steps(1)
    exporter.joint.clear()
    ranks.steps(20)
    assert len(exporter.joint) == 4
    assert all(sorted(sent) == [0, 1, 2] for sent, _ in exporter.joint)


def test_the_first_line_after_a_pause_goes_as_soon_as_it_has_settled(tmp_path: Path) -> None:
    ranks = Host(tmp_path, exporter := Joining(), send_interval=5.0)
    ranks.steps(1)
    ranks.wait(30.0)
    sent = len(exporter.sent)
    ranks.ranks[1].steps(1, every=0.0)
    ranks.wait(0.2)
    assert len(exporter.sent) == sent, "another line of its millisecond might follow"
    ranks.wait(0.2)
    assert len(exporter.sent) == sent + 1
    assert [name for name, *_ in exporter.sent[-1]].count("training.loss") == 1


def test_what_is_shown_is_at_most_a_second_and_a_half_old(tmp_path: Path) -> None:
    ranks = Host(tmp_path, exporter := Joining(), 8)
    ages: list[float] = []

    def answer(records: Sequence[Any]) -> Outcome:
        ages.extend(ranks.time.now - at / SECOND for series, at, _ in records if series.name == "training.loss")
        return OK

    ranks.steps(1)
    exporter.answer = answer
    for number in range(100):  # each rank has its own moment in a second
        ranks.ranks[number % 8].steps(1, every=0.0)
        ranks.wait(0.1)
    assert len(ages) > 80
    assert max(ages) <= 1.5


def test_the_end_goes_at_once(tmp_path: Path) -> None:
    ranks = Host(tmp_path, exporter := Joining(), send_interval=30.0)
    ranks.steps(2)
    ranks.ranks[0].steps(1, every=0.0)
    ranks.ranks[0].end()
    ranks.wait(0.1)
    assert ranks.state(0).position.finished
    assert not ranks.state(1).position.finished
    assert [name for _, name, *_ in exporter.taken].count("training.loss") >= 3


@pytest.mark.parametrize("what", ["error", "nan"])
def test_what_must_not_wait_goes_at_once_and_alone(tmp_path: Path, what: str) -> None:
    ranks = Host(tmp_path, exporter := Joining(), send_interval=30.0)
    ranks.steps(2)
    ranks.wait(5.0)
    before = len(exporter.sent)
    for rank in ranks.ranks[1:]:
        rank.steps(1, every=0.0)
    if what == "error":
        ranks.ranks[0].emit("error", parent=ranks.ranks[0].run, type="ValueError", message="no", stack="")
    else:
        ranks.ranks[0].steps(1, every=0.0, value=lambda _: "NaN")
    ranks.wait(0.4)
    assert {resource["rank"] for resource, *_ in exporter.requests[before:]} == {0}
    name = "training.run.errors" if what == "error" else "training.nonfinite"
    assert any(name == record[0] for records in exporter.sent[before:] for record in records)


def test_a_value_that_stays_nan_is_no_request_a_line(tmp_path: Path) -> None:
    ranks = Host(tmp_path, exporter := Joining(), 1, send_interval=10.0)
    ranks.steps(2)
    exporter.requests.clear()
    for _ in range(50):
        ranks.ranks[0].steps(1, every=0.0, value=lambda _: "NaN")
        ranks.wait(0.1)
    assert len(exporter.requests) <= 12, "once a second, and what had to settle"


def test_who_waits_is_sent_to_at_once(tmp_path: Path) -> None:
    ranks = Host(tmp_path, exporter := Joining(), send_interval=30.0)
    ranks.steps(2)
    for rank in ranks.ranks:
        rank.steps(1, every=0.0)
    ranks.schedulers[0].wake(1.0)
    ranks.wait()  # just after the last look, when nothing had been written
    ranks.wait(0.4)
    assert all(ranks.state(number).position.seq == rank.writer.seq for number, rank in enumerate(ranks.ranks))
    assert len(exporter.joint) <= 4


def test_zero_sends_each_session_s_lines_as_they_are_seen(tmp_path: Path) -> None:
    ranks = Host(tmp_path, exporter := Joining(), send_interval=0.0)
    ranks.steps(3)
    assert exporter.joint == []
    assert len(exporter.requests) >= 9


def test_an_exporter_that_cannot_join_gets_one_resource_a_call(tmp_path: Path) -> None:
    exporter = Scripted()
    assert not isinstance(exporter, JoiningExporter)
    ranks = Host(tmp_path, exporter)
    ranks.steps(3)
    ranks.end()
    assert Counter(rank for rank, *_ in exporter.taken)[0] == len(everything(ranks.ranks[0].path)["metrics"])
    ranks.assert_all_delivered()


def test_a_session_that_lags_goes_alone(tmp_path: Path) -> None:
    ranks = Host(tmp_path, exporter := Joining())
    ranks.time.skip(500.0)
    late, *others = ranks.ranks
    late.steps(3, every=1.0)  # of 500 s ago
    for rank in others:
        rank.now = int(ranks.time.now * SECOND)
        rank.steps(1, every=0.0)
    ranks.wait(2.0)
    ranks.wait(2.0)
    assert exporter.joint
    assert all(0 not in sent for sent, _ in exporter.joint)
    late.steps(1, every=0.0)
    ranks.steps(2)
    assert sorted(exporter.joint[-1][0]) == [0, 1, 2], "it has caught up"


def test_points_ahead_of_the_clock_and_of_times_that_were_given_go_alone(tmp_path: Path) -> None:
    ranks = Host(tmp_path, exporter := Joining())
    ranks.steps(2)
    exporter.joint.clear()
    ranks.ranks[0].now += 60 * SECOND
    ranks.ranks[0].steps(1, every=0.0)
    past = NOON - 3600 * SECOND
    ranks.ranks[1].emit("metrics", split="train", metrics={"loss": 0.25}, time=past)
    ranks.ranks[2].steps(1, every=0.0)
    ranks.wait(1.0)
    assert all(sent == [2] for sent, _ in exporter.joint) or not exporter.joint
    assert {resource["rank"] for resource, *_ in exporter.requests} == {0, 1, 2}


def test_a_request_is_of_one_host_and_of_512_kib(tmp_path: Path) -> None:
    exporter = Joining()
    exporter.part_bytes = MAX_REQUEST_BYTES // 3
    ranks = Host(tmp_path, exporter, 7)
    other = ranks.place / "job" / "another"
    other.mkdir()
    moved = ranks.ranks.pop()
    moved.writer.forget()
    moved.path.path.rename(other / moved.path.path.name)
    ranks.steps(3)
    assert all(len(sent) <= 3 and 6 not in sent for sent, _ in exporter.joint)
    assert sorted(rank for sent, _ in exporter.joint[-2:] for rank in sent) == [*range(6)]
    assert {resource["rank"] for resource, *_ in exporter.requests} == {*range(7)}


# ---------------------------------------------------------------- outcomes


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_refused_point_costs_its_session_s_neighbours_nothing(tmp_path: Path, protocol: Any) -> None:
    def answer(request: Any) -> Answer:
        bad = any(
            p.rank == 1 and p.value is not None and p.name == "training.loss" and p.number == 13
            for p in points(request)
        )
        return Answer(400, text="no") if bad else Answer()

    with ScriptedReceiver() as receiver, host(tmp_path, receiver, 4, protocol) as ranks:
        ranks.steps(2)
        receiver.script("metrics", answer)
        receiver.seen.clear()
        for number, rank in enumerate(ranks.ranks):
            rank.steps(1, every=0.0, value=always(13.0 if number == 1 else 0.5))
        ranks.wait(1.0)
        assert sorted(requests(receiver)[0]) == [0, 1, 2, 3]
        assert [ranks.state(number).ledger.rejected for number in range(4)] == [0, 1, 0, 0]
        seqs = [(ranks.state(number).position.seq, rank.writer.seq) for number, rank in enumerate(ranks.ranks)]
        assert all(position == written for position, written in seqs), "in the same round"
        receiver.seen.clear()
        ranks.steps(3)
        assert all(request == [1] or sorted(request) == [0, 2, 3] for request in requests(receiver))
        ranks.time.skip(ALONE_S)
        ranks.wait(1.0)
        receiver.seen.clear()
        ranks.steps(2)
        assert sorted(requests(receiver)[-1]) == [0, 1, 2, 3], "ten minutes later it travels with the others"
        ranks.end()
        ranks.assert_all_delivered(lambda n, _: [p for p in receiver.points() if p.rank == n])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_partial_success_is_counted_and_not_sent_again(tmp_path: Path, protocol: Any) -> None:
    with ScriptedReceiver() as receiver, host(tmp_path, receiver, 3, protocol) as ranks:
        ranks.steps(2)
        receiver.script("metrics", [Answer(rejected=5, text="five of them")])
        receiver.seen.clear()
        ranks.steps(1)
        assert len(requests(receiver)) == 1
        assert sum(ranks.state(number).ledger.rejected for number in range(3)) == 5
        ranks.end()
        ranks.assert_all_delivered()
        assert sum(ranks.state(number).ledger.delivered for number in range(3)) == len(receiver.points()) - 5


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_when_the_receiver_is_away_all_wait_together_as_long_as_it_asks(tmp_path: Path, protocol: Any) -> None:
    with ScriptedReceiver() as receiver, host(tmp_path, receiver, 3, protocol) as ranks:
        ranks.steps(2)
        receiver.script("metrics", [Answer(503, retry_after=20)])
        receiver.seen.clear()
        ranks.steps(19)
        assert len(receiver.seen) == 1
        assert {ranks.state(number).state for number in range(3)} == {"retry"}
        ranks.steps(4)
        assert {ranks.state(number).state for number in range(3)} == {"ok"}
        assert sorted(requests(receiver)[-1]) == [0, 1, 2]
        ranks.end()
        ranks.assert_all_delivered(lambda n, _: [p for p in receiver.points() if p.rank == n])


def test_a_hold_is_everybody_s_and_each_tries_again(tmp_path: Path) -> None:
    ranks = Host(tmp_path, exporter := Joining())
    ranks.steps(2)
    exporter.answer = lambda _: Outcome(Verdict.HOLD, "no token")
    exporter.joint.clear()
    ranks.steps(1)
    assert [outcome.message for _, outcome in exporter.joint] == ["no token"]
    assert {ranks.state(number).state for number in range(3)} == {"hold"}
    exporter.answer = lambda _: OK
    ranks.steps(20)
    assert {ranks.state(number).state for number in range(3)} == {"ok"}
    ranks.end()
    ranks.assert_all_delivered()


def test_too_old_is_told_of_the_session_that_is(tmp_path: Path) -> None:
    ranks = Host(tmp_path, exporter := Joining())
    ranks.steps(2)
    too_old = Outcome(Verdict.HOLD, "too old", too_old=True)
    exporter.answer = lambda records: too_old if any(value == 13.0 for _, _, value in records) else OK
    for number, rank in enumerate(ranks.ranks):
        rank.steps(1, every=0.0, value=always(13.0 if number == 1 else 0.5))
    ranks.wait(1.0)
    assert [ranks.state(number).state for number in range(3)] == ["ok", "hold", "ok"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_request_that_is_too_large_is_halved_by_sessions(tmp_path: Path, protocol: Any) -> None:
    limit = 2500
    with ScriptedReceiver() as receiver, host(tmp_path, receiver, 8, protocol) as ranks:
        receiver.script("metrics", lambda r: Answer(413, text="larger than max") if r.ByteSize() > limit else Answer())
        ranks.steps(2)
        receiver.seen.clear()
        ranks.steps(5)
        assert max(map(len, requests(receiver))) > 1
        assert sum(seen.answer.status == 413 for seen in receiver.seen) <= 3, "the size is learnt"
        ranks.end()
        ranks.assert_all_delivered(lambda n, _: [p for p in receiver.points() if p.rank == n])
        assert all(ranks.state(number).ledger.rejected == 0 for number in range(8))


def test_what_is_refused_only_together_goes_in_smaller_requests(tmp_path: Path) -> None:
    refused = Outcome(Verdict.ISOLATE, "no")
    exporter = Joining(lambda records: OK if len(records) <= 10 else refused)
    ranks = Host(tmp_path, exporter, 8)
    ranks.steps(6)
    assert max(len(sent) for sent, outcome in exporter.joint if outcome is OK) > 1
    assert sum(outcome is not OK for _, outcome in exporter.joint) <= 4
    ranks.end()
    ranks.assert_all_delivered()


class Killed(BaseException):
    """SIGKILL, as code sees it: not at all."""


def test_a_kill_between_the_answer_and_the_cursors_sends_the_same_again(tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver, host(tmp_path, receiver) as ranks:
        ranks.steps(2)
        task = next(iter(ranks.schedulers[0].tasks.values()))
        before = ranks.state(0).position.seq
        export = ranks.exporter.export_encoded

        def killed(*arguments: Any) -> Outcome:
            export(*arguments)
            raise Killed

        ranks.exporter.export_encoded = killed
        with pytest.raises(Killed):
            ranks.steps(1)
        del ranks.exporter.export_encoded
        assert task.position.seq == ranks.state(0).position.seq == before
        for scheduler in ranks.schedulers:
            scheduler.close()
        ranks.restart()
        ranks.steps(2)
        ranks.end()
        ranks.assert_all_delivered(lambda n, _: [p for p in receiver.points() if p.rank == n])


def test_ledgers_hold_whatever_becomes_of_joint_requests(tmp_path: Path) -> None:
    for seed in (*range(8), 36, 78):
        chance = random.Random(seed)

        def answer(records: Sequence[Any], chance: random.Random = chance) -> Outcome:
            verdict = chance.choices(list(Verdict), [8, 1, 1, 1, 2, 0.3])[0]
            rejected = chance.choice([0, 0, 0, 1, 3, 100]) if verdict is Verdict.DELIVERED else 0
            return Outcome(verdict, "so", chance.choice([None, None, 2.0]), rejected)

        exporter = Joining(answer)
        ranks = Host(tmp_path / str(seed), exporter, 4)
        for _ in range(30):
            ranks.steps(1)
            for file in (tmp_path / str(seed)).rglob("there.metrics"):
                if (state := read_cursor(file)) is not None:
                    assert_true(state.ledger, state.position.seq)
        exporter.answer = lambda _: OK
        for rank in ranks.ranks:
            rank.end()
        ranks.wait(400.0)
        ranks.assert_all_delivered()


def test_shares_of_a_partial_success_add_up() -> None:
    chance = random.Random(7)
    for _ in range(2000):
        counts = [chance.randrange(1, 50) for _ in range(chance.randrange(2, 9))]
        total = chance.randrange(0, 2 * sum(counts))
        shares = joint._shares(total, counts)
        assert sum(shares) == min(total, sum(counts))
        assert all(0 <= share <= count for share, count in zip(shares, counts, strict=True))


def test_a_journal_that_nobody_writes_is_not_read(tmp_path: Path) -> None:
    ranks = Host(tmp_path, Joining())
    ranks.steps(3)
    ranks.wait(3.0)
    for task in ranks.schedulers[0].tasks.values():
        task._batches.read = lambda *_: pytest.fail("it was read")  # type: ignore[method-assign]
    ranks.wait(10.0)
