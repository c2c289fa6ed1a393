"""What can be seen to be wrong in a fraction of a second, without torch: files that aren't there, devices, schemes.

`look` finds the rest, once libraries are loaded.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

from bitladder import planning
from bitladder.data import files
from bitladder.errors import MeasurementError, OutputError, RecipeError
from bitladder.evaluation.harness import check_installed
from bitladder.formats import get_format
from bitladder.measured import MEASUREMENT_FILE
from bitladder.models.weights import WeightFiles, read_config
from bitladder.planning.carrying import refuse_uncarried
from bitladder.recipe import Recipe
from bitladder.records import CheckpointManifest, Measurement, Record, Scheme
from bitladder.runtimes.child import check_interpreter
from bitladder.steps.workspace import Workspace
from bitladder.storage import check_vacant, check_writable, real_path

_DRIVER = "libcuda.so.1"  # NVIDIA's, without which torch sees no GPU of theirs
_OTHER_GPUS = Path("/dev/kfd")  # AMD's, which torch calls cuda, too


def glance(work: Workspace, *, measuring: bool = True, held_out: bool = False, schemes: bool = False) -> None:
    """Look at what a recipe names, before anything is imported that takes long.

    Args:
        work: the recipe and its output directory.
        measuring: whether calibration data will be needed.
        held_out: whether validation and held-out data will be, and tasks.
        schemes: whether schemes will be planned and exported.

    Raises:
        BitladderError: a file, format or device isn't there, a scheme can't be had, or a place not be written.
    """
    recipe = work.recipe
    if not work.output.exists():
        check_writable(work.output)
    for name in recipe.measurement.formats:
        get_format(name)
    if schemes and measuring and not recipe.measurement.share_fused_scales:
        raise RecipeError(
            "measurement.share_fused_scales: false is for comparison only, and its schemes can't be exported: run "
            "`bitladder measure`, or leave it out"
        )
    if schemes:
        planning.refuse_unattainable(recipe.schemes, recipe.measurement.formats)
        refuse_uncarried(recipe.scheme_specs(), recipe.measurement.formats, recipe.export.carrier)
        for spec in recipe.schemes:
            work.check_place(work.checkpoint_directory(spec.name))
    _check_device(recipe)
    if recipe.runtimes.vllm is not None:
        check_interpreter(Path(recipe.runtimes.vllm.python))
    sets = [spec.data for spec in recipe.calibration] if measuring else []
    if held_out:
        sets += [recipe.data_of(one) for one in (*recipe.validation, *recipe.held_out)]
        if recipe.tasks.names:
            check_installed()
    for source in dict.fromkeys(sets):
        files.glance(source)
    if Path(recipe.model.path).is_absolute():  # else it is fetched, which takes long
        read_config(work.model_directory)
        WeightFiles.open(work.model_directory)


def _check_device(recipe: Recipe) -> None:
    """Raise MeasurementError where a GPU is asked for on a machine without a driver for one."""
    device, workers = recipe.measurement.device, recipe.workers
    if not device.startswith("cuda") or (workers.count and workers.address) or _OTHER_GPUS.exists():
        return
    try:
        ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise MeasurementError(
            f"device {device} was asked for, but this machine has no NVIDIA driver ({_DRIVER}); use device: cpu"
        ) from error


def check_elsewhere(work: Workspace, directory: Path) -> None:
    """Refuse a new directory outside a run that holds something, lies where others keep theirs, or can't be made.

    Raises:
        OutputError: says what is there, or what the system says.
    """
    check_vacant(directory)
    own = [work.checkpoint_directory(spec.name) for spec in work.recipe.schemes]
    for place in (work.output, Path(work.recipe.model.path), *own):
        hub_id = not place.is_absolute()
        if not hub_id and real_path(directory).is_relative_to(real_path(place)):
            raise OutputError(f"{directory} lies in {place}, which would not be what it was; name a place elsewhere")
    check_writable(directory)


def check_planned(work: Workspace) -> None:
    """Raise RecordError where a step that needs a measurement and schemes has none of these yet."""
    needed: list[tuple[type[Record], Path]] = [(Measurement, work.output / MEASUREMENT_FILE)]
    needed += [(Scheme, work.scheme_file(spec.name)) for spec in work.recipe.schemes]
    _check_written(needed)


def check_exported(work: Workspace) -> None:
    """Raise RecordError where a step that needs checkpoints has none yet."""
    check_planned(work)
    names = [spec.name for spec in work.recipe.schemes]
    _check_written(
        [(CheckpointManifest, work.checkpoint_directory(name) / CheckpointManifest.FILE_NAME) for name in names]
    )


def _check_written(needed: Sequence[tuple[type[Record], Path]]) -> None:
    for kind, path in needed:
        if not path.exists():
            kind.read(path)  # says what writes it
