"""What is printed to a terminal: lines of any text, and tables without a cut cell.

A journal holds what others wrote, so no text reaches a terminal except through `printable`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import accumulate

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepspan.cli.event_text import printable

GAP_COLUMNS = 2
"""Columns of the terminal between two of a table."""
SHORT_ID_CHARS = 8
PIPED_COLUMNS = 240
"""The width of a page where there is no terminal."""


def stdout_console() -> Console:
    """Standard output, as wide as the terminal."""
    return Console(width=None if sys.stdout.isatty() else PIPED_COLUMNS, highlight=False)


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print a line of any text; a terminal wraps it."""
    console.print(Text(printable(text), style=style), soft_wrap=True)


def print_table(
    console: Console, columns: Sequence[str], rows: Iterable[Sequence[object]], *, keys: Sequence[str]
) -> None:
    """Print a table; columns that do not fit beside the others follow below them, so that no cell is cut.

    Args:
        console: Where to, and how wide.
        columns: Their names; one that begins with `>` is flush right. A column without any value is left out.
        rows: A value for each column; None leaves the cell empty.
        keys: The columns that are repeated in each part.

    """
    cells = [["" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    names = [name.lstrip(">") for name in columns]
    kept = [n for n in range(len(names)) if any(row[n] for row in cells)]
    widths = {n: GAP_COLUMNS + max(cell_len(text) for text in (names[n], *(row[n] for row in cells))) for n in kept}
    repeated = [n for n in kept if names[n] in keys]
    others = [n for n in kept if n not in repeated]
    width = console.width + GAP_COLUMNS - sum(widths[n] for n in repeated)
    while others:
        fitting = sum(end <= width for end in accumulate(widths[n] for n in others)) or 1
        part = sorted([*repeated, *others[:fitting]])
        others = others[fitting:]
        table = Table(box=None, header_style="dim", pad_edge=False)
        for n in part:
            table.add_column(names[n], justify="right" if columns[n].startswith(">") else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text(row[n]) for n in part))
        console.print(table)
        if others:
            console.print()


def rank_label(rank: int, role: str) -> str:
    """A rank as it is shown: "3", or "3.worker1" for a process with a role of its own."""
    return f"{rank}.{role}" if role else str(rank)


def short_id_length(sessions: Iterable[str]) -> int:
    """How many characters of sessions' ids tell them from each other."""
    ids = set(sessions)
    unique = len({session[:SHORT_ID_CHARS] for session in ids}) == len(ids)
    return SHORT_ID_CHARS if unique else max(map(len, ids))
