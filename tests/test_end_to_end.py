"""The demo's two ranks against a real Collector and a real Prometheus: every point arrives, and one trace a step."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from harness.processes import Ranks
from harness.stack import Collector, Prometheus

import stepspan
from stepspan.journal.layout import find_sessions
from stepspan.reading.sessions import read_session

pytestmark = pytest.mark.stack

MILLISECOND = 1_000_000


def demo(directory: Path, **variables: str) -> str:
    """Run `stepspan demo`, and return what it printed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    command = [sys.executable, "-m", "stepspan", "demo", "--directory", str(directory)]
    done = subprocess.run(command, env={**env, **variables}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def journaled(directory: Path) -> dict[int, list[dict[str, Any]]]:
    """Rank -> the events of its journal."""
    return {session.rank: read_session(session).events for session in find_sessions(directory)}


def logged(events: list[dict[str, Any]], key: str) -> dict[tuple[str, int], float]:
    """(split, millisecond) -> the last value that was logged in it."""
    return {
        (event["split"], event["ts"] // MILLISECOND): event["metrics"][key]
        for event in events
        if event["tag"] == "metrics" and key in event["metrics"]
    }


def arrived(prometheus: Prometheus, job_id: str, key: str) -> dict[str, dict[tuple[str, int], float]]:
    """Rank -> (split, millisecond) -> value, as Prometheus has it."""
    found: dict[str, dict[tuple[str, int], float]] = {}
    for labels, samples in prometheus.series(f'training_{key}{{job_id="{job_id}"}}[1h]'):
        found.setdefault(labels["rank"], {}).update({(labels["split"], ms): value for ms, value in samples})
    return found


def assert_every_point(prometheus: Prometheus, directory: Path) -> Any:
    """That Prometheus holds exactly what both ranks logged; the job's id."""
    ranks = journaled(directory)
    job_id = ranks[0][0]["job_id"]
    for key in ("loss", "learning_rate", "grad_norm", "accuracy"):
        expected = {str(rank): logged(events, key) for rank, events in ranks.items()}
        assert all(expected.values())
        assert arrived(prometheus, job_id, key) == expected
    return job_id


@pytest.mark.parametrize("protocol", ["http/protobuf", "http/json", "grpc"])
def test_every_point_of_the_demo_arrives(
    collector: Collector, prometheus: Prometheus, tmp_path: Path, protocol: str
) -> None:
    endpoint = collector.grpc_endpoint if protocol == "grpc" else collector.http_endpoint
    printed = demo(tmp_path / "runs", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, OTEL_EXPORTER_OTLP_PROTOCOL=protocol)
    assert printed.count(" ok") == 6, "two ranks, three signals, all delivered"
    job_id = assert_every_point(prometheus, tmp_path / "runs")
    assert_one_trace_a_step(collector, tmp_path / "runs")
    assert {log["eventName"] for log in collector.logs()} == {"training.hyperparams", "training.artifact"}
    ended = prometheus.query(f'count({{job_id="{job_id}",__name__=~"training_.*"}})', at=time.time() + 2)
    assert ended == [], "a run that has ended leaves no series that looks alive"


def assert_one_trace_a_step(collector: Collector, directory: Path) -> None:
    ranks = len(journaled(directory))
    spans = collector.spans()
    assert max(Counter(span["spanId"] for span in spans).values()) == 1, "no two spans share an id"
    runs = {span["resource"]["rank"]: span for span in spans if span["name"] == "training.run"}
    traces: dict[str, list[dict[str, Any]]] = {}
    for span in spans:
        if span["name"] == "training.step":
            traces.setdefault(span["traceId"], []).append(span)
    assert len({(s["attributes"]["split"], s["attributes"]["step"]) for t in traces.values() for s in t}) == len(traces)
    for trace in traces.values():
        by_rank = {span["resource"]["rank"]: span for span in trace}
        assert len(trace) == len(by_rank) == ranks
        root = by_rank.pop(0)
        assert not root.get("parentSpanId")
        assert {span["parentSpanId"] for span in by_rank.values()} == {root["spanId"]}
        for rank, span in {0: root, **by_rank}.items():
            assert [(link["traceId"], link["spanId"]) for link in span["links"]] == [
                (runs[rank]["traceId"], runs[rank]["spanId"])
            ]
    phases = {span["name"] for span in spans if span["traceId"] in traces and span["name"] != "training.step"}
    assert phases == {"forward_backward", "all_reduce", "optimizer"}


def _rank_with_sdk_exporters(
    rank: int, ranks: Ranks, epochs: Any, directory: Path, memory: Any, barrier: Any, endpoint: Any
) -> None:
    os.environ.update(STEPSPAN_JOB_ID="official", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    from stepspan.cli.demo_training import train

    exporter = stepspan.SdkExporter(
        span=OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces"),
        metric=OTLPMetricExporter(endpoint=f"{endpoint}/v1/metrics"),
        log=OTLPLogExporter(endpoint=f"{endpoint}/v1/logs"),
    )
    train(rank, ranks, epochs, directory, memory, barrier, exporters=[exporter])  # type: ignore[arg-type]


def test_every_point_arrives_through_the_official_exporters(
    collector: Collector, prometheus: Prometheus, tmp_path: Path
) -> None:
    from stepspan.cli.demo_training import shared_memory

    context = multiprocessing.get_context("spawn")
    shared = (shared_memory(2), context.Barrier(2))
    processes = [
        context.Process(
            target=_rank_with_sdk_exporters, args=(rank, 2, 2, tmp_path / "runs", *shared, collector.http_endpoint)
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
        process.close()
    assert_every_point(prometheus, tmp_path / "runs")
    assert_one_trace_a_step(collector, tmp_path / "runs")


@pytest.mark.parametrize("protocol", ["http/protobuf", "http/json", "grpc"])
def test_nan_and_infinity_arrive_as_themselves_and_are_counted(
    collector: Collector, prometheus: Prometheus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    endpoint = collector.grpc_endpoint if protocol == "grpc" else collector.http_endpoint
    with stepspan.start_run(directory=tmp_path / "runs", job_id="diverged", endpoint=endpoint) as run:
        run.log_metrics({"loss": math.nan, "up": math.inf, "down": -math.inf})
        assert run.flush(20)
    values = {
        labels["__name__"]: [value for _, value in samples]
        for labels, samples in prometheus.series('{job_id="diverged",split="train"}[1h]')
    }
    assert math.isnan(values["training_loss"][0])
    assert values["training_up"] == [math.inf]
    assert values["training_down"] == [-math.inf]
    counted = prometheus.series('training_nonfinite_total{job_id="diverged"}[1h]')
    first = {labels["key"]: samples[0][1] for labels, samples in counted}
    assert first == {"loss": 1.0, "up": 1.0, "down": 1.0}


def test_the_demo_without_an_endpoint_says_how_to_send_it_and_that_works(
    collector: Collector, prometheus: Prometheus, tmp_path: Path
) -> None:
    printed = demo(tmp_path / "runs")
    line = next(line for line in printed.splitlines() if line.startswith("send it: "))
    arguments = line.partition(" sync ")[2].replace("http://localhost:4318", collector.http_endpoint)
    command = [sys.executable, "-m", "stepspan", "sync", *arguments.split()]
    first = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert first.returncode == 0, first.stdout + first.stderr
    assert_every_point(prometheus, tmp_path / "runs")
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 0
    assert second.stdout == "delivered 0 metrics, 0 traces, 0 logs; rejected 0; 0 lines wait\n"


KILLED = """
import os, signal, sys, time
import stepspan

run = stepspan.start_run(directory=sys.argv[1], job_id="killed")
with run.epoch(0):
    for _ in run.steps(range(800, 900), start=800):
        with run.span("forward"):
            run.log_metrics({"loss": 0.5})
            if run.stats()["journaled"] > 60:
                if sys.argv[2] == "forked" and os.fork() == 0:
                    print(os.getpid(), flush=True)
                    os.close(1)
                    time.sleep(60)
                os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("child", ["alone", "forked"])
def test_a_rank_killed_in_a_step_leaves_that_step_as_an_error(collector: Collector, tmp_path: Path, child: str) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "runs"), child]
    killed = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    assert killed.returncode == -9
    try:
        events = journaled(tmp_path / "runs")[0]
        last = max((event for event in events if event["tag"] == "step_begin"), key=lambda event: event["step"])
        sync = [sys.executable, "-m", "stepspan", "sync", str(tmp_path / "runs"), "--endpoint", collector.http_endpoint]
        done = subprocess.run(sync, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        for pid in killed.stdout.split():
            os.kill(int(pid), 9)
    failed = {span["name"]: span for span in collector.spans() if span["status"].get("code") == 2}
    assert failed.keys() == {"training.run", "training.epoch", "training.step", "forward"}
    assert failed["training.step"]["attributes"]["step"] == last["step"]
    assert {span["endTimeUnixNano"] for span in failed.values()} == {events[-1]["ts"]}
    assert failed["training.run"]["attributes"]["status"] == "interrupted"
    assert failed["forward"]["traceId"] == failed["training.step"]["traceId"]
    steps = [span for span in collector.spans() if span["name"] == "training.step"]
    assert len(steps) == len([event for event in events if event["tag"] == "step_begin"])
