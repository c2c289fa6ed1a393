"""Fold the norms of a recipe's model into the weights that read them, and write it as another model."""

from functools import partial
from pathlib import Path

from bitladder.checkpoints.folded import write_folded
from bitladder.device import resolve_device, resolve_dtype
from bitladder.errors import EngineError
from bitladder.measuring.folding import Fold, fold_norms, parameters_of
from bitladder.models.loading import checkpoint_tensor_names, load_model
from bitladder.models.weights import WeightFiles
from bitladder.steps.data import calibration_data
from bitladder.steps.glance import check_elsewhere
from bitladder.steps.look import look
from bitladder.steps.workspace import Workspace


def fold(work: Workspace, destination: Path) -> tuple[Fold, ...]:
    """Write the recipe's model to a new directory with its norms folded, and return what was done.

    Raises:
        BitladderError: see `check_elsewhere`, `measuring.folding.fold_norms` and `checkpoints.folded.write_folded`.
    """
    check_elsewhere(work, destination)
    look(work)
    spec, source = work.recipe.measurement, work.model_directory
    device = resolve_device(spec.device)
    model = load_model(source, resolve_dtype(spec.dtype, device), device)
    model.config.use_cache = False
    files = WeightFiles.open(source)
    tensor_of = {made: name for name, made in checkpoint_tensor_names(model, files.tensors).items()}
    stored = {made: partial(files.load, name) for made, name in tensor_of.items()}
    batches = [batch.to(device) for batch in calibration_data(work).batches]
    searched = {module.name for group in work.target.groups for module in group.modules}
    folds = fold_norms(model, batches, searched, stored, work.progress)
    scalings = {}
    for one in folds:
        for name, scaling in parameters_of(model, one).items():
            scalings[tensor_of[name]] = scaling
    if len(scalings) < sum(len(parameters_of(model, one)) for one in folds):
        raise EngineError("two norms or weights of this model are one tensor, which can't be folded twice")
    remark = f"{len(folds)} norms were folded into the weights that read them, by powers of two (bitladder fold)"
    write_folded(source, destination, scalings, remark, work.progress)
    return folds
