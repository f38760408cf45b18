"""Logs: given these events, exactly these log records. `whole_run` as OTLP JSON stands here in full."""

from __future__ import annotations

import json
from typing import Any

import pytest
from harness.events_of import SessionEvents, restored, whole_run

from stepspan import __version__
from stepspan.mapping.mapper import mapper
from stepspan.mapping.records import Log
from stepspan.otlp import json as otlp_json

WHOLE_RUN = r"""
{"resourceLogs": [
  {"resource": {"attributes": [
     {"key": "service.name", "value": {"stringValue": "training"}},
     {"key": "rank", "value": {"intValue": "0"}}]},
   "scopeLogs": [
    {"scope": {"name": "stepspan", "version": "VERSION"},
     "logRecords": [
      {"timeUnixNano": "1760000000002000000",
       "observedTimeUnixNano": "1760000000002000000",
       "severityNumber": 9,
       "severityText": "INFO",
       "body": {"stringValue": "{\"lr\":0.5,\"model\":{\"width\":8}}"},
       "eventName": "training.hyperparams",
       "attributes": [
        {"key": "lr", "value": {"doubleValue": 0.5}},
        {"key": "model.width", "value": {"intValue": "8"}}],
       "traceId": "aea4eb54eb251bd937e988143f204e4d",
       "flags": 1,
       "spanId": "732a36b52b908bea"},
      {"timeUnixNano": "1760000001006000000",
       "observedTimeUnixNano": "1760000001006000000",
       "severityNumber": 9,
       "severityText": "INFO",
       "body": {"stringValue": "checkpoint ckpt: /tmp/ckpt.pt"},
       "eventName": "training.artifact",
       "attributes": [
        {"key": "name", "value": {"stringValue": "ckpt"}},
        {"key": "path", "value": {"stringValue": "/tmp/ckpt.pt"}},
        {"key": "kind", "value": {"stringValue": "checkpoint"}},
        {"key": "step", "value": {"intValue": "0"}}],
       "traceId": "aea4eb54eb251bd937e988143f204e4d",
       "flags": 1,
       "spanId": "732a36b52b908bea"}]}]}]}"""


def test_a_whole_run_is_exactly_this_otlp() -> None:
    s = whole_run()
    body = otlp_json.encode("logs", s.header["resource"], s.records("logs", status="completed"))
    assert json.loads(body) == json.loads(WHOLE_RUN.replace("VERSION", __version__))


def test_a_log_stands_in_the_span_it_was_logged_in() -> None:
    s = SessionEvents()
    run = s.run()
    step = s.emit("step_begin", parent=run, step=0, split="train")
    s.emit("event", parent=step, name="in step")
    span = s.emit("span_begin", parent=step, name="forward")
    s.emit("event", parent=span, name="in span")
    s.emit("span_end", begin=span)
    s.emit("step_end", begin=step)
    s.emit("event", parent=step, name="step is over")
    s.emit("event", parent=0, name="in nothing")
    spans = {span.name: (span.trace_id, span.span_id) for span in s.records("traces", status="completed")}
    assert [(log.event_name, log.trace_id, log.span_id) for log in s.records("logs")] == [
        ("in step", *spans["training.step"]),
        ("in span", *spans["forward"]),
        ("step is over", *spans["training.run"]),
        ("in nothing", *spans["training.run"]),
    ]


def test_without_a_run_a_log_has_no_ids() -> None:
    s = SessionEvents()
    s.emit("hyperparams", params={"lr": 0.5})
    assert s.records("logs") == [Log(s.ts, 9, '{"lr":0.5}', "training.hyperparams", {"lr": 0.5}, None, None)]


@pytest.mark.parametrize(
    ("status", "severity", "body"),
    [
        (None, 9, "checkpoint"),
        ("ok", 9, "checkpoint: ok"),
        ("failed", 17, "checkpoint: failed"),
        ("FAILED", 17, "checkpoint: FAILED"),
        ("error", 17, "checkpoint: error"),
    ],
)
def test_a_milestone_is_as_severe_as_its_status(status: str | None, severity: int, body: str) -> None:
    s = SessionEvents()
    fields = {} if status is None else {"status": status}
    s.emit("event", parent=0, name="checkpoint", attributes={"n": 1, "status": "the user's"}, **fields)  # type: ignore[arg-type]
    (log,) = s.records("logs")
    assert (log.severity, log.body, log.event_name) == (severity, body, "checkpoint")
    assert log.attributes == {"n": 1, "status": status or "the user's"}


def test_an_exception_is_an_error_with_its_stack_trace() -> None:
    s = SessionEvents()
    about = {"type": "ValueError", "message": "boom", "stack": "Traceback …"}
    s.emit("error", parent=0, **about, attributes={"batch": 3, "exception.type": "the user's"})  # type: ignore[arg-type]
    assert s.records("logs") == [
        Log(
            s.ts,
            17,
            "ValueError: boom",
            "exception",
            {
                "batch": 3,
                "exception.type": "ValueError",
                "exception.message": "boom",
                "exception.stacktrace": "Traceback …",
            },
        )
    ]


def test_a_gap_in_the_journal_is_a_warning() -> None:
    s = SessionEvents()
    s.emit("gap", dropped=12, why="No space left on device")
    assert s.records("logs") == [
        Log(
            s.ts,
            13,
            "12 events could not be written: No space left on device",
            "stepspan.gap",
            {"dropped": 12},
        )
    ]


def test_ten_megabytes_of_hyperparameters_are_cut_to_what_a_backend_takes() -> None:
    s = SessionEvents()
    many = {f"layer{number}": {f"p{n}": n for n in range(100)} for number in range(1000)}
    s.emit("hyperparams", params={"text": "x" * 10_000_000 + "end", "list": list(range(100_000)), **many})
    (log,) = s.records("logs")
    assert len(log.body) < 17_000
    assert len(log.attributes) == 128
    assert len(log.attributes["text"]) < 17_000
    assert log.attributes["text"].endswith("end")
    assert len(log.attributes["list"]) < 17_000


def test_what_is_neither_number_nor_text_nor_a_list_of_them_is_told_as_text() -> None:
    s = SessionEvents()
    s.emit(
        "hyperparams", params={"none": None, "flag": True, "pairs": [[1, 2]], "dict": {"a": {"b": 0.5}}, "l": [1, "a"]}
    )
    (log,) = s.records("logs")
    assert log.attributes == {"flag": True, "pairs": "[[1, 2]]", "dict.a.b": 0.5, "l": [1, "a"]}


@pytest.mark.parametrize("bent", [{"params": 3}, {"params": [1]}], ids=str)
def test_an_event_bent_out_of_shape_costs_that_event(bent: dict[str, Any]) -> None:
    s = SessionEvents()
    s.emit("hyperparams", **bent)
    s.emit("event", parent=0, name="later")
    assert [log.event_name for log in s.records("logs")] == ["later"]


def test_metrics_and_unknown_events_are_no_logs() -> None:
    s = SessionEvents()
    s.metrics({"loss": 1.0})
    s.emit("something_of_a_later_version", x=1)
    for signal in ("metrics", "traces", "logs"):
        assert all(record[1] == s.ts - 1_000_000 for record in s.records(signal)), signal
    assert s.records("logs", status="interrupted") == []


def test_a_restart_in_the_middle_of_everything_changes_no_log() -> None:
    s = whole_run()
    for cut in range(len(s.events) + 1):
        fold = mapper("logs", s.header)
        first = fold.map(s.events[:cut])
        assert first + restored("logs", s.header, fold.state()).map(s.events[cut:]) == s.records("logs")


def test_attributes_beyond_their_number_are_counted() -> None:
    params = {"model": {f"layer{n}": n for n in range(200)}, "none": None}
    s = SessionEvents()
    s.emit("hyperparams", params=params)
    s.emit("event", name="e", attributes=params, status="ok")
    s.emit("error", type="ValueError", message="m", stack="s", attributes=params)
    s.emit("log", severity="info", logger="l", message="m", attributes=params)
    s.emit("hyperparams", params={"lr": 0.5}, cut=240_000)
    assert [(len(log.attributes), log.dropped_attributes) for log in s.records("logs")] == [
        (128, 72), (129, 72), (131, 72), (129, 72), (1, 240_000),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "params",
    [
        {f"key{n}": "x" * 100 for n in range(1000)},
        {"prompt": '"quoted" \\ é\n' * 10_000, "lr": 0.5},
        {"layers": list(range(100_000)), "lr": 0.5},
        {"k" * 50_000: 1, "lr": 0.5},
        {"deep": {"er": {"still": ["x" * 200] * 1000}}, "lr": 0.5},
    ],
    ids=["many", "long text", "long list", "long key", "nested"],
)
def test_the_body_of_hyperparameters_stays_json_whatever_they_are(params: dict[str, Any]) -> None:
    s = SessionEvents()
    s.emit("hyperparams", params=params)
    (log,) = s.records("logs")
    assert len(log.body) <= 16 << 10
    body = json.loads(log.body)
    if "lr" in params:
        assert body["lr"] == 0.5
    else:
        assert (body["key0"], body["..."]) == ("x" * 100, f"{1000 - len(body) + 1} more")


def test_what_was_dropped_is_an_event_by_its_key() -> None:
    s = SessionEvents()
    s.emit("dropped", key="loss", count=1, why="not a number")
    s.emit("dropped", key="hyperparams.dir", count=4, why="missing")
    assert [(log.event_name, log.severity, log.body, log.attributes) for log in s.records("logs")] == [
        ("stepspan.dropped_value", 13, "1 value of loss not recorded: not a number", {"key": "loss", "count": 1}),
        (
            "stepspan.dropped_value",
            13,
            "4 values of hyperparams.dir not recorded: missing",
            {"key": "hyperparams.dir", "count": 4},
        ),
    ]
