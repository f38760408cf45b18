"""Random receivers, which refuse records, series, sizes, codes and connections: what is certain with any of them.

The ledgers hold after each round; each record is delivered or rejected once the receiver behaves; what is rejected is
what the receiver refuses; a session of which nothing is refused is stopped by no other; and the requests stay few.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from harness.delivery import OK, Scripted, Time, Training, assert_true, everything, options, plain, sync
from harness.received import bits, points
from harness.receiver import RESET, Answer, ScriptedReceiver

from stepspan.deliver import backoff, dead_letters
from stepspan.deliver.scheduler import Scheduler
from stepspan.journal.layout import SessionPath
from stepspan.mapping.records import SIGNALS, Signal, Span
from stepspan.otlp.endpoint import PROTOCOLS
from stepspan.otlp.outcome import Outcome, Verdict

REFUSALS = {
    "400": Outcome(Verdict.ISOLATE, "400: refused"),
    "413": Outcome(Verdict.HALVE, "413: too large"),
    "429": Outcome(Verdict.RETRY, "429: busy"),
    "500": Outcome(Verdict.RETRY_THEN_HOLD, "500: failed"),
    "503": Outcome(Verdict.RETRY, "503: busy"),
    "403": Outcome(Verdict.HOLD, "403: forbidden", may_pass=True),
    "closed": Outcome(Verdict.RETRY, "closed the connection"),
}
AWAY = (
    Outcome(Verdict.RETRY, "no connection"),
    Outcome(Verdict.RETRY, "503: away"),
    Outcome(Verdict.RETRY_THEN_HOLD, "500: disk full"),
    Outcome(Verdict.HOLD, "401: credentials", denied=True),
    Outcome(Verdict.HOLD, "404: path", may_pass=True),
)
TOO_LARGE = Outcome(Verdict.HALVE, "larger than the receiver takes")
SEEDS = int(os.environ.get("STEPSPAN_SEEDS", "12"))
RANKS, STEPS = 3, 60
HEALTHY_RANK = RANKS - 1


def name_of(record: Any) -> str:
    if type(record) is tuple:
        return str(record[0].name)
    return record.name if isinstance(record, Span) else f"{record.event_name} {record.severity}"


class RandomReceiver:
    """Refuses what a seed says, of all sessions but the healthy rank's; away now and then."""

    def __init__(self, seed: int, clock: Time, signal: Signal, names: Sequence[str]) -> None:
        chance = random.Random(f"{seed} {signal}")
        self.clock, self.signal = clock, signal
        self.code = chance.choice(list(REFUSALS))
        self.bad_names = set(chance.sample(names, min(len(names) - 1, chance.choice((0, 1, 1, 2)))))
        self.bad_ranks = set(range(HEALTHY_RANK)) if chance.random() < 0.5 else {0}
        self.share = chance.choice((0.0, 0.0, 0.01, 0.05))
        """Of records that are refused one by one."""
        self.max_records = chance.choice((10**6, 10**6, 40, 7))
        self.flaps = chance.choice((0.0, 0.0, 0.1, 0.2))
        """Of requests that fail whatever they hold."""
        begin = clock.now
        self.absences = []
        for _ in range(chance.choice((0, 1, 2))):
            begin += chance.uniform(2, 20)
            end = begin + chance.choice((0.5, 5.0, 40.0))
            self.absences.append((begin, end, chance.choice(AWAY)))
            begin = end
        self.chance = chance
        self.behaves = False

    def refuses(self, rank: int, record: Any) -> bool:
        if rank not in self.bad_ranks:
            return False
        identity = (rank, *plain([record])[0])
        return name_of(record) in self.bad_names or random.Random(repr(identity)).random() < self.share

    @property
    def absence(self) -> Outcome | None:
        now = self.clock.now
        return next((outcome for begin, end, outcome in self.absences if begin <= now < end), None)

    def answer(self, rank: int, records: Sequence[Any]) -> Outcome:
        if self.absence and not self.behaves:
            return self.absence
        if self.chance.random() < self.flaps and not self.behaves:
            return AWAY[1]
        if len(records) > self.max_records:
            return TOO_LARGE
        return REFUSALS[self.code] if any(self.refuses(rank, record) for record in records) else OK


class Receiver(Scripted):
    """Answers as a random receiver says. Sends one session's records a request."""

    def __init__(self, random_receiver: RandomReceiver) -> None:
        super().__init__(signals=[random_receiver.signal])
        self.random_receiver = random_receiver
        self.count = 0
        """Of requests."""

    def export(self, signal: Any, resource: Any, records: Any) -> Outcome:
        self.count += 1
        outcome = self.random_receiver.answer(int(resource["rank"]), records)
        self.requests.append((resource, plain(records), outcome))
        return outcome


class JoiningReceiver(Receiver):
    """Takes several sessions' records in one request, too."""

    def encode(self, signal: Signal, resource: Any, records: Any) -> Any:
        return [(resource, records)]

    def export_encoded(self, signal: Signal, parts: Sequence[Any]) -> Outcome:
        sent = [(int(resource["rank"]), records) for part in parts for resource, records in part]
        outcomes = [self.random_receiver.answer(rank, records) for rank, records in sent]
        outcome = next((outcome for outcome in outcomes if outcome is not OK), OK)
        if sum(len(records) for _, records in sent) > self.random_receiver.max_records:
            outcome = TOO_LARGE
        self.count += 1
        self.requests += [({"rank": rank}, plain(records), outcome) for rank, records in sent]
        return outcome


@pytest.fixture
def rejected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """What becomes a dead letter: rank and record."""
    found: list[tuple[int, Any]] = []
    append = dead_letters.append

    def spy(directory: Path, destination: str, signal: Signal, resource: Any, records: Any) -> None:
        found.extend((resource["rank"], record) for record, _ in records)
        append(directory, destination, signal, resource, records)

    monkeypatch.setattr(dead_letters, "append", spy)
    return found


NAMES: dict[Signal, Sequence[str]] = {
    "metrics": ["training.loss", "training.lr", "training.step.number", "training.step.duration"],
    "traces": ["training.step", "training.run"],
    "logs": ["milestone 9", "training.run.begin 9"],
}


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("joins", [False, True], ids=["alone", "joint"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_receiver(tmp_path: Path, rejected: list[tuple[int, Any]], seed: int, signal: Signal, joins: bool) -> None:
    clock = Time()
    chance = random.Random(f"training {seed}")
    trainings = [Training(tmp_path, rank=rank, session=f"00000000000000a{rank}") for rank in range(RANKS)]
    receiver = RandomReceiver(seed, clock, signal, NAMES[signal])
    exporter = JoiningReceiver(receiver) if joins else Receiver(receiver)
    how = options(clock, batch_bytes=chance.choice((700, 5000, 1 << 20)), jitter=lambda: 0.5)
    paths = [training.path for training in trainings]
    scheduler = Scheduler(signal, exporter, lambda: paths, how)
    positions: dict[SessionPath, Any] = {}
    batches = rounds_away = records = 0
    rounds = longest_wait = 0
    written: list[tuple[int, int]] = []
    """Rounds, and how much the session of which nothing is refused had written by then."""

    def run_once() -> None:
        nonlocal batches, rounds_away, rounds, longest_wait, written
        requests = len(exporter.requests)
        scheduler.run_once()
        rounds += 1
        rounds_away += any(outcome.verdict is not Verdict.DELIVERED for *_, outcome in exporter.requests[requests:])
        for training in trainings:
            task = scheduler.tasks.get(training.path.path)
            if task is not None:
                journaled = training.writer.seq
                assert_true(task.state.ledger, journaled, pending=journaled - task.position.seq)
                batches += positions.get(training.path) != task.position
                positions[training.path] = task.position
                if training is trainings[HEALTHY_RANK]:
                    written = [(since, seq) for since, seq in written if seq > task.position.seq]
                    longest_wait = max(longest_wait, *(rounds - since for since, _ in written), 0)

    for step in range(STEPS):
        for training in trainings:
            training.now = max(training.now, int(clock.now * 1e9))
            training.steps(1, every=0.001)
        written.append((rounds, trainings[HEALTHY_RANK].writer.seq))
        for _ in range(chance.choice((1, 1, 10))):
            run_once()
            clock.skip(0.1)
        if step == STEPS // 2:
            clock.skip(chance.choice((0.0, 60.0)))
    for training in trainings:
        training.end()
    receiver.behaves = True
    for _ in range(3000):
        run_once()
        clock.skip(1.0)
        if scheduler.over and not scheduler.tasks:
            break
    assert not scheduler.tasks, {task.state.state + task.state.message for task in scheduler.tasks.values()}
    wrong = [record for rank, record in rejected if not receiver.refuses(rank, record)]
    assert not wrong, (receiver.code, len(wrong), wrong[:3])
    gone = {*exporter.taken, *((rank, *plain([record])[0]) for rank, record in rejected)}
    for training in trainings:
        rank = int(training.path.rank)
        expected = everything(training.path)[signal]
        records += len(expected)
        progress = scheduler.progress[training.path.path]
        assert_true(progress.ledger, training.writer.seq)
        lost = [record for record in expected if record not in gone]
        assert not lost, (receiver.code, lost[:3])
        assert progress.ledger.rejected == sum(record[0] == rank for record in rejected)
    single = sum(name_of(record) not in receiver.bad_names for _, record in rejected)
    bad = len(receiver.bad_names) * len(receiver.bad_ranks) + single
    allowed = 5 * (batches + rounds_away) + 50 * (bad + RANKS) + 2 * (records // receiver.max_records)
    assert exporter.count <= allowed
    assert longest_wait <= 40 or receiver.flaps or receiver.absences, "rounds, of what nothing is refused of"


@pytest.mark.parametrize(
    ("protocol", "answer"),
    [
        *((protocol, Answer(400)) for protocol in PROTOCOLS),
        ("http/protobuf", Answer(413)),
        ("http/protobuf", RESET),
        ("http/json", Answer(500)),
        ("http/json", Answer(409)),
        ("grpc", Answer(429)),
        ("grpc", Answer(500, code="OUT_OF_RANGE")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.code or f"{value.status} {value.then}",
)
def test_a_refused_series_and_a_refused_record_over_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str, answer: Answer
) -> None:
    monkeypatch.setitem(backoff.DELAYS_S, "retry", (0.001, 0.01))
    ranks, steps, refused = 2, 60, bits(12345.0)
    for rank in range(ranks):
        training = Training(tmp_path / "runs", rank=rank, session=f"00000000000000a{rank}")
        training.steps(steps, value=lambda n: 12345.0 if n == 45 else 1.0)
        training.end()

    def is_refused(point: Any) -> bool:
        return bool(point.name == "training.lr" or (point.name == "training.loss" and point.value == refused))

    with ScriptedReceiver() as receiver:
        receiver.script("metrics", lambda request: answer if any(map(is_refused, points(request))) else Answer())
        where = receiver.grpc_target if protocol == "grpc" else receiver.url
        states = sync(tmp_path / "runs", where, protocol)
        requests = len(receiver.seen)
        taken = Counter(point.name for point in receiver.points())
    for state in states.values():
        assert state.position.finished
        assert state.ledger.rejected == steps + 1 + 1, "the series, with its end, and one point"
        assert state.ledger.mapped == state.ledger.delivered + state.ledger.rejected
    assert "training.lr" not in taken
    assert taken["training.loss"] == ranks * steps, "its end for one that was refused"
    assert requests < 350
