"""A Lightning training, recorded by one callback: what arrives in a real Prometheus, and what its journal says."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.runs import events, outline, sessions, spans, status_of
from harness.stack import Collector, Prometheus

pytest.importorskip("lightning", reason="no Lightning here: `make test-frameworks`")

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, TensorDataset

import stepspan
from stepspan.integrations.lightning import StepspanCallback
from stepspan.journal.format import decode
from stepspan.journal.layout import find_sessions
from stepspan.run import Run

pytestmark = pytest.mark.filterwarnings("ignore")
start = runs.start
Start = Callable[..., Run]
EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_classifier.py"
MILLISECOND = 1_000_000


class Line(LightningModule):
    """y = 2x, by a weight and a bias."""

    def __init__(self, fails_at: int = -1, rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, 1)
        self.fails_at = fails_at

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        x, y = batch
        if number == self.fails_at:
            raise ValueError("in the step")
        loss = ((self.layer(x) - y) ** 2).mean()
        self.log("loss", loss, prog_bar=True)
        self.log("both", float(number), on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        x, y = batch
        self.log("val_loss", ((self.layer(x) - y) ** 2).mean())

    test_step = validation_step

    def predict_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.layer(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["rate"])


def loader(count: int = 8) -> DataLoader:
    x = torch.linspace(-1, 1, count).reshape(-1, 1)
    return DataLoader(TensorDataset(x, 2 * x), batch_size=2)


def trainer(*callbacks: Callback, **arguments: Any) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    given = {"max_epochs": 1, "enable_checkpointing": False, "num_sanity_val_steps": 0, **quiet, **arguments}
    return Trainer(callbacks=list(callbacks), **given)


def only_session(directory: Path) -> Path:
    (session,) = find_sessions(directory)
    return session.path


def steps_of(where: Run | Path, split: str = "train") -> list[int]:
    return [event["step"] for event in events(where, "step_begin") if event["split"] == split]


# the whole way


def test_the_example_arrives_whole(collector: Collector, prometheus: Prometheus, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not runs.is_ours(name)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**env, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.http_endpoint, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    journal = only_session(tmp_path / "stepspan-runs")
    lines = [decode(line) for line in (journal / "000001.jsonl").read_bytes().splitlines()]
    job = lines[0]["job_id"]
    sync = [sys.executable, "-m", "stepspan", "sync", str(tmp_path / "stepspan-runs")]
    subprocess.run([*sync, "--endpoint", collector.http_endpoint], check=True, capture_output=True, timeout=60)

    found = collector.spans()
    assert Counter(span["name"] for span in found) == {
        "training.run": 1, "training.epoch": 3, "training.step": 45 + 3 * 3, "sanity_check": 1, "validation": 3,
        "checkpoint": 3,
    }  # fmt: skip
    trained = [s for s in found if s["name"] == "training.step" and s["attributes"]["split"] == "train"]
    assert sorted(span["attributes"]["step"] for span in trained) == list(range(45))
    assert len({span["traceId"] for span in trained}) == 45
    assert not [span for span in found if span["status"].get("code") == 2]

    for key, points in {"loss": 90, "loss_epoch": 3}.items():
        journaled = {
            event["ts"] // MILLISECOND: event["metrics"][key]
            for event in lines
            if event["tag"] == "metrics" and key in event["metrics"]
        }
        ((_, samples),) = prometheus.series(f'training_{key}{{job_id="{job}",split="train"}}[1h]')
        assert {ms: value for ms, value in samples if value == value} == journaled
        assert sum(key in event.get("metrics", ()) for event in lines) == points
    for key in ("loss", "accuracy"):
        ((_, samples),) = prometheus.series(f'training_{key}{{job_id="{job}",split="val"}}[1h]')
        assert len([value for _, value in samples if value == value]) == 3
    phases = {labels["phase"] for labels, _ in prometheus.series(f'training_phase_time_seconds{{job_id="{job}"}}[1h]')}
    assert phases == {"data_wait", "validation", "checkpoint", "sanity_check"}
    ((labels, _),) = prometheus.series(f'training_run_info{{job_id="{job}",model!=""}}[1h]')
    assert (labels["name"], labels["model"], labels["learning_rate"]) == ("digits", "Classifier", "0.05")
    ((_, total),) = prometheus.series(f'training_run_total_steps{{job_id="{job}"}}[1h]')
    assert total[0][1] == 45
    for split in ("train", "val"):
        asked = f'training_throughput_per_second{{job_id="{job}",item="samples",split="{split}"}}[1h]'
        ((_, rates),) = prometheus.series(asked)
        assert all(rate > 0 for _, rate in rates if rate == rate)
    assert Counter(log["eventName"] for log in collector.logs()) == {"training.hyperparams": 1, "training.artifact": 3}


# what the journal says


def test_a_training_without_a_run_is_one(start: Start, tmp_path: Path) -> None:
    trainer(StepspanCallback(name="line")).fit(Line(), loader(4), loader(2))
    journal = only_session(tmp_path / "stepspan-runs")
    told = [line for line in outline(journal) if not line.startswith("sample")]
    shape = [line.partition("=")[0] for line in told]
    assert shape == [
        *("run", "hyperparams", "progress", "  epoch 0"),
        *("    step 0", "train 0: loss", "    end step", "    step 1", "train 1: loss", "    end step"),
        *("    span validation", "      step 0 val", "      end step", "    end span", "val 1: val_loss"),
        *("train 1: both_epoch", "  end epoch", "end run completed"),
    ]
    assert told[5].endswith(" both=0.0")
    assert told[-3] == "train 1: both_epoch=0.5"
    (begin,), (params,) = events(journal, "run_begin"), events(journal, "hyperparams")
    assert begin["name"] == "line"
    assert (params["params"]["model"], params["params"]["rate"]) == ("Line", 0.1)
    assert {event["samples"] for event in events(journal, "step_end")} == {2.0}
    assert all(0 < event["data_wait"] < 10 for event in events(journal, "step_end"))


def test_what_is_tested_after_the_training_is_its_runs(start: Start, tmp_path: Path) -> None:
    training = trainer(StepspanCallback())
    training.fit(Line(), loader(4))
    training.test(Line(), loader(4), verbose=False)
    training.validate(Line(), loader(4), verbose=False)
    training.predict(Line(), loader(4))
    stepspan.current_run().close()
    journal = only_session(tmp_path / "stepspan-runs")
    told = [line.partition("=")[0] for line in outline(journal) if line != "sample"]
    told = told[told.index("end run completed") :]
    assert [line for line in told if "span" in line] == [
        "span test",
        "end span",
        "span validation",
        "end span",
        "span predict",
        "end span",
    ]
    assert status_of(journal) == "completed"


def test_a_run_of_the_users_stays_open(start: Start) -> None:
    with start() as run:
        trainer(StepspanCallback()).fit(Line(), loader(4))
        assert not run.closed
        trainer(StepspanCallback()).test(Line(), loader(4), verbose=False)
        trainer(StepspanCallback()).predict(Line(), loader(4))
    names = [event["name"] for event in events(run, "span_begin")]
    assert names == ["test", "predict"]
    assert steps_of(run, "test") == [0, 1]
    tested = events(run, "metrics")[-1]
    assert (tested["split"], tested["step"], "own_step" in tested) == ("test", steps_of(run)[-1], False)
    assert status_of(runs.path_of(run)) == "completed"


def test_what_is_tested_without_a_run_starts_none(start: Start, tmp_path: Path) -> None:
    trainer(StepspanCallback()).test(Line(), loader(4), verbose=False)
    assert not (tmp_path / "stepspan-runs").exists()


def test_switched_off_it_does_nothing(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPSPAN_DISABLED", "1")
    trainer(StepspanCallback()).fit(Line(), loader(4), loader(2))
    assert not (tmp_path / "stepspan-runs").exists()


def test_a_step_is_an_optimizer_step(start: Start) -> None:
    with start() as run:
        trainer(StepspanCallback(), accumulate_grad_batches=3, max_epochs=2).fit(Line(), loader(16))
    assert steps_of(run) == [0, 1, 2, 3, 4, 5]
    assert [event["samples"] for event in events(run, "step_end")] == [6.0, 6.0, 4.0] * 2
    assert [e["step"] for e in events(run, "metrics") if "loss" in e["metrics"]][:8] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert events(run, "progress")[0]["total_steps"] == 6


def test_validation_while_gradients_accumulate_lies_in_the_step(start: Start) -> None:
    with start() as run:
        training = trainer(StepspanCallback(), accumulate_grad_batches=4, val_check_interval=2)
        training.fit(Line(), loader(16), loader(4))
    assert steps_of(run) == [0, 1]
    assert not [event for event in events(run, "step_begin") if "lap" in event]
    within = {event["seq"] for event in events(run, "step_begin") if event["split"] == "train"}
    inside = [event["parent"] in within for event in events(run, "span_begin") if event["name"] == "validation"]
    assert inside == [True, False, True, False]
    assert len([event for event in events(run, "metrics") if event["split"] == "val"]) == 4


class Adversaries(LightningModule):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, number: int) -> None:
        for optimizer, layer in zip(self.optimizers(), (self.a, self.b), strict=True):
            loss = (layer(batch[0]) ** 2).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("loss", loss)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.a, self.b)]


def test_several_optimizers_step_as_lightning_counts_them(start: Start) -> None:
    with start() as run:
        trainer(StepspanCallback()).fit(Adversaries(), loader(6))
    assert steps_of(run) == [0, 2, 4]
    assert not [event for event in events(run, "progress") if "total_steps" in event]


def test_a_resumed_training_goes_on_counting(start: Start, tmp_path: Path) -> None:
    with start() as first:
        training = trainer(StepspanCallback())
        training.fit(Line(), loader(6))
        training.save_checkpoint(tmp_path / "a.ckpt")
    with start() as second:
        trainer(StepspanCallback(), max_epochs=2).fit(Line(), loader(6), ckpt_path=tmp_path / "a.ckpt")
    assert steps_of(first) == [0, 1, 2]
    assert steps_of(second) == [3, 4, 5]
    assert [event["epoch"] for event in events(second, "epoch_begin")] == [1]
    assert events(second, "progress")[0]["total_steps"] == 6


def test_a_training_that_is_resumed_within_an_epoch_is_in_it(start: Start, tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    trainer(Save()).fit(Line(), loader(8))
    with start() as run:
        trainer(StepspanCallback(), max_epochs=2).fit(Line(), loader(8), ckpt_path=tmp_path / "a.ckpt")
    assert [(e["step"], e["epoch"]) for e in events(run, "step_begin")] == [
        *((2, 0), (3, 0)),
        *((4, 1), (5, 1), (6, 1), (7, 1)),
    ]


def test_checkpoints_are_timed_and_named(start: Start, tmp_path: Path) -> None:
    with start() as run:
        training = trainer(StepspanCallback(), enable_checkpointing=True, default_root_dir=tmp_path, max_epochs=2)
        training.fit(Line(), loader(4))
        assert "save_checkpoint" not in vars(training), "the trainer is as it was"
    assert [event["name"] for event in events(run, "span_begin")] == ["checkpoint"] * 2
    first, _ = events(run, "artifact")
    assert (first["name"], first["kind"]) == ("epoch=0-step=2.ckpt", "checkpoint")
    assert Path(first["path"]).parent.parent == tmp_path


def test_an_exception_fails_what_is_open(start: Start, tmp_path: Path) -> None:
    training = trainer(StepspanCallback())
    with pytest.raises(ValueError, match="in the step"):
        training.fit(Line(fails_at=2), loader())
    assert "save_checkpoint" not in vars(training)
    journal = only_session(tmp_path / "stepspan-runs")
    (error,) = events(journal, "error")
    assert error["type"] == "ValueError"
    assert "in training_step" in error["stack"]
    failed = {name for name, span in spans(journal).items() if span.error is not None}
    assert failed == {"training.run", "training.epoch 0", "training.step 2"}
    assert status_of(journal) == "failed"
    training.fit(Line(), loader(4))
    assert len(list(find_sessions(tmp_path / "stepspan-runs"))) == 2


def test_an_interrupt_is_told_and_lightning_leaves_as_it_would(start: Start, tmp_path: Path) -> None:
    class Interrupt(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            trainer(Interrupt(), StepspanCallback()).fit(Line(), loader())
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on
    journal = only_session(tmp_path / "stepspan-runs")
    assert status_of(journal) == "interrupted"
    assert not events(journal, "error")


def test_an_interrupt_within_a_run_ends_it_as_interrupted(start: Start) -> None:
    class Interrupt(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit), start() as run:
            trainer(Interrupt(), StepspanCallback()).fit(Line(), loader())
    finally:
        signal.signal(signal.SIGINT, handler)
    assert status_of(runs.path_of(run)) == "interrupted", "Lightning makes an exit with code 1 of it"
    assert not events(run, "error")


def test_a_training_that_is_terminated_was_interrupted(start: Start, tmp_path: Path) -> None:
    class Terminate(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise SIGTERMException

    with pytest.raises(SIGTERMException):
        trainer(Terminate(), StepspanCallback()).fit(Line(), loader())
    journal = only_session(tmp_path / "stepspan-runs")
    assert not events(journal, "error")
    assert status_of(journal) == "interrupted"


def test_learning_rates_of_lightnings_own_monitor_are_recorded(start: Start, tmp_path: Path) -> None:
    with start() as run:
        monitor = LearningRateMonitor("step")
        training = trainer(monitor, StepspanCallback(), logger=True, log_every_n_steps=1, default_root_dir=tmp_path)
        training.fit(Line(rate=0.5), loader(4))
    assert [e["metrics"]["lr-SGD"] for e in events(run, "metrics") if "lr-SGD" in e["metrics"]] == [0.5] * 2


def test_no_signal_handler_of_lightnings_is_taken(start: Start) -> None:
    handlers: list[Any] = []

    class Look(Callback):
        def on_train_start(self, *_: Any) -> None:
            handlers.append([type(signal.getsignal(number)) for number in signal.valid_signals()])

    for callbacks in ([Look()], [Look(), StepspanCallback()]):
        trainer(*callbacks).fit(Line(), loader(2))
    assert handlers[0] == handlers[1]


def test_it_is_a_callback_that_can_be_copied() -> None:
    callback = StepspanCallback(name="line")
    for each in (callback, copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert isinstance(each, Callback)
        assert isinstance(each, StepspanCallback)
        assert each.loop._arguments == {"name": "line"}


def test_wrong_arguments_are_refused_before_training(start: Start) -> None:
    with pytest.raises(stepspan.ConfigError, match="name"):
        trainer(StepspanCallback(name=5)).fit(Line(), loader(2))


def test_the_lightning_that_is_loaded_is_the_one(tmp_path: Path) -> None:
    code = """
    import sys
    import stepspan.integrations.lightning as integration
    assert not {"torch", "lightning", "pytorch_lightning"} & set(sys.modules)
    import pytorch_lightning
    assert isinstance(integration.StepspanCallback(), pytorch_lightning.Callback)
    assert "lightning.pytorch" not in sys.modules
    """
    if subprocess.run([sys.executable, "-c", "import pytorch_lightning"], capture_output=True).returncode:
        pytest.skip("no pytorch_lightning here")
    (tmp_path / "check.py").write_text("\n".join(line[4:] for line in code.splitlines()))
    found = subprocess.run([sys.executable, "check.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr


RANKS = """
import sys
sys.path[:0] = {path!r}
from test_lightning import Callback, Line, loader, trainer
from stepspan.integrations.lightning import StepspanCallback
from stepspan.integrations.torch import watch_collectives


class Watch(Callback):
    def on_train_start(self, trainer, module):
        watch_collectives(trainer.strategy.model)


trainer(StepspanCallback(), Watch(), devices=2, strategy="ddp").fit(Line(), loader(16))
"""


def test_ranks_that_lightning_launches_itself_are_one_job(start: Start, tmp_path: Path) -> None:
    here = Path(__file__).parent
    (tmp_path / "ranks.py").write_text(RANKS.format(path=[str(here), str(here.parent)]))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "ranks.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = sessions(tmp_path / "stepspan-runs")
    assert set(found) == {"0", "1"}
    headers = {rank: events(path)[0] for rank, path in found.items()}
    assert headers["0"]["job_id"] == headers["1"]["job_id"]
    assert [headers[rank]["world_size"] for rank in "01"] == [2, 2]
    traces = [{span.trace_id for name, span in spans(path).items() if "step" in name} for path in found.values()]
    assert traces[0] == traces[1]
    assert len(traces[0]) == 4
    waits = [[one for one in events(path) if one.get("collective")] for path in found.values()]
    assert [len(each) for each in waits] == [4, 4], "one in each step's backward pass"
