"""Runs a runtime in a child process of another Python environment: `run_child(...) -> Outcome`.

The child is a script in its runtime's folder. It imports the standard library, torch and its runtime, and nothing of
ours, so that any environment with the runtime can run it. A job goes in as JSON; what the child found comes back
as JSON, written after every step, so that a child that is killed or crashes leaves what it knew.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitladder.errors import BitladderError
from bitladder.reading import open_file, read_json
from bitladder.storage import scratch_directory

# Set unless the caller's environment says otherwise. A checkpoint is a local directory, so no hub is needed; the KV
# cache is in GiB, and read on CPUs only.
VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_INT4_W4A8": "0",  # on CPUs with AMX inputs of four-bit weights would be rounded to eight bits
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
VLLM_PACKAGES = ("vllm", "vllm-cpu")  # distributions that hold the module `vllm`
_OUTPUT_KEPT = 200_000  # characters of the child's last output


@dataclass(frozen=True)
class Outcome:
    """What came of a child process.

    Attributes:
        result: the JSON object that the child wrote last; empty if it wrote none.
        returncode: its exit status; negative: the signal that ended it.
        timed_out: whether it was killed at the time limit.
        output: the end of its standard output and standard error, together.
    """

    result: dict[str, Any]
    returncode: int
    timed_out: bool
    output: str


def first_line(text: str) -> str:
    """Return the first line of `text` that isn't blank, stripped; "" where there is none."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def installed_version(python: Path, packages: Sequence[str] = VLLM_PACKAGES) -> str | None:
    """Return the version of the first of `packages` that is installed for `python`, without importing it; None: none.

    Raises:
        BitladderError: there is no such interpreter.
    """
    check_interpreter(python)
    code = (
        "import importlib.metadata as m, sys\n"
        "found = [d.version for name in sys.argv[1:] for d in m.distributions(name=name)]\n"
        "print(found[0] if found else '')"
    )
    done = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def vllm_version(python: Path) -> str:
    """Return the version of vLLM that is installed for `python`.

    Raises:
        BitladderError: there is none, or no such interpreter.
    """
    version = installed_version(python)
    if version is None:
        raise BitladderError(
            f"vLLM is not installed for {python}; name the interpreter of an environment that has it (`make vllm-env` "
            "makes .venv-vllm/bin/python)"
        )
    return version


def check_interpreter(python: Path) -> None:
    """Raise BitladderError where there is no program at `python`."""
    if not (python.is_file() and os.access(python, os.X_OK)):
        raise BitladderError(
            f"no Python interpreter at {python}; name the one of the runtime's environment (`make vllm-env` makes "
            ".venv-vllm/bin/python)"
        )


def run_child(
    python: Path, script: Path, job: Mapping[str, Any], *, timeout: float, environment: Mapping[str, str] | None = None
) -> Outcome:
    """Run `script` with `job` under another interpreter, and wait for it.

    Args:
        python: the interpreter of the runtime's environment.
        script: the child's file; it is called with the paths of the job and the result.
        job: what to do, as JSON.
        timeout: seconds until the child and its own children are killed.
        environment: variables set for the child unless the caller's environment has them.

    Raises:
        BitladderError: there is no such interpreter.
    """
    check_interpreter(python)
    with scratch_directory() as scratch:
        paths = [scratch / name for name in ("job.json", "result.json", "output.txt")]
        paths[0].write_text(json.dumps(dict(job)), encoding="utf-8")
        with paths[2].open("wb") as output:
            process = subprocess.Popen(
                [str(python), str(script), str(paths[0]), str(paths[1])],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**(environment or {}), **os.environ},
                start_new_session=True,  # so that its own children can be killed with it
            )
            timed_out = False
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        try:
            result = read_json(paths[1])
        except (OSError, ValueError):  # it wrote nothing, or was killed while writing
            result = {}
        with open_file(paths[2]) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", errors="replace").read()[-_OUTPUT_KEPT:]
    return Outcome(result=result, returncode=process.returncode, timed_out=timed_out, output=text)
