"""Where a step ran, how long each of its phases took, and the memory it peaked at; and how progress is told."""

import datetime
import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from bitladder.records import PhaseCost, RunInfo

# (phase, done, total) -> None; `total` 0 where it isn't known.
Progress = Callable[[str, int, int], None]
_PACKAGES = ("bitladder", "torch", "transformers", "nvidia-modelopt", "safetensors", "numpy")


def no_progress(phase: str, done: int, total: int) -> None:
    """Tell nobody."""


def versions() -> dict[str, str]:
    """Return the versions of the packages whose behaviour a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """Return one line on the machine: processor, cores, memory, GPU."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        name = next(lines, f": {name}").partition(":")[2].strip()
    memory = psutil.virtual_memory().total / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB memory, {gpu}"


@contextmanager
def one_core_each(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool whose threads compute on one core each; work that wasn't begun is dropped when the body fails.

    torch would otherwise give every thread as many helpers as there are cores, and they would wait for each other.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(max_workers=threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _reset_peak_rss() -> None:
    """Start the kernel's peak counter anew, where it can be (Linux: proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak then covers the whole process


def _peak_rss_bytes() -> int:
    """Return the peak resident memory in bytes since the last reset (or of the process, where that isn't possible)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Meter:
    """Collects what each phase of a step took."""

    def __init__(self) -> None:
        self.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.phases: list[PhaseCost] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the body: seconds on the wall clock, peak resident memory, peak GPU memory."""
        _reset_peak_rss()
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            yield
        finally:
            if gpu:
                torch.cuda.synchronize()
            self.phases.append(
                PhaseCost(
                    phase=name,
                    seconds=round(time.perf_counter() - start, 3),
                    peak_rss_bytes=_peak_rss_bytes(),
                    peak_gpu_bytes=torch.cuda.max_memory_allocated() if gpu else None,
                )
            )

    def info(self) -> RunInfo:
        """Return what was collected."""
        return RunInfo(
            started=self.started,
            hardware=hardware(),
            threads=torch.get_num_threads(),
            versions=versions(),
            phases=tuple(self.phases),
        )
