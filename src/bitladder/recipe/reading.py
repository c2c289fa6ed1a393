"""How a recipe's YAML becomes a `Recipe`: what is wrong with it in one line, and its paths made absolute."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from bitladder.errors import RecipeError
from bitladder.reading import read_bytes
from bitladder.recipe.section import Section, shortened
from bitladder.recipe.sections import (
    GENERATED,
    MESSAGES,
    DataSpec,
    Recipe,
    RuntimesSpec,
    SchemeSpec,
)

_PACKAGE_PREFIX = "package:"
_MOST_PART = 255  # bytes of one part of a path. Source: NAME_MAX of Linux


def _known_keys(section: Any, location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that are known at `location` inside `section` (where an unknown one was found)."""
    for part in location[:-1]:
        if isinstance(part, int) or not (isinstance(section, type) and issubclass(section, BaseModel)):
            continue
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), section)
    return list(section.model_fields)


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


def _one_line(error: ValidationError, origin: str, section: type[Section], content: Any = None) -> RecipeError:
    """Return the first validation error as one line: where, what was given, what is possible."""
    # A misspelt key is also a missing one: the unknown key says more.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    location = _as_written(first["loc"], content)
    where = ".".join(str(part) for part in location) or "(top level)"
    if first["type"] == "extra_forbidden":
        known = _known_keys(section, location)
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
        return RecipeError(f"{origin}: unknown key '{where}'; {hint}")
    message = first["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list").replace("Tuple", "List")
    given = "" if first["type"] in ("missing", "value_error") else f" (got {shortened(first['input'])})"
    return RecipeError(f"{origin}: {where}: {message}{given}")


def parse_recipe(content: Any, origin: str) -> Recipe:
    """Return the recipe that `content` (parsed YAML) describes; `origin` names it in errors.

    Raises:
        RecipeError: one line that names the key, what was given and what is possible.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise _one_line(error, origin, Recipe, content) from error


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


def _resolve_model(path: str, base: Path) -> str:
    """Return an absolute path where `path` is (or looks like) a directory, and a Hub id as it is."""
    looks_like_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", _usable(path)) and not path.startswith(".")
    if looks_like_hub_id and not (base / path).exists():
        return path
    return resolve_path(path, base)


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in the YAML file at `path`, with absolute paths.

    Raises:
        RecipeError: the file is missing, isn't YAML, or isn't a recipe.
    """
    from bitladder.recipe.yaml_text import parse_yaml

    try:
        content = parse_yaml(read_bytes(path))
    except FileNotFoundError:
        raise RecipeError(f"recipe {path} does not exist; see recipes/ for examples") from None
    except IsADirectoryError:
        raise RecipeError(f"recipe {path} is a directory; name a YAML file") from None
    except OSError as error:
        raise RecipeError(f"recipe {path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise RecipeError(f"{path} is not YAML that can be read: {error}") from error
    return with_absolute_paths(parse_recipe(content, str(path)), path.resolve().parent)


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

    held_out = tuple(
        spec if spec.data is None else spec.model_copy(update={"data": data(spec.data)}) for spec in recipe.held_out
    )
    if recipe.profile is not None and ("/" in recipe.profile or names_a_file(recipe.profile)):
        recipe = recipe.model_copy(update={"profile": resolve_path(recipe.profile, base)})
    vllm = recipe.runtimes.vllm
    if vllm is not None:
        # Not resolved: the interpreter of a virtual environment is a link, and is known by the link's place.
        python = os.path.normpath(base / os.path.expanduser(_usable(vllm.python)))
        recipe = recipe.model_copy(update={"runtimes": RuntimesSpec(vllm=vllm.model_copy(update={"python": python}))})
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"path": _resolve_model(recipe.model.path, base)}),
            "calibration": tuple(spec.model_copy(update={"data": data(spec.data)}) for spec in recipe.calibration),
            "held_out": held_out,
            "output": resolve_path(recipe.output, base),
        }
    )
