"""For `child_load.py`: which checkpoint tensor was copied into which elements of which parameter. Loaded by its path.

Seen below torch's dispatcher while vLLM loads weights. Elements that no copy reached and that still hold the poison
that parameters were filled with, or vLLM's initial value, were never loaded. Standard library and torch only.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
FP8_NAN = 0x7F  # OCP OFP8: E4M3 (fn) has one NaN, S.1111.111
FP8_MAGNITUDE = 0x7F  # all but the sign
PACKED = (torch.uint8, torch.int8, torch.int32)  # dtypes of weights with several codes a number
PACKED_POISON = 0x5A  # no number of codes is NaN: what still holds this everywhere where no copy came was never filled
MAX_VALUES = 1024  # a parameter with "scale" in its name and no more elements than this is written down in full

Facts = dict[str, Any]


def dtype_name(dtype: torch.dtype) -> str:
    """Return e.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def address(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor's data and the byte after the last, as its strides reach."""
    if not tensor.numel():
        return (0, 0)
    begin = tensor.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (reach + 1) * tensor.element_size()


class Parameters:
    """The model's parameters and buffers by the place of their data, with the copies that each received."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.facts: dict[str, Facts] = {}
        self._places: list[tuple[int, int, str, int]] = []
        for name, tensor in self._tensors(model):
            self.facts[name] = {
                "dtype": dtype_name(tensor.dtype),
                "shape": list(tensor.shape),
                "copies": [],
            }
            begin, end = address(tensor)
            if end > begin:
                self._places.append((begin, end, name, tensor.element_size()))
        self._places.sort()

    @staticmethod
    def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        yield from model.named_parameters()
        yield from model.named_buffers()

    def record(self, tensor: str, target: torch.Tensor) -> str | None:
        """Note that `tensor` was copied into `target`; return the parameter that it is part of, if any."""
        begin, end = address(target)
        for first, last, name, size in self._places:
            if first <= begin and end <= last and end > begin:
                copy = {"tensor": tensor, "begin": (begin - first) // size, "end": (end - first) // size}
                self.facts[name]["copies"].append(copy)
                return name
        return None


class Watch(TorchDispatchMode):
    """Sees every copy and cast while weights are loaded, and which tensor of the checkpoint they belong to."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parameters = parameters
        self.tensors: dict[str, Facts] = {}
        self.casts: list[Facts] = []
        self.used: set[str] = set()
        self._current = ""
        self._places: dict[str, tuple[int, int]] = {}

    def follow(self, weights: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the loader's tensors, and remember where each lies."""
        for name, tensor in weights:
            self._current = name
            self._places[name] = address(tensor)
            self.tensors[name] = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
            yield name, tensor

    def _name_of(self, source: torch.Tensor) -> str:
        """Return the checkpoint tensor that `source` is a view of; a copy of one belongs to the latest."""
        begin, end = address(source)
        candidates = [self._current, *self._places]
        inside = (
            n for n in candidates if n in self._places and self._places[n][0] <= begin and end <= self._places[n][1]
        )
        return next(inside, self._current)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; note it if it copies or casts."""
        before = args[0].dtype if function is torch.ops.aten._to_copy.default else None
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.copy_.default:
            self._note_copy(args[0], args[1])
        elif before is not None:
            self._note_cast(self._name_of(args[0]), None, before, result.dtype)
        return result

    def _note_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        name = self._name_of(source)
        parameter = self.parameters.record(name, target)
        if parameter is not None:
            self.used.add(name)
        self._note_cast(name, parameter, source.dtype, target.dtype)

    def _note_cast(self, name: str, parameter: str | None, before: torch.dtype, after: torch.dtype) -> None:
        if before != after and (before in FLOAT8 or after in FLOAT8):
            self.casts.append(
                {"tensor": name, "parameter": parameter, "before": dtype_name(before), "after": dtype_name(after)}
            )


def is_scale(name: str) -> bool:
    """Return whether a parameter holds scales; those keep vLLM's own initial value, which its code looks at."""
    return "scale" in name.rpartition(".")[2]


def poison(model: torch.nn.Module) -> None:
    """Fill every parameter but scales with NaN, or packed codes with a pattern, so that what isn't loaded shows."""
    for name, parameter in model.named_parameters():
        if is_scale(name) or parameter.is_meta:
            continue
        if parameter.dtype in FLOAT8:
            parameter.data.view(torch.uint8).fill_(FP8_NAN)
        elif parameter.is_floating_point():
            parameter.data.fill_(float("nan"))
        elif is_packed(name, parameter):
            parameter.data.fill_(PACKED_POISON)


def is_packed(name: str, tensor: torch.Tensor) -> bool:
    """Return whether a parameter holds a weight's packed codes."""
    return tensor.dtype in PACKED and name.rpartition(".")[2].startswith("weight")


def is_nan(tensor: torch.Tensor) -> torch.Tensor:
    """Return where a tensor is NaN; E4M3 has no such operation on every device, its codes are compared."""
    if tensor.dtype == torch.float8_e4m3fn:
        return (tensor.view(torch.uint8) & FP8_MAGNITUDE) == FP8_NAN
    return torch.isnan(tensor.float() if tensor.dtype in FLOAT8 else tensor)


def is_poison(part: torch.Tensor) -> bool:
    """Return whether a part of a parameter is all as `poison` left it."""
    return bool((is_nan(part) if part.is_floating_point() else part == PACKED_POISON).all())


def gaps(copies: list[Facts], elements: int) -> list[tuple[int, int]]:
    """Return the ranges of elements that no copy reached."""
    found, position = [], 0
    for copy in sorted(copies, key=lambda copy: copy["begin"]):
        if copy["begin"] > position:
            found.append((position, copy["begin"]))
        position = max(position, copy["end"])
    return found + ([(position, elements)] if position < elements else [])


def unloaded(name: str, tensor: torch.Tensor, copies: list[Facts]) -> list[tuple[int, int]]:
    """Return the ranges that no copy reached and that nothing else filled: they hold the poison, or are scales."""
    flat = tensor.detach().reshape(-1)
    return [(begin, end) for begin, end in gaps(copies, tensor.numel()) if is_scale(name) or is_poison(flat[begin:end])]


def odd_scales(values: torch.Tensor, copies: list[Facts]) -> list[tuple[int, str]]:
    """Return (place, value) of the first number in each copy that isn't finite and positive, as no scale is."""
    found = []
    for copy in copies:
        part = values[copy["begin"] : copy["end"]]
        places = (~(torch.isfinite(part) & (part > 0))).nonzero()
        if len(places):
            place = int(places[0])
            found.append((copy["begin"] + place, repr(float(part[place]))))
    return found


def inspect_parameters(model: torch.nn.Module, parameters: Parameters) -> None:
    """Add to each parameter's facts what was never loaded, its scales, and how many of its values aren't finite."""
    for name, tensor in model.named_parameters():
        facts = parameters.facts.get(name)
        if (
            facts is None
            or tensor.is_meta
            or not (tensor.is_floating_point() or is_packed(name, tensor) or is_scale(name))
        ):
            continue
        facts["unloaded"] = unloaded(name, tensor, facts["copies"])
        if not tensor.is_floating_point():
            continue  # every number is one of codes, or an exponent
        flat = tensor.detach().reshape(-1)
        if is_scale(name) and tensor.numel() <= MAX_VALUES:
            facts["values"] = [repr(value) for value in flat.float().tolist()]  # JSON has no NaN
        elif is_scale(name) and tensor.dtype not in FLOAT8:
            facts["odd"] = odd_scales(flat.float(), facts["copies"])
        elif tensor.dtype in FLOAT8 or not math.isfinite(flat.sum(dtype=torch.float32)):  # one pass where all is well
            missing = sum(end - begin for begin, end in facts["unloaded"])
            facts["nan"] = int(is_nan(flat).sum()) - missing
            facts["inf"] = 0 if tensor.dtype in FLOAT8 else int(torch.isinf(flat).sum())
