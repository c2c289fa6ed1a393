"""Held-out KL of llm-compressor's and AutoRound's checkpoints beside ours, at no more stored bits.

    python benchmarks/others.py --python PYTHON --auto-round PYTHON --scratch DIR [--model NAME] [--checkpoint NAME]
                                                                   # writes benchmarks/results/others.json

Each PYTHON is the interpreter of an environment of its own, with llm-compressor (`pip install llmcompressor`) or with
AutoRound (`pip install auto-round compressed-tensors`); `others_child.py` runs there. They get the very rows of tokens
that ours are calibrated on: half a recipe's, and as many that the model writes itself. Their checkpoints are evaluated
from their files by our code (`others_files.py`), on the sets of `mixes.py`: what calibration left of its own text, and
another text. So are ours, with nearest and with compensated codes: planned by `fisher` with at most the bits of each
checkpoint, from formats of the same arithmetic and from all; and everything in NVFP4 of the model that `bitladder fold`
writes. Inputs are rounded as each file says (Blackwell), or stay in 16 bits beside NVFP4 weights (Hopper).

Hours on two CPU cores. What is finished is kept in the scratch directory; models and checkpoints that aren't named keep
their results.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ladder
import mixes

MODELS = {
    "smollm2-135m-instruct": "smollm2_135m.yaml",
    "embedded-qwen2.5-vl": "demo.yaml",
    "gemma-3-270m": "gemma3_270m.yaml",
}
HELD_OUT_SAMPLES = 8  # of each set of language models, of 256 tokens each: 32 take minutes on a busy core
TARGETS = ("hopper", "blackwell")  # whose arithmetic
INTEGERS = ("int4_w4a16_g64", "int8_w8a16_g64")
FORMATS = ("fp8_pc_pt", "nvfp4", "nvfp4_w4a16", *INTEGERS)
WEIGHTS_ONLY = ("nvfp4_w4a16", *INTEGERS)
FOLDED = ("nvfp4", "nvfp4_w4a16")  # formats of the folded model, everything in one of them
SCORE_SAMPLES = 4  # of a measurement whose schemes have one format, where no score matters
LLM_COMPRESSOR, AUTO_ROUND = "llm-compressor", "AutoRound"
INT_OPTIONS = ["W4A16G64", "W8A16G64"]
IMPORTANCE = "nvfp4_expanded_imatrix"  # llm-compressor's observer for NVFP4 that weighs errors by the inputs' squares


@dataclass(frozen=True)
class Checkpoint:
    """What a tool is asked for.

    tool: whose. asked: what its child process is told beside. beside: the formats of ours that multiply alike, by
    target.
    """

    tool: str
    asked: dict
    beside: dict[str, tuple[str, ...]]


NVFP4 = {"hopper": ("nvfp4_w4a16",), "blackwell": ("nvfp4",)}  # with inputs in 16 bits they multiply alike
INT = dict.fromkeys(TARGETS, WEIGHTS_ONLY)
CHECKPOINTS = {
    "nvfp4_gptq": Checkpoint(LLM_COMPRESSOR, {"preset": "NVFP4", "method": "gptq"}, NVFP4),
    "nvfp4_gptq_imatrix": Checkpoint(
        LLM_COMPRESSOR, {"preset": "NVFP4", "method": "gptq", "observer": IMPORTANCE}, NVFP4
    ),
    "nvfp4_awq": Checkpoint(LLM_COMPRESSOR, {"preset": "NVFP4", "method": "awq"}, NVFP4),
    "nvfp4_search": Checkpoint(AUTO_ROUND, {"scheme": "NVFP4"}, NVFP4),
    "int_mix_5": Checkpoint(AUTO_ROUND, {"average_bits": 5, "options": INT_OPTIONS}, INT),
    "int_mix_6": Checkpoint(AUTO_ROUND, {"average_bits": 6, "options": INT_OPTIONS}, INT),
    "int4_gptq": Checkpoint(LLM_COMPRESSOR, {"preset": "W4A16", "method": "gptq", "group_size": 64}, INT),
    "fp8_pc_pt_gptq": Checkpoint(
        LLM_COMPRESSOR, {"preset": "FP8_DYNAMIC", "method": "gptq"}, dict.fromkeys(TARGETS, ("fp8_pc_pt",))
    ),
}


def recipe_of(name: str):
    """Return the model's recipe with this benchmark's calibration, held-out sets and formats."""
    from bitladder.recipe import read_recipe

    recipe = mixes.with_near_text(read_recipe(ladder.ROOT / "recipes" / MODELS[name]))
    calibration, held_out = mixes.with_written_rows(recipe.calibration), recipe.held_out
    if held_out[0].task is None:
        held_out = tuple(one.model_copy(update={"samples": HELD_OUT_SAMPLES}) for one in held_out)
    else:  # pairs of pictures and text, padded where several are in a batch: pads would be calibrated on
        calibration = tuple(one.model_copy(update={"batch_size": 1}) for one in calibration)
    changed = {"engine": "native", "method": "fisher", "dtype": "float32", "formats": FORMATS, "score_samples": None}
    return recipe.model_copy(
        update={
            "calibration": calibration,
            "held_out": held_out,
            "measurement": recipe.measurement.model_copy(update=changed),
            "serve_on": "blackwell",
            "export": recipe.export.model_copy(update={"carrier": "compressed-tensors"}),
        }
    )


def workspace(recipe, output: Path):
    from bitladder.steps.workspace import Workspace

    output.mkdir(parents=True, exist_ok=True)
    return Workspace(recipe, output)


def make(name: str, work, interpreters: dict[str, Path], scratch: Path) -> dict:
    """Let a tool make a checkpoint, where it isn't there; returns what it took and its versions."""
    import torch

    from bitladder.steps.data import calibration_data

    one, directory, done = CHECKPOINTS[name], scratch / name, scratch / f"{name}.json"
    if not done.exists():
        batches = scratch / "batches.pt"
        torch.save([dict(batch.inputs) for batch in calibration_data(work).batches], batches)
        shutil.rmtree(directory, ignore_errors=True)
        job = {"tool": one.tool, "model": str(work.model_directory), "batches": str(batches), "output": str(directory)}
        job |= {"result": str(done), **one.asked}
        environment = {"HF_HUB_OFFLINE": "1", **os.environ}
        environment.pop("PYTHONPATH", None)  # of this environment
        child = Path(__file__).with_name("others_child.py")
        subprocess.run([str(interpreters[one.tool]), str(child), json.dumps(job)], check=True, env=environment)
    return json.loads(done.read_text())


class Judge:
    """The original's outputs on the held-out sets, and the KL to it of whatever is asked, each kept once known."""

    def __init__(self, work, cache: Path, references: Sequence = ()) -> None:
        """Take the originals' outputs that are at hand; none: they are computed on a CPU when they are needed."""
        self.work, self.cache = work, cache
        self.known: dict = json.loads(cache.read_text()) if cache.exists() else {}
        self.references = list(references)

    def kl(self, key: str, results_on) -> dict[str, list[float]]:
        """Return set -> KL and its standard error.

        Args:
            key: what it is kept by.
            results_on: what gives the results on all sets, from the references.
        """
        if key not in self.known:
            found = results_on(self._originals())
            self.known[key] = {one.split: [one.value, one.standard_error] for one in found if one.metric == "kl"}
            self.cache.write_text(json.dumps(self.known))
            print(key, self.known[key], flush=True)
        return self.known[key]

    def kl_of_model(self, key: str, origin: str, load) -> dict[str, list[float]]:
        """Return the same of a loaded model.

        Args:
            key: what it is kept by.
            origin: where it comes from, for errors.
            load: gives it; called where its KL isn't known.
        """
        from bitladder.evaluation.evaluate import compare_loaded

        def results(references):
            model = load()
            return [
                one for reference in references for one in compare_loaded(reference, model, origin, key, answer=False)
            ]

        return self.kl(key, results)

    def _originals(self) -> list:
        from bitladder.evaluation.reference import Reference
        from bitladder.steps.data import calibration_data, load_set

        if not self.references:
            seen = calibration_data(self.work).summary
            for spec in self.work.recipe.held_out:
                data = load_set(self.work, spec, self.work.recipe.data_of(spec), seen)
                self.references.append(Reference.compute(self.work.model_directory, data, split=spec.name))
        return self.references


def theirs(name: str, scratch: Path, judge: Judge) -> dict:
    """Return a checkpoint's formats, its stored bits and its KL in each target's arithmetic."""
    import others_files

    from bitladder.formats.targets import served
    from bitladder.models.weights import WeightFiles, read_config

    directory = next(path.parent for path in (scratch / name).rglob("config.json"))  # AutoRound adds a folder
    files = WeightFiles.open(directory)
    formats = others_files.formats_of(files, read_config(directory)["quantization_config"])
    used = sorted({one.name for one in formats.values()})
    kls = {}
    for target in TARGETS:
        arithmetic = served(used, target)

        def load(arithmetic=arithmetic):
            return others_files.load(directory, arithmetic)[0]

        kls[target] = judge.kl_of_model(f"{name} {arithmetic}", str(directory), load)
    count = {one: sum(format_.name == one for format_ in formats.values()) for one in used}
    return {"modules": count, "bits": others_files.stored_bits(files, formats), "kl": kls}


class Ours:
    """A measurement of ours, and the KL of its schemes."""

    def __init__(self, name: str, work, judge: Judge) -> None:
        from bitladder.steps.measure import measure

        self.name, self.work, self.judge = name, work, judge
        self.measurement = measure(work)
        self.simulation = None

    def beside(self, formats: tuple[str, ...], bits: float) -> dict | None:
        """Return our choice with at most so many bits and its KL; None: these formats take more."""
        from bitladder.errors import PlanError

        try:
            most = math.nextafter(bits, math.inf)  # rounded down, their own bits would not do for the same format
            scheme = mixes.planned(self.measurement, formats, f"{bits:g}", most)
        except PlanError:
            return None
        return {"effective_bits": scheme.effective_bits, "kl": self.kl(scheme)}

    def kl(self, scheme) -> dict[str, list[float]]:
        """Return the KL of a scheme, as its files would have it on Blackwell."""
        from bitladder.steps.simulated import simulation_of

        def results(references):
            if self.simulation is None:
                self.simulation = simulation_of(self.work, self.measurement, references[0].device)
            return self.simulation.results(references, scheme)

        return self.judge.kl(f"ours, {self.name} {sorted(scheme.formats.items())}", results)


def ours_of(recipe, scratch: Path, judge: Judge) -> Iterator[Ours]:
    """Yield our measurements: with compensated codes, with those for 16-bit inputs, folded, with nearest codes.

    Nothing folded where the model's norms cannot be.

    Raises:
        SystemExit: the folded model was calibrated on other rows than the rest.
    """
    from bitladder.data import generation
    from bitladder.errors import EngineError

    def of(one, name: str, **changed) -> Ours:
        spec = one.measurement.model_copy(update=changed)
        if not (scratch / name / "run.json").exists():
            shutil.rmtree(scratch / name, ignore_errors=True)  # nothing but rows, where a run was killed early
        work = workspace(one.model_copy(update={"measurement": spec}), scratch / name)
        if one is recipe:
            generation.copy_rows(scratch / "rows", work.output)
        return Ours(name, work, judge)

    made = of(recipe, "compensated", rounding="compensated")
    yield made
    # Where NVFP4 is measured too, NVFP4's weights alone have its codes, which are made for rounded inputs.
    yield of(recipe, "for_16_bit_inputs", rounding="compensated", formats=NVFP4["hopper"], score_samples=SCORE_SAMPLES)
    try:
        folded = mixes.of_folded_model(recipe, judge.work, scratch / "folded_model")
    except EngineError as error:
        print(f"folded: {error}", flush=True)
    else:
        other = of(folded, "folded", rounding="compensated", formats=FOLDED, score_samples=SCORE_SAMPLES)
        if made.measurement.calibration.sample_ids != other.measurement.calibration.sample_ids:
            raise SystemExit("the folded model wrote other rows than the original; they can't be compared")
        yield other
    yield of(recipe, "nearest", rounding="nearest")


def label_of(formats: tuple[str, ...]) -> str:
    return "all" if formats == FORMATS else "same arithmetic"


def fill(found: dict, name: str, interpreters: dict[str, Path], scratch: Path, wanted: list[str]) -> Iterator[None]:
    """Put what there is to say of a model's checkpoints into `found`, and yield whenever there is more of it.

    Args:
        found: checkpoint -> what is known of it; changed.
        name: of the model.
        interpreters: of each tool's environment.
        scratch: what is finished is kept there.
        wanted: names of checkpoints.
    """
    recipe = recipe_of(name)
    work = workspace(recipe, scratch / "rows")
    judge = Judge(work, scratch / "kl.json")
    for checkpoint in wanted:
        one, row = CHECKPOINTS[checkpoint], found.setdefault(checkpoint, {"ours": {}})
        made = make(checkpoint, work, interpreters, scratch)
        row |= {"tool": one.tool, "asked": one.asked, **made, **theirs(checkpoint, scratch, judge)}
        yield
    for ours in ours_of(recipe, scratch, judge):
        for checkpoint in wanted:
            row = found[checkpoint]
            for target in TARGETS:
                for formats in (CHECKPOINTS[checkpoint].beside[target], FORMATS):
                    if not set(formats) <= set(ours.measurement.formats):
                        continue
                    own = ours.beside(formats, row["bits"])
                    if own is None:
                        continue
                    ratio = {split: value[0] / row["kl"][target][split][0] for split, value in own["kl"].items()}
                    label = f"{target}, {label_of(formats)}, {ours.name}"
                    row["ours"][label] = {**own, "ratio": ratio}
            yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of llm-compressor's environment")
    parser.add_argument("--auto-round", type=Path, required=True, help="interpreter of AutoRound's environment")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, action="append", help="all where none is named")
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, action="append", help="all where none is named")
    arguments = parser.parse_args()

    import transformers

    from bitladder.runinfo import hardware, versions

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = ladder.ROOT / "benchmarks/results/others.json"
    models = json.loads(path.read_text())["models"] if path.exists() else {}
    interpreters = {LLM_COMPRESSOR: arguments.python, AUTO_ROUND: arguments.auto_round}
    claim = "held-out KL of other tools' checkpoints and of ours at no more stored bits, from the same calibration rows"
    for name in arguments.model or MODELS:
        found = models.get(name, {}).get("checkpoints", {})
        wanted = arguments.checkpoint or list(CHECKPOINTS)
        for _ in fill(found, name, interpreters, arguments.scratch.resolve() / name, wanted):
            ordered = {one: found[one] for one in CHECKPOINTS if one in found}
            models[name] = {"hardware": hardware(), "versions": versions(), "checkpoints": ordered}
            path.write_text(json.dumps({"claim": claim, "models": models}, indent=1) + "\n")


if __name__ == "__main__":
    main()
