"""The lines that are written most often, as templates: the journal fills in what differs from one to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orjson import dumps

from stepspan.journal.format import template
from stepspan.recording.steps_in_force import TRAIN

if TYPE_CHECKING:
    from stepspan.recording.scope import Scope

LINES_OF_ENDS = {tag: template(f"{tag}_end", b',"begin":%d%b') for tag in ("epoch", "step", "span")}
"""Tag -> the line of a scope's end: takes `begin` and what else there is to say, as JSON from a comma on."""


class LastStep:
    """The last step of a split: steps that follow in the same epoch and lap differ in their numbers alone.

    Attributes:
        line: A line of such a step's begin: takes `parent` and `step`.
        parent: The scope that it lies in, where that is no loop's and this thread's own.

    """

    __slots__ = ("epoch", "lap", "line", "number", "parent", "split")

    def __init__(self, split: str, epoch: int | None, lap: int) -> None:
        self.split = split
        self.parent: Scope
        self.epoch = epoch
        self.lap = lap
        self.number = -1
        same = {"split": split, **({} if epoch is None else {"epoch": epoch}), **({"lap": lap} if lap else {})}
        self.line = template("step_begin", b',"parent":%d,"step":%d,' + dumps(same)[1:-1].replace(b"%", b"%%"))


class LinesOfMetrics(dict[str | None, bytes]):
    """A split, or None -> a line of its metrics, which takes `step` and the values.

    Args:
        rest: Of the line.

    """

    def __init__(self, rest: bytes) -> None:
        self._rest = rest

    def __missing__(self, split: str | None) -> bytes:
        named = dumps(split or TRAIN).replace(b"%", b"%%")
        line = self[split] = template("metrics", b',"split":%b,"step":%%d%b,"metrics":%%b' % (named, self._rest))
        return line
