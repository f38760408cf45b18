"""The OTLP exporter: records as requests to a Collector, Prometheus, Tempo or whatever else speaks OTLP."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepspan.mapping.records import Attributes, Record, Signal
from stepspan.otlp.credentials import absolute_path
from stepspan.otlp.endpoint import read_variables, resolve_destination, route_digest, tenant_digest
from stepspan.otlp.outcome import Outcome, Transport, Verdict
from stepspan.otlp.record_variables import read_record_variables
from stepspan.otlp.request_sizes import RequestSizes
from stepspan.otlp.transport import open_transport
from stepspan.processors import Processor, build, specs


class OtlpExporter:
    """Sends records over OTLP, from the deliverer process.

    Args:
        endpoint: A general endpoint, such as `"http://localhost:4318"`; each signal has its path below it. None: where
            the OTEL_EXPORTER_OTLP_* variables say, and without them nowhere. Over the variables.
        protocol: "http/protobuf", "grpc" or "http/json". None: gRPC if the port is 4317, otherwise http/protobuf.
        headers: Further headers of every request. Credentials belong here or in OTEL_EXPORTER_OTLP_HEADERS. Or a
            function that gives them, called before each request: then delivery runs on threads of the process.
        headers_file: A file with further headers, `key=value` lines, which is read again when it changes, and when the
            receiver refuses what it has said before. None: STEPSPAN_HEADERS_FILE.
        compression: "none" or "gzip".
        timeout: Seconds for one request, 10 by default.
        temporality: "cumulative", "delta" or "lowmemory": what the receiver takes of sums and histograms. None:
            OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE, or cumulative.
        histogram_aggregation: "base2_exponential_bucket_histogram" or "explicit_bucket_histogram", of stepspan's own
            histograms. None: OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION, or exponential ones.
        processors: Run on the events of this exporter alone, after the journal.
        destination: A name for the receiver: letters, digits, "-" and "_". Cursors have it, so delivery goes on where
            it was, whatever address and credentials are. None: a hash of the endpoints and of the tenant.
        env: The environment to read, or what `stepspan.otlp.endpoint.read_variables` made of it; None: `os.environ`.

    Attributes:
        endpoints: Signal -> the `Endpoint` it goes to. Signals that are switched off or go nowhere are not in it.
        signals: The signals it takes: those of `endpoints`.
        faults: Which variable is wrong, and how -> the signals that are held for it.
        mapping_options: What arguments and variables say of the records that are sent.
        ignored: What of the variables says nothing and counts as unset.
        warnings: What of the variables may not mean what it says.
        address: The name that the destination has where none is given.
        is_named: Whether one is.
        digest: `route_digest`, in a deliverer.
        is_portable: Whether another process can send in its place.
        settings: The arguments from which a deliverer process makes the same exporter again.

    Raises:
        ConfigError: An argument is wrong; says which, and what to write. A wrong variable holds its signals (`faults`).

    Example:
        `OtlpExporter("https://otlp.example.com", headers={"authorization": "Bearer …"}, processors=[Drop(["grad/*"])])`

    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        protocol: str | None = None,
        headers: Mapping[str, str] | Callable[[], Mapping[str, str]] | None = None,
        headers_file: str | Path | None = None,
        compression: str | None = None,
        timeout: float | None = None,
        temporality: str | None = None,
        histogram_aggregation: str | None = None,
        processors: Sequence[Processor] = (),
        destination: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.settings: dict[str, Any] = {
            "endpoint": endpoint,
            "protocol": protocol,
            "headers": headers if headers is None or callable(headers) else dict(headers),
            "headers_file": None if headers_file is None else absolute_path(headers_file),
            "compression": compression,
            "timeout": timeout,
            "temporality": temporality,
            "histogram_aggregation": histogram_aggregation,
        }
        variables = read_variables(os.environ if env is None else env)
        resolved = resolve_destination(variables, **self.settings)
        options, ignored = read_record_variables(variables)
        self.endpoints = resolved.endpoints
        if "metrics" in self.endpoints:
            metrics = self.endpoints["metrics"]
            aggregation = metrics.histogram_aggregation
            options = replace(options, temporality=metrics.temporality, histogram_aggregation=aggregation)
        self.mapping_options = options
        self.processors = tuple(processors)
        self.signals: tuple[Signal, ...] = tuple(self.endpoints)
        self.faults: dict[str, list[Signal]] = {}
        for signal, each in self.endpoints.items():
            if each.fault:
                self.faults.setdefault(each.fault, []).append(signal)
        self.ignored, self.warnings = (*resolved.ignored, *ignored), resolved.warnings
        self.address, self.is_named = resolved.name, destination not in (None, "", resolved.name)
        self.destination = destination or resolved.name
        self.digest = ""
        self._configured = resolved.configured
        self._transports: dict[Signal, Transport] = {}
        self._sizes = {signal: RequestSizes() for signal in self.signals}

    def name(self, destination: str) -> None:
        """Name the receiver, where it has no name yet.

        Args:
            destination: As the argument of this name.

        """
        self.destination, self.is_named = destination, True

    def clone(self, timeout: float) -> OtlpExporter:
        """The same receiver over connections of its own, for another thread.

        Args:
            timeout: Seconds that a request may take at most.

        """
        other = copy(self)
        other.endpoints = {
            s: replace(e, timeout=min(e.timeout, timeout), credentials=copy(e.credentials))
            for s, e in self.endpoints.items()
        }
        other._transports = {}
        other._sizes = {signal: RequestSizes() for signal in self.signals}
        return other

    @property
    def is_portable(self) -> bool:
        """Whether a deliverer process can make the same exporter."""
        credentials = [endpoint.credentials for endpoint in self.endpoints.values()]
        return not callable(self.settings["headers"]) and all(each is None or each.is_portable for each in credentials)

    def route_digest(self, salt: bytes, *, with_address: bool) -> str:
        """How the receiver is reached, and what of all there is it gets: "" where there is nothing to tell apart.

        Args:
            salt: Random bytes of the journals' directory.
            with_address: Whether the address counts, too: where it is no part of the destination's name.

        """
        options = self.mapping_options.key()
        if off := sorted(self._configured.keys() - self.endpoints.keys()):
            options["off"] = off
        return route_digest(self._configured, salt, with_address=with_address, options=options)

    def tenant_digest(self, salt: bytes) -> str:
        """Whose data it is: as of `stepspan.otlp.endpoint.tenant_digest`.

        Args:
            salt: Random bytes of the journals' directory.

        """
        return tenant_digest(self._configured, salt)

    def has_new_credentials(self, signal: Signal) -> bool:
        """Whether a request would go out with other headers now than the last one did.

        Args:
            signal: One of `signals`.

        """
        credentials = self.endpoints[signal].credentials
        return credentials is not None and credentials.have_changed()

    def prepare(self, signal: Signal) -> None:
        """Import what sends a signal, which may take longer than the first request; nothing is sent.

        Args:
            signal: One of `signals`.

        """
        self._transport(signal)
        self._encoding(signal)

    def export(self, signal: Signal, resource: Attributes, records: Sequence[Record]) -> Outcome:
        """Send one request, once.

        Args:
            signal: One of `signals`.
            resource: The attributes of the session's Resource.
            records: Records of this signal, of one session, in time order.

        Returns:
            What became of it. ISOLATE where a record of other instrumentation is not OTLP.

        """
        try:
            part = self.encode(signal, resource, records)
        except ValueError as error:
            return Outcome(Verdict.ISOLATE, f"not OTLP: {error}")
        return self._send(signal, part, can_be_cut=len(records) > 1)

    def encode(self, signal: Signal, resource: Attributes, records: Sequence[Record]) -> bytes:
        """One session's part of a request, which is a whole request as well.

        Args:
            signal: One of `signals`.
            resource: The attributes of the session's Resource.
            records: Records of this signal, of one session, in time order.

        Returns:
            An Export*ServiceRequest in the endpoint's encoding, not compressed.

        Raises:
            ValueError: A record of other instrumentation is not OTLP.

        """
        encoded: bytes = self._encoding(signal).encode(signal, resource, records)
        return encoded

    def export_encoded(self, signal: Signal, parts: Sequence[bytes]) -> Outcome:
        """Send parts as one request, once.

        Args:
            signal: One of `signals`.
            parts: At least one, from `encode`.

        Returns:
            What became of all of them together.

        """
        return self._send(signal, self._encoding(signal).join(signal, parts), can_be_cut=len(parts) > 1)

    def send_json(self, signal: Signal, request: bytes) -> Outcome:
        """Send one request that is OTLP JSON already, over this exporter's protocol.

        Args:
            signal: One of `signals`.
            request: The body of an Export*ServiceRequest in OTLP JSON, such as a dead letter.

        Returns:
            What became of it. ISOLATE where `request` is not OTLP JSON.

        """
        if self.endpoints[signal].protocol != "http/json":
            from stepspan.otlp.sdk_records import request_from_json

            try:
                request = request_from_json(signal, request)
            except ValueError as error:
                return Outcome(Verdict.ISOLATE, f"not OTLP JSON: {error}")
        return self._send(signal, request)

    def _encoding(self, signal: Signal) -> Any:
        """The module that writes a signal's requests."""
        if self.endpoints[signal].protocol == "http/json":
            from stepspan.otlp import json

            return json
        from stepspan.otlp import protobuf

        return protobuf

    def _send(self, signal: Signal, body: bytes, *, can_be_cut: bool = False) -> Outcome:
        sizes = self._sizes[signal]
        outcome = sizes.check(len(body)) if can_be_cut else None
        if outcome is None:
            outcome = self._transport(signal).send(body)
            sizes.learn(len(body), outcome, can_be_cut=can_be_cut)
        return outcome

    def _transport(self, signal: Signal) -> Transport:
        if signal not in self._transports:
            self._transports[signal] = open_transport(self.endpoints[signal])
        return self._transports[signal]

    def close(self) -> None:
        """Close the connections. A later `export` opens new ones."""
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()


def otlp_exporters(
    env: Mapping[str, str],
    *,
    endpoint: str | None,
    protocol: str | None,
    destination: str | None = None,
    headers_file: str | Path | None = None,
    further: Sequence[Mapping[str, Any]] = (),
) -> list[OtlpExporter]:
    """The OTLP exporters that settings and standard variables name. Each variable is looked up once.

    Args:
        env: The environment.
        endpoint: The setting of this name; None: by the variables.
        protocol: The setting of this name.
        destination: The setting of this name.
        headers_file: The setting of this name.
        further: The entries of the setting `exporters`: arguments of `OtlpExporter`, with processors as
            `stepspan.processors.build` takes them. One that repeats another exporter is left out.

    Returns:
        Those that send anything. Empty: no network at all.

    Raises:
        ConfigError: A setting is wrong.

    """
    variables = read_variables(env)
    exporters = [
        OtlpExporter(endpoint, protocol=protocol, destination=destination, headers_file=headers_file, env=variables)
    ]
    for entry in further:
        exporter = OtlpExporter(**{**entry, "processors": build(entry["processors"])}, env=variables)
        if not any(_does_the_same(exporter, other) for other in exporters):
            exporters.append(exporter)
    return [exporter for exporter in exporters if exporter.signals]


def _does_the_same(one: OtlpExporter, other: OtlpExporter) -> bool:
    return one.endpoints == other.endpoints and specs(one.processors) == specs(other.processors)
