"""`Telemetry.track()`: a block or function that starts, and completes, fails or is interrupted."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from stepspan.compat.cloudmesh.writing import Emitted
from stepspan.recording.outcomes import Outcomes

if TYPE_CHECKING:
    from typing_extensions import Self

F = TypeVar("F", bound=Callable[..., Any])


EmitStatus: TypeAlias = "Callable[[str, Any, Mapping[str, Any], str, BaseException | None], Emitted]"
"""Emits a record of what is tracked, and never raises: its status, message, metrics, span (which the record of a start
and that of its end have in common), and the exception of a failure."""


class Tracked:
    """What `Telemetry.track` returns: a context manager, also an asynchronous one, and a decorator.

    It may be entered again once it is left; a decorated function uses a new one for each call.
    """

    def __init__(self, emit: EmitStatus, message: str | None) -> None:
        self._emit = emit
        self._message = message
        self._span = ""
        self._began_s = 0.0

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._end(error)

    async def __aenter__(self) -> Self:
        await self._begin()
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        await self._end(error)

    def __call__(self, function: F) -> F:
        """Track each call of a function or coroutine function."""

        async def awaiting(*args: Any, **kwargs: Any) -> Any:
            async with Tracked(self._emit, self._message):
                return await function(*args, **kwargs)

        def calling(*args: Any, **kwargs: Any) -> Any:
            with Tracked(self._emit, self._message):
                return function(*args, **kwargs)

        return cast("F", wraps(function)(awaiting if inspect.iscoroutinefunction(function) else calling))

    def _begin(self) -> Emitted:
        self._span, self._began_s = os.urandom(8).hex(), time.perf_counter()
        return self._emit("started", self._message, {}, self._span, None)

    def _end(self, error: BaseException | None) -> Emitted:
        metrics = {"duration_sec": time.perf_counter() - self._began_s}
        status = Outcomes().of(error)
        if status == "completed":
            return self._emit(status, "Command completed successfully", metrics, self._span, None)
        if status == "interrupted":
            return self._emit(status, type(error).__name__, metrics, self._span, None)
        return self._emit(status, error, metrics, self._span, error)
