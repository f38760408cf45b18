"""Exits, noted as the program asks for them: what ends a process knows no exception once it has left the last frame.

An exit that leaves a `with` is seen there. For a run that is closed by its process `sys.exit`, `exit` and `quit` say
beforehand what they are going to raise; they do what they did, and cost nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any


def note_exits(note: Callable[[SystemExit], None]) -> None:
    """Have each exit noted before it is raised. To be called once in a process.

    Args:
        note: Called with the exit; what it raises is lost.

    """
    sys.exit = _noting(sys.exit, note, 0)
    if site := sys.modules.get("_sitebuiltins"):  # `exit` and `quit`
        site.Quitter.__call__ = _noting(site.Quitter.__call__, note, 1)


def _noting(leave: Callable[..., Any], note: Callable[[SystemExit], None], first: int) -> Any:
    """`leave`, whose argument number `first` is the exit code."""

    @wraps(leave)
    def noting(*args: Any, **named: Any) -> Any:
        with suppress(Exception):
            error = SystemExit(*(args[first:] or named.values()))
            error.__context__ = sys.exc_info()[1]  # `except KeyboardInterrupt: sys.exit(1)`
            note(error)
        return leave(*args, **named)

    return noting
