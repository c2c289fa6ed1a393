"""Codes of a weight that make up for one another's rounding errors: GPTQ on a format's own grid.

Rounding to nearest makes each weight's error as small as it can be. What counts is the error of the output, X W - X Q:
where inputs are correlated, the rounding of one column can be made up for by the columns that are still to be rounded.
With H = Xᵀ X over calibration tokens, columns are taken in the order of falling diag(H), each is rounded to nearest,
and its error is spread over the remaining ones so that tr((W - Q) H (W - Q)ᵀ) is least. The scale stays what it was, so
a runtime sees no difference.

Source: Frantar et al., GPTQ (2022), arXiv:2210.17323. Its Cholesky factor of the inverse of H is taken from one of H:
with J the reversal of rows, J H J = L Lᵀ gives inverse(H) = Uᵀ U with U = J inverse(L) J, upper triangular.
"""

import torch

from bitladder.errors import MeasurementError
from bitladder.formats import E4m3

_COLUMNS_AT_ONCE = 128  # errors are spread at once within so many columns, and over the rest by one product


def compensated_codes(
    weight: torch.Tensor, hessian: torch.Tensor, amax: torch.Tensor, format_: E4m3, damping: float
) -> torch.Tensor:
    """Return the codes of a weight, [out_features, in_features].

    Args:
        weight: [out_features, in_features]; modules that share input and scale may be stacked.
        hessian: Xᵀ X of its inputs, [in_features, in_features] float32, on the same device.
        amax: of the weight, as `format_` scales by it.
        format_: the codes'.
        damping: this share of the mean of the hessian's diagonal is added to it. More of it trusts the calibration
            tokens less; what is infinite rounds to nearest.

    Raises:
        MeasurementError: the hessian is not positive definite.
    """
    scale = format_.scale(amax)
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    factor = _inverse_factor(hessian, order, float(diagonal.mean()) * damping)
    rest = weight.detach().float().t()[order]  # [in_features, out_features]: a column is a row here, in one piece
    codes = torch.empty(rest.shape, dtype=format_.codes(rest[0], amax).dtype, device=rest.device)
    for start in range(0, len(rest), _COLUMNS_AT_ONCE):
        end = min(start + _COLUMNS_AT_ONCE, len(rest))
        block, local = rest[start:end], factor[start:end, start:end]
        errors = torch.empty_like(block)
        for index in range(end - start):
            code = format_.codes(block[index], amax)
            codes[start + index] = code
            errors[index] = (block[index] - format_.restored(code, scale)) / local[index, index]
            block[index + 1 :].addr_(local[index, index + 1 :], errors[index], alpha=-1)
        rest[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    found = torch.empty_like(codes)
    found[order] = codes
    return found.t().contiguous()


def _inverse_factor(hessian: torch.Tensor, order: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the upper triangular U with Uᵀ U = the inverse of the damped hessian, rows and columns in `order`."""
    backwards = order.flip(0)
    reversed_ = hessian[backwards][:, backwards]
    reversed_.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(reversed_)
    if int(failed):
        raise MeasurementError(
            "the products of a module's inputs are not positive definite: too few calibration tokens for its width, or "
            "an input that is always zero; raise measurement.damping, or calibrate on more tokens"
        )
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse: torch.Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1)


def output_error(weight: torch.Tensor, restored: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return |X (W - Q)| / |X W| over the tokens of the hessian, Q being what the codes restore."""
    exact = weight.detach().float()
    difference = exact - restored
    squares = [float(((rows @ hessian) * rows).sum(dtype=torch.float64)) for rows in (difference, exact)]
    return (max(squares[0], 0.0) / squares[1]) ** 0.5 if squares[1] > 0 else 0.0
