"""Measuring with the native engine against ModelOpt's, step by step: calibration, gradient scores, KL scores, memory.

    python benchmarks/full_size.py build DIR                  # Qwen2.5-VL-3B at full size, random weights
    python benchmarks/scoring.py run --model DIR              # writes benchmarks/results/scoring.json
    python benchmarks/scoring.py growth --model DIR           # adds 9 and 18 layers, and fewer groups, to it
    python benchmarks/scoring.py run --model DIR --sizes 8x512 --parts FORMATS --out RESULTS/scoring_formats.json

For every size (rows × tokens of a batch of real captions) each engine and method is a process of its own, so that its
peak memory is its own. A step's time is that between two calls of the engine's progress, the GPU waited for (ours waits
itself, while the next batch is on its way); the first of several is left out, and ours leaves out the last, most of
which came before. Both engines are called through `bitladder.sensitivity.measure`, which gives ModelOpt the same
arithmetic and data and spares it the backward pass of the vision tower. A part's name is engine-method, and maybe how:
`compiled` compiles the layers, however few the batches, `NNgroups` does so too and searches only as many, the first of
every layer, `NNgb` limits the GPU memory, so that what doesn't fit runs again, and weights that don't fit are streamed,
`float32` is the arithmetic (and shows what BF16's rounding adds to a score), `fp8+nvfp4` the formats, all of FP8 else;
`FORMATS` stands for the parts that compare several formats with one. Nothing is compiled in the other parts, as
for as few batches by itself. `plain` is the model alone: a forward pass, and one with the backward pass by activations.
ModelOpt's CUDA extension is compiled before, and its time stated apart. The result is written after every process, so
that a killed run keeps what it has.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import full_size
import ladder

RESULT = full_size.RESULTS / "scoring.json"
SIZES = "8x512,1x512,4x2048"
BATCHES = 6  # to calibrate; gradient scores all of them
KL_BATCHES = 4  # ModelOpt runs the whole model 145 times for each
PLAIN_STEPS = 6
DTYPE = "bfloat16"
PARTS = (
    "plain",
    "native-gradient",
    "modelopt-gradient",
    "native-gradient-compiled",
    "native-fisher",
    "native-fisher-compiled",
    "native-kl_div",
    "native-kl_div-compiled",
    "modelopt-kl_div",
)
THREE = "fp8+nvfp4+nvfp4_w4a16"
FORMAT_PARTS = (
    "plain",
    "native-fisher-compiled",
    f"native-fisher-compiled-{THREE}",
    "native-gradient-compiled-fp8+nvfp4",
    "modelopt-gradient-fp8+nvfp4",
    f"native-fisher-{THREE}",
    "native-kl_div-compiled",
    "native-kl_div-compiled-fp8+nvfp4",
)
DEPTHS = (9, 18)  # decoder layers beside the model's own 36
GROUPS = (36, 72)  # of 144, at 36 layers
GROWTH_SIZE, GROWTH_PARTS = "8x512", ("native-gradient-compiled", "native-kl_div-compiled")


def parse_size(size: str) -> dict:
    """Return the settings of a data set whose batches have `rows`x`tokens`."""
    rows, tokens = (int(part) for part in size.split("x"))
    return {"samples": BATCHES * rows, "sequence_length": tokens, "batch_size": rows, "seed": 0}


def synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock:
    """When each phase of a measurement had done how many batches; called as its progress.

    Our engine says that a batch is scored once its scores are there, and the next one is on its way by then; with
    ModelOpt, and while calibrating, the GPU is waited for.
    """

    def __init__(self, engine: str) -> None:
        self.start, self.engine = time.perf_counter(), engine
        self.times: dict[str, dict[int, float]] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        if (self.engine, phase) != ("native", "score"):
            synchronise()
        self.times.setdefault(phase, {})[done] = time.perf_counter() - self.start

    def steps(self, phase: str) -> list[float]:
        """Return the seconds of each batch."""
        times = [self.times[phase][done] for done in sorted(self.times[phase])]
        return [after - before for before, after in itertools.pairwise(times)]


def step_seconds(steps: list[float], overlapping: bool = False) -> float | None:
    """Return the median without the first step, which warms up; None: there are too few.

    Where the next batch is on its way before a step ends, the last step is left out too: most of it came before.
    """
    steps = steps[1:-1] if overlapping else steps[1:]
    return statistics.median(steps) if steps else None


def measure(model: Path, scratch: Path, size: str, engine: str, method: str, *hows: str) -> dict:
    """Measure once; return the seconds of each step, the peak memory, and every group's scores."""
    from bitladder.formats import FORMATS
    from bitladder.measuring import gradient, kl
    from bitladder.measuring.measure import measure as measure_now
    from bitladder.models import weights
    from bitladder.models.target import find_target
    from bitladder.recipe import MeasureSpec

    named = [one for one in hows if set(one.split("+")) <= set(FORMATS)]
    formats = tuple(named[0].split("+")) if named else ("fp8",)
    how = next((one for one in hows if one not in named), "")
    is_compiled = how == "compiled" or how.endswith("groups")
    gradient._COMPILED_FROM = kl._COMPILED_FROM = 0 if is_compiled else 10**9
    limit = float(how.removesuffix("gb")) if how.endswith("gb") else None

    settings = parse_size(size)
    data = full_size.text_of(model, scratch, settings)
    source = weights.model_source(model, path=str(model), revision=None, cache=weights.DigestCache())
    target = find_target(model)
    if how.endswith("groups"):
        target = with_groups(target, int(how.removesuffix("groups")))
    scored = settings["batch_size"] * (KL_BATCHES if method == "kl_div" else BATCHES)
    dtype = how if how == "float32" else DTYPE
    spec = MeasureSpec(
        engine=engine, method=method, dtype=dtype, score_samples=scored, memory_gb=limit, formats=formats
    )
    clock = Clock(engine)
    measurement = measure_now(model, source, target, data, spec, scratch, clock)
    assert measurement.run is not None
    return {
        "calibration_step_seconds": step_seconds(clock.steps("calibrate")),
        "scoring_step_seconds": step_seconds(clock.steps("score"), overlapping=engine == "native"),
        "scoring_seconds_a_batch": sum(clock.steps("score")) / (scored / settings["batch_size"]),
        "calibration_steps": clock.steps("calibrate"),
        "scoring_steps": clock.steps("score"),
        "first_score_seconds": clock.times["score"][min(done for done in clock.times["score"] if done)],
        "peak_gpu_bytes": max(phase.peak_gpu_bytes or 0 for phase in measurement.run.phases),
        "phases": [phase.model_dump() for phase in measurement.run.phases],
        "scores": {
            one.group if len(formats) == 1 else f"{one.group} {one.format}": measurement.sensitivity(one)
            for one in measurement.candidates
        },
    }


def with_groups(target, count: int):
    """Return the target with only `count` of its groups, the first ones of every layer."""
    from bitladder.measuring.calls import by_layer

    layers = by_layer(target.groups).values()
    chosen = [group for groups in layers for group in groups[: count // len(layers)]]
    return dataclasses.replace(target, groups=tuple(chosen))


def plain(model: Path, scratch: Path, size: str) -> dict:
    """Time the model alone: forward, and forward with the backward pass by activations (no gradient of a weight)."""
    import torch

    from bitladder.device import resolve_device
    from bitladder.models.loading import load_model

    device = resolve_device("auto")
    batch = full_size.text_of(model, scratch, parse_size(size)).batches[0].to(device)
    loaded = load_model(model, getattr(torch, DTYPE), device)
    loaded.requires_grad_(False)

    def forward() -> None:
        with torch.no_grad():
            loaded(**batch.inputs, use_cache=False)

    def forward_backward() -> None:
        loaded(**batch.inputs, labels=batch.labels, use_cache=False).loss.backward()

    found: dict = {"forward_seconds": timed(forward)}
    loaded.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    try:
        found["forward_backward_seconds"] = timed(forward_backward)
    except torch.OutOfMemoryError:  # every layer's activations at once
        found["forward_backward_seconds"] = None
    found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return found


def timed(step: Callable[[], None]) -> float:
    """Return the median seconds of a step."""
    steps = []
    for _ in range(PLAIN_STEPS):
        start = time.perf_counter()
        step()
        synchronise()
        steps.append(time.perf_counter() - start)
    return step_seconds(steps)


def over(top: float | None, bottom: float | None) -> float | None:
    """Return the ratio, or None where one of the two is missing."""
    return top / bottom if top and bottom else None


def ratios(parts: dict[str, dict]) -> dict[str, float | None]:
    """Return what the claims are about, of the parts that there are."""

    def get(part: str, key: str) -> float | None:
        return parts.get(part, {}).get(key)

    step, first, calibration = "scoring_step_seconds", "first_score_seconds", "calibration_step_seconds"
    found = {}
    for how in ("", "-compiled"):
        ours, fisher, kl = (f"native-{method}{how}" for method in ("gradient", "fisher", "kl_div"))
        found |= {
            f"gradient_speedup{how}": over(get("modelopt-gradient", step), get(ours, step)),
            f"gradient_over_forward_backward{how}": over(get(ours, step), get("plain", "forward_backward_seconds")),
            f"gradient_memory{how}": over(get(ours, "peak_gpu_bytes"), get("modelopt-gradient", "peak_gpu_bytes")),
            f"first_score_speedup{how}": over(get("modelopt-gradient", first), get(ours, first)),
            f"fisher_over_gradient{how}": over(get(fisher, step), get(ours, step)),
            f"kl_speedup{how}": over(get("modelopt-kl_div", step), get(kl, step)),
            f"kl_speedup_of_fisher{how}": over(get("modelopt-kl_div", step), get(fisher, step)),
        }
        for method in ("gradient", "kl_div"):
            theirs = parts.get(f"modelopt-{method}", {})
            found |= agreement(f"{method}{how}", parts.get(f"native-{method}{how}", {}), theirs)
    ours, theirs = "native-gradient", "modelopt-gradient"
    found |= {
        "calibration_speedup": over(get(theirs, calibration), get(ours, calibration)),
        "calibration_over_forward": over(get(ours, calibration), get("plain", "forward_seconds")),
    }
    for part in (part for part in parts if "+" in part and part.startswith("native")):
        one, method = part.rpartition("-")[0], part.split("-")[1]
        theirs = f"modelopt-{method}-{part.rpartition('-')[2]}"
        found |= {
            f"{part}_over_forward_backward": over(get(part, step), get("plain", "forward_backward_seconds")),
            f"{part}_over_one_format": over(get(part, step), get(one, step)),
            f"{part}_memory_over_one_format": over(get(part, "peak_gpu_bytes"), get(one, "peak_gpu_bytes")),
            f"{part}_speedup": over(get(theirs, step), get(part, step)),
            **agreement(part, parts[part], parts.get(theirs, {})),
        }
    exact = parts.get("native-kl_div-float32", {})
    for part in ("native-kl_div", "native-kl_div-compiled", "modelopt-kl_div"):
        found |= agreement(f"{part}_over_float32", parts.get(part, {}), exact)
    scores = parts.get(ours, {}).get("scores")
    for how in ("12gb", "5gb"):
        other = parts.get(f"{ours}-{how}", {}).get("scores")
        if scores and other:
            found[f"gradient_largest_change_in_{how}"] = max(abs(other[g] / scores[g] - 1) for g in scores)
    return {name: value for name, value in found.items() if value is not None}


def agreement(method: str, ours: dict, theirs: dict) -> dict[str, float]:
    """Return how the groups' scores compare, where both engines have scored."""
    from bitladder.report.groups import rank_correlation

    if "scores" not in ours or "scores" not in theirs:
        return {}
    quotients = [ours["scores"][group] / score for group, score in theirs["scores"].items()]
    return {
        f"{method}_least_quotient": min(quotients),
        f"{method}_median_quotient": statistics.median(quotients),
        f"{method}_largest_quotient": max(quotients),
        f"{method}_spearman": rank_correlation(
            [ours["scores"][group] for group in theirs["scores"]], list(theirs["scores"].values())
        ),
    }


def child(part: str, model: Path, scratch: Path, size: str) -> dict:
    """Run one part in a process of its own; a failure is written down, and the other parts go on."""
    try:
        found = ladder.child(part, "--model", str(model), "--size", size, "--scratch", str(scratch), script=__file__)
    except SystemExit as error:
        return {"error": str(error)[-1000:]}
    return found


def describe(model: Path) -> str:
    """Return one line on the model of `full_size.py`."""
    config = json.loads((model / "config.json").read_text())
    text = config["text_config"]
    return f"{config['architectures'][0]}, {text['num_hidden_layers']} layers of {text['hidden_size']}, random weights"


def run(model: Path, sizes: list[str], parts: list[str], out: Path) -> None:
    """Run every part at every size, and write the result after each."""
    from bitladder.runinfo import hardware, versions

    content: dict = {
        "claim": "measuring with engine native against ModelOpt's engine, the same batches and arithmetic",
        "model": describe(model),
        "hardware": hardware(),
        "versions": versions(),
        "batches": {"calibrated": BATCHES, "scored by gradient": BATCHES, "scored by kl_div": KL_BATCHES},
    }
    known = json.loads(out.read_text()) if out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="scoring-", dir=model.parent) as scratch:
        compiled = child("compile", model, Path(scratch), sizes[0])  # or loaded, where that was done before
        content["modelopt_extension"] = known.get("modelopt_extension", compiled)
        content["sizes"] = {size: found for size, found in known.get("sizes", {}).items() if size not in sizes}
        content |= {"growth": known["growth"]} if "growth" in known else {}
        for size in sizes:
            found: dict[str, dict] = {}
            for part in parts:
                directory = Path(scratch) / size / part
                directory.mkdir(parents=True)
                found[part] = child(part, model, directory, size)
                content["sizes"][size] = {"hardware": hardware(), "ratios": ratios(found), **found}
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(content, indent=1) + "\n")
                shown = {key: value for key, value in found[part].items() if key not in ("scores", "phases")}
                print(f"{size} {part}: {json.dumps(shown)}", flush=True)
            print(f"{size}: {json.dumps(content['sizes'][size]['ratios'])}", flush=True)


def grow(model: Path, parts: list[str], out: Path) -> None:
    """Add the seconds of a step at other numbers of layers, and of groups, to the result."""
    content = json.loads(out.read_text())
    whole = json.loads((model / "config.json").read_text())["text_config"]["num_hidden_layers"]
    known = content["sizes"].get(GROWTH_SIZE, {})
    kept = ("scoring_step_seconds", "calibration_step_seconds", "peak_gpu_bytes", "error")
    content["growth"] = growth = {"size": GROWTH_SIZE, "layers": {}, "groups": {}}

    def add(kind: str, number: int, found: dict[str, dict]) -> None:
        rows = {part: {key: entry[key] for key in kept if key in entry} for part, entry in found.items()}
        growth[kind][str(number)] = rows
        out.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{number} {kind}: { {part: row.get('scoring_step_seconds') for part, row in rows.items()} }", flush=True)

    add("layers", whole, {part: known[part] for part in parts if part in known})
    with tempfile.TemporaryDirectory(prefix="scoring-", dir=model.parent) as scratch:

        def run_all(directory: Path, chosen: list[str]) -> dict[str, dict]:
            found = {}
            for part in chosen:
                place = Path(scratch) / "runs" / directory.name / part
                place.mkdir(parents=True)
                found[part] = child(part, directory, place, GROWTH_SIZE)
            return found

        for depth in DEPTHS:
            smaller = Path(scratch) / f"{depth}-layers"
            child(f"build-{depth}", smaller, Path(scratch), GROWTH_SIZE)
            add("layers", depth, run_all(smaller, parts))
        for count in GROUPS:
            names = [part.replace("compiled", f"{count}groups") for part in parts if part.endswith("compiled")]
            add("groups", count, run_all(model, names))


def run_part(part: str, model: Path, scratch: Path, size: str) -> dict:
    """Do what one process does."""
    if part == "plain":
        return plain(model, scratch, size)
    start = time.perf_counter()
    if part == "compile":
        full_size.warm_up()
        return {"seconds": time.perf_counter() - start}
    engine, method, *how = part.split("-")
    if engine == "build":
        full_size.build(model, None, int(method))
        return {"seconds": time.perf_counter() - start}
    if engine == "modelopt":
        full_size.warm_up()  # compiled already: this loads it
    return measure(model, scratch, size, engine, method, *how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="run or growth; a part's name is internal")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sizes", default=SIZES, help="rows x tokens of a batch, several separated by commas")
    parser.add_argument("--parts", default=",".join(PARTS), help="what is run at each size, separated by commas")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--size", help="internal: of one process")
    parser.add_argument("--scratch", type=Path, help="internal")
    arguments = parser.parse_args()
    if arguments.what == "run":
        parts = list(FORMAT_PARTS) if arguments.parts == "FORMATS" else arguments.parts.split(",")
        run(arguments.model, arguments.sizes.split(","), parts, arguments.out)
        return
    if arguments.what == "growth":
        grow(arguments.model, list(GROWTH_PARTS), arguments.out)
        return

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(json.dumps(run_part(arguments.what, arguments.model, arguments.scratch, arguments.size)))


if __name__ == "__main__":
    main()
