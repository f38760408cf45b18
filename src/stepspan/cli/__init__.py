"""The command line: one file a command, imported when it is called."""

from __future__ import annotations

import sys


def main() -> None:
    """`stepspan`."""
    from stepspan.cli.app import app
    from stepspan.errors import StepspanError

    try:
        app(prog_name="stepspan")
    except StepspanError as error:
        print(f"stepspan: {error}", file=sys.stderr)
        sys.exit(2)
