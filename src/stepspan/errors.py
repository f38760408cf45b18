"""Every error that stepspan raises. Only `start_run`, constructors and commands raise; nothing raises into training.

StepspanError
├── ConfigError        an argument, variable or file entry is wrong (also a ValueError)
├── RecordError        a record or file of another system is not as its schema says (also a ValueError)
└── JournalError       a journal cannot be read or written as asked
    ├── NewerSchema    it was written by a newer major version of stepspan
    └── Damaged        a line, cursor or checkpoint whose checksum does not hold
"""

from __future__ import annotations


class StepspanError(Exception):
    """The root of the tree."""


class ConfigError(StepspanError, ValueError):
    """A setting is wrong. Says which `field`, what `value` it had, and the `fix`."""

    def __init__(self, field: str, value: object, fix: str) -> None:
        self.field = field
        self.value = value
        self.fix = fix
        shown = repr(value)
        super().__init__(f"{field}={shown if len(shown) <= 120 else shown[:117] + '...'}: {fix}")


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
    """A record or file is not as the schema says: `problem`, which names the `fields` it is about, found at `where`."""

    def __init__(self, problem: str, *fields: str, where: str = "") -> None:
        self.problem = problem
        self.fields = fields
        self.where = where
        super().__init__(f"{where}: {problem}" if where else problem)

    def at(self, where: str) -> RecordError:
        """The same error, found at `where`."""
        return RecordError(self.problem, *self.fields, where=where)
