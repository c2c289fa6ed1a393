"""Records -> one page: `build_report(...) -> Report`, written as `report.json` and `report.md`.

A report is a record itself, made of records and nothing else: no model, no torch, no clock. `content` decides what it
says, `render` how that reads (with `report.md.jinja`), for a page and for a terminal.
"""

from bitladder.report.card import render_card
from bitladder.report.compare import compare_runs
from bitladder.report.content import Report, batch_standard_error, build_report
from bitladder.report.render import JSON_FILE, STAGES, closing_table, render_markdown, write_report

__all__ = [
    "JSON_FILE",
    "STAGES",
    "Report",
    "batch_standard_error",
    "build_report",
    "closing_table",
    "compare_runs",
    "render_card",
    "render_markdown",
    "write_report",
]
