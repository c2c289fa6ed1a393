"""The steps of a recipe as commands."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bitladder.cli.app import app
from bitladder.cli.arguments import Formats, Output, RecipePath, names_in
from bitladder.cli.terminal import answered, console, print_preview, print_schemes, print_table, say, started
from bitladder.errors import RecipeError

if TYPE_CHECKING:
    from bitladder.library import Run
    from bitladder.planning.prediction import KlMap
    from bitladder.records import CheckpointManifest, Measurement, Scheme
    from bitladder.report import Report

DEMO = "package:demo/recipe.yaml"
_PERCENT = 100


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Write here.", show_default=True)] = Path(
        "bitladder_demo"
    ),
) -> None:
    """Do every step for the small vision-language model that comes with Bitladder: minutes on a CPU, no network.

    Example: bitladder demo
    """
    from bitladder.recipe import resolve_path

    _run_all(Path(resolve_path(DEMO, Path())), output)


@app.command()
def run(
    recipe: RecipePath,
    output: Output = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, why, and how long it took before; do nothing.")
    ] = False,
) -> None:
    """Do every step of a recipe that isn't done yet: measure, plan, export, verify, pre-flight, evaluate, controls,
    report.

    Example: bitladder run recipes/demo.yaml

    Example: bitladder run recipes/demo.yaml --dry-run
    """
    if not dry_run:
        _run_all(recipe, output)
        return
    with started(recipe, output) as work:
        steps = work.preview()
    if not answered(output=work.output, steps=steps):
        print_preview(steps)


def _run_all(recipe: Path, output: Path | None) -> None:
    from bitladder import report

    with started(recipe, output) as work:
        result = work.run()
    if answered(output=work.output, done=work.done, report=result):
        return
    print_table(report.closing_table(result))
    if not work.done:
        console().print("Nothing to do: every step is done and valid.")
    say(result.verdict)
    say(f"Report: {work.output / report.HTML_FILE}")
    _say_next(work, result)


def _say_next(work: "Run", result: "Report") -> None:
    """Say what to do with the scheme that the verdict advises."""
    from bitladder.report import serve_command

    if result.decision.take is None:
        return
    directory = str(work.checkpoint(result.decision.take))
    if work.recipe.runtimes.vllm is None:
        asked = f"{shlex.quote(directory)} --python .venv-vllm/bin/python --stage generate"
        say(f"Next, whether vLLM takes it: bitladder probe {asked}")
    taken = next(scheme for scheme in result.schemes if scheme.name == result.decision.take)
    say(f"Serve it: {serve_command(result, taken, directory)}")


@app.command()
def measure(recipe: RecipePath, output: Output = None) -> None:
    """Measure the sensitivity of every quant group, once.

    Example: bitladder measure recipes/smollm2_135m.yaml
    """
    from bitladder.measured import MEASUREMENT_FILE

    with started(recipe, output) as work:
        result = work.measure()
    path = work.output / MEASUREMENT_FILE
    if answered(
        output=work.output,
        done=work.done,
        measurement=path,
        fingerprint=result.fingerprint(),
        groups=len(result.groups),
        searched_weights=result.searched_weights,
        formats=result.formats,
        method=result.method,
        batches=len(result.score_weights),
        score_unit=result.score_unit,
    ):
        return
    console().print(
        f"{len(result.groups)} groups, {result.searched_weights:,} weights, {result.method} scores "
        f"on {len(result.score_weights)} batches ({result.score_unit})"
    )
    say(f"Measurement: {path}")


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
    max_predicted_score: Annotated[
        list[float] | None,
        typer.Option("--max-predicted-score", help="A scheme of at most this score, in the measurement's unit."),
    ] = None,
    max_kl: Annotated[
        list[float] | None,
        typer.Option("--max-kl", help="A scheme of at most this predicted KL; needs kl_points.json beside it."),
    ] = None,
    formats: Formats = None,
    chosen_by: Annotated[
        Literal["score", "kl"] | None,
        typer.Option(
            "--chosen-by",
            help="What --coverage and --effective-bits go by; kl needs kl_points.json beside the measurement.",
        ),
    ] = None,
) -> None:
    """Plan the schemes of a recipe, or of the given targets from any measurement.

    Example: bitladder plan recipes/demo.yaml

    Example: bitladder plan --measurement m.json --coverage 0.25 --effective-bits 12 --output plans
    """
    from bitladder import planning
    from bitladder.measured import MEASUREMENT_FILE
    from bitladder.records import Measurement
    from bitladder.steps.workspace import KL_POINTS_FILE

    asked = {
        "coverage": coverage,
        "effective_bits": effective_bits,
        "max_predicted_score": max_predicted_score,
        "max_kl": max_kl,
    }
    if (recipe is None) == (measurement is None):
        raise RecipeError("give either a recipe or --measurement, not both and not neither")
    if recipe is not None:
        if any(asked.values()) or formats is not None or chosen_by is not None:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in (*asked, "chosen_by"))
            raise RecipeError(f"{names} and --formats go with --measurement; a recipe names its own schemes")
        with started(recipe, output) as work:
            schemes = work.plan()
        known = Measurement.read(work.output / MEASUREMENT_FILE)
        kl_map = planning.kl_map_of(work.output / KL_POINTS_FILE, known) if work.recipe.maps_kl else None
        _show_plan(known, schemes, work.output / "schemes", kl_map)
        return
    assert measurement is not None
    if chosen_by is not None and (max_kl or max_predicted_score):
        raise RecipeError(
            "--chosen-by goes with --coverage and --effective-bits; ask for --max-kl or --max-predicted-score in a "
            "command of its own"
        )
    among = {"chosen_by": chosen_by, "formats": None if formats is None else names_in(formats)}
    _plan_from(measurement, asked, {key: value for key, value in among.items() if value is not None}, output)


_PREFIX = {"coverage": "top", "effective_bits": "bits", "max_predicted_score": "score", "max_kl": "kl"}  # of names


def _plan_from(
    path: Path, asked: Mapping[str, Sequence[float] | None], given: Mapping[str, object], output: Path | None
) -> None:
    """Plan from a measurement, without a model.

    Args:
        path: of the measurement.
        asked: way to ask -> targets, a scheme each.
        given: what else each scheme is given.
        output: where schemes are written; None: nowhere.
    """
    from bitladder import planning
    from bitladder.recipe import parse_schemes
    from bitladder.records import Measurement
    from bitladder.steps.workspace import KL_POINTS_FILE

    specs = parse_schemes(
        [
            {"name": f"{_PREFIX[way]}{_PERCENT * value if way == 'coverage' else value:g}", way: value, **given}
            for way, values in asked.items()
            for value in values or ()
        ]
    )
    known = Measurement.read(path)
    by_kl = any(spec.by_kl for spec in specs)
    kl_map = planning.kl_map_of(path.parent / KL_POINTS_FILE, known) if by_kl else None
    schemes = planning.plan_all(known, specs, kl_map)
    if output is not None:
        for scheme in schemes:
            scheme.write(output / f"{scheme.name}.json")
    _show_plan(known, schemes, output, kl_map)


def _show_plan(
    measurement: "Measurement", schemes: "tuple[Scheme, ...]", place: Path | None, kl_map: "KlMap | None"
) -> None:
    kls = {} if kl_map is None else {scheme.name: kl_map.of_scheme(measurement, scheme) for scheme in schemes}
    if answered(directory=place, schemes=schemes, predicted_kl=kls):
        return
    print_schemes(measurement, schemes, kls)
    if place is not None:
        say(f"Schemes: {place}")


@app.command()
def export(
    recipe: RecipePath,
    output: Output = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="Write one checkpoint there, verified: a new or empty directory."),
    ] = None,
    scheme: Annotated[str | None, typer.Option("--scheme", help="Which goes there, of several.")] = None,
) -> None:
    """Write one checkpoint per scheme; those that are there and intact are kept.

    Example: bitladder export recipes/demo.yaml

    Example: bitladder export recipes/demo.yaml --scheme bits_8 --to /srv/models/digits-bits-8
    """
    if to is None and scheme is not None:
        raise RecipeError("--scheme goes with --to; without both, every scheme of the recipe is exported")
    with started(recipe, output) as work:
        if to is not None:
            _export_to(work, to, scheme)
            return
        manifests = work.export()
    if answered(
        output=work.output,
        done=work.done,
        checkpoints={name: _answer(work.checkpoint(name), manifest) for name, manifest in manifests.items()},
    ):
        return
    for name, manifest in manifests.items():
        console().print(f"{name}: {manifest.total_bytes:,} bytes, {len(manifest.modules)} quantised modules")
    for place in dict.fromkeys(work.checkpoint(name).parent for name in manifests):
        say(f"Checkpoints: {place}")


def _export_to(work: "Run", directory: Path, scheme: str | None) -> None:
    """Export one scheme's checkpoint to a directory outside the run, and say what is there."""
    manifest = work.export_to(directory, scheme)
    if not answered(checkpoints={manifest.scheme: _answer(directory.absolute(), manifest)}):
        say(f"{manifest.scheme}: {manifest.total_bytes:,} bytes, {len(manifest.modules)} quantised modules, verified")
        say(f"Checkpoint: {directory.absolute()}")


def _answer(directory: Path, manifest: "CheckpointManifest") -> dict[str, object]:
    return {
        "directory": directory,
        "total_bytes": manifest.total_bytes,
        "quantised_modules": len(manifest.modules),
    }


@app.command()
def verify(recipe: RecipePath, output: Output = None) -> None:
    """Re-read the checkpoints against their schemes, the source and each other; exit status 2 if anything is wrong.

    Example: bitladder verify recipes/demo.yaml
    """
    with started(recipe, output) as work:
        result = work.verify()
    if answered(output=work.output, done=work.done, verification=result):
        return
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
def evaluate(recipe: RecipePath, output: Output = None) -> None:
    """Evaluate the checkpoints against the original on held-out data.

    Example: bitladder evaluate recipes/demo.yaml
    """
    with started(recipe, output) as work:
        results = work.evaluate()
    if answered(output=work.output, done=work.done, evaluations=results):
        return
    for name, evaluation in results.items():
        kl = evaluation.result("kl")
        if kl is not None:
            error = "" if kl.standard_error is None else f" ± {kl.standard_error:.2g}"
            console().print(f"{name}: KL {kl.value:.4g}{error} {kl.unit} (noise floor {kl.noise_floor:.2g})")
    say(f"Evaluations: {work.output / 'evaluations'}")


@app.command()
def controls(recipe: RecipePath, output: Output = None) -> None:
    """Evaluate other choices of groups at each scheme's bits, in memory: random, inverse and the like.

    Example: bitladder controls recipes/demo.yaml
    """
    from bitladder.steps.workspace import EVIDENCE_FILE

    with started(recipe, output) as work:
        evidence = work.controls()
    if answered(output=work.output, done=work.done, evidence=evidence):
        return
    if evidence is None:
        console().print("No control arms: none are asked for, or no scheme leaves a choice of groups.")
        return
    for arm in evidence.arms:
        kl = next(result for result in arm.results if result.metric == "kl")
        console().print(f"{arm.scheme.name}: {arm.scheme.effective_bits:.3f} bits, KL {kl.value:.4g} {kl.unit}")
    if evidence.left_out:
        console().print(f"Left out for lack of time: {', '.join(evidence.left_out)}", soft_wrap=True)
    say(f"Evidence: {work.output / EVIDENCE_FILE}")


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
    if answered(output=work.output, report=result):
        return
    print_table(reports.closing_table(result))
    say(f"Report: {work.output / reports.HTML_FILE}")


@app.command()
def card(
    recipe: RecipePath,
    schemes: Annotated[list[str] | None, typer.Argument(metavar="[SCHEME]...", help="Which; all by default.")] = None,
    output: Output = None,
    base_model: Annotated[str | None, typer.Option("--base-model", help="The original's id on the Hub.")] = None,
    license: Annotated[str | None, typer.Option("--license", help="The id of its licence, e.g. apache-2.0.")] = None,
) -> None:
    """Write checkpoints' model cards (README.md) again, and say how each is uploaded to the Hub and what it lacks.

    The two options count for this time; what stands under `card` in the recipe counts for every report.

    Example: bitladder card recipes/demo.yaml

    Example: bitladder card recipes/demo.yaml bits_8 --base-model Qwen/Qwen2.5-VL-3B-Instruct --license apache-2.0
    """
    with started(recipe, output) as work:
        uploads = work.cards(schemes or (), base_model=base_model, license=license)
    if answered(output=work.output, uploads=uploads):
        return
    for name, upload in uploads.items():
        say(f"{name}: {upload.card}")
        say(f"  {upload.command}")
        for missing in upload.lacks:
            say(f"  {missing}")
