"""A request goes out, an `Outcome` comes back: the delivery table, and what both transports share.

The tables below are docs/architecture.md's delivery table as data: one row an answer, and a phrase table for what a
receiver only says in words. A transport sends once and raises nothing for what the network or the receiver does; when
to send again, what to split and where to stop is the deliverer's, by the verdict.

Everything a send does runs under OpenTelemetry's suppress-instrumentation keys, so that an instrumented `requests` or
gRPC makes no spans about telemetry, which would make telemetry for ever. Only the current context is changed, and put
back. The transports are imported when one is opened: gRPC costs 130 ms and 33 MB.
"""

from __future__ import annotations

import enum
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry import context
from opentelemetry.context import _SUPPRESS_HTTP_INSTRUMENTATION_KEY, _SUPPRESS_INSTRUMENTATION_KEY

from stepspan import __version__
from stepspan.otlp.endpoint import Endpoint

USER_AGENT = f"stepspan/{__version__}"
TEXT_LIMIT = 300  # characters of a receiver's text that a message shows
_SUPPRESSED = (_SUPPRESS_INSTRUMENTATION_KEY, _SUPPRESS_HTTP_INSTRUMENTATION_KEY, "suppress_instrumentation")


class Verdict(enum.Enum):
    """What to do about a request that was sent."""

    DELIVERED = "delivered"
    """The receiver has it, less `Outcome.rejected` records."""
    RETRY = "retry"
    """Send the same again later."""
    RETRY_THEN_HOLD = "retry, then hold"
    """Send the same again; if that does not help, hold. Never reject: it may be the receiver's disk."""
    HALVE = "halve"
    """Larger than the receiver takes: send it in halves."""
    ISOLATE = "isolate"
    """Something in it is refused: halve until the record that is refused stands alone."""
    HOLD = "hold"
    """Nothing will help but a person: try slowly, and tell once."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request."""

    verdict: Verdict
    message: str = ""
    """For a person: the status, what to fix, the receiver's text. Never a credential."""
    retry_after: float | None = None
    """Seconds the receiver asked to wait."""
    rejected: int = 0
    """Records of a delivered request that the receiver says it did not take (OTLP partial success)."""
    opaque: bool = False
    """Refused, and what answers does not know why: it passes on the refusal of something behind it."""


class Transport(typing.Protocol):
    """Sends one signal to one endpoint; used by one thread at a time."""

    def send(self, body: bytes) -> Outcome:
        """Send an encoded export request once, uncompressed as given, and say what became of it."""
        ...

    def close(self) -> None:
        """Close the connections. A later `send` opens new ones."""
        ...


def open_transport(endpoint: Endpoint) -> Transport:
    """The transport for the endpoint's protocol. Connects on the first `send`."""
    if endpoint.protocol == "grpc":
        from stepspan.otlp.grpc import GrpcTransport

        return GrpcTransport(endpoint)
    from stepspan.otlp.http import HttpTransport

    return HttpTransport(endpoint)


class Row(typing.NamedTuple):
    """An answer's verdict and what to fix, with `{url}`, `{signal}`, `{protocol}`, `{other}` and `{place}` in it."""

    verdict: Verdict
    fix: str = ""
    opaque: bool = False


_SET_HEADERS = "the receiver wants credentials: set OTEL_EXPORTER_OTLP_HEADERS (authorization=...)"
_NOT_ALLOWED = "the credentials in OTEL_EXPORTER_OTLP_HEADERS may not write {signal} there"
_BUSY = "the receiver is busy or away"

HTTP_ROWS: Mapping[int, Row] = {
    400: Row(Verdict.ISOLATE, "the receiver refuses something in the request"),
    401: Row(Verdict.HOLD, _SET_HEADERS),
    403: Row(Verdict.HOLD, _NOT_ALLOWED),
    404: Row(Verdict.HOLD, "no OTLP receiver at {url}: check the path"),
    405: Row(Verdict.HOLD, "{url} takes no POST: check the path"),
    407: Row(Verdict.HOLD, "the proxy wants credentials: check HTTPS_PROXY and HTTP_PROXY"),
    408: Row(Verdict.RETRY, _BUSY),
    413: Row(Verdict.ISOLATE, "the request is larger than the receiver takes"),
    415: Row(Verdict.HOLD, "the receiver does not read {protocol}: try protocol {other}"),
    422: Row(Verdict.ISOLATE, "the receiver refuses something in the request"),
    429: Row(Verdict.RETRY, _BUSY),
    500: Row(Verdict.RETRY_THEN_HOLD, "the receiver failed: look in its log"),
    502: Row(Verdict.RETRY, _BUSY),
    503: Row(Verdict.RETRY, _BUSY),
    504: Row(Verdict.RETRY, _BUSY),
}
HTTP_REDIRECT = Row(Verdict.HOLD, "{url} is somewhere else, and telemetry follows no redirect: set {place} as endpoint")
HTTP_OTHER = Row(Verdict.HOLD, "no answer that OTLP knows: is {url} an OTLP receiver?")

GRPC_ROWS: Mapping[str, Row] = {
    "ABORTED": Row(Verdict.RETRY, _BUSY),
    "CANCELLED": Row(Verdict.RETRY, _BUSY),
    "DATA_LOSS": Row(Verdict.RETRY, _BUSY),
    "DEADLINE_EXCEEDED": Row(Verdict.RETRY, "no answer from {url} in time"),
    "INTERNAL": Row(Verdict.RETRY_THEN_HOLD, "the receiver failed: look in its log"),
    "INVALID_ARGUMENT": Row(Verdict.ISOLATE, "the receiver refuses something in the request"),
    "PERMISSION_DENIED": Row(Verdict.HOLD, _NOT_ALLOWED),
    "RESOURCE_EXHAUSTED": Row(Verdict.RETRY, _BUSY),
    "UNAUTHENTICATED": Row(Verdict.HOLD, _SET_HEADERS),
    "UNAVAILABLE": Row(Verdict.RETRY, "no receiver at {url}, or it is busy"),
    "UNIMPLEMENTED": Row(
        Verdict.HOLD, "no OTLP receiver for {signal} at {url}: check the port, or try protocol {other}"
    ),
    "UNKNOWN": Row(Verdict.RETRY_THEN_HOLD, "the receiver failed: look in its log"),
}
GRPC_OTHER = Row(Verdict.HOLD, "no answer that OTLP knows: is {url} an OTLP receiver?")

TLS_FAULT = Row(
    Verdict.HOLD,
    "no TLS with {url}: check that it speaks TLS (http:// is without), and the files that "
    "OTEL_EXPORTER_OTLP_CERTIFICATE, _CLIENT_KEY and _CLIENT_CERTIFICATE name",
)
NAME_FAULT = Row(Verdict.HOLD, "the name in {url} has no address: check OTEL_EXPORTER_OTLP_ENDPOINT and DNS")
PROTOCOL_FAULT = Row(
    Verdict.HOLD, "what answers at {url} does not speak {protocol}: check scheme and port, or try {other}"
)


class Phrase(typing.NamedTuple):
    """Words in a receiver's text that say more than its status, where the status has one of these verdicts."""

    words: str
    row: Row
    instead_of: frozenset[Verdict]


_REFUSED = frozenset({Verdict.ISOLATE, Verdict.RETRY_THEN_HOLD})
_TOO_OLD = Row(
    Verdict.HOLD,
    "the points are older than the receiver takes: widen storage.tsdb.out_of_order_time_window "
    "(Mimir and others: out_of_order_time_window), then they go out by themselves",
)

PHRASES: tuple[Phrase, ...] = (
    Phrase("larger than max", Row(Verdict.HALVE, "larger than the receiver takes"), _REFUSED | {Verdict.RETRY}),
    # Prometheus says "out of bounds: timestamp is too far in the future": the future first.
    Phrase(
        "too far in the future",
        Row(Verdict.HOLD, "the points are in the receiver's future: set the clocks of this host and of the receiver"),
        _REFUSED,
    ),
    Phrase("out of bounds", _TOO_OLD, _REFUSED),
    Phrase("too old", _TOO_OLD, _REFUSED),
    Phrase("out of order", _TOO_OLD, _REFUSED),
    # VictoriaMetrics' 400; no record of the request is to blame.
    Phrase(
        "json encoding isn't supported",
        Row(Verdict.HOLD, "the receiver does not read {protocol}: try protocol {other}"),
        _REFUSED,
    ),
    # The Collector's otlp_http exporter passes a 400 on without Prometheus' words: too old looks like any other reason.
    Phrase(
        "responded with http status code 400",
        Row(
            Verdict.ISOLATE,
            "what is behind the collector refuses something in the request: its own log says why",
            opaque=True,
        ),
        frozenset({Verdict.ISOLATE}),
    ),
)
"""By the first that fits, also behind a 500: what is in between may have wrapped the 400."""


def judge(
    endpoint: Endpoint,
    status: str,
    row: Row,
    text: str,
    *,
    phrases: tuple[Phrase, ...] = PHRASES,
    retry_after: float | None = None,
    place: str = "",
) -> Outcome:
    """The outcome of an answer by its row, or by the first phrase in its `text` that says more."""
    lower = text.lower()
    row = next((p.row for p in phrases if row.verdict in p.instead_of and p.words in lower), row)
    fix = row.fix.format(
        url=endpoint.shown,
        signal=endpoint.signal,
        protocol=endpoint.protocol,
        other="http/json" if endpoint.protocol == "http/protobuf" else "http/protobuf",
        place=clean(endpoint, place) or "the right place",
    )
    said = clean(endpoint, text)
    message = ": ".join(filter(None, (status, fix))) + (f' ("{said}")' if said else "")
    return Outcome(row.verdict, message, retry_after, opaque=row.opaque)


def delivered(rejected: int, text: str, endpoint: Endpoint) -> Outcome:
    """The outcome of a success, partial if the receiver counted records that it did not take."""
    said = clean(endpoint, text)
    if rejected > 0:
        return Outcome(
            Verdict.DELIVERED, f"{rejected} rejected by the receiver" + (f' ("{said}")' if said else ""), None, rejected
        )
    return Outcome(Verdict.DELIVERED, said)


def partial_success(endpoint: Endpoint, content: bytes) -> tuple[int, str]:
    """What a protobuf answer says about records not taken: how many, and why. Junk becomes a note: it was a success."""
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    try:
        if endpoint.signal == "metrics":
            metrics = ExportMetricsServiceResponse.FromString(content).partial_success
            return metrics.rejected_data_points, metrics.error_message
        if endpoint.signal == "traces":
            traces = ExportTraceServiceResponse.FromString(content).partial_success
            return traces.rejected_spans, traces.error_message
        logs = ExportLogsServiceResponse.FromString(content).partial_success
        return logs.rejected_log_records, logs.error_message
    except DecodeError:
        return 0, junk(content)


def status_details(content: bytes) -> tuple[str, float | None] | None:
    """The message of an encoded google.rpc.Status and the seconds to wait by its RetryInfo; None if it is none."""
    from google.protobuf.message import DecodeError
    from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
    from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

    retry = RetryInfo()
    try:
        status = Status.FromString(content)
        asked = any(detail.Unpack(retry) for detail in status.details)
    except DecodeError:
        return None
    delay = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return str(status.message), max(delay, 0.0) if asked else None


def junk(content: bytes) -> str:
    """The note on a success whose body is not what OTLP says."""
    return f"taken, with an answer that is not OTLP: {content[:4096].decode('utf-8', 'replace')}"


def clean(endpoint: Endpoint, text: str) -> str:
    """A receiver's text as a message may show it: on one line, short, without credentials."""
    for secret in endpoint.secrets:
        text = text.replace(secret, "***")
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= TEXT_LIMIT else line[: TEXT_LIMIT - 3] + "..."


@contextmanager
def uninstrumented() -> Iterator[None]:
    """Within it, nothing that OpenTelemetry instruments makes spans."""
    quiet = context.get_current()
    for key in _SUPPRESSED:
        quiet = context.set_value(key, True, quiet)
    token = context.attach(quiet)
    try:
        yield
    finally:
        context.detach(token)
