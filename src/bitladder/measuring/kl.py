"""Scores by `kl_div`: nats between the original and the model with one group quantised, added up over counted tokens.

A group changes nothing before its own layer. So its layer runs a second time with the group quantised, and what
that gives goes through the layers behind it beside the original: half a forward pass a group on average. What a layer's
groups give goes on together, as one larger batch. What a model adds between two layers would be lost, so a model that
does so is refused.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial as bound
from typing import Any

import torch

from bitladder.data.batches import Batch
from bitladder.formats import get_format
from bitladder.measured import Amax, Codes
from bitladder.measuring.calls import LayerCall
from bitladder.measuring.candidates import Form, InForm, forms_in, forms_of, taken
from bitladder.measuring.decoder import (
    ROWS_AT_ONCE,
    Decoder,
    Pass,
    can_compile,
    compiling,
    copies_fit,
    counted,
    is_whole,
    is_worth_compiling,
    named,
)
from bitladder.measuring.job import BatchScores, Job
from bitladder.measuring.layers import Layers
from bitladder.measuring.scores import LEAST_LOG
from bitladder.records import QuantGroup

_KERNEL_ROWS_AT_ONCE = 1024  # of logits where kernels take them as they are: 311 MB, twice
_COMPILED_FROM = 40_000  # tokens of a shape from which a dozen seconds of compiling layers are worth it
# Of a layer at most, for every format: alone and with each of its groups quantised, for every type of layer and shape.
_COMPILED_FORMS = 64
_TOKENS_TOGETHER = 16384  # of states that go through a layer together: fewer launches, and larger products


@dataclass
class States:
    """Hidden states of a batch in each of these variants: [variants x rows, tokens, hidden]."""

    variants: list[tuple[str, str]]  # the group that is quantised, and in which format
    hidden: torch.Tensor


class KlScorer(ExitStack):
    """KL scores: nats, added up over the batch's counted tokens.

    Args:
        layers: of the model.
        job: what is scored.
        amax: of its modules.
        codes: compensated ones; None: the nearest.
        plain: don't compile, nor keep weights in their formats.
    """

    def __init__(
        self, layers: Layers, job: Job, amax: Amax, codes: Codes | None = None, *, plain: bool = False
    ) -> None:
        super().__init__()
        self.layers, self.job, self.amax, self.codes = layers, job, amax, codes
        self.decoder = Decoder(layers, job, not plain and is_worth_compiling(layers, job, _COMPILED_FROM))
        self.states = len(job.variants) + 1  # of each batch: the original's, and every variant's
        self.forms: dict[tuple[str, str], dict[str, Form]] = {}  # of every variant, where all of them fit
        if not plain and copies_fit(layers, job):
            for group in job.target.groups:
                found = forms_in(layers.model, group, job.served(group), amax, codes)
                self.forms |= {(group.name, name): forms for name, forms in found.items()}
        if self.decoder.compiled:
            config: Any = torch._dynamo.config
            self.enter_context(config.patch(recompile_limit=_COMPILED_FORMS * len(job.spec.formats)))
        self.normalisers, self.kl, self.rows = _normalisers, _kl_of_rows, ROWS_AT_ONCE
        if can_compile(job.device):
            from bitladder.measuring import kernels

            self.normalisers, self.kl, self.rows = kernels.normalisers, kernels.kl_of_rows, _KERNEL_ROWS_AT_ONCE

    @torch.no_grad()
    def scores(self, batches: Sequence[Batch]) -> list[Callable[[], BatchScores]]:
        """Return for each batch a function that waits for its scores.

        All batches go through a layer before the next one is loaded.
        """
        passes = [Pass(batch.to(self.job.device), whole=is_whole(batch)) for batch in batches]
        for current in passes:
            self.decoder.begin(current)
        needed = self.states * sum(current.output.numel() * current.output.element_size() for current in passes)
        if needed > self.layers.memory.free() / 2:
            self.layers.home = "cpu"
        with compiling(self.decoder):
            states = self._through(passes)
        return [self._batch_scores(current, known) for current, known in zip(passes, states, strict=True)]

    def _through(self, passes: Sequence[Pass]) -> list[list[States]]:
        """Bring the batches behind the last layer, and return each one's hidden states in every variant.

        What the variants of a layer give goes through the layers behind it together, as one larger batch.
        """
        states: list[list[States]] = [[] for _ in passes]
        sizes = [self._together(current) for current in passes]
        for index in range(len(self.layers)):
            with self.layers.loaded(index) as layer:
                fresh: list[dict[tuple[str, str], torch.Tensor]] = [{} for _ in passes]
                for group in self.decoder.groups.get(index, ()):
                    for name in self.job.formats_of(group):
                        with self._in_format(group, name):
                            for current, found in zip(passes, fresh, strict=True):
                                found[group.name, name] = self.decoder.run(layer, current.output, current.calls[index])
                for current, known, found, size in zip(passes, states, fresh, sizes, strict=True):
                    for each in known:
                        each.hidden = self.decoder.run(
                            layer, each.hidden, self._call(current, len(each.variants), index)
                        )
                    current.output = self.decoder.run(layer, current.output, current.calls[index])
                    names = list(found)
                    for start in range(0, len(names), size):
                        together = names[start : start + size]
                        known.append(States(together, torch.cat([found[name] for name in together])))
        return states

    def _together(self, current: Pass) -> int:
        """Return how many variants' hidden states at most go through a layer together."""
        is_text = set(current.batch.inputs) == {"input_ids", "attention_mask"}
        return max(1, _TOKENS_TOGETHER // current.batch.labels.numel()) if is_text else 1

    def _call(self, current: Pass, copies: int, index: int) -> LayerCall:
        """Return what a layer is called with for so many copies of a batch."""
        if copies == 1:
            return current.calls[index]
        if copies not in current.copies:
            inputs = {name: torch.cat([value] * copies) for name, value in current.batch.inputs.items()}
            calls, _ = self.layers.calls(Batch(inputs, torch.cat([current.batch.labels] * copies)))
            nothing = torch.empty(0)
            current.copies[copies] = [dataclasses.replace(call, hidden=nothing) for call in calls]
        return current.copies[copies][index]

    @contextlib.contextmanager
    def _in_format(self, group: QuantGroup, name: str) -> Iterator[None]:
        """Let the group's modules give what they would in a format."""
        forms = self.forms.get((group.name, name)) or forms_of(
            self.layers.model, group, get_format(name, self.job.arithmetic), self.amax, self.codes
        )
        with ExitStack() as stack:
            for name, form in forms.items():
                stack.enter_context(taken(self.layers.model.get_submodule(name), InForm, form=form))
            yield

    def _batch_scores(self, current: Pass, states: list[States]) -> Callable[[], BatchScores]:
        original = counted(current.output, current)
        found = [variant for each in states for variant in each.variants]
        others = [counted(part, current) for each in states for part in each.hidden.chunk(len(each.variants))]
        values = dict(zip(found, self._kl(original, others), strict=True))
        variants = self.job.variants
        return bound(named, torch.stack([values[group.name, name] for group, name in variants])[:, None], variants)

    def _kl(self, original: torch.Tensor, others: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return KL(original || other) in nats, added up over the rows, for each of `others` [counted, hidden]."""
        device = self.layers.device
        sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in others]
        for start in range(0, len(original), self.rows):
            rows = slice(start, start + self.rows)
            logits = self.decoder.logits(original[rows].to(device))
            normaliser = self.normalisers(logits)
            for total, other in zip(sums, others, strict=True):
                total += self.kl(logits, normaliser, self.decoder.logits(other[rows].to(device))).sum()
        return sums


def _normalisers(logits: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the sum of exponentials of each row of [rows, vocabulary]: [rows] in float32."""
    return logits.float().logsumexp(-1)


def _kl_of_rows(logits: torch.Tensor, normaliser: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return KL(softmax(logits) || softmax(others)) in nats for each row of [rows, vocabulary]: [rows] in float64.

    With d = log q - log p it is the sum of p (exp(d) - 1 - d), which equals the sum of -p d for exact distributions
    and takes the float32 rounding of the two normalisers out (as in `evaluation`). For small d a term's error is d
    times float32's precision. No term is negative, so that adding them up in float32 loses nothing that counts.
    """
    log_p = (logits.float() - normaliser[:, None]).clamp_min_(LEAST_LOG)
    d = (others.float() - _normalisers(others)[:, None]) - log_p
    return (log_p.exp() * (d.expm1() - d)).sum(-1).double()
