"""One process against several workers, each with a GPU of its own: the same bytes, in how many seconds.

    python benchmarks/full_size.py build DIR                      # Qwen2.5-VL-3B at full size, random weights
    python benchmarks/workers.py run --model DIR --workers 2      # writes benchmarks/results/workers.json

Every kind of measurement is made by one process without Ray, by one again (where a GPU adds up in no fixed order,
these two differ already), by `--workers` of them, and by as many of which one is killed (SIGKILL) after the first
scored batch. Each is a process of its own, timed by the measurement's own phases, and compiles anew what it compiles;
the weight files are in the page cache, since their digests are taken before. The bytes that are compared are those of
measurement.json but `run`, of measurement.safetensors, and of the codes. On a CPU workers have `--threads` threads
each, and so has the one process. The result is written after every measurement; kinds of an earlier run stay in it.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import full_size
import ladder
import psutil

RESULT = full_size.RESULTS / "workers.json"
KINDS = {
    "fisher": {"spec": {"method": "fisher"}, "score_samples": 512},
    "kl_div": {"spec": {"method": "kl_div"}, "score_samples": 80},
    "compensated": {"spec": {"method": "gradient", "rounding": "compensated"}, "score_samples": 128},
}


def digests(output: Path) -> dict[str, str]:
    """Return the SHA-256 of every file that a measurement wrote, its record without where and how it ran."""
    found = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    record = json.loads(found["measurement.json"])
    record.pop("run")
    found["measurement.json"] = json.dumps(record).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(found.items())}


def kill_a_worker() -> None:
    """Kill one of the workers, which are processes below this one."""
    processes = psutil.Process().children(recursive=True)
    victim = next(process for process in processes if process.name().startswith("ray::_Worker"))
    os.kill(victim.pid, signal.SIGKILL)


def measure(model: Path, scratch: Path, kind: str, sizes: dict, workers: int, threads: int, kill: bool) -> dict:
    """Measure once; return what each phase took, and the digests of what was written."""
    import torch

    from bitladder.measuring.measure import measure as measure_now
    from bitladder.models import weights
    from bitladder.models.target import find_target
    from bitladder.recipe import MeasureSpec, WorkersSpec

    torch.set_num_threads(threads)
    settings = {key: value for key, value in sizes.items() if key != "score_samples"}
    data = full_size.text_of(model, scratch, settings)
    source = weights.model_source(model, path=str(model), revision=None, cache=weights.DigestCache())
    samples = min(sizes.get("score_samples", KINDS[kind]["score_samples"]), settings["samples"])
    spec = MeasureSpec(engine="native", score_samples=samples, **KINDS[kind]["spec"])
    killed = []

    def progress(phase: str, done: int, total: int) -> None:
        if kill and not killed and (phase, done) == ("score", 1):
            kill_a_worker()
            killed.append(done)

    output = scratch / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    start = time.perf_counter()
    measurement = measure_now(
        model,
        source,
        find_target(model),
        data,
        spec,
        output,
        progress,
        WorkersSpec(count=workers, threads=threads),
    )
    seconds = time.perf_counter() - start
    assert measurement.run is not None
    assert kill == bool(killed)
    return {
        "workers": measurement.run.workers,
        "whole_seconds": seconds,
        "seconds": {phase.phase: phase.seconds for phase in measurement.run.phases},
        "peak_gpu_bytes": max(phase.peak_gpu_bytes or 0 for phase in measurement.run.phases),
        "peak_rss_bytes": max(phase.peak_rss_bytes for phase in measurement.run.phases),
        "digests": digests(output),
    }


def run(model: Path, kinds: list[str], chosen: list[str], sizes: dict, workers: int, threads: int, out: Path) -> None:
    """Make every kind of measurement in the chosen ways, and compare them."""
    import scoring
    import torch

    from bitladder.runinfo import hardware, versions

    content: dict = {
        "claim": f"{workers} workers write the bytes of one process, a killed one included, in less time",
        "hardware": hardware(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "versions": versions(),
        "kinds": json.loads(out.read_text())["kinds"] if out.exists() else {},
    }
    given = {"model": scoring.describe(model), "sizes": sizes}
    ways = {
        "alone": [],
        "again": [],
        "shared": ["--workers", str(workers)],
        "killed": ["--workers", str(workers), "--kill"],
    }
    with tempfile.TemporaryDirectory(prefix="workers-", dir=model.parent) as scratch:
        common = ["--model", str(model), "--scratch", scratch, "--sizes", json.dumps(sizes), "--threads", str(threads)]
        for kind in kinds:
            found: dict[str, dict] = {}
            digests_of: dict[str, dict[str, str]] = {}
            for way in chosen:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{scratch}/compiled-{kind}-{way}"
                flags = ways[way]
                measured = ladder.child("measure", "--kinds", kind, *common, *flags, script=__file__)
                digests_of[way] = measured.pop("digests")
                found[way] = measured
                content["kinds"][kind] = given | compare(found, digests_of)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(content, indent=1) + "\n")
                print(f"{kind} {way}: {json.dumps(measured)}", flush=True)
            shown = {key: value for key, value in content["kinds"][kind].items() if key != "runs"}
            print(f"{kind}: {json.dumps(shown)}", flush=True)


def compare(found: dict[str, dict], digests_of: dict[str, dict[str, str]]) -> dict:
    """Return how the runs of one kind compare with that of one process."""
    alone, files = found["alone"], digests_of["alone"]
    return {
        "files": len(files),
        "files_that_differ": {
            way: sorted(name for name in files.keys() | other.keys() if files.get(name) != other.get(name))
            for way, other in digests_of.items()
        },
        "speedup": {
            way: {
                phase: alone["seconds"][phase] / seconds if seconds else None
                for phase, seconds in measured["seconds"].items()
            }
            for way, measured in found.items()
        },
        "runs": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "measure"], help="run; the other is internal")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=0, help="run: how many, at least 2")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of measurements, separated by commas")
    parser.add_argument("--ways", default="alone,again,shared,killed", help="alone and others, separated by commas")
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON: samples, sequence_length, batch_size, ...")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--scratch", type=Path, help="internal")
    parser.add_argument("--kill", action="store_true", help="internal")
    arguments = parser.parse_args()
    kinds, sizes = arguments.kinds.split(","), {**full_size.SIZES, **arguments.sizes}
    if arguments.what == "run":
        if arguments.workers < 2:
            parser.error("--workers: at least 2")
        ways = arguments.ways.split(",")
        run(arguments.model, kinds, ways, sizes, arguments.workers, arguments.threads, arguments.out)
        return

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = measure(
        arguments.model, arguments.scratch, kinds[0], sizes, arguments.workers, arguments.threads, arguments.kill
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
