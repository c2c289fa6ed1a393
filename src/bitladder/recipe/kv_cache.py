"""In which format a recipe wants the KV cache, and of how many layers."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from bitladder.recipe.section import Section, shortened


class KvShare(Section):
    """An FP8 KV cache of some attention layers, those in which it does least damage."""

    fp8: float = Field(gt=0, lt=1, description="share of the attention layers, at most")


def _as_asked(value: Any) -> Any:
    """Return the value; raises ValueError where it is none of the three."""
    if value in ("none", "fp8") or isinstance(value, KvShare):
        return value
    share = value.get("fp8") if isinstance(value, Mapping) and set(value) == {"fp8"} else None
    if isinstance(share, bool) or not isinstance(share, int | float):
        given = "nothing" if value is None else shortened(value)
        raise ValueError(f"give none, fp8, or the share of the layers that have it, as {{fp8: 0.75}}, not {given}")
    if not 0 < share < 1:
        raise ValueError(
            f"fp8 is a share of the attention layers, between 0 and 1, not {share}; for all of them write kv_cache: fp8"
        )
    return value


KvCache = Annotated[Literal["none", "fp8"] | KvShare, BeforeValidator(_as_asked)]
