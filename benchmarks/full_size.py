"""Qwen2.5-VL-3B at full size, random weights: Bitladder's three schemes against three ModelOpt runs, on a GPU.

    python benchmarks/full_size.py build DIR                         # the model: seconds on a GPU, 7.5 GB on disk
    python benchmarks/full_size.py compare --model DIR               # writes benchmarks/results/full_size.json
    python benchmarks/full_size.py images --model DIR                # ... full_size_images.json
    python benchmarks/full_size.py rounding --model DIR              # ... full_size_rounding.json
    python benchmarks/full_size.py driver --model DIR --out-root OUT # ... full_size_driver.json; keeps the checkpoints

The architecture is the published one (36 layers, 144 quant groups, vision depth 32); the weights are random, so that
speed, memory and loading mean something, and quality nothing. The tokenizer is the embedded model's, whose ids are all
below the vocabulary's size; the special tokens' ids in the configuration are its.

`compare`: Bitladder (identify, measure, plan, export three schemes) and ModelOpt (load, auto_quantize, export, three
times) get the same batches of text, the same BF16 arithmetic and the same targets in effective bits; ours measures by
gradient with `engine: native`; sizes are the defaults of ModelOpt's `hf_ptq` example (512 samples to calibrate, 128 to
score). Each run is a process of its own, timed after its imports; both flush what they write to the disk. ModelOpt's
CUDA extension is compiled before, outside the clock.

`images`: measures on image+text pairs of random pictures with real captions, which ModelOpt's own script refuses; by
gradient with `engine: modelopt`.

`rounding`: compensates the codes of every searched weight in each of `--formats`, scores some samples with them,
exports everything in each format and verifies the files; by gradient with `engine: native`, without ModelOpt.

`driver`: two calls of `scripts/qwen/qwen2_5_vl_3b_autoquant_fp8_schemes.py`, as a user would make them: the ladder of
three schemes, then the whole language model with an FP8 KV cache from the same measurement; engine and method are the
driver's defaults.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ladder

ROOT = ladder.ROOT
RESULTS = ROOT / "benchmarks/results"
BITS = (14.0, 12.0, 8.0)
SIZES = {"samples": 512, "sequence_length": 512, "batch_size": 8, "seed": 0}
SCORE_SAMPLES = 128
HELD_OUT_SAMPLES = 4  # of the driver's runs: random weights have no quality to evaluate, only time and memory
LEFT_ALONE = ("*visual*", "*lm_head*")
DRIVER = ROOT / "scripts/qwen/qwen2_5_vl_3b_autoquant_fp8_schemes.py"
CALLS = (
    ("--schemes", "top25,top50,full"),
    ("--scheme-name", "fp8_autoquant_full_kv", "--coverage", "1", "--kv-cache", "fp8"),
)
DEMO = ROOT / "src/bitladder/demo/qwen2_5_vl_digits"

TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 128000,
    "max_window_layers": 36,
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "window_size": 112,
    "tokens_per_second": 2,
}


WIDE = {  # the language model of Qwen2.5-VL-72B, beside whose layers the vision tower is the 3B model's
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
}


def config_of(layers: int | None = None, depth: int | None = None, wide: bool = False) -> Any:
    """Return the model's configuration; see `build`."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(DEMO)
    rope = {**config.text_config.rope_parameters, "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    settings = {**TEXT, "rope_parameters": rope}
    if layers is not None:  # a trial of this script without a GPU
        settings |= {"num_hidden_layers": layers, "max_window_layers": layers, "vocab_size": 2048}
        settings |= {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2}
        VISION.update(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=256)
        VISION.update(fullatt_block_indexes=[1])
    if depth is not None:
        settings |= {"num_hidden_layers": depth, "max_window_layers": depth}
    if wide:
        settings |= WIDE
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        VISION.update(out_hidden_size=WIDE["hidden_size"])
    for name, value in settings.items():
        setattr(config.text_config, name, value)
    config.text_config.layer_types = ["full_attention"] * config.text_config.num_hidden_layers
    for name, value in VISION.items():
        setattr(config.vision_config, name, value)
    return config


def build(directory: Path, layers: int | None, depth: int | None = None, wide: bool = False) -> None:
    """Save the model with random weights, and the embedded model's tokenizer and processor beside it.

    `layers` makes a small one, for trials; `depth` gives the full-size one so many decoder layers; `wide` makes these
    the 72B model's.
    """
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = config_of(layers, depth, wide)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(before)
    model.save_pretrained(directory, max_shard_size="4GB")
    for path in DEMO.iterdir():
        if path.suffix != ".safetensors" and not (directory / path.name).exists():
            shutil.copy(path, directory / path.name)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{directory}: {count / 1e9:.2f}B weights, {[p.name for p in sorted(directory.glob('*.safetensors'))]}")


def captions_file(directory: Path, sizes: dict) -> Path:
    """Write real captions, repeated until they suffice (a row never starts twice at the same place)."""
    path = directory / "captions.txt"
    text = (ladder.TEXTS / "coco2017_captions.txt").read_text()
    path.write_text(text * max(1, 8 * sizes["samples"] * sizes["sequence_length"] // len(text)))
    return path


def text_of(model: Path, scratch: Path, sizes: dict):
    """Return batches of the captions."""
    return ladder.data_of(model, captions_file(scratch, sizes), sizes)


def warm_up() -> None:
    """Compile ModelOpt's CUDA extension, which it otherwise does at its first FP8 rounding on a machine."""
    import torch
    from modelopt.torch.quantization.extensions import get_cuda_ext_fp8

    if torch.cuda.is_available():
        get_cuda_ext_fp8()


def make_pairs(directory: Path, count: int) -> None:
    """Write a COCO directory of random pictures of 448 × 448 (256 image tokens each) with real captions."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    captions = [line for line in (ladder.TEXTS / "coco2017_captions.txt").read_text().splitlines() if line.strip()]
    (directory / "train2017").mkdir(parents=True)
    (directory / "annotations").mkdir()
    images, annotations = [], []
    for index in range(count):
        coarse = random.integers(0, 256, (14, 14, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((448, 448), Image.Resampling.BICUBIC).save(
            directory / "train2017" / f"{index:012}.jpg"
        )
        images.append({"id": index, "file_name": f"{index:012}.jpg"})
        annotations.append({"id": index, "image_id": index, "caption": captions[index]})
    path = directory / "annotations" / "captions_train2017.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))


def measure_images(model: Path, output: Path, sizes: dict) -> dict:
    """Measure on image+text pairs; return what it took and what of the scores lies at image positions."""
    import math

    from bitladder.data.processors import load_processor
    from bitladder.data.samples import load_data
    from bitladder.measuring.measure import measure
    from bitladder.models import weights
    from bitladder.models.target import find_target
    from bitladder.recipe import DataSpec, MeasureSpec
    from bitladder.runinfo import Meter

    meter = Meter()
    with meter.phase("load pairs"):
        make_pairs(output / "coco", sizes["samples"])
        processor = load_processor(model)
        data = load_data(DataSpec(kind="coco", path=str(output / "coco")), processor, **sizes)
    source = weights.model_source(model, path=str(model), revision=None, cache=weights.DigestCache())
    with meter.phase("measure"):
        spec = MeasureSpec(engine="modelopt", method="gradient")
        measurement = measure(model, source, find_target(model), data, spec, output)
    assert measurement.run is not None
    total = math.fsum(measurement.sensitivity(candidate) for candidate in measurement.candidates)
    text = math.fsum(measurement.sensitivity(candidate, 0.0) for candidate in measurement.candidates)
    batch = data.batches[0].inputs
    return {
        "groups": len(measurement.groups),
        "tokens_per_batch": list(batch["input_ids"].shape),
        "image_patches_per_batch": list(batch["pixel_values"].shape),
        "image_share_of_scores": 1 - text / total,
        "phases": [
            phase.model_dump() for phase in (*meter.phases, *(measurement.run.phases if measurement.run else ()))
        ],
    }


def compensate(model: Path, output: Path, sizes: dict, score_samples: int, formats: tuple[str, ...]) -> dict:
    """Measure with compensated codes, export and verify each format; return what it took and what the codes do."""
    from bitladder import planning, verification
    from bitladder.checkpoints.export import export
    from bitladder.formats import COMPRESSED_TENSORS
    from bitladder.measured import read_amax, read_codes
    from bitladder.measuring.measure import measure
    from bitladder.models import weights
    from bitladder.models.target import find_target
    from bitladder.recipe import MeasureSpec, SchemeSpec
    from bitladder.runinfo import Meter

    data = text_of(model, output, sizes)
    settings = {"engine": "native", "method": "gradient", "rounding": "compensated", "score_samples": score_samples}
    spec = MeasureSpec(**settings, formats=formats)
    source = weights.model_source(model, path=str(model), revision=None, cache=weights.DigestCache())
    measurement = measure(model, source, find_target(model), data, spec, output)
    assert measurement.run is not None
    assert measurement.rounding is not None
    amax, codes = read_amax(measurement, output), read_codes(measurement, output)
    meter, verified = Meter(), {}
    for name in formats:
        scheme = planning.plan(measurement, SchemeSpec(name=name, coverage=1.0, format=name))
        with meter.phase("export"):
            export(scheme, measurement, amax, model, output / name, codes=codes, carrier=COMPRESSED_TENSORS)
        with meter.phase("verify"):
            found = verification.verify(
                [scheme], measurement, amax, model, {name: output / name}, carrier=COMPRESSED_TENSORS
            )
        verified[name] = found.ok
        shutil.rmtree(output / name)
    modules = {name: [m for m in measurement.rounding.modules if m.format == name] for name in formats}
    return {
        "formats": list(formats),
        "damping": measurement.rounding.damping,
        "verified": verified,
        "median_output_error": {
            name: [statistics.median(getattr(m, f"{which}output_error") for m in own) for which in ("", "nearest_")]
            for name, own in modules.items()
            if own
        },
        "phases": [phase.model_dump() for phase in (*measurement.run.phases, *meter.phases)],
    }


def drive(model: Path, out_root: Path, sizes: dict, score_samples: int, measurement: Path | None) -> dict:
    """Call the driver for the ladder and for the FP8 KV cache; return what each call and each phase took.

    With a measurement of an earlier run, nothing is measured; its phases are then those of that run.
    """
    from bitladder.records import CheckpointManifest, Evaluation, RunState, Verification

    out_root.mkdir(parents=True, exist_ok=True)
    captions = captions_file(out_root, sizes)
    size = {"--calib-size": sizes["samples"], "--calib-seq-len": sizes["sequence_length"]}
    size |= {"--batch-size": sizes["batch_size"], "--held-out-size": HELD_OUT_SAMPLES}
    size |= {"--score-size": score_samples} if measurement is None else {"--measurement": measurement}
    first = ["--model-dir", str(model), "--captions", str(captions)]
    first += [str(part) for pair in size.items() for part in pair]
    calls = []
    for call in CALLS:
        flags = ["--out-root", str(out_root), *call, *([] if calls else first)]
        start = time.perf_counter()
        subprocess.run([sys.executable, str(DRIVER), *flags], check=True)
        state = RunState.read(out_root / "autoquant" / RunState.FILE_NAME)
        phases = {step: [phase.model_dump() for phase in phases] for step, phases in state.phases.items()}
        calls.append({"flags": list(call), "seconds": time.perf_counter() - start, "phases": phases})
    records = out_root / "autoquant"
    return {
        "calls": calls,
        "verified": Verification.read(records / "verification.json").ok,
        "bytes": {
            path.parent.name: CheckpointManifest.read(path).total_bytes
            for path in sorted((out_root / "quantized").glob(f"*/{CheckpointManifest.FILE_NAME}"))
        },
        "kl": {
            path.stem: [result.value for result in Evaluation.read(path).results if result.metric == "kl"]
            for path in sorted((records / "evaluations").glob("*.json"))
        },
    }


def compare(
    model: Path, result: Path, scratch: Path, sizes: dict, score_samples: int, repeats: int, keep: Path | None
) -> None:
    """Run both kinds of process in turn and write the comparison; `keep` is where our measurement is copied to."""
    from bitladder.runinfo import hardware, versions

    common = ["--model", str(model), "--sizes", json.dumps({**sizes, "score_samples": score_samples})]

    def child(kind: str, output: Path) -> dict:
        output.mkdir(parents=True, exist_ok=True)
        found = ladder.child(kind, *common, "--scratch", str(output), script=__file__)
        print(f"{kind}: {json.dumps(found)[:2000]}", flush=True)
        return found

    ours, theirs = [], []
    for repeat in range(repeats):
        output = scratch / str(repeat)
        ours.append(child("bitladder", output / "ours"))
        if keep is not None:
            shutil.copy(output / "ours" / "measurement.json", keep)
        shutil.rmtree(output)
        runs = []
        for bits in BITS:
            runs.append(child(f"modelopt-{bits:g}", output / "theirs"))
            shutil.rmtree(output)
        theirs.append(runs)
        our_seconds = statistics.median(run["seconds"] for run in ours)
        their_seconds = statistics.median(sum(run["seconds"] for run in each) for each in theirs)
        peaks = [
            max(phase["peak_gpu_bytes"] or 0 for run in runs for phase in run["phases"])
            for runs in (ours, [run for each in theirs for run in each])
        ]
        content = {
            "claim": "measure + three schemes against three ModelOpt runs (load + auto_quantize + export)",
            "model": "Qwen2.5-VL-3B, full size, random weights",
            "hardware": hardware(),
            "versions": versions(),
            "sizes": {**sizes, "score_samples": score_samples, "effective_bits": BITS},
            "speedup": their_seconds / our_seconds,
            "peak_gpu_bytes": {"bitladder": peaks[0], "modelopt": peaks[1]},
            "bitladder": ours,
            "modelopt": theirs,
        }
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{our_seconds:.1f} s against {their_seconds:.1f} s: {their_seconds / our_seconds:.2f}x; GPU {peaks}")


def save(path: Path, claim: str, sizes: dict, found: dict) -> None:
    """Write and print what was found."""
    from bitladder.runinfo import hardware, versions

    model = "Qwen2.5-VL-3B, full size, random weights"
    content = {"claim": claim, "model": model, "hardware": hardware(), "versions": versions(), "sizes": sizes, **found}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="build, compare, images, rounding or driver; the rest is internal")
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, help="build: a small model, to try this script without a GPU")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--scratch", type=Path, help="where checkpoints go (and go away); beside the model by default")
    parser.add_argument("--out-root", type=Path, help="driver: where its checkpoints go and stay")
    parser.add_argument("--measurement", type=Path, help="driver: of an earlier run; the driver then doesn't measure")
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON: samples, sequence_length, batch_size, ...")
    parser.add_argument(
        "--formats", type=lambda value: tuple(value.split(",")), default=("fp8",), help="rounding: of it"
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--result", type=Path)
    parser.add_argument("--keep", type=Path, help="compare: copy our measurement to this file")
    arguments = parser.parse_args()
    sizes = {**SIZES, **arguments.sizes}
    score_samples = sizes.pop("score_samples", SCORE_SAMPLES)

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.what == "build":
        build(arguments.directory, arguments.layers)
        return
    model = arguments.model
    dtype = "bfloat16"
    if arguments.what == "bitladder":
        data = text_of(model, arguments.scratch, sizes)
        found = ladder.run_bitladder(
            model, arguments.scratch, data, BITS, dtype, score_samples, verify=False, engine="native"
        )
    elif arguments.what.startswith("modelopt-"):
        data = text_of(model, arguments.scratch, sizes)
        warm_up()
        bits = float(arguments.what.partition("-")[2])
        batches = -(-score_samples // sizes["batch_size"])
        found = ladder.run_modelopt(model, arguments.scratch, data, bits, dtype, LEFT_ALONE, batches)
    else:
        with tempfile.TemporaryDirectory(prefix="full-size-", dir=arguments.scratch or model.parent) as scratch:
            if arguments.what == "compare":
                result = arguments.result or RESULTS / "full_size.json"
                compare(model, result, Path(scratch), sizes, score_samples, arguments.repeats, arguments.keep)
            elif arguments.what == "driver":
                found = drive(model, arguments.out_root, sizes, score_samples, arguments.measurement)
                found["measured_before"] = arguments.measurement is not None
                claim = "the driver, called twice: a ladder of three schemes, and one with an FP8 KV cache"
                path = arguments.result or RESULTS / "full_size_driver.json"
                save(path, claim, {**sizes, "score_samples": score_samples}, found)
            elif arguments.what == "rounding":
                sizes = {**sizes, "samples": 128, **arguments.sizes}
                sizes.pop("score_samples", None)
                found = compensate(model, Path(scratch), sizes, min(score_samples, sizes["samples"]), arguments.formats)
                path = arguments.result or RESULTS / "full_size_rounding.json"
                claim = "codes of every searched weight compensated, then exported and verified, at full size"
                save(path, claim, {**sizes, "score_samples": score_samples}, found)
            else:
                warm_up()
                sizes = {**sizes, "samples": 64, **arguments.sizes}
                sizes.pop("score_samples", None)
                found = measure_images(model, Path(scratch), sizes)
                path = arguments.result or RESULTS / "full_size_images.json"
                save(path, "an image+text measurement at full size", sizes, found)
        return
    print(json.dumps(found))


if __name__ == "__main__":
    main()
