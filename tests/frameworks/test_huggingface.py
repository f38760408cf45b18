"""A training by Hugging Face's Trainer, recorded by one callback: what arrives, and what its journal says."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.runs import events, outline, sessions, spans, status_of
from harness.stack import Collector, Prometheus

pytest.importorskip("transformers", reason="no transformers here: `make test-frameworks`")
pytest.importorskip("accelerate", reason="no accelerate here: `make test-frameworks`")

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import stepspan
from stepspan.integrations.huggingface import StepspanCallback
from stepspan.journal.format import decode
from stepspan.journal.layout import find_sessions
from stepspan.run import Run

pytestmark = pytest.mark.filterwarnings("ignore")
start = runs.start
Start = Callable[..., Run]
EXAMPLE = Path(__file__).parents[2] / "examples" / "huggingface_trainer.py"
MILLISECOND = 1_000_000


class Words(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([1, index % 3, 2]), "labels": torch.tensor(index % 2)}


def trainer(*callbacks: Any, train: Any = None, **arguments: Any) -> Trainer:
    """A tiny BERT on 8 sentences in batches of 2; logs each step unless told otherwise."""
    config = BertConfig(
        vocab_size=3, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4,
        max_position_embeddings=4,
    )  # fmt: skip
    given = {
        "output_dir": "out", "per_device_train_batch_size": 2, "num_train_epochs": 1, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return Trainer(
        model=BertForSequenceClassification(config),
        args=TrainingArguments(**{**given, **arguments}),
        train_dataset=train or Words(8),
        eval_dataset=Words(4),
        callbacks=list(callbacks),
    )


def only_session(directory: Path) -> Path:
    (session,) = find_sessions(directory)
    return session.path


def steps_of(where: Run | Path) -> list[int]:
    return [event["step"] for event in events(where, "step_begin")]


# the whole way


def test_the_example_arrives_whole(collector: Collector, prometheus: Prometheus, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not runs.is_ours(name)}
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.http_endpoint}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, env={**env, **offline},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 0.5, "it learned"
    journal = only_session(tmp_path / "stepspan-runs")
    lines = [decode(line) for line in (journal / "000001.jsonl").read_bytes().splitlines()]
    job = lines[0]["job_id"]
    sync = [sys.executable, "-m", "stepspan", "sync", str(tmp_path / "stepspan-runs")]
    subprocess.run([*sync, "--endpoint", collector.http_endpoint], check=True, capture_output=True, timeout=60)

    found = collector.spans()
    assert Counter(span["name"] for span in found) == {
        "training.run": 1, "training.epoch": 2, "training.step": 40, "validation": 2, "checkpoint": 2,
    }  # fmt: skip
    trained = [span for span in found if span["name"] == "training.step"]
    assert sorted(span["attributes"]["step"] for span in trained) == list(range(40))
    assert len({span["traceId"] for span in trained}) == 40
    assert not [span for span in found if span["status"].get("code") == 2]

    for key in ("loss", "learning_rate", "grad_norm", "epoch"):
        journaled = {
            event["ts"] // MILLISECOND: event["metrics"][key]
            for event in lines
            if event["tag"] == "metrics" and key in event["metrics"]
        }
        ((_, samples),) = prometheus.series(f'training_{key}{{job_id="{job}",split="train"}}[1h]')
        assert {ms: value for ms, value in samples if value == value} == journaled
        assert len(journaled) >= 8
    ((_, samples),) = prometheus.series(f'training_loss{{job_id="{job}",split="eval"}}[1h]')
    assert len([value for _, value in samples if value == value]) == 2
    phases = {labels["phase"] for labels, _ in prometheus.series(f'training_phase_time_seconds{{job_id="{job}"}}[1h]')}
    assert phases == {"data_wait", "validation", "checkpoint"}
    ((labels, _),) = prometheus.series(f'training_run_info{{job_id="{job}",model!=""}}[1h]')
    assert (labels["name"], labels["model"]) == ("find a word", "BertForSequenceClassification")
    assert (labels["batch_size"], labels["learning_rate"]) == ("32", "0.003")
    ((_, total),) = prometheus.series(f'training_run_total_steps{{job_id="{job}"}}[1h]')
    assert total[0][1] == 40
    items = {
        labels["item"]
        for labels, samples in prometheus.series(f'training_throughput_per_second{{job_id="{job}"}}[1h]')
        if all(rate > 0 for _, rate in samples if rate == rate)
    }
    assert items == {"samples", "tokens"}
    assert Counter(log["eventName"] for log in collector.logs()) == {"training.hyperparams": 1, "training.artifact": 2}


# what the journal says


def test_a_training_without_a_run_is_one(start: Start, tmp_path: Path) -> None:
    trainer(StepspanCallback(name="words"), eval_strategy="epoch", save_strategy="epoch").train()
    journal = only_session(tmp_path / "stepspan-runs")
    told = [line for line in outline(journal) if not line.startswith("sample")]
    steps = [line for n in range(4) for line in (f"    step {n}", "    end step", f"train {n}: loss")]
    assert [line.partition("=")[0] for line in told] == [
        *("run", "hyperparams", "progress", "  epoch 0"),
        *steps,
        *("    span validation", "eval 3: eval_loss", "train 3: epoch", "    end span"),
        *("    span checkpoint", "    end span", "artifact"),
        *("train 3: train_runtime", "  end epoch", "end run completed"),
    ]
    assert events(journal, "run_end")[0]["status"] == "completed"
    (begin,), (params,) = events(journal, "run_begin"), events(journal, "hyperparams")
    assert begin["name"] == "words"
    chosen = ("model", "batch_size", "learning_rate", "max_steps", "warmup_steps")
    assert [params["params"][name] for name in chosen] == ["BertForSequenceClassification", 2, 5e-05, 4, 0]
    assert "hub_model_id" not in params["params"], "what is not set"
    assert events(journal, "progress")[0]["total_steps"] == 4
    last = events(journal, "metrics")[-1]["metrics"]
    assert 0 < last["mean_train_loss"] < 1
    assert "train_loss" not in last, "which would be another `training_loss` of split train"
    (artifact,) = events(journal, "artifact")
    assert (artifact["name"], artifact["kind"]) == ("checkpoint-4", "checkpoint")
    assert Path(artifact["path"]).is_dir()
    assert Path(artifact["path"]).is_absolute()
    ends = events(journal, "step_end")
    assert {event["samples"] for event in ends} == {2.0}
    assert all(0 < event["data_wait"] < 10 for event in ends)


def test_what_is_evaluated_after_the_training_is_its_runs(start: Start, tmp_path: Path) -> None:
    training = trainer(StepspanCallback())
    training.train()
    training.evaluate(metric_key_prefix="test")
    training.predict(Words(4))
    stepspan.current_run().close()
    journal = only_session(tmp_path / "stepspan-runs")
    told = [line.partition("=")[0] for line in outline(journal) if line != "sample"]
    score = ["span validation", "end span", "test 3: test_loss"]
    assert told[told.index("end run completed") :] == [
        "end run completed",
        *("span validation", "test 3: test_loss", "train 3: epoch", "end span"),
        *score,
    ]
    assert status_of(journal) == "completed"
    assert len(events(journal, "run_end")) == 1


def test_a_run_of_the_users_stays_open_and_takes_what_follows(start: Start) -> None:
    with start() as run:
        training = trainer(StepspanCallback)
        training.train()
        assert not run.closed
        training.evaluate()
        training.predict(Words(4))
    assert [event["name"] for event in events(run, "span_begin")] == ["validation", "validation"]
    found = [event for event in events(run, "metrics") if event["split"] != "train"]
    assert [(event["split"], next(iter(event["metrics"]))) for event in found] == [
        ("eval", "eval_loss"),
        ("test", "test_loss"),
    ]
    assert status_of(runs.path_of(run)) == "completed"


def test_what_is_evaluated_without_a_run_starts_none_and_is_told(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = trainer(StepspanCallback())
    for _ in range(2):
        training.evaluate()
    assert not (tmp_path / "stepspan-runs").exists()
    (message,) = [record.getMessage() for record in caplog.records if record.name == "stepspan"]
    assert message.startswith("stepspan: an evaluation is not recorded")


def test_switched_off_it_does_nothing(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPSPAN_DISABLED", "1")
    trainer(StepspanCallback()).train()
    assert not (tmp_path / "stepspan-runs").exists()


def test_a_step_is_an_optimizer_step(start: Start) -> None:
    with start() as run:
        arguments = {"gradient_accumulation_steps": 3, "num_train_epochs": 2, "include_num_input_tokens_seen": True}
        trainer(StepspanCallback(), train=Words(16), **arguments).train()
    assert steps_of(run) == [0, 1, 2, 3, 4, 5]
    assert [event["samples"] for event in events(run, "step_end")] == [6.0, 6.0, 4.0] * 2
    assert [event["tokens"] for event in events(run, "step_end")] == [18.0, 18.0, 12.0] * 2
    assert [event["epoch"] for event in events(run, "epoch_begin")] == [0, 1]


def test_an_evaluation_between_steps_lies_in_the_epoch(start: Start) -> None:
    with start() as run:
        trainer(StepspanCallback(), eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2).train()
    (epoch,) = events(run, "epoch_begin")
    phases = events(run, "span_begin")
    assert [event["name"] for event in phases] == ["validation", "checkpoint"] * 2
    assert {event["parent"] for event in phases} == {epoch["seq"]}


def test_a_resumed_training_goes_on_counting(start: Start, tmp_path: Path) -> None:
    with start() as first:
        trainer(StepspanCallback(), save_strategy="steps", save_steps=3, max_steps=3).train()
    with start() as second:
        trainer(StepspanCallback(), num_train_epochs=2).train(resume_from_checkpoint="out/checkpoint-3")
    assert steps_of(first) == [0, 1, 2]
    assert steps_of(second) == [3, 4, 5, 6, 7]
    assert [event["epoch"] for event in events(second, "epoch_begin")] == [0, 1]


class StopEpochs(TrainerCallback):
    """Each epoch ends after its first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_epoch_stop = True
        return control


def test_epochs_that_are_cut_short_count_on(start: Start) -> None:
    with start() as run:
        trainer(StopEpochs(), StepspanCallback(), num_train_epochs=3).train()
    assert [event["epoch"] for event in events(run, "epoch_begin")][:3] == [0, 1, 2]


class Broken(Words):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        raise ValueError("no such word")


def test_an_exception_within_a_run_fails_what_is_open(start: Start) -> None:
    with pytest.raises(ValueError, match="no such word"), start() as run:
        trainer(StepspanCallback(), train=Broken(4)).train()
    assert events(run, "error")[0]["type"] == "ValueError"
    assert {name for name, span in spans(run).items() if span.error is not None} == {
        "training.run",
        "training.epoch 0",
    }


PROGRAM = """
import sys
sys.path[:0] = {path!r}
from test_huggingface import Broken, StepspanCallback, trainer

trainer(StepspanCallback(), train=Broken(4)).train()
"""


def test_an_exception_that_ends_the_program_is_the_runs(start: Start, tmp_path: Path) -> None:
    here = Path(__file__).parent
    (tmp_path / "train.py").write_text(PROGRAM.format(path=[str(here), str(here.parent)]))
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (journal,) = sessions(tmp_path / "stepspan-runs").values()
    (error,) = events(journal, "error")
    assert error["type"] == "ValueError"
    assert "in __getitem__" in error["stack"]
    assert status_of(journal) == "failed"


def test_an_exception_that_was_caught_leaves_an_interrupted_run(start: Start, tmp_path: Path) -> None:
    callback = StepspanCallback()
    with pytest.raises(ValueError, match="no such word"):
        trainer(callback, train=Broken(4)).train()
    trainer(callback).train()
    stepspan.current_run().close()
    assert Counter(status_of(session.path) for session in find_sessions(tmp_path / "stepspan-runs")) == {
        "interrupted": 1,
        "completed": 1,
    }


class Stop(TrainerCallback):
    """Ctrl-C after the second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_a_training_that_was_interrupted_takes_none_of_the_next(start: Start, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(StepspanCallback(), Stop()).train()
    trainer(StepspanCallback()).train()
    trainer(StepspanCallback()).train()
    stepspan.current_run().close()
    assert Counter(status_of(session.path) for session in find_sessions(tmp_path / "stepspan-runs")) == {
        "interrupted": 1,
        "completed": 2,
    }


def test_a_trial_that_is_pruned_was_interrupted(start: Start, tmp_path: Path) -> None:
    class Prune(TrainerCallback):
        """As the Trainer does it in a search of hyperparameters."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                state.is_hyper_param_search = True
                training.callback_handler.on_train_end(args, state, control)
                raise KeyError("TrialPruned")

    training = trainer(StepspanCallback(), Prune())
    with pytest.raises(KeyError):
        training.train()
    journal = only_session(tmp_path / "stepspan-runs")
    assert status_of(journal) == "interrupted"
    assert not events(journal, "error")


class OutOfMemory(TrainerCallback):
    """In the first step of batches of 4."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.train_batch_size == 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


def test_samples_are_of_the_batch_size_that_was_found(start: Start) -> None:
    with start() as run:
        found = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_steps": 1}
        trainer(OutOfMemory(), StepspanCallback(), **found).train()
    (*_, end) = events(run, "step_end")
    (*_, params) = events(run, "hyperparams")
    assert end["samples"] == params["params"]["batch_size"] < 4


def test_it_is_a_callback_that_can_be_copied() -> None:
    callback = StepspanCallback(name="words")
    for each in (callback, copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert isinstance(each, TrainerCallback)
        assert isinstance(each, StepspanCallback)
        assert each.loop._arguments == {"name": "words"}


def test_wrong_arguments_are_refused_before_training(start: Start) -> None:
    with pytest.raises(stepspan.ConfigError, match="name"):
        trainer(StepspanCallback(name=5)).train()


def test_importing_it_loads_no_framework() -> None:
    code = "import sys, stepspan.integrations.huggingface; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_trainings_in_threads_have_a_run_each(start: Start) -> None:
    """And what is evaluated after each, and logged there by hand, is its own."""
    trained = threading.Barrier(2, timeout=120)

    def train(number: int) -> None:
        callback = StepspanCallback(job_id=f"job-{number}", samplers="none", stall_after=0)
        training = trainer(callback)
        training.train()
        trained.wait()
        stepspan.current_run().log_metrics({"score": number})
        training.evaluate()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, range(2)))
    jobs = {events(session.path)[0]["job_id"]: session.path for session in find_sessions(Path("stepspan-runs"))}
    assert jobs.keys() == {"job-0", "job-1"}
    for job, path in jobs.items():
        metrics = [event["metrics"] for event in events(path, "metrics")]
        assert len(events(path, "step_end")) == 4
        assert [each["score"] for each in metrics if "score" in each] == [float(job[-1])]
        assert any("eval_loss" in each for each in metrics)


def test_a_callback_takes_the_arguments_of_a_run_and_no_other() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'sampler'"):
        StepspanCallback(sampler="none")
