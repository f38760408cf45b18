"""agent.yaml → gateway.yaml → Prometheus with real Collectors, while the gateway dies.

Two live ranks log steadily and their deliverer sends to the agent. The gateway is killed twice between deliveries, and
comes back on its ports and its queue's directory. Afterwards Prometheus holds exactly the points that stand in the
journals: as many as have different times in milliseconds, each with its value.

What is sent again after a kill is equal to what was sent before, so Prometheus would hide it: an equal point at an equal
time is the same point. It is counted where it shows, at file exporters: the gateway's, for what the agent sent twice,
and that of a Collector that hands on to Prometheus, for what the gateway sent twice.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import processes
import pytest
import runs
from processes import Ranks, until
from stack import Collector, Prometheus, StackCollector

from stepspan.journal.layout import find_sessions

ranks = processes.ranks

JOB = "job"
PATIENCE = 30.0
SCALE = Path(__file__).parents[1] / "benchmarks" / "scale.py"


def logged(directory: Path) -> dict[str, dict[int, float]]:
    """What each rank logged as loss, by the journals' lines: {rank: {ms: value}}, the last value of a millisecond."""
    return {
        str(session.rank): {
            event["ts"] // 1_000_000: event["metrics"]["loss"] for event in runs.events(session.path, "metrics")
        }
        for session in find_sessions(directory)
    }


def stored(prometheus: Prometheus) -> dict[str, dict[int, float]]:
    """The same, as Prometheus has it."""
    series = prometheus.series(f'training_loss{{job_id="{JOB}"}}[1h]')
    return {labels["rank"]: dict(samples) for labels, samples in series}


def losses(collector: Collector) -> dict[str, set[int]]:
    """The times (ms) of the losses that a Collector took, by rank."""
    found: dict[str, set[int]] = {"0": set(), "1": set()}
    for point in collector.metric_points():
        if point["metric"] == "training.loss" and "asDouble" in point:
            found[str(point["resource"]["rank"])].add(point["timeUnixNano"] // 1_000_000)
    return found


def training(dump: list[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    """The samples of training, without what an agent adds to target_info and what the deliverer says of itself."""
    return [sample for sample in dump if sample[0].startswith("training_")]


def duplicates(collector: Collector) -> int:
    """How many of training's points a Collector took more than once."""
    seen: Counter[Any] = Counter(
        (point["resource"]["rank"], point["metric"], repr(point["attributes"]), point["timeUnixNano"])
        for point in collector.metric_points()
        if point["metric"].startswith("training.")
    )
    return seen.total() - len(seen)


@pytest.mark.stack
@pytest.mark.timeout(120)
def test_a_gateway_that_is_killed_between_deliveries_loses_no_point(ranks: Ranks, tmp_path: Path):
    prometheus = Prometheus(tmp_path / "prometheus")
    store = Collector(tmp_path / "store", prometheus)
    gateway = StackCollector(tmp_path / "gateway", "gateway.yaml", PROMETHEUS_OTLP=store.http_endpoint)
    agent = StackCollector(tmp_path / "agent", "agent.yaml", COLLECTOR_GATEWAYS=f"[{gateway.grpc_target}]")

    def both_have_more_than(before: dict[str, dict[int, float]]) -> bool:
        now = stored(prometheus)
        return len(now) == 2 and all(len(now[rank]) > len(before.get(rank, ())) for rank in now)

    with prometheus, store, gateway, agent:
        for rank in range(2):
            ranks.start(rank, OTEL_EXPORTER_OTLP_ENDPOINT=agent.http_endpoint)
        arrived: dict[str, dict[int, float]] = {}
        for _ in range(2):
            until(lambda: both_have_more_than(arrived), PATIENCE)
            gateway.kill()
            newest = {rank: max(points) for rank, points in losses(agent).items()}
            until(lambda newest=newest: all(max(losses(agent)[rank]) > newest[rank] for rank in newest), PATIENCE)
            arrived = stored(prometheus)
            waiting = {rank: max(losses(agent)[rank]) - max(arrived[rank]) for rank in arrived}
            assert min(waiting.values()) > 0, "what comes while the gateway is dead waits at the agent"
            gateway.start()
        until(lambda: both_have_more_than(arrived), PATIENCE)
        steps = [count for count, _ in ranks.stop()]
        until(lambda: not ranks.deliverers(), PATIENCE)
        expected = logged(ranks.directory)
        until(lambda: stored(prometheus) == expected, PATIENCE)

        assert all(0 < len(expected[rank]) <= count for rank, count in zip("01", steps, strict=True))
        again = {"agent": duplicates(gateway), "gateway": duplicates(store)}
        print(f"points sent twice by the agent and by the gateway, of {len(store.metric_points())}: {again}")
        assert min(again.values()) >= 0

        # Everything else of the runs, by the journals sent without a Collector to a store of its own.
        with Prometheus(tmp_path / "directly") as direct:
            metrics_only = {"OTEL_TRACES_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
            done = runs.command("sync", ranks.directory, "--endpoint", direct.otlp_endpoint, **metrics_only)
            assert done.returncode == 0, done.stdout + done.stderr
            assert training(prometheus.dump(JOB)) == training(direct.dump(JOB))
