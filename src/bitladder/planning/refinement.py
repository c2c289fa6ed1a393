"""Refines a planned scheme where groups interact: `refine(...) -> Refined`, pure but for the KL that it asks for.

A plan adds up what each group does alone. In the company of a scheme's other groups the ones near its edge may do more
or less. So the groups next to the edge are scored again in context, each by the KL of the scheme with that one group's
format changed. From these scores the exact planner chooses anew within the scheme's own bits, and single swaps are
listed, the most promising first. The first of them whose measured KL is less is taken, and all begins again, until
nothing improves or the evaluations are used up.

The KL comes from validation or calibration samples: held-out data that chooses a scheme can't judge it any more.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from bitladder.errors import PlanError
from bitladder.formats import group_bits
from bitladder.planning.pricing import density_order, price
from bitladder.planning.solver import Solver
from bitladder.records import BF16, Measurement, Scheme

_TRIES = 4  # choices of a round whose KL is measured

Kl = Callable[[Scheme], float]  # the measured KL of any scheme, in nats per token


@dataclass(frozen=True)
class Refined:
    """What came of refining one scheme; `scheme` is the very one that was given where nothing helped.

    Attributes:
        scheme: with at most the weight bits of the one given.
        before: its KL as planned, in nats per token.
        after: its KL now.
        evaluations: how many schemes' KL was asked for.
        swapped: groups whose format changed.
    """

    scheme: Scheme
    before: float
    after: float
    evaluations: int
    swapped: tuple[str, ...]


def refine(
    measurement: Measurement,
    scheme: Scheme,
    kl: Kl,
    *,
    evaluations: int,
    marginal: int,
    excluded: Collection[str] = (),
) -> Refined:
    """Return the scheme with groups at its edge swapped while its KL falls.

    Args:
        measurement: what the scheme was planned from.
        scheme: of one format beside bf16.
        kl: the KL of a scheme of this measurement, in nats per token.
        evaluations: at most so many calls of `kl`; a round takes 2 · `marginal` and one for each choice that it tries.
        marginal: groups on each side of the edge that are scored again in a round.
        excluded: groups that must stay in bf16.

    Raises:
        PlanError: several formats, or too few evaluations for one round.
    """
    names = {name for name in scheme.formats.values() if name != BF16}
    if len(names) > 1:
        raise PlanError(
            f"scheme {scheme.name} mixes {len(names)} formats ({', '.join(sorted(names))}), and only a scheme of one "
            "can be refined; set refine.evaluations: 0, or give the scheme one of them as its `formats`"
        )
    if evaluations < 2 * marginal + 2:
        raise PlanError(
            f"refine: {evaluations} evaluations don't suffice for a round with {marginal} groups on each side; give at "
            f"least {2 * marginal + 2}"
        )
    (name,) = names
    order = [group for group in density_order(measurement, name) if group not in excluded]
    before = after = kl(scheme)
    best, used = scheme, 1
    while used + 2 * marginal < evaluations:
        edge = _edge(order, best.formats, marginal)
        if len({best.formats[group] for group in edge}) < 2:
            break  # everything is on one side
        damage = {group: _in_context(measurement, best, group, name, kl, after) for group in edge}
        used += len(edge)
        better = None
        for tried in _choices(measurement, best, damage, name)[: min(_TRIES, evaluations - used)]:
            used += 1
            found = kl(tried)
            if found < after:
                better = tried, found
                break
        if better is None:
            break
        best, after = better
    swapped = tuple(group for group, chosen in best.formats.items() if chosen != scheme.formats[group])
    return Refined(best, before, after, used, swapped)


def _edge(order: list[str], formats: Mapping[str, str], marginal: int) -> list[str]:
    """Return the quantised groups with most score per bit saved, and the others with least: `marginal` of each."""
    taken = [group for group in order if formats[group] != BF16]
    left = [group for group in order if formats[group] == BF16]
    return [*taken[-marginal:], *left[:marginal]]


def _in_context(measurement: Measurement, scheme: Scheme, group: str, name: str, kl: Kl, base: float) -> float:
    """Return what quantising one group adds to the KL, all the others being as in the scheme."""
    quantised = scheme.formats[group] != BF16
    changed = with_formats(measurement, scheme, {group: BF16 if quantised else name})
    return base - kl(changed) if quantised else kl(changed) - base


def with_formats(measurement: Measurement, scheme: Scheme, changes: Mapping[str, str]) -> Scheme:
    """Return the scheme with some groups' formats changed."""
    return price(
        measurement,
        scheme.name,
        {**scheme.formats, **changes},
        scheme.asked,
        cache=scheme.kv_cache,
        fingerprint=scheme.measurement_sha256,
    )


def _choices(measurement: Measurement, scheme: Scheme, damage: Mapping[str, float], name: str) -> list[Scheme]:
    """Return what might be better within the scheme's weight bits: the exact optimum over the groups in `damage`, all
    others fixed, and then swaps of two of them, by what they promise."""
    size = {group.name: group.weight_elements for group in measurement.groups}
    swaps = sorted(
        (damage[enters] - damage[leaves], leaves, enters)
        for leaves in damage
        for enters in damage
        if scheme.formats[leaves] != BF16 and scheme.formats[enters] == BF16 and size[enters] >= size[leaves]
        if damage[enters] < damage[leaves]
    )
    found = [_optimum(measurement, scheme, damage, name)]
    found += [{**scheme.formats, leaves: BF16, enters: name} for _, leaves, enters in swaps]
    return [with_formats(measurement, scheme, formats) for formats in found if formats != scheme.formats]


def _optimum(measurement: Measurement, scheme: Scheme, damage: Mapping[str, float], name: str) -> dict[str, str]:
    """Return the formats of least damage within the scheme's weight bits; groups not in `damage` keep theirs."""
    groups = tuple(group for group in measurement.groups if group.name in damage)
    candidates = tuple(
        c.model_copy(update={"scores": (damage[c.group],), "image_scores": ()})
        for c in measurement.candidates
        if c.group in damage and c.format == name
    )
    part = measurement.model_copy(
        update={"groups": groups, "candidates": candidates, "formats": (name,), "score_weights": (1.0,)}
    )
    chosen = Solver(part).least_score(sum(group_bits(g, scheme.formats[g.name]) for g in groups))
    assert chosen is not None  # the scheme's own choice fits
    return {**scheme.formats, **chosen}
