"""`counter-server demo`."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import click

_INSTALL = "pip install 'counter-server[demo]'"


@click.command()
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="Only what has this name: a server's, a strategy's or both, as waitress/ours. May be repeated.",
)
@click.option(
    "--clients", type=click.IntRange(2, 100), default=100, show_default=True, help="That ask at the same moment."
)
@click.option(
    "--rounds", type=click.IntRange(1, 1000), default=1, show_default=True, help="Of each, on a fresh server."
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="For all servers, in turn (default: free ones).")
@click.option("--json", "as_json", is_flag=True, help="Print all that is known, for programs.")
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw what came back, into a .png or .svg.",
)
def demo(only: tuple[str, ...], clients: int, rounds: int, port: int, picture: Path | None, *, as_json: bool) -> None:
    """See the race: one small app behind real servers, 100 clients at once, and what each was told.

    Takes about a minute. Exit status 0 if counter-server was right, 1 if it was not.
    """
    _check_installed("rich", wanted=not as_json)
    if picture is not None:
        _check_picture(picture)
    from .demonstration import Demonstration
    from .plan import chosen
    from .progress import progress
    from .report import as_json as report_as_json
    from .report import print_table

    pairs = chosen(only)
    demonstration = Demonstration(clients=clients, rounds=rounds, port=port)
    outcomes = []
    try:
        with progress(len(pairs)) as told:
            for outcome in demonstration.run(pairs, told.tell):
                told.done(outcome)
                outcomes.append(outcome)
            if picture is not None and any(outcome.rounds for outcome in outcomes):
                from .picture import draw

                told.tell("drawing")
                draw(outcomes, picture)
    except KeyboardInterrupt:
        click.echo("Stopped. Nothing of it is left.", err=True)
        sys.exit(130)
    except OSError as error:
        raise click.ClickException(f"{picture} could not be written: {error.strerror}") from error
    if as_json:
        click.echo(report_as_json(demonstration, outcomes))
    else:
        print_table(demonstration, outcomes)
    sys.exit(1 if any(outcome.failed for outcome in outcomes) else 0)


def _check_installed(name: str, *, wanted: bool) -> None:
    if wanted and find_spec(name) is None:
        raise click.ClickException(f"{name} is not installed, and nothing was started: {_INSTALL}")


def _check_picture(file: Path) -> None:
    """What would be told in a minute is told now."""
    if file.suffix.lower() not in (".png", ".svg"):
        raise click.BadParameter(f"{str(file)!r} ends neither in .png nor in .svg", param_hint="--picture")
    if not os.access(file.parent, os.W_OK):
        raise click.BadParameter(f"nothing can be written in {str(file.parent)!r}", param_hint="--picture")
    _check_installed("matplotlib", wanted=True)
