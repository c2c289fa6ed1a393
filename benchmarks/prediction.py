"""How well predicted scores say a scheme's KL on real models: ModelOpt's gradient and kl_div scores.

    python benchmarks/prediction.py --scratch DIR [--model NAME]   # writes benchmarks/results/prediction.json

Minutes for the embedded model on two CPU cores, a minute for the others on an H200. Five schemes in FP8 with nearest
codes, planned from gradient scores, and all their control arms are simulated on the recipe's first held-out set. Then
each method's scores predict each one's KL from all the others (`bitladder.prediction`). The measurements, and every
simulation that is finished, are kept in the scratch directory, one for each model; a model that isn't named keeps its
results.
"""

import argparse
import json
import statistics
from pathlib import Path

import ladder

SMOLLM2 = ladder.ROOT / "recipes/smollm2_135m.yaml"
KL_SAMPLES = 8  # scored by kl_div, which takes a forward pass a group and batch
MODELS = {  # name -> recipe, and samples scored by kl_div
    "smollm2-135m-instruct": (SMOLLM2, KL_SAMPLES),
    "gemma-3-270m": (ladder.ROOT / "recipes/gemma3_270m.yaml", 32),
    "embedded-qwen2.5-vl": (ladder.ROOT / "recipes/demo.yaml", 96),
}
ENGINES = {"smollm2_135m": "modelopt", "gemma3_270m": "native", "demo": "modelopt"}  # who scores, by recipe
GRADIENT_SAMPLES = {"smollm2_135m": 16, "gemma3_270m": 8, "demo": None}  # scored by gradient; None: all
HELD_OUT_SAMPLES = {"gemma3_270m": 64}  # its KL varies more from row to row than its recipe's samples can settle
FORMATS = ("fp8",)
COVERAGES = (0.25, 0.5, 0.75, 1.0)
EFFECTIVE_BITS = 11.0
WITHIN = 0.15  # of the measured KL


def measurements(scratch: Path, path: Path = SMOLLM2, kl_samples: int = KL_SAMPLES) -> dict:
    """Return the measurement of a recipe's model by each of ModelOpt's methods, and the recipe's workspace.

    In float32 on a GPU too: the KL of one group of a small model is below BF16's own noise.
    """
    from bitladder.recipe import read_recipe
    from bitladder.steps.measure import measure
    from bitladder.steps.workspace import Workspace

    recipe = read_recipe(path)
    if path.stem in HELD_OUT_SAMPLES:
        first = recipe.held_out[0].model_copy(update={"samples": HELD_OUT_SAMPLES[path.stem]})
        recipe = recipe.model_copy(update={"held_out": (first, *recipe.held_out[1:])})
    found = {}
    for method, samples in (("gradient", GRADIENT_SAMPLES[path.stem]), ("kl_div", kl_samples)):
        changes = {"engine": ENGINES[path.stem], "method": method, "score_samples": samples, "dtype": "float32"}
        changes |= {"formats": FORMATS, "rounding": "nearest"}
        changed = recipe.measurement.model_copy(update=changes)
        work = Workspace(recipe.model_copy(update={"measurement": changed}), scratch / method)
        found[method] = (measure(work), work)
    return found


def results_of(work, measurement, schemes: list, cache: Path) -> dict[str, dict[str, list[float]]]:
    """Return each scheme's KL and its standard error on every held-out set: fingerprint -> set -> both."""
    from bitladder.runinfo import Meter
    from bitladder.steps.originals import Originals
    from bitladder.steps.simulated import simulation_of

    known = json.loads(cache.read_text()) if cache.exists() else {}
    missing = {scheme.fingerprint(): scheme for scheme in schemes if scheme.fingerprint() not in known}
    if missing:
        with Originals(work) as originals:
            references = originals.references(Meter())
            simulation = simulation_of(work, measurement, references[0].device)
            for fingerprint, scheme in missing.items():
                known[fingerprint] = {
                    result.split: [result.value, result.standard_error]
                    for result in simulation.results(references, scheme)
                    if result.metric == "kl"
                }
                cache.write_text(json.dumps(known))
                print(scheme.name, f"{scheme.effective_bits:.3f}", known[fingerprint], flush=True)
    return known


def simulate(work, measurement, schemes: list, cache: Path) -> dict[str, list[float]]:
    """Return the KL and its standard error of each scheme on the first held-out set, by name."""
    known = results_of(work, measurement, schemes, cache)
    split = work.recipe.held_out[0].name
    return {scheme.name: known[scheme.fingerprint()][split] for scheme in schemes}


def predicted(means: dict[str, float], parts: list, kls: list[float]) -> dict:
    """Return each point predicted from all the others, and how far off that is."""
    from bitladder.planning.prediction import LEVEL, KlMap, leave_one_out

    guesses = leave_one_out(means, parts, kls)
    errors = [abs(guess.value / kl - 1) for guess, kl in zip(guesses, kls, strict=True)]
    fitted = KlMap.fit(means, parts, kls)
    inside = [guess.low <= kl <= guess.high for guess, kl in zip(guesses, kls, strict=True)]
    return {
        "factor": fitted.factor,
        "exponent": fitted.exponent,
        "shrinkage": fitted.shrinkage,
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
        f"within_{WITHIN:.0%}": sum(error <= WITHIN for error in errors) / len(errors),
        f"inside_{LEVEL:.0%}_interval": sum(inside) / len(inside),
        "predicted": [guess.value for guess in guesses],
    }


def points_of(scratch: Path, recipe: Path, kl_samples: int) -> dict:
    """Return the schemes and arms of one model with their KL, and how well each method's scores say it."""
    from bitladder import planning
    from bitladder.planning.pricing import mean_scores, parts_by_format
    from bitladder.recipe import ControlSpec, SchemeSpec
    from bitladder.records import BF16
    from bitladder.runinfo import hardware, versions
    from bitladder.steps.known import control_arms

    found = measurements(scratch, recipe, kl_samples)
    measurement, work = found["gradient"]
    specs = [SchemeSpec(name=f"top{100 * share:g}", coverage=share) for share in COVERAGES]
    specs.append(SchemeSpec(name=f"{EFFECTIVE_BITS:g}bits", effective_bits=EFFECTIVE_BITS))
    schemes = planning.plan_all(measurement, specs)
    every = [*schemes, *control_arms(measurement, schemes, ControlSpec())]
    kls = simulate(work, measurement, every, scratch / "simulated.json")
    methods = {}
    for method, (scored, _) in found.items():
        table = scored.by_group()
        scores = [
            sum(scored.sensitivity(table[group][name]) for group, name in scheme.formats.items() if name != BF16)
            for scheme in every
        ]
        methods[method] = {
            "score_unit": scored.score_unit,
            "batches": len(scored.score_weights),
            "scores": scores,
            **predicted(
                mean_scores(scored),
                [parts_by_format(scored, scheme.formats) for scheme in every],
                [kls[scheme.name][0] for scheme in every],
            ),
        }
    return {
        "hardware": hardware(),
        "versions": versions(),
        "points": [
            {
                "name": scheme.name,
                "coverage": scheme.coverage,
                "kl": kls[scheme.name][0],
                "standard_error": kls[scheme.name][1],
            }
            for scheme in every
        ],
        "methods": methods,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, action="append", help="all where none is named")
    arguments = parser.parse_args()

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = ladder.ROOT / "benchmarks/results/prediction.json"
    models = json.loads(path.read_text())["models"] if path.exists() else {}
    for name in arguments.model or MODELS:
        models[name] = points_of(arguments.scratch.resolve() / name, *MODELS[name])
        for method, result in models[name]["methods"].items():
            print(name, method, {key: value for key, value in result.items() if not isinstance(value, list)})
    claim = "predicted scores say the held-out KL of schemes and control arms, each from all the others"
    path.write_text(json.dumps({"claim": claim, "models": models}, indent=1) + "\n")


if __name__ == "__main__":
    main()
