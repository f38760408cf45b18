"""Limits of OpenTelemetry on attributes, events and links: how much of a span or log record goes to a destination.

The journal keeps everything. What is cut off is counted in the record's `dropped_*_count`; a text that is shortened is
not. What says what an exception is goes before a user's own attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from stepspan.mapping.records import Attributes, Link, Log, Record, SdkRecord, Signal, Span, SpanEvent


@dataclass(frozen=True, slots=True)
class AttributeLimits:
    """Of one kind of attributes.

    Attributes:
        count: The largest number of attributes; None: what the mapping makes, which keeps 128 of a user's.
        length: The largest number of characters of a text, also of each in a list; None: any.

    """

    count: int | None = None
    length: int | None = None


@dataclass(frozen=True, slots=True)
class RecordLimits:
    """What of a span or log record is sent.

    Attributes:
        span: Of a span's attributes.
        event: Of the attributes of a span's event.
        link: Of the attributes of a span's link.
        log: Of a log record's attributes.
        events: The largest number of events of a span; None: what the mapping makes, which keeps 128.
        links: The largest number of its links; None: all.

    """

    span: AttributeLimits = AttributeLimits()
    event: AttributeLimits = AttributeLimits()
    link: AttributeLimits = AttributeLimits()
    log: AttributeLimits = AttributeLimits()
    events: int | None = None
    links: int | None = None

    def apply(self, signal: Signal, record: Record) -> Record:
        """A record within the limits.

        Args:
            signal: "traces" or "logs".
            record: A span or log record; it may be changed.

        """
        if isinstance(record, Span):
            return self._span(record)
        if isinstance(record, Log):
            record.attributes, dropped = _cut(record.attributes, self.log)
            record.dropped_attributes += dropped
            return record
        sdk_record = cast("SdkRecord", record)
        content = dict(sdk_record.record)
        if signal == "logs":
            _cut_json(content, self.log)
        else:
            _cut_json(content, self.span)
            for name, limit, limits in (("events", self.events, self.event), ("links", self.links, self.link)):
                items = [dict(item) for item in content.get(name, ())]
                if items:
                    for item in items[:limit]:
                        _cut_json(item, limits)
                    content[name] = items[:limit]
                    _add(content, f"dropped{name.capitalize()}Count", len(items) - len(content[name]))
        return sdk_record._replace(record=content)

    def _span(self, span: Span) -> Span:
        span.attributes, dropped = _cut(span.attributes, self.span)
        span.dropped_attributes += dropped
        events = span.events[: self.events]
        span.dropped_events += len(span.events) - len(events)
        span.events = [self._event(event) for event in events]
        links = span.links[: self.links]
        span.dropped_links += len(span.links) - len(links)
        span.links = [self._link(link) for link in links]
        return span

    def _event(self, event: SpanEvent) -> SpanEvent:
        attributes, dropped = _cut(event.attributes, self.event)
        return replace(event, attributes=attributes, dropped_attributes=event.dropped_attributes + dropped)

    def _link(self, link: Link) -> Link:
        attributes, dropped = _cut(link.attributes, self.link)
        return Link(link.trace_id, link.span_id, attributes, link.dropped_attributes + dropped, link.trace_state)


def _cut(attributes: Attributes, limits: AttributeLimits) -> tuple[Attributes, int]:
    """Attributes within the limits, and how many more there were."""
    dropped = 0 if limits.count is None else max(0, len(attributes) - limits.count)
    if dropped:
        names = sorted(attributes, key=_is_of_user)[: limits.count]
        attributes = {name: attributes[name] for name in names}
    if limits.length is not None:
        attributes = {name: _shortened(value, limits.length) for name, value in attributes.items()}
    return attributes, dropped


def _is_of_user(name: str) -> bool:
    return not name.startswith("exception.")


def _shortened(value: Any, length: int) -> Any:
    if isinstance(value, str):
        return value[:length]
    if isinstance(value, Mapping):
        return {name: _shortened(item, length) for name, item in value.items()}
    return [_shortened(item, length) for item in value] if isinstance(value, Sequence) else value


def _cut_json(content: dict[str, Any], limits: AttributeLimits) -> None:
    """The same for what has `attributes` in OTLP JSON; it is changed."""
    attributes = content.get("attributes", ())
    dropped = 0 if limits.count is None else max(0, len(attributes) - limits.count)
    if dropped:
        attributes = sorted(attributes, key=lambda pair: _is_of_user(pair["key"]))[: limits.count]
    if limits.length is not None:
        attributes = [{**pair, "value": _shortened_json(pair["value"], limits.length)} for pair in attributes]
    if attributes or "attributes" in content:
        content["attributes"] = attributes
    _add(content, "droppedAttributesCount", dropped)


def _shortened_json(value: Any, length: int) -> Any:
    if "stringValue" in value:
        return {"stringValue": value["stringValue"][:length]}
    if "arrayValue" in value:
        values = value["arrayValue"].get("values", ())
        return {"arrayValue": {"values": [_shortened_json(item, length) for item in values]}}
    if "kvlistValue" in value:
        pairs = value["kvlistValue"].get("values", ())
        return {"kvlistValue": {"values": [{**p, "value": _shortened_json(p["value"], length)} for p in pairs]}}
    return value


def _add(content: dict[str, Any], name: str, count: int) -> None:
    if count:
        content[name] = int(content.get(name, 0)) + count
