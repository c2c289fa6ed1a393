"""An interpreter in forks of one process that has imported what is slow: 0.3 s for a child to begin instead of 5 to 15.

`interpreter(...)` starts that process (`python warm.py SOCKET MODULE...`) and gives an executable that takes the place
of an interpreter: it hands `SCRIPT ARGUMENTS`, `-c CODE ARGUMENTS` or `-m MODULE ARGUMENTS` over, with its environment,
directory and standard streams, and ends as the fork ends. The fork is killed when the executable is. What this can't
prove is that a child imports in time what it needs: tests of that, of signals and of start-up take the interpreter.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

VLLM = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.layers.quantization.modelopt",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.models.qwen2_5_vl",
    "vllm.multimodal.media.image",
)
BITLADDER = (
    "bitladder.library",
    "bitladder.cli",
    "bitladder.steps.run",
    "bitladder.measuring.measure",
    "bitladder.evaluation.evaluate",
    "modelopt.torch.quantization",
    "modelopt.torch.quantization.algorithms",
    "transformers.conversion_mapping",
    "transformers.models.auto.processing_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
)
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
words = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(connection, [len(words).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(words)
answer = connection.recv(16)
status = int(answer) if answer else 70  # the server ended
if status < 0:
    if -status not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@contextlib.contextmanager
def interpreter(
    original: Path, directory: Path, modules: Sequence[str], environment: Mapping[str, str] = {}
) -> Iterator[Path]:
    """Yield what stands for an interpreter, in a directory, with modules imported already."""
    address = min(str(directory / "socket"), os.path.relpath(directory / "socket"), key=len)  # 107 bytes at most
    server = subprocess.Popen(
        [original, __file__, address, *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment, **dict.fromkeys(THREADS, "1")},  # a second one would not survive the fork
    )
    with server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        path = directory / "python"
        path.write_text(CLIENT.format(python=original, address=str(directory / "socket")))
        path.chmod(0o755)
        yield path
        server.stdin.close()


@functools.cache
def python() -> Path:
    """Return what stands for this interpreter, with what the command line imports; it lasts as long as this process."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="warm-")))
    return stack.enter_context(interpreter(Path(sys.executable), directory, BITLADDER))


def run(argv: list[str]) -> int:
    """Do what the interpreter does with `argv`, and return its exit status."""
    try:
        if argv[0] == "-c":
            sys.argv, sys.path[:0] = ["-c", *argv[2:]], [""]
            module = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(argv[1], "<string>", "exec"), module.__dict__)
        elif argv[0] == "-m":
            sys.argv, sys.path[:0] = argv[1:], [os.getcwd()]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = argv, [str(Path(argv[0]).resolve().parent)]
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def received(connection: socket.socket) -> tuple[list[str], str, dict[str, str], list[int]]:
    head, streams, *_ = socket.recv_fds(connection, 8, 3)
    size, words = int.from_bytes(head, "big"), b""
    while len(words) < size:
        words += connection.recv(size - len(words))
    return (*json.loads(words), streams)


def start(connection: socket.socket) -> int:
    """Fork a child that does what is asked on a connection, and return its process id."""
    argv, directory, environment, streams = received(connection)
    child = os.fork()
    if child:
        for stream in streams:
            os.close(stream)
        return child
    status = 70
    try:
        os.setsid()
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
        os.closerange(3, 1024)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.modules["torch"].set_num_threads(int(environment.get(THREADS[0], len(os.sched_getaffinity(0)))))
        status = run(argv)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def end(child: int, connection: socket.socket) -> None:
    """Kill a child whose client is gone, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)
    connection.close()


def serve(address: str, modules: Sequence[str]) -> None:
    """Answer until standard input ends: that is when who started this process has."""
    del sys.path[0]  # this file's directory
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    for module in modules:
        importlib.import_module(module)
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    threads = [name for name in threads if name != "jemalloc_bg_thd"]  # pyarrow's, which is made for that
    assert len(threads) == 1, f"threads do not survive a fork: {threads}"
    gc.collect()
    gc.freeze()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    os.write(answers, b"ready\n")
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        waiting = [0, listening, *running]
        ready, _, _ = select.select(waiting, [], [], 0.02 if running else None)
        for number in ready:
            if number == 0:
                for child, connection in running.values():
                    end(child, connection)
                os._exit(0)  # without what its libraries say as they leave
            if number is listening:
                connection, _ = listening.accept()
                running[connection.fileno()] = (start(connection), connection)
            else:
                end(*running.pop(number))
        for number, (child, connection) in list(running.items()):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                with contextlib.suppress(BrokenPipeError):
                    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                end(*running.pop(number))


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
