"""A report that can be passed on: without the directories of the machine that made it."""

import re
from pathlib import PurePath
from typing import Any

from bitladder.records import Part
from bitladder.report.types import Report

# The directories of a path from the root or from home, amid other words: no blank in them. What follows a letter, a
# colon or another slash is part of something else: a Hub id, an address.
_DIRECTORIES = re.compile(r"(?<![\w.:/~\\-])(?:~[\w.-]*)?/(?:[^/\s'\"`<>|:;,()]+/)+")
_PATH = re.compile(r"(?:~[\w.-]*)?/[^:\n]*/[^:\n/]+/?")  # a text that is one, whatever blanks it has


def without_directories(report: Report) -> Report:
    """Return the report with `…/name` for every path from the root or from home; relative paths stay."""
    return report.model_copy(update={name: _shortened(getattr(report, name)) for name in Report.model_fields})


def shorten(text: str) -> str:
    """Return a text with `…/name` for every path from the root or from home that it holds."""
    if _PATH.fullmatch(text):
        return f"…/{PurePath(text).name}"
    return _DIRECTORIES.sub("…/", text)


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        return shorten(value)
    if isinstance(value, Part):
        return value.model_copy(update={name: _shortened(getattr(value, name)) for name in type(value).model_fields})
    if isinstance(value, list | tuple):
        return type(value)(_shortened(item) for item in value)
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    return value
