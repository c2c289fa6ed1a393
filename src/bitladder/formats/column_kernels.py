"""The grids of `columns` as functions of a GPU kernel, in Triton: the same scales and nearest values, to the bit.

A kernel walks rows side by side, each with a scale and a zero point of its own; every function has the same arguments,
whether it reads them or not:

    scales(least, greatest, factor, known, GREATEST) -> scale, zero    of a group's values, as they are stored
    nearest(values, scale, zero, known, GREATEST) -> values            float32

`known` is the rows' part of `Columns.known`, GREATEST the greatest code of integers. Divisions round to nearest, which
plain ones don't; powers of two are made of their bits.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from bitladder.formats import columns, grids, integers

_E4M3_MAX = tl.constexpr(grids.E4M3_MAX)
_E4M3_LEAST = tl.constexpr(grids.E4M3_MIN_EXPONENT)
_E4M3_DIGITS = tl.constexpr(grids.E4M3_MANTISSA_BITS)
_E2M1_MAX = tl.constexpr(grids.E2M1_MAX)
_LEAST_BLOCK_SCALE = tl.constexpr(grids.LEAST_BLOCK_SCALE)
_LEAST_INTEGER_SCALE = tl.constexpr(integers.LEAST_SCALE)
_OF_ZEROS = tl.constexpr(integers.SCALE_OF_ZEROS)
_BIAS = tl.constexpr(127)  # of a float32 number's exponent, which has the bits above its mantissa
_DIGITS = tl.constexpr(23)
_MANTISSA = tl.constexpr((1 << 23) - 1)
_SUBNORMAL = tl.constexpr(1 << 22)  # the bits of 2^-127
_SIGN = tl.constexpr(-(1 << 31))
_ROUNDING = tl.constexpr(1.5 * 2**23)  # what is added to it has no digits below 1: ties go to even


class ColumnKernel(NamedTuple):
    """What a kernel must know of `Columns`.

    kinds: 1, or 2 where a scale has a zero point.
    greatest: code of integers.
    by_row: every row has a scale of its own that is known before.
    """

    scales: Any
    nearest: Any
    kinds: int = 1
    greatest: int = 0
    by_row: bool = False


def kernel_of(of: columns.Columns) -> ColumnKernel:
    """Return the functions for a grid."""
    if isinstance(of, columns.E4m3Columns):
        return ColumnKernel(_known, _nearest_e4m3, by_row=True)
    if isinstance(of, columns.E2m1Columns):
        return ColumnKernel(_block_scales, _nearest_e2m1)
    if isinstance(of, columns.ExponentColumns):
        return ColumnKernel(_exponents, _nearest_by_exponent)
    assert isinstance(of, columns.IntegerColumns)
    if isinstance(of, columns.RowIntegerColumns):
        return ColumnKernel(_known, _nearest_integer, greatest=of.greatest, by_row=True)
    if isinstance(of, columns.RangeColumns):
        return ColumnKernel(_ranges, _nearest_in_range, kinds=2, greatest=of.greatest)
    return ColumnKernel(_integer_scales, _nearest_integer, greatest=of.greatest)


@triton.jit
def _rounded(values):
    """Return the nearest integers of values below 2^22."""
    return (values + _ROUNDING) - _ROUNDING


@triton.jit
def _power(exponent):
    return ((exponent + _BIAS) << _DIGITS).to(tl.float32, bitcast=True)


@triton.jit
def _signed_as(magnitude, values):
    bits = magnitude.to(tl.int32, bitcast=True) | (values.to(tl.int32, bitcast=True) & _SIGN)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(values):
    """Return the nearest E4M3 numbers, saturated. Not by a conversion: GPUs below 8.9 have none."""
    magnitude = tl.minimum(tl.abs(values), _E4M3_MAX)
    exponent = (magnitude.to(tl.int32, bitcast=True) >> _DIGITS) - _BIAS
    step = tl.maximum(exponent, _E4M3_LEAST) - _E4M3_DIGITS
    return _signed_as(_rounded(magnitude * _power(-step)) * _power(step), values)


@triton.jit
def _known(least, greatest, factor, known, GREATEST: tl.constexpr):
    return known, known * 0


@triton.jit
def _nearest_e4m3(values, scale, zero, known, GREATEST: tl.constexpr):
    factor = tl.div_rn(tl.full(scale.shape, _E4M3_MAX, tl.float32), scale)
    return _e4m3(values * factor) * tl.div_rn(scale, tl.full(scale.shape, _E4M3_MAX, tl.float32))


@triton.jit
def _block_scales(least, greatest, factor, known, GREATEST: tl.constexpr):
    scale = tl.div_rn(tl.maximum(-least, greatest) * factor, _E2M1_MAX * known)
    scale = tl.where(scale == 0.0, 1.0, scale)
    return _e4m3(tl.maximum(scale, _LEAST_BLOCK_SCALE)), known * 0


@triton.jit
def _nearest_e2m1(values, scale, zero, known, GREATEST: tl.constexpr):
    step = scale * known
    scaled = tl.div_rn(values, tl.broadcast_to(step, values.shape))
    magnitude = tl.minimum(tl.abs(scaled), _E2M1_MAX)
    exponent = tl.where(magnitude < 2.0, -1, tl.where(magnitude < 4.0, 0, 1))  # of how far apart numbers are
    return _signed_as(_rounded(magnitude * _power(-exponent)) * _power(exponent), scaled) * step


@triton.jit
def _power_of_e8m0(scale):
    """Return 2^(scale - 127); the least is a subnormal number."""
    bits = tl.where(scale == 0.0, _SUBNORMAL, scale.to(tl.int32) << _DIGITS)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _exponents(least, greatest, factor, known, GREATEST: tl.constexpr):
    amax = tl.maximum(-least, greatest)
    bits = tl.div_rn(amax, tl.full(amax.shape, _E4M3_MAX, tl.float32)).to(tl.int32, bitcast=True)
    up = (bits + _MANTISSA) >> _DIGITS
    return tl.where(bits <= _SUBNORMAL, 0, up).to(tl.float32), known * 0


@triton.jit
def _nearest_by_exponent(values, scale, zero, known, GREATEST: tl.constexpr):
    step = _power_of_e8m0(scale)
    return _e4m3(tl.div_rn(values, tl.broadcast_to(step, values.shape))) * step


@triton.jit
def _bf16(values):
    """Return positive values rounded to BF16. Not by a conversion: Triton's interpreter truncates."""
    bits = values.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _integer_scales(least, greatest, factor, known, GREATEST: tl.constexpr):
    amax = tl.maximum(-least, greatest) * factor
    scale = tl.div_rn(amax, tl.full(amax.shape, GREATEST + 0.5, tl.float32))
    scale = tl.where(scale < _LEAST_INTEGER_SCALE, 1.0, scale)
    return _bf16(scale), known * 0


@triton.jit
def _nearest_integer(values, scale, zero, known, GREATEST: tl.constexpr):
    scaled = tl.div_rn(values, tl.broadcast_to(scale, values.shape))
    return _rounded(tl.minimum(tl.maximum(scaled, -GREATEST - 1.0), GREATEST + 0.0)) * scale


@triton.jit
def _ranges(least, greatest, factor, known, GREATEST: tl.constexpr):
    least, greatest = tl.minimum(least * factor, 0.0), tl.maximum(greatest * factor, 0.0)
    scale = tl.div_rn(greatest - least, tl.full(least.shape, 2.0 * GREATEST + 1.0, tl.float32))
    usable = scale >= _LEAST_INTEGER_SCALE
    scale = tl.where(usable, scale, _OF_ZEROS)
    zero = -GREATEST - 1.0 - tl.div_rn(least, scale)
    zero = _rounded(tl.minimum(tl.maximum(zero, -GREATEST - 1.0), GREATEST + 0.0))
    return _bf16(scale), tl.where(usable, zero, 0.0)


@triton.jit
def _nearest_in_range(values, scale, zero, known, GREATEST: tl.constexpr):
    scaled = tl.div_rn(values, tl.broadcast_to(scale, values.shape)) + zero
    code = _rounded(tl.minimum(tl.maximum(scaled, -GREATEST - 1.0), GREATEST + 0.0))
    return (code - zero) * scale
