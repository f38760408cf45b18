"""Which steps of loops go on, in what, and until when: the rules of loops that are left, held, nested or side by side.

`step_loop` has what is known of one loop, and why that is little. Here is what follows from it:

    something follows the last thing in a step   the step may have been left then; it goes on if its loop asks for more
    a loop asks within another one's step        its step lies in that one, or goes on side by side with it (`zip`)
    a step ends                                  at its own end, or where its loop was left
"""

from __future__ import annotations

from collections.abc import Callable

from stepspan.recording.scope import AdjacentStep, Scope, has_begun_here
from stepspan.recording.step_loop import EVALUATION, EVALUATION_SPANS, NESTED, StepLoop


class OpenLoops:
    """The loops of a run, as long as they have an open step.

    Args:
        close: Closes a scope alone, with the exception that leaves it.

    Attributes:
        begun: How many steps of loops have begun.
        adjacent: The open steps that go on side by side with another loop's, by themselves.
        maybe_left: Steps of loops that were left, or that something followed: to be ended with the run at the latest.

    """

    def __init__(self, close: Callable[[Scope, BaseException | None], None]) -> None:
        self.begun = 0
        self.adjacent: dict[Scope, AdjacentStep] = {}
        self.maybe_left: dict[Scope, None] = {}
        self._close = close

    def forget(self) -> None:
        """In a forked child: what the parent has open is not ours to end."""
        self.adjacent.clear()
        self.maybe_left.clear()

    def follow(self, loop: StepLoop, by: int) -> None:
        """Something follows the last thing in a loop's step, and in those that go on side by side with it.

        Args:
            loop: The loop.
            by: `NESTED` or `EVALUATION`.

        """
        if loop.step is None:  # it has ended, and what lies in it goes on
            return
        loop.follow(by)
        self.maybe_left[loop.step] = None
        for step in list(self.adjacent.values()):
            if step.adjacent_to is loop.step and step.loop is not None:
                step.loop.ts = max(step.ts, loop.maybe_left_at)
                step.loop.follow(by)
                self.maybe_left[step] = None

    def ends_before(self, scope: Scope, parent: Scope, loop: StepLoop) -> bool:
        """Note that a scope begins within a loop's step, or after the loop was left.

        Args:
            scope: What begins.
            parent: The innermost scope, which lies in the loop's step, or is it.
            loop: The loop.

        Returns:
            Whether the step has ended, now, because the loop was left before an evaluation.

        """
        if scope.tag == "span":
            if scope.begin.get("name") in EVALUATION_SPANS:
                self.follow(loop, EVALUATION)
            return False
        step, inner, split = loop.step, parent, scope.split or ""
        while inner.tag == "epoch" and inner.parent is not None:
            inner = inner.parent
        if scope.tag == "step" and split == loop.split and loop.followed == EVALUATION and inner is step:
            for adjacent in list(self.adjacent.values()):
                if adjacent.adjacent_to is step:
                    self._close(adjacent, None)
            self._close(step, None)
            return True
        self.follow(loop, NESTED if scope.tag == "epoch" or loop.has(split) else EVALUATION)
        return False

    def find_adjacent(self, loop: StepLoop, inner: Scope | None, begun: int) -> Scope | None:
        """The step of another loop that the next one of this loop goes on side by side with.

        That is one which is asked by the same instruction, or has begun after this loop: a loop that begins within
        another one's step is nested in it, and so is one whose data the other's steps are. In an evaluation's split
        only a step that follows at once goes on side by side: others are an evaluation within it.

        Args:
            loop: It has no open step.
            inner: The innermost scope.
            begun: How many steps of loops had begun when it asked for its batch.

        """
        found = None
        while inner is not None and inner.loop is not None:
            other: StepLoop = inner.loop
            step: Scope | None = other.step
            if step is None or other.step_order <= loop.created or other.feeds is loop:
                break
            if other.step_order > begun:
                other.feeds = loop
                break
            if not loop.is_asked_with(other) and (
                other.step_order <= loop.order or (loop.is_evaluation and other.ts != step.ts)
            ):
                break
            found, inner = step, step.parent
        return found

    def end_of(self, scope: Scope, error: BaseException | None) -> tuple[int, BaseException | None]:
        """When a scope ends that its loop may have left before, and by what.

        Args:
            scope: What is being closed.
            error: The exception that comes by.

        Returns:
            The time, Unix ns, 0: now; and the exception, if it is one that leaves the scope and has not come after it.

        """
        loop, ended = scope.loop, scope.abandoned_at
        if loop is not None and loop.step is scope and loop.maybe_left_at:
            if error is not None and loop.followed == EVALUATION and not ended:
                error = None  # it has come by after the loop
            if (error is None and not (ended and loop.followed == NESTED)) or not (ended or loop.followed):
                ended = loop.maybe_left_at if loop.followed else max(loop.maybe_left_at, loop.ts)
            if error is not None:
                loop.go_on()  # until this
        return ended, error

    def close_within(self, scope: Scope, error: BaseException | None) -> None:
        """Close the steps that go on side by side within a scope; with the run, all that may have been left.

        Args:
            scope: What is being closed.
            error: The exception that leaves it.

        """
        if self.adjacent:
            for step in list(self.adjacent.values()):
                if step.parent is scope and has_begun_here(step):
                    self._close(step, error)
        if scope.tag == "run":
            for left in list(self.maybe_left):  # in threads that nothing was recorded in since
                if left.session is not None:
                    self._close(left, None)

    def has_ended(self, scope: Scope) -> None:
        """Forget a scope, if it is a loop's step."""
        loop = scope.loop
        if loop is not None and loop.step is scope:
            loop.step = None
            if self.maybe_left:
                self.maybe_left.pop(scope, None)
        if scope.detached:
            self.adjacent.pop(scope, None)

    def end_abandoned(self) -> None:
        """End the detached steps of this thread whose loop was left: no scope around them will notice soon."""
        for step in list(self.adjacent.values()):
            if step.abandoned_at and has_begun_here(step):
                self._close(step, None)
