"""Does refining a plan in context (`bitladder.refinement`) lower the held-out KL?

    python benchmarks/refine.py --scratch DIR            # writes benchmarks/results/refine.json; about an hour

The schemes of each real model's recipe are refined on the scored calibration samples, and simulated before and after on
held-out text. KL values that are known already are kept in the scratch directory.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import choice
import ladder
import prediction

EVALUATIONS, MARGINAL = 27, 6


def refine_all(recipe: Path, scratch: Path, wanted: list[str]) -> list[dict]:
    """Return one row for each scheme of a recipe that leaves a choice, and is wanted (empty: all are)."""
    from bitladder import planning
    from bitladder.evaluation.reference import Reference
    from bitladder.planning.refinement import refine
    from bitladder.records import BF16
    from bitladder.steps.data import calibration_data
    from bitladder.steps.simulated import simulation_of

    measurement, work = prediction.measurements(scratch, recipe)["gradient"]
    data = calibration_data(work)
    scored = dataclasses.replace(data, batches=data.batches[: len(measurement.score_weights)])
    cache = scratch / "in_context.json"
    known = json.loads(cache.read_text()) if cache.exists() else {}
    rows, schemes = [], planning.plan_all(measurement, work.recipe.scheme_specs())
    with Reference.compute(work.model_directory, scored) as reference:
        simulation = simulation_of(work, measurement, reference.device)

        def kl(scheme) -> float:
            key = json.dumps(sorted(scheme.quantised_groups()))
            if key not in known:
                known[key] = simulation.results([reference], scheme)[0].value
                cache.write_text(json.dumps(known))
            return known[key]

        found = [
            (scheme, refine(measurement, scheme, kl, evaluations=EVALUATIONS, marginal=MARGINAL))
            for scheme in schemes
            if BF16 in scheme.formats.values() and (not wanted or scheme.name in wanted)
        ]
    for scheme, refined in found:
        pair = [scheme, refined.scheme.model_copy(update={"name": f"{scheme.name}.refined"})]
        kls = prediction.simulate(work, measurement, pair, scratch / "simulated-refined.json")
        rows.append(
            {
                "scheme": scheme.name,
                "effective_bits": [one.effective_bits for one in pair],
                "kl_calibration": [refined.before, refined.after],
                "kl_held_out": [kls[one.name][0] for one in pair],
                "kl_held_out_standard_error": [kls[one.name][1] for one in pair],
                "evaluations": refined.evaluations,
                "swapped": len(refined.swapped),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument(
        "--recipes", nargs="+", default=list(choice.MODELS.values()), help="of those that choice.py names"
    )
    parser.add_argument("--schemes", nargs="*", default=[], help="of those recipes; default all")
    parser.add_argument("--result", type=Path, default=ladder.ROOT / "benchmarks/results/refine.json")
    arguments = parser.parse_args()

    import transformers

    from bitladder.runinfo import hardware, versions

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    known = json.loads(arguments.result.read_text())["models"] if arguments.result.exists() else {}
    content = {
        "claim": "held-out KL of schemes as planned from gradient scores, and refined in context",
        "evaluations": EVALUATIONS,
        "marginal": MARGINAL,
        "models": known,
    }
    for name, recipe in choice.MODELS.items():
        if recipe in arguments.recipes:
            scratch = arguments.scratch.resolve() / Path(recipe).stem
            rows = refine_all(ladder.ROOT / "recipes" / recipe, scratch, arguments.schemes)
            known[name] = {"hardware": hardware(), "versions": versions(), "schemes": rows}
    arguments.result.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
