"""`Telemetry.track()`: what begins, and completes or fails."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Mapping
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from stepspan.compat.cloudmesh.writing import Emitted
from stepspan.recording.scopes import is_failure
from stepspan.values import json_value

if TYPE_CHECKING:
    from typing_extensions import Self

    from stepspan.compat.cloudmesh.telemetry import Telemetry

F = TypeVar("F", bound=Callable[..., Any])


class Tracked:
    """What `Telemetry.track` returns. It may be entered again once it is left; a decorated function has one a call."""

    def __init__(
        self,
        telemetry: Telemetry,
        message: str | None,
        metrics: Mapping[str, Any] | None,
        event: str | None,
        attributes: Mapping[str, Any],
    ) -> None:
        self._telemetry = telemetry
        self._given = message, metrics, event, attributes
        self._span = ""
        self._began = 0.0

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end(error)

    async def __aenter__(self) -> Self:
        await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._end(error)

    def __call__(self, function: F) -> F:
        """Track each call of a function or coroutine function."""
        if inspect.iscoroutinefunction(function):

            @wraps(function)
            async def awaiting(*args: Any, **kwargs: Any) -> Any:
                async with Tracked(self._telemetry, *self._given):
                    return await function(*args, **kwargs)

            return cast("F", awaiting)

        @wraps(function)
        def calling(*args: Any, **kwargs: Any) -> Any:
            with Tracked(self._telemetry, *self._given):
                return function(*args, **kwargs)

        return cast("F", calling)

    def _begin(self) -> Emitted:
        self._span, self._began = os.urandom(8).hex(), time.perf_counter()
        return self._warn("started", self._given[0])

    def _end(self, error: BaseException | None) -> Emitted:
        took = {"duration_sec": time.perf_counter() - self._began}
        if error is None or not is_failure(error):
            return self._warn("completed", "Command completed successfully", took)
        return self._warn("failed", error, took, error)

    def _warn(
        self, status: str, message: Any, took: Mapping[str, float] | None = None, error: BaseException | None = None
    ) -> Emitted:
        _, metrics, event, attributes = self._given
        try:
            if error is not None:
                message = json_value(error) or type(error).__name__
            found = {**(metrics or {}), **(took or {})}
            return self._telemetry.record(status, found, message, attributes, event=event, span=self._span, error=error)
        except Exception as failure:
            return self._telemetry.lost(failure)
