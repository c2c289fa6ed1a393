"""What an assignment of formats costs and is predicted to do."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bitladder.errors import InfeasibleTarget, PlanError
from bitladder.formats import get_format, group_bits
from bitladder.models.fusing import Fusing
from bitladder.planning.options import check_usable
from bitladder.recipe import SchemeSpec
from bitladder.records import BF16, CacheChoice, Candidate, Control, Measurement, QuantGroup, Scheme

IN_16_BITS = CacheChoice()


class InFormat(NamedTuple):
    """The groups of an assignment that have one format."""

    score: float  # predicted, summed, in the measurement's unit
    weights: int  # elements, summed


Parts = Mapping[str, InFormat]  # by format


def density_order(measurement: Measurement, format_name: str) -> list[str]:
    """Return the groups by predicted damage per bit saved, least first; groups with equal density in network order.

    Those that can't have the format are left out.

    Raises:
        PlanError: the format isn't measured. MeasurementError: a score is NaN or Inf.
    """
    if format_name not in measurement.formats:
        raise PlanError(f"format {format_name} is not measured; measured: {', '.join(measurement.formats)}")
    return list(cheapest_first(measurement.only([format_name])))


def cheapest_first(measurement: Measurement) -> dict[str, str]:
    """Return the groups by predicted damage per bit saved, least first, each with the format that does least of it.

    Of a group's formats with equal density it is the smallest one, of those the first one measured; groups with equal
    density are in network order. Groups that can have none of the formats are left out.

    Raises:
        MeasurementError: a score is NaN or Inf.
    """
    check_usable(measurement)
    groups = {group.name: group for group in measurement.groups}

    def density(one: Candidate) -> float:
        return measurement.sensitivity(one) / groups[one.group].bits_saved(one)

    best = {}
    for group, row in measurement.by_group().items():
        known = [(row[name], i) for i, name in enumerate(measurement.formats) if name in row]
        able = [(density(one), one.weight_bits, i) for one, i in known]
        if able:
            best[group] = min(able)
    return {group: measurement.formats[best[group][2]] for group in sorted(best, key=lambda group: best[group][0])}


def standard_error(measurement: Measurement, formats: Mapping[str, str]) -> float | None:
    """Return the standard error of a scheme's predicted score over the scoring batches, or None with one batch
    or nothing quantised.

    With n batches and c_b the scheme's weighted score of batch b, the predicted score is Σ c_b and its standard error
    sqrt(n / (n - 1) · Σ (c_b - mean c)²).
    """
    table = measurement.by_group()
    chosen = [table[group][name].scores for group, name in formats.items() if name != BF16]
    count = len(measurement.score_weights)
    if count < 2 or not chosen:
        return None
    parts = [
        weight * math.fsum(scores[batch] for scores in chosen) for batch, weight in enumerate(measurement.score_weights)
    ]
    mean = math.fsum(parts) / count
    return math.sqrt(count / (count - 1) * math.fsum((part - mean) ** 2 for part in parts))


def parts_by_format(measurement: Measurement, formats: Mapping[str, str]) -> Parts:
    """Return an assignment's predicted score and weights by the format that groups have, of every measured format."""
    table = measurement.by_group()
    scores = {(g, name): measurement.sensitivity(table[g][name]) for g, name in formats.items() if name != BF16}
    return summed(measurement, formats, scores)


def summed(measurement: Measurement, formats: Mapping[str, str], scores: Mapping[tuple[str, str], float]) -> Parts:
    """Return what `parts_by_format` does, from the predicted score of each group and format where that is at hand."""
    elements = {group.name: group.weight_elements for group in measurement.groups}
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in measurement.formats}
    for group, name in formats.items():
        if name != BF16:
            found[name].append((scores[group, name], elements[group]))
    return {
        name: InFormat(math.fsum(score for score, _ in groups), sum(weights for _, weights in groups))
        for name, groups in found.items()
    }


def mean_scores(measurement: Measurement) -> dict[str, float]:
    """Return by format what a weight scores on average, over the groups that can have it; 0 where none can."""
    elements = {group.name: group.weight_elements for group in measurement.groups}
    found = {}
    for name in measurement.formats:
        able = [one for one in measurement.candidates if one.format == name]
        weights = sum(elements[one.group] for one in able)
        found[name] = math.fsum(map(measurement.sensitivity, able)) / weights if weights else 0.0
    return found


def price(
    measurement: Measurement,
    name: str,
    formats: Mapping[str, str],
    asked: SchemeSpec | Control,
    *,
    cache: CacheChoice = IN_16_BITS,
    fingerprint: str | None = None,
) -> Scheme:
    """Return the record of any assignment: what it costs, and what it is predicted to do.

    Args:
        measurement: what the prediction is made from.
        name: of the scheme.
        formats: `{group: format}`, of every group.
        asked: what led to it.
        cache: what becomes of the KV cache.
        fingerprint: of the measurement as it was written, where it is weighed otherwise here.

    Raises:
        InfeasibleTarget: nothing is quantised. PlanError: a group has a format that it can't have.
    """
    check_able(measurement, name, formats)
    weight_bits = weight_bytes = quantised = 0
    excluded: list[str] = []
    for group in measurement.groups:
        format_name = formats[group.name]
        bits, size = stored(group, format_name)
        weight_bits += bits
        weight_bytes += size
        if format_name == BF16:
            excluded += [(m.tensor or m.name).removesuffix(".weight") for m in group.modules]
        else:
            quantised += group.weight_elements
    if not quantised:
        raise InfeasibleTarget(f"scheme {name} would quantise nothing; ask for more")
    return Scheme(
        name=name,
        measurement_sha256=fingerprint or measurement.fingerprint(),
        asked=asked,
        formats=dict(formats),
        effective_bits=weight_bits / measurement.searched_weights,
        coverage=quantised / measurement.searched_weights,
        searched_weights=measurement.searched_weights,
        weight_bits=weight_bits,
        weight_bytes=weight_bytes,
        predicted_score=predicted_score(measurement, formats),
        score_unit=measurement.score_unit,
        exclude_modules=_with_vllms_names(
            measurement.model.architecture, [*excluded, *(module.checkpoint_name for module in measurement.untouched)]
        ),
        kv_cache_format=cache.format,
        kv_cache_skips=cache.skips,
        kv_cache_kl=cache.kl,
    )


def stored(group: QuantGroup, format_name: str) -> tuple[int, int]:
    """Return a group's weight bits in a format, `bf16` included, and its bytes, which count scales of tensors too."""
    bits = group_bits(group, format_name)
    scales = 0 if format_name == BF16 else len(group.modules) * get_format(format_name).tensor_scale_bytes
    return bits, -(-bits // 8) + scales


def check_able(measurement: Measurement, scheme: str, formats: Mapping[str, str]) -> None:
    """Check that every group can have the format that it is given.

    Raises:
        PlanError: one can't.
    """
    for one in measurement.left_out:
        if formats[one.group] == one.format:
            raise PlanError(f"scheme {scheme}: {one.group} can't be in {one.format}: {one.reason}; name another format")


def predicted_score(measurement: Measurement, formats: Mapping[str, str]) -> float:
    """Return an assignment's predicted score, in the measurement's unit."""
    table = measurement.by_group()
    return math.fsum(measurement.sensitivity(table[g][name]) for g, name in formats.items() if name != BF16)


def _with_vllms_names(architecture: str, modules: Sequence[str]) -> tuple[str, ...]:
    """Return the excluded modules and, where these alone would not exclude a layer in vLLM, the name that it asks for.

    That is so where vLLM's quantisation doesn't know which modules a layer holds, where it insists on one that the
    model hasn't (values that are the keys), and where it builds a module under another name than the module's own.
    Source: vllm, quantization/utils/quant_utils.py, is_layer_skipped.
    """
    fusing = Fusing.of({"architectures": [architecture]})
    layers = [layer for layer in fusing.layers(modules) if layer.shards]
    names = [*modules, *(x.name for x in layers if not x.packed or len(x.modules) < len(x.shards))]
    return tuple(dict.fromkeys([*names, *map(fusing.asked_as, names)]))
