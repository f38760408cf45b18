"""What ships for running the backends: each configuration against its own program, and then with a run through it."""

from __future__ import annotations

import re
import subprocess
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from harness import runs
from harness.processes import until
from harness.received import attributes
from harness.receiver import ScriptedReceiver
from harness.stack import CONFIGS, Loki, StackCollector, StackPrometheus, Tempo, binary, tempo_binary

from stepspan.exporters.otlp import OtlpExporter
from stepspan.mapping.records import Signal
from stepspan.otlp.outcome import Verdict

start = runs.start
ROOT = CONFIGS.parent
STACK = CONFIGS / "stack"
COLLECTORS = ["agent.yaml", "gateway.yaml", "single.yaml"]
DATASOURCES = yaml.safe_load((STACK / "grafana/provisioning/datasources/datasources.yml").read_text())["datasources"]
VARIABLE = re.compile(r"\$\{env:(\w+)(?::-([^}]*))?\}")


def check(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


# ------------------------------------------------------------------------------------- each by its own program


@pytest.mark.stack
@pytest.mark.parametrize("file", COLLECTORS)
def test_the_collector_accepts(file: str) -> None:
    done = check(binary("otelcol"), "validate", f"--config={CONFIGS / file}")
    assert done.returncode == 0, done.stderr
    typo = f"yaml:exporters::{'load_balancing/metrics' if file == 'agent.yaml' else 'otlp_http/loki'}::timeot: 1s"
    assert check(binary("otelcol"), "validate", f"--config={CONFIGS / file}", f"--config={typo}").returncode != 0


@pytest.mark.stack
def test_the_agent_takes_a_list_of_gateways() -> None:
    environment = {"COLLECTOR_GATEWAYS": "[gateway-0:4317, gateway-1:4317]"}
    done = check(binary("otelcol"), "print-config", f"--config={CONFIGS / 'agent.yaml'}", **environment)
    exporters = yaml.safe_load(done.stdout)["exporters"]
    assert [one["resolver"]["static"]["hostnames"] for one in exporters.values()] == [
        ["gateway-0:4317", "gateway-1:4317"]
    ] * 3


@pytest.mark.stack
def test_an_agent_hands_on_a_request_of_a_host_as_one_and_always_the_same_way(tmp_path: Path) -> None:
    hosts = [f"node{number}" for number in range(12)]
    kinds: dict[Signal, str] = {"metrics": "resource_metrics", "logs": "resource_logs"}
    with ScriptedReceiver() as one, ScriptedReceiver() as other:
        gateways = f"[{one.grpc_target}, {other.grpc_target}]"
        with StackCollector(tmp_path, "agent.yaml", record=False, COLLECTOR_GATEWAYS=gateways) as agent:
            with closing(OtlpExporter(agent.http_endpoint, env={})) as exporter:
                for host in [*hosts, *hosts]:
                    for signal, body in requests_of(host, ranks=8).items():
                        assert exporter.send_json(signal, body).verdict is Verdict.DELIVERED
            until(lambda: all(len(one.requests[kind]) + len(other.requests[kind]) >= 24 for kind in kinds), 20)
            for kind, field in kinds.items():
                ways: dict[str, set[int]] = {}
                for receiver in (one, other):
                    for request in receiver.requests[kind]:
                        resources = [attributes(each.resource) for each in getattr(request, field)]
                        [host] = {each["host.name"] for each in resources}
                        assert len(resources) == 8
                        ways.setdefault(host, set()).add(id(receiver))
                assert sorted(ways) == sorted(hosts)
                assert all(len(way) == 1 for way in ways.values())
                assert len(set.union(*ways.values())) == 2


def requests_of(host: str, ranks: int) -> dict[Signal, bytes]:
    """A request of metrics and one of logs, each of all ranks of a host, as OTLP JSON."""
    point = {"timeUnixNano": str(time.time_ns()), "asDouble": 1.0}
    metrics = [{"metrics": [{"name": "training.loss", "gauge": {"dataPoints": [point]}}]}]
    logs = [{"logRecords": [{"timeUnixNano": str(time.time_ns()), "body": {"stringValue": "x"}}]}]
    named = [{"host.name": host, "rank": str(rank)} for rank in range(ranks)]
    about = [{"attributes": [{"key": key, "value": {"stringValue": each[key]}} for key in each]} for each in named]
    return {
        "metrics": orjson.dumps({"resourceMetrics": [{"resource": each, "scopeMetrics": metrics} for each in about]}),
        "logs": orjson.dumps({"resourceLogs": [{"resource": each, "scopeLogs": logs} for each in about]}),
    }


@pytest.mark.stack
@pytest.mark.parametrize("file", COLLECTORS)
def test_what_a_collector_accepted_is_never_given_up(file: str) -> None:
    done = check(binary("otelcol"), "print-config", f"--config={CONFIGS / file}")
    for name, exporter in yaml.safe_load(done.stdout)["exporters"].items():
        retry, queue = exporter["retry_on_failure"], exporter["sending_queue"]
        assert retry["enabled"], name
        assert retry["max_elapsed_time"] == "0s", name
        assert retry["multiplier"] > 1, name
        assert queue["storage"] == "file_storage/queue", name
        assert queue["block_on_overflow"], name
        assert queue["batch"] is None, "one bad point would take the good ones of its batch with it"


@pytest.mark.stack
def test_prometheus_accepts_its_configuration_and_its_rules() -> None:
    done = check(binary("promtool"), "check", "config", "--lint=all", "--lint-fatal", STACK / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.stack
def test_loki_accepts_its_configuration(tmp_path: Path) -> None:
    adjusted = tmp_path / "loki.yaml"
    adjusted.write_text((STACK / "loki.yaml").read_text().replace("/loki", str(tmp_path)))
    done = check(binary("loki"), "-verify-config", f"-config.file={adjusted}")
    assert done.returncode == 0, done.stderr


@pytest.mark.stack
def test_tempo_accepts_its_configuration() -> None:
    done = check(tempo_binary(), "-config.verify=true", f"-config.file={STACK / 'tempo.yaml'}")
    assert done.returncode == 0, done.stderr


@pytest.mark.stack
def test_compose_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    (tmp_path / "docker-compose.yml").write_text(text.replace("read_only:", "readonly:"))
    done = check(binary("compose-check"), tmp_path / "docker-compose.yml")
    assert "collector" in done.stderr
    assert done.returncode != 0


# ----------------------------------------------------------------------------------------------- docker-compose


@pytest.fixture(scope="module")
def services() -> Any:
    """The services of docker-compose.yml, as the Compose Specification's loader understands them."""
    done = check(binary("compose-check"), "--format", "json", "docker-compose.yml")
    assert done.returncode == 0, done.stderr
    return orjson.loads(done.stdout)["services"]


@pytest.mark.stack
def test_every_path_that_is_mounted_exists_and_is_read_only(services: dict[str, Any]) -> None:
    mounts = [mount for service in services.values() for mount in service.get("volumes", ())]
    binds = [mount for mount in mounts if mount["type"] == "bind"]
    assert {"bind", "volume"} == {mount["type"] for mount in mounts}
    assert [mount["source"] for mount in binds if not Path(mount["source"]).exists()] == []
    assert all(mount["read_only"] for mount in binds)


@pytest.mark.stack
def test_ports_are_published_on_loopback_only(services: dict[str, Any]) -> None:
    published = {name: [port["host_ip"] for port in service["ports"]] for name, service in services.items()}
    assert {host for hosts in published.values() for host in hosts} == {"127.0.0.1"}
    assert not any(service.get("network_mode") for service in services.values())


@pytest.mark.stack
def test_images_are_pinned_to_the_versions_that_the_tests_run(services: dict[str, Any]) -> None:
    tags = {name: service["image"].partition(":")[2] for name, service in services.items()}
    assert all(re.fullmatch(r"v?\d+\.\d+\.\d+", tag) for tag in tags.values()), tags
    builder = yaml.safe_load((CONFIGS / "builder.yaml").read_text())
    assert tags["collector"] == builder["dist"]["version"]
    assert f"github.com/grafana/loki/v3 v{tags['loki']} " in (CONFIGS / "loki" / "go.mod").read_text()
    # Prometheus 3.x.y is the Go module 0.3xx.y.
    major, minor, patch = tags["prometheus"].removeprefix("v").split(".")
    module = f"github.com/prometheus/prometheus v0.{major}{minor:0>2}.{patch} "
    assert module in (CONFIGS / "prometheus" / "go.mod").read_text()


@pytest.mark.stack
def test_every_service_comes_back_is_limited_and_may_gain_no_privileges(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}, name
        assert "no-new-privileges:true" in service["security_opt"], name
    # The Collector's image holds one program and nothing that could ask it.
    assert {name for name, service in services.items() if "healthcheck" not in service} == {"collector"}
    healthy = {name for name, one in services["grafana"]["depends_on"].items() if one["condition"] == "service_healthy"}
    assert healthy == {"prometheus", "loki"}


@pytest.mark.stack
def test_grafana_has_no_password_that_anybody_knows(services: dict[str, Any]) -> None:
    environment = services["grafana"]["environment"]
    assert not [name for name in environment if "PASSWORD" in name]
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] in {"Viewer", "Editor"}


@pytest.mark.stack
def test_compose_sets_only_what_the_collector_reads(services: dict[str, Any]) -> None:
    known = {name for name, _ in VARIABLE.findall((CONFIGS / "single.yaml").read_text())}
    assert set(services["collector"]["environment"]) - {"GOMEMLIMIT"} <= known


# ------------------------------------------------------------------------------------------- what they agree on


@pytest.mark.parametrize("file", COLLECTORS)
def test_every_setting_has_a_default_and_stands_in_the_readme(file: str) -> None:
    readme = (CONFIGS / "README.md").read_text()
    lines = (CONFIGS / file).read_text().splitlines()
    found = VARIABLE.findall("\n".join(line for line in lines if not line.lstrip().startswith("#")))
    assert {"COLLECTOR_QUEUE_DIRECTORY", "COLLECTOR_OTLP_GRPC"} <= {name for name, _ in found}
    for name, default in found:
        assert yaml.safe_load(default) is not None, f"{name} has no default"
        assert f"`{name}`" in readme


def test_the_slim_collector_holds_what_the_configurations_use_and_no_more() -> None:
    builder = yaml.safe_load((CONFIGS / "builder.yaml").read_text())
    held = Counter(kind for kind in ("receivers", "processors", "exporters", "extensions") for _ in builder[kind])
    used: dict[str, set[str]] = {kind: set() for kind in held}
    # What tests and examples add: replaying exported files, keeping what came, looking at it.
    used["receivers"] |= {"otlp_json_file"}
    used["exporters"] |= {"file", "debug"}
    for file in COLLECTORS:
        config = yaml.safe_load((CONFIGS / file).read_text())
        for kind in held:
            used[kind] |= {name.partition("/")[0] for name in config.get(kind, ())}
    assert {kind: len(names) for kind, names in used.items()} == held
    versions = {part["gomod"].rpartition(" v")[2] for kind in held for part in builder[kind]}
    assert versions == {builder["dist"]["version"]}


def test_datasources_lead_to_each_other_and_dashboards_ask_no_others() -> None:
    by_uid = {one["uid"]: one["jsonData"] for one in DATASOURCES}
    assert list(by_uid) == ["prometheus", "tempo", "loki"]
    assert by_uid["prometheus"]["exemplarTraceIdDestinations"][0]["datasourceUid"] == "tempo"
    assert by_uid["tempo"]["tracesToMetrics"]["datasourceUid"] == "prometheus"
    assert by_uid["tempo"]["tracesToLogsV2"]["datasourceUid"] == "loki"
    assert by_uid["loki"]["derivedFields"][0]["datasourceUid"] == "tempo"
    asked = {
        str(uid)
        for file in (STACK / "dashboards").glob("*.json")
        for uid in _values(orjson.loads(file.read_bytes()), "datasource", "uid")
    }
    # Grafana's own, for annotations and panels that read another panel.
    assert asked - {"-- Grafana --", "-- Dashboard --", "grafana"} <= set(by_uid)


def _values(node: Any, parent: str, name: str) -> list[Any]:
    if isinstance(node, list):
        return [value for item in node for value in _values(item, parent, name)]
    if not isinstance(node, dict):
        return []
    here = [node[parent][name]] if isinstance(node.get(parent), dict) and name in node[parent] else []
    return here + [value for item in node.values() for value in _values(item, parent, name)]


def test_what_grafana_itself_would_expand_is_escaped() -> None:
    text = (STACK / "grafana/provisioning/datasources/datasources.yml").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert not re.search(r"(?<!\$)\$(?!\$)", "\n".join(lines).replace("$$", ""))


def test_the_dashboards_are_mounted_where_grafana_looks() -> None:
    provider = yaml.safe_load((STACK / "grafana/provisioning/dashboards/dashboards.yml").read_text())["providers"][0]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]
    assert f"./collector-config/stack/dashboards:{provider['options']['path']}:ro" in compose["volumes"]
    home = Path(compose["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert (STACK / "dashboards" / home.name).exists()


# --------------------------------------------------------------------------------------------------- with a run


def train(start: Any, endpoint: str, directory: Path, *, rank: int = 0, steps: int = 4, **settings: Any) -> None:
    """One rank of a job of two, delivered when this returns."""
    with start(
        endpoint=endpoint, directory=directory, job_id="job", rank=rank, local_rank=rank, world_size=2, **settings
    ) as run:
        run.log_hyperparams({"lr": 0.1, "model": "tiny"})
        for n in range(steps):
            with run.step(n):
                run.log_metrics({"loss": 1 / (n + 1)})
                time.sleep(0.002)  # Prometheus tells points apart by the millisecond
        run.log_error(ValueError("bad sample"))
    done = runs.command("sync", directory, "--endpoint", endpoint)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.stack
def test_single_moves_a_run_to_prometheus_with_identity_exemplars_and_the_queue_in_sight(
    start: Any, tmp_path: Path
) -> None:
    prometheus = StackPrometheus(tmp_path / "prometheus")
    collector = StackCollector(tmp_path / "collector", "single.yaml", PROMETHEUS_OTLP=prometheus.otlp_endpoint)
    prometheus.scrapes.append(collector.metrics_address)
    began = time.time()
    with prometheus, collector:
        train(start, collector.http_endpoint, tmp_path / "runs", rank=1)
        found = until(lambda: prometheus.series('training_loss{job_id="job"}[1h]'))
        ((labels, samples),) = found
        assert {name: labels[name] for name in ("rank", "local_rank", "world_size", "instance", "split")} == {
            "rank": "1", "local_rank": "1", "world_size": "2", "instance": "job-1", "split": "train",
        }  # fmt: skip
        assert labels["host_name"]
        assert [value for _, value in samples] == [1, 1 / 2, 1 / 3, 1 / 4]
        traces = {span["traceId"] for span in collector.spans() if span["name"] == "training.step"}
        exemplars = until(lambda: prometheus.exemplars("training_step_duration_seconds", began - 1, time.time() + 1))
        assert {one["labels"]["trace_id"] for one in exemplars} <= traces
        queue = until(lambda: prometheus.query("otelcol_exporter_queue_size"))
        assert {one["metric"]["exporter"] for one in queue} >= {"otlp_http/prometheus", "otlp_grpc/tempo"}
        log = (tmp_path / "collector" / "otelcol.log").read_text()
        assert "deprecated" not in log.lower()


@pytest.mark.stack
def test_single_makes_hyperparameters_and_errors_visible_in_loki(start: Any, loki: Loki, tmp_path: Path) -> None:
    began = time.time() - 5
    with StackCollector(tmp_path / "collector", "single.yaml", LOKI_OTLP=loki.otlp_endpoint) as collector:
        train(start, collector.http_endpoint, tmp_path / "runs", rank=1)
        until(lambda: len(loki.query('{job_id="job"}', began, time.time() + 5)) >= 2)
        ask = lambda event: loki.query(f'{{job_id="job", rank="1"}} | event_name="{event}"', began, time.time() + 5)  # noqa: E731
        ((labels, [(_, line)]),) = ask("training.hyperparams")  # type: ignore[no-untyped-call]
        assert (labels["service_name"], labels["job_id"], labels["rank"]) == ("training", "job", "1")
        assert orjson.loads(line) == {"lr": 0.1, "model": "tiny"}
        ((labels, [(_, line)]),) = ask("exception")  # type: ignore[no-untyped-call]
        assert line == "ValueError: bad sample"
        assert labels["exception_type"] == "ValueError"
        traces = {span["traceId"] for span in collector.spans()}
        assert labels["trace_id"] in traces


@pytest.mark.stack
def test_single_moves_traces_to_tempo(start: Any, tempo: Tempo, tmp_path: Path) -> None:
    began = time.time() - 5
    with StackCollector(tmp_path / "collector", "single.yaml", TEMPO_OTLP=tempo.otlp_target) as collector:
        train(start, collector.http_endpoint, tmp_path / "runs")
        traceql = '{ resource.job_id="job" && span:name="training.step" }'
        assert len(until(lambda: tempo.search(traceql, began, time.time() + 5))) == 4


@pytest.mark.stack
def test_what_single_accepted_outlives_its_own_death_and_the_absence_of_the_store(start: Any, tmp_path: Path) -> None:
    prometheus = StackPrometheus(tmp_path / "prometheus")
    collector = StackCollector(tmp_path / "collector", "single.yaml", PROMETHEUS_OTLP=prometheus.otlp_endpoint)
    with collector:
        train(start, collector.http_endpoint, tmp_path / "runs")
        collector.kill()
        with prometheus:
            collector.start()
            ((_, samples),) = until(lambda: prometheus.series('training_loss{job_id="job"}[1h]'))
            assert [value for _, value in samples] == [1, 1 / 2, 1 / 3, 1 / 4]


@pytest.mark.stack
def test_what_an_agent_accepted_outlives_its_own_death_and_the_absence_of_the_gateway(
    start: Any, tmp_path: Path
) -> None:
    with StackPrometheus(tmp_path / "prometheus") as prometheus:
        gateway = StackCollector(tmp_path / "gateway", "gateway.yaml", PROMETHEUS_OTLP=prometheus.otlp_endpoint)
        agent = StackCollector(tmp_path / "agent", "agent.yaml", COLLECTOR_GATEWAYS=f"[{gateway.grpc_target}]")
        with agent:
            train(start, agent.http_endpoint, tmp_path / "runs")
            agent.restart()
            with gateway:
                until(lambda: prometheus.series('training_loss{job_id="job"}[1h]'))
                until(lambda: len(gateway.spans()) >= len(agent.spans()))
                until(lambda: len(gateway.logs()) >= len(agent.logs()))
        ((_, samples),) = prometheus.series('training_loss{job_id="job"}[1h]')
        assert [value for _, value in samples] == [1, 1 / 2, 1 / 3, 1 / 4]


@pytest.mark.stack
def test_agents_send_a_host_and_a_trace_each_to_one_gateway(start: Any, tmp_path: Path) -> None:
    with StackPrometheus(tmp_path / "prometheus") as prometheus:
        gateways = [
            StackCollector(tmp_path / f"gateway-{n}", "gateway.yaml", PROMETHEUS_OTLP=prometheus.otlp_endpoint)
            for n in range(2)
        ]
        listed = f"[{', '.join(gateway.grpc_target for gateway in gateways)}]"
        with gateways[0], gateways[1], StackCollector(
            tmp_path / "agent", "agent.yaml", COLLECTOR_GATEWAYS=listed
        ) as agent:  # fmt: skip
            for rank in range(2):
                train(
                    start, agent.http_endpoint, tmp_path / "runs", rank=rank, steps=30, resource={"host.name": "a-node"}
                )
            until(
                lambda: len(prometheus.query('sum by (rank) (count_over_time(training_loss{job_id="job"}[1h]))')) == 2
            )
            until(lambda: sum(len(gateway.spans()) for gateway in gateways) >= len(agent.spans()))
            until(lambda: sum(len(gateway.metric_points()) for gateway in gateways) >= len(agent.metric_points()))
        points = [[p for p in gateway.metric_points() if "rank" in p["resource"]] for gateway in gateways]
        ranks = [{point["resource"]["rank"] for point in some} for some in points]
        assert sorted(ranks, key=len) == [set(), {0, 1}]
        steps = [{span["traceId"] for span in gateway.spans()} for gateway in gateways]
        assert all(steps), "30 steps' traces are shared out"
        assert not steps[0] & steps[1]
        resources = [point["resource"] for some in points for point in some]
        assert {resource["host.name"] for resource in resources} == {"a-node"}
        assert all("os.type" in resource for resource in resources), "the agent adds what was not told"
