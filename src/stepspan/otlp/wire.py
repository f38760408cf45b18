"""Protobuf's wire format, which is small enough to stand here in full.

A message is a sequence of fields, a field is a tag (field number << 3 | wire type) and its payload:

    wire type 0  varint                        uint, int, bool, enum (sint32: zigzag first)
    wire type 1  8 bytes, little-endian        fixed64, double
    wire type 2  length as varint, then bytes  string, bytes, message, packed repeated scalars
    wire type 5  4 bytes, little-endian        fixed32
"""

from __future__ import annotations

import struct

from stepspan.otlp.rules import NAN
from stepspan.values import utf8

_UINT64 = (1 << 64) - 1
_ONE_BYTE = [bytes([number]) for number in range(128)]
_pack_double = struct.Struct("<Bd").pack


def bytes_field(tag: bytes, payload: bytes) -> bytes:
    """A field of wire type 2.

    Args:
        tag: The field's number and wire type, encoded.
        payload: Bytes, a message, or packed scalars.

    """
    length = len(payload)
    return tag + (_ONE_BYTE[length] if length < 0x80 else varint(length)) + payload


def string_field(tag: bytes, string: str) -> bytes:
    """A string field, as UTF-8; a lone surrogate becomes "?"."""
    return bytes_field(tag, utf8(string))


def double_field(tag: int, value: float) -> bytes:
    """A double field; every NaN is written as `rules.NAN`. `tag` is a single byte."""
    return _pack_double(tag, value if value == value else NAN)


def zigzag(number: int) -> bytes:
    """A sint32 as a varint that is short where the absolute value is small."""
    return varint(number << 1 ^ number >> 31)


def varint(number: int) -> bytes:
    """Seven bits a byte, lowest first; a negative number in two's complement of 64 bits."""
    if 0 <= number < 0x80:
        return _ONE_BYTE[number]
    number &= _UINT64
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
