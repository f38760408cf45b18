"""The run of a process that records nothing: takes all that a `Run` takes, does nothing, costs next to nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from stepspan.run import Run

if TYPE_CHECKING:
    from typing_extensions import Self

    from stepspan.events import Event
    from stepspan.identity import Identity
    from stepspan.recording.steps import Amount

T = TypeVar("T")
PREFIX = "STEPSPAN_"


def switched_off(env: Mapping[str, str]) -> bool:
    """Whether STEPSPAN_DISABLED stops everything here."""
    return env.get(f"{PREFIX}DISABLED", "").strip().lower() in {"1", "true", "yes", "on"}


class _Nothing:
    """A scope that nobody records."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class _Batches:
    """The batches as they are."""

    def __init__(self, iterable: Iterable[Any]) -> None:
        self._iterable = iterable
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable) if self._iterator is None else self._iterator

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._iterable)
        return next(self._iterator)

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type] # as a run's own


class DisabledRun(Run):
    """`stepspan.current_run()` where no run is open, and what `start_run` returns where stepspan is switched off."""

    def __init__(self) -> None:
        self.closed = False
        self.background_tasks = []

    @cached_property
    def identity(self) -> Identity:  # type: ignore[override] # looked up only if somebody asks
        """Who this process would be, by its launcher alone."""
        from stepspan import identity as identity_of

        env = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        return identity_of.resolve({}, env, identity_of.host_facts(), earlier_sessions=lambda job, rank: 0)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None, *, split: str | None = None) -> None:
        """Nothing."""

    def log_scalar(self, key: str, value: Any, step: int | None = None) -> None:
        """Nothing."""

    def log_hyperparams(self, params: Any) -> None:
        """Nothing."""

    def log_artifact(self, name: str, path: str | os.PathLike[str], *, kind: str = "file") -> None:
        """Nothing."""

    def log_event(self, name: str, /, *, status: str | None = None, **attributes: Any) -> None:
        """Nothing."""

    def log_error(self, error: BaseException, /, **attributes: Any) -> None:
        """Nothing."""

    def epoch(self, n: int) -> Any:
        """Nothing to enter."""
        return _NOTHING

    def step(self, n: int, *, split: str = "train", samples: float | None = None, tokens: float | None = None) -> Any:
        """Nothing to enter."""
        return _NOTHING

    def span(self, name: str, /, *, collective: bool = False, cuda: bool = False, **attributes: Any) -> Any:
        """Nothing to enter."""
        return _NOTHING

    def steps(
        self,
        iterable: Iterable[T],
        *,
        start: int | None = None,
        accumulate: int = 1,
        split: str = "train",
        samples: Amount = None,
        tokens: Amount = None,
    ) -> Any:
        """The batches as they are."""
        return _Batches(iterable)

    def set_total_steps(self, n: int) -> None:
        """Nothing."""

    def emit_background(self, event: Event) -> None:
        """Nothing."""

    def flush(self, timeout: float = 5.0) -> bool:
        """Nothing waits."""
        return True

    def close(self, status: str = "completed") -> None:
        """Nothing."""

    def stats(self) -> dict[str, Any]:
        """As a run that has done nothing."""
        return {"journaled": 0, "lost": 0, "durable": True, "journal": None, "warnings": {}, "delivery": {}}

    def warn_once(self, kind: str, message: str, level: int = logging.WARNING) -> None:
        """Nothing."""

    def after_fork(self, number: int) -> None:
        """Nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


_NOTHING = _Nothing()
DISABLED = DisabledRun()
