"""What an FP8 KV cache does in each layer, measured once where a scheme has it in some of them."""

import dataclasses
import itertools
from collections.abc import Sequence

from bitladder.data.batches import Batch
from bitladder.evaluation.evaluate import ARITHMETIC
from bitladder.measured import kv_amax, read_amax
from bitladder.measuring.kv_damage import STEP, layer_kls
from bitladder.measuring.partial import Partial
from bitladder.records import KvDamage, digest_of
from bitladder.steps.data import validation_data
from bitladder.steps.step import doing, valid
from bitladder.steps.workspace import Workspace

_TOKENS = 4096  # that count, of whole batches
_PARTIAL = "measuring_kv"  # directory of what is done so far


def measure_kv_damage(work: Workspace) -> KvDamage:
    """Measure the KL of an FP8 KV cache in each layer alone, on the first samples by which schemes are chosen, once.

    Raises:
        MeasurementError: the amax of some layer's keys and values isn't known. BitladderError: see
            `measuring.kv_damage`.
    """
    measurement = work.measurement()
    amax = read_amax(measurement, work.output)
    kv_amax(measurement, amax)  # all layers have scales
    batches, key = _asked(work)
    known = valid(work, KvDamage, work.output / KvDamage.FILE_NAME, settings_sha256=key)
    if known is not None:
        return known
    with doing(work, STEP) as meter:
        with meter.phase(STEP):
            layers = layer_kls(
                work.model_directory,
                dataclasses.replace(work.target, groups=measurement.groups),
                batches,
                amax,
                work.recipe.measurement,
                Partial(work.output / _PARTIAL, key),
                work.progress,
            )
        result = KvDamage(
            measurement_sha256=measurement.fingerprint(),
            settings_sha256=key,
            tokens=tuple(int(tokens) for batch in batches for tokens in batch.predicted.sum(-1)),
            layers=layers,
            run=meter.info(),
        )
        result.write(work.output / KvDamage.FILE_NAME)
    return result


def known_kv_damage(work: Workspace) -> KvDamage | None:
    """Return what is there and valid."""
    return valid(work, KvDamage, work.output / KvDamage.FILE_NAME, settings_sha256=_asked(work)[-1])


def _asked(work: Workspace) -> tuple[Sequence[Batch], str]:
    """Return the batches to measure on, and the digest of the settings."""
    measurement = work.measurement()
    data = validation_data(work, measurement)
    counted = list(itertools.accumulate(batch.loss_tokens for batch in data.batches))
    batches = data.batches[: sum(tokens < _TOKENS for tokens in counted) + 1]
    key = digest_of([ARITHMETIC, measurement.fingerprint(), data.summary.sha256, str(len(batches))])
    return batches, key
