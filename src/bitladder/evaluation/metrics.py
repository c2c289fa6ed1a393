"""Sums over tokens of what is compared: KL, log-probabilities, agreement."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bitladder.errors import ModelError

EXPORT_AGAIN = "export this scheme again"
_TOKENS_AT_ONCE = 256  # rows of [tokens, vocabulary] compared at a time
_MAX_MEAN_NLL = 300.0  # nats per token; chance is log(vocabulary), about 12. Keeps exp() finite


@dataclass
class Sums:
    """Per row of the data: counted tokens, and sums over them."""

    tokens: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    agree: list[int] = field(default_factory=list)

    def ratio(self, values: Sequence[float]) -> tuple[float, float | None]:
        """Return Σ values / Σ tokens and its standard error (None with one row)."""
        total, rows = sum(self.tokens), len(self.tokens)
        mean = math.fsum(values) / total
        if rows < 2:
            return mean, None
        squares = math.fsum((v - mean * n) ** 2 for v, n in zip(values, self.tokens, strict=True))
        return mean, math.sqrt(rows / (rows - 1) * squares) / total

    def perplexity(self) -> tuple[float, float | None]:
        """Return exp(mean negative log-likelihood) and its standard error, to first order."""
        mean, error = self.ratio(self.nll)
        value = math.exp(mean)
        return value, None if error is None else value * error


def check_nll(sums: Sums, what: str) -> None:
    """Raise ModelError where the mean negative log-likelihood is beyond any model's."""
    mean = sums.ratio(sums.nll)[0]
    if mean > _MAX_MEAN_NLL:
        raise ModelError(
            f"{what} gives the held-out tokens {mean:.0f} nats each, so that no perplexity can be stated: its weights "
            f"or scales are wrong; {EXPORT_AGAIN}, or check the original"
        )


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return KL(p ‖ q) [tokens] in float64 nats, from float32 log-probabilities [tokens, vocabulary].

    Σ p · (log p - log q) - p + q: the last two cancel for exact distributions, and in float32 they take the rounding of
    the two normalisers out of the sum (relative error of a KL of 10⁻³ on SmolLM2: 10⁻⁵ instead of 5 · 10⁻⁴).
    """
    exp_p = p.exp()
    return (exp_p * (p - q)).sub_(exp_p).add_(q.exp()).sum(-1, dtype=torch.float64)


def add_rows(sums: Sums, batch: Any, reference: torch.Tensor, ours: torch.Tensor) -> None:
    """Add what a batch gives; the reference comes to the device of `ours` piece by piece."""
    mask = batch.predicted
    targets = batch.labels[:, 1:][mask].to(ours.device)
    kl, nll, agree = [], [], []
    for start in range(0, len(ours), _TOKENS_AT_ONCE):
        q = ours[start : start + _TOKENS_AT_ONCE]
        p = reference[start : start + _TOKENS_AT_ONCE].to(ours.device)
        kl.append(_kl(p, q))
        nll.append(-q.gather(-1, targets[start : start + _TOKENS_AT_ONCE, None])[:, 0].double())
        agree.append(p.argmax(-1) == q.argmax(-1))
    per_row = mask.sum(-1).tolist()
    columns = [torch.split(torch.cat(values).cpu(), per_row) for values in (kl, nll, agree)]
    for row_kl, row_nll, row_agree in zip(*columns, strict=True):
        if not len(row_kl):
            continue
        sums.tokens.append(len(row_kl))
        sums.kl.append(float(row_kl.sum()))
        sums.nll.append(float(row_nll.sum()))
        sums.agree.append(int(row_agree.sum()))
