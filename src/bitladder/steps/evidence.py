"""The control arms of every scheme: which there are, and what is known of them."""

import itertools
from collections.abc import Sequence

from bitladder.planning import controls
from bitladder.recipe import ControlSpec
from bitladder.records import Evidence, Measurement, Scheme
from bitladder.steps.workspace import EVIDENCE_FILE, Workspace


def control_arms(measurement: Measurement, schemes: Sequence[Scheme], spec: ControlSpec) -> tuple[Scheme, ...]:
    """Return the control arms of all schemes, the first of each before any second: short of time, all have some."""
    rows = [controls.arms(measurement, scheme, kinds=spec.kinds, seeds=spec.seeds) for scheme in schemes]
    return tuple(arm for column in itertools.zip_longest(*rows) for arm in column if arm is not None)


def evidence_of(work: Workspace, measurement: Measurement, schemes: Sequence[Scheme]) -> Evidence | None:
    """Return the control arms of these very schemes, where they were evaluated."""
    path = work.output / EVIDENCE_FILE
    if not path.exists():
        return None
    known = Evidence.read(path)
    wanted = {arm.fingerprint() for arm in control_arms(measurement, schemes, work.recipe.controls)}
    return known if {arm.scheme.fingerprint() for arm in known.arms} <= wanted else None
