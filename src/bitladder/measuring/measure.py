"""One sensitivity measurement of a model: `measure(...) -> Measurement`.

An engine gives amax values and raw scores, batch by batch; this module turns them into records, and keeps what is
done in `measuring/` beside the result, so that a killed run goes on where it stopped and ends with the same bytes.

    measuring/key.json             what the files in here belong to
    measuring/amax.safetensors     after calibration
    measuring/codes/               where codes are compensated, one file per decoder layer
    measuring/scores-00007.json    one per scored batch
    measurement.safetensors        amax of every searched module
    codes/                         the codes of every searched weight, where they are compensated
    measurement.json               the Measurement, written last
"""

import gc
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file

from bitladder.data.batches import DataSet
from bitladder.device import measuring_device, resolve_dtype
from bitladder.errors import EngineError, MeasurementError
from bitladder.formats import POWERS_OF_TWO, Arithmetic, group_bits, in_order
from bitladder.measured import AMAX_FILE, CODES, MEASUREMENT_FILE, codes_files
from bitladder.measuring.job import Job, damping_of, score_batch_count, score_weights
from bitladder.measuring.partial import PARTIAL, Partial
from bitladder.models.target import Target
from bitladder.recipe import MeasureSpec, WorkersSpec
from bitladder.records import Candidate, FileDigest, LeftOut, Measurement, ModelSource, Rounding, digest_of
from bitladder.runinfo import Meter, Progress, no_progress, told
from bitladder.storage import atomic_path, discard, sha256_of_file, unseal

# How compensated ones are made now.
_CODES = "tokens are weighed, a sweep with the same scales follows, a row in sixteen checks what is served"
_BLOCKS = "made with scales that are powers of two"


def settings_sha256(
    source: ModelSource, data: DataSet, spec: MeasureSpec, arithmetic: Mapping[str, Arithmetic] = MappingProxyType({})
) -> str:
    """Return the digest of everything that decides a measurement: model, data, settings, what isn't as stored."""
    spec = _ordered(spec).model_copy(update={"damping": damping_of(spec)})
    computed = [f"{name}: {arithmetic[name]}" for name in sorted(arithmetic)]
    if spec.rounding == "compensated":
        computed += [_CODES, *([_BLOCKS] if POWERS_OF_TWO in arithmetic.values() else [])]
    return digest_of([source.sha256, data.summary.sha256, spec.model_dump_json(exclude={"memory_gb"}), *computed])


def _ordered(spec: MeasureSpec) -> MeasureSpec:
    """Return the settings with their formats in one order: it decides nothing."""
    return spec.model_copy(update={"formats": in_order(spec.formats)})


def check_engine(spec: MeasureSpec, target: Target, device: str, workers: int = 0) -> None:
    """Look whether a model can be measured as asked, on this device.

    Args:
        spec: how.
        target: what is searched.
        device: where.
        workers: processes that share the work; 0: none do.

    Raises:
        EngineError: a format that the engine can't measure there, or layers that have to run one by one, and can't.
    """
    from bitladder.measuring import compensation, layers, modelopt, native

    if spec.engine == "native":
        problem = layers.why_not_by_layers(target, f"{native.REMEDY}{_beside_modelopt(spec, device, workers)}")
    else:
        or_native = layers.why_not_by_layers(target, native.REMEDY) is None
        modelopt.check_formats(spec.formats, device, or_native=or_native)
        compensated = spec.rounding == "compensated"
        problem = layers.why_not_by_layers(target, compensation.REMEDY) if compensated else None
    if problem is not None:
        raise EngineError(problem)


def _beside_modelopt(spec: MeasureSpec, device: str, workers: int) -> str:
    """Return what of the settings has to change, too, where ModelOpt is to measure what doesn't go layer by layer."""
    from bitladder.measuring import modelopt

    able = modelopt.measurable(device)
    changes = {
        "method: gradient": spec.method == "fisher" and "method" in spec.model_fields_set,
        "rounding: nearest": spec.rounding == "compensated",
        "no damping": spec.damping is not None,
        "no memory_gb": spec.memory_gb is not None,
        "no workers": workers > 0,
        f"formats among {', '.join(able)}": not set(spec.formats) <= set(able),
    }
    needed = ", ".join(change for change, is_needed in changes.items() if is_needed)
    return f" with {needed}" if needed else ""


def measure(
    directory: Path,
    source: ModelSource,
    target: Target,
    data: DataSet,
    spec: MeasureSpec,
    output: Path,
    progress: Progress = no_progress,
    workers: WorkersSpec | None = None,
    arithmetic: Mapping[str, Arithmetic] = MappingProxyType({}),
) -> Measurement:
    """Measure the sensitivity of every quant group once; write `measurement.json` and `measurement.safetensors`.

    Args:
        directory: the model's files.
        source: their identity (`weights.model_source`).
        target: what is searched (`models.target.find_target`).
        data: calibration batches.
        spec: engine, method, formats, arithmetic.
        output: where the two files go; `measuring/` in it holds what is done so far.
        progress: told of every calibrated and scored batch.
        workers: processes that share the work; None: this one does it alone. The result is the same.
        arithmetic: format -> how the device that will serve computes it, where that isn't as it is stored.

    Raises:
        ModelError: NaN or Inf in weights. MeasurementError: NaN or Inf in activations or scores; no group that has a
            scale; workers that don't come up, or die again and again.
    """
    from bitladder.measuring import checks, compensation, layers, modelopt, native, parallel

    spec = _ordered(spec)
    target = checks.in_any_format(target, spec.formats)
    workers = workers or WorkersSpec()
    problem = workers.problem(spec)
    if problem is not None:
        raise MeasurementError(problem)
    meter = Meter()
    device = measuring_device(spec, workers)
    if spec.engine == "modelopt":
        modelopt.check_formats(spec.formats, device)
    dtype = resolve_dtype(spec.dtype, device)
    key = settings_sha256(source, data, spec, arithmetic)
    partial = Partial(output / PARTIAL, key)
    count = score_batch_count(data, spec)
    scored = tuple(batch.labels.shape for batch in data.batches[:count])
    job = Job(target, data.batches, scored, spec, device, progress, arithmetic)

    memory = layers.DeviceMemory(device, spec.memory_gb)

    def opened(remedy: str) -> layers.Layers:
        with meter.phase("load model"), told(progress, "load model"):
            return layers.open_layers(directory, job, dtype, memory, remedy)

    with memory.enforced():
        if partial.amax() is None or partial.unscored(count, spec.formats):
            if workers.count:
                parallel.run(workers, directory, source, dtype, job, partial, meter)
            elif spec.engine == "native":
                native.run(opened(native.REMEDY), job, partial, meter)
            else:
                with meter.phase("load model"), told(progress, "load model"):
                    model = layers.load_whole(directory, target, dtype, device)
                modelopt.run(model, job, partial, meter)
                del model
            _free_memory()
        amax = partial.amax()
        assert amax is not None
        target = checks.with_scales(target, amax, spec)
        job, amax = replace(job, target=target), checks.of_target(amax, target)
        rounding = None
        if spec.rounding == "compensated":
            if spec.engine != "native":  # which has made the codes already, and scored them
                whole = opened(compensation.REMEDY)
                with native.ready(whole, job):
                    compensation.run(whole, job, partial, amax, meter)
                del whole
                _free_memory()
            rounding = _keep_codes(partial, output, data, spec)
    unit, weights = score_weights(spec.method, data.batches[:count])
    batches = [partial.scores(batch) or {} for batch in range(count)]
    raw = [score for batch in batches for formats in batch.values() for score in formats.values()]
    apart = all(len(score) == 2 for score in raw) and any(score[1] > 0 for score in raw)
    candidates = tuple(
        Candidate(
            group=group.name,
            format=name,
            weight_bits=group_bits(group, name),
            scores=tuple(_finite(batch[group.name][name][0], group.name, name) for batch in batches),
            image_scores=tuple(batch[group.name][name][1] for batch in batches) if apart else (),
        )
        for group, name in job.variants
    )
    left_out = tuple(LeftOut(group=group, format=name, reason=reason) for (group, name), reason in job.left_out.items())
    if all(score == 0 for candidate in candidates for score in candidate.scores):
        raise MeasurementError("all scores are zero: no token counted for the loss, or no gradient reached the groups")
    with atomic_path(output / AMAX_FILE) as temporary:
        save_file(dict(sorted(amax.items())), temporary)
    measurement = Measurement(
        model=source,
        calibration=data.summary,
        engine=spec.engine,
        method=spec.method,
        fused_scales_shared=spec.share_fused_scales,
        compute_dtype=str(dtype).removeprefix("torch."),
        score_unit=unit,
        score_weights=weights,
        formats=spec.formats,
        arithmetic=dict(arithmetic),
        groups=target.groups,
        candidates=candidates,
        left_out=left_out,
        untouched=target.untouched,
        amax_sha256=sha256_of_file(output / AMAX_FILE),
        rounding=rounding,
        settings_sha256=key,
        run=meter.info(),
    )
    measurement.write(output / MEASUREMENT_FILE)
    if rounding is None:
        discard(output / CODES)  # of an earlier measurement
    partial.remove()
    return measurement


def _free_memory() -> None:
    """Give back what deleted models hold: their modules and hooks refer to each other, so `del` frees nothing yet."""
    gc.collect()
    torch.cuda.empty_cache()


def _keep_codes(partial: Partial, output: Path, data: DataSet, spec: MeasureSpec) -> Rounding:
    """Move the finished codes to where they stay, and return their record."""
    from bitladder.measuring import compensation

    made, kept = partial.directory / CODES, output / CODES
    if made.exists():
        unseal(made)
        discard(kept)
        os.replace(made, kept)
    paths = codes_files(kept)
    return Rounding(
        method="compensated",
        damping=damping_of(spec),
        samples=data.summary.samples,
        scored=spec.engine == "native",
        files=tuple(
            FileDigest(name=path.name, bytes=path.stat().st_size, sha256=sha256_of_file(path)) for path in paths
        ),
        modules=tuple(module for path in paths for module in compensation.read_modules(path)),
    )


def _finite(score: float, group: str, format_name: str) -> float:
    """Return the score.

    Raises:
        MeasurementError: it is NaN or Inf.
    """
    if not math.isfinite(score):
        raise MeasurementError(
            f"the score of {group} in {format_name} is {score}; "
            "measure in float32 (measurement.dtype) or check the calibration data"
        )
    return score
