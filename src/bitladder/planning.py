"""Plans schemes from a measurement: `plan(measurement, spec) -> Scheme`. Pure and exact; no torch, no model.

Every group gets one of its candidate formats or stays in bf16. The cost of an assignment is its weight bits (an
integer), its predicted damage the sum of the sensitivities. `Frontier` holds every Pareto-optimal pair of the two, so
that a budget on either side is one look-up:

    effective_bits       the least damage within so many bits
    max_predicted_score  the fewest bits within so much damage
    max_kl               the same, through a map from scores to KL that was fitted on measured schemes
    coverage             a prefix of the order by damage per bit saved, so that coverage schemes are nested
    include              what the patterns name

The frontier grows group by group: shift all points by each candidate, merge, drop what is dominated. With one format
and no negative score a prefix is on the frontier, too: nothing of its size does less damage.

Source: Nemhauser and Ullmann, "Discrete dynamic programming and capital allocation", Management Science 15(9), 1969.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitladder.errors import DuplicateSchemes, InfeasibleTarget, MeasurementError, PlanError
from bitladder.formats import FORMATS, bits_of, get_format
from bitladder.models.fusing import Fusing
from bitladder.prediction import KlMap
from bitladder.recipe import SchemeSpec
from bitladder.records import BF16, BF16_BITS, Measurement, QuantGroup, Scheme, UntouchedModule

MAX_FRONTIER_CHOICES = 20_000_000  # stored over all groups, 5 bytes each: 100 MB
SMALLEST_FORMAT_BITS = 4  # in the field, such as NVFP4


@dataclass(frozen=True)
class _Stage:
    """One group's step: which point of the stage before, and which choice, each point came from."""

    group: str
    choices: tuple[str, ...]
    parent: NDArray[np.int32]
    choice: NDArray[np.int8]


class Frontier:
    """Every Pareto-optimal (weight bits, predicted score) of a measurement.

    bits: [points] int64, ascending. scores: [points] float64, descending: no point is as good as another in both.
    Among equal points the one found first is kept: fewer bits first, then the better score, then the earlier choice
    (bf16 before the formats in the measurement's order). So the result depends on the measurement alone.
    """

    def __init__(self, measurement: Measurement, excluded: Iterable[str] = ()) -> None:
        _check_usable(measurement)
        self.measurement = measurement
        self.excluded = frozenset(excluded)  # groups that stay in bf16
        self.bits: NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        self.scores: NDArray[np.float64] = np.zeros(1, dtype=np.float64)
        self._stages: list[_Stage] = []
        table = measurement.by_group()
        stored = 0
        for group in measurement.groups:
            choices: list[tuple[str, int, float]] = [(BF16, group.weight_elements * BF16_BITS, 0.0)]
            if group.name not in self.excluded:
                row = table[group.name]
                choices += [(n, row[n].weight_bits, measurement.sensitivity(row[n])) for n in measurement.formats]
            if stored + len(self.bits) * len(choices) > MAX_FRONTIER_CHOICES:
                raise PlanError(
                    f"the exact frontier of {len(measurement.groups)} groups with {len(measurement.formats)} formats "
                    f"exceeds {MAX_FRONTIER_CHOICES:,} stored choices; use coverage or include, or fewer formats"
                )
            self._stages.append(self._extend(group, choices))
            stored += len(self.bits)

    def _extend(self, group: QuantGroup, choices: Sequence[tuple[str, int, float]]) -> _Stage:
        """Add one group's choices to every point, and keep what isn't dominated."""
        count = len(self.bits)
        bits = np.concatenate([self.bits + extra for _, extra, _ in choices])
        scores = np.concatenate([self.scores + extra for _, _, extra in choices])
        order = np.lexsort((scores, bits))  # stable: equal points stay in the order of the choices
        sorted_scores = scores[order]
        best_before = np.minimum.accumulate(np.concatenate(([np.inf], sorted_scores[:-1])))
        kept = order[sorted_scores < best_before]
        self.bits, self.scores = bits[kept], scores[kept]
        return _Stage(
            group.name,
            tuple(name for name, _, _ in choices),
            (kept % count).astype(np.int32),
            (kept // count).astype(np.int8),
        )

    @property
    def effective_bits(self) -> NDArray[np.float64]:
        """Effective bits of each point."""
        return np.asarray(self.bits / self.measurement.searched_weights, dtype=np.float64)

    def assignment(self, index: int) -> dict[str, str]:
        """Return `{group: format}` of a point."""
        formats = {}
        for stage in reversed(self._stages):
            formats[stage.group] = stage.choices[stage.choice[index]]
            index = int(stage.parent[index])
        return dict(reversed(formats.items()))

    def within_bits(self, max_bits: int) -> int | None:
        """Return the point of the least score with at most so many weight bits, or None where there is none."""
        index = int(np.searchsorted(self.bits, max_bits, side="right")) - 1
        return index if index >= 0 else None

    def within_score(self, max_score: float) -> int | None:
        """Return the point of the fewest bits with at most this score, or None where there is none."""
        index = int(np.searchsorted(-self.scores, -max_score, side="left"))
        return index if index < len(self.scores) else None


def _check_usable(measurement: Measurement) -> None:
    """Refuse a measurement whose plans would mean nothing.

    Raises:
        MeasurementError: no candidate, a score that is NaN or Inf, or bits that contradict the format.
    """
    if not measurement.candidates:
        raise MeasurementError("the measurement has no quant group or no format: nothing to plan; measure again")
    size = {group.name: group.weight_elements for group in measurement.groups}
    for candidate in measurement.candidates:
        score = measurement.sensitivity(candidate)
        if not math.isfinite(score):
            raise MeasurementError(f"the score of {candidate.group} in {candidate.format} is {score}; measure again")
        wanted = size[candidate.group] * bits_of(candidate.format)
        if candidate.weight_bits != wanted:
            raise MeasurementError(
                f"{candidate.group} in {candidate.format} is recorded with {candidate.weight_bits} bits, but its "
                f"{size[candidate.group]} weights take {wanted}; measure again"
            )


def frontier(measurement: Measurement) -> Frontier:
    """Return the whole trade-off of a measurement.

    Raises:
        MeasurementError: a score is NaN or Inf. PlanError: it would not fit in memory.
    """
    return Frontier(measurement)


def density_order(measurement: Measurement, format_name: str) -> list[str]:
    """Return the groups by predicted damage per bit saved, least first; groups with equal density in network order.

    Raises:
        PlanError: the format isn't measured. MeasurementError: a score is NaN or Inf.
    """
    _check_usable(measurement)
    if format_name not in measurement.formats:
        raise PlanError(f"format {format_name} is not measured; measured: {', '.join(measurement.formats)}")
    table = measurement.by_group()

    def density(group: QuantGroup) -> float:
        candidate = table[group.name][format_name]
        return measurement.sensitivity(candidate) / (group.weight_elements * BF16_BITS - candidate.weight_bits)

    return [group.name for group in sorted(measurement.groups, key=density)]


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


class Searched(Protocol):
    """What patterns are matched with: a measurement, or a model that is to be measured (`targets.Target`)."""

    @property
    def groups(self) -> tuple[QuantGroup, ...]:
        """What is searched."""

    @property
    def untouched(self) -> tuple[UntouchedModule, ...]:
        """What isn't, and why."""


def matching_groups(searched: Searched, scheme: str, patterns: Iterable[str]) -> set[str]:
    """Return the groups that any of the patterns matches: by their own name, or by a module's, also as the checkpoint
    names it.

    Raises:
        PlanError: a pattern matches nothing.
    """
    names: dict[str, str] = {}
    for group in searched.groups:
        names[group.name] = group.name
        for module in group.modules:
            names[module.name] = group.name
            if module.tensor is not None:
                names[module.tensor.removesuffix(".weight")] = group.name
    found = set()
    for pattern in patterns:
        hits = {group for name, group in names.items() if fnmatchcase(name, pattern)}
        if not hits:
            for left in searched.untouched:
                if fnmatchcase(left.name, pattern) or fnmatchcase(left.checkpoint_name, pattern):
                    raise PlanError(
                        f"scheme {scheme}: pattern {pattern!r} matches only modules that no scheme quantises, such as "
                        f"{left.name} ({left.reason}); remove it"
                    )
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0)[0]
            raise PlanError(f"scheme {scheme}: pattern {pattern!r} matches no group or module; the nearest is {near!r}")
        found |= hits
    return found


def _one_format(measurement: Measurement, spec: SchemeSpec) -> str:
    """Return the format that a coverage or include scheme uses.

    Raises:
        PlanError: it isn't measured, or there are several and none is named.
    """
    name = spec.format or (measurement.formats[0] if len(measurement.formats) == 1 else None)
    if name is None or name not in measurement.formats:
        asked = "names no format" if name is None else f"asks for format {name}"
        raise PlanError(f"scheme {spec.name} {asked}; set `format` to one of those measured: {_listed(measurement)}")
    return name


def _listed(measurement: Measurement) -> str:
    return ", ".join(measurement.formats)


def _rounded_up(value: float) -> str:
    """Return six significant digits that are not below `value`, so that what a message names can be asked for."""
    return f"{float(Context(prec=6, rounding=ROUND_CEILING).create_decimal_from_float(value)):g}"


def _least_bits(edge: Frontier) -> str:
    """Return the least effective bits, rounded up."""
    return f"{math.ceil(Fraction(int(edge.bits[0]) * 100, edge.measurement.searched_weights)) / 100:.2f}"


def _range_of(edge: Frontier) -> str:
    """Return the formats and the effective bits that they reach."""
    return f"{_listed(edge.measurement)}, {BF16}: attainable {_least_bits(edge)} to {edge.effective_bits[-1]:.2f}"


def _remedy_for_bits(edge: Frontier, asked: Fraction) -> str:
    """Return what would make `asked` effective bits attainable."""
    measurement = edge.measurement
    total = measurement.searched_weights
    kept = sum(group.weight_elements for group in measurement.groups if group.name in edge.excluded)
    # what the groups that aren't excluded may have, so that all together keep the target
    share = (asked * total - kept * BF16_BITS) / (total - kept)
    enough = any(name not in measurement.formats and bits_of(name) <= share for name in FORMATS)
    if edge.excluded and not enough and min(map(bits_of, measurement.formats)) <= asked:
        return f"raise the target, or exclude less than {kept / total:.2%} of the weights"
    return _formats_for(share, measurement.formats)


def _formats_for(bits: Fraction, measured: Sequence[str]) -> str:
    """Return which formats would allow so few bits per weight."""
    enough = [name for name in FORMATS if name not in measured and bits_of(name) <= bits]
    known = f"(Bitladder knows: {', '.join(FORMATS)})"
    if enough:
        return f"raise the target, or add {' or '.join(enough)} to measurement.formats {known}"
    needed = "; a 4-bit format such as NVFP4 would be needed" if bits >= SMALLEST_FORMAT_BITS else ""
    return f"raise the target; no known format has so few bits {known}{needed}"


def refuse_unattainable(specs: Iterable[SchemeSpec], formats: Sequence[str]) -> None:
    """Refuse effective bits that no measurement of these formats can reach, before anything is measured.

    Raises:
        InfeasibleTarget: with the attainable range.
    """
    low = min(bits_of(name) for name in formats)
    attainable = f"{', '.join(formats)}, {BF16}: attainable {low:.2f} to {BF16_BITS:.2f}"
    for spec in specs:
        if spec.effective_bits is None:
            continue
        asked = Fraction(str(spec.effective_bits))
        if asked >= BF16_BITS:
            raise _quantises_nothing(spec, attainable)
        if asked < low:
            raise InfeasibleTarget(
                f"scheme {spec.name}: {spec.effective_bits} effective bits is below the minimum {low:.2f} "
                f"of these formats ({attainable}); {_formats_for(asked, formats)}"
            )


def _quantises_nothing(spec: SchemeSpec, attainable: str) -> InfeasibleTarget:
    return InfeasibleTarget(
        f"scheme {spec.name}: {spec.effective_bits} effective bits would quantise nothing "
        f"({attainable}); ask for less than {BF16_BITS}"
    )


def _by_bits(spec: SchemeSpec, edge: Frontier) -> dict[str, str]:
    """Return the least damage within `effective_bits`."""
    assert spec.effective_bits is not None
    asked = Fraction(str(spec.effective_bits))
    if asked >= BF16_BITS:
        raise _quantises_nothing(spec, _range_of(edge))
    index = edge.within_bits(math.floor(asked * edge.measurement.searched_weights))
    if index is None:
        raise InfeasibleTarget(
            f"scheme {spec.name}: {spec.effective_bits} effective bits is below the minimum {_least_bits(edge)} "
            f"of these formats ({_range_of(edge)}); {_remedy_for_bits(edge, asked)}"
        )
    return edge.assignment(index)


def _by_score(most: float, edge: Frontier) -> dict[str, str] | None:
    """Return the fewest bits within a predicted score of `most`; None where nothing can be quantised within it."""
    measurement = edge.measurement
    # A point's score carries the rounding of adding up group by group: start a little above, compare the exact sum.
    every = math.fsum(abs(measurement.sensitivity(candidate)) for candidate in measurement.candidates)
    slack = len(measurement.groups) * float(np.finfo(np.float64).eps) * every
    start = edge.within_score(most + slack)
    for index in range(len(edge.bits) if start is None else start, len(edge.bits)):
        formats = edge.assignment(index)
        if _quantises(formats) and _predicted(measurement, formats) <= most:
            return formats
    return None


def _attainable_scores(edge: Frontier) -> tuple[float, float]:
    """Return the least score at which something is quantised, and that of everything in its fewest bits."""
    last = edge.assignment(len(edge.bits) - 1)
    least = last if _quantises(last) else edge.assignment(len(edge.bits) - 2)
    return _predicted(edge.measurement, least), float(edge.scores[0])


def _by_damage(spec: SchemeSpec, edge: Frontier, kl_map: KlMap | None) -> dict[str, str]:
    """Return the fewest bits within `max_predicted_score` or `max_kl`."""
    if spec.max_kl is None:
        assert spec.max_predicted_score is not None
        formats = _by_score(spec.max_predicted_score, edge)
        if formats is None:
            low, high = (_rounded_up(score) for score in _attainable_scores(edge))
            raise InfeasibleTarget(
                f"scheme {spec.name}: no group can be quantised within a predicted score of "
                f"{spec.max_predicted_score}; attainable {low} to {high} {edge.measurement.score_unit}: raise it"
            )
        return formats
    if kl_map is None:
        raise PlanError(
            f"scheme {spec.name}: max_kl needs KL measured on a few schemes, which planning from a recipe does; here "
            "use coverage, effective_bits or max_predicted_score"
        )
    most = kl_map.score_of(spec.max_kl)
    formats = None if most is None else _by_score(most, edge)
    if formats is None:
        ends = [kl_map.predict(score) for score in _attainable_scores(edge)]
        low, high = ("0" if end is None else _rounded_up(end.value) for end in ends)
        raise InfeasibleTarget(
            f"scheme {spec.name}: no group can be quantised within a predicted KL of {spec.max_kl}; attainable "
            f"{low} to {high} nats per token: raise it"
        )
    return formats


def _by_coverage(measurement: Measurement, spec: SchemeSpec, excluded: set[str]) -> dict[str, str]:
    """Return the longest prefix of the order by damage per bit saved that `coverage` has room for."""
    assert spec.coverage is not None
    name = _one_format(measurement, spec)
    total = measurement.searched_weights
    size = {group.name: group.weight_elements for group in measurement.groups}
    order = [group for group in density_order(measurement, name) if group not in excluded]
    budget = Fraction(str(spec.coverage)) * total
    chosen = {group for group, taken in zip(order, accumulate(size[g] for g in order), strict=True) if taken <= budget}
    if not chosen:
        least = math.ceil(Fraction(size[order[0]] * 10**6, total)) / 10**6
        raise InfeasibleTarget(
            f"scheme {spec.name}: coverage {spec.coverage} is less than the share of the first group; "
            f"the smallest attainable is {least:g} ({order[0]})"
        )
    return {group.name: name if group.name in chosen else BF16 for group in measurement.groups}


def _by_name(measurement: Measurement, spec: SchemeSpec, excluded: set[str]) -> dict[str, str]:
    """Return what `include` names, less what is excluded."""
    assert spec.include is not None
    name = _one_format(measurement, spec)
    chosen = matching_groups(measurement, spec.name, spec.include) - excluded
    if not chosen:
        raise InfeasibleTarget(
            f"scheme {spec.name} would quantise nothing: include {list(spec.include)} without exclude "
            f"{list(spec.exclude)} leaves no group; include more"
        )
    return {group.name: name if group.name in chosen else BF16 for group in measurement.groups}


def _quantises(formats: Mapping[str, str]) -> bool:
    return any(name != BF16 for name in formats.values())


def _predicted(measurement: Measurement, formats: Mapping[str, str]) -> float:
    table = measurement.by_group()
    return math.fsum(measurement.sensitivity(table[g][name]) for g, name in formats.items() if name != BF16)


def price(
    measurement: Measurement,
    name: str,
    formats: Mapping[str, str],
    asked: Mapping[str, Any],
    *,
    kv_cache_format: str | None = None,
    fingerprint: str | None = None,
) -> Scheme:
    """Return the record of any assignment: what it costs, and what it is predicted to do.

    Args:
        measurement: what the prediction is made from.
        name: of the scheme.
        formats: `{group: format}`, of every group.
        asked: what led to it.
        kv_cache_format: None: 16 bits.
        fingerprint: of the measurement as it was written, where it is weighed otherwise here.

    Raises:
        InfeasibleTarget: nothing is quantised.
    """
    weight_bits = weight_bytes = quantised = 0
    excluded: list[str] = []
    for group in measurement.groups:
        format_name = formats[group.name]
        bits = group.weight_elements * bits_of(format_name)
        weight_bits += bits
        weight_bytes += -(-bits // 8)
        if format_name == BF16:
            excluded += [(m.tensor or m.name).removesuffix(".weight") for m in group.modules]
        else:
            quantised += group.weight_elements
            weight_bytes += len(group.modules) * get_format(format_name).scale_bytes
    if not quantised:
        raise InfeasibleTarget(f"scheme {name} would quantise nothing; ask for more")
    return Scheme(
        name=name,
        measurement_sha256=fingerprint or measurement.fingerprint(),
        asked=dict(asked),
        formats=dict(formats),
        effective_bits=weight_bits / measurement.searched_weights,
        coverage=quantised / measurement.searched_weights,
        searched_weights=measurement.searched_weights,
        weight_bits=weight_bits,
        weight_bytes=weight_bytes,
        predicted_score=_predicted(measurement, formats),
        score_unit=measurement.score_unit,
        exclude_modules=_with_vllms_names(
            measurement.model.architecture, [*excluded, *(module.checkpoint_name for module in measurement.untouched)]
        ),
        kv_cache_format=kv_cache_format,
    )


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


def plan(
    measurement: Measurement, spec: SchemeSpec, *, frontier: Frontier | None = None, kl_map: KlMap | None = None
) -> Scheme:
    """Return the scheme that `spec` asks for.

    Args:
        measurement: what was measured.
        spec: what is asked, in exactly one way, less what `exclude` names.
        frontier: the measurement's frontier where it is at hand; one is made where it is needed.
        kl_map: from this measurement's scores to KL; `max_kl` needs it.

    Raises:
        InfeasibleTarget: outside the attainable range, which the message names. PlanError: a pattern that matches
        nothing, or a format that isn't measured. MeasurementError: a score is NaN or Inf.
    """
    fingerprint = measurement.fingerprint()
    if spec.image_weight != 1.0:
        measurement, frontier = measurement.weigh_images(spec.image_weight), None
    _check_usable(measurement)
    excluded = matching_groups(measurement, spec.name, spec.exclude)
    if len(excluded) == len(measurement.groups):
        raise InfeasibleTarget(
            f"scheme {spec.name} would quantise nothing: exclude {list(spec.exclude)} leaves no group; exclude less"
        )
    if spec.coverage is not None:
        formats = _by_coverage(measurement, spec, excluded)
    elif spec.include is not None:
        formats = _by_name(measurement, spec, excluded)
    else:
        if spec.format is not None and measurement.formats != (spec.format,):
            raise PlanError(
                f"scheme {spec.name}: `format` goes with coverage or include; the others choose among all measured "
                f"formats ({_listed(measurement)}); leave it out"
            )
        if frontier is not None and frontier.measurement != measurement:
            raise PlanError(f"scheme {spec.name}: the frontier given is of another measurement; leave it out")
        if frontier is None or frontier.excluded != excluded:
            frontier = Frontier(measurement, excluded)
        by_bits = spec.effective_bits is not None
        formats = _by_bits(spec, frontier) if by_bits else _by_damage(spec, frontier, kl_map)
    scheme = price(
        measurement,
        spec.name,
        formats,
        spec.model_dump(mode="json", exclude_defaults=True),
        kv_cache_format="fp8" if spec.kv_cache == "fp8" else None,
        fingerprint=fingerprint,
    )
    _check(measurement, spec, scheme, kl_map)
    return scheme


def _check(measurement: Measurement, spec: SchemeSpec, scheme: Scheme, kl_map: KlMap | None) -> None:
    """Check, in integers, that the plan keeps its budget."""
    total = measurement.searched_weights
    quantised = sum(g.weight_elements for g in measurement.groups if scheme.formats[g.name] != BF16)
    kept = [
        spec.effective_bits is None or scheme.weight_bits <= Fraction(str(spec.effective_bits)) * total,
        spec.coverage is None or quantised <= Fraction(str(spec.coverage)) * total,
        spec.max_predicted_score is None or scheme.predicted_score <= spec.max_predicted_score,
        spec.max_kl is None or kl_map is None or scheme.predicted_score <= (kl_map.score_of(spec.max_kl) or 0.0),
    ]
    if not all(kept):
        raise PlanError(f"scheme {spec.name} exceeds its budget; this is a bug: please report it")


def plan_all(measurement: Measurement, specs: Sequence[SchemeSpec], kl_map: KlMap | None = None) -> tuple[Scheme, ...]:
    """Return the schemes of a ladder, with the relations between them.

    Raises:
        DuplicateSchemes: two schemes come out equal. See `plan` for the others.
    """
    needs_edge = any(spec.coverage is None and spec.include is None and spec.image_weight == 1.0 for spec in specs)
    edge = Frontier(measurement) if needs_edge else None
    return related([plan(measurement, spec, frontier=edge, kl_map=kl_map) for spec in specs])


def related(schemes: Sequence[Scheme]) -> tuple[Scheme, ...]:
    """Return the schemes, each with the others that it is nested in.

    Raises:
        DuplicateSchemes: two are equal. PlanError: two have one name.
    """
    for index, scheme in enumerate(schemes):
        for other in schemes[index + 1 :]:
            if scheme.name == other.name:
                raise PlanError(f"two schemes are named {scheme.name}; rename one")
            if (scheme.formats, scheme.kv_cache_format) == (other.formats, other.kv_cache_format):
                raise DuplicateSchemes(
                    f"schemes {scheme.name} ({scheme.asked}) and {other.name} ({other.asked}) assign the same formats "
                    f"(coverage {scheme.coverage:.4f}, {scheme.effective_bits:.3f} bits); drop one or change its target"
                )
    return tuple(
        scheme.model_copy(update={"nested_in": tuple(other.name for other in schemes if _is_nested(scheme, other))})
        for scheme in schemes
    )


def _is_nested(inner: Scheme, outer: Scheme) -> bool:
    """Return whether `outer` quantises all of `inner`, KV cache included, in the same formats, and more."""
    mine, theirs = inner.quantised_groups(), outer.quantised_groups()
    same_cache = inner.kv_cache_format == outer.kv_cache_format
    return (
        mine <= theirs
        and (same_cache or inner.kv_cache_format is None)
        and not (mine == theirs and same_cache)
        and all(inner.formats[group] == outer.formats[group] for group in mine)
    )
