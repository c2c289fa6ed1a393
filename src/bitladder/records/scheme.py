"""Records of plans: schemes, and what was simulated for them."""

from typing import Any, Literal

from pydantic import Field, field_serializer

from bitladder.recipe import ControlKind, SchemeSpec
from bitladder.records.base import BF16, Part, Record, RunInfo
from bitladder.records.measurement import DataSummary, Measurement


class Control(Part):
    """What led to a control arm: another choice of groups at a scheme's own bits."""

    control: ControlKind
    beside: str = Field(description="the scheme whose bits it has")
    seed: int | None = Field(default=None, description="of a random one")


class Scheme(Record):
    """The format of every quant group, and what it costs and is predicted to do."""

    written_by = "plan"
    # What is said of the scheme, not what it is: one scheme more must not make this one's checkpoint stale.
    volatile = frozenset({"nested_in", "standard_error", "text_only_changes"})

    name: str
    measurement_sha256: str
    asked: SchemeSpec | Control = Field(description="the recipe's entry for this scheme, or which control arm it is")
    formats: dict[str, str] = Field(description="group name -> format; `bf16` is left as in the source")
    effective_bits: float = Field(description="Σ weight bits / Σ weights over the searched groups")
    coverage: float = Field(description="share of the searched weight elements that are quantised")
    searched_weights: int
    weight_bits: int
    weight_bytes: int = Field(description="the searched weights and their scales on disk")
    predicted_score: float
    score_unit: str
    standard_error: float | None = Field(
        default=None, description="of the predicted score over the scoring batches; None: there is one, or not planned"
    )
    text_only_changes: int | Literal["unattainable"] | None = Field(
        default=None,
        description="groups that would have another format if text positions alone counted; unattainable: what is "
        "asked can't be met then; None: image positions are not known apart",
    )
    exclude_modules: tuple[str, ...] = Field(
        description="exact checkpoint names of the linear modules left alone, and of fused layers that vLLM asks for"
    )
    kv_cache_format: str | None = Field(default=None, description="None: 16 bits")
    nested_in: tuple[str, ...] = Field(default=(), description="schemes that quantise all of its groups and more")

    @field_serializer("asked")
    def _as_given(self, asked: SchemeSpec | Control) -> dict[str, Any]:
        return asked.model_dump(mode="json", exclude_defaults=True)

    def weigh(self, measurement: Measurement) -> Measurement:
        """Return the measurement with image positions weighed as they were to plan this scheme.

        Raises:
            MeasurementError: they are not known apart.
        """
        return measurement.weigh_images(self.asked.image_weight if isinstance(self.asked, SchemeSpec) else 1.0)

    def narrow(self, measurement: Measurement) -> Measurement:
        """Return the measurement without the formats that none of this scheme's groups may have.

        Raises:
            MeasurementError: it hasn't these formats.
        """
        return measurement.only(self.asked.candidates if isinstance(self.asked, SchemeSpec) else None)

    @property
    def by_name(self) -> bool:
        """Whether its groups were named, so that no score chose them."""
        return isinstance(self.asked, SchemeSpec) and self.asked.include is not None

    def quantised_groups(self) -> frozenset[str]:
        """Return the names of the groups that this scheme quantises."""
        return frozenset(group for group, format_name in self.formats.items() if format_name != BF16)


class SimulatedKls(Record):
    """KLs of simulated schemes on the scored calibration samples, each kept as soon as it is known."""

    settings_sha256: str = Field(description="digest of the measurement, the samples and the arithmetic")
    kl: dict[str, float] = Field(description="digest of a scheme's formats -> nats per token")


class KlPoint(Part):
    """A scheme that was simulated to learn which KL its predicted score means."""

    name: str
    scores: dict[str, float] = Field(description="predicted, by format, in the measurement's unit")
    kl: float = Field(description="measured, in nats per token")


class KlPoints(Record):
    """What maps predicted scores to KL: a few schemes, simulated on the scored calibration samples."""

    volatile = frozenset({"run"})

    measurement_sha256: str
    settings_sha256: str
    data: DataSummary = Field(description="calibration data: held-out data must not choose a scheme")
    samples: int = Field(description="of it that were used, the first ones")
    points: tuple[KlPoint, ...]
    run: RunInfo | None = None


class Refinement(Part):
    """What refining one scheme in context came to."""

    scheme: str
    planned_sha256: str = Field(description="fingerprint of the scheme as planned")
    kl_planned: float = Field(description="nats per token, on calibration samples")
    kl_refined: float = Field(description="nats per token, on the same")
    evaluations: int = Field(description="simulated schemes that it took")
    changes: dict[str, str] = Field(description="group -> format, where it isn't the planned one")


class Refinements(Record):
    """Schemes whose groups were swapped at their edge while the KL on the scored calibration samples fell."""

    volatile = frozenset({"run"})

    measurement_sha256: str
    settings_sha256: str
    data: DataSummary = Field(description="calibration data: held-out data must not choose a scheme")
    samples: int = Field(description="of it that were used, the first ones")
    refinements: tuple[Refinement, ...]
    run: RunInfo | None = None
