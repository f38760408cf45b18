"""The public face: one sorted list, and everything on it is there."""

from __future__ import annotations

import stepspan


def test_all_is_sorted() -> None:
    assert stepspan.__all__ == sorted(stepspan.__all__)


def test_every_name_can_be_imported() -> None:
    assert [name for name in stepspan.__all__ if getattr(stepspan, name, None) is None] == []
