"""The key that signs our cookies, kept in the data directory; and sessions whose cookie is Secure under https."""

import secrets
import time
from contextlib import suppress

from flask import Flask, request
from flask.sessions import SecureCookieSessionInterface

from ...errors import StorageFull
from ...journal import sync
from ...manager.directory import DataDirectory
from ...settings import default_data_dir

_ENDED = "signed-out"  # in the data directory
_MARGIN = 48 * 3600.0  # seconds that the end is kept beyond the sign-in's own: a clock that jumps revives nothing


def init_app(app: Flask) -> None:
    """Give `app` its ``SECRET_KEY``, unless it was configured: the same for all workers, and after a restart.

    :raises StartupError: if the data directory cannot be made or written.
    """
    app.session_interface = Sessions()
    if not app.config["SECRET_KEY"]:
        app.config["SECRET_KEY"] = signing_key(app.config["COUNTER_SERVER_STORE"], default_data_dir(app.instance_path))


def signing_key(store: str, data_dir: str) -> bytes:
    """The key for the app over `store`: in its data directory, or in `data_dir` for one that has none.

    :param store: its URL. A store in this process's memory has a key of its kind: nothing is written.
    :raises StartupError: if the directory cannot be made or written.
    """
    if store == "memory://":
        return secrets.token_bytes(32)
    directory = _directory(store, data_dir)
    directory.make()
    return directory.key("session")


def _directory(store: str, data_dir: str) -> DataDirectory:
    return DataDirectory.from_url(store, data_dir) if store.startswith("manager:") else DataDirectory(data_dir)


class Ended:
    """The sign-ins that were ended before their time: a file for each, in the data directory, which all workers see.

    So they stay ended when workers, the manager or the whole server start again. With a store in this process's memory
    nothing is written, and the memory holds them.

    :param seconds: that a sign-in lasts.
    """

    def __init__(self, app: Flask, seconds: float) -> None:
        store = app.config["COUNTER_SERVER_STORE"]
        self._in_memory: set[str] = set()
        self._directory = None if store == "memory://" else _directory(store, default_data_dir(app.instance_path))
        self._kept = seconds + _MARGIN

    def __contains__(self, name: str) -> bool:
        if self._directory is None:
            return name in self._in_memory
        return (self._directory.path / _ENDED / name).exists()

    def add(self, name: str) -> None:
        """End a sign-in, for good when this returns.

        :raises StorageFull: if that cannot be written; then it is not ended.
        """
        if self._directory is None:
            self._in_memory.add(name)
            return
        self._directory.make()
        place = self._directory.path / _ENDED
        try:
            place.mkdir(mode=0o700, exist_ok=True)
            for file in place.iterdir():
                with suppress(FileNotFoundError):  # another worker removed it
                    if time.time() - file.stat().st_mtime > self._kept:
                        file.unlink()
            (place / name).touch(mode=0o600)
            for directory in (place, self._directory.path):
                sync(directory)
        except OSError as error:
            raise StorageFull(
                f"the sign-in was not ended, as {place} cannot be written: {error.strerror}; make room and sign"
                " out again, or start the server with another token"
            ) from error


class Sessions(SecureCookieSessionInterface):
    """Flask's own; but one app may be reached by http and, through a proxy, by https."""

    def get_cookie_secure(self, app: Flask) -> bool:
        return super().get_cookie_secure(app) or request.is_secure
