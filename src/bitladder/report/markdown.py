"""A report as Markdown, by `report.md.jinja`."""

from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import jinja2
import yaml

from bitladder.report import escaping
from bitladder.report.answers import answers
from bitladder.report.escaping import Markdown, prose
from bitladder.report.kv_cache import cache_lines, cache_tables
from bitladder.report.ladder import Ladder
from bitladder.report.numbers import FLIPS_OFTEN, NOT_RUN, byte_size, common_prefix, data_kind, exact, narrow, percent
from bitladder.report.sentences import (
    asked_table,
    edge_lines,
    floor_lines,
    nesting_lines,
    noise_lines,
    refinement_lines,
    rounding,
    runtime_lines,
    summary_line,
    unsettled_lines,
    worth_lines,
)
from bitladder.report.speeds import speed_lines, speed_tables
from bitladder.report.tables import (
    controls,
    evaluation_table,
    groups_table,
    held_out,
    layer_counts,
    on_devices,
    phases_table,
    positions_table,
    prediction_table,
    runtimes,
    sizes,
    verification_table,
)
from bitladder.report.types import Report


def template(name: str, **filters: Callable[..., str]) -> jinja2.Template:
    """Return one of the templates beside this file, with our ways of showing numbers, and more, as its filters.

    Whatever goes into it is escaped, into Markdown by `escaping`, into HTML by jinja.
    """
    is_html = name.endswith(".html.jinja")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=is_html,
        finalize=None if is_html else prose,
    )
    ours = (exact, percent, byte_size, rounding, data_kind, narrow, escaping.code, escaping.text)
    own = {one.__name__: one for one in ours}
    environment.filters.update(own, **filters)
    return environment.get_template(name)


def page_context(report: Report) -> dict[str, Any]:
    """Return everything that a page shows besides the report itself: tables in Markdown, sentences, titles."""
    ladder = Ladder(report)
    prefix = common_prefix([group.name for group in report.groups])
    settings = yaml.safe_dump(report.settings, sort_keys=False, allow_unicode=True, width=120)
    return {
        "report": report,
        "title": PurePath(report.model.path).name or report.model.path,
        "summary": summary_line(report, ladder),
        "asked": asked_table(report, ladder),
        "groups_blocks": [1 + 4, *[4] * (len(report.formats) - 1)],  # weights, and four columns a format
        "noise_lines": noise_lines(report, ladder),
        "edge_lines": edge_lines(report, prefix),
        "nesting_lines": [*floor_lines(report), *nesting_lines(report)],
        "failed": [scheme.name for scheme in report.schemes if scheme.verified is False],
        "is_predicted_kl": report.score_unit == "nats per token",
        "sizes": sizes(report),
        "layer_counts": layer_counts(report),
        "on_devices": on_devices(report),
        "prefix": prefix.rstrip("."),
        "groups": groups_table(report, prefix),
        "positions": positions_table(report, prefix),
        "several": bool(ladder.further),
        "evaluated": ladder.evaluated,
        "evaluation": evaluation_table(report, ladder),
        "held_out": held_out(report),
        "answers": answers(report),
        "verification": verification_table(report),
        "controls": controls(report, ladder),
        "prediction": prediction_table(report, ladder),
        "worth_lines": [*worth_lines(report), *unsettled_lines(report), *refinement_lines(report)],
        "flips_often": percent(FLIPS_OFTEN, 0),
        "speed_tables": speed_tables(report),
        "speed_lines": speed_lines(report),
        "cache_tables": cache_tables(report),
        "cache_lines": cache_lines(report),
        "runtimes": runtimes(report),
        "runtime_lines": runtime_lines(report),
        "settings": Markdown(settings),
        "fence": Markdown(escaping.fence(settings)),
        "phases": phases_table(report) if report.phases else "",
        "not_run": NOT_RUN,
    }


def render_markdown(report: Report) -> str:
    """Return the report as Markdown (GitHub's tables), the same for the same report."""
    return template("report.md.jinja").render(page_context(report))
