"""For tests of delivery: sessions of a small training written by the real writer, an exporter that answers by script,
and time that a test moves by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from harness.journals import NOON, ROOMY, RUN, SECOND, header, session_of
from stepspan.deliver.deliverer import Deliverer, caught_up
from stepspan.deliver.ledgers import cursors
from stepspan.deliver.options import Options
from stepspan.deliver.scheduler import Scheduler
from stepspan.deliver.task import DeliveryTask
from stepspan.exporters.otlp import OtlpExporter
from stepspan.journal.disk import Limits
from stepspan.journal.layout import SessionPath, find_sessions
from stepspan.journal.writer import SessionWriter
from stepspan.mapping.records import SIGNALS, Attributes, Record, Signal
from stepspan.otlp.outcome import Outcome, Verdict

OK = Outcome(Verdict.DELIVERED)
DAY = 86_400.0


class Time:
    """Seconds, moved by hand: both clocks of a deliverer."""

    def __init__(self, now: float = NOON / SECOND) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def skip(self, seconds: float) -> None:
        self.now += seconds


def options(time: Time | None = None, **fields: Any) -> Options:
    time = time or Time()
    return Options(**{"boot_id": "boot", "clock": time, "wall_clock": time, "jitter": lambda: 1.0, **fields})


class Scripted:
    """An exporter that answers with `answer(records)` or from a list, then with success. `taken` is what it took."""

    def __init__(
        self,
        answers: Iterable[Outcome] | Callable[[Sequence[Any]], Outcome] = (),
        *,
        signals: Sequence[Signal] = ("metrics",),
        processors: Sequence[Any] = (),
        destination: str = "there",
    ) -> None:
        self.destination, self.signals, self.processors = destination, signals, processors
        if not callable(answers):
            listed = iter(answers)
            answers = lambda _: next(listed, OK)  # noqa: E731
        self.answer = answers
        self.requests: list[tuple[Attributes, list[tuple[Any, ...]], Outcome]] = []
        self.closed = False

    def export(self, signal: Signal, resource: Attributes, records: Sequence[Record]) -> Outcome:
        outcome = self.answer(records)
        self.requests.append((resource, plain(records), outcome))
        return outcome

    def close(self) -> None:
        self.closed = True

    @property
    def sent(self) -> list[list[tuple[Any, ...]]]:
        return [records for _, records, _ in self.requests]

    @property
    def taken(self) -> list[tuple[Any, ...]]:
        return [
            (resource.get("rank"), *record)
            for resource, records, outcome in self.requests
            if outcome.verdict is Verdict.DELIVERED
            for record in records
        ]


def plain(records: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Records so that they can be compared and kept in sets."""
    return [
        (r[0].name, tuple(sorted(r[0].attributes.items())), r[1], repr(r[2])) if type(r) is tuple else (repr(r),)
        for r in records
    ]


class Training:
    """A session being written: its writer, and a clock that goes on `every` seconds with each step."""

    def __init__(
        self,
        directory: Path,
        *,
        rank: int = 0,
        session: str = "00000000000000a0",
        started: float = 0.0,
        limits: Limits = ROOMY,
        **fields: Any,
    ) -> None:
        self.now = NOON + int(started * SECOND)
        self.step = 0
        self.losses: dict[int, Any] = {}
        """By millisecond."""
        place = directory / "job" / "node"
        place.mkdir(parents=True, exist_ok=True)
        resource = {"service.name": "training", "service.instance.id": f"job-{rank}", "job_id": "job", "rank": rank}
        about = header(session, rank=rank, world_size=2, started=self.now, resource=resource, **fields)
        self.writer = SessionWriter(place, about, limits=limits, clock=self._clock)
        self.writer.open()
        self.path = session_of(self.writer.path)
        self.run = self.emit("run_begin", **RUN)

    def _clock(self) -> int:
        self.now += 1000
        return self.now

    def emit(self, tag: str, **fields: Any) -> int:
        event = {"ts": 0, "seq": 0, "tag": tag, **fields}
        self.writer.write(event, self._clock())
        if tag == "metrics":
            self.losses[event["ts"] // 10**6] = fields["metrics"]["loss"]
        return self.writer.seq

    def steps(self, count: int, *, every: float = 1.0, value: Callable[[int], Any] = lambda n: 1.0 / (n + 1)) -> None:
        for _ in range(count):
            self.now += int(every * SECOND / 2)
            step = self.emit("step_begin", parent=self.run, step=self.step, split="train")
            self.emit("metrics", step=self.step, split="train", metrics={"loss": value(self.step), "lr": 0.5})
            self.now += int(every * SECOND / 2)
            if self.step % 7 == 0:
                self.emit("event", parent=step, name="milestone", attributes={"n": self.step})
            self.emit("step_end", begin=step)
            self.step += 1

    def collective_step(self, *, collective: float = 0.0, compute: float = 0.0, loss: Any = 0.5) -> None:
        """A step that waits `collective` seconds for other ranks, logs a value, and computes `compute` seconds."""
        step = self.emit("step_begin", parent=self.run, step=self.step, split="train")
        span = self.emit("span_begin", parent=step, name="all_reduce", collective=True)
        self.now += int(collective * SECOND)
        self.emit("span_end", begin=span)
        self.emit("metrics", step=self.step, split="train", metrics={"loss": loss})
        self.now += int(compute * SECOND)
        self.emit("step_end", begin=step, data_wait=0.002)
        self.step += 1

    def end(self, status: str = "completed") -> SessionPath:
        self.emit("run_end", begin=self.run, status=status)
        self.writer.close(status)
        return self.path

    def die(self) -> SessionPath:
        """As SIGKILL would leave it."""
        self.writer.forget()
        return self.path


def trained(directory: Path, steps: int = 40, *, every: float = 1.0, **fields: Any) -> SessionPath:
    """A whole session."""
    training = Training(directory, **fields)
    training.steps(steps, every=every)
    return training.end()


def deliver(session: SessionPath, exporter: Any, how: Options, signal: Signal = "metrics") -> DeliveryTask:
    """A session's signal to its end, by tasks that don't fail; the last one, closed."""
    task = DeliveryTask(session, signal, exporter, how)
    while task.advance(1 << 62):
        pass
    task.close()
    return task


def run_to_end(scheduler: Scheduler, rounds: int = 100_000) -> None:
    """Rounds until nothing moves: twice, for a session that was held in the first lets others pass in the second."""
    still = 0
    for _ in range(rounds):
        still = 0 if scheduler.run_once() else still + 1
        if still == 2:
            return
    raise AssertionError("it never ends")


def sync(directory: Path, where: str, protocol: Any = None, **fields: Any) -> dict[Any, Any]:
    """Deliver the metrics below a directory to a receiver; a session's rank -> the cursor's state."""
    env = {"OTEL_TRACES_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
    with closing(OtlpExporter(where, protocol=protocol, env=env, destination="there")) as exporter:
        deliverer = Deliverer([exporter], lambda _: find_sessions(directory), Options(boot_id="boot", **fields))
        deliverer.start()
        deliverer.wait(caught_up)
        deliverer.stop()
        assert not any(scheduler.broken or scheduler.unreadable for scheduler in deliverer.schedulers)
    home = lambda session: fields["state_directory"] / session.path.name if fields else session.path  # noqa: E731
    return {s.rank: cursors(home(s))["there"]["metrics"] for s in find_sessions(directory)}  # type: ignore[no-untyped-call]


def copy(session: SessionPath, place: Path) -> SessionPath:
    """The journal alone, as nobody has delivered it yet."""
    to = place / "job" / "node" / session.path.name
    shutil.copytree(session.path, to, ignore=shutil.ignore_patterns("cursors", "rejected.jsonl"))
    return session_of(to)


def assert_true(ledger: Any, journaled: int, *, pending: int = 0) -> None:
    """Both equations of a ledger."""
    assert ledger.read + ledger.damaged + ledger.pruned + ledger.dropped + pending == journaled
    assert ledger.mapped == ledger.delivered + ledger.rejected + ledger.filtered + ledger.thinned


def everything(session: SessionPath) -> dict[Signal, list[tuple[Any, ...]]]:
    """What a session maps to, by delivery in one go to an exporter that takes all."""
    found: dict[Signal, list[tuple[Any, ...]]] = {}
    for signal in SIGNALS:
        exporter = Scripted(destination="everything")
        deliver(session, exporter, options(batch_bytes=1 << 30), signal)
        found[signal] = exporter.taken
    for file in (session.path / "cursors").glob("everything.*"):
        file.unlink()
    return found
