"""Tables for a terminal: columns that do not fit beside the others follow below them, so that every cell is whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepspan.cli.describe import printable

GAP = 2  # columns of a terminal between two of a table
SHORT = 8


def print_table(
    console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]], *, keys: Sequence[str]
) -> None:
    """Print `rows`; a column whose name begins with `>` is flush right, one without any value is left out.

    `keys` name the columns that are repeated in each part of a table that is too wide.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    names = [name.lstrip(">") for name in columns]
    kept = [n for n in range(len(names)) if any(row[n] for row in cells)]
    width = {n: GAP + max(cell_len(text) for text in (names[n], *(row[n] for row in cells))) for n in kept}
    always = [n for n in kept if names[n] in keys]
    for number, part in enumerate(_parts(kept, always, width, console.width + GAP)):
        if number:
            console.print()
        table = Table(box=None, header_style="dim", pad_edge=False)
        for n in part:
            table.add_column(names[n], justify="right" if columns[n].startswith(">") else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text(row[n]) for n in part))
        console.print(table)


def _parts(kept: Sequence[int], always: Sequence[int], width: dict[int, int], room: int) -> list[list[int]]:
    """The columns of each part: `always`, and of the others as many as there is room for, at least one."""
    room -= sum(width[n] for n in always)
    parts: list[list[int]] = [[]]
    left = room
    for n in kept:
        if n in always:
            continue
        if parts[-1] and width[n] > left:
            parts.append([])
            left = room
        parts[-1].append(n)
        left -= width[n]
    return [sorted((*always, *part)) for part in parts]


def shortened(sessions: Iterable[str]) -> int:
    """How many characters of a session's id tell it from the others."""
    whole = set(sessions)
    return SHORT if len({session[:SHORT] for session in whole}) == len(whole) else max(map(len, whole), default=SHORT)
