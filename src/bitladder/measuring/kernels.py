"""The KL of two sets of logits as GPU kernels, in Triton, which comes with torch for NVIDIA GPUs.

A row of 151,936 logits is read twice, in its own dtype, and nothing else of its size is written: torch makes several
passes of it, and compiled by torch for equal bits everywhere it takes twice as long. Every row is one program, which
adds up in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from bitladder.measuring.scores import LEAST_LOG

_BLOCK, _WARPS = 8192, 16  # the fastest of seven tried on an H100, with 256 rows at once and with 1024


def normalisers(logits: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the sum of exponentials of each row of [rows, vocabulary] on a GPU: [rows], float32."""
    found = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    launch: Any = _normalisers[(len(logits),)]
    launch(logits.contiguous(), found, logits.shape[1], BLOCK=_BLOCK, num_warps=_WARPS)
    return found


def kl_of_rows(logits: torch.Tensor, normaliser: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return KL(softmax(logits) || softmax(others)) in nats for each row of [rows, vocabulary]: [rows] in float64.

    Args:
        logits: on a GPU.
        normaliser: `normalisers(logits)`.
        others: of the same shape and dtype, on the same GPU.
    """
    found = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    launch: Any = _kl[(len(logits),)]
    arguments = logits.contiguous(), others.contiguous(), normaliser, normalisers(others), found
    launch(*arguments, logits.shape[1], LEAST_LOG, BLOCK=_BLOCK, num_warps=_WARPS)
    return found


@triton.jit
def _normalisers(logits, found, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + columns
        values = tl.load(logits + row * vocabulary + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        before, largest = largest, tl.maximum(largest, tl.max(values, 0))
        total = total * tl.exp(before - largest) + tl.exp(values - largest)
    tl.store(found + row, largest + tl.log(tl.sum(total, 0)))


@triton.jit
def _kl(logits, others, normaliser, other_normaliser, found, vocabulary, least, BLOCK: tl.constexpr):
    """Add up p (exp(d) - 1 - d) with d = log q - log p, by its Taylor series where d is small."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    p_shift = tl.load(normaliser + row)
    q_shift = tl.load(other_normaliser + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + columns
        there = at < vocabulary
        p = tl.load(logits + row * vocabulary + at, mask=there, other=0.0).to(tl.float32)
        q = tl.load(others + row * vocabulary + at, mask=there, other=0.0).to(tl.float32)
        log_p = tl.maximum(p - p_shift, least)
        d = (q - q_shift) - log_p
        series = 1 / 24 + d * (1 / 120 + d * (1 / 720 + d / 5040))
        series = d * d * (0.5 + d * (1 / 6 + d * series))
        excess = tl.where(tl.abs(d) < 0.5, series, tl.exp(d) - 1 - d)
        total += tl.where(there, tl.exp(log_p) * excess, 0.0)
    tl.store(found + row, tl.sum(total, 0).to(tl.float64))
