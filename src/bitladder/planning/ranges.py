"""What can be attained, in words: refusals name the range and what would widen it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_CEILING, Context
from fractions import Fraction

from bitladder.errors import InfeasibleTarget, PlanError
from bitladder.formats import FORMATS, MODELOPT, get_format, group_bits, least_bits
from bitladder.models.splitting import Split
from bitladder.planning.patterns import matching_groups
from bitladder.planning.prediction import KlMap
from bitladder.planning.sharing import can_have
from bitladder.planning.speed import Load, SpeedModel
from bitladder.planning.trade_off import TradeOff
from bitladder.recipe import Phase, SchemeSpec
from bitladder.records import BF16, BF16_BITS, Measurement, Scheme

_MORE = 1 + 1e-9  # times a KL: what its logarithm and back may lose of it, and more


def refuse_unattainable(specs: Iterable[SchemeSpec], formats: Sequence[str]) -> None:
    """Refuse what no measurement of these formats can reach, before anything is measured.

    Raises:
        InfeasibleTarget: effective bits, with the attainable range. PlanError: see `refuse_unmeasured`.
    """
    for spec in specs:
        refuse_unmeasured([spec], formats)
        if spec.effective_bits is None:
            continue
        allowed = [name for name in formats if name in (spec.candidates or formats)]
        low = min(Fraction(least_bits(name)) for name in allowed)
        attainable = f"{', '.join(allowed)}, {BF16}: attainable {_hundredths(low)} to {BF16_BITS:.2f}"
        asked = Fraction(str(spec.effective_bits))
        if asked >= BF16_BITS:
            raise quantises_nothing(spec, attainable)
        if asked < low:
            enough = [name for name in FORMATS if name not in allowed and least_bits(name) <= asked]
            raise InfeasibleTarget(
                f"scheme {spec.name}: {spec.effective_bits} effective bits is below the minimum {_hundredths(low)} "
                f"of these formats ({attainable}); {_formats_for(enough, allowed, formats)}"
            )


def refuse_unmeasured(specs: Iterable[SchemeSpec], measured: Sequence[str]) -> None:
    """Refuse schemes that name formats which aren't measured, one too many, or too few of them.

    Raises:
        PlanError: names those that are.
    """
    for spec in specs:
        named = [*([] if spec.format is None else [spec.format]), *(spec.formats or ())]
        unknown = [name for name in named if name not in measured]
        if unknown:
            remedy = "add it to measurement.formats, or " if unknown[0] in FORMATS else ""
            raise PlanError(
                f"scheme {spec.name} asks for format {unknown[0]}, which is not measured; {remedy}choose among those "
                f"measured: {', '.join(measured)}"
            )
        allowed = [name for name in measured if name in (spec.candidates or measured)]
        if spec.include is not None and len(allowed) > 1:
            raise PlanError(
                f"scheme {spec.name} names no format for what it includes; set `format` to one of these: "
                f"{', '.join(allowed)}"
            )
        if spec.format is not None and spec.include is None and spec.coverage is None and len(measured) > 1:
            raise PlanError(
                f"scheme {spec.name}: `format` goes with coverage or include; the others choose among all measured "
                f"formats ({', '.join(measured)}): leave it out, or give `formats: [{spec.format}]`"
            )


def quantises_nothing(spec: SchemeSpec, attainable: str) -> InfeasibleTarget:
    """Return the refusal of as many bits as 16-bit weights have."""
    return InfeasibleTarget(
        f"scheme {spec.name}: {spec.effective_bits} effective bits would quantise nothing "
        f"({attainable}); ask for less than {BF16_BITS}"
    )


def below_the_minimum(spec: SchemeSpec, edge: TradeOff, measured: Sequence[str], split: Split) -> InfeasibleTarget:
    """Return the refusal of fewer bits than all groups in their smallest formats have.

    Args:
        spec: what is asked.
        edge: of the formats that the scheme may have.
        measured: these, and those that its own `formats` leave out.
        split: of the model among ranks.
    """
    remedy = _remedy_for_bits(edge, Fraction(str(spec.effective_bits)), measured, split)
    return InfeasibleTarget(
        f"scheme {spec.name}: {spec.effective_bits} effective bits is below the minimum {_least_bits(edge)} "
        f"of these formats ({range_of(edge)}); {remedy}"
    )


def refuse_no_faster(spec: SchemeSpec, edge: TradeOff) -> None:
    """Refuse to take the fewest seconds where no format takes fewer than 16 bits.

    Raises:
        InfeasibleTarget: says so.
    """
    if spec.prefer != "bytes" and all(set(one.names) == {BF16} for one in edge.options):
        raise InfeasibleTarget(
            f"scheme {spec.name}: prefer: {spec.prefer} would quantise nothing: no format of these "
            f"({listed(edge.measurement)}) is faster there than 16 bits; leave prefer out, or name other formats"
        )


def beyond_the_score(spec: SchemeSpec, edge: TradeOff) -> InfeasibleTarget:
    """Return the refusal of a predicted score within which nothing can be quantised."""
    low, high = (_rounded_up(score) for score in edge.attainable_scores())
    return InfeasibleTarget(
        f"scheme {spec.name}: no group can be quantised within a predicted score of "
        f"{spec.max_predicted_score}; attainable {low} to {high} {edge.measurement.score_unit}: raise it"
    )


def beyond_the_kl(spec: SchemeSpec, edge: TradeOff, kl_map: KlMap, of_cache: float) -> InfeasibleTarget:
    """Return the refusal of a predicted KL within which nothing can be quantised.

    Args:
        spec: what is asked.
        edge: of weighed scores.
        kl_map: from these to KL.
        of_cache: the part of `max_kl` that the KV cache takes.
    """
    kls = (0.0 if score <= 0 else kl_map.kl_of(score) for score in edge.attainable_scores())
    low, high = (_rounded_up((kl + of_cache) * _MORE) for kl in kls)
    beside = f" beside the {of_cache:.2g} of its KV cache" if of_cache else ""
    return InfeasibleTarget(
        f"scheme {spec.name}: no group can be quantised within a predicted KL of {spec.max_kl}{beside}; attainable "
        f"{low} to {high} nats per token: raise it"
    )


def unbounded_kl(spec: SchemeSpec, kl_map: KlMap) -> PlanError:
    """Return the refusal of any choice by KL where it doesn't grow with the score."""
    return PlanError(
        f"scheme {spec.name}: on the {kl_map.points} schemes that were simulated for it KL doesn't grow with the "
        "predicted score, so that no plan can be held to a max_kl, nor chosen by KL; ask for coverage or "
        "effective_bits, chosen by scores"
    )


def too_fast(
    spec: SchemeSpec, formats: Sequence[str], fastest: Mapping[str, str], speed: SpeedModel, phase: Phase, load: Load
) -> InfeasibleTarget:
    """Return the refusal of more speed than the fastest format of every group gives.

    Args:
        spec: what is asked.
        formats: that the scheme may have.
        fastest: group -> the fastest of them.
        speed: of the device that serves.
        phase: that is to be fast.
        load: at what.
    """
    assert spec.speed is not None
    found = speed.predict(fastest, load).ratio(phase)
    names = sorted(set(fastest.values()) - {BF16})
    most = math.floor(found * 1000) / 1000
    remedy = f"ask for at most {most:g}" if most > 1 else "ask for fewer bits instead"
    return InfeasibleTarget(
        f"scheme {spec.name}: {spec.speed.target[1]:g} times 16 bits at {phase} is more than these formats reach on "
        f"{speed.profile.place} with {load}: {', '.join(formats)}, {BF16}: attainable up to {found:.3f} "
        f"({', '.join(names) or 'all in 16 bits'}); {remedy}"
    )


def fast_enough(spec: SchemeSpec, phase: Phase) -> InfeasibleTarget:
    """Return the refusal of a speed that 16 bits have."""
    assert spec.speed is not None
    return InfeasibleTarget(
        f"scheme {spec.name}: {spec.speed.target[1]:g} times 16 bits at {phase} would quantise nothing, as 16 bits are "
        "as fast; ask for more, or for bits or coverage"
    )


def listed(measurement: Measurement) -> str:
    """Return the measured formats."""
    return ", ".join(measurement.formats)


def _rounded_up(value: float) -> str:
    """Return six significant digits that are not below `value`, so that what a message names can be asked for."""
    return f"{float(Context(prec=6, rounding=ROUND_CEILING).create_decimal_from_float(value)):g}"


def _least_bits(edge: TradeOff) -> str:
    """Return the least effective bits, rounded up."""
    return _hundredths(Fraction(edge.least_bits, edge.measurement.searched_weights))


def _hundredths(bits: Fraction) -> str:
    """Return bits per weight with two decimals, rounded up, so that what is named can be asked for."""
    return f"{math.ceil(bits * 100) / 100:.2f}"


def range_of(edge: TradeOff) -> str:
    """Return the formats and the effective bits that they reach."""
    most = edge.most_bits / edge.measurement.searched_weights
    return f"{listed(edge.measurement)}, {BF16}: attainable {_least_bits(edge)} to {most:.2f}"


def _remedy_for_bits(edge: TradeOff, asked: Fraction, measured: Sequence[str], split: Split) -> str:
    """Return what would make `asked` effective bits attainable."""
    measurement = edge.measurement
    others = (name for name in FORMATS if name not in measurement.formats)
    enough = [name for name in others if _least_with(edge, name, split) <= asked * measurement.searched_weights]
    percent = math.floor(_most_excluded(measurement, asked) * 10**4) / 100
    if edge.excluded and not enough and percent > 0:
        return f"raise the target, or exclude at most {percent:.2f}% of the weights"
    return _formats_for(enough, measurement.formats, measured)


def _least_with(edge: TradeOff, name: str, split: Split) -> int:
    """Return the fewest bits of all groups if those that aren't excluded might have one more format."""
    least = {one.group: int(one.bits.min()) for one in edge.options}
    for group in edge.measurement.groups:
        if group.name not in edge.excluded and can_have(group, name, split):
            least[group.name] = min(least[group.name], group_bits(group, name))
    return sum(least.values())


def _most_excluded(measurement: Measurement, asked: Fraction) -> Fraction:
    """Return the share of the weights that may be excluded, whichever they are, so that the others reach `asked` bits.

    Not above 0: none surely may.
    """
    least: dict[str, Fraction] = {}  # bits per weight of groups that can have a format; others have 16 in any case
    size = {group.name: group.weight_elements for group in measurement.groups}
    for one in measurement.candidates:
        bits = Fraction(one.weight_bits, size[one.group])
        least[one.group] = min(bits, least.get(one.group, bits))
    worst = max(least.values())
    always = 1 - Fraction(sum(size[name] for name in least), measurement.searched_weights)
    return (asked - worst) / (BF16_BITS - worst) - always


def _formats_for(enough: Sequence[str], allowed: Sequence[str], measured: Sequence[str]) -> str:
    """Return which formats would allow so few bits per weight, and where to name them.

    Args:
        enough: each of these alone would.
        allowed: the formats that the scheme may have.
        measured: these, and those that its own `formats` leave out.
    """
    known = f"(Bitladder knows: {', '.join(FORMATS)})"
    narrowed = len(allowed) < len(measured)
    at_hand = [name for name in enough if name in measured]
    if at_hand:
        return f"raise the target, or {_added(at_hand, 'the formats of the scheme')}"
    if enough:
        where = "measurement.formats and the scheme's" if narrowed else "measurement.formats"
        return f"raise the target, or {_added(enough, where)} {known}"
    return f"raise the target; no known format reaches so few bits {known}"


def _added(names: Sequence[str], where: str) -> str:
    """Return how to add one of these formats, with the carrier that some need because the default one lacks them."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        layouts = get_format(name).layouts
        needs = "" if MODELOPT in layouts else f" with export.carrier: {' or '.join(layouts)}"
        kinds.setdefault(needs, []).append(name)
    return ", or ".join(f"add {' or '.join(kind)} to {where}{needs}" for needs, kind in kinds.items())


def at_the_floor(measurement: Measurement, scheme: Scheme) -> tuple[str, ...]:
    """Return the smallest formats, where a scheme asked for by bits has every group in the smallest it can have.

    Empty: its effective bits leave a choice, or it was asked for otherwise. What the scheme excludes stays in 16 bits.
    """
    asked = scheme.asked
    if not isinstance(asked, SchemeSpec) or asked.effective_bits is None:
        return ()
    candidates = scheme.narrow(measurement)
    excluded = matching_groups(measurement, scheme.name, asked.exclude)
    floor, table = 0, candidates.by_group()
    for group in candidates.groups:
        row = {} if group.name in excluded else table[group.name]
        floor += min([group.weight_elements * BF16_BITS, *(one.weight_bits for one in row.values())])
    if scheme.weight_bits > floor:
        return ()
    return tuple(name for name in candidates.formats if name in scheme.formats.values())


def floor_sentence(name: str, bits: float, candidates: Sequence[str], smallest: Sequence[str]) -> str:
    """Return what is said of a scheme at its floor."""
    return (
        f"{name}: {bits:.2f} effective bits is the floor of these formats ({', '.join(candidates)}): every group is in "
        f"the smallest that it can have ({', '.join(smallest)}); a mix needs more"
    )
