"""The table that a run closes with, for a terminal of any width."""

import textwrap
from pathlib import PurePath

from rich.table import Table
from rich.text import Text

from bitladder.records import BF16_BITS
from bitladder.report.ladder import Ladder, verified
from bitladder.report.numbers import NONE, NOT_RUN, ORIGINAL, byte_size, percent, runtime_title
from bitladder.report.sentences import last_stages
from bitladder.report.types import Report

_NARROW = 14  # characters of a terminal column's header where there are several held-out sets


def _narrow(*lines: str | None) -> str:
    """Return a column's header whose lines are broken to `_NARROW` characters."""
    return "\n".join(piece for line in lines for piece in textwrap.wrap(line or "", _NARROW))


def _runs(report: Report, scheme: str) -> str:
    """Return whether every runtime that was asked runs the scheme's checkpoint, or the first that doesn't.

    `by rules` where only the pre-flight was done.
    """
    probes = [probe for probe in last_stages(report.probes) if probe.scheme == scheme]
    failed = [f"{runtime_title(p)}: {p.verdict}" for p in probes if p.verdict != "ok"]
    if not probes or failed:
        return failed[0] if failed else NOT_RUN
    return "by rules" if all(probe.stage == "preflight" for probe in probes) else "yes"


def closing_table(report: Report) -> Table:
    """Return the ladder as a table for a terminal of 120 columns; several held-out sets cost it blanks and letters."""
    ladder = Ladder(report)
    several = bool(ladder.further)
    table = Table(
        title=Text(PurePath(report.model.path).name),
        caption=Text(f"weights: {report.model.provenance}") if report.model.provenance else None,
        caption_justify="left",
        padding=(0, 0 if several else 1),
    )
    table.add_column("scheme", overflow="fold")
    unit = ladder.kl_unit.replace(" per ", "/")
    quality = [_narrow("KL ± SE", split, unit) for split in ladder.kl_columns] if several else []
    quality = [*(quality or [f"held-out KL ± SE\n{unit}"]), "per-\nplexity"]
    quality += ["top-1\nagr." if several else "top-1\nagreement"]
    if ladder.has_task:
        named = _narrow("task", ladder.task_split) if ladder.task_split else "worst task,\npoints"
        quality += ["task accuracy\n± SE" if ladder.task_split == ladder.split else named]
    for name in ("coverage", "eff.\nbits" if several else "effective\nbits", "weight\nfiles", *quality):
        table.add_column(Text(name), justify="right", no_wrap=True)
    last = ["verified", "loads"] if report.probes else ["verified"]
    for name in last:
        table.add_column(name, no_wrap=True)
    nothing = [NONE] * len(last)
    table.add_row(
        ORIGINAL, "0.00%", f"{BF16_BITS:.2f}", byte_size(report.source_weight_file_bytes), *ladder.original(), *nothing
    )
    table.add_row("noise floor", NONE, NONE, NONE, *ladder.noise_floor(), *nothing, end_section=True)
    for scheme in report.schemes:
        style = "bold red" if scheme.verified is False else None
        table.add_row(
            Text(scheme.name),
            percent(scheme.coverage),
            f"{scheme.effective_bits:.2f}",
            NOT_RUN if scheme.weight_file_bytes is None else byte_size(scheme.weight_file_bytes),
            *ladder.scheme(scheme),
            verified(scheme.verified),
            *([Text(_runs(report, scheme.name))] if report.probes else []),
            style=style,
        )
    return table
