"""The report as one self-contained page: `render_html(report) -> str`, the same for the same report.

Tables and sentences are those of the Markdown report, so that both say the same numbers; `parts` says what stands in
cards, rows and cells, and the figures are drawn in the reader's browser from the data in the page (`plots`), by the
three scripts beside this file. Nothing is fetched. Without JavaScript the tables are still there. The directories of
the machine that made the report are left out: the page is made to be passed on.
"""

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bitladder.records import BF16
from bitladder.report import parts
from bitladder.report.escaping import Markdown, prose
from bitladder.report.ladder import Ladder
from bitladder.report.markdown import page_context, template
from bitladder.report.plots import plot_data
from bitladder.report.public import without_directories
from bitladder.report.types import Report

SCRIPTS = ("page_charts.js", "page_figures.js", "page.js")
FIRST_PICTURES = 8  # schemes whose layers are drawn before the reader asks for all


def render_html(report: Report) -> str:
    """Return the page."""
    here = Path(__file__).parent
    report = without_directories(report)
    page = template("page.html.jinja", table=html_table, inline=inline)
    context = page_context(report)
    return page.render(
        context | _parts(report, context),
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup((here / name).read_text(encoding="utf-8")) for name in SCRIPTS],
        # Inside <script> neither "</script" nor "<!--" may stand.
        data=Markup(json.dumps(plot_data(report), ensure_ascii=False, sort_keys=True).replace("<", "\\u003c")),
    )


def _parts(report: Report, context: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page shows besides what the Markdown report does, whose `context` is given."""
    ladder = Ladder(report)
    lines = [line for name in ("worth_lines", "noise_lines", "edge_lines", "nesting_lines") for line in context[name]]
    lines += context["runtime_lines"]
    named = [f"`{scheme.name}`" for scheme in report.schemes]
    curves = report.frontier.curves if report.frontier else ()
    left_out = [f"{target:g}" for curve in curves[:1] for target in curve.left_out]
    return {
        "card": parts.verdict_card(report, ladder),
        "columns": parts.scheme_columns(report, ladder),
        "rows": parts.scheme_rows(report, ladder, lines),
        "general_lines": [line for line in lines if not any(name in line for name in named)],
        "kl_unit": parts.KL_UNIT,
        "formats": [BF16, *report.formats],
        "tones": {BF16: "kept"} | {name: f"f{index}" for index, name in enumerate(report.formats, start=1)},
        "kinds": list(dict.fromkeys(group.kind for group in report.groups)),
        "matrix_of_runtimes": parts.runtime_matrix(report),
        "findings": parts.findings_of_runtimes(report),
        "matrix_of_devices": parts.device_matrix(report),
        "made": parts.made_of(report),
        "description": parts.description_of(report),
        "planned": sum(bool(curve.points) for curve in curves),
        "predicts_kl": any(point.kl is not None for curve in curves for point in curve.points),
        "targets_left_out": ", ".join(left_out),
        "first_pictures": FIRST_PICTURES,
    }


def inline(text: object) -> Markup:
    """Return a line as HTML, as `escaping.prose` makes it Markdown: what is special is a reference already."""
    pieces = re.split(r"`([^`]*)`", prose(text))
    return Markup("".join(f"<code>{html.escape(s, quote=False)}</code>" if i % 2 else s for i, s in enumerate(pieces)))


def html_table(markdown: str, name: str, identifier: str = "") -> Markup:
    """Return a table as `render.markdown_table` writes it, as an HTML table that scrolls inside itself.

    Args:
        markdown: the table.
        name: what it is called by those who read the page aloud.
        identifier: its `id`.
    """
    lines = [[Markdown(cell.strip()) for cell in line.split("|")[1:-1]] for line in markdown.strip().splitlines()]
    head, rule, *body = lines
    right = [cell.endswith(":") for cell in rule]

    def row(cells: list[Markdown], tag: str) -> str:
        shown = (
            f"<{tag}{' class=n' if side else ''}>{inline(cell)}</{tag}>"
            for cell, side in zip(cells, right, strict=True)
        )
        return f"<tr>{''.join(shown)}</tr>"

    rows = "\n".join(row(cells, "td") for cells in body)
    mark = f' id="{identifier}"' if identifier else ""
    return Markup(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(name)}"><table{mark}>\n'
        f"<thead>{row(head, 'th')}</thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )
