"""Everything that a user may have got wrong, looked at before anything long begins."""

from pathlib import Path

from bitladder import planning
from bitladder.data.batches import interleaved
from bitladder.device import capability, measuring_device
from bitladder.errors import EngineError, RecipeError
from bitladder.formats import Arithmetic, get_format
from bitladder.formats.targets import TARGETS, served, target_of
from bitladder.measured import MEASUREMENT_FILE
from bitladder.measuring.kv_damage import check_by_layer
from bitladder.measuring.measure import check_engine
from bitladder.models.kv_layers import cached_layers
from bitladder.planning.caching import cached_in_fp8
from bitladder.planning.sharing import refuse_parts
from bitladder.recipe import GENERATED, Recipe
from bitladder.runtimes.child import vllm_version
from bitladder.steps.data import calibration_sets, check_asked_length, held_out_set, validation_sets
from bitladder.steps.originals import tasks_of
from bitladder.steps.workspace import Workspace


def look(work: Workspace, *, held_out: bool = False) -> None:
    """Look at everything that a user may have got wrong, before the model is hashed or anything is computed.

    Args:
        work: the recipe and its output directory.
        held_out: whether validation and held-out data will be needed.

    Raises:
        BitladderError: a format or device that isn't there, a model that can't be searched, a pattern that matches
            nothing of it, speeds that can't be had, data that can't be used, no runtime in the environment that is
            named.
    """
    recipe = work.recipe
    for name in recipe.measurement.formats:
        get_format(name)
    device = measuring_device(recipe.measurement, recipe.workers)
    if recipe.runtimes.vllm is not None:
        vllm_version(Path(recipe.runtimes.vllm.python))
    served_arithmetic(recipe)
    asked = tasks_of(work) if held_out else None
    unmeasured = not (work.output / MEASUREMENT_FILE).exists()
    if unmeasured:
        check_engine(recipe.measurement, work.target, device, recipe.workers.count)
    shares = [scheme for scheme in recipe.scheme_specs() if scheme.kv_share is not None]
    if shares:
        check_by_layer(work.target)
    for scheme in shares:
        cached_in_fp8(scheme, len(cached_layers(work.target.groups)))
    for scheme in recipe.schemes:
        chosen, _ = planning.named_groups(work.target, scheme)
        if unmeasured:  # or planning knows what calibration left out of it
            refuse_parts(scheme, work.target.groups, chosen, recipe.measurement.formats, work.split)
    for group in work.target.groups:
        work.split.group(group)
    if recipe.profile is not None:
        speed = work.speed_model(work.target.groups)
        assert speed is not None
        planning.refuse_too_fast(recipe.schemes, recipe.measurement.formats, work.target, speed, work.split)
    for spec in recipe.calibration:
        check_asked_length(work, spec.sequence_length, spec.data)
    for rows in (*recipe.validation, *recipe.held_out) if held_out else ():
        check_asked_length(work, rows.sequence_length, recipe.data_of(rows))
    _ = work.processor  # a damaged one is found here, wherever the data comes from
    if asked is not None:
        asked.check_length(work.most_positions)
    readable = [spec for spec in recipe.calibration if spec.data.kind != GENERATED]  # others the model has to write
    sets = calibration_sets(work, readable)
    if not held_out:
        return
    calibrated = interleaved(sets).summary if sets else None
    choosing = validation_sets(work, calibrated, readable=True)
    for one in recipe.held_out:
        if recipe.data_of(one).kind != GENERATED:
            held_out_set(work, one, calibrated, choosing)


def served_arithmetic(recipe: Recipe) -> dict[str, Arithmetic]:
    """Return how the device that will serve computes the measured formats, of those that it doesn't as stored.

    Raises:
        RecipeError: vLLM runs one not at all there. EngineError: ModelOpt would score one otherwise.
        MeasurementError: the GPUs that measure are not in this machine.
    """
    spec = recipe.measurement
    target: str | None = recipe.serve_on
    missing = [name for name in spec.formats if target is not None and name in TARGETS[target].unsupported]
    if missing:
        raise RecipeError(
            f"serve_on is {target}, where vLLM runs no {', '.join(missing)}; take it out of measurement.formats, or "
            "name another device"
        )
    if spec.engine == "modelopt":  # which knows formats as they are stored
        unlike = served(spec.formats, target) if target is not None else {}
        if unlike:
            names = ", ".join(f"{name} {how}" for name, how in unlike.items())
            raise EngineError(
                f"serve_on: {target} computes {names}, but ModelOpt scores formats as they are stored; use "
                "engine: native, or leave serve_on out"
            )
        return {}
    if target is None:
        device = measuring_device(spec, recipe.workers)
        if not any(served(spec.formats, name) for name in TARGETS):
            return {}  # the same everywhere
        target = target_of(capability(device))
    return served(spec.formats, target)
