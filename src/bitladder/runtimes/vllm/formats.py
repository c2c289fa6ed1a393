"""Which of our formats a layer of vLLM's runs in: told by dtype and scales, which every release has."""

from collections.abc import Sequence
from typing import Any

from bitladder.formats import FORMATS, Spread, get_format
from bitladder.models.weights import TORCH_NAMES
from bitladder.records import BF16, ProbedLayer, ProbeFinding
from bitladder.runtimes import files
from bitladder.runtimes.vllm.rules import VllmRules

# dtypes of weights that aren't quantised, as torch calls them
SIXTEEN_BIT = tuple(TORCH_NAMES[dtype] for dtype in files.SIXTEEN_BIT)
# of codes of which several are one number
PACKED = frozenset(TORCH_NAMES[one.code_dtype] for one in FORMATS.values() if one.codes_a_number > 1)


def plain_format(dtype: str | None) -> str | None:
    """Return the format of a weight's dtype (torch's name of it) by itself; None: scales tell which it is."""
    if dtype is None or dtype in SIXTEEN_BIT:
        return BF16
    return None if fitting(dtype) else dtype


def fitting(
    dtype: str,
    *,
    spread: Spread | None = None,
    dynamic_input: bool | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    zero_points: bool | None = None,
) -> list[str]:
    """Return the formats, of those that vLLM runs, that store weights so.

    Args:
        dtype: of the codes, as torch calls it.
        spread: what a weight scale is for; None: not known.
        dynamic_input: whether inputs have no scale, being scaled as they come or not at all; None: not known.
        bits: of a code; None: not known.
        group_size: how many neighbours of a row share a scale; None: not known.
        zero_points: whether their codes have zero points; None: not known.
    """
    formats = [get_format(name) for name in dict.fromkeys((*VllmRules.SUPPORT, *VllmRules.CARRIED))]
    return [
        one.name
        for one in formats
        if TORCH_NAMES[one.code_dtype] == dtype
        and spread in (None, one.spread)
        and dynamic_input in (None, not one.has_input_scale)
        and bits in (None, one.code_bits)
        and group_size in (None, one.group_size)
        and zero_points in (None, one.zero_points)
    ]


def packing_of(bits: int | None, group_size: int | None, symmetric: bool | None) -> dict[str, Any]:
    """Return what `fitting` is to know of packed integers as vLLM's scheme for a layer has them; empty: no integers."""
    return {} if bits is None else {"bits": bits, "group_size": group_size, "zero_points": symmetric is False}


def spread_of(shape: Sequence[int], dtype: str, rows: int) -> Spread:
    """Return what a weight scale of this shape and dtype (torch's name of it) is for.

    Of square blocks it has four dimensions in ModelOpt's files, in compressed-tensors' two, as scales of rows [rows, 1]
    and of blocks of a row have; those of blocks of a row aren't float32.
    """
    if len(shape) == 2 and dtype == "float32":
        return "row" if tuple(shape) == (rows, 1) else "square"
    if len(shape) == 4:
        return "square"
    if len(shape) >= 2:
        return "block"
    return "row" if tuple(shape) not in ((), (1,)) else "tensor"


def wrong_format(layer: ProbedLayer, says: str) -> ProbeFinding:
    """Return the finding of a layer that runs in another format than it should; `says`: who names which format."""
    return ProbeFinding(
        error_class="wrong_format",
        where=layer.name,
        problem=f"{says}, vLLM runs {layer.format} ({layer.method} of {layer.runtime_name})",
        remedy="name it in exclude_modules (`ignore` in config.json) exactly if it is stored in 16 bits, and in "
        "quantized_layers, where there is one, if it isn't",
    )
