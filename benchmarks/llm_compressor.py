"""Held-out KL of llm-compressor's FP8 checkpoints beside ours, everything in FP8, from the same calibration tokens.

    python benchmarks/llm_compressor.py --python PYTHON --scratch DIR [--model NAME]
                                                        # writes benchmarks/results/llm_compressor.json

PYTHON is the interpreter of an environment with llm-compressor (`pip install llmcompressor`), in which nothing of ours
is needed; this script runs there as a child process. Its `oneshot` makes two checkpoints with the preset scheme FP8
(one static scale a tensor for weights and inputs, lm_head left alone), by QuantizationModifier (nearest) and by
GPTQModifier, with its own defaults, in float32 as ours. They are evaluated from their files in our arithmetic: weights
dequantised and inputs rounded with the scales that are stored. These scales differ within q/k/v and gate/up; vLLM gives
such modules the largest one and quantises again, so each checkpoint is also evaluated after that.

Ours are everything in FP8 with nearest and with compensated codes, on the very same rows of tokens. Held-out sets are
those of `quality.py`. What is finished is kept in the scratch directory; a model that isn't named keeps its results.
"""

import argparse
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
ROUNDINGS = ("nearest", "compensated")
MODIFIERS = ("QuantizationModifier", "GPTQModifier")
SCORE_SAMPLES = 4  # of ours: everything is quantised, so that no score matters
DONE = "made.json"  # what the child says of a checkpoint, beside the directory


def make_checkpoint(job: dict) -> dict:
    """Quantise by llm-compressor, in its own environment; returns what it took and its versions."""
    from importlib.metadata import version

    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    rows = json.loads(Path(job["rows"]).read_text())
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    modifier = {"QuantizationModifier": QuantizationModifier, "GPTQModifier": GPTQModifier}[job["modifier"]]
    start = time.perf_counter()
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32"),
        dataset=data,
        recipe=modifier(targets="Linear", scheme="FP8", ignore=["lm_head"]),
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        output_dir=job["output"],
    )
    packages = ("llmcompressor", "compressed-tensors", "torch", "transformers")
    return {"seconds": time.perf_counter() - start, "versions": {name: version(name) for name in packages}}


def checkpoints_of(recipe, python: Path, scratch: Path) -> dict[str, tuple[Path, dict]]:
    """Return llm-compressor's checkpoint by each modifier, and what the child said of it."""
    from bitladder.steps.data import calibration_data
    from bitladder.steps.workspace import Workspace

    work = Workspace(recipe, scratch / "recipe")
    data = calibration_data(work)
    rows = scratch / "rows.json"
    rows.write_text(json.dumps([row for batch in data.batches for row in batch.inputs["input_ids"].tolist()]))
    found = {}
    for modifier in MODIFIERS:
        directory = scratch / modifier
        done = directory.with_suffix(f".{DONE}")
        if not done.exists():
            shutil.rmtree(directory, ignore_errors=True)
            job = {"model": str(work.model_directory), "rows": str(rows), "modifier": modifier}
            job |= {"output": str(directory), "result": str(done)}
            environment = {"HF_HUB_OFFLINE": "1", **os.environ}
            environment.pop("PYTHONPATH", None)  # of this environment
            command = [str(python), __file__, "--job", json.dumps(job)]
            subprocess.run(command, check=True, env=environment)
        found[modifier] = (directory, json.loads(done.read_text()))
        print(modifier, found[modifier][1], flush=True)
    return found


def fused(measurement, directory: Path, output: Path) -> int:
    """Write the checkpoint as vLLM runs it, one scale within fused modules; returns how many groups had several.

    Source: vllm requantize_with_max_scale (model_executor/layers/quantization/utils/w8a8_utils.py).
    """
    import torch
    from safetensors.torch import save_file

    from bitladder.formats import grids
    from bitladder.models.weights import SINGLE_FILE, WeightFiles

    files = WeightFiles.open(directory)
    tensors = {name: files.load(name) for name in files.tensors}
    several = 0
    for group in measurement.groups:
        names = [module.tensor.removesuffix(".weight") for module in group.modules]
        for kind in ("weight_scale", "input_scale"):
            scales = [tensors[f"{name}.{kind}"] for name in names]
            largest = torch.stack(scales).amax(0)
            if kind == "weight_scale" and any(not torch.equal(scale, largest) for scale in scales):
                several += 1
                for name, scale in zip(names, scales, strict=True):
                    weight = grids.dequantise(tensors[f"{name}.weight"], scale)
                    tensors[f"{name}.weight"] = grids.quantise(weight, largest[0] * grids.E4M3_MAX)
            tensors |= {f"{name}.{kind}": largest.clone() for name in names}
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(directory, output, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, output / SINGLE_FILE, metadata={"format": "pt"})
    return several


def measured(recipe, scratch: Path) -> dict:
    """Return our measurement by each way of rounding, and its workspace."""
    from bitladder.steps.measure import measure
    from bitladder.steps.workspace import Workspace

    found = {}
    for rounding in ROUNDINGS:
        changes = {"engine": "native", "method": "gradient", "rounding": rounding, "dtype": "float32"}
        spec = recipe.measurement.model_copy(update={**changes, "score_samples": SCORE_SAMPLES})
        work = Workspace(recipe.model_copy(update={"measurement": spec}), scratch / rounding)
        found[rounding] = (measure(work), work)
    return found


def kl_of(results) -> dict:
    """Return the KL among a checkpoint's results."""
    (kl,) = (result for result in results if result.metric == "kl")
    return {"kl": kl.value, "standard_error": kl.standard_error, "samples": kl.samples, "noise_floor": kl.noise_floor}


def result_of(name: str, python: Path, scratch: Path) -> dict:
    """Return everything about one model."""
    import others_files
    import quality

    from bitladder.evaluation.evaluate import compare_loaded
    from bitladder.runinfo import Meter, hardware, versions
    from bitladder.steps.originals import Originals
    from bitladder.steps.simulated import simulation_of
    from bitladder.steps.workspace import Workspace

    recipe = quality.recipe_of(name)
    made = checkpoints_of(recipe, python, scratch)
    measurements = measured(recipe, scratch)
    nearest = measurements["nearest"][0]
    groups = tuple(group.name for group in nearest.groups)
    several, directories = {}, {}
    for modifier, (directory, _) in made.items():
        directories[modifier] = directory
        directories[f"{modifier}, fused"] = scratch / f"{modifier}-fused"
        several[modifier] = fused(nearest, directory, directories[f"{modifier}, fused"])
    cache = scratch / "kl.json"
    kls: dict = json.loads(cache.read_text()) if cache.exists() else {}

    def note(split: str, arm: str, results) -> None:
        kls[split][arm] = kl_of(results)
        cache.write_text(json.dumps(kls))
        print(f"{split:<10} {arm:<30} {1e3 * kls[split][arm]['kl']:.3f}e-3", flush=True)

    for held_out in recipe.held_out:  # one at a time: the original's outputs are gigabytes
        done = kls.setdefault(held_out.name, {})
        ours = {f"ours, {rounding}": both for rounding, both in measurements.items()}
        if not (ours.keys() | directories.keys()) - done.keys():
            continue
        work = Workspace(recipe.model_copy(update={"held_out": (held_out,)}), scratch / "nearest")
        with Originals(work) as originals:
            (reference,) = originals.references(Meter())
            for arm, (measurement, own) in ours.items():
                if arm not in done:
                    simulation = simulation_of(own, measurement, reference.device)
                    note(held_out.name, arm, simulation.results([reference], quality.scheme_of(measurement, groups)))
                    del simulation
            for arm, directory in directories.items():
                if arm in done:
                    continue
                model, formats = others_files.load(directory, {})
                if len(formats) != sum(len(group.modules) for group in nearest.groups):
                    raise SystemExit(f"{directory}: {len(formats)} modules are FP8, not all that we search")
                note(held_out.name, arm, compare_loaded(reference, model, str(directory), arm, answer=False))
    return {
        "hardware": hardware(),
        "versions": versions(),
        "calibration": {"samples": recipe.calibration.samples, "sequence_length": recipe.calibration.sequence_length},
        "llm_compressor": {modifier: said for modifier, (_, said) in made.items()},
        "quantization_config": json.loads((directories["GPTQModifier"] / "config.json").read_text())[
            "quantization_config"
        ],
        "groups_with_several_weight_scales": several,
        "groups": len(groups),
        "seconds_of_ours": {
            rounding: {phase.phase: phase.seconds for phase in measurement.run.phases}
            for rounding, (measurement, _) in measurements.items()
        },
        "kl": kls,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="interpreter of llm-compressor's environment")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--model", choices=MODELS, action="append", help="all where none is named")
    parser.add_argument("--job", help="internal: what the child process does")
    arguments = parser.parse_args()
    if arguments.job:
        job = json.loads(arguments.job)
        Path(job["result"]).write_text(json.dumps(make_checkpoint(job)))
        return
    if arguments.python is None or arguments.scratch is None:
        parser.error("--python and --scratch are needed")

    import ladder
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = ladder.ROOT / "benchmarks/results/llm_compressor.json"
    models = json.loads(path.read_text())["models"] if path.exists() else {}
    for name in arguments.model or MODELS:
        models[name] = result_of(name, arguments.python.absolute(), arguments.scratch.resolve() / name)
        claim = "held-out KL of llm-compressor's FP8 checkpoints and ours, everything in FP8, same calibration tokens"
        path.write_text(json.dumps({"claim": claim, "models": models}, indent=1) + "\n")


if __name__ == "__main__":
    main()
