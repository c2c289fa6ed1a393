"""What a report says in sentences."""

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from bitladder.planning.ranges import floor_sentence
from bitladder.planning.uncertainty import MULTIPLES
from bitladder.records import BF16, BF16_BITS, KL, PairDifference, RoundedModule
from bitladder.report.escaping import Markdown
from bitladder.report.ladder import Ladder, of_all, verified
from bitladder.report.numbers import (
    KL_EXPONENT,
    NOISE_FLOOR,
    NONE,
    NOT_RUN,
    ORIGINAL,
    STAGES,
    byte_size,
    exact,
    markdown_table,
    number_column,
    percent,
    power_of_ten,
    runtime_name,
    size_of,
)
from bitladder.report.types import WITHIN_NOISE_ERRORS, Report, ReportedProbe, ReportedScheme


def rounding(report: Report) -> str:
    """Return how the codes were chosen, and what that does."""
    chosen = report.rounding
    if chosen is None:
        return "every weight to its nearest"
    by_format: dict[str, list[RoundedModule]] = {}
    for module in chosen.modules:
        by_format.setdefault(module.format, []).append(module)
    errors = []
    for name, modules in by_format.items():
        own, nearest = (
            statistics.median(getattr(m, f"{which}output_error") for m in modules) for which in ("", "nearest_")
        )
        where = f"in {name} " if len(by_format) > 1 else ""
        errors.append(f"{where}{percent(own)} at the median, with the nearest codes {percent(nearest)}")
    taken = sum(module.nearest_taken for module in chosen.modules)
    kept = f"; {exact(taken)} of {exact(len(chosen.modules))} did worse on rows that check and stay the nearest"
    scored = "these" if chosen.scored else "the nearest"
    return (
        f"compensated (GPTQ), damping {chosen.damping:g}, from {exact(chosen.samples)} calibration samples; the error "
        f"of a module's output by its weights is {'; '.join(errors)}{kept if taken else ''}; the scores are those of "
        f"{scored} codes"
    )


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
        elif key == "chosen_by":
            words.append(f"chosen by {value.upper()}")
        elif key == "kv_cache":
            words.append(f"KV cache {_cache_asked(value)}")
        elif isinstance(value, list | tuple):
            words.append(f"{key} {', '.join(f'`{item}`' for item in value)}")
        else:
            words.append(f"{key} {value}")
    return "; ".join(words) or NONE


def _cache_asked(value: Any) -> str:
    """Return in words which KV cache a recipe asks for."""
    if isinstance(value, dict):
        return f"FP8 in ≤ {percent(value['fp8'])} of the layers"
    return "in 16 bits" if value == "none" else str(value).upper()


def _cache_held(scheme: ReportedScheme) -> str:
    """Return the format of a scheme's KV cache in a word or two."""
    skipped = len(scheme.kv_cache_skips)
    return f"{(scheme.kv_cache_format or BF16).upper()}{f', {skipped} in {BF16.upper()}' if skipped else ''}"


def summary_line(report: Report, ladder: Ladder) -> Markdown:
    """Return the table of schemes, one a row: what each costs and does."""
    task = f"{ladder.task_title}{' ± SE' if ladder.task_split else ', points beside the original'}"
    quality = [f"held-out KL{of_all(ladder.split, ladder)} ± SE, {ladder.kl_unit}"]
    quality += [f"KL{of_all(split, ladder)} ± SE, {ladder.kl_unit}" for split in ladder.further]
    quality += ["perplexity", "top-1 agreement", *([task] if ladder.has_task else [])]
    header = ["scheme", "effective bits", "weight files", *quality]
    source = report.source_weight_file_bytes
    rows = [
        [ORIGINAL, f"{BF16_BITS:.2f}", byte_size(source), *ladder.original()],
        [NOISE_FLOOR, NONE, NONE, *ladder.noise_floor()],
    ]
    for scheme in report.schemes:
        costs = [f"{scheme.effective_bits:.2f}", size_of(scheme.weight_file_bytes, source)]
        rows.append([scheme.name, *costs, *ladder.scheme(scheme)])
    return markdown_table(header, rows)


def asked_table(report: Report, ladder: Ladder) -> Markdown:
    """Return the table of what each scheme was asked for, and what planning said of it."""
    has_cache = any(scheme.kv_cache_format for scheme in report.schemes)
    header = ["scheme", "asked", "coverage", "searched weights", f"predicted score ± SE, {ladder.predicted_unit}"]
    header += [*(["KV cache"] if has_cache else []), "verified"]
    searched = report.searched_source_bytes
    cache = [BF16.upper()] if has_cache else []
    rows = [[ORIGINAL, NONE, "0.00%", byte_size(searched), "0", *cache, NONE]]
    for scheme in report.schemes:
        rows.append(
            [
                scheme.name,
                asked_of(scheme.asked),
                percent(scheme.coverage),
                size_of(scheme.weight_bytes, searched),
                ladder.predicted_column.show(scheme.predicted_score, scheme.predicted_standard_error),
                *([_cache_held(scheme)] if has_cache else []),
                verified(scheme.verified),
            ]
        )
    return markdown_table(header, rows, left=2)


def noise_lines(report: Report, ladder: Ladder) -> list[str]:
    """Return one sentence for everything that the evaluation can't tell apart, or one that says that it can."""
    if not ladder.evaluated:
        return [f"Held-out evaluation: {NOT_RUN}."]
    if not report.comparable:
        return ["The schemes were evaluated on different data or in different arithmetic: their KL can't be compared."]
    lines = []
    for pair in report.comparisons:
        if pair.within_noise:
            column = number_column([], [pair.standard_error], KL_EXPONENT)
            shown = column.show(pair.difference, pair.standard_error)
            lines.append(
                f"Within noise: `{pair.first}` and `{pair.second}`. Their KL differs by ({shown}) × {ladder.kl_unit}, "
                f"less than {WITHIN_NOISE_ERRORS:g} standard errors of the difference: "
                "this evaluation doesn't tell them apart."
            )
    for name in report.below_noise_floor:
        result = next(s for s in report.schemes if s.name == name).result(KL, ladder.split)
        assert result is not None
        column = number_column([result.value, result.noise_floor], [result.standard_error], KL_EXPONENT)
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


def nesting_lines(report: Report) -> list[str]:
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


def floor_lines(report: Report) -> list[str]:
    """Return a sentence for every scheme whose effective bits are the fewest that its formats have."""
    return [
        f"At the floor: {floor_sentence(f'`{s.name}`', s.effective_bits, s.candidates, s.floor)}."
        for s in report.schemes
        if s.floor
    ]


def edge_lines(report: Report, prefix: str) -> list[str]:
    """Return a sentence for every scheme whose last group taken and first group left can't be told apart."""
    return [
        f"Edge within noise: `{edge.scheme}` takes `{edge.taken.removeprefix(prefix)}` and leaves "
        f"`{edge.left.removeprefix(prefix)}`; their scores per bit saved differ by less than "
        f"{WITHIN_NOISE_ERRORS:g} standard errors over the scoring batches, so either could have been chosen."
        for edge in report.edges
        if edge.within_noise
    ]


def of_pair(pair: PairDifference, damaged: Sequence[str]) -> str:
    """Return how many findings a pair has; where one of the two has findings of its own, that they explain it."""
    blamed = [name for name in (pair.first, pair.second) if name in damaged]
    if pair.findings or not blamed:
        return str(len(pair.findings))
    return f"not judged: see the findings of {' and '.join(blamed)}"


def unsettled_lines(report: Report) -> list[str]:
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


def worth_lines(report: Report) -> list[str]:
    """Return a sentence for every scheme: its KL beside that of random choices at the same bits."""
    lines = []
    for found in report.control_comparisons:
        if found.control != "random" or found.kl is None or found.ratio is None:
            continue
        better = ", less than each" if found.kl < found.least else "; not each of them is worse"
        choices = f"{found.arms} random choice{'' if found.arms == 1 else 's'} at its bits"
        lines.append(f"Against chance: `{found.scheme}` has {found.ratio:.2f} times the KL of {choices}{better}.")
    if report.modelopt_agrees:
        agreed = ", ".join(f"`{name}`" for name in report.modelopt_agrees)
        lines.append(f"ModelOpt's solver, from the same scores: the same choice for {agreed}.")
    return lines


def refinement_lines(report: Report) -> list[str]:
    """Return a sentence for every scheme that was refined: what it gained on the samples that chose it."""
    lines = []
    for found in report.refinements:
        column = number_column([found.kl_planned, found.kl_refined], [], KL_EXPONENT)
        gain = f"{column.show(found.kl_planned)} → {column.show(found.kl_refined)} × {power_of_ten(KL_EXPONENT)} nats"
        lines.append(
            f"Refined: `{found.scheme}` has {len(found.changes)} group{'' if len(found.changes) == 1 else 's'} in "
            f"another format than planned; KL on the samples that chose it {gain} per token, {found.evaluations} "
            "simulations."
        )
    return lines


def runtime_lines(report: Report) -> list[str]:
    """Return a sentence for every checkpoint that a runtime wouldn't run as promised, or runs slower than the original.

    Of a runtime's stages the last one that was tried speaks for it.
    """
    lines = []
    for probe in last_stages(report.probes):
        name = runtime_name(probe)
        if probe.verdict != "ok":
            first = next(found for found in probe.findings if found.severity == "error")
            lines.append(
                f"Doesn't run as it says: `{probe.scheme}` in {name} ({STAGES[probe.stage]}): {probe.verdict}, "
                f"{first.problem}."
            )
        for speed in probe.throughput:
            if speed.ratio is not None and speed.ratio < 1:
                lines.append(
                    f"Slower than the original: `{probe.scheme}` in {name} at {speed.phase}, "
                    f"{speed.ratio:.2f}× its tokens per second."
                )
    return lines


def last_stages(probes: Iterable[ReportedProbe]) -> list[ReportedProbe]:
    """Return of every scheme, runtime and version the probe of the last stage."""
    order = list(STAGES)
    last: dict[tuple[str, str, str], ReportedProbe] = {}
    for probe in sorted(probes, key=lambda probe: order.index(probe.stage)):
        version = "" if probe.stage == "preflight" else probe.version  # a probe says more than the rules of any version
        last[probe.scheme, probe.runtime, version] = probe
    probed = {key[:2] for key, probe in last.items() if probe.stage != "preflight"}
    return [probe for key, probe in last.items() if probe.stage != "preflight" or key[:2] not in probed]
