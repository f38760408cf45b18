"""Writes docs/events.md, the schema of the journal, from the TypedDicts of `stepspan.events`.

python tools/event_table.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typing_extensions import NotRequired

from stepspan.events import BY_TAG, SCHEMA, Line

PAGE = Path(__file__).parents[1] / "docs" / "events.md"
HEAD = f"""# Events

The journal's schema, version {SCHEMA}: each tag, its fields and what they mean. This page is made from the classes in
`src/stepspan/events.py` by `python tools/event_table.py`; a test holds it to them. How an event becomes a line is in
`src/stepspan/journal/format.py`.

Each event also has its `tag`, which is the heading here. A field with `?` is left out where there is nothing to say.
Numbers that JSON has no word for are `"NaN"`, `"Infinity"` and `"-Infinity"`. A reader passes over tags and fields that
it does not know: they come with minor versions.
"""


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD, "## Every event\n", table(Line, ())]
    common = (*get_type_hints(Line), "tag")
    for tag, kind in BY_TAG.items():
        parts += [f"## {tag}\n", f"{kind.__doc__}\n", table(kind, common)]
    return "\n".join(parts)


def table(kind: type, skipped: tuple[str, ...]) -> str:
    """The fields of one class as a Markdown table."""
    rows = ["| field | type | meaning |", "|---|---|---|"]
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if name not in skipped:
            optional, meaning, shown = _parts(hint)
            rows.append(f"| `{name}`{'?' if optional else ''} | {shown} | {meaning} |")
    return "\n".join(rows) + "\n"


def _parts(hint: Any) -> tuple[bool, str, str]:
    """Whether the field may be absent, what it means, and its type in words."""
    optional = get_origin(hint) is NotRequired
    if optional:
        (hint,) = get_args(hint)
    meaning = ""
    if get_origin(hint) is Annotated:
        hint, meaning = get_args(hint)
    text = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    text = re.sub(r"typing\.Literal\['NaN', 'Infinity', '-Infinity'\]", "non-finite", text)
    text = text.replace("typing.", "").replace("dict[str, Any]", "object").replace("NoneType", "null")
    return optional, meaning, text.replace("| None", "or null").replace("|", "or").replace("None", "null")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
