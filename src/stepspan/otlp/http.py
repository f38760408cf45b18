"""OTLP over HTTP: one POST a request, protobuf or JSON, on a connection that is kept.

A redirect is an answer, never followed; a `.netrc` is not read. Proxies are the environment's (`proxies`), and so is
whom to trust (REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE, SSL_CERT_FILE). At most 64 KiB of an answer are read.

The connection is dropped where another one may do better: after an answer that says "not now", which may be one of
several replicas', after any fault, and by its age, so that a name's new address is found. It is opened anew and the
request sent again where a kept one turns out to have been closed meanwhile.
"""

from __future__ import annotations

import gzip
import math
import os
import random
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlsplit

import orjson

from stepspan.environment import unquoted
from stepspan.otlp import answers
from stepspan.otlp.answers import Answer
from stepspan.otlp.connection import (
    Connection,
    ConnectionLost,
    Origin,
    ProxyNameError,
    ProxyRefusal,
    Reply,
    TlsFiles,
    connect,
)
from stepspan.otlp.endpoint import Endpoint
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.otlp.proxies import Proxy, proxy_of_url
from stepspan.values import to_float

_CONTENT_TYPES = {"http/protobuf": "application/x-protobuf", "http/json": "application/json"}
_REJECTED = {"metrics": "rejectedDataPoints", "traces": "rejectedSpans", "logs": "rejectedLogRecords"}
_GZIP_LEVEL = 1  # 5.5 µs a step against 13.7 at level 6, for a few percent of size
_COMPRESSORS: Mapping[str, Callable[[bytes], bytes]] = {
    "gzip": lambda body: gzip.compress(body, _GZIP_LEVEL, mtime=0),
    "deflate": lambda body: zlib.compress(body, _GZIP_LEVEL),  # as HTTP calls zlib's format
}
_OWN_HEADERS = frozenset({"content-length", "content-type", "content-encoding", "host", "transfer-encoding"})
"""What the request itself decides, or stands elsewhere in it."""
_DEFAULT_PORTS = {"http": 80, "https": 443}
_IN_PATHS = "!#$%&'()*+,/:;=?@[]~"
"""What stays as it is in a URL's path and query."""

FAULTS: tuple[tuple[type[BaseException], Answer], ...] = (
    (ProxyNameError, answers.PROXY_NAME_FAULT),
    (socket.gaierror, answers.NAME_FAULT),
    (ssl.SSLError, answers.TLS_FAULT),
    (ConnectionLost, Answer(Verdict.RETRY, "{url} closed the connection")),
    (TimeoutError, Answer(Verdict.RETRY, "no answer from {url} in time")),
    (OSError, Answer(Verdict.RETRY, "no connection to {url}")),
    (HTTPException, answers.PROTOCOL_FAULT),
    (
        ValueError,
        Answer(Verdict.HOLD, "no request can be sent to {url}: check OTEL_EXPORTER_OTLP_ENDPOINT and the proxy's URL"),
    ),
)
"""Why there is no answer, by the first type that fits."""


class HttpTransport:
    """Posts to one endpoint, on a connection that is kept.

    Args:
        endpoint: Where and how; of protocol "http/protobuf" or "http/json".
        jitter: A random number in [0, 1), for a connection's age.

    """

    def __init__(self, endpoint: Endpoint, *, jitter: Callable[[], float] = random.random) -> None:
        self._endpoint = endpoint
        self._jitter = jitter
        self._connection: Connection | None = None
        self._expires_at = 0.0
        self._given: Mapping[str, str] | None = None
        """The endpoint's headers as of the last request."""
        self._headers = b""
        self._avoided: Any = None
        """The address where something failed last."""
        parts = urlsplit(endpoint.url)
        default_port = _DEFAULT_PORTS[parts.scheme]
        host, self._host = parts.hostname or "", parts.netloc.removesuffix(f":{default_port}")
        self._path = quote(f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}", safe=_IN_PATHS)
        self._files = TlsFiles(
            endpoint.certificate or _variable("REQUESTS_CA_BUNDLE") or _variable("CURL_CA_BUNDLE"),
            endpoint.client_certificate or "",
            endpoint.client_key or "",
        )
        self._proxy: Proxy | None = None
        self._url_error: ValueError | None = None
        try:  # the environment is read once: for each request that was a third of the time of sending
            self._proxy = proxy_of_url(endpoint.url)
            host, self._host = _ascii(host), _ascii(self._host)
        except ValueError as error:
            self._url_error = error
        self._origin = Origin(parts.scheme, host, parts.port or default_port)

    @property
    def proxy(self) -> str:
        """The URL of the proxy in between, as a message may show it; "" for none."""
        return self._proxy.display_url if self._proxy else ""

    def send(self, body: bytes) -> Outcome:
        """Post the request, compressed if the endpoint says so."""
        endpoint = self._endpoint
        compress = _COMPRESSORS.get(endpoint.compression)
        data = compress(body) if compress else body
        try:
            reply = self._exchange(self._head(data) + data, time.monotonic() + endpoint.timeout)
        except ProxyRefusal as refusal:
            self.close()
            answer = answers.PROXY_ANSWERS.get(refusal.status, answers.PROXY_REFUSES)
            return self._failed(str(refusal.status), answer, refusal.reason, phrases=())
        except (OSError, HTTPException, ValueError) as error:
            self._drop()
            answer = next(answer for kind, answer in FAULTS if isinstance(error, kind))
            return self._failed("", answer, str(error) or type(error).__name__, phrases=())
        outcome = self._outcome(reply)
        if answers.another_may_do_better(reply.status, outcome):
            self._drop()
        return outcome

    def close(self) -> None:
        """Close the connection. A later `send` opens a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _drop(self) -> None:
        """Close the connection, and go to another address first where there is one."""
        if self._connection is not None:
            self._avoided = self._connection.address
        self.close()

    def _exchange(self, request: bytes, deadline: float) -> Reply:
        if self._connection is not None:
            if time.monotonic() < self._expires_at and self._connection.is_usable():
                with suppress(ConnectionLost):  # closed by the receiver, just as we wrote
                    return self._connection.exchange(request, deadline)
            self.close()
        if self._url_error is not None:
            raise self._url_error
        self._connection = connect(self._origin, self._proxy, self._files, deadline, self._avoided)
        self._expires_at = time.monotonic() + answers.connection_age(self._jitter())
        return self._connection.exchange(request, deadline)

    def _head(self, data: bytes) -> bytes:
        """What goes before a request's body: the request line and the headers, the endpoint's own among them."""
        given = self._endpoint.request_headers(data)
        if given is not self._given:
            self._given, self._headers = given, self._encoded_headers(given)
        return b"%bcontent-length: %d\r\n\r\n" % (self._headers, len(data))

    def _encoded_headers(self, given: Mapping[str, str]) -> bytes:
        endpoint, proxy, path = self._endpoint, self._proxy, self._path
        headers = {"user-agent": answers.USER_AGENT, "accept": "*/*", "accept-encoding": "identity"}
        headers |= {name: value for name, value in given.items() if name not in _OWN_HEADERS}
        headers["content-type"] = _CONTENT_TYPES[endpoint.protocol]
        if endpoint.compression != "none":
            headers["content-encoding"] = endpoint.compression
        if proxy is not None and self._origin.scheme == "http" and proxy.scheme in ("http", "https"):
            path = f"http://{self._host}{path}"
            if proxy.authorization:
                headers["proxy-authorization"] = proxy.authorization
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        return f"POST {path} HTTP/1.1\r\nhost: {given.get('host', self._host)}\r\n{lines}".encode("latin-1")

    def _outcome(self, reply: Reply) -> Outcome:
        endpoint, code, kind = self._endpoint, reply.status, _content_type(reply)
        content = reply.content if reply.complete else b""  # its status was given, and that is what counts
        if 200 <= code < 300:
            if answers.is_web_page(kind, reply.content, reply.complete):
                return self._failed(str(code), answers.WEB_PAGE, answers.page_title(reply.content), phrases=())
            return answers.delivered_outcome(endpoint, *_partial_success(endpoint, kind, content))
        return self._failed(
            str(code),
            answers.answer_of_status(code),
            _error_text(kind, content),
            retry_after=retry_after(reply.headers.get("retry-after"), time.time()),
            location=(reply.headers.get("location") or "").partition("?")[0],
        )

    def _failed(self, status: str, answer: Answer, text: str, **more: Any) -> Outcome:
        return answers.failed_outcome(self._endpoint, status, answer, text, proxy=self.proxy, **more)


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


def _ascii(host: str) -> str:
    """A host's name as the network has it. ValueError: it has none."""
    return host if host.isascii() else host.encode("idna").decode()


def _content_type(reply: Reply) -> str:
    return (reply.headers.get("content-type") or "").partition(";")[0].strip().lower()


def _partial_success(endpoint: Endpoint, kind: str, content: bytes) -> tuple[int, str]:
    """What a success says: the number of records not accepted, and why. Not all answer in what they were asked in."""
    if not content.strip():
        return 0, ""
    if (kind if kind in _CONTENT_TYPES.values() else _CONTENT_TYPES[endpoint.protocol]) != _CONTENT_TYPES["http/json"]:
        return answers.partial_success(content)
    try:
        partial = orjson.loads(content).get("partialSuccess") or {}
        return int(partial.get(_REJECTED[endpoint.signal]) or 0), str(partial.get("errorMessage") or "")
    except (AttributeError, TypeError, ValueError):
        return 0, answers.malformed_note(content)


def _error_text(kind: str, content: bytes) -> str:
    """What a failure says: OTLP puts a google.rpc.Status there, many receivers plain text."""
    if kind == _CONTENT_TYPES["http/json"]:
        with suppress(KeyError, TypeError, ValueError):
            return str(orjson.loads(content)["message"])
    if kind == _CONTENT_TYPES["http/protobuf"] and (status := answers.status_details(content)) is not None:
        return status[0]
    return answers.page_title(content)


def _variable(name: str) -> str:
    return unquoted(os.environ.get(name, ""))
