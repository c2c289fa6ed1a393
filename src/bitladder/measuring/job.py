"""What an engine is given, and what it gives back."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from bitladder.data.batches import Batch, DataSet
from bitladder.errors import MeasurementError
from bitladder.formats import Arithmetic, Format, get_format, why_not
from bitladder.models.target import Target
from bitladder.recipe import MeasureSpec
from bitladder.records import QuantGroup
from bitladder.runinfo import Progress

_DAMPING = 0.1
Variant = tuple[QuantGroup, str]  # a group in a format
RawScore = tuple[float, ...]  # (score,) or (score, what of it lies at image-token positions)
BatchScores = dict[str, dict[str, RawScore]]  # group -> format -> raw score of one batch


@dataclass(frozen=True)
class Job:
    """What an engine is asked to do."""

    target: Target
    batches: tuple[Batch, ...]  # all are calibrated on
    scored: tuple[torch.Size, ...]  # [rows, tokens] of each batch that is scored: the first so many
    spec: MeasureSpec
    device: str
    progress: Progress
    # format -> how the device that will serve computes it, where that isn't as it is stored
    arithmetic: Mapping[str, Arithmetic] = field(default_factory=dict)

    @property
    def score_batches(self) -> int:
        """How many batches are scored."""
        return len(self.scored)

    @cached_property
    def left_out(self) -> dict[tuple[str, str], str]:
        """Why a group can't have a format: (its name, the format) -> the reason."""
        asked = ((group, name, why_not(group, name)) for group in self.target.groups for name in self.spec.formats)
        return {(group.name, name): reason for group, name, reason in asked if reason is not None}

    def formats_of(self, group: QuantGroup) -> tuple[str, ...]:
        """Return those of the job's formats that a group can have."""
        return tuple(name for name in self.spec.formats if (group.name, name) not in self.left_out)

    def served(self, group: QuantGroup) -> tuple[Format, ...]:
        """Return them as the device that will serve computes them."""
        return tuple(get_format(name, self.arithmetic) for name in self.formats_of(group))

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """Every group in every format that it can have, a group's together."""
        return tuple((group, name) for group in self.target.groups for name in self.formats_of(group))


def damping_of(spec: MeasureSpec) -> float:
    """Return the damping with which codes are compensated."""
    return _DAMPING if spec.damping is None else spec.damping


def score_batch_count(data: DataSet, spec: MeasureSpec) -> int:
    """Return how many of the batches are scored: the fewest that hold as many samples as were asked for.

    Raises:
        MeasurementError: more samples are to be scored than there are.
    """
    if spec.score_samples is None:
        return len(data.batches)
    if spec.score_samples > data.summary.samples:
        raise MeasurementError(
            f"measurement.score_samples is {spec.score_samples}, calibration.samples is {data.summary.samples}; "
            "score at most as many as are calibrated"
        )
    held = itertools.accumulate(len(batch.labels) for batch in data.batches)
    return next(count for count, samples in enumerate(held, start=1) if samples >= spec.score_samples)


def score_weights(method: str, batches: tuple[Batch, ...]) -> tuple[str, tuple[float, ...]]:
    """Return the unit of a sensitivity, and the weight of each batch's raw score in it.

    ModelOpt's gradient score of a batch is Σ (∂loss/∂y · Δy)² with `loss` the mean over the batch's n tokens: it
    shrinks with n², so a batch of few tokens would weigh most. n² / Σn makes it the score of the summed loss, per
    token. A KL score, estimated by `fisher` or exact, is a sum over tokens: 1 / Σn.
    """
    tokens = [batch.loss_tokens for batch in batches]
    total = sum(tokens)
    if method == "gradient":
        return "nats² per token", tuple(n * n / total for n in tokens)
    return "nats per token", tuple(1.0 / total for _ in tokens)
