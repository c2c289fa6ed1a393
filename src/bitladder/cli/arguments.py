"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from bitladder.errors import RecipeError

_SIXTEEN_BITS = "bf16"  # always a candidate, so that naming it says nothing

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Targets = Annotated[
    list[Path], typer.Argument(metavar="DIR...|RECIPE", help="Checkpoint directories, or one recipe with all of its.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write here instead of the recipe's `output`.")]
Formats = Annotated[
    str | None,
    typer.Option("--formats", metavar="NAME,...", help="Candidates beside bf16, of those measured. Default all."),
]


def names_in(formats: str) -> list[str]:
    """Return the formats that a list with commas names, without `bf16`.

    Raises:
        RecipeError: it names none.
    """
    names = [name for part in formats.split(",") if (name := part.strip()) and name != _SIXTEEN_BITS]
    if not names:
        raise RecipeError(f"--formats {formats!r} names no format to quantise to; name some, or leave it out")
    return names
