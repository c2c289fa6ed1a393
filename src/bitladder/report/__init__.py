"""Records -> one page: `build_report(...) -> Report`, written as `report.json`, `report.md` and `report.html`.

A report is a record itself, made of records and nothing else: no model, no torch, no clock. `build` decides what it
says, `verdict` what follows from it, `tables` how that reads (with `report.md.jinja`), for a page and for a terminal;
`page` makes it HTML with plots, `figures` files for papers, `card` a checkpoint's model card.
"""

from pathlib import Path

from bitladder.report.build import build_report
from bitladder.report.card import render_card
from bitladder.report.compare import compare_runs
from bitladder.report.figures import check_figures, write_figures
from bitladder.report.groups import batch_standard_error
from bitladder.report.markdown import JSON_FILE, render_markdown
from bitladder.report.numbers import STAGES
from bitladder.report.page import render_html
from bitladder.report.terminal import closing_table
from bitladder.report.types import Report
from bitladder.storage import atomic_write

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
    "render_card",
    "render_html",
    "render_markdown",
    "write_figures",
    "write_report",
]


def write_report(report: Report, directory: Path) -> None:
    """Write `report.json`, `report.md` and `report.html` into `directory`, each whole or not at all.

    Raises:
        OutputError: no space, no permission.
    """
    report.write(directory / JSON_FILE)
    atomic_write(directory / MARKDOWN_FILE, render_markdown(report))
    atomic_write(directory / HTML_FILE, render_html(report))
