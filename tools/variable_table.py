"""Writes docs/variables.md, what each variable of OpenTelemetry does, from `stepspan.otlp.variable_table`.

python tools/variable_table.py
"""

from __future__ import annotations

from pathlib import Path

from stepspan.otlp.variable_table import OTLP, PARTS, TABLE, Variables

SIGNALS = "\\|".join(part for part in PARTS if part)
"""With the bar escaped, as a table of Markdown wants it."""
PAGE = Path(__file__).parents[1] / "docs" / "variables.md"
HEAD = """# Variables of OpenTelemetry

What each variable of OpenTelemetry's specification does here, or why nothing. This page is made from
`src/stepspan/otlp/variable_table.py` by `python tools/variable_table.py`; a test holds it to that. `stepspan doctor`
names those that are set and have no effect. stepspan's own variables are in the README, *Settings*, and in
`stepspan/config.py`.

**None of them keeps training from starting.** Quotes and space around a value are none of it (`docker --env-file`
keeps quotes), and what has one meaning has it: `10s`, `1`, `yes`, `HTTP/JSON`. A word that says nothing counts as
unset, with a warning, and `stepspan doctor` fails on it. Where going on would send data to a wrong place, or in a
wrong way, the signal is held: a warning names the variable and the fix, the journal keeps everything, `doctor` and
`sync` fail, and with the right value `stepspan sync` sends it all. Only what `start_run` is given as an argument, or
as a `STEPSPAN_*` variable that would be wrong on any machine, raises.

A variable of one signal goes before the general one. `OTEL_TRACES_EXPORTER=none` switches traces off, whatever else
is set, and a wrong variable of a signal that is off says nothing.
"""


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for title, honoured in (("Honoured", True), ("Without effect", False)):
        rows = [f"| {_names(row)} | {row.text} |" for row in TABLE if row.honoured is honoured]
        parts += [f"## {title}\n", "| variable | |", "|---|---|", *rows, ""]
    return "\n".join(parts)


def _names(row: Variables) -> str:
    """The names of a row, the four of OTLP that differ in the signal as one."""
    names = list(row.names)
    shown = []
    while names:
        name = names[0]
        family = {name.replace(OTLP, f"{OTLP}{part}", 1) for part in PARTS}
        if name.startswith(OTLP) and family <= set(names):
            names = [each for each in names if each not in family]
            shown.append(f"`{OTLP}[{SIGNALS}]{name.removeprefix(OTLP)}`")
        else:
            names.remove(name)
            shown.append(f"`{name}`")
    return ", ".join(shown)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
