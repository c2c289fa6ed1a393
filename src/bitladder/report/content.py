"""What a report says: numbers only, each from a record, so that a program can read it as `report.json`."""

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pydantic import Field

from bitladder.errors import StaleRecord
from bitladder.prediction import LEVEL, KlMap, leave_one_out
from bitladder.records import (
    BF16,
    BF16_BITS,
    KL,
    Candidate,
    CheckpointManifest,
    ControlArm,
    DataSummary,
    EvalResult,
    Evaluation,
    Evidence,
    LogProbDifference,
    Measurement,
    ModelSource,
    Part,
    PhaseCost,
    ProbeFinding,
    ProbeResult,
    QuantGroup,
    Record,
    Refinement,
    Refinements,
    Rounding,
    RunInfo,
    Scheme,
    Stage,
    Throughput,
    Verification,
)
from bitladder.report.verdict import verdict
from bitladder.uncertainty import flips, rank_intervals

WITHIN_NOISE_ERRORS = 2.0  # two values closer than so many standard errors of their difference aren't told apart
_BITS_PER_BYTE = 8
_KV_CACHE = "KV cache"  # stands beside the groups where schemes are compared; no group's name has a blank
MAX_MOVED = 10  # groups shown whose rank moves most
_WEIGHT_SUFFIX = ".safetensors"


class FormatCount(Part):
    """How much of the searched part one scheme puts in one format."""

    format: str
    groups: int
    modules: int
    weight_elements: int
    groups_by_kind: dict[str, int] = Field(description="kind (qkv_proj, o_proj, …) -> groups; kinds with none are 0")


class Unsettled(Part):
    """What another draw of the scoring batches would change in a scheme (`bitladder.uncertainty`)."""

    expected_flips: float = Field(description="groups that change sides in a draw, on average")
    enough: int | None = Field(
        description="multiple of the scoring batches that leaves at most one group open; None: more than 32"
    )
    shares: dict[str, float] = Field(description="group -> share of the draws in which it changes sides, where any")


class ReportedScheme(Part):
    """One rung of the ladder: what was asked, what it costs, what it does."""

    name: str
    asked: dict[str, Any]
    coverage: float
    effective_bits: float
    weight_bytes: int = Field(description="searched weights and their scales")
    weight_file_bytes: int | None = Field(description="*.safetensors of the checkpoint; None: not exported")
    checkpoint_bytes: int | None = Field(description="all files of the checkpoint; None: not exported")
    kv_cache_format: str | None = Field(description="None: 16 bits")
    predicted_score: float
    predicted_standard_error: float | None
    results: tuple[EvalResult, ...] | None = Field(description="None: not evaluated")
    verified: bool | None = Field(description="None: not verified yet")
    format_counts: tuple[FormatCount, ...]
    nested_in: tuple[str, ...] = Field(description="schemes that quantise all of this one's groups alike, and more")
    unsettled: Unsettled | None = Field(description="None: one batch, everything quantised, or chosen by name")

    def result(self, metric: str, split: str) -> EvalResult | None:
        """Return the metric's result on a held-out set, or None."""
        return next((r for r in self.results or () if (r.metric, r.split) == (metric, split)), None)


class GroupSensitivity(Part):
    """What one format does to one group."""

    format: str
    score: float = Field(description="sensitivity, in the report's `score_unit`")
    standard_error: float | None = Field(description="over the scoring batches; None: a single batch")
    score_per_bit_saved: float | None = Field(description="None: the format saves nothing")
    rank: int | None = Field(description="1 has the least score per bit saved, and is quantised first")
    rank_interval: tuple[int, int] | None = Field(description="90%, over draws of the scoring batches; None: one batch")


class ReportedGroup(Part):
    """One quant group, in network order."""

    name: str
    kind: str = Field(description="last part of the name: qkv_proj, o_proj, gate_up_proj, down_proj, …")
    modules: tuple[str, ...]
    weight_elements: int
    sensitivities: tuple[GroupSensitivity, ...]
    formats: dict[str, str] = Field(description="scheme -> format")


class MovedGroup(Part):
    """A group whose rank depends on whether image positions count."""

    group: str
    rank_text: int = Field(description="by score per bit saved, from text positions only")
    rank_both: int = Field(description="from text and image positions: the measurement's own")
    image_share: float | None = Field(description="of its score; None: the score is 0")


class PositionRanking(Part):
    """How the order of the groups in one format depends on image-token positions."""

    format: str
    image_share: float | None = Field(description="of the score summed over all groups; None: the sum is 0")
    rank_correlation: float | None = Field(
        description="Spearman's, of score per bit saved from text positions and from both; None: all are equal"
    )
    moved: tuple[MovedGroup, ...] = Field(description="the groups whose rank moves most, at most 10")


class Positions(Part):
    """Text and image positions apart: what each says about the groups."""

    rankings: tuple[PositionRanking, ...]
    scheme_changes: dict[str, int | None] = Field(
        description="scheme -> groups in another format if only text positions counted; None: it can't be met then"
    )


class Comparison(Part):
    """The KL on the first held-out set of two schemes that are neighbours in searched-weight bits."""

    first: str
    second: str
    difference: float = Field(description="KL of the second minus KL of the first")
    standard_error: float | None = Field(description="sqrt(se1² + se2²); None: an error is unknown")
    within_noise: bool | None = Field(description="|difference| < 2 standard errors; None: can't be said")


class Edge(Part):
    """Where a scheme stops: the most sensitive group that it takes, and the least sensitive one that it leaves."""

    scheme: str
    taken: str
    left: str
    difference: float = Field(description="score per bit saved, left minus taken")
    standard_error: float | None = Field(description="of the difference, batch by batch; None: a single batch")
    within_noise: bool | None


class ReportedEvaluation(Part):
    """On which held-out set, and in which arithmetic, one checkpoint was evaluated."""

    scheme: str
    split: str
    data: DataSummary = Field(description="without sample_ids")
    arithmetic: str
    samples_seen_in_calibration: int | None = Field(description="None: the samples carry no digests")


class NotSearched(Part):
    """Modules that are left alone for one reason."""

    reason: str
    modules: tuple[str, ...]


class ReportedArm(Part):
    """One control arm: another choice of groups at a scheme's bits."""

    name: str
    control: str = Field(description="random, inverse, first_last, largest, lowest_score or modelopt")
    beside: str = Field(description="the scheme at whose bits it stands")
    coverage: float
    effective_bits: float
    predicted_score: float
    results: tuple[EvalResult, ...]


class ControlComparison(Part):
    """A scheme's KL on the first held-out set beside that of its control arms of one kind."""

    scheme: str
    control: str
    arms: int
    kl: float | None = Field(description="of the scheme; None: not evaluated")
    mean: float = Field(description="of the arms' KL")
    least: float
    most: float

    @property
    def ratio(self) -> float | None:
        """The scheme's KL over the arms' mean, or None."""
        return None if self.kl is None or self.mean <= 0 else self.kl / self.mean


class PredictedPoint(Part):
    """A scheme or control arm: the KL that all the others predict for it, and its measured one."""

    name: str
    is_control: bool
    score: float = Field(description="predicted score, in the report's `score_unit`")
    measured: float
    predicted: float | None = Field(description="None: its score is not positive, or the others don't suffice")
    low: float | None
    high: float | None


class Prediction(Part):
    """How well predicted scores say the KL on the first held-out set: KL = factor · score^exponent, leaving one out."""

    factor: float
    exponent: float
    level: float = Field(description="of the intervals")
    points: tuple[PredictedPoint, ...]
    median_error: float | None = Field(description="of |predicted / measured - 1|; None: no point is predicted")
    inside: float | None = Field(description="share of the measured values inside their intervals")


class ReportedProbe(Part):
    """What one runtime does with one scheme's checkpoint."""

    scheme: str
    runtime: str
    version: str
    stage: Stage
    device: str | None
    verdict: str = Field(description="ok, or the class of the first error")
    layers: dict[str, int] = Field(description="format -> linear modules that the runtime runs in it")
    as_promised: int = Field(description="linear modules that it runs in the format of the manifest")
    findings: tuple[ProbeFinding, ...]
    log_probs: tuple[LogProbDifference, ...]
    throughput: tuple[Throughput, ...]


class Environment(Part):
    """Where some of the steps ran."""

    steps: tuple[str, ...]
    hardware: str
    threads: int
    versions: dict[str, str]


class Report(Record):
    """Everything that one run measured, planned, wrote, checked and evaluated."""

    volatile = frozenset({"environments", "phases"})

    verdict: str = Field(default="", description="which scheme to take, in one sentence (`report.verdict`)")
    measurement_sha256: str
    model: ModelSource
    source_weight_file_bytes: int | None = Field(description="the original's *.safetensors; None: not known")
    searched_weights: int
    searched_source_bytes: int = Field(description="the searched weights in 16 bits")
    calibration: DataSummary = Field(description="without sample_ids")
    engine: str
    method: str
    compute_dtype: str
    fused_scales_shared: bool
    rounding: Rounding | None = Field(default=None, description="None: every weight to its nearest code")
    formats: tuple[str, ...]
    score_unit: str
    score_batches: int
    schemes: tuple[ReportedScheme, ...] = Field(description="from most to fewest bits")
    nesting: tuple[tuple[str, ...], ...] = Field(description="chains of schemes, each holding the one before")
    comparable: bool = Field(description="all evaluations share data, model and arithmetic")
    splits: tuple[str, ...] = Field(description="names of the held-out sets; the first is compared")
    comparisons: tuple[Comparison, ...]
    below_noise_floor: tuple[str, ...] = Field(description="schemes whose KL is below that of BF16 arithmetic")
    edges: tuple[Edge, ...]
    groups: tuple[ReportedGroup, ...]
    positions: Positions | None = Field(description="None: scores of image positions are not known apart")
    evaluations: tuple[ReportedEvaluation, ...]
    verification: Verification | None
    probes: tuple[ReportedProbe, ...]
    controls: tuple[ReportedArm, ...]
    control_comparisons: tuple[ControlComparison, ...]
    refinements: tuple[Refinement, ...] = Field(default=(), description="schemes whose groups were swapped in context")
    controls_left_out: tuple[str, ...] = Field(description="control arms for which there was no time")
    prediction: Prediction | None = Field(description="None: too few measured points")
    not_searched: tuple[NotSearched, ...]
    settings: dict[str, Any] = Field(description="the recipe with every default")
    environments: tuple[Environment, ...]
    phases: tuple[PhaseCost, ...]

    def first_result(self, metric: str, split: str) -> EvalResult | None:
        """Return the metric's result of the first scheme that has one: for its unit, reference and noise floor."""
        return next((found for scheme in self.schemes if (found := scheme.result(metric, split))), None)


def batch_standard_error(contributions: Sequence[float]) -> float | None:
    """Return the standard error of Σ `contributions`, one per scoring batch; None for fewer than two.

    The batches are taken as independent draws: sqrt(n · s²), s² being the sample variance.
    """
    count = len(contributions)
    if count < 2:
        return None
    mean = math.fsum(contributions) / count
    return math.sqrt(count / (count - 1) * math.fsum((c - mean) ** 2 for c in contributions))


def build_report(
    recipe: Mapping[str, Any],
    measurement: Measurement,
    schemes: Sequence[Scheme],
    manifests: Mapping[str, CheckpointManifest],
    verification: Verification | None,
    evaluations: Mapping[str, Evaluation],
    phases: Sequence[PhaseCost],
    standard_errors: Mapping[str, float | None] = MappingProxyType({}),
    text_only_changes: Mapping[str, int | None] = MappingProxyType({}),
    probes: Sequence[ProbeResult] = (),
    evidence: Evidence | None = None,
    refinements: Refinements | None = None,
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
        standard_errors: of the predicted scores, by scheme name.
        text_only_changes: groups of each scheme that would change if only text positions counted; None: can't be met.
        probes: what the runtimes do with those checkpoints.
        evidence: the control arms of the schemes.
        refinements: of the schemes, where they were refined.

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
    nested_in = _nested_in(ladder)
    arms = evidence.arms if evidence and comparable else ()
    report = Report(
        measurement_sha256=measurement.fingerprint(),
        model=measurement.model,
        source_weight_file_bytes=sum(weight_files) if weight_files else None,
        searched_weights=measurement.searched_weights,
        searched_source_bytes=measurement.searched_weights * BF16_BITS // _BITS_PER_BYTE,
        calibration=measurement.calibration.model_copy(update={"sample_ids": ()}),
        engine=measurement.engine,
        method=measurement.method,
        compute_dtype=measurement.compute_dtype,
        fused_scales_shared=measurement.fused_scales_shared,
        rounding=measurement.rounding,
        formats=measurement.formats,
        score_unit=measurement.score_unit,
        score_batches=len(measurement.score_weights),
        schemes=tuple(
            _reported_scheme(
                scheme, nested_in[scheme.name], measurement, manifests, verification, evaluations, standard_errors
            )
            for scheme in ladder
        ),
        nesting=_chains(nested_in),
        comparable=comparable,
        splits=tuple(
            dict.fromkeys(split for s in ladder if s.name in evaluations for split in evaluations[s.name].data)
        ),
        comparisons=_comparisons(ladder, evaluations) if comparable else (),
        below_noise_floor=tuple(s.name for s in ladder if _below_floor(evaluations.get(s.name))),
        edges=tuple(edge for scheme in ladder if (edge := _edge(scheme, measurement)) is not None),
        groups=_reported_groups(measurement, ladder),
        positions=_positions(measurement, ladder, text_only_changes),
        evaluations=tuple(
            reported
            for s in ladder
            if s.name in evaluations
            for reported in _reported_evaluations(evaluations[s.name], measurement.calibration)
        ),
        verification=verification,
        probes=tuple(_reported_probe(probe) for scheme in ladder for probe in probes if probe.scheme == scheme.name),
        controls=tuple(_reported_arm(arm) for arm in arms),
        control_comparisons=_control_comparisons(ladder, evaluations, arms),
        refinements=refinements.refinements if refinements else (),
        controls_left_out=evidence.left_out if evidence else (),
        prediction=_prediction(ladder, evaluations, arms) if comparable else None,
        not_searched=_not_searched(measurement),
        settings=_plain(recipe),
        environments=_environments(measurement, ladder, evaluations),
        phases=tuple(phases) or (measurement.run.phases if measurement.run else ()),
    )
    return report.model_copy(update={"verdict": verdict(report)})


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return `content` as JSON would give it back: tuples are lists, anything else is text."""
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
    standard_errors: Mapping[str, float | None],
) -> ReportedScheme:
    manifest = manifests.get(scheme.name)
    evaluation = evaluations.get(scheme.name)
    return ReportedScheme(
        name=scheme.name,
        asked=_plain(scheme.asked),
        coverage=scheme.coverage,
        effective_bits=scheme.effective_bits,
        weight_bytes=scheme.weight_bytes,
        weight_file_bytes=_weight_file_bytes(manifest) if manifest else None,
        checkpoint_bytes=manifest.total_bytes if manifest else None,
        kv_cache_format=scheme.kv_cache_format,
        predicted_score=scheme.predicted_score,
        predicted_standard_error=standard_errors.get(scheme.name),
        results=evaluation.results if evaluation else None,
        verified=None if verification is None else verification.matches(scheme.name),
        format_counts=_format_counts(scheme, measurement),
        nested_in=nested_in,
        unsettled=_unsettled(scheme, measurement),
    )


def _unsettled(scheme: Scheme, measurement: Measurement) -> Unsettled | None:
    found = flips(measurement, scheme)
    if found is None:
        return None
    return Unsettled(expected_flips=found.expected[1], enough=found.enough, shares=dict(found.share))


def _weight_file_bytes(manifest: CheckpointManifest) -> int:
    return sum(file.bytes for file in manifest.files if file.name.endswith(_WEIGHT_SUFFIX))


def _kind(group: QuantGroup) -> str:
    return group.name.rpartition(".")[2]


def _format_counts(scheme: Scheme, measurement: Measurement) -> tuple[FormatCount, ...]:
    kinds = list(dict.fromkeys(_kind(group) for group in measurement.groups))
    counts = []
    for format_name in (*measurement.formats, BF16):
        groups = [group for group in measurement.groups if scheme.formats[group.name] == format_name]
        counts.append(
            FormatCount(
                format=format_name,
                groups=len(groups),
                modules=sum(len(group.modules) for group in groups),
                weight_elements=sum(group.weight_elements for group in groups),
                groups_by_kind={kind: sum(_kind(group) == kind for group in groups) for kind in kinds},
            )
        )
    return tuple(counts)


def _nested_in(ladder: Sequence[Scheme]) -> dict[str, tuple[str, ...]]:
    """Return for every scheme the others that quantise all of its groups (and KV cache) alike, and more."""
    quantised = {
        s.name: {item for item in [*s.formats.items(), (_KV_CACHE, s.kv_cache_format or BF16)] if item[1] != BF16}
        for s in ladder
    }
    return {name: tuple(other for other in quantised if quantised[name] < quantised[other]) for name in quantised}


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


def _comparisons(ladder: Sequence[Scheme], evaluations: Mapping[str, Evaluation]) -> tuple[Comparison, ...]:
    """Return the KL differences of neighbours among the evaluated schemes."""
    results = [(s.name, evaluations[s.name].result(KL)) for s in ladder if s.name in evaluations]
    known = [(name, result) for name, result in results if result is not None]
    comparisons = []
    for (first, one), (second, other) in itertools.pairwise(known):
        difference = other.value - one.value
        error = None
        if one.standard_error is not None and other.standard_error is not None:
            error = math.hypot(one.standard_error, other.standard_error)
        comparisons.append(
            Comparison(
                first=first,
                second=second,
                difference=difference,
                standard_error=error,
                within_noise=None if error is None else abs(difference) < WITHIN_NOISE_ERRORS * error,
            )
        )
    return tuple(comparisons)


def _below_floor(evaluation: Evaluation | None) -> bool:
    result = evaluation.result(KL) if evaluation else None
    return result is not None and result.noise_floor is not None and result.value < result.noise_floor


def _bits_saved(group: QuantGroup, candidate: Candidate) -> int:
    return group.weight_elements * BF16_BITS - candidate.weight_bits


def _contributions(measurement: Measurement, candidate: Candidate) -> list[float]:
    """Return what each scoring batch adds to the candidate's sensitivity."""
    return [w * s for w, s in zip(measurement.score_weights, candidate.scores, strict=True)]


def _densities(measurement: Measurement, format_name: str, image_weight: float = 1.0) -> dict[str, float]:
    """Return each group's score per bit saved in one format, in network order, without those that save nothing."""
    table = measurement.by_group()
    density = {}
    for group in measurement.groups:
        candidate = table[group.name][format_name]
        saved = _bits_saved(group, candidate)
        if saved > 0:
            density[group.name] = measurement.sensitivity(candidate, image_weight) / saved
    return density


def ranks_of(density: Mapping[str, float]) -> dict[str, int]:
    """Return each group's rank, from 1, in increasing order; equal ones in the order they come in."""
    return {name: rank for rank, name in enumerate(sorted(density, key=density.__getitem__), start=1)}


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation of two sequences; None where all values of one are equal.

    The correlation of the ranks, equal values having the mean of theirs. Source: Kendall, Rank Correlation Methods.
    """
    ranks = []
    for values in (first, second):
        order = sorted(values)
        # Mean position, from 0, of a value's equals.
        mean = {value: order.index(value) + (order.count(value) - 1) / 2 for value in set(values)}
        middle = (len(values) - 1) / 2
        ranks.append([mean[value] - middle for value in values])
    norm = math.sqrt(math.prod(math.fsum(rank * rank for rank in side) for side in ranks))
    return math.fsum(a * b for a, b in zip(*ranks, strict=True)) / norm if norm else None


def _positions(
    measurement: Measurement, ladder: Sequence[Scheme], text_only_changes: Mapping[str, int | None]
) -> Positions | None:
    """Return what text and image positions say apart; None where it isn't known of every candidate."""
    if not all(candidate.image_scores for candidate in measurement.candidates):
        return None
    return Positions(
        rankings=tuple(_position_ranking(measurement, format_name) for format_name in measurement.formats),
        scheme_changes={s.name: text_only_changes[s.name] for s in ladder if s.name in text_only_changes},
    )


def _position_ranking(measurement: Measurement, format_name: str) -> PositionRanking:
    table = measurement.by_group()
    text, both = (_densities(measurement, format_name, weight) for weight in (0.0, 1.0))
    rank_text, rank_both = ranks_of(text), ranks_of(both)
    scores: dict[str, tuple[float, float]] = {}  # group -> score of image positions, of all
    for name in table:
        score = measurement.sensitivity(table[name][format_name])
        scores[name] = (score - measurement.sensitivity(table[name][format_name], 0.0), score)
    moved = sorted(
        (name for name in both if rank_text[name] != rank_both[name]), key=lambda n: -abs(rank_text[n] - rank_both[n])
    )
    return PositionRanking(
        format=format_name,
        image_share=_share(math.fsum(i for i, _ in scores.values()), math.fsum(s for _, s in scores.values())),
        rank_correlation=rank_correlation(list(text.values()), list(both.values())),
        moved=tuple(
            MovedGroup(
                group=name,
                rank_text=rank_text[name],
                rank_both=rank_both[name],
                image_share=_share(*scores[name]),
            )
            for name in moved[:MAX_MOVED]
        ),
    )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _reported_groups(measurement: Measurement, ladder: Sequence[Scheme]) -> tuple[ReportedGroup, ...]:
    table = measurement.by_group()
    density = {name: _densities(measurement, name) for name in measurement.formats}
    ranks = {name: ranks_of(found) for name, found in density.items()}
    intervals = {name: rank_intervals(measurement, name) for name in measurement.formats}
    reported = []
    for group in measurement.groups:
        sensitivities = []
        for format_name in measurement.formats:
            candidate = table[group.name][format_name]
            sensitivities.append(
                GroupSensitivity(
                    format=format_name,
                    score=measurement.sensitivity(candidate),
                    standard_error=batch_standard_error(_contributions(measurement, candidate)),
                    score_per_bit_saved=density[format_name].get(group.name),
                    rank=ranks[format_name].get(group.name),
                    rank_interval=intervals[format_name].get(group.name),
                )
            )
        reported.append(
            ReportedGroup(
                name=group.name,
                kind=_kind(group),
                modules=tuple(module.name for module in group.modules),
                weight_elements=group.weight_elements,
                sensitivities=tuple(sensitivities),
                formats={scheme.name: scheme.formats[group.name] for scheme in ladder},
            )
        )
    return tuple(reported)


def _edge(scheme: Scheme, measurement: Measurement) -> Edge | None:
    """Return where the scheme stops in the order of score per bit saved; None where it doesn't follow that order.

    The scores are those that it was planned from: image positions count for what was asked.
    """
    measurement = measurement.weigh_images(float(scheme.asked.get("image_weight", 1.0)))
    table = measurement.by_group()
    taken: list[tuple[float, str, list[float]]] = []  # score per bit saved, group, its parts batch by batch
    left: list[tuple[float, str, list[float]]] = []
    for group in measurement.groups:
        format_name = scheme.formats[group.name]
        quantised = format_name != BF16
        if not quantised and len(measurement.formats) != 1:
            return None  # one order a format: there is no single edge
        candidate = table[group.name][format_name if quantised else measurement.formats[0]]
        saved = _bits_saved(group, candidate)
        if saved <= 0:
            continue
        scores = [contribution / saved for contribution in _contributions(measurement, candidate)]
        (taken if quantised else left).append((math.fsum(scores), group.name, scores))
    if not taken or not left:
        return None
    last, first = max(taken, key=lambda entry: entry[0]), min(left, key=lambda entry: entry[0])
    difference = first[0] - last[0]
    if difference < 0:
        return None  # chosen otherwise (by name, at random), or a smaller group filled the budget
    error = batch_standard_error([b - a for a, b in zip(last[2], first[2], strict=True)])
    return Edge(
        scheme=scheme.name,
        taken=last[1],
        left=first[1],
        difference=difference,
        standard_error=error,
        within_noise=None if error is None else difference < WITHIN_NOISE_ERRORS * error,
    )


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
    )


def _reported_arm(arm: ControlArm) -> ReportedArm:
    scheme = arm.scheme
    return ReportedArm(
        name=scheme.name,
        control=str(scheme.asked["control"]),
        beside=str(scheme.asked["beside"]),
        coverage=scheme.coverage,
        effective_bits=scheme.effective_bits,
        predicted_score=scheme.predicted_score,
        results=arm.results,
    )


def _kl_of(results: Sequence[EvalResult]) -> float | None:
    """Return the KL on the first held-out set."""
    return next((result.value for result in results if result.metric == KL), None)


def _control_comparisons(
    ladder: Sequence[Scheme], evaluations: Mapping[str, Evaluation], arms: Sequence[ControlArm]
) -> tuple[ControlComparison, ...]:
    found = []
    for scheme in ladder:
        own = _kl_of(evaluations[scheme.name].results) if scheme.name in evaluations else None
        kinds: dict[str, list[float]] = {}
        for arm in arms:
            kl = _kl_of(arm.results)
            if arm.scheme.asked["beside"] == scheme.name and kl is not None:
                kinds.setdefault(str(arm.scheme.asked["control"]), []).append(kl)
        for kind, kls in kinds.items():
            found.append(
                ControlComparison(
                    scheme=scheme.name,
                    control=kind,
                    arms=len(kls),
                    kl=own,
                    mean=math.fsum(kls) / len(kls),
                    least=min(kls),
                    most=max(kls),
                )
            )
    return tuple(found)


def _prediction(
    ladder: Sequence[Scheme], evaluations: Mapping[str, Evaluation], arms: Sequence[ControlArm]
) -> Prediction | None:
    """Return how well the predicted scores of schemes and arms with a 16-bit KV cache say their KL."""
    evaluated = [(scheme, evaluations[scheme.name].results, False) for scheme in ladder if scheme.name in evaluations]
    evaluated += [(arm.scheme, arm.results, True) for arm in arms]
    known = [
        (scheme, kl, is_control)
        for scheme, results, is_control in evaluated
        if scheme.kv_cache_format is None and (kl := _kl_of(results)) is not None  # scores know nothing of the cache
    ]
    scores, kls = [scheme.predicted_score for scheme, _, _ in known], [kl for _, kl, _ in known]
    fitted = KlMap.fit(scores, kls)
    if fitted is None:
        return None
    points = tuple(
        PredictedPoint(
            name=scheme.name,
            is_control=is_control,
            score=scheme.predicted_score,
            measured=kl,
            predicted=guess.value if guess else None,
            low=guess.low if guess else None,
            high=guess.high if guess else None,
        )
        for (scheme, kl, is_control), guess in zip(known, leave_one_out(scores, kls), strict=True)
    )
    guessed = [(p.measured, p.predicted, p.low, p.high) for p in points if p.predicted and p.low and p.high]
    errors = sorted(abs(predicted / measured - 1) for measured, predicted, _, _ in guessed)
    return Prediction(
        factor=fitted.factor,
        exponent=fitted.exponent,
        level=LEVEL,
        points=points,
        median_error=statistics.median(errors) if errors else None,
        inside=sum(low <= measured <= high for measured, _, low, high in guessed) / len(guessed) if guessed else None,
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
        found[key] = Environment(steps=steps, hardware=run.hardware, threads=run.threads, versions=run.versions)
    return tuple(found.values())
