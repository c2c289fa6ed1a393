"""The report as one self-contained page: `render_html(report) -> str`, the same for the same report.

Tables and sentences are those of the Markdown report, so that both say the same numbers; the plots are drawn by plotly
in the reader's browser from the data in the page. Nothing is fetched. Without JavaScript the tables are still there.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bitladder.records import KL, EvalResult
from bitladder.report.escaping import Markdown, prose
from bitladder.report.markdown import page_context, template
from bitladder.report.numbers import CONTROLS
from bitladder.report.types import GroupSensitivity, Report, ReportedGroup, ReportedScheme

_LAYER = re.compile(r"\.(\d+)\.")  # the number of a layer in a group's name
_BITS_PER_BYTE = 8


def render_html(report: Report) -> str:
    """Return the page."""
    from plotly.offline import get_plotlyjs

    here = Path(__file__).parent
    page = template("page.html.jinja", table=html_table, inline=inline)
    return page.render(
        page_context(report),
        plotly=Markup(get_plotlyjs()),
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        script=Markup((here / "page.js").read_text(encoding="utf-8")),
        # Inside <script> neither "</script" nor "<!--" may stand.
        data=Markup(json.dumps(plot_data(report), ensure_ascii=False, sort_keys=True).replace("<", "\\u003c")),
        kinds=list(dict.fromkeys(group.kind for group in report.groups)),
    )


def inline(text: object) -> Markup:
    """Return a line as HTML, as `escaping.prose` makes it Markdown: what is special is a reference already."""
    pieces = re.split(r"`([^`]*)`", prose(text))
    return Markup("".join(f"<code>{html.escape(s, quote=False)}</code>" if i % 2 else s for i, s in enumerate(pieces)))


def html_table(markdown: str, identifier: str = "", without: tuple[str, ...] = ()) -> Markup:
    """Return a table as `render.markdown_table` writes it, as an HTML table that scrolls inside itself.

    Args:
        markdown: the table.
        identifier: its `id`.
        without: titles of columns that are left out.
    """
    lines = [[Markdown(cell.strip()) for cell in line.split("|")[1:-1]] for line in markdown.strip().splitlines()]
    kept = [index for index, title in enumerate(lines[0]) if title not in without]
    head, rule, *body = [[line[index] for index in kept] for line in lines]
    right = [cell.endswith(":") for cell in rule]

    def row(cells: list[Markdown], tag: str) -> str:
        shown = (
            f"<{tag}{' class=n' if side else ''}>{inline(cell)}</{tag}>"
            for cell, side in zip(cells, right, strict=True)
        )
        return f"<tr>{''.join(shown)}</tr>"

    name = f' id="{identifier}"' if identifier else ""
    rows = "\n".join(row(cells, "td") for cells in body)
    return Markup(
        f'<div class="scroll" tabindex="0"><table{name}>\n<thead>{row(head, "th")}</thead>\n<tbody>\n{rows}\n</tbody>'
        "</table></div>"
    )


def plot_data(report: Report) -> dict[str, Any]:
    """Return what the plots are drawn from, as plain data; KL in nats per token, sizes in bytes."""
    prediction = report.prediction
    return {
        "splits": list(report.splits),
        "formats": list(report.formats),
        "floors": {
            split: None if (found := report.first_result(KL, split)) is None else found.noise_floor
            for split in report.splits
        },
        "originalBytes": report.searched_source_bytes,
        "schemes": [_scheme(report, scheme) for scheme in report.schemes],
        "arms": [
            {
                "name": arm.name,
                "kind": CONTROLS[arm.control],
                "bits": arm.effective_bits,
                "bytes": _bytes_of(report, arm.effective_bits),
                "kl": _kl_of(arm.results),
            }
            for arm in report.controls
        ],
        "groups": [_group(group) for group in report.groups],
        "points": [] if prediction is None else [point.model_dump(mode="json") for point in prediction.points],
    }


def _bytes_of(report: Report, effective_bits: float) -> float:
    """Return the bytes of the searched weights, scales left out."""
    return effective_bits * report.searched_weights / _BITS_PER_BYTE


def _kl_of(results: tuple[EvalResult, ...] | None) -> dict[str, list[float | None]]:
    """Return the KL and its standard error by held-out set."""
    return {result.split: [result.value, result.standard_error] for result in results or () if result.metric == KL}


def _scheme(report: Report, scheme: ReportedScheme) -> dict[str, Any]:
    return {
        "name": scheme.name,
        "bits": scheme.effective_bits,
        "bytes": _bytes_of(report, scheme.effective_bits),
        "kl": _kl_of(scheme.results),
        "flips": scheme.unsettled.shares if scheme.unsettled else {},
    }


def _group(group: ReportedGroup) -> dict[str, Any]:
    layer = _LAYER.search(group.name)
    return {
        "name": group.name,
        "kind": group.kind,
        "layer": None if layer is None else int(layer[1]),
        "formats": group.formats,
        "scores": {found.format: _sensitivity(found) for found in group.sensitivities},
    }


def _sensitivity(found: GroupSensitivity) -> dict[str, Any]:
    return {"score": found.score, "density": found.score_per_bit_saved, "rank": found.rank}
