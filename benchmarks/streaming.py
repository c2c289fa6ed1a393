"""Measuring a model that is larger than the GPU: decoder layers of Qwen2.5-VL-72B, streamed under a limit of memory.

    python benchmarks/streaming.py run --root DIR      # writes benchmarks/results/streaming.json

The layers are those of the 72B model's language model (8192 wide, 0.88 billion weights each), with random weights, and
there are 4 and 8 of its 80: disk and time allow no more. What grows with them is stated a layer. Each model is
measured twice by `fisher`, whole on the GPU and streamed under `--memory-gb`, in processes of their own; their scores
are compared. The files are in the page cache. The host's peak is the process's resident memory.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import full_size
import ladder
import scoring

RESULT = full_size.RESULTS / "streaming.json"
DEPTHS = "4,8"
SIZE, METHOD = "4x512", "fisher"


def run(root: Path, depths: list[int], memory_gb: float, out: Path) -> None:
    """Measure at every depth, and write the result after each."""
    from bitladder.runinfo import hardware, versions

    wide = full_size.WIDE["hidden_size"]
    content: dict = {
        "claim": "a model larger than the GPU is measured by streaming its layers, with the same scores",
        "model": f"decoder layers of Qwen2.5-VL-72B's language model, {wide} wide, random weights",
        "hardware": hardware(),
        "versions": versions(),
        "memory_gb": memory_gb,
        "size": SIZE,
        "batches": scoring.BATCHES,
        "layers": {},
    }
    with tempfile.TemporaryDirectory(prefix="streaming-", dir=root) as scratch:
        for depth in depths:
            model = Path(scratch) / "model"
            ladder.child("build", "--root", str(model), "--depths", str(depth), script=__file__)
            found = {"weight_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors"))}
            for how in ("whole", "streamed"):
                limit = str(memory_gb if how == "streamed" else 0)
                found[how] = ladder.child("measure", "--root", str(model), "--memory-gb", limit, script=__file__)
                print(f"{depth} layers, {how}: {json.dumps({**found[how], 'scores': None})}", flush=True)
            scores = [found[how].pop("scores") for how in ("whole", "streamed")]
            found["largest_change"] = max(abs(scores[1][group] / scores[0][group] - 1) for group in scores[0])
            content["layers"][str(depth)] = found
            shutil.rmtree(model)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(content, indent=1) + "\n")
    first, last = (content["layers"][str(depth)]["streamed"] for depth in (min(depths), max(depths)))
    content["a_layer"] = {
        key: (last[key] - first[key]) / (max(depths) - min(depths))
        for key in ("calibration_seconds", "scoring_seconds", "peak_gpu_bytes", "peak_rss_bytes")
    }
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content["a_layer"]))


def measure(model: Path, memory_gb: float) -> dict:
    """Measure once; return seconds and memory, and every group's score."""
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        how = f"{memory_gb:g}gb" if memory_gb else ""
        measured = scoring.measure(model, Path(scratch), SIZE, "native", METHOD, how)
    seconds = {phase["phase"]: phase["seconds"] for phase in measured["phases"]}
    return {
        "loading_seconds": seconds["load model"],
        "calibration_seconds": seconds["calibrate"],
        "scoring_seconds": seconds["score"],
        "peak_gpu_bytes": measured["peak_gpu_bytes"],
        "peak_rss_bytes": max(phase["peak_rss_bytes"] for phase in measured["phases"]),
        "scores": measured["scores"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "build", "measure"], help="run; the others are internal")
    parser.add_argument("--root", type=Path, required=True, help="where the models go (and go away)")
    parser.add_argument("--depths", default=DEPTHS, help="numbers of layers, separated by commas")
    parser.add_argument("--memory-gb", type=float, default=12.0)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    depths = [int(depth) for depth in arguments.depths.split(",")]
    if arguments.what == "run":
        arguments.root.mkdir(parents=True, exist_ok=True)
        run(arguments.root, depths, arguments.memory_gb, arguments.out)
        return

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.what == "build":
        full_size.build(arguments.root, None, depths[0], wide=True)
        print("{}")
        return
    print(json.dumps(measure(arguments.root, arguments.memory_gb)))


if __name__ == "__main__":
    main()
