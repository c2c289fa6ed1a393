"""How fast a scheme is to be served, as a recipe asks for it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from bitladder.recipe.section import Section

Phase = Literal["prefill", "decode"]
MAX_SPECULATIVE_TOKENS = 100  # more than any drafter of vLLM is served with


class LoadSpec(Section):
    """What speeds are predicted for: requests that are given at once, of so many tokens each."""

    requests: int = Field(default=64, gt=0)
    prompt_tokens: int = Field(default=512, gt=0)
    output_tokens: int = Field(default=128, gt=1)
    speculative_tokens: int = Field(
        default=0,
        ge=0,
        le=MAX_SPECULATIVE_TOKENS,
        description="drafted for each request and step of decoding, vLLM's `num_speculative_tokens`; 0: none",
    )


class SpeedSpec(Section):
    """How much faster than 16 bits a scheme is served at least, in one phase."""

    prefill: float | None = Field(default=None, gt=0, le=100, description="times the prefill speed of 16 bits")
    decode: float | None = Field(default=None, gt=0, le=100, description="times the decoding speed of 16 bits")
    requests: int | None = Field(default=None, gt=0, description="given at once; None: the recipe's `load`")
    prompt_tokens: int | None = Field(default=None, gt=0)
    output_tokens: int | None = Field(default=None, gt=1)
    speculative_tokens: int | None = Field(
        default=None, ge=0, le=MAX_SPECULATIVE_TOKENS, description="of decoding only"
    )

    @model_validator(mode="after")
    def _one_phase(self) -> Self:
        if (self.prefill is None) == (self.decode is None):
            raise ValueError("give either prefill or decode, as times the speed of 16 bits")
        if self.prefill is not None and self.speculative_tokens is not None:
            raise ValueError(
                "speculative_tokens are verified in steps of decoding, and prefill has none of them; give decode, or "
                "leave them out"
            )
        return self

    @property
    def target(self) -> tuple[Phase, float]:
        """The phase, and how many times the speed of 16 bits it has at least."""
        if self.prefill is not None:
            return "prefill", self.prefill
        assert self.decode is not None
        return "decode", self.decode
