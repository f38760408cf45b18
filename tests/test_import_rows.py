"""Rows of JSON, as the readers of the four systems share them: positions, torn lines, and what values are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from stepspan.compat.rows import first_row, parse_row, read_json, read_rows, row_index, row_number, unix_ns
from stepspan.errors import RecordError


def test_rows_come_with_the_numbers_of_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \n{"a": NaN}\r\n{"a": "\xc3\xa4"}')
    (first, second, third) = read_rows(path)
    assert (first, third) == ((1, {"a": 1}), (5, {"a": "ä"}))
    assert second[0] == 4
    assert math.isnan(second[1]["a"])


@pytest.mark.parametrize("torn", [b'{"a": ', b"{", b'{"a": "\xc3', b'{"a": 1'], ids=["value", "brace", "letter", "end"])
def test_a_torn_last_line_is_left_out(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + torn)
    assert list(read_rows(path)) == [(1, {"a": 1})]
    path.write_bytes(b'{"a": 1}\n' + torn + b"\n")
    with pytest.raises(RecordError, match=r"rows\.jsonl, line 2: not JSON: "):
        list(read_rows(path))


def test_what_is_no_object_is_refused_even_where_it_might_be_torn() -> None:
    with pytest.raises(RecordError) as refused:
        parse_row("[1]", "here", may_be_torn=True)
    assert str(refused.value) == "here: must be an object, not [1]"
    assert refused.value.where == "here"


def test_a_guess_at_a_file_never_raises(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert first_row(path) == first_row(tmp_path) == {}
    for content in (b"", b"[1]\n", b"\xff\n", b"[" * 100_000):
        path.write_bytes(content)
        assert first_row(path) == {}
    path.write_bytes(b'{"a": 1}\n{')
    assert first_row(path) == {"a": 1}


def test_a_missing_corrupt_or_other_document_counts_as_empty(tmp_path: Path) -> None:
    path = tmp_path / "document.json"
    assert read_json(path, dict) == {}
    path.write_text("{")
    assert read_json(path, list) == []
    path.write_text("[1]")
    assert read_json(path, dict) == {}
    assert read_json(path, list) == [1]


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1.0), (0.5, 0.5), (True, 1.0), (math.nan, "NaN"), (-math.inf, "-Infinity"), ("Infinity", "Infinity"),
        ("1.5", None), (None, None), ([1], None), (10**400, None),
    ],
)  # fmt: skip
def test_numbers_are_those_that_an_event_holds(value: Any, number: Any) -> None:
    assert row_number(value) == number


@pytest.mark.parametrize(
    ("value", "index"), [(0, 0), (7.0, 7), (-1, None), (True, None), (1.5, None), ("7", None), (1 << 63, None)]
)
def test_steps_epochs_and_ranks_are_whole_numbers_from_0(value: Any, index: int | None) -> None:
    assert row_index(value) == index


@pytest.mark.parametrize(
    ("seconds", "ns"),
    [
        (1_760_000_000, 1_760_000_000_000_000_000), (1_760_000_000.25, 1_760_000_000_250_000_000),
        (0, None), (-1, None), (True, None), ("1", None), (math.nan, None), (1e10, None),
    ],
)  # fmt: skip
def test_times_are_exactly_what_the_double_says(seconds: Any, ns: int | None) -> None:
    assert unix_ns(seconds) == ns
