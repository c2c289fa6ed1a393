"""What is looked at before scores are believed: weights against the files, and which groups have FP8 scales.

A weight or an input that is zero everywhere has no scale, nor has the input of a module that no sample reaches. Nobody
can say what FP8 would do there, so such a group stays in 16 bits, with the reason beside its modules. That is no error:
models have such modules (pruned projections, cross-attention that text alone passes by). NaN and Inf are errors:
something is wrong with the model, the data or the arithmetic.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from bitladder.errors import MeasurementError, ModelError
from bitladder.formats import Format, get_format, why_not
from bitladder.measured import Amax
from bitladder.models.loading import checkpoint_tensor_names
from bitladder.models.target import ZERO_WEIGHTS, Target
from bitladder.models.weights import WeightFiles, all_finite
from bitladder.recipe import MeasureSpec
from bitladder.records import QuantGroup, UntouchedModule

_KV_SUFFIXES = (".k_amax", ".v_amax")


def check_weights(model: torch.nn.Module, directory: Path, target: Target) -> None:
    """Check that the loaded weights are finite, and that every searched one equals its tensor in the files.

    Raises:
        ModelError: NaN, Inf, or a tensor name that leads to another weight.
    """
    names = checkpoint_tensor_names(model, WeightFiles.open(directory).tensors)
    tensor_of = {parameter: tensor for tensor, parameter in names.items()}
    for name, parameter in model.named_parameters():
        if not all_finite(parameter):
            raise ModelError(f"{directory}: tensor {tensor_of.get(name, name)} holds NaN or Inf; fetch the model again")
    files = WeightFiles.open(directory)
    for group in target.groups:
        for module in group.modules:
            parameter = model.get_parameter(f"{module.name}.weight")
            assert module.tensor is not None
            stored = files.load(module.tensor)
            if not torch.equal(stored.to(parameter.device, parameter.dtype), parameter.detach()):
                raise ModelError(f"{directory}: {module.tensor} is not what transformers loads into {module.name}")


def in_any_format(target: Target, formats: Sequence[str]) -> Target:
    """Return the target without the groups that none of the formats fits; why not is said of each of their modules.

    Raises:
        MeasurementError: a format that fits no group.
    """
    kept, left = [], []
    for group in target.groups:
        reasons = [why_not(group, name) for name in formats]
        fits = None in reasons
        if fits:
            kept.append(group)
        else:
            left += _left_alone(group, {module.name: str(reasons[0]) for module in group.modules})
    for name in formats:
        if kept and all(why_not(group, name) is not None for group in kept):
            raise MeasurementError(
                f"no group can be in {name}: {why_not(kept[0], name)}; leave it out of measurement.formats"
            )
    return dataclasses.replace(target, groups=tuple(kept), untouched=(*target.untouched, *left)) if left else target


def with_scales(target: Target, amax: Amax, spec: MeasureSpec) -> Target:
    """Return the target without the groups that have no scale; why not is said of each of their modules.

    Args:
        target: what was calibrated.
        amax: "<module>.weight_amax" and "<module>.input_amax" of all of its modules that samples reached.
        spec: of which formats; where ModelOpt measures inputs without scales alone, it observes none.

    Raises:
        MeasurementError: NaN or Inf, or no group is left; the message names a module.
    """
    kept, left = [], []
    formats = [get_format(name) for name in spec.formats]
    observed = spec.engine == "native" or any(format_.has_input_scale for format_ in formats)
    least = max(format_.least_amax for format_ in formats)
    names = {Format.amax_name, *(format_.amax_name for format_ in formats)}
    for group in target.groups:
        found = {module.name: _why_no_scale(module.name, amax, names, observed, least) for module in group.modules}
        reasons = {name: reason for name, reason in found.items() if reason is not None}
        if not reasons:
            kept.append(group)
        left += _left_alone(group, reasons)
    if not kept:
        raise MeasurementError(
            f"no group is left to quantise: {left[0].name} is {left[0].reason}, and so for all {len(target.groups)} "
            "groups; check the model, or calibrate on data that reaches it"
        )
    return dataclasses.replace(target, groups=tuple(kept), untouched=(*target.untouched, *left))


def _why_no_scale(module: str, amax: Amax, names: set[str], observed: bool, least: float) -> str | None:
    """Return why a module has no scale, or None.

    Args:
        module: its name.
        amax: of all modules.
        names: what a weight's amax is called; an engine may know it in one shape alone.
        observed: whether inputs were looked at.
        least: amax of which a scale can be made.

    Raises:
        MeasurementError: NaN or Inf.
    """
    known = [amax[key].max() for name in sorted(names) if (key := f"{module}.{name}") in amax]
    weights, inputs = (torch.stack(known).max() if known else None), amax.get(f"{module}.input_amax")
    for value, what in ((weights, "weights"), (inputs, "activations")):
        if value is not None and not bool(torch.isfinite(value)):
            raise MeasurementError(
                f"{module}: its {what} hold NaN or Inf during calibration; check the model and the data, "
                "or measure in float32 (measurement.dtype)"
            )
    if weights is not None and float(weights) == 0:
        return ZERO_WEIGHTS
    if weights is not None and inputs is None and not observed:
        return None
    if weights is None or inputs is None:
        return "reached by no calibration sample: no FP8 scale"
    if float(inputs) == 0:
        return "all zero in its input during calibration: no FP8 scale"
    if min(float(weights), float(inputs)) < least:
        return f"too small (weights up to {float(weights):.1e}, inputs up to {float(inputs):.1e}): no FP8 scale"
    return None


def _left_alone(group: QuantGroup, reasons: dict[str, str]) -> list[UntouchedModule]:
    """Return the modules of a group that has no scale for these reasons (none: an empty list)."""
    found = []
    for module in group.modules if reasons else ():
        culprit, reason = next(iter(reasons.items()))
        own = reasons.get(module.name, f"fused with {culprit.rpartition('.')[2]}, which is {reason}")
        name = (module.tensor or f"{module.name}.weight").removesuffix(".weight")
        found.append(UntouchedModule(name=module.name, checkpoint_name=name, reason=own))
    return found


def of_target(amax: Amax, target: Target) -> Amax:
    """Return what of `amax` belongs to the target's modules; keys and values of all attention layers, or of none.

    Of none: a layer's were dropped, or have no scale, so that a cache would be FP8 in some layers only.
    """
    modules = {module.name for group in target.groups for module in group.modules}
    kept = {name: value for name, value in amax.items() if name.rpartition(".")[0] in modules}
    caches = [name for name in amax if name.endswith(_KV_SUFFIXES)]
    whole = all(name in kept and 0 < float(kept[name]) < torch.inf for name in caches)
    return kept if whole else {name: value for name, value in kept.items() if name not in caches}
