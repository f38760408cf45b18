"""`python -m stepspan`."""

from stepspan.cli import main

main()
