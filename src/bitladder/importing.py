"""Turns a published ModelOpt AutoQuantize manifest into a Measurement: good for planning, refused for export.

The manifest lists quant groups under their first module's name, with parallel lists of formats, scores and costs (a
cost is bits/16 times the number of weights). It has no amax values, no batches, and no tensor names.
"""

import json
import re
from pathlib import Path
from typing import Any

from bitladder.errors import RecordError
from bitladder.formats import get_format
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
FUSED = {
    "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
}
_FORMAT = re.compile(r"(?P<name>\w+)\(effective-bits: (?P<bits>[\d.]+)\)")
_CUSTOM = re.compile(r"CUSTOM_(\d+)")


def _format_name(spelled: str, configs: list[str], path: Path) -> str:
    """Return our name for ModelOpt's `FP8_DEFAULT_CFG(effective-bits: 8.0)` or `CUSTOM_0(...)`.

    Raises:
        RecordError: a format that Bitladder doesn't know.
    """
    match = _FORMAT.fullmatch(spelled)
    if match is None:
        raise RecordError(f"{path}: format {spelled!r} isn't in ModelOpt's form NAME(effective-bits: N)")
    name, bits = match["name"], float(match["bits"])
    if name == "NONE":
        return BF16
    custom = _CUSTOM.fullmatch(name)
    if custom and int(custom[1]) < len(configs):
        name = configs[int(custom[1])]
    if name.startswith("FP8_") and bits == get_format("fp8").bits:
        return "fp8"
    raise RecordError(f"{path}: format {spelled!r} ({name}) is not one that Bitladder knows (fp8)")


def _group(first: str, modules: set[str], elements: int) -> QuantGroup:
    """Return the group that ModelOpt names after its first module."""
    parent, _, leaf = first.rpartition(".")
    fused, members = FUSED.get(leaf, (leaf, (leaf,)))
    names = [f"{parent}.{member}" for member in members]
    if not set(names) <= modules:
        fused, names = leaf, [first]
    return QuantGroup(
        name=f"{parent}.{fused}", modules=tuple(QuantModule(name=name) for name in names), weight_elements=elements
    )


def import_manifest(path: Path) -> Measurement:
    """Return the measurement that a manifest tells of, its language model's groups searched.

    Raises:
        RecordError: the file is missing, isn't such a manifest, or names a format that Bitladder doesn't know.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        scheme, layers, sensitivity = content["scheme"], content["layers"], content["layer_sensitivity"]
    except FileNotFoundError:
        raise RecordError(f"{path} does not exist; name a ModelOpt AutoQuantize manifest") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(
            f"{path} is not a ModelOpt AutoQuantize manifest with scheme, layers and layer_sensitivity ({error!r})"
        ) from error
    groups, candidates, formats = [], [], []
    try:
        for key, entry in sensitivity.items():
            first = key.removesuffix(".quant_recipe")
            if not LANGUAGE_MODEL.search(first):
                continue
            names = [_format_name(f, scheme.get("quant_formats", []), path) for f in entry["formats"]]
            elements = round(entry["costs"][names.index(BF16)])
            group = _group(first, set(layers), elements)
            groups.append(group)
            for name, score, cost in zip(names, entry["scores"], entry["costs"], strict=True):
                if name == BF16:
                    continue
                bits = round(cost * BF16_BITS)
                candidates.append(Candidate(group=group.name, format=name, weight_bits=bits, scores=(float(score),)))
                if name not in formats:
                    formats.append(name)
        searched = {module.name for group in groups for module in group.modules}
        digest = sha256_of_file(path)
        return Measurement(
            model=ModelSource(
                path=scheme.get("name", path.name),
                architecture="unknown (imported manifest)",
                model_type="unknown",
                sha256=digest_of(["manifest", digest]),
            ),
            calibration=DataSummary(
                source=f"unknown; told by {path.name}",
                kind="unknown",
                sha256=digest,
                samples=int(scheme.get("auto_quantize_score_size", 0)),
                tokens=0,
                sequence_length=0,
                batch_size=0,
                seed=0,
            ),
            engine="modelopt (imported)",
            method=str(scheme.get("auto_quantize_method", "unknown")),
            fused_scales_shared=False,
            compute_dtype="unknown",
            score_unit="ModelOpt score",
            score_weights=(1.0,),
            formats=tuple(formats),
            groups=tuple(groups),
            candidates=tuple(candidates),
            untouched=tuple(
                UntouchedModule(name=name, checkpoint_name=name, reason="outside the language model: not searched")
                for name in layers
                if name not in searched
            ),
            amax_sha256=None,
        )
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise RecordError(f"{path} is not a usable ModelOpt AutoQuantize manifest: {error!r}") from error
