"""Serves checkpoints beside their original with vLLM: prefill and decode speed, memory, answers, log-probabilities.

    python benchmarks/serving.py --source DIR --checkpoint top50=DIR --checkpoint full=DIR --python VLLM_PYTHON \\
        [--text FILE] [--pairs FILE] [--out benchmarks/results/serving.json]

Every checkpoint is served by a process of its own, one after the other, the original first, so that all ratios are of
one run. The batch is `--requests` prompts of `--prompt-tokens` random tokens, given at once: prefill is all prompt
tokens over the seconds with one token of output, decode what `--output-tokens` take on top. One repetition goes before,
untimed; medians of `--repeats`. On a GPU vLLM uses CUDA graphs; on a CPU it runs eagerly, to try the script.

With `--text` (a text file) or `--pairs` (a JSONL file of image+text pairs) log-probabilities are compared with our own
evaluation of each checkpoint's files, in float32: four bytes a weight, on the GPU if this Python's torch has one.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bitladder.data.batches import DataSet
from bitladder.data.processors import load_processor
from bitladder.data.samples import load_data
from bitladder.errors import BitladderError, ModelError
from bitladder.evaluation import logprobs
from bitladder.recipe import DataSpec
from bitladder.records import ProbeResult
from bitladder.runinfo import hardware
from bitladder.runtimes.vllm.job import LogProbs, Question, ServeJob, SpeedJob
from bitladder.runtimes.vllm.serve import probe_one
from bitladder.runtimes.vllm.served import Served

RESULT = Path(__file__).resolve().parent / "results" / "serving.json"
SEQUENCE_LENGTH, PAIR_LENGTH = 512, 1024  # tokens of a text row; the most that a pair may have
PROMPTS = ("Describe a picture of a cat.", "Name three colours.")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of vLLM's environment")
    parser.add_argument("--source", type=Path, help="the original in 16 bits: ratios are to it")
    parser.add_argument("--checkpoint", action="append", required=True, metavar="NAME=DIR", help="may be repeated")
    parser.add_argument("--image", type=Path, help="goes before the prompts, which are asked with and without it")
    parser.add_argument("--prompt", action="append", help="may be repeated")
    parser.add_argument("--text", type=Path, help="text whose log-probabilities are compared")
    parser.add_argument("--pairs", type=Path, help="image+text pairs whose log-probabilities are compared")
    parser.add_argument("--samples", type=int, default=16, help="of each of the two; default 16")
    parser.add_argument("--sequence-length", type=int, default=SEQUENCE_LENGTH, help=f"default {SEQUENCE_LENGTH}")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-speed", action="store_true", help="time nothing")
    parser.add_argument("--kv-cache-gib", type=float, help="on a GPU that others use too; default: all that is left")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one checkpoint")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args(arguments)


def data_sets(flags: argparse.Namespace, directory: Path) -> dict[str, DataSet]:
    """Return the sets whose log-probabilities are compared, by name."""
    wanted = {"text": (flags.text, flags.sequence_length), "image_text": (flags.pairs, PAIR_LENGTH)}
    return {
        kind: load_data(
            DataSpec(kind=kind, path=str(path.resolve())),
            load_processor(directory),
            samples=flags.samples,
            sequence_length=length,
            batch_size=4,
            seed=0,
        )
        for kind, (path, length) in wanted.items()
        if path is not None
    }


def expected_log_probs(directories: Sequence[Path], data: Sequence[DataSet]) -> dict[Path, LogProbs]:
    """Return our evaluation of each directory that it takes; what it refuses is served without."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for directory in directories:
        print(f"evaluating {directory} on {device}", flush=True)
        try:
            found[directory] = logprobs.log_probs(directory, data, device=device)
        except ModelError as error:
            print(f"not evaluated: {error}", flush=True)
    return found


def job_of(flags: argparse.Namespace, data: dict[str, DataSet], directory: Path) -> ServeJob:
    prompts = flags.prompt or PROMPTS
    images = [None] if flags.image is None else [None, str(flags.image.resolve())]
    return ServeJob(
        questions=tuple(Question(prompt, image) for image in images for prompt in prompts),
        sequences=tuple(s for name, one in data.items() for s in logprobs.sequences(one, name, directory)),
        speed=None
        if flags.no_speed
        else SpeedJob(flags.requests, flags.prompt_tokens, flags.output_tokens, flags.repeats),
        kv_cache_bytes=None if flags.kv_cache_gib is None else int(flags.kv_cache_gib * 2**30),
    )


def spread(values: Sequence[float]) -> float:
    """Return (max - min) / median of the repetitions."""
    return (max(values) - min(values)) / median(values)


def entry(result: ProbeResult, served: Served) -> dict[str, Any]:
    """Return what is written of one checkpoint."""
    rates = {
        speed.phase: {
            "tokens_per_second": round(speed.tokens_per_second, 1),
            "ratio_to_source": (
                None
                if speed.source_tokens_per_second is None
                else round(speed.tokens_per_second / speed.source_tokens_per_second, 3)
            ),
        }
        for speed in result.throughput
    }
    peaks = [phase.peak_gpu_bytes for phase in served.phases if phase.peak_gpu_bytes is not None]
    known: dict[str, Any] = {
        "weight_bytes": served.weight_bytes,
        "kv_cache": {
            "dtype": served.kv_cache_dtype,
            "bytes": served.kv_cache_bytes,
            "tokens": served.kv_cache_tokens,
        },
        "peak_gpu_bytes": max(peaks, default=None),
        "peak_gpu_bytes_without_kv_cache": max(peaks) - (served.kv_cache_bytes or 0) if peaks else None,
        "seconds": {phase.phase: phase.seconds for phase in served.phases},
    }
    if served.timings is not None:
        known["repetitions"] = served.timings.model_dump()
        known["spread"] = {name: round(spread(v), 4) for name, v in served.timings.model_dump().items()}
    kernels: dict[str, int] = {}
    for layer in result.layers:
        name = f"{layer.format}: {layer.kernel or layer.method}"
        kernels[name] = kernels.get(name, 0) + 1
    return {
        "verdict": result.verdict,
        "findings": [finding.model_dump() for finding in result.findings],
        "device": result.device,
        "modules_by_kernel": kernels,
        "throughput": rates,
        **known,
        "log_probs": [difference.model_dump() for difference in result.log_probs],
        "answers": [answer.model_dump(exclude={"token_ids"}) for answer in result.answers],
        "traceback": result.traceback,
    }


def heading(flags: argparse.Namespace, job: ServeJob, first: ProbeResult) -> dict[str, Any]:
    """Return where and how all of them were served."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": first.run.hardware if first.run is not None else hardware(),
        "versions": first.run.versions if first.run is not None else {},
        "vllm": first.version,
        "kv_cache_gib": flags.kv_cache_gib,
        "batch": None
        if flags.no_speed
        else {
            "requests": flags.requests,
            "prompt_tokens": flags.prompt_tokens,
            "output_tokens": flags.output_tokens,
            "repeats": flags.repeats,
        },
        "scored_tokens": sum(len(sequence.counted) for sequence in job.sequences),
    }


def serve_all(
    flags: argparse.Namespace, names: dict[str, Path], job: ServeJob, expected: dict[Path, LogProbs]
) -> dict[str, Any]:
    """Serve the original and each checkpoint; what is known is written after each, so that a killed run keeps it."""
    written: dict[str, Any] = {"source": None, "checkpoints": {}}
    original = None
    for name, directory in [*([] if flags.source is None else [("source", flags.source)]), *names.items()]:
        own = expected.get(directory)
        run, result = probe_one(directory, flags.python, job, original=original, expected=own, timeout=flags.timeout)
        if len(written) == 2:
            written = {**heading(flags, job, result), **written}
        if directory == flags.source:
            original = run
            written["source"] = entry(result, run.served)
        else:
            written["checkpoints"][name] = entry(result, run.served)
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        flags.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        print(name, result.verdict, flush=True)
    return written


def table(written: dict[str, Any]) -> str:
    """Return the speeds as lines of text."""
    rows = {"source": written["source"], **written["checkpoints"]}
    lines = []
    for name, row in rows.items():
        if row is None:
            continue
        parts = [f"{name:<24} {row['verdict']:<14}"]
        for phase, rate in row["throughput"].items():
            ratio = rate["ratio_to_source"]
            parts.append(f"{phase} {rate['tokens_per_second']:>10,.0f}/s" + ("" if ratio is None else f" ({ratio}x)"))
        if row.get("weight_bytes"):
            parts.append(f"weights {row['weight_bytes'] / 2**30:.2f} GiB")
        parts += [f"|Δ| {d['split']} {d['mean_abs_difference']:.4f}" for d in row["log_probs"]]
        lines.append("  ".join(parts))
    return "\n".join(lines)


def main() -> None:
    flags = parse()
    names = {}
    for value in flags.checkpoint:
        name, separator, directory = value.partition("=")
        if not separator:
            sys.exit(f"error: --checkpoint {value}: give it as NAME=DIR")
        names[name] = Path(directory)
    directories = list(names.values())
    try:
        data = data_sets(flags, flags.source or directories[0])
        job = job_of(flags, data, flags.source or directories[0])
        given = [*([] if flags.source is None else [flags.source]), *directories]
        expected = expected_log_probs(given, list(data.values())) if data else {}
        written = serve_all(flags, names, job, expected)
    except BitladderError as error:
        sys.exit(f"error: {error}")
    print(table(written))
    print(flags.out)


if __name__ == "__main__":
    main()
