"""How each format lies in a file of each carrier, and what its configuration says of it.

Nothing is taken from the exporter: what it writes is written out here a second time.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

E4M3: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
_E2M1: dict[str, Any] = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
E2M1_MAX = 6.0
BLOCK = 16  # elements of a row that share a scale
EXPONENT_BLOCK = 32  # elements of a row that share an exponent
SQUARE = 128  # rows and columns that share a scale
# What a weight's scales are for: all of it, a row, a square of rows and columns, a block of a row of
# packed codes, a block of a row, as an exponent, or a group of packed integers.
Spread = Literal["tensor", "row", "square", "fp4", "exponent", "group"]


# Whose scales are made of the source's own numbers when they are written; the others come from the measurement, which
# has cast them to its arithmetic.
WRITTEN = ("fp4", "exponent", "group")

# Of which ModelOpt has no files: bits of a code, how many share a scale (None: a row), and whether they are symmetric.
INTEGERS = {
    "int8": (8, None, True),
    "int8_w8a16": (8, 128, True),
    "int8_w8a16_g64": (8, 64, True),
    "int4_w4a16": (4, 128, True),
    "int4_w4a16_g64": (4, 64, True),
    "int4_w4a16_asym": (4, 128, False),
    "int4_w4a16_asym_g64": (4, 64, False),
}
_WORD = 32  # bits of a number of packed integers


@dataclass(frozen=True)
class Layout:
    """What a file holds of a format: its `quant_algo`, what a weight's scale is for, whether an input has one."""

    algorithm: str
    weights: dict[str, Any] | None  # in `config_groups`; None: the algorithm is all that is said there
    inputs: dict[str, Any] | None  # there, too; None: nothing is said of them
    input_scale: bool
    spread: Spread = "tensor"
    bits: int | None = None  # of integers; None: they aren't
    sharing: int | None = None  # of packed integers: how many neighbours of a row share a BF16 scale
    symmetric: bool = True  # False: groups have zero points
    grouped_alone: bool = True  # whether `config_groups` are written where a checkpoint has this format only

    @property
    def entry(self) -> dict[str, Any]:
        """What is said of a module in `quantized_layers`."""
        size = {"fp4": BLOCK, "exponent": EXPONENT_BLOCK}.get(self.spread)
        return {"quant_algo": self.algorithm, **({"group_size": size} if size else {})}

    @property
    def group(self) -> dict[str, Any]:
        """What is said in `config_groups`."""
        if self.weights is None:
            return {"quant_algo": self.algorithm}
        return {"weights": self.weights, **({} if self.inputs is None else {"input_activations": self.inputs})}

    @property
    def largest(self) -> float:
        """What the largest value of a weight or an input is stored as."""
        return E4M3_MAX * E2M1_MAX if self.spread == "fp4" else E4M3_MAX

    def scales(self, shape: tuple[int, ...]) -> "dict[str, tuple[tuple[int, ...], torch.dtype]]":
        """Return `{part: (shape, dtype)}` of the scales of a weight."""
        number: tuple[tuple[int, ...], torch.dtype] = (), torch.float32
        found = {"weight_scale": number}
        if self.sharing is not None:
            groups = (shape[0], shape[1] // self.sharing)
            found = {"weight_scale": (groups, torch.bfloat16), "weight_shape": ((2,), torch.int64)}
            if not self.symmetric and self.bits is not None:
                found["weight_zero_point"] = ((shape[0] * self.bits // _WORD, groups[1]), torch.int32)
            return found
        if self.spread == "row":
            found = {"weight_scale": ((shape[0],), torch.float32)}
        elif self.spread == "square":
            found = {"weight_scale": ((shape[0] // SQUARE, 1, shape[1] // SQUARE, 1), torch.float32)}
        elif self.spread == "exponent":
            found = {"weight_scale": ((shape[0], shape[1] // EXPONENT_BLOCK), torch.uint8)}
        elif self.spread == "fp4":
            blocks = (shape[0], shape[1] // BLOCK)
            found = {"weight_scale": (blocks, torch.float8_e4m3fn), "weight_scale_2": number}
        return found | ({"input_scale": number} if self.input_scale else {})


# Source: modelopt 0.47.0, torch/export/convert_hf_config.py.
LAYOUTS = {
    "fp8": Layout("FP8", weights=E4M3, inputs=E4M3, input_scale=True),
    "fp8_pc_pt": Layout(
        "FP8_PER_CHANNEL_PER_TOKEN",
        weights={**E4M3, "strategy": "channel"},
        inputs=E4M3,
        input_scale=False,
        spread="row",
        grouped_alone=False,
    ),
    "fp8_block": Layout(
        "fp8_pb_wo", weights=None, inputs=None, input_scale=False, spread="square", grouped_alone=False
    ),
    "mxfp8": Layout(
        "MXFP8",
        weights={**E4M3, "group_size": EXPONENT_BLOCK},
        inputs={**E4M3, "group_size": EXPONENT_BLOCK},
        input_scale=False,
        spread="exponent",
        grouped_alone=False,
    ),
    "nvfp4": Layout("NVFP4", weights=_E2M1, inputs=_E2M1, input_scale=True, spread="fp4"),
    "nvfp4_w4a16": Layout("W4A16_NVFP4", weights=_E2M1, inputs=None, input_scale=False, spread="fp4"),
    **{
        name: Layout(
            "",
            weights={},
            inputs=None,
            input_scale=False,
            spread="row" if group is None else "group",
            bits=bits,
            sharing=group,
            symmetric=symmetric,
        )
        for name, (bits, group, symmetric) in INTEGERS.items()
    },
}


@dataclass(frozen=True)
class Carrier:
    """How a kind of checkpoint spells what a layout has."""

    codes: str  # of weights in blocks
    above: str  # the scale over the blocks' scales
    input_above: str  # the input's, where a weight is in blocks
    inverted: bool  # whether those two are 1 / scale
    with_axis: bool  # whether one number is [1], one a row [rows, 1], one a square [rows, columns]

    def stored(self, part: str, shape: tuple[int, ...], in_blocks: bool) -> tuple[str, tuple[int, ...], bool]:
        """Return a scale's name, shape, and whether it is inverted."""
        name = self.above if part == "weight_scale_2" else part
        name = self.input_above if part == "input_scale" and in_blocks else name
        inverted = self.inverted and (part == "weight_scale_2" or (part == "input_scale" and in_blocks))
        if self.with_axis and part != "weight_shape":
            shape = shape[::2] if len(shape) == 4 else (*shape, 1) if len(shape) < 2 else shape
        return name, shape, inverted


# Source: compressed_tensors 0.20.0, compressors/nvfp4/base.py and quantization/lifecycle/initialize.py; vllm 0.32.0,
# compressed_tensors/schemes/compressed_tensors_w4a4_nvfp4.py ("stores as divisors").
CARRIERS = {
    "modelopt": Carrier("weight", "weight_scale_2", "input_scale", inverted=False, with_axis=False),
    "compressed-tensors": Carrier(
        "weight_packed", "weight_global_scale", "input_global_scale", inverted=True, with_axis=True
    ),
}


def _numbers(bits: int, strategy: str, dynamic: bool | str = False) -> dict[str, Any]:
    """Return what compressed-tensors' configuration says of floating-point numbers."""
    group = {"group_size": BLOCK, "scale_dtype": "torch.float8_e4m3fn"} if strategy == "tensor_group" else {}
    return {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": dynamic, **group}


_EXPONENTS = {"group_size": EXPONENT_BLOCK, "scale_dtype": "torch.uint8"}
# Source: compressed_tensors 0.20.0, quantization/quant_scheme.py (FP8, FP8_DYNAMIC, FP8_BLOCK, MXFP8, NVFP4, NVFP4A16).
GROUPS: dict[str, dict[str, Any]] = {
    "fp8": {
        "format": "float-quantized",
        "weights": _numbers(8, "tensor"),
        "input_activations": _numbers(8, "tensor"),
    },
    "fp8_pc_pt": {
        "format": "float-quantized",
        "weights": _numbers(8, "channel"),
        "input_activations": _numbers(8, "token", dynamic=True),
    },
    "fp8_block": {
        "format": "float-quantized",
        "weights": {**_numbers(8, "block"), "block_structure": [SQUARE, SQUARE]},
        "input_activations": {**_numbers(8, "group", dynamic=True), "group_size": SQUARE},
    },
    "mxfp8": {
        "format": "mxfp8-quantized",
        "weights": {**_numbers(8, "group"), **_EXPONENTS},
        "input_activations": {**_numbers(8, "group", dynamic=True), **_EXPONENTS},
    },
    "nvfp4": {
        "format": "nvfp4-pack-quantized",
        "weights": _numbers(4, "tensor_group"),
        "input_activations": _numbers(4, "tensor_group", dynamic="local"),
    },
    "nvfp4_w4a16": {"format": "nvfp4-pack-quantized", "weights": _numbers(4, "tensor_group")},
    "int8": {
        "format": "int-quantized",
        "weights": {**_numbers(8, "channel"), "type": "int"},
        "input_activations": {**_numbers(8, "token", dynamic=True), "type": "int"},
    },
    **{
        name: {
            "format": "pack-quantized",
            "weights": {**_numbers(bits, "group"), "type": "int", "group_size": group, "symmetric": symmetric},
        }
        for name, (bits, group, symmetric) in INTEGERS.items()
        if group is not None
    },
}
