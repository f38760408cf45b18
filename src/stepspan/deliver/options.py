"""What all deliveries of a deliverer have in common."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from stepspan.deliver.open_sessions import OpenSessions
from stepspan.journal.liveness import DEAD_AFTER_S

BATCH_BYTES = 512 << 10
SEND_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Options:
    """How sessions are delivered.

    Attributes:
        boot_id: The boot of this host: for sessions of the same boot the writer's lock says whether it lives.
        dead_after: Seconds of silence after which a session of another host or boot counts as dead.
        state_directory: Where cursors lie, for journals that this user may only read; None: with each session.
        batch_bytes: Journal bytes in a batch, about.
        send_interval: Seconds between two requests for what is fresh of a host's sessions, which go together; 0: what
            is new is sent as soon as it is seen, in a request for each session.
        all_ranks: Whether what sessions leave out by their rank is sent, too.
        clock: Monotonic seconds.
        wall_clock: Unix seconds.
        jitter: A random number in [0, 1).
        sessions: Those that are open.

    """

    boot_id: str
    dead_after: float = DEAD_AFTER_S
    state_directory: Path | None = None
    batch_bytes: int = BATCH_BYTES
    send_interval: float = SEND_INTERVAL_S
    all_ranks: bool = False
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    jitter: Callable[[], float] = random.SystemRandom().random
    sessions: OpenSessions = field(default_factory=OpenSessions, compare=False)
