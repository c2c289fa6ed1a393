"""The samples that a recipe names, each set read once."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from bitladder.data import generation
from bitladder.data.batches import DataSet, interleaved
from bitladder.data.processors import tokenizer_of
from bitladder.data.samples import GENERATED_SOURCE, load_data
from bitladder.errors import DataError, StaleRecord
from bitladder.models.loading import embedding_rows, image_token_ids
from bitladder.recipe import GENERATED, MESSAGES, PAIR_KINDS, DataSpec, HeldOutSpec, OtherRowsSpec, SampleSpec
from bitladder.records import DataSummary, Measurement, digest_of
from bitladder.runinfo import Meter
from bitladder.steps.workspace import Workspace


def calibration_data(work: Workspace) -> DataSet:
    """Return the recipe's calibration batches; several sets are interleaved, and have no sample in common.

    Raises:
        BitladderError: see `data.samples.load_data` and `data.generation`.
    """
    return interleaved(calibration_sets(work, work.recipe.calibration))


def calibration_sets(work: Workspace, specs: Sequence[SampleSpec]) -> list[DataSet]:
    """Return the batches of calibration sets, none of which has a sample of one before."""
    sets: list[DataSet] = []
    for spec in specs:
        seen = interleaved(sets).summary if sets else None
        sets.append(load_set(work, spec, spec.data, seen))
    return sets


def load_set(work: Workspace, spec: SampleSpec | OtherRowsSpec, source: DataSpec, avoid: DataSummary | None) -> DataSet:
    """Return one set's batches, of samples that `avoid` doesn't have; a process reads each once."""
    key = digest_of([spec.model_dump_json(), source.model_dump_json(), *(avoid.sample_ids if avoid else ())])
    if key not in work.loaded:
        check_asked_length(work, spec.sequence_length, source)
        found = load_data(
            source,
            work.processor,
            samples=spec.samples,
            sequence_length=spec.sequence_length,
            batch_size=spec.batch_size,
            seed=spec.seed,
            avoid=avoid,
            vocabulary=embedding_rows(work.model_config),
            image_tokens=image_token_ids(work.model_config),
            written=_written_rows(work, spec, source) if source.kind == GENERATED else None,
        )
        _check_width(work, source, max(batch.labels.shape[1] for batch in found.batches))
        if found.summary.null_rows:
            work.tell(f"{source.path}: {found.summary.null_rows} of the rows that were read hold null and are left out")
        work.loaded[key] = found
    return work.loaded[key]


def check_asked_length(work: Workspace, length: int, source: DataSpec) -> None:
    """Raise for rows longer than the model has positions for, before any is made; not where it is only a bound."""
    limit = work.most_positions
    if source.kind not in (*PAIR_KINDS, MESSAGES) and limit is not None and length > limit:
        raise DataError(
            f"sequence_length {length} is more than the {limit} positions that the model knows "
            f"(max_position_embeddings); set sequence_length to at most {limit}"
        )


def _check_width(work: Workspace, source: DataSpec, width: int) -> None:
    """Raise for samples of more tokens than the model has positions for.

    Args:
        work: the recipe and its output directory.
        source: where they come from.
        width: tokens of the longest sample.
    """
    limit = work.most_positions
    if limit is not None and width > limit:
        remedy = (
            "use smaller pictures or shorter texts" if source.kind in PAIR_KINDS else f"set sequence_length: {limit}"
        )
        raise DataError(
            f"{source.path or GENERATED_SOURCE}: a sample has {width} tokens, more than the {limit} "
            f"positions that the model knows (max_position_embeddings); {remedy}"
        )


def is_written(work: Workspace, spec: SampleSpec | OtherRowsSpec, source: DataSpec) -> bool:
    """Return whether the model has written the rows of a set of kind generated."""
    return _writing_of(work, spec, source)[1].exists()


def _writing_of(work: Workspace, spec: SampleSpec | OtherRowsSpec, source: DataSpec) -> tuple[generation.Writing, Path]:
    """Return what the model has to write for a set, and the file that holds it."""
    tokenizer = tokenizer_of(work.processor)
    start, kept = generation.start_of(tokenizer)
    writing = generation.Writing(
        samples=spec.samples,
        sequence_length=spec.sequence_length,
        seed=spec.seed,
        temperature=1.0 if source.temperature is None else source.temperature,
        start=start,
        kept=kept,
        known_tokens=len(tokenizer),
        dtype=work.recipe.measurement.dtype,
        device=work.recipe.measurement.device,
    )
    return writing, generation.file_of(work.output, writing, work.source().sha256)


def _written_rows(work: Workspace, spec: SampleSpec | OtherRowsSpec, source: DataSpec) -> torch.Tensor:
    """Return the rows [samples, sequence_length] that the model wrote, which it does once."""
    writing, path = _writing_of(work, spec, source)
    if not path.exists():
        meter = Meter()
        with meter.phase(generation.PHASE):
            generation.write(work.model_directory, writing, path, work.progress)
        work.finished("generate", meter.phases)
    return generation.read(path, writing)


def validation_data(work: Workspace, measurement: Measurement) -> DataSet:
    """Return the batches on which schemes are chosen by KL: the recipe's validation sets, or the scored batches.

    Raises:
        StaleRecord: the calibration data isn't what was measured on. BitladderError: see `data.samples.load_data`.
    """
    if not work.recipe.validation:
        return scored_calibration_data(work, measurement)
    return interleaved(validation_sets(work, measurement.calibration))


def validation_sets(work: Workspace, calibrated: DataSummary | None, *, readable: bool = False) -> list[DataSet]:
    """Return the recipe's validation sets, which have no sample of calibration's or of one before.

    Args:
        work: the recipe and its output directory.
        calibrated: calibration's samples; None: not known.
        readable: leave out those that the model has to write.
    """
    sets: list[DataSet] = []
    for spec in work.recipe.validation:
        source = work.recipe.data_of(spec)
        if not (readable and source.kind == GENERATED):
            sets.append(load_set(work, spec, source, _with_samples(calibrated, sets)))
    return sets


def held_out_set(
    work: Workspace, spec: HeldOutSpec, calibrated: DataSummary | None, choosing: list[DataSet]
) -> DataSet:
    """Return a held-out set, which has no sample of calibration's or validation's.

    Args:
        work: the recipe and its output directory.
        spec: the set's.
        calibrated: calibration's samples; None: not known.
        choosing: the validation sets.
    """
    return load_set(work, spec, work.recipe.data_of(spec), _with_samples(calibrated, choosing))


def _with_samples(known: DataSummary | None, sets: list[DataSet]) -> DataSummary | None:
    """Return a summary whose samples are those of one and of some sets; None: there are none."""
    if not sets:
        return known
    more = interleaved(sets).summary
    samples = (*(known.sample_ids if known is not None else ()), *more.sample_ids)
    return more.model_copy(update={"sample_ids": samples})


def scored_calibration_data(work: Workspace, measurement: Measurement) -> DataSet:
    """Return the calibration batches that were scored.

    Raises:
        StaleRecord: the data isn't what was measured on.
    """
    data = calibration_data(work)
    if data.summary.sha256 != measurement.calibration.sha256:
        raise StaleRecord(
            "the calibration data is not what was measured on; measure again, or name other rows by which schemes are "
            "chosen: validation"
        )
    return dataclasses.replace(data, batches=data.batches[: len(measurement.score_weights)])
