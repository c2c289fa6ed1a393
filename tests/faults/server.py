"""Runs `bitladder ARGV` in forks of one process that imported everything: 0.5 s a run instead of 8.

`Server` starts that process and talks to it in lines of JSON; `python -m faults.server` is its other end. Each run has
its own session, a limit of time, memory and file size, no standard input, and an audit hook (`hook`) that counts its
file operations, fails or kills the run at one of them, and tells what was opened for writing outside the allowed
places.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from faults.hook import Fault, Operation, install

MEMORY_BYTES = 12 << 30  # of addresses: torch alone maps several GB
FILE_BYTES = 256 << 20
SECONDS = 10.0  # of processor time; what takes longer fails
_WALL_FACTOR = 6  # by the clock a run may take longer: the machine has other work
_POLL_SECONDS = 0.005
_TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Job:
    """One run of the command line.

    Attributes:
        argv: what follows `bitladder`.
        cwd: where it runs.
        allowed: places that it may write to.
        fault: what happens at one of its operations.
        delay: seconds after the request at which it starts.
        file_bytes: the largest file that it may write.
        more_bytes: of addresses that it may map beyond those of the process that it is forked from.
        seconds: of processor time, after which it is killed.
        list_operations: whether all of its operations are wanted.
    """

    argv: tuple[str, ...]
    cwd: str
    allowed: tuple[str, ...]
    fault: Fault | None = None
    delay: float = 0.0
    file_bytes: int = FILE_BYTES
    more_bytes: int | None = None
    seconds: float = SECONDS
    list_operations: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: the exit status; negative: the signal that ended it.
        output: standard output and standard error.
        seconds: processor time.
        late: it was killed since it took too long.
        struck: the fault's operation was reached.
        outside: paths outside the allowed places that it wrote to or tried to.
        opened: how many files were opened, as Python tells it.
        operations: where they were asked for.
    """

    status: int
    output: str
    seconds: float
    late: bool
    struck: bool
    outside: tuple[str, ...]
    opened: int = 0
    operations: tuple[Operation, ...] = ()

    @property
    def complaints(self) -> list[str]:
        """The lines that tell of an error."""
        starts = ("error:", "unexpected ", "interrupted", "Traceback", "Fatal", "Segmentation")
        return [line for line in self.output.splitlines() if line.startswith(starts)]

    @property
    def refused(self) -> bool:
        """Whether it ended with status 2 and one line that says why."""
        return self.status == 2 and len(self.complaints) == 1 and self.complaints[0].startswith("error: ")


@dataclass
class Server:
    """The process that forks; a context."""

    environment: Mapping[str, str] = field(default_factory=dict)
    runs: int = 0
    _process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(_TESTS), str(_TESTS.parent / "src")]),  # what is tried is this tree
            "OMP_NUM_THREADS": "1",  # a second one would not survive the fork
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "COLUMNS": "200",
            **self.environment,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._process = None

    def run(self, *jobs: Job) -> list[Outcome]:
        """Return the outcomes of jobs that run beside each other."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.runs += len(jobs)
        print(json.dumps([asdict(job) for job in jobs]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the fork server ended")
        return [_outcome(entry) for entry in json.loads(line)]


def _outcome(entry: dict[str, Any]) -> Outcome:
    operations = tuple(Operation(*operation) for operation in entry.pop("operations"))
    return Outcome(operations=operations, outside=tuple(entry.pop("outside")), **entry)


def _job(entry: dict[str, Any]) -> Job:
    fault = entry.pop("fault")
    return Job(
        argv=tuple(entry.pop("argv")),
        allowed=tuple(entry.pop("allowed")),
        fault=None if fault is None else Fault(**fault),
        **entry,
    )


@dataclass
class _Child:
    """A run under way."""

    pid: int
    job: Job
    output: Path
    report: Path
    deadline: float
    result: dict[str, Any] | None = None

    def look(self) -> bool:
        """Return whether it has ended; end it where it is late."""
        if self.result is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            late = False
            if not pid:
                if time.monotonic() < self.deadline:
                    return False
                late = True
                os.killpg(self.pid, signal.SIGKILL)
                _, status, usage = os.wait4(self.pid, 0)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # nothing that it started stays
            code = os.waitstatus_to_exitcode(status)
            entries = [json.loads(line) for line in self.report.read_text().splitlines()]
            self.result = {
                "status": code,
                "output": self.output.read_text(errors="replace"),
                "seconds": usage.ru_utime + usage.ru_stime,
                "late": late or code == -signal.SIGXCPU,
                "struck": any("struck" in entry for entry in entries),
                "outside": sorted({entry["outside"] for entry in entries if "outside" in entry}),
                "opened": sum(entry.get("opened", 0) for entry in entries),
                "operations": [entry["operation"] for entry in entries if "operation" in entry],
            }
        return True


def _start(job: Job, scratch: Path, number: int) -> _Child:
    output, report = scratch / f"output{number}", scratch / f"report{number}"
    report.write_bytes(b"")
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            status = _run(job, output, report)
        finally:
            os._exit(status)
    return _Child(pid, job, output, report, time.monotonic() + job.delay + _WALL_FACTOR * job.seconds)


def _run(job: Job, output: Path, report: Path) -> int:
    """In the child: become `bitladder ARGV` and return its exit status."""
    import bitladder.cli

    os.setsid()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for target, path, how in ((0, os.devnull, os.O_RDONLY), (1, output, flags), (2, output, flags | os.O_APPEND)):
        os.dup2(os.open(path, how, 0o644), target)
    os.dup2(1, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    time.sleep(job.delay)
    os.chdir(job.cwd)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    addresses = MEMORY_BYTES if job.more_bytes is None else mapped + job.more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
    resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_bytes, job.file_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (int(job.seconds) + 1, int(job.seconds) + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    closing = install(job.allowed, job.fault, report, list_operations=job.list_operations)
    sys.argv = ["bitladder", *job.argv]
    status = 0
    try:
        bitladder.cli.main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        closing()
    return status


def _import_all() -> None:
    """Import what runs import, so that no fork has to."""
    import pkgutil

    import bitladder
    import bitladder.cli

    for module in pkgutil.walk_packages(bitladder.__path__, "bitladder."):
        if not module.name.startswith("bitladder.demo"):
            with contextlib.suppress(ImportError):  # what lives in vLLM's environment
                __import__(module.name)
    import transformers.conversion_mapping
    import transformers.core_model_loading
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401


def _serve() -> None:
    """Answer requests on standard input until it ends."""
    import gc

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    _import_all()
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory(prefix="faults-server-", dir=os.environ.get("FAULTS_SCRATCH")) as directory:
        for line in sys.stdin:
            jobs = [_job(entry) for entry in json.loads(line)]
            children = [_start(job, Path(directory), number) for number, job in enumerate(jobs)]
            while not all([child.look() for child in children]):
                time.sleep(_POLL_SECONDS)
            print(json.dumps([child.result for child in children]), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
