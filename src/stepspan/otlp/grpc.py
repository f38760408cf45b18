"""OTLP over gRPC: one unary call a request, with the bytes as they are.

The channel is opened by the first send and dropped when the connection fails, because a channel that has failed answers
from its own back-off for up to two minutes: when to try again is decided by delivery. It is dropped, too, where the
receiver is busy, for another one may lead to another replica, and by its age: a new one resolves the name again.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc

from stepspan.environment import unquoted
from stepspan.otlp import answers
from stepspan.otlp.answers import Answer, Phrase
from stepspan.otlp.endpoint import Endpoint
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.otlp.proxies import proxy_of_grpc

_METHODS = {
    "metrics": "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
    "traces": "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
    "logs": "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
}
_COMPRESSION = {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}
_SERVICE_CONFIG = '{"loadBalancingConfig": [{"pick_first": {"shuffleAddressList": true}}]}'
"""A name's addresses in any order: the first one may be the replica that fails."""
_HTTP_STATUS = re.compile(r"http2 header with status: (\d{3})")
"""How gRPC says that something in between answered with HTTP alone."""
_UNAVAILABLE = frozenset({Verdict.RETRY})
_UNKNOWN = frozenset({Verdict.RETRY_THEN_HOLD})

GRPC_PHRASES: tuple[Phrase, ...] = (
    # gRPC has one code, UNAVAILABLE, for all that keeps it from connecting. By the words of 1.50 to 1.85.
    Phrase("errors resolving", answers.NAME_FAULT, _UNAVAILABLE),
    Phrase("dns resolution failed", answers.NAME_FAULT, _UNAVAILABLE),
    Phrase("ssl_error_ssl", answers.TLS_FAULT, _UNAVAILABLE),
    Phrase("certificate_verify_failed", answers.TLS_FAULT, _UNAVAILABLE),
    Phrase("hostname verification", answers.TLS_FAULT, _UNAVAILABLE),
    Phrase("security handshaker", answers.TLS_FAULT, _UNAVAILABLE),
    Phrase("expected settings frame", answers.PROTOCOL_FAULT, _UNAVAILABLE),
    Phrase("http1.x server", answers.PROTOCOL_FAULT, _UNAVAILABLE),
    # A gRPC answer ends with a status: what lacks one is a web page, of which gRPC shows nothing.
    Phrase("data frame with end_stream flag", answers.WEB_PAGE, _UNKNOWN),
    Phrase("no status received", answers.WEB_PAGE, _UNKNOWN),
    Phrase("proxy returned response code 407", answers.PROXY_ANSWERS[407], _UNAVAILABLE),
    Phrase("proxy returned response code 4", answers.PROXY_REFUSES, _UNAVAILABLE),
    *answers.PHRASES,
)


class GrpcTransport:
    """Calls one endpoint's Export, on a channel that is kept.

    Args:
        endpoint: Where and how; of protocol "grpc".

    """

    def __init__(self, endpoint: Endpoint, *, jitter: Callable[[], float] = random.random) -> None:
        self._endpoint = endpoint
        self._jitter = jitter
        self._channel: grpc.Channel | None = None
        self._expires_at = 0.0
        self._headers: Mapping[str, str] | None = None
        self._metadata: tuple[tuple[str, str | bytes], ...] = ()
        self.proxy = proxy.display_url if (proxy := proxy_of_grpc(endpoint.url)) else ""
        """The URL of the proxy in between, as a message may show it; "" for none."""

    def send(self, body: bytes) -> Outcome:
        """Call Export once, with the request as its bytes are; gRPC compresses it if the endpoint says so."""
        if time.monotonic() >= self._expires_at:
            self.close()
        with answers.uninstrumented():
            try:
                metadata = self._request_metadata(body)
                if self._channel is None:
                    self._channel = _open_channel(self._endpoint, bool(self.proxy))
                    self._expires_at = time.monotonic() + answers.connection_age(self._jitter())
                export = self._channel.unary_unary(_METHODS[self._endpoint.signal], None, None)
                answer: bytes = export(body, timeout=self._endpoint.timeout, metadata=metadata)
            except OSError as error:  # a certificate file
                return answers.failed_outcome(self._endpoint, "", answers.TLS_FAULT, str(error))
            except grpc.RpcError as error:
                return self._error_outcome(error)
        return answers.delivered_outcome(self._endpoint, *answers.partial_success(answer))

    def close(self) -> None:
        """Close the channel. A later `send` opens a new one."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _request_metadata(self, body: bytes) -> tuple[tuple[str, str | bytes], ...]:
        headers = self._endpoint.request_headers(body)
        if headers is not self._headers:
            self._headers = headers
            self._metadata = tuple((n, value.encode() if n.endswith("-bin") else value) for n, value in headers.items())
        return self._metadata

    def _error_outcome(self, error: Any) -> Outcome:
        code, text = error.code().name, error.details() or ""
        details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
        status = answers.status_details(details)  # with the seconds to wait by its RetryInfo
        outcome = answers.failed_outcome(
            self._endpoint,
            code,
            _answer(code, text),
            text,
            phrases=GRPC_PHRASES,
            retry_after=None if status is None else status[1],
            proxy=self.proxy,
        )
        if outcome.may_pass or outcome.verdict in (Verdict.RETRY, Verdict.RETRY_THEN_HOLD):
            self.close()
        return outcome


def _answer(code: str, text: str) -> Answer:
    """The row of a code, or of the HTTP status behind an UNKNOWN."""
    if code == "UNKNOWN" and (found := _HTTP_STATUS.search(text)) is not None:
        return answers.answer_of_status(int(found[1]))
    return answers.GRPC_ANSWERS.get(code, answers.UNKNOWN_ANSWER)


def _open_channel(endpoint: Endpoint, through_proxy: bool) -> grpc.Channel:
    options = (
        ("grpc.primary_user_agent", answers.USER_AGENT),
        # Otherwise a new channel inherits the failed connection of the one that was dropped, and its back-off.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.service_config", _SERVICE_CONFIG),
        ("grpc.enable_http_proxy", int(through_proxy)),
    )
    compression = _COMPRESSION.get(endpoint.compression, grpc.Compression.NoCompression)
    if endpoint.insecure:
        return grpc.insecure_channel(endpoint.url, options=options, compression=compression)
    provided = None if endpoint.credentials is None else endpoint.credentials.channel_credentials()
    credentials = provided or grpc.ssl_channel_credentials(
        root_certificates=_file_bytes(endpoint.certificate) or _usual_authorities(),
        # As with HTTP, one file may hold both.
        private_key=_file_bytes(endpoint.client_key or endpoint.client_certificate),
        certificate_chain=_file_bytes(endpoint.client_certificate),
    )
    return grpc.secure_channel(endpoint.url, credentials, options=options, compression=compression)


def _usual_authorities() -> bytes | None:
    """What SSL_CERT_FILE names, beside the usual ones, as with HTTP; None: gRPC's own."""
    path = unquoted(os.environ.get("SSL_CERT_FILE", ""))
    if not path or not os.path.isfile(path):
        return None
    import certifi

    usual = os.environ.get("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH") or certifi.where()
    return Path(path).read_bytes() + b"\n" + Path(usual).read_bytes()


def _file_bytes(path: str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
