"""A model card for each checkpoint, as model hubs show it: `render_card(report, scheme) -> str`, its `README.md`."""

import re
from pathlib import PurePath
from typing import Any

import yaml

from bitladder.formats import FORMATS
from bitladder.records import BF16
from bitladder.report.escaping import Markdown
from bitladder.report.ladder import Ladder
from bitladder.report.markdown import template
from bitladder.report.numbers import data_names
from bitladder.report.tables import controls, evaluation_table, held_out, layer_counts, runtimes
from bitladder.report.types import Report, ReportedScheme

_HUB_NAME = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?")
_TAGS = ("mixed-precision", "{carrier}", "vllm", "bitladder")


def render_card(report: Report, name: str) -> str:
    """Return the model card of one scheme's checkpoint, in Markdown with YAML metadata: the same for the same report.

    Args:
        report: of the whole run; what it says of other schemes is left out.
        name: of the scheme.

    Source: huggingface.co/docs/hub/model-cards, for the metadata.
    """
    scheme = next(scheme for scheme in report.schemes if scheme.name == name)
    alone = report.model_copy(
        update={
            "schemes": (scheme,),
            "probes": tuple(probe for probe in report.probes if probe.scheme == name),
            "control_comparisons": tuple(c for c in report.control_comparisons if c.scheme == name),
            "evaluations": tuple(evaluation for evaluation in report.evaluations if evaluation.scheme == name),
        }
    )
    ladder = Ladder(alone)
    groups = [group for group in report.groups if group.formats[name] == BF16]
    known = [FORMATS[name] for name in _formats(scheme) if name in FORMATS]
    return template("card.md.jinja").render(
        report=alone,
        scheme=scheme,
        metadata=Markdown(yaml.safe_dump(_metadata(report, scheme), sort_keys=False)),
        base=PurePath(report.model.path).name or report.model.path,
        quantised=_modules(scheme, quantised=True),
        modules=_modules(scheme, quantised=True) + _modules(scheme, quantised=False),
        left=[module for group in groups for module in group.modules],
        formats=" and ".join(_described(name) for name in _formats(scheme)),
        zero_points=any(one.zero_points for one in known),
        rounded=" and ".join(one.name.upper() for one in known if one.input != "unrounded"),
        calibration=data_names(report.calibration, quote="`"),
        layers=layer_counts(alone),
        evaluation=evaluation_table(alone, ladder) if scheme.results else "",
        held_out=[(entry["evaluation"].split, entry["evaluation"].data) for entry in held_out(alone)],
        controls=controls(alone, ladder),
        runtimes=runtimes(alone),
    )


def _metadata(report: Report, scheme: ReportedScheme) -> dict[str, Any]:
    """Return a hub's metadata; the base model is named only where it came from a hub."""
    known = report.model.revision is not None and _HUB_NAME.fullmatch(report.model.path)
    base = {"base_model": report.model.path, "base_model_relation": "quantized"} if known else {}
    kinds = dict.fromkeys(name.partition("_")[0] for name in _formats(scheme))
    return {**base, "tags": [*kinds, *(tag.format(carrier=scheme.carrier) for tag in _TAGS)]}


def _formats(scheme: ReportedScheme) -> list[str]:
    """Return the formats that some group has, but for bf16."""
    return [count.format for count in scheme.format_counts if count.format != BF16 and count.groups]


def _described(name: str) -> str:
    known = FORMATS.get(name)
    return name.upper() if known is None else f"{name.upper()} ({known.title})"


def _modules(scheme: ReportedScheme, *, quantised: bool) -> int:
    return sum(count.modules for count in scheme.format_counts if (count.format != BF16) == quantised)
