"""Which step the values of a call belong to.

**In force** in a split that is trained in is the last step that began in it, in whatever thread. Other splits
(evaluations, and those that have no steps) take that of `train`, else that of the split that stepped last. Where
nothing is trained an evaluation's own steps count, and where nothing steps each call's `step=`; a call without one is
of the step that was given last.

**Its own** step is what a value's call says (`step=`), else the step that its code was started in: that may have ended
since, or be one of several that go on in threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from stepspan.events import Event
from stepspan.mapping.names import EVALUATION_SPLITS, split_in_key

TRAIN = "train"
MAX_KNOWN_KEYS = 10_000


StepOf: TypeAlias = tuple[str, int]
"""A step by its split and number."""


class StepsInForce:
    """The steps in force in one process. A forked child goes on from its parent's.

    Attributes:
        step: In splits that have no step of their own; None where nothing has stepped.
        leading: The split that this is of.
        differ: Whether there are splits that have one of their own.

    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.leading = ""
        self.differ = False
        self._steps: dict[str, int] = {}
        """By split: of those that are trained in or, as long as there are none, of evaluations. That of the leading
        split is brought up to date as another one's begins: until then it is `step`."""
        self._is_trained = False
        self._given: int | None = None
        """The `step=` that was given last, of training unless there was none; for where nothing has stepped."""
        self._given_in_training = False
        self.split_of_key: dict[str, str] = {}
        """Key -> the split that it names itself, or "": those that `split_of` was asked for."""

    def begin(self, split: str, number: int) -> None:
        """Put a step in force that has begun: in its split, and where that leads, in the splits without steps."""
        if split == self.leading:
            self.step = number
            return
        if self.step is not None:
            self._steps[self.leading] = self.step
        if split in EVALUATION_SPLITS:
            if self._is_trained:
                return
        elif not self._is_trained:
            self._is_trained = True
            self._steps.clear()
        self._steps[split] = number
        if split == TRAIN or TRAIN not in self._steps:
            self.leading, self.step = split, number
        self.differ = len(self._steps) > 1

    def attribute(
        self, event: Event, keys: Iterable[str], step: int | None, split: str, started_in: StepOf | None
    ) -> None:
        """Fill in the steps of a call's values, where they are known. No key is looked at where one split is stepped.

        Args:
            event: Gets `step`, and `own_step` and `steps` where these differ.
            keys: Of the values.
            step: Given by the caller; None: nothing.
            split: Of the keys that name none.
            started_in: The step that the code here was started in.

        """
        if self.step is None:
            in_force = step = self._given if step is None else self.step_given(keys, step, split)
        elif not self.differ:
            in_force = self.step
            if step is None:
                step = started_in[1] if started_in is not None and started_in[0] == self.leading else in_force
        else:
            in_force, step = self._steps_in(split, given := step, started_in)
            others: dict[str, list[int]] = {}
            for key in keys:
                named = self.split_of(key)
                if named and named != split and named not in others:
                    steps = self._steps_in(named, given, started_in)
                    if steps != (in_force, step):
                        others[named] = list(steps)
            if others:
                event["steps"] = others
        if in_force is not None:
            event["step"] = in_force
            if step != in_force:
                event["own_step"] = step

    def training_step(self, started_in: StepOf | None) -> int | None:
        """The training step that something belongs to which is of no split; an evaluation's where nothing is trained.

        Args:
            started_in: The step that the code here was started in.

        """
        if started_in is not None and started_in[0] in self._steps:
            return started_in[1]
        return self._given if self.step is None else self.step

    def split_of(self, key: str) -> str:
        """The split that a key names itself, or ""."""
        split = self.split_of_key.get(key)
        if split is None:
            if len(self.split_of_key) >= MAX_KNOWN_KEYS:
                self.split_of_key.clear()
            split = self.split_of_key[key] = split_in_key(key)[0] or ""
        return split

    def step_given(self, keys: Iterable[str], step: int, split: str) -> int:
        """The step of a call that gives it, where nothing has stepped."""
        in_training, known = False, self.split_of_key
        for key in keys:
            named = known[key] if key in known else self.split_of(key)
            if (named or split) not in EVALUATION_SPLITS:
                in_training = True
                break
        if in_training or not self._given_in_training:
            self._given, self._given_in_training = step, in_training
        return step

    def _steps_in(self, split: str, step: int | None, started_in: StepOf | None) -> tuple[int, int]:
        """The step in force in a split, and the one that a value belongs to."""
        leading = split if split in self._steps else self.leading
        in_force = self.step if leading == self.leading and self.step is not None else self._steps[leading]
        if step is None:
            step = started_in[1] if started_in is not None and started_in[0] == leading else in_force
        return in_force, step
