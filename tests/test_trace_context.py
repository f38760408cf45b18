"""A run that an orchestrator has started: its span leads to the orchestrator's, or is its child."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.events_of import SessionEvents
from harness.processes import until
from harness.receiver import ScriptedReceiver
from harness.runs import events, python, spans
from opentelemetry.sdk.trace import TracerProvider

from stepspan.otlp.endpoint import PROTOCOLS
from stepspan.otlp.json import encode
from stepspan.run import Run

start = runs.start

E = "OTEL_EXPORTER_OTLP_"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"
TRAIN = """
import stepspan
with stepspan.start_run(job_id="job", directory="stepspan-runs") as run:
    for step in run.steps(range(2)):
        run.log_metrics({"loss": 1.0})
    print(run.trace_id)
"""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_run_links_to_the_span_that_started_it(tmp_path: Path, protocol: str) -> None:
    with ScriptedReceiver() as receiver:
        variables = {
            f"{E}ENDPOINT": receiver.grpc_target if protocol == "grpc" else receiver.url,
            f"{E}PROTOCOL": protocol,
            "TRACEPARENT": f'"{PARENT}"',
            "TRACESTATE": "vendor=1",
            "OTEL_PROPAGATORS": "tracecontext,baggage",
        }
        trained = python(TRAIN, tmp_path, **variables)
        [run] = until(lambda: messages(receiver, "training.run"))
    assert run.trace_id.hex() == trained.stdout.strip() != TRACE
    assert run.parent_span_id == b""
    [link] = run.links
    assert (link.trace_id.hex(), link.span_id.hex(), link.trace_state) == (TRACE, SPAN, "vendor=1")
    assert {pair.key: pair.value.string_value for pair in link.attributes} == {"relation": "caller"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_with_propagation_that_span_is_the_parent(tmp_path: Path, protocol: str) -> None:
    with ScriptedReceiver() as receiver:
        variables = {
            f"{E}ENDPOINT": receiver.grpc_target if protocol == "grpc" else receiver.url,
            f"{E}PROTOCOL": protocol,
            "TRACEPARENT": PARENT,
            "TRACESTATE": "vendor=1",
            "STEPSPAN_PROPAGATE": "1",
        }
        trained = python(TRAIN, tmp_path, **variables)
        [run] = until(lambda: messages(receiver, "training.run"))
        steps = messages(receiver, "training.step")
    assert trained.stdout.strip() == run.trace_id.hex() == TRACE
    assert (run.parent_span_id.hex(), run.trace_state, list(run.links)) == (SPAN, "vendor=1", [])
    assert len(steps) == 2
    for step in steps:
        assert step.trace_id.hex() != TRACE
        assert [(link.trace_id, link.span_id) for link in step.links] == [(run.trace_id, run.span_id)]


def messages(receiver: ScriptedReceiver, name: str) -> list[Any]:
    """The spans of this name that were taken, as protobuf."""
    scopes = [s for request in receiver.requests["traces"] for r in request.resource_spans for s in r.scope_spans]
    return [span for scope in scopes for span in scope.spans if span.name == name]


def test_what_is_recorded_in_a_joined_run_has_the_ids_that_are_sent(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACEPARENT", PARENT)
    with start(propagate=True) as run:
        recorded = {"training.run": run._scopes.ids(run._scope)}
        with run.epoch(0) as epoch:
            recorded["training.epoch 0"] = run._scopes.ids(epoch)
            with run.span("load") as load:
                recorded["load"] = run._scopes.ids(load)
        with run.span("eval") as span:
            recorded["eval"] = run._scopes.ids(span)
    sent = {name: (span.trace_id, span.span_id) for name, span in spans(run).items()}
    assert sent == recorded
    assert spans(run)["eval"].links[0].trace_id.hex() == TRACE


def test_the_program_s_current_span_goes_before_the_variable_and_a_scope_of_ours_is_none(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACEPARENT", PARENT)
    with TracerProvider().get_tracer("orchestrator").start_as_current_span("task") as task:
        context = task.get_span_context()
        with start(job_id="a") as outer, outer.step(0), start(job_id="b") as inner:
            pass
    assert context is not None
    [link] = spans(outer)["training.run"].links
    assert (int.from_bytes(link.trace_id, "big"), int.from_bytes(link.span_id, "big")) == (
        context.trace_id,
        context.span_id,
    )
    assert events(inner, "run_begin")[0]["traceparent"] == PARENT
    assert "tracestate" not in events(outer, "run_begin")[0]


@pytest.mark.parametrize(
    "value",
    [
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{SPAN}-01",
        "garbage",
        "\u00e9",
    ],
)
def test_what_is_no_traceparent_is_ignored_with_a_warning(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    monkeypatch.setenv("TRACEPARENT", value)
    with start() as run:
        pass
    assert "traceparent" not in events(run, "run_begin")[0]
    [told] = [
        r.getMessage()
        for r in caplog.records
        if "TRACEPARENT" in r.getMessage() and "warnings of" not in r.getMessage()
    ]
    assert "not a traceparent" in told


@pytest.mark.parametrize(
    ("variables", "taken"),
    [
        ({}, True),
        ({"OTEL_PROPAGATORS": "TraceContext , b3"}, True),
        ({"OTEL_PROPAGATORS": "b3"}, False),
        ({"OTEL_PROPAGATORS": "none"}, False),
    ],
)
def test_propagators_say_whether_it_is_read(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], taken: bool
) -> None:
    for name, value in {"TRACEPARENT": PARENT.upper(), **variables}.items():
        monkeypatch.setenv(name, value)
    with start() as run:
        pass
    assert events(run, "run_begin")[0].get("traceparent") == (PARENT if taken else None)


@pytest.mark.parametrize("state", ["x" * 513, "a\u00e9=1"])
def test_a_state_that_cannot_be_sent_is_left_out(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setenv("TRACEPARENT", PARENT)
    monkeypatch.setenv("TRACESTATE", state)
    with start() as run:
        pass
    begin = events(run, "run_begin")[0]
    assert "traceparent" in begin
    assert "tracestate" not in begin


@pytest.mark.parametrize(
    "fields", [{"traceparent": 7, "joins": True}, {"traceparent": "x"}, {"traceparent": PARENT, "tracestate": 1}]
)
def test_fields_that_a_processor_has_bent_cost_no_span(fields: dict[str, Any]) -> None:
    s = SessionEvents()
    s.emit("run_end", begin=s.run(**fields), status="completed")
    [run] = s.records("traces", status="completed")
    assert json.loads(encode("traces", {}, [run]))
