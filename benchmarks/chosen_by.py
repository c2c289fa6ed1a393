"""Plans chosen by scores, and by the KL that a map from scores makes of them, at equal bits, with compensated codes.

    python benchmarks/chosen_by.py --scratch DIR [--recipe RECIPE] [--serve-on hopper]
                                                                        # writes benchmarks/results/chosen_by.json

One measurement by `gradient`, that of `mixes.py --compensated`. Two dozen schemes are simulated on validation rows, as
a run does for `chosen_by: kl`: on other rows like calibration's, on other rows of the other held-out text, and on both,
which gives a map each. Plans at 5.4 to 12 bits from {NVFP4, FP8} and from all floats are chosen by scores and by each
map, and simulated on the held-out sets, of which no map has seen a row. A GPU helps: minutes on an H200 for SmolLM2.
"""

from pathlib import Path

import mixes
import predicted_mixes
import prediction

BITS = (5.4, 7.0, 8.0, 9.0, 10.0, 12.0)
SETS = {name: mixes.SETS[name] for name in ("same", "all")}
BOTH = "both"  # a map's KLs are the means of those on either set, which have as many tokens


def maps_of(measurement, work) -> dict:
    """Return the map from scores to KL that validation rows of each held-out set's data give, and that of both."""
    from bitladder.planning.prediction import KlMap
    from bitladder.planning.pricing import mean_scores, parts_by_format
    from bitladder.steps.data import validation_sets
    from bitladder.steps.kl_points import kl_point_schemes
    from bitladder.steps.simulated import kl_on

    schemes, kls = kl_point_schemes(measurement), {}
    sets = validation_sets(work, measurement.calibration)
    for held_out, data in zip(work.recipe.held_out, sets, strict=True):
        with kl_on(work, measurement, data) as kl:
            kls[held_out.name] = [kl(scheme) for scheme in schemes]
    kls[BOTH] = [sum(each) / len(each) for each in zip(*kls.values(), strict=True)]
    parts = [parts_by_format(measurement, scheme.formats) for scheme in schemes]
    return {name: KlMap.fit(mean_scores(measurement), parts, each) for name, each in kls.items()}


def plans_of(measurement, maps: dict) -> dict[tuple[str, str, float], object]:
    """Return a plan for each way to choose (`score`, or a map's name), set of formats and size."""
    from bitladder import planning
    from bitladder.recipe import SchemeSpec

    ways = {"score": None, **maps}
    plans: dict[tuple[str, str, float], object] = {}
    for way, kl_map in ways.items():
        for label, formats in SETS.items():
            for bits in BITS:
                spec = SchemeSpec(
                    name=f"plan{len(plans)}",
                    effective_bits=bits,
                    formats=formats,
                    chosen_by="score" if kl_map is None else "kl",
                )
                plans[way, label, bits] = planning.plan(measurement, spec, kl_map=kl_map)
    return plans


def compare(recipe: Path, scratch: Path, serve_on: str) -> dict:
    """Return the maps, and a row for each plan: how it was chosen, its bits, its KL, and that over the score's plan."""
    from bitladder.steps.workspace import Workspace

    measurement, work = mixes.measured(scratch, recipe, "gradient", serve_on, compensated=True)
    maps = maps_of(measurement, Workspace(predicted_mixes.with_validation(work.recipe), work.output))
    plans = plans_of(measurement, maps)
    kls = prediction.results_of(work, measurement, list(plans.values()), scratch / "chosen-by.json")
    rows = []
    for (way, label, bits), scheme in plans.items():
        kl, by_score = kls[scheme.fingerprint()], kls[plans["score", label, bits].fingerprint()]
        ratio = {split: value[0] / by_score[split][0] for split, value in kl.items()}
        row = {"chosen_by": way, "formats": label, "bits": bits, "effective_bits": scheme.effective_bits}
        rows.append({**row, "kl": kl, "over_score": ratio})
    said = ("weights", "shrinkage", "exponent")
    return {"maps": {name: {key: getattr(one, key) for key in said} for name, one in maps.items()}, "rows": rows}


def main() -> None:
    arguments = mixes.parser_of(__doc__, "chosen_by.json").parse_args()
    name, scratch = mixes.started(arguments)
    found = compare(arguments.recipe, scratch, arguments.serve_on)
    models = {**mixes.known_models(arguments.result), name: {**mixes.measured_here(), **found}}
    claim = "held-out KL of plans chosen by KL on validation rows over that of plans chosen by scores, at equal bits"
    mixes.record(arguments.result, claim, models)


if __name__ == "__main__":
    main()
