"""Which schemes a recipe asks for."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from bitladder.recipe.kv_cache import KvCache, KvShare
from bitladder.recipe.section import Section, beside_sixteen_bits, check_name
from bitladder.recipe.speed import SpeedSpec

_PERCENT = 100


class SchemeSpec(Section):
    """One scheme of the ladder, asked for in exactly one way."""

    name: str
    coverage: float | None = Field(default=None, gt=0, le=1, description="share of the searched weights, at most")
    effective_bits: float | None = Field(default=None, gt=0, description="at most")
    max_predicted_score: float | None = Field(default=None, description="at most, in the measurement's unit")
    max_kl: float | None = Field(default=None, gt=0, le=100, description="at most, as predicted, in nats per token")
    speed: SpeedSpec | None = Field(default=None, description="at least, as predicted from the recipe's `profile`")
    prefer: Literal["bytes", "prefill", "decode"] = Field(
        default="bytes", description="with max_kl or max_predicted_score: what is least within it, bytes or seconds"
    )
    chosen_by: Literal["score", "kl"] = Field(
        default="score", description="with coverage, effective_bits or speed: what tells damage, scores or a map to KL"
    )
    include: tuple[str, ...] | None = Field(default=None, description="glob patterns of groups or modules to quantise")
    exclude: tuple[str, ...] = Field(default=(), description="glob patterns of groups or modules never quantised")
    format: str | None = Field(default=None, description="with coverage or include: the only one beside bf16")
    formats: tuple[str, ...] | None = Field(
        default=None, description="candidates beside bf16, of those measured; None: all, or `format` alone"
    )
    image_weight: float = Field(
        default=1.0, ge=0, description="weight of image-token positions in the predicted score; text positions have 1"
    )
    kv_cache: KvCache | None = Field(default=None, description="None: the recipe's")

    @field_validator("coverage", mode="before")
    @classmethod
    def _a_share(cls, value: Any) -> Any:
        if isinstance(value, int | float) and 2 < value <= _PERCENT:
            raise ValueError(f"a share of the weights, at most 1; got {value}: did you mean {value / _PERCENT:g}?")
        return value

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        check_name("scheme", self.name)
        ways = ("coverage", "effective_bits", "max_predicted_score", "max_kl", "include", "speed")
        given = [way for way in ways if getattr(self, way) is not None]
        if len(given) != 1:
            raise ValueError(f"scheme {self.name}: give exactly one of {', '.join(ways)}; got {given or 'none'}")
        if self.prefer != "bytes" and self.max_kl is None and self.max_predicted_score is None:
            raise ValueError(f"scheme {self.name}: prefer goes with max_kl or max_predicted_score; leave it out")
        if self.chosen_by == "kl" and (self.coverage, self.effective_bits, self.speed) == (None, None, None):
            raise ValueError(f"scheme {self.name}: chosen_by goes with coverage, effective_bits or speed; leave it out")
        if self.by_kl and self.image_weight != 1:
            way = "chosen_by: kl" if self.max_kl is None else "max_kl"
            raise ValueError(
                f"scheme {self.name}: image_weight weighs scores, and {way} goes by a KL to which all positions "
                "contribute; leave one of the two out"
            )
        if self.formats == ():
            raise ValueError(f"scheme {self.name}: formats names none to quantise to; name one, or leave it out")
        if self.format is not None and self.formats is not None and self.format not in self.formats:
            raise ValueError(
                f"scheme {self.name}: format {self.format} is none of its formats ({', '.join(self.formats)}); "
                "leave one of the two out"
            )
        return self

    @field_validator("formats")
    @classmethod
    def _each_once(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if value is None else beside_sixteen_bits(value)

    @property
    def caches_fp8(self) -> bool:
        """Whether some layers have an FP8 KV cache."""
        return self.kv_cache not in (None, "none")

    @property
    def kv_share(self) -> float | None:
        """The share of the attention layers that have it at most, where a measurement chooses which."""
        return self.kv_cache.fp8 if isinstance(self.kv_cache, KvShare) else None

    @property
    def by_speed(self) -> bool:
        """Whether predicted speeds choose it."""
        return self.speed is not None or self.prefer != "bytes"

    @property
    def by_kl(self) -> bool:
        """Whether a map from scores to KL chooses it."""
        return self.max_kl is not None or self.chosen_by == "kl"

    @property
    def names_its_format(self) -> bool:
        """Whether it says what a group is to have, rather than what it may have."""
        return self.format is not None or self.include is not None

    @property
    def candidates(self) -> tuple[str, ...] | None:
        """The formats beside `bf16` that its groups may have; None: all that are measured."""
        return (self.format,) if self.format is not None else self.formats
