"""Integers with a scale a row, or a BF16 scale and maybe a zero point a group: read back, compared with the weight."""

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
        weight: [rows, columns] of the source; of rows in the arithmetic of the measurement.
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


def ranges_of(weight: torch.Tensor, bits: int, scale: Scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the scales [rows, groups] of groups with zero points must be, in their dtype, and these as stored.

    From the least to the greatest code a group reaches from its least to its greatest value, 0 being one of them. Zeros
    have the library's scale, BF16's step at 1.

    Args:
        weight: [rows, columns] of the source.
        bits: of a code.
        scale: what is expected of the scales.
    """
    nothing, half = torch.zeros(()), 2 ** (bits - 1)
    low, high = torch.aminmax(weight.float().reshape(len(weight), scale.shape[1], -1), dim=2)
    low, high = torch.minimum(low, nothing), torch.maximum(high, nothing)
    step = (high - low) / (2**bits - 1)
    zeros = (-half - low / step).clamp(-half, half - 1).round()
    empty = step < 2 * _TINY
    step[empty], zeros[empty] = 2.0**-7, 0
    # as many rows as a word holds, the first in the lowest bits
    lines = (zeros.long() + half).reshape(-1, _WORD // bits, zeros.shape[1])
    words = (lines << torch.arange(0, _WORD, bits)[:, None]).sum(1)
    return step.to(scale.dtype), torch.where(words >= 1 << (_WORD - 1), words - (1 << _WORD), words).int()


def zero_points(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the zero points [rows, groups] that stored ones [rows · bits / 32, groups] are."""
    lines = (words.long().unsqueeze(1) >> torch.arange(0, _WORD, bits)[:, None]) & (2**bits - 1)
    zeros: torch.Tensor = lines.reshape(-1, words.shape[1]) - 2 ** (bits - 1)
    return zeros


def zeros_problem(stored: torch.Tensor, wanted: torch.Tensor, bits: int) -> str | None:
    """Return what is wrong with stored zero points, which have the right shape; None: nothing."""
    found, own = (zero_points(words.reshape(stored.shape), bits) for words in (stored, wanted))
    wrong = (found != own).nonzero().tolist()
    if not wrong:
        return None
    row, group = wrong[0]
    return (
        f"{len(wrong):,} of {found.numel():,} groups have another zero point: group {group} of row {row} has "
        f"{found[row, group]}, the source's weights give {own[row, group]}"
    )


def stored_as(original: torch.Tensor, bits: int, *, packed: bool) -> tuple[torch.dtype, list[int], str]:
    """Return dtype and shape of a weight's codes, and what the scheme says of them."""
    rows, columns = original.shape
    if not packed:
        return torch.int8, [rows, columns], "says 8-bit integers"
    return torch.int32, [rows, columns * bits // _WORD], f"says {bits}-bit integers, {_WORD // bits} a word,"


def wrong_codes(
    stored: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    original: torch.Tensor,
    zeros: torch.Tensor | None = None,
    shift: float | None = None,
) -> int:
    """Return how many codes restore something that is farther than half a step from the source weight, or than `shift`.

    The smallest and the largest code may stand for more, where each was to be the nearest one.

    Args:
        stored: [rows, columns] int8, or words of int32, the first column in the lowest bits.
        scale: [rows], or [rows, groups].
        bits: of a code.
        original: [rows, columns].
        zeros: stored zero points; None: there are none.
        shift: how many steps a code may be off; None: half a one.
    """
    offsets = None if zeros is None else zero_points(zeros, bits)
    half, wrong, at_once = 2 ** (bits - 1), 0, max(1, _AT_ONCE // original.shape[1])
    shifts = torch.arange(0, _WORD, bits)
    for start in range(0, len(stored), at_once):
        rows = slice(start, start + at_once)
        codes = stored[rows].long()
        if stored.dtype == torch.int32:
            codes = ((codes.unsqueeze(2) >> shifts) & (2 * half - 1)).reshape(len(codes), -1) - half
        some = scale[rows].float().reshape(len(codes), -1)
        step = some.repeat_interleave(codes.shape[1] // some.shape[1], 1)
        steps = codes
        if offsets is not None:
            steps = codes - offsets[rows].repeat_interleave(codes.shape[1] // offsets.shape[1], 1)
        restored, wanted = steps * step, original[rows].float()
        if shift is not None:
            wrong += int(((restored - wanted).abs() > shift * step * _TOLERANCE).sum())
            continue
        at_end = ((codes == half - 1) & (wanted >= restored)) | ((codes == -half) & (wanted <= restored))
        wrong += int((~(((restored - wanted).abs() <= step / 2 * _TOLERANCE) | at_end)).sum())
    return wrong
