"""How a recipe's YAML becomes a `Recipe`: what is wrong with it in one line, and its paths made absolute."""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from bitladder.errors import RecipeError
from bitladder.reading import read_bytes
from bitladder.recipe.rows import GENERATED, MESSAGES, DataSpec, RowsT
from bitladder.recipe.schemes import SchemeSpec
from bitladder.recipe.section import Section, shortened
from bitladder.recipe.sections import HUB_ID, Recipe, RuntimesSpec

_PACKAGE_PREFIX = "package:"
_SURELY_MEANT, _PERHAPS_MEANT = 0.75, 0.5  # least likeness of a key to one that is known. Source: difflib's ratio
_SAID_FIRST = {"extra_forbidden": 0, "missing": 2}  # kinds of errors in the order in which they are told; others 1
_MOST_PART = 255  # bytes of one part of a path. Source: NAME_MAX of Linux
LineOf = Callable[[Sequence[int | str]], int | None]  # where a key stands in what was written


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a key's type names."""
    options = [annotation, *get_args(annotation)]
    return [one for one in options if isinstance(one, type) and issubclass(one, BaseModel)]


def _section_at(section: Any, location: Sequence[int | str]) -> Any:
    """Return the section that lies at `location` inside `section`."""
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            section = next(iter(_sections_of(section.model_fields[part].annotation)), section)
    return section


def _homes(key: str, section: type[BaseModel], place: str = "") -> list[str]:
    """Return where in a section, however deep, a key is known: as `measurement.device`."""
    found = []
    for name, field in section.model_fields.items():
        for inner in _sections_of(field.annotation):
            found += [f"{place}{name}.{key}"] if key in inner.model_fields else []
            found += _homes(key, inner, f"{place}{name}.")
    return found


def _unknown(location: tuple[int | str, ...], section: type[Section]) -> str:
    """Return what to say of a key that isn't known where it stands."""
    key, known = str(location[-1]), list(_section_at(section, location[:-1]).model_fields)
    place = "".join(f"{part}." for part in location[:-1] if isinstance(part, str))
    near = difflib.get_close_matches(key, known, n=1, cutoff=_SURELY_MEANT)
    homes = [] if near else _homes(key, section)
    further_in = [home for home in homes if home.startswith(place)]
    if further_in:
        hint = f"it belongs further in: {' or '.join(further_in)}"
    elif len(homes) == 1:
        hint = f"it belongs elsewhere: {homes[0]}"
    else:  # what several other sections know, as `name`, says nothing of what was meant
        near = [] if homes else difflib.get_close_matches(key, known, n=1, cutoff=_PERHAPS_MEANT)
        hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
    return f"unknown key '{'.'.join(map(str, location))}'; {hint}"


def _wanted(found: Mapping[str, Any], section: type[Section], location: tuple[int | str, ...]) -> str:
    """Return what is wrong with a value, as pydantic found it, in words of a recipe."""
    if found["type"] == "tuple_type":
        example = ", a dash before each entry" if isinstance(found["input"], Mapping) else ", as [a, b]"
        return f"give a list{example}"
    if found["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"give a mapping of keys: {', '.join(_section_at(section, location).model_fields)}"
    return str(found["msg"]).removeprefix("Value error, ").replace("a valid tuple", "a list").replace("Tuple", "List")


def _as_written(location: tuple[int | str, ...], content: Any) -> tuple[int | str, ...]:
    """Return where `location` is in what was written: without the index where one mapping stands for a list of one."""
    written: list[int | str] = []
    for part in location:
        if isinstance(part, int) and isinstance(content, Mapping):
            continue
        written.append(part)
        known = isinstance(content, Mapping) and part in content
        if known or (isinstance(part, int) and isinstance(content, list | tuple) and part < len(content)):
            content = content[part]
        else:
            content = None
    return tuple(written)


def _one_line(
    error: ValidationError, origin: str, section: type[Section], content: Any = None, line_of: LineOf | None = None
) -> RecipeError:
    """Return the first validation error as one line: where, what was given, what is possible."""
    # A misspelt key is also a missing one, and what is written says more than what isn't.
    first = min(error.errors(), key=lambda found: _SAID_FIRST.get(found["type"], 1))
    location = _as_written(first["loc"], content)
    line = line_of(location) if line_of is not None and location else None
    place = origin if line is None else f"{origin} line {line}"
    if first["type"] == "extra_forbidden":
        return RecipeError(f"{place}: {_unknown(location, section)}")
    where = f"{'.'.join(map(str, location))}: " if location else ""
    given = "" if first["type"] in ("missing", "value_error") else f" (got {shortened(first['input'])})"
    return RecipeError(f"{place}: {where}{_wanted(first, section, location)}{given}")


def parse_recipe(content: Any, origin: str, line_of: LineOf | None = None) -> Recipe:
    """Return the recipe that `content` (parsed YAML) describes; `origin` names it in errors.

    Args:
        content: of the recipe.
        origin: where it comes from.
        line_of: says in which line of that a key stands.

    Raises:
        RecipeError: one line that names the key, what was given and what is possible.
    """
    if not isinstance(content, Mapping):
        what = "is empty" if content is None else f"holds {shortened(content)}"
        needed = ", ".join(name for name, field in Recipe.model_fields.items() if field.is_required())
        raise RecipeError(
            f"{origin} {what}; a recipe is a mapping of keys, of which {needed} are needed: see recipes/, or write one "
            "with `bitladder init MODEL`"
        )
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise _one_line(error, origin, Recipe, content, line_of) from error


def parse_schemes(entries: Sequence[dict[str, Any]]) -> tuple[SchemeSpec, ...]:
    """Return the schemes that `entries` (as in a recipe's `schemes`) ask for.

    Raises:
        RecipeError: none are given, or one is malformed.
    """
    if not entries:
        raise RecipeError("no scheme is asked for; give --coverage or --effective-bits")
    try:
        return tuple(SchemeSpec.model_validate(entry) for entry in entries)
    except ValidationError as error:
        raise _one_line(error, "scheme", SchemeSpec) from error


def resolve_path(path: str, base: Path) -> str:
    """Return `path` as absolute: `package:...` inside the installed package, anything else relative to `base`.

    Raises:
        RecipeError: no path of this system.
    """
    path = _usable(path)
    if path.startswith(_PACKAGE_PREFIX):
        return str(Path(__file__).parents[1] / path.removeprefix(_PACKAGE_PREFIX))
    try:
        return str((base / Path(path).expanduser()).resolve())
    except (OSError, RuntimeError, ValueError) as error:  # no such user; links in a circle
        raise RecipeError(f"the path {shortened(path)} can't be used: {error}") from error


def _usable(path: str) -> str:
    """Return a path as it is; raises RecipeError where the system would refuse to look for it."""
    if any(len(os.fsencode(part)) > _MOST_PART for part in path.split("/")):
        raise RecipeError(f"the path {shortened(path)} has a part of more than {_MOST_PART} bytes; shorten it")
    return path


def names_a_file(path: str) -> bool:
    """Return whether a path that isn't there is meant as a file, not as a data set of the Hub."""
    return path.startswith((".", "~", "/", _PACKAGE_PREFIX)) or Path(path).suffix in (".jsonl", ".json")


def resolve_model(path: str, base: Path) -> str:
    """Return an absolute path where `path` is (or looks like) a directory, and a Hub id as it is.

    Raises:
        RecipeError: no path of this system.
    """
    looks_like_hub_id = HUB_ID.fullmatch(_usable(path)) and not path.startswith(".")
    if looks_like_hub_id and not (base / path).exists():
        return path
    return resolve_path(path, base)


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in the YAML file at `path`, with absolute paths.

    Raises:
        RecipeError: the file is missing, isn't YAML, or isn't a recipe.
    """
    from bitladder.recipe.yaml_text import line_of, parse_yaml

    try:
        text = read_bytes(path)
        content = parse_yaml(text)
    except FileNotFoundError:
        raise RecipeError(f"recipe {path} does not exist; see recipes/ for examples") from None
    except IsADirectoryError:
        raise RecipeError(f"recipe {path} is a directory; name a YAML file") from None
    except OSError as error:
        raise RecipeError(f"recipe {path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise RecipeError(f"{path} is not YAML that can be read: {error}") from error
    recipe = parse_recipe(content, str(path), lambda location: line_of(text, location))
    return with_absolute_paths(recipe, path.resolve().parent)


def with_absolute_paths(recipe: Recipe, base: Path) -> Recipe:
    """Return the recipe with its paths made absolute: they are relative to `base`.

    Raises:
        RecipeError: no path of this system.
    """

    def data(spec: DataSpec) -> DataSpec:
        if spec.kind == GENERATED:
            return spec
        of_the_hub = spec.kind == "huggingface" or (spec.kind == MESSAGES and not names_a_file(spec.path))
        if of_the_hub and not (base / _usable(spec.path)).exists():
            return spec
        return spec.model_copy(update={"path": resolve_path(spec.path, base)})

    def rows(sets: Sequence[RowsT]) -> tuple[RowsT, ...]:
        return tuple(one if one.data is None else one.model_copy(update={"data": data(one.data)}) for one in sets)

    if recipe.profile is not None and ("/" in recipe.profile or names_a_file(recipe.profile)):
        recipe = recipe.model_copy(update={"profile": resolve_path(recipe.profile, base)})
    vllm = recipe.runtimes.vllm
    if vllm is not None:
        # Not resolved: the interpreter of a virtual environment is a link, and is known by the link's place.
        python = os.path.normpath(base / os.path.expanduser(_usable(vllm.python)))
        recipe = recipe.model_copy(update={"runtimes": RuntimesSpec(vllm=vllm.model_copy(update={"python": python}))})
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"path": resolve_model(recipe.model.path, base)}),
            "calibration": tuple(spec.model_copy(update={"data": data(spec.data)}) for spec in recipe.calibration),
            "validation": rows(recipe.validation),
            "held_out": rows(recipe.held_out),
            "output": resolve_path(recipe.output, base),
        }
    )
