"""The OTLP exporter: records as requests to a Collector, Prometheus, Tempo or whatever else speaks OTLP."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from stepspan.mapping.records import Attributes, Record, Signal
from stepspan.otlp.endpoint import destination_name, resolve_endpoints
from stepspan.otlp.outcome import Outcome, Transport, Verdict
from stepspan.otlp.transport import open_transport
from stepspan.processors import Processor

SWITCH = re.compile(r"OTEL_(TRACES|METRICS|LOGS)_EXPORTER")


class OtlpExporter:
    """Sends to `endpoint`, else to where the OTEL_EXPORTER_OTLP_* variables say.

    `protocol`: "http/protobuf", "grpc" or "http/json". `timeout`: seconds for a request. `processors`: of this exporter
    alone. `destination` names its cursors; by default a hash of the endpoints. Raises `ConfigError`.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        protocol: str | None = None,
        headers: Mapping[str, str] | None = None,
        compression: str | None = None,
        timeout: float | None = None,
        processors: Sequence[Processor] = (),
        destination: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.settings: dict[str, Any] = {
            "endpoint": endpoint,
            "protocol": protocol,
            "headers": None if headers is None else dict(headers),
            "compression": compression,
            "timeout": timeout,
        }
        env = os.environ if env is None else env
        self.endpoints = resolve_endpoints(env, **self.settings)
        self.processors = tuple(processors)
        self.signals: tuple[Signal, ...] = tuple(self.endpoints)
        everything = {name: value for name, value in env.items() if not SWITCH.fullmatch(name)}
        # Named by all signals, also those switched off: switching one must not start the others anew.
        self.destination = destination or destination_name(resolve_endpoints(everything, **self.settings))
        self._transports: dict[Signal, Transport] = {}

    def clone(self, timeout: float) -> OtlpExporter:
        """The same receiver over connections of its own, for another thread; a request takes at most `timeout` s."""
        other = copy(self)
        other.endpoints = {s: replace(e, timeout=min(e.timeout, timeout)) for s, e in self.endpoints.items()}
        other._transports = {}
        return other

    def export(self, signal: Signal, resource: Attributes, records: Sequence[Record]) -> Outcome:
        """One request."""
        if self.endpoints[signal].protocol == "http/json":
            from stepspan.otlp.json import encode
        else:
            from stepspan.otlp.protobuf import encode
        try:
            body = encode(signal, resource, records)
        except ValueError as error:  # a record of other instrumentation that is none
            return Outcome(Verdict.ISOLATE, f"no OTLP: {error}")
        return self._send(signal, body)

    def send_json(self, signal: Signal, request: bytes) -> Outcome:
        """One request that is OTLP JSON already, over this exporter's protocol. ISOLATE where it is none."""
        if self.endpoints[signal].protocol != "http/json":
            from stepspan.otlp.protobuf import from_json

            try:
                request = from_json(signal, request)
            except ValueError as error:
                return Outcome(Verdict.ISOLATE, f"no OTLP JSON: {error}")
        return self._send(signal, request)

    def _send(self, signal: Signal, body: bytes) -> Outcome:
        if signal not in self._transports:
            self._transports[signal] = open_transport(self.endpoints[signal])
        return self._transports[signal].send(body)

    def close(self) -> None:
        """Close the connections."""
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()
