"""How well predicted scores say the KL of mixes of several formats, from 4.6 to 14 bits, with compensated codes.

    python benchmarks/predicted_mixes.py --scratch DIR                # writes benchmarks/results/predicted_mixes.json
    python benchmarks/predicted_mixes.py --scratch DIR --recipe recipes/demo.yaml

One measurement by `gradient` in seven formats, compensated. A map from scores to KL is fitted on the schemes that a run
with `max_kl` simulates; it predicts plans from {NVFP4, FP8} and from all formats at ten sizes, and control arms of some
of them. Everything is simulated on the scored calibration rows, on rows that calibration left of the same text, and on
the recipe's held-out sets. The map with a weight a format stands beside the one without. A GPU helps: some 230 s on an
H100 for SmolLM2, of which measuring takes 46, and minutes on two cores for the embedded model.
"""

import argparse
import contextlib
import json
import statistics
from pathlib import Path

import ladder
import mixes
import prediction

BITS = (4.6, 4.8, 5.4, 6.0, 7.0, 8.0, 9.0, 10.0, 12.0, 14.0)
WITH_ARMS = (5.4, 7.0, 10.0)
CALIBRATION = "calibration"


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


def rows_of(recipe: Path, scratch: Path, serve_on: str) -> list[dict]:
    """Return every scheme with its scores by format, and its KL on each set."""
    from bitladder.planning.pricing import scores_by_format
    from bitladder.steps.data import scored_calibration_data
    from bitladder.steps.simulated import kl_on

    measurement, work = mixes.measured(scratch, recipe, "gradient", serve_on, compensated=True)
    by_use, rows = schemes_of(measurement), {}
    with kl_on(work, measurement, scored_calibration_data(work, measurement)) as kl:
        for use, schemes in by_use.items():
            for scheme in schemes:
                one = {"use": use, "name": scheme.name, "effective_bits": scheme.effective_bits}
                scores = scores_by_format(measurement, scheme.formats)
                rows.setdefault(scheme.fingerprint(), {**one, "scores": scores, "kl": {CALIBRATION: kl(scheme)}})
    schemes = [scheme for all_ in by_use.values() for scheme in all_]
    held_out = prediction.results_of(work, measurement, schemes, scratch / "held-out.json")
    for fingerprint, row in rows.items():
        row["kl"] |= {split: value for split, (value, _) in held_out[fingerprint].items()}
    return list(rows.values())


def compared(rows: list[dict]) -> list[dict]:
    """Return how far off the predictions are: of each set, fitted on it or on calibration rows."""
    from bitladder.planning.prediction import KlMap

    fit, others = ([row for row in rows if (row["use"] == "fit") == fitted] for fitted in (True, False))
    found = []
    for split in rows[0]["kl"]:
        for source in dict.fromkeys((CALIBRATION, split)):
            for weights in (False, True):

                def parts(row: dict) -> dict[str, float]:
                    return row["scores"] if weights else {"all": sum(row["scores"].values())}  # noqa: B023

                kl_map = KlMap.fit([parts(row) for row in fit], [row["kl"][source] for row in fit])
                ratios = [kl_map.predict(parts(row)).value / row["kl"][split] for row in others]
                within = sum(abs(ratio - 1) <= prediction.WITHIN for ratio in ratios)
                found.append(
                    {
                        "fitted_on": source,
                        "set": split,
                        "weights": dict(kl_map.weights) if weights else None,
                        "exponent": kl_map.exponent,
                        "within": f"{within} of {len(ratios)}",
                        "least": min(ratios),
                        "median": statistics.median(ratios),
                        "most": max(ratios),
                    }
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=ladder.ROOT / "recipes/smollm2_135m.yaml")
    parser.add_argument("--serve-on", default="blackwell")
    arguments = parser.parse_args()

    import transformers

    from bitladder.runinfo import hardware, versions

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = ladder.ROOT / "benchmarks/results/predicted_mixes.json"
    known = json.loads(path.read_text()) if path.exists() else {"models": {}}
    name = f"{arguments.recipe.stem}, {arguments.serve_on}"
    rows = rows_of(arguments.recipe, arguments.scratch.resolve() / name.replace(", ", "-"), arguments.serve_on)
    results = compared(rows)
    for result in results:
        print(json.dumps(result), flush=True)
    known["claim"] = "a map with a weight a format says the KL of mixes within 15%"
    known["models"][name] = {"hardware": hardware(), "versions": versions(), "predicted": results, "schemes": rows}
    path.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
