"""The real counterparts of the end-to-end tests: Prometheus, the OpenTelemetry Collector and Loki, as processes.

`make stack` builds their binaries into `.stack/` (`$STEPSPAN_STACK` names another place). Both listen on loopback only,
keep their ports over a restart, and leave configuration, log and data in the directory they were given, for whoever
looks into a failure.

    with Prometheus(tmp_path / "prometheus") as prometheus, Collector(tmp_path / "collector", prometheus) as collector:
        send_to(collector.http_endpoint)
        assert prometheus.series('training_loss{job_id="j"}[2h]') == [({"job_id": "j", ...}, [(t_ms, 0.5)])]
        assert [span["name"] for span in collector.spans()] == ["training.step"]

`StackPrometheus`, `StackCollector` and `Loki` run the files of `collector-config` as they are committed, on loopback
addresses and directories of their own. Addresses stand when the object is made, so servers that point at each other are
made first and started then:

    prometheus = StackPrometheus(tmp_path / "prometheus")
    collector = StackCollector(tmp_path / "collector", "single.yaml", PROMETHEUS_OTLP=prometheus.otlp_endpoint)
    prometheus.scrapes.append(collector.metrics_address)
    with prometheus, collector: ...
"""

from __future__ import annotations

import base64
import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import requests
import yaml

from harness import remote_read
from harness.processes import under_load

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIGS = Path(__file__).parents[2] / "collector-config"

START_SECONDS = 30.0
STOP_SECONDS = 10.0


ASKED_BY_UNMARKED = False
"""Set by conftest while a test runs that isn't marked `stack`: it would fail where `make stack` was never run."""


def binary(name: str) -> Path:
    """The built binary of that name. Without it the test that asks is skipped, or fails where the stack is required."""
    if ASKED_BY_UNMARKED:
        pytest.fail(f"needs {name} of the stack: mark it with `pytest.mark.stack`")
    root = os.environ.get("STEPSPAN_STACK")
    path = (Path(root) if root else Path(__file__).parents[2] / ".stack").resolve() / name
    if not path.exists():
        reason = f"needs `make stack`: {path} is missing"
        required = os.environ.get("STEPSPAN_REQUIRE_STACK") == "1" and name != "loki"  # .ci/run may lack its time
        (pytest.fail if required else pytest.skip)(reason)
    return path


# Below the ephemeral range: a client that keeps calling a dead server on an ephemeral port is one day given that port
# as its own, connects to itself, and the server cannot come back. Shuffled by the system's random numbers, because
# tests seed Python's: two test runs at a time are not to ask for the same ports.
_ports = iter(random.SystemRandom().sample(range(20_000, 32_000), 12_000))


def free_address() -> str:
    """A loopback address nobody listens on, and no other server of this test run was given."""
    for port in _ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return f"127.0.0.1:{port}"
    raise RuntimeError("no free port left")


class Server:
    """One process of the stack: started until it answers, stopped or killed by its own pid, restarted on its ports."""

    name: str

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self._log = directory / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._http = requests.Session()
        self._http.trust_env = False  # a proxy in the environment is not for loopback

    def _command(self) -> list[str | Path]:
        raise NotImplementedError

    def _ready_url(self) -> str:
        raise NotImplementedError

    def _environment(self) -> dict[str, str]:
        """What its environment has beside the test's own."""
        return {}

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env={**os.environ, **self._environment()},
            )
        try:
            deadline = time.monotonic() + under_load(START_SECONDS)
            while not self._answers():
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{self.name} did not start:\n{self._log.read_text()[-4000:]}")
                time.sleep(0.02)
        except BaseException:  # a test's timeout and Ctrl-C too: nobody else would end the process
            self.kill()
            raise

    def _answers(self) -> bool:
        try:
            return self._http.get(self._ready_url(), timeout=1).ok
        except requests.RequestException:
            return False

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for a server that will not go."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: the server dies as it would of the OOM killer."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(under_load(STOP_SECONDS))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        self._http.close()

    def restart(self) -> None:
        """Killed and started again: same ports, same data."""
        self.kill()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


# ---------------------------------------------------------------------------------------------------- Prometheus


class Prometheus(Server):
    """A Prometheus that takes OTLP, with an empty database.

    `out_of_order_time_window` is how far behind the newest sample a point may arrive ("0s": not at all).
    """

    name = "prometheus"

    def __init__(self, directory: Path, out_of_order_time_window: str = "48h") -> None:
        super().__init__(directory)
        self.window = out_of_order_time_window
        self._binary = binary("prometheus")
        self._address = free_address()
        config = {
            "otlp": {"promote_resource_attributes": ["job_id", "rank", "local_rank", "world_size"]},
            "storage": {"tsdb": {"out_of_order_time_window": out_of_order_time_window}},
        }
        # JSON is YAML.
        (directory / "prometheus.yml").write_bytes(orjson.dumps(config))

    def _command(self) -> list[str | Path]:
        return [
            self._binary,
            "--config.file=prometheus.yml",
            "--storage.tsdb.path=data",
            # A test's points may carry any date.
            "--storage.tsdb.retention.time=100y",
            "--web.enable-otlp-receiver",
            "--enable-feature=exemplar-storage",
            f"--web.listen-address={self._address}",
        ]

    def _ready_url(self) -> str:
        return f"{self.url}/-/ready"

    @property
    def url(self) -> str:
        return f"http://{self._address}"

    @property
    def otlp_endpoint(self) -> str:
        """What OTEL_EXPORTER_OTLP_ENDPOINT takes; `/v1/metrics` is appended to it."""
        return f"{self.url}/api/v1/otlp"

    def query(self, promql: str, at: float | None = None) -> Any:
        """The `result` of an instant query as the API gives it, at `at` (Unix seconds; default: now)."""
        answer = self._http.post(
            f"{self.url}/api/v1/query", data={"query": promql} | ({} if at is None else {"time": repr(at)})
        )
        if not answer.ok:
            raise RuntimeError(f"{promql}: {answer.text}")
        return orjson.loads(answer.content)["data"]["result"]

    def series(self, selector: str, at: float | None = None) -> list[tuple[dict[str, str], list[tuple[int, float]]]]:
        """The float samples of a range selector such as `training_loss{rank="0"}[2h]`, as (labels, [(t_ms, value)]).

        The range reaches back from `at` (Unix seconds; default: now), its beginning excluded. PromQL hides markers of
        staleness; `dump` shows them.
        """
        return [
            (one["metric"], [(round(t * 1000), float(value)) for t, value in one.get("values", ())])
            for one in self.query(selector, at)
        ]

    def dump(self, job_id: str) -> list[tuple[str, int, str]]:
        """Every sample of the job, as sorted (series, t_ms, value): equal dumps mean equal data.

        A float's value is its shortest exact decimal, NaN with its bits, so that stale markers are told apart; a native
        histogram's is its count, sum and non-empty buckets. `remote_read` says what it cannot tell.
        """
        answer = self._http.post(f"{self.url}/api/v1/read", data=remote_read.request("job_id", job_id))
        if not answer.ok:
            raise RuntimeError(answer.text)
        return sorted(remote_read.samples(answer.content))


class StackPrometheus(Prometheus):
    """The Prometheus of docker-compose.yml: `stack/prometheus.yml` and the rules it names, scraping the Collectors at
    `scrapes` (host:port) once a second. `rule_files` replaces the rules."""

    def __init__(self, directory: Path, *, rule_files: Sequence[Path] | None = None) -> None:
        super().__init__(directory)
        self.scrapes: list[str] = []
        self._rule_files = rule_files

    def start(self) -> None:
        config = yaml.safe_load((CONFIGS / "stack" / "prometheus.yml").read_text())
        config["global"]["scrape_interval"] = "1s"
        rules = self._rule_files
        if rules is None:
            rules = [CONFIGS / "stack" / name for name in config["rule_files"]]
        config["rule_files"] = [str(file.resolve()) for file in rules]
        targets = {"collector": self.scrapes, "prometheus": [self._address]}
        for job in config["scrape_configs"]:
            job["static_configs"] = [{"targets": targets[job["job_name"]]}]
        (self.directory / "prometheus.yml").write_bytes(orjson.dumps(config))
        super().start()

    def exemplars(self, selector: str, start: float, end: float) -> list[dict[str, Any]]:
        """The exemplars of the series selected, between two times (Unix seconds), as the API gives them."""
        answer = self._http.get(
            f"{self.url}/api/v1/query_exemplars", params={"query": selector, "start": repr(start), "end": repr(end)}
        )
        if not answer.ok:
            raise RuntimeError(f"{selector}: {answer.text}")
        return [one for series in orjson.loads(answer.content)["data"] for one in series["exemplars"]]


# ----------------------------------------------------------------------------------------------------- Collector


class Collector(Server):
    """A Collector that writes every request it takes to a file, and hands metrics on to a Prometheus if there is one.

    Without `queued` the client gets Prometheus' refusal as its answer. With it the client gets 200, and the collector
    retries on its own.
    """

    name = "otelcol"

    def __init__(self, directory: Path, prometheus: Prometheus | None = None, *, queued: bool = False) -> None:
        super().__init__(directory)
        self._binary = binary("otelcol")
        self._prometheus = prometheus
        self._queued = queued
        self._starts = 0
        self._http_address, self._grpc_address, self._health_address = (free_address() for _ in range(3))

    def start(self) -> None:
        # A file for each start, so that a line torn by a kill never has another one written behind it.
        self._starts += 1
        config = self._config(f"requests-{self._starts:03d}.jsonl")
        (self.directory / "otelcol.yaml").write_bytes(orjson.dumps(config))
        super().start()

    def _command(self) -> list[str | Path]:
        return [self._binary, "--config=otelcol.yaml"]

    def _config(self, file: str) -> dict[str, Any]:
        exporters: dict[str, Any] = {
            # With `rotation` the exporter writes each request through before it is answered; without, it buffers, and a
            # kill would lose what the client was told is safe.
            "file": {"path": file, "rotation": {"max_megabytes": 1_000_000}},
        }
        if self._prometheus is not None:
            exporters["otlp_http/prometheus"] = {
                "endpoint": self._prometheus.otlp_endpoint,
                # One consumer: Prometheus is to see the requests in order.
                "sending_queue": {"enabled": self._queued, "num_consumers": 1},
                "retry_on_failure": {"enabled": self._queued, "initial_interval": "100ms"},
            }
        pipelines = {kind: {"receivers": ["otlp"], "exporters": ["file"]} for kind in ("traces", "logs", "metrics")}
        pipelines["metrics"]["exporters"] = list(exporters)
        return {
            "receivers": {
                "otlp": {
                    "protocols": {"grpc": {"endpoint": self._grpc_address}, "http": {"endpoint": self._http_address}}
                }
            },
            "exporters": exporters,
            "extensions": {"health_check": {"endpoint": self._health_address}},
            "service": {
                "extensions": ["health_check"],
                "pipelines": pipelines,
                "telemetry": {"metrics": {"level": "none"}},
            },
        }

    def _ready_url(self) -> str:
        return f"http://{self._health_address}/"

    @property
    def http_endpoint(self) -> str:
        """What OTEL_EXPORTER_OTLP_ENDPOINT takes for http/protobuf and http/json."""
        return f"http://{self._http_address}"

    @property
    def grpc_endpoint(self) -> str:
        """What OTEL_EXPORTER_OTLP_ENDPOINT takes for grpc; the scheme says that it is plaintext."""
        return f"http://{self._grpc_address}"

    def spans(self) -> list[dict[str, Any]]:
        """Every span answered so far, in order of arrival: as `plain` gives it, and its resource's attributes under
        `resource`."""
        return list(self._records("resourceSpans", "scopeSpans", "spans"))

    def logs(self) -> list[dict[str, Any]]:
        """Every log record, likewise."""
        return list(self._records("resourceLogs", "scopeLogs", "logRecords"))

    def metric_points(self) -> list[dict[str, Any]]:
        """Every data point, likewise, with its `metric` (the name), `unit` and `type` ("gauge", "sum", ...); also those
        that Prometheus then refused."""
        return [
            {"attributes": {}, "resource": metric["resource"]}
            | {"metric": metric["name"], "unit": metric.get("unit", ""), "type": kind}
            | point
            for metric in self._records("resourceMetrics", "scopeMetrics", "metrics")
            for kind, data in metric.items()
            if isinstance(data, dict) and "dataPoints" in data
            for point in data["dataPoints"]
        ]

    def _records(self, by_resource: str, by_scope: str, records: str) -> Iterator[dict[str, Any]]:
        for file in sorted(self.directory.glob("requests-*.jsonl")):
            whole, _, _ = file.read_bytes().rpartition(b"\n")
            for line in whole.splitlines():
                for group in orjson.loads(line).get(by_resource, ()):
                    resource = plain("attributes", group["resource"].get("attributes", []))
                    for scope in group.get(by_scope, ()):
                        for record in scope.get(records, ()):
                            yield {"attributes": {}, "resource": resource} | plain(records, record)


class StackCollector(Collector):
    """A Collector that runs a file of `collector-config` (`single.yaml`, `agent.yaml`, `gateway.yaml`).

    `environment` is what the file reads as ${env:NAME}; its own addresses and the queue's directory are filled in. With
    `record` a file exporter stands beside the file's own exporters: `spans`, `logs`, `metric_points` tell what came.
    """

    def __init__(self, directory: Path, file: str, *, record: bool = True, **environment: str) -> None:
        super().__init__(directory)
        self.metrics_address = free_address()
        self._file = CONFIGS / file
        self._record = record
        metrics_host, _, metrics_port = self.metrics_address.partition(":")
        self._own = {
            "COLLECTOR_OTLP_GRPC": self._grpc_address,
            "COLLECTOR_OTLP_HTTP": self._http_address,
            "COLLECTOR_HEALTH": self._health_address,
            "COLLECTOR_METRICS_HOST": metrics_host,
            "COLLECTOR_METRICS_PORT": metrics_port,
            "COLLECTOR_QUEUE_DIRECTORY": str(directory / "queue"),
        } | environment

    def _environment(self) -> dict[str, str]:
        return self._own

    def _command(self) -> list[str | Path]:
        return [self._binary, f"--config={self._file}", "--config=otelcol.yaml"]

    def _config(self, file: str) -> dict[str, Any]:
        """What is merged over the file: maps are merged, lists replaced."""
        pipelines = yaml.safe_load(self._file.read_text())["service"]["pipelines"]
        if not self._record:
            return {}
        return {
            "exporters": {"file": {"path": file, "rotation": {"max_megabytes": 1_000_000}}},
            "service": {
                "pipelines": {
                    kind: {"exporters": [*pipeline["exporters"], "file"]} for kind, pipeline in pipelines.items()
                }
            },
        }

    @property
    def grpc_target(self) -> str:
        """`host:port`, as COLLECTOR_GATEWAYS takes it: f"[{gateway.grpc_target}]"."""
        return self._grpc_address


# Numbers that OTLP JSON writes as strings: 64-bit integers always, floats when they are NaN or infinite.
_INTEGERS = frozenset({"asInt", "bucketCounts", "count", "intValue", "zeroCount"})
_FLOATS = frozenset({"asDouble", "doubleValue", "explicitBounds", "max", "min", "sum", "zeroThreshold"})


def plain(field: str, value: Any) -> Any:
    """A field of OTLP JSON as Python data under OTLP's names: attributes are a dict, numbers and times are numbers."""
    if field in ("attributes", "filteredAttributes"):
        return {entry["key"]: _any_value(entry.get("value", {})) for entry in value}
    if field == "body":
        return _any_value(value)
    if isinstance(value, list):
        return [plain(field, item) for item in value]
    if isinstance(value, dict):
        return {name: plain(name, item) for name, item in value.items()}
    if field in _INTEGERS or field.endswith("UnixNano"):
        return int(value)
    if field in _FLOATS:
        return float(value)
    return value


def _any_value(value: dict[str, Any]) -> Any:
    for kind, content in value.items():
        if kind == "arrayValue":
            return [_any_value(item) for item in content.get("values", ())]
        if kind == "kvlistValue":
            return plain("attributes", content.get("values", []))
        if kind == "bytesValue":
            return base64.b64decode(content)
        return plain(kind, content)
    return None


# ---------------------------------------------------------------------------------------------------------- Loki


class Loki(Server):
    """The Loki of docker-compose.yml: `stack/loki.yaml` with an empty directory."""

    name = "loki"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._binary = binary("loki")
        self._address = free_address()
        host, _, port = self._address.partition(":")
        inner = free_address()
        config = yaml.safe_load((CONFIGS / "stack" / "loki.yaml").read_text().replace("/loki", str(directory / "data")))
        config["server"] |= {
            "http_listen_address": host,
            "http_listen_port": int(port),
            "grpc_listen_port": int(inner.partition(":")[2]),
        }
        config["frontend_worker"]["frontend_address"] = inner
        # Ready as soon as it is: it would wait 15 s for others that may join.
        config["ingester"]["lifecycler"] = {"min_ready_duration": "0s"}
        config["memberlist"] = {"bind_addr": [host], "bind_port": int(free_address().partition(":")[2])}
        (directory / "loki.yaml").write_bytes(orjson.dumps(config))

    def _command(self) -> list[str | Path]:
        return [self._binary, "-config.file=loki.yaml"]

    def _ready_url(self) -> str:
        return f"{self.url}/ready"

    @property
    def url(self) -> str:
        return f"http://{self._address}"

    @property
    def otlp_endpoint(self) -> str:
        """What LOKI_OTLP takes; `/v1/logs` is appended to it."""
        return f"{self.url}/otlp"

    def query(self, logql: str, start: float, end: float) -> list[tuple[dict[str, str], list[tuple[int, str]]]]:
        """Lines between two times (Unix seconds), as (labels and structured metadata, [(t_ns, line)])."""
        answer = self._http.get(
            f"{self.url}/loki/api/v1/query_range",
            params={"query": logql, "start": f"{start:.0f}", "end": f"{end:.0f}", "limit": "1000"},
        )
        if not answer.ok:
            raise RuntimeError(f"{logql}: {answer.text}")
        streams = orjson.loads(answer.content)["data"]["result"]
        return [(one["stream"], [(int(t), line) for t, line, *_ in one["values"]]) for one in streams]


# --------------------------------------------------------------------------------------------------------- Tempo


def tempo_binary() -> Path:
    """A `tempo` that somebody put beside the built binaries. `make stack` can't build it: Go's module proxy serves no
    version of it, so tests that ask are skipped even where the stack is required."""
    path = binary("prometheus").with_name("tempo")
    if not path.exists():
        pytest.skip(f"needs Tempo 3, which can't be built as a Go module: put a release's binary at {path}")
    return path


class Tempo(Server):
    """The Tempo of docker-compose.yml: `stack/tempo.yaml` with an empty directory."""

    name = "tempo"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._binary = tempo_binary()
        self._address, self.otlp_target = free_address(), free_address()
        host, _, port = self._address.partition(":")
        text = (CONFIGS / "stack" / "tempo.yaml").read_text().replace("/var/tempo", str(directory / "data"))
        config = yaml.safe_load(text)
        config["server"] |= {
            "http_listen_address": host,
            "http_listen_port": int(port),
            "grpc_listen_address": host,
            "grpc_listen_port": int(free_address().partition(":")[2]),
        }
        config["distributor"]["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"] = self.otlp_target
        # A search finds what has just come.
        config["query_frontend"]["query_end_cutoff"] = "0s"
        (directory / "tempo.yaml").write_bytes(orjson.dumps(config))

    def _command(self) -> list[str | Path]:
        return [self._binary, "-config.file=tempo.yaml"]

    def _ready_url(self) -> str:
        return f"{self.url}/ready"

    @property
    def url(self) -> str:
        return f"http://{self._address}"

    def search(self, traceql: str, start: float, end: float) -> list[dict[str, Any]]:
        """The traces found between two times (Unix seconds), as the API gives them."""
        answer = self._http.get(
            f"{self.url}/api/search", params={"q": traceql, "start": f"{start:.0f}", "end": f"{end:.0f}"}
        )
        if not answer.ok:
            raise RuntimeError(f"{traceql}: {answer.text}")
        return orjson.loads(answer.content).get("traces") or []
