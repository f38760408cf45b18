"""Checkpoints: a mapper's state at a position, so that a restart need not read a session from its beginning.

One file beside each cursor, `<destination>.<signal>.state`: the CRC-32 of the rest in 8 hex digits, a space, and JSON
with `position`, `mapper` (the state) and a key. The key names what the state depends on: the version of the mapping,
the session, and the processors before it.

Only the deliverer that holds the destination's lock writes it, by an atomic replacement, after the cursor has moved: a
checkpoint is never ahead of its cursor. A crash leaves the old file or the new one. A file that is damaged, or whose
key is another one, counts as none: the state is then rebuilt by reading the journal, which gives the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import orjson

from stepspan.journal.cursor import Position
from stepspan.journal.layout import read_file, replace_file


class Checkpoint(NamedTuple):
    """A mapper's state when it has seen everything up to a position."""

    position: Position
    mapper: dict[str, Any]


def save_checkpoint(path: Path, checkpoint: Checkpoint, key: Mapping[str, Any]) -> None:
    """Replace the checkpoint at `path`. `key`: what it depends on, as JSON. OSError: the old one still stands."""
    content = orjson.dumps({**key, **checkpoint._asdict()})
    replace_file(path, b"%08x %b" % (crc32(content), content))


def load_checkpoint(path: Path, key: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint at `path`; None where there is none, or none that holds for this `key`."""
    checksum, _, content = (read_file(path) or b"").partition(b" ")
    try:
        if int(checksum or b"0", 16) != crc32(content):
            return None
        found = orjson.loads(content)
        if any(found[name] != value for name, value in key.items()):
            return None
        return Checkpoint(Position(**found["position"]), found["mapper"])
    except (ValueError, TypeError, KeyError):
        return None
