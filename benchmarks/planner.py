"""Planning for many formats: how long fifteen targets take, beside the planner that made the whole frontier for them.

    python benchmarks/planner.py                         # writes benchmarks/results/planner.json; some minutes

Measurements are made up: sizes as a decoder's groups have them, scores that grow fourfold a bit with some noise. The
earlier planner is read from the history of this repository and runs in the same process, alternating; where it exceeds
its limit, or there is no time for it, that is said. Each target's plan is compared with HiGHS (scipy.optimize.milp).
"""

import argparse
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EARLIER = "97471aa"  # the last commit whose planner made the whole frontier
WIDTHS = {"q8": 8, "q4": 4, "q6": 6, "q5": 5, "q12": 12, "q3": 3, "q7": 7, "q10": 10}
SHAPES = ((2048, 2048), (2560, 2048), (2048, 11008), (22016, 2048))
# groups, formats beside bf16, whether sizes are all different, whether the earlier planner runs too
CASES = ((144, 1, False, True), (144, 3, False, True), (144, 8, False, True), (144, 8, True, False),
         (1000, 4, False, True), (1000, 4, True, False))  # fmt: skip
TARGETS = 15
REPEATS = 3


def earlier_planner():
    """Return the planner as it was, as a module."""
    source = subprocess.run(
        ["git", "show", f"{EARLIER}:src/bitladder/planning.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    path = Path(tempfile.mkdtemp()) / "earlier_planning.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("earlier_planning", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["earlier_planning"] = module
    spec.loader.exec_module(module)
    return module


def make(groups: int, count: int, different: bool):
    """Return a made-up measurement."""
    sys.path.insert(0, str(ROOT / "tests"))
    from bitladder import formats
    from bitladder.formats.fp8_tensor import Fp8Tensor
    from test_planning import BITS, measurement_of

    names = list(WIDTHS)[:count]
    for name in names:
        formats.FORMATS[name] = type("Other", (Fp8Tensor,), {"name": name, "code_bits": WIDTHS[name]})()
    BITS.update(WIDTHS)
    rng = random.Random(0)
    sizes = [rng.choice(SHAPES) for _ in range(groups)]
    sizes = [a * b + (16 * rng.randrange(100_000) if different else 0) for a, b in sizes]
    rows = []
    for size in sizes:
        base = 10 ** rng.uniform(-4, -1) * size / 1e7
        rows.append({name: base * 4.0 ** (8 - WIDTHS[name]) * rng.lognormvariate(0, 0.3) for name in names})
    return measurement_of(sizes, rows, tuple(names))


def timed(call) -> tuple[float, object]:
    """Return seconds, and what came of it: the result, or the message of a refusal."""
    from bitladder.errors import PlanError

    begin = time.perf_counter()
    try:
        found = call()
    except PlanError as error:
        found = str(error)
    return time.perf_counter() - begin, found


def by_highs(measurement, max_bits: int) -> float:
    """Return the score that HiGHS reaches within so many bits, with a relative gap of 1e-7 and its own tolerances."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    from bitladder.planning.options import options_of

    options = options_of(measurement)
    owner = np.repeat(np.arange(len(options)), [len(one.names) for one in options])
    score = np.concatenate([one.scores for one in options])
    bits = np.concatenate([one.bits for one in options])
    one_each = csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    result = milp(
        score,
        integrality=np.ones(len(score)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(bits[None] / 2.0**20, ub=max_bits / 2.0**20)],
        options={"mip_rel_gap": 1e-7, "time_limit": 30},
    )
    return float(result.fun)


def run(groups: int, count: int, different: bool, beside: bool) -> dict:
    """Return one case's medians, in seconds."""
    from bitladder import planning
    from bitladder.recipe import SchemeSpec

    measurement = make(groups, count, different)
    low = min(WIDTHS[name] for name in measurement.formats)
    targets = [round(low + (15.9 - low) * (i + 0.5) / TARGETS, 3) for i in range(TARGETS)]
    by_bits = [SchemeSpec(name=f"bits{bits}", effective_bits=bits) for bits in targets]
    earlier = earlier_planner()
    seconds: dict[str, list[float]] = {"bits": [], "scores": [], "earlier": []}
    said = None
    for repeat in range(REPEATS):
        taken, schemes = timed(lambda: planning.plan_all(measurement, by_bits))
        seconds["bits"].append(taken)
        by_score = [SchemeSpec(name=s.name, max_predicted_score=s.predicted_score * 1.001) for s in schemes]
        seconds["scores"].append(timed(lambda by_score=by_score: planning.plan_all(measurement, by_score))[0])
        if beside and (repeat == 0 or seconds["earlier"][0] < 20):
            taken, then = timed(lambda: earlier.plan_all(measurement, by_bits))
            seconds["earlier"].append(taken)
            said = then if isinstance(then, str) else ("equal plans" if then == schemes else "OTHER PLANS")
    checked = schemes[:: max(1, TARGETS // 3)]
    begin = time.perf_counter()
    gaps = [s.predicted_score / by_highs(measurement, int(t * measurement.searched_weights)) - 1
            for s, t in zip(checked, targets[:: max(1, TARGETS // 3)], strict=True)]  # fmt: skip
    return {
        "groups": groups,
        "formats": count,
        "sizes_all_different": different,
        "targets": TARGETS,
        "seconds_by_bits": statistics.median(seconds["bits"]),
        "seconds_by_score": statistics.median(seconds["scores"]),
        "earlier_seconds_by_bits": statistics.median(seconds["earlier"]) if seconds["earlier"] else None,
        "earlier_said": said,
        "highs_seconds_a_target": (time.perf_counter() - begin) / len(checked),
        "score_over_highs_minus_1": gaps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks/results/planner.json")
    arguments = parser.parse_args()

    from bitladder.runinfo import hardware, versions

    rows = []
    content = {
        "claim": "fifteen targets of 144 groups in 8 formats take less than 1 s, of 1,000 groups in 4 less than 5 s",
        "hardware": hardware(),
        "versions": versions(),
        "repeats": REPEATS,
        "cases": rows,
    }
    for case in CASES:
        rows.append(run(*case))
        print(json.dumps(rows[-1]), flush=True)
        arguments.result.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
