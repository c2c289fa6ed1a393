"""A block of columns as compensated rounding walks it, as one GPU kernel in Triton.

Rows don't know of one another, so a program takes some of them through all columns of a block, which it keeps in
registers; launching the steps of every column takes some thirty times as long.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from bitladder.formats.column_kernels import kernel_of
from bitladder.formats.columns import Columns

_LEAST = tl.constexpr(2.0**-126)  # of float32 with whole digits
_ROWS, _WARPS = 16, 2  # of a program: as fast as any of sixteen tried on an H100


def walked(
    block: torch.Tensor, local: torch.Tensor, columns: Columns, factors: torch.Tensor, given: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `rounding.walked` does, of up to 128 columns on a GPU; `block` stays as it is."""
    kernel, (size, rows) = kernel_of(columns), block.shape
    block, local = block.contiguous(), local.contiguous()  # the kernel counts in rows of it
    at_once = triton.next_power_of_2(size)
    group = columns.size if columns.size > 1 else at_once
    values, errors = torch.empty_like(block), torch.empty_like(block)
    chosen = block.new_empty(kernel.kinds, rows, -(-size // group)) if given is None else given.contiguous()
    launch: Any = _walked[(triton.cdiv(rows, _ROWS),)]
    launch(
        *(block, local, columns.known, factors, values, errors, chosen),
        *(rows, size, chosen.shape[2], columns.known.stride(0) if kernel.by_row else 0),
        GROUP=group,
        CANDIDATES=len(columns.factors),
        KINDS=kernel.kinds,
        GIVEN=given is not None,
        GREATEST=kernel.greatest,
        SCALES=kernel.scales,
        NEAREST=kernel.nearest,
        COLUMNS=at_once,
        ROWS=_ROWS,
        num_warps=_WARPS,
    )
    return values, errors, chosen


@triton.jit
def _walked(
    block,
    local,
    known,
    factors,
    values,
    errors,
    chosen,
    rows,
    columns,
    groups,
    known_stride,
    GROUP: tl.constexpr,
    CANDIDATES: tl.constexpr,
    KINDS: tl.constexpr,
    GIVEN: tl.constexpr,
    GREATEST: tl.constexpr,
    SCALES: tl.constexpr,
    NEAREST: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    all_ = column[:, None] * rows + row[None, :]
    rest = tl.load(block + all_, mask=inside[:, None] & there[None, :], other=0.0)
    pivots = tl.load(local + column * columns + column, mask=inside, other=1.0)
    weights = (1.0 / (pivots * pivots))[:, None]
    of_rows = tl.load(known + row * known_stride, mask=there, other=1.0)
    for group in range(groups):
        if GIVEN:
            scale = tl.load(chosen + row * groups + group, mask=there, other=1.0)
            zero = tl.load(chosen + ((KINDS - 1) * rows + row) * groups + group, mask=there, other=0.0)
        else:
            own = ((column // GROUP == group) & inside)[:, None]
            least = tl.min(tl.where(own, rest, float("inf")), 0)
            greatest = tl.max(tl.where(own, rest, float("-inf")), 0)
            scale, zero = SCALES(least, greatest, tl.load(factors), of_rows, GREATEST)
            if CANDIDATES > 1:
                # By a power of two that brings them near 1, as `rounding` does: the exponent's bits of the greatest.
                size = tl.maximum(tl.maximum(tl.abs(least), tl.abs(greatest)), _LEAST)
                unit = 1.0 / (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
                lowest = tl.full([ROWS], float("inf"), tl.float32)
                for candidate in range(CANDIDATES):
                    other, other_zero = SCALES(least, greatest, tl.load(factors + candidate), of_rows, GREATEST)
                    away = NEAREST(rest, other[None, :], other_zero[None, :], of_rows[None, :], GREATEST) - rest
                    away *= unit[None, :]
                    error = tl.sum(tl.where(own, away * away * weights, 0.0), 0)
                    better = error < lowest  # the first of equals
                    lowest = tl.where(better, error, lowest)
                    scale = tl.where(better, other, scale)
                    zero = tl.where(better, other_zero, zero)
            tl.store(chosen + row * groups + group, scale, mask=there)
            if KINDS > 1:
                tl.store(chosen + (rows + row) * groups + group, zero, mask=there)
        for at in range(group * GROUP, tl.minimum(group * GROUP + GROUP, columns)):
            value = tl.sum(tl.where((column == at)[:, None], rest, 0.0), 0)
            nearest = NEAREST(value, scale, zero, of_rows, GREATEST)
            error = tl.div_rn(value - nearest, tl.broadcast_to(tl.load(local + at * columns + at), value.shape))
            tl.store(values + at * rows + row, nearest, mask=there)
            tl.store(errors + at * rows + row, error, mask=there)
            shares = tl.load(local + at * columns + column, mask=inside & (column > at), other=0.0)
            rest -= shares[:, None] * error[None, :]
