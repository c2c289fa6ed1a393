"""Held-out KL at equal effective bits: nearest and compensated codes, and the choices of ModelOpt's two methods.

    python benchmarks/quality.py --scratch DIR [--model NAME] [--calibration mixed]    # writes results/quality.json

ModelOpt calibrates, scores and chooses by itself (`choice.py`), once by each of its methods, and rounds to nearest;
bits are counted over the searched weights. We measure twice by `engine: native`, method kl_div, on the same calibration
samples: with nearest and with compensated codes. For each of ModelOpt's choices there is ours with at most its bits.
Everything is simulated with the scales that an export would have, on held-out sets: for SmolLM2 and Gemma a novel, of a
kind that calibration never saw, and captions that it didn't see; for the embedded model those of its recipe. What is
finished is kept in the scratch directory; a model that isn't named keeps its results. A GPU helps.

`--calibration mixed` adds rows that the model writes itself to the recipe's calibration, for ModelOpt and for us; the
held-out samples stay the same. Its results stand beside the others', under `models_mixed_calibration`.
"""

import argparse
import json
import statistics
from pathlib import Path, PurePath

import choice
import ladder
import prediction

BITS = ("9", "10", "11", "12", "13", "14")  # asked of ModelOpt; 8 is everything, where there is no choice
SCORE_SAMPLES = 8  # by each method of either tool
MODELS = {
    "smollm2-135m-instruct": ("smollm2_135m.yaml", SCORE_SAMPLES),
    "gemma-3-270m": ("gemma3_270m.yaml", SCORE_SAMPLES),
    "embedded-qwen2.5-vl": ("demo.yaml", 96),
}
HELD_OUT_SAMPLES = {"smollm2-135m-instruct": 16, "gemma-3-270m": 16}  # of each set
ROUNDINGS = ("nearest", "compensated")
RESULTS = {"captions": "models", "mixed": "models_mixed_calibration"}  # calibration -> key of the results
WRITTEN_ROWS = 64  # by the model itself, of as many tokens as the recipe's calibration has, where calibration is mixed


def recipe_of(name: str, calibration: str):
    """Return the model's recipe with the calibration and the held-out sets of this benchmark."""
    from bitladder.recipe import DataSpec, HeldOutSpec, read_recipe

    recipe = read_recipe(ladder.ROOT / "recipes" / MODELS[name][0])
    (captions,) = recipe.calibration
    if calibration == "mixed":
        written = captions.model_copy(update={"data": DataSpec(kind="generated"), "samples": WRITTEN_ROWS})
        recipe = recipe.model_copy(update={"calibration": (captions, written)})
    if name == "embedded-qwen2.5-vl":
        return recipe
    novel = recipe.held_out[0].model_copy(update={"name": "novel", "samples": HELD_OUT_SAMPLES[name]})
    seen = HeldOutSpec(
        name="captions",
        data=captions.data,
        samples=novel.samples,
        sequence_length=novel.sequence_length,
        batch_size=novel.batch_size,
    )
    return recipe.model_copy(update={"held_out": (novel, seen)})


def measured(recipe, scratch: Path, score_samples: int) -> dict:
    """Return, for each way of rounding, the measurement and its workspace; all are calibrated on the same batches."""
    from bitladder.data import generation
    from bitladder.steps.measure import measure
    from bitladder.steps.workspace import Workspace

    found: dict = {}
    for rounding in ROUNDINGS:
        spec = recipe.measurement.model_copy(
            update={
                "engine": "native",
                "method": "kl_div",
                "rounding": rounding,
                "score_samples": score_samples,
                "dtype": "float32",  # as ModelOpt here; the KL of one group is below BF16's own noise
            }
        )
        work = Workspace(recipe.model_copy(update={"measurement": spec}), scratch / rounding)
        for _, first in found.values():  # a GPU needn't write the same rows again
            generation.copy_rows(first.output, work.output)
        found[rounding] = (measure(work), work)
        assert found[rounding][0].calibration == found[ROUNDINGS[0]][0].calibration
        print(rounding, [(p.phase, p.seconds) for p in found[rounding][0].run.phases], flush=True)
    return found


def modelopt_choices(measurement, work, scratch: Path) -> dict[str, dict[str, list[str]]]:
    """Return the groups that ModelOpt quantises, by method and bits asked, on the measurement's calibration batches."""
    from bitladder.steps.data import calibration_data

    assert calibration_data(work).summary == measurement.calibration
    found = {}
    for method in ("gradient", "kl_div"):
        path = scratch / f"modelopt-{method}.json"
        if not path.exists():
            path.write_text(json.dumps(choice.modelopt_choices(work, measurement, method, count_all=False)))
        found[method] = json.loads(path.read_text())
    return found


def scheme_of(measurement, groups: tuple[str, ...]):
    """Return the scheme that quantises these groups."""
    from bitladder import planning
    from bitladder.recipe import SchemeSpec
    from bitladder.records import BF16

    formats = {group.name: "fp8" if group.name in groups else BF16 for group in measurement.groups}
    return planning.price(measurement, "choice", formats, SchemeSpec(name="choice", include=("*",), format="fp8"))


def planned(measurement, bits: float) -> tuple[str, ...]:
    """Return the groups that we quantise within so many effective bits."""
    from bitladder import planning
    from bitladder.recipe import SchemeSpec

    return tuple(sorted(planning.plan(measurement, SchemeSpec(name="ours", effective_bits=bits)).quantised_groups()))


def rows_of(found: dict, theirs: dict[str, dict[str, list[str]]], scratch: Path) -> list[dict]:
    """Return one row for each of ModelOpt's choices, and one for everything in FP8."""
    nearest, compensated = (found[rounding][0] for rounding in ROUNDINGS)
    everything = tuple(sorted(group.name for group in nearest.groups))
    cases = [(method, bits, tuple(sorted(theirs[method][bits]))) for method in theirs for bits in BITS]
    cases = [("all", "8", everything)] + [case for case in cases if case[2] and case[2] != everything]
    rows = []
    for method, bits, groups in cases:
        budget = scheme_of(nearest, groups).effective_bits
        arms = {
            "modelopt": ("nearest", scheme_of(nearest, groups)),
            "nearest": ("nearest", scheme_of(nearest, planned(nearest, budget))),
            "compensated": ("compensated", scheme_of(compensated, planned(compensated, budget))),
            "compensated, planned from scores of nearest codes": (
                "compensated",
                scheme_of(compensated, planned(nearest, budget)),
            ),
        }
        rows.append({"method": method, "bits_asked": bits, "effective_bits": budget, "arms": arms})
    kls = {}
    for rounding, (measurement, work) in found.items():
        schemes = [scheme for row in rows for used, scheme in row["arms"].values() if used == rounding]
        kls |= prediction.results_of(work, measurement, schemes, scratch / f"simulated-{rounding}.json")
    for row in rows:
        row["kl"] = {arm: kls[scheme.fingerprint()] for arm, (_, scheme) in row.pop("arms").items()}
    return rows


def summary(rows: list[dict]) -> dict:
    """Return, for each held-out set and arm, the geometric mean of its KL over that of ModelOpt's choice."""
    arms = [arm for arm in rows[0]["kl"] if arm != "modelopt"]
    found: dict = {}
    for split in rows[0]["kl"]["modelopt"]:
        for arm in arms:
            for method in ("gradient", "kl_div"):
                ratios = [
                    row["kl"][arm][split][0] / row["kl"]["modelopt"][split][0]
                    for row in rows
                    if row["method"] in (method, "all")
                ]
                entry = {**choice.geometric_mean(ratios), "largest": max(ratios), "points": len(ratios)}
                found.setdefault(split, {}).setdefault(arm, {})[method] = entry
    return found


def result_of(name: str, calibration: str, scratch: Path) -> dict:
    """Return everything about one model by one calibration."""
    from bitladder.report.groups import rank_correlation
    from bitladder.runinfo import hardware, versions

    recipe = recipe_of(name, calibration)
    found = measured(recipe, scratch, MODELS[name][1])
    theirs = modelopt_choices(*found["nearest"], scratch)
    rows = rows_of(found, theirs, scratch)
    scores = [[m.sensitivity(candidate) for candidate in m.candidates] for m, _ in found.values()]
    rounding, data = found["compensated"][0].rounding, found["compensated"][0].calibration
    return {
        "hardware": hardware(),
        "versions": versions(),
        "calibration": {
            "samples": rounding.samples,
            "damping": rounding.damping,
            "sets": [
                {
                    "source": PurePath(part.source).name,
                    "kind": part.kind,
                    "samples": part.samples,
                    "tokens": part.tokens,
                }
                for part in data.parts or (data,)
            ],
        },
        "phases": {name: [p.model_dump() for p in m.run.phases] for name, (m, _) in found.items()},
        "median_output_error": statistics.median(m.output_error for m in rounding.modules),
        "median_nearest_output_error": statistics.median(m.nearest_output_error for m in rounding.modules),
        "rank_correlation_of_scores": rank_correlation(*scores),
        "sum_of_scores_over_nearest": sum(scores[1]) / sum(scores[0]),
        "over_modelopt": summary(rows),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, action="append", help="all where none is named")
    parser.add_argument("--calibration", choices=RESULTS, default="captions", help="mixed: and rows of the model's own")
    parser.add_argument("--result", type=Path, default=ladder.ROOT / "benchmarks/results/quality.json")
    arguments = parser.parse_args()

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = arguments.result
    claim = "held-out KL of nearest and compensated codes over that of ModelOpt's choices at equal effective bits"
    content = json.loads(path.read_text()) if path.exists() else {"claim": claim}
    models = content.setdefault(RESULTS[arguments.calibration], {})
    for name in arguments.model or MODELS:
        scratch = arguments.scratch.resolve() / (name if arguments.calibration == "captions" else f"{name}-mixed")
        models[name] = result_of(name, arguments.calibration, scratch)
        print(json.dumps(models[name]["over_modelopt"], indent=1))
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
