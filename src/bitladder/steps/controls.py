"""Evaluate the control arms of every scheme."""

import time
from collections.abc import Sequence

from bitladder.evaluation.evaluate import in_words
from bitladder.recipe import ControlSpec
from bitladder.records import ControlArm, Evidence, Scheme, digest_of
from bitladder.steps.known import control_arms
from bitladder.steps.originals import Originals
from bitladder.steps.simulated import simulation_of
from bitladder.steps.step import doing, valid
from bitladder.steps.workspace import EVIDENCE_FILE, Workspace


def settings_of(originals: Originals, spec: ControlSpec, arms: Sequence[Scheme]) -> str:
    """Return the digest of all that the evidence depends on."""
    return digest_of([*originals.settings(), spec.model_dump_json(), *(arm.fingerprint() for arm in arms)])


def evaluate_controls(work: Workspace, originals: Originals | None = None) -> Evidence | None:
    """Evaluate the control arms of every scheme in memory, as far as time allows, unless that was done.

    Returns None where there are none: none are asked for, or no scheme leaves a choice.

    Args:
        work: the recipe and its output directory.
        originals: the original on the held-out sets, where another step needs it as well.

    Raises:
        BitladderError: see `planning.controls.arms` and `evaluation.simulation`.
    """
    spec, measurement, schemes = work.recipe.controls, work.measurement(), work.schemes()
    path = work.output / EVIDENCE_FILE
    arms = control_arms(measurement, schemes, spec)
    if not arms:
        path.unlink(missing_ok=True)
        return None
    if originals is None:
        with Originals(work) as originals:
            return evaluate_controls(work, originals)
    key = settings_of(originals, spec, arms)
    evidence = valid(work, Evidence, path, settings_sha256=key) or Evidence(
        measurement_sha256=measurement.fingerprint(),
        settings_sha256=key,
        data={split: data.summary for split, data in originals.data.items()},
        arithmetic=in_words(measurement.arithmetic),
        arms=(),
    )
    found = list(evidence.arms)
    if len(found) + len(evidence.left_out) == len(arms):
        return evidence
    start = time.monotonic()
    with doing(work, "controls") as meter:
        references = originals.references(meter)
        with meter.phase("control arms"):
            simulation = simulation_of(work, measurement, references[0].device)
            for index, arm in enumerate(arms[len(found) :], start=len(found)):
                work.progress("control arms", index, len(arms))
                if time.monotonic() - start > spec.max_seconds:
                    break
                found.append(ControlArm(scheme=arm, results=simulation.results(references, arm)))
                evidence.model_copy(update={"arms": tuple(found)}).write(path)  # a killed run goes on after it
            work.progress("control arms", len(arms), len(arms))
        left_out = tuple(arm.name for arm in arms[len(found) :])
        evidence = evidence.model_copy(update={"arms": tuple(found), "left_out": left_out, "run": meter.info()})
        evidence.write(path)
    return evidence
