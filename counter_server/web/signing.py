"""The key that signs our cookies, kept in the data directory; and sessions whose cookie is Secure under https."""

import secrets

from flask import Flask, request
from flask.sessions import SecureCookieSessionInterface

from ..manager.directory import DataDirectory
from ..settings import default_data_dir


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
    directory = DataDirectory.from_url(store, data_dir) if store.startswith("manager:") else DataDirectory(data_dir)
    directory.make()
    return directory.key("session")


class Sessions(SecureCookieSessionInterface):
    """Flask's own; but one app may be reached by http and, through a proxy, by https."""

    def get_cookie_secure(self, app: Flask) -> bool:
        return super().get_cookie_secure(app) or request.is_secure
