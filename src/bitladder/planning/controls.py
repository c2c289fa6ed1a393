"""Control arms: other choices of groups at a scheme's own bits, to show what the search is worth. Pure, no torch.

Most arms take groups in an order that knows less than the measurement does, or the opposite, and go on while the
scheme's weight bits have room: a group that doesn't fit is passed over, the next one may. So such an arm never has
fewer effective bits than its scheme, and at most one group's worth more.

    random       groups in a random order, by seed
    inverse      the most sensitive first: the worst that the same measurement can do
    first_last   from the middle layer outwards, so that the first and last layers stay in 16 bits: a common rule
    largest      the largest groups first, which needs the fewest groups
    lowest_score the least sensitive first, whatever they save
    modelopt     what ModelOpt's solver chooses from the same scores within the scheme's bits, so at most those. A
                 group's score is the plain sum over batches then, however many tokens a batch has. `gradient`: the
                 least sum within the bits (`fisher` too); `kl_div`: all groups below a threshold
"""

import random
import re
from collections.abc import Callable, Sequence

from bitladder.errors import PlanError
from bitladder.planning.pricing import density_order, price
from bitladder.planning.solver import Solver
from bitladder.recipe import CONTROL_KINDS, ControlKind
from bitladder.records import BF16, Control, Measurement, Scheme

_LAYER = re.compile(r"\.(\d+)\.")  # the number of a layer in a module's path


def arms(measurement: Measurement, scheme: Scheme, *, kinds: Sequence[ControlKind], seeds: int) -> tuple[Scheme, ...]:
    """Return the control arms of one scheme, each once; `asked` says what each is.

    None where every group is quantised: there is no other choice then.

    Args:
        measurement: what the scheme was planned from.
        scheme: the one whose bits the arms may have.
        kinds: of `CONTROL_KINDS`.
        seeds: number of random arms.

    Raises:
        PlanError: an unknown kind, or a scheme with several formats, which has no single order.
    """
    unknown = sorted(set(kinds) - set(CONTROL_KINDS))
    if unknown:
        raise PlanError(f"control {unknown[0]!r} is unknown; known: {', '.join(CONTROL_KINDS)}")
    formats = {name for name in scheme.formats.values() if name != BF16}
    if len(formats) > 1 or BF16 not in scheme.formats.values():
        return ()  # which groups are quantised is what an arm chooses otherwise, not in which of several formats
    (name,) = formats
    taken = {frozenset(scheme.quantised_groups())}
    found = []
    for kind, seed in _wanted(kinds, seeds):
        if kind == "modelopt":
            chosen = _modelopt_choice(measurement, scheme, name)
        else:
            chosen = _fill(measurement, scheme, name, _order(measurement, name, kind, seed))
        if not chosen or chosen in taken:  # a small model has few choices
            continue
        taken.add(chosen)
        label = kind if seed is None else f"{kind}{seed}"
        found.append(
            price(
                measurement,
                f"{scheme.name}.{label}",
                {group: name if group in chosen else BF16 for group in scheme.formats},
                Control(control=kind, beside=scheme.name, seed=seed),
                kv_cache_format=scheme.kv_cache_format,
            )
        )
    return tuple(found)


def _wanted(kinds: Sequence[ControlKind], seeds: int) -> list[tuple[ControlKind, int | None]]:
    """Return (kind, seed) in the order in which they should be evaluated where time is short."""
    single: list[tuple[ControlKind, int | None]] = [(kind, None) for kind in kinds if kind != "random"]
    drawn: list[tuple[ControlKind, int | None]] = (
        [("random", seed) for seed in range(seeds)] if "random" in kinds else []
    )
    return [*drawn[:1], *single, *drawn[1:]]


def _modelopt_choice(measurement: Measurement, scheme: Scheme, format_name: str) -> frozenset[str]:
    """Return the groups that ModelOpt's solver would quantise within the scheme's bits.

    Source: modelopt.torch.quantization.algorithms, AutoQuantizeGradientSearcher and AutoQuantizeKLDivSearcher (a
    threshold over normalised scores, found by bisection: here it is the highest that keeps the bits).
    """
    plain = measurement.model_copy(update={"score_weights": (1.0,) * len(measurement.score_weights)})
    if measurement.method != "kl_div":
        chosen = Solver(plain).least_score(scheme.weight_bits)
        assert chosen is not None  # the scheme itself is within its bits
        return frozenset(group for group, name in chosen.items() if name != BF16)
    size = {group.name: group.weight_elements for group in measurement.groups}
    room = sum(size[group] for group in scheme.quantised_groups())
    below = set()
    for group in _order(plain, format_name, "lowest_score", None):
        below.add(group)
        room -= size[group]
        if room <= 0:
            break
    return frozenset(below)


def _order(measurement: Measurement, format_name: str, kind: str, seed: int | None) -> list[str]:
    """Return all groups in the order in which the arm takes them."""
    table = measurement.by_group()
    names = [group for group in table if format_name in table[group]]
    if kind == "random":
        random.Random(seed).shuffle(names)
        return names
    if kind == "inverse":
        return density_order(measurement, format_name)[::-1]
    if kind == "lowest_score":
        return sorted(names, key=lambda group: measurement.sensitivity(table[group][format_name]))
    if kind == "largest":
        size = {group.name: group.weight_elements for group in measurement.groups}
        return sorted(names, key=lambda group: -size[group])
    layers = {group: _layer(group) for group in names}
    middle = (min(layers.values()) + max(layers.values())) / 2
    return sorted(names, key=lambda group: abs(layers[group] - middle))


def _layer(group: str) -> int:
    found = _LAYER.search(group)
    if found is None:
        raise PlanError(f"group {group} names no layer; leave first_last out of `controls.kinds`")
    return int(found[1])


def _fill(measurement: Measurement, scheme: Scheme, format_name: str, order: Sequence[str]) -> frozenset[str]:
    """Return the groups taken in this order within the weights that the scheme quantises."""
    size: Callable[[str], int] = {group.name: group.weight_elements for group in measurement.groups}.__getitem__
    room = sum(map(size, scheme.quantised_groups()))
    chosen = set()
    for group in order:
        if size(group) <= room:
            chosen.add(group)
            room -= size(group)
    return frozenset(chosen)
