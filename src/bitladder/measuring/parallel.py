"""Several processes share a measurement by the native engine, through Ray: `run(...)`, in place of `native.run`.

One actor a GPU (on a CPU: a share of its cores), on this machine or on a cluster; each has loaded the whole model. What
is shared out are batches, and the bytes of the result are those of one process:

    calibrate   some batches a call; the largest of the workers' amax values is the amax of all batches, exactly
    round       codes need sums over all batches in their order: one worker makes them, the others read its files
    score       one batch a call; a batch's scores depend on nothing else, and are kept under its number

This process loads no model. It deals out calls, keeps what comes back in the same files as one process would, and so
goes on where either kind of run was killed. A worker that dies, or whose node is lost, is replaced and what it was
given is dealt out again; a call on which workers die again and again ends the run. An error that a worker raises is
raised here as it is, and nothing is tried again.

Sums depend on the kind of processor, on torch's threads on a CPU, and on versions; so unlike workers are refused.
"""

import contextlib
import dataclasses
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitladder.data.batches import Batch
from bitladder.device import OUT_OF_MEMORY, without_cudnn_attention
from bitladder.errors import BitladderError, MeasurementError, ModelError
from bitladder.measured import Amax, Codes, codes_files
from bitladder.measuring import compensation, native
from bitladder.measuring.amax import RunningAmax
from bitladder.measuring.calls import by_layer
from bitladder.measuring.checks import with_scales
from bitladder.measuring.job import BatchScores, Job
from bitladder.measuring.layers import DeviceMemory, Layers, open_layers
from bitladder.measuring.partial import Partial
from bitladder.models.weights import DigestCache, model_source
from bitladder.recipe import WorkersSpec
from bitladder.records import ModelSource, RoundedModule
from bitladder.runinfo import Meter, Peaks, no_progress, processor, versions

_CALLS_AHEAD = 2  # given to a worker at once, so that it never waits while this process writes to the disk
_CHUNKS = 4  # of calibration batches for every worker: each costs one look at all weights
_MOST_DEATHS = 3  # of workers on one call
_KNOCK_SECONDS = 10.0
_LOOK_SECONDS = 30.0  # without an answer, after which nodes are counted again
_LOOPBACK = ("127.0.0.1", "::1")
_NO_NODE = (
    "no node of the Ray cluster is left that has room for a worker; mend it, then run the same command again: "
    "finished batches are kept"
)


def run(
    workers: WorkersSpec,
    directory: Path,
    source: ModelSource,
    dtype: torch.dtype,
    job: Job,
    partial: Partial,
    meter: Meter,
) -> None:
    """Calibrate and score with several workers; amax values, codes and each batch's scores go to `partial`.

    Raises:
        MeasurementError: no Ray, no room for the workers, one that dies again and again, NaN or Inf, out of memory.
        ModelError: a worker's node has another model. EngineError: a model that the engine can't score.
    """
    threads = workers.threads or max(1, torch.get_num_threads() // workers.count)
    meter.threads, meter.workers = threads, workers.count
    with ExitStack() as stack:
        shared = dataclasses.replace(job, batches=(), progress=no_progress)
        with meter.phase("load model") as peaks:  # the start of Ray and its processes included
            pool = stack.enter_context(_Pool(workers, threads, job.device.startswith("cuda"), peaks))
            pool.everyone("load", "loading the model", directory.absolute(), source, dtype, shared, threads, pool.node)
        amax = partial.amax()
        if amax is None:
            with pool.phase(meter, "calibrate"):
                amax = _calibrate(pool, job, workers.count)
            partial.keep_amax(amax)
        job = dataclasses.replace(job, target=with_scales(job.target, amax, job.spec))
        rounded: tuple[RoundedModule, ...] = ()
        if job.spec.rounding == "compensated":
            rounded = _round(pool, job, partial, amax, meter)
        with pool.phase(meter, "score"):
            pool.everyone("prepare", "preparing to score", amax, partial.codes_file(0).parent, rounded)
            _score(pool, job, partial)


def _calibrate(pool: "_Pool", job: Job, count: int) -> Amax:
    """Return the amax of all batches, checked."""
    total = len(job.batches)
    size = -(-total // (count * _CHUNKS))
    calls = [
        _Call("calibrate", f"calibrating on the batches from {start}", (job.batches[start : start + size],), start)
        for start in range(0, total, size)
    ]
    job.progress("calibrate", 0, total)
    seen: RunningAmax[str] = RunningAmax()
    done = 0
    for call, amax in pool.each(calls):
        for name, value in amax.items():
            seen.see(name, value)
        done += len(call.args[0])
        job.progress("calibrate", done, total)
    largest = seen.values()
    with_scales(job.target, largest, job.spec)  # NaN is found before anything is kept
    return largest


def _round(pool: "_Pool", job: Job, partial: Partial, amax: Amax, meter: Meter) -> tuple[RoundedModule, ...]:
    """Have one worker make the codes that are missing, and return what all of them do."""
    files = [partial.codes_file(layer) for layer in sorted(by_layer(job.target.groups))]
    if not all(path.exists() for path in files):
        job.progress("round", 0, 1)
        with pool.phase(meter, "round"):
            for _ in pool.each([_Call("round", "compensating codes", (partial, job.batches, amax), 0)]):
                job.progress("round", 1, 1)
    if not all(path.exists() for path in files):
        raise MeasurementError(_not_shared(partial.directory))
    return tuple(module for path in files for module in compensation.read_modules(path))


def _score(pool: "_Pool", job: Job, partial: Partial) -> None:
    """Score every batch that isn't scored yet."""
    total = job.score_batches
    missing = partial.unscored(total, job.spec.formats)
    done = total - len(missing)
    job.progress("score", done, total)
    calls = [_Call("score", f"scoring batch {index}", (job.batches[index],), index) for index in missing]
    for call, scores in pool.each(calls):
        assert call.index is not None
        partial.keep_scores(call.index, scores)
        done += 1
        job.progress("score", done, total)


def _not_shared(directory: Path) -> str:
    return (
        f"{directory} is not the same directory on every node of the Ray cluster, and compensated codes are kept "
        "there; put `output` on a file system that all nodes share, or use rounding: nearest"
    )


@dataclass(frozen=True)
class _Call:
    """A call of a worker's method."""

    method: str
    what: str  # it does, for errors
    args: tuple[Any, ...]
    index: int | None = None  # of what is shared out; None: every worker has to do it before


@dataclass(eq=False)
class _Hired:
    """A worker's actor, and its calls that haven't ended, in their order."""

    actor: Any
    calls: deque[tuple[Any, _Call]] = field(default_factory=deque)  # with the reference to what comes back

    @property
    def is_ready(self) -> bool:
        """Whether it has done what every worker has to do before."""
        return all(call.index is not None for _, call in self.calls)


class _Pool(ExitStack):
    """The workers; a context manager. Both ends of a call are here, so that a worker's death is noticed and mended."""

    def __init__(self, spec: WorkersSpec, threads: int, on_gpus: bool, peaks: list[Peaks]) -> None:
        super().__init__()
        self.ray = _import_ray(spec)
        self.spec, self.on_gpus, self.cpus = spec, on_gpus, 1 if on_gpus else threads
        self.hired: list[_Hired] = []
        self.first_calls: list[_Call] = []  # that a new worker begins with
        self.queue: deque[_Call] = deque()
        self.deaths: Counter[str] = Counter()
        self.peaks = peaks  # of the phase at hand: where each call's are added
        self.processor: str | None = None
        with contextlib.ExitStack() as stack:
            self._connect(stack)
            self.node = self.ray.get_runtime_context().get_node_id()
            room = self._room()
            if room < spec.count:
                needs = "a GPU" if on_gpus else f"{self.cpus} cores (workers.threads)"
                where = "this machine" if spec.address is None else "the Ray cluster"
                raise MeasurementError(
                    f"workers.count is {spec.count} and each needs {needs}, but {where} has room for {room}; lower it"
                )
            stack.callback(self._dismiss_all)
            for _ in range(spec.count):
                self._hire()
            self.push(stack.pop_all())

    @contextmanager
    def phase(self, meter: Meter, name: str) -> Iterator[None]:
        """Measure the body, the workers' memory included."""
        with meter.phase(name) as self.peaks:
            yield

    def everyone(self, method: str, what: str, *args: Any) -> None:
        """Have every worker do something, now, and each that takes a dead one's place before anything else."""
        call = _Call(method, what, args)
        self.first_calls.append(call)
        for worker in self.hired:
            self._give(worker, call)
        while any(worker.calls for worker in self.hired):
            self._settle()

    def each(self, calls: Iterable[_Call]) -> Iterator[tuple[_Call, Any]]:
        """Share the calls out, and yield each with what it gave, as they end."""
        self.queue.extend(calls)
        while self.queue or any(call.index is not None for worker in self.hired for _, call in worker.calls):
            for ahead in range(1, _CALLS_AHEAD + 1):
                for worker in self.hired:
                    if self.queue and worker.is_ready and len(worker.calls) < ahead:
                        self._give(worker, self.queue.popleft())
            ended = self._settle()
            if ended is not None and ended[0].index is not None:
                yield ended

    def _connect(self, stack: ExitStack) -> None:
        """Connect to the cluster, or start one on this machine; not where the caller has done so."""
        if self.ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        logging.getLogger("ray").setLevel(logging.ERROR)  # what it says before it sets the level itself
        stack.callback(self.ray.shutdown)
        try:  # Ray raises whatever its parts do
            if self.spec.address is not None:
                _knock(self.spec.address)
                self.ray.init(address=self.spec.address, **quiet)
            else:
                gpus = min(self.spec.count, torch.cuda.device_count()) if self.on_gpus else 0
                cpus = self.spec.count * self.cpus
                stack.enter_context(_on_loopback())
                own = {"num_cpus": cpus, "num_gpus": gpus, "_node_ip_address": _LOOPBACK[0]}
                self.ray.init(address="local", include_dashboard=False, **own, **quiet)
                found = self.ray.util.get_node_ip_address()
                if found not in _LOOPBACK:
                    raise RuntimeError(f"it would listen on {found}, not on this machine alone")
        except Exception as error:
            if self.spec.address is None:
                message = f"Ray doesn't start on this machine ({_first_line(error)}); mend that, or leave workers out"
            else:
                message = (
                    f"no Ray cluster answers at workers.address {self.spec.address} ({_first_line(error)}); start one "
                    "with `ray start --head`, or leave workers.address out to use this machine"
                )
            raise MeasurementError(message) from error

    def _room(self) -> int:
        """Return how many workers the living nodes have room for, whoever else uses them."""
        total = 0
        for node in self.ray.nodes():
            if node["Alive"]:
                have = node["Resources"]
                fits = [have.get("CPU", 0) // self.cpus, *([have.get("GPU", 0)] if self.on_gpus else [])]
                total += int(min(fits))
        return total

    def _hire(self) -> None:
        actor = self.ray.remote(_Worker).options(num_cpus=self.cpus, num_gpus=int(self.on_gpus)).remote()
        self.hired.append(_Hired(actor))
        for call in self.first_calls:
            self._give(self.hired[-1], call)

    def _dismiss(self, worker: _Hired) -> None:
        self.hired.remove(worker)
        self.ray.kill(worker.actor)

    def _dismiss_all(self) -> None:
        for worker in list(self.hired):
            self._dismiss(worker)

    def _give(self, worker: _Hired, call: _Call) -> None:
        worker.calls.append((worker.actor.do.remote(call.method, *call.args), call))

    def _settle(self) -> tuple[_Call, Any] | None:
        """Wait until a call ends, and return it with what it gave; None: its worker died, or the wait was long."""
        current = {worker.calls[0][0]: worker for worker in self.hired if worker.calls}
        ended, _ = self.ray.wait(list(current), timeout=_LOOK_SECONDS)
        if not ended:
            self._give_up_waiting()
            return None
        reference = ended[0]
        worker = current[reference]
        try:
            result, peaks = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self.ray.exceptions.RayError as error:
            self._replace(worker, error)
            return None
        _, call = worker.calls.popleft()
        self.peaks.append(peaks)
        if call.method == "load":
            self._check_alike(*result)
        return call, result

    def _replace(self, worker: _Hired, error: Exception) -> None:
        """Put a worker in a dead one's place, and its calls back into the queue.

        Raises:
            MeasurementError: the call at hand has cost too many workers, or no node is left.
        """
        _, fatal = worker.calls[0]
        self.deaths[fatal.what] += 1
        self.queue.extendleft(call for _, call in reversed(worker.calls) if call.index is not None)
        self._dismiss(worker)
        if self.deaths[fatal.what] >= _MOST_DEATHS:
            raise MeasurementError(
                f"{_MOST_DEATHS} workers died while {fatal.what} ({_first_line(error)}); if memory ran out, lower "
                "calibration.batch_size or workers.count, then run the same command again: finished batches are kept"
            ) from error
        if self._room() > len(self.hired):
            self._hire()
        elif not self.hired:
            raise MeasurementError(_NO_NODE) from error

    def _give_up_waiting(self) -> None:
        """Do without the workers that no node has room for any more: the one that was to take them was lost.

        Raises:
            MeasurementError: no worker is left.
        """
        waiting = [worker for worker in self.hired if not worker.is_ready]
        for worker in waiting[: max(0, len(self.hired) - self._room())]:
            self._dismiss(worker)
        if not self.hired:
            raise MeasurementError(_NO_NODE)

    def _check_alike(self, found: dict[str, str], processor_name: str) -> None:
        """Check that a worker computes as the others, with the versions that this process has."""
        own = versions()
        unlike = [f"{name} {found.get(name)} ({own.get(name)} here)" for name in own if found.get(name) != own[name]]
        self.processor = self.processor or processor_name
        if self.processor != processor_name:
            unlike.append(f"{processor_name} beside {self.processor}")
        if unlike:
            raise MeasurementError(
                f"a worker has {', '.join(unlike)}: who scores a batch would change its numbers; use nodes alike"
            )


class _Worker:
    """One process with the model: what a Ray actor does."""

    layers: Layers
    job: Job
    scorer: Any = None

    def __init__(self) -> None:
        self.away = False  # on another node than the process that deals out the calls

    def do(self, method: str, *args: Any) -> tuple[Any, Peaks]:
        """Call a method; return what it gives, and the most memory that it took.

        Raises:
            BitladderError: as the method does; where this is another node it says so.
        """
        Peaks.reset()
        try:
            with without_cudnn_attention():
                result = getattr(self, method)(*args)
        except torch.OutOfMemoryError as error:
            raise MeasurementError(OUT_OF_MEMORY) from error
        except BitladderError as error:
            if self.away:
                raise type(error)(f"on {socket.gethostname()}: {error}") from error
            raise
        return result, Peaks.read()

    def load(
        self, directory: Path, source: ModelSource, dtype: torch.dtype, job: Job, threads: int, node: str
    ) -> tuple[dict[str, str], str]:
        """Load the model; return versions and the processor's name.

        Raises:
            ModelError: it isn't there, is damaged, or is another one.
        """
        import ray

        self.away = ray.get_runtime_context().get_node_id() != node
        if self.away:
            here = model_source(directory, path=source.path, revision=source.revision, cache=DigestCache())
            if here.sha256 != source.sha256:
                raise ModelError(f"{directory} holds another model than where the run was started")
        torch.set_num_threads(threads)
        memory = DeviceMemory(job.device, job.spec.memory_gb)
        memory.enforced().__enter__()  # for the rest of its life
        self.job, self.layers = job, open_layers(directory, job, dtype, memory, native.REMEDY)
        self.layers.model.config.use_cache = False
        self.layers.model.requires_grad_(False)
        return versions(), processor(job.device)

    def calibrate(self, batches: tuple[Batch, ...]) -> Amax:
        """Return the amax of some batches, unchecked."""
        return native.calibrate(self.layers, dataclasses.replace(self.job, batches=batches))

    def round(self, partial: Partial, batches: tuple[Batch, ...], amax: Amax) -> None:
        """Make the codes that are missing in `partial`.

        Raises:
            MeasurementError: this node doesn't see its directory.
        """
        if not partial.directory.is_dir():
            raise MeasurementError(_not_shared(partial.directory))
        job = dataclasses.replace(self.job, batches=batches, target=with_scales(self.job.target, amax, self.job.spec))
        compensation.run(self.layers, job, partial, amax, Meter())

    def prepare(self, amax: Amax, directory: Path, rounded: tuple[RoundedModule, ...]) -> None:
        """Be ready to score.

        Args:
            amax: of all batches.
            directory: of the compensated codes.
            rounded: what these are, in the order of the layers; empty: every weight goes to its nearest.

        Raises:
            MeasurementError: other codes lie in the directory, as this node sees it.
        """
        codes = None
        if rounded:
            files = codes_files(directory)
            if tuple(module for path in files for module in compensation.read_modules(path)) != rounded:
                raise MeasurementError(_not_shared(directory))
            codes = Codes.in_files(files)
        job = dataclasses.replace(self.job, target=with_scales(self.job.target, amax, self.job.spec))
        scorer = native.scorer(self.layers, job, amax, codes)
        self.scorer = scorer.__enter__()  # for the rest of its life

    def score(self, batch: Batch) -> BatchScores:
        """Return a batch's scores."""
        (wait,) = self.scorer.scores([batch])
        scores: BatchScores = wait()
        return scores


def _import_ray(spec: WorkersSpec) -> Any:
    try:
        import ray
    except ImportError as error:
        raise MeasurementError(
            f"workers.count is {spec.count}, which needs Ray: pip install 'bitladder[ray]', or leave workers out"
        ) from error
    return ray


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray's processes listen on loopback alone: whoever reaches their ports can run code.

    Given a loopback address by `_node_ip_address` alone, Ray takes the machine's own and listens on every interface;
    with this switch, made for systems whose firewall asks, it doesn't. Source: `ray/_private/services.py`,
    `get_node_ip_address`.
    """
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(name)
    ray_constants.ENABLE_RAY_CLUSTER, os.environ[name] = False, "0"  # here, and in the processes that it starts
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[0]
        os.environ.pop(name)
        if before[1] is not None:
            os.environ[name] = before[1]


def _knock(address: str) -> None:
    """Connect to `host:port` once: Ray itself tries for minutes.

    Raises:
        OSError: nobody answers.
    """
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()


def _first_line(error: Exception) -> str:
    """Return what an error of Ray's says: where an actor couldn't be made, the reason is its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (lines[-1] if "creation task" in lines[0] else lines[0]).rstrip(".")
