"""Qwen2.5-VL-3B at full size, random weights, in mixes of formats: what vLLM makes of each, and how fast, beside BF16.

    PYTHONPATH=src python benchmarks/served_mixes.py --scratch DIR [--vllm-site DIR] [--seconds 540]
                                                     # writes benchmarks/results/served_mixes.json; one NVIDIA GPU
    ... --tiny --rounds 2 --arms fp8,nvfp4,fp8+nvfp4 --python .venv-vllm/bin/python   # a trial without a GPU

An arm is a format, or several joined with `+`, which take the groups in turn: in layer 0 the first one has q/k/v, the
second o, the first gate/up ..., in layer 1 the other way round, so that two formats have half of the weights each and
every kind of layer in both. Everything goes through Bitladder: one measurement (64 × 512 tokens calibrated, 8 × 512
scored) for all arms, export, verification, pre-flight by the rules of the installed vLLM, the engine, the loader check.

All engines are up at once on one GPU, each with a small KV cache, in processes of their own that are idle while another
one is timed. Rounds go from engine to engine; a ratio is the median over the rounds of the ratio to the original in the
same round. Two batches: 1 × 2048 tokens (the first token's seconds are the time to first token) and 32 × 512, 65 tokens
of output each. Of vLLM's defaults the engines lack torch.compile (unless `--compiled`), which takes a minute an engine;
decoding runs in CUDA graphs of the two batch sizes, prefill eagerly with vLLM's own fused operators, the original's
too.

Log-probabilities of four rows of text are compared with our evaluation of the same files in float32, in the arithmetic
of the kernels that run: with inputs of NVFP4 W4A4 in 16 bits for Marlin (on GPUs without FP4 units), with scales
rounded up to powers of two for DeepGEMM. The distances to the evaluations in other arithmetic are beside it.

What is known is written after each step; a failure is written with its arm and stops no other one. Steps that the
seconds don't suffice for are left out and named.
"""

import argparse
import gc
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import full_size
import ladder
from served_mixes_engine import (
    BATCHES,
    SETTINGS,
    SOURCE,
    TINY_BATCHES,
    Results,
    Serving,
    SpeedJob,
    in_turn,
    vllm_python,
)

RESULT = full_size.RESULTS / "served_mixes.json"
ARMS = "fp8,fp8+nvfp4,fp8+nvfp4_w4a16,nvfp4,fp8_block"
SIZES = {"samples": 64, "sequence_length": 512, "batch_size": 8, "seed": 0}
SCORED = 8  # samples: the scores choose nothing here
HELD_OUT = {"samples": 4, "sequence_length": 512, "batch_size": 2, "seed": 0}
KV_CACHE_BYTES = 3 * 2**29  # 43,000 tokens of this model; the larger batch needs 18,464
AT_ONCE = 2  # evaluations: 15 GB of the GPU each, and 25 GB of the host
AS_SAID, FP4_IN_16_BITS, IN_16_BITS = "as the file says", "NVFP4 inputs in 16 bits", "all inputs in 16 bits"
WEIGHTS_ALONE = re.compile("Marlin|Humming")  # kernels that take inputs in 16 bits
IN_POWERS = "scales of square blocks rounded up to powers of two"


def cores() -> int:
    return len(os.sched_getaffinity(0))


def end(pool: ProcessPoolExecutor) -> None:
    """End a pool's processes, whatever they do."""
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


def pool_of(workers: int, threads: int) -> ProcessPoolExecutor:
    """Return processes of `threads` threads each."""
    import torch

    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,))


def measured(model: Path, built: bool, output: Path, formats: tuple[str, ...], tiny: bool) -> dict[str, float]:
    """Build the model where it isn't there, and measure all formats once; return the seconds of the phases."""
    from bitladder.measuring.measure import measure
    from bitladder.models import weights
    from bitladder.models.target import find_target
    from bitladder.recipe import MeasureSpec

    start = time.perf_counter()
    if not built:
        full_size.build(model, 2 if tiny else None)
    seconds = {"build": time.perf_counter() - start}
    sizes = {**SIZES, **({"samples": 16, "sequence_length": 64} if tiny else {})}
    source = weights.model_source(model, path=str(model), revision=None, cache=weights.DigestCache())
    data = full_size.text_of(model, output, sizes)
    spec = MeasureSpec(formats=formats, score_samples=SCORED)
    measurement = measure(model, source, find_target(model), data, spec, output)
    assert measurement.run is not None
    return {**seconds, **{phase.phase: phase.seconds for phase in measurement.run.phases}}


def free_gpu() -> None:
    """Give the GPU's memory back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def scheme_of(measurement: Any, arm: str) -> Any:
    """Return the scheme of an arm: its formats in turn, beginning with the next one in every layer."""
    from bitladder import planning
    from bitladder.recipe import SchemeSpec

    names, name = arm.split("+"), arm.replace("+", "-")
    if len(names) == 1:
        return planning.plan(measurement, SchemeSpec(name=name, include=("*",), format=names[0]))
    formats = in_turn(names, measurement.groups)
    bits = planning.price(measurement, name, formats, SchemeSpec(name=name, include=("*",))).effective_bits
    return planning.price(measurement, name, formats, SchemeSpec(name=name, effective_bits=bits))


def exported(scheme: Any, output: Path, model: Path, directory: Path) -> dict[str, Any]:
    """Write an arm's checkpoint; return what it took and takes."""
    from bitladder.checkpoints.export import export
    from bitladder.measured import MEASUREMENT_FILE, read_amax
    from bitladder.records import Measurement

    start = time.perf_counter()
    measurement = Measurement.read(output / MEASUREMENT_FILE)
    manifest = export(scheme, measurement, read_amax(measurement, output), model, directory)
    return {"seconds": time.perf_counter() - start, "bytes": manifest.total_bytes}


def verified(scheme: Any, output: Path, model: Path, directory: Path) -> dict[str, Any]:
    """Verify an arm's files against its scheme and the model."""
    from bitladder import verification
    from bitladder.measured import MEASUREMENT_FILE, read_amax
    from bitladder.records import Measurement

    start = time.perf_counter()
    measurement = Measurement.read(output / MEASUREMENT_FILE)
    verdict, _ = verification.examine(scheme, measurement, read_amax(measurement, output), model, directory)
    return {
        "seconds": time.perf_counter() - start,
        "ok": verdict.ok,
        "tensors": verdict.tensors_checked,
        "codes": verdict.codes_checked,
        "findings": [finding.model_dump() for finding in verdict.findings[:5]],
    }


def held_out(model: Path, sizes: dict[str, int]) -> Any:
    return ladder.data_of(model, ladder.TEXTS / "emma.txt", sizes)


def evaluated(directory: Path, model: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """Return our log-probabilities of a checkpoint: as its files say, and as devices compute it that do otherwise."""
    import torch

    from bitladder.evaluation.logprobs import log_probs, log_probs_of
    from bitladder.evaluation.reading import FakeQuantLinear, load_checkpoint
    from bitladder.formats import POWERS_OF_TWO, WEIGHT_ONLY

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = [held_out(model, sizes)]
    loaded = load_checkpoint(directory, device=device)
    found = {AS_SAID: log_probs_of(loaded, data, device)}
    linears = [one for one in loaded.modules() if isinstance(one, FakeQuantLinear)]
    for way, formats in ((FP4_IN_16_BITS, {"nvfp4"}), (IN_16_BITS, {one.format.name for one in linears})):
        changed = [one for one in linears if one.format.name in formats]
        for linear in changed:
            linear.format = linear.format.on(WEIGHT_ONLY)
        if changed:
            found[way] = log_probs_of(loaded, data, device)
    squares = any(one.format.name == "fp8_block" for one in linears)
    del loaded, linears
    free_gpu()
    if squares:  # other scales restore other weights
        found[IN_POWERS] = log_probs(directory, data, device=device, arithmetic={"fp8_block": POWERS_OF_TWO})
    return found


def difference(ours: Any, theirs: Any) -> float:
    """Return mean |Δ log-prob| of two evaluations in nats per token."""
    pairs = [pair for rows in zip(ours, theirs, strict=True) for pair in zip(*rows, strict=True)]
    return sum(abs(own - other) for own, other in pairs) / len(pairs)


def keep_engines(serving: Serving, results: Results, expected: dict[str, dict[str, Any]]) -> None:
    """Judge what the engines answered as `bitladder probe` does, and keep it."""
    from serving import entry

    from bitladder.runtimes.files import read_manifest
    from bitladder.runtimes.findings import Findings
    from bitladder.runtimes.vllm.serve import judge
    from bitladder.runtimes.vllm.served import Run

    original = None
    for name, served in serving.runs.items():
        ours = expected.get(name, {})
        way = AS_SAID
        kernels = {layer.kernel or "" for layer in served.layers.values()}
        if FP4_IN_16_BITS in ours and any("NvFp4" in one and WEIGHTS_ALONE.search(one) for one in kernels):
            way = FP4_IN_16_BITS
        if IN_POWERS in ours and any("DeepGemm" in one or "DeepGEMM" in one for one in kernels):
            way = IN_POWERS
        runs = {each: Run(served, values) for each, values in ours.items()} or {AS_SAID: Run(served)}
        version = served.runtime.version if served.runtime else "?"
        manifest = None if name == SOURCE else read_manifest(serving.flags.directories[name], Findings())
        judged = {
            each: judge(run, serving.job, checkpoint=name, version=version, manifest=manifest, source=original)
            for each, run in runs.items()
        }
        kept = entry(judged[way], served)
        kept.pop("answers"), kept.pop("throughput")
        kept["compared_with_our_evaluation"] = way
        kept["nats_per_token_from_our_evaluation"] = {
            each: one.mean_abs_difference for each, result in judged.items() for one in result.log_probs
        }
        kept["nats_per_token_between_our_evaluations"] = {
            each: difference(values, ours[AS_SAID]) for each, values in ours.items() if each != AS_SAID
        }
        kept["layers"] = [
            layer.model_dump(include={"name", "format", "method", "kernel"}) for layer in judged[way].layers
        ]
        results.arms[name]["engine"] = kept
        if name == SOURCE:
            original = runs[AS_SAID]
        if served.runtime is not None:
            results.content["vllm"] = {"versions": served.runtime.versions, "device": served.runtime.device}


def loaded(directory: Path, python: Path, seconds: float) -> dict[str, Any]:
    """Return what the loader check says of a checkpoint."""
    from bitladder.runtimes.vllm import load

    return _told(load.probe(directory, python, timeout=seconds))


def _told(result: Any) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for layer in result.layers:
        key = f"{layer.format}: {layer.method}" + (f", {layer.kernel}" if layer.kernel else "")
        counts[key] = counts.get(key, 0) + 1
    findings = [one.model_dump() for one in result.findings]
    return {"version": result.version, "verdict": result.verdict, "modules": counts, "findings": findings}


def preflights(results: Results, directories: dict[str, Path], version: str) -> None:
    """Keep what our own rules of the installed vLLM say before anything is loaded."""
    from bitladder.runtimes.preflight import preflight
    from bitladder.runtimes.registry import VERSIONS

    rules = f"vllm=={version}" if f"vllm=={version}" in VERSIONS else "vllm"
    for name, directory in directories.items():
        try:
            results.arms[name]["preflight"] = _told(preflight(directory, [rules])[0])
        except Exception as error:  # an arm's failure is a result
            results.failed(name, "pre-flight", error)
    results.say(f"pre-flight by the rules of {rules}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="36 GB at full size; emptied at the end")
    parser.add_argument("--model", type=Path, help="built before (`full_size.py build`); default: built in the scratch")
    parser.add_argument("--arms", default=ARMS, help=f"default {ARMS}")
    parser.add_argument("--vllm-site", help="the PYTHONPATH under which vLLM lies; nothing else of PYTHONPATH is kept")
    parser.add_argument(
        "--python", type=Path, default=Path(sys.executable), help="of vLLM's environment; default: this"
    )
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything")
    parser.add_argument("--start-seconds", type=float, default=240.0, help="until the engines are up")
    parser.add_argument(
        "--at-once", type=int, default=8, help="arms' engines that are up at once beside the original's"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="of a batch in a visit, after an untimed one")
    parser.add_argument("--compiled", action="store_true", help="engines with torch.compile, as vLLM's default is")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON: more arguments of vllm.LLM")
    parser.add_argument("--tiny", action="store_true", help="a model of two narrow layers: a trial without a GPU")
    parser.add_argument("--no-load", action="store_true", help="leave the loader check out")
    parser.add_argument("--out", type=Path, default=RESULT)
    flags = parser.parse_args()
    sizes = [requests for requests, _, _ in (TINY_BATCHES if flags.tiny else BATCHES).values()]
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes, "custom_ops": ["all"]}
    compiling = {"cudagraph_capture_sizes": sizes} if flags.compiled else graphs
    flags.engine = {"compilation_config": compiling, **flags.engine}
    return flags


def prepare(flags: argparse.Namespace, results: Results, output: Path, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Build, measure, plan and export; return the scheme of each arm that was exported."""
    from bitladder.measured import MEASUREMENT_FILE
    from bitladder.records import Measurement

    built, flags.model = flags.model is not None, flags.model or output / "model"
    arms = flags.arms.split(",")
    formats = tuple(dict.fromkeys(name for arm in arms for name in arm.split("+")))
    alone = pool_of(1, cores())  # a process of its own, which gives the whole GPU back
    try:
        measuring = alone.submit(measured, flags.model, built, output, formats, flags.tiny)
        results.content["measuring_seconds"] = measuring.result(timeout=results.left)
    finally:
        end(alone)
    measurement = Measurement.read(output / MEASUREMENT_FILE)
    results.say("measured")
    schemes, writing = {}, {}
    for arm in arms:
        results.arms[arm] = {}
        try:
            schemes[arm] = scheme = scheme_of(measurement, arm)
        except Exception as error:  # an arm's failure is a result
            results.failed(arm, "plan", error)
            continue
        results.arms[arm]["effective_bits"] = scheme.effective_bits
        flags.directories[arm] = output / scheme.name
        writing[arm] = pool.submit(exported, scheme, output, flags.model, flags.directories[arm])
    results.collect("export", writing, lambda arm, found: results.arms[arm].update(export=found))
    for arm in arms:
        if "export" not in results.arms[arm]:
            flags.directories.pop(arm, None)
    return {arm: scheme for arm, scheme in schemes.items() if arm in flags.directories}


def serve_and_compare(
    flags: argparse.Namespace, results: Results, output: Path, pool: ProcessPoolExecutor, schemes: dict[str, Any]
) -> None:
    """Verify, serve, evaluate and load what was exported."""
    from bitladder.evaluation.logprobs import sequences
    from bitladder.runtimes.child import vllm_version
    from bitladder.runtimes.vllm.job import ServeJob

    python = vllm_python(flags.python, flags.vllm_site, output)
    version = vllm_version(python)
    preflights(results, {arm: flags.directories[arm] for arm in schemes}, version)
    sizes = {**HELD_OUT, **({"sequence_length": 64} if flags.tiny else {})}
    data = held_out(flags.model, sizes)
    batches = TINY_BATCHES if flags.tiny else BATCHES
    largest = SpeedJob(max(b[0] for b in batches.values()), max(b[1] for b in batches.values()), 65, 1)
    job = ServeJob(sequences=sequences(data, "text", flags.model), speed=largest, kv_cache_bytes=KV_CACHE_BYTES)
    places = {SOURCE: flags.model, **{arm: flags.directories[arm] for arm in schemes}}
    flags.directories = places
    checks = {arm: pool.submit(verified, scheme, output, flags.model, places[arm]) for arm, scheme in schemes.items()}

    def wait_for_checks() -> None:
        waiting = {arm: check for arm, check in checks.items() if "verified" not in results.arms[arm]}
        results.collect("verification", waiting, lambda arm, found: results.arms[arm].update(verified=found))

    serving = Serving(flags, results, python, job, output)
    serving.all(places, wait_for_checks)
    keep_engines(serving, results, {})
    results.say("engines kept")
    end(pool)
    readers = pool_of(AT_ONCE, max(1, cores() // AT_ONCE))
    evaluating = {name: readers.submit(evaluated, place, flags.model, sizes) for name, place in places.items()}
    with ThreadPoolExecutor(3) as threads:
        checking = {}
        if not flags.no_load:
            left = max(10.0, results.left - 5)
            checking = {arm: threads.submit(loaded, places[arm], python, left) for arm in schemes}
        expected: dict[str, dict[str, Any]] = {}
        results.collect("evaluation", evaluating, lambda name, found: expected.update({name: found}))
        end(readers)
        keep_engines(serving, results, expected)
        results.collect("loader check", checking, lambda arm, found: results.arms[arm].update(load=found))
    results.say("done")


def table(results: Results) -> str:
    """Return what was found as lines of text."""
    lines = []
    for name, arm in results.arms.items():
        engine = arm.get("engine", {})
        parts = [
            f"{name:<20} {engine.get('verdict', 'not served'):<14} {(engine.get('weight_bytes') or 0) / 1e9:.2f} GB"
        ]
        for batch, found in arm.get("speeds", {}).items():
            for rate, value in found.items():
                parts.append(f"{batch} {rate} {value['median']:.4g} ({value['ratio_to_source']})")
        parts.append(json.dumps(engine.get("nats_per_token_from_our_evaluation", {})))
        lines.append("  ".join(parts))
    return "\n".join(lines)


def main() -> None:
    start = time.monotonic()
    flags = parse()

    import transformers

    from bitladder.runinfo import hardware, versions

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    flags.scratch.mkdir(parents=True, exist_ok=True)
    flags.directories = {}
    content = {
        "claim": "mixes served by vLLM beside the original in the same run: kernels, speeds, log-probabilities",
        "model": "Qwen2.5-VL-3B, full size, random weights" if not flags.tiny else "Qwen2.5-VL, two narrow layers",
        "hardware": hardware(),
        "versions": versions(),
        "batches": TINY_BATCHES if flags.tiny else BATCHES,
        "repeats_a_visit": flags.repeats,
        "at_once": flags.at_once,
        "engine": flags.engine,
        "environment": {name: os.environ.get(name, value) for name, value in SETTINGS.items()},
        "done": {},
        "arms": {SOURCE: {}},
        "rounds": [],
    }
    results = Results(flags.out, start, flags.seconds, content)
    workers = min(len(flags.arms.split(",")), max(1, cores() // 2))
    with tempfile.TemporaryDirectory(prefix="served-mixes-", dir=flags.scratch) as directory:
        pool = pool_of(workers, max(1, cores() // workers))
        try:
            schemes = prepare(flags, results, Path(directory), pool)
            serve_and_compare(flags, results, Path(directory), pool, schemes)
        finally:
            end(pool)
            results.say("end")
    print(table(results))
    print(flags.out)


if __name__ == "__main__":
    main()
