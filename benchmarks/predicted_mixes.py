"""How well predicted scores say the KL of mixes of several formats, from 4.6 to 14 bits, with compensated codes.

    python benchmarks/predicted_mixes.py --scratch DIR                # writes benchmarks/results/predicted_mixes.json
    python benchmarks/predicted_mixes.py --scratch DIR --recipe recipes/demo.yaml

One measurement by `gradient` in seven formats, compensated. A map from scores to KL is fitted on the schemes that a run
with `max_kl` simulates, on the scored calibration rows and on validation rows: other rows of each held-out set's data.
It predicts plans from {NVFP4, FP8} and from all formats at ten sizes, and control arms of some of them, which are
simulated on the held-out sets; so no row that the map has seen judges it, but for the scored calibration rows on
themselves. The map stands beside those without weights of formats and without shrinkage. A GPU helps: minutes on an
H100 for SmolLM2, and on two cores for the embedded model.
"""

import contextlib
import json
import statistics
from pathlib import Path

import ladder
import mixes
import prediction

BITS = (4.6, 4.8, 5.4, 6.0, 7.0, 8.0, 9.0, 10.0, 12.0, 14.0)
WITH_ARMS = (5.4, 7.0, 10.0)
CALIBRATION, VALIDATION = "calibration", "{}, validation"


def schemes_of(measurement) -> dict[str, list]:
    """Return schemes by what they are for: `fit`, `plan`, `arm`."""
    from bitladder.errors import PlanError
    from bitladder.planning import controls
    from bitladder.steps.kl_points import kl_point_schemes

    found = {"fit": list(kl_point_schemes(measurement)), "plan": [], "arm": []}
    for formats in (mixes.THEIRS, measurement.formats):
        for bits in BITS:
            with contextlib.suppress(PlanError):  # below what the formats store
                scheme = mixes.planned(measurement, formats, f"plan{len(found['plan'])}", bits)
                found["plan"].append(scheme)
                if bits in WITH_ARMS:
                    found["arm"] += controls.arms(measurement, scheme, kinds=("random", "inverse"), seeds=2)
    return found


def with_validation(recipe):
    """Return a recipe with other rows of each held-out set's data for validation; of a small set half of each."""
    from bitladder.recipe import OtherRowsSpec

    held_out, validation = [], []
    for one in recipe.held_out:
        data = recipe.data_of(one)
        samples = one.samples // 2 if data.path and data.path.startswith(str(ladder.ROOT / "src")) else one.samples
        held_out.append(one.model_copy(update={"data": data, "samples": samples, "task": None}))
        shape = {key: getattr(one, key) for key in ("sequence_length", "batch_size")}
        validation.append(OtherRowsSpec(data=data, samples=samples, seed=one.seed + 1, **shape))
    return recipe.model_copy(update={"held_out": tuple(held_out), "validation": tuple(validation)})


def rows_of(recipe: Path, scratch: Path, serve_on: str) -> tuple[dict[str, float], list[dict]]:
    """Return mean scores by format, and every scheme with its scores and weights by format and its KL on each set."""
    from bitladder.planning.pricing import mean_scores, parts_by_format
    from bitladder.steps.data import scored_calibration_data, validation_sets
    from bitladder.steps.simulated import kl_on
    from bitladder.steps.workspace import Workspace

    measurement, work = mixes.measured(scratch, recipe, "gradient", serve_on, compensated=True)
    work = Workspace(with_validation(work.recipe), work.output)
    rows = {}
    for use, schemes in schemes_of(measurement).items():
        for scheme in schemes:
            parts = {name: part._asdict() for name, part in parts_by_format(measurement, scheme.formats).items()}
            one = {"use": use, "name": scheme.name, "effective_bits": scheme.effective_bits, "parts": parts, "kl": {}}
            rows.setdefault(scheme.fingerprint(), (scheme, one))
    sets = {CALIBRATION: scored_calibration_data(work, measurement)}
    names = [VALIDATION.format(one.name) for one in work.recipe.held_out]
    sets |= dict(zip(names, validation_sets(work, measurement.calibration), strict=True))
    for name, data in sets.items():
        with kl_on(work, measurement, data) as kl:
            for scheme, one in rows.values():
                one["kl"][name] = kl(scheme)
    schemes = [scheme for scheme, _ in rows.values()]
    held_out = prediction.results_of(work, measurement, schemes, scratch / "held-out.json")
    for fingerprint, (_, one) in rows.items():
        one["kl"] |= {split: value for split, (value, _) in held_out[fingerprint].items()}
    return mean_scores(measurement), [one for _, one in rows.values()]


def compared(means: dict[str, float], rows: list[dict]) -> list[dict]:
    """Return how far off the predictions are: of each set, fitted on calibration rows or on validation rows like it."""
    from bitladder.planning.prediction import KlMap
    from bitladder.planning.pricing import InFormat

    def full(row: dict) -> dict:
        return {name: InFormat(**part) for name, part in row["parts"].items()}

    def even(row: dict) -> dict:  # each scores what as many weights do, so that there is nothing to shrink to
        return {
            name: InFormat(part["score"], part["score"] / means[name] if means[name] else 0)
            for name, part in row["parts"].items()
        }

    def summed(row: dict) -> dict:
        total = sum(part["score"] for part in row["parts"].values())
        return {"all": InFormat(total, total)}

    ways = {"one factor": (summed, {"all": 1.0}), "weights": (even, means), "weights and shrinkage": (full, means)}
    fit, others = ([row for row in rows if (row["use"] == "fit") == fitted] for fitted in (True, False))
    held_out = [name for name in rows[0]["kl"] if VALIDATION.format(name) in rows[0]["kl"]]
    pairs = [(CALIBRATION, CALIBRATION)]
    pairs += [(source, name) for name in held_out for source in (CALIBRATION, VALIDATION.format(name))]
    found = []
    for source, judge in pairs:
        for way, (parts, of_format) in ways.items():
            kl_map = KlMap.fit(of_format, [parts(row) for row in fit], [row["kl"][source] for row in fit])
            guesses = [kl_map.predict(parts(row)) for row in others]
            kls = [row["kl"][judge] for row in others]
            ratios = [guess.value / kl for guess, kl in zip(guesses, kls, strict=True)]
            within = sum(abs(ratio - 1) <= prediction.WITHIN for ratio in ratios)
            inside = sum(guess.low <= kl <= guess.high for guess, kl in zip(guesses, kls, strict=True))
            found.append(
                {
                    "fitted_on": source,
                    "judged_on": judge,
                    "map": way,
                    "weights": dict(kl_map.weights),
                    "shrinkage": kl_map.shrinkage,
                    "exponent": kl_map.exponent,
                    "within": f"{within} of {len(ratios)}",
                    "inside_interval": f"{inside} of {len(ratios)}",
                    "least": min(ratios),
                    "median": statistics.median(ratios),
                    "most": max(ratios),
                }
            )
    return found


def main() -> None:
    arguments = mixes.parser_of(__doc__, "predicted_mixes.json").parse_args()
    name, scratch = mixes.started(arguments)
    means, rows = rows_of(arguments.recipe, scratch, arguments.serve_on)
    results = compared(means, rows)
    for result in results:
        print(json.dumps(result), flush=True)
    found = {**mixes.measured_here(), "predicted": results, "mean_scores": means, "schemes": rows}
    models = {**mixes.known_models(arguments.result), name: found}
    mixes.record(arguments.result, "a map fitted on validation rows says the KL of mixes within 15%", models)


if __name__ == "__main__":
    main()
