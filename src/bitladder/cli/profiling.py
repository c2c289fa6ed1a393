"""The command `bitladder profile`."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitladder.cli.app import app
from bitladder.cli.arguments import names_in
from bitladder.cli.terminal import answered, quietly, say
from bitladder.errors import RecipeError

if TYPE_CHECKING:
    from bitladder.records import Profile


@app.command()
def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A local directory or a Hub id.")],
    python: Annotated[Path, typer.Option("--python", help="The interpreter of vLLM's environment.")] = Path(
        ".venv-vllm/bin/python"
    ),
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("profile.json"),
    formats: Annotated[
        str | None, typer.Option("--formats", metavar="NAME,...", help="Those to time. Default: all that vLLM runs.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", metavar="JSON", help="More arguments of vllm.LLM, as in service.")
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", min=1, help="Ranks that share the model, a GPU each.")
    ] = 1,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for all of it.")] = 1800.0,
    revision: Annotated[str | None, typer.Option("--revision", help="Of a Hub id.")] = None,
) -> None:
    """Time vLLM's layers of a model in every format, and its engine in 16 bits, on the device that will serve.

    Weights are random, so that a model's configuration and the headers of its files are enough. Other work on the
    device makes it wrong.

    Example: bitladder profile ./Qwen2.5-VL-3B-Instruct --python .venv-vllm/bin/python
    """
    from bitladder.storage import check_file

    output = Path(os.path.expanduser(output))
    check_file(output)
    from bitladder.steps.profile import profile as timed
    from bitladder.steps.workspace import local_model

    with quietly():
        found = timed(
            local_model(model, revision),
            Path(os.path.abspath(python)),
            formats=None if formats is None else names_in(formats),
            engine=_arguments(engine),
            tensor_parallel=tensor_parallel,
            timeout=timeout,
        )
    found.write(output)
    if answered(profile=output):
        return
    _print(found)
    say(f"Profile: {output}")


def _arguments(engine: str | None) -> dict[str, Any]:
    """Return what a JSON object holds.

    Raises:
        RecipeError: it is none, or says what an option is for.
    """
    try:
        content = json.loads(engine or "{}")
    except ValueError as error:
        raise RecipeError(f"--engine {engine!r} is no JSON ({error}); give an object of vllm.LLM's arguments") from None
    if not isinstance(content, dict):
        raise RecipeError(f"--engine {engine!r} is no JSON object; give one of vllm.LLM's arguments")
    if "speculative_config" in content:
        raise RecipeError(
            "--engine names speculative_config, and how many tokens a step of such an engine keeps isn't known; leave "
            "it out, and say how many are drafted in a recipe: `load: {speculative_tokens: 3}`"
        )
    if "tensor_parallel_size" in content:
        raise RecipeError("--engine names tensor_parallel_size, by which layers' shapes change; use --tensor-parallel")
    return content


def _print(found: "Profile") -> None:
    """Print what each format is predicted to gain where every layer that can have it has it."""
    from bitladder.planning.speed import Load, SpeedModel, groups_of

    most = max(found.loads, key=lambda one: one.requests * one.prompt_tokens)
    load = Load(most.requests, most.prompt_tokens, most.output_tokens)
    model = SpeedModel(found, groups_of(found), load)
    say(f"{found.place}, vLLM {found.version}: times 16 bits at {load}, as predicted")
    for name in found.formats:
        speed = model.predict(model.uniform(name), load)
        kernels = sorted({layer.kernel or layer.method for layer in found.layers if layer.format == name})
        say(f"{name}: prefill {speed.prefill_ratio:.2f}, decode {speed.decode_ratio:.2f} ({', '.join(kernels)})")
    for name, why in found.refused.items():
        say(f"{name}: no times ({why})")
