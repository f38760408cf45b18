r"""A line of the journal: an event of `stepspan.events` as JSON with a checksum of its own.

    {"ts":1760000000001000000,"seq":7,"tag":"metrics",...,"crc":3735928559}\n

`crc` is the CRC-32 of all bytes of the line before `,"crc":`. It comes last, so that a line which was cut anywhere, or
in which a bit has flipped, is recognised without reading another one. Numbers that JSON has no word for are written as
proto3 JSON does (`stepspan.values.json_number`).

A reader passes over tags and fields that it does not know: they come with minor versions of the schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import orjson

from stepspan.conversion import json_value
from stepspan.errors import Damaged
from stepspan.events import Event


def encode(event: Event) -> bytes:
    """One event as its line, the newline included.

    Args:
        event: Objects that JSON can't hold (a user's, a huge integer, a lone surrogate) are written as text.

    Returns:
        The bytes that one `write(2)` puts into a segment.

    """
    try:
        body = orjson.dumps(event)[:-1]
    except TypeError:  # an object, a huge integer, a lone surrogate: text keeps it
        body = orjson.dumps(json_value(event))[:-1]
    return b'%b,"crc":%d}\n' % (body, crc32(body))


def template(tag: str, rest: bytes) -> bytes:
    """What an event of one kind is but for its numbers and its checksum: `template % (ts, seq, …)`, and then the rest.

    Args:
        tag: Of the event.
        rest: Its other fields as JSON, from a comma on, with a `%d` or `%b` for each that differs from event to event.

    Returns:
        The template; `from_template` gives the event of it.

    """
    return b'{"ts":%%d,"seq":%%d,"tag":%b%b' % (orjson.dumps(tag), rest)


def from_template(template: bytes, *values: int | bytes) -> Event:
    """The event that a template and its values are.

    Args:
        template: As `template` gives it.
        values: `ts`, `seq` and those of its own.

    """
    event: Event = orjson.loads(template % values + b"}")
    return event


def decode(line: bytes) -> Event:
    """The event of a line.

    Args:
        line: The line without its newline.

    Returns:
        The event; `ts` and `seq` are integers and `tag` is text, nothing else is checked.

    Raises:
        Damaged: The checksum does not hold, or it is not a line of a journal.

    """
    body, mark, tail = line.rpartition(b',"crc":')
    try:
        if mark and crc32(body) == int(tail[:-1]):
            event: Event = orjson.loads(line)
            if type(event["seq"]) is int and type(event["ts"]) is int and type(event["tag"]) is str:
                return event
    except (ValueError, KeyError):
        pass
    raise Damaged(f"not a journal line: {line[:60]!r}")


def decode_sequence(lines: Sequence[bytes], seq: int) -> list[Event] | None:
    """The events of consecutive lines, at two thirds of what `decode` costs for each: the usual case of a reader.

    Args:
        lines: Whole lines, numbered from `seq` + 1 on, each with its newline or without.
        seq: The number of the line before them.

    Returns:
        Their events; None where any line is damaged, missing or out of order: then `decode` says which.

    """
    ts = 0
    try:
        events: list[Event] = orjson.loads(b"[%b]" % b",".join(lines))
        for line, event in zip(lines, events, strict=True):
            seq, before, ts = seq + 1, ts, event["ts"]
            if event["seq"] != seq or ts <= before or type(event["tag"]) is not str:
                return None
            if event["crc"] != crc32(line.rpartition(b',"crc":')[0]):
                return None
    except (ValueError, KeyError, TypeError):
        return None
    return events
