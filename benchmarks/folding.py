"""What folding norms is worth: held-out KL of everything in one format, of the model as it is and folded.

    python benchmarks/folding.py --scratch DIR [--model NAME]      # writes benchmarks/results/folding.json

Either model is measured with nearest and with compensated codes, calibrated as `mixes.py` does it: on half the recipe's
rows, and as many that the model writes itself, which both models do alike, since they compute the same. Inputs are
rounded as each format says (Blackwell's arithmetic); with 16-bit inputs `nvfp4_w4a16` is what Hopper makes of `nvfp4`.
What is finished is kept in the scratch directory; a model that isn't named keeps its results.
"""

import argparse
import json
from pathlib import Path

import ladder
import mixes
import prediction

MODELS = {
    "smollm2-135m-instruct": "smollm2_135m.yaml",
    "gemma-3-270m": "gemma3_270m.yaml",
    "embedded-qwen2.5-vl": "demo.yaml",
}
HELD_OUT_SAMPLES = 8  # of each set of language models, of 256 tokens each
FORMATS = ("nvfp4", "nvfp4_w4a16", "int4_w4a16_g64", "fp8")
ROUNDINGS = ("nearest", "compensated")
SCORE_SAMPLES = 4  # everything is quantised, so that no score matters


def recipe_of(name: str):
    """Return the model's recipe with this benchmark's calibration, held-out sets and formats."""
    from bitladder.recipe import read_recipe

    recipe = mixes.with_near_text(read_recipe(ladder.ROOT / "recipes" / MODELS[name]))
    held_out = recipe.held_out
    if held_out[0].task is None:
        held_out = tuple(one.model_copy(update={"samples": HELD_OUT_SAMPLES}) for one in held_out)
    changed = {"engine": "native", "method": "fisher", "dtype": "float32", "formats": FORMATS}
    spec = recipe.measurement.model_copy(update={**changed, "score_samples": SCORE_SAMPLES})
    return recipe.model_copy(
        update={
            "calibration": mixes.with_written_rows(recipe.calibration),
            "held_out": held_out,
            "measurement": spec,
            "serve_on": "blackwell",
            "export": recipe.export.model_copy(update={"carrier": "compressed-tensors"}),
        }
    )


def result_of(name: str, scratch: Path) -> dict:
    """Return everything about one model: arm -> rounding -> format -> held-out set -> KL and its standard error."""
    from bitladder.data import generation
    from bitladder.runinfo import hardware, versions
    from bitladder.steps.measure import measure
    from bitladder.steps.workspace import Workspace

    recipe = recipe_of(name)
    folded = mixes.of_folded_model(recipe, Workspace(recipe, scratch / "fold"), scratch / "model")
    kls: dict = {}
    seen = []
    written = {"as it is": [scratch / "fold"], "folded": []}
    for arm, one in (("as it is", recipe), ("folded", folded)):
        for rounding in ROUNDINGS:
            spec = one.measurement.model_copy(update={"rounding": rounding})
            output = scratch / f"{arm.replace(' ', '-')}-{rounding}"
            output.mkdir(parents=True, exist_ok=True)
            work = Workspace(one.model_copy(update={"measurement": spec}), output)
            for other in written[arm]:  # the same model's, which needn't be written again
                generation.copy_rows(other, output)
            written[arm].append(output)
            measurement = measure(work)
            seen.append(measurement.calibration.sample_ids)
            schemes = mixes.in_each_format(measurement)
            found = prediction.results_of(work, measurement, list(schemes.values()), output / "simulated.json")
            kls.setdefault(arm, {})[rounding] = mixes.uniform_rows(schemes, found)
            print(arm, rounding, json.dumps(kls[arm][rounding]), flush=True)
    assert all(one == seen[0] for one in seen)
    return {"hardware": hardware(), "versions": versions(), "kl": kls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, action="append", help="all where none is named")
    arguments = parser.parse_args()

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = ladder.ROOT / "benchmarks/results/folding.json"
    models = json.loads(path.read_text())["models"] if path.exists() else {}
    for name in arguments.model or MODELS:
        models[name] = result_of(name, arguments.scratch.resolve() / name)
        claim = "held-out KL of everything in one format, of a model as it is and with its norms folded"
        path.write_text(json.dumps({"claim": claim, "models": models}, indent=1) + "\n")


if __name__ == "__main__":
    main()
