"""docs/events.md says what `stepspan.events` says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

TOOL = Path(__file__).parents[1] / "tools" / "event_table.py"


def test_the_page_of_events_is_made_from_their_classes() -> None:
    spec = importlib.util.spec_from_file_location("event_table", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run `python tools/event_table.py`"
