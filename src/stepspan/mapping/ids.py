"""Trace and span ids that need no communication: every rank computes the same ones from what it knows anyway.

A step's ids hash what names the step within its run, so all ranks' spans of a step meet in one trace and each rank
knows rank 0's span id, its parent. Every other span id hashes the session and the `seq` of its begin line. No random
numbers: a user's `random.seed(42)` in every rank changes nothing, and sending twice gives the same span twice.

=====================  =====================================================  ===================
id                     hashes                                                 shared by
=====================  =====================================================  ===================
trace of a step        run key, split, epoch, lap, step                       all ranks
span of a step         its trace, rank, role and the role's session           no other span
trace outside steps    run key, rank, role, epoch, hour                       one rank's sessions
any other span         session, `seq`                                         no other span
=====================  =====================================================  ===================

These are on disk and in backends for ever: what is hashed, and how it is written, must not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from stepspan.values import utf8

MAX_SPLITS = 100
"""Whose names are remembered."""
HOUR_NS = 3600 * 1_000_000_000


def step_trace_id(run_key: str, split: str, epoch: int | None, lap: int, step: int) -> bytes:
    """The trace that all ranks' spans of one step share.

    Args:
        run_key: What the ranks of one run have in common, and no other run has.
        split: "train", "val" …
        epoch: The number of the epoch that the step lies in; None outside of epochs.
        lap: How many times the steps of this split have begun to count again.
        step: The step's number.

    Returns:
        16 bytes.

    """
    named = utf8(f"step\0{epoch}\0{lap}\0{step}") + _which_steps(split, run_key)
    return blake2b(named, digest_size=16).digest()


def unique_role(role: str, session: str, schema: str = "") -> str:
    """What stands for a role in the ids of steps: roles are taken again, so the session belongs to it.

    In journals of `schema` 1.0 they were not.
    """
    return f"{role}-{session}" if role and schema != "1.0" else role


def step_span_id(trace_id: bytes, rank: int, role: str = "") -> bytes:
    """One rank's span of the step whose trace it is, 8 bytes; rank 0's without a role is the root.

    `role` is as `unique_role` has it.
    """
    return blake2b(trace_id + _whose_span(rank, role), digest_size=8).digest()


def _which_steps(split: str, run_key: str) -> bytes:
    return utf8(f"\0{len(split)}\0{split}{run_key}")


def _whose_span(rank: int, role: str) -> bytes:
    return b"%d\0%b" % (rank, utf8(role))


class StepIds:
    """The ids of one session's steps: what all of them share is put together once.

    Args:
        header: The session's header; an empty one where a reader could not read it, of which no step is asked for.

    """

    def __init__(self, header: Mapping[str, Any]) -> None:
        role = unique_role(header.get("role", ""), header.get("session", ""), header.get("schema", ""))
        self._run_key: str = header.get("run_key", "")
        self._own = _whose_span(header.get("rank", 0), role)
        self._root = None if self._own == _whose_span(0, "") else _whose_span(0, "")
        self._named: dict[str, bytes] = {}
        """A split -> the last part of what its steps' traces hash."""

    def of(self, begin: Mapping[str, Any]) -> tuple[bytes, bytes, bytes | None]:
        """The ids of a step.

        Args:
            begin: Its begin event.

        Returns:
            Of its trace, of its span, and of its parent; None where it is the root.

        """
        split: str = begin["split"]
        if split not in self._named:
            if len(self._named) >= MAX_SPLITS:
                self._named.clear()
            self._named[split] = _which_steps(split, self._run_key)
        step = utf8(f"step\0{begin.get('epoch')}\0{begin.get('lap', 0)}\0{begin['step']}")
        trace_id = blake2b(step + self._named[split], digest_size=16).digest()
        root = self._root and blake2b(trace_id + self._root, digest_size=8).digest()
        return trace_id, blake2b(trace_id + self._own, digest_size=8).digest(), root


def outside_trace_id(run_key: str, rank: int, role: str, epoch: int | None, ts: int) -> bytes:
    """The trace of what one rank does outside steps, 16 bytes.

    One for each epoch and each hour of `ts` (Unix ns), so that none grows without end.
    """
    named = f"rank\0{rank}\0{epoch}\0{ts // HOUR_NS}\0{len(role)}\0{role}{run_key}"
    return blake2b(utf8(named), digest_size=16).digest()


def span_id(session: str, seq: int) -> bytes:
    """Any other span, by its session's id and the `seq` of its begin line, 8 bytes."""
    return blake2b(b"%b\0%d" % (session.encode(), seq), digest_size=8).digest()
