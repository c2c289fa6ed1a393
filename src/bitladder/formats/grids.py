"""FP8 E4M3 numbers, and FP4 E2M1 numbers in blocks: magnitudes, scales, codes, and back. Only this module knows 448, 6.

MXFP8 is E4M3 numbers in blocks of 32 with a power of two for each, stored as its exponent (E8M0).

A value x of a tensor with amax a is stored as the E4M3 code nearest to x · (448 / a), saturated at ±448, and restored
as code · (a / 448). Products and the division run in float32, as ModelOpt's fake quantisation does
(modelopt.torch.quantization.tensor_quant.fp8_eager); ModelOpt's own export divides in BF16, which moves some codes to
a neighbour. `docs/numerics.md` has the measurements.

An FP4 value is one of ±{0, 0.5, 1, 1.5, 2, 3, 4, 6} times the E4M3 scale of its block of 16 times a float32 scale of
the whole tensor. Weights are coded as ModelOpt does it, to the bit; inputs are rounded as vLLM's reference does it, to
the bit, which differs in the order of float32 products and in what becomes of blocks near zero.
"""

from itertools import pairwise

import torch

E4M3_MAX = 448.0  # largest finite value; OCP 8-bit Floating Point Specification 1.0, table 1
E4M3_DTYPE = torch.float8_e4m3fn
E4M3_MANTISSA_BITS = 3
E4M3_MIN_EXPONENT = -6  # of the smallest normal value; below it the step stays that of subnormals, 2^-9

E2M1_MAX = 6.0  # OCP Microscaling Formats Specification 1.0, table 5
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; 8 to 15 are their negatives
_E2M1_MIDPOINTS = tuple((low + high) / 2 for low, high in pairwise(E2M1_VALUES))
_E2M1_IN_E4M3 = 0b10011100 - 256  # the bits of an E4M3 number, as int8, that hold an E2M1 number
_E2M1_OVER_E4M3 = 64.0  # that number over what they are read as: 2 to the power of the exponents' biases' difference
BLOCK = 16  # elements of a row that share an E4M3 scale
LEAST_BLOCK_SCALE = 2.0**-9  # the least positive E4M3 number
_E2M1_STEPS = ((2.0, 0.5), (4.0, 1.0))  # below a magnitude, how far apart values are; above the last one 2

# Below it amax / 448 is no normal float32 number, or 448 / amax no finite one.
LEAST_AMAX = E4M3_MAX * 2 * torch.finfo(torch.float32).tiny
LEAST_BLOCKS_AMAX = E2M1_MAX * LEAST_AMAX  # of a tensor in blocks
E8M0_BIAS, E8M0_NAN = 127, 255  # OCP Microscaling Formats Specification 1.0, section 5.4.1
_MANTISSA_BITS, _MANTISSA = 23, (1 << 23) - 1  # of a float32 number
_LEAST_POWER = 1 << 22  # the bits of 2^-127, which E8M0 holds and float32 only as a subnormal number
_LEAST_SQUARE_AMAX = 1e-4  # of a block whose scale becomes a power of two (deep_gemm.py, per_block_cast_to_fp8)
LEAST_GROUP_AMAX = 1e-10  # of a group of a token, in which its scale is made (fp8_utils.py, `eps`)


def amax_of(values: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of `values` (any shape), a scalar of its dtype; NaN if it holds one."""
    amax: torch.Tensor = torch.linalg.vector_norm(values.detach(), torch.inf)
    return amax


def scale_of(amax: torch.Tensor) -> torch.Tensor:
    """Return the multiplier that restores values from codes, amax / 448, in float32 (any shape)."""
    return amax.float() / E4M3_MAX


def quantise(values: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Return the E4M3 codes of `values` for `amax` > 0, a scalar or broadcast over them, dtype float8_e4m3fn.

    They lie row by row, whatever the values' order in memory: GPUs multiply no others.
    """
    # One float32 copy, changed in place: three times as fast as a new tensor a step.
    scaled = values.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return scaled.mul_(E4M3_MAX / amax.float()).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3_DTYPE)


def dequantise(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return code · scale, multiplied in float32 and cast to `dtype`; shapes broadcast."""
    return (codes.float() * scale.float()).to(dtype)


def fake_quantise(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return `values` rounded through E4M3 with a scale, a scalar or broadcast over them, in their own dtype.

    Source: modelopt.torch.quantization.tensor_quant.fp8_eager with amax = 448 · scale.
    """
    factor = E4M3_MAX / (scale.float() * E4M3_MAX)
    codes = (values.float() * factor).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3_DTYPE)
    return (codes.float() * (1 / factor)).to(values.dtype)


def half_step(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return, per element, half the distance between the two E4M3 multiples of `scale` around the value.

    A value within ±448 · scale lies at most this far from the nearest code · scale.
    """
    exponent = torch.frexp(values.float() / scale.float()).exponent - 1  # x = m · 2^exponent with 1 <= |m| < 2
    step_exponent = exponent.clamp_min(E4M3_MIN_EXPONENT) - E4M3_MANTISSA_BITS
    return scale.float() / 2 * torch.exp2(step_exponent.float())


def scale_of_blocks(amax: torch.Tensor) -> torch.Tensor:
    """Return the scale above the blocks' scales of a tensor, amax / (448 · 6), in float32."""
    return amax.float() / (E2M1_MAX * E4M3_MAX)


def in_blocks(values: torch.Tensor, size: int = BLOCK) -> torch.Tensor:
    """Return a view [..., columns / size, size] of [..., columns]."""
    return values.reshape(*values.shape[:-1], -1, size)


def largest(values: torch.Tensor, *, keepdim: bool = False) -> torch.Tensor:
    """Return the largest magnitude along the last dimension, float32.

    In the values' own dtype torch would, where it compiles, round it from one kernel to the next but not within one:
    codes would be made with one power of two and restored with another.
    """
    return values.detach().float().abs().amax(-1, keepdim=keepdim)


def block_scales(values: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """Return the E4M3 scale of every block, [..., columns / 16] float8_e4m3fn; that of a block of zeros is 1.

    Args:
        values: [..., columns].
        above: float32 scalar, the scale of the whole tensor.

    Source: NVFP4QTensor.get_weights_scaling_factor and _cast_per_block_scale_to_fp8.
    """
    return block_scales_of(largest(in_blocks(values)), above)


def block_scales_of(amax: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """Return the E4M3 scales of blocks with these largest magnitudes, of the same shape."""
    scales = amax.float() / (E2M1_MAX * above)
    scales = torch.where(scales == 0, 1.0, scales)
    return scales.clamp(LEAST_BLOCK_SCALE, E4M3_MAX).to(E4M3_DTYPE)


def block_codes(values: torch.Tensor, scales: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """Return the nearest E2M1 codes of `values` [..., columns], ties to even, uint8 0 to 15 (8: negative).

    Source: NVFP4QTensor.quantize and _cast_fp4.
    """
    scaled = (in_blocks(values.detach()) / (scales.float() * above).unsqueeze(-1)).reshape(values.shape)
    magnitude = scaled.abs()
    # A code is the number of midpoints below; one that ties goes to the even code. Several times as fast as dividing.
    code = (magnitude > _E2M1_MIDPOINTS[0]).to(torch.uint8)
    for below, midpoint in enumerate(_E2M1_MIDPOINTS[1:], start=1):
        code += magnitude >= midpoint if below % 2 else magnitude > midpoint
    return code | ((scaled < 0).to(torch.uint8) << 3)


def _e2m1_step(magnitude: torch.Tensor) -> torch.Tensor:
    """Return how far apart E2M1 values are at these magnitudes."""
    (low, fine), (middle, coarse) = _E2M1_STEPS
    return torch.where(magnitude < low, fine, torch.where(magnitude < middle, coarse, 2 * coarse))


def round_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest E2M1 values, ties to even, saturated at ±6; float32."""
    magnitude = values.abs().clamp(max=E2M1_MAX)
    step = _e2m1_step(magnitude)
    return torch.copysign(torch.round(magnitude / step) * step, values)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Return two codes a byte [..., columns / 2] of uint8 [..., columns], the even column in the low nibble."""
    return (codes[..., 1::2] << 4) | codes[..., 0::2]


def restored_blocks(packed: torch.Tensor, scales: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """Return code · (scale · above) in float32, [..., columns], of codes two a byte, [..., columns / 2].

    Source: NVFP4QTensor.dequantize; vLLM's dequantize_to_dtype.
    """
    # Sign, exponent and mantissa of E2M1, at their places among the bits of E4M3, are the value times 2^-6.
    signed = torch.stack((packed << 4, packed), dim=-1).flatten(-2).view(torch.int8)
    values = ((signed >> 2) & _E2M1_IN_E4M3).view(E4M3_DTYPE).float()
    factors = scales.float() * above.float() * _E2M1_OVER_E4M3
    return (in_blocks(values) * factors.unsqueeze(-1)).reshape(values.shape)


def fake_quantise_blocks(values: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """Return `values` [..., columns] with every block rounded through E2M1 and an E4M3 scale, in their own dtype.

    Args:
        values: an input.
        above: float32 scalar, its stored scale.

    Source: vllm 0.32.0, quantization/utils/nvfp4_emulation_utils.py, ref_nvfp4_quant_dequant, with global_scale the
    inverse of the stored scale, as ModelOptLinearMethod has it.
    """
    inverse = 1.0 / above.float()
    blocks = in_blocks(values.float())
    amax = largest(blocks, keepdim=True)
    scales = (inverse * (amax * (1 / E2M1_MAX))).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3_DTYPE).float()
    rounded = round_e2m1(blocks * _inverse(scales * _inverse(inverse)))
    return (rounded * (scales / inverse)).reshape(values.shape).to(values.dtype)


def _inverse(numbers: torch.Tensor) -> torch.Tensor:
    """Return 1 / number, and 1e-8 for zero, so that a block whose scale vanishes becomes zero.

    Source: get_reciprocal in the same file.
    """
    return 1.0 / (numbers + (numbers == 0) * 1e8)


def squares(values: torch.Tensor, side: int) -> torch.Tensor:
    """Return a view [rows / side, side, columns / side, side] of [rows, columns]."""
    rows, columns = values.shape
    return values.reshape(rows // side, side, columns // side, side)


def fake_quantise_groups(values: torch.Tensor, size: int, *, powers_of_two: bool = False) -> torch.Tensor:
    """Return `values` [..., columns] with every `size` neighbours rounded with a scale of their own, in their dtype.

    Source: vllm 0.32.0, quantization/utils/fp8_utils.py, per_token_group_quant_fp8, with float32 scales; with powers of
    two its argument use_ue8m0.
    """
    groups = in_blocks(values.float(), size)
    scales = largest(groups, keepdim=True).clamp_min(LEAST_GROUP_AMAX) / E4M3_MAX
    if powers_of_two:
        scales = power_above(scales.clamp_min(LEAST_GROUP_AMAX))
    codes = (groups / scales).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3_DTYPE)
    return (codes.float() * scales).reshape(values.shape).to(values.dtype)


def fake_quantise_squares(values: torch.Tensor, side: int) -> torch.Tensor:
    """Return float32 `values` [rows, columns] with every square block rounded, its scale a power of two.

    Source: vllm 0.32.0, utils/deep_gemm.py, per_block_cast_to_fp8, as requant_weight_ue8m0_inplace calls it.
    """
    blocks = squares(values, side)
    scales = powers_of_squares(blocks.abs().amax((1, 3), keepdim=True))
    return ((blocks / scales).to(E4M3_DTYPE).float() * scales).reshape(values.shape)


def powers_of_squares(amax: torch.Tensor) -> torch.Tensor:
    """Return the scales of blocks whose largest magnitudes these are, float32 powers of two (any shape).

    Source: see `fake_quantise_squares`.
    """
    return power_above(amax.float().clamp_min(_LEAST_SQUARE_AMAX) / E4M3_MAX)


def power_above(values: torch.Tensor) -> torch.Tensor:
    """Return the least power of two that is no less than a positive float32 number; of any shape.

    Read off its bits: a logarithm beside a power of two is rounded to it, otherwise on each device.
    """
    return ((values.view(torch.int32) + _MANTISSA) & ~_MANTISSA).view(torch.float32)


def powers(exponents: torch.Tensor) -> torch.Tensor:
    """Return the scales, float32, that E8M0 numbers (uint8) stand for: 2^(number - 127); 255 is NaN.

    Source: OCP Microscaling Formats Specification 1.0, section 5.4.1.
    """
    return torch.where(exponents == E8M0_NAN, torch.nan, torch.exp2(exponents.float() - E8M0_BIAS))


def exponents_of(values: torch.Tensor, size: int) -> torch.Tensor:
    """Return the E8M0 scale of every `size` neighbours of [..., columns]: ceil(log2(amax / 448)) + 127, uint8.

    Read off the bits of amax / 448, since a logarithm beside a power of two is rounded to it, otherwise on each device.
    Zeros have the least, 0.

    Source: MXFP8QTensor._compute_e8m0_exponent; vllm 0.32.0, mxfp8_utils.py, _mxfp8_e4m3_quantize_torch.
    """
    return exponents_for(largest(in_blocks(values, size)))


def exponents_for(amax: torch.Tensor) -> torch.Tensor:
    """Return the E8M0 scales of blocks with these largest magnitudes, float32 of any shape."""
    bits = (amax / E4M3_MAX).view(torch.int32)
    rounded_up = (bits + _MANTISSA) >> _MANTISSA_BITS
    return torch.where(bits <= _LEAST_POWER, 0, rounded_up).to(torch.uint8)


def exponent_codes(values: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Return the nearest E4M3 codes of `values` [..., columns] with E8M0 scales [..., columns / size].

    Source: MXFP8QTensor.quantize_with_scale.
    """
    blocks = in_blocks(values.detach().float(), values.shape[-1] // exponents.shape[-1])
    scaled = blocks * torch.exp2(E8M0_BIAS - exponents.float()).unsqueeze(-1)
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3_DTYPE).reshape(values.shape)


def restored_by_exponents(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Return code · scale in float32, [..., columns]; E8M0 scales are [..., columns / size]."""
    blocks = in_blocks(codes.float(), codes.shape[-1] // exponents.shape[-1])
    return (blocks * powers(exponents).unsqueeze(-1)).reshape(codes.shape)
