"""Print docs/runtimes.md with its tables of formats, runtimes and kernels as the code has them; see `make docs`."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from bitladder.formats import FORMATS
from bitladder.formats.targets import TARGETS
from bitladder.runtimes.base import Support
from bitladder.runtimes.registry import VERSIONS
from bitladder.runtimes.vllm.kernels import CARRIED_KERNELS, KERNELS, Cell, Row

PAGE = Path(__file__).parents[1] / "docs" / "runtimes.md"
BEGIN, END = "<!-- from here on `make docs` writes -->", "<!-- up to here -->"
TITLES = {
    "ampere": "Ampere 8.0, 8.6",
    "ada": "Ada 8.9",
    "hopper": "Hopper 9.0",
    "blackwell": "Blackwell 10.0",
    "blackwell_rtx": "Blackwell RTX 12.0",
    "cpu": "CPU without AMX",
    "cpu_amx": "CPU with AMX",
}
WORDS = {"as stored": "as stored", "weight-only": "**16-bit inputs**", "powers of two": "**scales to powers of two**"}


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield _line(head)
    yield _line(["---"] * len(head))
    yield from map(_line, rows)


def _support(row: Support | str | None) -> str:
    if row is None:
        return "not checked"
    if isinstance(row, str):
        return f"no: {row}"
    least = "" if row.capability is None else f", from {row.capability // 10}.{row.capability % 10}"
    mix = "" if row.in_mix is True else "; not in a mix" if row.in_mix is False else f"; in a mix: {row.in_mix}"
    return f"`{row.method}`{least}{mix}"


def methods() -> Iterator[str]:
    """Yield the table of the class that runs a format, by runtime and version."""
    columns: dict[str, Mapping[str, Support | str]] = {}
    for rules in dict.fromkeys(VERSIONS.values()):
        version = f" {rules.version}" if rules.version[0].isdigit() else ""
        columns[f"{rules.runtime}{version}"] = rules.SUPPORT
        if rules.CARRIED:
            columns[f"{rules.runtime}{version}, compressed-tensors"] = rules.CARRIED
    rows = [[f"`{name}`", *(_support(each.get(name)) for each in columns.values())] for name in FORMATS]
    yield from _table(["format", *columns], rows)


def _cell(cell: Cell) -> str:
    if cell.kernel is None:
        words = str(cell.note)
    else:
        what = "**doesn't run**" if cell.arithmetic is None else WORDS[cell.arithmetic]
        words = f"{cell.kernel}: {what}" + (f" ({cell.note})" if cell.note else "")
    return words + (" ✓" if cell.seen else "")


def kernels(rows: Mapping[str, Row]) -> Iterator[str]:
    """Yield the table of kernels of one version; formats with the same row share a line."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for name, row in rows.items():
        lines.setdefault((*(_cell(row.cells[target]) for target in TARGETS), row.source), []).append(f"`{name}`")
    found = [[", ".join(names), *cells] for cells, names in lines.items()]
    yield from _table(["format", *(TITLES[target] for target in TARGETS), "read in"], found)


def page(text: str) -> str:
    """Return the page with its generated part as the code has it now."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    seen = sorted(
        {cell.seen for rows in KERNELS.values() for row in rows.values() for cell in row.cells.values()} - {None}
    )
    carried = "; ".join(f"`{name}` {_cell(cell)}" for name, cell in CARRIED_KERNELS.items())
    parts = ["The class that runs a format, and the least compute capability that it asks for:", "", *methods()]
    for version, rows in KERNELS.items():
        parts += ["", f"vLLM {version}, kernel and arithmetic:", "", *kernels(rows)]
    parts += ["", f"On Ampere in compressed-tensors' layout: {carried}."]
    parts += ["", f"✓ was run: {', '.join(f'`{name}`' for name in seen)}."]
    return "\n".join([before + BEGIN, "", *parts, "", END]) + after


if __name__ == "__main__":
    sys.stdout.write(page(PAGE.read_text(encoding="utf-8")))
