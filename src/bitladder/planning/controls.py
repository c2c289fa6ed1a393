"""Control arms: other choices at a scheme's own bits, to show what the search is worth. Pure, no torch.

Most arms take groups in an order that knows less than the measurement does, or the opposite, and go on while the
scheme's weight bits have room: a group that doesn't fit is passed over, the next one may. So such an arm never has
fewer effective bits than its scheme, and at most one group's worth more.

A mix has arms of the same formats, each for as many weights as in the scheme: the first groups of the order go to the
smallest format until it is used up, those that follow to the next one. So an arm shows what it is worth to know the
groups; with other shares of the formats it would differ in what the search said of these as well. Room in which no
group fits is left to the next format. A group's score is that in the smallest of these formats that it can have.

    random       groups in a random order, by seed
    inverse      the most sensitive first: the worst that the same measurement can do
    first_last   from the middle layer outwards, so that the first and last layers stay in 16 bits: a common rule
    largest      the largest groups first, which needs the fewest groups
    lowest_score the least sensitive first, whatever they save
    modelopt     what ModelOpt's solver chooses from the same scores and candidates within the scheme's bits, so at
                 most those. A group's score is the plain sum over batches then, however many tokens a batch has.
                 `gradient`: the least sum within the bits (`fisher` too); `kl_div`: every group in the smallest format
                 whose score is below a threshold
"""

import random
import re
from collections.abc import Sequence
from fractions import Fraction

from bitladder.errors import PlanError
from bitladder.planning.pricing import price
from bitladder.planning.solver import Solver
from bitladder.recipe import CONTROL_KINDS, ControlKind
from bitladder.records import BF16, BF16_BITS, Control, Measurement, Scheme

RANDOM_FIRST = 3  # so many say what chance does, which the other arms don't replace
_LAYER = re.compile(r"\.(\d+)\.")  # the number of a layer in a module's path


def arms(measurement: Measurement, scheme: Scheme, *, kinds: Sequence[ControlKind], seeds: int) -> tuple[Scheme, ...]:
    """Return the control arms of one scheme, each once; `asked` says what each is.

    None where every group has one format: there is no other choice then.

    Args:
        measurement: what the scheme was planned from.
        scheme: the one whose bits the arms may have.
        kinds: of `CONTROL_KINDS`.
        seeds: number of random arms.

    Raises:
        PlanError: an unknown kind.
    """
    unknown = sorted(set(kinds) - set(CONTROL_KINDS))
    if unknown:
        raise PlanError(f"control {unknown[0]!r} is unknown; known: {', '.join(CONTROL_KINDS)}")
    if len(set(scheme.formats.values())) == 1:
        return ()  # everything is in one format, and nothing else has its bits
    candidates = scheme.narrow(measurement)
    used = measurement.only([name for name in measurement.formats if name in scheme.formats.values()])
    taken = {tuple(scheme.formats.items())}
    found = []
    for kind, seed in _wanted(kinds, seeds):
        if kind == "modelopt":
            formats = _modelopt_choice(candidates, scheme)
        else:
            formats = _fill(used, scheme, _order(used, kind, seed))
        if not set(formats.values()) - {BF16} or tuple(formats.items()) in taken:  # a small model has few choices
            continue
        taken.add(tuple(formats.items()))
        label = kind if seed is None else f"{kind}{seed}"
        found.append(
            price(
                measurement,
                f"{scheme.name}.{label}",
                formats,
                Control(control=kind, beside=scheme.name, seed=seed),
                cache=scheme.kv_cache,
                fingerprint=scheme.measurement_sha256,
            )
        )
    return tuple(found)


def modelopt_agrees(measurement: Measurement, scheme: Scheme) -> bool:
    """Return whether ModelOpt's solver would choose the scheme itself within its bits, so that it has no such arm.

    Where every group has one format there is no other choice: that is no agreement.
    """
    if len(set(scheme.formats.values())) == 1:
        return False
    return _modelopt_choice(scheme.narrow(measurement), scheme) == scheme.formats


def _wanted(kinds: Sequence[ControlKind], seeds: int) -> list[tuple[ControlKind, int | None]]:
    """Return (kind, seed) in the order in which they should be evaluated where time is short."""
    single: list[tuple[ControlKind, int | None]] = [(kind, None) for kind in kinds if kind != "random"]
    drawn: list[tuple[ControlKind, int | None]] = (
        [("random", seed) for seed in range(seeds)] if "random" in kinds else []
    )
    return [*drawn[:RANDOM_FIRST], *single, *drawn[RANDOM_FIRST:]]


def _modelopt_choice(candidates: Measurement, scheme: Scheme) -> dict[str, str]:
    """Return the formats that ModelOpt's solver would choose from these candidates within the scheme's bits.

    Source: modelopt.torch.quantization.algorithms, AutoQuantizeGradientSearcher and AutoQuantizeKLDivSearcher (a
    threshold over normalised scores, found by bisection: here it is the highest that keeps the bits; a group takes the
    first of its formats below it, the smallest first).
    """
    plain = candidates.model_copy(update={"score_weights": (1.0,) * len(candidates.score_weights)})
    if candidates.method != "kl_div":
        chosen = Solver(plain).least_score(scheme.weight_bits)
        assert chosen is not None  # the scheme itself is within its bits
        return chosen
    if len(candidates.formats) > 1:
        return _below_a_threshold(plain, scheme.weight_bits)
    size = {group.name: group.weight_elements for group in candidates.groups}
    room = sum(size[group] for group in scheme.quantised_groups())
    formats = dict.fromkeys(scheme.formats, BF16)
    for group in _order(plain, "lowest_score", None):
        formats[group] = candidates.formats[0]
        room -= size[group]
        if room <= 0:
            break
    return formats


def _below_a_threshold(measurement: Measurement, max_bits: int) -> dict[str, str]:
    """Return every group in the smallest format whose score is at most the least threshold that keeps the bits."""
    smallest_first, table = _by_bits(measurement), measurement.by_group()
    bits = {group.name: group.weight_elements * BF16_BITS for group in measurement.groups}
    formats, total = dict.fromkeys(table, BF16), sum(bits.values())
    scored = [(measurement.sensitivity(one), one) for one in measurement.candidates]
    for _, one in sorted(scored, key=lambda entry: entry[0]):
        if total <= max_bits:
            break
        now = formats[one.group]
        if now == BF16 or smallest_first.index(one.format) < smallest_first.index(now):
            total += one.weight_bits - bits[one.group]
            formats[one.group], bits[one.group] = one.format, one.weight_bits
    return formats


def _by_bits(measurement: Measurement) -> list[str]:
    """Return the formats by the bits of a weight, fewest first; of equal ones in the measurement's order."""
    size = {group.name: group.weight_elements for group in measurement.groups}
    bits, weights = dict.fromkeys(measurement.formats, 0), dict.fromkeys(measurement.formats, 0)
    for one in measurement.candidates:
        bits[one.format] += one.weight_bits
        weights[one.format] += size[one.group]
    return sorted(measurement.formats, key=lambda name: Fraction(bits[name], weights[name]))


def _order(measurement: Measurement, kind: str, seed: int | None) -> list[str]:
    """Return all groups that can have a format in the order in which the arm takes them."""
    smallest_first, groups = _by_bits(measurement), {group.name: group for group in measurement.groups}
    smallest = {
        group: next(row[name] for name in smallest_first if name in row)
        for group, row in measurement.by_group().items()
        if row
    }
    names = list(smallest)
    score = {group: measurement.sensitivity(one) for group, one in smallest.items()}
    if kind == "random":
        random.Random(seed).shuffle(names)
        return names
    if kind == "inverse":
        return sorted(names, key=lambda group: score[group] / groups[group].bits_saved(smallest[group]))[::-1]
    if kind == "lowest_score":
        return sorted(names, key=score.__getitem__)
    if kind == "largest":
        return sorted(names, key=lambda group: -groups[group].weight_elements)
    layers = {group: _layer(group) for group in names}
    middle = (min(layers.values()) + max(layers.values())) / 2
    return sorted(names, key=lambda group: abs(layers[group] - middle))


def _layer(group: str) -> int:
    found = _LAYER.search(group)
    if found is None:
        raise PlanError(f"group {group} names no layer; leave first_last out of `controls.kinds`")
    return int(found[1])


def _fill(measurement: Measurement, scheme: Scheme, order: Sequence[str]) -> dict[str, str]:
    """Return formats given in this order, the smallest first, each for as many weights as in the scheme.

    Args:
        measurement: of the scheme's own formats.
        scheme: whose formats and bits they are.
        order: the groups.
    """
    size, table = {group.name: group.weight_elements for group in measurement.groups}, measurement.by_group()
    formats = dict.fromkeys(scheme.formats, BF16)
    room = 0
    for name in _by_bits(measurement):
        room += sum(size[group] for group, given in scheme.formats.items() if given == name)
        for group in order:
            if formats[group] == BF16 and name in table[group] and size[group] <= room:
                formats[group] = name
                room -= size[group]
    return formats
