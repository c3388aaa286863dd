"""Context managers that are decorators too, also of coroutine functions."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


class Block(AbstractContextManager[None]):
    """A context manager for one `with` statement, or a decorator: then each call of the function has a block.

    The standard library's decorators end the block of an `async def` function, or of a generator function, before its
    body runs. Here it lasts until a coroutine has ended. A generator runs whenever its caller goes on, so a block
    around one is refused.

    :param make: returns a new context manager.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make

    def __enter__(self) -> None:
        self._entered = self._make()
        self._entered.__enter__()

    def __exit__(self, *exception: Any) -> bool | None:
        return self._entered.__exit__(*exception)

    def __call__(self, function: Function) -> Function:
        """Decorate a function.

        :raises TypeError: if it is a generator function or a class.
        """
        if isinstance(function, type) or inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            kind = "class" if isinstance(function, type) else "generator function"
            raise TypeError(f"{function.__qualname__} is a {kind}, which cannot be decorated: write `with` in its body")

        def call(*arguments: Any, **keywords: Any) -> Any:
            with self._make():
                return function(*arguments, **keywords)

        async def run(*arguments: Any, **keywords: Any) -> Any:
            with self._make():
                return await function(*arguments, **keywords)

        return cast(Function, wraps(function)(run if inspect.iscoroutinefunction(function) else call))
