"""The program that commands belong to, and its options."""

import gc
from typing import Annotated

import typer

from bitladder import __version__
from bitladder.cli.terminal import Mode, set_up

gc.disable()  # until work begins: imports leave no garbage, and looking for it takes a tenth of their time

# Options of the program that count wherever they stand: `main` moves them to the front.
ANYWHERE = ("--json", "--quiet", "-q", "--verbose", "-v", "--debug")

app = typer.Typer(
    help="One sensitivity measurement, a ladder of mixed-precision checkpoints, and the evidence for each.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"bitladder {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    json: Annotated[
        bool, typer.Option("--json", help="Print what was found as JSON, and all else to standard error.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print what was found, no progress or remarks.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also print which steps were done, and how long they took.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Also print what libraries say, and the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The options --json, --quiet, --verbose and --debug may stand anywhere on the line."""
    set_up(Mode(quiet=quiet, verbose=verbose, debug=debug, json=json))


def moved_to_the_front(arguments: list[str]) -> list[str]:
    """Return a command line with the program's own options before the command; after `--` there are none."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own = [one for one in arguments[:end] if one in ANYWHERE]
    return [*own, *(one for one in arguments[:end] if one not in ANYWHERE), *arguments[end:]]
