"""A report's three files."""

from pathlib import Path

from bitladder.report import HTML_FILE, JSON_FILE, MARKDOWN_FILE
from bitladder.report.markdown import render_markdown
from bitladder.report.page import render_html
from bitladder.report.types import Report
from bitladder.storage import atomic_write


def write_report(report: Report, directory: Path) -> None:
    """Write `report.json`, `report.md` and `report.html` into `directory`, each whole or not at all.

    Raises:
        OutputError: no space, no permission.
    """
    report.write(directory / JSON_FILE)
    atomic_write(directory / MARKDOWN_FILE, render_markdown(report))
    atomic_write(directory / HTML_FILE, render_html(report))
