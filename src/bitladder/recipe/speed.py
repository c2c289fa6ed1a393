"""How fast a scheme is to be served, as a recipe asks for it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from bitladder.recipe.section import Section

Phase = Literal["prefill", "decode"]


class LoadSpec(Section):
    """What speeds are predicted for: requests that are given at once, of so many tokens each."""

    requests: int = Field(default=64, gt=0)
    prompt_tokens: int = Field(default=512, gt=0)
    output_tokens: int = Field(default=128, gt=1)


class SpeedSpec(Section):
    """How much faster than 16 bits a scheme is served at least, in one phase."""

    prefill: float | None = Field(default=None, gt=0, le=100, description="times the prefill speed of 16 bits")
    decode: float | None = Field(default=None, gt=0, le=100, description="times the decoding speed of 16 bits")
    requests: int | None = Field(default=None, gt=0, description="given at once; None: the recipe's `load`")
    prompt_tokens: int | None = Field(default=None, gt=0)
    output_tokens: int | None = Field(default=None, gt=1)

    @model_validator(mode="after")
    def _one_phase(self) -> Self:
        if (self.prefill is None) == (self.decode is None):
            raise ValueError("give either prefill or decode, as times the speed of 16 bits")
        return self

    @property
    def target(self) -> tuple[Phase, float]:
        """The phase, and how many times the speed of 16 bits it has at least."""
        if self.prefill is not None:
            return "prefill", self.prefill
        assert self.decode is not None
        return "decode", self.decode
