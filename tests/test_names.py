"""From a key to a metric's name: no two keys share a series in Prometheus, whose translation is written out here."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import runs
from harness.events_of import SessionEvents
from harness.stack import Prometheus
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stepspan.mapping.names import MAX_NAME_CHARS, metric_name
from stepspan.mapping.records import Series
from stepspan.run import Run
from stepspan.samplers.torch import COUNTERS, SUMS

start = runs.start
Start = Callable[..., Run]
OF_A_SESSION = {
    "training.step.number", "training.step.time", "training.step.wait", "training.step.duration", "training.phase.time",
    "training.phase.device_time", "training.run.epoch", "training.run.info", "training.run.errors",
    "training.run.total_steps", "training.run.eta", "training.run.start_time", "training.run.checkpoint_time",
    "training.throughput", "training.nonfinite",
    "training.memory.allocated", "training.memory.reserved", "training.memory.active",
    "training.memory.inactive", "training.memory.alloc_retries", "training.memory.ooms",
}  # fmt: skip
UNITS = {"s": "seconds", "By": "bytes", "1": "ratio", "{item}/s": "per_second"}


def prometheus_name(name: str, unit: str = "", kind: str = "gauge") -> str:
    """As Prometheus' OTLP receiver does with its default strategy, UnderscoreEscapingWithSuffixes."""
    tokens = [token for token in re.split(r"[^a-zA-Z0-9:]", name) if token]
    suffix = UNITS.get(unit)
    if suffix and suffix not in tokens:
        tokens.append(suffix)
    if kind == "sum":
        tokens = [*(token for token in tokens if token != "total"), "total"]
    translated = "_".join(tokens)
    return f"_{translated}" if translated[:1].isdigit() else translated


def prometheus_series(key: str, split: str = "train") -> tuple[str, dict[str, str]]:
    """Name and labels; a label without a value is none."""
    name = metric_name(key, split)
    labels = {"split": name.split, "key": name.key or ""}
    return prometheus_name(name.name), {label: value for label, value in labels.items() if value}


def named_split(key: str) -> str | None:
    """The split that a key's prefix names, in words of the documentation."""
    for word in ("train", "val", "valid", "validation", "eval", "test"):
        for separator in "/._":
            if key.startswith(word + separator) and key != word + separator:
                if word + separator == "valid_" and key not in ("valid_loss", "valid_loss_step", "valid_loss_epoch"):
                    continue
                return "val" if word.startswith("val") else word
    return None


@pytest.mark.parametrize(
    ("key", "name", "split", "attribute"),
    [
        ("loss", "training.loss", "train", None),
        ("Loss", "training.Loss", "train", None),
        ("a_b", "training.a_b", "train", None),
        ("a.b", "training.a.b", "train", "a.b"),
        ("a/b", "training.a/b", "train", "a/b"),
        ("a__b", "training.a__b", "train", "a__b"),
        ("_a", "training._a", "train", "_a"),
        ("train/loss", "training.loss", "train", "train/loss"),
        ("train_loss", "training.loss", "train", "train_loss"),
        ("train.loss", "training.loss", "train", "train.loss"),
        ("train//loss", "training./loss", "train", "train//loss"),
        ("/loss", "training./loss", "train", "/loss"),
        ("val/loss", "training.loss", "val", "val/loss"),
        ("val_loss_epoch", "training.loss_epoch", "val", "val_loss_epoch"),
        ("validation.loss", "training.loss", "val", "validation.loss"),
        ("validation_acc", "training.acc", "val", "validation_acc"),
        ("valid/loss", "training.loss", "val", "valid/loss"),
        ("valid.acc", "training.acc", "val", "valid.acc"),
        ("valid_loss", "training.loss", "val", "valid_loss"),
        ("valid_loss_step", "training.loss_step", "val", "valid_loss_step"),
        ("valid_tokens", "training.valid_tokens", "train", None),
        ("valid_losses", "training.valid_losses", "train", None),
        ("valid_loss\n", "training.valid_loss\n", "train", "valid_loss\n"),
        ("eval/a.b", "training.a.b", "eval", "eval/a.b"),
        ("eval_loss", "training.loss", "eval", "eval_loss"),
        ("test/loss", "training.loss", "test", "test/loss"),
        ("training_loss", "training.training_loss", "train", None),
        ("Train/loss", "training.Train/loss", "train", "Train/loss"),
        ("evaluation/loss", "training.evaluation/loss", "train", "evaluation/loss"),
        ("valor", "training.valor", "train", None),
        ("val/", "training.val/", "train", "val/"),
        ("train_", "training.train_", "train", "train_"),
        ("val/\n", "training.\n", "val", "val/\n"),
        ("val", "training.val", "train", None),
        ("val/val/loss", "training.val/loss", "val", "val/val/loss"),
        ("val/train_loss", "training.train_loss", "val", "val/train_loss"),
        ("", "training.", "train", ""),
        ("🔥", "training.🔥", "train", "🔥"),
        ("step", "training.step", "train", None),
        ("epoch", "training.epoch", "train", None),
        ("memory", "training.memory", "train", None),
        ("step.time", "training.user.step.time", "train", "step.time"),
        ("step/time", "training.user.step/time", "train", "step/time"),
        ("val/step.time", "training.user.step.time", "val", "val/step.time"),
        ("train_step_time", "training.user.step_time", "train", "train_step_time"),
        ("train/step_time", "training.user.step_time", "train", "train/step_time"),
        ("step time  seconds", "training.user.step time  seconds", "train", "step time  seconds"),
        ("run.epoch", "training.user.run.epoch", "train", "run.epoch"),
        ("phase.time", "training.user.phase.time", "train", "phase.time"),
        ("memory.allocated", "training.user.memory.allocated", "train", "memory.allocated"),
        ("memory_allocated_bytes", "training.user.memory_allocated_bytes", "train", "memory_allocated_bytes"),
        ("step_number", "training.user.step_number", "train", "step_number"),
        ("step_time_seconds", "training.user.step_time_seconds", "train", "step_time_seconds"),
        ("test_step_logged", "training.user.step_logged", "test", "test_step_logged"),
        ("nonfinite_total", "training.user.nonfinite_total", "train", "nonfinite_total"),
        ("run_epoch", "training.user.run_epoch", "train", "run_epoch"),
        ("run_eta_seconds", "training.user.run_eta_seconds", "train", "run_eta_seconds"),
        ("throughput", "training.throughput", "train", None),
        ("user_step_number", "training.user_step_number", "train", None),
        ("steps_per_second", "training.steps_per_second", "train", None),
        ("train_samples_per_second", "training.samples_per_second", "train", "train_samples_per_second"),
    ],
)
def test_a_key_becomes(key: str, name: str, split: str, attribute: str | None) -> None:
    assert metric_name(key, "train") == (name, split, attribute)


def test_a_prefix_wins_over_the_split_of_the_call_which_is_kept_as_it_is_written() -> None:
    assert metric_name("val/loss", "probe") == ("training.loss", "val", "val/loss")
    assert metric_name("train_loss", "val") == ("training.loss", "train", "train_loss")
    assert metric_name("loss", "validation") == ("training.loss", "validation", None)


def test_keys_of_300_characters_are_cut_but_told_apart() -> None:
    one, other = "x" * 300, "x" * 299 + "y"
    assert metric_name(one, "train").name == metric_name(other, "train").name
    assert len(metric_name(one, "train").name) == MAX_NAME_CHARS == 255
    assert metric_name(one, "train").key == one
    assert prometheus_series(one) != prometheus_series(other)


PIECES = [
    "a", "b", "_", ".", "/", "__", " ", "\n", "é", "🔥", "user", "step", "run", "epoch", "number", "time", "seconds",
    "train", "val", "valid", "validation", "eval", "test", "loss", "train/", "val_", "test.", "valid_", "valid_loss",
    "memory", "phase", "info", "nonfinite", "total", "logged", "0", ":", "-", "x" * 255,
]  # fmt: skip
LIKELY = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
SPLITS = st.sampled_from(["train", "val", "x"])


@settings(deadline=None, max_examples=400)
@given(LIKELY | st.text(max_size=5), LIKELY | st.text(max_size=5), SPLITS, SPLITS)
@example("user_step_number", "step_number", "train", "train")
@example("user.run.epoch", "run.epoch", "train", "train")
@example("a.b", "a_b", "train", "train")
@example("_", "", "train", "train")
@example("val/", "", "train", "val")
@example("train//loss", "/loss", "train", "train")
@example("loss", "val/loss", "val", "train")
@example("validation_loss", "valid_loss", "val", "val")
@example("x" * 300, "x" * 299 + "y", "train", "train")
@example("val/loss", "val/loss", "x", "train")
def test_two_keys_share_a_series_only_if_they_are_the_same_key(
    one: Any, other: Any, split: Any, other_split: Any
) -> None:
    same = one == other and (split == other_split or named_split(one) is not None)
    assert (prometheus_series(one, split) == prometheus_series(other, other_split)) == same
    assert metric_name(one, split).split == (named_split(one) or split)


@pytest.mark.stack
def test_a_real_prometheus_holds_each_key_of_a_run_as_a_series_of_its_own(start: Start, tmp_path: Path) -> None:
    """Whose translation is not written out here."""
    keys = [
        *("loss", "train/loss", "train_loss", "train.loss", "train//loss", "/loss", "val/loss", "valid_loss", ""),
        *("validation/loss", "val_loss", "valid_tokens", "val/", "recall@10", "recall_10", "recall 10", "train/", "🔥"),
        *("точность", "準確率", "a" * 300 + "x", "a" * 300 + "y", "step_time", "train/step_time", "step time seconds"),
        *("user_step_time", "user/step_time", "9lives", "a:b", "a_b", "_", "\x00", "e\u0301", "é", "nonfinite_total"),
    ]
    with Prometheus(tmp_path / "prometheus") as prometheus:
        with start(directory=tmp_path / "runs", job_id="keys", endpoint=prometheus.otlp_endpoint) as run:
            for split, hundreds in ((None, 0), ("val", 100)):
                run.log_metrics({key: float(hundreds + index) for index, key in enumerate(keys)}, split=split)
                time.sleep(0.002)
            assert run.flush(30)
        found = prometheus.series('{job_id="keys",__name__=~"training.*",split=~".+"}[1h]')
    curves = sorted([value for _, value in samples] for _, samples in found)
    named = [index for index, key in enumerate(keys) if named_split(key)]  # the call's split does not matter to them
    others = [index for index in range(len(keys)) if index not in named]
    twice = [[float(index), 100.0 + index] for index in named]
    assert curves == sorted([*twice, *([float(hundreds + index)] for index in others for hundreds in (0, 100))])


def our_series() -> dict[str, Series]:
    """All metrics of its own that a session can have, by name."""
    s = SessionEvents()
    s.run()
    s.emit("progress", total_steps=9)
    s.emit("artifact", name="a", path="a", kind="checkpoint")
    s.emit("epoch_begin", parent=0, epoch=0)
    step = s.emit("step_begin", parent=0, step=0, split="train")
    for cuda in ({}, {"cuda": True}):
        span = s.emit("span_begin", parent=step, name="all_reduce", collective=True, **cuda)
        s.emit("span_end", begin=span)
    s.emit("device_time", begin=span, seconds=0.5)
    s.emit("error", parent=step, type="E", message="", stack="")
    s.emit("memory", device_id=0, counters=dict.fromkeys(COUNTERS, 1))
    s.emit("sample", source="torch", values=[[name, 1, {"device_id": 0}] for name in SUMS])
    s.emit("step_end", begin=step, samples=1)
    s.metrics({"loss": "NaN"}, 100.0, step=0)
    return {series.name: series for series, *_ in s.records("metrics") if series.name != "training.loss"}


OURS = {prometheus_name(series.name, series.unit, series.kind) for series in our_series().values()}


def test_these_are_the_metrics_of_a_session() -> None:
    assert our_series().keys() == OF_A_SESSION


@settings(deadline=None)
@given(LIKELY)
@example("run_eta_seconds")
@example("throughput_per_second")
@example("step_number")
@example("step.number")
@example("step_time_seconds")
@example("step__duration seconds")
def test_no_key_shares_a_series_with_one_of_stepspans_own(key: str) -> None:
    assert prometheus_series(key)[0] not in OURS
