"""Plan every scheme of a recipe; torch is imported only where something has to be simulated or scales looked at."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitladder import planning
from bitladder.models.splitting import Split
from bitladder.planning.carrying import check_carrier
from bitladder.planning.sharing import check_parts, cut_words
from bitladder.recipe import SchemeSpec
from bitladder.records import Measurement, Scheme
from bitladder.runinfo import Meter
from bitladder.steps.workspace import SIMULATED_FILE, Workspace
from bitladder.storage import discard

if TYPE_CHECKING:
    from bitladder.planning.speed import SpeedModel

_CHOOSES_NOTHING = (
    "validation: nothing is chosen by KL here (max_kl, chosen_by: kl, refine, a share of kv_cache); its rows are only "
    "kept out of the held-out sets"
)


def plan(work: Workspace) -> tuple[Scheme, ...]:
    """Plan every scheme of the recipe (it takes well under a second) and write those that changed.

    Where one is chosen by KL, a few schemes are simulated first: `measure_kl_points`; where a KV cache is chosen by
    layer, its damage is measured: `measure_kv_damage`. Where the recipe wants schemes refined, that follows:
    `refine_schemes`.

    Raises:
        PlanError: infeasible, two schemes are equal, or the recipe's carrier, or the ranks that are to share the model,
            can't hold one. MeasurementError: keys and values of some layer have no scale, and an FP8 KV cache is asked
            for.
    """
    kl_map, kv_damage, meter, specs = None, None, Meter(), work.recipe.scheme_specs()
    recipe = work.recipe
    if recipe.validation and not recipe.chooses_by_kl:
        work.tell(_CHOOSES_NOTHING)
    measurement = work.measurement()
    speed = work.speed_model(measurement.groups)
    if recipe.maps_kl:
        from bitladder.steps.kl_points import fitted_kl_map

        _refuse_what_no_kl_allows(measurement, specs, speed, work.split)
        kl_map = fitted_kl_map(work)
    if recipe.shares_kv_cache:
        from bitladder.steps.kv_damage import measure_kv_damage

        kv_damage = measure_kv_damage(work)
    with meter.phase("plan"):
        schemes = planning.plan_all(measurement, specs, kl_map, speed, kv_damage, work.split)
        for scheme in schemes:
            check_carrier(scheme, recipe.export.carrier)
            check_parts(scheme, measurement.groups, work.split)
        if any(scheme.kv_cache_format for scheme in schemes) and measurement.amax_sha256 is not None:
            from bitladder.measured import kv_amax, read_amax

            kv_amax(measurement, read_amax(measurement, work.output))  # all layers have scales
    if recipe.refine.evaluations:
        from bitladder.steps.refine import refine_schemes

        schemes = refine_schemes(work, schemes)
    schemes = planning.remarked(measurement, schemes, speed, work.split)
    changed = []
    for scheme in schemes:
        path = work.scheme_file(scheme.name)
        if work.known(Scheme, path) != scheme:
            changed.append((path, scheme))
    for path, scheme in changed:
        scheme.write(path)
    if changed:
        left_out = cut_words(measurement, work.split)
        if left_out is not None:
            work.tell(left_out)
        work.finished("plan", meter.phases)
    discard(work.output / SIMULATED_FILE)  # it has served
    return schemes


def _refuse_what_no_kl_allows(
    measurement: Measurement, specs: Sequence[SchemeSpec], speed: "SpeedModel | None", split: Split
) -> None:
    """Refuse, before any KL is measured for them, schemes that can't be had whatever it will be.

    Raises:
        PlanError: a pattern matches nothing. InfeasibleTarget: bits or a speed outside the attainable range.
    """
    for spec in specs:
        if spec.chosen_by == "kl" and spec.coverage is None:
            by_score = spec.model_copy(update={"chosen_by": "score", "kv_cache": "none"})
            planning.plan(measurement, by_score, speed=speed, split=split)
        elif spec.by_kl:
            planning.named_groups(measurement, spec)
