"""How a report reads: Markdown for a page, a table for a terminal. Numbers are rounded here and nowhere else.

A column keeps one number of decimals, set by the smallest standard error in it, so that values can be compared by eye.
"""

import itertools
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import jinja2
import yaml
from rich.table import Table
from rich.text import Text

from bitladder.records import BF16, BF16_BITS, KL, DataSummary, EvalResult, PairDifference
from bitladder.report import escaping
from bitladder.report.content import WITHIN_NOISE_ERRORS, Report, ReportedProbe, ReportedScheme
from bitladder.report.escaping import Markdown, prose
from bitladder.uncertainty import LEVEL as RANK_LEVEL
from bitladder.uncertainty import MULTIPLES

JSON_FILE = "report.json"
NOT_RUN = "not run"
NONE = "–"
LEFT_ALONE = "·"  # a group that stays in 16 bits
KL_EXPONENT = -3  # KL is shown in 10⁻³ nats per token
ORIGINAL = "original"
NOISE_FLOOR = "original in BF16 arithmetic (noise floor)"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MAX_DECIMALS = 5
_SHARES = ("top1_agreement", "task_accuracy")  # metrics shown in percent
_METRIC_NAMES = {
    KL: "KL to the original",
    "perplexity": "perplexity",
    "top1_agreement": "top-1 agreement",
    "task_accuracy": "task accuracy",
}
FLIPS_OFTEN = 0.1  # share of the draws from which on a group is marked
CONTROLS = {
    "random": "random groups",
    "inverse": "most sensitive first",
    "first_last": "first and last layers kept",
    "largest": "largest groups first",
    "lowest_score": "least sensitive first, whatever they save",
    "modelopt": "ModelOpt's own choice from these scores",
}
STAGES = {"preflight": "pre-flight", "load": "loader", "generate": "engine"}  # in the order of what they prove
_RUNTIME_NAMES = {"vllm": "vLLM", "sglang": "SGLang", "tensorrt_llm": "TensorRT-LLM"}
_MIB = 1 << 20
_GIB = 1 << 30
_NARROW = 14  # characters of a terminal column's header where there are several held-out sets


@dataclass(frozen=True)
class _Column:
    """How the numbers of one column are shown: times 10^-exponent, with so many decimals."""

    exponent: int
    decimals: int

    def show(self, value: float | None, error: float | None = None) -> str:
        if value is None:
            return NONE
        text = self._number(value)
        return text if error is None else f"{text} ± {self._number(error)}"

    def _number(self, value: float) -> str:
        return f"{value * 10.0**-self.exponent:,.{self.decimals}f}"


def _column(values: Iterable[float | None], errors: Iterable[float | None], exponent: int, digits: int = 3) -> _Column:
    """Return a column that shows 2 digits of the smallest error, or `digits` of the smallest value without errors."""
    positive = [abs(error) for error in errors if error]
    kept = 2
    if not positive:
        positive, kept = [abs(value) for value in values if value], digits
    if not positive:
        return _Column(exponent=exponent, decimals=0)
    decimals = kept - 1 - math.floor(math.log10(min(positive))) + exponent
    return _Column(exponent=exponent, decimals=min(max(decimals, 0), _MAX_DECIMALS))


def power_of_ten(exponent: int) -> str:
    """Return `10⁻³` for -3."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def _with_unit(exponent: int, unit: str) -> str:
    return f"{power_of_ten(exponent)} {unit}" if exponent else unit


def scientific(value: float | None) -> str:
    """Return `value` with three significant digits, in the same form for every magnitude."""
    return NONE if value is None else f"{value:.2e}"


def percent(value: float | None, decimals: int = 2) -> str:
    """Return a share as a percentage."""
    return NONE if value is None else f"{100 * value:.{decimals}f}%"


def byte_size(count: int | None) -> str:
    """Return bytes in GiB from 10 GiB on, in MiB below; four digits or more have no decimals."""
    if count is None:
        return NONE
    if count >= 10 * _GIB:
        return f"{count / _GIB:,.2f} GiB"
    return f"{count / _MIB:,.{0 if count >= 1000 * _MIB else 1}f} MiB"


def exact(count: int | None) -> str:
    """Return an integer in full, with separators."""
    return NONE if count is None else f"{count:,}"


def data_names(data: DataSummary, quote: str = "") -> str:
    """Return the file name and kind of a data set, or those of all sets that it is made of; for `prose`."""
    return " + ".join(f"{quote}{PurePath(one.source).name}{quote} ({data_kind(one)})" for one in data.parts or (data,))


def data_kind(data: DataSummary) -> str:
    """Return a data set's kind, for conversations which tokens count, and how many nulls were left out."""
    counted = "" if data.counted is None else f", {data.counted} count"
    return data.kind + counted + (f", {exact(data.null_rows)} null rows left out" if data.null_rows else "")


def rounding(report: Report) -> str:
    """Return how the codes were chosen, and what that does."""
    chosen = report.rounding
    if chosen is None:
        return "every weight to its nearest"
    errors = [
        statistics.median(getattr(module, name) for module in chosen.modules)
        for name in ("output_error", "nearest_output_error")
    ]
    scored = "these" if chosen.scored else "the nearest"
    return (
        f"compensated (GPTQ), damping {chosen.damping:g}, from {exact(chosen.samples)} calibration samples; the error "
        f"of a module's output by its weights is {percent(errors[0])} at the median, with the nearest codes "
        f"{percent(errors[1])}; the scores are those of {scored} codes"
    )


def _size_of(count: int | None, whole: int | None) -> str:
    """Return a size, and its share of `whole`."""
    if count is None:
        return NOT_RUN
    return byte_size(count) + (f" ({percent(count / whole, 1)})" if whole else "")


def asked_of(asked: dict[str, Any]) -> str:
    """Return in words what a recipe's scheme entry asks for."""
    given = {key: value for key, value in asked.items() if key != "name" and value not in (None, (), [], "")}
    words = []
    for key, value in given.items():
        if key == "coverage":
            words.append(f"coverage ≤ {percent(value, 0) if float(100 * value).is_integer() else percent(value)}")
        elif key in ("effective_bits", "max_predicted_score"):
            words.append(f"{key.removeprefix('max_').replace('_', ' ')} ≤ {value:g}")
        elif key == "image_weight":
            words.append(f"image weight {value:g}")
        elif key == "kv_cache":
            words.append(f"KV cache {value.upper() if value != 'none' else 'in 16 bits'}")
        elif isinstance(value, list | tuple):
            words.append(f"{key} {', '.join(f'`{item}`' for item in value)}")
        else:
            words.append(f"{key} {value}")
    return "; ".join(words) or NONE


def cell(value: object) -> str:
    """Return `value` so that it stays inside one cell of a Markdown table."""
    return prose(value).strip()


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> Markdown:
    """Return a Markdown table; the first `left` columns are aligned left, the others right."""
    lines = [
        [cell(name) for name in header],
        [":---" if index < left else "---:" for index in range(len(header))],
        *([cell(value) for value in row] for row in rows),
    ]
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines))


def _verified(verified: bool | None) -> str:
    return NOT_RUN if verified is None else "yes" if verified else "NO"


def _exponent_for(values: Iterable[float], unit: str) -> int:
    """Return the power of ten to show values in; 10⁻³ where they are predicted KL, beside the measured one."""
    if unit == "nats per token":
        return KL_EXPONENT
    largest = max((abs(value) for value in values), default=0.0)
    exponent = math.floor(math.log10(largest)) if largest else 0
    return 0 if -1 <= exponent <= 3 else exponent


class Ladder:
    """The rows that the page's summary and the terminal's closing table share."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.evaluated = any(scheme.results is not None for scheme in report.schemes)
        self.split = report.splits[0] if report.splits else ""
        self.further = report.splits[1:]
        first = report.first_result(KL, self.split)
        self.kl_unit = _with_unit(KL_EXPONENT, first.unit if first else "nats per token")
        self.kl_columns = {split: self._kl_column_of(split) for split in (self.split, *self.further)}
        self.kl_column = self.kl_columns[self.split]
        predicted = [scheme.predicted_score for scheme in report.schemes]
        exponent = _exponent_for(predicted, report.score_unit)
        self.predicted_unit = _with_unit(exponent, report.score_unit)
        self.predicted_column = _column(predicted, [s.predicted_standard_error for s in report.schemes], exponent)
        # The first set that has a task.
        self.task_split = next((s for s in report.splits if report.first_result("task_accuracy", s)), None)
        self.has_task = self.task_split is not None

    def _kl_column_of(self, split: str) -> _Column:
        kls = [result for scheme in self.report.schemes if (result := scheme.result(KL, split))]
        return _column([r.value for r in kls], [r.standard_error for r in kls], KL_EXPONENT)

    def _cells(self, kls: Sequence[str], perplexity: float | None, top1: float | None, task: str) -> list[str]:
        cells = [*kls, NONE if perplexity is None else f"{perplexity:,.2f}", percent(top1)]
        return [*cells, task] if self.has_task else cells

    def _not_run(self) -> list[str]:
        return [NOT_RUN] * (len(self.kl_columns) + 2 + self.has_task)

    def scheme(self, scheme: ReportedScheme) -> list[str]:
        """Return a scheme's KL on each held-out set, perplexity, top-1 agreement and, where there is one, accuracy."""
        if scheme.results is None:
            return self._not_run()
        kls = []
        for split, column in self.kl_columns.items():
            kl = scheme.result(KL, split)
            kls.append(column.show(kl.value, kl.standard_error) if kl else NONE)
        perplexity, top1 = (scheme.result(metric, self.split) for metric in ("perplexity", "top1_agreement"))
        return self._cells(
            kls,
            perplexity.value if perplexity else None,
            top1.value if top1 else None,
            _share_with_error(scheme.result("task_accuracy", self.task_split) if self.task_split else None),
        )

    def original(self) -> list[str]:
        """Return the original's own values of these metrics."""
        if not self.evaluated:
            return self._not_run()
        perplexity, task = self._first("perplexity"), self._first("task_accuracy")
        return self._cells(
            ["0"] * len(self.kl_columns),
            perplexity.reference if perplexity else None,
            1.0,
            percent(task.reference if task else None, 1),
        )

    def noise_floor(self) -> list[str]:
        """Return what BF16 arithmetic alone does to the original."""
        if not self.evaluated:
            return self._not_run()
        kls = []
        for split, column in self.kl_columns.items():
            kl = self.report.first_result(KL, split)
            kls.append(column.show(kl.noise_floor if kl else None))
        perplexity, top1, task = (
            result.noise_floor if (result := self._first(metric)) else None
            for metric in ("perplexity", "top1_agreement", "task_accuracy")
        )
        return self._cells(kls, perplexity, top1, percent(task, 1))

    def _first(self, metric: str) -> EvalResult | None:
        """Return a scheme's result of the metric, on the held-out set that the table shows it of."""
        split = self.task_split if metric == "task_accuracy" else self.split
        return self.report.first_result(metric, split) if split is not None else None


def _share_with_error(result: EvalResult | None) -> str:
    if result is None:
        return NONE
    error = result.standard_error
    return percent(result.value, 1) + ("" if error is None else f" ± {percent(error, 1)}")


def _of(split: str, ladder: Ladder) -> str:
    """Return how a column names its held-out set, where there are several."""
    return f" on {split}" if ladder.further else ""


def _task_of(ladder: Ladder) -> str:
    """Return how the task's column names its held-out set, where it isn't that of the columns beside it."""
    return f" on {ladder.task_split}" if ladder.task_split != ladder.split else ""


def _summary(report: Report, ladder: Ladder) -> Markdown:
    quality = [f"held-out KL{_of(ladder.split, ladder)} ± SE, {ladder.kl_unit}"]
    quality += [f"KL{_of(split, ladder)} ± SE, {ladder.kl_unit}" for split in ladder.further]
    quality += ["perplexity", "top-1 agreement"]
    quality += [f"task accuracy{_task_of(ladder)} ± SE"] if ladder.has_task else []
    has_cache = any(scheme.kv_cache_format for scheme in report.schemes)
    header = ["scheme", "asked", "coverage", "effective bits", *(["KV cache"] if has_cache else [])]
    header += ["searched weights", "weight files", f"predicted score ± SE, {ladder.predicted_unit}"]
    header += [*quality, "verified"]
    searched, source = report.searched_source_bytes, report.source_weight_file_bytes
    cache = [BF16.upper()] if has_cache else []
    costs = ["0.00%", f"{BF16_BITS:.2f}", *cache, byte_size(searched), byte_size(source), "0"]
    rows = [
        [ORIGINAL, NONE, *costs, *ladder.original(), NONE],
        [NOISE_FLOOR, NONE, *[NONE] * len(costs), *ladder.noise_floor(), NONE],
    ]
    for scheme in report.schemes:
        costs = [
            percent(scheme.coverage),
            f"{scheme.effective_bits:.2f}",
            *([(scheme.kv_cache_format or BF16).upper()] if has_cache else []),
            _size_of(scheme.weight_bytes, searched),
            _size_of(scheme.weight_file_bytes, source),
            ladder.predicted_column.show(scheme.predicted_score, scheme.predicted_standard_error),
        ]
        rows.append([scheme.name, asked_of(scheme.asked), *costs, *ladder.scheme(scheme), _verified(scheme.verified)])
    return markdown_table(header, rows, left=2)


def _noise_lines(report: Report, ladder: Ladder) -> list[str]:
    """Return one sentence for everything that the evaluation can't tell apart, or one that says that it can."""
    if not ladder.evaluated:
        return [f"Held-out evaluation: {NOT_RUN}."]
    if not report.comparable:
        return ["The schemes were evaluated on different data or in different arithmetic: their KL can't be compared."]
    lines = []
    for pair in report.comparisons:
        if pair.within_noise:
            column = _column([], [pair.standard_error], KL_EXPONENT)
            shown = column.show(pair.difference, pair.standard_error)
            lines.append(
                f"Within noise: `{pair.first}` and `{pair.second}`. Their KL differs by ({shown}) × {ladder.kl_unit}, "
                f"less than {WITHIN_NOISE_ERRORS:g} standard errors of the difference: "
                "this evaluation doesn't tell them apart."
            )
    for name in report.below_noise_floor:
        result = next(s for s in report.schemes if s.name == name).result(KL, ladder.split)
        assert result is not None
        column = _column([result.value, result.noise_floor], [result.standard_error], KL_EXPONENT)
        lines.append(
            f"Below the noise floor: `{name}`. Its KL is {column.show(result.value)} × {ladder.kl_unit}; BF16 "
            f"arithmetic alone moves the original by {column.show(result.noise_floor)}."
        )
    unknown = [f"`{pair.first}` and `{pair.second}`" for pair in report.comparisons if pair.within_noise is None]
    if unknown:
        lines.append(f"No standard error of the KL, so no statement about noise: {'; '.join(unknown)}.")
    floors_known = all(r.noise_floor is not None for s in report.schemes if (r := s.result(KL, ladder.split)))
    if not lines and report.comparisons and floors_known:
        lines.append(
            "Every evaluated scheme's KL differs from its neighbour's by at least "
            f"{WITHIN_NOISE_ERRORS:g} standard errors of the difference, and none is below the noise floor."
        )
    return lines


def _nesting_lines(report: Report) -> list[str]:
    """Return the chains of nested schemes, and which neighbours aren't nested."""
    lines = [
        f"Nested: {' ⊂ '.join(f'`{name}`' for name in chain)}. Each quantises every group of the one before, and more."
        for chain in report.nesting
    ]
    for first, second in itertools.pairwise(report.schemes):
        if second.name not in first.nested_in:
            caches = first.kv_cache_format or second.kv_cache_format
            lines.append(
                f"Not nested: `{first.name}` and `{second.name}`. Each quantises groups"
                f"{' or a KV cache' if caches else ''} that the other leaves or has in another format."
            )
    return lines


def _edge_lines(report: Report, prefix: str) -> list[str]:
    """Return a sentence for every scheme whose last group taken and first group left can't be told apart."""
    return [
        f"Edge within noise: `{edge.scheme}` takes `{edge.taken.removeprefix(prefix)}` and leaves "
        f"`{edge.left.removeprefix(prefix)}`; their scores per bit saved differ by less than "
        f"{WITHIN_NOISE_ERRORS:g} standard errors over the scoring batches, so either could have been chosen."
        for edge in report.edges
        if edge.within_noise
    ]


def _sizes(report: Report) -> Markdown:
    rows: list[list[str]] = [
        [ORIGINAL, exact(report.searched_source_bytes), exact(report.source_weight_file_bytes), NONE]
    ]
    for scheme in report.schemes:
        files = [scheme.weight_file_bytes, scheme.checkpoint_bytes]
        rows.append([scheme.name, exact(scheme.weight_bytes), *(NOT_RUN if n is None else exact(n) for n in files)])
    header = ["scheme", "searched weights and scales, bytes", "weight files, bytes", "all files, bytes"]
    return markdown_table(header, rows)


def layer_counts(report: Report) -> Markdown:
    """Return the table of how many groups, modules and weights each scheme has in each format."""
    kinds = list(dict.fromkeys(group.kind for group in report.groups))
    header = ["scheme", "format", "groups", "modules", "weights", *kinds]
    rows = [
        [scheme.name, count.format.upper(), count.groups, count.modules, exact(count.weight_elements)]
        + [count.groups_by_kind[kind] for kind in kinds]
        for scheme in report.schemes
        for count in scheme.format_counts
    ]
    return markdown_table(header, rows, left=2)


def common_prefix(names: Sequence[str]) -> str:
    """Return the dotted path, its last dot included, that all names begin with; "" where there is none."""
    parts = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) != 1:
            break
        shared.append(level[0])
    return "".join(f"{part}." for part in shared)


def _groups(report: Report, prefix: str) -> Markdown:
    header = ["group", "weights"]
    for name in report.formats:
        suffix = f" {name.upper()}" if len(report.formats) > 1 else ""
        header += [f"sensitivity{suffix}", f"SE{suffix}", f"rank{suffix}", f"rank, {RANK_LEVEL:.0%}{suffix}"]
    header += [scheme.name for scheme in report.schemes]
    rows = []
    for group in report.groups:
        row: list[object] = [group.name.removeprefix(prefix), exact(group.weight_elements)]
        for found in group.sensitivities:
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


def _positions(report: Report, prefix: str) -> dict[str, Any]:
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
    several = bool(ladder.further)
    header = ["scheme", *(["set"] if several else []), "metric"]
    header += ["value", "SE", "noise floor", "original", "samples", "unit"]
    rows = []
    for scheme in report.schemes:
        if scheme.results is None:
            rows.append([scheme.name, *[NOT_RUN] * (len(header) - 1)])
        for result in scheme.results or ():
            show, unit = _metric_format(result, ladder)
            rows.append(
                [
                    scheme.name,
                    *([result.split] if several else []),
                    _METRIC_NAMES.get(result.metric, result.metric),
                    *(show(v) for v in (result.value, result.standard_error, result.noise_floor, result.reference)),
                    exact(result.samples),
                    unit,
                ]
            )
    return markdown_table(header, rows, left=3 if several else 2)


def _metric_format(result: EvalResult, ladder: Ladder) -> tuple[Any, str]:
    """Return how a metric's numbers are shown, and in which unit."""
    if result.metric == KL:
        return ladder.kl_columns[result.split].show, _with_unit(KL_EXPONENT, result.unit)
    if result.metric in _SHARES:
        return percent, "percent"
    column = _Column(exponent=0, decimals=3)
    return column.show, result.unit


def held_out(report: Report) -> list[dict[str, Any]]:
    """Return the held-out data sets, each with the schemes that were evaluated on it."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for evaluation in report.evaluations:
        key = (evaluation.split, evaluation.data.sha256, evaluation.arithmetic)
        found.setdefault(key, {"evaluation": evaluation, "schemes": []})["schemes"].append(evaluation.scheme)
    return list(found.values())


def _of_pair(pair: PairDifference, damaged: Sequence[str]) -> str:
    """Return how many findings a pair has; where one of the two has findings of its own, that they explain it."""
    blamed = [name for name in (pair.first, pair.second) if name in damaged]
    if pair.findings or not blamed:
        return str(len(pair.findings))
    return f"not judged: see the findings of {' and '.join(blamed)}"


def _verification(report: Report) -> dict[str, Any]:
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
        [f"{p.first} / {p.second}", p.modules_expected, p.modules_differing, _of_pair(p, damaged)]
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
    column = _column(values, [], KL_EXPONENT)
    rows = []
    for found in report.control_comparisons:
        span = NONE if found.arms == 1 else f"{column.show(found.least)} to {column.show(found.most)}"
        kls = [NOT_RUN if found.kl is None else column.show(found.kl), column.show(found.mean), span]
        ratio = NONE if found.ratio is None else f"{found.ratio:.2f}"
        rows.append([found.scheme, CONTROLS[found.control], found.arms, *kls, ratio])
    header = ["scheme", "control at its bits", "arms", f"scheme's KL, {ladder.kl_unit}", "control's KL (mean)", "range"]
    return {"table": markdown_table([*header, "scheme / control"], rows, left=2), "left_out": report.controls_left_out}


def _prediction(report: Report, ladder: Ladder) -> dict[str, Any]:
    """Return the table of predicted against measured KL; {} where too little was measured."""
    if report.prediction is None:
        return {}
    points = report.prediction.points
    column = _column([point.measured for point in points], [], KL_EXPONENT)
    rows = []
    for point in sorted(points, key=lambda point: point.measured):
        ratio = NONE if point.predicted is None else f"{point.predicted / point.measured:.2f}"
        span = NONE if point.low is None else f"{column.show(point.low)} to {column.show(point.high)}"
        kind = "control" if point.is_control else "scheme"
        row = [point.name, kind, scientific(point.score), column.show(point.predicted), span]
        rows.append([*row, column.show(point.measured), ratio])
    interval = f"{percent(report.prediction.level, 0)} interval"
    header = [
        "",
        "",
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
        "median_error": percent(report.prediction.median_error, 1),
        "inside": percent(report.prediction.inside, 0),
        "points": len(points),
    }


def _unsettled_lines(report: Report) -> list[str]:
    """Return a sentence for every scheme that more scoring data would change."""
    lines = []
    for scheme in report.schemes:
        found = scheme.unsettled
        if found is None or found.enough == 1:
            continue
        batches = report.score_batches
        advice = (
            f"{found.enough} times as many ({batches * found.enough} scoring batches) would leave at most one open"
            if found.enough
            else f"more than {MULTIPLES[-1]} times as many would be needed to leave at most one open"
        )
        lines.append(
            f"More calibration would change about {found.expected_flips:.1f} of {len(report.groups)} groups of "
            f"`{scheme.name}` ({batches} scoring batches, drawn again); {advice}."
        )
    return lines


def _worth_lines(report: Report) -> list[str]:
    """Return a sentence for every scheme: its KL beside that of random choices at the same bits."""
    lines = []
    for found in report.control_comparisons:
        if found.control != "random" or found.kl is None or found.ratio is None:
            continue
        better = ", less than each" if found.kl < found.least else "; not each of them is worse"
        choices = f"{found.arms} random choice{'' if found.arms == 1 else 's'} at its bits"
        lines.append(f"Against chance: `{found.scheme}` has {found.ratio:.2f} times the KL of {choices}{better}.")
    return lines


def _refinement_lines(report: Report) -> list[str]:
    """Return a sentence for every scheme that was refined: what it gained on calibration samples."""
    lines = []
    for found in report.refinements:
        column = _column([found.kl_planned, found.kl_refined], [], KL_EXPONENT)
        gain = f"{column.show(found.kl_planned)} → {column.show(found.kl_refined)} × {power_of_ten(KL_EXPONENT)} nats"
        lines.append(
            f"Refined: `{found.scheme}` has {len(found.changes)} group{'' if len(found.changes) == 1 else 's'} in "
            f"another format than planned; KL on calibration samples {gain} per token, {found.evaluations} simulations."
        )
    return lines


def _runtime_name(probe: ReportedProbe) -> str:
    return f"{_RUNTIME_NAMES.get(probe.runtime, probe.runtime)} {probe.version}"


def runtimes(report: Report) -> dict[str, Any]:
    """Return the tables of what the runtimes do with the checkpoints, and what was found; {} where none was asked."""
    if not report.probes:
        return {}
    rows, speeds, served, findings = [], [], [], []
    for probe in report.probes:
        where = [probe.scheme, _runtime_name(probe)]
        modules = sum(probe.layers.values())
        layers = ", ".join(f"{exact(count)} {name.upper()}" for name, count in probe.layers.items())
        promised = f"{exact(probe.as_promised)} of {exact(modules)}" if modules else NONE
        rows.append([*where, STAGES[probe.stage], probe.device or NONE, probe.verdict, layers or NONE, promised])
        for found in probe.findings:
            text = f"{' '.join(where)}, {STAGES[probe.stage]}: {found.severity}, {found.error_class}: `{found.where}`: "
            findings.append(f"{text}{found.problem}; {found.remedy}")
        for speed in probe.throughput:
            ratio = speed.tokens_per_second / speed.source_tokens_per_second if speed.source_tokens_per_second else None
            numbers = [f"{speed.tokens_per_second:,.0f}"]
            numbers += [NONE if ratio is None else f"{speed.source_tokens_per_second:,.0f}"]
            speeds.append([*where, speed.phase, exact(speed.requests), *numbers, _times(ratio)])
        for difference in probe.log_probs:
            column = _column([difference.mean_abs_difference], [], 0)
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


def _times(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f}×{' (slower)' if ratio < 1 else ''}"


def _runtime_lines(report: Report) -> list[str]:
    """Return a sentence for every checkpoint that a runtime wouldn't run as promised, or runs slower than the original.

    Of a runtime's stages the last one that was tried speaks for it.
    """
    lines = []
    for probe in _last_stages(report.probes):
        name = _runtime_name(probe)
        if probe.verdict != "ok":
            first = next(found for found in probe.findings if found.severity == "error")
            lines.append(
                f"Doesn't run as it says: `{probe.scheme}` in {name} ({STAGES[probe.stage]}): {probe.verdict}, "
                f"{first.problem}."
            )
        for speed in probe.throughput:
            source = speed.source_tokens_per_second
            if source and speed.tokens_per_second < source:
                lines.append(
                    f"Slower than the original: `{probe.scheme}` in {name} at {speed.phase}, "
                    f"{speed.tokens_per_second / source:.2f}× its tokens per second."
                )
    return lines


def _last_stages(probes: Iterable[ReportedProbe]) -> list[ReportedProbe]:
    """Return of every scheme, runtime and version the probe of the last stage."""
    order = list(STAGES)
    last: dict[tuple[str, str, str], ReportedProbe] = {}
    for probe in sorted(probes, key=lambda probe: order.index(probe.stage)):
        version = "" if probe.stage == "preflight" else probe.version  # a probe says more than the rules of any version
        last[probe.scheme, probe.runtime, version] = probe
    probed = {key[:2] for key, probe in last.items() if probe.stage != "preflight"}
    return [probe for key, probe in last.items() if probe.stage != "preflight" or key[:2] not in probed]


def _phases(report: Report) -> Markdown:
    header = ["phase", "seconds", "peak memory", "peak GPU memory"]
    rows = [
        [phase.phase, f"{phase.seconds:,.1f}", byte_size(phase.peak_rss_bytes), byte_size(phase.peak_gpu_bytes)]
        for phase in report.phases
    ]
    rows.append(["total", f"{sum(phase.seconds for phase in report.phases):,.1f}", "", ""])
    return markdown_table(header, rows)


def template(name: str, **filters: Callable[..., str]) -> jinja2.Template:
    """Return one of the templates beside this file, with our ways of showing numbers, and more, as its filters.

    Whatever goes into it is escaped, into Markdown by `escaping`, into HTML by jinja.
    """
    is_html = name.endswith(".html.jinja")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=is_html,
        finalize=None if is_html else prose,
    )
    own = {one.__name__: one for one in (exact, percent, byte_size, rounding, data_kind, escaping.code, escaping.text)}
    environment.filters.update(own, **filters)
    return environment.get_template(name)


def page_context(report: Report) -> dict[str, Any]:
    """Return everything that a page shows besides the report itself: tables in Markdown, sentences, titles."""
    ladder = Ladder(report)
    prefix = common_prefix([group.name for group in report.groups])
    settings = yaml.safe_dump(report.settings, sort_keys=False, allow_unicode=True, width=120)
    return {
        "report": report,
        "title": PurePath(report.model.path).name or report.model.path,
        "summary": _summary(report, ladder),
        "noise_lines": _noise_lines(report, ladder),
        "edge_lines": _edge_lines(report, prefix),
        "nesting_lines": _nesting_lines(report),
        "failed": [scheme.name for scheme in report.schemes if scheme.verified is False],
        "is_predicted_kl": report.score_unit == "nats per token",
        "sizes": _sizes(report),
        "layer_counts": layer_counts(report),
        "prefix": prefix.rstrip("."),
        "groups": _groups(report, prefix),
        "positions": _positions(report, prefix),
        "several": bool(ladder.further),
        "evaluated": ladder.evaluated,
        "evaluation": evaluation_table(report, ladder),
        "held_out": held_out(report),
        "verification": _verification(report),
        "controls": controls(report, ladder),
        "prediction": _prediction(report, ladder),
        "worth_lines": [*_worth_lines(report), *_unsettled_lines(report), *_refinement_lines(report)],
        "flips_often": percent(FLIPS_OFTEN, 0),
        "runtimes": runtimes(report),
        "runtime_lines": _runtime_lines(report),
        "settings": Markdown(settings),
        "fence": Markdown(escaping.fence(settings)),
        "phases": _phases(report) if report.phases else "",
        "not_run": NOT_RUN,
    }


def render_markdown(report: Report) -> str:
    """Return the report as Markdown (GitHub's tables), the same for the same report."""
    return template("report.md.jinja").render(page_context(report))


def _narrow(*lines: str | None) -> str:
    """Return a column's header whose lines are broken to `_NARROW` characters."""
    return "\n".join(piece for line in lines for piece in textwrap.wrap(line or "", _NARROW))


def _runs(report: Report, scheme: str) -> str:
    """Return whether every runtime that was asked runs the scheme's checkpoint, or the first that doesn't.

    `by rules` where only the pre-flight was done.
    """
    probes = [probe for probe in _last_stages(report.probes) if probe.scheme == scheme]
    failed = [f"{_RUNTIME_NAMES.get(p.runtime, p.runtime)}: {p.verdict}" for p in probes if p.verdict != "ok"]
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
        quality += ["task accuracy\n± SE" if ladder.task_split == ladder.split else _narrow("task", ladder.task_split)]
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
            _verified(scheme.verified),
            *([Text(_runs(report, scheme.name))] if report.probes else []),
            style=style,
        )
    return table
