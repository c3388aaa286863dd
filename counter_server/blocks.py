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
        self._entered: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        if self._entered is not None:
            raise RuntimeError("this block is not over: make another one for each `with`")
        self._entered = self._make()
        self._entered.__enter__()

    def __exit__(self, *exception: Any) -> bool | None:
        entered, self._entered = self._entered, None
        return entered.__exit__(*exception) if entered else None

    def __call__(self, function: Function) -> Function:
        """Decorate a function.

        :raises TypeError: if it is a generator function or a class.
        """
        if isinstance(function, type) or inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            kind = "class" if isinstance(function, type) else "generator function"
            name = getattr(function, "__qualname__", repr(function))
            raise TypeError(f"{name} is a {kind}, which cannot be decorated: write `with` in its body")

        def call(*arguments: Any, **keywords: Any) -> Any:
            with self._make():
                return function(*arguments, **keywords)

        async def run(*arguments: Any, **keywords: Any) -> Any:
            with self._make():
                return await function(*arguments, **keywords)

        made = (function, getattr(function, "__func__", None), type(function).__call__)
        return cast(Function, wraps(function)(run if any(map(inspect.iscoroutinefunction, made)) else call))
