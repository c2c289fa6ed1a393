"""Engines of vLLM that stay up, each in a process of its own, and time batches when asked (`Engine`, `Serving`).

Beside them what `served_mixes.py` and `speed.py` share: the file of results, and arms of several formats.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from bitladder.runtimes.child import Outcome
from bitladder.runtimes.vllm import serve
from bitladder.runtimes.vllm.job import ServeJob, SpeedJob
from bitladder.runtimes.vllm.served import Served

CHILD = Path(__file__).with_name("served_mixes_child.py")
SOURCE = "source"  # the name of the original among the arms
BATCHES = {"1 x 2048": (1, 2048, 65), "32 x 512": (32, 512, 65)}  # requests, prompt tokens, output tokens
TINY_BATCHES = {"1 x 64": (1, 64, 9), "4 x 16": (4, 16, 9)}
SPARE = 90.0  # seconds that are left for the evaluation and the loader check after the last round
START = 120.0  # seconds in which engines that failed among others may come up alone
SETTINGS = {  # of vLLM's environment, where the caller's says nothing else
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # without flashinfer 0.25.1 stops while it makes its sampler
    "VLLM_USE_DEEP_GEMM": "0",  # it compiles its kernels when they are first needed, with a compiler that servers lack
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


class Results:
    """The file, rewritten whole after each step, and the clock."""

    def __init__(self, path: Path, start: float, seconds: float, content: dict[str, Any]) -> None:
        self.path, self.content, self.start, self.seconds = path, content, start, seconds
        self.arms: dict[str, dict[str, Any]] = content["arms"]

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def say(self, words: str) -> None:
        """Print what is done, with the seconds since the start, and write the file."""
        elapsed = round(time.monotonic() - self.start, 1)
        print(f"[{elapsed:6.1f} s] {words}", flush=True)
        self.content["done"][words] = elapsed
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(temporary, self.path)

    def failed(self, arm: str, step: str, error: BaseException | str) -> None:
        """Keep why a step of an arm failed."""
        told = error if isinstance(error, str) else "".join(traceback.format_exception(error))[-3000:]
        self.arms[arm].setdefault("failed", {})[step] = told
        self.say(f"{step} of {arm} failed: {told.strip().splitlines()[-1][:200]}")

    def collect(self, step: str, futures: dict[str, Future], keep: Callable[[str, Any], None]) -> None:
        """Keep each arm's result of a step, as long as there is time."""
        for arm, future in futures.items():
            try:
                keep(arm, future.result(timeout=max(1.0, self.left)))
            except TimeoutError:
                self.failed(arm, step, "not finished within the seconds")
            except Exception as error:  # an arm's failure is a result
                self.failed(arm, step, error)
            else:
                self.say(f"{step} of {arm}")


class Engine:
    """A child that serves a checkpoint; started, not yet up, when it is made."""

    def __init__(
        self,
        python: Path,
        checkpoint: Path,
        job: ServeJob,
        engine: dict[str, Any],
        directory: Path,
        child: Path = CHILD,
    ) -> None:
        """Start it.

        Args:
            python: the interpreter of vLLM's environment.
            checkpoint: what is served.
            job: what is scored, and the largest batch that will be timed.
            engine: more arguments of `vllm.LLM`, used on a GPU.
            directory: where its job, result and output go.
            child: the script.
        """
        directory.mkdir(parents=True)
        self.result, self.output = directory / "result.json", directory / "output.txt"
        path = directory / "job.json"
        path.write_text(json.dumps({**serve.child_job(checkpoint, job), "engine": engine}))
        self.replies, writing = os.pipe()
        self._told = b""
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [str(python), str(child), str(path), str(self.result), str(serve.SCRIPT), str(writing)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**serve.ENVIRONMENT, **os.environ},
                pass_fds=(writing,),
                start_new_session=True,  # so that its own children can be killed with it
            )
        os.close(writing)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def reply(self, seconds: float) -> Any:
        """Return the next thing that it says; None: it ended, or said nothing in time."""
        end = time.monotonic() + seconds
        while b"\n" not in self._told:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.replies], [], [], left)[0]:
                return None
            read = os.read(self.replies, 65536)
            if not read:
                self.process.wait(30)
                return None
            self._told += read
        line, _, self._told = self._told.partition(b"\n")
        return json.loads(line)

    def ask(self, speed: dict[str, Any], seconds: float) -> Any:
        """Return the seconds of a batch; None: it ended, or took too long."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(speed).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self.reply(seconds)

    def served(self, *, timed_out: bool = False) -> Served:
        """Return what is known of it by now."""
        try:
            result = json.loads(self.result.read_text())
        except (OSError, ValueError):
            result = {}
        said = self.output.read_text(errors="replace")
        return Served.parse(Outcome(result, self.process.poll() or 0, timed_out, said))

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        os.close(self.replies)


def vllm_python(python: Path, site: str | None, scratch: Path) -> Path:
    """Return an interpreter that finds vLLM in `site`, and nothing of ours, and has the settings of a server."""
    lines = [f'export {name}="${{{name}:-{value}}}"' for name, value in SETTINGS.items()]
    lines += [f'export PYTHONPATH="{site or ""}"', f'exec "{python.absolute()}" "$@"']
    path = scratch / "vllm-python"
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def in_turn(names: Sequence[str], groups: Sequence[Any]) -> dict[str, str]:
    """Return group -> format: these take the groups in turn, beginning with the next one in every layer."""
    layers: dict[str, list[str]] = {}
    for group in groups:
        layers.setdefault(group.name.rpartition(".layers.")[2].partition(".")[0], []).append(group.name)
    return {
        group: names[(index + place) % len(names)]
        for index, own in enumerate(layers.values())
        for place, group in enumerate(own)
    }


def rates(shape: tuple[int, int, int], timings: dict[str, list[float]]) -> dict[str, float]:
    """Return the rates of one visit to an engine."""
    requests, prompt, output = shape
    one, many = median(timings["one_token"]), median(timings["all_tokens"])
    found = {"seconds_to_first_token": one, "prefill_tokens_per_second": requests * prompt / one}
    if many > one:
        found["decode_tokens_per_second"] = requests * (output - 1) / (many - one)
    return found


def speeds(arm: str, rounds: list[dict[str, Any]], batches: dict[str, tuple[int, int, int]]) -> dict[str, Any]:
    """Return an arm's median rates and their ratios to the original, round by round."""
    found: dict[str, Any] = {}
    for name, shape in batches.items():
        visits = [
            {who: rates(shape, one[who][name]) for who in (arm, SOURCE) if name in one.get(who, {})}
            for one in rounds
            if name in one.get(arm, {})
        ]
        for rate in sorted({rate for visit in visits for rate in visit[arm]}):
            own = [visit[arm][rate] for visit in visits if rate in visit[arm]]
            both = [visit for visit in visits if all(rate in visit.get(who, {}) for who in (arm, SOURCE))]
            ratios = sorted(round(visit[arm][rate] / visit[SOURCE][rate], 4) for visit in both)
            found.setdefault(name, {})[rate] = {
                "median": median(own),
                "rounds": len(own),
                "ratio_to_source": round(median(ratios), 4) if ratios else None,
                "ratios": ratios,
            }
    return found


class Serving:
    """The engines of some arms and of the original."""

    def __init__(self, flags: Any, results: Results, python: Path, job: Any, scratch: Path) -> None:
        self.flags, self.results, self.python, self.job, self.scratch = flags, results, python, job, scratch
        self.batches = TINY_BATCHES if flags.tiny else BATCHES
        self.runs: dict[str, Any] = {}

    def start(self, directories: dict[str, Path]) -> dict[str, Engine]:
        """Start engines at once; return those that came up."""
        engines = {
            name: Engine(self.python, directory, self.job, self.flags.engine, self.scratch / f"engine-{index}-{name}")
            for index, (name, directory) in enumerate(directories.items())
        }
        limit = min(self.flags.start_seconds, self.results.left - SPARE) + time.monotonic()
        up = {}
        for name, engine in engines.items():
            ready = engine.reply(limit - time.monotonic())
            self.runs[name] = served = engine.served(timed_out=ready is None and engine.alive)
            if ready == "ready":
                up[name] = engine
                self.results.say(f"engine of {name} up, {sum(phase.seconds for phase in served.phases):.0f} s")
            else:
                engine.close()
                self.runs[name] = served = engine.served(timed_out=served.timed_out)
                told = served.error.traceback if served.error else served.output
                self.results.failed(name, "engine", told[-3000:] or f"not up, last step finished: {served.reached}")
        return up

    def rounds(self, engines: dict[str, Engine]) -> None:
        """Time all engines in turn."""
        asked = {name: SpeedJob(*shape, self.flags.repeats) for name, shape in self.batches.items()}
        for number in range(self.flags.rounds):
            if self.results.left < SPARE + 5:
                self.results.say(f"no time for round {number} and on")
                return
            found: dict[str, Any] = {}
            self.results.content["rounds"].append(found)
            for name, engine in list(engines.items()):
                for batch, speed in asked.items():
                    timings = engine.ask(asdict(speed), max(10.0, self.results.left - SPARE / 2))
                    if timings is None:
                        self.runs[name] = engine.served(timed_out=engine.alive)
                        engines.pop(name).close()
                        self.results.failed(name, "timing", f"{batch}: the engine ended or took too long")
                        break
                    found.setdefault(name, {})[batch] = timings
            for name in engines:
                self.results.arms[name]["speeds"] = speeds(name, self.results.content["rounds"], self.batches)
            self.results.say(f"round {number} of {', '.join(engines)}")

    def all(self, directories: dict[str, Path], before_timing: Callable[[], None]) -> None:
        """Serve the original and every arm, so many at once as asked; what fails to come up is tried again alone."""
        arms = [name for name in directories if name != SOURCE]
        batches = [arms[first : first + self.flags.at_once] for first in range(0, len(arms), self.flags.at_once)]
        original: dict[str, Engine] = {}
        again: set[str] = set()
        while batches:
            names = batches.pop(0)
            wanted = {name: directories[name] for name in ([] if original else [SOURCE]) + names}
            engines = {**original, **self.start(wanted)}
            before_timing()
            try:
                self.rounds(engines)
            finally:
                for name in names:
                    if name in engines:
                        engines[name].close()
                original = {name: engine for name, engine in engines.items() if name == SOURCE}
            for name in wanted:
                failed = self.results.arms[name].get("failed", {})
                if "engine" in failed and name not in again and self.results.left > SPARE + START:
                    failed["engine, first try"] = failed.pop("engine")
                    again.add(name)
                    batches.append([name] if name != SOURCE else names)
        for engine in original.values():
            engine.close()
