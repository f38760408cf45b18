"""Warnings of a run: each cause is logged once and counted from then on.

Nothing raises into training, and a loop of a million steps must not log a million lines. So whatever goes wrong has a
kind, and a key that tells two causes of one kind apart: the metric, the parameter, the exception's type. The first
occurrence of each is logged by local rank 0 (the other ranks log it at DEBUG), `run.stats()` has the counts, and the
end of the run sums them up in one line. `MAX_KEYS` keys of a kind are told apart; what comes beyond is counted
together.

Values that were logged and cannot be recorded are written to the journal as well, as `dropped` events: at the first of
a key, the second, the fourth, the eighth …, and at the end. So a receiver gets to know of each, and a value that is
wrong in each step costs a line for each doubling.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from threading import RLock

from stepspan.events import Event
from stepspan.processors.redact import redacted_text

log = logging.getLogger("stepspan")

MAX_KEYS = 100
"""How many keys of one kind are counted and logged apart."""
MAX_KEY_CHARS = 200
OTHER_KEYS = "(other keys)"
"""What the keys beyond `MAX_KEYS` are counted as."""
MAX_SUMMARY_KEYS = 5
"""How many keys of one kind the line at the end of a run names: those that came up most."""


class WarningSink:
    """Counts warnings by kind and key, and logs the first of each.

    Args:
        audible: Whether this process logs them where people look; otherwise at DEBUG.
        counted_in: What gives the counts, for the log record.

    """

    def __init__(self, *, audible: bool, counted_in: str = "run.stats()") -> None:
        self.audible = audible
        self._counted_in = counted_in
        self.counts: Counter[str] = Counter()
        """How often each kind of warning came up."""
        self._keys: dict[str, Counter[str]] = {}
        """How often each key of a kind came up."""
        self._above_info: set[str] = set()
        """Kinds of which more than information was logged."""
        self._lock = RLock()  # a signal handler may warn while its thread does

    def warn_once(self, kind: str, message: str, level: int = logging.WARNING, *, key: str = "") -> None:
        """As `count`, for those who need not know the key."""
        self.count(kind, message, level, key=key)

    def count(self, kind: str, message: str, level: int = logging.WARNING, *, key: str = "") -> str:
        """Count something that went wrong, and log it if it is the first of its kind and key.

        Args:
            kind: What is counted together: "processor", "value", "journal", …
            message: What happened and, where there is one, the fix.
            level: Of the log record.
            key: What tells this cause from others of its kind.

        Returns:
            The key that it was counted under.

        """
        with self._lock:
            self.counts[kind] += 1
            if level > logging.INFO:
                self._above_info.add(kind)
            keys, key = self._keys.setdefault(kind, Counter()), key[:MAX_KEY_CHARS]
            if key not in keys and len(keys) >= MAX_KEYS:
                key = OTHER_KEYS
            keys[key] += 1
            first = keys[key] == 1
        if first:
            counted = f"{self._counted_in} counts{' this and all further keys together' if key == OTHER_KEYS else ''}"
            message = redacted_text(message)  # it may quote what was logged
            log.log(level if self.audible else logging.DEBUG, "stepspan: %s (logged once; %s)", message, counted)
        return key

    def conclude(self, kind: str, message: str) -> None:
        """Count and log what is to be said once, as the run ends: by this process, whichever it is.

        Args:
            kind: What is counted together.
            message: What a person has to know; holds no value of the program.

        """
        with self._lock:
            self.counts[kind] += 1
        log.warning("stepspan: %s", message)

    def key_counts(self) -> dict[str, dict[str, int]]:
        """Kind -> key -> how often, of the kinds that have keys."""
        with self._lock:
            keyed = {kind: {key: count for key, count in keys.items() if key} for kind, keys in self._keys.items()}
        return {kind: keys for kind, keys in keyed.items() if keys}

    def log_summary(self) -> None:
        """Log in one line what went wrong, if anything did."""
        with self._lock:
            summary = ", ".join(self._summary(kind) for kind in self.counts if kind in self._above_info)
        if summary:
            level = logging.WARNING if self.audible else logging.DEBUG
            log.log(level, "stepspan: warnings of this run: %s", redacted_text(summary))

    def _summary(self, kind: str) -> str:
        """A kind, its count and its keys: `value 38 (loss 17, f1 17, val_loss 1)`."""
        keys = [(key, count) for key, count in sorted(self._keys[kind].items(), key=lambda item: -item[1]) if key]
        shown = [f"{key:.80} {count}" for key, count in keys[:MAX_SUMMARY_KEYS]]
        if len(keys) > MAX_SUMMARY_KEYS:
            shown.append(f"and {len(keys) - MAX_SUMMARY_KEYS} more")
        in_brackets = f" ({', '.join(shown)})" if shown else ""
        return f"{kind} {self.counts[kind]}{in_brackets}"

    def after_fork(self) -> None:
        """In a forked child: another thread of the parent may have held the lock."""
        self.audible, self._lock = False, RLock()


class DroppedValues:
    """Writes to the journal which values were dropped, and how many.

    Args:
        write: Takes a `dropped` event.

    """

    def __init__(self, write: Callable[[Event], None]) -> None:
        self._write = write
        self._totals: Counter[str] = Counter()
        self._unwritten: Counter[str] = Counter()
        self._reasons: dict[str, str] = {}
        self._closed = False
        self._lock = RLock()

    def add(self, key: str, why: str) -> None:
        """Count one value, and write a line if their number is a power of two.

        Args:
            key: Of the metric, or the place of another value. The caller bounds how many there are.
            why: What is wrong with it.

        """
        with self._lock:
            if self._closed:
                return
            self._totals[key] += 1
            self._unwritten[key] += 1
            self._reasons[key] = why
            total = self._totals[key]
            event = self._event(key) if total & (total - 1) == 0 else None
        if event is not None:
            self._write(event)

    def close(self) -> None:
        """Write what is not written yet; nothing is written afterwards."""
        self._closed = True
        self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        with self._lock:
            events = [self._event(key) for key in list(self._unwritten)]
        for event in events:
            self._write(event)

    def _event(self, key: str) -> Event:
        """The line of the values of a key that are not written yet."""
        return {"ts": 0, "seq": 0, "tag": "dropped", "key": key, "count": self._unwritten.pop(key),
                "why": self._reasons.pop(key)}  # fmt: skip
