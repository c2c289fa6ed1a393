"""The KL of schemes that are simulated in memory, each kept as soon as it is known."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from bitladder.data.batches import DataSet
from bitladder.device import resolve_device
from bitladder.evaluation.evaluate import ARITHMETIC
from bitladder.evaluation.reference import Reference
from bitladder.evaluation.simulation import Simulation
from bitladder.formats import MODELOPT
from bitladder.measured import read_amax, read_codes
from bitladder.records import Measurement, Scheme, SimulatedKls, digest_of
from bitladder.steps.step import valid
from bitladder.steps.workspace import SIMULATED_FILE, Workspace


@contextmanager
def kl_on(work: Workspace, measurement: Measurement, data: DataSet) -> Iterator[Callable[[Scheme], float]]:
    """Give the KL of any scheme of the measurement on `data`, in nats per token, simulated in memory.

    Each is kept as soon as it is known, so that a killed run doesn't simulate it again. The original runs on the data
    only where something has to be simulated.

    Raises:
        BitladderError: see `evaluation.simulation`.
    """
    path = work.output / SIMULATED_FILE
    carried = [] if work.recipe.export.carrier == MODELOPT else [work.recipe.export.carrier]
    key = digest_of([measurement.fingerprint(), data.summary.sha256, str(len(data.batches)), ARITHMETIC, *carried])
    known = valid(work, SimulatedKls, path, settings_sha256=key)
    kls = dict(known.kl) if known is not None else {}
    device = resolve_device(work.recipe.measurement.device)
    with ExitStack() as stack:
        prepared: list[tuple[Reference, Simulation]] = []

        def kl(scheme: Scheme) -> float:
            cache = [f"KV cache {scheme.kv_cache_format}", *scheme.kv_cache_skips] if scheme.kv_cache_format else []
            name = digest_of([*(f"{group} {one}" for group, one in sorted(scheme.formats.items())), *cache])
            if name not in kls:
                if not prepared:
                    split = "validation" if work.recipe.validation else "calibration"
                    reference = Reference.compute(work.model_directory, data, split=split, device=device)
                    prepared.append((stack.enter_context(reference), simulation_of(work, measurement, device)))
                reference, simulation = prepared[0]
                kls[name] = simulation.results([reference], scheme)[0].value
                SimulatedKls(settings_sha256=key, kl=kls).write(path)
            return kls[name]

        yield kl


def simulation_of(work: Workspace, measurement: Measurement, device: str) -> Simulation:
    """Return the original, ready to take any scheme with the codes and scales of the measurement."""
    amax = read_amax(measurement, work.output)
    codes = read_codes(measurement, work.output, work.cache.sha256)
    return Simulation(work.model_directory, measurement, amax, device, codes, work.recipe.export.carrier)
