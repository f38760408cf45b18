"""The journal's clock: the wall clock as it was when last compared, and the time since. It never goes back.

A wall clock may be wrong as a run starts (a machine that has not heard of NTP yet), and be set later. So it is compared
again: each second in the first minutes, and then once a minute. What was behind is set at once; what was ahead runs at
half speed until it is right, because event time must not go back. The journal writes each of this down (`clock`
events), so that durations can be told from times. A laptop's sleep counts as time, and the small corrections that NTP
makes all the time reach this clock by the kernel's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from stepspan.events import MILLISECOND_NS, SECOND_NS

TOLERANCE_NS = SECOND_NS // 2
"""What clocks may differ by."""
FIRST_INTERVAL_NS, EARLY_INTERVAL_NS, INTERVAL_NS = MILLISECOND_NS, SECOND_NS, 60 * SECOND_NS
"""Between two comparisons: each time twice as long, up to the second, and after `EARLY_NS` up to the third."""
EARLY_NS = 600 * SECOND_NS
MAX_READING_NS = 10 * MILLISECOND_NS
"""Both clocks must be read within this; else this process was paused in between, and reads again."""
MAX_READINGS = 10


class Clock:
    """The time in Unix nanoseconds.

    Args:
        since: Gives nanoseconds since some moment; by default since the machine was started, its sleep included.
        wall: Gives Unix nanoseconds, right or wrong; by default the system's.

    Attributes:
        since: Nanoseconds since some moment: what durations are measured with. It is never set.
        correction: What the clock was last found ahead of the wall clock by, ns; negative: behind. 0 once that has been
            written down.

    """

    def __init__(self, since: Callable[[], int] | None = None, wall: Callable[[], int] | None = None) -> None:
        with_sleep = getattr(time, "CLOCK_BOOTTIME", None)
        default = time.monotonic_ns if with_sleep is None else partial(time.clock_gettime_ns, with_sleep)
        self.since: Callable[[], int] = since or default
        self._wall = wall or (lambda: time.time_ns())
        self.correction = 0
        now, unix, _ = self._read()
        self._setting = unix - now, 0
        """What is added to `since`, and until when (by `since`) the clock runs at half speed."""
        self.interval = FIRST_INTERVAL_NS
        """Until the next comparison, by `since`."""
        self._compare_at, self._early_until = now, now + EARLY_NS

    def __call__(self) -> int:
        """The time now, in Unix nanoseconds."""
        now = self.since()
        offset, slow_until = self._setting
        if now < slow_until:
            offset += (slow_until - now) // 2
        return offset + now

    @property
    def steady(self) -> tuple[Callable[[], int], int]:
        """What gives the time until the next comparison, and what is to be added to it: this clock without a call."""
        offset, slow_until = self._setting
        return (self, 0) if self.since() < slow_until else (self.since, offset)

    @property
    def ahead(self) -> int:
        """Nanoseconds that are still to be made up."""
        return max(0, self._setting[1] - self.since()) // 2

    def set_back(self) -> None:
        """Be right at once, although time goes back by that: where nothing is kept of the time so far."""
        self._setting, self.correction = (self._setting[0], 0), 0

    def compare_if_due(self, *, now: bool = False) -> None:
        """Compare with the wall clock, where it is time to or `now`, and set this one right."""
        due = self.since() >= self._compare_at
        if self.correction or not (due or now):
            return
        passed, wall, at_once = self._read()
        if due:
            limit = EARLY_INTERVAL_NS if passed < self._early_until else INTERVAL_NS
            self._compare_at, self.interval = passed + self.interval, min(2 * self.interval, limit)
        if not at_once or abs(self._setting[0] + passed - wall) <= TOLERANCE_NS:
            return
        ahead = self._setting[0] + max(0, self._setting[1] - passed) // 2 + passed - wall
        self._setting, self.correction = (wall - passed, passed + 2 * max(0, ahead)), ahead

    def _read(self) -> tuple[int, int, bool]:
        """This moment by `since` and by the wall clock, and whether both were read at once."""
        for _ in range(MAX_READINGS):
            before, wall, after = self.since(), self._wall(), self.since()
            if after - before <= MAX_READING_NS:
                break
        return (before + after) // 2, wall, after - before <= MAX_READING_NS
