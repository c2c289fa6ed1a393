"""Which scheme to take: `decide(report) -> Decision`, from the report's numbers alone; `verdict`: in one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitladder.planning.controls import RANDOM_FIRST
from bitladder.records import BF16, KL, TASK_ACCURACY
from bitladder.report.damage import NEARLY_LOSSLESS_KL, bound_in_words, lost_tasks, worst_task
from bitladder.report.numbers import kl_in_words, runtime_name
from bitladder.report.speeds import fastest
from bitladder.report.types import WITHIN_NOISE_ERRORS, Decision

if TYPE_CHECKING:  # a report holds its verdict
    from bitladder.report.types import Report, ReportedProbe, ReportedScheme

_EVERYTHING = 1.0  # coverage
_BOUND = f"KL at most {kl_in_words(NEARLY_LOSSLESS_KL)}"


def verdict(report: Report) -> str:
    """Return the decision in one sentence."""
    decision = report.decision
    advice = ", or ".join(filter(None, (decision.advice, decision.alternative)))
    return "; ".join([advice, *decision.notes]) + "."


def decide(report: Report) -> Decision:
    """Return which scheme to take for which aim, or that everything quantised is good enough, with its numbers.

    A scheme counts if its files match it and no runtime that was asked to load it fails; where none was, if it loads by
    the rules of one at least. What *nearly lossless* is: `report.damage`.
    """
    evaluated = [scheme for scheme in report.schemes if _worst_kl(scheme) is not None]
    if not evaluated:
        return Decision(advice="No scheme was evaluated yet, so none can be advised: run `bitladder evaluate`")
    if not report.comparable:
        return Decision(
            advice="The schemes were evaluated on different data, so none can be advised: "
            "run `bitladder evaluate` again"
        )
    problems = {scheme.name: problem for scheme in evaluated if (problem := _problem(report, scheme)) is not None}
    usable = [scheme for scheme in evaluated if scheme.name not in problems]
    left_out = tuple(f"`{name}` is left out: {problem}" for name, problem in problems.items())
    if not usable:
        return Decision(advice=f"No scheme can be advised: {'; '.join(left_out)}")
    found = _advice(report, usable)
    notes = (*_lost(usable), *_against_uniform(usable), *_speed(report, usable), *_caveats(report, usable), *left_out)
    return found.model_copy(update={"notes": notes})


def _worst_kl(scheme: ReportedScheme) -> float | None:
    """Return a scheme's largest KL over the held-out sets, in nats per token; None: not evaluated."""
    return max((result.value for result in scheme.results or () if result.metric == KL), default=None)


def _problem(report: Report, scheme: ReportedScheme) -> str | None:
    """Return why a scheme's checkpoint must not be served; None: nothing is known against it, but see `_caveats`."""
    if scheme.verified is False:
        return "its files don't match it"
    probes = [probe for probe in report.probes if probe.scheme == scheme.name]
    asked = {probe.runtime for probe in probes if probe.stage != "preflight"}
    failed = [probe for probe in probes if probe.verdict != "ok"]
    decisive = [probe for probe in failed if probe.runtime in asked]
    if not asked and {probe.runtime for probe in failed} == {probe.runtime for probe in probes}:
        decisive = failed  # there is none that takes it
    return f"{runtime_name(decisive[0])}: {decisive[0].verdict}" if decisive else None


def _caveats(report: Report, usable: Sequence[ReportedScheme]) -> list[str]:
    """Return which runtimes, that nobody asked, don't take a scheme by their rules."""
    refused: dict[str, list[str]] = {}
    for scheme in usable:
        for probe in report.probes:
            if probe.scheme == scheme.name and probe.verdict != "ok":
                refused.setdefault(f"{runtime_name(probe)} ({probe.verdict})", []).append(f"`{scheme.name}`")
    return [f"{', '.join(dict.fromkeys(names))}: not for {runtime}" for runtime, names in refused.items()]


def _advice(report: Report, usable: Sequence[ReportedScheme]) -> Decision:
    """Return what to take for the least damage, and for the least bytes."""
    smallest = min(usable, key=lambda scheme: (scheme.weight_bytes, _worst_kl(scheme)))
    gentle = [scheme for scheme in usable if scheme.damage == "nearly_lossless"]
    numbers = _numbers(report, smallest)
    if smallest in gentle:
        advice = f"Take `{smallest.name}` {numbers}: the smallest, and nearly lossless ({_BOUND})"
        formats = [count.format for count in smallest.format_counts if count.format != BF16]
        if smallest.coverage >= _EVERYTHING and len(formats) == 1:
            advice = (
                f"Uniform {formats[0].upper()} is good enough: take `{smallest.name}` {numbers}, nearly lossless "
                f"({_BOUND}), so that a search has little left to win"
            )
        return Decision(take=smallest.name, aim="nearly_lossless", advice=advice)
    other = f"`{smallest.name}` {numbers} for the smallest files"
    best = min(gentle, key=lambda scheme: scheme.weight_bytes) if gentle else min(usable, key=_harm)
    chosen = f"`{best.name}` {_numbers(report, best)}"
    if gentle:
        return Decision(
            take=best.name,
            aim="nearly_lossless",
            smallest=smallest.name,
            advice=f"Take {chosen} to stay nearly lossless ({_BOUND}){_against_chance(report, best)}",
            alternative=other,
        )
    none = f"No scheme is nearly lossless ({bound_in_words('nearly_lossless')})"
    if best is smallest:
        advice = f"{none}; {chosen} for the smallest files does the least damage too"
        return Decision(take=best.name, aim="least_damage", advice=advice)
    advice = f"{none}: take {chosen} for the least damage{_against_chance(report, best)}"
    return Decision(take=best.name, aim="least_damage", smallest=smallest.name, advice=advice, alternative=other)


def _harm(scheme: ReportedScheme) -> tuple[bool, float]:
    """Return what a scheme does to the model, to order by: a task that is surely lost weighs more than any KL."""
    return bool(lost_tasks(scheme.results or ())), _worst_kl(scheme) or 0.0


def _lost(usable: Sequence[ReportedScheme]) -> list[str]:
    """Return which schemes are surely worse than the original on a task, task by task."""
    found: dict[str, list[str]] = {}
    for scheme in usable:
        for task in lost_tasks(scheme.results or ()):
            beside = f" against {task.reference:.1%}" if task.reference is not None else ""
            found.setdefault(task.split, []).append(f"`{scheme.name}` ({task.value:.1%}{beside})")
    return [f"surely worse than the original on {task}: {', '.join(schemes)}" for task, schemes in found.items()]


def _numbers(report: Report, scheme: ReportedScheme) -> str:
    """Return in brackets a scheme's KL, accuracy on a task, and share of the original's bytes."""
    worst = max((r for r in scheme.results or () if r.metric == KL), key=lambda result: result.value)
    said = [f"KL {kl_in_words(worst.value)}{f' on {worst.split}' if len(report.splits) > 1 else ''}"]
    task = worst_task(scheme.results or ())
    if task is not None and task.reference is not None:
        tasks = [result.split for result in scheme.results or () if result.metric == TASK_ACCURACY]
        of = f"{task.split}, the worst of {len(tasks)} tasks, " if len(tasks) > 1 else ""
        named = f"accuracy on {of or task.split + ' '}" if of or task.split in report.tasks else "task accuracy "
        said.append(f"{named}{task.value:.1%} against the original's {task.reference:.1%}")
    if scheme.weight_file_bytes is not None and report.source_weight_file_bytes:
        said.append(f"{scheme.weight_file_bytes / report.source_weight_file_bytes:.0%} of the original's bytes")
    return f"({', '.join(said)})"


def _against_chance(report: Report, scheme: ReportedScheme) -> str:
    """Return what a scheme's KL is beside that of random choices at its bits; "" where there are too few."""
    for found in report.control_comparisons:
        is_random = (found.scheme, found.control) == (scheme.name, "random")
        if is_random and found.arms >= RANDOM_FIRST and found.ratio is not None:
            return f" at {found.ratio:.2f} times the KL of {found.arms} random choices"
    return ""


def _against_uniform(usable: Sequence[ReportedScheme]) -> list[str]:
    """Return for every scheme in one format throughout the mix of at most its bytes that does the least damage.

    The mix counts if its KL is less on every held-out set, by more than chance.
    """
    said = []
    for uniform in usable:
        formats = {count.format for count in uniform.format_counts if count.groups}
        better = [
            mix
            for mix in usable
            if len(formats) == 1 and mix.weight_bytes <= uniform.weight_bytes and _does_less(mix, uniform)
        ]
        if better:
            best = min(better, key=lambda scheme: _worst_kl(scheme) or 0.0)
            ratio = (_worst_kl(best) or 0.0) / (_worst_kl(uniform) or math.nan)
            said.append(
                f"`{best.name}` is no larger than `{uniform.name}`, uniform {formats.pop().upper()}, and has "
                f"{ratio:.2f} times its KL"
            )
    return said


def _does_less(mix: ReportedScheme, other: ReportedScheme) -> bool:
    """Return whether a scheme's KL is less than another's on every held-out set of both, by more than noise."""
    pairs = [
        (found, beside)
        for found in mix.results or ()
        if found.metric == KL and (beside := other.result(KL, found.split)) is not None
    ]
    return bool(pairs) and all(
        beside.value - found.value
        > WITHIN_NOISE_ERRORS * math.hypot(found.standard_error or 0.0, beside.standard_error or 0.0)
        for found, beside in pairs
    )


def _speed(report: Report, usable: Sequence[ReportedScheme]) -> list[str]:
    """Return which scheme was served fastest, and its tokens per second over the original's.

    Where none was timed, which is predicted to be; [] where there is no profile either.

    The fastest has the largest geometric mean of the ratios of its phases.
    """
    names = {scheme.name for scheme in usable}
    timed = [probe for probe in report.probes if probe.scheme in names and _ratios(probe)]
    if not timed:
        known = [one for one in report.speeds.schemes if one.scheme in names] if report.speeds else []
        return [fastest(known, report.speeds.place)] if report.speeds and known else []
    best = max(timed, key=lambda probe: math.prod(_ratios(probe)) ** (1 / len(_ratios(probe))))
    shown = " and ".join(f"{s.ratio:.2f} times at {s.phase}" for s in best.throughput if s.ratio is not None)
    device = f" on {best.device}" if best.device else ""
    if all(ratio < 1 for probe in timed for ratio in _ratios(probe)):
        return [f"none is faster than the original{device}: `{best.scheme}` comes nearest with {shown}"]
    return [f"served fastest{device} is `{best.scheme}`, {shown} the original's tokens per second"]


def _ratios(probe: ReportedProbe) -> list[float]:
    return [speed.ratio for speed in probe.throughput if speed.ratio is not None]
