"""How a run ended, by what left it: "completed", "failed" or "interrupted".

An interruption is no failure: somebody, or something that the training asked for, ended it before it was done. It
counts no error and fails no step. What is one stands in the tables here; the setting `interruptions` names more.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Literal, TypeAlias, get_args

from stepspan.values import to_text

Status: TypeAlias = Literal["completed", "failed", "interrupted"]
STATUSES: tuple[Status, ...] = get_args(Status)

INTERRUPTIONS = frozenset(
    {
        "builtins.KeyboardInterrupt",
        "builtins.GeneratorExit",
        "asyncio.exceptions.CancelledError",
        "concurrent.futures._base.CancelledError",
        "trio.Cancelled",
        "click.exceptions.Abort",  # what click and typer make of Ctrl-C
        "optuna.exceptions.TrialPruned",
        "torch.distributed.elastic.multiprocessing.api.SignalException",
        "lightning.pytorch.utilities.exceptions.SIGTERMException",
        "pytorch_lightning.utilities.exceptions.SIGTERMException",
        "ray.exceptions.TaskCancelledError",
        "prefect.exceptions.CancelledRun",
        "prefect.exceptions.TerminationSignal",
        "airflow.exceptions.AirflowTaskTerminated",
        "dagster._core.errors.DagsterExecutionInterruptedError",
    }
)
"""Exceptions by module and qualified name, with all that derive from them: nothing is imported to know them."""
EXIT_CODES = {"builtins.SystemExit": "code", "click.exceptions.Exit": "exit_code"}
"""Exceptions that end the program, and the attribute that has its exit code."""
CRASHES = frozenset({4, 5, 6, 7, 8, 11, 31})
"""Signals that a process brings upon itself: ILL, TRAP, ABRT, BUS, FPE, SEGV, SYS."""
MAX_SIGNAL = 64
SHELL_OFFSET = 128
"""A shell's exit code for a process that a signal ended is this plus the signal; `subprocess` has minus the signal."""
OTHER_WORDS: dict[str, Status] = {
    **dict.fromkeys(("complete", "done", "finished", "ok", "succeeded", "success"), "completed"),
    **dict.fromkeys(("crashed", "error", "fail", "failure"), "failed"),
    **dict.fromkeys(("aborted", "canceled", "cancelled", "killed", "preempted", "pruned", "stopped"), "interrupted"),
}
"""What people and other systems call a status."""


class Outcomes:
    """Tells failures from interruptions.

    Args:
        interruptions: Names of further exceptions that are no failures: "Class", or "module.Class".

    """

    def __init__(self, interruptions: Iterable[str] = ()) -> None:
        self._names = frozenset(interruptions)

    def of(self, error: BaseException | None) -> Status:
        """How what this exception leaves has ended. None: nothing was raised. Never raises.

        An exit with code 0 is "completed"; whether it came too early, the run knows.
        """
        if error is None:
            return "completed"
        try:
            return self._of(error)
        except Exception:  # an exception's own `__getattr__` may raise anything
            return "failed"

    @staticmethod
    def is_exit(error: BaseException) -> bool:
        """Whether this ends the program by an exit code."""
        return any(_name(kind) in EXIT_CODES for kind in type(error).__mro__)

    def _of(self, error: BaseException) -> Status:
        kinds = [kind for kind in type(error).__mro__ if kind is not object]
        if any(self._is_interruption(kind) for kind in kinds):
            return "interrupted"
        for kind in kinds:
            if attribute := EXIT_CODES.get(_name(kind)):
                return self._of_exit(error, getattr(error, attribute, None), own_kind=kind is not type(error))
        inside = getattr(error, "exceptions", None)  # of an exception group
        if isinstance(inside, tuple) and inside and all(isinstance(each, BaseException) for each in inside):
            return "failed" if any(self.of(each) == "failed" for each in inside) else "interrupted"
        return "failed"

    def _of_exit(self, error: BaseException, code: object, *, own_kind: bool) -> Status:
        if code is None or code == 0:
            return "interrupted" if own_kind else "completed"  # what a framework raises to leave in a hurry
        after = error.__context__  # `except KeyboardInterrupt: sys.exit(1)`
        if type(code) is int and is_signal(code):
            return "interrupted"
        return "interrupted" if after is not None and self.of(after) == "interrupted" else "failed"

    def _is_interruption(self, kind: type) -> bool:
        if _name(kind) in INTERRUPTIONS:
            return True
        return any(
            name in {kind.__name__, kind.__qualname__, _name(kind)} or _is_called(kind, name) for name in self._names
        )


def is_signal(code: int) -> bool:
    """Whether an exit code says that a signal from outside ended the program; -1 is what people write for "wrong"."""
    number = -code if code < 0 else code - SHELL_OFFSET
    return (1 if code > 0 else 2) <= number <= MAX_SIGNAL and number not in CRASHES


def to_status(given: Any) -> tuple[Status, bool]:
    """The status that a word stands for.

    Args:
        given: What a program has called it.

    Returns:
        The status, "interrupted" for a word that is not known; and whether it was called by its own name.

    """
    word = "completed" if given is None else to_text(given).strip().lower()
    for status in STATUSES:
        if word == status:
            return status, True
    return OTHER_WORDS.get(word, "interrupted"), False


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_called(kind: type, name: str) -> bool:
    """Whether a class goes by a name under which another module offers it: `optuna.TrialPruned`."""
    module, _, attribute = name.rpartition(".")
    with suppress(Exception):  # a module may have a `__getattr__` of its own
        return getattr(sys.modules.get(module), attribute, None) is kind
    return False
