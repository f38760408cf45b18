"""The transport for an endpoint's protocol. Each is imported when one is opened: gRPC costs 130 ms and 33 MB."""

from __future__ import annotations

from stepspan.otlp.endpoint import Endpoint
from stepspan.otlp.outcome import Transport


def open_transport(endpoint: Endpoint) -> Transport:
    """Make the transport for the endpoint's protocol. It connects on the first `send`."""
    if endpoint.protocol == "grpc":
        from stepspan.otlp.grpc import GrpcTransport

        return GrpcTransport(endpoint)
    from stepspan.otlp.http import HttpTransport

    return HttpTransport(endpoint)
