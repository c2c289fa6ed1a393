"""What patterns name: groups, by their own name or by a module's."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Protocol

from bitladder.errors import InfeasibleTarget, PlanError
from bitladder.recipe import SchemeSpec
from bitladder.records import QuantGroup, UntouchedModule


class Searched(Protocol):
    """What patterns are matched with: a measurement, or a model that is to be measured (`models.target.Target`)."""

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


def named_groups(searched: Searched, spec: SchemeSpec) -> tuple[frozenset[str], frozenset[str]]:
    """Return the groups that a scheme may quantise by its patterns, and those that it excludes.

    Raises:
        PlanError: a pattern matches nothing. InfeasibleTarget: no group is left.
    """
    excluded = frozenset(matching_groups(searched, spec.name, spec.exclude))
    if len(excluded) == len(searched.groups):
        raise InfeasibleTarget(
            f"scheme {spec.name} would quantise nothing: exclude {list(spec.exclude)} leaves no group; exclude less"
        )
    if spec.include is None:
        return frozenset(group.name for group in searched.groups) - excluded, excluded
    chosen = matching_groups(searched, spec.name, spec.include) - excluded
    if not chosen:
        raise InfeasibleTarget(
            f"scheme {spec.name} would quantise nothing: include {list(spec.include)} without exclude "
            f"{list(spec.exclude)} leaves no group; include more"
        )
    return frozenset(chosen), excluded
