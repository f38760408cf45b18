"""The delivery table: what an answer of a receiver, or the lack of one, means as an `Outcome`.

The tables are docs/architecture.md's delivery table as data: an `Answer` for each HTTP status and gRPC code, and
phrases for what a receiver only says in words. To change how a refused request is handled, change its row here.

What both transports share stands here, too. What gRPC does for a send runs in `uninstrumented()`: an instrumented one
would otherwise make spans about telemetry, which make telemetry, without end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from stepspan._version import __version__
from stepspan.mapping.records import Signal
from stepspan.otlp.endpoint import Endpoint
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.values import shorten

USER_AGENT = f"stepspan/{__version__}"
MAX_TEXT_CHARS = 300
"""Characters of a receiver's text that a message shows."""
_SIZES = re.compile(r"\((\d+) vs\.? (\d+)\)")
MAX_CONNECTION_AGE_S = 240.0
"""By then a connection is replaced, after half of it at the earliest: some balancers forget one that rests so long."""
_PAGE_TYPES = frozenset({"text/html", "application/xhtml+xml"})
_BEFORE_A_PAGE = b" \t\r\n\f\v\0\xef\xbb\xbf\xfe\xff"
"""White space and the marks of an encoding."""


class Answer(NamedTuple):
    """What one kind of answer means.

    Args:
        verdict: What delivery does.
        fix: For a person, with `{url}`, `{signal}`, `{protocol}`, `{other}` (another protocol to try), `{location}`,
            `{records}` (the signal's), and `{widen}` (what its stores call their window).
        reason_hidden: As `Outcome.reason_hidden`.
        too_old: As `Outcome.too_old`.
        too_new: As `Outcome.too_new`.
        may_pass: As `Outcome.may_pass`.
        denied: As `Outcome.denied`.

    """

    verdict: Verdict
    fix: str = ""
    reason_hidden: bool = False
    too_old: bool = False
    too_new: bool = False
    may_pass: bool = False
    denied: bool = False


_SET_HEADERS = (
    "the receiver wants credentials, in OTEL_EXPORTER_OTLP_HEADERS (authorization and what it asks for), "
    "or STEPSPAN_HEADERS_FILE for a token that expires"
)
_NOT_ALLOWED = "the credentials in OTEL_EXPORTER_OTLP_HEADERS may not write {signal} there"
_BUSY = "the receiver is busy or away"
_REFUSED = "the receiver refuses something in the request"
_FAILED = "the receiver failed: look in its log"
_PROXY_CREDENTIALS = "the proxy wants credentials: check HTTPS_PROXY and HTTP_PROXY"
_OTHER_PROTOCOL = "the receiver does not read {protocol}: try protocol {other}, or no compression"

WEB_PAGE = Answer(
    Verdict.HOLD,
    "{url} answers with a web page and is no OTLP receiver, or a login or a proxy is in between: "
    "check the address, the path and the credentials",
)
"""A success that is none: the page of a login, a proxy, a web server that answers everything."""

HTTP_ANSWERS: Mapping[int, Answer] = {
    **dict.fromkeys((400, 422), Answer(Verdict.ISOLATE, _REFUSED)),
    401: Answer(Verdict.HOLD, _SET_HEADERS, denied=True),
    403: Answer(Verdict.HOLD, _NOT_ALLOWED, may_pass=True, denied=True),
    404: Answer(Verdict.HOLD, "no OTLP receiver at {url}: check the path", may_pass=True),
    405: Answer(Verdict.HOLD, "{url} takes no POST: check the path"),
    407: Answer(Verdict.HOLD, _PROXY_CREDENTIALS),
    413: Answer(Verdict.HALVE, "the request is larger than the receiver takes"),
    415: Answer(Verdict.HOLD, _OTHER_PROTOCOL),
    500: Answer(Verdict.RETRY_THEN_HOLD, _FAILED),
    511: WEB_PAGE,  # a network that wants a login
    **dict.fromkeys((408, 429, 502, 503, 504), Answer(Verdict.RETRY, _BUSY)),
    **dict.fromkeys(
        range(520, 531),
        Answer(Verdict.HOLD, "a content delivery network in between does not reach the receiver", may_pass=True),
    ),
}
HTTP_REDIRECT = Answer(
    Verdict.HOLD, "{url} redirects, and telemetry follows no redirect: set {location} as the endpoint"
)
PROXY_ANSWERS: Mapping[int, Answer] = {
    407: Answer(Verdict.HOLD, _PROXY_CREDENTIALS),
    **dict.fromkeys((408, 429, 500, 502, 503, 504), Answer(Verdict.RETRY, "the proxy does not reach {url}")),
}
"""By the status with which a proxy refuses to connect."""
PROXY_REFUSES = Answer(Verdict.HOLD, "the proxy refuses to connect to {url}: allow it there", may_pass=True)

GRPC_ANSWERS: Mapping[str, Answer] = {
    **dict.fromkeys(
        ("ABORTED", "CANCELLED", "DATA_LOSS", "OUT_OF_RANGE", "RESOURCE_EXHAUSTED"), Answer(Verdict.RETRY, _BUSY)
    ),
    **dict.fromkeys(("INTERNAL", "UNKNOWN"), Answer(Verdict.RETRY_THEN_HOLD, _FAILED)),
    "DEADLINE_EXCEEDED": Answer(Verdict.RETRY, "no answer from {url} in time"),
    **dict.fromkeys(("FAILED_PRECONDITION", "INVALID_ARGUMENT"), Answer(Verdict.ISOLATE, _REFUSED)),
    "NOT_FOUND": Answer(Verdict.HOLD, "no OTLP receiver for {signal} at {url}: check the address", may_pass=True),
    "PERMISSION_DENIED": Answer(Verdict.HOLD, _NOT_ALLOWED, may_pass=True, denied=True),
    "UNAUTHENTICATED": Answer(Verdict.HOLD, _SET_HEADERS, denied=True),
    "UNAVAILABLE": Answer(Verdict.RETRY, "no receiver at {url}, or it is busy"),
    "UNIMPLEMENTED": Answer(
        Verdict.HOLD, "no OTLP receiver for {signal} at {url}: check the port, or try protocol {other}", may_pass=True
    ),
}

UNKNOWN_ANSWER = Answer(Verdict.ISOLATE, "not an answer that OTLP knows: is {url} an OTLP receiver?")
"""Any HTTP status or gRPC code that is not in the tables: it may be about one record."""


def answer_of_status(status: int) -> Answer:
    """The row of an HTTP status that is no success."""
    return HTTP_REDIRECT if 300 <= status < 400 else HTTP_ANSWERS.get(status, UNKNOWN_ANSWER)


TLS_FAULT = Answer(
    Verdict.HOLD,
    "no TLS with {url}: check that it speaks TLS (http:// is without), and the files that "
    "OTEL_EXPORTER_OTLP_CERTIFICATE, _CLIENT_KEY and _CLIENT_CERTIFICATE name",
    may_pass=True,
)
NAME_FAULT = Answer(
    Verdict.HOLD, "the name in {url} has no address: check OTEL_EXPORTER_OTLP_ENDPOINT and DNS", may_pass=True
)
PROXY_NAME_FAULT = Answer(
    Verdict.HOLD, "the name of the proxy has no address: check HTTPS_PROXY, HTTP_PROXY and DNS", may_pass=True
)
PROTOCOL_FAULT = Answer(
    Verdict.HOLD, "what answers at {url} does not speak {protocol}: check scheme and port, or try {other}"
)


_REFUSALS = frozenset({Verdict.ISOLATE, Verdict.RETRY_THEN_HOLD})


class Phrase(NamedTuple):
    """Words in a receiver's text that say more than its status does.

    Args:
        words: In lower case.
        answer: What they mean.
        instead_of: The verdicts, by status, that the phrase replaces.

    """

    words: str
    answer: Answer
    instead_of: frozenset[Verdict] = _REFUSALS


_TOO_LARGE = Answer(Verdict.HALVE, "larger than the receiver takes")
_TRACE_TOO_LARGE = Answer(Verdict.ISOLATE, "the trace is larger than the receiver takes (Tempo: max_bytes_per_trace)")
_IN_FUTURE = Answer(
    Verdict.HOLD,
    "{records} are in the receiver's future: set the clocks of this host and of the receiver",
    too_new=True,
)
_TOO_OLD = Answer(
    Verdict.HOLD, "{records} are older than the receiver takes: {widen}, then they go out by themselves", too_old=True
)
_RECORDS: Mapping[Signal, str] = {"metrics": "the points", "traces": "the spans", "logs": "the log records"}
_WIDEN: tuple[tuple[Signal, str, str], ...] = (
    ("metrics", "mimir", "widen limits.out_of_order_time_window in Mimir"),
    ("metrics", "", "widen storage.tsdb.out_of_order_time_window (Mimir and others: out_of_order_time_window)"),
    ("traces", "", "widen what the store of traces takes of the past (Tempo: ingestion_time_range_slack)"),
    ("logs", "too far behind", "raise ingester.max_chunk_age in Loki: a stream may lag by half of it"),
    ("logs", "", "widen what the store of logs takes (Loki: limits_config.reject_old_samples_max_age)"),
)
"""How a store is made to take older records: signal, words of the store in lower case, what to do. The first counts."""
_REFUSED_BEHIND = Answer(
    Verdict.ISOLATE,
    "what is behind the collector refuses something in the request: its own log says why",
    reason_hidden=True,
)

_TLS_WANTED = Answer(Verdict.HOLD, "what answers at {url} speaks TLS: write https:// in its place")

IN_FUTURE_WORDS = (
    "too far in the future",  # Prometheus, Mimir, Thanos
    "too far into the future",
    "too far in future",  # Mimir's "err-mimir-too-far-in-future"
    "timestamp too new",  # Loki, Cortex
    "minutes in the future",  # Google Cloud
    "hours in the future",
    "is in the future",
    "are in the future",
    "future timestamp",
)
TOO_OLD_WORDS = (
    "out of bounds",  # Prometheus, Thanos, Amazon
    "too old",  # of them, of Loki and Cortex, and Mimir's "err-mimir-sample-timestamp-too-old"
    "out of order",
    "too far behind",  # Loki, of a stream
    "too far in the past",
    "too far into the past",
    "hours in the past",
    "days in the past",
    "is in the past",
    "written in order",  # Google Cloud
    "older than the retention",
    "outside the retention",
    "outside of the retention",
    "beyond the retention",
)

_ANY_FAILURE = _REFUSALS | {Verdict.RETRY}
PHRASES: tuple[Phrase, ...] = (
    # Tempo says these as FAILED_PRECONDITION, 500 or 429: of one trace for good, of a tenant until it has room.
    Phrase("trace_too_large", _TRACE_TOO_LARGE, _ANY_FAILURE),
    Phrase("max size of trace", _TRACE_TOO_LARGE, _ANY_FAILURE),
    Phrase("live_traces_exceeded", Answer(Verdict.RETRY, _BUSY), _ANY_FAILURE),
    Phrase("larger than max", _TOO_LARGE, _ANY_FAILURE),
    Phrase("body too large", _TOO_LARGE, _ANY_FAILURE),
    Phrase("payload too large", _TOO_LARGE, _ANY_FAILURE),
    Phrase("entity too large", _TOO_LARGE, _ANY_FAILURE),
    Phrase("request too large", _TOO_LARGE, _ANY_FAILURE),
    Phrase("message too large", _TOO_LARGE, _ANY_FAILURE),
    # Prometheus says "out of bounds: timestamp is too far in the future": the future first. Hyphens count as spaces.
    *(Phrase(words, _IN_FUTURE) for words in IN_FUTURE_WORDS),
    *(Phrase(words, _TOO_OLD) for words in TOO_OLD_WORDS),
    # Go's and nginx's 400.
    Phrase("http request to an https server", _TLS_WANTED),
    Phrase("plain http request was sent to https port", _TLS_WANTED),
    # VictoriaMetrics' 400; no record of the request is to blame.
    Phrase("json encoding isn't supported", Answer(Verdict.HOLD, _OTHER_PROTOCOL)),
    # The Collector's otlp_http exporter passes a 400 on without Prometheus' words: too old looks like any other reason.
    Phrase("responded with http status code 400", _REFUSED_BEHIND, frozenset({Verdict.ISOLATE})),
)
"""The first that fits counts. They apply behind a 500, too: a proxy may have wrapped the 400."""


def failed_outcome(
    endpoint: Endpoint,
    status: str,
    answer: Answer,
    text: str,
    *,
    phrases: tuple[Phrase, ...] = PHRASES,
    retry_after: float | None = None,
    location: str = "",
    proxy: str = "",
) -> Outcome:
    """The outcome of a request that did not succeed.

    Args:
        endpoint: Where it was sent.
        status: The HTTP status or gRPC code; "" if there was no answer.
        answer: The status' row in the tables.
        text: What the receiver, or the error, says.
        phrases: Those that may replace `answer`, by the words in `text`.
        retry_after: Seconds that the receiver asked to wait.
        location: Where a redirect points.
        proxy: The URL of the proxy in between, without credentials; "" for none.

    """
    lower = text.lower()
    said = f"{lower}\n{lower.replace('-', ' ').replace('_', ' ')}"
    answer = next((p.answer for p in phrases if answer.verdict in p.instead_of and p.words in said), answer)
    fix = answer.fix.format(
        url=endpoint.display_url,
        signal=endpoint.signal,
        records=_RECORDS[endpoint.signal],
        widen=next(do for signal, words, do in _WIDEN if signal == endpoint.signal and words in said),
        protocol=endpoint.protocol,
        other="http/json" if endpoint.protocol == "http/protobuf" else "http/protobuf",
        location=redacted_line(endpoint, location) or "the right URL",
    )
    through = f", through proxy {proxy}" if proxy else ""
    message = ": ".join(filter(None, (status, fix))) + through + _quoted(redacted_line(endpoint, text))
    return Outcome(
        answer.verdict,
        message,
        retry_after,
        reason_hidden=answer.reason_hidden,
        too_old=answer.too_old,
        too_new=answer.too_new,
        may_pass=answer.may_pass,
        denied=answer.denied,
        max_ratio=_max_ratio(text) if answer.verdict is Verdict.HALVE else 0.0,
    )


def _max_ratio(text: str) -> float:
    """The size that a receiver takes, as a part of what it was sent: of "larger than max (6 vs. 4)" 2/3. 0: unknown."""
    found = _SIZES.search(text)
    return float(found[2]) / float(found[1]) if found and 0 < float(found[2]) < float(found[1]) else 0.0


def delivered_outcome(endpoint: Endpoint, rejected: int, text: str) -> Outcome:
    """The outcome of a success.

    Args:
        endpoint: Where the request was sent.
        rejected: Number of records that the receiver says it did not accept.
        text: What the receiver says about them.

    """
    line = redacted_line(endpoint, text)
    if rejected > 0:
        return Outcome(Verdict.DELIVERED, f"{rejected} rejected by the receiver{_quoted(line)}", rejected=rejected)
    return Outcome(Verdict.DELIVERED, line)


def is_web_page(content_type: str, content: bytes, complete: bool) -> bool:
    """Whether what came with a success is a page for people, which no OTLP receiver sends.

    Args:
        content_type: In lower case, without parameters. Some frameworks say `text/html` of an answer without a body.
        content: The body.
        complete: Whether that is all of it.

    """
    start = content.lstrip(_BEFORE_A_PAGE)[:1]
    return start == b"<" or (content_type in _PAGE_TYPES and (start != b"" or not complete))


def page_title(content: bytes) -> str:
    """The title of a web page; where it has none, its text."""
    text = content.decode("utf-8", "replace")
    title = re.search(r"<title[^>]*>(.*?)</title", text, re.IGNORECASE | re.DOTALL)
    return title[1] if title else text


def another_may_do_better(status: int, outcome: Outcome) -> bool:
    """Whether the connection is to be dropped after an answer: what is behind another one may be another replica.

    Args:
        status: Of the answer.
        outcome: What it means.

    """
    return outcome.may_pass or status in (408, 429) or status >= 500


def connection_age(jitter: float) -> float:
    """Seconds until a connection is replaced, so that new addresses and replicas are found. `jitter`: in [0, 1)."""
    return MAX_CONNECTION_AGE_S * (0.5 + jitter / 2)


def partial_success(content: bytes) -> tuple[int, str]:
    """What a protobuf answer to a success says: the number of records not accepted, and why.

    The responses of the three signals have one layout, so one class reads them all. An answer that is none becomes a
    note, because the request did succeed.
    """
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse

    try:
        partial = ExportLogsServiceResponse.FromString(content).partial_success
    except DecodeError:
        return 0, malformed_note(content)
    return partial.rejected_log_records, partial.error_message


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


def malformed_note(content: bytes) -> str:
    """The note on a success whose body is not what OTLP says."""
    return f"delivered, with an answer that is not OTLP: {content[:4096].decode('utf-8', 'replace')}"


def redacted_line(endpoint: Endpoint, text: str) -> str:
    """A receiver's text as a message may show it: on one line, without credentials, of about `MAX_TEXT_CHARS`."""
    if not text:
        return ""
    for secret in endpoint.secrets:
        text = text.replace(secret, "***")
    printable = "".join(c if c.isprintable() else " " for c in text)
    return shorten(" ".join(printable.split()), MAX_TEXT_CHARS)


def _quoted(line: str) -> str:
    return f' ("{line}")' if line else ""


@contextmanager
def uninstrumented() -> Iterator[None]:
    """A context in which nothing that OpenTelemetry instruments makes spans.

    Only the current context is changed, and it is restored.
    """
    from opentelemetry import context
    from opentelemetry.context import _SUPPRESS_HTTP_INSTRUMENTATION_KEY, _SUPPRESS_INSTRUMENTATION_KEY

    suppressed = context.get_current()
    for key in (_SUPPRESS_INSTRUMENTATION_KEY, _SUPPRESS_HTTP_INSTRUMENTATION_KEY, "suppress_instrumentation"):
        suppressed = context.set_value(key, True, suppressed)
    token = context.attach(suppressed)
    try:
        yield
    finally:
        context.detach(token)
