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
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bitladder.errors import EngineError
from bitladder.formats import WEIGHT, WEIGHT_SCALE, Format, grids
from bitladder.measured import Amax, Codes, encoded
from bitladder.measuring.scores import token_directions, token_scores
from bitladder.models.anatomy import PLAIN, Layout, tokens_first
from bitladder.records import QuantGroup

_FP8_CAPABILITY = (8, 9)  # of the first NVIDIA GPUs that multiply FP8 numbers
_PARTS = 4  # of a form that its product is made of: input, weight, the scale of either
_FP8_MULTIPLE = 16  # torch._scaled_mm takes matrices whose sides are multiples of this


@dataclass(frozen=True, eq=False)
class Form:
    """What a linear module is in a format.

    weight: [out_features, in_features], codes where the device multiplies them, else values rounded through the format.
    weight_scale: float32 scalar of the codes; None: of values.
    input_amax, input_scale: float32 scalars; modules of a group that share an amax share its tensors. None: the scale
        is made of the input itself.
    """

    format: Format
    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    input_amax: torch.Tensor | None
    input_scale: torch.Tensor | None

    def input_of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the module's input x [..., in_features] as it is multiplied: codes [rows, in_features], or like x."""
        if self.weight.dtype == grids.E4M3_DTYPE:
            assert self.input_amax is not None
            return grids.quantise(x.reshape(-1, x.shape[-1]), self.input_amax)
        return self.format.served_input(x, self.input_scale)

    def output_of(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the module's output [..., out_features] from its input [..., in_features]."""
        product = _product(self.input_of(x), self.weight, self.input_scale, self.weight_scale, bias, x.dtype)
        return product.view(*x.shape[:-1], len(self.weight))


def _product(
    seen: torch.Tensor,
    weight: torch.Tensor,
    input_scale: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return a module's output in its format from what `Form.input_of` gave: [rows or ..., out_features]."""
    if weight.dtype != grids.E4M3_DTYPE:
        return functional.linear(seen, weight, bias)
    assert input_scale is not None
    assert weight_scale is not None
    return torch._scaled_mm(seen, weight.t(), scale_a=input_scale, scale_b=weight_scale, bias=bias, out_dtype=dtype)


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
        multiplied = _multiplies(format_, weight)
        stored = parts[WEIGHT] if multiplied else format_.served_weight(parts, weight.dtype)
        weight_scale = parts[WEIGHT_SCALE] if multiplied else None
        if not format_.has_input_scale:
            found[module.name] = Form(format_, stored, weight_scale, None, None)
            continue
        input_amax = amax[f"{module.name}.input_amax"]
        known = float(input_amax)  # from the CPU: reading it back from a GPU would wait for it
        if known not in inputs:
            moved = input_amax.to(weight.device, non_blocking=True)
            inputs[known] = moved, format_.input_scale(moved)
        found[module.name] = Form(format_, stored, weight_scale, *inputs[known])
    return found


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
        # By format and type of weight: the amax of the form that saw the input, and what that made of it.
        self._made: dict[tuple[str, torch.dtype], tuple[torch.Tensor | None, torch.Tensor]] = {}

    def of(self, form: Form, x: torch.Tensor) -> torch.Tensor:
        """Return `form.input_of(x)`."""
        if self._input is None or self._input() is not x:
            self._input = weakref.ref(x)
            self._made.clear()
        key = form.format.name, form.weight.dtype
        known = self._made.get(key)
        if known is None or known[0] is not form.input_amax:
            self._made[key] = known = form.input_amax, form.input_of(x)
        return known[1]


class Tapped(nn.Linear):
    """A linear module whose backward pass also gives what every token adds to the module's score in each of its forms.

    It arrives as the gradient of the `sink` that the module was given before it ran: [forms, rows, tokens], in float64;
    what several runs in one pass add is summed. `layout` says which dimensions of its output rows and tokens are;
    `copied`, that the layer changes the output in place.
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
        parts: list[torch.Tensor | None] = []
        with torch.no_grad():
            for form in self.forms:
                # Where torch compiles, it finds equal inputs itself.
                seen = form.input_of(x) if torch.compiler.is_compiling() else self.last_input.of(form, x)
                parts += [seen, form.weight, form.input_scale, form.weight_scale]
        tapped: torch.Tensor = _Tap.apply(  # type: ignore[no-untyped-call]
            output, sink, self.bias, self.directional, self.layout, self.copied, *parts
        )
        return tapped


class _Tap(torch.autograd.Function):
    """Lets a module's output through; the gradient of `sink` is what every token adds to the score."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        sink: torch.Tensor,
        bias: torch.Tensor | None,
        directional: bool,
        layout: Layout,
        copied: bool,
        *parts: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(output, bias, *parts)
        ctx.directional, ctx.layout, ctx.shape = directional, layout, sink.shape[1:]
        return output.clone() if copied else output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        output, bias, *parts = ctx.saved_tensors
        by_token = token_directions if ctx.directional else token_scores
        found = []
        for seen, weight, input_scale, weight_scale in zip(*[iter(parts)] * _PARTS, strict=True):
            quantised = _product(seen, weight, input_scale, weight_scale, bias, output.dtype).view_as(output)
            scores = tokens_first(by_token(gradient, quantised - output), ctx.layout, ctx.shape)
            found.append(scores.flatten(len(ctx.shape)).sum(-1) if scores.dim() > len(ctx.shape) else scores)
        return gradient, torch.stack(found), *(None,) * (4 + len(parts))


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
