"""What is known of a plan's schemes: those records of each that are still valid. Read without torch."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bitladder.recipe import ControlSpec
from bitladder.records import (
    CheckpointManifest,
    Evaluation,
    Evidence,
    KlPoints,
    KvDamage,
    Measurement,
    ProbeResult,
    Refinements,
    Scheme,
    Verification,
)
from bitladder.steps.step import read_valid
from bitladder.steps.workspace import (
    EVIDENCE_FILE,
    KL_POINTS_FILE,
    PROBES,
    REFINEMENTS_FILE,
    VERIFICATION_FILE,
    Workspace,
)


def exported(work: Workspace, schemes: Sequence[Scheme]) -> dict[str, CheckpointManifest]:
    """Return the manifests of the checkpoints that were exported from these very schemes."""
    found = {}
    for scheme in schemes:
        path = work.checkpoint_directory(scheme.name) / CheckpointManifest.FILE_NAME
        manifest = read_valid(CheckpointManifest, path, scheme_sha256=scheme.fingerprint())
        if manifest is not None:
            found[scheme.name] = manifest
    return found


def verified(work: Workspace, manifests: Mapping[str, CheckpointManifest]) -> Verification | None:
    """Return what verifying these very checkpoints found."""
    return read_valid(Verification, work.output / VERIFICATION_FILE, manifest_sha256=fingerprints(manifests))


def evaluated(work: Workspace, manifests: Mapping[str, CheckpointManifest]) -> dict[str, Evaluation]:
    """Return the evaluations of these very checkpoints."""
    found = {}
    for name, manifest in manifests.items():
        evaluation = read_valid(Evaluation, work.evaluation_file(name), manifest_sha256=manifest.fingerprint())
        if evaluation is not None:
            found[name] = evaluation
    return found


def refined(work: Workspace) -> Refinements | None:
    """Return what refining came to, where the recipe wants it."""
    return Refinements.read_if_whole(work.output / REFINEMENTS_FILE) if work.recipe.refine.evaluations else None


def control_arms(measurement: Measurement, schemes: Sequence[Scheme], spec: ControlSpec) -> tuple[Scheme, ...]:
    """Return the control arms of all schemes, the first of each before any second: short of time, all have some."""
    from bitladder.planning import controls  # with numpy, which other records are read without

    rows = [controls.arms(measurement, scheme, kinds=spec.kinds, seeds=spec.seeds) for scheme in schemes]
    return tuple(arm for column in itertools.zip_longest(*rows) for arm in column if arm is not None)


def evidence_of(work: Workspace, measurement: Measurement, schemes: Sequence[Scheme]) -> Evidence | None:
    """Return the control arms of these very schemes, where they were evaluated."""
    known = read_valid(Evidence, work.output / EVIDENCE_FILE)
    wanted = {arm.fingerprint() for arm in control_arms(measurement, schemes, work.recipe.controls)}
    return known if known is not None and {arm.scheme.fingerprint() for arm in known.arms} <= wanted else None


def kv_damage(work: Workspace, measurement: Measurement) -> KvDamage | None:
    """Return what an FP8 KV cache does in each layer, where that was measured and some scheme is chosen by it."""
    if all(spec.kv_share is None for spec in work.recipe.scheme_specs()):
        return None
    return read_valid(KvDamage, work.output / KvDamage.FILE_NAME, measurement_sha256=measurement.fingerprint())


def kl_points(work: Workspace, measurement: Measurement) -> KlPoints | None:
    """Return the simulated schemes through which a map from scores to KL goes, where one chooses a scheme."""
    found = KlPoints.read_if_whole(work.output / KL_POINTS_FILE) if work.recipe.maps_kl else None
    return found if found is not None and found.measurement_sha256 == measurement.fingerprint() else None


def probe_path(work: Workspace, result: ProbeResult) -> Path:
    """Return where a probe's result lies."""
    version = re.sub(r"[^A-Za-z0-9.+]+", "_", result.version)
    return work.output / PROBES / f"{result.scheme}--{result.runtime}-{version}-{result.stage}.json"


def probed(work: Workspace, manifests: Mapping[str, CheckpointManifest]) -> tuple[ProbeResult, ...]:
    """Return what is known of how the runtimes treat these checkpoints."""
    digests = fingerprints(manifests)
    return tuple(one for one in _probes(work).values() if digests.get(str(one.scheme)) == one.manifest_sha256)


def forget_earlier(work: Workspace, manifests: Mapping[str, CheckpointManifest]) -> None:
    """Remove what is known of how the runtimes treated checkpoints that were there before these."""
    digests = fingerprints(manifests)
    for path, one in _probes(work).items():
        if digests.get(str(one.scheme)) != one.manifest_sha256:
            path.unlink()


def _probes(work: Workspace) -> dict[Path, ProbeResult]:
    """Return each probe's result that lies where it belongs."""
    found = {}
    for path in sorted((work.output / PROBES).glob("*--*-*-*.json")):  # others are somebody else's
        result = work.known(ProbeResult, path)
        if result is None or result.scheme is None or probe_path(work, result) != path:
            continue  # not what its name says: written again where it belongs, else none of ours
        found[path] = result
    return found


def fingerprints(manifests: Mapping[str, CheckpointManifest]) -> dict[str, str]:
    """Return each manifest's fingerprint."""
    return {name: manifest.fingerprint() for name, manifest in manifests.items()}
