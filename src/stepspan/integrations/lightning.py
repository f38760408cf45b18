"""PyTorch Lightning: `Trainer(callbacks=[StepspanCallback()])`.

Works with `lightning.pytorch` and `pytorch_lightning`, whichever is loaded when the callback is made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from stepspan.disabled import DISABLED
from stepspan.integrations.loop import Loop, finite, hook, joined, samples_of

if TYPE_CHECKING:
    from typing_extensions import Self

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
STEP, EPOCH = "_step", "_epoch"
"""What Lightning appends to the name of a metric that is logged for both."""


class StepspanCallback:
    """Records a Lightning training in the open run; without one it starts one and ends it.

    - An epoch; a step for each optimizer step, numbered by `trainer.global_step` as it begins, so that resuming goes
      on. `data_wait` is the time from the last hook before to the batch: loader and transfer to the device, and with
      them loggers and other callbacks that run in between.
    - `validation`, `test`, `predict` and `sanity_check` as spans, with a step for each batch of `val` and `test`.
    - Every value of `self.log`, at its step, each step (not each `log_every_n_steps`): `loss`, its epoch's mean as
      `loss_epoch`; `val_loss` of a validation is `loss` of split `val`. What is given to a logger itself is not seen.
    - Hyperparameters, total steps, samples (the first dimension of the batch's tensors, where all have the same),
      checkpoints (span and artifact), exceptions.

    `arguments`: of `stepspan.start_run`. No signal handler is touched: requeueing on SLURM works as without it.
    """

    def __new__(cls, **arguments: Any) -> Self:
        """One that is a `Callback` of the loaded Lightning, too."""
        made: Self = object.__new__(joined(cls, _callback()))
        made._made_by = partial(cls, **arguments)
        return made

    def __init__(self, **arguments: Any) -> None:
        self.loop = Loop(arguments)
        self._made_by: partial[Any]
        self._step = 0
        """The number of the training step that is open, or was last."""
        self._batches = 0
        """How many batches were validated or tested."""
        self._seen: dict[str, Any] = {}
        """Metric -> the value that was logged last."""

    def __reduce__(self) -> tuple[Any, ...]:
        return self._made_by, ()

    @hook
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin."""
        self.loop.begin(partial(_who, trainer) if stage == "fit" else None)
        self._seen = {}
        if stage == "fit":
            trainer.__dict__.pop("save_checkpoint", None)
            trainer.save_checkpoint = partial(self._save, trainer, trainer.save_checkpoint)

    @hook
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hyperparameters, of trainer, data and model."""
        found = {"model": type(pl_module).__name__}
        for name in ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision"):
            value = getattr(trainer, name, None)
            if value is not None and value != -1:
                found[name] = value
        for owner in (trainer.datamodule, pl_module):
            found.update(getattr(owner, "hparams_initial", None) or {})
        self.loop.run.log_hyperparams(found)

    @hook
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """How many steps there will be, if that is known: optimizers that are stepped by hand are not counted on."""
        if not pl_module.automatic_optimization:
            return
        total = finite(trainer.estimated_stepping_batches)
        if total is not None:
            self.loop.run.set_total_steps(total)

    @hook
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The last epoch ends only here, for checkpoints are kept after `on_train_epoch_end`."""
        self._log(trainer, "train")
        self.loop.enter("epoch", self.loop.run.epoch(trainer.current_epoch))

    @hook
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A step begins, or goes on where gradients accumulate."""
        if self.loop.at("epoch") is None:  # resumed within one, which Lightning doesn't begin again
            self.loop.enter("epoch", self.loop.run.epoch(trainer.current_epoch))
        if self.loop.at("step") is None:
            self._step = trainer.global_step
        self.loop.batch(self._step, samples=samples_of(batch))

    @hook
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step ends where the optimizer has made one."""
        self._log(trainer, "train", forked=STEP)
        if trainer.global_step > self._step:
            self.loop.leave("step")

    @hook
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The epoch's metrics."""
        self.loop.leave("step")
        self._log(trainer, "train")

    @hook
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last epoch ends."""
        self._log(trainer, "train")
        self.loop.leave("epoch")

    @hook
    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Its metrics are thrown away by Lightning, and not recorded here."""
        self.loop.enter("phase", self.loop.run.span("sanity_check"))

    @hook
    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        """Over."""
        self.loop.leave("phase")

    @hook
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Between two steps, or within one whose gradients accumulate."""
        self._begin(trainer, "validation")

    @hook
    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any, **__: Any) -> None:
        """A step of split `val`."""
        self._batch(trainer, batch, "val")

    @hook
    def on_validation_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Over."""
        self._batch_end()

    @hook
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Its metrics."""
        self._end(trainer, "val")

    @hook
    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """As a validation."""
        self._begin(trainer, "test")

    @hook
    def on_test_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any, **__: Any) -> None:
        """A step of split `test`."""
        self._batch(trainer, batch, "test")

    @hook
    def on_test_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Over."""
        self._batch_end()

    @hook
    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Its metrics."""
        self._end(trainer, "test")

    @hook
    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """A span."""
        self._begin(trainer, "predict")

    @hook
    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Over."""
        self.loop.leave("phase")

    @hook
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """What is open has failed with it."""
        trainer.__dict__.pop("save_checkpoint", None)
        self.loop.end(exception)

    @hook
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The end."""
        trainer.__dict__.pop("save_checkpoint", None)
        self.loop.end()

    def _begin(self, trainer: Any, name: str) -> None:
        if not trainer.sanity_checking:
            self.loop.enter("phase" if self.loop.at("step") is None else "part", self.loop.run.span(name))

    def _batch(self, trainer: Any, batch: Any, split: str) -> None:
        if not (trainer.sanity_checking or self.loop.at("part")):
            self.loop.batch(self._batches, split=split, samples=samples_of(batch))
            self._batches += 1

    def _batch_end(self) -> None:
        if self.loop.at("part") is None:
            self.loop.leave("step")

    def _end(self, trainer: Any, split: str) -> None:
        if not trainer.sanity_checking:
            self.loop.leave("phase" if self.loop.at("part") is None else "part")
            self._log(trainer, split)

    def _save(self, trainer: Any, save: Any, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """`trainer.save_checkpoint`, while it trains: no hook says when one is written, nor where."""
        with self.loop.run.span("checkpoint"):
            save(filepath, *args, **kwargs)
        if trainer.is_global_zero:
            self.loop.run.log_artifact(os.path.basename(str(filepath)), filepath, kind="checkpoint")

    def _log(self, trainer: Any, split: str, *, forked: str = EPOCH) -> None:
        """Log what is new among the values of `self.log`: those in memory of their own.

        Of the two names of a value that is logged for the step and for the epoch, a step's is the plain one.
        """
        found = {name: value for name, value in trainer.callback_metrics.items() if self._is_new(name, value)}
        self._seen.update(found)
        for name in list(found):
            if name.endswith(forked) and (plain := name.removesuffix(forked)) in found:
                del found[name if forked == STEP else plain]
        if found:
            self.loop.log(found, self._step, split)

    def _is_new(self, name: str, value: Any) -> bool:
        before = self._seen.get(name)
        return before is None or before.data_ptr() != value.data_ptr()


def _callback() -> type:
    """The `Callback` of the Lightning that is loaded; of the two the first that can be, if none is."""
    loaded = [name for name in PACKAGES if name in sys.modules]
    for name in loaded or PACKAGES:
        try:
            found: type = import_module(name).Callback
        except ModuleNotFoundError as error:
            missing = error
        else:
            return found
    raise missing


def _who(trainer: Any) -> Mapping[str, Any]:
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
