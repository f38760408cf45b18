"""What an exporter is: something that follows the journal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from stepspan.mapping.records import Attributes, Record, Signal
from stepspan.otlp.outcome import Outcome
from stepspan.processors import Processor


class Exporter(Protocol):
    """Sends what delivery reads from the journal to one destination. Each signal is used by one thread at a time.

    Delivery does the rest: it batches, retries, halves and isolates by the outcomes, and keeps a durable cursor for
    each session and signal. An exporter sends once and raises nothing for what the receiver does.
    """

    @property
    def destination(self) -> str:
        """Names its cursors: letters, digits, `-` and `_`. The same after a restart, or everything is sent again."""

    @property
    def signals(self) -> Sequence[Signal]:
        """The signals it takes: "metrics", "traces", "logs"."""

    @property
    def processors(self) -> Sequence[Processor]:
        """Its own processors, which see the events that it is sent, after the journal."""

    def export(self, signal: Signal, resource: Attributes, records: Sequence[Record]) -> Outcome:
        """Send records once.

        Args:
            signal: One of `signals`.
            resource: The attributes of the session's Resource.
            records: Records of this signal, of one session, in time order.

        Returns:
            What became of them; `stepspan.otlp.outcome.Verdict` says what delivery does about each verdict.

        """

    def close(self) -> None:
        """Close connections, and whatever else is held; called once, after the last `export`."""


@runtime_checkable
class JoiningExporter(Exporter, Protocol):
    """An exporter that can send records of several sessions in one request, each under a Resource of its own."""

    def encode(self, signal: Signal, resource: Attributes, records: Sequence[Record]) -> bytes:
        """One session's part of a request, which is a whole request as well.

        Args:
            signal: One of `signals`.
            resource: The attributes of the session's Resource.
            records: Records of this signal, of one session, in time order.

        Raises:
            ValueError: A record cannot be sent.

        """

    def export_encoded(self, signal: Signal, parts: Sequence[bytes]) -> Outcome:
        """Send parts as one request, once.

        Args:
            signal: One of `signals`.
            parts: At least one, from `encode`.

        Returns:
            What became of all of them together.

        """
