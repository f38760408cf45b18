"""Warnings of a run: each kind is logged once and counted from then on.

Nothing raises into training, and a loop of a million steps must not log a million lines. So whatever goes wrong has a
kind; its first occurrence is logged by local rank 0 (the other ranks log it at DEBUG), and `run.stats()["warnings"]`
has the counts.
"""

from __future__ import annotations

import logging
from collections import Counter

log = logging.getLogger("stepspan")


class WarningSink:
    """Counts warnings by kind and logs the first of each.

    Args:
        audible: Whether this process logs them where people look; otherwise at DEBUG.
        counted_in: What gives the counts, for the log record.

    """

    def __init__(self, *, audible: bool, counted_in: str = "run.stats()") -> None:
        self.audible = audible
        self._counted_in = counted_in
        self.counts: Counter[str] = Counter()

    def warn_once(self, kind: str, message: str, level: int = logging.WARNING) -> None:
        """Count something that went wrong, and log it if it is the first of its kind.

        Args:
            kind: What is counted together: "processor", "value", "journal", …
            message: What happened and, where there is one, the fix.
            level: Of the log record.

        """
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            log.log(level if self.audible else logging.DEBUG, "%s (logged once; %s counts)", message, self._counted_in)
