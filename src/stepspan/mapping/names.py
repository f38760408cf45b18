"""From a user's metric key to a metric's name, such that no two keys share a series.

=====================================  ======================  ===========================  ============================
the key                                its metric              its attributes               why
=====================================  ======================  ===========================  ============================
`loss`                                 `training.loss`         `split` of the call
`val/loss`, `val.loss`, `val_loss`     `training.loss`         `split="val"`,               a prefix names the split of
                                                               `key="val/loss"` …           that key
`grad.norm`, `a__b`, `_x`, `🔥`        `training.grad.norm` …  `split`, `key="grad.norm"`   Prometheus would make it the
                                                                                            name of another key
`step/time`, `run.x`, `phase/x`,       `training.user.` + key  `split`, `key`               stepspan's own names begin
`memory.x`                                                                                  like that
`step_time`, `run_eta_seconds`,        `training.user.` + key  `split`, `key`               Prometheus calls one of
`train/step time` …                                                                         stepspan's own metrics that
longer than `MAX_NAME_CHARS`           cut there               `split`, `key`
=====================================  ======================  ===========================  ============================

Prefixes are `train`, `val`, `valid`, `validation`, `eval` and `test`, followed by `/`, `.` or `_`; `valid` and
`validation` are split `val`, too. After `valid_` only the loss is one of that split (`valid_loss`, `valid_loss_step`,
`valid_loss_epoch`), since `valid_tokens` counts tokens that are valid. One prefix is taken off, once, and wins over
the split of the call; a key that is nothing else is left whole. The split of a *call* is kept as it is written: were
"valid" made "val" there, too, no attribute would tell two calls apart.

Attribute `key` is the key as it was logged, prefix included, wherever the metric's name alone does not say it:
Prometheus turns every character but letters, digits, `:` and `_` into `_`, folds `__` and trims the ends. A series
without it is that of a key of which nothing was changed. So no two keys share one, whatever they become.
"""

from __future__ import annotations

import re
from typing import NamedTuple

PREFIX = re.compile(r"(train|val|validation|eval|test)[/._](?=.)|valid(?:[/.](?=.)|_(?=loss(?:_step|_epoch)?\Z))", re.S)
SYNONYMS = {None: "val", "validation": "val"}
"""What `PREFIX` matched (None: `valid`) -> the split that it is, where that is not the same word."""
EVALUATION_SPLITS = frozenset({"val", "valid", "validation", "eval", "test", "predict"})
"""Splits whose values belong to the training step that came before: in all others a model is trained."""
RESERVED = re.compile(r"(?:step|run|phase|memory)[./]")
PROMETHEUS_SUFFIXES = {
    "step_number": "", "step_logged": "", "step_time": "_seconds", "step_wait": "_seconds",
    "step_duration": "_seconds", "phase_time": "_seconds", "phase_device_time": "_seconds",
    "run_epoch": "", "run_info": "", "run_errors": "_total", "run_dropped_values": "_total",
    "run_total_steps": "", "run_eta": "_seconds",
    "run_start_time": "_seconds", "run_checkpoint_time": "_seconds", "throughput_per_second": "",
    "nonfinite": "_total", "memory_allocated": "_bytes", "memory_reserved": "_bytes", "memory_active": "_bytes",
    "memory_inactive": "_bytes", "memory_alloc_retries": "_total", "memory_ooms": "_total",
}  # fmt: skip
"""What Prometheus makes of the names of stepspan's own metrics, and what it adds."""
OWN_NAMES = frozenset(name + end for name, suffix in PROMETHEUS_SUFFIXES.items() for end in ("", suffix))
UNCHANGED = re.compile(r"[A-Za-z0-9]+(?:_[A-Za-z0-9]+)*")
"""Keys that Prometheus leaves as they are."""
SEPARATORS = re.compile(r"[^A-Za-z0-9:]+")
MAX_NAME_CHARS = 255


class MetricName(NamedTuple):
    """A metric's name, its `split`, and the key where the name alone does not tell it."""

    name: str
    split: str
    key: str | None


def split_in_key(key: str) -> tuple[str | None, str]:
    """The split that a key's prefix names, and what follows it.

    Args:
        key: As it was logged.

    Returns:
        (split, rest), such as ("val", "loss"); (None, `key`) where it has no prefix.

    """
    found = PREFIX.match(key)
    if found is None:
        return None, key
    word = found[1]
    return SYNONYMS.get(word, word), key[found.end() :]


def metric_name(key: str, split: str) -> MetricName:
    """The name of a user's metric.

    Args:
        key: As it was logged.
        split: Of the call; a split that the key begins with goes before.

    Returns:
        Name, split and key by the table above; `key` is None where no attribute says it.

    """
    named, rest = split_in_key(key)
    reserved = RESERVED.match(rest) or SEPARATORS.sub("_", rest).strip("_") in OWN_NAMES
    name = f"training.user.{rest}" if reserved else f"training.{rest}"
    has_key = named is not None or reserved or UNCHANGED.fullmatch(rest) is None or len(name) > MAX_NAME_CHARS
    return MetricName(name[:MAX_NAME_CHARS], split if named is None else named, key if has_key else None)
