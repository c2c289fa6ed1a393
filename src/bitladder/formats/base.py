"""What a number format has to say: how a weight and an input of it are stored, scaled, restored and rounded."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

if TYPE_CHECKING:
    import torch

    from bitladder.formats.carriers import Layout
    from bitladder.formats.columns import Columns

# Parts of a module, as ModelOpt's files name them.
WEIGHT, WEIGHT_SCALE, WEIGHT_SCALE_2, INPUT_SCALE = "weight", "weight_scale", "weight_scale_2", "input_scale"
WEIGHT_ZERO_POINT = "weight_zero_point"  # as compressed-tensors' files name it; ModelOpt's have none
# What files of any format may have beside a weight's codes; ours know all but `weight_scale_inv`.
SCALE_NAMES = (WEIGHT_SCALE, WEIGHT_SCALE_2, "weight_scale_inv", INPUT_SCALE)
KV_SCALE_NAMES = ("k_scale", "v_scale")  # of an attention that caches keys and values
# In `quantization_config`: numbers of layers whose cache stays in 16 bits, as vLLM's argument of this name takes them.
KV_SKIPS = "kv_cache_dtype_skip_layers"
SCALE_DTYPE = "F32"  # as safetensors spells it
Spread = Literal["tensor", "row", "block", "square"]
# How a device multiplies what is stored: as the file says; weights restored, inputs in 16 bits; or with every scale of
# a block, stored ones too, rounded up to a power of two and the codes made anew.
Arithmetic = Literal["as stored", "weight-only", "powers of two"]
AS_STORED: Arithmetic = "as stored"
WEIGHT_ONLY: Arithmetic = "weight-only"
POWERS_OF_TWO: Arithmetic = "powers of two"
_DTYPE_BITS = {"I64": 64, "F32": 32, "I32": 32, "BF16": 16, "I8": 8, "F8_E4M3": 8, "U8": 8}


@dataclass(frozen=True)
class Part:
    """One tensor that a quantised module has; dtype as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    counts: bool = False  # integers that say how large the weight is, which belong to no row of it
    packed: bool = False  # small integers, several of them a number: whatever its bits are, they are some

    @property
    def grows(self) -> bool:
        """Whether it does with the weight, as scales of rows do."""
        return bool(self.shape) and not self.counts

    @property
    def bits(self) -> int:
        """What it takes on disk."""
        return _DTYPE_BITS[self.dtype] * math.prod(self.shape)


class Format(ABC):
    """One format of a linear module's weight [out_features, in_features] and of its input.

    A weight's amax is what its scale is made of, in the shape that the format scales by: a scalar, [out_features], or
    one a square block, [out_features / square, in_features / square].
    Pure at import; torch inside methods.
    """

    name: ClassVar[str]
    title: ClassVar[str]  # what it is, in a few words that stand in parentheses
    modelopt_config: ClassVar[str]  # ModelOpt's configuration, an attribute of modelopt.torch.quantization
    modelopt_algorithm: ClassVar[str]  # `quant_algo` in hf_quant_config.json
    modelopt_on_cpu: ClassVar[bool] = True  # whether ModelOpt can compute with it there
    modelopt_searches: ClassVar[bool] = True  # whether its search knows the scales that a file will have
    modelopt_calibrates: ClassVar[bool] = True  # whether its calibration finds them; else `modelopt_grid` tells them
    grouped_alone: ClassVar[bool] = True  # whether ModelOpt 0.47 writes `config_groups` for a checkpoint of it alone
    code_dtype: ClassVar[str] = "F8_E4M3"  # of a stored weight, as safetensors spells it
    code_bits: ClassVar[int] = 8  # of an element, without scales
    codes_a_number: ClassVar[int] = 1  # how many neighbours of a row lie in one number of `code_dtype`
    zero_points: ClassVar[bool] = False  # whether the code that restores 0 is another one in every group
    rows: ClassVar[int] = 1  # of a weight that are stored together: only whole multiples of them can be made at a time
    group_size: ClassVar[int | None] = None  # neighbours of a row that share a scale of their own; None: no such groups
    square: ClassVar[int | None] = None  # so many rows and columns share a scale; None: no such blocks
    channels: ClassVar[bool] = False  # whether every row of a weight has a scale of its own
    amax_name: ClassVar[str] = "weight_amax"  # of a weight's amax, in the shape that the format scales by
    # What is done to an input: rounded with a stored scale, with one a token or a block of a token that is made when it
    # is seen, or nothing.
    input: ClassVar[Literal["static", "token", "block", "unrounded"]]
    weight_like: ClassVar[str | None] = None  # another format that stores the very same of a weight
    layouts: "ClassVar[Mapping[str, Layout]]"  # the carriers that hold it
    scalar_scales: ClassVar[bool] = False  # whether weight and input have one scale each, and codes in E4M3
    arithmetic: Arithmetic = AS_STORED  # how the device at hand does it: see `on`

    @property
    def spread(self) -> Spread:
        """What a weight's scale is for: all of it, a row, a block of a row, or a square block."""
        if self.square is not None:
            return "square"
        return "block" if self.group_size is not None else "row" if self.channels else "tensor"

    def on(self, arithmetic: Arithmetic) -> Self:
        """Return the format as devices of this arithmetic compute it: `restored` and `seen` are theirs."""
        if arithmetic == self.arithmetic:
            return self
        other = copy.copy(self)
        other.arithmetic = arithmetic
        return other

    @property
    def multiplies_codes(self) -> bool:
        """Whether the product is one of codes that torch._scaled_mm takes, with a scalar scale on either side."""
        return self.scalar_scales and self.arithmetic == AS_STORED

    @property
    def has_input_scale(self) -> bool:
        """Whether a file has a scale of the module's input, which calibration settles."""
        return self.input == "static"

    def modelopt_quantisation(self) -> dict[str, Any]:
        """Return the configuration with which ModelOpt computes in this format."""
        import modelopt.torch.quantization as mtq

        preset: dict[str, Any] = getattr(mtq, self.modelopt_config)
        changes = self.modelopt_changes()

        def changed(entry: dict[str, Any]) -> dict[str, Any]:
            settings = changes.get(entry["quantizer_name"])
            return entry if settings is None else {**entry, "cfg": settings, "enable": True}

        return {**preset, "quant_cfg": [changed(entry) for entry in preset["quant_cfg"]]}

    def modelopt_changes(self) -> dict[str, dict[str, Any]]:
        """Return what ModelOpt's preset says otherwise: `{name of a quantiser: its settings}`."""
        return {}

    def modelopt_grid(self, weight: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor | None]":
        """Return what lets ModelOpt's quantiser of this weight round to what files hold, where it can't find out.

        Returns:
            Its amax, float32 in the shape in which that quantiser has it, and what it subtracts before it rounds and
            adds again, of the same shape (None: nothing).
        """
        raise NotImplementedError(f"ModelOpt calibrates {self.name}")

    @abstractmethod
    def why_not(self, shape: Sequence[int]) -> str | None:
        """Return why no weight of this shape [out_features, in_features] can have the format; None: it can.

        The message goes on after the weight's name and shape.
        """

    def why_no_part(self, shape: Sequence[int]) -> str | None:
        """Return why no rank of a runtime can hold a part of this shape of a weight in the format; None: it can.

        Scales of rows, or of all of a weight, go with any part of it; blocks that are cut have none. Kernels that take
        multiples only are the runtime's care.
        """
        return self.why_not(shape) if self.spread in ("block", "square") else None

    @abstractmethod
    def stored(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """Return all that is stored of a weight [out_features, in_features], the codes first."""

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """Return what is stored beside the codes of a weight of this shape."""
        return self.stored(shape)[1:]

    @property
    def _least_shape(self) -> tuple[int, int]:
        """The shape of the smallest weight."""
        side = self.square or self.group_size or 1
        return side, side

    @property
    def scale_names(self) -> tuple[str, ...]:
        """The names of `parts`, which are alike for any shape."""
        return tuple(part.name for part in self.parts(self._least_shape))

    def weight_shape(self, stored: Sequence[int]) -> tuple[int, int]:
        """Return [out_features, in_features] of a weight whose codes are stored in this shape."""
        rows, columns = stored
        return rows, columns * self.codes_a_number

    def bits(self, shape: Sequence[int]) -> int:
        """Return the bits of a weight: its codes, and scales that grow with it (a tensor's numbers don't)."""
        return self.code_bits * math.prod(shape) + sum(part.bits for part in self.parts(shape) if part.grows)

    @property
    def least_bits(self) -> float:
        """The fewest bits that an element of a weight takes: scales of blocks count, those of rows become few."""
        if self.spread in ("tensor", "row"):
            return self.code_bits
        return self.bits(self._least_shape) / math.prod(self._least_shape)

    @property
    def tensor_scale_bytes(self) -> int:
        """Bytes of a module's scales that don't grow with its weight, which `bits` leaves out."""
        return sum(part.bits for part in self.parts(self._least_shape) if not part.grows) // 8

    def config_group(self) -> dict[str, Any]:
        """Return what `config_groups` say of weights and inputs, in ModelOpt's words.

        Source: modelopt.torch.export.convert_hf_config, _quant_algo_to_group_config.
        """
        numbers: dict[str, Any] = {"dynamic": False, "num_bits": self.code_bits, "type": "float"}
        if self.group_size is not None:
            numbers["group_size"] = self.group_size
        inputs = {} if self.input == "unrounded" else {"input_activations": numbers}
        return {**inputs, "weights": {**numbers, **({"strategy": "channel"} if self.channels else {})}}

    def uniform_config_group(self) -> dict[str, Any] | None:
        """Return the same for a checkpoint of this format alone; None: ModelOpt writes none."""
        return self.config_group() if self.grouped_alone else None

    def layer_config(self) -> dict[str, Any]:
        """Return what `quantized_layers` say of a module, or `quantization` of a checkpoint of this format alone.

        Source: modelopt.torch.export.quant_utils, process_layer_quant_config.
        """
        group = {} if self.group_size is None else {"group_size": self.group_size}
        return {"quant_algo": self.modelopt_algorithm, **group}

    def weight_key(self, module: str) -> str:
        """Return the name of a module's weight amax in this format among a measurement's tensors."""
        return f"{module}.{self.amax_name}"

    @property
    @abstractmethod
    def least_amax(self) -> float:
        """The least amax of a weight or an input of which a scale can be made."""

    def amax_of(self, weight: "torch.Tensor") -> "torch.Tensor":
        """Return the amax of a weight [out_features, in_features] that its scale is made of: of all of it, a scalar."""
        from bitladder.formats import grids

        return grids.amax_of(weight)

    @abstractmethod
    def tensor_scales(self, amax: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """Return the parts that a weight's amax settles without the weight: `{part: scale}`, float32."""

    def rows_of(self, amax: "torch.Tensor", first: int, count: int) -> "torch.Tensor":
        """Return the amax of some rows of a weight, from that of all of it; of square blocks a line a row."""
        if self.square is not None:
            import torch

            return amax[torch.arange(first, first + count, device=amax.device) // self.square]
        return amax[first : first + count] if self.channels else amax

    @abstractmethod
    def made(self, part: str, weight: "torch.Tensor", amax: "torch.Tensor") -> "torch.Tensor":
        """Return a part that the weight itself settles, of a weight or of some of its rows.

        Args:
            part: its name, one of those that `tensor_scales` doesn't give.
            weight: [rows, in_features], a multiple of `rows` of them.
            amax: what `rows_of` gives of these rows.
        """

    def encode(self, weight: "torch.Tensor", amax: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """Return all that is stored of a weight but its input's scale, `{part: tensor}`.

        Args:
            weight: [out_features, in_features].
            amax: as the format scales by it; what a fused group shares is the amax.
        """
        scales = self.tensor_scales(amax)
        names = [part.name for part in self.stored(tuple(weight.shape)) if part.name not in {*scales, INPUT_SCALE}]
        rows = self.rows_of(amax, 0, len(weight))
        return {name: self.made(name, weight, rows) for name in names} | scales

    @abstractmethod
    def columns(self, amax: "torch.Tensor", rows: int) -> "Columns":
        """Return the grid of a weight with so many rows, as compensated rounding walks it.

        Args:
            amax: as the format scales by it; of rows that are stacked, one after the other.
            rows: of the weight.
        """

    @abstractmethod
    def decode(self, parts: "Mapping[str, torch.Tensor]", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Return the weight [out_features, in_features] that stored parts restore.

        Multiplied in float32 and cast to `dtype` (None: float32).
        """

    def served_weight(self, parts: "Mapping[str, torch.Tensor]", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Return the weight that the device at hand makes of stored parts; as `decode`."""
        return self.decode(parts, dtype)

    def served_input(self, x: "torch.Tensor", scale: "torch.Tensor | None") -> "torch.Tensor":
        """Return an input as the device at hand multiplies it; as `round_input`."""
        return x if self.arithmetic == WEIGHT_ONLY else self.round_input(x, scale)

    def input_scale(self, amax: "torch.Tensor") -> "torch.Tensor":
        """Return the stored scale of an input, float32, from its amax, a scalar."""
        raise NotImplementedError(f"{self.name} stores no scale of an input")

    @abstractmethod
    def round_input(self, x: "torch.Tensor", scale: "torch.Tensor | None") -> "torch.Tensor":
        """Return an input [..., in_features] rounded through the format, in its own dtype.

        Args:
            x: the input.
            scale: the stored one; None where the format has none.
        """
