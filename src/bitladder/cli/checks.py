"""What runtimes do with checkpoints, as commands."""

import os
from pathlib import Path
from typing import Annotated

import typer

from bitladder.cli.app import app
from bitladder.cli.arguments import Output, Targets
from bitladder.cli.terminal import close_probes, started
from bitladder.errors import RecipeError


@app.command()
def preflight(
    targets: Targets,
    output: Output = None,
    runtime: Annotated[
        list[str] | None, typer.Option("--runtime", help="vllm, sglang, tensorrt_llm or vllm==0.25.1; may be repeated.")
    ] = None,
    read_weights: Annotated[
        bool, typer.Option("--read-weights", help="Also look for NaN in the weights: reads every byte.")
    ] = False,
    tensor_parallel: Annotated[
        int | None, typer.Option("--tensor-parallel", min=1, help="GPUs that will share the language model; 1.")
    ] = None,
) -> None:
    """Say from the files alone what vLLM, SGLang and TensorRT-LLM would do with a checkpoint; no runtime is needed.

    Exit status 2 if one of them wouldn't load it, or not run it as it says.

    Example: bitladder preflight runs/demo/checkpoints/uniform_fp8

    Example: bitladder preflight recipes/demo.yaml
    """
    from bitladder.runtimes import preflight as rules

    recipe = _recipe_among(targets)
    if recipe is None:
        wanted = tuple(runtime or rules.RUNTIMES)
        close_probes(
            [
                result
                for path in targets
                for result in rules.preflight(
                    path, wanted, read_weights=read_weights, tensor_parallel=tensor_parallel or 1
                )
            ]
        )
        return
    if tensor_parallel is not None:
        raise RecipeError("--tensor-parallel goes with checkpoint directories; a recipe has its own tensor_parallel")
    if runtime or read_weights:
        raise RecipeError("--runtime and --read-weights go with checkpoint directories, not with a recipe")
    with started(recipe, output) as work:
        results = work.preflight()
    close_probes(results)


@app.command()
def probe(
    targets: Targets,
    output: Output = None,
    runtime: Annotated[str, typer.Option("--runtime", help="The runtime: vllm.")] = "vllm",
    stage: Annotated[
        str | None, typer.Option("--stage", help="load: the runtime's own loader; generate: its engine. Default load.")
    ] = None,
    python: Annotated[
        Path | None, typer.Option("--python", help="The interpreter of the runtime's environment; or in the recipe.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--source", help="generate: the original, served beside it; or the recipe's.")
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", help="generate: a picture to ask about.")] = None,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds for one checkpoint; 1800.")] = None,
) -> None:
    """Have a runtime load a checkpoint (and serve it), and compare layer by layer with what its manifest promises.

    It runs in a process of its own, so that its failure is a result. Exit status 2 if it fails.

    Example: bitladder probe runs/demo/checkpoints/uniform_fp8 --python .venv-vllm/bin/python

    Example: bitladder probe recipes/demo.yaml --python .venv-vllm/bin/python --stage generate
    """
    if runtime != "vllm":
        raise RecipeError(f"runtime {runtime!r} can't be probed; known here: vllm (`preflight` knows more)")
    if stage not in (None, "load", "generate"):
        raise RecipeError(f"stage {stage!r} is unknown; use load or generate")
    recipe = _recipe_among(targets)
    if recipe is None:
        from bitladder.recipe import VllmSpec
        from bitladder.steps import asking

        given = {"stage": stage, "timeout": timeout, "python": os.path.abspath(python or ".venv-vllm/bin/python")}
        spec = VllmSpec.model_validate({key: value for key, value in given.items() if value is not None})
        close_probes(asking.probe_directories(targets, spec, source=source, image=image))
        return
    if source is not None or image is not None:
        raise RecipeError("--source and --image go with checkpoint directories; a recipe names its model and data")
    with started(recipe, output) as work:
        results = work.probe(python=python, stage=stage, timeout=timeout)
    close_probes(results)


def _recipe_among(targets: list[Path]) -> Path | None:
    """Return the recipe that is the only target; None where all are checkpoint directories."""
    files = [path for path in targets if not path.is_dir()]
    gone = next((path for path in files if not path.exists()), None)
    if gone is not None:
        raise RecipeError(f"{gone} does not exist; give checkpoint directories, or one recipe")
    if not files:
        return None
    if len(targets) > 1:
        raise RecipeError(f"{files[0]} is no directory; give checkpoint directories, or one recipe")
    return files[0]
