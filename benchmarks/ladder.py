"""Five schemes of SmolLM2-135M-Instruct: Bitladder once, against five separate runs of ModelOpt.

    python benchmarks/ladder.py --model models/smollm2_135m_instruct      # writes benchmarks/results/ladder.json

Both score by ModelOpt's engine and gradient, get the same batches, the same float32 arithmetic, the same targets in
effective bits, and start from the model's directory on disk; a ModelOpt run is load + auto_quantize + export. Each
measured run is a process of its own, timed after its imports; the two kinds alternate, and the medians are compared.
Then every checkpoint's held-out KL is evaluated by the same code. Both kinds flush their files to the disk. Also here:
exporting against `cp` on the same disk, and planning on the 144 real groups.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ROOT / "recipes/data"
BITS = (14.0, 12.0, 10.0, 9.0, 8.0)
CALIBRATION = {"samples": 8, "sequence_length": 256, "batch_size": 4, "seed": 0}
HELD_OUT = {"samples": 16, "sequence_length": 256, "batch_size": 4, "seed": 0}


def data_of(model: Path, path: Path, options: dict):
    from bitladder.data.processors import load_processor
    from bitladder.data.samples import load_data
    from bitladder.recipe import DataSpec

    processor = load_processor(model)
    return load_data(DataSpec(kind="text", path=str(path)), processor, **options)


def run_bitladder(
    model: Path,
    output: Path,
    data,
    bits_asked=BITS,
    dtype="float32",
    score_samples=None,
    verify=True,
    engine="modelopt",
) -> dict:
    from bitladder import planning, verification
    from bitladder.checkpoints.export import export_all
    from bitladder.measured import read_amax
    from bitladder.measuring.measure import measure
    from bitladder.models import weights
    from bitladder.models.target import find_target
    from bitladder.recipe import MeasureSpec, SchemeSpec
    from bitladder.runinfo import Meter

    directories = {f"bits{bits:g}": output / f"bits{bits:g}" for bits in bits_asked}
    meter = Meter()
    start = time.perf_counter()
    with meter.phase("identify and find groups"):
        source = weights.model_source(model, path=str(model), revision=None, cache=weights.DigestCache())
        target = find_target(model)
    with meter.phase("measure"):
        settings = MeasureSpec(engine=engine, method="gradient", dtype=dtype, score_samples=score_samples)
        measurement = measure(model, source, target, data, settings, output)
    with meter.phase("plan"):
        specs = [SchemeSpec(name=f"bits{bits:g}", effective_bits=bits) for bits in bits_asked]
        schemes = planning.plan_all(measurement, specs)
    amax = read_amax(measurement, output)
    with meter.phase("export"):
        export_all(schemes, measurement, amax, model, directories)
    seconds = time.perf_counter() - start
    verified = None
    if verify:
        with meter.phase("verify"):
            verified = verification.verify(schemes, measurement, amax, model, directories).ok
    return {
        "seconds": seconds,
        "verified": verified,
        "effective_bits": {scheme.name: scheme.effective_bits for scheme in schemes},
        "phases": [phase.model_dump() for phase in meter.phases],
        "measuring": [phase.model_dump() for phase in (measurement.run.phases if measurement.run else ())],
    }


def run_modelopt(
    model: Path, output: Path, data, bits: float, dtype="float32", left_alone=("*lm_head*",), score_batches=None
) -> dict:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint

    from bitladder.device import resolve_device
    from bitladder.models.loading import load_model
    from bitladder.runinfo import Meter

    device = resolve_device("auto")
    meter = Meter()
    start = time.perf_counter()
    with meter.phase("load model"):
        loaded = load_model(model, getattr(torch, dtype), device)
        loaded.config.use_cache = False
    with meter.phase("auto_quantize"):
        loaded, state = mtq.auto_quantize(
            loaded,
            constraints={"effective_bits": bits, "cost": {"excluded_module_name_patterns": list(left_alone)}},
            quantization_formats=[mtq.FP8_DEFAULT_CFG],
            data_loader=[batch.to(device) for batch in data.batches],
            forward_step=lambda m, batch: m(**batch.inputs, labels=batch.labels),
            loss_func=lambda result, batch: result.loss,
            num_calib_steps=len(data.batches),
            num_score_steps=score_batches or len(data.batches),
            disabled_layers=list(left_alone),
            verbose=False,
        )
    with meter.phase("export"):
        export_hf_checkpoint(loaded, dtype=torch.bfloat16, export_dir=output / f"bits{bits:g}")
        flush(output / f"bits{bits:g}")
    return {
        "seconds": time.perf_counter() - start,
        "effective_bits": float(state["best"]["constraints"]["effective_bits"]),
        "phases": [phase.model_dump() for phase in meter.phases],
    }


def evaluate(model: Path, directories: dict[str, Path]) -> dict:
    from bitladder.evaluation.evaluate import compare
    from bitladder.evaluation.reference import Reference

    data = data_of(model, TEXTS / "emma.txt", HELD_OUT)
    table = {}
    with Reference.compute(model, data) as reference:
        for name, directory in directories.items():
            results, _ = compare(reference, directory, name)
            table[name] = {r.metric: r.model_dump() for r in results}
    return table


def flush(directory: Path) -> None:
    """Wait until a directory's files are on the disk, as Bitladder's own export does."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def copy_and_sync(source: Path, destination: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(destination)], check=True)
    flush(destination)
    return time.perf_counter() - start


def export_against_copy(model: Path, bitladder_output: Path, scratch: Path, repeats: int = 7) -> dict:
    """Time exporting one scheme and copying the source with `cp` (both flushed to the disk), alternating."""
    from bitladder import planning
    from bitladder.checkpoints.export import export
    from bitladder.measured import read_amax
    from bitladder.recipe import SchemeSpec
    from bitladder.records import Measurement
    from bitladder.runinfo import Meter

    measurement = Measurement.read(bitladder_output / "measurement.json")
    amax = read_amax(measurement, bitladder_output)
    size = sum(path.stat().st_size for path in model.iterdir())
    scheme = planning.plan(measurement, SchemeSpec(name="half", coverage=0.5))
    copies, exports, meter = [], [], Meter()
    before = psutil.Process().memory_info().rss
    for _ in range(repeats):
        shutil.rmtree(scratch / "copy", ignore_errors=True)
        copies.append(copy_and_sync(model, scratch / "copy"))
        shutil.rmtree(scratch / "half", ignore_errors=True)
        with meter.phase("export"):
            export(scheme, measurement, amax, model, scratch / "half")
        exports.append(meter.phases[-1].seconds)
    return {
        "source_bytes": size,
        "cp_seconds": copies,
        "export_seconds": exports,
        "export_speed_over_cp": statistics.median(copies) / statistics.median(exports),
        "export_peak_rss_bytes": max(phase.peak_rss_bytes for phase in meter.phases),
        "process_rss_before_bytes": before,
    }


def plan_real_groups(repeats: int = 5) -> dict:
    """Time planning fifteen schemes on the published measurement of Qwen2.5-VL-3B-Instruct (144 groups)."""
    from bitladder import planning
    from bitladder.planning import importing
    from bitladder.recipe import SchemeSpec

    measurement = importing.import_manifest(ROOT / "tests/data/qwen2_5_vl_3b_instruct_fp8_autoquant_manifest.json")
    specs = [SchemeSpec(name=f"top{10 * i}", coverage=i / 10) for i in range(1, 11)]
    specs += [SchemeSpec(name=f"bits{bits}", effective_bits=bits) for bits in (9, 10, 11, 12, 14)]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        planning.plan_all(measurement, specs)
        seconds.append(time.perf_counter() - start)
    return {"groups": len(measurement.groups), "schemes": len(specs), "seconds": seconds}


def child(*arguments: str, script: str = __file__) -> dict:
    """Run a script as a process of its own and return the JSON of its last line."""
    command = [sys.executable, script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr[-3000:])
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2_135m_instruct")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks/results/ladder.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="internal: what a child process does")
    parser.add_argument("--output", type=Path, help="internal")
    arguments = parser.parse_args()
    if arguments.only:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        captions = TEXTS / "coco2017_captions.txt"
        if arguments.only == "bitladder":
            data = data_of(arguments.model, captions, CALIBRATION)
            result = run_bitladder(arguments.model, arguments.output, data)
        elif arguments.only == "copy":
            with tempfile.TemporaryDirectory(dir=arguments.output) as scratch:
                result = export_against_copy(arguments.model, arguments.output, Path(scratch))
        elif arguments.only == "evaluate":
            result = evaluate(arguments.model, {p.name: p for p in sorted(arguments.output.glob("bits*"))})
        else:
            data = data_of(arguments.model, captions, CALIBRATION)
            result = run_modelopt(arguments.model, arguments.output, data, float(arguments.only))
        print(json.dumps(result))
        return

    from bitladder.runinfo import hardware, versions

    model = str(arguments.model)
    with tempfile.TemporaryDirectory(prefix="ladder-", dir=arguments.model.parent) as scratch:
        ours, theirs = [], []
        for repeat in range(arguments.repeats):
            output = Path(scratch) / f"{repeat}"
            (output / "ours").mkdir(parents=True)
            (output / "theirs").mkdir()
            ours.append(child("--only", "bitladder", "--model", model, "--output", str(output / "ours")))
            print(f"bitladder, five schemes: {ours[-1]['seconds']:.1f} s", flush=True)
            runs = [child("--only", str(b), "--model", model, "--output", str(output / "theirs")) for b in BITS]
            theirs.append(runs)
            print(f"modelopt, five runs: {sum(run['seconds'] for run in runs):.1f} s", flush=True)
        last = Path(scratch) / f"{arguments.repeats - 1}"
        result = {
            "claim": "one measurement and five exports against five ModelOpt runs (load + auto_quantize + export)",
            "model": "SmolLM2-135M-Instruct",
            "hardware": hardware(),
            "versions": versions(),
            "calibration": CALIBRATION,
            "held_out": HELD_OUT,
            "bitladder": ours,
            "modelopt": theirs,
            "kl_bitladder": child("--only", "evaluate", "--model", model, "--output", str(last / "ours")),
            "kl_modelopt": child("--only", "evaluate", "--model", model, "--output", str(last / "theirs")),
            "export": child("--only", "copy", "--model", model, "--output", str(last / "ours")),
            "planning": plan_real_groups(),
        }
    our_seconds = statistics.median(run["seconds"] for run in ours)
    their_seconds = statistics.median(sum(run["seconds"] for run in runs) for runs in theirs)
    result["speedup"] = their_seconds / our_seconds
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    print(f"median of {arguments.repeats}: {our_seconds:.1f} s against {their_seconds:.1f} s: {result['speedup']:.2f}x")
    print(f"{'scheme':<8} {'bits ours':>9} {'theirs':>7} {'KL ours':>10} {'KL theirs':>10}")
    for index, bits in enumerate(BITS):
        name = f"bits{bits:g}"
        print(
            f"{name:<8} {ours[-1]['effective_bits'][name]:>9.3f} {theirs[-1][index]['effective_bits']:>7.3f} "
            f"{result['kl_bitladder'][name]['kl']['value']:>10.6f} {result['kl_modelopt'][name]['kl']['value']:>10.6f}"
        )
    print(f"export at {result['export']['export_speed_over_cp']:.2f} of cp's speed")
    print(f"planning {statistics.median(result['planning']['seconds']):.3f} s")


if __name__ == "__main__":
    main()
