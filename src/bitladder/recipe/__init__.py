"""The recipe: the YAML file a user writes, parsed into frozen types.

Unknown keys are refused with the nearest known one. Paths are relative to the recipe's directory; `package:demo/...`
names files that ship with Bitladder. `docs/guide.md` shows every key.
"""

from bitladder.recipe.reading import (
    names_a_file,
    parse_recipe,
    parse_schemes,
    read_recipe,
    resolve_model,
    resolve_path,
    with_absolute_paths,
)
from bitladder.recipe.rows import (
    DEFAULT_SPLIT,
    GENERATED,
    MESSAGES,
    PAIR_KINDS,
    DataSpec,
    HeldOutSpec,
    OtherRowsSpec,
    SampleSpec,
)
from bitladder.recipe.schemes import SchemeSpec
from bitladder.recipe.sections import (
    CONTROL_KINDS,
    HUB_ID,
    SCHEME_PLACE,
    ControlKind,
    ControlSpec,
    MeasureSpec,
    Recipe,
    RefineSpec,
    VllmSpec,
    WorkersSpec,
)
from bitladder.recipe.speed import LoadSpec, Phase, SpeedSpec

__all__ = [
    "CONTROL_KINDS",
    "DEFAULT_SPLIT",
    "GENERATED",
    "HUB_ID",
    "MESSAGES",
    "PAIR_KINDS",
    "SCHEME_PLACE",
    "ControlKind",
    "ControlSpec",
    "DataSpec",
    "HeldOutSpec",
    "LoadSpec",
    "MeasureSpec",
    "OtherRowsSpec",
    "Phase",
    "Recipe",
    "RefineSpec",
    "SampleSpec",
    "SchemeSpec",
    "SpeedSpec",
    "VllmSpec",
    "WorkersSpec",
    "names_a_file",
    "parse_recipe",
    "parse_schemes",
    "read_recipe",
    "resolve_model",
    "resolve_path",
    "with_absolute_paths",
]
