"""OTLP over gRPC: one unary call a request, with the bytes as they are.

The channel is opened by the first send and dropped when the connection fails, because a channel that has failed answers
from its own back-off for up to two minutes: when to try again is decided by delivery.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc

from stepspan.otlp import answers
from stepspan.otlp.answers import Phrase
from stepspan.otlp.endpoint import Endpoint
from stepspan.otlp.outcome import Outcome, Verdict

_METHODS = {
    "metrics": "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
    "traces": "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
    "logs": "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
}
_CONNECTION_FAILED = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"})
_UNAVAILABLE = frozenset({Verdict.RETRY})

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
    *answers.PHRASES,
)


class GrpcTransport:
    """Calls one endpoint's Export, on a channel that is kept.

    Args:
        endpoint: Where and how; of protocol "grpc".

    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._channel: grpc.Channel | None = None
        self._headers: Mapping[str, str] | None = None
        self._metadata: tuple[tuple[str, str | bytes], ...] = ()

    def send(self, body: bytes) -> Outcome:
        """Call Export once, with the request as its bytes are; gRPC compresses it if the endpoint says so."""
        with answers.uninstrumented():
            try:
                metadata = self._request_metadata(body)
                if self._channel is None:
                    self._channel = _open_channel(self._endpoint)
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
        code = error.code().name
        if code in _CONNECTION_FAILED:
            self.close()
        details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
        status = answers.status_details(details)  # with the seconds to wait by its RetryInfo
        return answers.failed_outcome(
            self._endpoint,
            code,
            answers.GRPC_ANSWERS.get(code, answers.UNKNOWN_ANSWER),
            error.details() or "",
            phrases=GRPC_PHRASES,
            retry_after=None if status is None else status[1],
        )


def _open_channel(endpoint: Endpoint) -> grpc.Channel:
    options = (
        ("grpc.primary_user_agent", answers.USER_AGENT),
        # Otherwise a new channel inherits the failed connection of the one that was dropped, and its back-off.
        ("grpc.use_local_subchannel_pool", 1),
    )
    compression = grpc.Compression.Gzip if endpoint.compression == "gzip" else grpc.Compression.NoCompression
    if endpoint.insecure:
        return grpc.insecure_channel(endpoint.url, options=options, compression=compression)
    provided = None if endpoint.credentials is None else endpoint.credentials.channel_credentials()
    credentials = provided or grpc.ssl_channel_credentials(
        root_certificates=_file_bytes(endpoint.certificate),
        # As with HTTP, one file may hold both.
        private_key=_file_bytes(endpoint.client_key or endpoint.client_certificate),
        certificate_chain=_file_bytes(endpoint.client_certificate),
    )
    return grpc.secure_channel(endpoint.url, credentials, options=options, compression=compression)


def _file_bytes(path: str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
