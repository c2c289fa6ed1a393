"""Codes and their scales, whatever these are for: what they stand for, and what they must be for a weight."""

import torch

from bitladder.formats import grids
from bitladder.verification.layouts import BLOCK, E2M1_MAX, E4M3_MAX, EXPONENT_BLOCK, SQUARE, Spread

# Source: OCP Microscaling Formats Specification 1.0, section 5.3.3: sign, two bits of exponent, one of mantissa.
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Below a magnitude, half the distance of the two values around it; from the last one on 1.
_HALF_STEPS = ((2.0, 0.25), (4.0, 0.5))
_LEAST = 2.0**-9  # the least positive E4M3 number
# Of a row or square of zeros: below it the greatest code / amax is no finite float32 number, or its inverse no normal
# one.
_LEAST_AMAX = E4M3_MAX * 2 * torch.finfo(torch.float32).tiny


def many_scales(weight: torch.Tensor, spread: Spread, above: torch.Tensor | None) -> torch.Tensor | None:
    """Return what the scales of a weight's rows or blocks must be; None: it has none, or `above` isn't known.

    Args:
        weight: [out_features, in_features] of the source; of rows and squares in the arithmetic of the measurement.
        spread: what the scales are for.
        above: scale of the whole weight, of FP4 codes.
    """
    if spread == "fp4":
        return None if above is None else scales_of(weight, above)
    if spread == "tensor":
        return None
    if spread == "exponent":
        # amax / 448 = m · 2^e with 1/2 <= m < 1, so the least power of two above is 2^e, or itself where m is 1/2
        amax = _largest(weight, EXPONENT_BLOCK)
        mantissa, exponent = torch.frexp(amax.double() / E4M3_MAX)
        power = torch.where(mantissa == 0.5, exponent - 1, exponent)
        return torch.where(mantissa == 0, 0, power + 127).clamp(0, 254).to(torch.uint8)
    if spread == "square":
        amax = _largest(_largest(weight, SQUARE).t(), SQUARE).t()[:, None, :, None]
    else:
        amax = weight.abs().amax(1)
    return amax.float().clamp_min(_LEAST_AMAX) / torch.tensor(E4M3_MAX)


def _largest(values: torch.Tensor, size: int) -> torch.Tensor:
    """Return the largest magnitude of every `size` neighbours of a row, [rows, columns / size]."""
    return torch.stack([values[:, at : at + size].abs().amax(1) for at in range(0, values.shape[1], size)], 1)


def numbers(codes: torch.Tensor, spread: Spread) -> torch.Tensor:
    """Return the numbers that some rows of codes stand for, float32 [rows, in_features].

    Args:
        codes: [rows, in_features] of E4M3, or of FP4 two a byte, the even column in the low nibble.
        spread: what their scales are for.
    """
    if spread != "fp4":
        return codes.float()
    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)])
    return values[torch.stack((codes % 16, codes // 16), 2).reshape(len(codes), -1).int()]


def steps(scale: torch.Tensor, spread: Spread, first: int, count: int, above: torch.Tensor | None) -> torch.Tensor:
    """Return what the numbers of some rows are multiplied with, so that it broadcasts over [count, in_features].

    Args:
        scale: as it is stored.
        spread: what it is for.
        first: the first row.
        count: how many.
        above: scale of the whole weight, of FP4 codes.
    """
    rows = slice(first, first + count)
    if spread == "row":
        return scale[rows, None]
    if spread == "square":
        lines = scale.reshape(len(scale), -1).repeat_interleave(SQUARE, 0)[rows]
        return lines.repeat_interleave(SQUARE, 1)
    if spread == "exponent":
        powers = scale[rows].view(torch.float8_e8m0fnu).float()
        return powers.repeat_interleave(EXPONENT_BLOCK, 1)
    if spread == "fp4":
        assert above is not None
        return (scale[rows].float() * above).repeat_interleave(BLOCK, 1)
    return scale


def half_steps(values: torch.Tensor, step: torch.Tensor, spread: Spread) -> torch.Tensor:
    """Return, per element, half the distance of the two values around it that codes can stand for."""
    if spread != "fp4":
        return grids.half_step(values, step)
    size, (first, second) = (values / step).abs(), _HALF_STEPS
    half = torch.where(size < first[0], first[1], torch.where(size < second[0], second[1], 1.0))
    return half * step


def scales_of(weight: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """Return what the blocks' scales [out_features, in_features / 16] must be, float8_e4m3fn.

    The largest magnitude of a block is to be stored as 6, under the scale of the whole weight; zeros have scale 1.

    Args:
        weight: [out_features, in_features] of the source.
        above: scale of the whole weight.
    """
    amax = weight.reshape(len(weight), -1, BLOCK).abs().max(2).values.float()
    scales: torch.Tensor = amax / (E2M1_MAX * above)
    scales[scales == 0] = 1.0
    return scales.clamp(_LEAST, E4M3_MAX).to(torch.float8_e4m3fn)
