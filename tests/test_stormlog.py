"""stormlog's records: what its own packages answered, and the boundaries of what is accepted."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepspan import stormlog
from stepspan.compat.stormlog.projection import _json
from stepspan.compat.stormlog.schema import (
    CAPABILITIES,
    CAPABILITY_FLAGS,
    CAPABILITY_TEXTS,
    FIELDS,
    LAYOUTS,
    NAMES,
    accepted,
)
from stepspan.errors import StepspanError

CONFORMANCE = Path(__file__).parent / "conformance"
# stormlog 0.3.8 did not know this key yet; 0.4.3 reads it, and so do we.
LATER_KEY = "a.json|{}|157"


def cases(version: str) -> list[Any]:
    found = json.loads((CONFORMANCE / f"stormlog-{version}.json").read_text())["cases"]
    return [pytest.param(case, id=f"{case['kind']}-{case['name']}") for case in found]


def thawed(value: Any) -> Any:
    if isinstance(value, (dict, MappingProxyType)):
        return {key: thawed(each) for key, each in value.items()}
    return [thawed(each) for each in value] if isinstance(value, (list, tuple)) else value


def sessions_of(path: Path, **how: Any) -> list[dict[str, Any]]:
    return [
        {
            "sid": session.summary.session_id,
            "status": session.summary.status,
            "started": session.summary.started_at_ns,
            "ended": session.summary.ended_at_ns,
            "n": len(session.events),
            "source": session.summary.source,
        }
        for session in stormlog.load_telemetry_sessions(path, **how)
    ]


def answer(case: dict[str, Any], place: Path) -> Any:
    """What our functions return for a case's input, in the form in which stormlog's answer was written down."""
    given = case["input"]
    if case["kind"] == "validate":
        return stormlog.validate_telemetry_record(given["record"])
    if case["kind"] == "identity_env":
        return stormlog.resolve_distributed_identity(env=given["env"])
    if case["kind"] == "project":
        return thawed(vars(stormlog.project_telemetry_event(given["record"])))
    if case["kind"] == "load":
        text = given["text"]
        content = eval(text) if text.startswith("b'") else text.encode()  # bytes were written down as Python shows them
        (place / given["file"]).write_bytes(content)
        return sessions_of(place / given["file"], **given["kwargs"])
    strict = {"from_record": False, "from_record_strict": True}[case["kind"]]
    event = stormlog.telemetry_event_from_record(given["record"], permissive_legacy=not strict)
    return stormlog.telemetry_event_to_dict(event)


def named(message: str) -> set[str]:
    """The fields that a message of stormlog is about."""
    return set(re.findall(r"\w+", message)) & {*NAMES, "zzz", "za", "zb", "timestamp"}


@pytest.mark.parametrize("case", cases("0.3.8"))
def test_answers_as_stormlog_0_3_8(case: dict[str, Any], tmp_path: Path) -> None:
    if case["name"] == LATER_KEY:
        assert answer(case, tmp_path)[0]["n"] == 1
    elif "ok" in case:
        assert answer(case, tmp_path) == case["ok"]
    else:
        kind = {"ValueError": ValueError, "UnicodeDecodeError": UnicodeDecodeError}[case["error"]]
        with pytest.raises(kind) as caught:
            answer(case, tmp_path)
        message = case["message"].replace("<dir>", str(tmp_path))
        if isinstance(caught.value, stormlog.RecordError):
            assert named(message) <= {*caught.value.fields, "schema_version"} | named(str(caught.value))
            assert set(re.findall(r"\S+\.jsonl?|line \d+|index \d+", message)) <= set(
                re.findall(r"\S+\.jsonl?|line \d+|index \d+", str(caught.value))
            )


@pytest.mark.parametrize("case", cases("0.4.3"))
def test_accepts_and_refuses_as_stormlog_0_4_3(case: dict[str, Any], tmp_path: Path) -> None:
    if "ok" in case:
        answer(case, tmp_path)
    else:
        with pytest.raises(ValueError, match=r"."):
            answer(case, tmp_path)


def test_the_files_hold_106_cases_of_each_version() -> None:
    assert [len(cases(version)) for version in ("0.3.8", "0.4.3")] == [106, 106]


def test_every_public_name_is_there() -> None:
    assert [name for name in stormlog.__all__ if not hasattr(stormlog, name)] == []


# Of stormlog 0.3.8, by inspect.signature; events have a field more in V3 than in V2.
SIGNATURES = {
    "validate_telemetry_record": "(record)",
    "telemetry_event_from_record": (
        "(record, permissive_legacy=True, default_collector='legacy.unknown', default_sampling_interval_ms=0,"
        " default_session_id=None)"
    ),
    "telemetry_event_to_dict": "(event)",
    "resolve_distributed_identity": (
        "(*, job_id=None, rank=None, local_rank=None, world_size=None, metadata=None, env=None)"
    ),
    "project_telemetry_event": "(event)",
    "project_telemetry_events": "(events)",
    "load_telemetry_sessions": "(path, permissive_legacy=True, events_key=None)",
    "load_telemetry_events": "(path, permissive_legacy=True, events_key=None, session_id=None)",
    "SessionSummary": (
        "(session_id, status, started_at_ns, ended_at_ns, host, pid, job_id=None, rank=0, local_rank=0, world_size=1,"
        " source='stormlog.session')"
    ),
    "LoadedTelemetrySession": "(summary, events, sources_loaded=<factory>, warnings=<factory>)",
    "ProjectedTelemetryRecord": (
        "(schema_version, record_id, timestamp_ns, observed_timestamp_ns, session_id, source_kind, event_type, stage,"
        " severity, severity_text, body, resource=<factory>, attributes=<factory>, correlation=<factory>)"
    ),
    "TelemetryEvent": (
        "(schema_version, session_id, timestamp_ns, event_type, collector, sampling_interval_ms, pid, host, device_id,"
        " allocator_allocated_bytes, allocator_reserved_bytes, allocator_active_bytes, allocator_inactive_bytes,"
        " allocator_change_bytes, device_used_bytes, device_free_bytes, device_total_bytes, context, job_id=None,"
        " rank=0, local_rank=0, world_size=1, metadata=<factory>)"
    ),
}
SIGNATURES["TelemetryEventV3"] = SIGNATURES["TelemetryEventV4"] = SIGNATURES["TelemetryEvent"]
SIGNATURES["TelemetryEventV2"] = SIGNATURES["TelemetryEvent"].replace(" session_id,", "")


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_stormlogs(name: str) -> None:
    signature = inspect.signature(getattr(stormlog, name))
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(inspect.Signature(plain)) == SIGNATURES[name]


RECORD: dict[str, Any] = {
    "schema_version": 3,
    "session_id": "session-1",
    "timestamp_ns": 1_700_000_000_000_000_000,
    "event_type": "sample",
    "collector": "stormlog.cuda_tracker",
    "sampling_interval_ms": 100,
    "pid": 1234,
    "host": "node-a",
    "job_id": "job-1",
    "rank": 1,
    "local_rank": 0,
    "world_size": 2,
    "device_id": 0,
    "allocator_allocated_bytes": 1024,
    "allocator_reserved_bytes": 2048,
    "allocator_active_bytes": 512,
    "allocator_inactive_bytes": 256,
    "allocator_change_bytes": -128,
    "device_used_bytes": 4096,
    "device_free_bytes": 8192,
    "device_total_bytes": 12288,
    "context": "forward",
    "metadata": {},
}
CAN = dict.fromkeys(CAPABILITY_TEXTS, "cuda") | dict.fromkeys(CAPABILITY_FLAGS, True)
RECORD_V4 = RECORD | {"schema_version": 4, "metadata": {"memory_capabilities": CAN}}
RECORD_V2 = {name: value for name, value in RECORD.items() if name != "session_id"} | {"schema_version": 2}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in RECORD.items() if name not in names}


def refusal(record: Any) -> stormlog.RecordError:
    with pytest.raises(stormlog.RecordError) as caught:
        stormlog.validate_telemetry_record(record)
    return caught.value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"pid": "12"}, "pid must be an integer, not '12'", id="text for an integer"),
        pytest.param({"rank": True}, "rank must be an integer, not True", id="bool for an integer"),
        pytest.param({"timestamp_ns": 1.0}, "timestamp_ns must be an integer, not 1.0", id="float for an integer"),
        pytest.param({"pid": -2}, "pid must be >= -1, not -2", id="pid below unknown"),
        pytest.param({"sampling_interval_ms": -1}, "sampling_interval_ms must be >= 0, not -1", id="interval"),
        pytest.param(
            {"device_free_bytes": -1}, "device_free_bytes must be >= 0 when provided, not -1", id="nullable counter"
        ),
        pytest.param(
            {"device_used_bytes": 12289},
            "device_used_bytes cannot exceed device_total_bytes: 12289 > 12288",
            id="used beyond total",
        ),
        pytest.param({"host": "\u2003"}, "host must be a non-empty string, not '\\u2003'", id="blank text"),
        pytest.param({"context": 5}, "context must be a string, not 5", id="context"),
        pytest.param({"metadata": [1]}, "metadata must be an object, not [1]", id="metadata"),
        pytest.param({"rank": 2}, "rank must be < world_size: it is 2 of 2", id="rank outside its world"),
        pytest.param(
            {"schema_version": 5}, "Unsupported schema_version: 5 (2, 3 and 4 are known)", id="unknown schema"
        ),
        pytest.param({"host": "x" * 500, "pid": []}, "pid must be an integer, not []", id="the first in order"),
        pytest.param({"collector": list(range(500))}, "...", id="a long value is cut short"),
    ],
)
def test_refusal_names_field_value_and_fix(change: dict[str, Any], said: str) -> None:
    error = refusal(RECORD | change)
    assert isinstance(error, StepspanError)
    assert str(error).endswith(said)
    assert len(str(error)) < 200


def test_refuses_missing_before_unknown_fields_and_names_all() -> None:
    error = refusal(without("host", "pid") | {"zb": 1, "za": 1})
    assert error.fields == ("pid", "host")
    assert refusal(RECORD | {"zb": 1, "za": 1}).fields == ("za", "zb")


# One wrong value for each step of the order that is part of the contract.
ORDER: list[tuple[str, object]] = [
    ("session_id", " "),
    ("timestamp_ns", -1),
    ("event_type", ""),
    ("collector", None),
    ("sampling_interval_ms", -1),
    ("pid", -2),
    ("host", 5),
    ("job_id", ""),
    ("rank", "x"),
    ("local_rank", None),
    ("world_size", 0),
    ("device_id", 1.5),
    ("allocator_allocated_bytes", "x"),
    ("allocator_change_bytes", "x"),
    ("allocator_reserved_bytes", -1),  # all types of a group come before all its ranges
    ("device_used_bytes", None),
    ("device_free_bytes", -1),
    ("device_total_bytes", 1),
    ("context", 5),
    ("metadata", None),
]


@pytest.mark.parametrize("place", range(len(ORDER)), ids=[name for name, _ in ORDER])
def test_the_first_fault_in_order_is_told(place: int) -> None:
    error = refusal(RECORD | dict(ORDER[place:]))
    expected = "device_used_bytes" if ORDER[place][0] == "device_total_bytes" else ORDER[place][0]
    assert error.fields[0] == expected


@pytest.mark.parametrize("name", [field.name for field in FIELDS if field.kind is int and field.minimum is not None])
@pytest.mark.parametrize("record", [RECORD, RECORD_V4], ids=["v3", "v4"])
def test_least_integer_is_accepted_and_one_less_refused(name: str, record: dict[str, Any]) -> None:
    (field,) = (field for field in FIELDS if field.name == name)
    assert field.minimum is not None
    # What bounds another field is moved out of the way.
    least = {"rank": 0, "local_rank": 0, "device_used_bytes": 0, "device_free_bytes": 0}
    stormlog.validate_telemetry_record(record | least | {name: field.minimum})
    assert refusal(record | least | {name: field.minimum - 1}).fields == (name,)


@pytest.mark.parametrize("field", [field for field in FIELDS if field.name != "schema_version"], ids=lambda f: f.name)
@pytest.mark.parametrize(("version", "record"), [(2, RECORD_V2), (3, RECORD), (4, RECORD_V4)])
def test_null_is_accepted_where_the_table_says(field: Any, version: int, record: dict[str, Any]) -> None:
    if field.since > version:
        return
    if field.null is not None and field.null <= version:
        stormlog.validate_telemetry_record(record | {field.name: None})
    else:
        assert refusal(record | {field.name: None}).fields == (field.name,)


@pytest.mark.parametrize("flag", CAPABILITY_FLAGS[:7])
def test_v4_counter_that_cannot_be_measured_is_null(flag: str) -> None:
    name = f"{flag.removeprefix('supports_')}_bytes"
    blind = RECORD_V4 | {"metadata": {"memory_capabilities": CAN | {flag: False}}}
    assert refusal(blind).fields[0] == name
    nulls = {name: None} | ({"allocator_change_bytes": None} if name == "allocator_allocated_bytes" else {})
    event = stormlog.telemetry_event_from_record(blind | nulls)
    assert isinstance(event, stormlog.TelemetryEventV4)
    assert stormlog.project_telemetry_event(event).attributes[f"memory.{name.replace('_', '.', 1)}"] is None


@pytest.mark.parametrize("name", CAPABILITIES)
def test_v4_needs_exactly_its_capabilities(name: str) -> None:
    less = {each: value for each, value in CAN.items() if each != name}
    assert name in refusal(RECORD_V4 | {"metadata": {"memory_capabilities": less}}).fields
    assert "more" in refusal(RECORD_V4 | {"metadata": {"memory_capabilities": CAN | {"more": True}}}).fields
    wrong = CAN | {name: 1}
    assert name in str(refusal(RECORD_V4 | {"metadata": {"memory_capabilities": wrong}}))


@pytest.mark.parametrize("found", [None, [], "cuda"])
def test_v4_capabilities_are_an_object(found: object) -> None:
    assert "metadata.memory_capabilities must be an object" in str(
        refusal(RECORD_V4 | {"metadata": {"memory_capabilities": found}})
    )


def test_v3_does_not_look_at_capabilities() -> None:
    stormlog.validate_telemetry_record(RECORD | {"metadata": {"memory_capabilities": 5}})


def test_events_are_checked_when_they_are_made() -> None:
    with pytest.raises(stormlog.RecordError, match="pid must be an integer"):
        stormlog.TelemetryEvent(**(RECORD | {"pid": "x"}))
    with pytest.raises(stormlog.RecordError, match="session_id"):
        stormlog.TelemetryEventV2(**(RECORD_V2 | {"schema_version": 3}))


def test_an_event_and_its_record_are_the_same_both_ways() -> None:
    event = stormlog.telemetry_event_from_record(RECORD)
    assert event == stormlog.TelemetryEvent(**RECORD)
    assert list(stormlog.telemetry_event_to_dict(event)) == list(NAMES)
    assert stormlog.telemetry_event_to_dict(event) == RECORD


def test_metadata_is_a_copy_each_way() -> None:
    metadata = {"a": 1}
    event = stormlog.telemetry_event_from_record(RECORD | {"metadata": metadata})
    event.metadata["b"] = 2
    stormlog.telemetry_event_to_dict(event)["metadata"]["c"] = 3
    assert (metadata, event.metadata) == ({"a": 1}, {"a": 1, "b": 2})


def test_v2_stays_v2_as_a_dict_and_becomes_v3_as_an_event() -> None:
    event = stormlog.TelemetryEventV2(**RECORD_V2)
    assert stormlog.telemetry_event_to_dict(event) == RECORD_V2
    upgraded = stormlog.telemetry_event_from_record(RECORD_V2, default_session_id="s")
    assert (upgraded.schema_version, upgraded.session_id) == (3, "s")
    assert stormlog.project_telemetry_event(event).session_id.startswith("legacy-")


def test_a_session_made_up_depends_on_time_host_and_pid_only() -> None:
    def session(**change: object) -> str:
        return stormlog.telemetry_event_from_record(RECORD_V2 | change).session_id

    assert session() == session(device_id=3, rank=0)
    assert len({session(), session(pid=1), session(host="b"), session(timestamp_ns=1)}) == 4


def test_identity_absent_is_one_process() -> None:
    event = stormlog.telemetry_event_from_record(without("job_id", "rank", "local_rank", "world_size"))
    assert (event.job_id, event.rank, event.local_rank, event.world_size) == (None, 0, 0, 1)
    alone = stormlog.telemetry_event_from_record(without("local_rank"))
    assert alone.local_rank == 1  # as the rank


@pytest.mark.parametrize(
    ("legacy", "expected"),
    [
        pytest.param({"timestamp": 1.5}, {"timestamp_ns": 1_500_000_000}, id="seconds go through float"),
        pytest.param({"timestamp": 3, "timestamp_ns": 7}, {"timestamp_ns": 7}, id="nanoseconds win"),
        pytest.param({"type": "peak"}, {"event_type": "peak"}, id="type"),
        pytest.param({"message": "m"}, {"context": "m"}, id="message"),
        pytest.param({"context": None, "message": "m"}, {"context": None}, id="a null that is there wins"),
        pytest.param({"memory_mb": 1.5}, {"allocator_allocated_bytes": 1572864, "device_id": 0}, id="mebibytes"),
        pytest.param({"memory_mb": "2"}, {"allocator_allocated_bytes": 0}, id="mebibytes that are no number"),
        pytest.param({"memory_allocated": 7}, {"allocator_reserved_bytes": 7, "device_used_bytes": 7}, id="allocated"),
        pytest.param(
            {"memory_allocated": 7, "memory_reserved": 9},
            {"allocator_reserved_bytes": 9, "device_used_bytes": 7},
            id="reserved",
        ),
        pytest.param({"memory_change": -4}, {"allocator_change_bytes": -4}, id="change"),
        pytest.param(
            {"memory_allocated": 7, "total_memory": 10},
            {"device_total_bytes": 10, "device_free_bytes": 3},
            id="free from total",
        ),
        pytest.param({"metadata_total_bytes": 10}, {"device_total_bytes": 10}, id="total in metadata"),
        pytest.param(
            {"total_memory": 1, "device_total": 2, "total_bytes": 3}, {"device_total_bytes": 1}, id="totals in order"
        ),
        pytest.param({"device": "/GPU:3"}, {"device_id": 3}, id="TensorFlow's device"),
        pytest.param({"device": "cuda:11"}, {"device_id": 11}, id="torch's device"),
        pytest.param({"device": "/CPU:0", "memory_mb": 1}, {"device_id": -1}, id="a CPU is no device"),
        pytest.param({"device": "mps"}, {"device_id": -1}, id="a device without number"),
        pytest.param({"device": "gpu:" + "9" * 5000}, {"device_id": -1}, id="a number that is none"),
        pytest.param({"backend": " ROCm "}, {"collector": "stormlog.rocm_tracker"}, id="collector from backend"),
        pytest.param(
            {"backend": "zz", "metadata": {"backend": "cuda"}}, {"collector": "legacy.unknown"}, id="the record's wins"
        ),
        pytest.param({"memory_allocated": 1}, {"collector": "stormlog.cpu_tracker"}, id="collector of a CPU"),
        pytest.param(
            {"memory_allocated": 1, "device_id": 0}, {"collector": "stormlog.cuda_tracker"}, id="collector of a device"
        ),
        pytest.param({"metadata": {"host": "h", "pid": 7}}, {"host": "h", "pid": 7}, id="process in metadata"),
        pytest.param(
            {"metadata": {"a": 1}, "metadata_a": 2, "metadata_b": 3}, {"metadata": {"a": 2, "b": 3}}, id="metadata_*"
        ),
        pytest.param(
            {"metadata": {"job_id": "j", "rank": 2, "world_size": 4, "session_id": "S", "k": 1}},
            {"job_id": "j", "rank": 2, "local_rank": 2, "world_size": 4, "session_id": "S", "metadata": {"k": 1}},
            id="identity in metadata",
        ),
        pytest.param({"what": 1, "ever": 2}, {"metadata": {}}, id="unknown keys are dropped"),
    ],
)
def test_legacy_record_becomes(legacy: dict[str, Any], expected: dict[str, Any]) -> None:
    event = stormlog.telemetry_event_to_dict(stormlog.telemetry_event_from_record({"timestamp": 1, **legacy}))
    assert {name: event[name] for name in expected} == expected
    assert event["schema_version"] == 3


@pytest.mark.parametrize(
    ("legacy", "field"),
    [
        pytest.param({}, "timestamp", id="no time"),
        pytest.param({"timestamp": "1"}, "timestamp", id="text for a time"),
        pytest.param({"timestamp": math.nan}, "timestamp", id="NaN for a time"),
        pytest.param({"timestamp": math.inf}, "timestamp", id="infinity for a time"),
        pytest.param({"timestamp": 10**400}, "timestamp", id="a time beyond float"),
        pytest.param({"timestamp": 1, "memory_mb": math.nan}, "memory_mb", id="NaN for mebibytes"),
        pytest.param({"timestamp": 1, "memory_allocated": 1.5}, "memory_allocated", id="half a byte"),
        pytest.param({"timestamp": 1, "memory_change": None}, "memory_change", id="null change"),
        pytest.param({"timestamp": 1, "total_memory": "1"}, "total_memory", id="text for a total"),
        pytest.param({"timestamp": 1, "metadata": []}, "metadata", id="metadata is a list"),
        pytest.param({"timestamp": 1, "rank": 1}, "rank", id="rank outside its world"),
        pytest.param({"timestamp": 1, "device_id": "0"}, "device_id", id="text for a device"),
        pytest.param({"timestamp": -1}, "timestamp_ns", id="before 1970"),
    ],
)
def test_legacy_record_is_refused(legacy: dict[str, Any], field: str) -> None:
    with pytest.raises(stormlog.RecordError) as caught:
        stormlog.telemetry_event_from_record(legacy)
    assert caught.value.fields[0] == field


def test_legacy_record_never_takes_the_readers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "mine"}.items():
        monkeypatch.setenv(name, value)
    event = stormlog.telemetry_event_from_record({"timestamp": 1})
    assert (event.job_id, event.rank, event.world_size) == (None, 0, 1)
    assert stormlog.resolve_distributed_identity()["world_size"] == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(
            {"rank": 0, "metadata": {"rank": 1, "world_size": 3}, "env": {"RANK": "2", "WORLD_SIZE": "4"}},
            (None, 0, 2, 3),
            id="argument, then metadata, then launcher",
        ),
        pytest.param({"rank": 3, "world_size": 4}, (None, 3, 3, 4), id="local rank is the rank"),
        pytest.param(
            {"env": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}},
            (None, 1, 0, 2),
            id="Open MPI",
        ),
        pytest.param(
            {"env": {"RANK": "1", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_JOB_ID": " 7 "}},
            ("7", 2, 2, 4),
            id="half a launcher does not count",
        ),
        pytest.param({"env": {"TORCHELASTIC_RUN_ID": " ", "SLURM_JOB_ID": "9"}}, ("9", 0, 0, 1), id="blank job"),
    ],
)
def test_identity_is_resolved(given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = stormlog.resolve_distributed_identity(**given)
    assert (found["job_id"], found["rank"], found["local_rank"], found["world_size"]) == expected


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"rank": True, "world_size": 2}, "rank"),
        ({"env": {"RANK": "one", "WORLD_SIZE": "2"}}, "rank"),
        ({"env": {"RANK": "0", "WORLD_SIZE": "0"}}, "world_size"),
        ({"job_id": 7}, "job_id"),
        ({"metadata": "text"}, "metadata"),
    ],
)
def test_identity_is_refused(given: dict[str, Any], field: str) -> None:
    with pytest.raises(stormlog.RecordError) as caught:
        stormlog.resolve_distributed_identity(**given)
    assert caught.value.fields[0] == field


SCOPE = {"name": "forward", "path": ["step", "forward"], "scope_id": 7, "parent_scope_id": None, "sequence": 0}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param({"metadata": {"backend": "MPS"}}, {"source_kind": "mps"}, id="kind by backend"),
        pytest.param({"collector": "my.CPU.thing"}, {"source_kind": "cpu"}, id="kind by collector"),
        pytest.param({"collector": "mine"}, {"source_kind": "gpu"}, id="kind by device"),
        pytest.param({"collector": "mine", "device_id": -1}, {"source_kind": "other"}, id="no kind"),
        pytest.param({"metadata": {"phase_scope": SCOPE}}, {"stage": "forward"}, id="stage by name"),
        pytest.param({"metadata": {"phase_scope": {"path": ["a", "b"]}}}, {"stage": "b"}, id="stage by path"),
        pytest.param({"metadata": {"phase_scope": {"path": []}}}, {"stage": None}, id="no stage"),
        pytest.param({"event_type": " Critical "}, {"severity": "critical"}, id="severity by type"),
        pytest.param({"event_type": "allocation"}, {"severity": None}, id="no severity"),
        pytest.param(
            {"metadata": {"severity": " WARN ", "severity_text": 7}},
            {"severity": "warn", "severity_text": "7"},
            id="severity told",
        ),
    ],
)
def test_projection(change: dict[str, Any], expected: dict[str, Any]) -> None:
    record = stormlog.project_telemetry_event(RECORD | change)
    assert {name: getattr(record, name) for name in expected} == expected


def test_projection_is_read_only_all_the_way_down() -> None:
    record = stormlog.project_telemetry_event(RECORD | {"metadata": {"a": {"b": [1, {"c": 2}]}, 5: 6}})
    assert record.attributes["a"]["b"] == (1, {"c": 2})
    assert record.attributes["5"] == 6
    for mapping in (record.attributes, record.attributes["a"], record.resource, record.correlation):
        with pytest.raises(TypeError):
            mapping["x"] = 1  # type: ignore[index]


def test_projection_correlates_by_phase() -> None:
    record = stormlog.project_telemetry_event(RECORD | {"metadata": {"phase_scope": SCOPE}})
    assert record.correlation["phase.scope_id"] == 7
    assert record.correlation["phase.sequence"] == 0
    assert "phase.parent_scope_id" not in record.correlation


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
metadata = st.dictionaries(st.text(max_size=8), json_values, max_size=4)


@given(metadata, st.text(min_size=1), st.integers())
def test_record_id_hashes_the_json_of_the_record(held: dict[str, Any], host: str, device: int) -> None:
    record = RECORD | {"metadata": held, "context": host, "device_id": device}
    expected = json.dumps(record, sort_keys=True)
    assert _json(record) == expected
    digest = hashlib.sha256(expected.encode()).hexdigest()[:32]
    assert stormlog.project_telemetry_event(record).record_id == f"telemetry-{digest}"


odd = st.sampled_from([None, True, 0, 1, -1, -2, 5, 1.0, math.nan, 10**30, "", " ", "x", "3", [], {}])  # type: ignore[var-annotated]
names = st.sampled_from(
    [*NAMES, "timestamp", "type", "message", "memory_mb", "memory_allocated", "device", "total_memory", "backend"]
)
changed = st.builds(
    lambda base, gone, changes: {name: value for name, value in (base | changes).items() if name not in gone},
    st.sampled_from([RECORD, RECORD_V2, RECORD_V4, {"timestamp": 1.5}, {}]),
    st.sets(names, max_size=2),
    st.dictionaries(names | st.text(max_size=12), odd | json_values, max_size=4),
)


@settings(max_examples=500)
@given(changed | json_values | st.dictionaries(st.none() | st.integers() | st.text(), json_values))
def test_any_value_ends_in_an_event_or_a_record_error(value: Any) -> None:
    for call in (stormlog.validate_telemetry_record, stormlog.project_telemetry_event):
        try:
            call(value)
        except stormlog.RecordError:
            continue


@settings(max_examples=500)
@given(changed)
def test_the_quick_answer_is_the_thorough_one(record: dict[str, Any]) -> None:
    """A record of the same types is learned first, so that the quick way has an opinion."""
    layout = LAYOUTS.get(record.get("schema_version", 0)) if type(record.get("schema_version")) is int else None
    if layout is None:
        assert accepted(record) is None
        return
    try:
        values = layout.check(record)
    except stormlog.RecordError:
        try:
            assert accepted(record) is None
        except stormlog.RecordError:
            assert layout.version == 4
    else:
        quick = accepted(record)
        assert quick is None or (quick[0] is layout and str(quick[1]) == str(values))


def test_a_subclass_of_int_is_an_integer() -> None:
    class Pid(int):
        pass

    assert stormlog.telemetry_event_from_record(RECORD | {"pid": Pid(7)}).pid == 7


def test_a_lone_surrogate_is_a_host_like_any_other() -> None:
    event = stormlog.telemetry_event_from_record({"timestamp": 1, "host": "\ud800"})
    assert event.session_id.startswith("legacy-")
    assert stormlog.project_telemetry_event(event).resource["host"] == "\ud800"


def test_what_contains_itself_is_refused() -> None:
    held: dict[str, Any] = {}
    held["itself"] = held
    with pytest.raises(stormlog.RecordError, match="metadata"):
        stormlog.project_telemetry_event(RECORD | {"metadata": held})


def test_a_value_that_cannot_be_shown_is_refused_all_the_same() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError

    assert "pid must be an integer" in str(refusal(RECORD | {"pid": Odd()}))


def test_the_types_of_events_agree_with_the_table() -> None:
    for version, kind in (
        (2, stormlog.TelemetryEventV2),
        (3, stormlog.TelemetryEventV3),
        (4, stormlog.TelemetryEventV4),
    ):
        hints = {field.name: field.type for field in dataclasses.fields(kind)}
        assert set(hints) == set(LAYOUTS[version].names)
        for field in LAYOUTS[version].fields:
            nullable = field.null is not None and field.null <= version
            assert ("None" in hints[field.name]) == nullable
