"""What became of a request: the verdict that delivery acts on, and the protocol of what sends one.

A transport or exporter sends once and raises nothing for what the network or the receiver does. When to send again,
what to split and where to stop is decided by `stepspan.deliver.task`, from the verdict alone.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, Protocol


class Verdict(enum.Enum):
    """What delivery does about a request that was sent."""

    DELIVERED = "delivered"
    """The receiver has it, except for `Outcome.rejected` records. The cursor moves on."""
    RETRY = "retry"
    """A passing failure. The same request goes out again, with exponential backoff or after `Outcome.retry_after`."""
    RETRY_THEN_HOLD = "retry, then hold"
    """The receiver failed. As RETRY, but after some attempts the signal is held."""
    HALVE = "halve"
    """The request is larger than the receiver accepts. It goes out in halves."""
    ISOLATE = "isolate"
    """Something in the request is refused. It is halved until the refused record stands alone, which is then rejected
    (kept as a dead letter) if the receiver has accepted another one. What fails under any other verdict is isolated,
    too, once a record that was accepted before is accepted again and it is not."""
    HOLD = "hold"
    """Only a person can fix it. The signal is retried slowly, and the run warns once."""


class Outcome(NamedTuple):
    """What became of one request.

    Args:
        verdict: What delivery does next.
        message: For a person: the status, what to fix, and what the receiver said. Never holds a credential.
        retry_after: Seconds that the receiver asked to wait before the next attempt; None if it did not ask.
        rejected: Number of records of a delivered request that the receiver says it did not accept (OTLP partial
            success). They count as rejected in the ledger.
        reason_hidden: The request was refused by something behind what answered, so the reason may be one that time
            cures. An old or future record is then held instead of rejected.
        too_old: The receiver says that a record is older than it takes.
        too_new: The receiver says that a record is of its future.
        may_pass: A HOLD that may end by itself where the receiver has answered well before: a rollout, a DNS server
            that is away. It is then retried for minutes before it holds.
        max_ratio: Of HALVE: how large a request may be, as a part of this one; 0: not known.
        denied: The receiver does not take these credentials, or there are none to be had: others may help.

    """

    verdict: Verdict
    message: str = ""
    retry_after: float | None = None
    rejected: int = 0
    reason_hidden: bool = False
    too_old: bool = False
    too_new: bool = False
    may_pass: bool = False
    denied: bool = False
    max_ratio: float = 0.0


class Transport(Protocol):
    """Sends the requests of one signal to one endpoint. Used by one thread at a time."""

    @property
    def proxy(self) -> str:
        """The URL of the proxy in between, as a message may show it; "" for none."""

    def send(self, body: bytes) -> Outcome:
        """Send one encoded export request once.

        Args:
            body: The request, not compressed: the transport compresses it if the endpoint says so.

        """

    def close(self) -> None:
        """Close the connections. A later `send` opens new ones."""
