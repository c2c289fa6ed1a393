"""Compensated codes of every searched weight, layer by layer: `run(...) -> tuple[RoundedModule, ...]`.

Layer after layer runs on all batches (`layers`, which may stream them); the products of its searched modules' inputs
are added up, and its codes are made from them (`rounding`). So the products of one layer live at a time, and the hidden
states of all batches, [tokens, hidden] in the model's dtype.

Inputs are those of the original model, each rounded through its own FP8 scale: codes then serve every scheme, whatever
else that quantises. Every token counts alike: its input is divided by its own length, since a few tokens (the first
of a sequence, above all) are a hundred times as long as the others and would settle the codes alone. Padding doesn't
count.

    measuring/codes/layer-00007.safetensors   one per decoder layer; what its codes do is in the file's metadata
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from bitladder.device import OUT_OF_MEMORY, without_cudnn_attention
from bitladder.errors import EngineError, MeasurementError
from bitladder.formats import E4m3, column_format
from bitladder.measured import Amax
from bitladder.measuring.calls import by_layer, hidden_of
from bitladder.measuring.job import Job
from bitladder.measuring.layers import Layers
from bitladder.measuring.partial import Partial
from bitladder.measuring.rounding import compensated_codes, output_error
from bitladder.models.anatomy import PLAIN, Layout, tokens_first
from bitladder.reading import open_safetensors
from bitladder.records import QuantGroup, RoundedModule
from bitladder.runinfo import Meter
from bitladder.storage import atomic_path, seal, sha256_of_bytes

_NEAREST = "rounding: nearest"
REMEDY = f"rounding: compensated goes layer by layer and needs one list, use {_NEAREST}"


def run(layers: Layers, job: Job, partial: Partial, amax: Amax, meter: Meter) -> tuple[RoundedModule, ...]:
    """Make the codes of every layer that has none in `partial` yet, and return what all of them do.

    Raises:
        MeasurementError: too few calibration tokens, or out of memory. EngineError: a model that can't be taken apart.
    """
    groups = by_layer(job.target.groups)
    missing = [layer for layer in sorted(groups) if not partial.codes_file(layer).exists()]
    if missing:
        try:
            with meter.phase("round"), torch.no_grad(), without_cudnn_attention():
                _round_layers(layers, groups, missing, job, partial, amax)
        except torch.OutOfMemoryError as error:
            raise MeasurementError(OUT_OF_MEMORY) from error
    return tuple(module for layer in sorted(groups) for module in read_modules(partial.codes_file(layer)))


def read_modules(path: Path) -> tuple[RoundedModule, ...]:
    """Return what the codes in a layer's file do, as it was found when they were made."""
    with open_safetensors(path) as file:
        return tuple(RoundedModule.model_validate(entry) for entry in json.loads(file.metadata()["modules"]))


def _round_layers(
    layers: Layers,
    groups: dict[int, list[QuantGroup]],
    missing: list[int],
    job: Job,
    partial: Partial,
    amax: Amax,
) -> None:
    last = missing[-1]
    counted = [batch.inputs["attention_mask"].bool().to(job.device) for batch in job.batches]
    try:
        calls = [layers.calls(batch.to(job.device))[0] for batch in job.batches]
    except EngineError as error:
        raise EngineError(f"{error}; use {_NEAREST}") from error
    hidden = [found[0].hidden.to(layers.home) for found in calls]
    format_ = column_format(job.spec.formats[0], job.arithmetic)
    for index in range(last + 1):
        job.progress("round", index, last + 1)
        layer_groups = groups[index] if index in missing else []
        with layers.loaded(index) as layer:
            with _Products(layers, layer_groups, format_, amax) as inputs:
                for number, (found, mask) in enumerate(zip(calls, counted, strict=True)):
                    inputs.counted = mask
                    x = hidden[number].to(job.device)
                    output = hidden_of(layer(x, *found[index].args, **found[index].kwargs))
                    hidden[number] = output.to(layers.home)
            if layer_groups:
                _write(partial.codes_file(index), layers.model, layer_groups, inputs.products, job, amax)
    job.progress("round", last + 1, last + 1)


class _Products(ExitStack):
    """Adds up the products of inputs, group by group; a context manager, within which a layer runs on all batches."""

    def __init__(self, layers: Layers, groups: list[QuantGroup], format_: E4m3, amax: Amax) -> None:
        super().__init__()
        self.format = format_
        self.products: dict[str, torch.Tensor] = {}  # group -> [in_features, in_features] float32
        self.counted = torch.empty(0)  # mask [rows, tokens] of the batch at hand: all but padding
        for group in groups:
            name = group.modules[0].name  # all of a group have the same input, and its scale
            linear: Any = layers.model.get_submodule(name)
            layout = layers.anatomy.positions.get(name, PLAIN)
            scale = None
            if format_.has_input_scale:
                scale = format_.input_scale(amax[f"{name}.input_amax"].to(linear.weight.device))
            self.callback(linear.register_forward_pre_hook(self._hook(group.name, name, scale, layout)).remove)

    def _hook(
        self, group: str, module: str, scale: torch.Tensor | None, layout: Layout | None
    ) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
        def add(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            x = inputs[0] if layout is None else tokens_first(inputs[0], layout, self.counted.shape)
            if layout is None or x.shape[:2] != self.counted.shape:
                raise EngineError(
                    f"{module}: its input has shape {list(x.shape)}, [rows, tokens, features] was expected; "
                    "use rounding: nearest"
                )
            rows = self.format.served_input(x[self.counted].flatten(0, -2).float(), scale)
            rows = nn.functional.normalize(rows, dim=-1)
            if group not in self.products:
                self.products[group] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            self.products[group].addmm_(rows.t(), rows)

        return add


def _write(
    path: Path,
    model: nn.Module,
    groups: list[QuantGroup],
    products: dict[str, torch.Tensor],
    job: Job,
    amax: Amax,
) -> None:
    """Write the codes of one layer's modules, and what they do."""
    (name,) = job.spec.formats
    format_ = column_format(name)
    tensors: dict[str, torch.Tensor] = {}
    modules = []
    for group in groups:
        product = products.pop(group.name, None)
        if product is None:
            raise EngineError(f"{group.name} doesn't run inside its layer; use rounding: nearest")
        weights: list[torch.Tensor] = [model.get_parameter(f"{module.name}.weight") for module in group.modules]
        # One call for all modules of a group: they share input and scale.
        keys = [format_.weight_key(module.name) for module in group.modules]
        each = [amax[key].to(product.device) for key in keys]
        weight_amax = torch.cat(each) if format_.channels else each[0]
        try:
            codes = compensated_codes(torch.cat(weights), product, weight_amax, format_, job.spec.damping)
        except MeasurementError as error:
            raise MeasurementError(f"{group.name}: {error}") from error
        parts = torch.split(codes, [len(weight) for weight in weights])
        for module, weight, part, own_amax in zip(group.modules, weights, parts, each, strict=True):
            tensors[module.name] = part.cpu().contiguous()
            scale = format_.scale(own_amax)
            restored, nearest = (format_.restored(found, scale) for found in (part, format_.codes(weight, own_amax)))
            shift = (restored - weight.float()).abs().amax(-1) / scale
            modules.append(
                RoundedModule(
                    name=module.name,
                    codes_sha256=codes_sha256(tensors[module.name]),
                    largest_shift=float(shift.amax()),
                    output_error=output_error(weight, restored, product),
                    nearest_output_error=output_error(weight, nearest, product),
                )
            )
    with atomic_path(path) as temporary:
        metadata = {"modules": json.dumps([module.model_dump(mode="json") for module in modules])}
        save_file(tensors, temporary, metadata=metadata)
    seal(path)


def codes_sha256(codes: torch.Tensor) -> str:
    """Return the hex SHA-256 of a module's codes on the CPU, row by row, one byte an element."""
    return sha256_of_bytes(codes.contiguous().view(torch.uint8).numpy().data)
