"""What a report says of quant groups: sensitivity, rank, what lies at a scheme's edge."""

import math
from collections.abc import Mapping, Sequence

from bitladder.records import BF16, Candidate, Measurement, QuantGroup, Scheme
from bitladder.report.types import (
    WITHIN_NOISE_ERRORS,
    Edge,
    FormatCount,
    GroupSensitivity,
    MovedGroup,
    PositionRanking,
    Positions,
    ReportedGroup,
)

MAX_MOVED = 10  # groups shown whose rank moves most


def batch_standard_error(contributions: Sequence[float]) -> float | None:
    """Return the standard error of Σ `contributions`, one per scoring batch; None for fewer than two.

    The batches are taken as independent draws: sqrt(n · s²), s² being the sample variance.
    """
    count = len(contributions)
    if count < 2:
        return None
    mean = math.fsum(contributions) / count
    return math.sqrt(count / (count - 1) * math.fsum((c - mean) ** 2 for c in contributions))


def kind_of(group: QuantGroup) -> str:
    """Return the last part of a group's name: what kind of layer it is."""
    return group.name.rpartition(".")[2]


def format_counts(scheme: Scheme, measurement: Measurement) -> tuple[FormatCount, ...]:
    """Return how many groups of each kind have which format: those of the scheme, and `bf16`."""
    kinds = list(dict.fromkeys(kind_of(group) for group in measurement.groups))
    counts = []
    for format_name in (*measurement.formats, BF16):
        groups = [group for group in measurement.groups if scheme.formats[group.name] == format_name]
        if not groups and format_name != BF16:
            continue  # measured, but none of the scheme's
        counts.append(
            FormatCount(
                format=format_name,
                groups=len(groups),
                modules=sum(len(group.modules) for group in groups),
                weight_elements=sum(group.weight_elements for group in groups),
                groups_by_kind={kind: sum(kind_of(group) == kind for group in groups) for kind in kinds},
            )
        )
    return tuple(counts)


def contributions(measurement: Measurement, candidate: Candidate) -> list[float]:
    """Return what each scoring batch adds to the candidate's sensitivity."""
    return [w * s for w, s in zip(measurement.score_weights, candidate.scores, strict=True)]


def densities(measurement: Measurement, format_name: str, image_weight: float = 1.0) -> dict[str, float]:
    """Return each group's score per bit saved in one format, in network order, of those that can save any."""
    table = measurement.by_group()
    density = {}
    for group in measurement.groups:
        candidate = table[group.name].get(format_name)
        saved = 0 if candidate is None else group.bits_saved(candidate)
        if candidate is not None and saved > 0:
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


def positions_of(measurement: Measurement, ladder: Sequence[Scheme]) -> Positions | None:
    """Return what text and image positions say apart; None where it isn't known of every candidate."""
    if not all(candidate.image_scores for candidate in measurement.candidates):
        return None
    return Positions(
        rankings=tuple(_position_ranking(measurement, format_name) for format_name in measurement.formats),
        scheme_changes={
            scheme.name: None if scheme.text_only_changes == "unattainable" else scheme.text_only_changes
            for scheme in ladder
            if scheme.text_only_changes is not None
        },
    )


def _position_ranking(measurement: Measurement, format_name: str) -> PositionRanking:
    table = measurement.by_group()
    text, both = (densities(measurement, format_name, weight) for weight in (0.0, 1.0))
    rank_text, rank_both = ranks_of(text), ranks_of(both)
    scores: dict[str, tuple[float, float]] = {}  # group -> score of image positions, of all
    for name in (name for name in table if format_name in table[name]):
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


def reported_groups(measurement: Measurement, ladder: Sequence[Scheme]) -> tuple[ReportedGroup, ...]:
    """Return what the report says of every group, in the measurement's order."""
    from bitladder.planning.uncertainty import rank_intervals  # with numpy, which comparing reports needs not

    table = measurement.by_group()
    density = {name: densities(measurement, name) for name in measurement.formats}
    ranks = {name: ranks_of(found) for name, found in density.items()}
    intervals = {name: rank_intervals(measurement, name) for name in measurement.formats}
    reported = []
    for group in measurement.groups:
        sensitivities = []
        for format_name in (name for name in measurement.formats if name in table[group.name]):
            candidate = table[group.name][format_name]
            sensitivities.append(
                GroupSensitivity(
                    format=format_name,
                    score=measurement.sensitivity(candidate),
                    standard_error=batch_standard_error(contributions(measurement, candidate)),
                    score_per_bit_saved=density[format_name].get(group.name),
                    rank=ranks[format_name].get(group.name),
                    rank_interval=intervals[format_name].get(group.name),
                )
            )
        reported.append(
            ReportedGroup(
                name=group.name,
                kind=kind_of(group),
                modules=tuple(module.name for module in group.modules),
                weight_elements=group.weight_elements,
                sensitivities=tuple(sensitivities),
                formats={scheme.name: scheme.formats[group.name] for scheme in ladder},
            )
        )
    return tuple(reported)


def edge_of(scheme: Scheme, measurement: Measurement) -> Edge | None:
    """Return where the scheme stops in the order of score per bit saved; None where it doesn't follow that order.

    The scores are those that it was planned from: image positions count for what was asked.
    """
    measurement = scheme.narrow(scheme.weigh(measurement))
    table = measurement.by_group()
    taken: list[tuple[float, str, list[float]]] = []  # score per bit saved, group, its parts batch by batch
    left: list[tuple[float, str, list[float]]] = []
    for group in measurement.groups:
        format_name = scheme.formats[group.name]
        quantised = format_name != BF16
        if not quantised and len(measurement.formats) != 1:
            return None  # one order a format: there is no single edge
        candidate = table[group.name].get(format_name if quantised else measurement.formats[0])
        saved = 0 if candidate is None else group.bits_saved(candidate)
        if candidate is None or saved <= 0:
            continue
        scores = [contribution / saved for contribution in contributions(measurement, candidate)]
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
