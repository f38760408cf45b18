"""Delivery to the real Prometheus, straight and through the real Collector: what its rules cost, and what they do not
cost."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import requests
from harness import processes
from harness.delivery import DAY, Time, Training, assert_true, sync
from harness.journals import NOON, SECOND, closed_of
from harness.processes import Ranks, until
from harness.runs import python
from harness.stack import Collector, Prometheus

from stepspan.deliver.ledgers import cursors
from stepspan.deliver.options import Options
from stepspan.deliver.scheduler import Scheduler
from stepspan.exporters.otlp import OtlpExporter
from stepspan.journal.layout import find_sessions

pytestmark = pytest.mark.stack
ranks = processes.ranks
WAYS = ["straight", "through the collector"]


def ago(seconds: float) -> Any:
    """What `Training` takes as `started`."""
    return time.time() - NOON / SECOND - seconds


def endpoint(way: Any, prometheus: Prometheus, collector: Collector) -> Any:
    return collector.http_endpoint if way == "through the collector" else prometheus.otlp_endpoint


def training(directory: Path, rank: int, started: Any, steps: Any, every: Any) -> Any:
    """A session, and its losses by millisecond."""
    one = Training(directory, rank=rank, session=f"00000000000000a{rank}", started=started)
    one.steps(steps, every=every, value=lambda n: (rank + 1) / (n + 1))
    one.end()
    return one.losses


def arrived(prometheus: Prometheus, span: Any) -> dict[Any, Any]:
    return {
        int(labels["rank"]): dict(samples)
        for labels, samples in prometheus.series(f'training_loss{{job_id="job"}}[{span}]')
    }


@pytest.mark.parametrize("way", WAYS)
def test_two_journals_of_five_days_arrive_whole_in_an_empty_prometheus(
    tmp_path: Path, prometheus: Prometheus, collector: Collector, way: Any
) -> None:
    every = 5 * DAY / 250
    started = ago(5 * DAY)
    expected = {rank: training(tmp_path / "runs", rank, started, 240, every) for rank in range(2)}
    states = sync(tmp_path / "runs", endpoint(way, prometheus, collector))
    assert arrived(prometheus, "6d") == expected
    for state in states.values():
        assert (state.state, state.ledger.rejected) == ("ok", 0)
        assert state.position.finished


@pytest.mark.parametrize("way", [*WAYS, "through the collector's gRPC"])
def test_an_old_journal_beside_live_data_is_held_with_nothing_rejected(
    tmp_path: Path, prometheus: Prometheus, collector: Collector, way: Any
) -> None:
    by_grpc = way.endswith("gRPC")
    where = collector.grpc_endpoint if by_grpc else endpoint(way, prometheus, collector)
    protocol = "grpc" if by_grpc else None
    live = training(tmp_path / "live", 0, ago(60), 50, 1.0)
    assert sync(tmp_path / "live", where, protocol)[0].state == "ok"
    training(tmp_path / "old", 1, ago(5 * DAY), 240, 5 * DAY / 250)
    (state,) = sync(tmp_path / "old", where, protocol).values()
    assert state.state == "hold"
    assert (state.ledger.rejected, state.ledger.delivered) == (0, 0)
    assert "storage.tsdb.out_of_order_time_window" in state.message
    if way != "straight":
        assert "look in the backend's log" in state.message
    assert list((tmp_path / "old").rglob("rejected.jsonl")) == []
    assert arrived(prometheus, "6d") == {0: live}


def occupy(prometheus: Prometheus, rank: int, millisecond: int) -> None:
    """Let Prometheus have another value of a rank's loss already."""
    resource = {"service.name": "training", "service.instance.id": f"job-{rank}", "job_id": "job", "rank": str(rank)}
    body = {
        "resourceMetrics": [
            {
                "resource": {"attributes": [{"key": k, "value": {"stringValue": v}} for k, v in resource.items()]},
                "scopeMetrics": [
                    {"metrics": [{"name": "training.loss", "gauge": {"dataPoints": [point(millisecond)]}}]}
                ],
            }
        ]
    }
    assert requests.post(f"{prometheus.otlp_endpoint}/v1/metrics", json=body, timeout=10).ok


@pytest.mark.parametrize("way", WAYS)
def test_a_refused_point_of_one_session_costs_the_others_in_its_request_nothing(
    tmp_path: Path, prometheus: Prometheus, collector: Collector, way: Any
) -> None:
    sent: list[int] = []

    class Counting(OtlpExporter):
        def export_encoded(self, signal: Any, parts: Any) -> Any:
            sent.append(len(parts))
            return super().export_encoded(signal, parts)

    ranks = [Training(tmp_path, rank=rank, session=f"00000000000000a{rank}", started=ago(60)) for rank in range(3)]
    exporter = Counting(endpoint(way, prometheus, collector), env={}, destination="there")
    moved = Time()
    how = Options(boot_id="boot", clock=moved)
    scheduler = Scheduler("metrics", exporter, lambda: find_sessions(tmp_path), how)

    def deliver() -> None:
        for _ in range(20):
            moved.skip(0.1)
            while scheduler.run_once():
                pass

    for round_ in range(3):
        for rank in ranks:
            rank.steps(5, value=lambda n, rank=rank: (rank.path.rank + 1) / (n + 1))  # type: ignore[misc]
        if round_ == 1:
            bad = sorted(ranks[1].losses)[7]
            occupy(prometheus, 1, bad)
        deliver()
    for rank in ranks:
        rank.end()
    deliver()
    assert sent[:2] == [3, 3]
    expected = {rank.path.rank: rank.losses for rank in ranks}
    expected[1][bad] = 99.0
    assert arrived(prometheus, "1h") == expected
    states = {rank.path.rank: cursors(rank.path.path)["there"]["metrics"] for rank in ranks}
    assert {rank: state.ledger.rejected for rank, state in states.items()} == {0: 0, 1: 1, 2: 0}
    for rank in ranks:
        assert_true(states[rank.path.rank].ledger, closed_of(rank.path.path).seq)
    exporter.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_refused_point_costs_one_point(
    tmp_path: Path, prometheus: Prometheus, collector: Collector, way: Any
) -> None:
    started = ago(600)
    expected = {rank: training(tmp_path / "runs", rank, started, 100, 5.0) for rank in range(2)}
    bad = sorted(expected[0])[42]
    occupy(prometheus, 0, bad)
    states = sync(tmp_path / "runs", endpoint(way, prometheus, collector))
    expected[0][bad] = 99.0
    assert arrived(prometheus, "1h") == expected
    assert {rank: state.ledger.rejected for rank, state in states.items()} == {0: 1, 1: 0}
    for session in find_sessions(tmp_path / "runs"):
        assert_true(states[session.rank].ledger, closed_of(session.path).seq)
        assert states[session.rank].position.finished
    (letters,) = (tmp_path / "runs").rglob("rejected.jsonl")
    assert letters.read_bytes().count(b"\n") == 1


def point(ms: Any) -> dict[str, Any]:
    split = {"key": "split", "value": {"stringValue": "train"}}
    return {"timeUnixNano": str(ms * 10**6), "asDouble": 99.0, "attributes": [split]}


@pytest.mark.parametrize("way", WAYS)
def test_repeated_delivery_from_zero_changes_nothing(
    tmp_path: Path, prometheus: Prometheus, collector: Collector, way: Any
) -> None:
    started = ago(600)
    for rank in range(2):
        training(tmp_path / "runs", rank, started, 100, 5.0)
    where = endpoint(way, prometheus, collector)
    sync(tmp_path / "runs", where, state_directory=tmp_path / "first")
    dump = prometheus.dump("job")
    assert len(dump) > 1000
    sync(tmp_path / "runs", where, state_directory=tmp_path / "second")
    assert prometheus.dump("job") == dump
    sync(tmp_path / "runs", where, state_directory=tmp_path / "third", batch_bytes=3000)
    # Prometheus writes target_info of its own, by the times of each request, so other batches give it more samples.
    ours = lambda entries: [entry for entry in entries if "target_info" not in entry[0]]  # noqa: E731
    assert ours(prometheus.dump("job")) == ours(dump)  # type: ignore[no-untyped-call]


def test_a_collector_that_is_killed_and_restarted_under_a_run_loses_nothing(
    ranks: Ranks, prometheus: Prometheus, tmp_path: Path
) -> None:
    with Collector(tmp_path / "collector", prometheus) as collector:
        for rank in range(2):
            ranks.start(rank, OTEL_EXPORTER_OTLP_ENDPOINT=collector.http_endpoint)
        count = lambda: sum(map(len, arrived(prometheus, "1h").values()))  # noqa: E731
        until(lambda: count() > 50)  # type: ignore[no-untyped-call]
        for _ in range(2):
            collector.kill()
            time.sleep(0.2)  # so that something is refused meanwhile; nothing rests on it
            collector.start()
            before = count()  # type: ignore[no-untyped-call]
            until(lambda before=before: count() > before)  # type: ignore[misc, no-untyped-call]
        counts = ranks.stop()
        until(lambda: not ranks.deliverers(), 40)
        steps = {rank: sorted(samples.values()) for rank, samples in arrived(prometheus, "1h").items()}
        assert steps == {rank: [float(n) for n in range(steps)] for rank, (steps, _) in enumerate(counts)}
        spans = collector.spans()
        assert {s["resource"]["rank"] for s in spans if s["name"] == "training.run"} == {0, 1}


@pytest.mark.parametrize("window", ["0s", "48h"], ids=["in order only", "with a window"])
def test_data_workers_of_five_epochs_are_as_many_series_as_there_are_workers(tmp_path: Path, window: str) -> None:
    """Each epoch forks its workers anew, at once after the last one's: the shortest time in which a number is used
    again is taken away."""
    code = """
    import os, stepspan
    from stepspan.journal import numbers
    numbers.REUSE_AFTER_S = 0.0
    with stepspan.start_run(job_id="job") as run:
        for epoch in range(5):
            ready, end = os.pipe(), os.pipe()
            workers = []
            for _ in range(3):
                workers.append(os.fork())
                if not workers[-1]:
                    os.close(end[1])
                    for number in range(20):
                        run.log_metrics({"decoded": epoch * 20 + number})
                    os.write(ready[1], b".")
                    os.read(end[0], 1)  # all three live at once
                    run.close()
                    os._exit(0)
            for _ in workers:
                os.read(ready[0], 1)
            os.close(end[1])
            for worker in workers:
                os.waitpid(worker, 0)
        assert run.flush(20)
    """
    with Prometheus(tmp_path / "prometheus", out_of_order_time_window=window) as prometheus:
        where = f"{prometheus.otlp_endpoint}/v1/metrics"
        found = python(code, tmp_path, OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=where, STEPSPAN_SAMPLERS="none")
        assert found.returncode == 0, found.stderr
        expected = [float(number) for number in range(100)]
        until(lambda: [len(s) for _, s in prometheus.series('training_decoded{job_id="job"}[1h]')] == [100] * 3)
        arrived = {
            labels["instance"]: [value for _, value in samples]
            for labels, samples in prometheus.series('training_decoded{job_id="job"}[1h]')
        }
        assert arrived == {f"job-0-worker{number}": expected for number in (1, 2, 3)}
