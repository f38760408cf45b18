"""A durable cursor: how far one signal of one session has been delivered to one destination, and the ledger of it.

A file of two slots of 2 KiB, allocated when it is made, so that it can be moved on a full disk:

    slot   4 bytes CRC-32 of the rest · 4 bytes length of the JSON · JSON, with its generation · zeros

Only the deliverer that holds the destination's lock writes. That is one for each host; where two hosts could come to
the same session the file itself is flock'ed while it is open (`CursorInUse`). A move writes the older slot with the
next generation, in one `pwrite`; a slot that is torn fails its checksum, and the other one holds. Losing a move costs
sending again what was answered, which is harmless: the mapping gives the same points.
"""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import closing, suppress
from dataclasses import dataclass, field, fields
from operator import add, attrgetter, sub
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import orjson

from stepspan.journal.layout import open_path, read_file

SLOT_BYTES = 2048
CHECKPOINT = ".state"
"""What follows a cursor's name in that of its checkpoint."""
NAMED = "-named"
"""What follows an address in the name of an empty file that says: its cursors have been renamed."""
MAX_MESSAGE_CHARS = 600
ADDED_FIELDS = frozenset({"thinned", "held_until", "released"})
"""What cursors of stepspan 0.1 do not have."""

T = TypeVar("T", bound="Position | Ledger")


@dataclass(slots=True)
class Ledger:
    """What became of lines and records.

    Lines: journaled = read + damaged + pruned + dropped + pending.
    Records: mapped = delivered + rejected + filtered + thinned + in flight.
    """

    read: int = 0
    damaged: int = 0
    pruned: int = 0
    dropped: int = 0
    mapped: int = 0
    delivered: int = 0
    rejected: int = 0
    filtered: int = 0
    """Left out: a later point of its series in its millisecond went out, the step's trace is one of too many, or the
    signal is not sent for this rank."""
    thinned: int = 0
    """Values that gave way to later ones of their call: there were more of them than milliseconds."""

    def plus(self, other: Ledger) -> Ledger:
        """The sum of two ledgers."""
        return Ledger(*map(add, _counts(self), _counts(other)))

    def minus(self, other: Ledger) -> Ledger:
        """What has come on since another one."""
        return Ledger(*map(sub, _counts(self), _counts(other)))


_counts = attrgetter(*(f.name for f in fields(Ledger)))


@dataclass(slots=True)
class Position:
    """Where to read on: everything before has been answered for."""

    segment: int = 0
    offset: int = 0
    seq: int = 0
    ts: int = 0
    finished: bool = False
    """The session has ended and its end has been delivered."""
    held_until: int = 0
    """The time of the last point that the events so far have, and whose time has not come, Unix ns; 0: none waits."""
    released: int = 0
    """The time of the last point after these events that has been answered for, Unix ns; 0: none has."""


@dataclass(slots=True)
class CursorState:
    """All that a cursor keeps."""

    position: Position = field(default_factory=Position)
    ledger: Ledger = field(default_factory=Ledger)
    answered: float = 0.0
    """When the receiver last took something, Unix seconds."""
    state: str = "new"
    """new, ok, retry or hold."""
    message: str = ""
    """What the receiver said, and what to fix."""
    asked_until: float = 0.0
    """Before when the receiver has asked not to be tried again, Unix seconds; 0: it has not."""
    partial: int = 0
    """How many of the rejected records the receiver left out of requests that it took: nobody knows which."""
    left_out: int = 0
    """How many of the filtered records were not sent for their rank: `stepspan sync --all-ranks` sends them."""
    needs: int = 0
    """The oldest segment that a restart would read."""
    session: str = ""
    """The id of the session that the cursor is of; "" before its first move."""
    denied: bool = False
    """Whether the receiver refused the credentials when it was last asked."""

    @property
    def failing(self) -> bool:
        """Whether the last request was not taken."""
        return self.state in {"retry", "hold"}

    @classmethod
    def load(cls, content: dict[str, Any]) -> CursorState:
        """From a slot's JSON, less what a newer version added. TypeError or KeyError where it is something else."""
        return cls(
            position=_known(Position, content["position"]),
            ledger=_known(Ledger, content["ledger"]),
            answered=float(content["answered"]),
            state=str(content["state"]),
            message=str(content["message"]),
            asked_until=float(content.get("asked_until", 0.0)),
            partial=int(content.get("partial", 0)),
            left_out=int(content.get("left_out", 0)),
            needs=int(content["needs"]),
            session=str(content["session"]),
            denied=bool(content.get("denied")),
        )


STATE_FIELDS = tuple(f.name for f in fields(CursorState))


def _known(kind: type[T], content: dict[str, Any]) -> T:
    return kind(**{f.name: content[f.name] for f in fields(kind) if f.name in content or f.name not in ADDED_FIELDS})


def _unpack(slot: bytes) -> tuple[int, CursorState] | None:
    if len(slot) < 8:
        return None
    checksum, length = struct.unpack_from("<II", slot)
    content = slot[8 : 8 + length]
    if crc32(slot[4 : 8 + length]) != checksum:
        return None
    try:
        found = orjson.loads(content)
        return int(found["generation"]), CursorState.load(found)
    except (ValueError, TypeError, KeyError):
        return None


def _latest(slots: bytes) -> tuple[int, CursorState] | None:
    """Generation and state of the later one of two slots; None where both are damaged."""
    found = [slot for slot in (_unpack(slots[:SLOT_BYTES]), _unpack(slots[SLOT_BYTES:])) if slot]
    return max(found, key=lambda slot: slot[0], default=None)


class CursorInUse(OSError):
    """Another deliverer has this cursor open."""


class Cursor:
    """The cursor file at `path`, made where there is none; one whose slots are both damaged starts from zero.

    Raises:
        CursorInUse: Another deliverer has it open.
        OSError: It can't be made or opened.

    """

    def __init__(self, path: Path) -> None:
        self._fd = open_path(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise CursorInUse(f"{path}: another deliverer is at work on it") from None
        except OSError:  # a file system without locks
            pass
        size = os.fstat(self._fd).st_size
        if size < 2 * SLOT_BYTES:
            os.pwrite(self._fd, bytes(2 * SLOT_BYTES - size), size)
        self._generation, self.state = _latest(os.pread(self._fd, 2 * SLOT_BYTES, 0)) or (0, CursorState())

    def write(self, state: CursorState) -> None:
        """Move the cursor: from here on `state` is what a restart finds.

        Raises:
            OSError: It was not written, and the older slot still holds.

        """
        self.state = state
        generation = self._generation + 1
        message = state.message.encode("utf-8", "replace").decode()
        values = {name: getattr(state, name) for name in STATE_FIELDS}
        while True:
            content = orjson.dumps({"generation": generation, **values, "message": message})
            if len(content) <= SLOT_BYTES - 8:
                break
            message = message[: min(len(message) // 2, MAX_MESSAGE_CHARS)]
        rest = struct.pack("<I", len(content)) + content
        slot = struct.pack("<I", crc32(rest)) + rest
        if os.pwrite(self._fd, slot.ljust(SLOT_BYTES, b"\0"), SLOT_BYTES * (generation % 2)) != SLOT_BYTES:
            raise OSError("the disk took only a part of the cursor")
        self._generation = generation  # a move that failed is repeated on the same slot, never on the good one

    def close(self) -> None:
        """Close the file; the cursor stays as it was last written."""
        os.close(self._fd)


def rename_cursor(directory: Path, address: str, destination: str, signal: str) -> None:
    """Let a destination that has got a name go on where its address is, unless it has begun.

    Args:
        directory: Of a session's cursors.
        address: The name that the address stands for.
        destination: The name that it got.
        signal: Of the cursor.

    Raises:
        CursorInUse: Somebody sends to the address.
        OSError: It cannot be renamed.

    """
    old, new = directory / cursor_name(address, signal), directory / cursor_name(destination, signal)
    if new.exists() or not old.exists():
        return
    with closing(Cursor(old)):
        os.close(open_path(directory / f"{address}{NAMED}", os.O_WRONLY | os.O_CREAT))
        for end in (CHECKPOINT, ""):  # a cursor without its checkpoint reads a little more
            with suppress(FileNotFoundError):
                os.rename(f"{old}{end}", f"{new}{end}")


def read_cursor(path: Path) -> CursorState | None:
    """What a cursor file says, without making or changing it."""
    found = _latest(read_file(path, 2 * SLOT_BYTES) or b"")
    return found[1] if found else None


def cursor_is_open(path: Path) -> bool:
    """Whether a deliverer has a cursor open, as far as this host knows."""
    try:
        fd = open_path(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    finally:
        os.close(fd)
    return False


def cursor_name(destination: str, signal: str) -> str:
    """The file of one signal's cursor for one destination."""
    return f"{destination}.{signal}"
