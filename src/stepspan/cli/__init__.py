"""The command line: `app` declares the commands; what each does is in a module that is imported when it is called."""

from __future__ import annotations

import sys


def main() -> None:
    """Run `stepspan` with the arguments of this process. Exit code 2 and a message where an argument is wrong."""
    from stepspan.cli.app import app
    from stepspan.errors import StepspanError

    try:
        app(prog_name="stepspan")
    except StepspanError as error:
        print(f"stepspan: {error}", file=sys.stderr)
        sys.exit(2)
