"""docs/events.md says what `stepspan.events` says."""

from __future__ import annotations

from typing import get_args, get_type_hints

from harness.tools import tool_named

from stepspan.events import BY_TAG


def test_the_page_of_events_is_made_from_their_classes() -> None:
    tool = tool_named("event_table")
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run `python tools/event_table.py`"


def test_each_class_is_of_the_tag_that_it_is_listed_under() -> None:
    assert {tag: get_args(get_type_hints(kind)["tag"]) for tag, kind in BY_TAG.items()} == {
        tag: (tag,) for tag in BY_TAG
    }
