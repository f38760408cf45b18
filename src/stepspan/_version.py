"""The release's version, in a module of its own: what is sent names it, and must not need all of `stepspan`."""

__version__ = "0.1.0"
