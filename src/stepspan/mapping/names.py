"""From a user's metric key to a metric's name, such that no two keys share a series.

Prometheus turns every other character into `_`, folds `__` and trims the ends, so a key that is not itself after that
carries attribute `key` as well.
"""

from __future__ import annotations

import re
from typing import NamedTuple

SPLITS = ("train", "val", "eval", "test")
RESERVED = re.compile(r"(?:step|run|phase|memory)[./]")
SUFFIXES = {
    "step_number": "", "step_time": "_seconds", "step_wait": "_seconds", "step_duration": "_seconds",
    "phase_time": "_seconds", "phase_device_time": "_seconds",
    "run_epoch": "", "run_info": "", "run_errors": "_total", "run_total_steps": "", "run_eta": "_seconds",
    "run_start_time": "_seconds", "run_checkpoint_time": "_seconds", "throughput_per_second": "",
}  # fmt: skip
"""What Prometheus makes of our own metrics' names, and what it adds."""
OURS = frozenset(name + end for name, suffix in SUFFIXES.items() for end in ("", suffix))
ITSELF = re.compile(r"[A-Za-z0-9]+(?:_[A-Za-z0-9]+)*")
LONGEST = 255


class MetricName(NamedTuple):
    """A metric's name, its `split`, and the key where the name alone does not tell it."""

    name: str
    split: str
    key: str | None


def metric_name(key: str, split: str) -> MetricName:
    """The name of a user's metric. A leading `train/`, `val/`, `eval/` or `test/` is its split."""
    head, slash, rest = key.partition("/")
    if slash and rest and head in SPLITS:
        key, split = rest, head
    reserved = RESERVED.match(key) or key in OURS
    name = f"training.user.{key}" if reserved else f"training.{key}"
    plain = not reserved and ITSELF.fullmatch(key) is not None and len(name) <= LONGEST
    return MetricName(name[:LONGEST], split, None if plain else key)
