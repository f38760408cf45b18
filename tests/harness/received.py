"""What arrived at a receiver, as plain values that a test can compare.

`decode` reads a request as strictly as the specification has it (JSON: hex ids, no bare NaN). A NaN from JSON becomes
the NaN that Go makes of it, so that equal points have equal bits whatever the protocol.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from google.protobuf import json_format
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from stepspan.mapping.records import Signal

REQUESTS: dict[Signal, Any] = {
    "metrics": ExportMetricsServiceRequest,
    "traces": ExportTraceServiceRequest,
    "logs": ExportLogsServiceRequest,
}
GO_NAN: float = struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000001))[0]


class Point(NamedTuple):
    """One data point. `value` is comparable: see `bits`."""

    job: Any
    rank: Any
    name: str
    attributes: tuple[tuple[str, Any], ...]
    time: int
    start: int
    value: Any

    @property
    def number(self) -> float:
        """The value of a gauge or sum."""
        if isinstance(self.value, tuple):
            return float(self.value[1])
        number: float = struct.unpack("<d", struct.pack("<Q", self.value))[0]
        return number


def bits(value: float) -> int:
    """A double's bits, by which values are compared: NaN equals itself, -0.0 is not 0.0."""
    number: int = struct.unpack("<Q", struct.pack("<d", value))[0]
    return number


def decode(signal: Signal, body: bytes, *, from_json: bool = False) -> Any:
    """An export request from its bytes. Raises ValueError for what a receiver would refuse."""
    try:
        if not from_json:
            return REQUESTS[signal].FromString(body)
        tree = json.loads(body, parse_constant=_refuse_constant)
        request = json_format.ParseDict(_ids_to_base64(tree), REQUESTS[signal]())
    except (DecodeError, json_format.ParseError) as error:
        raise ValueError(str(error)) from error
    if signal == "metrics":
        for _, _, point, _ in _each_point(request):
            if hasattr(point, "as_double") and math.isnan(point.as_double):
                point.as_double = GO_NAN
    return request


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _ids_to_base64(tree: Any) -> Any:
    """OTLP writes ids in hex, where protobuf's JSON has base64."""
    if isinstance(tree, list):
        return [_ids_to_base64(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: base64.b64encode(bytes.fromhex(value)).decode()
        if key in ("traceId", "spanId", "parentSpanId")
        else _ids_to_base64(value)
        for key, value in tree.items()
    }


def once(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each different item, in the order it came first."""
    return list({repr(item): item for item in items}.values())


def _value(any_value: Any) -> Any:
    kind = any_value.WhichOneof("value")
    if kind == "array_value":
        return tuple(_value(item) for item in any_value.array_value.values)
    if kind == "kvlist_value":
        return {pair.key: _value(pair.value) for pair in any_value.kvlist_value.values}
    return None if kind is None else getattr(any_value, kind)


def attributes(holder: Any) -> dict[str, Any]:
    """The attributes of a resource, point, span … as plain values."""
    return {pair.key: _value(pair.value) for pair in holder.attributes}


def is_health(request: Any) -> bool:
    """Whether a metrics request is a deliverer's own."""
    return any(attributes(r.resource).get("service.name") == "stepspan" for r in request.resource_metrics)


def _identity(resource: Any) -> tuple[Any, Any]:
    known = attributes(resource)
    return known.get("job_id"), known.get("rank")


def _each_point(request: Any) -> Iterator[tuple[Any, Any, Any, str]]:
    """(resource, metric, point, kind) of each data point."""
    for resource in request.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                kind = metric.WhichOneof("data")
                for point in getattr(metric, kind).data_points if kind else ():
                    yield resource.resource, metric, point, kind


def points(request: Any) -> Iterator[Point]:
    """The data points of a metrics request."""
    for resource, metric, point, kind in _each_point(request):
        labels = tuple(sorted(attributes(point).items()))
        value = _histogram_value(point) if "histogram" in kind else _number_value(point)
        start = point.start_time_unix_nano
        yield Point(*_identity(resource), metric.name, labels, point.time_unix_nano, start, value)


def _number_value(point: Any) -> Any:
    """A double's bits, ("int", n), or None for "no recorded value"."""
    if getattr(point, "flags", 0) & 1:
        return None
    return bits(point.as_double) if point.WhichOneof("value") == "as_double" else ("int", point.as_int)


def _histogram_value(point: Any) -> Any:
    if point.flags & 1:
        return None
    exemplars = tuple((e.time_unix_nano, _number_value(e), e.trace_id.hex(), e.span_id.hex()) for e in point.exemplars)
    head = (point.count, bits(point.sum), bits(point.min), bits(point.max))
    if hasattr(point, "explicit_bounds"):
        return (*head, tuple(point.explicit_bounds), tuple(point.bucket_counts), exemplars)
    positive = point.positive
    return (*head, point.scale, point.zero_count, positive.offset, tuple(positive.bucket_counts), exemplars)


def spans(request: Any) -> Iterator[dict[str, Any]]:
    """The spans of a traces request, with hex ids."""
    for resource in request.resource_spans:
        job, rank = _identity(resource.resource)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield {
                    "job": job,
                    "rank": rank,
                    "trace_id": span.trace_id.hex(),
                    "span_id": span.span_id.hex(),
                    "parent_id": span.parent_span_id.hex() or None,
                    "name": span.name,
                    "start": span.start_time_unix_nano,
                    "end": span.end_time_unix_nano,
                    "attributes": attributes(span),
                    "status": ("UNSET", "OK", "ERROR")[span.status.code],
                    "message": span.status.message,
                    "events": [(event.name, event.time_unix_nano, attributes(event)) for event in span.events],
                    "links": [(link.trace_id.hex(), link.span_id.hex(), attributes(link)) for link in span.links],
                }


def logs(request: Any) -> Iterator[dict[str, Any]]:
    """The records of a logs request, with hex ids."""
    for resource in request.resource_logs:
        job, rank = _identity(resource.resource)
        for scope in resource.scope_logs:
            for record in scope.log_records:
                yield {
                    "job": job,
                    "rank": rank,
                    "time": record.time_unix_nano,
                    "severity": record.severity_number,
                    "event_name": record.event_name,
                    "body": _value(record.body),
                    "attributes": attributes(record),
                    "trace_id": record.trace_id.hex() or None,
                    "span_id": record.span_id.hex() or None,
                }
