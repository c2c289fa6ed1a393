"""A model card for each checkpoint, as model hubs show it: `render_card(report, scheme) -> str`, its `README.md`."""

import math
import re
from pathlib import PurePath
from typing import Any

import yaml

from bitladder.formats import COMPRESSED_TENSORS, FORMATS
from bitladder.recipe import HUB_ID, MESSAGES
from bitladder.records import BF16, KL, TASK_ACCURACY
from bitladder.report.escaping import Markdown
from bitladder.report.kv_cache import skip_argument
from bitladder.report.ladder import Ladder
from bitladder.report.markdown import template
from bitladder.report.numbers import data_names
from bitladder.report.tables import controls, evaluation_table, held_out, layer_counts, runtimes
from bitladder.report.types import Report, ReportedScheme

_SEEING = "ForConditionalGeneration"  # how transformers calls a decoder with something before it that sees
_NO_NAME = re.compile(r"[^\w.-]+")  # what no hub has in a model's name
_OF_THE_HUB = ("huggingface", MESSAGES)  # kinds of data that may be sets of the Hub
_METRICS = {  # metric -> a hub's type of it, and what it is here
    KL: ("kl_divergence", "KL to the original, nats per token"),
    "perplexity": ("perplexity", "perplexity"),
    "top1_agreement": ("accuracy", "top-1 agreement with the original, share of tokens"),
    TASK_ACCURACY: ("accuracy", "task accuracy, share of samples"),
}
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
        skip_argument=skip_argument(scheme.kv_cache_skips),
        metadata=Markdown(yaml.safe_dump(_on_lines(_metadata(report, scheme)), sort_keys=False, width=math.inf)),
        base=_base_name(report),
        sees=report.model.architecture.endswith(_SEEING),
        sglang=any((probe.runtime, probe.verdict) == ("sglang", "ok") for probe in alone.probes),
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
    """Return a hub's metadata; the base model is named only where it came from a hub, or the recipe names it."""
    said = report.settings.get("card") or {}
    base = said.get("base_model")
    sees = report.model.architecture.endswith(_SEEING)
    kinds = dict.fromkeys(name.partition("_")[0] for name in _formats(scheme))
    data = [data for one in _calibrations(report) if (data := one.get("data", {})).get("kind") in _OF_THE_HUB]
    datasets = dict.fromkeys(one["path"] for one in data if HUB_ID.fullmatch(one["path"]))
    task = "image-text-to-text" if sees else "text-generation"
    wanted = {
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        "license": said.get("license"),
        "library_name": "transformers" if _loads_as_it_is(scheme) else "vllm",  # a hub shows how that loads it
        "pipeline_tag": task,
        "datasets": list(datasets),
        "tags": [*kinds, *(tag.format(carrier=scheme.carrier) for tag in _TAGS)],
        "model-index": _model_index(report, scheme, task),
    }
    return {key: value for key, value in wanted.items() if value}


def _on_lines(value: Any) -> Any:
    """Return metadata whose texts have no line ends: what stands on a line of its own could end it."""
    if isinstance(value, dict):
        return {key: _on_lines(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_on_lines(one) for one in value]
    return " ".join(value.split()) if isinstance(value, str) else value


def _loads_as_it_is(scheme: ReportedScheme) -> bool:
    """Return whether transformers loads a checkpoint, and rightly; see the card's own words."""
    zero_points = any(FORMATS[name].zero_points for name in _formats(scheme) if name in FORMATS)
    return scheme.carrier == COMPRESSED_TENSORS and not zero_points


def _calibrations(report: Report) -> list[dict[str, Any]]:
    """Return the recipe's calibration sets."""
    found = report.settings.get("calibration") or []
    return [found] if isinstance(found, dict) else list(found)


def _model_index(report: Report, scheme: ReportedScheme, task: str) -> list[dict[str, Any]]:
    """Return the results of an evaluation in a hub's words; one dataset is a held-out set.

    Source: huggingface_hub.repocard_data, EvalResult.
    """
    kinds = {one.split: one.data.kind for one in report.evaluations if one.scheme == scheme.name}
    results = [
        {
            "task": {"type": task},
            "dataset": {"type": kind, "name": f"{split} (held out)"},
            "metrics": [
                {"type": _METRICS[found.metric][0], "name": _METRICS[found.metric][1], "value": found.value}
                for found in scheme.results or ()
                if found.split == split
            ],
        }
        for split, kind in kinds.items()
    ]
    return [{"name": name_on_a_hub(report, scheme.name), "results": results}] if results else []


def name_on_a_hub(report: Report, scheme: str) -> str:
    """Return what a hub may call a scheme's checkpoint."""
    return _NO_NAME.sub("-", f"{_base_name(report)}-{scheme}")


def _base_name(report: Report) -> str:
    return PurePath(report.model.path).name or report.model.path


def _formats(scheme: ReportedScheme) -> list[str]:
    """Return the formats that some group has, but for bf16."""
    return [count.format for count in scheme.format_counts if count.format != BF16 and count.groups]


def _described(name: str) -> str:
    known = FORMATS.get(name)
    return name.upper() if known is None else f"{name.upper()} ({known.title})"


def _modules(scheme: ReportedScheme, *, quantised: bool) -> int:
    return sum(count.modules for count in scheme.format_counts if (count.format != BF16) == quantised)
