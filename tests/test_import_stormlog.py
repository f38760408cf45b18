"""stormlog's files, whole and growing, as journals, and on to a real Collector."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.processes import under_load, until
from harness.receiver import ScriptedReceiver
from harness.stack import Collector, Prometheus

from stepspan.compat.importing import write_session
from stepspan.compat.stormlog.reader import detect, read_sessions
from stepspan.deliver.deliverer import Deliverer, caught_up
from stepspan.deliver.options import Options
from stepspan.exporters.memory import MemoryExporter
from stepspan.journal.layout import find_sessions

START = 1_795_226_400_000_000_000
SECOND = 1_000_000_000


def record(number: int, event_type: str = "sample", **fields: object) -> dict[str, Any]:
    """A record of schema 3, `number` seconds after the start."""
    return {
        "schema_version": 3,
        "session_id": "tracker-1",
        "timestamp_ns": START + number * SECOND,
        "event_type": event_type,
        "collector": "stormlog.cuda_tracker",
        "sampling_interval_ms": 1000,
        "pid": 77,
        "host": "node-a",
        "device_id": 0,
        "allocator_allocated_bytes": 1000 + number,
        "allocator_reserved_bytes": 4096,
        "allocator_active_bytes": None,
        "allocator_inactive_bytes": 0,
        "allocator_change_bytes": -1,
        "device_used_bytes": 5000,
        "device_free_bytes": 3000,
        "device_total_bytes": 8000,
        "context": None,
        "metadata": {},
        "job_id": "memory-job",
        "rank": 1,
        "local_rank": 1,
        "world_size": 2,
        **fields,
    }


RECORDS = [
    record(0, "start"),
    record(1, "phase_enter", metadata={"phase_scope": {"name": "forward", "path": ["forward"]}}),
    record(2),
    record(3, "phase_exit", metadata={"phase_scope": {"name": "forward", "path": ["forward"]}}),
    record(4, "warning", context="nearly full"),
    record(5, "stop"),
]


def write_sink(directory: Path, records: list[dict[str, Any]], status: str = "completed") -> Path:
    """A sink directory of one session."""
    directory.mkdir(exist_ok=True)
    (directory / "segment-000001.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    session = {
        "session_id": "tracker-1",
        "status": status,
        "started_at_ns": START,
        "ended_at_ns": None if status == "running" else records[-1]["timestamp_ns"],
        "host": "node-a",
        "pid": 77,
        "job_id": "memory-job",
        "rank": 1,
        "local_rank": 1,
        "world_size": 2,
    }
    manifest = {"schema_version": 2, "format": "stormlog.append_only_telemetry_sink", "sessions": [session]}
    manifest["segments"] = [{"filename": "segment-000001.jsonl", "session_id": "tracker-1"}]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def delivered(directory: Path, state: Path) -> Any:
    """What the journals below a directory map to."""
    exporter = MemoryExporter()
    deliverer = Deliverer([exporter], lambda _: find_sessions(directory), Options(boot_id="", state_directory=state))
    deliverer.start()
    deliverer.wait(caught_up)
    deliverer.stop()
    return exporter


def test_a_session_becomes_points_spans_and_logs(tmp_path: Path) -> None:
    sink = write_sink(tmp_path / "sink", RECORDS)
    (found,) = read_sessions(sink)
    write_session(tmp_path / "runs", found)
    records = delivered(tmp_path / "runs", tmp_path / "state").records

    resource = records["metrics"][0][0]
    assert (resource["job_id"], resource["rank"], resource["world_size"]) == ("memory-job", 1, 2)
    assert (resource["import.system"], resource["import.source"]) == ("stormlog", str(sink))
    points = [point for _, point in records["metrics"] if point[2] is not None]
    allocated = [(ts, value) for series, ts, value in points if series.name == "training.memory.allocator.allocated"]
    assert [(ts // SECOND, value) for ts, value in allocated] == [(START // SECOND + n, 1000.0 + n) for n in range(6)]
    memory = {series.name: series for series, *_ in points if series.name.startswith("training.memory.")}
    assert set(memory) == {
        "training.memory.allocator.allocated",
        "training.memory.allocator.reserved",
        "training.memory.allocator.inactive",
        "training.memory.allocator.change",
        "training.memory.device.used",
        "training.memory.device.free",
        "training.memory.device.total",
    }
    assert {(series.unit, series.attributes["device_id"]) for series in memory.values()} == {("By", 0)}

    spans = {span.name: span for _, span in records["traces"]}
    assert set(spans) == {"training.run", "forward"}
    assert spans["training.run"].attributes["status"] == "completed"
    assert (spans["forward"].end - spans["forward"].start) // SECOND == 2
    logs = {log.event_name: log for _, log in records["logs"]}
    assert set(logs) == {"stormlog.start", "stormlog.warning", "stormlog.stop"}
    assert logs["stormlog.warning"].severity == 13
    assert logs["stormlog.warning"].attributes["message"] == "nearly full"


@pytest.mark.parametrize("status", ["interrupted", "incomplete", "running"])
def test_a_session_that_did_not_complete_is_an_interrupted_run(tmp_path: Path, status: str) -> None:
    (found,) = read_sessions(write_sink(tmp_path / "sink", RECORDS[:3], status))
    write_session(tmp_path / "runs", found)
    spans = {span.name: span for _, span in delivered(tmp_path / "runs", tmp_path / "state").records["traces"]}
    assert spans["training.run"].attributes["status"] == "interrupted"
    assert spans["forward"].error == "interrupted"


def test_importing_twice_writes_nothing_the_second_time(tmp_path: Path) -> None:
    sink = write_sink(tmp_path / "sink", RECORDS)
    path, events = write_session(tmp_path / "runs", next(read_sessions(sink)))
    before = (path / "000001.jsonl").read_bytes()
    assert events > 0
    assert write_session(tmp_path / "runs", next(read_sessions(sink))) == (path, 0)
    elsewhere, _ = write_session(tmp_path / "again", next(read_sessions(sink)))
    assert elsewhere.name == path.name
    assert (elsewhere / "000001.jsonl").read_bytes() == before == (path / "000001.jsonl").read_bytes()


def test_an_import_that_was_cut_short_is_made_anew_and_its_cursors_hold(tmp_path: Path) -> None:
    sink = write_sink(tmp_path / "sink", RECORDS)
    path, events = write_session(tmp_path / "runs", next(read_sessions(sink)))
    whole = (path / "000001.jsonl").read_bytes()
    (path / "closed.json").unlink()
    (path / "000001.jsonl").write_bytes(whole[:700])
    (path / "cursors").mkdir()
    (path / "cursors" / "somewhere.metrics").write_bytes(b"kept")
    assert write_session(tmp_path / "runs", next(read_sessions(sink))) == (path, events)
    assert (path / "000001.jsonl").read_bytes() == whole
    assert (path / "cursors" / "somewhere.metrics").read_bytes() == b"kept"


@pytest.mark.parametrize("written_anew", [False, True])
def test_an_import_that_was_cut_short_twice_keeps_its_cursors(tmp_path: Path, written_anew: bool) -> None:
    sink = write_sink(tmp_path / "sink", RECORDS)
    path, events = write_session(tmp_path / "runs", next(read_sessions(sink)))
    content = (path / "000001.jsonl").read_bytes()
    (path / "closed.json").unlink()
    partial = path.with_name(f".{path.name}.partial")
    path.rename(partial)
    (partial / "cursors").mkdir()
    (partial / "cursors" / "somewhere.metrics").write_bytes(b"kept")
    if written_anew:
        path.mkdir()
        (path / "000001.jsonl").write_bytes(content[:700])
    assert write_session(tmp_path / "runs", next(read_sessions(sink))) == (path, events)
    assert (path / "000001.jsonl").read_bytes() == content
    assert (path / "cursors" / "somewhere.metrics").read_bytes() == b"kept"
    assert not partial.exists()


def test_detecting_says_what_it_is(tmp_path: Path) -> None:
    assert detect(write_sink(tmp_path / "sink", RECORDS)) == "a stormlog sink of 1 segments"
    document = tmp_path / "events.json"
    document.write_text(json.dumps({"events": RECORDS}))
    assert detect(document) == "stormlog telemetry of 6 events in 1 sessions"
    (tmp_path / "other.json").write_text('{"loss": 1}')
    (tmp_path / "other.jsonl").write_text('{"ts": 1, "step": 2, "metrics": {"loss": 1}}\n')
    assert [detect(tmp_path / name) for name in ("other.json", "other.jsonl", "nowhere")] == [None, None, None]


def stepspan(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stepspan", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_import_and_sync_reach_a_real_collector(collector: Collector, prometheus: Prometheus, tmp_path: Path) -> None:
    write_sink(tmp_path / "sink", RECORDS)
    told = stepspan("import", "sink", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("sink: a stormlog sink of 1 segments (stormlog)\nmemory-job rank 1: ")
    done = stepspan("sync", "stepspan-runs", "--endpoint", collector.http_endpoint, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    query = 'training_memory_allocator_allocated_bytes{job_id="memory-job"}[1h]'
    ((labels, samples),) = prometheus.series(query, at=START / SECOND + 60)
    assert (labels["rank"], labels["device_id"]) == ("1", "0")
    assert [value for _, value in samples] == [1000.0 + n for n in range(6)]
    assert {span["name"] for span in collector.spans()} == {"training.run", "forward"}
    assert {log["eventName"] for log in collector.logs()} == {"stormlog.start", "stormlog.warning", "stormlog.stop"}


def test_a_sink_that_is_not_certain_is_refused(tmp_path: Path) -> None:
    (tmp_path / "what.json").write_text('{"loss": 1}')
    told = stepspan("import", "what.json", cwd=tmp_path)
    assert told.returncode == 1
    assert "not recognised: say which system it is of with --from" in told.stderr


def test_a_growing_sink_is_followed(tmp_path: Path) -> None:
    sink = write_sink(tmp_path / "sink", RECORDS[:2], "running")
    with ScriptedReceiver() as receiver:
        command = [sys.executable, "-m", "stepspan", "sync", "--follow", "sink", "--endpoint", receiver.url]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        try:
            allocated = "training.memory.allocator.allocated"
            until(lambda: len(receiver.points(allocated)) == 2, 30)
            write_sink(sink, RECORDS)
            until(lambda: len(receiver.spans("training.run")) == 1, 30)
            until(lambda: {p.time // SECOND - START // SECOND for p in receiver.points(allocated)} == set(range(6)), 30)
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=under_load(30))
        assert process.returncode == 0


def test_the_example_runs(tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples" / "stormlog_memory.py"
    done = subprocess.run([sys.executable, "-W", "error", example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10 events in the sink\n")
    (session,) = find_sessions(tmp_path / "stepspan-runs")
    assert session.path.parents[1].name == "stormlog-example"
