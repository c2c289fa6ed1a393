"""Compensated codes of every searched weight in every format: `run(...) -> tuple[RoundedModule, ...]`.

Layer after layer runs on all batches (`layers`, which may stream them); the products of its searched modules' inputs
are added up, and its codes are made from them (`rounding`). So the products of one layer live at a time, and the hidden
states of all batches, [tokens, hidden] in the model's dtype.

Inputs are those of the original model, each rounded as the format has it on the device that will serve: codes then
serve every scheme, whatever else that quantises. A format that stores the very same of a weight as another one that is
measured has its codes.

A token counts by how much its output matters. An error of the weights costs, to second order, the square of the token's
input times the gradient by the module's output, as the model's own predictions have it (`gradient.TokenWeigher`; Kim et
al., GuidedQuant, 2025, arXiv:2505.07004, with one weight a token). Its root is taken, the product of both lengths: few
tokens would settle the codes else (`docs/log.md`). Padding doesn't count.

Some rows of every calibration set stay out of the products. A module whose output is farther off on those of any set
with the codes so made than with the nearest ones has the nearest.

    measuring/codes/layer-00007.safetensors   one per decoder layer; what its codes do is in the file's metadata
"""

import functools
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from bitladder.data.batches import Batch
from bitladder.device import OUT_OF_MEMORY, tf32_products, without_cudnn_attention
from bitladder.errors import EngineError, MeasurementError
from bitladder.formats import WEIGHT, WEIGHT_ONLY, Format
from bitladder.measured import Amax, codes_key
from bitladder.measuring.calls import LayerCall, by_layer, hidden_of
from bitladder.measuring.gradient import TokenWeigher
from bitladder.measuring.job import Job, damping_of
from bitladder.measuring.layers import Layers, chunks
from bitladder.measuring.partial import Partial
from bitladder.measuring.rounding import compensated, nearest, output_errors
from bitladder.models.anatomy import PLAIN, Layout, tokens_first
from bitladder.reading import open_safetensors
from bitladder.records import QuantGroup, RoundedModule
from bitladder.runinfo import Meter
from bitladder.storage import atomic_path, seal, sha256_of_bytes

_NEAREST = "rounding: nearest"
_CHECKING = 16  # one row in so many of a calibration set checks the codes, and one of less
_MOST_CHECKED = 8  # of these rows
_CHECKED_TOKENS = 512  # the first ones of each of these, which are kept while their layer is at hand
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


@dataclass(frozen=True, eq=False)
class _Made:
    """Codes of a module in a format, `{part: tensor on the CPU}`, and what they do, as `RoundedModule` names it."""

    module: str
    format: str
    parts: dict[str, torch.Tensor]
    figures: dict[str, float]


@dataclass(frozen=True, eq=False)
class _Use:
    """What a batch's tokens are for, masks [rows, tokens]: padding is in neither.

    part: the set that they are of. made_from: by the codes. checked: kept to look what the codes do.
    """

    part: int
    made_from: torch.Tensor
    checked: torch.Tensor


def _uses(batches: Sequence[Batch], device: str) -> list[_Use]:
    """Return what each batch's tokens are for; the rows that check codes lie evenly in their set."""
    sizes: Counter[int] = Counter()
    for batch in batches:
        sizes[batch.part] += len(batch.labels)
    before: Counter[int] = Counter()
    uses = []
    for batch in batches:
        size = sizes[batch.part]
        share = max(1, min(_MOST_CHECKED, size // _CHECKING))
        row = before[batch.part] + torch.arange(len(batch.labels), device=device)
        before[batch.part] += len(batch.labels)
        checks = ((row + 1) * share // size > row * share // size)[:, None]
        counted = batch.inputs["attention_mask"].bool().to(device)
        made_from = counted & ~checks if size > 1 else counted  # a single row has to do for both
        uses.append(_Use(batch.part, made_from, counted & checks & (counted.cumsum(1) <= _CHECKED_TOKENS)))
    return uses


def _round_layers(
    layers: Layers,
    groups: dict[int, list[QuantGroup]],
    missing: list[int],
    job: Job,
    partial: Partial,
    amax: Amax,
) -> None:
    last = missing[-1]
    uses = _uses(job.batches, job.device)
    for batch in {frozenset(batch.inputs): batch for batch in job.batches}.values():  # text, and pictures
        _calls(layers, batch, job)  # before the tokens of all are weighed
    lengths = _lengths(layers, job, partial)
    calls = [_calls(layers, batch, job) for batch in job.batches]
    hidden = [found[0].hidden.to(layers.home) for found in calls]
    with ThreadPoolExecutor(1) as writer:  # hashes and writes a layer's codes while the next one is on the GPU
        written = writer.submit(lambda: None)
        for index in range(last + 1):
            job.progress("round", index, last + 1)
            layer_groups = groups[index] if index in missing else []
            with layers.loaded(index) as layer:
                with _Inputs(layers, layer_groups, job, amax) as inputs:
                    for number, (found, use) in enumerate(zip(calls, uses, strict=True)):
                        inputs.use, inputs.lengths = use, lengths[number]
                        x = hidden[number].to(job.device)
                        output = hidden_of(layer(x, *found[index].args, **found[index].kwargs))
                        hidden[number] = output.to(layers.home)
                if layer_groups:
                    made = list(_made(layers.model, layer_groups, inputs, job, amax))
                    written.result()
                    written = writer.submit(_write, partial.codes_file(index), made)
        written.result()
    job.progress("round", last + 1, last + 1)


def _calls(layers: Layers, batch: Batch, job: Job) -> list[LayerCall]:
    """Return what each layer is called with.

    Raises:
        EngineError: a model whose layers can't be run one after another.
    """
    try:
        return layers.calls(batch.to(job.device))[0]
    except EngineError as error:
        raise EngineError(f"{error}; use {_NEAREST}") from error


def _lengths(layers: Layers, job: Job, partial: Partial) -> list[dict[str, torch.Tensor]]:
    """Return for every batch how long each token's gradient by a module's output is, {module: [rows, tokens]}.

    In units of the module's mean; on the host.

    Raises:
        EngineError: a model whose gradients can't be taken. MeasurementError: a module that none reaches.
    """
    batches, names = job.batches, [module.name for group in job.target.groups for module in group.modules]
    _weigh(layers, job, partial)
    found = [partial.lengths(number) for number in range(len(batches))]
    counted = [batch.inputs["attention_mask"].bool().cpu() for batch in batches]
    totals = [each[:, mask].double().sum(1) for each, mask in zip(found, counted, strict=True)]
    means = (torch.stack(totals).sum(0) / sum(int(mask.sum()) for mask in counted)).float()
    if not bool(means.isfinite().all()):
        raise MeasurementError(
            f"{names[int(means.isfinite().int().argmin())]}: the gradient by its output holds NaN or Inf; measure in "
            f"float32 (measurement.dtype), check the calibration data, or use {_NEAREST}"
        )
    for each in found:
        each.div_(means.masked_fill(means == 0, 1)[:, None, None])
        each[means == 0] = 1  # what the module gives doesn't matter at all, as before weights of zero
    return [dict(zip(names, each, strict=True)) for each in found]


def _weigh(layers: Layers, job: Job, partial: Partial) -> None:
    """Store how long the gradients of tokens are, of every batch of which that isn't known yet."""
    batches = job.batches
    if not (unknown := partial.unweighed(len(batches))):
        return
    try:
        with TokenWeigher(layers, job) as weigher:
            for start, chunk in chunks(unknown, layers, batches, weigher.states):
                job.progress("weigh tokens", start, len(batches))
                for number, lengths in zip(chunk, weigher.lengths([batches[one] for one in chunk]), strict=True):
                    partial.keep_lengths(number, lengths.cpu())
    except (EngineError, MeasurementError) as error:
        reason, _, remedy = str(error).partition("; use ")  # of one who scores by gradients
        beside = f" with {remedy}" if remedy and job.spec.method != "kl_div" else ""
        raise type(error)(f"{reason}; use {_NEAREST}{beside}") from error
    job.progress("weigh tokens", len(batches), len(batches))


class _Inputs(ExitStack):
    """Adds up the products of inputs, module by module; a context manager, within which a layer runs on all batches.

    products: module -> how its input is rounded -> [in_features, in_features] float32.
    checked: module -> set -> what checks its codes, for every batch some inputs as the model has them, [tokens,
        in_features], and the lengths of these tokens' gradients, [tokens, 1].
    """

    def __init__(self, layers: Layers, groups: list[QuantGroup], job: Job, amax: Amax) -> None:
        super().__init__()
        self.products: dict[str, dict[str, torch.Tensor]] = {}
        self.checked: dict[str, dict[int, list[tuple[torch.Tensor, torch.Tensor]]]] = {}
        self.use = _Use(0, torch.empty(0), torch.empty(0))  # of the batch at hand
        self.lengths: dict[str, torch.Tensor] = {}  # of its tokens' gradients, by module
        for group in groups:
            for name in (module.name for module in group.modules):
                linear: Any = layers.model.get_submodule(name)
                layout = layers.anatomy.positions.get(name, PLAIN)
                device = linear.weight.device
                served = {_input_of(format_): _served(format_, name, amax, device) for format_ in _made_for(job, group)}
                self.callback(linear.register_forward_pre_hook(self._hook(name, served, layout)).remove)

    def _hook(
        self, module: str, served: dict[str, Callable[[torch.Tensor], torch.Tensor]], layout: Layout | None
    ) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
        def add(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            use, shape = self.use, self.use.made_from.shape
            x = inputs[0] if layout is None else tokens_first(inputs[0], layout, shape)
            if layout is None or x.shape[:2] != shape:
                raise EngineError(
                    f"{module}: its input has shape {list(x.shape)}, [rows, tokens, features] was expected; "
                    "use rounding: nearest"
                )
            lengths = self.lengths[module].to(x.device).view(*shape, *(1,) * (x.dim() - 2)).expand(*x.shape[:-1], 1)
            checked = self.checked.setdefault(module, {}).setdefault(use.part, [])
            checked.append((x[use.checked].flatten(0, -2), lengths[use.checked].flatten(0, -2)))
            tokens, theirs = x[use.made_from].flatten(0, -2).float(), lengths[use.made_from].flatten(0, -2)
            sums = self.products.setdefault(module, {})
            for how, seen in served.items() if len(tokens) else ():
                rows = _weighed(seen(tokens), theirs)
                if how not in sums:
                    sums[how] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
                with tf32_products():
                    sums[how].addmm_(rows.t(), rows)

        return add


def _weighed(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return inputs [tokens, in_features] so that the square of each has the length of input times gradient.

    Args:
        x: as they are multiplied.
        lengths: of the gradients, [tokens, 1].
    """
    own: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return x * ((lengths * own).sqrt() / own)  # lengths / own is no number where an input is zero


def _made_for(job: Job, group: QuantGroup) -> tuple[Format, ...]:
    """Return the formats in which a group's codes are made: not those that have another one's."""
    served = job.served(group)
    names = {format_.name for format_ in served}
    return tuple(format_ for format_ in served if format_.weight_like not in names)


def _input_of(format_: Format) -> str:
    """Return a name for what becomes of an input: the same where it is the same."""
    return "unrounded" if format_.arithmetic == WEIGHT_ONLY or format_.input == "unrounded" else format_.name


def _served(format_: Format, module: str, amax: Amax, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what rounds a module's input as the device that will serve does."""
    scale = None
    if format_.has_input_scale:
        scale = format_.input_scale(amax[f"{module}.input_amax"].to(device))
    return functools.partial(format_.served_input, scale=scale)


def _made(model: nn.Module, groups: list[QuantGroup], inputs: _Inputs, job: Job, amax: Amax) -> Iterator[_Made]:
    """Yield the codes of one layer's modules, which go to the CPU."""
    damping = damping_of(job.spec)
    for group in groups:
        for name in (module.name for module in group.modules):
            sums, checked = inputs.products.pop(name, None), inputs.checked.pop(name, {})
            if sums is None:
                raise EngineError(f"{name} doesn't run inside its layer; use {_NEAREST}")
            for format_ in _made_for(job, group):
                product = sums[_input_of(format_)]
                seen = _served(format_, name, amax, product.device)
                sets = [map(torch.cat, zip(*some, strict=True)) for some in checked.values()]
                checks = [_weighed(seen(x.float()), lengths) for x, lengths in sets]
                weight: torch.Tensor = model.get_parameter(f"{name}.weight")
                yield _of_module(name, weight, format_, product, checks, damping, amax)


def _of_module(
    name: str,
    weight: torch.Tensor,
    format_: Format,
    product: torch.Tensor,
    checks: Sequence[torch.Tensor],
    damping: float,
    amax: Amax,
) -> _Made:
    """Return the codes of a module in a format.

    Args:
        name: of the module.
        weight: its own, [out_features, in_features].
        format_: as the device that will serve computes it.
        product: Xᵀ X of its inputs, so weighed.
        checks: of each calibration set, inputs that aren't in the product, [tokens, in_features], weighed alike.
        damping: see `rounding`.
        amax: of all modules.
    """
    weight_amax = amax[format_.weight_key(name)].to(product.device)
    columns = format_.columns(weight_amax, len(weight))
    try:
        found = compensated(weight, product, columns, damping)
    except MeasurementError as error:
        raise MeasurementError(f"{name}: {error}") from error
    parts, plain = columns.parts(found.values, found.scales), format_.encode(weight, weight_amax)
    restored = [format_.served_weight(plain | some) for some in (parts, {})]
    errors = [output_errors(weight, restored, x) for x in checks]
    is_worse = not all(ours <= theirs for ours, theirs in errors)  # what is no number is worse
    if is_worse:
        found, parts = nearest(weight, columns), {part: plain[part] for part in parts}
    ours, theirs = (statistics.fmean(of_sets) for of_sets in zip(*errors, strict=True))
    return _Made(
        module=name,
        format=format_.name,
        parts={part: tensor.cpu().contiguous() for part, tensor in parts.items()},
        figures={
            "largest_shift": float(found.largest_shift(weight).amax()),
            "output_error": theirs if is_worse else ours,
            "nearest_output_error": theirs,
            "nearest_taken": is_worse,
        },
    )


def _write(path: Path, made: list[_Made]) -> None:
    """Write the codes of one layer's modules, and what they do."""
    tensors: dict[str, torch.Tensor] = {}
    modules = []
    for one in made:
        tensors |= {f"{codes_key(one.module, one.format)}.{part}": tensor for part, tensor in one.parts.items()}
        digests = {
            name: sha256_of_bytes(part.flatten().view(torch.uint8).numpy().data) for name, part in one.parts.items()
        }
        modules.append(
            RoundedModule(
                name=one.module,
                format=one.format,
                codes_sha256=digests.pop(WEIGHT),
                scales_sha256=digests,
                **one.figures,
            )
        )
    with atomic_path(path) as temporary:
        metadata = {"modules": json.dumps([module.model_dump(mode="json") for module in modules])}
        save_file(tensors, temporary, metadata=metadata)
    seal(path)
