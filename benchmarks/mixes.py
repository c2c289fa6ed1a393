"""Mixes of several formats at equal effective bits: Bitladder's choice against that of ModelOpt's AutoQuantize.

    python benchmarks/mixes.py --scratch DIR             # writes benchmarks/results/mixes.json; needs an NVIDIA GPU
    python benchmarks/mixes.py --scratch DIR --serve-on hopper --recipe recipes/gemma3_270m.yaml
    python benchmarks/mixes.py --scratch DIR --compensated                          # adds to what is there
    python benchmarks/mixes.py --scratch DIR --compensated --folded                 # the same on the folded model
    python benchmarks/mixes.py --scratch DIR --no-modelopt --recipe recipes/demo.yaml    # minutes on a CPU

ModelOpt calibrates and scores {NVFP4, FP8} with its own `auto_quantize` by each of its methods, and its own solver
chooses at 4.8 to 9 effective bits, modules that aren't searched left out of its count. Bitladder measures once by
`kl_div` and once by `gradient`, on the same samples, in all its formats; it plans with at most the bits of ModelOpt's
choice, from the same formats and from others. All choices are simulated with the same scales and nearest codes, inputs
rounded as each format says on the device that will serve; KL on held-out text, in nats per token. Beside it the
frontier from 4.5 to 16 bits of each set of formats, by `kl_div`: predicted (the sum of single-group KL on calibration
text) and measured on text that calibration left; and everything in each format. What is finished is kept in the scratch
directory. A model with held-out sets of several kinds is measured on these, and not on text that calibration left.

`--compensated` measures once more, by `gradient` with compensated codes, calibrated on half the recipe's rows and as
many that the model writes itself, and adds to the rows of an earlier run our choices with these codes at no more bits,
the frontier and everything in each format with these codes. `--folded` does that with the model that `bitladder fold`
writes, which computes the same. `--no-modelopt` leaves out ModelOpt's choices and ours at their bits: its NVFP4 needs a
GPU.
"""

import argparse
import contextlib
import json
from pathlib import Path

import ladder
import prediction

BITS = (4.8, 5.4, 6.0, 7.0, 8.0, 9.0)
THEIRS = ("fp8", "nvfp4")
FLOATS = ("fp8", "fp8_pc_pt", "mxfp8", "nvfp4", "nvfp4_w4a16")
INTEGERS = ("int8_w8a16_g64", "int4_w4a16_g64")  # in groups of 64, of which all of these models' rows are made
SETS = {
    "same": THEIRS,
    "fp8_pc_pt + nvfp4_w4a16": ("fp8_pc_pt", "nvfp4_w4a16"),
    "all": FLOATS,
    "all + integers": FLOATS + INTEGERS,
}
FRONTIER = (4.5, 4.8, 5.4, 6.0, 7.0, 8.0, 9.0, 10.0, 12.0, 14.0, 16.0)
FRONTIER_SETS = {"fp8": ("fp8",), **SETS}
METHODS = ("kl_div", "gradient")
KL_TOKENS = 4096


def kl_samples(recipe) -> int:
    """Return how many of a recipe's calibration samples are scored by `kl_div`."""
    return min(recipe.calibration[0].samples, KL_TOKENS // recipe.calibration[0].sequence_length)


def measured(
    scratch: Path, recipe: Path, method: str, serve_on: str, *, compensated: bool = False, folded: bool = False
) -> tuple:
    """Return (measurement in all formats, its workspace)."""
    from bitladder.recipe import read_recipe
    from bitladder.steps.measure import measure
    from bitladder.steps.workspace import Workspace

    output = scratch / ("-".join(["compensated"] + ["folded"] * folded) if compensated else method)
    spec = with_near_text(read_recipe(recipe))
    if folded:
        written = spec.model_copy(update={"calibration": with_written_rows(spec.calibration)})
        spec = of_folded_model(spec, Workspace(written, scratch / "fold"), scratch / "model")
    changed = {"method": method, "formats": SETS["all + integers"], "engine": "native", "dtype": "float32"}
    changed |= {"score_samples": kl_samples(spec)} if method == "kl_div" else {}
    changed |= {"rounding": "compensated"} if compensated else {}
    asked = spec.measurement.model_copy(update=changed)
    carrier = spec.export.model_copy(update={"carrier": "compressed-tensors"})  # which alone holds integers
    recipe_now = {"measurement": asked, "output": str(output), "serve_on": serve_on}
    if compensated:
        recipe_now["calibration"] = with_written_rows(spec.calibration)
    work = Workspace(spec.model_copy(update={**recipe_now, "export": carrier}), output)
    output.mkdir(parents=True, exist_ok=True)
    return measure(work), work


def with_near_text(recipe):
    """Return a recipe with what calibration leaves of its own text as a held-out set beside its only one."""
    if len(recipe.held_out) > 1:
        return recipe
    near = recipe.held_out[0].model_copy(update={"name": "near", "data": None})
    return recipe.model_copy(update={"held_out": (near, *recipe.held_out)})


def with_written_rows(calibration: tuple) -> tuple:
    """Return half of a recipe's calibration, and as many rows that the model writes itself."""
    from bitladder.recipe import DataSpec

    (one,) = calibration
    half = one.model_copy(update={"samples": one.samples // 2})
    return half, half.model_copy(update={"data": DataSpec(kind="generated")})


def of_folded_model(recipe, work, directory: Path):
    """Return the recipe for the model that `bitladder fold` makes of a workspace's, in a directory, once."""
    from bitladder.steps.fold import fold

    if not directory.exists():
        fold(work, directory)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(directory)})})


def limited(measurement, formats: tuple[str, ...]):
    """Return the measurement as if only these formats had been scored."""
    candidates = tuple(one for one in measurement.candidates if one.format in formats)
    return measurement.model_copy(update={"candidates": candidates, "formats": formats})


def planned(measurement, formats: tuple[str, ...], name: str, bits: float):
    """Return the choice among some formats with at most so many bits, as a scheme of the whole measurement."""
    from bitladder import planning
    from bitladder.recipe import SchemeSpec

    spec = SchemeSpec(name=name, effective_bits=bits)
    return planning.price(measurement, name, planning.plan(limited(measurement, formats), spec).formats, spec)


def modelopt_choices(work, measurement, method: str) -> dict[str, dict[str, str]]:
    """Return what ModelOpt's own solver chooses from its own scores: bits asked -> group -> format."""
    from bitladder.formats import get_format

    presets = {name: get_format(name).modelopt_quantisation() for name in THEIRS}
    _, choice_at = auto_quantized(work, measurement, method, presets, BITS[-1])
    return {f"{bits:g}": choice_at(bits) for bits in BITS}


def auto_quantized(
    work, measurement, method: str, presets: dict[str, dict], bits: float, checkpoint: Path | None = None
) -> tuple:
    """Return the model that ModelOpt's `auto_quantize` gives at so many bits, and a function of what it would choose.

    Args:
        work: whose calibration data it takes, all of it.
        measurement: of whose groups.
        method: of ModelOpt.
        presets: what the formats between which it chooses are called here -> its configuration.
        bits: asked, over the modules that are searched.
        checkpoint: where its calibration and its scores are kept, and taken from where they are.

    Returns:
        The model in float32, and `choice_at(bits)`, which gives `{group: format}`.
    """
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.quantization.algorithms import QuantRecipe, _resolve_best_recipe

    from bitladder.device import resolve_device
    from bitladder.models.loading import load_model
    from bitladder.records import BF16
    from bitladder.steps.data import calibration_data

    data, device = calibration_data(work), resolve_device(work.recipe.measurement.device)
    searched = {module.name: group.name for group in measurement.groups for module in group.modules}
    model = load_model(work.model_directory, torch.float32, device)
    model.config.use_cache = False
    left_alone = [name for name, _ in model.named_modules() if name and name not in searched]
    cost = {"cost": {"excluded_module_name_patterns": left_alone}}

    def forward(loaded, batch):
        if method == "gradient":
            return loaded(**batch.inputs, labels=batch.labels)
        return loaded(**batch.inputs).logits[:, :-1][batch.predicted]

    scored = kl_samples(work.recipe) // len(data.batches[0].labels) if method == "kl_div" else len(data.batches)
    model, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": bits, **cost},
        quantization_formats=list(presets.values()),
        data_loader=[batch.to(device) for batch in data.batches],
        forward_step=forward,
        loss_func=(lambda output, _: output.loss) if method == "gradient" else None,
        num_calib_steps=len(data.batches),
        num_score_steps=scored,
        method=method,
        disabled_layers=left_alone,
        verbose=False,
        checkpoint=None if checkpoint is None else str(checkpoint),
    )
    names = [(QuantRecipe(quant_cfg=preset, name=name), name) for name, preset in presets.items()]
    names.append((QuantRecipe(quant_cfg=None), BF16))

    def choice_at(bits: float) -> dict[str, str]:
        formats = {}
        for stat, recipe in _resolve_best_recipe(state, {"effective_bits": bits, **cost}).items():
            chosen = next(name for known, name in names if known == recipe)
            formats |= {searched[m]: chosen for m in state["candidate_stats"][stat]["module_names"] if m in searched}
        assert set(formats) == set(searched.values())
        return formats

    return model, choice_at


def frontier(measurement) -> dict[tuple[str, float], object]:
    """Return the best choice by our scores in each set of formats at each of `FRONTIER` bits that it can have."""
    from bitladder.errors import PlanError

    found = {}
    for label, formats in FRONTIER_SETS.items():
        for bits in FRONTIER:
            with contextlib.suppress(PlanError):  # below what the formats store
                found[label, bits] = planned(measurement, formats, f"frontier{len(found)}", bits)
    return found


def frontier_rows(best: dict[tuple[str, float], object], kls: dict) -> list[dict]:
    """Return the KL of what `frontier` gave."""
    return [
        {
            "formats": label,
            "bits": bits,
            "effective_bits": scheme.effective_bits,
            "predicted": scheme.predicted_score,  # in the unit of the scores
            "kl": kls[scheme.fingerprint()],
        }
        for (label, bits), scheme in best.items()
    ]


def in_each_format(measurement) -> dict:
    """Return a scheme of everything in one format for each that all groups can have."""
    from bitladder import planning
    from bitladder.recipe import SchemeSpec

    return {
        name: planning.plan(measurement, SchemeSpec(name=name, coverage=1.0, format=name))
        for name in measurement.formats
    }


def uniform_rows(schemes: dict, kls: dict) -> dict:
    """Return the KL of what `in_each_format` gave."""
    return {
        name: {"effective_bits": scheme.effective_bits, "kl": kls[scheme.fingerprint()]}
        for name, scheme in schemes.items()
    }


def compare(recipe: Path, scratch: Path, serve_on: str, *, modelopt: bool) -> dict:
    """Return one row for each of ModelOpt's methods and bits: the held-out KL of its choice and of ours.

    Beside them the frontier of each set of formats, and everything in each format.
    """
    from bitladder import planning
    from bitladder.recipe import SchemeSpec

    found = {method: measured(scratch, recipe, method, serve_on) for method in METHODS}
    measurement, work = found["kl_div"]
    theirs = {}
    for method in METHODS if modelopt else ():
        path = scratch / f"modelopt-{method}.json"
        if not path.exists():
            path.write_text(json.dumps(modelopt_choices(work, measurement, method)))
        theirs[method] = json.loads(path.read_text())
    rows: list[dict] = []
    schemes = {}
    for method, choices in theirs.items():
        for bits, formats in choices.items():
            name = f"modelopt-{method}-{bits}"
            spec = SchemeSpec(name=name, effective_bits=float(bits))
            schemes[name] = planning.price(measurement, name, formats, spec)
            row = {"modelopt": method, "bits": float(bits), "effective_bits": schemes[name].effective_bits}
            for label, chosen in SETS.items():
                for ours in METHODS:
                    plan = planned(found[ours][0], chosen, f"plan{len(schemes)}", row["effective_bits"])
                    schemes[f"{label}, {ours} {name}"] = planning.price(
                        measurement, plan.name, plan.formats, plan.asked
                    )
            rows.append(row)
    best, uniform = frontier(measurement), in_each_format(measurement)
    everything = [*schemes.values(), *best.values(), *uniform.values()]
    kls = prediction.results_of(work, measurement, everything, scratch / "simulated.json")
    for row in rows:
        name = f"modelopt-{row['modelopt']}-{row['bits']:g}"
        row["kl"] = kls[schemes[name].fingerprint()]
        for key, scheme in schemes.items():
            if key.endswith(f" {name}"):
                label = key.removesuffix(f" {name}")
                result = kls[scheme.fingerprint()]
                row[label] = {"effective_bits": scheme.effective_bits, "kl": result}
                row[label]["ratio"] = {split: value[0] / row["kl"][split][0] for split, value in result.items()}
        print(json.dumps(row), flush=True)
    return {"rows": rows, "frontier": frontier_rows(best, kls), "uniform_nearest": uniform_rows(uniform, kls)}


def add_compensated(rows: list[dict], recipe: Path, scratch: Path, serve_on: str, *, folded: bool) -> dict:
    """Add our choices with compensated codes to the rows; return the frontier and each format with these codes."""
    measurement, work = measured(scratch, recipe, "gradient", serve_on, compensated=True, folded=folded)
    schemes = {
        (number, label): planned(measurement, chosen, f"plan{number}-{at}", row["effective_bits"])
        for number, row in enumerate(rows)
        for at, (label, chosen) in enumerate(SETS.items())
    }
    best, uniform = frontier(measurement), in_each_format(measurement)
    everything = [*schemes.values(), *best.values(), *uniform.values()]
    how = "compensated, folded" if folded else "compensated"
    kls = prediction.results_of(work, measurement, everything, scratch / f"simulated-{how.replace(', ', '-')}.json")
    for (number, label), scheme in schemes.items():
        result, row = kls[scheme.fingerprint()], rows[number]
        ratio = {split: value[0] / row["kl"][split][0] for split, value in result.items()}
        row[f"{label}, {how}"] = {"effective_bits": scheme.effective_bits, "kl": result, "ratio": ratio}
    found = {"uniform": uniform_rows(uniform, kls), "compensated_frontier": frontier_rows(best, kls)}
    return {f"{key}_folded" if folded else key: value for key, value in found.items()}


def parser_of(document: str | None, result: str) -> argparse.ArgumentParser:
    """Return a parser of what a benchmark of one model on one device is told; `result` names its file of results."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=ladder.ROOT / "recipes/smollm2_135m.yaml")
    parser.add_argument(
        "--serve-on", default="blackwell", help="whose arithmetic; blackwell: formats as they are stored"
    )
    parser.add_argument("--result", type=Path, default=ladder.ROOT / "benchmarks/results" / result)
    return parser


def started(arguments: argparse.Namespace) -> tuple[str, Path]:
    """Return what model and device are called in the results, and their own scratch directory; transformers is told
    to be quiet."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = f"{arguments.recipe.stem}, {arguments.serve_on}"
    return name, arguments.scratch.resolve() / name.replace(", ", "-")


def known_models(result: Path) -> dict:
    """Return what a file of results has: model and device -> what was found."""
    return json.loads(result.read_text())["models"] if result.exists() else {}


def measured_here() -> dict:
    """Return what says where numbers come from."""
    from bitladder.runinfo import hardware, versions

    return {"hardware": hardware(), "versions": versions()}


def record(result: Path, claim: str, models: dict) -> None:
    """Write a file of results."""
    result.write_text(json.dumps({"claim": claim, "models": models}, indent=1) + "\n")


def main() -> None:
    parser = parser_of(__doc__, "mixes.json")
    parser.add_argument("--compensated", action="store_true", help="add compensated codes to what is known")
    parser.add_argument("--folded", action="store_true", help="with --compensated: the model with its norms folded")
    parser.add_argument("--no-modelopt", action="store_true", help="leave out what only it chooses")
    arguments = parser.parse_args()
    if arguments.folded and not arguments.compensated:
        parser.error("--folded goes with --compensated")
    name, scratch = started(arguments)
    models = known_models(arguments.result)
    if arguments.compensated:
        one = models[name]
        folded = arguments.folded
        one |= add_compensated(one["rows"], arguments.recipe, scratch, arguments.serve_on, folded=folded)
        one["compensated_folded_on" if folded else "compensated_on"] = measured_here()
    else:
        found = compare(arguments.recipe, scratch, arguments.serve_on, modelopt=not arguments.no_modelopt)
        models[name] = {**measured_here(), **found}
    record(arguments.result, "held-out KL of mixes at equal effective bits, ours and ModelOpt's", models)


if __name__ == "__main__":
    main()
