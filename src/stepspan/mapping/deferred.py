"""Points whose values were known only later: a GPU still computed them, or timed a span, when their line was written.

A deferred value comes in a later line, which says what time it is of: the time of the call, or the end of a span or a
step. Its point has that time, and so comes behind points of other series that are newer. Within its own series the
order holds all the same, because

- the writer of a journal writes the deferred values of a series in the order of their calls, and no other value of
  that series in between: a call whose value is on its way has null in its place (`metrics` events), and
- `steps` settles pending steps in the order in which they ended.

What would break the order in spite of that is left out and counted as filtered, so that no request is refused for it:
a point that is not in a later millisecond than the deferred one before it, or that shares a millisecond with a value
that was known at once (`reserve`). No point is of a time before its session began, or after its own line.
"""

from __future__ import annotations

from stepspan.events import MILLISECOND_NS
from stepspan.mapping.point_buffer import PointBuffer
from stepspan.mapping.records import Series


class DeferredPoints:
    """The deferred points of one session.

    Args:
        started: When the session began, Unix ns.
        points: Where they go.

    Attributes:
        last: A series' identity -> the millisecond after which its next deferred point must lie. JSON.

    """

    def __init__(self, started: int, points: PointBuffer) -> None:
        self._started = started
        self._points = points
        self.last: dict[str, int] = {}

    def reserve(self, series: Series, now: int) -> None:
        """Say that a point is deferred. If the series has one of this millisecond, that is the one that stays.

        Args:
            series: Whose point it is. Call it before points of the same event are added.
            now: The time of the event, Unix ns.

        """
        if self._points.has_current(series):
            self.last[_identity(series)] = now // MILLISECOND_NS

    def add(self, series: Series, at: int, value: float, now: int) -> None:
        """Add a point whose value is known now.

        Args:
            series: Whose point it is.
            at: The time it is of, Unix ns.
            value: Its value.
            now: The time of the event that has the value, Unix ns.

        """
        at = min(max(at, self._started), now)
        millisecond, identity = at // MILLISECOND_NS, _identity(series)
        if millisecond <= self.last.get(identity, 0):
            self._points.filtered += 1
            return
        self.last[identity] = millisecond
        if millisecond == now // MILLISECOND_NS:
            self._points.add(series, at, value)
        else:
            self._points.points.append((series, at, value))


def _identity(series: Series) -> str:
    return repr((series.name, sorted(series.attributes.items(), key=str)))
