"""From a user's metric key to a metric's name, such that no two keys share a series.

=================================  ======================  ==========================  ==============================
the key                            its metric              its attributes              why
=================================  ======================  ==========================  ==============================
`loss`                             `training.loss`         `split` of the call
`val/loss`                         `training.loss`         `split="val"`               a leading `train/`, `val/`,
                                                                                       `eval/`, `test/` is its split
`grad.norm`, `a__b`, `_x`, `🔥`    `training.grad.norm` …  `split`, `key="grad.norm"`  Prometheus would make it the
                                                                                       name of another key
`step/time`, `run.x`, `phase/x`,   `training.user.` + key  `split`, `key`              stepspan's own names begin
`memory.x`                                                                             like that
`step_time`, `run_eta_seconds` …   `training.user.` + key  `split`, `key`              Prometheus calls one of
                                                                                       stepspan's own metrics that
longer than `MAX_NAME_CHARS`       cut there               `split`, `key`
=================================  ======================  ==========================  ==============================

Prometheus turns every character but letters, digits and `_` into `_`, folds `__` and trims the ends: a key that is not
itself after that carries attribute `key` as well.
"""

from __future__ import annotations

import re
from typing import NamedTuple

SPLITS = ("train", "val", "eval", "test")
RESERVED = re.compile(r"(?:step|run|phase|memory)[./]")
PROMETHEUS_SUFFIXES = {
    "step_number": "", "step_time": "_seconds", "step_wait": "_seconds", "step_duration": "_seconds",
    "phase_time": "_seconds", "phase_device_time": "_seconds",
    "run_epoch": "", "run_info": "", "run_errors": "_total", "run_total_steps": "", "run_eta": "_seconds",
    "run_start_time": "_seconds", "run_checkpoint_time": "_seconds", "throughput_per_second": "",
}  # fmt: skip
"""What Prometheus makes of the names of stepspan's own metrics, and what it adds."""
OWN_NAMES = frozenset(name + end for name, suffix in PROMETHEUS_SUFFIXES.items() for end in ("", suffix))
UNCHANGED = re.compile(r"[A-Za-z0-9]+(?:_[A-Za-z0-9]+)*")
"""Keys that Prometheus leaves as they are."""
MAX_NAME_CHARS = 255


class MetricName(NamedTuple):
    """A metric's name, its `split`, and the key where the name alone does not tell it."""

    name: str
    split: str
    key: str | None


def metric_name(key: str, split: str) -> MetricName:
    """The name of a user's metric.

    Args:
        key: As it was logged.
        split: Of the call; a split that the key begins with goes before.

    Returns:
        Name, split and key by the table above; `key` is None where no attribute says it.

    """
    head, slash, rest = key.partition("/")
    if slash and rest and head in SPLITS:
        key, split = rest, head
    reserved = RESERVED.match(key) or key in OWN_NAMES
    name = f"training.user.{key}" if reserved else f"training.{key}"
    plain = not reserved and UNCHANGED.fullmatch(key) is not None and len(name) <= MAX_NAME_CHARS
    return MetricName(name[:MAX_NAME_CHARS], split, None if plain else key)
