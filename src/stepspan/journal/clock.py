"""The journal's clock: the wall clock as it was when last compared, and the time since. It never goes back.

A wall clock may be wrong as a run starts (a machine that has not heard of NTP yet), and be set later. So it is compared
again soon after the start, then less and less often, once a minute in the end. What was behind is set at once; what was
ahead runs at half speed until it is right, because event time must not go back. The journal writes each of this down
(`clock` events), so that durations can be told from times. A laptop's sleep counts as time, and the small corrections
that NTP makes all the time reach this clock by the kernel's.
"""

from __future__ import annotations

import time
from functools import partial

from stepspan.events import MILLISECOND_NS, SECOND_NS

TOLERANCE_NS = SECOND_NS // 2
"""What clocks may differ by."""
FIRST_INTERVAL_NS = MILLISECOND_NS
LAST_INTERVAL_NS = 60 * SECOND_NS
"""Between two comparisons: each time twice as long, from the first to the last."""
MAX_READING_NS = 10 * MILLISECOND_NS
"""Both clocks must be read within this; else this process was paused in between, and reads again."""
MAX_READINGS = 10


class Clock:
    """The time in Unix nanoseconds.

    Attributes:
        since: Nanoseconds since some moment: what durations are measured with. It is never set.
        correction: What the clock was last found ahead of the wall clock by, ns; negative: behind. 0 once that has been
            written down.

    """

    def __init__(self) -> None:
        with_sleep = getattr(time, "CLOCK_BOOTTIME", None)
        self.since = time.monotonic_ns if with_sleep is None else partial(time.clock_gettime_ns, with_sleep)
        self.correction = 0
        now, wall, _ = self._read()
        self._setting = wall - now, 0
        """What is added to `since`, and until when (by `since`) the clock runs at half speed."""
        self.interval = FIRST_INTERVAL_NS
        """Until the next comparison, by `since`."""
        self._compare_at = now

    def __call__(self) -> int:
        """The time now, in Unix nanoseconds."""
        now = self.since()
        offset, slow_until = self._setting
        if now < slow_until:
            offset += (slow_until - now) // 2
        return offset + now

    @property
    def ahead(self) -> int:
        """Nanoseconds that are still to be made up."""
        return max(0, self._setting[1] - self.since()) // 2

    def compare_if_due(self) -> None:
        """Compare with the wall clock, where it is time to, and set this one right."""
        if self.correction or self.since() < self._compare_at:
            return
        now, wall, at_once = self._read()
        self._compare_at, self.interval = now + self.interval, min(2 * self.interval, LAST_INTERVAL_NS)
        if not at_once or abs(self._setting[0] + now - wall) <= TOLERANCE_NS:
            return
        ahead = self._setting[0] + max(0, self._setting[1] - now) // 2 + now - wall
        self._setting, self.correction = (wall - now, now + 2 * max(0, ahead)), ahead

    def _read(self) -> tuple[int, int, bool]:
        """This moment by `since` and by the wall clock, and whether both were read at once."""
        for _ in range(MAX_READINGS):
            before, wall, after = self.since(), time.time_ns(), self.since()
            if after - before <= MAX_READING_NS:
                break
        return (before + after) // 2, wall, after - before <= MAX_READING_NS
