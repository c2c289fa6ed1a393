"""FP8 E4M3 numbers: magnitudes, scales, codes, and back. The only module that knows 448.

A value x of a tensor with amax a is stored as the E4M3 code nearest to x · (448 / a), saturated at ±448, and restored
as code · (a / 448). Products and the division run in float32, as ModelOpt's fake quantisation does
(modelopt.torch.quantization.tensor_quant.fp8_eager); ModelOpt's own export divides in BF16, which moves some codes to
a neighbour. `docs/numerics.md` has the measurements.
"""

import torch

E4M3_MAX = 448.0  # largest finite value; OCP 8-bit Floating Point Specification 1.0, table 1
E4M3_DTYPE = torch.float8_e4m3fn
E4M3_MANTISSA_BITS = 3
E4M3_MIN_EXPONENT = -6  # of the smallest normal value; below it the step stays that of subnormals, 2^-9

# Below it amax / 448 is no normal float32 number, or 448 / amax no finite one.
LEAST_AMAX = E4M3_MAX * 2 * torch.finfo(torch.float32).tiny


def amax_of(values: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of `values` (any shape), a scalar of its dtype; NaN if it holds one."""
    amax: torch.Tensor = torch.linalg.vector_norm(values.detach(), torch.inf)
    return amax


def scale_of(amax: torch.Tensor) -> torch.Tensor:
    """Return the multiplier that restores values from codes, amax / 448, in float32 (any shape)."""
    return amax.float() / E4M3_MAX


def quantise(values: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Return the E4M3 codes of `values` for `amax` > 0, a scalar or broadcast over them, dtype float8_e4m3fn."""
    # One float32 copy, changed in place: three times as fast as a new tensor a step.
    scaled = values.to(torch.float32, copy=True)
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
