"""All steps of a recipe in one directory: what is done and still valid is skipped, the rest is (re)done.

    run.log                     what was done when; the command line writes it
    run.json                    marks the directory as ours; the resolved recipe; what each step took
    measurement.json            + measurement.safetensors
    simulated.json              until all is planned: the KLs of what was simulated for that
    kl_points.json              where a scheme is asked for by its KL
    kv_damage.json              where some layers' KV cache is FP8
    refinements.json            where schemes are refined
    schemes/<name>.json
    checkpoints/<name>/
    verification.json
    evaluations/<name>.json
    evidence.json               control arms
    generated/                  rows of kind generated, which the model wrote
    probes/<name>--<runtime>-<version>-<stage>.json
    report.html, report.md, report.json

The recipe's `layout` may place the checkpoints elsewhere, manifests beside them, and a copy of the report.

A step is valid when its record names the digest of what it was made from: the measurement that of model, data and
settings; a checkpoint that of scheme and measurement; an evaluation that of checkpoint, held-out data and arithmetic.
"""

import os
from pathlib import Path

from bitladder import report
from bitladder.steps.controls import evaluate_controls
from bitladder.steps.evaluate import evaluate
from bitladder.steps.export import export
from bitladder.steps.glance import glance
from bitladder.steps.look import look
from bitladder.steps.measure import measure, take_over
from bitladder.steps.originals import Originals
from bitladder.steps.plan import plan
from bitladder.steps.preflight import preflight
from bitladder.steps.probe import probe
from bitladder.steps.report import make_report
from bitladder.steps.verify import verify
from bitladder.steps.workspace import Workspace


def run(work: Workspace, measurement: Path | None = None) -> report.Report:
    """Do every step that isn't done; `work.done` names those that were needed.

    Args:
        work: the recipe and its output directory.
        measurement: a measurement to use instead of measuring; see `take_over`.

    Raises:
        BitladderError: the first step that fails; what is finished stays.
    """
    glance(work, measuring=measurement is None, held_out=True, schemes=True)
    with work.locked():
        if measurement is None:
            look(work, held_out=True)
            measure(work)
        else:
            take_over(work, measurement)
        plan(work)
        export(work)
        verify(work, trust_times=True)
        preflight(work)
        if work.recipe.runtimes.vllm is not None:
            probe(work)
        with Originals(work) as originals:
            evaluate(work, originals)
            evaluate_controls(work, originals)
        result = make_report(work)
        orphans = work.orphans()
        if orphans:
            names = ", ".join(os.path.relpath(path, work.output) for path in orphans)
            work.tell(f"of schemes that the recipe doesn't have any more, to be removed by you: {names}")
        return result
