"""Records of plans: schemes, and what was simulated for them."""

import math
import statistics
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, field_serializer

from bitladder.recipe import ControlKind, SchemeSpec
from bitladder.records.base import BF16, Grown, Part, Record, RunInfo
from bitladder.records.measurement import DataSummary, Measurement


class Control(Part):
    """What led to a control arm: another choice of groups at a scheme's own bits."""

    control: ControlKind
    beside: str = Field(description="the scheme whose bits it has")
    seed: int | None = Field(default=None, description="of a random one")


class CacheChoice(NamedTuple):
    """In which format a KV cache is stored, and which attention layers' stay in 16 bits all the same."""

    format: str | None = None  # None: 16 bits
    skips: tuple[str, ...] = ()  # attention modules, in network order
    kl: float | None = None  # nats per token, predicted; None: it wasn't measured by layer


def layer_number(module: str) -> int:
    """Return the number of the layer that a module is in, as vLLM counts layers.

    Source: vllm 0.32.0, model_executor/models/utils.py, extract_layer_index: the one number in a module's name.
    """
    return next(int(part) for part in module.split(".") if part.isdigit())


class Scheme(Grown, Record):
    """The format of every quant group, and what it costs and is predicted to do."""

    written_by = "plan"
    later = frozenset({"kv_cache_skips", "kv_cache_kl"})
    # What is said of the scheme, not what it is: one scheme more must not make this one's checkpoint stale.
    volatile = frozenset({"nested_in", "standard_error", "text_only_changes", "kv_cache_kl"})

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
        "asked can't be met then; None: image positions are not known apart, or KL chose it",
    )
    exclude_modules: tuple[str, ...] = Field(
        description="exact checkpoint names of the linear modules left alone, and of fused layers that vLLM asks for"
    )
    kv_cache_format: str | None = Field(default=None, description="None: 16 bits")
    kv_cache_skips: tuple[str, ...] = Field(
        default=(), description="attention modules whose keys and values stay in 16 bits all the same"
    )
    kv_cache_kl: float | None = Field(
        default=None, description="of the cache alone, as predicted, in nats per token; None: not measured by layer"
    )
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
    def kv_cache(self) -> CacheChoice:
        """What becomes of its KV cache."""
        return CacheChoice(self.kv_cache_format, self.kv_cache_skips, self.kv_cache_kl)

    @property
    def by_name(self) -> bool:
        """Whether its groups were named, so that no score chose them."""
        return isinstance(self.asked, SchemeSpec) and self.asked.include is not None

    def quantised_groups(self) -> frozenset[str]:
        """Return the names of the groups that this scheme quantises."""
        return frozenset(group for group, format_name in self.formats.items() if format_name != BF16)


class SimulatedKls(Record):
    """KLs of simulated schemes on the samples by which schemes are chosen, each kept as soon as it is known."""

    settings_sha256: str = Field(description="digest of the measurement, the samples and the arithmetic")
    kl: dict[str, float] = Field(description="digest of a scheme's formats, KV cache included -> nats per token")


class KlPoint(Part):
    """A scheme that was simulated to learn which KL its predicted score means."""

    name: str
    scores: dict[str, float] = Field(description="predicted, by format, in the measurement's unit")
    weights: dict[str, int] = Field(description="searched weights by format")
    kl: float = Field(description="measured, in nats per token")


class KlPoints(Record):
    """What maps predicted scores to KL: a few schemes, simulated on validation samples, or scored calibration ones."""

    volatile = frozenset({"run"})

    measurement_sha256: str
    settings_sha256: str
    data: DataSummary = Field(description="validation or calibration data: held-out data must not choose a scheme")
    samples: int = Field(description="of it that were used, the first ones")
    points: tuple[KlPoint, ...]
    run: RunInfo | None = None


class LayerKl(Part):
    """What an FP8 KV cache does in one attention layer alone."""

    layer: str = Field(description="the attention module")
    kl: tuple[float, ...] = Field(description="to the original, in nats, added up over each sample's counted tokens")


class KvDamage(Record):
    """What an FP8 KV cache does in each layer alone, on the first samples by which schemes are chosen."""

    FILE_NAME: ClassVar[str] = "kv_damage.json"
    written_by = "plan"
    volatile = frozenset({"run"})

    measurement_sha256: str
    settings_sha256: str
    tokens: tuple[int, ...] = Field(description="that count, of each sample that was used, the first ones")
    layers: tuple[LayerKl, ...] = Field(description="in network order")
    run: RunInfo | None = None

    def of_layers(self) -> dict[str, float]:
        """Return each layer's KL in nats per token."""
        return {one.layer: math.fsum(one.kl) / sum(self.tokens) for one in self.layers}

    def medians(self) -> dict[str, float]:
        """Return the median over samples of each layer's KL in nats per token: of a few tokens it isn't made."""
        return {
            one.layer: statistics.median(kl / n for kl, n in zip(one.kl, self.tokens, strict=True) if n)
            for one in self.layers
        }

    def standard_error(self, layer: LayerKl) -> float | None:
        """Return the standard error of a layer's KL over the samples; None: there is one."""
        count, mean = len(self.tokens), math.fsum(layer.kl) / sum(self.tokens)
        if count < 2:
            return None
        squares = math.fsum((kl - mean * n) ** 2 for kl, n in zip(layer.kl, self.tokens, strict=True))
        return math.sqrt(count / (count - 1) * squares) / sum(self.tokens)


class Refinement(Part):
    """What refining one scheme in context came to."""

    scheme: str
    planned_sha256: str = Field(description="fingerprint of the scheme as planned")
    kl_planned: float = Field(description="nats per token, on the samples by which schemes are chosen")
    kl_refined: float = Field(description="nats per token, on the same")
    evaluations: int = Field(description="simulated schemes that it took")
    changes: dict[str, str] = Field(description="group -> format, where it isn't the planned one")


class Refinements(Record):
    """Schemes whose groups were swapped at their edge while the KL on the samples that choose them fell."""

    volatile = frozenset({"run"})

    measurement_sha256: str
    settings_sha256: str
    data: DataSummary = Field(description="validation or calibration data: held-out data must not choose a scheme")
    samples: int = Field(description="of it that were used, the first ones")
    refinements: tuple[Refinement, ...]
    run: RunInfo | None = None
