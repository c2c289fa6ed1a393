"""What is said of planned schemes beside their costs: how sure a prediction is, and what image positions make of it."""

from collections.abc import Sequence
from typing import Literal

from bitladder.errors import InfeasibleTarget
from bitladder.planning.asking import plan
from bitladder.planning.pricing import standard_error
from bitladder.recipe import SchemeSpec
from bitladder.records import Measurement, Scheme


def remarked(measurement: Measurement, schemes: Sequence[Scheme]) -> tuple[Scheme, ...]:
    """Return schemes of this measurement with `standard_error` and `text_only_changes` filled in."""
    return tuple(
        scheme.model_copy(
            update={
                "standard_error": standard_error(scheme.weigh(measurement), scheme.formats),
                "text_only_changes": _text_only_changes(measurement, scheme),
            }
        )
        for scheme in schemes
    )


def _text_only_changes(measurement: Measurement, scheme: Scheme) -> int | Literal["unattainable"] | None:
    """Return in how many groups the scheme would have another format if only text positions counted.

    A scheme asked for by its KL is compared at its bits.
    """
    asked = scheme.asked
    if not isinstance(asked, SchemeSpec) or not all(candidate.image_scores for candidate in measurement.candidates):
        return None
    changed: dict[str, float | None] = {"image_weight": 0.0}
    if asked.max_kl is not None:  # which score has that KL is known of both parts together alone
        changed |= {"max_kl": None, "effective_bits": scheme.effective_bits}
    try:
        formats = plan(measurement, asked.model_copy(update=changed)).formats
    except InfeasibleTarget:  # a bound on the predicted score below what text alone gives
        return "unattainable"
    return sum(scheme.formats.get(group) != name for group, name in formats.items())
