"""What every section of a recipe has in common."""

import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from bitladder.reading import twice

SIXTEEN_BITS = "bf16"  # among formats it says nothing: every group may keep its 16 bits
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MOST_NAME = 100  # characters: it becomes a part of file names
_MAX_SHOWN = 100  # characters of a wrong value that an error repeats
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def shortened(value: Any) -> str:
    """Return what was given, in at most so many characters."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


def check_name(of: str, name: str) -> None:
    """Raise ValueError where a name can't be a part of file names; `of` says whose it is."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{of} name {shortened(name)}: use letters, digits, '.', '_' and '-'")
    if len(name) > _MOST_NAME:
        raise ValueError(f"{of} name {shortened(name)} has {len(name)} characters; use at most {_MOST_NAME}")


def beside_sixteen_bits(formats: Sequence[str]) -> tuple[str, ...]:
    """Return the formats but that of 16 bits; raises ValueError where one is given twice."""
    again = twice(formats)
    if again:
        raise ValueError(f"format {again[0]} is given twice; name each once")
    return tuple(name for name in formats if name != SIXTEEN_BITS)


class Section(BaseModel):
    """A frozen part of the recipe that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true, false and quoted digits where a number is wanted, and text that isn't any."""
        kind = cls.model_fields[str(info.field_name)].annotation
        kinds = {kind, *get_args(kind)}
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError(f"give a value, not {str(value).lower()}")
        if isinstance(value, str) and kinds & {int, float} and str not in kinds:
            raise ValueError(f"give a number, not the text {shortened(value)}")
        for text in (value, *value) if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str) and _NO_TEXT.search(text):
                raise ValueError(f"{shortened(text)} holds a character that no name can have")
        return value
