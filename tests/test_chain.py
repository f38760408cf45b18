"""agent.yaml → gateway.yaml → Prometheus with real Collectors, while the gateway dies.

Two live ranks log steadily and their deliverer sends to the agent. The gateway is killed twice between deliveries, and
comes back on its ports and its queue's directory. Afterwards Prometheus holds exactly the points that stand in the
journals: as many as have different times in milliseconds, each with its value.

What is sent again after a kill equals what was sent before, so Prometheus hides it: an equal point at an equal time
is the same point. It is counted (and not held to a number: a kill need not fall between a request and its answer)
where it shows, at file exporters: the gateway's, for what the agent sent twice, and
that of a Collector between gateway and Prometheus, for what the gateway sent twice.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import processes, runs
from harness.processes import Ranks, under_load, until
from harness.stack import CONFIGS, Collector, Prometheus, StackCollector, binary

from stepspan.config import load
from stepspan.journal.layout import find_sessions
from stepspan.processors import build

ranks = processes.ranks

JOB = "job"
PATIENCE = 30.0
SCALING = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
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
def test_a_gateway_that_is_killed_between_deliveries_loses_no_point(
    ranks: Ranks, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
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
            until(lambda before=arrived: both_have_more_than(before), PATIENCE)  # type: ignore[misc]
            gateway.kill()
            newest = {rank: max(points) for rank, points in losses(agent).items()}
            until(lambda newest=newest: all(max(losses(agent)[rank]) > newest[rank] for rank in newest), PATIENCE)  # type: ignore[misc]
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
        assert losses(store) == {rank: set(points) for rank, points in expected.items()}
        record_property("sent twice by the agent", duplicates(gateway))
        record_property("sent twice by the gateway", duplicates(store))

        # Everything else of the runs, by the journals sent without a Collector to a store of its own.
        with Prometheus(tmp_path / "directly") as direct:
            metrics_only = {"OTEL_TRACES_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
            done = runs.command("sync", ranks.directory, "--endpoint", direct.otlp_endpoint, **metrics_only)
            assert done.returncode == 0, done.stdout + done.stderr
            assert training(prometheus.dump(JOB)) == training(direct.dump(JOB))


@pytest.mark.stack
def test_the_benchmark_of_scale_measures_every_part(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCALE), "--quick", "--directory", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=under_load(60),
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    printed = done.stdout.splitlines()
    figures = {line.split("|")[1].strip(): line.split("|")[2] for line in printed if line.startswith("| ")}
    points = figures["points/s accepted by Prometheus"]
    assert float(points.replace(",", "")) > 100, "16 ranks of 16 points a step"
    for part in ("generator", "deliverers", "agent", "gateway", "prometheus"):
        assert "MiB" in figures[f"{part}: cores, memory"]
    assert "0 of them 1 s or more at the worst." in done.stdout
    assert not list(tmp_path.iterdir()), "it leaves something behind"


# ------------------------------------------------------------------------------------------------ docs/scaling.md


def snippet(first: str) -> str:
    """The YAML of the documentation that begins with this line."""
    (found,) = (block for block in re.findall(r"```yaml\n(.*?)```", SCALING, re.DOTALL) if block.startswith(first))
    return str(found)


@pytest.mark.stack
@pytest.mark.parametrize("first", ["# ours.yaml", "# victoria.yaml"])
def test_the_documented_overlays_fit_the_gateway(tmp_path: Path, first: str) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(snippet(first))
    command: list[Any] = [binary("otelcol"), "validate", f"--config={CONFIGS / 'gateway.yaml'}", f"--config={overlay}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_the_documented_processors_are_settings(tmp_path: Path) -> None:
    file = tmp_path / "stepspan.yaml"
    file.write_text(snippet("exporters:\n  - endpoint"))
    settings = load({}, {}, config=file)
    drop, sample_steps = build(settings.exporters[0].processors)
    assert (drop.patterns, sample_steps.every) == (("grad/*", "debug/*"), 10)  # type: ignore[attr-defined]
    assert settings.sample_interval == 30


def test_every_documented_manifest_and_script_can_be_read(tmp_path: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", SCALING, re.DOTALL):
        assert yaml.safe_load(block)
    for block in re.findall(r"```sh\n(.*?)```", SCALING, re.DOTALL):
        (tmp_path / "script.sh").write_text(block)
        assert subprocess.run(["bash", "-n", tmp_path / "script.sh"]).returncode == 0
