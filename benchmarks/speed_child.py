"""Child of `speed.py`: an engine of random weights in one checkpoint's formats, timed when told. In vLLM's environment.

    python speed_child.py JOB RESULT CHILD_SERVE REPLIES

Imports vLLM, says so on the file descriptor REPLIES, and waits for a line of its standard input before it builds the
engine. Then it answers each line, a list of loads in JSON, with the seconds of each, until the input ends. Its steps
are in RESULT, as those of `child_serve.py`, whose path is CHILD_SERVE.

Where the engine speculates (`speculative_config`), every step of decoding must have all its drafted tokens, or its time
would say nothing. So the model says one of two tokens only, by rows of its embedding that are far longer than others
and opposite to each other; both open every prompt, where `ngram` finds them and drafts what follows, which is wrong: a
step keeps one token of every request. The answer has the tokens of each scheduled step, which show it.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from served_mixes_child import load, main

SAID = (0, 1)  # the tokens that the model says
LONGER = 1e4  # than other rows: such logits are above all others, such inputs outweigh what layers add

if __name__ == "__mp_main__":  # a rank that was spawned imports this script again: it needs the loader as well
    load(Path(sys.argv[3]).with_name("child_random.py")).register()


def saying_two(fill: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    """Return what fills parameters as `fill` does, of a model that says the two tokens only."""

    def filled(name: str, parameter: Any) -> None:
        fill(name, parameter)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            row = parameter.data[SAID[0]] * LONGER
            parameter.data[SAID[0]], parameter.data[SAID[1]] = row, -row

    return filled


def scheduled(llm: Any) -> list[int]:
    """Return a list that gets the tokens of every step that the engine schedules from now on."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    plain, steps = scheduler.schedule, []

    def schedule(*arguments: Any, **named: Any) -> Any:
        found = plain(*arguments, **named)
        steps.append(found.total_num_scheduled_tokens)
        return found

    scheduler.schedule = schedule
    return steps


def work(job: dict[str, Any], serving: Any, report: Any, replies: Any) -> None:
    """Import, wait, build, then answer until the input ends."""
    with report.step("imported") as facts:
        facts["runtime"] = serving.runtime_facts()
    print(json.dumps("imported"), file=replies, flush=True)
    sys.stdin.readline()
    gpu = facts["runtime"]["gpu"]
    speculates = "speculative_config" in job["engine"]
    with report.step("built") as facts:
        random = load(Path(sys.argv[3]).with_name("child_random.py"))
        engine = {key: job["engine"][key] for key in job["engine"] if gpu or key == "speculative_config"}
        if speculates:
            random.fill = saying_two(random.fill)
        llm = serving.build({**job, "engine": {**engine, "load_format": random.register()}}, gpu)
        if job["engine"].get("tensor_parallel_size", 1) == 1:  # else the model is in other processes
            facts.update(llm.apply_model(lambda model: serving.layer_facts(model, []))[0])
            facts.update(serving.memory_facts(llm, gpu))
    print(json.dumps("ready"), file=replies, flush=True)
    steps = scheduled(llm) if speculates else []
    for line in sys.stdin:
        answers = []
        for one in json.loads(line):
            steps.clear()
            found = serving.timings(llm, {**one, "opening": SAID} if speculates else one)
            answers.append({**found, "steps": list(steps)})
        print(json.dumps(answers), file=replies, flush=True)


if __name__ == "__main__":
    sys.exit(main(work))
