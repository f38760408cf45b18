"""What an OpenTelemetry SDK emits is on the journal, and arrives as the SDK itself would have sent it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.delivery import Scripted, Training, deliver, options
from harness.events_of import SessionEvents
from harness.receiver import Answer, ScriptedReceiver
from harness.runs import command, events, python, sessions
from harness.stack import Prometheus
from opentelemetry import trace
from opentelemetry._logs import SeverityNumber
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import LogRecordExportResult, SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricExportResult, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult

from stepspan.integrations.opentelemetry import (
    JournalLogRecordProcessor,
    JournalMetricExporter,
    JournalSpanProcessor,
    JsonlLogRecordExporter,
    JsonlMetricExporter,
    JsonlSpanExporter,
    exporters,
)
from stepspan.journal.layout import find_sessions
from stepspan.mapping.mapper import mapper
from stepspan.mapping.records import SdkRecord, Signal
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.otlp.protobuf import encode
from stepspan.otlp.sdk_objects import (
    log_fields,
    log_records,
    metric_fields,
    metrics_data,
    readable_spans,
    span_fields,
)
from stepspan.otlp.sdk_records import REQUESTS, to_wire
from stepspan.run import Run

start = runs.start
Start = Callable[..., Run]
SECOND = 1_000_000_000


class Collected:
    """SDK objects of each signal, as an exporter of the SDK is given them; their resource has no attributes."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.logs: list[Any] = []
        resource = Resource({})
        tracing, logs = TracerProvider(resource=resource), LoggerProvider(resource=resource)
        tracing.add_span_processor(SimpleSpanProcessor(self))  # type: ignore[arg-type]
        logs.add_log_record_processor(SimpleLogRecordProcessor(self))  # type: ignore[arg-type]
        views = [View(instrument_name="exponential", aggregation=ExponentialBucketHistogramAggregation())]
        self._reader = InMemoryMetricReader()
        meters = MeterProvider([self._reader], resource=resource, views=views)
        self.tracer = tracing.get_tracer("lib", "1.2", "https://schema", {"a": True})
        self.logger = logs.get_logger("lib", "1.2")
        self.meter = meters.get_meter("lib", "1.2", "https://schema")

    def export(self, batch: Any) -> Any:
        first = batch[0]
        (self.spans if hasattr(first, "events") else self.logs).extend(batch)
        return SpanExportResult.SUCCESS if hasattr(first, "events") else LogRecordExportResult.SUCCESS

    @property
    def metrics(self) -> Any:
        return self._reader.get_metrics_data()

    def shutdown(self) -> None: ...

    def force_flush(self, timeout_millis: float = 0) -> bool:
        return True


ATTRIBUTES = {"s": "é", "b": True, "i": -(2**53) - 1, "f": 0.1, "nan": float("inf"), "list": ["x", "y"], "none": []}


@pytest.fixture
def collected() -> Collected:
    """One of everything."""
    found = Collected()
    remote = trace.SpanContext(5, 6, True, trace.TraceFlags(1), trace.TraceState([("vendor", "1"), ("other", "2")]))
    parent = trace.set_span_in_context(trace.NonRecordingSpan(remote))
    with found.tracer.start_as_current_span(
        "outer",
        parent,
        trace.SpanKind.CLIENT,
        ATTRIBUTES,  # type: ignore[arg-type]
        [trace.Link(remote, {"l": 1})],
    ) as span:
        span.add_event("happened", {"n": 1}, 7 * SECOND)
        span.set_status(trace.StatusCode.ERROR, "no")
        found.tracer.start_span("inner").end()
        found.logger.emit(
            timestamp=5, severity_number=SeverityNumber.WARN2, severity_text="careful", event_name="named",
            body={"nested": [1, {"deep": b"\x00\xff"}]}, attributes={**ATTRIBUTES, "bytes": b"\x01", "map": {"k": 1.5}},  # type: ignore[dict-item]
        )  # fmt: skip
        found.logger.emit(body="plain")
        found.meter.create_counter("counter", "{thing}", "Things.").add(2**40, ATTRIBUTES)  # type: ignore[arg-type]
        found.meter.create_up_down_counter("level").add(-1.5)
        found.meter.create_gauge("gauge", "s").set(0.25, {"k": 1})
        for name in ("explicit", "exponential"):
            histogram: Histogram = found.meter.create_histogram(name, "By")  # type: ignore[assignment]
            for value in (0.0, 3.0, 1e6):
                histogram.record(value, {"k": "v"})
    return found


def foreign(signal: Signal, fields: Any) -> list[Any]:
    """What the mapping makes of the fields of `otel` events."""
    session = SessionEvents()
    for found in fields:
        session.emit("otel", **json.loads(json.dumps(found)))
    return list(mapper(signal, session.header).map(session.events))


def same(signal: str, ours: bytes, official: Any) -> None:
    """As messages, except that the official encoder writes an empty status, and no trace state of a link."""
    parsed = type(official).FromString(ours)
    for request in (parsed, official):
        for resource in getattr(request, REQUESTS[signal].fields[0].name):  # type: ignore[index]
            for scope in getattr(resource, resource.DESCRIPTOR.fields[1].name):
                for span in getattr(scope, "spans", ()):
                    if not span.status.ByteSize():
                        span.ClearField("status")
                    for link in getattr(span, "links", ()):
                        link.ClearField("trace_state")
    assert str(parsed) == str(official)


CASES = [
    pytest.param("traces", lambda c: [span_fields(span) for span in c.spans], lambda c: c.spans, encode_spans,
                 readable_spans, id="spans"),
    pytest.param("logs", lambda c: [log_fields(log) for log in c.logs], lambda c: c.logs, encode_logs,
                 log_records, id="logs"),
]  # fmt: skip


@pytest.mark.parametrize(("signal", "fields", "objects", "official", "back"), CASES)
def test_the_wire_is_what_the_official_encoder_writes(
    collected: Collected, signal: Any, fields: Any, objects: Any, official: Any, back: Any
) -> None:
    records = foreign(signal, fields(collected))
    assert all(type(record) is SdkRecord for record in records)
    expected = official(objects(collected))
    same(signal, encode(signal, {}, records), expected)
    same(signal, official(back({}, records)).SerializeToString(), expected)


def test_the_wire_of_metrics_is_what_the_official_encoder_writes(collected: Collected) -> None:
    data = collected.metrics
    records = foreign("metrics", metric_fields(data))
    assert len(records) == 5
    expected = encode_metrics(data)
    same("metrics", encode("metrics", {}, records), expected)
    same("metrics", encode_metrics(metrics_data({}, records)).SerializeToString(), expected)


def test_points_of_one_metric_from_several_collections_are_one_metric_in_time_order(collected: Collected) -> None:
    fields = [one for _ in range(3) for one in metric_fields(collected.metrics)]
    request = REQUESTS["metrics"]._concrete_class.FromString(  # type: ignore[attr-defined]
        encode("metrics", {}, [*foreign("metrics", fields), *mapped_ours()])
    )
    ours, theirs = request.resource_metrics[0].scope_metrics
    assert (ours.scope.name, theirs.scope.name, theirs.schema_url) == ("stepspan", "lib", "https://schema")
    assert [metric.name for metric in theirs.metrics] == ["counter", "level", "gauge", "explicit", "exponential"]
    times = [point.time_unix_nano for point in theirs.metrics[0].sum.data_points]
    assert len(times) == 3
    assert times == sorted(times)
    assert theirs.metrics[0].sum.is_monotonic


def mapped_ours() -> list[Any]:
    session = SessionEvents()
    session.metrics({"loss": 1.0})
    return list(mapper("metrics", session.header).map(session.events))


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        pytest.param({"traceId": "zz"}, "non-hexadecimal", id="an id that is not hex"),
        pytest.param({"startTimeUnixNano": "soon"}, "soon", id="a time that is no number"),
        pytest.param({"startTimeUnixNano": str(1 << 64)}, "range", id="a time beyond 64 bits"),
        pytest.param({"name": 5}, "5 is not text", id="a name that is no text"),
        pytest.param({"attributes": [{"key": "k", "value": "v"}]}, "items", id="a value that is no AnyValue"),
        pytest.param({"attributes": 5}, "iterable", id="attributes that are no list"),
    ],
)
def test_what_is_no_otlp_json_is_refused_by_value_error(tree: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        to_wire(REQUESTS["traces"], {"resourceSpans": [{"scopeSpans": [{"spans": [tree]}]}]})


# on the journal


def test_a_span_is_on_the_journal_when_it_has_ended(start: Start) -> None:
    provider = TracerProvider()
    with start(job_id="job") as run:
        provider.add_span_processor(JournalSpanProcessor())
        tracer = provider.get_tracer("user", "3")
        with run.step(0), tracer.start_as_current_span("outer"):
            tracer.start_span("inner").end()
            (event,) = events(run, "otel")
            assert event["signal"] == "traces"
            assert event["scope"] == {"name": "user", "version": "3"}
            assert event["record"]["name"] == "inner"
        assert [event["record"]["name"] for event in events(run, "otel")] == ["inner", "outer"]
        assert run.stats()["warnings"] == {}
    tracer.start_span("after the run").end()
    assert len(events(run, "otel")) == 2


def test_a_span_around_a_loop_that_an_exception_leaves_does_not_end_its_step(start: Start) -> None:
    provider = TracerProvider()
    with start(job_id="job") as run:
        provider.add_span_processor(JournalSpanProcessor(run))
        tracer = provider.get_tracer("user")
        with suppress(ValueError), run.epoch(0), tracer.start_as_current_span("around"):
            for _ in run.steps("ab"):
                raise ValueError("boom")
        (step,) = events(run, "step_end")
        (around,) = events(run, "otel")
        (epoch,) = events(run, "epoch_begin")
    assert step["status"] == "error"
    assert around["parent"] == epoch["seq"]


def test_a_span_that_is_not_sampled_is_not_written(start: Start) -> None:
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

    provider = TracerProvider(sampler=ALWAYS_OFF)
    with start(job_id="job") as run:
        provider.add_span_processor(JournalSpanProcessor(run))
        provider.get_tracer("user").start_span("unwanted").end()
        assert events(run, "otel") == []


def test_secrets_in_a_record_are_redacted_and_numbers_stay(start: Start) -> None:
    provider, meters = TracerProvider(), MeterProvider([reader := InMemoryMetricReader()])
    with start(job_id="job") as run:
        provider.add_span_processor(JournalSpanProcessor(run))
        given = {"api_key": "geheim", "password": ["geheim"], "auth_token": 12, "url": "https://me:geheim@host/"}
        with provider.get_tracer("user").start_as_current_span("s", attributes=given) as span:  # type: ignore[arg-type]
            span.add_event("login", {"password": "geheim"})
        meters.get_meter("m").create_counter("c").add(1, {"password": "geheim"})
        JournalMetricExporter(run).export(reader.get_metrics_data())  # type: ignore[arg-type]
        found = events(run, "otel")
    assert "geheim" not in json.dumps(found)
    attributes = {entry["key"]: entry["value"] for entry in found[0]["record"]["attributes"]}
    assert attributes == {
        "api_key": {"stringValue": "[redacted]"},
        "password": {"stringValue": "[redacted]"},
        "auth_token": {"intValue": "12"},
        "url": {"stringValue": "https://[redacted]@host/"},
    }


def test_a_processor_that_logs_to_opentelemetry_does_not_go_on_for_ever(start: Start) -> None:
    class Chatty:
        tags = frozenset({"otel", "metrics"})

        def __call__(self, event: Any) -> Any:
            logger.emit(body=f"seen {event['tag']}")
            return event

    provider = LoggerProvider()
    logger = provider.get_logger("chatty")
    with start(job_id="job", processors=[Chatty()]) as run:
        provider.add_log_record_processor(JournalLogRecordProcessor(run))
        run.log_metrics({"loss": 1.0})
        told = [event["record"]["body"]["stringValue"] for event in events(run, "otel")]
    assert set(told) == {"seen metrics", "seen otel"}
    assert len(told) < 5
    assert run.stats()["warnings"] == {}


def test_metrics_of_a_reader_show_no_progress_of_training(start: Start) -> None:
    with start(job_id="job") as run:
        reader = PeriodicExportingMetricReader(JournalMetricExporter(run), export_interval_millis=1e9)
        meters = MeterProvider([reader], shutdown_on_exit=False)
        meters.get_meter("user").create_counter("c").add(1)
        before = run._recorder.background_events  # type: ignore[union-attr]
        meters.force_flush()
        assert run._recorder.background_events > before  # type: ignore[union-attr]
        (event,) = events(run, "otel")
        assert event["record"]["sum"]["aggregationTemporality"] == 2
        meters.shutdown()


# configure()

KILLED = """
import os, signal, sqlite3, stepspan
from opentelemetry.instrumentation.sqlite3 import SQLite3Instrumentor
from stepspan.integrations.opentelemetry import configure

SQLite3Instrumentor().instrument()
configure()
run = stepspan.current_run()
with run.step(7):
    sqlite3.connect(":memory:").cursor().execute("select 1")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_library_s_span_survives_sigkill_and_arrives_as_a_child_of_its_step(start: Start, tmp_path: Path) -> None:
    found = python(KILLED, tmp_path, STEPSPAN_JOB_ID="job")
    assert found.returncode == -9, found.stderr
    with ScriptedReceiver() as receiver:
        told = command("sync", tmp_path / "stepspan-runs", "--endpoint", receiver.url)
        assert told.returncode == 0, told.stdout + told.stderr
        by_name = {span["name"]: span for span in receiver.spans()}
        scopes = {
            scope.scope.name: [span.name for span in scope.spans]
            for request in receiver.requests["traces"]
            for scope in request.resource_spans[0].scope_spans
        }
    query, step = by_name["select"], by_name["training.step"]
    assert (query["trace_id"], query["parent_id"]) == (step["trace_id"], step["span_id"])
    assert (step["status"], step["message"]) == ("ERROR", "interrupted")
    assert query["attributes"]["db.statement"] == "select 1"
    assert query["job"] == "job"
    assert scopes["opentelemetry.instrumentation.sqlite3"] == ["select"]


CONFIGURED = """
import stepspan
from opentelemetry import _logs, metrics, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from stepspan.integrations.opentelemetry import configure

theirs = InMemorySpanExporter()
{before}
with configure() as configured, configured.run.step(0):
    tracer = trace.get_tracer("user")
    for _ in range(200):
        tracer.start_span("user").end()
    metrics.get_meter("user").create_counter("things").add(3)
    _logs.get_logger("user").emit(body="said")
assert stepspan.current_run().stats()["journal"] is None
print(len(theirs.get_finished_spans()))
"""
OWN = """
provider = TracerProvider({})
provider.add_span_processor(SimpleSpanProcessor(theirs))
trace.set_tracer_provider(provider)
"""
RATIO = OWN.format("sampler=ParentBasedTraceIdRatio(0.1)")


@pytest.mark.parametrize(
    ("before", "env", "kept", "children"),
    [
        pytest.param("", {}, range(200, 201), True, id="no provider: one is installed"),
        pytest.param("", {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.1"}, range(1, 60), False,
                     id="no provider, a sampler by variable: it decides"),
        pytest.param(OWN.format(""), {}, range(200, 201), True, id="a provider that keeps all: beside what it has"),
        pytest.param(RATIO, {}, range(1, 60), False,
                     id="a provider with a sampler: it decides"),
        pytest.param(RATIO, {"STEPSPAN_PROPAGATE": "1"}, range(200, 201), True,
                     id="a provider with a sampler, and propagate: all follow the step"),
    ],
)  # fmt: skip
def test_configure_beside_what_is_there(
    start: Start, tmp_path: Path, before: str, env: dict[str, str], kept: range, children: bool
) -> None:
    found = python(CONFIGURED.format(before=before), tmp_path, STEPSPAN_SAMPLERS="none", **env)
    assert found.returncode == 0, found.stderr
    (path,) = sessions(tmp_path / "stepspan-runs").values()
    records = events(path, "otel")
    spans = [event["record"] for event in records if event["signal"] == "traces"]
    assert len(spans) in kept
    if before:
        assert int(found.stdout) == len(spans), "they still get what they got"
    assert all(("parentSpanId" in span) is children for span in spans)
    (things,) = (event["record"] for event in records if event["signal"] == "metrics")
    assert things["sum"]["dataPoints"][0]["asInt"] == "3"
    (said,) = (event["record"] for event in records if event["signal"] == "logs")
    assert said["body"] == {"stringValue": "said"}
    assert runs.status_of(path) == "completed"


def test_configure_again_after_shutdown_and_with_a_run_of_ones_own(start: Start, tmp_path: Path) -> None:
    found = python(
        """
        import stepspan
        from opentelemetry import metrics, trace
        from stepspan.integrations.opentelemetry import configure
        for number in range(2):
            with stepspan.start_run(job_id=f"job{number}") as run:
                configured = configure(run)
                with run.step(0):
                    trace.get_tracer("user").start_span(f"span {number}").end()
                    metrics.get_meter("user").create_counter(f"count_{number}").add(1)
                configured.shutdown()
        """,
        tmp_path,
        STEPSPAN_SAMPLERS="none",
    )
    assert found.returncode == 0, found.stderr
    assert "Can't shutdown" not in found.stderr
    names = {
        events(path)[0]["job_id"]: [event["record"]["name"] for event in events(path, "otel")]
        for path in (session.path for session in find_sessions(tmp_path / "stepspan-runs"))
    }
    assert names["job0"] == ["span 0", "count_0"]
    assert names["job1"][0] == "span 1"
    assert "count_1" in names["job1"]


def test_configure_again_before_shutdown_adds_nothing(start: Start, tmp_path: Path) -> None:
    found = python(
        """
        import stepspan
        from opentelemetry import _logs, metrics, trace
        from stepspan.integrations.opentelemetry import configure
        configured = configure()
        assert configure() is configure(stepspan.current_run()) is configured
        configured.run.close()
        run = stepspan.start_run(job_id="job")
        assert configure() is configured and configured.run is run
        trace.get_tracer("user").start_span("span").end()
        metrics.get_meter("user").create_counter("count").add(1)
        _logs.get_logger("user").emit(body="said")
        configured.shutdown()
        assert not run.closed
        assert configure() is not configured
        """,
        tmp_path,
        STEPSPAN_SAMPLERS="none",
    )
    assert found.returncode == 0, found.stderr
    paths = [session.path for session in find_sessions(tmp_path / "stepspan-runs")]
    (path,) = [path for path in paths if events(path)[0]["job_id"] == "job"]
    assert sorted(event["signal"] for event in events(path, "otel")) == ["logs", "metrics", "traces"]


SIDE_BY_SIDE = """
import stepspan, threading
from opentelemetry import _logs, trace
from stepspan.integrations.opentelemetry import configure

def work(name):
    tracer = trace.get_tracer("user")
    tracer.start_span(f"span of {name}").end()
    _logs.get_logger("user").emit(body=f"line of {name}")

def in_thread(name):
    thread = threading.Thread(target=work, args=[name])
    thread.start()
    thread.join()

"""
ONE = """
configured = configure(job_id="own", samplers="process")
work("own")
with stepspan.start_run(job_id="a", samplers="process") as a:
    with stepspan.start_run(job_id="b") as b:
        work("b")
        in_thread("b")
        assert configure() is configured
    work("a")
    in_thread("a")
work("own")
configured.shutdown()
work("nobody")
"""
EACH = """
own = stepspan.start_run(job_id="own")
with stepspan.start_run(job_id="a") as a, configure(a):
    with stepspan.start_run(job_id="b") as b:
        with configure(b):
            work("b")
            in_thread("b")
        work("a")  # nothing is configured for b any more, and a takes all
    work("a")
"""
FOLLOWED = """
with configure(job_id="own") as outermost:
    work("own")
    with stepspan.start_run(job_id="a") as a:
        with configure(a):
            work("a")
        work("a")
    with stepspan.start_run(job_id="b") as b:
        work("b")
        in_thread("b")
    work("own")
"""


@pytest.mark.parametrize("code", [ONE, EACH, FOLLOWED], ids=["one for all", "one for each", "one in another"])
def test_what_is_emitted_goes_to_the_run_that_it_was_emitted_in(start: Start, tmp_path: Path, code: str) -> None:
    found = python(SIDE_BY_SIDE + code, tmp_path)
    assert found.returncode == 0, found.stderr
    jobs = {events(session.path)[0]["job_id"]: session.path for session in find_sessions(tmp_path / "stepspan-runs")}
    assert jobs.keys() == {"own", "a", "b"}
    for name, path in jobs.items():
        records = [event["record"] for event in events(path, "otel")]
        spans = [record["name"] for record in records if "name" in record]
        lines = [record["body"]["stringValue"] for record in records if "body" in record]
        expected = 0 if (code, name) == (EACH, "own") else 2
        assert (spans, lines) == ([f"span of {name}"] * expected, [f"line of {name}"] * expected), name
        assert runs.status_of(path) == "completed"
    if code == ONE:
        sampled = {name for name, path in jobs.items() if events(path, "sample")}
        assert "a" in sampled, "not the substitute, which was there before"


def test_a_program_that_fails_is_a_failed_run_with_its_metrics(start: Start, tmp_path: Path) -> None:
    found = python(
        """
        from opentelemetry import metrics
        from stepspan.integrations.opentelemetry import configure
        configure()
        metrics.get_meter("user").create_counter("things").add(1)
        raise RuntimeError("it went wrong")
        """,
        tmp_path,
        STEPSPAN_SAMPLERS="none",
    )
    assert found.returncode == 1
    assert found.stderr.count("Traceback") == 1
    (path,) = sessions(tmp_path / "stepspan-runs").values()
    assert runs.status_of(path) == "failed"
    assert [event["record"]["name"] for event in events(path, "otel")] == ["things"]


def test_configure_where_stepspan_is_switched_off_does_nothing(start: Start, tmp_path: Path) -> None:
    found = python(
        """
        from opentelemetry import trace
        from stepspan.integrations.opentelemetry import configure
        with configure():
            trace.get_tracer("user").start_span("s").end()
        """,
        tmp_path,
        STEPSPAN_DISABLED="1",
    )
    assert found.returncode == 0, found.stderr
    assert not (tmp_path / "stepspan-runs").exists()


def test_a_forked_worker_s_spans_go_to_a_session_of_its_own(start: Start, tmp_path: Path) -> None:
    found = python(
        """
        import os, stepspan
        from opentelemetry import trace
        from stepspan.integrations.opentelemetry import configure
        configure()
        run = stepspan.current_run()
        with run.step(0):
            if os.fork() == 0:
                trace.get_tracer("user").start_span("in the worker").end()
                stepspan.current_run().close()
                os._exit(0)
            os.wait()
            trace.get_tracer("user").start_span("in the parent").end()
        """,
        tmp_path,
        STEPSPAN_SAMPLERS="none",
    )
    assert found.returncode == 0, found.stderr
    found_by = {who: events(path, "otel") for who, path in sessions(tmp_path / "stepspan-runs").items()}
    (parent,), (worker,) = found_by["0"], found_by["0-worker1"]
    assert (parent["record"]["name"], worker["record"]["name"]) == ("in the parent", "in the worker")
    assert parent["record"]["parentSpanId"] == worker["record"]["parentSpanId"]


# delivery


def user_span(trace_id: str, name: str = "query", **fields: Any) -> dict[str, Any]:
    record = {
        "traceId": trace_id, "spanId": "00f067aa0ba902b7", "name": name,
        "startTimeUnixNano": str(SECOND), "endTimeUnixNano": str(2 * SECOND), **fields,
    }  # fmt: skip
    return {"signal": "traces", "scope": {"name": "lib"}, "record": record}


def test_a_span_in_a_step_that_is_thinned_away_goes_with_it(tmp_path: Path) -> None:
    from stepspan.mapping.open_scopes import step_trace_id

    session = SessionEvents()
    for number in range(2000):
        step = session.emit("step_begin", 0.001, parent=0, step=number, split="train")
        inside = step_trace_id(session.header, session.events[-1]).hex()
        failed = {"status": {"code": 2}} if number == 1501 else {}
        session.emit("otel", parent=step, **user_span(inside, f"in {number}", **failed))
        session.emit("otel", parent=step, **user_span("f" * 32, f"elsewhere {number}"))
        session.emit("step_end", 0.001, begin=step)
    traces = mapper("traces", session.header)
    found = traces.map(session.events)
    names = [span.record["name"] for span in found if isinstance(span, SdkRecord)]
    steps = {f"in {span.attributes['step']}" for span in found if not isinstance(span, SdkRecord)}  # type: ignore[union-attr]
    assert {name for name in names if name.startswith("in")} == steps
    assert len(steps) < 1000
    assert "in 1501" in steps
    assert sum(name.startswith("elsewhere") for name in names) == 2000
    assert traces.filtered == 2 * (2000 - len(steps))


def test_a_span_that_waits_for_its_step_is_carried_over_a_restart() -> None:
    from stepspan.mapping.open_scopes import step_trace_id

    session = SessionEvents()
    for number in range(3):
        step = session.emit("step_begin", parent=0, step=number, split="train")
        inside = step_trace_id(session.header, session.events[-1]).hex()
        session.emit("otel", parent=step, **user_span(inside, f"in {number}"))
        session.emit("step_end", begin=step)
    expected = plain(mapper("traces", session.header).map(session.events))
    for cut in range(len(session.events)):
        first, second = (mapper("traces", session.header) for _ in range(2))
        found = list(first.map(session.events[:cut]))
        second.restore(json.loads(json.dumps(first.state())))
        assert plain([*found, *second.map(session.events[cut:])]) == expected


def plain(records: Any) -> list[Any]:
    return [(r.time, r.record, r.source.scope) if isinstance(r, SdkRecord) else r for r in records]


@pytest.mark.parametrize(
    "bent",
    [
        pytest.param({"record": None}, id="no record"),
        pytest.param({"record": {"endTimeUnixNano": "x"}}, id="no time"),
        pytest.param({"scope": 7}, id="no scope"),
        pytest.param({"signal": "metrics", "record": {"name": "m"}}, id="a metric without data"),
        pytest.param({"signal": "metrics", "record": {"name": "m", "gauge": {"dataPoints": [5]}}}, id="no point"),
    ],
)
def test_an_event_that_holds_no_otlp_costs_that_event(bent: dict[str, Any]) -> None:
    session = SessionEvents()
    event = {**user_span("f" * 32), **bent}
    session.emit("otel", **event)
    session.emit("otel", **user_span("f" * 32))
    found = mapper("traces", session.header).map(session.events)
    assert len(found) == 1
    assert list(mapper("metrics", session.header).map(session.events)) == []


def test_a_record_that_is_no_otlp_is_isolated_and_the_rest_goes(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.emit("otel", **user_span("f" * 32, "good"))
    training.emit("otel", **user_span("zz", "bad"))
    training.steps(2)
    session = training.end()
    with ScriptedReceiver() as receiver:
        told = command("sync", tmp_path, "--endpoint", receiver.url, "--destination", "there")
        assert told.returncode == 0, told.stdout + told.stderr
        assert "rejected 1" in told.stdout
        names = [span["name"] for span in receiver.spans()]
    assert sorted(names) == ["good", "training.run", "training.step", "training.step"]
    (letter,) = (json.loads(line) for line in (session.path / "rejected.jsonl").read_bytes().splitlines())
    assert letter["request"]["resourceSpans"][0]["scopeSpans"][0]["scope"] == {"name": "lib"}
    assert letter["request"]["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["name"] == "bad"


def test_dead_letters_of_other_instrumentation_are_sent_again(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for name in ("good", "refused"):
        training.emit("otel", **user_span("f" * 32, name))
    training.end()

    def picky(request: Any) -> Answer:
        names = [span.name for scope in request.resource_spans[0].scope_spans for span in scope.spans]
        return Answer(400, text="no") if "refused" in names else Answer()

    with ScriptedReceiver() as receiver:
        receiver.script("traces", picky)
        told = command("sync", tmp_path, "--endpoint", receiver.url)
        assert "rejected 1" in told.stdout
        receiver.script("traces", lambda _: Answer())
        told = command("sync", tmp_path, "--endpoint", receiver.url, "--rejected")
        assert told.returncode == 0, told.stdout + told.stderr
        assert {"good", "refused"} <= {span["name"] for span in receiver.spans()}


def test_an_old_data_point_is_held_like_one_of_ours(tmp_path: Path) -> None:
    training = Training(tmp_path, started=-7200)
    point = {"timeUnixNano": str(training.now), "asDouble": 1.0}
    training.emit("otel", signal="metrics", scope={}, record={"name": "m", "gauge": {"dataPoints": [point]}})
    session = training.die()

    def reason_hidden(records: Any) -> Outcome:
        theirs = any(isinstance(record, SdkRecord) for record in records)
        return Outcome(Verdict.ISOLATE, "no", reason_hidden=True) if theirs else Outcome(Verdict.DELIVERED)

    task = deliver(session, Scripted(reason_hidden), options())
    assert task.state.state == "hold"
    assert task.state.ledger.rejected == 0


@pytest.mark.stack
def test_prometheus_takes_what_an_sdk_collected_many_times(
    start: Start, tmp_path: Path, prometheus: Prometheus, collected: Collected
) -> None:
    with start(job_id="job", endpoint=None) as run:
        exporter = JournalMetricExporter(run)
        for _ in range(5):
            exporter.export(collected.metrics)
        run.log_metrics({"loss": 1.0})
        path = Path(run.stats()["journal"])
    told = command(
        "sync", path, "--endpoint", prometheus.otlp_endpoint,
        OTEL_TRACES_EXPORTER="none", OTEL_LOGS_EXPORTER="none",
    )  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr
    assert "rejected 0" in told.stdout
    ((labels, samples),) = prometheus.series('counter_total{job_id="job"}[1h]')
    assert {time for time, _ in samples} == {
        int(event["record"]["sum"]["dataPoints"][0]["timeUnixNano"]) // 10**6
        for event in events(path, "otel")
        if event["record"]["name"] == "counter"
    }
    assert {value for _, value in samples} == {float(2**40)}
    assert labels["s"] == "é"
    assert len(prometheus.series('explicit_bytes_count{job_id="job"}[1h]')) == 1
    assert len(prometheus.series('training_loss{job_id="job"}[1h]')) == 1


# the SDK's own exporters


def test_exporters_write_to_the_run_that_is_open(start: Start, collected: Collected) -> None:
    with start(job_id="job") as run:
        assert JsonlSpanExporter().export(collected.spans) is SpanExportResult.SUCCESS
        assert JsonlLogRecordExporter().export(collected.logs) is LogRecordExportResult.SUCCESS
        assert JsonlMetricExporter().export(collected.metrics) is MetricExportResult.SUCCESS
        found = events(run, "otel")
    assert [event["signal"] for event in found] == ["traces"] * 2 + ["logs"] * 2 + ["metrics"] * 5
    assert list(sessions(run._pipeline.journal.directory)) == ["0"]  # type: ignore[union-attr]


def test_exporters_without_a_run_share_one_of_their_own_with_the_sdk_s_resource(start: Start, tmp_path: Path) -> None:
    provider = TracerProvider(resource=Resource({"service.name": "shop", "team": "vision"}))
    spans, logs = JsonlSpanExporter(tmp_path / "here"), JsonlLogRecordExporter(tmp_path / "here")
    provider.add_span_processor(SimpleSpanProcessor(spans))
    tracer = provider.get_tracer("user")
    with tracer.start_as_current_span("outer"):
        tracer.start_span("inner").end()
        assert logs.export(Collected().logs) is LogRecordExportResult.SUCCESS
    (path,) = sessions(tmp_path / "here").values()
    resource = events(path)[0]["resource"]
    assert (resource["service.name"], resource["team"]) == ("shop", "vision")
    assert resource["job_id"]
    inner, outer = events(path, "otel")
    assert inner["record"]["parentSpanId"] == outer["record"]["spanId"]
    assert "parentSpanId" not in outer["record"]
    assert {event["tag"] for event in events(path)} == {"header", "run_begin", "otel"}
    spans.shutdown()
    assert runs.status_of(path) is None, "the other one still writes"
    logs.shutdown()
    logs.shutdown()
    assert runs.status_of(path) == "completed"
    assert spans.export(Collected().spans) is SpanExportResult.FAILURE


def test_an_exporter_that_cannot_write_says_so_once(
    start: Start, tmp_path: Path, collected: Collected, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    exporter = JsonlSpanExporter(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        assert exporter.export(collected.spans) is SpanExportResult.FAILURE
        assert exporter.export(collected.spans) is SpanExportResult.FAILURE
    (said,) = caplog.messages
    assert "is a file: name a directory" in said
    exporter.shutdown()


@pytest.mark.parametrize("emit", ["logging.warning('said')", "tracer.start_span('made').end()"], ids=["log", "span"])
def test_what_is_logged_while_the_journal_is_opened_does_not_open_it_again(
    start: Start, tmp_path: Path, emit: str
) -> None:
    found = python(
        f"""
        import faulthandler, logging
        from opentelemetry.sdk._logs import LoggerProvider
        from opentelemetry.sdk._logs.export import SimpleLogRecordProcessor
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from stepspan.integrations.opentelemetry import JsonlLogRecordExporter, JsonlSpanExporter
        faulthandler.dump_traceback_later(20, exit=True)
        logs, spans = LoggerProvider(), TracerProvider()
        logs.add_log_record_processor(SimpleLogRecordProcessor(JsonlLogRecordExporter()))
        spans.add_span_processor(SimpleSpanProcessor(JsonlSpanExporter()))

        class ToOpenTelemetry(logging.Handler):
            def emit(self, record):
                logs.get_logger("user").emit(body=record.getMessage())

        logging.getLogger().addHandler(ToOpenTelemetry())
        tracer = spans.get_tracer("user")
        {emit}
        """,
        tmp_path,
        STEPSPAN_DIRECTORY="/proc/nope",
    )
    assert found.returncode == 0, found.stderr


def test_an_exporter_waits_only_so_long_for_a_thread_that_opens_the_journal(
    start: Start, tmp_path: Path, collected: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporters, "OPEN_TIMEOUT_S", 0.01)
    exporter = JsonlSpanExporter(tmp_path / "here")
    with exporter._shared.lock:
        assert exporter.export(collected.spans) is SpanExportResult.FAILURE
    assert exporter.export(collected.spans) is SpanExportResult.SUCCESS
    exporter.shutdown()


def test_exporters_where_stepspan_is_switched_off_write_nothing(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collected: Collected
) -> None:
    monkeypatch.setenv("STEPSPAN_DISABLED", "1")
    exporter = JsonlSpanExporter(tmp_path / "none")
    assert exporter.export(collected.spans) is SpanExportResult.SUCCESS
    exporter.shutdown()
    assert not (tmp_path / "none").exists()


def test_an_exporter_in_a_forked_child_opens_a_session_of_its_own(start: Start, tmp_path: Path) -> None:
    found = python(
        """
        import os
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from stepspan.integrations.opentelemetry import JsonlSpanExporter
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(JsonlSpanExporter()))
        tracer = provider.get_tracer("user")
        tracer.start_span("before").end()
        provider.force_flush()
        if os.fork() == 0:
            tracer.start_span("in the child").end()
            provider.shutdown()
            os._exit(0)
        os.wait()
        tracer.start_span("after").end()
        provider.shutdown()
        """,
        tmp_path,
    )
    assert found.returncode == 0, found.stderr
    names = {
        who: [event["record"]["name"] for event in events(path, "otel")]
        for who, path in sessions(tmp_path / "stepspan-runs").items()
    }
    assert names == {"0": ["before", "after"], "0-worker1": ["in the child"]}


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("", "histogram"),
        ("explicit_bucket_histogram", "histogram"),
        ('"BASE2_exponential_bucket_histogram"', "exponentialHistogram"),
    ],
)
def test_histograms_of_the_sdk_are_what_the_variable_says(
    monkeypatch: pytest.MonkeyPatch, value: str, kind: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION", value)
    reader = PeriodicExportingMetricReader(JournalMetricExporter(), export_interval_millis=1e9)
    provider = MeterProvider([reader])
    provider.get_meter("app").create_histogram("latency").record(0.5)
    found: list[Any] = []
    monkeypatch.setattr(reader, "_receive_metrics", lambda data, **_: found.extend(metric_fields(data)))
    reader.collect()
    provider.shutdown()
    assert [event["record"].keys() & {"histogram", "exponentialHistogram"} for event in found[:1]] == [{kind}]
