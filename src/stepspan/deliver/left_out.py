"""What is not sent of a session, by its rank: the settings `metrics_ranks`, `traces_ranks`, `logs_ranks`.

The run writes into each session's header what is left out of it, so that whoever delivers the journal, live or later,
leaves out the same. Records are mapped, counted as filtered (and, to be found again, as left out), and not sent. A
session leaves out all of a signal, but for one case: rank 0's spans of steps go out where other ranks' traces do, for
they are the roots of these. `stepspan sync --all-ranks` begins such cursors anew and sends everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stepspan.events import Event
from stepspan.mapping.records import Record, Signal, Span

Choose = Callable[[Sequence[Record]], Sequence[Record]]


def chooser(header: Event, signal: Signal, *, all_ranks: bool) -> Choose | None:
    """What picks the records that are sent; None where all are.

    Args:
        header: The session's.
        signal: Of the records.
        all_ranks: Whether nothing is left out.

    """
    left_out = header.get("left_out")
    if all_ranks or not isinstance(left_out, list) or signal not in left_out:
        return None
    return _step_roots if signal == "traces" and header.get("step_roots") is True else _none


def _none(_: Sequence[Record]) -> Sequence[Record]:
    return ()


def _step_roots(records: Sequence[Record]) -> Sequence[Record]:
    return [r for r in records if isinstance(r, Span) and r.name == "training.step" and r.parent_id is None]
