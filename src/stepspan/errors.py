"""Every error that stepspan raises. Only `start_run`, constructors and commands raise; nothing raises into training.

StepspanError
├── ConfigError        an argument, variable or file entry is wrong (also a ValueError)
├── RecordError        a record or file of another system is not as its schema says (also a ValueError)
└── JournalError       a journal cannot be read or written as asked
    ├── NewerSchema    it was written by a newer major version of stepspan
    └── Damaged        a line, cursor or checkpoint whose checksum does not hold
"""

from __future__ import annotations

from typing import Protocol

MAX_REPR_CHARS = 120


class Warn(Protocol):
    """Where that goes which must not be raised. A run's counts it, and logs the first of each kind and key."""

    def __call__(self, kind: str, message: str, *, key: str = "") -> None:
        """Take what went wrong.

        Args:
            kind: What is counted together.
            message: What happened, and the fix.
            key: What tells this cause from others of its kind.

        """


class StepspanError(Exception):
    """The root of the tree."""


class ConfigError(StepspanError, ValueError):
    """A setting is wrong.

    Args:
        field: Which one: an argument, or a variable or a key of the settings file.
        value: What it was.
        fix: What to write instead.

    """

    def __init__(self, field: str, value: object, fix: str) -> None:
        self.field = field
        self.value = value
        self.fix = fix
        super().__init__(f"{field}={short_repr(value)}: {fix}")


class JournalError(StepspanError):
    """A journal cannot be read or written as asked."""


class NewerSchema(JournalError):
    """The journal's major schema version is newer than this stepspan reads."""

    def __init__(self, path: str, found: object, known: int) -> None:
        self.path = path
        self.found = found
        super().__init__(f"{path}: journal schema {found}, this stepspan reads up to {known}: upgrade stepspan")


class Damaged(JournalError):
    """Bytes whose checksum or form does not hold."""


class RecordError(StepspanError, ValueError):
    """A record or file is not as the schema says.

    Args:
        problem: What is wrong, in words that name the fields.
        fields: The names of the fields that it is about.
        where: File and line.

    """

    def __init__(self, problem: str, *fields: str, where: str = "") -> None:
        self.problem = problem
        self.fields = fields
        self.where = where
        super().__init__(f"{where}: {problem}" if where else problem)

    def at(self, where: str) -> RecordError:
        """The same error with its place.

        Args:
            where: File and line.

        """
        return RecordError(self.problem, *self.fields, where=where)


def short_repr(value: object, limit: int = MAX_REPR_CHARS) -> str:
    """A value as an error message shows it: its `repr`, cut at `limit` characters. Never raises."""
    try:
        shown = repr(value)
    except Exception as error:  # a user's object may fail in any way, and the error about it must not
        shown = f"<{type(value).__name__}: {type(error).__name__} in __repr__>"
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."
