"""stormlog's files: documents, lines and sink directories, whole, torn, damaged and hostile."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepspan import stormlog
from stepspan.compat.stormlog.sink import read_manifest

ONE, TWO = "segment-000001.jsonl", "segment-000002.jsonl"
FORMAT = "stormlog.append_only_telemetry_sink"


def record(session: str | None = "s", time: int = 5, event_type: str = "sample", **change: Any) -> dict[str, Any]:
    whole = {
        "schema_version": 2 if session is None else 3,
        "session_id": session,
        "timestamp_ns": time,
        "event_type": event_type,
        "collector": "stormlog.cuda_tracker",
        "sampling_interval_ms": 100,
        "pid": 12,
        "host": "node-a",
        "job_id": "job-1",
        "rank": 1,
        "local_rank": 0,
        "world_size": 2,
        "device_id": 0,
        "allocator_allocated_bytes": 1024,
        "allocator_reserved_bytes": 2048,
        "allocator_active_bytes": None,
        "allocator_inactive_bytes": None,
        "allocator_change_bytes": -128,
        "device_used_bytes": 4096,
        "device_free_bytes": None,
        "device_total_bytes": None,
        "context": None,
        "metadata": {},
        **change,
    }
    return {name: value for name, value in whole.items() if session is not None or name != "session_id"}


def lines(*records: Any) -> str:
    return "".join(json.dumps(each) + "\n" for each in records)


def session(name: str, status: str = "completed", start: object = 1, end: object = 9, **change: Any) -> dict[str, Any]:
    return {
        "session_id": name,
        "status": status,
        "started_at_ns": start,
        "ended_at_ns": end,
        "host": "node-m",
        "pid": 3,
        "job_id": None,
        "rank": 0,
        "local_rank": 0,
        "world_size": 1,
        "source": "stormlog.telemetry_sink",
        **change,
    }


def segment(name: str, of: str | None = "s") -> dict[str, Any]:
    return {"filename": name, "event_count": 1, "size_bytes": 1, "closed": True, "session_id": of}


def manifest(sessions: list[Any], segments: list[Any], **change: Any) -> str:
    return json.dumps({"schema_version": 2, "format": FORMAT, "sessions": sessions, "segments": segments, **change})


def sink(place: Path, **files: str | bytes) -> Path:
    directory = place / "sink"
    directory.mkdir()
    named = {"one": ONE, "two": TWO, "manifest": "manifest.json"}
    for name, content in files.items():
        (directory / named[name]).write_bytes(content.encode() if isinstance(content, str) else content)
    return directory


def summaries(path: Path, **how: Any) -> list[tuple[str, str, int, int | None, int]]:
    """Of each session: its id, status, start, end and number of events."""
    return [
        (found.summary.session_id, found.summary.status, found.summary.started_at_ns, found.summary.ended_at_ns, n)
        for found in stormlog.load_telemetry_sessions(path, **how)
        for n in [len(found.events)]
    ]


def times(path: Path, **how: Any) -> list[int]:
    return [event.timestamp_ns for event in stormlog.load_telemetry_events(path, **how)]


def refusal(path: Path, **how: Any) -> str:
    with pytest.raises(stormlog.RecordError) as caught:
        stormlog.load_telemetry_sessions(path, **how)
    return str(caught.value)


def legacy_id(path: Path, seed: str) -> str:
    return f"legacy-{uuid.uuid5(uuid.NAMESPACE_URL, f'{path.resolve()}::{seed}')}"


@pytest.mark.parametrize(
    ("document", "how"),
    [
        pytest.param([record(), record()], {}, id="a list"),
        pytest.param({"events": [record(), record()]}, {}, id="events"),
        pytest.param({"telemetry_events": [record(), record()]}, {}, id="telemetry_events"),
        pytest.param({"mine": [record(), record()]}, {"events_key": "mine"}, id="a key of one's own"),
        pytest.param([record(), record()], {"events_key": "mine"}, id="a list, whatever the key"),
    ],
)
def test_document_is_read(tmp_path: Path, document: Any, how: dict[str, Any]) -> None:
    path = tmp_path / "events.json"
    path.write_text(json.dumps(document))
    assert summaries(path, **how) == [("s", "incomplete", 5, None, 2)]


@pytest.mark.parametrize("one", [record(), {"timestamp": 1}, {"timestamp_ns": 1, "x": 2}], ids=["v3", "legacy", "ns"])
def test_document_may_be_one_record(tmp_path: Path, one: dict[str, Any]) -> None:
    path = tmp_path / "event.json"
    path.write_text(json.dumps(one))
    assert len(stormlog.load_telemetry_events(path)) == 1


@pytest.mark.parametrize(
    ("content", "how", "said"),
    [
        pytest.param("", {}, "is not JSON: Expecting value", id="empty"),
        pytest.param("[1, 2", {}, "is not JSON", id="torn"),
        pytest.param("[" * 100_000, {}, "is not JSON", id="too deep"),
        pytest.param("9" * 5000, {}, "is not JSON", id="too many digits"),
        pytest.param("5", {}, "must be a JSON object or array, not 5", id="a number"),
        pytest.param('{"x": 1}', {}, "does not contain telemetry events", id="something else"),
        pytest.param("[5]", {}, "Event at index 0 must be an object, not 5", id="a list of something else"),
        pytest.param('{"events": []}', {"events_key": "mine"}, "Top-level key 'mine' must contain a list", id="no key"),
        pytest.param('{"mine": 5}', {"events_key": "mine"}, "Top-level key 'mine' must contain a list", id="no list"),
        pytest.param(json.dumps([record(), record(pid="x")]), {}, "at index 1: pid must be an integer", id="a record"),
        pytest.param('[{"timestamp": 1}]', {"permissive_legacy": False}, "conversion is disabled", id="legacy"),
    ],
)
def test_document_is_refused_naming_the_file(tmp_path: Path, content: str, how: dict[str, Any], said: str) -> None:
    path = tmp_path / "events.json"
    path.write_text(content)
    message = refusal(path, **how)
    assert str(path) in message
    assert said in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param("", [], id="empty"),
        pytest.param(lines(record(time=7), record(time=5)), [5, 7], id="by time"),
        pytest.param("\n \n" + lines(record()) + "\n", [5], id="blank lines"),
        pytest.param(lines(record(), record()).replace("\n", "\r\n"), [5, 5], id="Windows' lines"),
        pytest.param(lines(record()) + '{"schema_ver', [5], id="a torn last line"),
        pytest.param(lines(record()) + json.dumps(record(time=6)), [5, 6], id="a whole last line without newline"),
        pytest.param('{"torn', [], id="nothing but a torn line"),
        pytest.param(lines(record(metadata={"loss": float("nan")})), [5], id="NaN"),
    ],
)
def test_lines_are_read(tmp_path: Path, content: str, expected: list[int]) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(content, newline="")
    assert times(path) == expected


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        pytest.param(lines(record()) + "{bad\n", 2, "Malformed", id="a bad last line that ends"),
        pytest.param("{bad\n" + lines(record()), 1, "Malformed", id="a bad first line"),
        pytest.param(lines(record()) + "{bad\n  ", 2, "Malformed", id="a bad line before a blank one"),
        pytest.param(lines(record(), [1]), 2, "must be an object, not [1]", id="a list"),
        pytest.param(lines(record()) + "5", 2, "must be an object, not 5", id="a last line that is no record"),
        pytest.param(lines(record(), record(), record(rank=2)), 3, "rank must be < world_size", id="a bad record"),
        pytest.param(lines(record()) + "[" * 100_000 + "\n", 2, "Malformed", id="too deep"),
        pytest.param(
            json.dumps(record(context="a\u2028b"), ensure_ascii=False) + "\n", 1, "Malformed", id="a raw U+2028"
        ),
    ],
)
def test_lines_are_refused_naming_file_and_line(tmp_path: Path, content: str, line: int, said: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(content, encoding="utf-8")
    message = refusal(path)
    assert f"{path} at line {line}" in message
    assert said in message


def test_what_is_not_utf_8_is_told_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(lines(record()).encode() + b'{"a":"\xc3')
    with pytest.raises(UnicodeDecodeError) as caught:
        stormlog.load_telemetry_events(path)
    assert f"{path} at line 2" in str(caught.value)


@pytest.mark.parametrize("load", [stormlog.load_telemetry_events, stormlog.load_telemetry_sessions])
def test_a_file_that_is_not_there(tmp_path: Path, load: Any) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.jsonl")


def test_session_without_manifest_is_completed_by_its_stop(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(lines(record(time=9), record(time=7, event_type="stop"), record("b", time=6)))
    assert summaries(path) == [("s", "completed", 7, 7, 2), ("b", "incomplete", 6, None, 1)]
    first, _ = stormlog.load_telemetry_sessions(path)
    assert (first.summary.host, first.summary.pid, first.summary.job_id, first.summary.rank) == (
        "node-a",
        12,
        "job-1",
        1,
    )
    assert (first.summary.source, first.sources_loaded, first.warnings) == ("artifact:events.jsonl", [str(path)], [])


def test_resources_and_correlations_are_listed_once_in_order(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(lines(*(record(time=n, device_id=n % 2 ^ 1, rank=n % 2) for n in range(6))))
    (found,) = stormlog.load_telemetry_sessions(path)
    assert [each["device_id"] for each in found.resources()] == [1, 0]
    assert [each["rank"] for each in found.correlations()] == [0, 1]
    assert len(found.telemetry_records()) == 6


@pytest.mark.parametrize(
    ("name", "content", "how", "seed"),
    [
        ("a.json", json.dumps([record(None)]), {}, "json"),
        ("a.json", json.dumps({"mine": [{"timestamp": 1}]}), {"events_key": "mine"}, "mine"),
        ("a.jsonl", lines(record(None), {"timestamp": 1}), {}, "sink"),
    ],
)
def test_records_without_session_share_one_of_the_file(
    tmp_path: Path, name: str, content: str, how: dict[str, Any], seed: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert [each[0] for each in summaries(tmp_path / "." / name, **how)] == [legacy_id(path, seed)]


def test_sink_is_read_with_its_manifest(tmp_path: Path) -> None:
    directory = sink(
        tmp_path,
        manifest=manifest([session("s", "interrupted"), session("r", "running", 3, None)], [segment(ONE)]),
        one=lines(record(time=7)),
        two=lines(record(time=6), record("r")),  # the manifest forgot it
    )
    assert summaries(directory) == [("s", "interrupted", 1, 9, 2), ("r", "running", 3, None, 1)]
    first, second = stormlog.load_telemetry_sessions(directory)
    assert [event.timestamp_ns for event in first.events] == [6, 7]
    assert first.sources_loaded == [str(directory / ONE), str(directory / TWO)]
    assert second.sources_loaded == [str(directory / TWO)]
    assert first.summary.source == "stormlog.telemetry_sink"


def test_sink_gives_records_without_session_to_their_segments(tmp_path: Path) -> None:
    directory = sink(
        tmp_path,
        manifest=manifest([session("s")], [segment(ONE, "s"), segment(TWO, None)]),
        one=lines(record(None)),
        two=lines({"timestamp": 1}),
    )
    assert [(each[0], each[4]) for each in summaries(directory)] == [("s", 1), (legacy_id(directory, "sink"), 1)]


@pytest.mark.parametrize("target", ["manifest.json", ONE])
def test_sink_may_be_named_by_a_file_in_it(tmp_path: Path, target: str) -> None:
    directory = sink(tmp_path, manifest=manifest([session("s")], [segment(ONE)]), one=lines(record()))
    assert summaries(directory / target) == [("s", "completed", 1, 9, 1)]


def test_sink_that_is_still_written_has_a_torn_segment(tmp_path: Path) -> None:
    directory = sink(
        tmp_path,
        manifest=manifest([session("s", "running", 1, None)], [segment(ONE)]),
        one=lines(record()),
        two=lines(record(time=6)) + '{"schema',
    )
    assert summaries(directory) == [("s", "running", 1, None, 2)]


@pytest.mark.parametrize("files", [{}, {"manifest": manifest([session("s")], [segment(ONE)])}], ids=["empty", "gone"])
def test_sink_without_segments_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    directory = sink(tmp_path, **files)
    assert f"{directory} retained no segments" in refusal(directory)
    if files:
        assert "retained no segments" in refusal(directory / "manifest.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param("{torn", "Expecting property name", id="torn"),
        pytest.param(b"\xff", "can't decode", id="not UTF-8"),
        pytest.param("[" * 100_000, "recursion", id="too deep"),
        pytest.param("[]", "must be an object, not []", id="a list"),
        pytest.param("{}", "schema_version must be an integer, not None", id="no version"),
        pytest.param(manifest([5], []), "sessions[0] ignored: must be an object, not 5", id="session"),
        pytest.param(manifest([session("q", "lost")], []), "status must be one of completed", id="status"),
        pytest.param(manifest([session("")], []), "session_id must be a non-empty string", id="session's id"),
        pytest.param(manifest([session("q", start="x")], []), "started_at_ns must be an integer", id="start"),
        pytest.param(manifest([session("q", rank=1.5)], []), "rank must be an integer, not 1.5", id="rank"),
        pytest.param(manifest([], [{}]), "segments[0] ignored: filename must be", id="segment"),
        pytest.param(manifest([], [segment("../other.jsonl")]), "a name in the sink's directory", id="a way out"),
        pytest.param(manifest([], [segment("/etc/hostname")]), "a name in the sink's directory", id="another way out"),
    ],
)
def test_bad_manifest_is_a_warning_and_its_segments_are_read(tmp_path: Path, content: str | bytes, said: str) -> None:
    directory = sink(tmp_path, manifest=content, one=lines(record(event_type="stop")))
    (tmp_path / "other.jsonl").write_text(lines(record("elsewhere")))
    (found,) = stormlog.load_telemetry_sessions(directory)
    assert (found.summary.session_id, found.summary.status) == ("s", "completed")
    (warning,) = found.warnings
    assert str(directory / "manifest.json") in warning
    assert said in warning


def test_one_bad_session_does_not_cost_the_others(tmp_path: Path) -> None:
    both = manifest([session("s", "interrupted"), session("q", "lost")], [segment(ONE)])
    assert summaries(sink(tmp_path, manifest=both, one=lines(record()))) == [("s", "interrupted", 1, 9, 1)]


def test_manifest_of_schema_1_has_segments_only(tmp_path: Path) -> None:
    old = manifest([session("q")], [segment("older.jsonl", "s")], schema_version=1)
    directory = sink(tmp_path, manifest=old)
    (directory / "older.jsonl").write_text(lines(record(None)))
    (found,) = stormlog.load_telemetry_sessions(directory)
    assert (found.summary.session_id, len(found.events), found.warnings) == ("s", 1, [])


@pytest.mark.parametrize("name", ["x" * 5000, "\0", "..", ".", "\ud800"])
def test_a_filename_that_no_file_can_have_is_harmless(tmp_path: Path, name: str) -> None:
    directory = sink(tmp_path, manifest=manifest([], [segment(name)]), one=lines(record()))
    assert summaries(directory) == [("s", "incomplete", 5, None, 1)]


def test_a_manifest_that_is_a_directory_is_a_warning(tmp_path: Path) -> None:
    directory = sink(tmp_path, one=lines(record()))
    (directory / "manifest.json").mkdir()
    (found,) = stormlog.load_telemetry_sessions(directory)
    assert "manifest.json" in found.warnings[0]


CHOICES = [  # in the order in which they are to be chosen
    session("c-late", "completed", 1, 9),
    session("c-early", "completed", 1, 8),
    session("c-no-end", "completed", 7, None),  # it is known to have lasted until its start
    session("i-new", "interrupted", 4, 6),
    session("i-old", "interrupted", 3, 6),
    session("n-a", "incomplete", 2, None),
    session("n-b", "incomplete", 2, None),
    session("r", "running", 99, None),
]


def test_sessions_come_by_status_end_start_and_id(tmp_path: Path) -> None:
    ids = [each["session_id"] for each in CHOICES]
    directory = sink(
        tmp_path, manifest=manifest(CHOICES[::-1], []), one=lines(*(record(each, n) for n, each in enumerate(ids)))
    )
    assert [each[0] for each in summaries(directory)] == ids
    assert times(directory) == [0]


@pytest.mark.parametrize("present", range(len(CHOICES)))
def test_the_first_session_with_events_is_chosen(tmp_path: Path, present: int) -> None:
    events = [record(each["session_id"], n) for n, each in enumerate(CHOICES)][present:]
    directory = sink(tmp_path, manifest=manifest(CHOICES, []), one=lines(*events))
    assert times(directory) == [present]
    assert times(directory, session_id="r") == [len(CHOICES) - 1]
    assert times(directory, session_id="c-late") == ([0] if present == 0 else [])


def test_a_session_that_is_not_there_is_refused_naming_those_that_are(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(lines(record("a"), record("b")))
    with pytest.raises(stormlog.RecordError, match=r"session_id not found: 'c' \(there are: a, b\)"):
        stormlog.load_telemetry_events(path, session_id="c")


def test_reading_leaves_a_sink_as_it_was(tmp_path: Path) -> None:
    directory = sink(tmp_path, manifest=manifest([session("s")], [segment(ONE)]), one=lines(record()) + "{torn")
    before = {path.name: (path.read_bytes(), os.stat(path).st_mtime_ns) for path in directory.iterdir()}
    stormlog.load_telemetry_sessions(directory)
    assert {path.name: (path.read_bytes(), os.stat(path).st_mtime_ns) for path in directory.iterdir()} == before


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
some_record = st.builds(
    lambda changes: record() | changes,
    st.dictionaries(st.sampled_from([*record(), "timestamp", "memory_mb"]), json_values, max_size=2),
)
some_line = some_record.map(json.dumps) | json_values.map(json.dumps) | st.text()
ends = st.sampled_from(["\n", "\r", "\u2028"])
some_text = st.builds(lambda parts, end: end.join(parts), st.lists(some_line, max_size=4), ends)
some_bytes = st.binary(max_size=60) | some_text.map(lambda text: text.encode("utf-8", "surrogatepass"))
some_manifest = st.builds(
    lambda sessions, segments, changes: json.dumps(json.loads(manifest(sessions, segments)) | changes).encode(),
    st.lists(
        json_values | st.dictionaries(st.sampled_from(list(session("s"))), json_values).map(lambda c: session("s") | c)
    ),
    st.lists(
        json_values | st.dictionaries(st.sampled_from(list(segment(ONE))), json_values).map(lambda c: segment(ONE) | c)
    ),
    st.dictionaries(st.sampled_from(["schema_version", "format", "sessions", "segments"]), json_values, max_size=1),
)
fuzzed = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzzed
@given(st.sampled_from(["events.json", "events.jsonl"]), some_bytes, st.none() | st.text())
def test_any_file_ends_in_sessions_or_a_value_error(tmp_path: Path, name: str, content: bytes, key: str | None) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    try:
        for found in stormlog.load_telemetry_sessions(path, events_key=key):
            found.telemetry_records()
    except ValueError as error:
        told = str(error)
    else:
        told = str(path)
    assert str(path) in told


@fuzzed
@given(some_manifest | some_bytes, some_bytes)
def test_any_sink_ends_in_sessions_or_a_value_error(tmp_path: Path, told: bytes, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(told)
    (tmp_path / ONE).write_bytes(content)
    assert all(isinstance(warning, str) for warning in read_manifest(tmp_path).warnings)
    try:
        found = stormlog.load_telemetry_sessions(tmp_path)
    except ValueError:
        return
    assert all(each.summary.status in ("completed", "interrupted", "incomplete", "running") for each in found)
