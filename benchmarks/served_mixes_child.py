"""Child of `served_mixes.py`: keeps one checkpoint served and times batches when told. Runs in vLLM's environment.

    python served_mixes_child.py JOB RESULT CHILD_SERVE REPLIES

Builds the engine and scores sequences as `child_serve.py` (whose path is CHILD_SERVE) does, with its steps in RESULT.
Then it writes a line to the file descriptor REPLIES, and after it answers each line of its standard input, a `SpeedJob`
in JSON, with the seconds that the batch took, until the input ends. An exception ends it, with exit status 1.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load(path: Path) -> Any:
    """Return the module in a file."""
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def work(job: dict[str, Any], serving: Any, report: Any, replies: Any) -> None:
    """Build and score, then answer until the input ends."""
    with report.step("imported") as facts:
        facts["runtime"] = serving.runtime_facts()
    gpu = facts["runtime"]["gpu"]
    with report.step("built") as facts:
        llm = serving.build(job if gpu else {**job, "engine": {}}, gpu)
        facts.update(llm.apply_model(lambda model: serving.layer_facts(model, job["modules"]))[0])
        facts.update(serving.memory_facts(llm, gpu))
    with report.step("scored") as facts:
        facts["scores"] = serving.scores(llm, job["sequences"])
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(serving.timings(llm, json.loads(line))), file=replies, flush=True)


def main(work: Callable[[dict[str, Any], Any, Any, Any], None]) -> int:
    """Do work on the job, with `child_serve.py`'s functions, the report and the file of the replies."""
    serving = load(Path(sys.argv[3]))
    with os.fdopen(int(sys.argv[4]), "w") as replies:
        return serving.done(lambda job, report: work(job, serving, report, replies))


if __name__ == "__main__":
    sys.exit(main(work))
