"""How a foreign text (a name, a path, an error's message) goes into Markdown: as text, never as markup.

A template's and a table's texts are escaped unless they are `Markdown` already, so that forgetting it does no harm. The
HTML page is made from the same escaped lines: what is escaped for Markdown here is escaped for HTML too.
"""

import re
from typing import Final

_CODE = re.compile(r"`([^`]+)`")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")  # bidi overrides as well
_SPECIAL = re.compile(r"[&<>\\*\[\]|`~$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=[wW]{3})\.")
# What makes a line a heading, a list or a rule.
_START = re.compile(r"\s*(?:#{1,6}|[-+=]+|[0-9]{1,9}[.)])(?=\s|$)")
_PLAIN_CODE: Final = re.compile(r"[^`|\\<>&\s](?:[^`|\\]*[^`|\\\s])?")


class Markdown(str):
    """Text that is Markdown already: it goes into a page as it is."""

    __slots__ = ()


def text(value: object) -> Markdown:
    """Return `value` as one line that shows exactly it, wherever it stands in a page.

    Characters that mean something are written as HTML's references: unlike a backslash these hold in tables and inside
    HTML as well. Source: GitHub Flavored Markdown, 2.5, 6.2 and the extensions for tables and links.
    """
    if isinstance(value, Markdown):
        return value
    line = re.sub(r"\s+", " ", _CONTROL.sub("\ufffd", str(value)))
    start = _START.match(line)
    if start:
        at = start.end() - 1
        return Markdown(_references(line[:at]) + f"&#{ord(line[at])};" + _references(line[at + 1 :]))
    return Markdown(_references(line))


def code(value: object) -> Markdown:
    """Return `value` as a code span."""
    line = " ".join(_CONTROL.sub("\ufffd", str(value)).split())
    if _PLAIN_CODE.fullmatch(line):
        return Markdown(f"`{line}`")
    return Markdown(f"<code>{_references(line)}</code>")


def prose(value: object) -> Markdown:
    """Return a line of our own that holds foreign texts, some of them between backticks: `these` become code.

    A foreign text that holds a backtick moves where code begins, and nothing else.
    """
    if isinstance(value, Markdown):
        return value
    pieces = _CODE.split(re.sub(r"\s+", " ", str(value)))
    return Markdown("".join(code(piece) if index % 2 else text(piece) for index, piece in enumerate(pieces)))


def fence(content: str) -> str:
    """Return the backticks that begin and end a block of code with this content."""
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    return "`" * max(4, longest + 1)


def _references(line: str) -> str:
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", line)
