"""Hugging Face `Trainer`: `Trainer(..., callbacks=[StepspanCallback()])`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from stepspan.integrations.loop import Loop, finite, hook, joined

if TYPE_CHECKING:
    from typing_extensions import Self

SPLITS = ("eval", "test")
"""What the Trainer puts before the names of an evaluation's metrics, with `_`."""


class StepspanCallback:
    """Records a training by the `Trainer` in the open run; without one it starts one and ends it.

    - An epoch; a step for each optimizer step, numbered by `global_step` as it begins, so that resuming goes on.
      `data_wait` is the time from the last hook before to the step: loader, collation and transfer of all its batches,
      and with them other callbacks.
    - `validation` and `checkpoint` as spans, which begin where the step before ends; a checkpoint as an artifact, too.
    - All metrics that the Trainer logs, at its step: `loss` is its mean since the last one. `eval_loss` is `loss` of
      split `eval`. What is evaluated outside of `train()` is recorded if a run of yours is open.
    - Hyperparameters, total steps; samples (batch size times batches: too many in an epoch's last step), and tokens
      where `include_num_input_tokens_seen` is on.

    The Trainer tells callbacks nothing of an exception. One that ends the program is recorded as the run ends; to have
    any recorded, train within `with stepspan.start_run():`. `arguments`: of `stepspan.start_run`.
    """

    def __new__(cls, **arguments: Any) -> Self:
        """One that is a `transformers.TrainerCallback`, too."""
        from transformers import TrainerCallback

        made: Self = object.__new__(joined(cls, TrainerCallback))
        made._made_by = partial(cls, **arguments)
        return made

    def __init__(self, **arguments: Any) -> None:
        self.loop = Loop(arguments)
        self._made_by: partial[Any]
        self._epoch = -1
        self._batches = 0
        """Of the open step, those that were done before its last."""
        self._tokens = 0
        """Seen by all ranks until the last step's end."""

    def __reduce__(self) -> tuple[Any, ...]:
        return self._made_by, ()

    @hook
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Begin."""
        self.loop.begin(dict, state)
        self._epoch, self._tokens = -1, state.num_input_tokens_seen
        chosen = {
            "model": type(model).__name__,
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "batch_size": _batch_size(args, state),
            "epochs": args.num_train_epochs,
            "learning_rate": args.learning_rate,
            "max_steps": state.max_steps,
            "seed": args.seed,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
        }
        given = {name: value for name, value in args.to_sanitized_dict().items() if value != "None"}
        self.loop.run.log_hyperparams({**chosen, **given, **chosen})  # the chosen ones first: backends cut long lists
        total = finite(state.max_steps)
        if total is not None:
            self.loop.run.set_total_steps(total)

    @hook
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last epoch ends only here, for it is evaluated and saved after `on_epoch_end`."""
        self._epoch = max(int(state.epoch or 0), self._epoch + 1)  # one that was cut short left a fraction
        self.loop.enter("epoch", self.loop.run.epoch(self._epoch))

    @hook
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All batches of the step have come."""
        self.loop.leave("phase")
        self._batches = 0
        self.loop.batch(state.global_step)

    @hook
    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A batch is done, and the step goes on."""
        self._batches += 1

    @hook
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The optimizer has made its step."""
        scope, tokens = self.loop.at("step"), state.num_input_tokens_seen - self._tokens
        self._tokens = state.num_input_tokens_seen
        if scope is not None:
            scope.samples = _batch_size(args, state) * (self._batches + 1)
            scope.tokens = tokens / args.world_size if tokens > 0 else None
        self.loop.leave("step")
        self._next(control)

    @hook
    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What follows belongs to the epoch still."""
        self.loop.leave("step")
        self._next(control)

    @hook
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Metrics of the training, or of an evaluation that is about to end."""
        self._log(state, logs or {})

    @hook
    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An evaluation that nothing announced."""
        if self.loop.follow() and self.loop.at("phase") is None:
            self.loop.enter("phase", self.loop.run.span("validation"))

    @hook
    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An evaluation has ended."""
        self.loop.leave("phase")
        if control.should_save:
            self.loop.enter("phase", self.loop.run.span("checkpoint"))

    @hook
    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """So has a prediction, whose metrics the Trainer does not log."""
        self.loop.leave("phase")
        self._log(state, metrics or {})

    @hook
    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint is written."""
        self.loop.leave("phase")
        if state.is_world_process_zero:
            name = f"checkpoint-{state.global_step}"
            path = os.path.abspath(os.path.join(args.output_dir, name))
            self.loop.run.log_artifact(name, path, kind="checkpoint")

    @hook
    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The end."""
        self.loop.end()

    def _next(self, control: Any) -> None:
        """What comes between two steps: the Trainer's own callback has decided it before ours is called."""
        if control.should_evaluate:
            self.loop.enter("phase", self.loop.run.span("validation"))
        elif control.should_save:
            self.loop.enter("phase", self.loop.run.span("checkpoint"))

    def _log(self, state: Any, logs: Mapping[str, Any]) -> None:
        if not self.loop.follow():
            return
        parts: dict[str, dict[str, Any]] = {}
        for name, value in logs.items():
            head = name.partition("_")[0]
            if not isinstance(value, (str, bytes)):
                parts.setdefault(head if head in SPLITS else "train", {})[name] = value
        for split, part in parts.items():
            self.loop.log(part, max(state.global_step - 1, 0), split)  # the step that was done last


def _batch_size(args: Any, state: Any) -> int:
    """The one in use: `auto_find_batch_size` leaves the arguments as they are."""
    size: int = getattr(state, "train_batch_size", None) or args.train_batch_size
    return size
