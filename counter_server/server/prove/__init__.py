"""`counter-server prove`: load, kills and the checker, against a server as its users run it."""

import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click
import msgspec

from ...errors import InvalidRequest, StartupError


@click.command()
@click.option("--clients", type=click.IntRange(1, 1000), default=100, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1, 86400), default=10.0, show_default=True, help="Of load.")
@click.option("--kill-manager", type=click.IntRange(0), default=0, metavar="N", help="kill -9 the manager N times.")
@click.option("--kill-worker", type=click.IntRange(0), default=0, metavar="N", help="kill -9 a worker N times.")
@click.option("--url", metavar="URL", help="Of a running server, instead of a new one; nothing is killed.")
@click.option("--save", type=click.Path(path_type=Path), metavar="FILE", help="Save the history even if it is right.")
@click.option("--check", type=click.Path(path_type=Path), metavar="FILE", help="Only check a saved history.")
@click.option("--json", is_flag=True, help="The verdict as JSON.")
def prove(
    *,
    clients: int,
    seconds: float,
    kill_manager: int,
    kill_worker: int,
    url: str | None,
    save: Path | None,
    check: Path | None,
    json: bool,
) -> None:
    """Show that every increment is counted exactly once: by load, kill -9, and a check of every answer.

    It starts a server of its own, on a new data directory that is removed afterwards. Exit status 0 if all was
    right, else 1, with the history of all increments saved. On the server at --url its counter is deleted in the end,
    with the token in COUNTER_SERVER_TOKEN if there is one.
    """
    from ...history import load
    from ...history import save as write
    from ..progress import progress
    from .proof import Proof, own_server
    from .verdict import judge, screen

    kills = {"manager": kill_manager, "worker": kill_worker}
    place = save
    if check is not None:
        if url is not None or save is not None or any(kills.values()):
            raise InvalidRequest("--check uses no server, so there is nothing to reach, kill or save: give it alone")
        history, final = load(check)
        verdict = judge(history, final)
    else:
        if any(kills.values()) and url is not None:
            raise InvalidRequest("only a server of the proof's own can be killed: leave out --url, or the kills")
        if save is not None and (save.is_dir() or not os.access(save.parent, os.W_OK)):
            raise InvalidRequest(f"no history can be saved as {save}: name a file in a directory that you can write")
        with progress(seconds, interval=max(seconds / 5, 1.0)) as show, ExitStack() as stack:
            server = None
            if url is None:
                show.say("Starting a server")
                server, url = stack.enter_context(own_server())
            verdict, history = Proof(url, clients, seconds, show, server, kills).run()
        if place is None and not verdict.right:
            directory = os.getcwd() if os.access(os.curdir, os.W_OK) else tempfile.gettempdir()
            place = Path(directory, f"{verdict.counter}.jsonl")
        verdict = msgspec.structs.replace(verdict, history=place and str(place))
    click.echo(msgspec.json.format(msgspec.json.encode(verdict)).decode() if json else screen(verdict))
    if place is not None:
        try:
            write(place, history, verdict.final, new=save is None)
        except OSError as error:
            raise StartupError(f"the history could not be saved as {place}: {error.strerror}") from error
    sys.exit(0 if verdict.right else 1)
