"""What an OpenTelemetry SDK handed over, as records: a span, a log record, or each data point of a metric.

They keep their own ids, times and scopes. The resource is the session's. For receivers of deltas cumulative points
become such; points that were handed over as deltas are so for every receiver.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from stepspan.events import Event
from stepspan.mapping.records import METRIC_DATA, SdkRecord, SdkScope, Signal
from stepspan.mapping.temporality import SdkDeltas

DELTA_TEMPORALITY = 1
MAX_SCOPES = 10_000
"""Scopes that are remembered, so that records share them."""


class SdkRecords:
    """The records of one signal's `otel` events. Raises one of `dispatch.MALFORMED` for what is no OTLP JSON.

    `deltas`: makes cumulative points deltas; None: they stay as they are.
    """

    def __init__(self, signal: Signal, deltas: SdkDeltas | None = None) -> None:
        self._signal = signal
        self._deltas = deltas
        self._scopes: dict[bytes, SdkScope] = {}

    def of(self, event: Event) -> list[SdkRecord]:
        """The records of one event.

        Args:
            event: An `otel` event.

        Returns:
            A span, a log record, or the data points of a metric, as they were handed over; none of another signal.

        """
        if event["signal"] != self._signal:
            return []
        record: Mapping[str, Any] = event["record"]
        if self._signal == "metrics":
            return self._points(event, record)
        if self._signal == "traces":
            time = record["endTimeUnixNano"]
        else:
            time = record.get("timeUnixNano") or record["observedTimeUnixNano"]
        return [SdkRecord(self._scope(event, None), int(time), record)]

    def _points(self, event: Event, metric: Mapping[str, Any]) -> list[SdkRecord]:
        (kind,) = metric.keys() & METRIC_DATA
        rest = {name: value for name, value in metric[kind].items() if name != "dataPoints"}
        points = metric[kind]["dataPoints"]
        if self._deltas is not None and self._deltas.takes(kind, rest):
            about = {name: value for name, value in metric.items() if name in ("name", "unit")}
            source = orjson.dumps([event["scope"], event.get("schema_url", ""), kind, about])
            points = self._deltas.convert(kind, source, points)
            rest["aggregationTemporality"] = DELTA_TEMPORALITY
        shared = self._scope(event, {**metric, kind: rest})
        return [SdkRecord(shared, int(point["timeUnixNano"]), point) for point in points]

    def _scope(self, event: Event, metric: Mapping[str, Any] | None) -> SdkScope:
        scope, schema_url = dict(event["scope"]), event.get("schema_url", "")
        key = orjson.dumps([scope, schema_url, metric])
        found = self._scopes.get(key)
        if found is None:
            if len(self._scopes) >= MAX_SCOPES:
                self._scopes.clear()
            found = self._scopes[key] = SdkScope(scope, schema_url, metric)
        return found
