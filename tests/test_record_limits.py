"""What the variables for samplers, limits and exemplars leave of spans, log records and histograms."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import pytest
from harness import runs
from harness.events_of import SessionEvents, mapper
from harness.processes import until
from harness.receiver import ScriptedReceiver
from harness.runs import command, python
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from stepspan.exporters.sdk import SdkExporter
from stepspan.mapping.options import DEFAULT_OPTIONS, MappingOptions
from stepspan.mapping.records import Signal
from stepspan.otlp import json as otlp_json
from stepspan.otlp.endpoint import PROTOCOLS
from stepspan.otlp.record_variables import NAMES, read_record_variables
from stepspan.run import Run

start = runs.start

E = "OTEL_EXPORTER_OTLP_"


def options(**variables: str) -> MappingOptions:
    found, ignored = read_record_variables(variables)
    assert ignored == ()
    return found


def full_session() -> SessionEvents:
    """Many attributes, events and steps, long texts, and what an SDK handed over."""
    s = SessionEvents()
    run = s.run(name="digits")
    s.emit("hyperparams", params={f"p{number}": "x" * 40 for number in range(200)})
    for number in range(150):
        s.emit("event", name="milestone", attributes={"n": number, "note": "y" * 40, "list": ["z" * 40, 1]})
    for number in range(40):
        step = s.emit("step_begin", 0.5, parent=run, step=number, split="train")
        span = s.emit("span_begin", parent=step, name="forward", attributes={"a": 1, "b": "w" * 40})
        s.emit("span_end", begin=span)
        s.emit("step_end", 0.25, begin=step)
    s.emit(
        "error", parent=run, type="ValueError", message="m" * 40, stack="s" * 40, attributes={"batch": 7, "loss": 2.0}
    )
    pairs = [{"key": f"k{n}", "value": {"stringValue": "v" * 40}} for n in range(5)]
    linked = {"traceId": "0a" * 16, "spanId": "0b" * 8, "attributes": pairs}
    span_record = {
        "traceId": "0c" * 16,
        "spanId": "0d" * 8,
        "name": "GET",
        "kind": 1,
        "flags": 256,
        "startTimeUnixNano": str(s.ts),
        "endTimeUnixNano": str(s.ts),
        "attributes": pairs,
        "events": [{"timeUnixNano": str(s.ts), "name": "e", "attributes": pairs} for _ in range(5)],
        "links": [linked for _ in range(5)],
        "droppedAttributesCount": 2,
    }
    s.emit("otel", signal="traces", scope={"name": "lib"}, record=span_record)
    nested = {"key": "map", "value": {"kvlistValue": {"values": pairs}}}
    log_record = {"timeUnixNano": str(s.ts), "body": {"stringValue": "v" * 40}, "attributes": [nested, *pairs]}
    s.emit("otel", signal="logs", scope={"name": "lib"}, record=log_record)
    s.emit("run_end", begin=run, status="completed")
    return s


def sent(signal: Signal, wanted: MappingOptions, session: SessionEvents | None = None) -> tuple[list[Any], int]:
    """The records as OTLP JSON, and how many were filtered."""
    s = session or full_session()
    fold = mapper(signal, s.header, wanted)
    records = [*fold.map(s.events), *fold.finish(s.closed("completed"))]
    request = json.loads(otlp_json.encode(signal, s.header["resource"], records))
    scopes = request[{"traces": "resourceSpans", "logs": "resourceLogs"}[signal]][0]
    found = scopes["scopeSpans" if signal == "traces" else "scopeLogs"]
    return [
        record for scope in found for record in scope["spans" if signal == "traces" else "logRecords"]
    ], fold.filtered


def attributes(holder: Any) -> dict[str, Any]:
    return {pair["key"]: next(iter(pair["value"].values())) for pair in holder["attributes"]}


def by_name(spans: list[Any], name: str) -> Any:
    return next(span for span in spans if span["name"] == name)


def test_without_variables_nothing_changes() -> None:
    assert options() == DEFAULT_OPTIONS
    assert options().key() == {}
    run = by_name(sent("traces", options())[0], "training.run")
    assert (len(run["events"]), run["droppedEventsCount"]) == (128, 23)


def test_span_attributes_have_a_limit_and_the_rest_is_counted() -> None:
    spans, filtered = sent("traces", options(OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT="3"))
    run, child, other = by_name(spans, "training.run"), by_name(spans, "forward"), by_name(spans, "GET")
    assert (len(run["attributes"]), run["droppedAttributesCount"]) == (3, 200 + 6 - 3)
    assert len(child["attributes"]) == 2
    assert "droppedAttributesCount" not in child
    assert (len(other["attributes"]), other["droppedAttributesCount"]) == (3, 2 + 2)
    assert len(run["events"]) == 128
    assert filtered == 0


def test_more_than_the_default_may_be_asked_for() -> None:
    variables = {"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "500", "OTEL_SPAN_EVENT_COUNT_LIMIT": "140"}
    run = by_name(sent("traces", options(**variables))[0], "training.run")
    assert len([pair for pair in run["attributes"] if pair["key"].startswith("hyperparams.")]) == 200
    assert "droppedAttributesCount" not in run
    assert (len(run["events"]), run["droppedEventsCount"]) == (140, 11)


def test_the_general_limit_is_each_kind_s_where_it_has_none() -> None:
    variables = {"OTEL_ATTRIBUTE_COUNT_LIMIT": "1", "OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT": "2"}
    spans, _ = sent("traces", options(**variables))
    run, step, other = by_name(spans, "training.run"), by_name(spans, "training.step"), by_name(spans, "GET")
    assert len(run["attributes"]) == len(step["attributes"]) == len(step["links"][0]["attributes"]) == 1
    assert (len(run["events"][0]["attributes"]), run["events"][0]["droppedAttributesCount"]) == (2, 1)
    assert (len(other["links"][0]["attributes"]), other["links"][0]["droppedAttributesCount"]) == (1, 4)
    assert (len(other["events"][0]["attributes"]), other["events"][0]["droppedAttributesCount"]) == (2, 3)
    logs, _ = sent("logs", options(**variables))
    assert {len(record["attributes"]) for record in logs} == {1}
    assert logs[0]["droppedAttributesCount"] == 199


def test_what_an_exception_is_goes_before_what_the_user_adds() -> None:
    limited = options(
        OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT="3",
        OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT="3",
        OTEL_SPAN_EVENT_COUNT_LIMIT="200",
    )
    [error] = [e for e in by_name(sent("traces", limited)[0], "training.run")["events"] if e["name"] == "exception"]
    [record] = [each for each in sent("logs", limited)[0] if each.get("eventName") == "exception"]
    for each in (error, record):
        assert {pair["key"] for pair in each["attributes"]} == {
            f"exception.{name}" for name in ("type", "message", "stacktrace")
        }
        assert each["droppedAttributesCount"] == 2


def test_events_and_links_have_limits() -> None:
    spans, _ = sent("traces", options(OTEL_SPAN_EVENT_COUNT_LIMIT="2", OTEL_SPAN_LINK_COUNT_LIMIT="0"))
    run, step, other = by_name(spans, "training.run"), by_name(spans, "training.step"), by_name(spans, "GET")
    assert (len(run["events"]), run["droppedEventsCount"]) == (2, 149)
    assert (step.get("links", []), step["droppedLinksCount"]) == ([], 1)
    assert (len(other["events"]), other["droppedEventsCount"]) == (2, 3)
    assert (other["links"], other["droppedLinksCount"]) == ([], 5)


@pytest.mark.parametrize("name", ["OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT"])
def test_texts_of_spans_are_cut_in_lists_as_well(name: str) -> None:
    spans, _ = sent("traces", options(**{name: "10"}))
    run, child, other = by_name(spans, "training.run"), by_name(spans, "forward"), by_name(spans, "GET")
    assert attributes(run)["hyperparams.p0"] == "x" * 10
    assert attributes(child) == {"a": "1", "b": "w" * 10}
    assert attributes(other)["k0"] == "v" * 10
    note = run["events"][0]
    is_general = name.startswith("OTEL_ATTRIBUTE")
    assert attributes(note)["note"] == "y" * (10 if is_general else 40)
    assert "droppedAttributesCount" not in child


def test_texts_of_log_records_are_cut_and_their_bodies_are_not() -> None:
    logs, _ = sent("logs", options(OTEL_LOGRECORD_ATTRIBUTE_VALUE_LENGTH_LIMIT="5"))
    other = logs[-1]
    assert other["body"] == {"stringValue": "v" * 40}
    assert "v" * 6 not in json.dumps(other["attributes"])
    assert "v" * 5 in json.dumps(other["attributes"][0])
    assert sent("traces", options(OTEL_LOGRECORD_ATTRIBUTE_VALUE_LENGTH_LIMIT="5")) == sent("traces", options())


def test_always_off_sends_no_span_and_counts_each() -> None:
    everything, _ = sent("traces", options())
    for name in ("always_off", "parentbased_always_off"):
        fold = mapper("traces", full_session().header, options(OTEL_TRACES_SAMPLER=name))
        s = full_session()
        assert [*fold.map(s.events), *fold.finish(s.closed())] == []
        assert fold.filtered == len(everything)


def test_a_ratio_keeps_whole_traces_the_same_ones_in_all_ranks() -> None:
    half = options(OTEL_TRACES_SAMPLER="traceidratio", OTEL_TRACES_SAMPLER_ARG="0.5")
    kept = []
    for rank in (0, 1):
        s = SessionEvents(rank=rank, world_size=2)
        s.run()
        for number in range(200):
            span = s.emit("step_begin", 0.5, parent=2, step=number, split="train")
            s.emit("span_end", begin=s.emit("span_begin", parent=span, name="forward"))
            s.emit("step_end", 0.2, begin=span)
        spans, filtered = sent("traces", half, s)
        steps = {span["traceId"] for span in spans if span["name"] == "training.step"}
        assert {span["traceId"] for span in spans if span["name"] == "forward"} == steps
        assert 60 < len(steps) < 140
        assert filtered + len(spans) == 401
        kept.append(steps)
    assert kept[0] == kept[1]


def exemplars(wanted: MappingOptions) -> list[Any]:
    s = full_session()
    fold = mapper("metrics", s.header, wanted)
    records = [*fold.map(s.events), *fold.finish(s.closed("completed"))]
    text = json.loads(otlp_json.encode("metrics", s.header["resource"], records))
    metrics = text["resourceMetrics"][0]["scopeMetrics"][0]["metrics"]
    histograms = [m["exponentialHistogram"]["dataPoints"] for m in metrics if "exponentialHistogram" in m]
    return [exemplar for points in histograms for point in points for exemplar in point.get("exemplars", ())]


def test_exemplars_are_of_traces_that_go_out() -> None:
    assert exemplars(options())
    assert exemplars(options(OTEL_METRICS_EXEMPLAR_FILTER="always_on"))
    assert not exemplars(options(OTEL_METRICS_EXEMPLAR_FILTER="always_off"))
    assert not exemplars(options(OTEL_TRACES_SAMPLER="always_off"))
    quarter = options(OTEL_TRACES_SAMPLER="traceidratio", OTEL_TRACES_SAMPLER_ARG="0.25")
    traces = {span["traceId"] for span in sent("traces", quarter)[0]}
    assert {each["traceId"] for each in exemplars(quarter)} <= traces


@pytest.mark.parametrize("signal", ["metrics", "traces", "logs"])
def test_batches_and_restarts_change_nothing(signal: Signal) -> None:
    wanted = options(
        **{name: "7" for name in NAMES if name.endswith("LIMIT")},
        OTEL_TRACES_SAMPLER="traceidratio",
        OTEL_TRACES_SAMPLER_ARG="0.5",
    )
    assert wanted.key() == json.loads(orjson.dumps(wanted.key()))
    s = full_session()
    once = mapper(signal, s.header, wanted)
    expected = [*once.map(s.events), *once.finish(s.closed())]
    pieces: list[Any] = []
    state: Any = None
    for first in range(0, len(s.events), 37):
        fold = mapper(signal, s.header, wanted)
        if state is not None:
            fold.restore(orjson.loads(orjson.dumps(state)))
        pieces += fold.map(s.events[first : first + 37])
        state = fold.state()
    pieces += fold.finish(s.closed())
    encode = otlp_json.encode
    assert sorted(encode(signal, {}, [each]) for each in pieces) == sorted(
        encode(signal, {}, [each]) for each in expected
    )
    assert fold.filtered == once.filtered


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("OTEL_TRACES_SAMPLER", "sometimes", "always_on, always_off, traceidratio"),
        ("OTEL_SPAN_EVENT_COUNT_LIMIT", "many", "whole number"),
        ("OTEL_ATTRIBUTE_COUNT_LIMIT", "-1", "whole number"),
        ("OTEL_METRICS_EXEMPLAR_FILTER", "some", "trace_based"),
    ],
)
def test_a_value_that_says_nothing_is_told(name: str, value: str, fix: str) -> None:
    found, [ignored] = read_record_variables({name: value})
    assert asdict(found) == asdict(DEFAULT_OPTIONS)
    assert ignored.startswith(f"{name}='{value}'")
    assert fix in ignored


def test_a_ratio_out_of_range_is_told() -> None:
    found, [ignored] = read_record_variables({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "50%"})
    assert found == DEFAULT_OPTIONS
    assert ignored.startswith("OTEL_TRACES_SAMPLER_ARG='50%': must be a number from 0 to 1")


def test_an_exporter_of_the_sdk_takes_what_the_variables_leave(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "1")
    spans = InMemorySpanExporter()
    with start(exporters=[SdkExporter(span=spans)], samplers=[]) as run:
        with run.span("load", a=1, b=2):
            pass
        assert run.flush(20)
    [span] = [span for span in spans.get_finished_spans() if span.name == "load"]
    assert dict(span.attributes or {}) == {"a": 1}
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    nothing = InMemorySpanExporter()
    with start(exporters=[SdkExporter(span=nothing, destination="other")], samplers=[]) as run:
        with run.span("load"):
            pass
        assert run.flush(20)
        assert run.stats()["delivery"]["other"]["traces"]["filtered"] >= 1
    assert nothing.get_finished_spans() == ()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_run_sends_what_the_variables_leave_and_keeps_the_rest(tmp_path: Path, protocol: str) -> None:
    code = """
    import stepspan
    with stepspan.start_run(job_id="job", directory="stepspan-runs") as run:
        run.log_hyperparams({f"p{n}": "x" * 40 for n in range(20)})
        for step in run.steps(range(3)):
            pass
        print(run.flush(20))
    """
    with ScriptedReceiver() as receiver:
        variables = {
            f"{E}ENDPOINT": receiver.grpc_target if protocol == "grpc" else receiver.url,
            f"{E}PROTOCOL": protocol,
            "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "10",
            "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": '"8"',
        }
        assert python(code, tmp_path, **variables).stdout.strip() == "True"
        [run] = until(lambda: [span for span in messages(receiver, "traces") if span.name == "training.run"])
        assert len(run.attributes) == 10
        assert run.dropped_attributes_count >= 16
        assert len(run.links) == 0
        [log] = receiver.logs("training.hyperparams")
        assert len(log["attributes"]) == 20
        assert "x" * 9 not in json.dumps(log["attributes"])
    assert "x" * 40 in next((tmp_path / "stepspan-runs").rglob("000001.jsonl")).read_text()


def test_sync_and_export_keep_to_the_variables_and_say_what_they_leave_out(tmp_path: Path) -> None:
    code = """
    import stepspan
    with stepspan.start_run(job_id="job", directory="stepspan-runs") as run:
        run.log_hyperparams({"p": "x" * 40})
    """
    assert python(code, tmp_path).returncode == 0
    journal = tmp_path / "stepspan-runs"
    with ScriptedReceiver() as receiver:
        off = {f"{E}ENDPOINT": receiver.url, "OTEL_TRACES_SAMPLER": "always_off"}
        synced = command("sync", journal, **off)
        assert synced.returncode == 0, synced.stdout
        assert receiver.points()
        assert not receiver.spans()
    status = json.loads(command("status", journal, "--json").stdout)
    assert [value for value in find(status, "filtered") if value] == [1], "the run's span"
    exported = command("export", journal, "--signal", "traces", OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT="8").stdout
    assert "x" * 8 in exported
    assert "x" * 9 not in exported


def messages(receiver: ScriptedReceiver, signal: Signal) -> list[Any]:
    """The spans that were taken, as protobuf."""
    requests = receiver.requests[signal]
    return [s for request in requests for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]


def find(content: Any, name: str) -> list[Any]:
    """The values of a name, wherever it stands in JSON."""
    if isinstance(content, dict):
        return [value for key, value in content.items() if key == name] + [
            v for c in content.values() for v in find(c, name)
        ]
    return [value for item in content for value in find(item, name)] if isinstance(content, list) else []
