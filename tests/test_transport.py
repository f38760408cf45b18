"""Every row of the delivery table over all three transports, against a receiver that answers by script."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from harness.received import bits, decode
from harness.receiver import HANG, OK, RESET, RESET_TAKEN, Answer, ScriptedReceiver
from opentelemetry import context, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from stepspan import __version__
from stepspan.mapping.records import SIGNALS, Signal
from stepspan.otlp.answers import GRPC_ANSWERS, HTTP_ANSWERS, MAX_TEXT_CHARS
from stepspan.otlp.endpoint import PROTOCOLS, resolve_destination
from stepspan.otlp.http import retry_after
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.otlp.transport import open_transport

HTTP_PROTOCOLS = ("http/protobuf", "http/json")
RESOURCE = {
    "attributes": [
        {"key": "job_id", "value": {"stringValue": "j"}},
        {"key": "rank", "value": {"intValue": "3"}},
    ]
}
POINTS = [
    {"timeUnixNano": "1000000", "asDouble": 0.5, "attributes": [{"key": "split", "value": {"stringValue": "train"}}]},
    {"timeUnixNano": "2000000", "asDouble": "NaN"},
]
SPAN = {
    "traceId": "5b8efff798038103d269b633813fc60c",
    "spanId": "eee19b7ec3c1b174",
    "name": "training.step",
    "kind": 1,
    "startTimeUnixNano": "1",
    "endTimeUnixNano": "2",
    "status": {"code": 2, "message": "interrupted"},
    "events": [{"timeUnixNano": "2", "name": "exception"}],
}
LOG = {"timeUnixNano": "1", "severityNumber": 9, "body": {"stringValue": "hi"}, "eventName": "training.hyperparams"}
BODIES = {
    "metrics": {
        "resourceMetrics": [
            {"resource": RESOURCE, "scopeMetrics": [{"metrics": [{"name": "loss", "gauge": {"dataPoints": POINTS}}]}]}
        ]
    },
    "traces": {"resourceSpans": [{"resource": RESOURCE, "scopeSpans": [{"spans": [SPAN]}]}]},
    "logs": {"resourceLogs": [{"resource": RESOURCE, "scopeLogs": [{"logRecords": [LOG]}]}]},
}


def body(signal: Signal, protocol: str) -> Any:
    encoded = json.dumps(BODIES[signal]).encode()
    return encoded if protocol == "http/json" else decode(signal, encoded, from_json=True).SerializeToString()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def receiver() -> Iterator[Any]:
    with ScriptedReceiver() as running:
        yield running


def target(receiver: Any, protocol: str) -> Any:
    return receiver.grpc_target if protocol == "grpc" else receiver.url


@contextlib.contextmanager
def transport(
    receiver: Any, protocol: str, signal: Signal = "metrics", *, env: Any = None, **arguments: Any
) -> Iterator[Any]:
    """A transport to the receiver, or to an endpoint given as text."""
    where = receiver if isinstance(receiver, str) else target(receiver, protocol)
    destination = resolve_destination(env or {}, endpoint=where, protocol=protocol, **{"timeout": 20, **arguments})
    opened = open_transport(destination.endpoints[signal])
    try:
        yield opened
    finally:
        opened.close()


def send(receiver: Any, protocol: str, signal: Signal = "metrics", **settings: Any) -> Any:
    with transport(receiver, protocol, signal, **settings) as opened:
        return opened.send(body(signal, protocol))


# The delivery table, from DESIGN.md: over HTTP by status …
HTTP_TABLE = {
    Verdict.DELIVERED: [200, 202, 204],
    Verdict.RETRY: [408, 429, 502, 503, 504],
    Verdict.RETRY_THEN_HOLD: [500],
    Verdict.ISOLATE: [400, 406, 409, 410, 418, 422, 431, 501, 505],
    Verdict.HALVE: [413],
    Verdict.HOLD: [
        *(300, 301, 302, 303, 304, 307, 308, 401, 403, 404, 405, 407, 415),
        *(511, *range(520, 531)),
    ],
}
# … and over gRPC by code.
GRPC_TABLE = {
    Verdict.DELIVERED: ["OK"],
    Verdict.RETRY: [
        *("ABORTED", "CANCELLED", "DATA_LOSS", "DEADLINE_EXCEEDED"),
        *("OUT_OF_RANGE", "RESOURCE_EXHAUSTED", "UNAVAILABLE"),
    ],
    Verdict.RETRY_THEN_HOLD: ["INTERNAL", "UNKNOWN"],
    Verdict.ISOLATE: ["ALREADY_EXISTS", "FAILED_PRECONDITION", "INVALID_ARGUMENT"],
    Verdict.HOLD: [
        "NOT_FOUND",
        *("PERMISSION_DENIED", "UNAUTHENTICATED", "UNIMPLEMENTED"),
    ],
}
ROWS = [
    *(
        (protocol, verdict, Answer(status, "" if status in (204, 304) else "so it is"))
        for protocol in HTTP_PROTOCOLS
        for verdict, statuses in HTTP_TABLE.items()
        for status in statuses
    ),
    *(
        ("grpc", verdict, Answer(200 if code == "OK" else 500, "so it is", code=code))
        for verdict, codes in GRPC_TABLE.items()
        for code in codes
    ),
]


@pytest.mark.parametrize(("protocol", "verdict", "answer"), ROWS, ids=[f"{p}-{a.code or a.status}" for p, _, a in ROWS])
def test_every_row_of_the_delivery_table(receiver: Any, protocol: Any, verdict: Any, answer: Any) -> None:
    receiver.script("metrics", [answer])
    outcome = send(receiver, protocol)
    assert outcome.verdict is verdict
    assert outcome.rejected == 0
    if verdict is not Verdict.DELIVERED:
        assert outcome.message.startswith(f"{answer.code or answer.status}: ")
        assert answer.text in outcome.message


def test_no_row_is_left_out() -> None:
    assert set(HTTP_ANSWERS) <= {status for row in HTTP_TABLE.values() for status in row}
    assert set(GRPC_ANSWERS) <= {code for row in GRPC_TABLE.values() for code in row}


# What a text says where the status alone says less: status, text, verdict, what the message names. Over all transports.
PHRASES = {
    "too old": (400, "too old sample", Verdict.HOLD, "out_of_order_time_window"),
    "out of bounds": (400, "out of bounds", Verdict.HOLD, "storage.tsdb.out_of_order_time_window"),
    "out of order": (400, "Out of order sample", Verdict.HOLD, "out_of_order_time_window"),
    "future": (400, "out of bounds: timestamp is too far in the future", Verdict.HOLD, "clock"),
    "too old, behind a collector": (500, 'HTTP 400: "too old sample"', Verdict.HOLD, "out_of_order_time_window"),
    "out of bounds, 422": (422, "x out of bounds y", Verdict.HOLD, "out_of_order_time_window"),
    "opaque, behind a collector": (400, "responded with HTTP Status Code 400", Verdict.ISOLATE, "behind the collector"),
    "duplicate": (400, "duplicate sample for timestamp", Verdict.ISOLATE, "refuses something"),
    "too old, while busy": (503, "too old", Verdict.RETRY, "busy"),
    "size": (429, "grpc: received message larger than max (5 vs. 4)", Verdict.HALVE, "larger"),
    "trace": (500, "TRACE_TOO_LARGE: max size of trace (5) exceeded", Verdict.ISOLATE, "max_bytes_per_trace"),
    "trace, busy": (429, "max size of trace (5) exceeded", Verdict.ISOLATE, "max_bytes_per_trace"),
    "traces": (400, "LIVE_TRACES_EXCEEDED: max live traces exceeded", Verdict.RETRY, "busy"),
    "body": (400, "http: request body too large", Verdict.HALVE, "larger"),
    "size, in a 500": (500, "received message after decompression larger than max", Verdict.HALVE, "larger"),
    "VictoriaMetrics": (400, "json encoding isn't supported for opentelemetry format", Verdict.HOLD, "try protocol"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("status", "text", "verdict", "named"), PHRASES.values(), ids=PHRASES)
def test_what_a_text_says(receiver: Any, protocol: Any, status: Any, text: Any, verdict: Any, named: Any) -> None:
    receiver.script("metrics", [Answer(status, text)])
    outcome = send(receiver, protocol)
    assert outcome.verdict is verdict
    assert named in outcome.message
    assert text in outcome.message


# The words of stores, as they write them: signal, status, text, whether it is about the past, what the message names.
STORES = {
    "Prometheus": ("metrics", 400, "out of bounds", True, "storage.tsdb.out_of_order_time_window"),
    "Prometheus, future": ("metrics", 400, "out of bounds: timestamp is too far in the future", False, "clocks"),
    "Mimir": (
        "metrics",
        400,
        "another sample is more recent, and this one is beyond the window (err-mimir-sample-timestamp-too-old)",
        True,
        "limits.out_of_order_time_window in Mimir",
    ),
    "Mimir, no window": ("metrics", 400, "(err-mimir-sample-out-of-order). The affected sample", True, "in Mimir"),
    "Mimir, future": ("metrics", 400, "received a sample (err-mimir-too-far-in-future)", False, "clocks"),
    "Thanos": ("metrics", 409, "store locally for endpoint: add 1 series: out of order sample", True, "time_window"),
    "Cortex, future": ("metrics", 400, "timestamp too new: 1754000000000 metric: loss", False, "clocks"),
    "Google Cloud": ("metrics", 400, "Points must be written in order. One or more", True, "window"),
    "Loki, behind": (
        "logs",
        400,
        "entry ignored, reason: 'entry too far behind, entry timestamp is: 1, oldest acceptable timestamp is: 2'",
        True,
        "ingester.max_chunk_age",
    ),
    "Loki, old": (
        "logs",
        400,
        "entry for stream '{}' has timestamp too old: 2026-01-01T00:00:00Z",
        True,
        "limits_config.reject_old_samples_max_age",
    ),
    "Loki, new": ("logs", 400, "entry for stream '{}' has timestamp too new: 2027-01-01T00:00:00Z", False, "clocks"),
    "Loki, unordered": ("logs", 400, "entry out of order", True, "limits_config"),
    "Loki, behind a collector": ("logs", 500, "Permanent error: HTTP 400: entry too far behind", True, "max_chunk_age"),
    "traces": ("traces", 400, "span is too old", True, "ingestion_time_range_slack"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("signal", "status", "text", "is_past", "named"), STORES.values(), ids=STORES)
def test_what_a_store_says_about_time(
    receiver: Any, protocol: Any, signal: Signal, status: int, text: str, is_past: bool, named: str
) -> None:
    receiver.script(signal, [Answer(status, text)])
    outcome = send(receiver, protocol, signal)
    assert (outcome.verdict, outcome.too_old) == (Verdict.HOLD, is_past)
    assert named in outcome.message
    assert ("out_of_order_time_window" in outcome.message) is (signal == "metrics" and is_past), (
        "it is Prometheus' word"
    )
    assert {"metrics": "the points", "traces": "the spans", "logs": "the log records"}[signal] in outcome.message


# What a person has to do is in the message: status, and what it names.
FIXES = {
    401: "OTEL_EXPORTER_OTLP_HEADERS",
    403: "OTEL_EXPORTER_OTLP_HEADERS",
    404: "/v1/traces: check the path",
    405: "check the path",
    407: "HTTPS_PROXY",
    415: "try protocol http/",
    418: "is http://127.0.0.1",
}


@pytest.mark.parametrize("protocol", HTTP_PROTOCOLS)
@pytest.mark.parametrize(("status", "named"), FIXES.items())
def test_the_message_says_what_to_fix(receiver: Any, protocol: Any, status: Any, named: Any) -> None:
    receiver.script("traces", [Answer(status)])
    assert named in send(receiver, protocol, "traces").message


GRPC_FIXES = {"UNAUTHENTICATED": "_HEADERS", "PERMISSION_DENIED": "_HEADERS", "UNIMPLEMENTED": "check the port"}


@pytest.mark.parametrize(("code", "named"), GRPC_FIXES.items())
def test_the_message_says_what_to_fix_over_grpc(receiver: Any, code: Any, named: Any) -> None:
    receiver.script("traces", [Answer(500, code=code)])
    assert named in send(receiver, "grpc", "traces").message


# What arrives


@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_signal_arrives(receiver: Any, protocol: Any, compression: str) -> None:
    for signal in SIGNALS:
        assert send(receiver, protocol, signal, compression=compression) == Outcome(Verdict.DELIVERED)
    assert [seen.protocol for seen in receiver.seen] == [protocol] * 3
    assert receiver.points() == {
        ("j", 3, "loss", (("split", "train"),), 1000000, 0, bits(0.5)),
        ("j", 3, "loss", (), 2000000, 0, 0x7FF8000000000001),
    }
    assert [(span["name"], span["status"], span["trace_id"]) for span in receiver.spans()] == [
        ("training.step", "ERROR", "5b8efff798038103d269b633813fc60c")
    ]
    assert [(log["event_name"], log["body"]) for log in receiver.logs()] == [("training.hyperparams", "hi")]
    assert receiver.resources("logs") == [{"job_id": "j", "rank": 3}]


@pytest.mark.parametrize(
    ("protocol", "kind"), [("http/protobuf", "application/x-protobuf"), ("http/json", "application/json")]
)
def test_http_headers(receiver: Any, protocol: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password else\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    send(receiver, protocol, compression="gzip", headers={"Authorization": "Bearer x", "Content-Type": "text/html"})
    headers = receiver.seen[0].headers
    assert headers["content-type"] == kind
    assert headers["user-agent"] == f"stepspan/{__version__}"
    assert headers["content-encoding"] == "gzip"
    assert headers["authorization"] == "Bearer x"


def test_a_netrc_is_not_sent(receiver: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("default login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    send(receiver, "http/json")
    assert "authorization" not in receiver.seen[0].headers
    assert "content-encoding" not in receiver.seen[0].headers


def test_grpc_metadata(receiver: Any) -> None:
    send(receiver, "grpc", headers={"Authorization": "Bearer x", "Trace-Bin": "x"}, compression="gzip")
    headers = receiver.seen[0].headers
    assert headers["authorization"] == "Bearer x"
    assert headers["user-agent"].startswith(f"stepspan/{__version__} grpc-python/")
    assert headers["trace-bin"] == "b'x'"


def test_http_keeps_its_connection(receiver: Any) -> None:
    receiver.script(
        "metrics", [OK, Answer(400, "no"), Answer(302, headers={"Location": "/x"}), Answer(200, body=b"junk")]
    )
    with transport(receiver, "http/protobuf") as opened:
        for _ in range(6):
            opened.send(body("metrics", "http/protobuf"))
    assert len(receiver.seen) == 6
    assert receiver.connections == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_transport_can_be_used_after_close(receiver: Any, protocol: Any) -> None:
    with transport(receiver, protocol) as opened:
        opened.close()
        assert opened.send(body("metrics", protocol)).verdict is Verdict.DELIVERED


# Successes that are not quite

JUNK = [
    b"welcome",
    b"\xff\xfe\x00",
    b"[1]",
    b'{"partialSuccess": 7}',
    b'{"partialSuccess": {"rejectedDataPoints": "x"}}',
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_partial_success(receiver: Any, protocol: Any, signal: Signal) -> None:
    receiver.script(signal, [Answer(rejected=2, text="two were bad"), Answer(text="a warning"), OK])
    with transport(receiver, protocol, signal) as opened:
        partial, warned, whole = (opened.send(body(signal, protocol)) for _ in range(3))
    assert (partial.verdict, partial.rejected) == (Verdict.DELIVERED, 2)
    assert "two were bad" in partial.message
    assert warned == Outcome(Verdict.DELIVERED, "a warning")
    assert whole == Outcome(Verdict.DELIVERED)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("junk", JUNK)
def test_a_success_with_a_junk_body_is_delivered(receiver: Any, protocol: Any, junk: Any) -> None:
    receiver.script("metrics", [Answer(200, body=junk)])
    outcome = send(receiver, protocol)
    assert (outcome.verdict, outcome.rejected) == (Verdict.DELIVERED, 0)
    if protocol != "grpc":  # gRPC's own framing is right, whatever is in it
        assert "not OTLP" in outcome.message
        assert outcome.message.isprintable()


@pytest.mark.parametrize("protocol", HTTP_PROTOCOLS)
@pytest.mark.parametrize("empty", [b"", b"\n"])
def test_an_empty_success_is_delivered(receiver: Any, protocol: Any, empty: bytes) -> None:
    receiver.script("metrics", [Answer(200, body=empty)])
    assert send(receiver, protocol).verdict is Verdict.DELIVERED


@pytest.mark.parametrize(
    "said", [None, {}, {"rejectedDataPoints": 3}, {"rejectedDataPoints": "3"}, {"rejectedDataPoints": None}]
)
def test_partial_success_as_json_may_have_it(receiver: Any, said: Any) -> None:
    receiver.script("metrics", [Answer(200, body=json.dumps({"partialSuccess": said, "new": 1}).encode())])
    outcome = send(receiver, "http/json")
    assert outcome.verdict is Verdict.DELIVERED
    assert outcome.rejected == (3 if said and said["rejectedDataPoints"] else 0)


@pytest.mark.parametrize(("status", "verdict"), [(200, Verdict.DELIVERED), (503, Verdict.RETRY), (404, Verdict.HOLD)])
def test_a_body_that_breaks_off_does_not_change_the_status(receiver: Any, status: int, verdict: Any) -> None:
    receiver.script("metrics", [Answer(status, body=b"half", headers={"Content-Length": "100"})])
    assert send(receiver, "http/json").verdict is verdict


@pytest.mark.parametrize(("status", "verdict"), [(200, Verdict.DELIVERED), (503, Verdict.RETRY)])
def test_a_body_that_drips_is_left_after_the_timeout_and_does_not_change_the_status(status: int, verdict: Any) -> None:
    def drip() -> None:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 %d Said\r\nContent-Length: 60\r\n\r\n" % status)
            for _ in range(60):
                connection.sendall(b"x")
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        outcome = send(url, "http/json", timeout=0.5)
        thread.join()
    assert outcome.verdict is verdict
    assert "xxx" not in outcome.message, "the whole of it would have come after three seconds"


def test_a_long_body_is_not_read_to_its_end(receiver: Any) -> None:
    receiver.script("metrics", [Answer(503, body=b"x" * 10_000_000)])
    assert len(send(receiver, "http/json").message) < MAX_TEXT_CHARS + 100


# Texts


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_message_is_one_short_line_without_credentials(receiver: Any, protocol: Any) -> None:
    text = "bad\r\n\x1b[31mtoken\u202e s3cret and s3cret-too, me:pass \u00e9 " + "x" * 1000
    receiver.script("metrics", [Answer(401, text)])
    where = target(receiver, protocol).replace("127.0.0.1", "me:pass@127.0.0.1") + (
        "" if protocol == "grpc" else "?key=s3cret-too"
    )
    message = send(where, protocol, headers={"api-key": "s3cret", "x": "Bearer s3cret-too"}).message
    assert "bad [31mtoken *** and ***, *** \u00e9 xxx" in message or protocol == "grpc"
    assert message.isprintable()
    assert len(message) < MAX_TEXT_CHARS + 200
    assert not any(secret in message for secret in ("s3cret", "me:pass", "pass", "-too"))


def test_a_secret_at_the_cut_is_hidden_whole(receiver: Any) -> None:
    receiver.script("metrics", [Answer(401, "x" * (MAX_TEXT_CHARS - 5) + " s3cret-token")])
    assert "s3c" not in send(receiver, "http/json", headers={"authorization": "Bearer s3cret-token"}).message


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("application/json", b'{"code": 3, "message": "the reason"}'),
        ("application/json; charset=utf-8", b'{"code": 3, "message": "the reason"}'),
        ("application/json", b"the reason"),
        ("application/json", b'["the reason"]'),
        ("application/x-protobuf", b"\x08\x03\x12\x0athe reason"),
        ("application/x-protobuf", b"the reason"),
        ("text/plain", b"the reason"),
        ("text/plain", b"\xff the reason"),
    ],
)
def test_the_text_of_an_error_in_every_form(receiver: Any, kind: str, content: bytes) -> None:
    receiver.script("metrics", [Answer(400, body=content, headers={"Content-Type": kind})])
    message = send(receiver, "http/protobuf").message
    assert "the reason" in message
    assert message.isprintable()
    assert ("message" in message) is False


# When to come back


RETRY_AFTER = {
    None: None,
    "7": 7.0,
    " 7 ": 7.0,
    "0.5": 0.5,
    "-3": 0.0,
    "nan": None,
    "1e999": None,
    "soon": None,
    "": None,
    "Mon, 12 Jan 1970 13:47:10 GMT": 30.0,
    "Mon, 12 Jan 1970 13:46:10 GMT": 0.0,
    "Mon, 99 Jan 1970 13:46:10 GMT": None,
}


@pytest.mark.parametrize(("value", "seconds"), RETRY_AFTER.items())
def test_retry_after(value: Any, seconds: Any) -> None:
    assert retry_after(value, now=1_000_000) == seconds


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("status", [429, 503, 500])
def test_the_receiver_says_when_to_come_back(receiver: Any, protocol: Any, status: int) -> None:
    receiver.script("metrics", [Answer(status, retry_after=7), Answer(status)])
    with transport(receiver, protocol) as opened:
        assert opened.send(body("metrics", protocol)).retry_after == 7.0
        assert opened.send(body("metrics", protocol)).retry_after is None


@pytest.mark.parametrize("protocol", HTTP_PROTOCOLS)
def test_the_receiver_names_a_date_to_come_back(receiver: Any, protocol: Any) -> None:
    receiver.script("metrics", [Answer(503, retry_after=formatdate(time.time() + 60, usegmt=True))])
    outcome = send(receiver, protocol)
    assert outcome.verdict is Verdict.RETRY
    assert 30 < outcome.retry_after <= 60


# No answer


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_connection_cut_after_the_request_was_read(receiver: Any, protocol: Any) -> None:
    receiver.script("metrics", [RESET, RESET_TAKEN])
    with transport(receiver, protocol) as opened:
        assert [opened.send(body("metrics", protocol)).verdict for _ in range(3)] == [
            Verdict.RETRY,
            Verdict.RETRY,
            Verdict.DELIVERED,
        ]
    assert len(receiver.seen) == 3
    assert len(receiver.requests["metrics"]) == 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_receiver_that_never_answers(receiver: Any, protocol: Any) -> None:
    receiver.script("metrics", [HANG])
    with transport(receiver, protocol, timeout=0.3) as opened:
        outcome = opened.send(body("metrics", protocol))
        assert outcome.verdict is Verdict.RETRY
        assert "in time" in outcome.message
    assert len(receiver.seen) == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_slow_receiver_within_the_timeout(receiver: Any, protocol: Any) -> None:
    receiver.script("metrics", [Answer(delay=0.05)])
    assert send(receiver, protocol).verdict is Verdict.DELIVERED


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_port_where_nobody_listens_until_the_receiver_returns(receiver: Any, protocol: Any) -> None:
    with transport(receiver, protocol) as opened:
        receiver.stop()
        for _ in range(3):
            outcome = opened.send(body("metrics", protocol))
            assert outcome.verdict is Verdict.RETRY
            assert "refused" in outcome.message
        receiver.start()
        assert opened.send(body("metrics", protocol)).verdict is Verdict.DELIVERED


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_name_without_address(protocol: Any) -> None:
    where = "http://nowhere.invalid:4317?key=s3cret"
    outcome = send(where, protocol)
    assert outcome.verdict is Verdict.HOLD
    assert "has no address" in outcome.message
    assert "s3cret" not in outcome.message


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tls_to_a_plain_port(receiver: Any, protocol: Any) -> None:
    where = "https://" + target(receiver, protocol).rpartition("/")[2]
    outcome = send(where, protocol)
    assert outcome.verdict is Verdict.HOLD
    assert "OTEL_EXPORTER_OTLP_CERTIFICATE" in outcome.message


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tls_with_an_unknown_authority_and_with_the_known_one(
    protocol: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedReceiver(tls=True, client_certificate=True) as receiver:
        where = "https://" + target(receiver, protocol).rpartition("/")[2]
        unknown = send(where, protocol)
        assert unknown.verdict is Verdict.HOLD
        assert "OTEL_EXPORTER_OTLP_CERTIFICATE" in unknown.message
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none"))  # loses against ours
        env = {
            "OTEL_EXPORTER_OTLP_CERTIFICATE": receiver.certificate_file,
            "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": receiver.certificate_file,
            "OTEL_EXPORTER_OTLP_CLIENT_KEY": receiver.key_file,
        }
        assert send(where, protocol, env=env) == Outcome(Verdict.DELIVERED)
        both = tmp_path / "both.pem"
        both.write_text(Path(receiver.certificate_file).read_text() + Path(receiver.key_file).read_text())
        env |= {"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(both), "OTEL_EXPORTER_OTLP_CLIENT_KEY": ""}
        assert send(where, protocol, env=env) == Outcome(Verdict.DELIVERED)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("content", [None, "not a certificate"])
@pytest.mark.parametrize("name", ["CERTIFICATE", "CLIENT_CERTIFICATE"])
def test_a_certificate_file_that_is_none(protocol: Any, content: str | None, name: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pem"
    if content is not None:
        path.write_text(content)
    with ScriptedReceiver(tls=True) as receiver:
        env = {"OTEL_EXPORTER_OTLP_CERTIFICATE": receiver.certificate_file, f"OTEL_EXPORTER_OTLP_{name}": str(path)}
        outcome = send("https://" + target(receiver, protocol).rpartition("/")[2], protocol, env=env)
    assert outcome.verdict is Verdict.HOLD
    assert "OTEL_EXPORTER_OTLP_CERTIFICATE" in outcome.message


def test_http_to_a_grpc_port(receiver: Any) -> None:
    outcome = send(f"http://{receiver.grpc_target}", "http/protobuf")
    assert outcome.verdict in (Verdict.HOLD, Verdict.RETRY)


def test_grpc_to_an_http_port(receiver: Any) -> None:
    outcome = send(receiver.url, "grpc")
    assert outcome.verdict is Verdict.HOLD
    assert "does not speak grpc" in outcome.message


def test_a_proxy_that_is_away(receiver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed.getsockname()[1]}")
        outcome = send("http://collector.invalid:4318", "http/json")
    assert outcome.verdict is Verdict.RETRY


def test_a_url_that_cannot_be_asked() -> None:
    assert send(f"http://{'a' * 70}.com", "http/json").verdict is Verdict.HOLD


def test_a_redirect_is_never_followed(receiver: Any) -> None:
    with ScriptedReceiver() as elsewhere:
        place = f"{elsewhere.url}/v1/metrics?key=s3cret"
        for status in (301, 302, 303, 307, 308):
            receiver.script("metrics", [Answer(status, headers={"Location": place})])
            outcome = send(receiver, "http/json")
            assert outcome.verdict is Verdict.HOLD
            assert f"set {elsewhere.url}/v1/metrics as the endpoint" in outcome.message
            assert "s3cret" not in outcome.message
        receiver.script("metrics", [Answer(302, headers={"Location": "http://[junk"})])
        assert send(receiver, "http/json").message.startswith("302: ")
        assert elsewhere.seen == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_signal_404_leaves_the_others(receiver: Any, protocol: Any) -> None:
    receiver.script("traces", lambda request: Answer(404))
    assert {signal: send(receiver, protocol, signal).verdict for signal in SIGNALS} == {
        "metrics": Verdict.DELIVERED,
        "traces": Verdict.HOLD,
        "logs": Verdict.DELIVERED,
    }


def test_grpc_refuses_a_message_over_4_mib_by_its_own_words(receiver: Any) -> None:
    large = decode("logs", json.dumps(BODIES["logs"]).encode(), from_json=True)
    large.resource_logs[0].scope_logs[0].log_records[0].body.string_value = "x" * 5_000_000
    with transport(receiver, "grpc", "logs") as opened:
        assert opened.send(large.SerializeToString()).verdict is Verdict.HALVE
        assert opened.send(body("logs", "grpc")).verdict is Verdict.DELIVERED


# Beside other OpenTelemetry


LOADED = {"http/json": [], "http/protobuf": [], "grpc": ["google.protobuf", "grpc"]}


@pytest.mark.parametrize(("protocol", "loaded"), LOADED.items())
def test_only_what_a_protocol_needs_is_imported(receiver: Any, protocol: Any, loaded: Any) -> None:
    script = """
import sys
from stepspan.otlp.endpoint import resolve_destination
from stepspan.otlp.transport import open_transport
watched = {"grpc", "requests", "urllib3", "google.protobuf", "opentelemetry.sdk", "pydantic"}
endpoints = resolve_destination({}, endpoint=sys.argv[1], protocol=sys.argv[2]).endpoints
print(sorted(watched & set(sys.modules)))
transport = open_transport(endpoints["logs"])
print(transport.send(bytes.fromhex(sys.argv[3])).verdict.name)
transport.close()
print(sorted(watched & set(sys.modules)))
"""
    arguments = [target(receiver, protocol), protocol, body("logs", protocol).hex()]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "DELIVERED", str(loaded)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_instrumented_client_makes_no_span_of_a_send(
    receiver: Any, protocol: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import grpc
    import requests
    from opentelemetry.instrumentation.grpc import GrpcInstrumentorClient
    from opentelemetry.instrumentation.requests import RequestsInstrumentor

    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)  # gRPC's instrumentor heeds no other
    with contextlib.ExitStack() as stack:
        for instrumentor in (RequestsInstrumentor(), GrpcInstrumentorClient()):  # type: ignore[no-untyped-call]
            instrumentor.instrument()
            stack.callback(instrumentor.uninstrument)
        stack.callback(provider.shutdown)
        requests.post(
            f"{receiver.url}/v1/logs",
            data=body("logs", "http/json"),
            headers={"content-type": "application/json"},
            timeout=9,
        )
        channel = grpc.insecure_channel(receiver.grpc_target)
        stack.callback(channel.close)
        channel.unary_unary("/opentelemetry.proto.collector.logs.v1.LogsService/Export")(b"", timeout=9)  # type: ignore[call-arg]
        assert len(spans.get_finished_spans()) == 2, "the instrumentation works"

        receiver.script("metrics", [OK, Answer(503), Answer(400), RESET])
        with transport(receiver, protocol) as opened:
            for _ in range(5):
                opened.send(body("metrics", protocol))
        again = protocol != "grpc"  # over HTTP, what was cut on a kept connection goes out once more
        assert len(receiver.seen) == 2 + 5 + again
        assert len(spans.get_finished_spans()) == 2
        assert "traceparent" not in receiver.seen[-1].headers


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_global_state_is_changed(receiver: Any, protocol: Any) -> None:
    def state() -> tuple[Any, ...]:
        loggers = [log for log in logging.root.manager.loggerDict.values() if isinstance(log, logging.Logger)]
        levels = {log.name: (log.level, list(log.handlers)) for log in [logging.root, *loggers]}
        return context.get_current(), trace.get_tracer_provider(), dict(os.environ), levels, socket.getdefaulttimeout()

    with transport(receiver, protocol) as opened:
        opened.send(body("metrics", protocol))
        before = state()
        receiver.script("metrics", [OK, Answer(400), RESET])
        for _ in range(3):
            opened.send(body("metrics", protocol))
        assert state() == before
