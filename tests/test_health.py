"""What a deliverer tells of itself: from these ledgers exactly this OTLP, and nothing at the cost of the journal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from harness import processes
from harness.delivery import OK, Scripted, Time, Training, options, run_to_end, trained
from harness.journals import NOON, SECOND, metrics, open_writer
from harness.processes import Ranks, under_load, until
from harness.received import attributes, points
from harness.receiver import ScriptedReceiver
from harness.runs import is_ours
from harness.stack import Collector, Prometheus

from stepspan.deliver import health as healths
from stepspan.deliver.deliverer import Deliverer, caught_up
from stepspan.deliver.health import Health
from stepspan.deliver.ledgers import cursors
from stepspan.deliver.options import Options
from stepspan.deliver.scheduler import Scheduler
from stepspan.deliver.task import DeliveryTask
from stepspan.exporters.otlp import OtlpExporter
from stepspan.journal.disk import Limits
from stepspan.journal.layout import SessionPath, find_sessions, segment_name
from stepspan.mapping.records import SIGNALS, Signal
from stepspan.otlp.json import encode
from stepspan.otlp.outcome import Outcome, Verdict

ranks = processes.ranks
AWAY = Outcome(Verdict.RETRY, "connection refused")
HOLD = Outcome(Verdict.HOLD, "too old")
NOWHERE = "http://127.0.0.1:1"


class Reporting:
    """A deliverer's schedulers to a scripted exporter, moved by hand, and its health, which goes to `receiver`."""

    def __init__(
        self,
        directory: Path,
        receiver: Any = None,
        *,
        answers: Any = (),
        signals: Any = ("metrics",),
        temporality: Any = None,
        **fields: Any,
    ) -> None:
        self.time = Time()
        self.options = options(self.time, **fields)
        self.there = Scripted(answers, signals=signals)
        find = lambda: find_sessions(directory)  # noqa: E731
        self.schedulers = [Scheduler(signal, self.there, find, self.options) for signal in signals]
        where = receiver.url if receiver else NOWHERE
        exporter = OtlpExporter(where, destination="there", temporality=temporality, env={})
        self.health = Health(exporter, self.schedulers, "node-1", self.options)

    def run_to_end(self, rounds: Any = None) -> None:
        for scheduler in self.schedulers:
            if rounds is None:
                run_to_end(scheduler)
                self.time.skip(1)  # the newest millisecond settles
                run_to_end(scheduler)
            else:
                for _ in range(rounds):
                    scheduler.run_once()

    def says(self) -> Any:
        """What it would tell now: name -> the attribute that tells points apart, joined to the signal's -> value."""
        found: dict[Any, Any] = {}
        request = json.loads(self.otlp())
        for metric in request["resourceMetrics"][0]["scopeMetrics"][0]["metrics"]:
            for point in metric[next(kind for kind in ("sum", "gauge") if kind in metric)]["dataPoints"]:
                named = {a["key"]: a["value"]["stringValue"] for a in point["attributes"]}
                key = tuple(named[n] for n in ("job_id", "signal", "outcome", "state") if n in named)
                found.setdefault(metric["name"].removeprefix("stepspan."), {})[key] = point["asDouble"]
        return found

    def after_a_look(self) -> Any:
        """What it says having only met the sessions."""
        for scheduler in self.schedulers:
            scheduler._scan(0.0)
        return self.says()

    def otlp(self) -> Any:
        now = int(self.time() * SECOND)
        records = list(self.health.points(self.health.jobs(), now))
        return encode("metrics", self.health.resource, records)


def segments_of(segment_bytes: Any) -> Limits:
    return Limits(free_bytes=0, free_ratio=0.0, segment_bytes=segment_bytes)


def lines(session: SessionPath) -> Any:
    return (session.path / segment_name(1)).read_bytes().splitlines(keepends=True)


# ---------------------------------------------------------------- what is told


def test_the_report_as_otlp(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.steps(3)
    reporting = Reporting(tmp_path, answers=[OK, AWAY], batch_bytes=1000)
    reporting.run_to_end(rounds=1)
    (task,) = reporting.schedulers[0].tasks.values()
    ledger, read = task.state.ledger, task.state.ledger.read
    rest = lines(training.path)[read:]
    assert ledger.delivered > 0
    assert len(rest) > 3, "the second batch waits"
    first = json.loads(rest[0])["ts"]
    reporting.time.now = first / SECOND + 7.5
    start, now = str(NOON), str(int(reporting.time() * SECOND))

    def text(**pairs: Any) -> list[Any]:
        return [{"key": key, "value": {"stringValue": value}} for key, value in pairs.items()]

    def sums(about: Any, key: str, values: Any) -> list[Any]:
        return [
            {"startTimeUnixNano": start, "timeUnixNano": now, "asDouble": float(value),
             "attributes": text(**about, **{key: name})}
            for name, value in values.items()
        ]  # fmt: skip

    whose = {"job_id": "job", "destination": "there"}
    which = {**whose, "signal": "metrics"}
    gauge = lambda value: {"dataPoints": [{"timeUnixNano": now, "asDouble": value, "attributes": text(**which)}]}  # noqa: E731
    cumulative = {"aggregationTemporality": 2, "isMonotonic": True}
    outcomes = {"delivered": ledger.delivered, "rejected": 0, "filtered": ledger.filtered, "thinned": 0}
    states = {"read": read, "damaged": 0, "dropped": 0, "pruned": 0}
    request = json.loads(reporting.otlp())
    (resource,) = request["resourceMetrics"]
    assert resource["resource"] == {
        "attributes": text(
            **{"service.name": "stepspan", "service.instance.id": "deliverer-node-1", "host.name": "node-1"}
        )
    }
    (scope,) = resource["scopeMetrics"]
    found = [{k: v for k, v in metric.items() if k != "description"} for metric in scope["metrics"]]
    lag = (int(reporting.time() * SECOND) - first) / SECOND
    assert found == [
        {"name": "stepspan.delivery.records", "unit": "{record}",
         "sum": {**cumulative, "dataPoints": sums(which, "outcome", outcomes)}},
        {"name": "stepspan.delivery.pending", "unit": "By", "gauge": gauge(float(len(b"".join(rest))))},  # type: ignore[no-untyped-call]
        {"name": "stepspan.delivery.lag", "unit": "s", "gauge": gauge(lag)},  # type: ignore[no-untyped-call]
        {"name": "stepspan.delivery.held", "unit": "{session}", "gauge": gauge(0.0)},  # type: ignore[no-untyped-call]
        {"name": "stepspan.journal.lines", "unit": "{line}",
         "sum": {**cumulative, "dataPoints": sums(whose, "state", states)}},
    ]  # fmt: skip
    assert lag == pytest.approx(7.5, abs=1e-5)


def test_sums_are_over_the_sessions_of_a_job_and_go_on_when_they_finish_and_after_a_restart(tmp_path: Path) -> None:
    trained(tmp_path, 20, rank=0, session="00000000000000a0")
    living = Training(tmp_path, rank=1, session="00000000000000a1")
    living.steps(20)
    reporting = Reporting(tmp_path, batch_bytes=1000)
    delivered, read = [], []
    for _ in range(60):
        reporting.run_to_end(rounds=1)
        says = reporting.says()
        delivered.append(says["delivery.records"]["job", "metrics", "delivered"])
        read.append(says["journal.lines"]["job", "read"])
    assert all(a <= b for a, b in pairwise(delivered))
    assert all(a <= b for a, b in pairwise(read))
    assert len(set(delivered)) > 5
    assert len(reporting.schedulers[0].tasks) == 1, "the other one is finished"
    assert delivered[-1] == len(reporting.there.taken)
    reporting.schedulers[0].close()
    assert says == Reporting(tmp_path).after_a_look()


def test_lines_are_told_by_what_became_of_them(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.steps(10)
    training.emit("gap", dropped=0, why="x")
    training.steps(1)
    content = lines(training.path)
    content[5] = b"garbage\n"
    (training.path.path / segment_name(1)).write_bytes(b"".join(content))
    reporting = Reporting(tmp_path, signals=SIGNALS)
    reporting.run_to_end()
    found = reporting.says()["journal.lines"]
    assert found == {
        ("job", "read"): len(content) - 1,
        ("job", "damaged"): 1,
        ("job", "dropped"): 0,
        ("job", "pruned"): 0,
    }


def test_jobs_are_told_apart(tmp_path: Path) -> None:
    for job, count in (("first", 5), ("second", 9)):
        resource = {"service.name": "t", "service.instance.id": f"{job}-0", "job_id": job, "rank": 0}
        writer = open_writer(tmp_path, session=f"00000000000000{count:02}", resource=resource, world_size=1)
        for number in range(count):
            writer.append(metrics(number))
    reporting = Reporting(tmp_path)
    reporting.run_to_end()
    assert reporting.says()["journal.lines"]["first", "read"] == 6
    assert reporting.says()["journal.lines"]["second", "read"] == 10


def test_lag_is_the_age_of_what_waits_not_of_what_was_delivered_last(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.steps(5)
    reporting = Reporting(tmp_path)
    reporting.run_to_end()
    assert reporting.says()["delivery.lag"] == {("job", "metrics"): 0.0}
    training.now += 600 * SECOND
    training.emit("event", parent=1, name="checkpoint")
    reporting.time.now = training.now / SECOND + 0.25
    assert reporting.says()["delivery.lag"]["job", "metrics"] == pytest.approx(0.25, abs=1e-5)
    reporting.time.skip(30)
    assert reporting.says()["delivery.lag"]["job", "metrics"] == pytest.approx(30.25, abs=1e-5)


@pytest.mark.parametrize(
    ("tail", "waits"),
    [
        (b'{"ts":1795262400', 0.0),
        (b"x" * 8000, 100.0),
        (b'garbage\n{"ts":1795262460000000000,"seq":99}\n', 40.0),
    ],
    ids=["a line that is being written", "no line at all", "a damaged line before a whole one"],
)
def test_lag_with_damage_at_the_cursor(tmp_path: Path, tail: Any, waits: float) -> None:
    training = Training(tmp_path)
    reporting = Reporting(tmp_path)
    reporting.run_to_end()
    with open(training.path.path / segment_name(1), "ab") as file:
        file.write(tail)
    reporting.time.now = NOON / SECOND + 100
    assert reporting.says()["delivery.lag"]["job", "metrics"] == pytest.approx(waits, abs=1e-4)
    assert reporting.says()["delivery.pending"]["job", "metrics"] == len(tail)


def test_pending_bytes_are_over_all_segments_also_where_one_was_pruned(tmp_path: Path) -> None:
    training = Training(tmp_path, limits=segments_of(4096))
    training.steps(100)
    session = training.path
    sizes = {n: (session.path / segment_name(n)).stat().st_size for n in session.segments()}
    assert len(sizes) > 3
    reporting = Reporting(tmp_path, answers=[AWAY] * 9)
    reporting.run_to_end(rounds=1)
    assert reporting.says()["delivery.pending"]["job", "metrics"] == sum(sizes.values())
    (session.path / segment_name(1)).unlink()
    assert reporting.says()["delivery.pending"]["job", "metrics"] == sum(sizes.values()) - sizes[1]


def test_a_session_that_is_held_shows_with_its_age_beside_those_that_go_on(tmp_path: Path) -> None:
    for rank in range(2):
        Training(tmp_path, rank=rank, session=f"00000000000000a{rank}").steps(10)
    with ScriptedReceiver() as receiver:
        reporting = Reporting(tmp_path, receiver)
        reporting.there.export = lambda signal, resource, records: HOLD if resource["rank"] == 1 else OK  # type: ignore[method-assign]
        reporting.run_to_end(rounds=5)
        reporting.time.now = NOON / SECOND + 3600
        says = reporting.says()
        assert says["delivery.held"] == {("job", "metrics"): 1.0}
        assert says["delivery.lag"]["job", "metrics"] == pytest.approx(3600, abs=1)
        assert reporting.health.report()
        (request,) = receiver.health
    assert {p.name for p in points(request)} == {f"stepspan.{name}" for name in says}


def test_a_session_that_cannot_be_read_any_more_takes_nothing_from_the_sums(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.steps(10)
    reporting = Reporting(tmp_path)
    reporting.run_to_end()
    before = reporting.says()
    (task,) = reporting.schedulers[0].tasks.values()
    reporting.schedulers[0]._give_up(task.session.path, OSError("gone"))
    assert reporting.schedulers[0].progress[task.session.path].ledger == task.state.ledger
    reporting.time.skip(120)
    reporting.run_to_end()
    assert reporting.says()["journal.lines"] == before["journal.lines"]


# ---------------------------------------------------------------- when it is told


def test_a_job_is_told_while_it_is_open_and_once_after_its_end(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.steps(3)
    with ScriptedReceiver() as receiver:
        reporting = Reporting(tmp_path, receiver)
        reporting.run_to_end()
        assert [reporting.health.report() for _ in range(3)] == [True, True, True]
        training.end()
        reporting.time.skip(1)
        reporting.run_to_end()
        assert not reporting.schedulers[0].tasks
        assert [reporting.health.report() for _ in range(3)] == [True, False, False]
        assert len(receiver.health) == 4
        last = {p.attributes: p.number for p in points(receiver.health[-1]) if p.name.endswith("records")}
        assert sum(last.values()) == len(reporting.there.taken)


def test_a_job_that_was_finished_before_is_passed_over(tmp_path: Path) -> None:
    trained(tmp_path, 3)
    Reporting(tmp_path).run_to_end()
    with ScriptedReceiver() as receiver:
        later = Reporting(tmp_path, receiver)
        later.run_to_end()
        assert not later.health.report()
        assert receiver.health == []


def test_nothing_is_told_before_all_sessions_are_counted(tmp_path: Path) -> None:
    Training(tmp_path)
    with ScriptedReceiver() as receiver:
        reporting = Reporting(tmp_path, receiver)
        assert not reporting.health.report(), "a sum that began too small would look like a reset"
        reporting.run_to_end()
        assert reporting.health.report()


def test_a_receiver_that_is_away_is_not_asked(tmp_path: Path) -> None:
    Training(tmp_path).steps(3)
    with ScriptedReceiver() as receiver:
        reporting = Reporting(tmp_path, receiver, answers=[AWAY] * 2)
        reporting.run_to_end(rounds=1)
        assert not reporting.health.report()
        assert receiver.connections == 0
        reporting.time.skip(100)
        reporting.run_to_end(rounds=1)
        reporting.time.skip(100)
        reporting.run_to_end()
        assert reporting.health.report()


def test_after_a_request_that_failed_it_asks_again_a_minute_later(tmp_path: Path) -> None:
    Training(tmp_path).steps(3)
    reporting = Reporting(tmp_path, signals=["traces"])
    reporting.run_to_end()
    sent = []
    reporting.health._exporter.export = lambda *request: sent.append(request) or AWAY  # type: ignore[func-returns-value, method-assign]
    for _ in range(12):
        assert not reporting.health.report()
        reporting.time.skip(healths.REPORT_INTERVAL_S)
    assert len(sent) == 2


def test_it_tells_every_so_often_while_it_runs_and_once_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healths, "REPORT_INTERVAL_S", 0.05)
    training = Training(tmp_path)
    training.steps(3)
    with ScriptedReceiver() as receiver:
        deliverer = live(tmp_path, OtlpExporter(receiver.url, env={}))
        until(lambda: len(receiver.health) >= 3)
        monkeypatch.setattr(healths, "REPORT_INTERVAL_S", 1000.0)
        training.end()
        deliverer.wait(caught_up)
        until(lambda: not any(scheduler.tasks for scheduler in deliverer.schedulers))
        deliverer.stop()
        last = {p.attributes: p.number for p in points(receiver.health[-1])}
        taken = {signal: len(points_of(receiver, signal)) for signal in SIGNALS}
        destination = deliverer.schedulers[0].exporter.destination
        assert {
            signal: last[("destination", destination), ("job_id", "job"), ("outcome", "delivered"), ("signal", signal)]
            for signal in SIGNALS
        } == taken
        times = [max(p.time for p in points(request)) for request in receiver.health]
        assert times == sorted(set(times))


def points_of(receiver: ScriptedReceiver, signal: Signal) -> Any:
    return {"metrics": receiver.points, "traces": receiver.spans, "logs": receiver.logs}[signal]()


def live(directory: Path, exporter: Any) -> Any:
    deliverer = Deliverer([exporter], lambda _: find_sessions(directory), Options(boot_id="boot"), health="node-1")
    deliverer.start()
    return deliverer


def test_a_deliverer_that_delivered_nothing_tells_nothing(tmp_path: Path) -> None:
    with ScriptedReceiver() as receiver:
        deliverer = live(tmp_path, OtlpExporter(receiver.url, env={}))
        deliverer.wait(caught_up)
        deliverer.stop()
        assert receiver.connections == 0


def test_a_destination_without_metrics_is_told_nothing(tmp_path: Path) -> None:
    Training(tmp_path).steps(3)
    with ScriptedReceiver() as receiver:
        deliverer = live(tmp_path, OtlpExporter(receiver.url, env={"OTEL_METRICS_EXPORTER": "none"}))
        deliverer.wait(caught_up)
        deliverer.stop()
        assert receiver.spans() != []
        assert receiver.logs() != []
        assert receiver.health == []


def test_a_receiver_that_hangs_on_it_delays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healths, "REPORT_INTERVAL_S", 0.01)
    training = Training(tmp_path)
    training.steps(3)

    class Hanging(OtlpExporter):
        def clone(self, timeout: Any) -> Any:
            other = super().clone(timeout)
            other.export = lambda *request: asked.append(request) or time.sleep(timeout) or AWAY  # type: ignore[func-returns-value, method-assign]
            return other

    asked: list[Any] = []
    with ScriptedReceiver() as receiver:
        deliverer = live(tmp_path, Hanging(receiver.url, env={}))
        until(lambda: asked)
        training.steps(5)
        until(lambda: len({p.time for p in receiver.points("training.loss")}) == 8)
        assert len(asked) == 1, "it still hangs"
        training.end()
        deliverer.wait(caught_up)
        before = time.monotonic()
        deliverer.stop()
        assert time.monotonic() - before < under_load(healths.REQUEST_TIMEOUT_S + 1)


def test_a_dead_endpoint_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healths, "REPORT_INTERVAL_S", 0.05)
    Training(tmp_path).steps(3)
    deliverer = live(tmp_path, OtlpExporter(NOWHERE, env={}))
    asked: list[Any] = []
    deliverer._health[0]._exporter.export = lambda *request: asked.append(request) or AWAY  # type: ignore[func-returns-value]
    until(lambda: all(scheduler.silent_for() > 0.5 for scheduler in deliverer.schedulers))
    before = time.monotonic()
    deliverer.stop()
    assert time.monotonic() - before < under_load(1)
    assert len(asked) <= 1, "at most before the first failure of the journal's own request"


# ---------------------------------------------------------------- the processes


def test_the_deliverer_of_a_run_tells_the_ledgers_that_its_cursors_hold(ranks: Ranks) -> None:
    with ScriptedReceiver() as receiver:
        for rank in range(2):
            ranks.start(rank, count=20, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
        ranks.stop()
        until(lambda: not ranks.deliverers(), 40)
        told = {p.attributes: p for request in receiver.health for p in points(request)}
        named = {tuple(dict(a).get(n) for n in ("signal", "outcome")): p.number for a, p in told.items()}
        assert {signal: named[signal, "delivered"] for signal in SIGNALS} == {
            signal: len(points_of(receiver, signal)) for signal in SIGNALS
        }
        about = attributes(receiver.health[-1].resource_metrics[0].resource)
        assert about["service.instance.id"] == f"deliverer-{about['host.name']}"


def test_a_run_can_switch_it_off(ranks: Ranks) -> None:
    with ScriptedReceiver() as receiver:
        ranks.start(0, count=5, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url, STEPSPAN_HEALTH="0")
        ranks.stop()
        until(lambda: not ranks.deliverers(), 40)
        assert receiver.points("training.loss")
        assert receiver.health == []


def sync(directory: Path, receiver: ScriptedReceiver, *flags: Any, **env: Any) -> Any:
    inherited = {name: value for name, value in os.environ.items() if not is_ours(name)}
    command = [sys.executable, "-m", "stepspan", "sync", str(directory), "--endpoint", receiver.url, *flags]
    return subprocess.Popen(command, env={**inherited, "NO_PROXY": "*", **env}, stdout=subprocess.PIPE)


def test_sync_tells_nothing(tmp_path: Path) -> None:
    trained(tmp_path, 3)
    with ScriptedReceiver() as receiver, sync(tmp_path, receiver) as process:
        assert process.wait(timeout=under_load(30)) == 0
        assert receiver.points("training.loss")
        assert receiver.health == []


@pytest.mark.parametrize(("setting", "told"), [("", 1), ("0", 0)], ids=["by default", "switched off"])
def test_sync_follow_tells_when_it_ends(tmp_path: Path, setting: str, told: int) -> None:
    trained(tmp_path, 3)
    with ScriptedReceiver() as receiver, sync(tmp_path, receiver, "--follow", STEPSPAN_HEALTH=setting) as process:
        until(lambda: list(tmp_path.rglob("*.logs")) and all_delivered(tmp_path))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=under_load(30)) == 0
        assert len(receiver.health) == told


def all_delivered(directory: Path) -> bool:
    return all(
        state.position.finished
        for session in find_sessions(directory)
        for states in cursors(session.path).values()
        for state in states.values()
    )


@pytest.mark.stack
def test_names_in_prometheus(tmp_path: Path, collector: Collector, prometheus: Prometheus) -> None:
    training = Training(tmp_path / "runs", started=time.time() - NOON / SECOND - 60)
    training.steps(20)
    for where in (collector.http_endpoint, prometheus.otlp_endpoint):
        with closing(
            OtlpExporter(where, env={"OTEL_TRACES_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"})
        ) as exporter:
            deliverer = live(tmp_path / "runs", exporter)
            deliverer.wait(caught_up)
            deliverer.stop()
            mine = f'destination="{exporter.destination}"'
            told = lambda query, mine=mine: {  # noqa: E731
                (m["metric"].get("outcome") or m["metric"].get("state"), float(m["value"][1]))
                for m in prometheus.query(query % mine)
            }
            until(lambda told=told: told('stepspan_delivery_records_total{job_id="job",signal="metrics",%s}'))  # type: ignore[misc]
            records = dict(told('stepspan_delivery_records_total{job_id="job",signal="metrics",%s}'))  # type: ignore[no-untyped-call]
            assert records["delivered"] > 20
            assert records["rejected"] == 0
            assert dict(told('stepspan_journal_lines_total{job_id="job",%s}'))["read"] > 60  # type: ignore[no-untyped-call]
            for gauge in ("stepspan_delivery_pending_bytes", "stepspan_delivery_lag_seconds", "stepspan_delivery_held"):
                assert told(gauge + '{signal="metrics",job="stepspan",instance="deliverer-node-1",%s}') == {(None, 0.0)}  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------- its cost


def test_ten_thousand_open_sessions_are_told_within_a_second(tmp_path: Path) -> None:
    """A look at each: two sizes, and where something waits the time of one line."""
    reporting = Reporting(tmp_path)
    session = Training(tmp_path)
    session.steps(3)
    task = DeliveryTask(session.path, "metrics", reporting.there, reporting.options)
    task.advance(1 << 62)
    session.steps(3)
    scheduler = reporting.schedulers[0]
    scheduler._record(task, moved=True)
    for number in range(10_000):
        scheduler.tasks[tmp_path / str(number)] = task
    before = time.thread_time()
    assert reporting.says()["delivery.pending"]["job", "metrics"] > 0
    assert time.thread_time() - before < 1.0
    scheduler.tasks.clear()
    task.close()


def test_a_receiver_of_deltas_gets_what_has_come_on_since_the_report_before(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.steps(5)
    before = Reporting(tmp_path)
    before.run_to_end()  # an earlier deliverer, whose reports are not to be counted again
    (task,) = before.schedulers[0].tasks.values()
    read = [task.state.ledger.read]
    before.schedulers[0].close()
    training.steps(5)
    with ScriptedReceiver() as receiver:
        receiver.health.clear()
        reporting = Reporting(tmp_path, receiver, temporality="delta")
        reporting.after_a_look()
        started = int(reporting.time() * SECOND)
        for steps in (0, 2):
            training.steps(steps)
            reporting.time.skip(10)
            reporting.run_to_end()
            assert reporting.health.report()
            (task,) = reporting.schedulers[0].tasks.values()
            read.append(task.state.ledger.read)
        reporting.health._exporter.close()
        requests = list(receiver.health)
    found = []
    for request in requests:
        (scope,) = request.resource_metrics[0].scope_metrics
        for metric in scope.metrics:
            if metric.name == "stepspan.journal.lines":
                assert metric.sum.aggregation_temporality == 1
                found += [
                    (p.start_time_unix_nano, p.time_unix_nano, p.as_double)
                    for p in metric.sum.data_points
                    if any(a.value.string_value == "read" for a in p.attributes)
                ]
    (start, first, one), (second_start, _, two) = found
    assert (start, second_start) == (started, first)
    assert (one, two) == (read[1] - read[0], read[2] - read[1])
    assert 0 < read[0] < read[1] < read[2]
