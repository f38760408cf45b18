"""From a key to a metric's name: no two keys share a series in Prometheus, whose translation is written out here."""

from __future__ import annotations

import re
from typing import Any

import pytest
from harness.events_of import SessionEvents
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stepspan.mapping.names import MAX_NAME_CHARS, metric_name
from stepspan.mapping.records import Series

OF_A_SESSION = {
    "training.step.number", "training.step.time", "training.step.wait", "training.step.duration", "training.phase.time",
    "training.phase.device_time", "training.run.epoch", "training.run.info", "training.run.errors",
    "training.run.total_steps", "training.run.eta", "training.run.start_time", "training.run.checkpoint_time",
    "training.throughput",
}  # fmt: skip
UNITS = {"s": "seconds", "By": "bytes", "1": "ratio"}


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


def prometheus_series(key: str, split: str = "train") -> tuple[str, str, str]:
    name = metric_name(key, split)
    return prometheus_name(name.name), name.split, name.key or ""


def said(key: str, split: str) -> tuple[str, str]:
    """A key and its split, where `val/loss` is the loss of split val."""
    head, slash, rest = key.partition("/")
    return (rest, head) if slash and rest and head in ("train", "val", "eval", "test") else (key, split)


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
        ("train/loss", "training.loss", "train", None),
        ("val/loss", "training.loss", "val", None),
        ("eval/a.b", "training.a.b", "eval", "a.b"),
        ("test/loss", "training.loss", "test", None),
        ("valid/loss", "training.valid/loss", "train", "valid/loss"),
        ("val_loss", "training.val_loss", "train", None),
        ("val/", "training.val/", "train", "val/"),
        ("val", "training.val", "train", None),
        ("val/val/loss", "training.val/loss", "val", "val/loss"),
        ("", "training.", "train", ""),
        ("🔥", "training.🔥", "train", "🔥"),
        ("step", "training.step", "train", None),
        ("epoch", "training.epoch", "train", None),
        ("memory", "training.memory", "train", None),
        ("step.time", "training.user.step.time", "train", "step.time"),
        ("step/time", "training.user.step/time", "train", "step/time"),
        ("val/step.time", "training.user.step.time", "val", "step.time"),
        ("run.epoch", "training.user.run.epoch", "train", "run.epoch"),
        ("phase.time", "training.user.phase.time", "train", "phase.time"),
        ("memory.allocated", "training.user.memory.allocated", "train", "memory.allocated"),
        ("step_number", "training.user.step_number", "train", "step_number"),
        ("step_time_seconds", "training.user.step_time_seconds", "train", "step_time_seconds"),
        ("run_epoch", "training.user.run_epoch", "train", "run_epoch"),
        ("run_eta_seconds", "training.user.run_eta_seconds", "train", "run_eta_seconds"),
        ("throughput", "training.throughput", "train", None),
        ("user_step_number", "training.user_step_number", "train", None),
        ("steps_per_second", "training.steps_per_second", "train", None),
    ],
)
def test_a_key_becomes(key: str, name: str, split: str, attribute: str | None) -> None:
    assert metric_name(key, "train") == (name, split, attribute)


def test_keys_of_300_characters_are_cut_but_told_apart() -> None:
    one, other = "x" * 300, "x" * 299 + "y"
    assert metric_name(one, "train").name == metric_name(other, "train").name
    assert len(metric_name(one, "train").name) == MAX_NAME_CHARS == 255
    assert metric_name(one, "train").key == one
    assert prometheus_series(one) != prometheus_series(other)


PIECES = [
    "a", "b", "_", ".", "/", "__", " ", "é", "🔥", "user", "step", "run", "epoch", "number", "time", "seconds",
    "train/", "val/", "memory", "phase", "info", "0", ":", "-",
]  # fmt: skip
LIKELY = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
SPLITS = st.sampled_from(["train", "val", "x"])


@settings(deadline=None)
@given(LIKELY | st.text(max_size=5), LIKELY | st.text(max_size=5), SPLITS, SPLITS)
@example("user_step_number", "step_number", "train", "train")
@example("user.run.epoch", "run.epoch", "train", "train")
@example("a.b", "a_b", "train", "train")
@example("_", "", "train", "train")
def test_two_keys_share_a_series_only_if_they_are_the_same_key(
    one: Any, other: Any, split: Any, other_split: Any
) -> None:
    same = said(one, split) == said(other, other_split)
    assert (prometheus_series(one, split) == prometheus_series(other, other_split)) == same


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
    s.emit("step_end", begin=step, samples=1)
    s.metrics({"loss": 1.0}, 100.0, step=0)
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
    name, _, attribute = prometheus_series(key)
    assert name not in OURS or attribute
