"""A manager process under a supervisor."""

from multiprocessing.connection import Connection

from ..manager.directory import DataDirectory
from ..manager.server import serve
from ..objects import Declaration
from ..settings import ServerSettings
from .logs import configure


def manage(
    directory: DataDirectory, settings: ServerSettings, declarations: list[Declaration], lifeline: Connection
) -> None:
    """The life of a manager process.

    :param lifeline: is told when clients can connect; its end ends the manager.
    """
    configure("manager", settings.log_format)
    serve(
        directory,
        settings.durability,
        ready=lambda: lifeline.send(None),
        lifeline=lifeline,
        declarations=declarations,
        caps=settings.caps,
    )
