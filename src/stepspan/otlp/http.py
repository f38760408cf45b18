"""OTLP over HTTP: one POST a request, protobuf or JSON, through `requests`.

Proxies, and the certificates of `REQUESTS_CA_BUNDLE`, are taken from the environment as the official exporter does; a
`.netrc` is not, for its password would replace the authorization header that was set. A redirect is an answer, never
followed. At most 64 KiB of an answer are read.
"""

from __future__ import annotations

import gzip
import http.client
import math
import os
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime

import orjson
import requests
import urllib3

from stepspan.otlp import answers
from stepspan.otlp.answers import Answer
from stepspan.otlp.endpoint import Endpoint
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.values import to_float

_CONTENT_TYPES = {"http/protobuf": "application/x-protobuf", "http/json": "application/json"}
_OWN_HEADERS = frozenset({"content-type", "content-encoding"})
"""What the encoding of a request decides."""
_REJECTED = {"metrics": "rejectedDataPoints", "traces": "rejectedSpans", "logs": "rejectedLogRecords"}
MAX_ANSWER_BYTES = 64 * 1024
_GZIP_LEVEL = 1  # 5.5 µs a step against 13.7 at level 6, for a few percent of size

FAULTS: tuple[tuple[type[BaseException], Answer], ...] = (
    (requests.exceptions.SSLError, answers.TLS_FAULT),
    (ssl.SSLError, answers.TLS_FAULT),
    (socket.gaierror, answers.NAME_FAULT),
    (http.client.RemoteDisconnected, Answer(Verdict.RETRY, "{url} closed the connection")),
    (http.client.BadStatusLine, answers.PROTOCOL_FAULT),
    (requests.exceptions.Timeout, Answer(Verdict.RETRY, "no answer from {url} in time")),
    (
        ValueError,
        Answer(Verdict.HOLD, "no request can be sent to {url}: check OTEL_EXPORTER_OTLP_ENDPOINT and the proxy's URL"),
    ),
    (requests.exceptions.RequestException, Answer(Verdict.RETRY, "no connection to {url}")),
    (urllib3.exceptions.HTTPError, Answer(Verdict.RETRY, "no connection to {url}")),
    (OSError, answers.TLS_FAULT),  # requests' error for a certificate file that is not there
)
"""Why there is no answer, by the first type that is in the chain of errors."""


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """None: requests would read the body and check the target even with allow_redirects=False."""
        return None


class HttpTransport:
    """Posts to one endpoint, on a connection that is kept.

    Args:
        endpoint: Where and how; of protocol "http/protobuf" or "http/json".

    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._session = _Session()
        self._session.stream = True  # `_content` reads the body, and not more of it than it must
        # The environment is read once: for each request that was a third of the time of sending. And no .netrc.
        self._session.trust_env = False
        self._session.proxies = requests.utils.get_environ_proxies(endpoint.url)
        bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
        self._session.verify = endpoint.certificate or bundle or True
        self._session.cert = endpoint.client_certificate
        if endpoint.client_certificate and endpoint.client_key:
            self._session.cert = endpoint.client_certificate, endpoint.client_key
        self._session.headers["user-agent"] = answers.USER_AGENT
        self._session.headers["content-type"] = _CONTENT_TYPES[endpoint.protocol]
        if endpoint.compression == "gzip":
            self._session.headers["content-encoding"] = "gzip"

    def send(self, body: bytes) -> Outcome:
        """Post the request once, compressed if the endpoint says so."""
        endpoint = self._endpoint
        data = gzip.compress(body, _GZIP_LEVEL, mtime=0) if endpoint.compression == "gzip" else body
        given = endpoint.request_headers(data)
        headers = {name: value for name, value in given.items() if name not in _OWN_HEADERS}
        with answers.uninstrumented():
            try:
                response = self._session.post(
                    endpoint.url, data, headers=headers, timeout=endpoint.timeout, allow_redirects=False
                )
            except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
                return _fault_outcome(endpoint, error)
            with response:
                content = _content(response, endpoint.timeout)
        return self._outcome(response, content)

    def close(self) -> None:
        """Close the connections. A later `send` opens new ones."""
        self._session.close()

    def _outcome(self, response: requests.Response, content: bytes) -> Outcome:
        endpoint, code = self._endpoint, response.status_code
        if 200 <= code < 300:
            return answers.delivered_outcome(endpoint, *_partial_success(endpoint, content))
        return answers.failed_outcome(
            endpoint,
            str(code),
            answers.HTTP_REDIRECT if 300 <= code < 400 else answers.HTTP_ANSWERS.get(code, answers.UNKNOWN_ANSWER),
            _error_text(response, content),
            retry_after=retry_after(response.headers.get("retry-after"), time.time()),
            location=response.headers.get("location", "").partition("?")[0],
        )


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds to wait by a Retry-After header, which holds seconds or a date; None if it holds neither.

    Args:
        value: The header.
        now: Unix time in seconds.

    """
    seconds = to_float(value)
    if value is not None and seconds is None:
        with suppress(TypeError, ValueError, OverflowError):
            seconds = parsedate_to_datetime(value).timestamp() - now
    return None if seconds is None or not math.isfinite(seconds) else max(seconds, 0.0)


def _content(response: requests.Response, timeout: float) -> bytes:
    """The answer's body, b"" if it breaks off or takes over `timeout` s: its status was given, and that is what counts.

    The socket's own timeout starts anew with each byte that arrives, so it does not bound the whole.
    """
    content, deadline = b"", time.monotonic() + timeout
    read = getattr(response.raw, "read1", response.raw.read)  # which an older urllib3 lacks
    try:
        while len(content) < MAX_ANSWER_BYTES:
            piece = read(MAX_ANSWER_BYTES - len(content), decode_content=True)
            if not piece:
                break
            if time.monotonic() > deadline:
                return b""
            content += piece
    except (OSError, urllib3.exceptions.HTTPError):
        return b""
    return content


def _partial_success(endpoint: Endpoint, content: bytes) -> tuple[int, str]:
    if not content.strip():
        return 0, ""
    if endpoint.protocol == "http/protobuf":
        return answers.partial_success(content)
    try:
        partial = orjson.loads(content).get("partialSuccess") or {}
        return int(partial.get(_REJECTED[endpoint.signal]) or 0), str(partial.get("errorMessage") or "")
    except (AttributeError, TypeError, ValueError):
        return 0, answers.malformed_note(content)


def _error_text(response: requests.Response, content: bytes) -> str:
    """What a failure says: OTLP puts a google.rpc.Status there, many receivers plain text."""
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _CONTENT_TYPES["http/json"]:
        with suppress(KeyError, TypeError, ValueError):
            return str(orjson.loads(content)["message"])
    if kind == _CONTENT_TYPES["http/protobuf"] and (status := answers.status_details(content)) is not None:
        return status[0]
    return content.decode("utf-8", "replace")


def _fault_outcome(endpoint: Endpoint, error: BaseException) -> Outcome:
    """The outcome of a request that got no answer."""
    chain = list(_error_chain(error))
    answer = next(answer for kind, answer in FAULTS if any(isinstance(link, kind) for link in chain))
    return answers.failed_outcome(endpoint, "", answer, str(chain[-1]) or type(chain[-1]).__name__, phrases=())


def _error_chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it wraps, outermost first: requests wraps urllib3's, which wraps the socket's."""
    link: BaseException | None = error
    while link is not None:
        yield link
        wrapped = [*link.args, getattr(link, "reason", None), link.__cause__]
        link = next((inner for inner in wrapped if isinstance(inner, BaseException)), None)
