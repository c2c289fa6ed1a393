"""What can be attained, in words: refusals name the range and what would widen it."""

import math
from collections.abc import Iterable, Sequence
from decimal import ROUND_CEILING, Context
from fractions import Fraction

from bitladder.errors import InfeasibleTarget
from bitladder.formats import FORMATS, least_bits
from bitladder.planning.prediction import KlMap
from bitladder.planning.trade_off import TradeOff
from bitladder.recipe import SchemeSpec
from bitladder.records import BF16, BF16_BITS, Measurement, Scheme


def refuse_unattainable(specs: Iterable[SchemeSpec], formats: Sequence[str]) -> None:
    """Refuse effective bits that no measurement of these formats can reach, before anything is measured.

    Raises:
        InfeasibleTarget: with the attainable range.
    """
    low = min(least_bits(name) for name in formats)
    attainable = f"{', '.join(formats)}, {BF16}: attainable {low:.2f} to {BF16_BITS:.2f}"
    for spec in specs:
        if spec.effective_bits is None:
            continue
        asked = Fraction(str(spec.effective_bits))
        if asked >= BF16_BITS:
            raise quantises_nothing(spec, attainable)
        if asked < low:
            raise InfeasibleTarget(
                f"scheme {spec.name}: {spec.effective_bits} effective bits is below the minimum {low:.2f} "
                f"of these formats ({attainable}); {_formats_for(asked, formats)}"
            )


def quantises_nothing(spec: SchemeSpec, attainable: str) -> InfeasibleTarget:
    """Return the refusal of as many bits as 16-bit weights have."""
    return InfeasibleTarget(
        f"scheme {spec.name}: {spec.effective_bits} effective bits would quantise nothing "
        f"({attainable}); ask for less than {BF16_BITS}"
    )


def below_the_minimum(spec: SchemeSpec, edge: TradeOff) -> InfeasibleTarget:
    """Return the refusal of fewer bits than all groups in their smallest formats have."""
    remedy = _remedy_for_bits(edge, Fraction(str(spec.effective_bits)))
    return InfeasibleTarget(
        f"scheme {spec.name}: {spec.effective_bits} effective bits is below the minimum {_least_bits(edge)} "
        f"of these formats ({range_of(edge)}); {remedy}"
    )


def beyond_the_score(spec: SchemeSpec, edge: TradeOff) -> InfeasibleTarget:
    """Return the refusal of a predicted score within which nothing can be quantised."""
    low, high = (_rounded_up(score) for score in edge.attainable_scores())
    return InfeasibleTarget(
        f"scheme {spec.name}: no group can be quantised within a predicted score of "
        f"{spec.max_predicted_score}; attainable {low} to {high} {edge.measurement.score_unit}: raise it"
    )


def beyond_the_kl(spec: SchemeSpec, edge: TradeOff, kl_map: KlMap) -> InfeasibleTarget:
    """Return the refusal of a predicted KL within which nothing can be quantised."""
    ends = [kl_map.predict(score) for score in edge.attainable_scores()]
    low, high = ("0" if end is None else _rounded_up(end.value) for end in ends)
    return InfeasibleTarget(
        f"scheme {spec.name}: no group can be quantised within a predicted KL of {spec.max_kl}; attainable "
        f"{low} to {high} nats per token: raise it"
    )


def listed(measurement: Measurement) -> str:
    """Return the measured formats."""
    return ", ".join(measurement.formats)


def _rounded_up(value: float) -> str:
    """Return six significant digits that are not below `value`, so that what a message names can be asked for."""
    return f"{float(Context(prec=6, rounding=ROUND_CEILING).create_decimal_from_float(value)):g}"


def _least_bits(edge: TradeOff) -> str:
    """Return the least effective bits, rounded up."""
    return f"{math.ceil(Fraction(edge.least_bits * 100, edge.measurement.searched_weights)) / 100:.2f}"


def range_of(edge: TradeOff) -> str:
    """Return the formats and the effective bits that they reach."""
    most = edge.most_bits / edge.measurement.searched_weights
    return f"{listed(edge.measurement)}, {BF16}: attainable {_least_bits(edge)} to {most:.2f}"


def _remedy_for_bits(edge: TradeOff, asked: Fraction) -> str:
    """Return what would make `asked` effective bits attainable."""
    measurement = edge.measurement
    total = measurement.searched_weights
    kept = sum(group.weight_elements for group in measurement.groups if group.name in edge.excluded)
    # what the groups that aren't excluded may have, so that all together keep the target
    share = (asked * total - kept * BF16_BITS) / (total - kept)
    enough = any(name not in measurement.formats and least_bits(name) <= share for name in FORMATS)
    if edge.excluded and not enough and min(least_bits(name) for name in measurement.formats) <= asked:
        return f"raise the target, or exclude less than {kept / total:.2%} of the weights"
    return _formats_for(share, measurement.formats)


def _formats_for(bits: Fraction, measured: Sequence[str]) -> str:
    """Return which formats would allow so few bits per weight."""
    enough = [name for name in FORMATS if name not in measured and least_bits(name) <= bits]
    known = f"(Bitladder knows: {', '.join(FORMATS)})"
    if enough:
        return f"raise the target, or add {' or '.join(enough)} to measurement.formats {known}"
    return f"raise the target; no known format has so few bits {known}"


def at_the_floor(measurement: Measurement, scheme: Scheme) -> str | None:
    """Return what is to be said of a scheme whose effective bits leave no choice; None: they leave one."""
    table = measurement.by_group()
    floor = sum(min(one.weight_bits for one in candidates.values()) for candidates in table.values())
    by_bits = isinstance(scheme.asked, SchemeSpec) and scheme.asked.effective_bits is not None
    if not by_bits or scheme.weight_bits > floor:
        return None
    smallest = ", ".join(name for name in measurement.formats if name in scheme.formats.values())
    return (
        f"{scheme.name}: {scheme.effective_bits:.2f} effective bits is the floor of these formats "
        f"({listed(measurement)}): every group is in the smallest that it can have ({smallest}); a mix needs more"
    )
