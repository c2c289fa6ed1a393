"""Two runs side by side: `compare_runs(first, second) -> Markdown`: text-only and image+text, two engines, two models.

Only what both have is compared: schemes of the same name, groups of the same name. KL is compared only where both were
evaluated on the same samples.
"""

from collections.abc import Sequence
from pathlib import PurePath

from bitladder.errors import RecordError
from bitladder.records import KL
from bitladder.report.escaping import text
from bitladder.report.groups import MAX_MOVED, rank_correlation, ranks_of
from bitladder.report.numbers import KL_EXPONENT, NONE, data_names, exact, markdown_table, percent, power_of_ten
from bitladder.report.types import Report, ReportedGroup


def compare_runs(first: Report, second: Report, names: tuple[str, str]) -> str:
    """Return a page that sets two reports side by side.

    Args:
        first: one run's.
        second: another's.
        names: what the two are called on the page.

    Raises:
        RecordError: the two have neither a scheme nor a group in common.
    """
    common = [group for group in first.groups if group.name in {other.name for other in second.groups}]
    schemes = [s.name for s in first.schemes if s.name in {other.name for other in second.schemes}]
    if not common and not schemes:
        raise RecordError(
            f"{names[0]} and {names[1]} have neither a scheme nor a quant group of the same name; "
            "compare runs of one recipe, or of one model"
        )
    parts = [f"# {text(names[0])} and {text(names[1])}", _settings(first, second, names)]
    if schemes:
        parts += ["## Schemes of the same name", _schemes(first, second, names, schemes)]
    if common:
        parts += ["## Ranking of the groups", *_ranking(first, second, names, common)]
    return "\n\n".join(parts) + "\n"


def _settings(first: Report, second: Report, names: tuple[str, str]) -> str:
    """Return the table of what was measured, and how."""
    rows = []
    for what, values in {
        "model": [PurePath(r.model.path).name for r in (first, second)],
        "calibration": [data_names(r.calibration) for r in (first, second)],
        "samples, tokens": [f"{exact(r.calibration.samples)}, {exact(r.calibration.tokens)}" for r in (first, second)],
        "engine, method": [f"{r.engine}, {r.method}" for r in (first, second)],
        "formats": [", ".join(r.formats) for r in (first, second)],
        "codes": ["nearest" if r.rounding is None else r.rounding.method for r in (first, second)],
        "score unit": [r.score_unit for r in (first, second)],
        "searched weights": [exact(r.searched_weights) for r in (first, second)],
    }.items():
        rows.append([what, *values, "" if values[0] == values[1] else "differs"])
    return markdown_table(["", *names, ""], rows, left=4)


def _schemes(first: Report, second: Report, names: tuple[str, str], schemes: Sequence[str]) -> str:
    """Return the table of schemes that both have."""
    header = ["scheme", *(f"bits, {name}" for name in names), "groups in another format"]
    header += [f"KL, {name}, {power_of_ten(KL_EXPONENT)} nats per token" for name in names]
    rows = []
    for name in schemes:
        one, other = (next(s for s in report.schemes if s.name == name) for report in (first, second))
        formats = [{group.name: group.formats[name] for group in report.groups} for report in (first, second)]
        differing = sum(formats[0][group] != formats[1][group] for group in set(formats[0]) & set(formats[1]))
        kls = _kls(first, second, name)
        rows.append([name, f"{one.effective_bits:.3f}", f"{other.effective_bits:.3f}", differing, *kls])
    return markdown_table(header, rows)


def _kls(first: Report, second: Report, name: str) -> list[str]:
    """Return a scheme's KL in both runs; "other data" where they weren't taken on the same samples."""
    found, data = [], []
    for report in (first, second):
        scheme = next(s for s in report.schemes if s.name == name)
        split = report.splits[0] if report.splits else ""
        result = scheme.result(KL, split)
        found.append(None if result is None else result.value)
        data += [e.data.sha256 for e in report.evaluations if (e.scheme, e.split) == (name, split)]
    if None not in found and len(set(data)) > 1:
        return ["other data"] * 2
    return [NONE if value is None else f"{value * 10.0**-KL_EXPONENT:.3f}" for value in found]


def _ranking(first: Report, second: Report, names: tuple[str, str], common: Sequence[ReportedGroup]) -> list[str]:
    """Return what is said of each format that both measured."""
    parts = []
    other = {group.name: group for group in second.groups}
    for format_name in (name for name in first.formats if name in second.formats):
        one, two = _densities(common, format_name), _densities([other[group.name] for group in common], format_name)
        both = [name for name in one if name in two]
        one, two = {name: one[name] for name in both}, {name: two[name] for name in both}
        correlation = rank_correlation(list(one.values()), list(two.values())) if both else None
        shown = "not defined" if correlation is None else f"{correlation:.3f}"
        left = len(first.groups) + len(second.groups) - 2 * len(common)
        parts.append(
            f"{text(format_name.upper())}: Spearman's rank correlation of score per bit saved over {len(both)} common "
            f"groups: {shown}." + (f" {left} groups are in one run only." if left else "")
        )
        ranks = (ranks_of(one), ranks_of(two))
        moved = [name for name in both if ranks[0][name] != ranks[1][name]]
        if moved:
            moved.sort(key=lambda name: -abs(ranks[0][name] - ranks[1][name]))
            rows = [[name, ranks[0][name], ranks[1][name]] for name in moved[:MAX_MOVED]]
            share = percent(len(moved) / len(both), 0)
            parts.append(f"The groups whose rank differs most ({share} of the groups have another rank):")
            parts.append(markdown_table(["group", *(f"rank, {name}" for name in names)], rows))
    return parts


def _densities(groups: Sequence[ReportedGroup], format_name: str) -> dict[str, float]:
    """Return each group's score per bit saved, without those that save nothing."""
    found = {}
    for group in groups:
        density = next((s.score_per_bit_saved for s in group.sensitivities if s.format == format_name), None)
        if density is not None:
            found[group.name] = density
    return found
