"""Settings of `counter-server run`, with their defaults."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..output import LogFormat
from ..settings import DEFAULT_CAPS, DEFAULT_DURABILITY, DEFAULT_STORE, Caps, Durability


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What `counter-server run` serves, and how."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free port
    workers: int = max(2, os.cpu_count() or 1)
    threads: int = 8  # in each worker, for requests
    request_timeout: float = 20.0  # seconds from the first byte of a request to its last
    frozen_after: float = 6.0  # seconds without a sign of life after which a worker is replaced
    store: str = DEFAULT_STORE
    durability: Durability = DEFAULT_DURABILITY
    log_format: LogFormat = "text"
    attach: bool = False  # use a manager that is already running
    caps: Caps = DEFAULT_CAPS
    web: Mapping[str, Any] = field(default_factory=dict)  # the web application's configuration
