"""How much processor time a command takes before its own work begins, beside an earlier commit.

    pip install --target plotly plotly                   # the earlier tree drew its page with it
    python benchmarks/start.py --packages plotly         # writes benchmarks/results/start.json; some minutes

Both trees do the same commands in children that alternate, on a small finished run of their own of the embedded model.
Three times of a child, user and system together: when it opens the first record that it works on (arguments are parsed
by then, a recipe is read and checked), when it enters the function that it is there for (numpy is imported by then,
where that computes), and when it ends. Processor time also grows while other processes press on the caches, so beside
the median stands the least; the ratio of the two trees is what to go by.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EARLIER = "d4b9728"  # the last commit whose commands imported all that any of them needs
GOAL = 0.4  # seconds before work begins
REPEATS = 15
TIMES = ("begin", "work", "end")
BEGIN = {  # command -> the file that it opens first of what it works on, and the function that works
    "plan": ("measurement.json", "bitladder.planning.asking.plan_all"),
    "frontier": ("measurement.json", "bitladder.planning.options.options_of"),
    "compare": ("report.json", "bitladder.report.compare.compare_runs"),
    "import": ("manifest.json", "bitladder.planning.importing.import_manifest"),
    "report": ("measurement.json", "bitladder.report.build.build_report"),
}
# Run by the child: says on a descriptor what has been used when the file is opened, and when the function is called.
CHILD = """
import os, resource, sys
from importlib.machinery import PathFinder
file, function, channel = sys.argv[1], sys.argv[2], int(sys.argv[3])
module, _, name = function.rpartition(".")
seen = set()

def tell(what):
    if what not in seen:
        seen.add(what)
        used = resource.getrusage(resource.RUSAGE_SELF)
        os.write(channel, f"{what} {used.ru_utime + used.ru_stime}\\n".encode())

def opened(event, arguments):
    if event == "open" and str(arguments[0]).endswith(file):
        tell("begin")

class Finder:
    def find_spec(self, fullname, path=None, target=None):
        spec = PathFinder.find_spec(fullname, path, target) if fullname == module else None
        if spec is not None:
            execute = spec.loader.exec_module
            def exec_module(found):
                execute(found)
                work = getattr(found, name)
                def told(*args, **kwargs):
                    tell("work")
                    return work(*args, **kwargs)
                setattr(found, name, told)
            spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
sys.addaudithook(opened)
sys.argv[:] = ["bitladder", *sys.argv[4:]]
from bitladder.cli import main
main()
"""
RECIPE = """
model: {path: package:demo/qwen2_5_vl_digits}
calibration:
  data: {kind: image_text, path: package:demo/data/calibration.jsonl}
  samples: 16
  sequence_length: 64
held_out:
  data: {kind: text, path: package:demo/data/captions.txt}
  samples: 4
  sequence_length: 32
measurement: {formats: [fp8]}
schemes:
  - {name: half, coverage: 0.5}
  - {name: full, coverage: 1.0}
output: run
"""
MANIFEST = ROOT / "tests/data/qwen2_5_vl_3b_instruct_fp8_autoquant_manifest.json"


def environment(tree: Path, cache: Path) -> dict[str, str]:
    """Return what a child runs with: a tree's sources, and compiled ones kept as an installation keeps them."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPATH": str(tree / "src"), "PYTHONPYCACHEPREFIX": str(cache), "OMP_NUM_THREADS": "1"}


def seconds(command: list[str], env: dict[str, str], work: Path) -> dict[str, float]:
    """Return the processor time of one command up to each of `TIMES`."""
    reader, writer = os.pipe()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", CHILD, *BEGIN[command[0]], str(writer), *command],
        env=env, cwd=work, pass_fds=[writer], check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    os.close(writer)
    with os.fdopen(reader) as channel:
        found = {what: float(used) for what, used in (line.split() for line in channel)}
    return found | {"end": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def commands(work: Path, number: str) -> list[list[str]]:
    """Return the commands to time; `number` names what may not be there yet."""
    return [
        ["plan", "recipe.yaml"],
        ["frontier", "run/measurement.json"],
        ["compare", "run", "run"],
        ["import", str(MANIFEST), str(work / f"imported_{number}.json")],
        ["report", "recipe.yaml"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks/results/start.json")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--packages", help="a directory with plotly, which the earlier tree needs")
    arguments = parser.parse_args()

    from bitladder.runinfo import hardware, versions

    work = Path(tempfile.mkdtemp())
    subprocess.run(["git", "worktree", "add", "--detach", work / "earlier", EARLIER], cwd=ROOT, check=True)
    try:
        trees = {"earlier": work / "earlier", "now": ROOT}
        env = {name: environment(tree, work / f"{name}_compiled") for name, tree in trees.items()}
        if arguments.packages:
            env["earlier"]["PYTHONPATH"] += os.pathsep + str(Path(arguments.packages).resolve())
        places = {name: work / f"{name}_runs" for name in trees}  # records have grown: each tree reads its own
        for name, place in places.items():
            place.mkdir()
            (place / "recipe.yaml").write_text(RECIPE)
            run = [sys.executable, "-m", "bitladder.cli", "run", "recipe.yaml"]
            subprocess.run(run, env=env[name], cwd=place, check=True)
        # The first round compiles, and isn't counted.
        rounds = [
            {
                name: [seconds(one, env[name], place) for one in commands(place, str(index))]
                for name, place in places.items()
            }
            for index in range(arguments.repeats + 1)
        ][1:]
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", work / "earlier"], cwd=ROOT, check=True)
    rows = []
    for index, command in enumerate(BEGIN):
        row: dict[str, object] = {"command": command}
        for name in trees:
            found = {time: [times[name][index][time] for times in rounds] for time in TIMES}
            row[name] = {time: {"median": statistics.median(all_), "least": min(all_)} for time, all_ in found.items()}
        row["ratio_to_begin"] = statistics.median(
            times["now"][index]["begin"] / times["earlier"][index]["begin"] for times in rounds
        )
        rows.append(row)
        print(json.dumps(row), flush=True)
    content = {
        "claim": f"plan, frontier, compare, import and report begin work within {GOAL} s of processor time",
        "hardware": hardware(),
        "versions": versions(),
        "repeats": arguments.repeats,
        "processor_seconds": rows,
    }
    arguments.result.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
