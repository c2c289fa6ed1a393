"""What a model is given: batches with labels, where they came from, and several sets as one."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from bitladder.data.pairs import Sample
from bitladder.records import DataSummary

IGNORED_LABEL = -100
MIXED = "mixed"  # the kind of several sets in one


@dataclass(frozen=True)
class Batch:
    """What the model is given, and which tokens count.

    inputs: `input_ids` [rows, tokens], `attention_mask` [rows, tokens], and what the processor adds for images.
    labels: [rows, tokens], -100 where a token doesn't count.
    part: which of several sets it is of.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    part: int = 0

    @property
    def predicted(self) -> torch.Tensor:
        """Boolean mask [rows, tokens - 1] of the positions whose next token counts."""
        return self.labels[:, 1:] != IGNORED_LABEL

    @property
    def loss_tokens(self) -> int:
        """Number of tokens that count."""
        return int(self.predicted.sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with all tensors on `device`."""
        inputs = {key: value.to(device) for key, value in self.inputs.items()}
        return Batch(inputs, self.labels.to(device), self.part)


@dataclass(frozen=True)
class DataSet:
    """Batches, what they came from, and the pairs themselves, in the order of the rows (one image+text set alone)."""

    batches: tuple[Batch, ...]
    summary: DataSummary
    samples: tuple[Sample, ...] = ()


def fingerprint(batches: Sequence[Batch]) -> str:
    """Return the hex SHA-256 over every tensor that the model is given, with names, dtypes and shapes."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in [*sorted(batch.inputs.items()), ("labels", batch.labels)]:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def interleaved(sets: Sequence[DataSet]) -> DataSet:
    """Return several sets as one; a single set as it is.

    A batch stands where its middle lies in its own set, as a share of the set's samples. So the first N batches hold
    about the same share of every set, and the same sets give the same order.

    Args:
        sets: at least one; each keeps its batches, in their order.
    """
    if len(sets) == 1:
        return sets[0]
    places: list[tuple[Fraction, int, Batch]] = []
    for index, one in enumerate(sets):
        before = 0
        for batch in one.batches:
            rows = len(batch.labels)
            place = Fraction(2 * before + rows, 2 * one.summary.samples)
            places.append((place, index, replace(batch, part=index)))
            before += rows
    batches = tuple(place[2] for place in sorted(places, key=lambda place: place[:2]))
    parts = [one.summary for one in sets]
    summary = DataSummary(
        source=" + ".join(part.source for part in parts),
        kind=MIXED,
        sha256=fingerprint(batches),
        samples=sum(part.samples for part in parts),
        tokens=sum(part.tokens for part in parts),
        sequence_length=max(part.sequence_length for part in parts),
        batch_size=max(part.batch_size for part in parts),
        seed=parts[0].seed,
        sample_ids=tuple(sample for part in parts for sample in part.sample_ids),
        null_rows=sum(part.null_rows for part in parts),
        parts=tuple(part.model_copy(update={"sample_ids": ()}) for part in parts),
    )
    return DataSet(batches, summary)
