"""A scope as a decorator: each call of a function is one of its own.

A coroutine function's scope is open while it is awaited. A generator's goes on beside the code that takes its items, so
that nothing of that comes to lie in it, from the first item to the end of the generator.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager, aclosing
from functools import wraps
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def decorate(
    function: F,
    scope: Callable[[], AbstractContextManager[object]],
    detached: Callable[[], AbstractContextManager[object]],
) -> F:
    """A function each of whose calls is in a scope of its own. What is no function is returned as it is.

    Args:
        function: Also a coroutine function, a generator function, a method, a static or a class method.
        scope: Makes a scope, not open yet.
        detached: Makes one that nothing comes to lie in.

    """
    if isinstance(function, (staticmethod, classmethod)):
        return cast("F", type(function)(decorate(function.__func__, scope, detached)))
    if isinstance(function, type) or not callable(function):
        return function

    def calling(*args: Any, **kwargs: Any) -> Any:
        with scope():
            return function(*args, **kwargs)

    async def awaiting(*args: Any, **kwargs: Any) -> Any:
        with scope():
            return await function(*args, **kwargs)

    def generating(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with detached():
            return (yield from function(*args, **kwargs))

    async def generating_asynchronously(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        with detached():
            async with aclosing(function(*args, **kwargs)) as items:
                sent = None
                while True:
                    try:
                        item = await items.asend(sent)
                    except StopAsyncIteration:
                        return
                    sent = yield item

    called: Callable[..., Any] = calling
    if inspect.iscoroutinefunction(function):
        called = awaiting
    elif inspect.isgeneratorfunction(function):
        called = generating
    elif inspect.isasyncgenfunction(function):
        called = generating_asynchronously
    return cast("F", wraps(function)(called))
