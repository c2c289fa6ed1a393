"""Commands that belong to no recipe."""

from pathlib import Path
from typing import Annotated

import typer

from bitladder.cli.app import app
from bitladder.cli.arguments import Formats, names_in
from bitladder.cli.terminal import answered, complaints, console, quietly


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
    if answered(
        score_unit=known.score_unit,
        points=[
            {"effective_bits": bits / known.searched_weights, "weight_bits": bits, "predicted_score": score}
            for bits, score in wanted
        ],
    ):
        return
    print("effective_bits,weight_bits,predicted_score")
    for bits, score in wanted:
        print(f"{bits / known.searched_weights:.6f},{bits},{score!r}")


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
    if output is not None:
        atomic_write(output, page)
    if not answered(first=reports[0], second=reports[1], page=page):
        print(page, end="")


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
    if answered(measurement=output, groups=len(measurement.groups), searched_weights=measurement.searched_weights):
        return
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
    if answered(
        model=directory,
        searched_weights=sum(group.weight_elements for group in target.groups),
        groups=target.groups,
        untouched=target.untouched,
        chats=chats,
        native_engine_problem=problem,
    ):
        return
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
