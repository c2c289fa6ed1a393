"""Whose choice of groups does less damage at equal effective bits: Bitladder's, or that of ModelOpt's own two methods?

    python benchmarks/choice.py --scratch DIR            # writes benchmarks/results/choice.json; about 40 minutes

On each real model, and for each of ModelOpt's methods (`gradient`, `kl_div`): ModelOpt calibrates and scores once
with its own `auto_quantize`, and its own solver chooses at 9 to 15 effective bits. Bitladder plans from its own
measurement by the same method, on the same samples, with at most the bits that ModelOpt's choice has. All choices are
simulated on held-out text with the same codes and scales (nearest rounding, fused scales shared), so that nothing but
the choice differs. ModelOpt counts modules that are not searched among the bits asked for, so its choices have fewer
over the searched weights; where it quantises everything there is no choice to compare, and the row counts for nothing.
What is finished is kept in the scratch directory.
"""

import argparse
import json
import math
import random
import statistics
from pathlib import Path

import ladder
import prediction

BITS = (9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0)
MODELS = {
    "SmolLM2-135M-Instruct": "smollm2_135m.yaml",
    "Gemma 3 270M": "gemma3_270m.yaml",
    "embedded Qwen2.5-VL (3.7M)": "demo.yaml",
}
ONLY_SEARCHED = ("Gemma 3 270M",)  # its head is most of it: no target below 13 bits could be met with the head counted
DRAWS, LEVEL = 10_000, 0.9  # of the bootstrap over models and bits


def modelopt_choices(work, measurement, method: str, count_all: bool = True) -> dict[str, list[str]]:
    """Return the groups that ModelOpt's own solver quantises, by bits asked, from its own scores.

    With `count_all` false it is told to leave modules that aren't searched out of its count of bits.
    """
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.quantization.algorithms import QuantRecipe, _resolve_best_recipe

    from bitladder.device import resolve_device
    from bitladder.models.loading import load_model
    from bitladder.steps.data import calibration_data

    data, device = calibration_data(work), resolve_device(work.recipe.measurement.device)
    searched = {module.name: group.name for group in measurement.groups for module in group.modules}
    model = load_model(work.model_directory, torch.float32, device)
    model.config.use_cache = False

    left_alone = [name for name, _ in model.named_modules() if name and name not in searched]
    cost = {} if count_all else {"cost": {"excluded_module_name_patterns": left_alone}}

    def forward(loaded, batch):
        if method == "gradient":
            return loaded(**batch.inputs, labels=batch.labels)
        return loaded(**batch.inputs).logits[:, :-1][batch.predicted]

    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": 12.0, **cost},
        quantization_formats=[mtq.FP8_DEFAULT_CFG],
        data_loader=[batch.to(device) for batch in data.batches],
        forward_step=forward,
        loss_func=(lambda output, _: output.loss) if method == "gradient" else None,
        num_calib_steps=len(data.batches),
        num_score_steps=len(measurement.score_weights),
        method=method,
        disabled_layers=left_alone,
        verbose=False,
    )
    nothing = QuantRecipe(quant_cfg=None)
    stats = {
        name: {searched[module] for module in stat["module_names"] if module in searched}
        for name, stat in state["candidate_stats"].items()
    }
    assert sorted(group for groups in stats.values() for group in groups) == sorted(set(searched.values()))
    found = {}
    for bits in BITS:
        best = _resolve_best_recipe(state, {"effective_bits": bits, **cost})
        found[f"{bits:g}"] = sorted(
            group for name, recipe in best.items() if recipe != nothing for group in stats[name]
        )
    return found


def pair_of(measurement, method: str, bits: str, chosen: list[str]) -> tuple:
    """Return ModelOpt's choice as a scheme of our measurement, and ours with at most its bits."""
    from bitladder import planning
    from bitladder.recipe import SchemeSpec
    from bitladder.records import BF16

    formats = {group.name: "fp8" if group.name in chosen else BF16 for group in measurement.groups}
    name = f"modelopt-{method}-{bits}"
    theirs = planning.price(measurement, name, formats, SchemeSpec(name=name, effective_bits=float(bits)))
    spec = SchemeSpec(name=f"bitladder-{method}-{bits}", effective_bits=theirs.effective_bits)
    return theirs, planning.plan(measurement, spec)


def geometric_mean(ratios: list[float]) -> dict:
    """Return the geometric mean of ratios and its bootstrap interval."""
    logs, pick = [math.log(ratio) for ratio in ratios], random.Random(0)
    draws = sorted(statistics.fmean(pick.choices(logs, k=len(logs))) for _ in range(DRAWS))
    edge = (1 - LEVEL) / 2
    low, high = draws[int(edge * DRAWS)], draws[int((1 - edge) * DRAWS) - 1]
    return {"geometric_mean": math.exp(statistics.fmean(logs)), "low": math.exp(low), "high": math.exp(high)}


def compare(name: str, recipe: Path, scratch: Path) -> list[dict]:
    """Return one row for each method and bits: bits and held-out KL of both choices."""
    from bitladder.records import BF16

    rows = []
    for method, (measurement, work) in prediction.measurements(scratch, recipe).items():
        path = scratch / f"modelopt-{method}.json"
        if not path.exists():
            count_all = name not in ONLY_SEARCHED
            path.write_text(json.dumps(modelopt_choices(work, measurement, method, count_all)))
        pairs = [
            (bits, *pair_of(measurement, method, bits, chosen))
            for bits, chosen in json.loads(path.read_text()).items()
            if chosen
        ]
        schemes = [scheme for _, *both in pairs for scheme in both]
        kls = prediction.simulate(work, measurement, schemes, scratch / f"simulated-{method}.json")
        for bits, theirs, ours in pairs:
            (our_kl, our_error), (their_kl, their_error) = kls[ours.name], kls[theirs.name]
            rows.append(
                {
                    "model": name,
                    "method": method,
                    "bits_asked": float(bits),
                    "bits_modelopt": theirs.effective_bits,
                    "bits_bitladder": ours.effective_bits,
                    "is_choice": BF16 in theirs.formats.values(),
                    "kl_modelopt": their_kl,
                    "kl_modelopt_standard_error": their_error,
                    "kl_bitladder": our_kl,
                    "kl_bitladder_standard_error": our_error,
                    "ratio": our_kl / their_kl,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, action="append", help="all where none is named; others keep theirs")
    parser.add_argument("--result", type=Path, default=ladder.ROOT / "benchmarks/results/choice.json")
    arguments = parser.parse_args()

    import transformers

    from bitladder.runinfo import hardware, versions

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    known = json.loads(arguments.result.read_text()) if arguments.result.exists() else {"rows": [], "measured": {}}
    wanted = arguments.model or list(MODELS)
    rows = [row for row in known["rows"] if row["model"] not in wanted]
    for name in wanted:
        scratch = arguments.scratch.resolve() / Path(MODELS[name]).stem
        rows += compare(name, ladder.ROOT / "recipes" / MODELS[name], scratch)
    content = {
        "claim": "held-out KL of Bitladder's choice of groups over that of ModelOpt's, at equal effective bits",
        "measured": {
            **known["measured"],
            **{name: {"hardware": hardware(), "versions": versions()} for name in wanted},
        },
        "ours_over_theirs": {
            name: {
                method: geometric_mean(
                    [r["ratio"] for r in rows if (r["model"], r["method"]) == (name, method) and r["is_choice"]]
                )
                for method in ("gradient", "kl_div")
            }
            for name in MODELS
            if any(row["model"] == name for row in rows)
        },
        "rows": rows,
    }
    arguments.result.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content["ours_over_theirs"], indent=1))


if __name__ == "__main__":
    main()
