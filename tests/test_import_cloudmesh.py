"""Reading cloudmesh's telemetry: the files of its releases and ours, as metrics, milestones, spans and log records."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.events_of import mapper
from harness.runs import events, is_ours, outline
from harness.stack import Collector
from hypothesis import given, settings
from hypothesis import strategies as st

from stepspan import Telemetry
from stepspan.compat.cloudmesh.reader import detect, read_sessions
from stepspan.compat.cloudmesh.records import instant, timestamp
from stepspan.compat.importing import ImportedSession, write_session
from stepspan.journal.liveness import read_closed
from stepspan.testing import FixedClock

SYSTEM = {"cpu": "Apple M2", "gpu_present": True, "gpu_model": None, "memory_total": None}
TABLE = (
    "CREATE TABLE telemetry (id INTEGER PRIMARY KEY AUTOINCREMENT, timestamp TEXT, command TEXT, status TEXT,"
    " metrics TEXT, system TEXT, message TEXT)"
)


@pytest.fixture(autouse=True)
def _half_past_four_in_india(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A local time that no machine is likely to have."""
    for name in filter(is_ours, list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as zone:
        zone.setenv("TZ", "Asia/Kolkata")
        time.tzset()
        yield
    time.tzset()


def row(second: float, status: str, message: str | None = None, command: str = "llm", **metrics: Any) -> dict[str, Any]:
    """A record as the releases write it; `second` after 08:53 UTC on 2025-10-09."""
    text = f"2025-10-09T14:23:{second:09.6f}"
    found = {"timestamp": text, "command": command, "status": status, "metrics": metrics, "system": SYSTEM}
    return found if message is None else {**found, "message": message}


def at(second: float) -> int:
    return 1_759_999_980_000_000_000 + round(second * 1_000_000) * 1000


def log_of(*records: Any, name: str = "telemetry.jsonl") -> Path:
    Path(name).write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return Path(name)


def database_of(*records: dict[str, Any], name: str = "telemetry.db") -> Path:
    names = ("timestamp", "command", "status", "metrics", "system", "message")
    with closing(sqlite3.connect(name)) as database, database:
        database.execute(TABLE)
        for record in records:
            texts = {key: json.dumps(record[key]) for key in ("metrics", "system")}
            values = [texts.get(key, record.get(key)) for key in names]
            database.execute(f"INSERT INTO telemetry ({', '.join(names)}) VALUES (?,?,?,?,?,?)", values)
    return Path(name)


def only(path: Path, **arguments: Any) -> ImportedSession:
    (imported,) = read_sessions(path, **arguments)
    return imported


def journal(imported: ImportedSession, directory: str = "runs") -> Path:
    path, written = write_session(Path(directory), imported)
    assert written == len(events(path)) - 1
    return path


def logs(path: Path) -> list[Any]:
    lines = events(path)
    return list(mapper("logs", lines[0]).map(lines))


RELEASED = (
    row(0, "started", "go", batch_size=32),
    row(1.5, "running", loss=0.5, device="mps"),
    row(3, "completed", "Command completed successfully", batch_size=32, duration_sec=3.0),
    row(10, "started"),
    row(12.25, "failed", "out of memory", duration_sec=2.25),
)


# ------------------------------------------------------------------------------------------------- a release's files


@pytest.mark.parametrize("made", [log_of, database_of], ids=["jsonl", "sqlite"])
def test_a_release_becomes_points_milestones_and_spans(made: Any) -> None:
    path = journal(only(made(*RELEASED)))
    assert outline(path) == [
        "run",
        "train -: batch_size=32.0",
        "  span llm",
        "    event llm",
        "train -: loss=0.5",
        "  event llm",
        "train -: batch_size=32.0 duration_sec=3.0",
        "    event llm",
        "  end span",
        "  span llm",
        "    event llm",
        "train -: duration_sec=2.25",
        "    event llm",
        "  end span failed",
        "end run completed",
    ]
    points = [(event["ts"], event["attributes"], event["metrics"]) for event in events(path, "metrics")]
    assert points == [
        (at(0), {"command": "llm"}, {"batch_size": 32.0}),
        (at(1.5), {"command": "llm"}, {"loss": 0.5}),
        (at(3), {"command": "llm"}, {"batch_size": 32.0, "duration_sec": 3.0}),
        (at(12.25), {"command": "llm"}, {"duration_sec": 2.25}),
    ]
    told = [(log.severity, log.body, log.attributes.get("message"), log.attributes.get("device")) for log in logs(path)]
    assert told == [
        (9, "llm: started", "go", None),
        (9, "llm: running", None, "mps"),
        (9, "llm: completed", "Command completed successfully", None),
        (9, "llm: started", None, None),
        (17, "llm: failed", "out of memory", None),
    ]
    header = events(path)[0]
    assert (
        header["resource"].items()
        >= {
            "host.cpu.model.name": "Apple M2",
            "host.gpu.present": True,
            "import.system": "cloudmesh",
            "service.instance.id": f"{header['job_id']}-0",
        }.items()
    )


def spans(path: Path) -> list[tuple[str, int, int, str | None]]:
    closed, lines = read_closed(path), events(path)
    assert closed is not None
    fold = mapper("traces", lines[0])
    found: list[Any] = [*fold.map(lines), *fold.finish(closed)]
    return [(s.name, s.start // 1000, s.end // 1000, s.error) for s in found if s.name != "training.run"]


def us(second: float) -> int:
    return at(second) // 1000


def test_what_starts_lasts_until_it_ends() -> None:
    assert spans(journal(only(log_of(*RELEASED)))) == [
        ("llm", us(0), us(3), None),
        ("llm", us(10), us(12.25), "failed"),
    ]


def test_commands_in_one_log_are_told_apart() -> None:
    records = [
        row(0, "started", command="a"),
        row(1, "started", command="b", loss=1),
        row(2, "completed", command="a", loss=2),
        row(3, "completed", command="b"),
        row(4, "completed", command="c"),
    ]
    path = journal(only(log_of(*records)))
    assert spans(path) == [("a", us(0), us(2), None), ("b", us(1), us(3), None)]
    assert [event["attributes"]["command"] for event in events(path, "metrics")] == ["b", "a"]


def test_what_never_ended_was_interrupted() -> None:
    path = journal(only(log_of(row(0, "started"), row(5, "running"))))
    assert spans(path) == [("llm", us(0), us(5), "interrupted")]


def test_calls_in_calls_end_inside_out() -> None:
    records = [row(0, "started"), row(1, "started"), row(2, "completed"), row(9, "completed")]
    assert spans(journal(only(log_of(*records)))) == [("llm", us(1), us(2), None), ("llm", us(0), us(9), None)]


def test_records_that_several_processes_mixed_are_put_in_order() -> None:
    path = journal(only(log_of(row(2, "completed", b=2), row(0, "started", a=1))))
    assert [event["ts"] for event in events(path, "metrics")] == [at(0), at(2)]
    assert spans(path) == [("llm", us(0), us(2), None)]


def test_events_of_a_name_with_two_ends_are_a_span() -> None:
    first = {**row(0, "started"), "event": "model_load_start"}
    last = {**row(4, "completed"), "event": "model_load_end"}
    path = journal(only(log_of(first, last)))
    assert spans(path) == [("model_load", us(0), us(4), None)]
    assert [log.event_name for log in logs(path)] == ["model_load_start", "model_load_end"]


def test_a_metric_may_stand_inside_metrics() -> None:
    path = journal(only(log_of(row(0, "completed", metric="accuracy", value=0.92))))
    assert [event["metrics"] for event in events(path, "metrics")] == [{"accuracy": 0.92}]


def test_numbers_that_json_has_no_word_for_stay_numbers() -> None:
    path = journal(only(log_of(row(0, "completed", a=float("nan"), b=float("-inf"), c=True, d="NaN", e=2**70))))
    (event,) = events(path, "metrics")
    assert event["metrics"] == {"a": "NaN", "b": "-Infinity", "c": 1.0, "d": "NaN", "e": float(2**70)}


# ---------------------------------------------------------------------------------------------------------- identity


def test_importing_twice_gives_the_same_ids_and_is_passed_over() -> None:
    path = log_of(*RELEASED)
    first, written = write_session(Path("runs"), only(path))
    assert write_session(Path("runs"), only(path)) == (first, 0)
    again = journal(only(path), "elsewhere")
    assert events(again) == events(first)
    assert written > 0


def test_a_log_names_its_job_by_itself_unless_it_is_told() -> None:
    Path("other").mkdir()
    one, other = only(log_of(*RELEASED)), only(log_of(*RELEASED, name="other/telemetry.jsonl"))
    assert one.job_id.startswith("telemetry-")
    assert one.job_id != other.job_id
    assert only(Path("telemetry.jsonl"), job_id="mine").job_id == "mine"


# ------------------------------------------------------------------------------------------------------ our own files


@pytest.mark.parametrize("backend", ["jsonl", "sqlite"])
def test_ours_become_one_session_per_job_and_rank(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FixedClock(step_ns=1_000_000_000)
    for rank in (1, 0):
        monkeypatch.setenv("STEPSPAN_RANK", str(rank))
        monkeypatch.setenv("STEPSPAN_WORLD_SIZE", "2")
        with Telemetry("train", backend=backend, path="shared", job_id="job", clock=clock) as t:
            t.start(event="load")
            t.start(event="warm_up")
            t.emit(metric="loss", value=0.5, note="ok")
            t.complete({"seconds": 1}, event="load")
            with suppress(ValueError), t.track():
                raise ValueError("bad")
    second, first = sessions = list(read_sessions(Path("shared")))
    about = [(s.job_id, s.rank, s.local_rank, s.world_size, s.status) for s in sessions]
    assert about == [("job", 1, 1, 2, "failed"), ("job", 0, 0, 2, "failed")]
    assert second.started < first.started
    paths = [journal(session) for session in sessions]
    assert [(name, end - start, error) for name, start, end, error in spans(paths[0])] == [
        ("load", 3_000_000, None),
        ("train", 1_000_000, "failed"),
        ("warm_up", 4_000_000, "interrupted"),
    ]
    (loss,) = (e for e in events(paths[0], "metrics") if "loss" in e["metrics"])
    assert loss["ts"] == clock.now - 10 * clock.step
    assert events(paths[0])[0]["resource"]["user.name"]


def test_spans_of_ours_are_paired_by_what_they_have_in_common() -> None:
    ours = {"job_id": "j", "rank": 0}
    records = [{**row(n, status), **ours, "span": span} for n, (status, span) in enumerate(
        [("started", "a"), ("started", "b"), ("completed", "a"), ("failed", "b")]
    )]  # fmt: skip
    assert spans(journal(only(log_of(*records)))) == [("llm", us(0), us(2), None), ("llm", us(1), us(3), "failed")]


def test_a_database_that_is_still_written_can_be_read() -> None:
    with Telemetry(backend="sqlite") as t:
        t.emit(metric="accuracy", value=0.92)
        assert detect(Path("telemetry.db")) == "a cloudmesh telemetry database of 1 records"
        assert len(events(journal(only(Path("telemetry.db"))), "metrics")) == 1


# ------------------------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("value", "ns"),
    [
        pytest.param("2025-10-09T14:23:00.000001", at(0.000001), id="local"),
        pytest.param("2025-10-09 14:23:00", at(0), id="local, with a space"),
        pytest.param("2025-10-09T08:53:00+00:00", at(0), id="UTC"),
        pytest.param("2025-10-09T08:53:00Z", at(0), id="Z"),
        pytest.param("2025-10-09T10:53:00.250000+02:00", at(0.25), id="a zone"),
        pytest.param(at(0.5) / 1e9, at(0.5), id="seconds"),
        pytest.param(None, None, id="none"),
    ],
)
def test_times(value: Any, ns: int | None) -> None:
    assert instant(value) == ns


@given(st.integers(0, 4_000_000_000_000_000))
def test_a_time_of_ours_comes_back(microseconds: int) -> None:
    assert instant(timestamp(microseconds * 1000 + 999)) == microseconds * 1000


def test_records_without_a_time_get_the_files_a_microsecond_apart() -> None:
    records = [{k: v for k, v in row(0, "running", n=n).items() if k != "timestamp"} for n in range(3)]
    path = log_of(*records)
    os.utime(path, ns=(at(7), at(7)))
    assert [event["ts"] for event in events(journal(only(path)), "metrics")] == [at(7) + n * 1000 for n in range(3)]


# --------------------------------------------------------------------------------------------- what it is taken for


def test_it_says_what_it_takes_a_file_for() -> None:
    assert detect(log_of(*RELEASED)) == "a cloudmesh telemetry log of 5 lines"
    assert detect(database_of(*RELEASED)) == "a cloudmesh telemetry database of 5 records"
    Telemetry(path="ours", backend="jsonl").emit(metric="accuracy", value=0.92)
    assert detect(Path("ours")) == "a cloudmesh telemetry log of 1 lines"


OTHERS = {
    "evsys": {"ts": 1.0, "step": 1, "split": "train", "metrics": {"loss": 1}},
    "qmlhc": {"ts": 1.0, "tag": "step_end", "step": 1, "context": {}},
    "stormlog": {"schema_version": 3, "timestamp_ns": 1, "event_type": "sample", "metadata": {}},
    "a log with a command": {"timestamp": "2025-10-09T14:23:00", "command": "ls", "status": "completed"},
    "a list": [1],
    "a text": "timestamp command status metrics system",
}


@pytest.mark.parametrize("row", OTHERS.values(), ids=OTHERS)
def test_it_takes_nothing_else_for_its_own(row: Any) -> None:
    assert detect(log_of(row)) is None


def test_it_takes_no_other_thing_for_its_own(tmp_path: Path) -> None:
    with closing(sqlite3.connect("other.db")) as database:
        database.execute("CREATE TABLE telemetry (id INTEGER, value REAL)")
    Path("empty").touch()
    Path("cut.db").write_bytes(b"SQLite format 3\0")
    Path("binary").write_bytes(bytes(range(256)))
    for name in ("other.db", "empty", "cut.db", "binary", "missing", "."):
        assert detect(Path(name)) is None


# ------------------------------------------------------------------------------------------------------ what is wrong


def test_a_torn_last_line_is_passed_over() -> None:
    path = log_of(*RELEASED)
    with path.open("a") as file:
        file.write('{"timestamp": "2025-10')
    assert len(events(journal(only(path)), "event")) == 5


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        pytest.param({**RELEASED[0], "timestamp": "yesterday"}, "timestamp='yesterday'", id="no time"),
        pytest.param({**RELEASED[0], "timestamp": "1960-01-01T00:00:00"}, "timestamp", id="before 1970"),
        pytest.param({**RELEASED[0], "timestamp": "0001-01-01T00:00:00"}, "timestamp", id="the year 1"),
        pytest.param({**RELEASED[0], "timestamp": [1]}, "timestamp", id="a list for a time"),
        pytest.param({**RELEASED[0], "metrics": [1]}, r"metrics=\[1\] is not an object", id="metrics that are a list"),
        pytest.param(
            {**RELEASED[0], "system": "linux"}, "system='linux' is not an object", id="a system that is a text"
        ),
        pytest.param({**RELEASED[0], "rank": -1}, "rank=-1", id="a rank below 0"),
        pytest.param({**RELEASED[0], "rank": "a"}, "rank='a'", id="a rank that is a text"),
        pytest.param({**RELEASED[0], "job_id": 3}, "job_id=3", id="a job that is a number"),
        pytest.param("text", "must be an object", id="no object"),
        pytest.param({"ts": 1.0, "step": 1, "metrics": {"loss": 1}}, "not a record of cloudmesh", id="another's row"),
    ],
)
def test_a_bad_line_is_named(bad: Any, said: str) -> None:
    path = log_of(RELEASED[0], bad, RELEASED[1])
    with pytest.raises(ValueError, match=f"telemetry.jsonl, line 2: .*{said}|line 2: {said}"):
        list(read_sessions(path))


def test_a_bad_row_is_named() -> None:
    path = database_of(*RELEASED)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE telemetry SET metrics = '{' WHERE id = 4")
    with pytest.raises(ValueError, match=r"telemetry\.db, row 4: metrics is not JSON"):
        list(read_sessions(path))


def test_a_database_of_something_else_is_refused() -> None:
    with closing(sqlite3.connect("other.db")) as database:
        database.execute("CREATE TABLE points (x)")
    with pytest.raises(ValueError, match=r"other\.db: a database without cloudmesh's table telemetry"):
        list(read_sessions(Path("other.db")))


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (*RELEASED[0], "message", "event", "attributes", "span", "user", "job_id", "rank", "local_rank", "world_size")
RECORDS = st.dictionaries(st.sampled_from(FIELDS), JSON | st.sampled_from(["started", "failed"]), max_size=8)


@given(st.lists(st.tuples(st.booleans(), RECORDS), max_size=4), st.binary(max_size=8))
@settings(max_examples=150, deadline=None)
def test_any_file_is_read_or_refused(records: list[tuple[bool, dict[str, Any]]], tail: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "telemetry.jsonl")
        rows = [{**RELEASED[0], **record} if whole else record for whole, record in records]
        path.write_bytes("".join(f"{json.dumps(row)}\n" for row in rows).encode() + tail)
        told = detect(path)
        assert told is None or told.startswith("a cloudmesh")
        sessions = []
        with suppress(ValueError):
            sessions = list(read_sessions(path))
        for session in sessions:
            written, _ = write_session(Path(directory, "runs"), session)
            lines = events(written)
            closed = read_closed(written)
            assert closed is not None
            for signal in ("metrics", "traces", "logs"):
                fold = mapper(signal, lines[0])
                fold.map(lines)
                fold.finish(closed)


# ---------------------------------------------------------------------------------------------------------- the whole


def test_a_log_of_a_release_is_imported_and_sent(collector: Collector) -> None:
    log_of(*RELEASED)
    for arguments in (
        ["import", "telemetry.jsonl", "--directory", "runs", "--job-id", "llm-7b"],
        ["sync", "runs", "--endpoint", collector.http_endpoint],
    ):
        env = {name: value for name, value in os.environ.items() if not runs.is_ours(name)}
        command = [sys.executable, "-m", "stepspan", *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        if arguments[0] == "import":
            assert "telemetry.jsonl: a cloudmesh telemetry log of 5 lines (cloudmesh)\n" in done.stdout
    points = {(p["metric"], p.get("asDouble")): p for p in collector.metric_points()}
    assert points["training.loss", 0.5]["timeUnixNano"] == at(1.5)
    assert points["training.loss", 0.5]["attributes"] == {"command": "llm", "split": "train"}
    ended = [(s["startTimeUnixNano"] // 1000, s["status"].get("code")) for s in collector.spans() if s["name"] == "llm"]
    assert ended == [(us(0), None), (us(10), 2)]
    assert [log["severityNumber"] for log in collector.logs()] == [9, 9, 9, 9, 17]
    for record in (*points.values(), *collector.spans(), *collector.logs()):
        assert (record["resource"]["job_id"], record["resource"]["rank"]) == ("llm-7b", 0)
