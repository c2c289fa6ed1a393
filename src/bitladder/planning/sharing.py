"""What the ranks that share a model can hold: whole blocks of a format, and which formats of groups that leaves out.

Planning leaves out what they can't hold (`plannable`), except where a scheme names its one format: such a scheme is
refused (`check_parts`, and before measuring `refuse_parts`).
"""

from collections import Counter
from collections.abc import Container, Sequence

from bitladder.errors import PlanError
from bitladder.formats import get_format, why_not
from bitladder.models.splitting import Split
from bitladder.recipe import SchemeSpec
from bitladder.records import BF16, LeftOut, Measurement, QuantGroup, Scheme


def why_cut(group: QuantGroup, format_name: str, split: Split) -> str | None:
    """Return why ranks can't share a group in a format, as each would hold parts of blocks; None: they can.

    Raises:
        UnsupportedModel: the group can't be split.
    """
    _, why = _cut(group, format_name, split)
    return why


def can_have(group: QuantGroup, format_name: str, split: Split) -> bool:
    """Return whether a format fits a group, and what each rank would hold of it.

    Raises:
        UnsupportedModel: the group can't be split.
    """
    return why_not(group, format_name) is None and why_cut(group, format_name, split) is None


def _cut(group: QuantGroup, format_name: str, split: Split) -> tuple[str, str | None]:
    """Return the own name of a module that would be cut, and why."""
    for module in split.group(group).modules if format_name != BF16 and split.ranks > 1 else ():
        assert module.shape is not None  # or else it couldn't be split
        why = get_format(format_name).why_no_part(module.shape)
        if why is not None:
            leaf = module.name.rpartition(".")[2]
            return leaf, f"of {leaf} each of {split.ranks} ranks would hold {list(module.shape)}, which {why}"
    return "", None


def plannable(measurement: Measurement, split: Split) -> Measurement:
    """Return the measurement without the formats of groups of which ranks would hold parts; its fingerprint differs."""
    groups = {group.name: group for group in measurement.groups}
    found = ((one, why_cut(groups[one.group], one.format, split)) for one in measurement.candidates)
    return measurement.without(
        [LeftOut(group=one.group, format=one.format, reason=why) for one, why in found if why is not None]
    )


def cut_words(measurement: Measurement, split: Split) -> str | None:
    """Return in a line which formats of how many groups plans leave out; None: none."""
    left, known = plannable(measurement, split).left_out, set(measurement.left_out)
    counts = Counter(one.format for one in left if one not in known)
    if not counts:
        return None
    words = ", ".join(f"{name} in {count} of {len(measurement.groups)} groups" for name, count in counts.items())
    return f"tensor_parallel {split.ranks}: plans leave out {words}, as ranks would hold parts of blocks there"


def check_parts(scheme: Scheme, groups: Sequence[QuantGroup], split: Split) -> None:
    """Refuse a scheme of which a rank would hold parts of blocks.

    Args:
        scheme: as planned.
        groups: those that it decides about.
        split: of the model.

    Raises:
        PlanError: a group's format has blocks that would be cut. UnsupportedModel: a group can't be split.
    """
    for group in groups:
        _refuse_cut(scheme.name, group, scheme.formats[group.name], split, by_name=scheme.by_name)


def refuse_parts(
    spec: SchemeSpec, groups: Sequence[QuantGroup], chosen: Container[str], measured: Sequence[str], split: Split
) -> None:
    """Refuse a scheme whose one format ranks can't hold where it has to be, before anything is measured.

    Args:
        spec: what is asked; a share in one format may do without the groups that would be cut.
        groups: that are searched.
        chosen: names of those that the scheme may quantise.
        measured: formats that will be.
        split: of the model among ranks.

    Raises:
        PlanError: as `check_parts`. UnsupportedModel: a group can't be split.
    """
    by_name, allowed = spec.include is not None, spec.candidates or measured
    whole = by_name or (spec.format is not None and spec.coverage == 1)
    for group in groups if whole and len(allowed) == 1 else ():
        if group.name in chosen and why_not(group, allowed[0]) is None:
            _refuse_cut(spec.name, group, allowed[0], split, by_name=by_name)


def _refuse_cut(scheme: str, group: QuantGroup, format_name: str, split: Split, *, by_name: bool) -> None:
    leaf, why = _cut(group, format_name, split)
    if why is not None:
        instead = "" if by_name else "give the scheme `formats` instead of `format`, "
        raise PlanError(
            f"scheme {scheme}: {group.name} is {format_name}, and {why}; set exclude: ['*.{leaf}'], {instead}or set "
            "another tensor_parallel"
        )
