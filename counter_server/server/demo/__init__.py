"""`counter-server demo`: one small app behind real servers, with the common ways to share a number."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import click


def _check_picture(_context: click.Context, _option: click.Parameter, file: Path | None) -> Path | None:
    if file is not None and file.suffix.lower() not in (".png", ".svg"):
        raise click.BadParameter(f"{str(file)!r} ends neither in .png nor in .svg")
    if file is not None and not os.access(file.parent, os.W_OK):
        raise click.BadParameter(f"nothing can be written in {str(file.parent)!r}")
    return file


@click.command()
@click.option("--only", multiple=True, metavar="NAME", help="A server, a strategy, or both: waitress/ours. Repeatable.")
@click.option("--clients", type=click.IntRange(2, 100), default=100, show_default=True, help="Simultaneous clients.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=1, show_default=True, help="Each on a new server.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="For all servers, in turn (default: free ones).")
@click.option("--json", is_flag=True, help="Print all results, for programs.")
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_check_picture,
    metavar="FILE",
    help="Draw the results into a .png or .svg.",
)
def demo(only: tuple[str, ...], clients: int, rounds: int, port: int, picture: Path | None, *, json: bool) -> None:
    """See the race: one small app behind real servers, 100 clients at once, and the numbers that they get.

    Takes about a minute. Exit status 0 if counter-server was right, 1 if it was not.
    """
    for name, needed in {"rich": not json, "matplotlib": picture is not None}.items():
        if needed and find_spec(name) is None:
            raise click.ClickException(
                f"{name} is not installed, and nothing was started: pip install 'counter-server[demo]'"
            )
    from ..progress import progress
    from .report import draw, print_json, print_table
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
                try:
                    draw(outcomes, picture)
                except OSError as error:
                    raise click.ClickException(f"{picture} cannot be written: {error.strerror}") from error
    except KeyboardInterrupt:
        click.echo("Stopped. All processes and files are removed.", err=True)
        sys.exit(130)
    except OSError as error:
        raise click.ClickException(f"a server could not be tried: {error}; all are ended, and files removed") from error
    if json:
        print_json(outcomes, clients, rounds)
    else:
        print_table(outcomes, clients)
    sys.exit(1 if any(outcome.failed for outcome in outcomes) else 0)
