"""A weight's grid as it is walked column by column: what a column's nearest values are, and whose scale they share.

Compensated rounding changes the columns that are still to come, so it chooses a group's scale when it gets there. A
scale that the largest value settles isn't the best: with a smaller one most values lie nearer and few are cut off, with
a larger one of E2M1 numbers the largest value falls on 4 instead of 6, where neighbours are closer. Several candidates
are tried, each stored as the format stores it; which is best is for the walk to say.

What is added here is added to `column_kernels` too, which GPUs use. Imported where torch is needed only.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch

from bitladder.formats import grids, integers
from bitladder.formats.base import WEIGHT, WEIGHT_SCALE, WEIGHT_ZERO_POINT

_SMALLER = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


class Columns(ABC):
    """Columns of a weight [out_features, in_features] in a format; a column is [out_features] here.

    known: the only tensor that the methods read beside what they are given.
    size: so many neighbours of a row share a scale; 1: a scale is for all of a row.
    factors: candidates for a group's scale, as shares of the one that its largest value gives.
    """

    size: int = 1
    factors: tuple[float, ...] = (1.0,)

    def __init__(self, known: torch.Tensor) -> None:
        self.known = known

    def at(self, groups: Sequence[int]) -> Self:
        """Return the same for some groups of columns, counted from the weight's first one."""
        return self

    def of_largest(self) -> "Columns":
        """Return the same without candidates: scales are those that the largest values give."""
        other = copy.copy(self)
        other.factors = (1.0,)
        return other

    def knowing(self, known: torch.Tensor) -> Self:
        """Return the same with another tensor in the place of what is known."""
        other = copy.copy(self)
        other.known = known
        return other

    def scales(self, values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Return candidates for the scales of a group, as they are stored, float32 [kinds, candidates, out_features].

        Where scales are what is known, they are the only ones.

        Args:
            values: of its columns, float32 [size, out_features].
            factors: [candidates, 1].
        """
        return self.known[None, None]

    @abstractmethod
    def nearest(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the nearest values that can be stored, float32.

        Args:
            values: [..., out_features].
            scales: [kinds, ..., out_features], which broadcast over them.
        """

    def steps(self, scales: torch.Tensor) -> torch.Tensor:
        """Return what codes are multiplied with: of scales [kinds, ...] the same shape without `kinds`."""
        return scales[0]

    @abstractmethod
    def parts(self, values: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what is stored of a weight whose values `nearest` gave, `{part: tensor}`.

        What the weight's amax settles isn't among it.

        Args:
            values: [out_features, in_features].
            scales: [kinds, out_features, groups]; one group where all of a row share one.
        """


class E4m3Columns(Columns):
    """E4M3 codes, with scales that are known before: of rows or of square blocks. As scales go their amax values."""

    def __init__(self, amax: torch.Tensor, size: int = 1) -> None:
        """Keep the amax of each row, [out_features], or of each of its blocks, [out_features, groups]."""
        super().__init__(amax)
        self.size = size

    def at(self, groups: Sequence[int]) -> Self:
        """See `Columns`."""
        return self if self.size == 1 else self.knowing(self.known[:, groups[0]])

    def nearest(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """See `Columns`."""
        return grids.dequantise(grids.quantise(values, scales[0]), self.steps(scales))

    def steps(self, scales: torch.Tensor) -> torch.Tensor:
        """See `Columns`."""
        return grids.scale_of(scales[0])

    def parts(self, values: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the codes."""
        return {WEIGHT: grids.quantise(values, scales[0].repeat_interleave(self.size, 1))}


class PowerColumns(E4m3Columns):
    """E4M3 codes of square blocks with scales that are powers of two, the ones above those of the largest values.

    Who rounds such scales up to powers of two finds these as they are. The nearest codes have the scales of the largest
    values, as without compensation.
    """

    def __init__(self, amax: torch.Tensor, size: int) -> None:
        """Keep the amax of each row's blocks, [out_features, groups]."""
        super().__init__(grids.powers_of_squares(amax) * grids.E4M3_MAX, size)
        self._largest = amax

    def of_largest(self) -> E4m3Columns:
        """See `Columns`."""
        return E4m3Columns(self._largest, self.size)

    def parts(self, values: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the codes, and the scales [blocks, 1, blocks, 1]."""
        return {**super().parts(values, scales), WEIGHT_SCALE: self.steps(scales)[:: self.size, None, :, None]}


class E2m1Columns(Columns):
    """E2M1 codes times an E4M3 scale a block times a float32 scale of all, which is known before."""

    size = grids.BLOCK
    factors = (1.0, *_SMALLER, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5)

    def scales(self, values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Return E4M3 scales."""
        return grids.block_scales_of(values.abs().amax(0) * factors, self.known).float()[None]

    def nearest(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """See `Columns`."""
        steps = self.steps(scales)
        return grids.round_e2m1(values / steps) * steps

    def steps(self, scales: torch.Tensor) -> torch.Tensor:
        """See `Columns`."""
        return scales[0] * self.known

    def parts(self, values: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return packed codes and the blocks' scales."""
        stored = scales[0].to(grids.E4M3_DTYPE)
        return {WEIGHT: grids.pack(grids.block_codes(values, stored, self.known)), WEIGHT_SCALE: stored}


class ExponentColumns(Columns):
    """E4M3 codes times a power of two a block."""

    def __init__(self, amax: torch.Tensor, size: int) -> None:
        """Keep how many neighbours a block has; the weight's amax says nothing."""
        super().__init__(amax)
        self.size = size

    def scales(self, values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Return the exponents, as E8M0 has them."""
        return grids.exponents_for(values.abs().amax(0)).float()[None, None]

    def nearest(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """See `Columns`."""
        steps = self.steps(scales)
        return (values / steps).clamp(-grids.E4M3_MAX, grids.E4M3_MAX).to(grids.E4M3_DTYPE).float() * steps

    def steps(self, scales: torch.Tensor) -> torch.Tensor:
        """See `Columns`."""
        return grids.powers(scales[0])

    def parts(self, values: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return codes and the blocks' exponents."""
        exponents = scales[0].to(torch.uint8)
        return {WEIGHT: grids.exponent_codes(values, exponents), WEIGHT_SCALE: exponents}


class IntegerColumns(Columns):
    """Packed integers times a BF16 scale a group."""

    factors: tuple[float, ...] = (1.0, *_SMALLER, 0.65, 0.6)

    def __init__(self, amax: torch.Tensor, bits: int, size: int) -> None:
        """Keep the bits of a code, and how many neighbours a group has; the weight's amax says nothing."""
        super().__init__(amax)
        self.bits, self.size = bits, size
        self.greatest = integers.greatest(bits)

    def scales(self, values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Return the groups' scales."""
        return integers.scale_of(values.abs().amax(0) * factors, self.bits).to(torch.bfloat16).float()[None]

    def nearest(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """See `Columns`."""
        return torch.round(values / scales[0]).clamp(-self.greatest - 1, self.greatest) * scales[0]

    def parts(self, values: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return packed codes and the groups' scales."""
        stored = scales[0].to(torch.bfloat16)
        codes = integers.codes(values, stored, self.bits)
        return {WEIGHT: integers.packed(codes, self.bits), WEIGHT_SCALE: stored}


class RangeColumns(IntegerColumns):
    """The same with a zero point a group."""

    def scales(self, values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Return the groups' scales and zero points."""
        scales, zeros = integers.ranges_of(values.amin(0) * factors, values.amax(0) * factors, self.bits)
        return torch.stack((scales.float(), zeros.float()))

    def nearest(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """See `Columns`."""
        codes = torch.round(values / scales[0] + scales[1]).clamp(-self.greatest - 1, self.greatest)
        return (codes - scales[1]) * scales[0]

    def parts(self, values: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return packed codes, the groups' scales and their packed zero points."""
        stored, zeros = scales[0].to(torch.bfloat16), scales[1].to(torch.int8)
        codes = integers.codes(values, stored, self.bits, zeros)
        packed = {WEIGHT: integers.packed(codes, self.bits), WEIGHT_SCALE: stored}
        return packed | {WEIGHT_ZERO_POINT: integers.packed_along_rows(zeros, self.bits)}


class RowIntegerColumns(IntegerColumns):
    """Integers times a float32 scale a row, which is known before."""

    factors = (1.0,)
    scales = Columns.scales  # of no group

    def __init__(self, scales: torch.Tensor, bits: int) -> None:
        """Keep the scales, [out_features], and the bits of a code."""
        super().__init__(scales, bits, 1)

    def parts(self, values: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the codes."""
        return {WEIGHT: integers.codes(values, scales[0, :, 0], self.bits)}
