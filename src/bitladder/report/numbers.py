"""How numbers and names read, in a page and in a terminal."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from bitladder.records import KL, TASK_ACCURACY, DataSummary, EvalResult
from bitladder.report.escaping import Markdown, prose
from bitladder.report.types import ReportedProbe

NOT_RUN = "not run"
NONE = "–"
LEFT_ALONE = "·"  # a group that stays in 16 bits
KL_EXPONENT = -3  # KL is shown in 10⁻³ nats per token
ORIGINAL = "original"
NOISE_FLOOR = "original in BF16 arithmetic (noise floor)"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MAX_DECIMALS = 5
MOST_COLUMNS = 7  # of a table that GitHub shows without scrolling
SHARES = ("top1_agreement", TASK_ACCURACY)  # metrics shown in percent
METRIC_NAMES = {
    KL: "KL to the original",
    "perplexity": "perplexity",
    "top1_agreement": "top-1 agreement",
    TASK_ACCURACY: "task accuracy",
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
RUNTIME_NAMES = {"vllm": "vLLM", "sglang": "SGLang", "tensorrt_llm": "TensorRT-LLM"}
_MIB = 1 << 20
_GIB = 1 << 30


@dataclass(frozen=True)
class Column:
    """How the numbers of one column are shown: times 10^-exponent, with so many decimals."""

    exponent: int
    decimals: int

    def show(self, value: float | None, error: float | None = None) -> str:
        """Return a number of the column, with its standard error."""
        if value is None:
            return NONE
        text = self._number(value)
        return text if error is None else f"{text} ± {self._number(error)}"

    def _number(self, value: float) -> str:
        return f"{value * 10.0**-self.exponent:,.{self.decimals}f}"


def number_column(
    values: Iterable[float | None], errors: Iterable[float | None], exponent: int, digits: int = 3
) -> Column:
    """Return a column that shows 2 digits of the smallest error, or `digits` of the smallest value without errors."""
    positive = [abs(error) for error in errors if error]
    kept = 2
    if not positive:
        positive, kept = [abs(value) for value in values if value], digits
    if not positive:
        return Column(exponent=exponent, decimals=0)
    decimals = kept - 1 - math.floor(math.log10(min(positive))) + exponent
    return Column(exponent=exponent, decimals=min(max(decimals, 0), _MAX_DECIMALS))


def power_of_ten(exponent: int) -> str:
    """Return `10⁻³` for -3."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def with_unit(exponent: int, unit: str) -> str:
    """Return a unit, after the power of ten by which its numbers were divided."""
    return f"{power_of_ten(exponent)} {unit}" if exponent else unit


def significant(value: float, digits: int = 2) -> str:
    """Return a number with so many significant digits, and no exponent."""
    if value == 0:
        return "0"
    shown = float(f"{value:.{digits - 1}e}")
    decimals = digits - 1 - math.floor(math.log10(abs(shown)))
    return f"{shown:,.{max(decimals, 0)}f}"


def kl_in_words(value: float) -> str:
    """Return a KL with two significant digits, in the one unit that it is shown in."""
    return f"{significant(value * 10.0**-KL_EXPONENT)} × {power_of_ten(KL_EXPONENT)} nats a token"


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


def size_of(count: int | None, whole: int | None) -> str:
    """Return a size, and its share of `whole`."""
    if count is None:
        return NOT_RUN
    return byte_size(count) + (f" ({percent(count / whole, 1)})" if whole else "")


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


def narrow(table: Markdown, keep: int = 1, blocks: Sequence[int] = ()) -> Markdown:
    """Return a Markdown table as several of at most `MOST_COLUMNS` columns, one below the other.

    Args:
        table: as `markdown_table` writes it.
        keep: how many of the first columns each of them has.
        blocks: how many of the further columns belong together, from the left; the rest is one more block.
    """
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    further = range(keep, len(lines[0]))
    if keep + len(further) <= MOST_COLUMNS:
        return table
    tables, start = [], keep
    for size in (*blocks, len(further) - sum(blocks)):
        for own in _in_even_parts(range(start, start + size), MOST_COLUMNS - keep):
            chosen = [[line[place] for place in (*range(keep), *own)] for line in lines]
            tables.append("\n".join("| " + " | ".join(line) + " |" for line in chosen))
        start += size
    return Markdown("\n\n".join(tables))


def _in_even_parts(whole: range, most: int) -> list[range]:
    """Return a range in as few parts as there must be for each to have at most so many."""
    count = math.ceil(len(whole) / most)
    ends = [round(len(whole) * part / count) for part in range(count + 1)] if count else []
    return [whole[first:last] for first, last in itertools.pairwise(ends)]


def exponent_for(values: Iterable[float], unit: str) -> int:
    """Return the power of ten to show values in; 10⁻³ where they are predicted KL, beside the measured one."""
    if unit == "nats per token":
        return KL_EXPONENT
    largest = max((abs(value) for value in values), default=0.0)
    exponent = math.floor(math.log10(largest)) if largest else 0
    return 0 if -1 <= exponent <= 3 else exponent


def share_with_error(result: EvalResult | None) -> str:
    """Return a share in percent, with its standard error."""
    if result is None:
        return NONE
    error = result.standard_error
    return percent(result.value, 1) + ("" if error is None else f" ± {percent(error, 1)}")


def common_prefix(names: Sequence[str]) -> str:
    """Return the dotted path, its last dot included, that all names begin with; "" where there is none."""
    parts = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) != 1:
            break
        shared.append(level[0])
    return "".join(f"{part}." for part in shared)


def runtime_title(probe: ReportedProbe) -> str:
    """Return a runtime's name as it writes itself."""
    return RUNTIME_NAMES.get(probe.runtime, probe.runtime)


def runtime_name(probe: ReportedProbe) -> str:
    """Return a runtime's name as it writes itself, with its version."""
    return f"{runtime_title(probe)} {probe.version}"


def times(ratio: float | None) -> str:
    """Return a ratio of speeds."""
    return NONE if ratio is None else f"{ratio:.2f}×{' (slower)' if ratio < 1 else ''}"
