"""Hugging Face `Trainer`: `Trainer(..., callbacks=[StepspanCallback()])`. Importing this module does not import it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from stepspan.integrations.loop import FrameworkCallback, hooks

SPLITS = ("eval", "test")
"""What the Trainer puts before the names of an evaluation's metrics, with `_`."""


@hooks
class StepspanCallback(FrameworkCallback):
    """Records a training by the `Trainer` in the open run; without one it starts one.

    - An epoch; a step for each optimizer step, numbered by `global_step` as it begins, so that resuming goes on.
      `data_wait` (s) is the time from the end of the last hook to the step: loader, collation and transfer of all its
      batches, and with them other callbacks.
    - `validation` and `checkpoint` as spans, which begin where the step before ends; a checkpoint as an artifact of
      kind "checkpoint", too.
    - All metrics that the Trainer logs, at its step: `loss` is its mean since the last one, and `mean_train_loss` what
      it logs as `train_loss` at the end: the mean of the whole training. `eval_loss` is `loss` of split `eval`.
    - A run that it has started ends with `train()`, and rests: it takes what `evaluate()` and `predict()` find then,
      until another training begins or the process ends. What is evaluated before is recorded if a run is open.
    - Hyperparameters, total steps; samples (batch size times batches: too many in an epoch's last step), and tokens
      where `include_num_input_tokens_seen` is on.

    The Trainer does not report exceptions to its callbacks. One that ends the program is recorded as the run ends; to
    have any recorded, train within `with stepspan.start_run():`. An instance is a `transformers.TrainerCallback`, and
    can be copied and pickled. Its methods are hooks that the `Trainer` calls with its own arguments; they raise nothing
    into the training but `ConfigError` at its start.

    Args:
        **arguments: Of `stepspan.start_run`, for the run that is started where none is open.

    Raises:
        ImportError: `transformers` is not installed.
        ConfigError: From `on_train_begin`, where `start_run` finds an argument or a setting wrong.

    """

    _packages, _base_name = ("transformers",), "TrainerCallback"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._epoch = -1
        self._substeps = 0
        """Batches of the open step that are done, without its last."""
        self._tokens = 0
        """Seen by all ranks until the last step ended."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Called as `train()` begins: starts a run where none is open; logs hyperparameters and total steps."""
        self.loop.begin(dict, state)
        self._epoch, self._tokens = -1, state.num_input_tokens_seen
        main = {
            "model": type(model).__name__,
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "batch_size": _batch_size(args, state),
            "epochs": args.num_train_epochs,
            "learning_rate": args.learning_rate,
            "max_steps": state.max_steps,
            "seed": args.seed,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
        }
        others = {name: value for name, value in args.to_sanitized_dict().items() if value != "None"}
        self.loop.run.log_hyperparams({**main, **others, **main})  # the main ones first: backends cut long lists
        self.loop.set_total_steps(state.max_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called before an epoch. The last one ends only here, for it is evaluated and saved after `on_epoch_end`."""
        self._epoch = max(int(state.epoch or 0), self._epoch + 1)  # one that was cut short left a fraction
        self.loop.enter("epoch", self.loop.run.epoch(self._epoch))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called once all batches of a step have been loaded: the step begins."""
        self.loop.leave("phase")
        self._substeps = 0
        self.loop.batch(state.global_step)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after each batch of a step but the last, where gradients accumulate: counts its samples."""
        self._substeps += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after the optimizer's step: the step ends, with its samples and this rank's share of the tokens."""
        scope, tokens = self.loop.scope_at("step"), state.num_input_tokens_seen - self._tokens
        self._tokens = state.num_input_tokens_seen
        if scope is not None:
            scope.samples = _batch_size(args, state) * (self._substeps + 1)
            scope.tokens = tokens / args.world_size if tokens > 0 else None
        self._end_step(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after an epoch's last step: what the Trainer does next still belongs to the epoch."""
        self._end_step(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called with metrics of the training, or of an evaluation that is about to end: logs them at the last step."""
        self._log(state, logs or {})

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called with each batch of an evaluation: opens the span "validation", where none is open yet."""
        if self.loop.follow() and self.loop.scope_at("phase") is None:
            self.loop.enter("phase", self.loop.run.span("validation"))

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after an evaluation: its span ends, and a checkpoint begins if one is due."""
        self.loop.leave("phase")
        if control.should_save:
            self.loop.enter("phase", self.loop.run.span("checkpoint"))

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Called after a prediction: its span ends; logs its metrics, which the Trainer does not."""
        self.loop.leave("phase")
        self._log(state, metrics or {})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after a checkpoint was written: its span ends, and rank 0 logs it as an artifact."""
        self.loop.leave("phase")
        if state.is_world_process_zero:
            name = f"checkpoint-{state.global_step}"
            path = os.path.abspath(os.path.join(args.output_dir, name))
            self.loop.run.log_artifact(name, path, kind="checkpoint")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called as `train()` ends: so does what is open, and the training of the run that `on_train_begin` started."""
        left = state.is_hyper_param_search and state.global_step < state.max_steps and not control.should_training_stop
        self.loop.end(status="interrupted" if left else None)  # a trial that is pruned is said to end, too

    def _end_step(self, control: Any) -> None:
        self.loop.leave("step")
        if control.should_evaluate:  # decided by the Trainer's own callback, which is called before
            self.loop.enter("phase", self.loop.run.span("validation"))
        elif control.should_save:
            self.loop.enter("phase", self.loop.run.span("checkpoint"))

    def _log(self, state: Any, logs: Mapping[str, Any]) -> None:
        if not self.loop.follow():
            return
        by_split: dict[str, dict[str, Any]] = {}
        last = "train_runtime" in logs  # of the training; its loss is no value of the curve that the others make
        for name, value in logs.items():
            head = name.partition("_")[0]
            if not isinstance(value, (str, bytes)):
                key = "mean_train_loss" if last and name == "train_loss" else name
                by_split.setdefault(head if head in SPLITS else "train", {})[key] = value
        for split, metrics in by_split.items():
            self.loop.log(metrics, max(state.global_step - 1, 0), split)  # the step that was done last


def _batch_size(args: Any, state: Any) -> int:
    """The one in use: `auto_find_batch_size` leaves the arguments as they are."""
    size: int = getattr(state, "train_batch_size", None) or args.train_batch_size
    return size
