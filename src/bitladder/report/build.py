"""What a report says: numbers only, each from a record, so that a program can read it as `report.json`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bitladder.errors import StaleRecord
from bitladder.models.splitting import WHOLE, Split
from bitladder.planning.controls import modelopt_agrees
from bitladder.planning.ranges import at_the_floor
from bitladder.planning.sharing import plannable
from bitladder.planning.speed import SpeedModel
from bitladder.planning.uncertainty import flips
from bitladder.records import (
    BF16,
    BF16_BITS,
    CheckpointManifest,
    DataSummary,
    Evaluation,
    Evidence,
    KlPoints,
    KvDamage,
    Measurement,
    PhaseCost,
    ProbeResult,
    Refinements,
    RunInfo,
    Scheme,
    Verification,
)
from bitladder.report.damage import damage_of
from bitladder.report.frontier import frontier_of
from bitladder.report.groups import edge_of, format_counts, positions_of, reported_groups
from bitladder.report.kv_cache import cache_of
from bitladder.report.quality import below_floor, comparisons_of, control_comparisons_of, prediction_of, reported_arm
from bitladder.report.speeds import speeds_of
from bitladder.report.types import (
    Environment,
    NotSearched,
    Report,
    ReportedEvaluation,
    ReportedProbe,
    ReportedScheme,
    Unsettled,
)
from bitladder.report.verdict import decide, verdict

_BITS_PER_BYTE = 8
# Stands, with a layer or without, beside the groups where schemes are compared; no group's name has a blank.
_KV_CACHE = "KV cache"
_WEIGHT_SUFFIX = ".safetensors"


def build_report(
    recipe: Mapping[str, Any],
    measurement: Measurement,
    schemes: Sequence[Scheme],
    manifests: Mapping[str, CheckpointManifest],
    verification: Verification | None,
    evaluations: Mapping[str, Evaluation],
    phases: Sequence[PhaseCost],
    probes: Sequence[ProbeResult] = (),
    evidence: Evidence | None = None,
    refinements: Refinements | None = None,
    speed: SpeedModel | None = None,
    split: Split = WHOLE,
    config: Mapping[str, Any] | None = None,
    kv_damage: KvDamage | None = None,
    kl_points: KlPoints | None = None,
) -> Report:
    """Return the report of one run; steps that haven't run are left out of the arguments.

    Args:
        recipe: the settings in full, as plain data.
        measurement: the one that all schemes were planned from.
        schemes: all of them, in the recipe's order.
        manifests: of the checkpoints that are exported, by scheme name.
        verification: of those checkpoints, or None.
        evaluations: of those checkpoints, by scheme name.
        phases: what every phase of every step took; empty: the measurement's own phases.
        probes: what the runtimes do with those checkpoints.
        evidence: the control arms of the schemes.
        refinements: of the schemes, where they were refined.
        speed: predicts speeds on the device that serves.
        split: of the model among ranks, which plans go by.
        config: the original's, which says what a KV cache takes.
        kv_damage: of an FP8 KV cache in each layer, where it was measured.
        kl_points: what the map to KL was fitted on, where it chose a scheme.

    Raises:
        StaleRecord: a record belongs to another measurement, scheme or checkpoint than the ones given.
    """
    _check_provenance(measurement, schemes, manifests, verification, evaluations, probes, evidence)
    ladder = sorted(schemes, key=lambda scheme: -scheme.weight_bits)
    weight_files = [file.bytes for file in measurement.model.files if file.name.endswith(_WEIGHT_SUFFIX)]
    contexts = {
        (tuple((split, data.sha256) for split, data in e.data.items()), e.model_sha256, e.arithmetic)
        for e in evaluations.values()
    }
    if evidence is not None:
        data = tuple((split, data.sha256) for split, data in evidence.data.items())
        contexts.add((data, measurement.model.sha256, evidence.arithmetic))
    comparable = len(contexts) <= 1
    nested_in, held = _nested_in(ladder), plannable(measurement, split)
    arms = evidence.arms if evidence and comparable else ()
    prediction, kl_map = (prediction_of(measurement, ladder, evaluations, arms) if comparable else None) or (None, None)
    report = Report(
        measurement_sha256=measurement.fingerprint(),
        model=measurement.model,
        source_weight_file_bytes=sum(weight_files) if weight_files else None,
        searched_weights=measurement.searched_weights,
        searched_source_bytes=measurement.searched_weights * BF16_BITS // _BITS_PER_BYTE,
        calibration=measurement.calibration.model_copy(update={"sample_ids": ()}),
        chosen_on=_chosen_on(kl_points, refinements),
        engine=measurement.engine,
        method=measurement.method,
        compute_dtype=measurement.compute_dtype,
        fused_scales_shared=measurement.fused_scales_shared,
        rounding=measurement.rounding,
        formats=measurement.formats,
        arithmetic=dict(measurement.arithmetic),
        score_unit=measurement.score_unit,
        score_batches=len(measurement.score_weights),
        schemes=tuple(
            _reported_scheme(scheme, nested_in[scheme.name], measurement, manifests, verification, evaluations)
            for scheme in ladder
        ),
        nesting=_chains(nested_in),
        comparable=comparable,
        splits=tuple(
            dict.fromkeys(split for s in ladder if s.name in evaluations for split in evaluations[s.name].data)
        ),
        comparisons=comparisons_of(ladder, evaluations) if comparable else (),
        below_noise_floor=tuple(s.name for s in ladder if below_floor(evaluations.get(s.name))),
        edges=tuple(edge for scheme in ladder if (edge := edge_of(scheme, measurement)) is not None),
        groups=reported_groups(measurement, ladder),
        positions=positions_of(measurement, ladder),
        evaluations=tuple(
            reported
            for s in ladder
            if s.name in evaluations
            for reported in _reported_evaluations(evaluations[s.name], measurement.calibration)
        ),
        tasks={name: task for s in ladder if s.name in evaluations for name, task in evaluations[s.name].tasks.items()},
        verification=verification,
        probes=tuple(_reported_probe(probe) for scheme in ladder for probe in probes if probe.scheme == scheme.name),
        controls=tuple(reported_arm(arm) for arm in arms),
        control_comparisons=control_comparisons_of(ladder, evaluations, arms),
        refinements=refinements.refinements if refinements else (),
        controls_left_out=evidence.left_out if evidence else (),
        modelopt_agrees=tuple(s.name for s in ladder if arms and modelopt_agrees(measurement, s)),
        prediction=prediction,
        frontier=frontier_of(held, kl_map, speed),
        speeds=None if speed is None else speeds_of(held, ladder, speed),
        kv_cache=cache_of(config or {}, measurement, ladder, kv_damage, probes),
        not_searched=_not_searched(measurement),
        settings=_plain(recipe),
        environments=_environments(measurement, ladder, evaluations),
        phases=tuple(phases) or (measurement.run.phases if measurement.run else ()),
    )
    report = report.model_copy(update={"decision": decide(report)})
    return report.model_copy(update={"verdict": verdict(report)})


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return `build` as JSON would give it back: tuples are lists, anything else is text."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(content), default=str))
    return plain


def _check_provenance(
    measurement: Measurement,
    schemes: Sequence[Scheme],
    manifests: Mapping[str, CheckpointManifest],
    verification: Verification | None,
    evaluations: Mapping[str, Evaluation],
    probes: Sequence[ProbeResult],
    evidence: Evidence | None,
) -> None:
    """Refuse records that don't belong together: their numbers would stand side by side and mean nothing.

    Raises:
        StaleRecord: the message names the record and the step to run again.
    """
    by_name = {scheme.name: scheme for scheme in schemes}
    measured = measurement.fingerprint()
    for scheme in schemes:
        if scheme.measurement_sha256 != measured:
            raise StaleRecord(f"scheme {scheme.name} was planned from another measurement; plan again")
        if set(scheme.formats) != {group.name for group in measurement.groups}:
            raise StaleRecord(f"scheme {scheme.name} doesn't name the measurement's quant groups; plan again")
    for name, manifest in manifests.items():
        if name not in by_name or manifest.scheme_sha256 != by_name[name].fingerprint():
            raise StaleRecord(f"checkpoint {name} was exported from another scheme; export it again")
    digests = {name: manifest.fingerprint() for name, manifest in manifests.items()}
    for check in verification.checkpoints if verification else ():
        if digests.get(check.scheme) != check.manifest_sha256:
            raise StaleRecord(f"another checkpoint {check.scheme} than the one at hand was verified; verify again")
    for name, evaluation in evaluations.items():
        if digests.get(name) != evaluation.manifest_sha256:
            raise StaleRecord(f"another checkpoint {name} than the one at hand was evaluated; evaluate again")
    for probe in probes:
        if probe.scheme is None or digests.get(probe.scheme) != probe.manifest_sha256:
            raise StaleRecord(f"another checkpoint {probe.checkpoint} than the one at hand was probed; probe again")
    if evidence is not None and evidence.measurement_sha256 != measured:
        raise StaleRecord("the control arms are of another measurement; run `bitladder controls` again")


def _reported_scheme(
    scheme: Scheme,
    nested_in: tuple[str, ...],
    measurement: Measurement,
    manifests: Mapping[str, CheckpointManifest],
    verification: Verification | None,
    evaluations: Mapping[str, Evaluation],
) -> ReportedScheme:
    manifest = manifests.get(scheme.name)
    evaluation = evaluations.get(scheme.name)
    return ReportedScheme(
        name=scheme.name,
        asked=scheme.model_dump(mode="json")["asked"],
        coverage=scheme.coverage,
        effective_bits=scheme.effective_bits,
        weight_bytes=scheme.weight_bytes,
        weight_file_bytes=_weight_file_bytes(manifest) if manifest else None,
        carrier=manifest.carrier if manifest else "modelopt",
        checkpoint_bytes=manifest.total_bytes if manifest else None,
        kv_cache_format=scheme.kv_cache_format,
        kv_cache_skips=scheme.kv_cache_skips,
        kv_cache_kl=scheme.kv_cache_kl,
        predicted_score=scheme.predicted_score,
        predicted_standard_error=scheme.standard_error,
        results=evaluation.results if evaluation else None,
        damage=damage_of(evaluation.results) if evaluation else None,
        verified=None if verification is None else verification.matches(scheme.name),
        format_counts=format_counts(scheme, measurement),
        nested_in=nested_in,
        unsettled=_unsettled(scheme, measurement),
        candidates=scheme.narrow(measurement).formats,
        floor=at_the_floor(measurement, scheme),
    )


def _unsettled(scheme: Scheme, measurement: Measurement) -> Unsettled | None:
    found = flips(measurement, scheme)
    if found is None:
        return None
    return Unsettled(expected_flips=found.expected[1], enough=found.enough, shares=dict(found.share))


def _weight_file_bytes(manifest: CheckpointManifest) -> int:
    return sum(file.bytes for file in manifest.files if file.name.endswith(_WEIGHT_SUFFIX))


def _nested_in(ladder: Sequence[Scheme]) -> dict[str, tuple[str, ...]]:
    """Return for every scheme the others that quantise all of its groups (and KV cache) alike, and more."""
    layers = tuple(dict.fromkeys(one for s in ladder for one in s.kv_cache_skips))
    quantised = {
        s.name: {item for item in [*s.formats.items(), *_cached(s, layers)] if item[1] != BF16} for s in ladder
    }
    return {name: tuple(other for other in quantised if quantised[name] < quantised[other]) for name in quantised}


def _cached(scheme: Scheme, layers: Sequence[str]) -> list[tuple[str, str]]:
    """Return the format of a scheme's KV cache, and that of each of these layers' caches."""
    name = scheme.kv_cache_format or BF16
    by_layer = [(f"{_KV_CACHE} {one}", BF16 if one in scheme.kv_cache_skips else name) for one in layers]
    return [(_KV_CACHE, name), *by_layer]


def _chains(nested_in: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Return chains of nested schemes that show every direct inclusion once, from the smallest scheme up."""
    # Direct inclusions only: a ⊂ c is left out where a ⊂ b ⊂ c.
    direct = {
        name: [n for n in above if not any(n in nested_in[between] for between in above)]
        for name, above in nested_in.items()
    }
    chains = []
    for name in direct:
        while direct[name]:
            chain = [name]
            while direct[chain[-1]]:
                chain.append(direct[chain[-1]].pop(0))
            chains.append(tuple(chain))
    return tuple(chains)


def _chosen_on(*records: KlPoints | Refinements | None) -> DataSummary | None:
    """Return the rows by whose KL schemes were chosen, which are the same in each of these."""
    found = next((record.data for record in records if record is not None), None)
    return None if found is None else found.model_copy(update={"sample_ids": ()})


def _reported_evaluations(evaluation: Evaluation, calibration: DataSummary) -> list[ReportedEvaluation]:
    seen = set(calibration.sample_ids)
    return [
        ReportedEvaluation(
            scheme=evaluation.scheme,
            split=split,
            data=data.model_copy(update={"sample_ids": ()}),
            arithmetic=evaluation.arithmetic,
            samples_seen_in_calibration=len(set(data.sample_ids) & seen) if data.sample_ids and seen else None,
        )
        for split, data in evaluation.data.items()
    ]


def _not_searched(measurement: Measurement) -> tuple[NotSearched, ...]:
    reasons: dict[str, list[str]] = {}
    for module in measurement.untouched:
        reasons.setdefault(module.reason, []).append(module.name)
    return tuple(NotSearched(reason=reason, modules=tuple(names)) for reason, names in reasons.items())


def _reported_probe(probe: ProbeResult) -> ReportedProbe:
    assert probe.scheme is not None  # `_check_provenance`
    formats = [layer.format for layer in probe.layers]
    return ReportedProbe(
        scheme=probe.scheme,
        runtime=probe.runtime,
        version=probe.version,
        stage=probe.stage,
        device=probe.device,
        verdict=probe.verdict,
        layers={name: formats.count(name) for name in sorted(set(formats))},
        as_promised=sum(layer.format == layer.promised for layer in probe.layers),
        findings=probe.findings,
        log_probs=probe.log_probs,
        throughput=probe.throughput,
        tasks=probe.tasks,
    )


def _environments(
    measurement: Measurement, ladder: Sequence[Scheme], evaluations: Mapping[str, Evaluation]
) -> tuple[Environment, ...]:
    """Return the machines and versions, each with the steps that ran there."""
    runs: list[tuple[str, RunInfo | None]] = [("measure", measurement.run)]
    runs += [(f"evaluate {s.name}", evaluations[s.name].run) for s in ladder if s.name in evaluations]
    found: dict[str, Environment] = {}
    for step, run in runs:
        if run is None:
            continue
        key = json.dumps([run.hardware, run.threads, run.versions], sort_keys=True)
        steps = (*found[key].steps, step) if key in found else (step,)
        started = min(run.started, found[key].started) if key in found else run.started
        found[key] = Environment(
            steps=steps, hardware=run.hardware, threads=run.threads, versions=run.versions, started=started
        )
    return tuple(found.values())
