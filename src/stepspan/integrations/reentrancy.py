"""The guard that keeps what is recorded from being recorded without end.

Recording may run a user's code (a `__str__`, a processor), which may log or end a span and so record again, in the same
thread. A signal handler may do so as well, at any moment. What is recorded within a recording is kept; what is recorded
within that is dropped, because code that records as it is recorded would never end.
"""

from __future__ import annotations

import threading

MAX_RECORDING_DEPTH = 2


class RecordingDepth(threading.local):
    """How many recordings are in progress in a thread. A context manager that yields how many there were before it.

    ```python
    with recording_depth as depth:
        if depth < MAX_DEPTH:
            ...
    ```
    """

    depth = 0

    def __enter__(self) -> int:
        self.depth += 1
        return self.depth - 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1


recording_depth = RecordingDepth()
