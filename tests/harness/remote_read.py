"""Prometheus' remote read, the one interface that tells a NaN from the markers that end a series.

PromQL drops the markers, and `promtool tsdb dump` prints every NaN alike. Remote read gives all bits of a float but the
sign of a zero (Go's protobuf omits a field that compares equal to zero); PromQL has that one. It speaks protobuf
(prompb/remote.proto, prompb/types.proto) in a snappy block; its messages are few and not published for Python, so they
are read here by field number.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator
from typing import Any


def request(label: str, value: str) -> bytes:
    """The body of a request for everything with label = value, from 1970 to the year 33658."""
    matcher = _nested(2, label.encode()) + _nested(3, value.encode())
    query = _varint(2 << 3) + _varint(10**15) + _nested(3, matcher)
    return _snappy_literal(_nested(1, query))


def samples(response: bytes) -> Iterator[tuple[str, int, str]]:
    """(series, t_ms, value) of each float and each integer native histogram in the body of a response."""
    for _, result in _fields(_snappy_decode(response)):
        for _, series in _fields(result):
            parts = _repeated(series)
            labels = sorted((pair[1].decode(), pair[2].decode()) for pair in map(dict, map(_fields, parts[1])))
            name = "{" + ", ".join(f'{label}="{value}"' for label, value in labels) + "}"
            for sample in parts[2]:
                yield name, *_float(sample)
            for sample in parts[4]:
                yield name, *_histogram(sample)


def _float(sample: bytes) -> tuple[int, str]:
    fields = dict(_fields(sample))
    return fields.get(2, 0), _exact(fields.get(1, 0.0))


def _histogram(sample: bytes) -> tuple[int, str]:
    """Buckets are told as {index: count}, and the reset hint not at all: how a histogram is divided into spans and what
    is known of resets depends on the chunk it lies in, not on what was sent."""
    fields = _repeated(sample)
    value = (
        f"count={_first(fields[1], 0)} sum={_exact(_first(fields[3], 0.0))} schema={_zigzag(_first(fields[4], 0))} "
        f"zero={_first(fields[6], 0)} threshold={_first(fields[5], 0.0)!r} "
        f"negative={_buckets(fields[8], _first(fields[9], b''))} "
        f"positive={_buckets(fields[11], _first(fields[12], b''))}"
    )
    return _first(fields[15], 0), value


def _buckets(spans: list[bytes], deltas: bytes) -> dict[int, int]:
    index = count = at = 0
    buckets = {}
    for span in map(dict, map(_fields, spans)):
        index += _zigzag(span.get(1, 0))
        for _ in range(span[2]):
            delta, at = _read_varint(deltas, at)
            count += _zigzag(delta)
            if count:
                buckets[index] = count
            index += 1
    return buckets


def _exact(value: float) -> str:
    return repr(value) if value == value else f"NaN({struct.pack('>d', value).hex()})"


# ---- protobuf


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        value: Any
        if tag & 7 == 0:
            value, at = _read_varint(message, at)
        elif tag & 7 == 1:
            (value,) = struct.unpack_from("<d", message, at)
            at += 8
        else:
            length, at = _read_varint(message, at)
            value = message[at : at + length]
            at += length
        yield tag >> 3, value


def _repeated(message: bytes) -> defaultdict[int, list[Any]]:
    values = defaultdict(list)
    for field, value in _fields(message):
        values[field].append(value)
    return values


def _first(values: list[Any], default: Any) -> Any:
    return values[0] if values else default


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7


def _zigzag(number: int) -> int:
    return number >> 1 ^ -(number & 1)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _nested(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


# ---- snappy (https://github.com/google/snappy/blob/main/format_description.txt)


def _snappy_literal(data: bytes) -> bytes:
    """A block that compresses nothing: one literal with its length in four bytes."""
    return _varint(len(data)) + b"\xfc" + struct.pack("<I", len(data) - 1) + data


def _snappy_decode(block: bytes) -> bytes:
    _, at = _read_varint(block, 0)
    decoded = bytearray()
    while at < len(block):
        tag = block[at]
        at += 1
        if tag & 3 == 0:
            length = tag >> 2
            if length >= 60:
                width = length - 59
                length = int.from_bytes(block[at : at + width], "little")
                at += width
            decoded += block[at : at + length + 1]
            at += length + 1
            continue
        if tag & 3 == 1:
            width, length, offset = 1, (tag >> 2 & 7) + 4, (tag >> 5) << 8 | block[at]
        else:
            width = 2 if tag & 3 == 2 else 4
            length, offset = (tag >> 2) + 1, int.from_bytes(block[at : at + width], "little")
        at += width
        # A copy longer than its offset repeats what it has just written.
        period = decoded[len(decoded) - offset :][:length]
        decoded += (period * (length // len(period) + 1))[:length]
    return bytes(decoded)
