"""The events of a run and their JSON line: the schema of the journal.

An event is a plain dict, because it is made in the training thread: no class is built and nothing is copied on its way
to the disk. Whoever makes one leaves `ts` and `seq` at 0; the journal's writer fills them in under its lock. Every
begin event carries `parent`, the `seq` of the begin line it lies in (0: none), every end event `begin`, its own one's.

Numbers that JSON has no word for are written as proto3 JSON does: "NaN", "Infinity", "-Infinity".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias
from zlib import crc32

import orjson

from stepspan.errors import Damaged
from stepspan.values import json_value

SCHEMA_MAJOR = 1
SCHEMA = "1.0"

Event: TypeAlias = dict[str, Any]

FIELDS: Mapping[str, str] = {
    "header": "schema, session, run_key, job_id, rank, role, started, boot_id, pid, host, resource",
    "run_begin": "parent, name, group, tags, attempt",
    "run_end": "begin, status",
    "epoch_begin": "parent, epoch",
    "epoch_end": "begin, status?",
    "step_begin": "parent, step, split, epoch?, lap?",
    "step_end": "begin, status?, data_wait? (s), samples?, tokens?, ended? (ns, where the line was written later)",
    "span_begin": "parent, name, collective?, cuda? (its time on the device follows), attributes?",
    "span_end": "begin, status?",
    "device_time": "begin, seconds (null: not known); written when the device has got there",
    "metrics": "step?, split, attributes?, metrics {key: number; null: follows}, at? (`ts` of the line it follows)",
    "hyperparams": "params {key: value}",
    "artifact": "name, path, kind, step?",
    "event": "parent, name, status?, severity?, attributes?",
    "error": "parent, type, message, stack, attributes",
    "log": "parent, severity, logger, message, attributes, exception? {type, message, stack}",
    "progress": "total_steps",
    "sample": "source, values [[name, value, {attribute: value}?], ...]",
    "memory": "device_id, counters {name: bytes}",
    "otel": "parent?, signal, scope, schema_url?, record: what an OpenTelemetry SDK handed over, as OTLP JSON",
    "gap": "dropped, why: so many events before this one could not be written",
}
"""Tag -> the tag's own fields, beside `ts` (Unix ns), `seq` and `crc`. `?`: left out where there is nothing to say.

A reader passes over tags and fields that it does not know: they come with minor versions of the schema."""

NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(event: Event) -> bytes:
    """One event as its line. The CRC-32 covers all bytes before `,"crc":`."""
    try:
        body = orjson.dumps(event)[:-1]
    except TypeError:  # an object, a huge integer, a lone surrogate: text keeps it
        body = orjson.dumps(json_value(event))[:-1]
    return b'%b,"crc":%d}\n' % (body, crc32(body))


def decode(line: bytes) -> Event:
    """The event of a line without its newline; raises `Damaged`."""
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
    """The events of lines that are numbered from `seq` + 1 on, whole and in order; None where any of them is not.

    For the usual case, at two thirds of the cost of `decode` for each.
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
