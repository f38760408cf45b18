"""An event and its line: what goes in comes out, a changed byte is seen, and no value can stop the telemetry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepspan.conversion import MAX_NESTING, json_value
from stepspan.errors import Damaged
from stepspan.events import Event
from stepspan.journal.format import decode, encode
from stepspan.values import NONFINITE, json_number

text = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=20,
).filter(lambda value: not (isinstance(value, float) and math.isinf(value)))


def event(**fields: Any) -> Event:
    return {"ts": 1_795_262_400_000_000_000, "seq": 7, "tag": "event", **fields}


def finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    return all(map(finite, value)) if isinstance(value, list) else True


@given(json_values.filter(finite))
def test_what_json_can_say_comes_back_as_it_was(value: Any) -> None:
    line = encode(event(name=value))
    found = decode(line[:-1])
    assert isinstance(found.pop("crc"), int)
    assert found == event(name=value)
    assert line.count(b"\n") == 1


@given(st.floats())
def test_a_metric_keeps_its_bits(value: float) -> None:
    stored = decode(encode(event(metrics={"loss": json_number(value)}))[:-1])["metrics"]["loss"]
    back = NONFINITE[stored] if isinstance(stored, str) else stored
    assert (math.isnan(value) and math.isnan(back)) or (
        value == back and math.copysign(1, value) == math.copysign(1, back)
    )


def test_the_line_is_json_with_the_crc_last() -> None:
    assert encode({"ts": 1, "seq": 2, "tag": "event", "name": "x"}) == (
        b'{"ts":1,"seq":2,"tag":"event","name":"x","crc":1305591440}\n'
    )


def test_every_change_of_one_byte_is_seen() -> None:
    line = encode(event(name="checkpoint", attributes={"crc": 17, ',"crc":': 0.5}))[:-1]
    assert decode(line)
    for position, byte in enumerate(line):
        for other in range(256):
            if other != byte:
                with pytest.raises(Damaged):
                    decode(line[:position] + bytes([other]) + line[position + 1 :])


def test_every_cut_is_seen() -> None:
    line = encode(event(name="checkpoint"))[:-1]
    for length in range(len(line)):
        with pytest.raises(Damaged):
            decode(line[:length])


def sealed(content: Any) -> bytes:
    """A line with a right checksum and a wrong content."""
    return encode(content)[:-1]


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\0" * 4096, id="zeros, as a power cut leaves them"),
        pytest.param(b'{"ts":1,"loss":0.5}', id="somebody else's JSON"),
        pytest.param(b'{"ts":1,"crc":"0"}', id="a checksum that is text"),
        pytest.param(b',"crc":0}', id="nothing but a checksum that holds"),
        pytest.param(sealed({"seq": 1, "tag": "event"}), id="without a time"),
        pytest.param(sealed({"ts": 1, "tag": "event"}), id="without a number"),
        pytest.param(sealed({"ts": 1, "seq": 1}), id="without a tag"),
        pytest.param(sealed({"ts": 1, "seq": "1", "tag": "event"}), id="a number that is text"),
        pytest.param(sealed({"ts": 1.5, "seq": 1, "tag": "event"}), id="a time that is a fraction"),
        pytest.param(sealed({"ts": 1, "seq": True, "tag": "event"}), id="a number that is a boolean"),
        pytest.param(sealed({"ts": 1, "seq": 1, "tag": []}), id="a tag that is a list"),
    ],
)
def test_what_is_no_journal_line_is_damaged(line: bytes) -> None:
    with pytest.raises(Damaged, match="not a journal line"):
        decode(line)


class Rude:
    def __str__(self) -> str:
        raise RuntimeError("no")


@dataclass
class Config:
    lr: float


class Tensorlike:
    def __str__(self) -> str:
        return "tensor(1.)"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param("\ud800lone", "?lone", id="lone surrogate"),
        pytest.param({"\udfff": 1}, {"?": 1}, id="lone surrogate in a key"),
        pytest.param(2**70, "1180591620717411303424", id="integer beyond 64 bits"),
        pytest.param(-(2**63), -(2**63), id="smallest integer"),
        pytest.param({1: "a", None: "b", (2, 3): "c"}, {"1": "a", "None": "b", "(2, 3)": "c"}, id="keys"),
        pytest.param(Tensorlike(), "tensor(1.)", id="object"),
        pytest.param(Rude(), "<Rude: RuntimeError in __str__>", id="object that raises"),
        pytest.param({Rude(): 1}, {"<Rude: RuntimeError in __str__>": 1}, id="key that raises"),
        pytest.param((1, [2, (3,)]), [1, [2, [3]]], id="tuples"),
        pytest.param({"layers"}, ["layers"], id="set"),
        pytest.param(b"\xff", "b'\\xff'", id="bytes"),
        pytest.param(math.nan, "NaN", id="nan"),
        pytest.param([math.inf, -math.inf], ["Infinity", "-Infinity"], id="inf"),
        pytest.param(np.float64("nan"), "NaN", id="numpy nan"),
        pytest.param(np.float64(0.5), 0.5, id="numpy double"),
        pytest.param(True, True, id="boolean"),
        pytest.param(Config(0.1), {"lr": 0.1}, id="dataclass"),
    ],
)
def test_plain_takes_anything(value: Any, expected: Any) -> None:
    assert json_value(value) == expected
    assert type(json_value(value)) is type(expected)
    assert orjson.loads(orjson.dumps(json_value(value))) == expected


@pytest.mark.parametrize("value", [object(), 2**70, "\ud800", Rude(), {Rude(): {1: 2}}, {1, 2}])
def test_a_line_is_made_of_anything(value: Any) -> None:
    assert decode(encode(event(params={"x": value}))[:-1])["params"] == json_value({"x": value})


def nest(levels: int) -> Any:
    value: Any = "core"
    for level in range(levels):
        value = {"in": value} if level % 2 else [value]
    return value


@pytest.mark.parametrize("levels", [1, MAX_NESTING - 1, MAX_NESTING + 1, 250, 300, 900, 5000])
def test_deep_nesting_ends_as_text(levels: int) -> None:
    found = decode(encode(event(params=json_value(nest(levels))))[:-1])["params"]
    depth = 0
    while not isinstance(found, str):
        found = found["in"] if isinstance(found, dict) else found[0]
        depth += 1
    assert depth == min(levels, MAX_NESTING)


def test_nesting_too_deep_for_the_encoder_is_no_error() -> None:
    assert decode(encode(event(params=nest(300)))[:-1])["params"] == json_value({"params": nest(300)})["params"]


def test_what_contains_itself_twice_ends() -> None:
    loop: list[Any] = []
    loop += [loop, loop]
    assert json_value(loop) == ["[cut: contains itself]"] * 2


def test_a_huge_value_is_one_line() -> None:
    params = {"vocabulary": "x" * 10_000_000}
    line = encode(event(params=params))
    assert len(line) > 10_000_000
    assert decode(line[:-1])["params"] == params
