"""The web application as it comes to the workers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flask import Flask

from .web import create_app


@dataclass(frozen=True)
class Application:
    """What serves the requests. The supervisor makes it, and its forks have it; a new interpreter makes its own.

    :param config: see `create_app`.
    """

    config: Mapping[str, Any]

    @cached_property
    def app(self) -> Flask:
        """:raises StartupError: if there cannot be one."""
        return create_app(self.config)

    def __reduce__(self) -> tuple[type["Application"], tuple[Mapping[str, Any]]]:
        return Application, (self.config,)
