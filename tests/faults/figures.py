"""The figures of a whole run of the trials: `benchmarks/results/reliability.json`, and the table of the page."""

import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from faults.verdict import Result

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"
_BEGIN, _END = "<!-- figures -->\n", "<!-- end of figures -->\n"
_MOST_FAILURES = 40  # listed by kind


def figures(results: Sequence[Result], seed: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return what was tried and held, by kind, and where and on what."""
    kinds: dict[str, Any] = {}
    for kind in dict.fromkeys(result.kind for result in results):
        ours = [result for result in results if result.kind == kind]
        failed = [result for result in ours if not result.held]
        kinds[kind] = {
            "tried": len(ours),
            "held": len(ours) - len(failed),
            "verdicts": dict(sorted(Counter(result.verdict for result in ours).items())),
            "failures": [f"{r.name}: {r.verdict}: {r.detail}" for r in failed[:_MOST_FAILURES]],
        }
    return {
        "seed": seed,
        "commit": _commit(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} processors, {platform.system()}",
        "python": platform.python_version(),
        "seconds": {name: round(value) for name, value in seconds.items()},
        "tried": len(results),
        "held": sum(result.held for result in results),
        "kinds": kinds,
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def table(content: Mapping[str, Any]) -> str:
    """Return the page's table, and the line that says of what it is."""
    rows = [
        f"| {kind} | {entry['tried']} | {entry['held']} | {_verdicts(entry['verdicts'])} |"
        for kind, entry in content["kinds"].items()
    ]
    return "\n".join(
        (
            f"Seed {content['seed']}, commit {content['commit']}, on {content['hardware']}.",
            "",
            "| Kind | Tried | Held | How they ended |",
            "|---|---:|---:|---|",
            *rows,
            f"| **all** | **{content['tried']}** | **{content['held']}** | |",
            "",
        )
    )


def _verdicts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def write(content: Mapping[str, Any]) -> None:
    """Write the figures and put the table into the page."""
    RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    page = PAGE.read_text()
    before, rest = page.split(_BEGIN)
    PAGE.write_text(before + _BEGIN + table(content) + _END + rest.split(_END)[1])
