"""Everything that a user may have got wrong, looked at before anything long begins."""

from pathlib import Path

from bitladder import planning
from bitladder.data.batches import interleaved
from bitladder.device import measuring_device
from bitladder.formats import get_format
from bitladder.measured import MEASUREMENT_FILE
from bitladder.measuring.measure import check_engine
from bitladder.recipe import GENERATED
from bitladder.runtimes.child import vllm_version
from bitladder.steps.data import calibration_sets, check_asked_length, load_set
from bitladder.steps.workspace import Workspace


def look(work: Workspace, *, held_out: bool = False) -> None:
    """Look at everything that a user may have got wrong, before the model is hashed or anything is computed.

    Args:
        work: the recipe and its output directory.
        held_out: whether held-out data will be needed.

    Raises:
        BitladderError: a format or device that isn't there, a model that can't be searched, a pattern that matches
            nothing of it, data that can't be used, no runtime in the environment that is named.
    """
    recipe = work.recipe
    for name in recipe.measurement.formats:
        get_format(name)
    measuring_device(recipe.measurement, recipe.workers)
    if recipe.runtimes.vllm is not None:
        vllm_version(Path(recipe.runtimes.vllm.python))
    if not (work.output / MEASUREMENT_FILE).exists():
        check_engine(recipe.measurement, work.target)
    for scheme in recipe.schemes:
        patterns = (*(scheme.include or ()), *scheme.exclude)
        if patterns:
            planning.matching_groups(work.target, scheme.name, patterns)
    for spec in recipe.calibration:
        check_asked_length(work, spec.sequence_length, spec.data)
    for one in recipe.held_out if held_out else ():
        check_asked_length(work, one.sequence_length, one.data or recipe.calibration[0].data)
    _ = work.processor  # a damaged one is found here, wherever the data comes from
    readable = [spec for spec in recipe.calibration if spec.data.kind != GENERATED]  # others the model has to write
    sets = calibration_sets(work, readable)
    for one in recipe.held_out if held_out else ():
        source = one.data or recipe.calibration[0].data
        if source.kind != GENERATED:
            seen = interleaved(sets).summary if sets else None
            load_set(work, one, source, seen)
