"""What becomes of every decoder architecture of the installed transformers: the table of docs/architectures.md.

    python benchmarks/architectures.py [NAME ...] [--again] [--limit SECONDS] [--render]

Each is built tiny, with random weights, by tests/tiny_architectures.py, and goes through the steps on the embedded
model's captions, in a process of GROUP architectures, on one thread: inspect, measure by either engine, then plan,
export, verify, pre-flight and evaluate what the native engine measured, or ModelOpt's where the native one refuses.
Models that see or hear are measured on text alone.

What is measured already is kept, but for architectures that are named; `--again` measures everything once more. Writes
benchmarks/results/architectures.json and docs/architectures.md; `--render` writes the page alone.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
ENGINES = ("native", "modelopt")
STEPS = ("inspect", *ENGINES, "export", "verify", "preflight", "evaluate")
GROUP = 12  # architectures a process
OK, REFUSED, TRACEBACK, FALSE_ERROR, TIME_LIMIT = "ok", "refused: ", "TRACEBACK ", "FALSE ERROR ", "TIME LIMIT"
NOT_BUILT, NOT_RUN = "not built: ", "not run: "
REMEDY_FAILS = "REMEDY FAILS "
REMEDY = "use engine: modelopt"

sys.path.insert(0, str(ROOT / "tests"))  # the models are the tests'


class TimeLimit(BaseException):
    """An architecture took longer than it may; not an Exception, so that nothing on the way catches it."""


@contextmanager
def time_limit(seconds: int):
    """Raise TimeLimit after `seconds`."""

    def stop(*_: object) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(step: Callable[[], Any]) -> tuple[str, Any]:
    """Return what the table says of a step, and what the step returned."""
    from bitladder.errors import BitladderError

    try:
        return OK, step()
    except BitladderError as error:
        return REFUSED + one_line(error), None
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "bitladder" in f.filename]
        where = f" @ {Path(frames[-1].filename).name} {frames[-1].name}" if frames else ""
        return f"{TRACEBACK}{type(error).__name__}: {one_line(error)[:200]}{where}", None


def one_line(error: BaseException) -> str:
    """Return the message in one line."""
    return " ".join(str(error).split())


def false_errors(results: Any) -> str | None:
    """Return the first error that the pre-flight finds in a checkpoint of our own, or None."""
    for result in results:
        for finding in result.findings:
            if finding.severity == "error":
                return f"{FALSE_ERROR}{result.runtime}: {' '.join(finding.problem.split())}"
    return None


def try_architecture(name: str, scratch: Path, cells: dict[str, str]) -> None:
    """Put into `cells` what each step makes of an architecture; steps after one that fails are left out."""
    import tiny_architectures
    from bitladder.models.target import find_target
    from bitladder.steps.evaluate import evaluate
    from bitladder.steps.export import export as export_step
    from bitladder.steps.measure import measure
    from bitladder.steps.plan import plan
    from bitladder.steps.preflight import preflight
    from bitladder.steps.verify import verify

    model = scratch / "model"
    try:
        tiny_architectures.build(name, model)
    except tiny_architectures.NotBuilt as error:
        cells["build"] = NOT_BUILT + str(error)
        return
    except Exception as error:  # transformers' own, on its own small configuration
        cells["build"] = f"{NOT_BUILT}{type(error).__name__}: {one_line(error)[:200]}"
        return
    cells["inspect"], _ = attempt(lambda: find_target(model))
    if cells["inspect"] != OK:
        return
    problem = tiny_architectures.why_it_does_not_run(name, model)
    if problem is not None:
        cells.update(dict.fromkeys(ENGINES, f"{NOT_RUN}transformers itself fails on text alone: {problem}"))
        return
    works = {engine: tiny_architectures.workspace(model, scratch / engine, engine) for engine in ENGINES}
    for engine, work in works.items():
        cells[engine], _ = attempt(lambda work=work: measure(work))
    if REMEDY in cells["native"] and cells["modelopt"] != OK:
        cells["modelopt"] = REMEDY_FAILS + cells["modelopt"]
    work = next((work for engine, work in works.items() if cells[engine] == OK), None)
    if work is None:
        return

    def export() -> None:
        plan(work)
        export_step(work)

    after = {"export": export, "verify": lambda: verify(work), "preflight": lambda: preflight(work)}
    for step, call in {**after, "evaluate": lambda: evaluate(work)}.items():
        cells[step], result = attempt(call)
        if step == "preflight" and cells[step] == OK:
            cells[step] = false_errors(result) or OK
        elif cells[step] != OK:
            break


def work_through(names: list[str], limit: int) -> None:
    """Print one line of JSON an architecture: what a child process does."""
    import warnings

    import torch
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in names:
        start, cells = time.monotonic(), dict[str, str]()
        with tempfile.TemporaryDirectory() as scratch:
            try:
                with time_limit(limit):
                    try_architecture(name, Path(scratch), cells)
            except TimeLimit:
                cells[next(step for step in STEPS if step not in cells)] = f"{TIME_LIMIT} of {limit} s"
        print(json.dumps({"name": name, "cells": cells, "seconds": round(time.monotonic() - start, 1)}), flush=True)


def run_group(names: list[str], limit: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the result of each architecture, from a process of their own; one that kills it is named as such."""
    left = list(names)
    while left:
        command = [sys.executable, __file__, "--child", "--limit", str(limit), *left]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        ) as child:
            for line in child.stdout or ():
                if line.startswith('{"name"'):
                    result = json.loads(line)
                    yield left.pop(0), {"cells": result["cells"], "seconds": result["seconds"]}
        if left:
            cell = f"{TRACEBACK}the process ended with {child.returncode}"
            yield left.pop(0), {"cells": {"build": cell}, "seconds": 0.0}


def summary(cells: dict[str, str]) -> str:
    """Return one line on an architecture for the terminal."""
    bad = {step: cell for step, cell in cells.items() if cell != OK}
    return "; ".join(f"{step}: {cell[:150]}" for step, cell in bad.items()) or OK


def counted(rows: int) -> str:
    """Return how many rows the page has, and of how many where some are missing."""
    import tiny_architectures

    every = len(list(tiny_architectures.architectures()))
    return f"{rows} rows" if rows >= every else f"{rows} of {every} rows so far, in alphabetical order"


def render(record: dict[str, Any]) -> str:
    """Return docs/architectures.md."""
    from bitladder.report.numbers import markdown_table

    numbers: dict[str, int] = {}  # by what is generic in a reason
    listed: dict[int, str] = {}

    def shown(cell: str | None) -> str:
        if cell in (None, OK):
            return cell or ""
        reason = cell.removeprefix(REFUSED).removeprefix(NOT_BUILT).removeprefix(NOT_RUN)
        reason = re.sub(r"/\S+/model\b", "MODEL", reason)  # no path of the machine that measured
        number = numbers.setdefault(generic(reason), len(numbers) + 1)
        listed.setdefault(number, reason)
        return f"{kind_of(cell)} [{number}](#reasons)"

    rows = []
    for name, entry in record["architectures"].items():
        cells = entry["cells"]
        types = ", ".join(entry["model_types"])
        first = shown(cells.get("build") or cells.get("inspect"))
        rows.append([f"`{name}`", types, first, *(shown(cells.get(step)) for step in STEPS[1:])])
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    table = markdown_table(["architecture", "model type", *STEPS], rows, left=2 + len(STEPS))
    reasons = "\n".join(f"{number}. {reason}" for number, reason in listed.items())
    return PAGE_TEXT.format(
        table=table.strip(),
        reasons=reasons,
        count=counted(len(rows)),
        totals=totals(record),
        where=environment_of(record),
    )


PAGE_TEXT = """\
# Architectures

What Bitladder makes of every decoder architecture that the installed transformers names: {count}, the model
classes of its auto mappings for causal, image-text and multimodal language models, some in several kinds (after the
colon). Made by `python benchmarks/architectures.py` on tiny random models; a part of it runs in the tests
(`tests/test_architectures.py`).

{where}

{totals}

*native* and *modelopt* are the two engines that measure, each with its default method; *export*, *verify*, *preflight*
and *evaluate* follow what the native engine measured, or ModelOpt's where the native one refuses. Models that see or
hear are measured on text alone here, without pictures. An empty cell was not reached. `refused` is one line and exit
status 2; anything else that is not `ok` is a fault of Bitladder. What a tiny random model can't show is how far a real
one is from its original.

{table}

## Reasons
Names, module paths and sizes are those of one architecture that has this reason.

{reasons}
"""


def environment_of(record: dict[str, Any]) -> str:
    """Return where and with what the table was made."""
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{record['hardware']}; {packages}."


def kind_of(cell: str) -> str:
    """Return the kind of a cell that isn't ok, as the table shows it."""
    kinds = (REFUSED, NOT_BUILT, NOT_RUN, REMEDY_FAILS, TRACEBACK, FALSE_ERROR, TIME_LIMIT)
    return next(kind for kind in kinds if cell.startswith(kind)).strip(" :")


def generic(reason: str) -> str:
    """Return a reason without names and numbers, so that those of one kind have one number."""
    return re.sub(r"'[^']*'|\w+(\.\w+)+|\b[A-Z]\w+|\d+|/\S+", "·", reason)


def totals(record: dict[str, Any]) -> str:
    """Return how many architectures end how."""
    ends: dict[str, int] = {}
    for entry in record["architectures"].values():
        end = ending(entry["cells"])
        ends[end] = ends.get(end, 0) + 1
    return "\n".join(f"- {count} {end}" for end, count in sorted(ends.items(), key=lambda item: -item[1]))


def ending(cells: dict[str, str]) -> str:
    """Return how an architecture ends, in words."""
    faults = (TRACEBACK, FALSE_ERROR, REMEDY_FAILS, TIME_LIMIT)
    if any(cell.startswith(faults) for cell in cells.values()):
        return "have a cell that is a fault"
    if "build" in cells or cells.get("native", "").startswith(NOT_RUN):
        return "are not built tiny here, or transformers itself doesn't run them, with the reason"
    if cells["inspect"] != OK:
        return "are refused by `inspect`, with the reason"
    if all(cells.get(step) == OK for step in STEPS):
        return "go through every step with both engines"
    if cells.get("verify") == OK:
        return "end with verified checkpoints, one engine or one later step refused in one line"
    return "are refused after `inspect`, in one line"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; all of them where none is named")
    parser.add_argument("--again", action="store_true", help="measure what is measured already")
    parser.add_argument("--limit", type=int, default=120, help="seconds an architecture may take")
    parser.add_argument("--render", action="store_true", help="write the page from what is measured")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        work_through(arguments.names, arguments.limit)
        return

    import tiny_architectures
    from bitladder.runinfo import hardware, versions

    known = tiny_architectures.architectures()
    unknown = sorted(set(arguments.names) - set(known))
    if unknown:
        parser.error(f"transformers names no decoder {', '.join(unknown)}")
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {"architectures": {}}
    done = {} if arguments.again and not arguments.names else record["architectures"]
    wanted = arguments.names or [name for name in known if name not in done]
    for start in range(0, 0 if arguments.render else len(wanted), GROUP):
        for name, entry in run_group(wanted[start : start + GROUP], arguments.limit):
            print(f"{name:44} {entry['seconds']:6} s  {summary(entry['cells'])}", flush=True)
            done[name] = entry
            rows = {n: {"model_types": list(known[n].model_types), **done[n]} for n in known if n in done}
            record = {"hardware": hardware(), "versions": versions(), "architectures": rows}
            RESULT.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(render(record))


if __name__ == "__main__":
    main()
