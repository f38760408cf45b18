"""Dashboards, recording rules and alerts: they are what the code makes, they parse, and they ask for what there is."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests
import yaml
from harness import grafana
from harness.stack import Prometheus, binary

from stepspan.events import TAGS
from stepspan.mapping import samples
from stepspan.testing import FixedClock, recorded_run

CONFIGS = grafana.STACK.parent
VALUES = {"job": "j", "rank": ".*", "split": ".*", "raw": ".*", "slower": "1s"}
UNITS = {
    "none", "short", "s", "percentunit", "bytes", "Bps", "watt", "celsius", "hertz", "suffix: /s",
}  # fmt: skip

every_dashboard = pytest.mark.parametrize("name", grafana.NAMES)


def test_the_committed_files_are_what_the_code_makes(tmp_path: Path) -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="the dashboards extra needs Python 3.11")
    subprocess.run([sys.executable, "-m", "dashboards", str(tmp_path)], cwd=CONFIGS, check=True, timeout=60)
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.*")}
    assert len(made) == 5
    for path, text in made.items():
        assert (grafana.STACK / path).read_text() == text, f"{path} is not up to date: make dashboards"


@pytest.mark.stack
@pytest.mark.parametrize("file", ["recording.yml", "alerts.yml"])
def test_promtool_takes_the_rules(file: str) -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", file)


@pytest.mark.stack
def test_alerts_fire_when_they_should_and_not_otherwise() -> None:
    promtool("test", "rules", "alerts_test.yml")


@pytest.mark.stack
def test_rules_keep_apart_what_differs_by_its_key() -> None:
    promtool("test", "rules", "recording_test.yml")


def promtool(*arguments: str) -> None:
    command: list[Any] = [binary("promtool"), *arguments]
    done = subprocess.run(command, cwd=grafana.PROMETHEUS_STACK, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_says_what_to_do_and_is_tested_both_ways() -> None:
    tests = yaml.safe_load((grafana.PROMETHEUS_STACK / "alerts_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for rule in grafana.rules("alerts.yml"):
        fires = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == rule["alert"]}
        assert fires == {True, False}, rule["alert"]
        assert rule["labels"]["severity"] in {"warning", "critical"}
        of = "instance" if rule["alert"].startswith("Collector") else "job_id"
        assert f"$labels.{of}" in rule["annotations"]["summary"]
        assert len(rule["annotations"]["description"]) > 100


def test_recording_rules_are_named_level_metric_operation_every_ten_seconds() -> None:
    (group,) = yaml.safe_load((grafana.PROMETHEUS_STACK / "recording.yml").read_text())["groups"]
    assert group["interval"] == "10s"
    for rule in group["rules"]:
        level, metric, operation = rule["record"].split(":")
        assert level in {"rank", "job"}
        assert re.fullmatch(r"[a-z][a-z0-9_]+", metric)
        assert operation in {"min", "avg", "p50", "p99", "max", "sum", "count", "avg1m"}


# ------------------------------------------------------------------------------------------------------ every panel


@every_dashboard
def test_every_panel_says_what_it_shows_and_what_to_do(name: str) -> None:
    board = grafana.dashboard(name)
    assert board["uid"] == f"stepspan-{name}"
    assert board["description"]
    for panel in grafana.panels(board):
        of = panel["title"]
        assert len(panel["description"]) > 50, of
        assert panel["description"].endswith("."), of
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, of


@every_dashboard
def test_ids_are_unique_and_every_query_has_a_letter_and_a_legend(name: str) -> None:
    board = grafana.dashboard(name)
    numbers = [panel["id"] for panel in board["panels"]]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    for panel in grafana.panels(board):
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == sorted(set(letters))
        assert letters[0] == "A"
        for target in panel["targets"]:
            if target["datasource"]["uid"] == "prometheus":
                assert target["legendFormat"], panel["title"]


@every_dashboard
def test_every_data_source_is_one_that_is_provisioned(name: str) -> None:
    file = grafana.STACK / "grafana" / "provisioning" / "datasources" / "datasources.yml"
    provisioned = {one["uid"]: one["type"] for one in yaml.safe_load(file.read_text())["datasources"]}
    text = orjson.dumps(grafana.dashboard(name)).decode()
    used = re.findall(r'"datasource":\{"type":"(\w+)","uid":"([\w-]+)"\}', text)
    assert used
    assert text.count('"datasource":') == len(used)
    for kind, uid in used:
        assert provisioned[uid] == kind


@every_dashboard
def test_panels_do_not_overlap(name: str) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in grafana.dashboard(name)["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]


@every_dashboard
def test_dashboards_lead_to_each_other_with_job_rank_and_time(name: str) -> None:
    board = grafana.dashboard(name)
    (link,) = board["links"]
    assert (link["type"], link["tags"], link["includeVars"], link["keepTime"]) == (
        "dashboards",
        ["stepspan"],
        True,
        True,
    )
    assert board["tags"] == ["stepspan"]
    assert grafana.variable("job", name)["query"] == "label_values(training_run_info, job_id)"


@every_dashboard
def test_a_panel_that_draws_single_ranks_narrows_them_and_bounds_their_number(name: str) -> None:
    for panel in grafana.panels(grafana.dashboard(name)):
        for target in panel["targets"]:
            if "rank {{rank}}" in target.get("legendFormat", ""):
                assert 'rank=~"${rank:pipe}"' in target["expr"], panel["title"]
                assert re.search(r"(top|bottom)k\(\d+, ", target["expr"]), panel["title"]


@every_dashboard
def test_ranks_that_are_typed_as_a_pattern_are_asked_for_as_one(name: str) -> None:
    """`12..` for the ranks 1200 to 1299, as the panel of blocks says."""
    asked = [query.filled(**{**VALUES, "rank": "12.."}) for query in grafana.queries(name)]
    narrowed = [text for text in asked if "rank=~" in text]
    assert bool(narrowed) == (name != "telemetry-health")
    assert all('rank=~"12.."' in text for text in narrowed)
    assert grafana.fill('{rank=~"$rank"}', rank="12..") == r'{rank=~"12\\.\\."}'


# ------------------------------------------------------------------------------------------------ what they ask for


@pytest.fixture(scope="module")
def parse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """PromQL as the real Prometheus' syntax tree; fails on an expression that it does not take."""
    with Prometheus(tmp_path_factory.mktemp("prometheus")) as server, requests.Session() as http:
        http.trust_env = False

        def tree(promql: str) -> Any:
            answer = http.get(f"{server.url}/api/v1/parse_query", params={"query": promql}).json()
            assert answer["status"] == "success", f"{promql}: {answer['error']}"
            return answer["data"]

        yield tree


def promql() -> Iterator[tuple[str, str]]:
    """Every PromQL expression there is: of what, and the expression with its variables filled."""
    for name in grafana.NAMES:
        for query in (*grafana.queries(name), *grafana.marks(name)):
            if query.source == "prometheus":
                yield query.of, query.filled(**VALUES)
    for file in ("recording.yml", "alerts.yml"):
        for rule in grafana.rules(file):
            yield rule.get("record") or rule["alert"], rule["expr"]
    yield "variable raw", grafana.fill(grafana.variable("raw")["query"], **VALUES)[len("query_result(") : -1]


@pytest.mark.stack
def test_every_expression_parses_and_asks_for_metrics_that_exist(parse: Callable[[str], Any]) -> None:
    known = {**ours(), **sampled(), **recorded(), **THEIRS}
    missing = [
        (of, name.pattern)
        for of, expression in promql()
        for name, _ in grafana.selectors(parse(expression))
        if not any(name.fullmatch(metric) for metric in known)
    ]
    assert not missing


@pytest.mark.stack
def test_every_label_asked_for_is_one_that_the_metric_has(parse: Callable[[str], Any]) -> None:
    known = {**ours(), **sampled(), **recorded()}
    for of, expression in promql():
        for name, matchers in grafana.selectors(parse(expression)):
            if name.pattern in known:  # not a pattern that names several
                assert matchers.keys() <= known[name.pattern] | IDENTITY, f"{of}: {name.pattern}"


IDENTITY = {"job_id", "rank"}
SUFFIXES = {
    "": "", "1": "_ratio", "s": "_seconds", "By": "_bytes", "W": "_watts", "J": "_joules", "Hz": "_hertz",
    "Cel": "_celsius", "{item}/s": "_per_second",
}  # fmt: skip
LOGGED = {
    "loss": 0.5, "lr": 0.1, "learning_rate": 0.1, "grad_norm": 1.0, "accuracy": 0.9, "reward": 1.0, "train_loss": 0.5,
    "loss_step": 0.5, "train_loss_step": 0.5, "loss_epoch": 0.5, "train_loss_epoch": 0.5,
}  # fmt: skip
"""What users log, as far as a panel has it by name."""
THEIRS = {
    name: set[str]()
    for name in (
        "up",
        "otelcol_exporter_queue_size",
        "otelcol_exporter_queue_capacity",
        *(
            f"otelcol_{what}_{of}_total"
            for what in ("receiver_refused", "exporter_sent", "exporter_send_failed")
            for of in ("metric_points", "spans", "log_records")
        ),
        "prometheus_rule_group_interval_seconds",
        "prometheus_rule_group_last_duration_seconds",
        "prometheus_tsdb_exemplar_exemplars_in_storage",
        "prometheus_tsdb_head_samples_appended_total",
        "prometheus_tsdb_head_series",
        "prometheus_tsdb_out_of_bound_samples_total",
        "prometheus_tsdb_out_of_order_samples_appended_total",
        "prometheus_tsdb_out_of_order_samples_total",
        "prometheus_tsdb_too_old_samples_total",
    )
}
"""The Collector's and Prometheus' own; test_panels.py meets them."""


def translated(name: str, unit: str, kind: str) -> str:
    """A metric's name in Prometheus, by the rules of its OTLP translation as far as they concern us."""
    suffix = "" if unit == "1" and kind == "sum" else SUFFIXES.get(unit, "")
    total = "_total" if kind == "sum" else ""
    return name.replace(".", "_") + suffix + total


def ours() -> dict[str, set[str]]:
    """Metric -> labels of everything a whole run is mapped to."""
    with recorded_run(clock=FixedClock(step_ns=1_000_000_000), name="n", group="g") as recording:
        run = recording.run
        run.log_hyperparams({"lr": 0.1})
        run.set_total_steps(20)
        run.log_artifact("model", "/checkpoint", kind="checkpoint")
        with run.epoch(0):
            for split in ("train", "val"):
                for _ in run.steps(range(3), split=split, samples=8, tokens=64):
                    with run.span("all_reduce", collective=True):
                        pass
                    run.log_metrics(LOGGED)
        run.log_metrics({"loss": math.nan, "f1": "0.5"}, step=1)
        run.log_error(ValueError("v"))
        counters = {"allocated": 1, "reserved": 2, "active": 1, "inactive": 1}
        run._recorder.emit_background({"ts": 0, "seq": 0, "tag": "memory", "device_id": 0, "counters": counters})
    assert {"memory", "progress", "sample"} <= TAGS
    found: dict[str, set[str]] = {}
    for series, _, _ in recording.points():
        labels = {label.replace(".", "_") for label in series.attributes}
        found.setdefault(translated(series.name, series.unit, series.kind), set()).update(labels)
    return found


def sampled() -> dict[str, set[str]]:
    """Metric -> labels of what samplers and deliverers tell."""
    labels = {
        "system": {"system_memory_state", "disk_io_direction", "network_io_direction"},
        "process": set[str](),
        "hw": {"hw_id", "hw_name", "hw_type", "hw_gpu_clock_domain", "hw_gpu_link", "network_io_direction", "reason",
               "error_type"},
        "training": {"device_id"},
    }  # fmt: skip
    found = {
        translated(name, unit, kind): labels[name.partition(".")[0]] for name, (unit, kind) in samples.METRICS.items()
    }
    from stepspan.deliver import health

    for metric in (health.RECORDS, health.PENDING, health.LAG, health.HELD, health.LINES):
        name = translated(metric.name, metric.unit, metric.kind)
        found[name] = {"destination", "signal", "instance", *([metric.state] if metric.state else [])}
    return found


def recorded() -> dict[str, set[str]]:
    """Metric -> labels of the recording rules."""
    found: dict[str, set[str]] = {}
    for rule in grafana.rules("recording.yml"):
        by = re.search(r"by \(([\w, ]+)\)", rule["expr"])
        found[rule["record"]] = set(by[1].split(", ")) if by else {"job_id", "rank", "split"}
    return found
