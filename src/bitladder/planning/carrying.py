"""Whether checkpoints of a carrier can hold a scheme."""

from collections.abc import Iterable, Sequence

from bitladder.errors import PlanError
from bitladder.formats import MODELOPT, carriers_of
from bitladder.recipe import SchemeSpec
from bitladder.records import BF16, Scheme

_CACHE_CARRIERS = (MODELOPT,)  # whose layout has a place for the scales of an FP8 KV cache


def check_carrier(scheme: Scheme, carrier: str) -> None:
    """Refuse a scheme that a carrier can't hold.

    Args:
        scheme: as planned.
        carrier: `modelopt` or `compressed-tensors`.

    Raises:
        PlanError: it can't; names a carrier that holds all of the scheme, or what has to go where none does.
    """
    formats = sorted(set(scheme.formats.values()) - {BF16})
    problem = _problem(formats, scheme.kv_cache_format is not None, carrier)
    if problem is not None:
        raise PlanError(f"scheme {scheme.name}: {problem}")


def refuse_uncarried(specs: Iterable[SchemeSpec], measured: Sequence[str], carrier: str) -> None:
    """Refuse schemes that a carrier can't hold whatever is planned, before anything is measured.

    Raises:
        PlanError: see `check_carrier`.
    """
    for spec in specs:
        candidates = spec.candidates or measured
        held = [name for name in candidates if carrier in carriers_of([name])]
        problem = _problem(held or candidates, spec.caches_fp8, carrier)
        if problem is not None:
            raise PlanError(f"scheme {spec.name}: {problem}")


def _problem(formats: Sequence[str], cached: bool, carrier: str) -> str | None:
    """Return why a carrier can't hold formats and, where `cached`, an FP8 KV cache, and what to do; None: it can."""
    of_weights = carriers_of(formats)
    able = tuple(name for name in of_weights if not cached or name in _CACHE_CARRIERS)
    if carrier in able:
        return None
    missing = [name for name in formats if carrier not in carriers_of([name])]
    are = "is no format" if len(missing) == 1 else "are no formats"
    problem = f"{', '.join(missing)} {are} of {carrier} checkpoints" if missing else f"{carrier} has no FP8 KV cache"
    if able:
        return f"{problem}; set export.carrier: {' or '.join(able)}"
    if not of_weights:
        return f"{problem}, and no carrier has all of {', '.join(formats)}; give it fewer `formats`"
    # the cache is in the way
    alone = [name for name in formats if not set(carriers_of([name])) & set(_CACHE_CARRIERS)]
    further = "" if carrier in of_weights else f" and export.carrier: {' or '.join(of_weights)}"
    return f"{problem}, and no carrier has both {', '.join(alone)} and an FP8 KV cache; set kv_cache: none{further}"
