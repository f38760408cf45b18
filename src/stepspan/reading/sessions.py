"""One session as it lies on disk: its header, its events batch by batch, and how it ended.

A session is read the same way while it is written, after it has ended and after a crash. The files stay as they are.
Damaged lines are passed over and counted in each batch's ledger; a session whose header cannot be read, or that a newer
version of stepspan wrote, is refused with `JournalError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from stepspan.events import Event
from stepspan.journal.cursor import Position
from stepspan.journal.layout import SessionPath
from stepspan.journal.liveness import DEAD_AFTER_S, Closed, read_closed, read_resting, writer_is_dead
from stepspan.journal.reader import EventBatch, JournalReader
from stepspan.mapping.mapper import mapper
from stepspan.mapping.records import Record, Signal

READ_BYTES = 4 << 20
"""Journal bytes of a batch, about: what reading a session of any length keeps in memory."""
ALL_LINES = Closed((1 << 62) - 1, 0, "")
"""An end after every line. A reader that is given it does not wait for the newest millisecond to settle."""


@dataclass(frozen=True, slots=True)
class Session:
    """A session read whole. It takes several times the memory of its files; `SessionReader` takes a few MB for any."""

    header: Event
    events: list[Event]
    """All events, the header first."""
    closed: Closed | None
    """Its end, or that of a run that rests; None while it is open, and after a crash until it was found dead."""

    def records(self, signal: Signal) -> list[Record]:
        """The events as the records of one signal, with those of the session's end if it has ended."""
        fold = mapper(signal, self.header)
        return [*fold.map(self.events), *(fold.finish(self.closed) if self.closed else fold.release())]


class SessionReader(AbstractContextManager["SessionReader"]):
    """One session, open to be read from its beginning. A context manager; its files are open as long as its block.

    Args:
        path: Where the session lies.
        state_directory: Where delivery keeps its cursors if it may not write to the journal, for the end of the session
            may be recorded there.

    Raises:
        OSError: The files cannot be opened.
        JournalError: There is no header that can be read, or a newer version wrote it.

    """

    def __init__(self, path: SessionPath, state_directory: Path | None = None) -> None:
        self.path = path
        self._reader = JournalReader(path)
        self.header = self._reader.header
        self.closed = read_closed(path.path) or read_closed(state_path(path, state_directory))
        """The end of the session, if it is known."""

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def batches(self, size: int = READ_BYTES) -> Iterator[EventBatch]:
        """The events in order, up to the session's end or else the last whole line. Memory is bounded by `size`.

        Args:
            size: Journal bytes of a batch, about; a batch ends between two milliseconds, so it may be larger.

        Raises:
            OSError: A segment cannot be read.

        """
        return read_batches(self._reader, Position(), closed=self.closed or ALL_LINES, size=size)

    def status(self, boot_id: str) -> str:
        """How the session ended: as `closed.json` has it, else as its run did.

        One whose run has not ended is "interrupted" if its writer is dead, else "running".

        Args:
            boot_id: This host's boot. The lock of a session of the same boot tells whether its writer lives; any other
                session counts as dead after 15 minutes of silence.

        Raises:
            OSError: The files cannot be listed.
            JournalError: They were removed since the session was opened.

        """
        if self.closed is not None:
            return self.closed.status
        ended = read_resting(self.path.path)
        if ended is not None:
            return ended
        dead = writer_is_dead(self.path, self.header, boot_id=boot_id, dead_after=DEAD_AFTER_S)
        return "interrupted" if dead else "running"


def read_session(path: SessionPath) -> Session:
    """A whole session, for one that is known to be small.

    Raises:
        OSError: The files cannot be read.
        JournalError: There is no header that can be read, or a newer version wrote it.

    """
    with SessionReader(path) as reader:
        events = [event for batch in reader.batches() for event in batch.events]
        closed, ended = reader.closed, read_resting(path.path)
        if closed is None and ended is not None:
            closed = Closed(events[-1]["seq"], events[-1]["ts"], ended)
        return Session(reader.header, events, closed)


def read_batches(
    reader: JournalReader, start: Position, *, closed: Closed | None, size: int = READ_BYTES
) -> Iterator[EventBatch]:
    """The batches from a position on, up to where nothing more can be read now. There is at least one, maybe empty.

    Args:
        reader: The session.
        start: Where to begin; the `position` of the last batch is where to go on later.
        closed: The end of the session. None: it may grow, and the newest millisecond waits until it has settled.
        size: Journal bytes of a batch, about.

    """
    while True:
        batch = reader.read(start, size=size, closed=closed)
        yield batch
        if batch.at_end or not batch.events:
            return
        start = batch.position


def state_path(path: SessionPath, state_directory: Path | None) -> Path:
    """Where delivery keeps the cursors of a session: in the session itself, or in its folder of a state directory."""
    return state_directory / path.path.name if state_directory else path.path


def job_folder(path: Path) -> str:
    """The name of the job's folder that a session at `path` lies in; "" for one that lies too high to be in any.

    It is the job's id where that is a harmless file name; the true id stands in the header.
    """
    parents = path.absolute().parents
    return parents[1].name if len(parents) > 1 else ""
