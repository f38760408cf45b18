"""The transport for an endpoint's protocol. Each is imported when one is opened: gRPC costs 130 ms and 33 MB."""

from __future__ import annotations

from stepspan.otlp.credentials import Credentials, CredentialsError
from stepspan.otlp.endpoint import Endpoint
from stepspan.otlp.outcome import Outcome, Transport, Verdict


def open_transport(endpoint: Endpoint) -> Transport:
    """Make the transport for the endpoint's protocol. It connects on the first `send`."""
    if endpoint.fault:
        return HeldTransport(endpoint.fault)
    transport: Transport
    if endpoint.protocol == "grpc":
        from stepspan.otlp.grpc import GrpcTransport

        transport = GrpcTransport(endpoint)
    else:
        from stepspan.otlp.http import HttpTransport

        transport = HttpTransport(endpoint)
    return transport if endpoint.credentials is None else RenewingTransport(transport, endpoint.credentials)


class HeldTransport:
    """Sends nothing, for a variable is wrong: whatever it is given is held.

    Args:
        fault: Which variable, and the fix.

    """

    proxy = ""

    def __init__(self, fault: str) -> None:
        self._fault = fault

    def send(self, _body: bytes) -> Outcome:
        """Hold the request."""
        return Outcome(Verdict.HOLD, self._fault)

    def close(self) -> None:
        """Do nothing: a transport that only holds has no connection."""


class RenewingTransport:
    """Sends a request once more where its credentials were refused and there are others by now.

    Args:
        transport: Sends.
        credentials: Of its endpoint.

    """

    def __init__(self, transport: Transport, credentials: Credentials) -> None:
        self._transport, self._credentials = transport, credentials

    @property
    def proxy(self) -> str:
        """As the transport's."""
        return self._transport.proxy

    def send(self, body: bytes) -> Outcome:
        """Send the request, twice at most."""
        try:
            outcome = self._transport.send(body)
            if outcome.denied and self._credentials.renew():
                outcome = self._transport.send(body)
        except CredentialsError as error:
            return Outcome(Verdict.HOLD, str(error), denied=True)
        if outcome.denied:
            return outcome._replace(message=f"{outcome.message}; sent with {self._credentials.names}")
        return outcome

    def close(self) -> None:
        """Close the connections. A later `send` opens new ones."""
        self._transport.close()
