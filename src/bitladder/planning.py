"""Plans schemes from a measurement: `plan(measurement, spec) -> Scheme`. Pure and exact; no torch, no model.

Every group gets one of its candidate formats or stays in bf16. The cost of an assignment is its weight bits (an
integer), its predicted damage the sum of the sensitivities. `Frontier` holds every Pareto-optimal pair of the two, so
that a budget on either side is one look-up:

    effective_bits       the least damage within so many bits
    max_predicted_score  the fewest bits within so much damage
    coverage             a prefix of the order by damage per bit saved (which is on the frontier, too)
    include              what the patterns name

The frontier grows group by group: shift all points by each candidate, merge, drop what is dominated.

Source: Nemhauser and Ullmann, "Discrete dynamic programming and capital allocation", Management Science 15(9), 1969.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from bitladder.errors import DuplicateSchemes, InfeasibleTarget, MeasurementError, PlanError
from bitladder.formats import FORMATS, bits_of, get_format
from bitladder.recipe import SchemeSpec
from bitladder.records import BF16, BF16_BITS, Measurement, QuantGroup, Scheme

MAX_FRONTIER_CHOICES = 50_000_000  # stored choices of all groups together: 400 MB


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
        left_alone = set(excluded)
        self.searched_weights = measurement.searched_weights
        self.bits: NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        self.scores: NDArray[np.float64] = np.zeros(1, dtype=np.float64)
        self._stages: list[_Stage] = []
        table = measurement.by_group()
        stored = 0
        for group in measurement.groups:
            choices: list[tuple[str, int, float]] = [(BF16, group.weight_elements * BF16_BITS, 0.0)]
            if group.name not in left_alone:
                for name, candidate in table[group.name].items():
                    score = measurement.sensitivity(candidate)
                    if not math.isfinite(score):
                        raise MeasurementError(f"the score of {group.name} in {name} is {score}; measure again")
                    choices.append((name, candidate.weight_bits, score))
            self._stages.append(self._extend(group, choices))
            stored += len(self.bits)
            if stored > MAX_FRONTIER_CHOICES:
                raise PlanError(
                    f"the exact frontier of {len(measurement.groups)} groups with {len(measurement.formats)} formats "
                    f"exceeds {MAX_FRONTIER_CHOICES:,} stored choices; use coverage or include, or fewer formats"
                )

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
        return np.asarray(self.bits / self.searched_weights, dtype=np.float64)

    def assignment(self, index: int) -> dict[str, str]:
        """Return `{group: format}` of a point."""
        formats = {}
        for stage in reversed(self._stages):
            formats[stage.group] = stage.choices[stage.choice[index]]
            index = int(stage.parent[index])
        return dict(reversed(formats.items()))

    def within_bits(self, most: int) -> int:
        """Return the point of the least score with at most so many bits, or -1 where there is none."""
        return int(np.searchsorted(self.bits, most, side="right")) - 1

    def within_score(self, most: float) -> int:
        """Return the point of the fewest bits with at most this score, or the number of points where there is none."""
        return int(np.searchsorted(-self.scores, -most, side="left"))


def frontier(measurement: Measurement) -> Frontier:
    """Return the whole trade-off of a measurement.

    Raises:
        MeasurementError: a score is NaN or Inf. PlanError: it would not fit in memory.
    """
    return Frontier(measurement)


def density_order(measurement: Measurement, format_name: str) -> list[str]:
    """Return the groups by predicted damage per bit saved, least first; groups with equal density in network order."""
    table = measurement.by_group()

    def density(group: QuantGroup) -> float:
        candidate = table[group.name][format_name]
        score = measurement.sensitivity(candidate)
        if not math.isfinite(score):
            raise MeasurementError(f"the score of {group.name} in {format_name} is {score}; measure again")
        return score / (group.weight_elements * BF16_BITS - candidate.weight_bits)

    return [group.name for group in sorted(measurement.groups, key=density)]


def standard_error(measurement: Measurement, formats: Mapping[str, str]) -> float | None:
    """Return the standard error of a scheme's predicted score over the scoring batches, or None with one batch.

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


def _matching(measurement: Measurement, scheme: str, patterns: Iterable[str]) -> set[str]:
    """Return the groups that a pattern matches by their own name, a module's, or a module's name in the checkpoint.

    Raises:
        PlanError: a pattern matches nothing.
    """
    names: dict[str, str] = {}
    for group in measurement.groups:
        names[group.name] = group.name
        for module in group.modules:
            names[module.name] = group.name
            if module.tensor is not None:
                names[module.tensor.removesuffix(".weight")] = group.name
    found = set()
    for pattern in patterns:
        hits = {group for name, group in names.items() if fnmatchcase(name, pattern)}
        if not hits:
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
        raise PlanError(f"scheme {spec.name} {asked}; set `format` to one of those measured: {measurement.formats}")
    return name


def _range_of(measurement: Measurement, edge: Frontier) -> str:
    low, high = edge.effective_bits[0], edge.effective_bits[-1]
    return f"{', '.join(measurement.formats)} and {BF16}: attainable {low:.2f} to {high:.2f}"


def _by_bits(measurement: Measurement, spec: SchemeSpec, edge: Frontier) -> dict[str, str]:
    assert spec.effective_bits is not None
    asked = Fraction(str(spec.effective_bits))
    if asked >= BF16_BITS:
        raise InfeasibleTarget(
            f"scheme {spec.name}: {spec.effective_bits:g} effective bits would quantise nothing "
            f"({_range_of(measurement, edge)}); ask for less than {BF16_BITS}"
        )
    index = edge.within_bits(math.floor(asked * measurement.searched_weights))
    if index < 0:
        others = [name for name in FORMATS if name not in measurement.formats and bits_of(name) <= asked]
        if others:
            hint = f"or add {' or '.join(others)} to measurement.formats"
        else:
            hint = (
                f"no format that Bitladder knows ({', '.join(FORMATS)}) has {spec.effective_bits:g} bits or fewer, "
                + ("a 4-bit format such as NVFP4 would be needed" if asked >= 4 else "and none in the field does")
            )
        raise InfeasibleTarget(
            f"scheme {spec.name}: {spec.effective_bits:g} effective bits is below the minimum "
            f"{edge.effective_bits[0]:.2f} ({_range_of(measurement, edge)}); raise it; {hint}"
        )
    return edge.assignment(index)


def _by_score(measurement: Measurement, spec: SchemeSpec, edge: Frontier) -> dict[str, str]:
    assert spec.max_predicted_score is not None
    index = edge.within_score(spec.max_predicted_score)
    while index < len(edge.bits):
        formats = edge.assignment(index)
        # the sum again, without the rounding of adding up group by group
        if _predicted(measurement, formats) <= spec.max_predicted_score:
            if all(name == BF16 for name in formats.values()):
                break
            return formats
        index += 1
    smallest = next(
        (edge.scores[i] for i in range(len(edge.bits) - 1, -1, -1) if set(edge.assignment(i).values()) != {BF16}), 0.0
    )
    raise InfeasibleTarget(
        f"scheme {spec.name}: no group can be quantised within a predicted score of {spec.max_predicted_score:g}; "
        f"attainable {smallest:.6g} to {edge.scores[0]:.6g} {measurement.score_unit}: raise it"
    )


def _by_coverage(measurement: Measurement, spec: SchemeSpec, excluded: set[str]) -> dict[str, str]:
    assert spec.coverage is not None
    name = _one_format(measurement, spec)
    size = {group.name: group.weight_elements for group in measurement.groups}
    order = [group for group in density_order(measurement, name) if group not in excluded]
    budget = Fraction(str(spec.coverage)) * measurement.searched_weights
    chosen = {group for group, total in zip(order, accumulate(size[g] for g in order), strict=True) if total <= budget}
    if not chosen:
        least = size[order[0]] / measurement.searched_weights if order else 0
        raise InfeasibleTarget(
            f"scheme {spec.name}: coverage {spec.coverage:g} is less than the first group's share; "
            f"the smallest attainable is {math.ceil(least * 1e6) / 1e6:g} ({order[0] if order else 'no group is left'})"
        )
    return {group.name: name if group.name in chosen else BF16 for group in measurement.groups}


def _predicted(measurement: Measurement, formats: Mapping[str, str]) -> float:
    table = measurement.by_group()
    return math.fsum(measurement.sensitivity(table[g][name]) for g, name in formats.items() if name != BF16)


def _scheme(measurement: Measurement, spec: SchemeSpec, formats: dict[str, str]) -> Scheme:
    """Return the record of an assignment."""
    weight_bits = weight_bytes = quantised = 0
    excluded: list[str] = []
    for group in measurement.groups:
        name = formats[group.name]
        bits = group.weight_elements * bits_of(name)
        weight_bits += bits
        weight_bytes += bits // 8
        if name == BF16:
            excluded += [(m.tensor or m.name).removesuffix(".weight") for m in group.modules]
        else:
            quantised += group.weight_elements
            weight_bytes += len(group.modules) * get_format(name).scale_bytes
    if not quantised:
        raise InfeasibleTarget(f"scheme {spec.name} would quantise nothing; ask for more")
    return Scheme(
        name=spec.name,
        measurement_sha256=measurement.fingerprint(),
        asked=spec.model_dump(mode="json", exclude_defaults=True),
        formats=formats,
        effective_bits=weight_bits / measurement.searched_weights,
        coverage=quantised / measurement.searched_weights,
        searched_weights=measurement.searched_weights,
        weight_bits=weight_bits,
        weight_bytes=weight_bytes,
        predicted_score=_predicted(measurement, formats),
        score_unit=measurement.score_unit,
        exclude_modules=(*excluded, *(module.checkpoint_name for module in measurement.untouched)),
    )


def plan(measurement: Measurement, spec: SchemeSpec, edge: Frontier | None = None) -> Scheme:
    """Return the scheme that `spec` asks for.

    Args:
        measurement: what was measured.
        spec: what is asked, in exactly one way, less what `exclude` names.
        edge: the measurement's frontier where it is at hand; one is made where it is needed.

    Raises:
        InfeasibleTarget: outside the attainable range, which the message names. PlanError: a pattern that matches
        nothing, or a format that isn't measured. MeasurementError: a score is NaN or Inf.
    """
    excluded = _matching(measurement, spec.name, spec.exclude)
    if spec.coverage is not None:
        formats = _by_coverage(measurement, spec, excluded)
    elif spec.include is not None:
        name = _one_format(measurement, spec)
        included = _matching(measurement, spec.name, spec.include) - excluded
        formats = {group.name: name if group.name in included else BF16 for group in measurement.groups}
    else:
        if edge is None or excluded:
            edge = Frontier(measurement, excluded)
        by = _by_bits if spec.effective_bits is not None else _by_score
        formats = by(measurement, spec, edge)
    scheme = _scheme(measurement, spec, formats)
    _check(measurement, spec, scheme)
    return scheme


def _check(measurement: Measurement, spec: SchemeSpec, scheme: Scheme) -> None:
    """Check, in integers, that the plan keeps its budget."""
    total = measurement.searched_weights
    quantised = sum(g.weight_elements for g in measurement.groups if scheme.formats[g.name] != BF16)
    kept = [
        spec.effective_bits is None or scheme.weight_bits <= Fraction(str(spec.effective_bits)) * total,
        spec.coverage is None or quantised <= Fraction(str(spec.coverage)) * total,
        spec.max_predicted_score is None or scheme.predicted_score <= spec.max_predicted_score,
    ]
    if not all(kept):
        raise PlanError(f"scheme {spec.name} exceeds its budget; this is a bug: please report it")


def plan_all(measurement: Measurement, specs: Sequence[SchemeSpec]) -> tuple[Scheme, ...]:
    """Return the schemes of a ladder, with the relations between them.

    Raises:
        DuplicateSchemes: two schemes come out equal. See `plan` for the others.
    """
    needs_edge = any(spec.effective_bits is not None or spec.max_predicted_score is not None for spec in specs)
    edge = Frontier(measurement) if needs_edge else None
    schemes = [plan(measurement, spec, edge) for spec in specs]
    for index, scheme in enumerate(schemes):
        for other in schemes[index + 1 :]:
            if scheme.name == other.name:
                raise PlanError(f"two schemes are named {scheme.name}; rename one")
            if scheme.formats == other.formats:
                raise DuplicateSchemes(
                    f"schemes {scheme.name} ({scheme.asked}) and {other.name} ({other.asked}) assign the same formats "
                    f"(coverage {scheme.coverage:.4f}, {scheme.effective_bits:.3f} bits); drop one or change its target"
                )
    return tuple(
        scheme.model_copy(update={"nested_in": tuple(other.name for other in schemes if _is_nested(scheme, other))})
        for scheme in schemes
    )


def _is_nested(inner: Scheme, outer: Scheme) -> bool:
    """Return whether `outer` quantises all groups of `inner`, in the same formats, and more."""
    mine, theirs = inner.quantised_groups(), outer.quantised_groups()
    return mine < theirs and all(inner.formats[group] == outer.formats[group] for group in mine)
