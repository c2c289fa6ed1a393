"""Plans schemes from a measurement: `plan(measurement, spec) -> Scheme`. Pure and exact; no torch, no model.

Every group gets one of its candidate formats or stays in bf16. The cost of an assignment is its weight bits (an
integer), its predicted damage the sum of the sensitivities. There is one way to ask a scheme:

    effective_bits       the least damage within so many bits
    max_predicted_score  the fewest bits within so much damage
    max_kl               the same, through a map from scores to KL that was fitted on measured schemes
    speed                the least damage that is at least so much faster than 16 bits, as a profile predicts it
    coverage             a prefix of the order by damage per bit saved, so that coverage schemes are nested
    include              what the patterns name

Where `prefer` says so, `max_predicted_score` and `max_kl` give the fewest seconds instead of the fewest bits. Seconds
are a cost like bits: an integer a group and format, added up, so that the same search finds the exact answer.

With `chosen_by: kl`, as with `max_kl`, damage is what the map to KL adds up: each format's scores weighed, and taken
some of the way to their mean (`prediction`).

With one format and no negative score such a prefix is on the frontier, too: nothing of its size does less damage. With
several formats each group has the one that does least damage per bit saved, whatever the share; so the schemes are
nested all the same, but something of their bits may do less damage: `effective_bits` finds it.

Candidates are the formats that are measured, or of those a scheme's own `formats`.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from itertools import accumulate
from pathlib import Path

from bitladder.errors import DuplicateSchemes, InfeasibleTarget, PlanError
from bitladder.models.splitting import WHOLE, Split
from bitladder.planning import ranges
from bitladder.planning.caching import cache_of, kl_left
from bitladder.planning.options import check_usable
from bitladder.planning.patterns import Searched, matching_groups, named_groups
from bitladder.planning.prediction import KlMap
from bitladder.planning.pricing import InFormat, cheapest_first, mean_scores, predicted_score, price
from bitladder.planning.sharing import can_have, plannable
from bitladder.planning.solver import Solver
from bitladder.planning.speed import Load, SpeedModel
from bitladder.planning.trade_off import TradeOff
from bitladder.recipe import Phase, SchemeSpec
from bitladder.records import BF16, BF16_BITS, CacheChoice, KlPoints, KvDamage, LeftOut, Measurement, QuantGroup, Scheme

_PREDICTED = 1e-9  # by which rounding to whole picoseconds may change a ratio
_BY_SCORES = "or ask by scores: max_predicted_score instead of max_kl, and no chosen_by"
_Aim = tuple[Phase, Load]  # what is to be fast, and at what
_Key = tuple[float, bool, tuple[str, ...], tuple[LeftOut, ...], frozenset[str], _Aim | None]


def plan(
    measurement: Measurement,
    spec: SchemeSpec,
    *,
    frontier: TradeOff | None = None,
    kl_map: KlMap | None = None,
    speed: SpeedModel | None = None,
    kv_damage: KvDamage | None = None,
    split: Split = WHOLE,
) -> Scheme:
    """Return the scheme that `spec` asks for.

    Args:
        measurement: what was measured.
        spec: what is asked, in exactly one way, less what `exclude` names.
        frontier: the measurement's trade-off where it is at hand, as a `Frontier` or a `Solver`: both answer the same.
        kl_map: from this measurement's scores to KL; `max_kl` and `chosen_by: kl` need it.
        speed: of this measurement's groups on the device that serves; `speed` and `prefer` need it.
        kv_damage: of an FP8 KV cache in each layer; a share of the layers as `kv_cache` needs it.
        split: of the model among ranks; what they can't hold is left out, but of the one format that a scheme names.

    Raises:
        InfeasibleTarget: outside the attainable range, which the message names. PlanError: a pattern that matches
        nothing, or a format that isn't measured, or has no times. MeasurementError: a score is NaN or Inf.
    """
    return _Planner(measurement, frontier, kl_map, speed, kv_damage, split).plan(spec)


def plan_all(
    measurement: Measurement,
    specs: Sequence[SchemeSpec],
    kl_map: KlMap | None = None,
    speed: SpeedModel | None = None,
    kv_damage: KvDamage | None = None,
    split: Split = WHOLE,
) -> tuple[Scheme, ...]:
    """Return the schemes of a ladder, with the relations between them.

    Raises:
        DuplicateSchemes: two schemes come out equal. See `plan` for the others.
    """
    planner = _Planner(measurement, None, kl_map, speed, kv_damage, split)
    return related([planner.plan(spec) for spec in specs])


def kl_map_of(place: Path, measurement: Measurement) -> KlMap:
    """Return the map from a measurement's scores to KL, of the schemes that a run which chooses by KL has simulated.

    Args:
        place: of these, `kl_points.json`, which lies beside the measurement.
        measurement: of which they are.

    Raises:
        PlanError: there are none, or they are another measurement's, or too few.
    """
    if not place.exists():
        raise PlanError(
            f"to choose by KL takes that of a few schemes of this measurement, and {place} isn't there; plan a recipe "
            f"that has a scheme of max_kl or chosen_by: kl, {_BY_SCORES}"
        )
    known = KlPoints.read(place)
    if known.measurement_sha256 != measurement.fingerprint():
        raise PlanError(f"{place} is of another measurement; copy both from one run, {_BY_SCORES}")
    return fitted(measurement, known, place)


def fitted(measurement: Measurement, points: KlPoints, place: Path) -> KlMap:
    """Return the map through simulated schemes of a measurement, which `place` holds.

    Raises:
        PlanError: they are too few, or too alike.
    """
    parts = [
        {name: InFormat(score, point.weights[name]) for name, score in point.scores.items()} for point in points.points
    ]
    found = KlMap.fit(mean_scores(measurement), parts, [point.kl for point in points.points])
    if found is None:
        raise PlanError(
            f"KL was measured on {len(points.points)} schemes, too few or too alike to say which KL a score means (see "
            f"{place}); ask for coverage or effective_bits, without chosen_by: kl"
        )
    return found


class _Planner:
    """Plans schemes of one measurement, and keeps what they share."""

    def __init__(
        self,
        measurement: Measurement,
        given: TradeOff | None,
        kl_map: KlMap | None,
        speed: SpeedModel | None,
        kv_damage: KvDamage | None,
        split: Split,
    ) -> None:
        self._fingerprint = measurement.fingerprint()
        self._split = split
        self._whole = measurement
        self._weighed = {1.0: measurement}  # by the weight of image-token positions
        self._given = given
        self._kl_map = kl_map
        self._speed = speed
        self._kv_damage = kv_damage
        self._solvers: dict[_Key, TradeOff] = {}
        check_usable(measurement)

    def plan(self, spec: SchemeSpec) -> Scheme:
        """Return the scheme that `spec` asks for; see `plan`."""
        ranges.refuse_unmeasured([spec], self._whole.formats)
        measurement = self._measurement(spec.image_weight).only(spec.candidates)
        if not spec.names_its_format:
            measurement = plannable(measurement, self._split)
        if not measurement.candidates:
            raise InfeasibleTarget(
                f"scheme {spec.name} would quantise nothing: of every group in {ranges.listed(measurement)} each of "
                f"{self._split.ranks} ranks would hold parts of blocks; give it other formats, or set another "
                "tensor_parallel"
            )
        chosen, excluded = named_groups(measurement, spec)
        if all(candidate.group in excluded for candidate in measurement.candidates):
            raise InfeasibleTarget(
                f"scheme {spec.name} would quantise nothing: no group that exclude {list(spec.exclude)} leaves can be "
                f"in {ranges.listed(measurement)}; exclude less, or give it other formats"
            )
        cache = cache_of(spec, self._fingerprint, self._kv_damage)
        if spec.coverage is not None:
            formats = _by_coverage(self._judged(measurement, spec), spec, excluded)
        elif spec.include is not None:
            formats = _by_name(measurement, spec, chosen)
        else:
            formats = self._by_budget(measurement, spec, excluded, cache)
        scheme = price(
            measurement,
            spec.name,
            formats,
            spec,
            cache=cache,
            fingerprint=self._fingerprint,
        )
        _check(measurement, spec, scheme, self._kl_map)
        return scheme

    def _measurement(self, image_weight: float) -> Measurement:
        if image_weight not in self._weighed:
            weighed = self._weighed[1.0].weigh_images(image_weight)
            check_usable(weighed)
            self._weighed[image_weight] = weighed
        return self._weighed[image_weight]

    def _by_budget(
        self, measurement: Measurement, spec: SchemeSpec, excluded: frozenset[str], cache: CacheChoice
    ) -> dict[str, str]:
        """Return the best choice among all formats within the budget on either side."""
        aim = _aim_of(spec, self._speed, measurement.formats)
        if spec.max_kl is not None:
            return self._by_kl(measurement, spec, excluded, aim, cache)
        edge = self._trade_off(measurement, spec, excluded, aim)
        if spec.effective_bits is not None:
            return _by_bits(spec, edge, self._whole.formats, self._split)
        if spec.speed is not None:
            assert self._speed is not None
            assert aim is not None
            return _by_speed(spec, edge, self._speed, aim)
        assert spec.max_predicted_score is not None
        ranges.refuse_no_faster(spec, edge)
        formats = edge.fewest_bits(spec.max_predicted_score)
        if formats is None:
            raise ranges.beyond_the_score(spec, edge)
        return formats

    def _by_kl(
        self,
        measurement: Measurement,
        spec: SchemeSpec,
        excluded: frozenset[str],
        aim: _Aim | None,
        cache: CacheChoice,
    ) -> dict[str, str]:
        """Return the fewest bits, or seconds, within `max_kl`, of which the cache has its part."""
        assert spec.max_kl is not None
        edge = Solver(self._judged(measurement, spec), excluded, self._cost(aim))
        assert self._kl_map is not None
        ranges.refuse_no_faster(spec, edge)
        left = kl_left(spec, cache)
        most = self._kl_map.score_of(left)
        assert most is not None  # KL grows with it
        formats = edge.fewest_bits(most)
        if formats is None:
            raise ranges.beyond_the_kl(spec, edge, self._kl_map, spec.max_kl - left)
        return formats

    def _judged(self, measurement: Measurement, spec: SchemeSpec) -> Measurement:
        """Return a measurement with the scores that choose: its own, or those that the map to KL has weighed.

        Raises:
            PlanError: there is no map, or KL doesn't grow with its scores.
        """
        if not spec.by_kl:
            return measurement
        if self._kl_map is None:
            way = "chosen_by: kl" if spec.max_kl is None else "max_kl"
            raise PlanError(
                f"scheme {spec.name}: {way} needs KL measured on a few schemes, which planning from a recipe does; "
                "here ask by scores: coverage, effective_bits or max_predicted_score"
            )
        if self._kl_map.exponent <= 0:
            raise ranges.unbounded_kl(spec, self._kl_map)
        return self._kl_map.weigh(measurement)

    def _cost(self, aim: _Aim | None) -> Callable[[QuantGroup, str], int] | None:
        """Return what a group costs in a format where it isn't bits: seconds."""
        return None if self._speed is None or aim is None else self._speed.cost_of(*aim)

    def _trade_off(
        self, measurement: Measurement, spec: SchemeSpec, excluded: frozenset[str], aim: _Aim | None
    ) -> TradeOff:
        given = self._given if spec.image_weight == 1.0 else None
        if given is not None and given.measurement is not self._whole and given.measurement != self._whole:
            raise PlanError(f"scheme {spec.name}: the frontier given is of another measurement; leave it out")
        known = measurement.formats, measurement.left_out
        alike = aim is None and known == (self._whole.formats, self._whole.left_out)
        if given is not None and given.excluded == excluded and alike and not spec.by_kl:
            return given
        key = spec.image_weight, spec.by_kl, *known, excluded, aim
        if key not in self._solvers:
            self._solvers[key] = Solver(self._judged(measurement, spec), excluded, self._cost(aim))
        return self._solvers[key]


def _check(measurement: Measurement, spec: SchemeSpec, scheme: Scheme, kl_map: KlMap | None) -> None:
    """Check, in integers, that the plan keeps its budget."""
    total = measurement.searched_weights
    quantised = sum(g.weight_elements for g in measurement.groups if scheme.formats[g.name] != BF16)
    kept = [
        spec.effective_bits is None or scheme.weight_bits <= Fraction(str(spec.effective_bits)) * total,
        spec.coverage is None or quantised <= Fraction(str(spec.coverage)) * total,
        spec.max_predicted_score is None or scheme.predicted_score <= spec.max_predicted_score,
        spec.max_kl is None
        or kl_map is None
        or _within_kl(measurement, scheme, kl_left(spec, scheme.kv_cache), kl_map),
    ]
    if not all(kept):
        raise PlanError(f"scheme {spec.name} exceeds its budget; this is a bug: please report it")


def _within_kl(measurement: Measurement, scheme: Scheme, most: float, kl_map: KlMap) -> bool:
    return predicted_score(kl_map.weigh(measurement), scheme.formats) <= (kl_map.score_of(most) or 0.0)


def related(schemes: Sequence[Scheme]) -> tuple[Scheme, ...]:
    """Return the schemes, each with the others that it is nested in.

    Raises:
        DuplicateSchemes: two are equal. PlanError: two have one name.
    """
    for index, scheme in enumerate(schemes):
        for other in schemes[index + 1 :]:
            if scheme.name == other.name:
                raise PlanError(f"two schemes are named {scheme.name}; rename one")
            if (scheme.formats, scheme.kv_cache[:2]) == (other.formats, other.kv_cache[:2]):
                first, second = (one.model_dump(mode="json")["asked"] for one in (scheme, other))
                raise DuplicateSchemes(
                    f"schemes {scheme.name} ({first}) and {other.name} ({second}) assign the same formats "
                    f"(coverage {scheme.coverage:.4f}, {scheme.effective_bits:.3f} bits); drop one or change its target"
                )
    return tuple(
        scheme.model_copy(update={"nested_in": tuple(other.name for other in schemes if _is_nested(scheme, other))})
        for scheme in schemes
    )


def _is_nested(inner: Scheme, outer: Scheme) -> bool:
    """Return whether `outer` quantises all of `inner`, KV cache included, in the same formats, and more."""
    mine, theirs = inner.quantised_groups(), outer.quantised_groups()
    mine_cached, theirs_cached = inner.kv_cache, outer.kv_cache
    same_cache = mine_cached[:2] == theirs_cached[:2]
    more_cached = mine_cached.format == theirs_cached.format and set(theirs_cached.skips) <= set(mine_cached.skips)
    return (
        mine <= theirs
        and (inner.kv_cache_format is None or more_cached)
        and not (mine == theirs and same_cache)
        and all(inner.formats[group] == outer.formats[group] for group in mine)
    )


def _by_bits(spec: SchemeSpec, edge: TradeOff, measured: Sequence[str], split: Split) -> dict[str, str]:
    """Return the least damage within `effective_bits`; `measured` are formats that the scheme might have as well."""
    assert spec.effective_bits is not None
    asked = Fraction(str(spec.effective_bits))
    if asked >= BF16_BITS:
        raise ranges.quantises_nothing(spec, ranges.range_of(edge))
    formats = edge.least_score(math.floor(asked * edge.measurement.searched_weights))
    if formats is None:
        raise ranges.below_the_minimum(spec, edge, measured, split)
    return formats


def _aim_of(spec: SchemeSpec, speed: SpeedModel | None, formats: Sequence[str]) -> _Aim | None:
    """Return what a scheme asks to be fast, and at what; None: nothing.

    Args:
        spec: what is asked.
        speed: of the device that serves; None: it isn't known.
        formats: that the scheme may have.

    Raises:
        PlanError: it isn't known, or has no times of one of the formats.
    """
    if not spec.by_speed:
        return None
    if speed is None:
        raise PlanError(
            f"scheme {spec.name}: speed needs a profile of the device that serves, which a recipe names as `profile`; "
            "here use coverage, effective_bits or max_predicted_score"
        )
    missing = speed.missing(formats)
    if missing:
        name, why = next(iter(missing.items()))
        timed = [name for name in formats if name not in missing]
        remedy = f"give the scheme `formats: [{', '.join(timed)}]`, or profile" if timed else "profile"
        raise PlanError(
            f"scheme {spec.name}: the profile of {speed.profile.place} has no times of {name} ({why}), and speeds "
            f"aren't guessed; {remedy} that format on that device"
        )
    if spec.speed is None:
        assert spec.prefer != "bytes"
        return spec.prefer, speed.load
    phase, _ = spec.speed.target
    load = speed.asked(spec.speed)
    speed.check(load)
    return phase, load


def refuse_too_fast(
    specs: Sequence[SchemeSpec], formats: Sequence[str], searched: Searched, speed: SpeedModel, split: Split = WHOLE
) -> None:
    """Refuse schemes whose speed no measurement of these formats could give, before anything is measured.

    Raises:
        PlanError: a format has no times. InfeasibleTarget: more speed than its fastest formats give.
    """
    for spec in specs:
        own = [name for name in formats if spec.candidates is None or name in spec.candidates]
        aim = _aim_of(spec, speed, own)
        if spec.speed is None or aim is None:
            continue
        phase, load = aim
        excluded = matching_groups(searched, spec.name, spec.exclude)
        cost = speed.cost_of(*aim)
        fastest = {}
        for group in searched.groups:
            able = [] if group.name in excluded else [name for name in own if can_have(group, name, split)]
            fastest[group.name] = min((BF16, *able), key=partial(cost, group))
        if speed.predict(fastest, load).ratio(phase) < spec.speed.target[1]:
            raise ranges.too_fast(spec, own, fastest, speed, phase, load)


def _by_speed(spec: SchemeSpec, edge: TradeOff, speed: SpeedModel, aim: _Aim) -> dict[str, str]:
    """Return the least damage that is as fast as `speed` asks."""
    assert spec.speed is not None
    (phase, load), (_, ratio) = aim, spec.speed.target
    formats = edge.least_score(speed.budget(ratio, phase, load))
    if formats is None or speed.predict(formats, load).ratio(phase) < ratio * (1 - _PREDICTED):
        fastest = {one.group: one.names[int(one.bits.argmin())] for one in edge.options}
        raise ranges.too_fast(spec, edge.measurement.formats, fastest, speed, phase, load)
    if set(formats.values()) == {BF16}:
        raise ranges.fast_enough(spec, phase)
    return formats


def _by_coverage(measurement: Measurement, spec: SchemeSpec, excluded: frozenset[str]) -> dict[str, str]:
    """Return the longest prefix of the order by damage per bit saved that `coverage` has room for."""
    assert spec.coverage is not None
    total = measurement.searched_weights
    size = {group.name: group.weight_elements for group in measurement.groups}
    best = cheapest_first(measurement)
    order = [group for group in best if group not in excluded]
    budget = Fraction(str(spec.coverage)) * total
    chosen = {group for group, taken in zip(order, accumulate(size[g] for g in order), strict=True) if taken <= budget}
    if not chosen:
        least = math.ceil(Fraction(size[order[0]] * 10**6, total)) / 10**6
        raise InfeasibleTarget(
            f"scheme {spec.name}: coverage {spec.coverage} is less than the share of the first group; "
            f"the smallest attainable is {least:g} ({order[0]})"
        )
    return {group.name: best[group.name] if group.name in chosen else BF16 for group in measurement.groups}


def _by_name(measurement: Measurement, spec: SchemeSpec, chosen: frozenset[str]) -> dict[str, str]:
    """Return what `include` names, less what is excluded: `chosen`, of which some can't be in the format."""
    (name,) = measurement.formats
    assert spec.include is not None
    reasons = {one.group: one.reason for one in measurement.left_out if one.format == name}
    if chosen <= reasons.keys():
        raise InfeasibleTarget(
            f"scheme {spec.name} would quantise nothing: no group that include {list(spec.include)} leaves can be in "
            f"{name} ({reasons[min(chosen)]}); include others, or set another `format`"
        )
    chosen -= reasons.keys()  # they stay in 16 bits, as modules do that no format fits
    return {group.name: name if group.name in chosen else BF16 for group in measurement.groups}
