"""A report's tables, one function each, as rows of text."""

from collections.abc import Mapping
from typing import Any

from bitladder.formats.targets import TARGETS, served
from bitladder.planning.uncertainty import LEVEL as RANK_LEVEL
from bitladder.records import BF16
from bitladder.report.escaping import Markdown
from bitladder.report.ladder import Ladder, metric_format
from bitladder.report.numbers import (
    CONTROLS,
    FLIPS_OFTEN,
    KL_EXPONENT,
    LEFT_ALONE,
    METRIC_NAMES,
    NONE,
    NOT_RUN,
    ORIGINAL,
    STAGES,
    byte_size,
    exact,
    markdown_table,
    number_column,
    percent,
    runtime_name,
    scientific,
    times,
)
from bitladder.report.sentences import of_pair
from bitladder.report.types import Report, ReportedScheme

_LEAST_SHRINKAGE = 0.005  # that is worth a word


def sizes(report: Report) -> Markdown:
    """Return the table of bytes."""
    rows: list[list[str]] = [
        [ORIGINAL, exact(report.searched_source_bytes), exact(report.source_weight_file_bytes), NONE]
    ]
    for scheme in report.schemes:
        files = [scheme.weight_file_bytes, scheme.checkpoint_bytes]
        rows.append([scheme.name, exact(scheme.weight_bytes), *(NOT_RUN if n is None else exact(n) for n in files)])
    header = ["scheme", "searched weights and scales, bytes", "weight files, bytes", "all files, bytes"]
    return markdown_table(header, rows)


def layer_counts(report: Report) -> Markdown:
    """Return the table of how many groups, modules and weights each scheme has in each format that it uses."""
    kinds = list(dict.fromkeys(group.kind for group in report.groups))
    header = ["scheme", "format", "groups", "modules", "weights", *kinds]
    rows = [
        [scheme.name, count.format.upper(), count.groups, count.modules, exact(count.weight_elements)]
        + [count.groups_by_kind[kind] for kind in kinds]
        for scheme in report.schemes
        for count in scheme.format_counts
    ]
    return markdown_table(header, rows, left=2)


def on_devices(report: Report) -> Markdown:
    """Return the table of how each kind of device computes each scheme, and which of them was scored and evaluated."""
    header = ["device", "scored and evaluated so", *(scheme.name for scheme in report.schemes)]
    rows = []
    for name, target in TARGETS.items():
        row = [target.title, "yes" if scored_so(report, name) else "no"]
        for scheme in report.schemes:
            missing, unlike = on_device(scheme, name)
            row.append(", ".join((*missing, *unlike)) or "as stored")
        rows.append(row)
    return markdown_table(header, rows, left=len(header))


def scored_so(report: Report, device: str) -> bool:
    """Return whether scores and evaluations are those of a kind of device."""
    unsupported = TARGETS[device].unsupported & set(report.formats)
    return served(report.formats, device) == report.arithmetic and not unsupported


def on_device(scheme: ReportedScheme, device: str) -> tuple[list[str], list[str]]:
    """Return which of a scheme's formats a kind of device doesn't have, and which it computes otherwise than stored."""
    formats = [count.format for count in scheme.format_counts]
    unsupported = TARGETS[device].unsupported
    able = [one for one in formats if one not in unsupported]
    missing = [f"no {one.upper()}" for one in formats if one in unsupported]
    return missing, [f"{one.upper()} {how}" for one, how in served(able, device).items()]


def groups_table(report: Report, prefix: str) -> Markdown:
    """Return the table of groups: sensitivity, and the format in each scheme."""
    header = ["group", "weights"]
    for name in report.formats:
        suffix = f" {name.upper()}" if len(report.formats) > 1 else ""
        header += [f"sensitivity{suffix}", f"SE{suffix}", f"rank{suffix}", f"rank, {RANK_LEVEL:.0%}{suffix}"]
    header += [scheme.name for scheme in report.schemes]
    rows = []
    for group in report.groups:
        row: list[object] = [group.name.removeprefix(prefix), exact(group.weight_elements)]
        known = {found.format: found for found in group.sensitivities}
        for name in report.formats:
            if name not in known:
                row += [NONE] * 4
                continue
            found = known[name]
            rank = NONE if found.rank is None else found.rank
            span = found.rank_interval
            between = NONE if span is None else f"{span[0]}" if span[0] == span[1] else f"{span[0]} to {span[1]}"
            row += [scientific(found.score), scientific(found.standard_error), rank, between]
        for scheme in report.schemes:
            name = group.formats[scheme.name]
            flips = scheme.unsettled is not None and scheme.unsettled.shares.get(group.name, 0) >= FLIPS_OFTEN
            row.append((LEFT_ALONE if name == BF16 else name.upper()) + (" ?" if flips else ""))
        rows.append(row)
    return markdown_table(header, rows)


def positions_table(report: Report, prefix: str) -> dict[str, Any]:
    """Return one entry a format with its table of groups that move, and the table of schemes; {} where unknown."""
    if report.positions is None:
        return {}
    rankings = []
    for ranking in report.positions.rankings:
        rows = [
            [moved.group.removeprefix(prefix), moved.rank_text, moved.rank_both, percent(moved.image_share, 1)]
            for moved in ranking.moved
        ]
        header = ["group", "rank, text only", "rank, text and image", "image share of its score"]
        correlation = ranking.rank_correlation
        rankings.append(
            {
                "format": ranking.format,
                "image_share": ranking.image_share,
                "rank_correlation": NONE if correlation is None else f"{correlation:.3f}",
                "moved": markdown_table(header, rows) if rows else "",
            }
        )
    changes = report.positions.scheme_changes
    rows = [[name, "can't be met" if count is None else exact(count)] for name, count in changes.items()]
    header = ["scheme", f"of {len(report.groups)} groups, in another format"]
    return {"rankings": rankings, "schemes": markdown_table(header, rows) if rows else ""}


def evaluation_table(report: Report, ladder: Ladder) -> Markdown:
    """Return the table of every metric of every scheme, with its error, noise floor and the original's value."""
    several = bool(ladder.further or report.tasks)
    header = ["scheme", *(["set"] if several else []), "metric"]
    header += ["value", "SE", "noise floor", "original", "samples"]
    rows = []
    for scheme in report.schemes:
        if scheme.results is None:
            rows.append([scheme.name, *[NOT_RUN] * (len(header) - 1)])
        for result in scheme.results or ():
            (show, unit), named = metric_format(result, ladder), METRIC_NAMES.get(result.metric, result.metric)
            rows.append(
                [
                    scheme.name,
                    *([result.split] if several else []),
                    named if unit == named else f"{named}, {unit}",
                    *(show(v) for v in (result.value, result.standard_error, result.noise_floor, result.reference)),
                    exact(result.samples),
                ]
            )
    return markdown_table(header, rows, left=3 if several else 2)


def held_out(report: Report) -> list[dict[str, Any]]:
    """Return the held-out data sets, each with the schemes that were evaluated on it."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for evaluation in report.evaluations:
        key = (evaluation.split, evaluation.data.sha256, evaluation.arithmetic)
        found.setdefault(key, {"evaluation": evaluation, "schemes": []})["schemes"].append(evaluation.scheme)
    return list(found.values())


def verification_table(report: Report) -> dict[str, Any]:
    """Return the tables of the verification, and its findings."""
    verification = report.verification
    if verification is None:
        return {}
    checks = {check.scheme: check for check in verification.checkpoints}
    rows: list[list[object]] = []
    for scheme in report.schemes:
        check = checks.get(scheme.name)
        if check is None:
            rows.append([scheme.name, *[NOT_RUN] * 5])
            continue
        counts = (check.tensors_checked, check.codes_checked, check.bytes_identical, len(check.findings))
        rows.append([scheme.name, *(exact(count) for count in counts), "yes" if check.ok else "NO"])
    header = ["checkpoint", "tensors checked", "codes checked", "bytes equal to the source's", "findings", "matches"]
    damaged = [check.scheme for check in verification.checkpoints if not check.ok]
    pairs = [
        [f"{p.first} / {p.second}", p.modules_expected, p.modules_differing, of_pair(p, damaged)]
        for p in verification.pairs
    ]
    findings = [(check.scheme, finding) for check in verification.checkpoints for finding in check.findings]
    findings += [(f"{pair.first} / {pair.second}", finding) for pair in verification.pairs for finding in pair.findings]
    return {
        "checkpoints": markdown_table(header, rows),
        "how": "By `bitladder run`: what it has read before is not read again while size and modification time stay; "
        "`bitladder verify` reads every byte."
        if verification.times_trusted
        else "By `bitladder verify`: every byte of the original and of the checkpoints was read.",
        "pairs": markdown_table(["pair", "modules that should differ", "modules that differ", "findings"], pairs)
        if pairs
        else "",
        "findings": [
            f"{where}: `{finding.file}`{f', `{finding.tensor}`' if finding.tensor else ''}: {finding.problem}; "
            f"{finding.remedy}"
            for where, finding in findings
        ],
    }


def controls(report: Report, ladder: Ladder) -> dict[str, Any]:
    """Return the tables of the control arms; {} where there are none."""
    if not report.control_comparisons:
        return {}
    values = [comparison.mean for comparison in report.control_comparisons]
    column = number_column(values, [], KL_EXPONENT)
    rows = []
    for found in report.control_comparisons:
        span = NONE if found.arms == 1 else f"{column.show(found.least)} to {column.show(found.most)}"
        kls = [NOT_RUN if found.kl is None else column.show(found.kl), column.show(found.mean), span]
        ratio = NONE if found.ratio is None else f"{found.ratio:.2f}"
        rows.append([found.scheme, CONTROLS[found.control], found.arms, *kls, ratio])
    header = ["scheme", "control at its bits", "arms", f"scheme's KL, {ladder.kl_unit}", "control's KL (mean)", "range"]
    return {"table": markdown_table([*header, "scheme / control"], rows, left=2), "left_out": report.controls_left_out}


def prediction_table(report: Report, ladder: Ladder) -> dict[str, Any]:
    """Return the table of predicted against measured KL; {} where too little was measured."""
    if report.prediction is None:
        return {}
    points = report.prediction.points
    column = number_column([point.measured for point in points], [], KL_EXPONENT)
    rows = []
    for point in sorted(points, key=lambda point: point.measured):
        ratio = NONE if point.predicted is None else f"{point.predicted / point.measured:.2f}"
        span = NONE if point.low is None else f"{column.show(point.low)} to {column.show(point.high)}"
        kind = "control" if point.is_control else "scheme"
        row = [point.name, kind, scientific(point.score), column.show(point.predicted), span]
        rows.append([*row, column.show(point.measured), ratio])
    interval = f"{percent(report.prediction.level, 0)} interval"
    header = [
        "scheme or arm",
        "which",
        f"score, {report.score_unit}",
        f"predicted KL, {ladder.kl_unit}",
        interval,
        "measured KL",
        "ratio",
    ]
    return {
        "table": markdown_table(header, rows, left=2),
        "factor": scientific(report.prediction.factor),
        "exponent": f"{report.prediction.exponent:.3f}",
        "meaning": _meaning(report.prediction.weights, report.prediction.shrinkage),
        "median_error": percent(report.prediction.median_error, 1),
        "inside": percent(report.prediction.inside, 0),
        "points": len(points),
    }


def _meaning(weights: Mapping[str, float], shrinkage: float) -> str:
    """Return in words what a score counts for by format, where there are several, and how far it is shrunk."""
    counts = ", ".join(f"{weight:.2f} in {name}" for name, weight in weights.items())
    said = [f"A score counts {counts}."] if len(weights) > 1 else []
    if shrinkage >= _LEAST_SHRINKAGE:
        said.append(f"Scores are taken {percent(shrinkage, 0)} of the way to the mean of their format.")
    return " ".join(said)


def runtimes(report: Report) -> dict[str, Any]:
    """Return the tables of what the runtimes do with the checkpoints, and what was found; {} where none was asked."""
    if not report.probes:
        return {}
    rows, speeds, served, findings = [], [], [], []
    for probe in report.probes:
        where = [probe.scheme, runtime_name(probe)]
        modules = sum(probe.layers.values())
        layers = ", ".join(f"{exact(count)} {name.upper()}" for name, count in probe.layers.items())
        promised = f"{exact(probe.as_promised)} of {exact(modules)}" if modules else NONE
        rows.append([*where, STAGES[probe.stage], probe.device or NONE, probe.verdict, layers or NONE, promised])
        for found in probe.findings:
            text = f"{' '.join(where)}, {STAGES[probe.stage]}: {found.severity}, {found.error_class}: `{found.where}`: "
            findings.append(f"{text}{found.problem}; {found.remedy}")
        for speed in probe.throughput:
            source = NONE if speed.ratio is None else f"{speed.source_tokens_per_second:,.0f}"
            numbers = [f"{speed.tokens_per_second:,.0f}", source, times(speed.ratio)]
            speeds.append([*where, speed.phase, exact(speed.requests), *numbers])
        for difference in probe.log_probs:
            column = number_column([difference.mean_abs_difference], [], 0)
            values = (difference.mean_abs_difference, difference.source_mean_abs_difference, difference.tolerance)
            served.append([*where, difference.split, exact(difference.tokens), *(column.show(v) for v in values)])
    header = ["scheme", "runtime", "stage", "device", "verdict", "linear modules run in", "as the manifest promises"]
    speed_header = ["scheme", "runtime", "phase", "requests", "tokens/s", "original's", "times the original"]
    served_header = ["scheme", "runtime", "held-out set", "tokens", "mean |Δ log-prob|", "original's", "tolerance"]
    return {
        "table": markdown_table(header, rows, left=7),
        "speeds": markdown_table(speed_header, speeds, left=3) if speeds else "",
        "served": markdown_table(served_header, served, left=3) if served else "",
        "findings": findings,
    }


def phases_table(report: Report) -> Markdown:
    """Return the table of what each step took."""
    header = ["phase", "seconds", "peak memory", "peak GPU memory"]
    rows = [
        [phase.phase, f"{phase.seconds:,.1f}", byte_size(phase.peak_rss_bytes), byte_size(phase.peak_gpu_bytes)]
        for phase in report.phases
    ]
    rows.append(["total", f"{sum(phase.seconds for phase in report.phases):,.1f}", "", ""])
    return markdown_table(header, rows)
