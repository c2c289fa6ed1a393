"""Symmetric integers with a scale a row, or a BF16 scale a group of a row: read back, and compared with the weight."""

import torch

from bitladder.verification.expected import Scale
from bitladder.verification.layouts import E4M3_MAX

# float32 rounding of code · scale and of the division that made the code, relative to the half step, at code 127
_TOLERANCE = 1 + 1e-4
_AT_ONCE = 1 << 18  # codes compared at a time: what a cache holds
_TINY = torch.finfo(torch.float32).tiny
_WORD = 32


def scales_of(weight: torch.Tensor, bits: int, scale: Scale) -> torch.Tensor:
    """Return what the scales of rows [rows] or groups [rows, groups] must be, in their dtype.

    The range of codes is one smaller on the positive side; half of it is what the largest magnitude is stored as, and
    zeros have scale 1.

    Args:
        weight: [rows, columns] of the source, in the arithmetic of the measurement.
        bits: of a code.
        scale: what is expected of them.
    """
    groups = 1 if scale.by_row else scale.shape[1]
    amax = weight.reshape(len(weight), groups, -1).abs().max(2).values.float()
    if scale.by_row:  # rows of zeros have the amax that FP8's have
        amax = amax[:, 0].clamp_min(E4M3_MAX * 2 * _TINY)
    scales: torch.Tensor = amax / ((2**bits - 1) / 2)
    scales[scales < 2 * _TINY] = 1.0
    return scales.to(scale.dtype)


def stored_as(original: torch.Tensor, bits: int, *, packed: bool) -> tuple[torch.dtype, list[int], str]:
    """Return dtype and shape of a weight's codes, and what the scheme says of them."""
    rows, columns = original.shape
    if not packed:
        return torch.int8, [rows, columns], "says 8-bit integers"
    return torch.int32, [rows, columns * bits // _WORD], f"says {bits}-bit integers, {_WORD // bits} a word,"


def wrong_codes(stored: torch.Tensor, scale: torch.Tensor, bits: int, original: torch.Tensor) -> int:
    """Return how many codes restore something that is farther than half a step from the source weight.

    The smallest and the largest code may stand for more.

    Args:
        stored: [rows, columns] int8, or words of int32, the first column in the lowest bits.
        scale: [rows], or [rows, groups].
        bits: of a code.
        original: [rows, columns].
    """
    half, wrong, at_once = 2 ** (bits - 1), 0, max(1, _AT_ONCE // original.shape[1])
    shifts = torch.arange(0, _WORD, bits)
    for start in range(0, len(stored), at_once):
        rows = slice(start, start + at_once)
        codes = stored[rows].long()
        if stored.dtype == torch.int32:
            codes = ((codes.unsqueeze(2) >> shifts) & (2 * half - 1)).reshape(len(codes), -1) - half
        some = scale[rows].float().reshape(len(codes), -1)
        step = some.repeat_interleave(codes.shape[1] // some.shape[1], 1)
        restored, wanted = codes * step, original[rows].float()
        at_end = ((codes == half - 1) & (wanted >= restored)) | ((codes == -half) & (wanted <= restored))
        wrong += int((~(((restored - wanted).abs() <= step / 2 * _TOLERANCE) | at_end)).sum())
    return wrong
