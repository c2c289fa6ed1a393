"""Codes of a weight that make up for one another's rounding errors: GPTQ on a format's own grid.

Rounding to nearest makes each weight's error as small as it can be. What counts is the error of the output, X W - X Q:
where inputs are correlated, the rounding of one column can be made up for by the columns that are still to be rounded.
With H = Xᵀ X over calibration tokens, columns are taken in the order of falling diag(H), each is rounded to nearest,
and its error is spread over the remaining ones so that tr((W - Q) H (W - Q)ᵀ) is least. A runtime sees no difference.

Columns that share a scale are taken together, groups in the order of what their diagonal adds up to. A group's scale is
chosen when it is reached, of the values that its columns have by then: the candidate with the least sum of squared
errors, each weighed with what is lost after all columns behind it have made up for it, 1 / U[j, j]². What all of a
weight shares stays as it was.

The columns before one that is rounded can't make up for its error any more. So a sweep follows, in the same order: each
column takes the value that is best beside all others as they are now, with the scale that it has. It is a walk, too.
With L the lower triangle of H and D its diagonal, one begins at Q + inverse(L) H (W - Q), and its factor is
(inverse(L) D)ᵀ.

Source: Frantar et al., GPTQ (2022), arXiv:2210.17323. Its Cholesky factor of the inverse of H is taken from one of H:
with J the reversal of rows, J H J = L Lᵀ gives inverse(H) = Uᵀ U with U = J inverse(L) J, upper triangular. The sweep
is one of coordinate descent (Behdin et al., QuantEase, 2023, arXiv:2309.01885), that is of Gauss and Seidel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bitladder.errors import MeasurementError
from bitladder.formats.columns import Columns
from bitladder.measuring.decoder import can_compile

_LEAST_EXPONENT = -125  # frexp's of the least float32 whose digits are whole
_COLUMNS_AT_ONCE = 128  # errors are spread at once within so many columns, and over the rest by one product


@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight on a format's grid.

    values: [out_features, in_features] float32.
    scales: as they are stored, float32 [kinds, out_features, groups]; where none depends on columns there is one group.
    steps: what codes are multiplied with, float32 [out_features, groups].
    """

    values: torch.Tensor
    scales: torch.Tensor
    steps: torch.Tensor

    def largest_shift(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the largest distance from a weight in every row, in units of the step, [out_features]."""
        rows, groups = self.steps.shape
        shift = (self.values - weight.detach().float()).abs().reshape(rows, groups, -1).amax(-1)
        return (shift / self.steps).amax(-1)


# A block's values [columns, out_features], what is to be spread of their errors, and scales [kinds, out_features,
# groups].
_Block = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_Walk = Callable[[torch.Tensor, torch.Tensor, Columns, torch.Tensor, torch.Tensor | None], _Block]


def compensated(
    weight: torch.Tensor, hessian: torch.Tensor, columns: Columns, damping: float, *, sweeps: int = 1
) -> Rounded:
    """Return a weight on a format's grid, [out_features, in_features].

    Args:
        weight: [out_features, in_features].
        hessian: Xᵀ X of its inputs, [in_features, in_features] float32, on the same device.
        columns: the grid.
        damping: this share of the mean of the hessian's diagonal is added to it. More of it trusts the calibration
            tokens less; where it is infinite, no error is made up for.
        sweeps: that follow GPTQ's walk.

    Raises:
        MeasurementError: the hessian is not positive definite.
    """
    order, groups = _order(hessian.diagonal(), columns.size)
    damped = hessian[order][:, order]
    damped.diagonal().add_(float(hessian.diagonal().mean()) * damping)
    exact = weight.detach().float().t()[order]  # [in_features, out_features]: a column is a row here, in one piece
    found = _walked(exact.clone(), columns, order, groups, _inverse_factor(damped))
    for _ in range(sweeps):
        found = _swept(exact, found, damped, columns, order, groups)
    return found


def nearest(weight: torch.Tensor, columns: Columns) -> Rounded:
    """Return a weight rounded as if no error were made up for: with the scales that its largest values give."""
    width = weight.shape[1]
    order, groups = torch.arange(width, device=weight.device), list(range(width // columns.size))
    rest, no_factor = weight.detach().float().t().clone(), torch.eye(width, device=weight.device)
    return _walked(rest, columns.of_largest(), order, groups, no_factor)


def _swept(
    exact: torch.Tensor,
    found: Rounded,
    damped: torch.Tensor,
    columns: Columns,
    order: torch.Tensor,
    groups: list[int],
) -> Rounded:
    """Return a rounded weight after one more sweep over its columns; no row's error is larger then.

    Args:
        exact: the weight, [in_features, out_features] in `order`.
        found: what it was rounded to; its scales stay.
        damped: the hessian, in `order`.
        columns: the grid.
        order: of the columns.
        groups: of the groups.
    """
    lower = damped.tril()
    factor = torch.linalg.solve_triangular(lower, damped.diagonal().diag(), upper=False).t()
    values = found.values.t()[order]
    start = values + torch.linalg.solve_triangular(lower, damped @ (exact - values), upper=False)
    return _walked(start, columns, order, groups, factor, found.scales)


def _walked(
    rest: torch.Tensor,
    columns: Columns,
    order: torch.Tensor,
    groups: list[int],
    factor: torch.Tensor,
    scales_of: torch.Tensor | None = None,
) -> Rounded:
    """Walk columns [in_features, out_features] that are in an order, and groups in theirs; `rest` is changed.

    Scales are chosen on the way, but where they are given, as `Rounded` has them.
    """
    size = columns.size
    values = torch.empty_like(rest)
    factors = torch.tensor(columns.factors, device=rest.device)
    walk, scales = walk_on(rest.device), []
    for start in range(0, len(rest), _COLUMNS_AT_ONCE):
        end = min(start + _COLUMNS_AT_ONCE, len(rest))
        here = groups[start // size : -(-end // size)] if size > 1 else [0]
        given = None if scales_of is None else scales_of[..., here]
        own, local = columns.at(here), factor[start:end, start:end]
        found, errors, chosen = walk(rest[start:end], local, own, factors, given)
        values[order[start:end]] = found
        scales.append(chosen)
        rest[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    all_scales = scales[0]
    if size > 1:
        all_scales = torch.cat(scales, -1)[..., sorted(range(len(groups)), key=groups.__getitem__)]
    return Rounded(values.t().contiguous(), all_scales, columns.steps(all_scales))


def walk_on(device: torch.device) -> _Walk:
    """Return what walks a block of columns there: on a GPU a kernel."""
    if not can_compile(device.type):
        return walked
    from bitladder.measuring import walking

    return walking.walked


def walked(
    block: torch.Tensor, local: torch.Tensor, columns: Columns, factors: torch.Tensor, given: torch.Tensor | None
) -> _Block:
    """Walk some columns, whose groups are whole.

    Args:
        block: the columns [columns, out_features], less the errors of those before; changed.
        local: their part of the factor, [columns, columns].
        columns: the grid.
        factors: its, [candidates].
        given: scales of the groups, [kinds, out_features, groups]; None: they are chosen.
    """
    values, errors = torch.empty_like(block), torch.empty_like(block)
    weights = local.diagonal() ** -2
    chosen: list[torch.Tensor] = []
    for index in range(len(block)):
        if index % columns.size == 0 and (columns.size > 1 or not chosen):
            group = slice(index, index + columns.size)
            if given is None:
                candidates = columns.scales(block[group], factors[:, None])
                chosen.append(_best(columns, block[group], candidates, weights[group]))
            else:
                chosen.append(given[..., len(chosen)])
        values[index] = columns.nearest(block[index], chosen[-1])
        errors[index] = (block[index] - values[index]) / local[index, index]
        block[index + 1 :].addr_(local[index, index + 1 :], errors[index], alpha=-1)
    return values, errors, torch.stack(chosen, -1)


def _order(diagonal: torch.Tensor, size: int) -> tuple[torch.Tensor, list[int]]:
    """Return the columns in the order in which they are taken, and the groups of `size` of them in theirs."""
    inside = torch.argsort(diagonal.view(-1, size), dim=1, descending=True, stable=True)
    groups = torch.argsort(diagonal.view(-1, size).sum(1), descending=True, stable=True)
    return (inside + torch.arange(len(inside), device=inside.device)[:, None] * size)[groups].flatten(), groups.tolist()


def _best(columns: Columns, values: torch.Tensor, candidates: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the scales [kinds, out_features] with the least weighed error of a group's values [size, out_features].

    Args:
        columns: the grid.
        values: of the group.
        candidates: [kinds, candidates, out_features].
        weights: of the columns, [size].
    """
    if candidates.shape[1] == 1:
        return candidates[:, 0]
    all_ = values[:, None]
    unit = _unit(values.abs().amax(0))
    error = (((columns.nearest(all_, candidates[:, None]) - all_) * unit) ** 2 * weights[:, None, None]).sum(0)
    best = error.argmin(0)  # the first of equals
    return candidates.gather(1, best.expand(len(candidates), 1, -1))[:, 0]


def _inverse_factor(damped: torch.Tensor) -> torch.Tensor:
    """Return the upper triangular U with Uᵀ U = the inverse of the damped hessian."""
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(failed):
        raise MeasurementError(
            "the products of a module's inputs are not positive definite: too few calibration tokens for its width, or "
            "an input that is always zero; raise measurement.damping, or calibrate on more tokens"
        )
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse: torch.Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1)


def _unit(greatest: torch.Tensor) -> torch.Tensor:
    """Return powers of two that bring numbers of these sizes near 1, and change no digit of them.

    What is very large or very small has no square that is a number.
    """
    return torch.ldexp(torch.ones_like(greatest), -torch.frexp(greatest).exponent.clamp_min(_LEAST_EXPONENT))


def output_errors(weight: torch.Tensor, restored: Sequence[torch.Tensor], inputs: torch.Tensor) -> list[float]:
    """Return |X (W - Q)| / |X W| over inputs X [tokens, in_features], for every Q that codes restore of a weight.

    Where X W is zero, |X (W - Q)| in units of its own: what isn't zero is farther off.
    """
    exact = weight.detach().float()
    unit = _unit(exact.abs().amax())
    lengths = [
        float((inputs @ (rows * unit).t()).square().sum(dtype=torch.float64)) ** 0.5
        for rows in (exact, *(exact - one for one in restored))
    ]
    return [length / (lengths[0] or 1.0) for length in lengths[1:]]
