"""vLLM's interpreter in forks of one process that imported vLLM: 0.3 s for a child to begin instead of 15.

`python vllm_server.py SOCKET` serves; the executable that `command` writes takes the place of an interpreter: it hands
`SCRIPT ARGUMENTS` or `-c CODE ARGUMENTS` to the server, with its environment, directory and standard streams, and ends
as the fork ends. The fork is killed when the executable is. Only what starts up differs: what a child imports before
it sets something up is imported already, so one test of each script has to take the interpreter itself.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
import types
from pathlib import Path

MODULES = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.layers.quantization.modelopt",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.models.qwen2_5_vl",
    "vllm.multimodal.media.image",
)
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
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def command(directory: Path, python: Path, address: str) -> Path:
    """Write the executable that stands for the interpreter, and return it."""
    path = directory / "python"
    path.write_text(CLIENT.format(python=python, address=address))
    path.chmod(0o755)
    return path


def run(argv: list[str]) -> int:
    """Do what the interpreter does with `argv`, and return its exit status."""
    try:
        if argv[0] == "-c":
            sys.argv, sys.path[:0] = ["-c", *argv[2:]], [""]
            module = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(argv[1], "<string>", "exec"), module.__dict__)
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


def serve(address: str) -> None:
    """Answer until standard input ends: that is when who started this process has."""
    del sys.path[0]  # this file's directory
    for module in MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    print("ready", flush=True)
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        waiting = [0, listening, *running]
        ready, _, _ = select.select(waiting, [], [], 0.02 if running else None)
        for number in ready:
            if number == 0:
                for child, connection in running.values():
                    end(child, connection)
                return
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
    serve(sys.argv[1])
