"""Turns a published ModelOpt AutoQuantize manifest into a Measurement: good for planning, refused for export.

The manifest lists quant groups under their first module's name, with parallel lists of formats, scores and costs (a
cost is bits/16 times the number of weights). It has no amax values, no batches, and no tensor names. Only the language
model's groups are searched; ModelOpt may have searched the vision tower as well.

Source: ModelOpt's `candidate_stats` and `QuantRecipe` (modelopt/torch/quantization/algorithms.py), written as JSON by
CodeGandee/auto-quantize-model, qwen2_5_vl_3b_autoquant_fp8_schemes.py.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bitladder.errors import RecordError
from bitladder.formats import group_bits, least_bits
from bitladder.models.fusing import Fusing, Layer
from bitladder.reading import read_json
from bitladder.records import (
    BF16,
    BF16_BITS,
    Candidate,
    DataSummary,
    Measurement,
    ModelSource,
    QuantGroup,
    QuantModule,
    UntouchedModule,
    digest_of,
)
from bitladder.storage import sha256_of_file

LANGUAGE_MODEL = re.compile(r"(^|\.)language_model\.|^model\.layers\.")
# ModelOpt's configuration -> our format. Its other FP8 configurations (per channel, block-wise, weight only) are
# other formats under the same number of bits.
FORMAT_OF = {
    "NONE": BF16,
    "FP8_DEFAULT_CFG": "fp8",
    "FP8_ALL_LAYERS_CFG": "fp8",  # of the manifests' source: FP8_DEFAULT_CFG without its list of skipped layers
}
_FORMAT = re.compile(r"(?P<name>\w+)\(effective-bits: (?P<bits>\d+(\.\d+)?)\)")
_CUSTOM = re.compile(r"CUSTOM_(\d+)")  # the n-th configuration of the search, given as a dictionary
_SUFFIX = ".quant_recipe"


def _format_name(spelled: str, configs: Sequence[str]) -> str:
    """Return our name for ModelOpt's `FP8_DEFAULT_CFG(effective-bits: 8.0)` or `CUSTOM_0(...)`.

    Raises:
        ValueError: a format that Bitladder doesn't know.
    """
    match = _FORMAT.fullmatch(spelled)
    if match is None:
        raise ValueError(f"format {spelled!r} isn't in ModelOpt's form NAME(effective-bits: N)")
    name = match["name"]
    custom = _CUSTOM.fullmatch(name)
    if custom and int(custom[1]) < len(configs):
        name = configs[int(custom[1])]
    ours = FORMAT_OF.get(name)
    if ours is None or float(match["bits"]) != least_bits(ours):
        raise ValueError(f"format {spelled!r} ({name}) is not one that Bitladder knows ({', '.join(FORMAT_OF)})")
    return ours


def _group(first: str, layer_of: Mapping[str, Layer], scored: Collection[str], elements: int) -> QuantGroup:
    """Return the group that ModelOpt names after its first module.

    Args:
        first: that module.
        layer_of: the layer of a runtime that holds a module, for all modules that the manifest lists.
        scored: the first modules of all groups.
        elements: the number of weights in the group.

    Raises:
        ValueError: only a part of the group is listed, or runtimes fuse it with another one.
    """
    layer = layer_of.get(first)
    if layer is None:
        raise ValueError(f"`layers` doesn't list {first}")
    if len(layer.modules) < len(layer.shards):
        raise ValueError(f"`layers` lists {list(layer.modules)} of the group {list(layer.shards)}, not all")
    apart = [name for name in layer.modules if name != first and name in scored]
    if apart:
        raise ValueError(f"{first} and {apart[0]} are scored apart, but runtimes fuse them into {layer.name}")
    return QuantGroup(
        name=layer.name, modules=tuple(QuantModule(name=name) for name in layer.modules), weight_elements=elements
    )


def _candidates(
    first: str, entry: dict[str, Any], layer_of: Mapping[str, Layer], scored: Collection[str], configs: Sequence[str]
) -> tuple[QuantGroup, list[Candidate]]:
    """Return one group of the manifest and its formats without the unquantised one.

    Raises:
        ValueError: the entry contradicts itself, or names a format that Bitladder doesn't know.
    """
    names = [_format_name(spelled, configs) for spelled in entry["formats"]]
    if names.count(BF16) != 1:
        raise ValueError(f"{first} has no unquantised format NONE(effective-bits: 16.0), so its size is unknown")
    rows = {n: (score, cost) for n, score, cost in zip(names, entry["scores"], entry["costs"], strict=True)}
    if len(rows) < len(names):
        raise ValueError(f"{first} lists a format twice: {entry['formats']}")
    unquantised, elements = rows.pop(BF16)
    if unquantised != 0:
        raise ValueError(f"{first}: the unquantised score is {unquantised}, so the others are no difference to it")
    if elements != int(elements):
        raise ValueError(f"{first}: an unquantised cost of {elements} is no number of weights")
    group = _group(first, layer_of, scored, int(elements))
    candidates = []
    for name, (score, cost) in rows.items():
        bits = group_bits(group, name)
        if cost * BF16_BITS != bits:
            raise ValueError(f"{first}: a cost of {cost} is not that of {group.weight_elements} weights in {name}")
        candidates.append(Candidate(group=group.name, format=name, weight_bits=bits, scores=(score,)))
    return group, candidates


def _measurement(content: dict[str, Any], path: Path) -> Measurement:
    """Return the measurement in a manifest's `content`.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it isn't such a manifest.
    """
    scheme, modules = content["scheme"], content["layers"]
    sensitivity = {key.removesuffix(_SUFFIX): entry for key, entry in content["layer_sensitivity"].items()}
    groups: list[QuantGroup] = []
    candidates: list[Candidate] = []
    layer_of = {name: layer for layer in Fusing.usual().layers(modules) for name in layer.modules}
    for first, entry in sensitivity.items():
        if LANGUAGE_MODEL.search(first):
            group, found = _candidates(first, entry, layer_of, sensitivity, scheme["quant_formats"])
            groups.append(group)
            candidates += found
    if not candidates:
        raise ValueError("`layer_sensitivity` has no quantised format of a language model's layer")
    searched = {module.name for group in groups for module in group.modules}
    others = [name for name in dict.fromkeys([*modules, *sensitivity]) if name not in searched]
    digest = sha256_of_file(path)
    return Measurement(
        model=ModelSource(
            path=content.get("model", {}).get("id") or scheme["name"],
            architecture="unknown (imported manifest)",
            model_type="unknown",
            sha256=digest_of(["manifest", digest]),
        ),
        calibration=DataSummary(
            source=f"unknown: {path.name} doesn't say",
            kind="unknown",
            sha256="",
            samples=scheme["auto_quantize_score_size"],
            tokens=0,
            sequence_length=0,
            batch_size=0,
            seed=0,
        ),
        engine="modelopt (imported)",
        method=scheme["auto_quantize_method"],
        fused_scales_shared=False,
        compute_dtype="unknown",
        score_unit="ModelOpt score",
        score_weights=(1.0,),
        formats=tuple(dict.fromkeys(candidate.format for candidate in candidates)),
        groups=tuple(groups),
        candidates=tuple(candidates),
        untouched=tuple(
            UntouchedModule(name=name, checkpoint_name=name, reason=_why_not_searched(name)) for name in others
        ),
        amax_sha256=None,
    )


def _why_not_searched(name: str) -> str:
    parts = name.split(".")
    if "visual" in parts:
        return "vision tower: not searched"
    if parts[-1] == "lm_head":
        return "vocabulary head: not searched"
    return "outside the language model's searched groups: not searched"


def import_manifest(path: Path) -> Measurement:
    """Return the measurement that a manifest tells of, its language model's groups searched.

    Raises:
        RecordError: the file is missing, isn't such a manifest, or names a format that Bitladder doesn't know.
    """
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise RecordError(f"{path} does not exist; name a ModelOpt AutoQuantize manifest") from None
    except (OSError, ValueError) as error:  # a directory, not UTF-8, not JSON
        raise RecordError(f"{path} is not a ModelOpt AutoQuantize manifest: {error}") from error
    wanted = ("scheme", "layers", "layer_sensitivity")
    if not isinstance(content, dict) or any(not isinstance(content.get(key), dict) for key in wanted):
        raise RecordError(f"{path} is not a ModelOpt AutoQuantize manifest: it needs the objects {', '.join(wanted)}")
    try:
        return _measurement(content, path)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or error.title
        problem = f"{where}: {first['msg']}"
    except KeyError as error:
        problem = f"it lacks {error}"
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        problem = str(error)
    raise RecordError(f"{path} is not a usable ModelOpt AutoQuantize manifest: {problem}")
