"""Records of quality: evaluations and control arms."""

from typing import Self

from pydantic import Field, model_validator

from bitladder.records.base import Part, Record, RunInfo
from bitladder.records.measurement import DataSummary
from bitladder.records.scheme import Scheme

KL = "kl"  # the main metric: of the original's next-token distribution to the checkpoint's


class EvalResult(Part):
    """One number about one checkpoint, or about the original where `checkpoint_sha256` is None."""

    metric: str = Field(description="kl, perplexity, top1_agreement, task_accuracy")
    split: str = Field(description="name of the held-out set")
    unit: str
    value: float
    standard_error: float | None
    samples: int
    noise_floor: float | None = Field(description="the same metric for the original in BF16 instead of float32")
    reference: float | None = Field(default=None, description="the same metric for the original, where it has one")


class Evaluation(Record):
    """One checkpoint on every held-out set, against the original."""

    written_by = "evaluate"
    volatile = frozenset({"run"})

    scheme: str
    manifest_sha256: str = Field(description="fingerprint of the checkpoint's manifest")
    model_sha256: str
    data: dict[str, DataSummary] = Field(min_length=1, description="name of the held-out set -> its samples")
    arithmetic: str
    settings_sha256: str = ""
    results: tuple[EvalResult, ...]
    run: RunInfo | None = None

    @model_validator(mode="after")
    def _of_known_sets(self) -> Self:
        seen = [(result.split, result.metric) for result in self.results]
        unknown = sorted({split for split, _ in seen} - set(self.data))
        if unknown:
            raise ValueError(f"result on unknown held-out set {unknown[0]}")
        if len(set(seen)) != len(seen):
            raise ValueError("two results have the same metric and held-out set")
        return self

    def result(self, metric: str, split: str | None = None) -> EvalResult | None:
        """Return the metric's result on the held-out set `split` (None: the first set), or None."""
        wanted = (metric, next(iter(self.data)) if split is None else split)
        return next((result for result in self.results if (result.metric, result.split) == wanted), None)


class ControlArm(Part):
    """Another choice of groups at a scheme's bits, and what it does."""

    scheme: Scheme = Field(description="`asked` says which control it is, and beside which scheme it stands")
    results: tuple[EvalResult, ...]


class Evidence(Record):
    """What the search is worth: control arms beside the schemes, evaluated in memory on the same held-out sets."""

    written_by = "controls"
    volatile = frozenset({"run"})

    measurement_sha256: str
    settings_sha256: str
    data: dict[str, DataSummary] = Field(min_length=1, description="name of the held-out set -> its samples")
    arithmetic: str
    arms: tuple[ControlArm, ...]
    left_out: tuple[str, ...] = Field(default=(), description="arms for which there was no time")
    run: RunInfo | None = None
