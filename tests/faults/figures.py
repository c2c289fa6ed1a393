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


def figures(results: Sequence[Result], seed: int, share: float, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return what was tried and held, by kind, and where and on what."""
    made = {
        "seed": seed,
        "share": share,
        "commit": _commit(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} processors, {platform.system()}",
        "python": platform.python_version(),
    }
    kinds: dict[str, Any] = {}
    for kind in dict.fromkeys(result.kind for result in results):
        ours = [result for result in results if result.kind == kind]
        failed = [result for result in ours if not result.held]
        kinds[kind] = {
            **made,
            "tried": len(ours),
            "held": len(ours) - len(failed),
            "verdicts": dict(sorted(Counter(result.verdict for result in ours).items())),
            "failures": [f"{r.name}: {r.verdict}: {r.detail}" for r in failed[:_MOST_FAILURES]],
        }
    return totals(kinds, {name: round(value) for name, value in seconds.items()})


def totals(kinds: Mapping[str, Any], seconds: Mapping[str, int]) -> dict[str, Any]:
    """Return the figures of some kinds with their sums."""
    return {
        "tried": sum(entry["tried"] for entry in kinds.values()),
        "held": sum(entry["held"] for entry in kinds.values()),
        "seconds": dict(seconds),
        "kinds": dict(kinds),
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def table(content: Mapping[str, Any]) -> str:
    """Return the page's table."""
    rows = [
        f"| {kind} | {entry['share']:.0%} | {entry['tried']} | {entry['held']} | {_verdicts(entry['verdicts'])} "
        f"| {entry['seed']}, {entry['commit']} |"
        for kind, entry in content["kinds"].items()
    ]
    return "\n".join(
        (
            "| Kind | Of all | Tried | Held | How they ended | Seed, commit |",
            "|---|---:|---:|---:|---|---|",
            *rows,
            f"| **all** | | **{content['tried']}** | **{content['held']}** | | |",
            "",
        )
    )


def _verdicts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def write(content: Mapping[str, Any]) -> None:
    """Write the figures and put the table into the page; kinds that were not tried keep theirs."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else totals({}, {})
    content = totals(known["kinds"] | content["kinds"], known["seconds"] | content["seconds"])
    RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    page = PAGE.read_text()
    before, rest = page.split(_BEGIN)
    PAGE.write_text(before + _BEGIN + table(content) + _END + rest.split(_END)[1])
