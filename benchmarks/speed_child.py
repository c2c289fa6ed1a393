"""Child of `speed.py`: an engine of random weights in one checkpoint's formats, timed when told. In vLLM's environment.

    python speed_child.py JOB RESULT CHILD_SERVE REPLIES

Imports vLLM, says so on the file descriptor REPLIES, and waits for a line of its standard input before it builds the
engine. Then it answers each line, a list of loads in JSON, with the seconds of each, until the input ends. Its steps
are in RESULT, as those of `child_serve.py`, whose path is CHILD_SERVE.
"""

import json
import sys
from pathlib import Path
from typing import Any

from served_mixes_child import load, main

if __name__ == "__mp_main__":  # a rank that was spawned imports this script again: it needs the loader as well
    load(Path(sys.argv[3]).with_name("child_random.py")).register()


def work(job: dict[str, Any], serving: Any, report: Any, replies: Any) -> None:
    """Import, wait, build, then answer until the input ends."""
    with report.step("imported") as facts:
        facts["runtime"] = serving.runtime_facts()
    print(json.dumps("imported"), file=replies, flush=True)
    sys.stdin.readline()
    gpu = facts["runtime"]["gpu"]
    with report.step("built") as facts:
        load_format = load(Path(sys.argv[3]).with_name("child_random.py")).register()
        llm = serving.build({**job, "engine": {**(job["engine"] if gpu else {}), "load_format": load_format}}, gpu)
        if job["engine"].get("tensor_parallel_size", 1) == 1:  # else the model is in other processes
            facts.update(llm.apply_model(lambda model: serving.layer_facts(model, []))[0])
            facts.update(serving.memory_facts(llm, gpu))
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps([serving.timings(llm, one) for one in json.loads(line)]), file=replies, flush=True)


if __name__ == "__main__":
    sys.exit(main(work))
