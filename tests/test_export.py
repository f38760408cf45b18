"""`stepspan export`: the same records as delivery, as lines that the Collector's file receiver takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.delivery import Training
from harness.processes import under_load, until
from harness.runs import command, is_ours
from harness.stack import Collector
from test_opentelemetry import user_span

LONGEST = 1 << 20


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Two ranks of a job, one of which was killed in a step, with records of other instrumentation."""
    for rank in (0, 1):
        training = Training(tmp_path / "runs", rank=rank, session=f"00000000000000a{rank}")
        training.steps(30, value=lambda n: "NaN" if n == 20 else 1.0 / (n + 1))
        step = training.emit("step_begin", parent=training.run, step=30, split="train")
        training.emit("otel", parent=step, **user_span("f" * 32, f"query of {rank}"))
        training.emit("otel", signal="logs", scope={}, record={"observedTimeUnixNano": "5", "body": {"intValue": "1"}})
        for time in (training.now, training.now + 10**9):
            point = {"timeUnixNano": str(time), "startTimeUnixNano": "1", "asInt": "7"}
            data = {"aggregationTemporality": 2, "isMonotonic": True, "dataPoints": [point]}
            training.emit("otel", signal="metrics", scope={"name": "lib"}, record={"name": "things", "sum": data})
        session = training.die() if rank else training.end()
        for segment in session.path.glob("*.jsonl"):
            os.utime(segment, (0, 0))  # silent for long: a session of another host that is not closed is dead
    return tmp_path / "runs"


def lines(content: str | bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """(the signal's field, the request) of each line."""
    for line in content.splitlines():
        assert len(line) < LONGEST
        ((field, _),) = (request := json.loads(line)).items()
        yield field, request


def names(content: str | bytes, field: str, scoped: str, records: str) -> list[str]:
    return sorted(
        record["name"]
        for kind, request in lines(content)
        if kind == field
        for scope in request[field][0][scoped]
        for record in scope[records]
    )


def records_of(content: str) -> list[str]:
    """All points, spans and log records, each with its resource, its scope and, if it has one, its metric: in order,
    whatever requests they stand in."""
    found = []
    for _, request in lines(content):
        for of_resource in next(iter(request.values())):
            resource = of_resource.pop("resource")
            for of_scope in next(iter(of_resource.values())):
                scope = of_scope.pop("scope")
                for record in next(iter(of_scope.values())):
                    data = next(
                        (part for part in record.values() if isinstance(part, dict) and "dataPoints" in part), {}
                    )
                    for point in data.pop("dataPoints", [None]):
                        found.append(json.dumps([resource, scope, record, point], sort_keys=True))
    return sorted(found)


def test_everything_goes_to_standard_output_and_the_journal_stays_as_it_is(journal: Path) -> None:
    before = sorted(map(str, journal.rglob("*")))
    told = command("export", journal, "--to", "otlp-json")
    assert told.returncode == 0, told.stderr
    assert {field for field, _ in lines(told.stdout)} == {"resourceMetrics", "resourceSpans", "resourceLogs"}
    spans = names(told.stdout, "resourceSpans", "scopeSpans", "spans")
    assert {"query of 0", "query of 1", "training.run"} <= set(spans)
    assert spans.count("training.step") == 62
    assert told.stderr.startswith("stepspan: exported ")
    assert " 66 traces" in told.stderr
    assert sorted(map(str, journal.rglob("*"))) == before
    again = command("export", journal)
    assert records_of(again.stdout) == records_of(told.stdout)


def test_one_signal_of_one_session_to_a_file(journal: Path, tmp_path: Path) -> None:
    (session,) = journal.rglob("rank-00000-*")
    out = tmp_path / "spans.jsonl"
    told = command("export", session, "--output", out, "--signal", "traces")
    assert told.returncode == 0, told.stderr
    assert told.stdout == ""
    assert "query of 0" in names(out.read_bytes(), "resourceSpans", "scopeSpans", "spans")
    assert [field for field, _ in lines(out.read_bytes())] == ["resourceSpans"]
    assert list(tmp_path.glob(".*")) == []


def test_a_directory_gets_a_file_for_each_signal(journal: Path, tmp_path: Path) -> None:
    told = command("export", journal, "--output", f"{tmp_path}/new/", "--signal", "logs", "--signal", "metrics")
    assert told.returncode == 0, told.stderr
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["logs.jsonl", "metrics.jsonl"]


def test_a_batch_that_fills_more_than_a_line_becomes_several(tmp_path: Path) -> None:
    training = Training(tmp_path / "runs")
    for number in range(300):
        training.emit("otel", **user_span("f" * 32, f"{number}", attributes=[
            {"key": "k", "value": {"stringValue": "x" * 20_000}}
        ]))  # fmt: skip
    training.end()
    told = command("export", tmp_path / "runs")
    assert told.returncode == 0, told.stderr
    found = list(lines(told.stdout))
    assert len(names(told.stdout, "resourceSpans", "scopeSpans", "spans")) == 301
    assert sum(field == "resourceSpans" for field, _ in found) > 5
    assert "over 1 MiB" not in told.stderr


def test_a_record_that_fills_a_line_by_itself_is_told_of(tmp_path: Path) -> None:
    training = Training(tmp_path / "runs")
    training.emit("otel", **user_span("f" * 32, "x" * LONGEST))
    training.end()
    told = command("export", tmp_path / "runs")
    assert told.returncode == 0
    assert "1 records fill over 1 MiB each" in told.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        pytest.param(["{journal}", "--to", "csv"], 2, "known is otlp-json", id="a format that nobody knows"),
        pytest.param(["{journal}", "--signal", "spans"], 2, "known are metrics, traces, logs", id="a signal"),
        pytest.param(["{journal}/nowhere"], 2, "not a directory", id="a path that is not there"),
        pytest.param(["{tmp}/empty"], 1, "no journal at or below", id="a directory without a journal"),
        pytest.param(["{journal}", "--output", "{tmp}/no/file"], 1, "No such file", id="a file in no directory"),
    ],
)
def test_what_is_wrong_is_said(journal: Path, tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    (tmp_path / "empty").mkdir()
    told = command("export", *(argument.format(journal=journal, tmp=tmp_path) for argument in arguments))
    assert told.returncode == code, told.stderr
    assert said in told.stderr
    assert "Traceback" not in told.stderr


def test_a_full_disk_leaves_no_file(journal: Path) -> None:
    with open("/dev/full", "wb") as full:
        told = subprocess.run(
            [sys.executable, "-m", "stepspan", "export", journal], stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert told.returncode == 1
    assert b"No space left" in told.stderr
    assert b"Traceback" not in told.stderr


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path: Path) -> None:
    training = Training(tmp_path / "runs")
    training.steps(2000)
    training.end()
    with subprocess.Popen(
        [sys.executable, "-m", "stepspan", "export", tmp_path / "runs"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 1


# the real Collector


class FileCollector(Collector):
    """A Collector that reads the files of a directory."""

    def __init__(self, directory: Path, files: Path) -> None:
        super().__init__(directory)
        self._files = files

    def _config(self, file: str) -> dict[str, Any]:
        config = super()._config(file)
        config["receivers"] = {
            "otlp_json_file": {
                "include": [f"{self._files}/*.jsonl"],
                "start_at": "beginning",
                "include_file_name": False,  # or each record gets one more attribute
                "poll_interval": "50ms",
            }
        }
        for pipeline in config["service"]["pipelines"].values():
            pipeline["receivers"] = ["otlp_json_file"]
        return config


def contents(collector: Collector) -> dict[str, list[str]]:
    """All records of a collector, comparable."""
    found = {"spans": collector.spans(), "logs": collector.logs(), "points": collector.metric_points()}
    return {name: sorted(repr(sorted(one.items())) for one in records) for name, records in found.items()}


@pytest.mark.stack
def test_the_collector_s_file_receiver_takes_the_same_as_sync_sends(journal: Path, tmp_path: Path) -> None:
    told = command("export", journal, "--output", f"{tmp_path}/out/")
    assert told.returncode == 0, told.stderr
    with Collector(tmp_path / "synced") as synced:
        told = command("sync", journal, "--endpoint", synced.http_endpoint)
        assert told.returncode == 0, told.stdout + told.stderr
        expected = contents(synced)
    assert all(expected.values())
    assert sum("query of" in span for span in expected["spans"]) == 2
    with FileCollector(tmp_path / "read", tmp_path / "out") as read:
        until(lambda: {name: len(found) for name, found in contents(read).items()} == lengths(expected))
        assert contents(read) == expected


def lengths(found: dict[str, list[str]]) -> dict[str, int]:
    return {name: len(records) for name, records in found.items()}


APP = """
import sqlite3
from opentelemetry import _logs, metrics, trace

connection = sqlite3.connect(":memory:")
with trace.get_tracer("app").start_as_current_span("request"):
    connection.cursor().execute("select 1")
    metrics.get_meter("app").create_counter("requests").add(2)
    _logs.get_logger("app").emit(body="said", severity_number=_logs.SeverityNumber.INFO)
"""


@pytest.mark.stack
@pytest.mark.timeout(180)
def test_opentelemetry_instrument_in_a_fresh_environment(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not is_ours(name) and name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=under_load(60))
    programs = tmp_path / "venv" / "bin"
    project = Path(__file__).parent.parent
    packages = [project, "opentelemetry-distro", "opentelemetry-instrumentation-sqlite3"]
    installed = subprocess.run(
        [programs / "pip", "install", "-q", *packages],  # type: ignore[list-item]
        env=environment,
        capture_output=True,
        text=True,
        timeout=under_load(150),
    )
    if installed.returncode:
        pytest.skip(f"pip cannot install into a fresh environment: {installed.stderr[-300:]}")
    (tmp_path / "app.py").write_text(APP)
    exporters = {f"OTEL_{signal}_EXPORTER": "stepspan_jsonl" for signal in ("TRACES", "METRICS", "LOGS")}
    ran = subprocess.run(
        [programs / "opentelemetry-instrument", programs / "python", "app.py"],
        cwd=tmp_path, env={**environment, **exporters, "OTEL_SERVICE_NAME": "shop"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    told = subprocess.run(
        [programs / "stepspan", "export", "stepspan-runs", "--to", "otlp-json", "--output", "out/"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    with FileCollector(tmp_path / "collector", tmp_path / "out") as collector:
        until(lambda: len(collector.spans()) == 3 and collector.logs() and len(collector.metric_points()) > 2)
        spans = {span["name"]: span for span in collector.spans()}
        (said,) = collector.logs()
        counted = [point for point in collector.metric_points() if point["metric"] == "requests"]
    query, request = spans["select"], spans["request"]
    assert (query["traceId"], query["parentSpanId"]) == (request["traceId"], request["spanId"])
    assert request["resource"]["service.name"] == "shop"
    assert request["resource"]["job_id"]
    assert (said["body"], said["spanId"]) == ("said", request["spanId"])
    assert {point["asInt"] for point in counted} == {2}
