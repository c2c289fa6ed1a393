"""Integers, symmetric or with zero points: scales, nearest codes, packing. Imported where torch is needed only.

Source: compressed_tensors 0.20.0, quantization/utils/helpers.py (calculate_range, calculate_qparams) and
compressors/pack_quantized/helpers.py; a group's scale lets the whole range of codes be used, -2^(bits - 1) too.
"""

import torch

from bitladder.formats import grids

LEAST_SCALE = 2 * torch.finfo(torch.float32).tiny  # of a scale, so that 1 / scale is a number
SCALE_OF_ZEROS = torch.finfo(torch.bfloat16).eps  # scale of a group of zeros that has a zero point
_NIBBLE = 4
_TOKEN_MAX = 127


def greatest(bits: int) -> int:
    """Return the greatest code."""
    return (1 << (bits - 1)) - 1


def scale_of(amax: torch.Tensor, bits: int) -> torch.Tensor:
    """Return amax / ((2^bits - 1) / 2), float32, of any shape; 1 where that is no usable scale, as of zeros."""
    scales = amax.float() / ((2**bits - 1) / 2)
    return torch.where(scales < LEAST_SCALE, 1.0, scales)


def group_scales(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, None]:
    """Return the BF16 scales [rows, columns / group] of a weight, whose codes have no zero points."""
    amax = weight.detach().reshape(len(weight), -1, group).abs().amax(-1)
    return scale_of(amax, bits).to(torch.bfloat16), None


def group_ranges(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the BF16 scales of a weight's groups and their zero points, int8, both [rows, columns / group].

    The codes span each group's least and greatest value, and 0. Zero points are made with scales in float32, codes with
    what is stored of them.
    """
    groups = weight.detach().reshape(len(weight), -1, group)
    return ranges_of(groups.amin(-1).float(), groups.amax(-1).float(), bits)


def ranges_of(least: torch.Tensor, greatest: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same of groups with these least and greatest values, float32 of any shape."""
    least, greatest = least.clamp(max=0), greatest.clamp(min=0)
    half = 2 ** (bits - 1)
    scales = (greatest - least) / (2 * half - 1)
    usable = scales >= LEAST_SCALE
    scales = torch.where(usable, scales, SCALE_OF_ZEROS)
    zeros = torch.where(usable, torch.round((-half - least / scales).clamp(-half, half - 1)), 0)
    return scales.to(torch.bfloat16), zeros.to(torch.int8)


def codes(weight: torch.Tensor, scales: torch.Tensor, bits: int, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """Return the nearest codes of a weight, ties to even, int8 [rows, columns].

    Args:
        weight: [rows, columns].
        scales: [rows, groups], or [rows] of whole rows.
        bits: of a code.
        zeros: the codes that restore 0, [rows, groups]; None: 0 does.
    """
    groups = weight.detach().float().reshape(len(weight), scales[0].numel(), -1)
    half = 2 ** (bits - 1)
    scaled = groups / scales.float().reshape(len(weight), -1, 1)
    scaled = scaled if zeros is None else scaled + zeros.unsqueeze(-1)
    return torch.round(scaled).clamp(-half, half - 1).to(torch.int8).reshape(weight.shape)


def restored(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """Return (code - zero point) · scale in float32, [rows, columns]; scales and zero points as in `codes`."""
    groups = values.float().reshape(len(values), scales[0].numel(), -1)
    groups = groups if zeros is None else groups - zeros.unsqueeze(-1)
    return (groups * scales.float().reshape(len(values), -1, 1)).reshape(values.shape)


def packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return int8 codes [rows, columns] of 4 or 8 bits as int32 [rows, columns · bits / 32], the first lowest."""
    unsigned = (values.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    if bits == _NIBBLE:
        unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << _NIBBLE)
    words: torch.Tensor = unsigned.flatten().view(torch.int32)  # flat: the stride of one row may be anything
    return words.reshape(len(values), -1)


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the int8 codes [rows, columns] of packed ones."""
    unsigned = words.flatten().view(torch.uint8).reshape(len(words), -1)
    if bits == _NIBBLE:
        unsigned = torch.stack((unsigned & 0xF, unsigned >> _NIBBLE), dim=-1).flatten(-2)
    values: torch.Tensor = (unsigned.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    return values


def packed_along_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return int8 codes [rows, columns] as int32 [rows · bits / 32, columns], the first row lowest."""
    return packed(values.t().contiguous(), bits).t().contiguous()


def unpacked_along_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the int8 codes [rows, columns] of what is packed so."""
    return unpacked(words.t(), bits).t()


def round_tokens(x: torch.Tensor) -> torch.Tensor:
    """Return an input [..., features] with every token rounded to 8-bit integers by its amax / 127, in its own dtype.

    Source: vllm 0.32.0, _custom_ops.py, scaled_int8_quant (csrc/quantization/w8a8/int8/scaled_quant.cu).
    """
    amax = grids.largest(x, keepdim=True)
    scale = torch.where(amax < LEAST_SCALE * _TOKEN_MAX, 1.0, amax / _TOKEN_MAX)
    return (torch.round(x.float() / scale).clamp(-_TOKEN_MAX - 1, _TOKEN_MAX) * scale).to(x.dtype)
