"""Measure once, or take over what somebody measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitladder.data import generation
from bitladder.data.batches import DataSet
from bitladder.errors import MeasurementError, RecordError, StaleRecord
from bitladder.formats import in_order
from bitladder.formats.targets import served
from bitladder.measured import AMAX_FILE, CODES, MEASUREMENT_FILE, copy_codes, has_earlier_codes, read_codes
from bitladder.measuring.measure import measure as measure_now
from bitladder.measuring.measure import settings_sha256
from bitladder.measuring.partial import forget_partial
from bitladder.models.kv_layers import check_layers
from bitladder.reading import read_bytes
from bitladder.recipe import GENERATED, Recipe
from bitladder.records import Measurement, ModelSource
from bitladder.steps.data import calibration_data
from bitladder.steps.look import look, served_arithmetic
from bitladder.steps.step import read_valid
from bitladder.steps.workspace import Workspace
from bitladder.storage import atomic_write

_ONE_KIND = (
    "compensated codes fit what they are calibrated on; a second calibration set, data: {kind: generated}, makes them "
    "better on other text"
)


def measure(work: Workspace) -> Measurement:
    """Measure once, or return the measurement that is there and valid.

    Raises:
        BitladderError: see `measuring.measure`.
    """
    look(work)
    known, again = known_measurement(work)
    if known is not None and again is None:
        forget_partial(work.output)  # of a run that was killed when it had measured
        work.note_measured_with(deciding(work.recipe))  # nor had it noted this
        return known
    if again is not None:
        work.tell(f"measuring again: {again}")
    asked = work.recipe.calibration
    if work.recipe.measurement.rounding == "compensated" and len(asked) == 1 and asked[0].data.kind != GENERATED:
        work.tell(_ONE_KIND)
    target, data, arithmetic = work.target, calibration_data(work), served_arithmetic(work.recipe)
    if any(spec.caches_fp8 for spec in work.recipe.scheme_specs()):
        check_layers(target.groups)
    recipe = work.recipe
    measurement = measure_now(
        work.model_directory,
        work.source(),
        target,
        data,
        recipe.measurement,
        work.output,
        work.progress,
        recipe.workers,
        arithmetic,
    )
    work.note_measured_with(deciding(work.recipe))
    work.finished("measure", measurement.run.phases if measurement.run else ())
    return measurement


def known_measurement(work: Workspace) -> tuple[Measurement | None, str | None]:
    """Return the measurement that is there, and why it isn't what the recipe asks for (None: it is, or there is none).

    Raises:
        RecordError: it is damaged: what took hours isn't made again unasked.
    """
    source, data = work.source(), calibration_data(work)
    known = read_valid(Measurement, work.output / MEASUREMENT_FILE)
    if known is None:
        return None, None
    key = settings_sha256(source, data, work.recipe.measurement, served_arithmetic(work.recipe))
    damaged = damaged_beside(work, known, work.output)
    if known.settings_sha256 == key and not damaged:
        return known, None
    return known, why_again(work, known, source, data, damaged)


def deciding(recipe: Recipe) -> dict[str, Any]:
    """Return the sections of a recipe that decide its measurement; in which order formats are listed doesn't."""
    sections = recipe.model_dump(mode="json", include={"model", "calibration", "measurement", "serve_on"})
    sections["measurement"]["formats"] = list(in_order(recipe.measurement.formats))
    return sections


def why_again(work: Workspace, known: Measurement, source: ModelSource, data: DataSet, damaged: Sequence[str]) -> str:
    """Say in a line what is not as it was when the measurement that is there was made."""
    before = work.state.measured_with
    changes = _changes(before, deciding(work.recipe)) if before else []
    if known.model.sha256 != source.sha256:
        changes.append("the model's files are others")
    if known.calibration.sha256 != data.summary.sha256 and not any(line.startswith("calibration") for line in changes):
        changes.append("the calibration samples are others")
    earlier = has_earlier_codes(known)
    changes += ["an earlier version made its compensated codes"] if earlier else []
    changes += [f"{name} is missing or damaged" for name in damaged if not (earlier and name == CODES)]
    if not changes and before and known.arithmetic == served_arithmetic(work.recipe):
        return "an earlier version made it otherwise"
    return ", ".join(changes) or "the settings are others than those that it was made with"


def _changes(before: Any, after: Any, name: str = "") -> list[str]:
    """Return what differs between two parts of a recipe, as lines like "calibration.samples 48 → 40"."""
    if before == after:
        return []
    if isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            return [f"{name}: {len(before)} → {len(after)} entries"]
        names = [f"{name}[{index}]" for index in range(len(after))] if len(after) > 1 else [name]
        pairs = list(zip(names, before, after, strict=True))
    elif isinstance(before, dict) and isinstance(after, dict):
        keys = dict.fromkeys((*before, *after))
        pairs = [(f"{name}.{key}" if name else key, before.get(key), after.get(key)) for key in keys]
    else:
        return [f"{name} {before} → {after}"]
    return [line for part, old, new in pairs for line in _changes(old, new, part)]


def damaged_beside(work: Workspace, measurement: Measurement, directory: Path) -> list[str]:
    """Return which of the files that belong to a measurement don't lie in `directory` as they were."""
    amax = directory / AMAX_FILE
    whole = amax.is_file() and work.cache.sha256(amax) == measurement.amax_sha256
    try:
        read_codes(measurement, directory, work.cache.sha256)  # compensated ones, where it has some
    except RecordError:
        return [CODES] if whole else [AMAX_FILE, CODES]
    return [] if whole else [AMAX_FILE]


def take_over(work: Workspace, path: Path) -> Measurement:
    """Use the measurement at `path`, with `measurement.safetensors` beside it, instead of measuring.

    Raises:
        RecordError: it isn't one, or its amax file is missing or another's. StaleRecord: it is of another model.
        MeasurementError: it was imported without amax values, so that nothing can be exported from it.
    """
    known, source = Measurement.read(path), work.source()
    amax = path.parent / AMAX_FILE
    if known.amax_sha256 is None:
        raise MeasurementError(f"{path} has no amax values ({known.engine}): it is good for planning only; measure")
    if known.model.sha256 != source.sha256:
        raise StaleRecord(
            f"{path} was measured on other weights ({known.model.path}) than {source.path} has; measure, or name the "
            "model that it is of"
        )
    if work.recipe.serve_on is not None and known.arithmetic != served(known.formats, work.recipe.serve_on):
        scored = ", ".join(f"{name} {how}" for name, how in sorted(known.arithmetic.items())) or "as they are stored"
        raise StaleRecord(
            f"{path} scored its formats {scored}, which isn't how serve_on: {work.recipe.serve_on} computes them; "
            "measure, or leave serve_on out"
        )
    if has_earlier_codes(known):
        raise RecordError(f"{path} has compensated codes of an earlier version's kind; measure again where it was made")
    for name in damaged_beside(work, known, path.parent):
        raise RecordError(f"{path.parent / name} is missing or not what {path} was written with; copy both together")
    own = work.output / MEASUREMENT_FILE
    if path.resolve() != own.resolve():
        atomic_write(work.output / AMAX_FILE, read_bytes(amax))
        copy_codes(known, path.parent, work.output)
        generation.copy_rows(path.parent, work.output)
        known.write(own)
        work.note_measured_with({})  # another recipe's, which isn't known here
        work.finished("measure", known.run.phases if known.run else ())
    return known
