"""When a value was measured, as a program says it: `log_metrics(..., time=...)`."""

from __future__ import annotations

import operator
from datetime import datetime, timedelta, timezone
from typing import Any

from stepspan.events import SECOND_NS

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
MICROSECOND = timedelta(microseconds=1)
MIN_INTEGER_NS = 10**17
"""In 1973. An integer below that counts seconds, milliseconds or microseconds."""
CLOCK_TOLERANCE_NS = 10 * SECOND_NS
"""How far another clock of this host may be ahead of the run's."""
FIX = "give a datetime, or Unix nanoseconds as an int, such as time.time_ns()"


def past_time(time: Any, now: int) -> int | None:
    """The time of a value, in Unix ns.

    Args:
        time: A datetime, local where it has no time zone; or Unix ns as an int.
        now: The run's time, Unix ns.

    Returns:
        A time before `now`; None where `time` is the present.

    Raises:
        ValueError: It is something else, or of the future; the text says what to give.

    """
    if isinstance(time, datetime):
        try:
            ns = (time.astimezone(timezone.utc) - EPOCH) // MICROSECOND * 1000
        except (OverflowError, OSError) as error:
            raise ValueError(f"not a time of this world ({error}): {FIX}") from None
        if ns <= 0:
            raise ValueError("before 1970, where Unix time begins")
    elif isinstance(time, float):
        raise ValueError(f"a float of seconds is not exact, and its unit is a guess: {FIX}")
    else:
        try:
            ns = operator.index(time)
        except Exception:  # a user's __index__ may raise anything
            raise ValueError(f"not a time: {FIX}") from None
        if isinstance(time, bool) or ns < MIN_INTEGER_NS:
            raise ValueError(f"not Unix nanoseconds, which have 19 digits: {FIX}")
    if ns > now + CLOCK_TOLERANCE_NS:
        raise ValueError("in the future: a value is logged when it is there")
    return ns if ns < now else None
