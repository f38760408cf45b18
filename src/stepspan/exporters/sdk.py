"""Any exporter of the OpenTelemetry SDK as an exporter of stepspan.

Runs on a thread of the training process, because an object can't be handed to another one. The SDK's exporters say of a
request that it succeeded or not, and no more. So a failure is retried, and what keeps failing while other records
succeed is halved until the bad record stands alone (`stepspan.deliver.isolation`). `OtlpExporter` learns that from the
answer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stepspan.errors import ConfigError
from stepspan.mapping.options import MappingOptions
from stepspan.mapping.records import Attributes, Record, Signal
from stepspan.otlp.answers import uninstrumented
from stepspan.otlp.endpoint import read_variables
from stepspan.otlp.outcome import Outcome, Verdict
from stepspan.otlp.record_variables import read_record_variables
from stepspan.processors import Processor

if TYPE_CHECKING:
    from opentelemetry.sdk._logs.export import LogRecordExporter
    from opentelemetry.sdk.metrics.export import MetricExporter
    from opentelemetry.sdk.trace.export import SpanExporter


class SdkExporter:
    """Exports through exporters of the OpenTelemetry SDK, one for each signal that is wanted.

    Args:
        span: Takes the traces.
        metric: Takes the metrics. Points that say "no recorded value" do not reach it: the SDK has no room for them.
        log: Takes the logs.
        processors: Run on the events of this exporter alone, after the journal.
        destination: Names its cursors: letters, digits, "-" and "_". Two exporters need two names.

    Raises:
        ConfigError: None of `span`, `metric` and `log` is given.

    Example:
        `start_run(exporters=[SdkExporter(span=OTLPSpanExporter(), metric=OTLPMetricExporter())])`

    """

    def __init__(
        self,
        *,
        span: SpanExporter | None = None,
        metric: MetricExporter | None = None,
        log: LogRecordExporter | None = None,
        processors: Sequence[Processor] = (),
        destination: str = "sdk",
    ) -> None:
        given: dict[Signal, Any] = {"metrics": metric, "traces": span, "logs": log}
        self._exporters = {signal: exporter for signal, exporter in given.items() if exporter is not None}
        if not self._exporters:
            raise ConfigError("SdkExporter", None, "give at least one of span=, metric=, log=")
        self.destination = destination
        self.signals: tuple[Signal, ...] = tuple(self._exporters)
        self.processors = tuple(processors)

    @property
    def mapping_options(self) -> MappingOptions:
        """By the variables; deltas as the SDK's exporter prefers them: of all counters, or of all but observed ones."""
        preferred = getattr(self._exporters.get("metrics"), "_preferred_temporality", None) or {}
        deltas = {kind.__name__ for kind, temporality in preferred.items() if temporality.name == "DELTA"}
        options = read_record_variables(read_variables(os.environ)).options
        if "Counter" not in deltas:
            return options
        return replace(options, temporality="delta" if "ObservableCounter" in deltas else "lowmemory")

    def export(self, signal: Signal, resource: Attributes, records: Sequence[Record]) -> Outcome:
        """Call the signal's SDK exporter once.

        Returns:
            DELIVERED if it answers success; RETRY_THEN_HOLD if it answers anything else, or raises.

        """
        from stepspan.otlp import sdk_objects

        convert: dict[Signal, Any] = {
            "metrics": sdk_objects.metrics_data,
            "traces": sdk_objects.readable_spans,
            "logs": sdk_objects.log_records,
        }
        exporter = self._exporters[signal]
        with uninstrumented():
            try:
                result = exporter.export(convert[signal](resource, records))
            except Exception as error:  # an exporter that is not ours may raise anything
                return Outcome(Verdict.RETRY_THEN_HOLD, f"{type(exporter).__name__}: {error!r}")
        if getattr(result, "name", "") == "SUCCESS":
            return Outcome(Verdict.DELIVERED)
        return Outcome(Verdict.RETRY_THEN_HOLD, f"{type(exporter).__name__} answered {result!s}")

    def close(self) -> None:
        """Shut the SDK exporters down. They take nothing after that."""
        for exporter in self._exporters.values():
            exporter.shutdown()
