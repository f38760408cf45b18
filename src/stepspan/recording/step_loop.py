"""What is known of a loop over batches: that it goes on is seen only when it asks for its next one.

A loop that is left drops its iterator, and that says when (`stepspan.recording.steps`). Where somebody holds the
iterator itself, a loop that was left looks as one that goes on. So the last thing that was recorded in its open step is
remembered as soon as something follows that is not a step's: a value of an evaluation, a span named like one, an
artifact, a milestone, a step or an epoch. If the loop asks for more after all, the step ends then. Otherwise it ends at
that last thing, once what is around it ends or, after an evaluation, once a step of its split begins.
"""

from __future__ import annotations

from typing import Any

from stepspan.mapping.names import EVALUATION_SPLITS

EVALUATION_SPANS = frozenset(
    {
        "val", "valid", "validate", "validation", "eval", "evaluate", "evaluation", "test", "testing", "predict",
        "prediction", "checkpoint", "save_checkpoint",
    }
)  # fmt: skip
"""Names of spans that follow the steps of a loop, or interrupt one."""
NESTED, EVALUATION = 1, 2
"""What may follow the last thing in a step: what lies in it, if the loop goes on, such as a step of another one; or an
evaluation, which shows more clearly that it was left."""


class StepLoop:
    """A loop over batches.

    Args:
        split: Of its steps.
        order: How many scopes of the run had begun when the loop did.

    Attributes:
        asked_from: The id of each Python frame that called for the first batch of the loop, the innermost first, and
            the instruction that it stood at; empty from the second step on.
        is_new: Whether the loop has not made a step yet.
        step: The step that is open; a `scopes.Scope`.
        step_order: How many scopes had begun when that did.
        seq: The line of the last thing that was recorded in it; the journal fills in both.
        ts: The time of that, Unix ns.
        maybe_left_at: The last thing in it before something followed, Unix ns; 0 while nothing has.
        followed: By what.
        feeds: The loop that waits for its data while steps of this one begin: these lie around that one's.

    """

    __slots__ = (
        "asked_from", "created", "feeds", "followed", "is_evaluation", "is_new", "maybe_left_at", "order", "seq",
        "split", "step", "step_order", "ts",
    )  # fmt: skip

    def __init__(self, split: str, order: int) -> None:
        self.split = split
        self.is_evaluation = split in EVALUATION_SPLITS
        self.order = self.created = order
        self.asked_from: dict[int, int] = {}
        self.is_new = True
        self.step: Any = None
        self.feeds: StepLoop | None = None
        self.seq = self.ts = self.step_order = self.maybe_left_at = self.followed = 0

    def go_on(self) -> None:
        """The loop asks for more, so it was not left."""
        self.maybe_left_at = self.followed = 0

    def follow(self, by: int) -> None:
        """Something comes after the last thing in the open step.

        Args:
            by: `NESTED` or `EVALUATION`.

        """
        self.maybe_left_at = self.maybe_left_at or self.ts
        self.followed = max(self.followed, by)

    def is_asked_with(self, other: StepLoop) -> bool:
        """Whether one instruction asks this loop and another one for their first batches: `zip`, whatever is between.

        That is so where the innermost frame which both calls come from has not moved on from one to the other.
        """
        for frame, instruction in self.asked_from.items():
            if frame in other.asked_from:
                return other.asked_from[frame] == instruction
        return False

    def has(self, split: str) -> bool:
        """Whether a value of that split may be of the step: an evaluation's is not of training, nor the other way."""
        return split == self.split or not (self.is_evaluation or split in EVALUATION_SPLITS)
