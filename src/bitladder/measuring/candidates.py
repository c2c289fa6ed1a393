"""A searched module in a format: in the original's place, or beside it (`Tapped`), where its error meets the gradient.

A module takes on a class derived from its own while it is needed, with its quantised form as an attribute; ModelOpt's
dynamic modules work alike. So a layer's code is the same in every layer, and torch can compile it once for all of them.
"""

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from bitladder.errors import EngineError
from bitladder.formats import WEIGHT, WEIGHT_SCALE, Format, grids
from bitladder.measured import Amax, Codes, encoded
from bitladder.measuring.scores import token_directions, token_lengths, token_scores
from bitladder.models.anatomy import PLAIN, Layout, tokens_first
from bitladder.records import QuantGroup

_FP8_CAPABILITY = (8, 9)  # of the first NVIDIA GPUs that multiply FP8 numbers
_FP8_MULTIPLE = 16  # torch._scaled_mm takes matrices whose sides are multiples of this
Kept = Literal["multiplied", "stored", "values"]
MULTIPLIED: Kept = "multiplied"
STORED: Kept = "stored"
VALUES: Kept = "values"


@dataclass(frozen=True, eq=False)
class Form:
    """What a linear module is in a format.

    kept: how its weight is: `multiplied`, codes that the device multiplies as they are; `stored`, as files have it,
        restored whenever it is multiplied; `values`, rounded through the format.
    parts: of the weight, `{part: tensor}`: codes and scales, or values [out_features, in_features] alone.
    input_amax, input_scale: float32 scalars; modules of a group that share an amax share its tensors. None: the scale
        is made of the input itself.
    """

    format: Format
    kept: Kept
    parts: dict[str, torch.Tensor]
    input_amax: torch.Tensor | None
    input_scale: torch.Tensor | None

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [out_features, in_features] as it is multiplied: codes, or values of this dtype."""
        return self.format.served_weight(self.parts, dtype) if self.kept == STORED else self.parts[WEIGHT]

    def input_of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the module's input x [..., in_features] as it is multiplied: codes [rows, in_features], or like x."""
        if self.kept == MULTIPLIED:
            assert self.input_amax is not None
            return grids.quantise(x.reshape(-1, x.shape[-1]), self.input_amax)
        return self.format.served_input(x, self.input_scale)

    def product(
        self, seen: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the module's output [rows or ..., out_features] from what `input_of` and `weight` gave."""
        if self.kept != MULTIPLIED:
            return functional.linear(seen, weight, bias)
        scale, weight_scale = self.input_scale, self.parts[WEIGHT_SCALE]
        assert scale is not None
        return torch._scaled_mm(seen, weight.t(), scale_a=scale, scale_b=weight_scale, bias=bias, out_dtype=dtype)

    def output_of(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the module's output [..., out_features] from its input [..., in_features]."""
        product = self.product(self.input_of(x), self.weight(x.dtype), bias, x.dtype)
        return product.view(*x.shape[:-1], product.shape[-1])


def forms_in(
    model: nn.Module, group: QuantGroup, formats: Sequence[Format], amax: Amax, codes: Codes | None
) -> dict[str, dict[str, Form]]:
    """Return what a group's modules are in each of these formats: `{format: {module: form}}`.

    A format that stores the same weights as another shares them.
    """
    found: dict[str, dict[str, Form]] = {}
    for format_ in formats:
        name = format_.name
        alike = found.get(format_.weight_like or "")
        if alike is None or format_.has_input_scale:
            found[name] = forms_of(model, group, format_, amax, codes)
        else:
            found[name] = {
                module: dataclasses.replace(form, format=format_, input_amax=None, input_scale=None)
                for module, form in alike.items()
            }
    return found


def forms_of(model: nn.Module, group: QuantGroup, format_: Format, amax: Amax, codes: Codes | None) -> dict[str, Form]:
    """Return what a group's modules are in a format, by name; their weights must be at hand."""
    inputs: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}
    found = {}
    for module in group.modules:
        weight: Any = model.get_parameter(f"{module.name}.weight")
        weight_amax = amax[format_.weight_key(module.name)].to(weight.device, non_blocking=True)
        parts = encoded(module.name, weight, weight_amax, format_, codes)
        kept = _kept(format_, weight)
        if kept == VALUES:
            parts = {WEIGHT: format_.served_weight(parts, weight.dtype)}
        if not format_.has_input_scale:
            found[module.name] = Form(format_, kept, parts, None, None)
            continue
        input_amax = amax[f"{module.name}.input_amax"]
        known = float(input_amax)  # from the CPU: reading it back from a GPU would wait for it
        if known not in inputs:
            moved = input_amax.to(weight.device, non_blocking=True)
            inputs[known] = moved, format_.input_scale(moved)
        found[module.name] = Form(format_, kept, parts, *inputs[known])
    return found


def _kept(format_: Format, weight: torch.Tensor) -> Kept:
    """Return how a weight is kept in a format.

    A GPU restores codes in a small part of the time of a product; on a CPU values spare it.
    """
    if _multiplies(format_, weight):
        return MULTIPLIED
    return STORED if weight.is_cuda else VALUES


def _multiplies(format_: Format, weight: torch.Tensor) -> bool:
    """Return whether the device multiplies codes as they are: with one scale for each side, that it takes at once."""
    return (
        weight.is_cuda
        and format_.multiplies_codes
        and weight.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(weight.device) >= _FP8_CAPABILITY
        and all(size % _FP8_MULTIPLE == 0 for size in weight.shape)
    )


class InForm(nn.Linear):
    """A linear module that gives what it would in a format."""

    form: Form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., out_features] from [..., in_features]."""
        return self.form.output_of(x, self.bias)


class LastInput:
    """The input seen last, and what it is in every format: modules that are fused by the runtime share both."""

    def __init__(self) -> None:
        self._input: weakref.ref[torch.Tensor] | None = None
        # By format and how the weight is kept: the amax of the form that saw the input, and what that made of it.
        self._made: dict[tuple[str, Kept], tuple[torch.Tensor | None, torch.Tensor]] = {}

    def of(self, form: Form, x: torch.Tensor) -> torch.Tensor:
        """Return `form.input_of(x)`."""
        if self._input is None or self._input() is not x:
            self._input = weakref.ref(x)
            self._made.clear()
        key = form.format.name, form.kept
        known = self._made.get(key)
        if known is None or known[0] is not form.input_amax:
            self._made[key] = known = form.input_amax, form.input_of(x)
        return known[1]


class Tapped(nn.Linear):
    """A linear module whose backward pass also gives what every token adds to the module's score in each of its forms.

    It arrives as the gradient of the `sink` that the module was given before it ran: [forms, rows, tokens], in float64;
    what several runs in one pass add is summed. Without forms it is [1, rows, tokens], every token's squared length of
    the gradient by the output. `layout` says which dimensions of its output rows and tokens are; `copied`, that the
    layer changes the output in place.
    """

    name: str  # read for an error alone: torch would compile a layer for every name
    forms: tuple[Form, ...]
    directional: bool
    last_input: LastInput
    sink: torch.Tensor | None = None
    layout: Layout = PLAIN
    copied: bool = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [rows, tokens, out_features] from [rows, tokens, in_features]."""
        output = super().forward(x)
        if not output.requires_grad:
            return output
        sink = self.sink
        if sink is None:
            raise EngineError(f"{self.name} runs outside its own layer; use engine: modelopt")
        with torch.no_grad():
            codes = [self.seen(form, x) for form in self.forms if form.kept == MULTIPLIED]
        kept = x if len(codes) < len(self.forms) else None
        tapped: torch.Tensor = _Tap.apply(output, sink, self, self.bias, kept, *codes)  # type: ignore[no-untyped-call]
        return tapped

    def seen(self, form: Form, x: torch.Tensor) -> torch.Tensor:
        """Return `form.input_of(x)`; where torch compiles, it finds equal inputs itself."""
        return form.input_of(x) if torch.compiler.is_compiling() else self.last_input.of(form, x)


class _Tap(torch.autograd.Function):
    """Lets a module's output through; the gradient of `sink` is what every token adds to the score.

    Of the input codes are kept, which are half as large, for forms that multiply them, and for all others the input
    itself, which they round in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        sink: torch.Tensor,
        tapped: Tapped,
        bias: torch.Tensor | None,
        x: torch.Tensor | None,
        *codes: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(output, bias, x, *codes)
        ctx.tapped, ctx.shape = tapped, sink.shape[1:]
        return output.clone() if tapped.copied else output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        output, bias, x, *codes = ctx.saved_tensors
        tapped, dtype = ctx.tapped, output.dtype
        by_token = token_directions if tapped.directional else token_scores
        found, multiplied = [], iter(codes)
        before = weight = None  # of the form before, which may have the same codes
        for form in tapped.forms:
            seen = next(multiplied) if form.kept == MULTIPLIED else tapped.seen(form, x)
            if weight is None or form.parts[WEIGHT] is not before:
                before, weight = form.parts[WEIGHT], form.weight(dtype)
            quantised = form.product(seen, weight, bias, dtype).view_as(output)
            found.append(by_token(gradient, quantised - output))
        by_position = [tokens_first(each, tapped.layout, ctx.shape) for each in found or [token_lengths(gradient)]]
        scores = [each.flatten(len(ctx.shape)).sum(-1) if each.dim() > len(ctx.shape) else each for each in by_position]
        return gradient, torch.stack(scores), *(None,) * (3 + len(codes))


@contextlib.contextmanager
def taken(linear: Any, kind: type[nn.Linear], **attributes: Any) -> Iterator[None]:
    """Let a linear module be of a class derived from its own and `kind`, with these attributes, for a while."""
    plain = type(linear)
    linear.__class__ = _derived(kind, plain)  # type: ignore[arg-type]
    for name, value in attributes.items():
        setattr(linear, name, value)
    try:
        yield
    finally:
        linear.__class__ = plain
        for name in attributes:
            delattr(linear, name)


@functools.cache
def _derived(kind: Any, plain: Any) -> Any:
    return type(f"{kind.__name__}{plain.__name__}", (kind, plain), {})
