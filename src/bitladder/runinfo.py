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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bitladder.reading import read_text
from bitladder.records import PhaseCost, RunInfo

# (phase, done, total) -> None; `total` 0 where it isn't known.
Progress = Callable[[str, int, int], None]
_PACKAGES = ("bitladder", "torch", "transformers", "nvidia-modelopt", "safetensors", "numpy")


def no_progress(phase: str, done: int, total: int) -> None:
    """Tell nobody."""


@contextmanager
def told(progress: Progress, phase: str) -> Iterator[None]:
    """Tell that the body, of whose length nothing is known, begins and ends."""
    progress(phase, 0, 1)
    yield
    progress(phase, 1, 1)


def versions() -> dict[str, str]:
    """Return the versions of the packages whose behaviour a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor(device: str = "cpu") -> str:
    """Return the name of what computes on `device`: the GPU, or this machine's processor."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line for line in read_text(cpuinfo).splitlines() if line.startswith("model name"))
        name = next(lines, f": {name}").partition(":")[2].strip()
    return name


def hardware() -> str:
    """Return one line on the machine: processor, cores, memory, GPU."""
    import psutil
    import torch

    memory = psutil.virtual_memory().total / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB memory, {gpu}"


@contextmanager
def one_core_each(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool whose threads compute on one core each; work that wasn't begun is dropped when the body fails.

    torch would otherwise give every thread as many helpers as there are cores, and they would wait for each other.
    """
    import torch

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
        for line in read_text(Path("/proc/self/status")).splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _used_cuda() -> Any:
    """Return `torch.cuda` where this process has used a GPU; None: it hasn't, or has not even imported torch.

    A process that leaves the GPU to its workers should not claim a part of it.
    """
    torch: Any = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


@dataclass(frozen=True)
class Peaks:
    """The most memory that a process had at once, in bytes; `gpu` is None where it used none."""

    rss: int
    gpu: int | None

    @classmethod
    def read(cls) -> Self:
        """Return this process's peaks since the last `reset`; waits for its GPU."""
        cuda = _used_cuda()
        if cuda is None:
            return cls(_peak_rss_bytes(), None)
        cuda.synchronize()
        return cls(_peak_rss_bytes(), cuda.max_memory_allocated())

    @staticmethod
    def reset() -> None:
        """Start counting anew."""
        _reset_peak_rss()
        cuda = _used_cuda()
        if cuda is not None:
            cuda.reset_peak_memory_stats()


class Meter:
    """Collects what each phase of a step took.

    threads, workers: what the step ran on, where that isn't this process alone.
    """

    def __init__(self) -> None:
        self.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.phases: list[PhaseCost] = []
        self.threads: int | None = None
        self.workers = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[list[Peaks]]:
        """Measure the body: seconds on the wall clock, peak resident memory, peak GPU memory.

        The body may add the peaks of other processes to the list that it is given; the largest counts.
        """
        others: list[Peaks] = []
        Peaks.reset()
        start = time.perf_counter()
        try:
            yield others
        finally:
            peaks = [Peaks.read(), *others]
            self.phases.append(
                PhaseCost(
                    phase=name,
                    seconds=round(time.perf_counter() - start, 3),
                    peak_rss_bytes=max(peak.rss for peak in peaks),
                    peak_gpu_bytes=max((peak.gpu for peak in peaks if peak.gpu is not None), default=None),
                )
            )

    def info(self) -> RunInfo:
        """Return what was collected."""
        import torch

        return RunInfo(
            started=self.started,
            hardware=hardware(),
            threads=self.threads or torch.get_num_threads(),
            workers=self.workers,
            versions=versions(),
            phases=tuple(self.phases),
        )
