"""What is said of planned schemes beside their costs: how sure a prediction is, and what image positions make of it."""

from collections.abc import Sequence
from typing import Any, Literal

from bitladder.errors import InfeasibleTarget
from bitladder.models.splitting import WHOLE, Split
from bitladder.planning.asking import plan
from bitladder.planning.pricing import standard_error
from bitladder.planning.speed import SpeedModel
from bitladder.recipe import SchemeSpec, SpeedSpec
from bitladder.records import Measurement, Scheme

_ROUNDING = 1e-6  # of a ratio of speeds: costs are whole picoseconds, and the scheme itself must be within its own


def remarked(
    measurement: Measurement, schemes: Sequence[Scheme], speed: SpeedModel | None = None, split: Split = WHOLE
) -> tuple[Scheme, ...]:
    """Return schemes of this measurement with `standard_error` and `text_only_changes` filled in."""
    return tuple(
        scheme.model_copy(
            update={
                "standard_error": standard_error(scheme.weigh(measurement), scheme.formats),
                "text_only_changes": _text_only_changes(measurement, scheme, speed, split),
            }
        )
        for scheme in schemes
    )


def _text_only_changes(
    measurement: Measurement, scheme: Scheme, speed: SpeedModel | None, split: Split
) -> int | Literal["unattainable"] | None:
    """Return in how many groups the scheme would have another format if only text positions counted.

    A scheme asked for by its KL is compared at its bits, or at its speed where it prefers that.
    """
    asked = scheme.asked
    if not isinstance(asked, SchemeSpec) or not all(candidate.image_scores for candidate in measurement.candidates):
        return None
    if asked.chosen_by == "kl":  # of all positions together
        return None
    changed: dict[str, Any] = {"image_weight": 0.0, "kv_cache": "none"}  # a cache changes no group's format
    if asked.max_kl is not None:  # which score has that KL is known of both parts together alone
        changed |= {"max_kl": None, "prefer": "bytes", **_at_its_cost(scheme, asked, speed)}
    try:
        formats = plan(measurement, asked.model_copy(update=changed), speed=speed, split=split).formats
    except InfeasibleTarget:  # a bound on the predicted score below what text alone gives
        return "unattainable"
    return sum(scheme.formats.get(group) != name for group, name in formats.items())


def _at_its_cost(scheme: Scheme, asked: SchemeSpec, speed: SpeedModel | None) -> dict[str, Any]:
    """Return what asks for a scheme by its bits, or by its speed where it prefers that."""
    if asked.prefer == "bytes" or speed is None:
        return {"effective_bits": scheme.effective_bits}
    ratio = speed.predict(scheme.formats, speed.load).ratio(asked.prefer) * (1 - _ROUNDING)
    return {"speed": SpeedSpec.model_validate({asked.prefer: ratio})}
