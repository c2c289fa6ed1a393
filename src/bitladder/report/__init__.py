"""Records -> one page: `build_report(...) -> Report`, written as `report.json`, `report.md` and `report.html`.

A report is a record itself, made of records and nothing else: no model, no torch, no clock. `build` decides what it
says, `verdict` what follows from it, `tables` how that reads (with `report.md.jinja`), for a page and for a terminal;
`page` makes it HTML with plots, `figures` files for papers, `card` a checkpoint's model card. What makes a page is
imported when one is made: to compare two reports needs none of it.
"""

from typing import TYPE_CHECKING

from bitladder.lazily import given_by

if TYPE_CHECKING:
    from bitladder.report.build import build_report
    from bitladder.report.card import name_on_a_hub, render_card
    from bitladder.report.compare import compare_runs
    from bitladder.report.figures import check_figures, write_figures
    from bitladder.report.groups import batch_standard_error
    from bitladder.report.markdown import render_markdown
    from bitladder.report.numbers import STAGES
    from bitladder.report.page import render_html
    from bitladder.report.serving import serve_command
    from bitladder.report.terminal import closing_table
    from bitladder.report.types import Report
    from bitladder.report.writing import write_report
else:
    __getattr__ = given_by(
        __name__,
        {
            "build": ("build_report",),
            "card": ("name_on_a_hub", "render_card"),
            "compare": ("compare_runs",),
            "figures": ("check_figures", "write_figures"),
            "groups": ("batch_standard_error",),
            "markdown": ("render_markdown",),
            "numbers": ("STAGES",),
            "page": ("render_html",),
            "serving": ("serve_command",),
            "terminal": ("closing_table",),
            "types": ("Report",),
            "writing": ("write_report",),
        },
    )

JSON_FILE = "report.json"
MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"

__all__ = [
    "HTML_FILE",
    "JSON_FILE",
    "MARKDOWN_FILE",
    "STAGES",
    "Report",
    "batch_standard_error",
    "build_report",
    "check_figures",
    "closing_table",
    "compare_runs",
    "name_on_a_hub",
    "render_card",
    "render_html",
    "render_markdown",
    "serve_command",
    "write_figures",
    "write_report",
]
