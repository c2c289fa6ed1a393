"""Symmetric integers: scales, nearest codes, packing. Imported where torch is needed only.

Source: compressed_tensors 0.20.0, quantization/utils/helpers.py (calculate_range, calculate_qparams) and
compressors/pack_quantized/helpers.py; a group's scale lets the whole range of codes be used, -2^(bits - 1) too.
"""

import torch

_LEAST = 2 * torch.finfo(torch.float32).tiny  # of a scale, so that 1 / scale is a number
_NIBBLE = 4
_TOKEN_MAX = 127


def scale_of(amax: torch.Tensor, bits: int) -> torch.Tensor:
    """Return amax / ((2^bits - 1) / 2), float32, of any shape; 1 where that is no usable scale, as of zeros."""
    scales = amax.float() / ((2**bits - 1) / 2)
    return torch.where(scales < _LEAST, 1.0, scales)


def group_scales(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Return the BF16 scales [rows, columns / group] of a weight."""
    amax = weight.detach().reshape(len(weight), -1, group).abs().amax(-1)
    return scale_of(amax, bits).to(torch.bfloat16)


def codes(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the nearest codes of a weight, ties to even, int8 [rows, columns].

    Args:
        weight: [rows, columns].
        scales: [rows, groups], or [rows] of whole rows.
        bits: of a code.
    """
    groups = weight.detach().float().reshape(len(weight), scales[0].numel(), -1)
    half = 2 ** (bits - 1)
    nearest = torch.round(groups / scales.float().reshape(len(weight), -1, 1)).clamp(-half, half - 1)
    return nearest.to(torch.int8).reshape(weight.shape)


def restored(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return code · scale in float32, [rows, columns]; scales as in `codes`."""
    groups = values.float().reshape(len(values), scales[0].numel(), -1)
    return (groups * scales.float().reshape(len(values), -1, 1)).reshape(values.shape)


def packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return int8 codes [rows, columns] of 4 or 8 bits as int32 [rows, columns · bits / 32], the first lowest."""
    unsigned = (values.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    if bits == _NIBBLE:
        unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << _NIBBLE)
    words: torch.Tensor = unsigned.contiguous().view(torch.int32)
    return words


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the int8 codes [rows, columns] of packed ones."""
    unsigned = words.contiguous().view(torch.uint8)
    if bits == _NIBBLE:
        unsigned = torch.stack((unsigned & 0xF, unsigned >> _NIBBLE), dim=-1).flatten(-2)
    values: torch.Tensor = (unsigned.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    return values


def round_tokens(x: torch.Tensor) -> torch.Tensor:
    """Return an input [..., features] with every token rounded to 8-bit integers by its amax / 127, in its own dtype.

    Source: vllm 0.32.0, _custom_ops.py, scaled_int8_quant (csrc/quantization/w8a8/int8/scaled_quant.cu).
    """
    amax = x.detach().abs().amax(-1, keepdim=True).float()
    scale = torch.where(amax < _LEAST * _TOKEN_MAX, 1.0, amax / _TOKEN_MAX)
    return (torch.round(x.float() / scale).clamp(-_TOKEN_MAX - 1, _TOKEN_MAX) * scale).to(x.dtype)
