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
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save_file

from bitladder.calibration import Batch, DataSet
from bitladder.errors import EngineError, MeasurementError, RecordError
from bitladder.formats import Format, get_format
from bitladder.kv_cache import cached_layers
from bitladder.reading import open_safetensors, read_json, read_tensors, read_text
from bitladder.recipe import MeasureSpec, WorkersSpec
from bitladder.records import Candidate, FileDigest, Measurement, ModelSource, Rounding, digest_of
from bitladder.runinfo import Meter, Progress, no_progress
from bitladder.storage import atomic_path, atomic_write, discard, seal, sha256_of_file, unseal, unsealed
from bitladder.targets import Target

MEASUREMENT_FILE = "measurement.json"
AMAX_FILE = "measurement.safetensors"
CODES = "codes"  # directory
_PARTIAL = "measuring"
_CODES_FILE = re.compile(r"layer-\d+\.safetensors")

# Float32 scalars: "<module>.weight_amax" and "<module>.input_amax"; keys and values as `kv_cache` names them.
Amax = dict[str, torch.Tensor]
RawScore = tuple[float, ...]  # (score,) or (score, what of it lies at image-token positions)
BatchScores = dict[str, dict[str, RawScore]]  # group -> format -> raw score of one batch


@dataclass(frozen=True)
class Job:
    """What an engine is asked to do."""

    target: Target
    batches: tuple[Batch, ...]  # all are calibrated on
    scored: tuple[torch.Size, ...]  # [rows, tokens] of each batch that is scored: the first so many
    spec: MeasureSpec
    device: str
    progress: Progress

    @property
    def score_batches(self) -> int:
        """How many batches are scored."""
        return len(self.scored)


class Codes:
    """Compensated codes of weights on disk: `{module: file}`, read when they are asked for."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files

    @classmethod
    def in_files(cls, paths: Iterable[Path]) -> Self:
        """Return the codes in these files, and in no other that may lie beside them.

        Raises:
            RecordError: a module is in two of them.
        """
        found: dict[str, Path] = {}
        for path in paths:
            with open_safetensors(path) as file:
                for module in file.keys():  # noqa: SIM118
                    if module in found:
                        raise RecordError(f"{path} and {found[module]} both have codes of {module}; measure again")
                    found[module] = path
        return cls(found)

    def read(self, module: str) -> torch.Tensor:
        """Return a module's codes, [out_features, in_features], on the CPU."""
        with open_safetensors(self.files[module]) as file:
            codes: torch.Tensor = file.get_tensor(module)
        return codes


class Partial:
    """What a measurement has so far, on disk."""

    def __init__(self, directory: Path, key: str) -> None:
        self.directory = directory.absolute()  # other processes may stand elsewhere
        path = directory / "key.json"
        damaged = unsealed(directory)
        if path in damaged or not path.exists() or read_text(path) != json.dumps({"key": key}):
            discard(directory)
            directory.mkdir(parents=True)
            self._keep_text(path, json.dumps({"key": key}))
        else:
            for one in damaged:  # what was in it is found again
                discard(one)

    @staticmethod
    def _keep_text(path: Path, text: str) -> None:
        atomic_write(path, text)
        seal(path)

    def codes_file(self, layer: int) -> Path:
        """Return where the codes of a decoder layer's modules are kept, once they are made."""
        return self.directory / CODES / f"layer-{layer:05}.safetensors"

    def codes(self) -> "Codes":
        """Return the codes that are made so far."""
        return Codes.in_files(codes_files(self.directory / CODES))

    def amax(self) -> Amax | None:
        """Return the amax values of a finished calibration, or None."""
        path = self.directory / "amax.safetensors"
        return read_tensors(path) if path.exists() else None

    def keep_amax(self, amax: Amax) -> None:
        """Store the amax values."""
        path = self.directory / "amax.safetensors"
        with atomic_path(path) as temporary:
            save_file(amax, temporary)
        seal(path)

    def scores(self, batch: int) -> BatchScores | None:
        """Return the scores of a finished batch, or None."""
        path = self.directory / f"scores-{batch:05}.json"
        if not path.exists():
            return None
        scores: BatchScores = read_json(path)
        return scores

    def keep_scores(self, batch: int, scores: BatchScores) -> None:
        """Store the scores of one batch (floats survive JSON exactly)."""
        self._keep_text(self.directory / f"scores-{batch:05}.json", json.dumps(scores))

    def remove(self) -> None:
        """Remove everything, once the measurement is written."""
        discard(self.directory)


def codes_files(directory: Path) -> list[Path]:
    """Return the files of layers' codes in a directory, by layer; what else lies there isn't ours."""
    return [path for path in sorted(directory.glob("*")) if _CODES_FILE.fullmatch(path.name)]


def resolve_device(device: str) -> str:
    """Return the device to run on; `auto` is a GPU where there is one.

    Raises:
        MeasurementError: a GPU was asked for that isn't there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise MeasurementError(f"device {device} was asked for, but torch sees no GPU; use device: cpu")
        count = torch.cuda.device_count()
        if (torch.device(device).index or 0) >= count:
            raise MeasurementError(f"device {device} was asked for, but torch sees {count} GPUs, from cuda:0 on")
    return device


def measuring_device(spec: MeasureSpec, workers: WorkersSpec) -> str:
    """Return the device that measuring runs on; a cluster's GPUs need not be in this machine.

    Raises:
        MeasurementError: as `resolve_device`.
    """
    elsewhere = workers.count and workers.address and spec.device == "cuda"
    return "cuda" if elsewhere else resolve_device(spec.device)


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """Return the arithmetic to score in: float32 on a CPU, bfloat16 on a GPU, unless the recipe says otherwise."""
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def score_batch_count(data: DataSet, spec: MeasureSpec) -> int:
    """Return how many of the batches are scored: the fewest that hold as many samples as were asked for.

    Raises:
        MeasurementError: more samples are to be scored than there are.
    """
    if spec.score_samples is None:
        return len(data.batches)
    if spec.score_samples > data.summary.samples:
        raise MeasurementError(
            f"measurement.score_samples is {spec.score_samples}, calibration.samples is {data.summary.samples}; "
            "score at most as many as are calibrated"
        )
    held = itertools.accumulate(len(batch.labels) for batch in data.batches)
    return next(count for count, samples in enumerate(held, start=1) if samples >= spec.score_samples)


def settings_sha256(source: ModelSource, data: DataSet, spec: MeasureSpec) -> str:
    """Return the digest of everything that decides a measurement: model, data, settings."""
    return digest_of([source.sha256, data.summary.sha256, spec.model_dump_json(exclude={"memory_gb"})])


def score_weights(method: str, batches: tuple[Batch, ...]) -> tuple[str, tuple[float, ...]]:
    """Return the unit of a sensitivity, and the weight of each batch's raw score in it.

    ModelOpt's gradient score of a batch is Σ (∂loss/∂y · Δy)² with `loss` the mean over the batch's n tokens: it
    shrinks with n², so a batch of few tokens would weigh most. n² / Σn makes it the score of the summed loss, per
    token. A KL score, estimated by `fisher` or exact, is a sum over tokens: 1 / Σn.
    """
    tokens = [batch.loss_tokens for batch in batches]
    total = sum(tokens)
    if method == "gradient":
        return "nats² per token", tuple(n * n / total for n in tokens)
    return "nats per token", tuple(1.0 / total for _ in tokens)


def check_engine(spec: MeasureSpec, target: Target) -> None:
    """Look whether a model can be measured as asked.

    Raises:
        EngineError: layers that have to run one by one, and can't.
    """
    from bitladder.sensitivity import compensation, layers, native

    remedies = {native.REMEDY: spec.engine == "native", compensation.REMEDY: spec.rounding == "compensated"}
    for remedy in (remedy for remedy, is_needed in remedies.items() if is_needed):
        problem = layers.why_not_by_layers(target, remedy)
        if problem is not None:
            raise EngineError(problem)


def measure(
    directory: Path,
    source: ModelSource,
    target: Target,
    data: DataSet,
    spec: MeasureSpec,
    output: Path,
    progress: Progress = no_progress,
    workers: WorkersSpec | None = None,
) -> Measurement:
    """Measure the sensitivity of every quant group once; write `measurement.json` and `measurement.safetensors`.

    Args:
        directory: the model's files.
        source: their identity (`weights.model_source`).
        target: what is searched (`targets.find_target`).
        data: calibration batches.
        spec: engine, method, formats, arithmetic.
        output: where the two files go; `measuring/` in it holds what is done so far.
        progress: told of every calibrated and scored batch.
        workers: processes that share the work; None: this one does it alone. The result is the same.

    Raises:
        ModelError: NaN or Inf in weights. MeasurementError: NaN or Inf in activations or scores; no group that has a
            scale; workers that don't come up, or die again and again.
    """
    from bitladder.sensitivity import checks, compensation, layers, modelopt, native, parallel

    for name in spec.formats:
        get_format(name)
    workers = workers or WorkersSpec()
    problem = workers.problem(spec)
    if problem is not None:
        raise MeasurementError(problem)
    meter = Meter()
    device = measuring_device(spec, workers)
    dtype = resolve_dtype(spec.dtype, device)
    key = settings_sha256(source, data, spec)
    partial = Partial(output / _PARTIAL, key)
    count = score_batch_count(data, spec)
    scored = tuple(batch.labels.shape for batch in data.batches[:count])
    job = Job(target, data.batches, scored, spec, device, progress)

    memory = layers.DeviceMemory(device, spec.memory_gb)

    def opened(remedy: str) -> layers.Layers:
        with meter.phase("load model"):
            return layers.open_layers(directory, job, dtype, memory, remedy)

    with memory.enforced():
        if partial.amax() is None or any(partial.scores(batch) is None for batch in range(count)):
            if workers.count:
                parallel.run(workers, directory, source, dtype, job, partial, meter)
            elif spec.engine == "native":
                native.run(opened(native.REMEDY), job, partial, meter)
            else:
                with meter.phase("load model"):
                    model = layers.load_whole(directory, target, dtype, device)
                modelopt.run(model, job, partial, meter)
                del model
            _free_memory()
        amax = partial.amax()
        assert amax is not None
        target = checks.with_scales(target, amax)
        job, amax = replace(job, target=target), checks.of_target(amax, target)
        rounding = None
        if spec.rounding == "compensated":
            if spec.engine != "native":  # which has made the codes already, and scored them
                compensation.run(opened(compensation.REMEDY), job, partial, amax, meter)
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
            weight_bits=group.weight_elements * get_format(name).bits,
            scores=tuple(_finite(batch[group.name][name][0], group.name, name) for batch in batches),
            image_scores=tuple(batch[group.name][name][1] for batch in batches) if apart else (),
        )
        for group in target.groups
        for name in spec.formats
    )
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
        groups=target.groups,
        candidates=candidates,
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


def forget_partial(output: Path) -> None:
    """Remove what an unfinished measurement in `output` has so far."""
    discard(output / _PARTIAL)


def _free_memory() -> None:
    """Give back what deleted models hold: their modules and hooks refer to each other, so `del` frees nothing yet."""
    gc.collect()
    torch.cuda.empty_cache()


def _keep_codes(partial: Partial, output: Path, data: DataSet, spec: MeasureSpec) -> Rounding:
    """Move the finished codes to where they stay, and return their record."""
    from bitladder.sensitivity import compensation

    made, kept = partial.directory / CODES, output / CODES
    if made.exists():
        unseal(made)
        discard(kept)
        os.replace(made, kept)
    paths = codes_files(kept)
    return Rounding(
        method="compensated",
        damping=spec.damping,
        samples=data.summary.samples,
        scored=spec.engine == "native",
        files=tuple(
            FileDigest(name=path.name, bytes=path.stat().st_size, sha256=sha256_of_file(path)) for path in paths
        ),
        modules=tuple(module for path in paths for module in compensation.read_modules(path)),
    )


def read_codes(
    measurement: Measurement, directory: Path, sha256: Callable[[Path], str] = sha256_of_file
) -> Codes | None:
    """Return the codes that belong to a measurement, `directory` being where its files lie; None: the nearest ones.

    Args:
        measurement: whose codes.
        directory: where its files lie.
        sha256: of a file; a cache spares hashing gigabytes again.

    Raises:
        RecordError: a file is missing, or not the one that the measurement was written with.
    """
    if measurement.rounding is None:
        return None
    for entry in measurement.rounding.files:
        path = directory / CODES / entry.name
        if not path.is_file():
            raise RecordError(f"{path} is missing; run `bitladder measure` again")
        if sha256(path) != entry.sha256:
            raise RecordError(f"{path} is not the file that {MEASUREMENT_FILE} was written with; measure again")
    return Codes.in_files(directory / CODES / entry.name for entry in measurement.rounding.files)


def codes_of(
    module: str, weight: torch.Tensor, amax: torch.Tensor, format_: Format, codes: Codes | None
) -> torch.Tensor:
    """Return the codes [out_features, in_features] that a module's weight is stored as, on the weight's device.

    Args:
        module: its name.
        weight: [out_features, in_features].
        amax: of the weight, a scalar on its device.
        format_: the codes' format.
        codes: the measurement's; None: every weight to its nearest.
    """
    return format_.codes(weight, amax) if codes is None else codes.read(module).to(weight.device)


def check_codes(measurement: Measurement, codes: Codes | None) -> None:
    """Check that compensated codes are at hand exactly where the measurement has them.

    Raises:
        MeasurementError: they are not, or of other modules.
    """
    wanted = {module.name for module in measurement.rounding.modules} if measurement.rounding is not None else None
    if wanted != (None if codes is None else set(codes.files)):
        have, need = ("no" if found is None else "compensated" for found in (codes, wanted))
        raise MeasurementError(f"{have} codes were given, the measurement has {need} ones; read them with read_codes")


def copy_codes(measurement: Measurement, source: Path, destination: Path) -> None:
    """Copy a measurement's codes, where it has some, to another run's directory."""
    discard(destination / CODES)
    for entry in measurement.rounding.files if measurement.rounding is not None else ():
        with atomic_path(destination / CODES / entry.name) as temporary:
            shutil.copyfile(source / CODES / entry.name, temporary)


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


def kv_amax(measurement: Measurement, amax: Amax) -> dict[str, torch.Tensor]:
    """Return `{name in the checkpoint: amax}` of every layer's keys and values.

    Raises:
        MeasurementError: the measurement doesn't know them.
    """
    layers = cached_layers(measurement.groups)
    missing = [name for layer in layers for name in layer.amax_names if name not in amax]
    if missing or not layers:
        raise MeasurementError(
            "kv_cache: fp8 was asked for, but this measurement has no amax of keys and values of every attention layer "
            "(some layer's k_proj or v_proj isn't searched or has no scale, or the model doesn't use transformers' "
            "cache); set kv_cache: none"
        )
    return {
        scale: amax[name] for layer in layers for name, scale in zip(layer.amax_names, layer.scale_names, strict=True)
    }


def read_amax(measurement: Measurement, directory: Path) -> Amax:
    """Return the amax values that belong to a measurement, `directory` being where its files lie.

    Raises:
        MeasurementError: it has none (an imported manifest, or measured without shared scales).
        RecordError: the file is missing, damaged, or of another measurement.
    """
    if measurement.amax_sha256 is None:
        raise MeasurementError(
            f"this measurement ({measurement.engine}, imported) has no amax values: it is good for planning, "
            "not for export; run `bitladder measure` on the model itself"
        )
    if not measurement.fused_scales_shared:
        raise MeasurementError(
            "this measurement was made with share_fused_scales: false, for comparison only: a runtime would requantise "
            "its fused modules; measure again with share_fused_scales: true"
        )
    path = directory / AMAX_FILE
    if not path.is_file():
        raise RecordError(f"{path} is missing; run `bitladder measure` again")
    if sha256_of_file(path) != measurement.amax_sha256:
        raise RecordError(f"{path} is not the file that {MEASUREMENT_FILE} was written with; measure again")
    try:
        amax: Amax = read_tensors(path)
        return amax
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} is damaged ({error}); measure again") from error
