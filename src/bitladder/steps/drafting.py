"""A recipe for a model and the device at hand: `draft(model) -> YAML`, which `bitladder run` takes as it is.

Nothing is computed: the model's shapes say which formats it can have, and the device which of these it serves.
"""

import json
import math
import os
from pathlib import Path

from bitladder.data.files import check_file, is_conversation, jsonl_rows, parsed_turns
from bitladder.device import capability, resolve_device
from bitladder.errors import DataError, RecipeError
from bitladder.formats import group_bits, why_not
from bitladder.formats.targets import TARGETS, target_of
from bitladder.models.loading import load_config, most_positions
from bitladder.models.target import Target, find_target
from bitladder.recipe import resolve_model
from bitladder.records import BF16
from bitladder.steps.workspace import fetch_model

_FOUR_BITS = "nvfp4"
# From the fewest bits up: two floats that one checkpoint can hold together, and what takes shapes that these don't.
_FORMATS = (_FOUR_BITS, "fp8")
_GENERATED = "{kind: generated}"  # also beside other data: codes that are made from both do well on other texts too
_SIZES = {"cpu": (16, 128, 4), "cuda": (128, 512, 4)}  # device -> calibration samples, tokens of each, a batch
_STEPS = (0.5, 1.5, 3.5)  # bits of the schemes above the fewest, which are rounded up to halves
_NAMES = ("small", "balanced", "gentle")
_SHARES = (0.25, 0.5, 1.0)  # of the weights, where there is one format
_VLLM = Path(".venv-vllm/bin/python")  # where `make vllm-env` makes it


def draft(model: str, *, data: Path | None = None, serve_on: str | None = None) -> str:
    """Return a recipe, as YAML with remarks.

    Args:
        model: a directory, or a Hub id.
        data: what to calibrate on, a file or a COCO directory; None: what the model writes itself.
        serve_on: the kind of device that will serve, as in a recipe; None: the one at hand.

    Raises:
        BitladderError: no such model, data or device, or a model that can't be searched.
    """
    if serve_on is not None and serve_on not in TARGETS:
        raise RecipeError(f"--serve-on {serve_on!r} is unknown; use {', '.join(TARGETS)}")
    path = resolve_model(model, Path.cwd())
    own = _data(data)
    directory = fetch_model(path, None)
    target, device = find_target(directory, _FORMATS), resolve_device("auto")
    served = serve_on or target_of(capability(device))
    formats = [name for name in _FORMATS if _fits(target, name) and name not in TARGETS[served].unsupported]
    samples, length, batch = _SIZES[device]
    length = min(length, most_positions(load_config(directory)) or length)
    sizes = f"  samples: {samples}\n  sequence_length: {length}\n  batch_size: {batch}\n"
    compensated = _FOUR_BITS in formats
    sets = list(dict.fromkeys((own, _GENERATED))) if compensated else [own]
    name = Path(path).name
    lines = [
        f"# {name}: {sum(group.weight_elements for group in target.groups):,} weights in {len(target.groups)} groups "
        f"are searched, on this machine's {device}, for {TARGETS[served].title}.",
        f"model:\n  path: {json.dumps(path)}",
        "# Data like what the model will be asked is better: see docs/guide.md, kinds jsonl, messages, image_text.",
        "calibration:",
        *(f"  - {{data: {one}, samples: {samples}, sequence_length: {length}, batch_size: {batch}}}" for one in sets),
        f"held_out:\n  data: {own}\n  seed: 1\n{sizes}".rstrip(),
        f"measurement:\n  formats: [{', '.join(formats)}]",
        *(["  rounding: compensated  # better codes in the same files, for some minutes more"] if compensated else []),
        f"serve_on: {served}",
        "schemes:",
        *_schemes(target, formats),
        *([f"runtimes:\n  vllm: {{python: {json.dumps(os.path.abspath(_VLLM))}}}"] if _VLLM.is_file() else []),
        f"output: {json.dumps(f'runs/{name}')}",
    ]
    return "\n".join(lines) + "\n"


def _fits(target: Target, name: str) -> bool:
    return any(why_not(group, name) is None for group in target.groups)


def _schemes(target: Target, formats: list[str]) -> list[str]:
    """Return the lines of three schemes: by size where there is a choice of formats, else by share."""
    if len(formats) == 1:
        return [f"  - {{name: top{100 * share:g}, coverage: {share}}}" for share in _SHARES]
    weights = sum(group.weight_elements for group in target.groups)
    fewest = sum(
        min(group_bits(group, name) for name in (*formats, BF16) if name == BF16 or why_not(group, name) is None)
        for group in target.groups
    )
    floor = math.ceil(2 * fewest / weights) / 2
    return [
        f"  - {{name: {name}, effective_bits: {floor + step:g}}}" for name, step in zip(_NAMES, _STEPS, strict=True)
    ]


def _data(path: Path | None) -> str:
    """Return the data of a recipe's set, as YAML in braces; its kind by its name and its first row.

    Raises:
        DataError: it isn't there, or of no kind that is known by that.
    """
    if path is None:
        return _GENERATED
    where = json.dumps(str(path.resolve()))
    if path.is_dir():
        if not (path / "annotations").is_dir():
            raise DataError(f"{path} is no COCO directory, which has annotations/; name a file")
        return f"{{kind: coco, path: {where}}}"
    check_file(path)
    if path.suffix not in (".jsonl", ".ndjson"):
        return f"{{kind: text, path: {where}}}"
    row = next((row for _, row in jsonl_rows(path)), {})
    if "image" in row:
        return f"{{kind: image_text, path: {where}}}"
    if any(is_conversation(parsed_turns(row.get(name))) for name in ("messages", "conversations")):
        return f"{{kind: messages, path: {where}}}"
    if "text" in row:
        return f"{{kind: jsonl, path: {where}}}"
    raise DataError(
        f"{path}: its first row has {', '.join(row) or 'nothing'}; text, messages, conversations or image are known: "
        "write the recipe's data by hand, with data.text_field"
    )
