"""Which runtime, in which version, loads which checkpoint: the table of docs/runtimes.md.

    python benchmarks/compatibility.py --python VLLM_PYTHON [--python ANOTHER ...] NAME=DIR [NAME=DIR ...]

Each checkpoint goes through the pre-flight, and through vLLM's own loader in each of the environments (no GPU needed).
Writes benchmarks/results/compatibility.json and prints the table.
"""

import argparse
import json
import os
from pathlib import Path

from bitladder.report.numbers import markdown_table
from bitladder.runinfo import hardware
from bitladder.runtimes import preflight
from bitladder.runtimes.vllm.load import load_all

RESULT = Path(__file__).resolve().parent / "results" / "compatibility.json"


def cell(result) -> dict:
    """Return what the table says of one result."""
    formats = [layer.format for layer in result.layers]
    return {
        "stage": result.stage,
        "version": result.version,
        "device": result.device,
        "verdict": result.verdict,
        "warnings": sorted({f.error_class for f in result.findings if f.severity == "warning"}),
        "fp8_modules": formats.count("fp8"),
        "modules": len(formats),
        "kernels": sorted({layer.kernel for layer in result.layers if layer.kernel}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, action="append", default=[], help="of an environment with vLLM")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=DIR")
    arguments = parser.parse_args()
    directories = {name: Path(path) for name, _, path in (item.partition("=") for item in arguments.checkpoints)}
    table: dict[str, dict[str, dict]] = {name: {} for name in directories}
    for name, directory in directories.items():
        for result in preflight.preflight(directory):
            table[name][f"{result.runtime}, pre-flight"] = cell(result)
    for python in arguments.python:
        results = load_all(list(directories.values()), Path(os.path.abspath(python)), isolated=False)
        for name, result in zip(directories, results, strict=True):
            table[name][f"vLLM {result.version}, loader"] = cell(result)
    arguments.out.write_text(json.dumps({"hardware": hardware(), "checkpoints": table}, indent=1) + "\n")
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    rows = []
    for name, row in table.items():
        fp8 = {(entry["fp8_modules"], entry["modules"]) for entry in row.values() if entry["modules"]}
        shown = ", ".join(f"{count} of {of}" for count, of in sorted(fp8))
        rows.append([name, shown, *(row[column]["verdict"] if column in row else "not run" for column in columns)])
    print(markdown_table(["checkpoint", "linear modules in FP8", *columns], rows, left=2))


if __name__ == "__main__":
    main()
