"""Whether checkpoints of a carrier can hold a scheme."""

from bitladder.errors import PlanError
from bitladder.formats import MODELOPT, why_no_carrier
from bitladder.records import Scheme


def check_carrier(scheme: Scheme, carrier: str) -> None:
    """Refuse a scheme that a carrier can't hold.

    Args:
        scheme: as planned.
        carrier: `modelopt` or `compressed-tensors`.

    Raises:
        PlanError: it can't; names the carrier that can.
    """
    problem = why_no_carrier(scheme.formats.values(), carrier)
    if problem is None and scheme.kv_cache_format is not None and carrier != MODELOPT:
        problem = f"an FP8 KV cache is written in ModelOpt's layout alone; set export.carrier: {MODELOPT}"
    if problem is not None:
        raise PlanError(f"scheme {scheme.name}: {problem}")
