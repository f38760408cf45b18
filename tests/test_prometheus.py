"""What a real Prometheus makes of old, refused and repeated data, and of a Collector that dies."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from journals import ROOMY, header, session_of
from stack import Collector, Prometheus

import stepspan
from stepspan.deliver.ledgers import session_ledger
from stepspan.journal.layout import find_sessions
from stepspan.journal.writer import JournalWriter

pytestmark = pytest.mark.stack

SECOND, HOUR = 1_000_000_000, 3600 * 1_000_000_000
DAY = 24 * HOUR


def sync(directory: Path, endpoint: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stepspan", "sync", str(directory), "--endpoint", endpoint, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def journal(directory: Path, job: str, rank: int, *, start: int, end: int, every: int) -> Path:
    """A run of one rank that logged a loss `every` so many ns from `start` to `end`, and ended."""
    resource = {"service.name": "training", "service.instance.id": f"{job}-{rank}", "job_id": job, "rank": rank}
    session = f"{rank:08x}" + "5e5510aa"
    told = header(session, job_id=job, rank=rank, world_size=2, run_key=job, started=start, resource=resource)
    place = directory / job / "node"
    place.mkdir(parents=True, exist_ok=True)
    times = iter(range(start, end, every))
    now = [start]
    writer = JournalWriter(place, told, limits=ROOMY, clock=lambda: now[0])
    for step, now[0] in enumerate(times):
        writer.append({"ts": 0, "seq": 0, "tag": "metrics", "step": step, "split": "train", "metrics": {"loss": 0.5}})
    writer.close("completed")
    return writer.path


def losses(prometheus: Prometheus, job: str) -> dict[str, int]:
    """Rank -> how many samples of its loss Prometheus has."""
    found = prometheus.series(f'training_loss{{job_id="{job}"}}[30d]')
    return {labels["rank"]: len(samples) for labels, samples in found}


def ledgers(directory: Path) -> dict[int, dict[str, dict]]:
    """Rank -> signal -> ledger, of the one destination there is."""
    found = [session_ledger(session) for session in find_sessions(directory)]
    return {ledger["rank"]: next(iter(ledger["destinations"].values())) for ledger in found}


def test_two_journals_of_five_days_arrive_whole(prometheus: Prometheus, tmp_path: Path):
    now = time.time_ns()
    for rank in range(2):
        journal(tmp_path / "runs", "long", rank, start=now - 5 * DAY, end=now - HOUR, every=HOUR // 2)
    done = sync(tmp_path / "runs", prometheus.otlp_endpoint, "--protocol", "http/protobuf")
    assert losses(prometheus, "long") == {"0": 2 * 24 * 5 - 2, "1": 2 * 24 * 5 - 2}
    assert {rank: ledger["metrics"]["rejected"] for rank, ledger in ledgers(tmp_path / "runs").items()} == {0: 0, 1: 0}
    assert "metrics: hold" not in done.stdout


@pytest.mark.parametrize("through", ["prometheus", "collector"])
def test_an_old_journal_beside_live_data_is_held_and_names_the_window(
    collector: Collector, prometheus: Prometheus, tmp_path: Path, through: str
):
    endpoint = collector.http_endpoint if through == "collector" else prometheus.otlp_endpoint
    now = time.time_ns()
    journal(tmp_path / "live", "live", 0, start=now - HOUR, end=now, every=60 * SECOND)
    sync(tmp_path / "live", endpoint)
    assert losses(prometheus, "live") == {"0": 60}
    journal(tmp_path / "old", "old", 1, start=now - 5 * DAY, end=now - HOUR, every=HOUR // 2)
    done = sync(tmp_path / "old", endpoint)
    assert done.returncode == 1
    held = next(line for line in done.stdout.splitlines() if line.startswith("metrics: hold"))
    assert "out_of_order_time_window" in held
    metrics = ledgers(tmp_path / "old")[1]["metrics"]
    assert metrics["rejected"] == 0
    assert metrics["pending"] > 0


@pytest.mark.parametrize("through", ["prometheus", "collector"])
def test_one_refused_point_costs_one_point(collector: Collector, prometheus: Prometheus, tmp_path: Path, through: str):
    endpoint = collector.http_endpoint if through == "collector" else prometheus.otlp_endpoint
    now = time.time_ns() // SECOND * SECOND
    start = now - 100 * SECOND
    for rank in range(2):
        journal(tmp_path / "runs", "job", rank, start=start, end=now, every=SECOND)
    taken = {"timeUnixNano": str(start + 50 * SECOND), "asDouble": 99.0}
    taken["attributes"] = [{"key": "split", "value": {"stringValue": "train"}}]
    fields = {"service.name": "training", "service.instance.id": "job-0", "job_id": "job"}
    resource = [{"key": key, "value": {"stringValue": value}} for key, value in fields.items()]
    resource.append({"key": "rank", "value": {"intValue": "0"}})
    metric = {"name": "training.loss", "gauge": {"dataPoints": [taken]}}
    body = {"resourceMetrics": [{"resource": {"attributes": resource}, "scopeMetrics": [{"metrics": [metric]}]}]}
    requests.post(f"{prometheus.otlp_endpoint}/v1/metrics", json=body, timeout=5).raise_for_status()

    done = sync(tmp_path / "runs", endpoint)
    assert losses(prometheus, "job") == {"0": 100, "1": 100}
    found = ledgers(tmp_path / "runs")
    assert (found[0]["metrics"]["rejected"], found[1]["metrics"]["rejected"]) == (1, 0), done.stdout
    (session,) = [session for session in find_sessions(tmp_path / "runs") if session.rank == 0]
    (letter,) = (session.path / "rejected.jsonl").read_text().splitlines()
    assert str(start + 50 * SECOND) in letter


def test_delivering_again_from_zero_changes_nothing(prometheus: Prometheus, tmp_path: Path):
    with stepspan.start_run(directory=tmp_path / "runs", job_id="pure") as run:
        run.log_hyperparams({"lr": 0.1})
        for epoch in range(2):
            with run.epoch(epoch):
                for number in run.steps(range(200)):
                    with run.span("all_reduce", collective=True):
                        run.log_metrics({"loss": 1.0 / (number + 1), "val/x": float("nan")})
        run.log_error(ValueError("no"))
    endpoint = prometheus.otlp_endpoint
    sync(tmp_path / "runs", endpoint, "--state-directory", str(tmp_path / "first"))
    before = prometheus.dump("pure")
    assert len(before) > 100
    for number, protocol in enumerate(("http/json", "http/protobuf")):
        more = ("--protocol", protocol, "--state-directory", str(tmp_path / f"again{number}"))
        sync(tmp_path / "runs", endpoint, *more)
        assert prometheus.dump("pure") == before


def test_a_collector_that_dies_and_returns_loses_nothing(collector: Collector, prometheus: Prometheus, tmp_path: Path):
    with stepspan.start_run(directory=tmp_path / "runs", job_id="outage", endpoint=collector.http_endpoint) as run:
        for number in run.steps(range(300)):
            run.log_metrics({"loss": float(number)})
            if number == 100:
                assert run.flush(20)
                collector.kill()
            if number == 200:
                collector.start()
            time.sleep(0.002)  # steps take time; nothing is waited for
        assert run.flush(40), run.stats()
        expected = run.stats()["journal"]
    from test_end_to_end import logged

    events = [*stepspan_events(Path(expected))]
    assert losses(prometheus, "outage") == {"0": len(logged(events, "loss"))}


def stepspan_events(path: Path) -> list[dict]:
    from journals import lines

    return lines(session_of(path).path)
