"""The transport for an endpoint's protocol. Each is imported when one is opened: gRPC costs 130 ms and 33 MB."""

from __future__ import annotations

from stepspan.otlp.endpoint import Endpoint
from stepspan.otlp.outcome import Outcome, Transport, Verdict


def open_transport(endpoint: Endpoint) -> Transport:
    """Make the transport for the endpoint's protocol. It connects on the first `send`."""
    if endpoint.fault:
        return HeldTransport(endpoint.fault)
    if endpoint.protocol == "grpc":
        from stepspan.otlp.grpc import GrpcTransport

        return GrpcTransport(endpoint)
    from stepspan.otlp.http import HttpTransport

    return HttpTransport(endpoint)


class HeldTransport:
    """Sends nothing, for a variable is wrong: whatever it is given is held.

    Args:
        fault: Which variable, and the fix.

    """

    def __init__(self, fault: str) -> None:
        self._fault = fault

    def send(self, _body: bytes) -> Outcome:
        """Hold the request."""
        return Outcome(Verdict.HOLD, self._fault)

    def close(self) -> None:
        """Nothing is open."""
