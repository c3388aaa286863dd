"""The command `counter-server demo`."""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import click

_INSTALL = "pip install 'counter-server[demo]'"


def _check_picture(_context: click.Context, _option: click.Parameter, file: Path | None) -> Path | None:
    if file is not None and file.suffix.lower() not in (".png", ".svg"):
        raise click.BadParameter(f"{str(file)!r} ends neither in .png nor in .svg")
    if file is not None and not os.access(file.parent, os.W_OK):
        raise click.BadParameter(f"nothing can be written in {str(file.parent)!r}")
    return file


@click.command()
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="Only this server, this strategy, or both, as waitress/ours. Can be repeated.",
)
@click.option("--clients", type=click.IntRange(2, 100), default=100, show_default=True, help="Simultaneous clients.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=1, show_default=True, help="Each on a new server.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="For all servers, in turn (default: free ones).")
@click.option("--json", "as_json", is_flag=True, help="Print all results, for programs.")
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_check_picture,
    metavar="FILE",
    help="Draw the results into a .png or .svg.",
)
def demo(only: tuple[str, ...], clients: int, rounds: int, port: int, picture: Path | None, *, as_json: bool) -> None:
    """See the race: one small app behind real servers, 100 clients at once, and the numbers that they get.

    Takes about a minute. Exit status 0 if counter-server was right, 1 if it was not.
    """
    _check_installed("rich", wanted=not as_json)
    _check_installed("matplotlib", wanted=picture is not None)
    from ..progress import progress
    from .report import as_json as format_json
    from .report import draw, table
    from .runner import Outcome, chosen, run

    pairs = chosen(only)
    outcomes: list[Outcome] = []
    try:
        with progress(len(pairs)) as show:

            def tell(what: str) -> None:
                show.show(len(outcomes), what)

            for outcome in run(pairs, tell, clients=clients, rounds=rounds, port=port):
                outcomes.append(outcome)
                show.say(f"{outcome.verdict:<8}  {outcome.pair.title}")
            if picture is not None and any(outcome.rounds for outcome in outcomes):
                tell("drawing")
                draw(outcomes, picture)
    except KeyboardInterrupt:
        click.echo("Stopped. All processes and files are removed.", err=True)
        sys.exit(130)
    except OSError as error:
        raise click.ClickException(f"{picture} cannot be written: {error.strerror}") from error
    if as_json:
        click.echo(format_json(outcomes, clients, rounds))
    else:
        for line in table(outcomes, clients, shutil.get_terminal_size().columns):
            click.echo(line)
    sys.exit(1 if any(outcome.failed for outcome in outcomes) else 0)


def _check_installed(name: str, *, wanted: bool) -> None:
    if wanted and find_spec(name) is None:
        raise click.ClickException(f"{name} is not installed, and nothing was started: {_INSTALL}")
