"""PyTorch Lightning: `Trainer(callbacks=[StepspanCallback()])`.

Works with `lightning.pytorch` and `pytorch_lightning`, whichever is loaded when the callback is made. Importing this
module imports neither.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from stepspan.integrations.loop import FrameworkCallback, hooks, samples_of
from stepspan.run import DISABLED

STEP, EPOCH = "_step", "_epoch"
"""What Lightning appends to the name of a metric that is logged for both."""


@hooks
class StepspanCallback(FrameworkCallback):
    """Records a Lightning training in the open run; without one it starts one.

    - An epoch; a step for each optimizer step, numbered by `trainer.global_step` as it begins, so that resuming goes
      on. `data_wait` (s) is the time from the end of the last hook to the batch: loader and transfer to the device, and
      with them loggers and other callbacks that run in between.
    - `validation`, `test`, `predict` and `sanity_check` as spans, with a step for each batch of `val` and `test`.
    - Every value of `self.log`, at its step, each step (not each `log_every_n_steps`): `loss`, its epoch's mean as
      `loss_epoch`; `val_loss` of a validation is `loss` of split `val`. What is given to a logger itself is not seen.
    - A run that it has started ends with `fit()`, and rests: it takes what `test()`, `validate()` and `predict()` find
      after it, until another training begins or the process ends.
    - Hyperparameters, total steps, samples (the first dimension of the batch's tensors, where all have the same),
      checkpoints (span and artifact of kind "checkpoint"), exceptions.

    No signal handler is touched: requeueing on SLURM works as without it. An instance is a `Callback` of the loaded
    Lightning, and can be copied and pickled. Its methods are hooks that the `Trainer` calls, with Lightning's own
    arguments; they raise nothing into the training but `ConfigError` at its start.

    Args:
        **arguments: Of `stepspan.start_run`, for the run that is started where none is open. What Lightning knows of
            this process (rank, world size) fills in what the environment does not say.

    Raises:
        ModuleNotFoundError: Lightning is not installed.
        ConfigError: From `setup`, where `start_run` finds an argument or a setting wrong.

    """

    _packages, _base_name = ("lightning.pytorch", "pytorch_lightning"), "Callback"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._step = 0
        """The number of the training step that is open, or was last."""
        self._batches = 0
        """How many batches were validated or tested."""
        self._logged: dict[str, Any] = {}
        """Metric -> the value that was logged last."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Called first of all: follows the open run, or starts one where the stage is "fit"."""
        self.loop.begin(partial(_identity, trainer) if stage == "fit" else None)
        self._logged = {}
        if stage == "fit":
            _restore(trainer)
            trainer.save_checkpoint = partial(self._save, trainer, trainer.save_checkpoint)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Called before a training: logs the hyperparameters of trainer, data module and model."""
        params = {"model": type(pl_module).__name__}
        for name in ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision"):
            value = getattr(trainer, name, None)
            if value is not None and value != -1:
                params[name] = value
        for owner in (trainer.datamodule, pl_module):
            params.update(getattr(owner, "hparams_initial", None) or {})
        self.loop.run.log_hyperparams(params)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Called as training begins: sets the run's total steps, unless optimizers are stepped by hand."""
        if pl_module.automatic_optimization:
            self.loop.set_total_steps(trainer.estimated_stepping_batches)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Called before an epoch, which begins here; the last one ends, for it kept checkpoints until now."""
        self._log(trainer, "train")
        self.loop.enter("epoch", self.loop.run.epoch(trainer.current_epoch))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Called with each batch: a step begins, or goes on where gradients accumulate."""
        if self.loop.scope_at("epoch") is None:  # resumed within one, which Lightning does not begin again
            self.loop.enter("epoch", self.loop.run.epoch(trainer.current_epoch))
        if self.loop.scope_at("step") is None:
            self._step = trainer.global_step
        self.loop.batch(self._step, samples=samples_of(batch))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called after each batch: logs its metrics, and ends the step where the optimizer was stepped."""
        self._log(trainer, "train", dropped=STEP)
        if trainer.global_step > self._step:
            self.loop.leave("step")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Called after an epoch: logs its metrics. The epoch stays open for its checkpoint."""
        self.loop.leave("step")
        self._log(trainer, "train")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Called as training ends: so does the last epoch."""
        self._log(trainer, "train")
        self.loop.leave("epoch")

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Called before the sanity check: a span. Lightning throws its metrics away; they are not recorded here."""
        self.loop.enter("phase", self.loop.run.span("sanity_check"))

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        """Called after the sanity check, whose span ends."""
        self.loop.leave("phase")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Called before a validation, between two steps or within one whose gradients accumulate: a span."""
        self._begin_evaluation(trainer, "validation")

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any, **__: Any) -> None:
        """Called with each batch of a validation: a step of split `val`."""
        self._begin_batch(trainer, batch, "val")

    def on_validation_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Called after each batch of an evaluation: its step ends."""
        if self.loop.scope_at("part") is None:
            self.loop.leave("step")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Called after a validation: logs its metrics, split `val`."""
        self._end_evaluation(trainer, "val")

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Called before a test: a span."""
        self._begin_evaluation(trainer, "test")

    def on_test_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any, **__: Any) -> None:
        """Called with each batch of a test: a step of split `test`."""
        self._begin_batch(trainer, batch, "test")

    on_test_batch_end = on_validation_batch_end

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Called after a test: logs its metrics, split `test`."""
        self._end_evaluation(trainer, "test")

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Called before a prediction: a span."""
        self._begin_evaluation(trainer, "predict")

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Called after a prediction, whose span ends."""
        self.loop.leave("phase")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Called with the exception that ends a training: the open scopes and the run have failed with it."""
        _restore(trainer)
        self.loop.end(exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Called last of all: ends what is open, and the training of the run if `setup` started it."""
        _restore(trainer)
        self.loop.end()

    def _begin_evaluation(self, trainer: Any, name: str) -> None:
        if not trainer.sanity_checking:
            self.loop.enter("phase" if self.loop.scope_at("step") is None else "part", self.loop.run.span(name))

    def _begin_batch(self, trainer: Any, batch: Any, split: str) -> None:
        if not (trainer.sanity_checking or self.loop.scope_at("part")):
            self.loop.batch(self._batches, split=split, samples=samples_of(batch))
            self._batches += 1

    def _end_evaluation(self, trainer: Any, split: str) -> None:
        if not trainer.sanity_checking:
            self.loop.leave("phase" if self.loop.scope_at("part") is None else "part")
            self._log(trainer, split)

    def _save(self, trainer: Any, save: Any, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Stands for `trainer.save_checkpoint` in a training: no hook says when a checkpoint is written, nor where."""
        with self.loop.run.span("checkpoint"):
            save(filepath, *args, **kwargs)
        if trainer.is_global_zero:
            self.loop.run.log_artifact(os.path.basename(str(filepath)), filepath, kind="checkpoint")

    def _log(self, trainer: Any, split: str, *, dropped: str = EPOCH) -> None:
        """Log what is new among the values of `self.log`: those in memory of their own.

        A value that is logged for the step and for the epoch has three names. Of the plain one and the one with suffix
        `dropped` one is redundant: the plain name is the step's.
        """
        found = {name: value for name, value in trainer.callback_metrics.items() if self._is_new(name, value)}
        self._logged.update(found)
        for name in list(found):
            if name.endswith(dropped) and (plain := name.removesuffix(dropped)) in found:
                del found[name if dropped == STEP else plain]
        if found:
            self.loop.log(found, None, split)

    def _is_new(self, name: str, value: Any) -> bool:
        before = self._logged.get(name)
        return before is None or before.data_ptr() != value.data_ptr()


def _restore(trainer: Any) -> None:
    """Give a trainer its own `save_checkpoint` back."""
    trainer.__dict__.pop("save_checkpoint", None)


def _identity(trainer: Any) -> Mapping[str, Any]:
    """What Lightning knows of this process, where it is the launcher itself and the environment says nothing."""
    known = DISABLED.identity
    if trainer.world_size == known.world_size:
        return {}
    job_id = os.environ.get("STEPSPAN_JOB_ID") or known.job_id
    return {
        "job_id": trainer.strategy.broadcast(job_id),
        "rank": trainer.global_rank,
        "local_rank": trainer.local_rank,
        "world_size": trainer.world_size,
    }
