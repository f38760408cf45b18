"""The fixtures themselves: what is sent to the real Collector is what its file and the real Prometheus give back."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from harness.stack import Collector, Prometheus

from stepspan.mapping.records import Signal

pytestmark = pytest.mark.stack

NOW = time.time_ns() // 10**9 * 10**9
SECOND = 10**9
RESOURCE = {
    "attributes": [
        {"key": "service.name", "value": {"stringValue": "training"}},
        {"key": "service.instance.id", "value": {"stringValue": "j-3"}},
        {"key": "job_id", "value": {"stringValue": "j"}},
        {"key": "rank", "value": {"intValue": "3"}},
    ]
}
LABELS = {"__name__": "training_loss", "job": "training", "instance": "j-3", "job_id": "j", "rank": "3"}


def metrics(*entries: Any) -> dict[str, Any]:
    return {"resourceMetrics": [{"resource": RESOURCE, "scopeMetrics": [{"metrics": list(entries)}]}]}


def gauge(*points: Any, **flags: Any) -> Any:
    """(ns, value) pairs as the gauge training.loss."""
    data = [{"timeUnixNano": str(at), "asDouble": value, **flags} for at, value in points]
    return metrics({"name": "training.loss", "gauge": {"dataPoints": data}})


def span(name: str) -> dict[str, Any]:
    record = {
        "traceId": "0af7651916cd43dd8448eb211c80319c",
        "spanId": "b7ad6b7169203331",
        "name": name,
        "kind": 1,
        "startTimeUnixNano": str(NOW),
        "endTimeUnixNano": str(NOW + SECOND),
        "attributes": [
            {"key": "step", "value": {"intValue": "812"}},
            {"key": "wait", "value": {"doubleValue": "NaN"}},
            {"key": "shape", "value": {"arrayValue": {"values": [{"intValue": "2"}, {"boolValue": True}, {}]}}},
            {"key": "data", "value": {"bytesValue": "AAE="}},
        ],
        "events": [{"name": "slow", "timeUnixNano": str(NOW)}],
        "status": {"code": 2, "message": "killed"},
    }
    return {"resourceSpans": [{"resource": RESOURCE, "scopeSpans": [{"spans": [record]}]}]}


def send(endpoint: Any, signal: Signal, body: Any) -> Any:
    return requests.post(f"{endpoint}/v1/{signal}", json=body, timeout=10)


def test_a_point_arrives_in_prometheus_at_its_own_time_with_its_job_and_rank(
    collector: Collector, prometheus: Prometheus
) -> None:
    points = [(NOW - 3600 * SECOND, 0.5), (NOW - 2 * SECOND, "NaN"), (NOW - SECOND, "Infinity")]
    assert send(collector.http_endpoint, "metrics", gauge(*points)).ok

    ((labels, samples),) = prometheus.series('training_loss{job_id="j"}[2h]', at=NOW / SECOND)
    assert labels == LABELS
    times, values = zip(*samples, strict=True)
    assert times == tuple(at // 10**6 for at, _ in points)
    assert values[0] == 0.5
    assert math.isnan(values[1])
    assert values[2] == math.inf

    assert [(p["metric"], p["type"], p["timeUnixNano"]) for p in collector.metric_points()] == [
        ("training.loss", "gauge", at) for at, _ in points
    ]
    assert collector.metric_points()[2]["asDouble"] == math.inf


def test_a_span_and_a_log_come_back_as_plain_data(collector: Collector) -> None:
    assert send(collector.http_endpoint, "traces", span("training.step")).ok
    record = {"timeUnixNano": str(NOW), "eventName": "training.artifact", "body": {"stringValue": "saved"}}
    logs = {"resourceLogs": [{"resource": RESOURCE, "scopeLogs": [{"logRecords": [record]}]}]}
    assert send(collector.http_endpoint, "logs", logs).ok

    (one,) = collector.spans()
    assert one["resource"] == {"service.name": "training", "service.instance.id": "j-3", "job_id": "j", "rank": 3}
    assert (one["traceId"], one["spanId"]) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    assert (one["startTimeUnixNano"], one["endTimeUnixNano"]) == (NOW, NOW + SECOND)
    assert math.isnan(one["attributes"].pop("wait"))
    assert one["attributes"] == {"step": 812, "shape": [2, True, None], "data": b"\x00\x01"}
    assert one["events"] == [{"name": "slow", "timeUnixNano": NOW}]
    assert one["status"] == {"code": 2, "message": "killed"}

    (log,) = collector.logs()
    assert (log["eventName"], log["body"], log["resource"]["job_id"]) == ("training.artifact", "saved", "j")


def test_a_dump_is_stable_and_tells_nan_from_a_marker_of_staleness(prometheus: Prometheus) -> None:
    def send_all() -> None:
        assert send(prometheus.otlp_endpoint, "metrics", gauge((NOW - 2 * SECOND, 0.1), (NOW - SECOND, "NaN"))).ok
        assert send(prometheus.otlp_endpoint, "metrics", gauge((NOW, 0), flags=1)).ok

    send_all()
    dump = prometheus.dump("j")
    loss = "{" + ", ".join(f'{key}="{value}"' for key, value in sorted(LABELS.items())) + "}"
    assert [entry for entry in dump if entry[0] == loss] == [
        (loss, NOW // 10**6 - 2000, "0.1"),
        (loss, NOW // 10**6 - 1000, "NaN(7ff8000000000001)"),
        (loss, NOW // 10**6, "NaN(7ff0000000000002)"),
    ]

    send_all()
    assert prometheus.dump("j") == dump
    prometheus.restart()
    assert prometheus.dump("j") == dump
    assert prometheus.dump("another") == []


def test_a_native_histogram_is_dumped_by_its_buckets(prometheus: Prometheus) -> None:
    point = {
        "startTimeUnixNano": str(NOW - SECOND),
        "timeUnixNano": str(NOW),
        "count": "8",
        "sum": 10.5,
        "scale": 2,
        "zeroCount": "1",
        "positive": {"offset": -1, "bucketCounts": ["2", "0", "0", "0", "0", "5"]},
    }
    histogram = {"aggregationTemporality": 2, "dataPoints": [point]}
    body = metrics({"name": "training.step.duration", "unit": "s", "exponentialHistogram": histogram})
    assert send(prometheus.otlp_endpoint, "metrics", body).ok

    ((name, at, value),) = (entry for entry in prometheus.dump("j") if "duration" in entry[0])
    assert '__name__="training_step_duration_seconds"' in name
    assert at == NOW // 10**6
    # Prometheus counts a bucket by its upper bound where OTLP counts it by its lower one: every index is one higher.
    assert value == "count=8 sum=10.5 schema=2 zero=1 threshold=1e-128 negative={} positive={0: 2, 5: 5}"


def test_a_refusal_by_prometheus_reaches_the_client_unless_the_collector_queues(tmp_path: Path) -> None:
    with (
        Prometheus(tmp_path / "prometheus", out_of_order_time_window="0s") as prometheus,
        Collector(tmp_path / "direct", prometheus) as direct,
        Collector(tmp_path / "queued", prometheus, queued=True) as queued,
    ):
        assert send(direct.http_endpoint, "metrics", gauge((NOW, 1.0))).ok
        late = gauge((NOW - SECOND, 2.0))
        assert send(direct.http_endpoint, "metrics", late).status_code == 400
        assert send(queued.http_endpoint, "metrics", late).ok

        prometheus.kill()
        assert send(direct.http_endpoint, "metrics", late).status_code == 503


def test_what_the_collector_has_answered_survives_its_death(tmp_path: Path) -> None:
    with Collector(tmp_path) as collector:
        for number in range(3):
            assert send(collector.http_endpoint, "traces", span(f"step {number}")).ok
            collector.restart()
        assert [one["name"] for one in collector.spans()] == ["step 0", "step 1", "step 2"]
