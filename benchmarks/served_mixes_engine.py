"""One engine of vLLM in a process of its own that stays up and times batches when it is asked (`Engine`)."""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from bitladder.runtimes.child import Outcome
from bitladder.runtimes.vllm import serve
from bitladder.runtimes.vllm.job import ServeJob, SpeedJob
from bitladder.runtimes.vllm.served import Served

__all__ = ["Engine", "SpeedJob"]

CHILD = Path(__file__).with_name("served_mixes_child.py")


class Engine:
    """A child that serves a checkpoint; started, not yet up, when it is made."""

    def __init__(self, python: Path, checkpoint: Path, job: ServeJob, engine: dict[str, Any], directory: Path) -> None:
        """Start it.

        Args:
            python: the interpreter of vLLM's environment.
            checkpoint: what is served.
            job: what is scored, and the largest batch that will be timed.
            engine: more arguments of `vllm.LLM`, used on a GPU.
            directory: where its job, result and output go.
        """
        directory.mkdir(parents=True)
        self.result, self.output = directory / "result.json", directory / "output.txt"
        path = directory / "job.json"
        path.write_text(json.dumps({**serve.child_job(checkpoint, job), "engine": engine}))
        self.replies, writing = os.pipe()
        self._told = b""
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [str(python), str(CHILD), str(path), str(self.result), str(serve.SCRIPT), str(writing)],
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
