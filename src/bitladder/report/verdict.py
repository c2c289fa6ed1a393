"""Which scheme to take, in one sentence: `verdict(report) -> str`, from the report's numbers and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitladder.records import BF16, KL, EvalResult, Throughput
from bitladder.report.numbers import runtime_name
from bitladder.report.speeds import fastest

if TYPE_CHECKING:  # a report holds its verdict
    from bitladder.report.types import Report, ReportedProbe, ReportedScheme

# Nats per token. llama.cpp's README of `perplexity` has 0.0055 for q6_K and 0.0108 for q5_K_M of LLaMA 3 8B, which its
# users take for nearly lossless; q4_K_M, which they don't, has 0.031.
NEARLY_LOSSLESS_KL = 0.01
CONFIDENT_ERRORS = 2.0  # a bound counts as kept if the value plus so many standard errors does
_EVERYTHING = 1.0  # coverage


def verdict(report: Report) -> str:
    """Return which scheme to take for which aim, or that everything quantised is good enough, with its numbers.

    A scheme counts if its files match it and no runtime that was asked to load it fails; where none was, if it loads by
    the rules of one at least. It is *nearly lossless* if on every
    held-out set its KL, plus two standard errors, is at most `NEARLY_LOSSLESS_KL`, and if on none with a task its
    accuracy lies more than two standard errors below the original's.
    """
    evaluated = [scheme for scheme in report.schemes if _worst_kl(scheme) is not None]
    if not evaluated:
        return "No scheme was evaluated yet, so none can be advised: run `bitladder evaluate`."
    if not report.comparable:
        return "The schemes were evaluated on different data, so none can be advised: run `bitladder evaluate` again."
    problems = {scheme.name: problem for scheme in evaluated if (problem := _problem(report, scheme)) is not None}
    usable = [scheme for scheme in evaluated if scheme.name not in problems]
    left_out = [f"`{name}` is left out: {problem}" for name, problem in problems.items()]
    if not usable:
        return f"No scheme can be advised: {'; '.join(left_out)}."
    return "; ".join([_advice(report, usable), *_speed(report, usable), *_caveats(report, usable), *left_out]) + "."


def _worst_kl(scheme: ReportedScheme) -> float | None:
    """Return a scheme's largest KL over the held-out sets, in nats per token; None: not evaluated."""
    return max((result.value for result in scheme.results or () if result.metric == KL), default=None)


def _is_nearly_lossless(scheme: ReportedScheme) -> bool:
    return not any(_is_damage(result) for result in scheme.results or ())


def _is_damage(result: EvalResult) -> bool:
    margin = CONFIDENT_ERRORS * (result.standard_error or 0.0)
    if result.metric == "task_accuracy":
        return result.reference is not None and result.value + margin < result.reference
    return result.metric == KL and result.value + margin > NEARLY_LOSSLESS_KL


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


def _advice(report: Report, usable: Sequence[ReportedScheme]) -> str:
    """Return what to take for the least damage, and for the least bytes."""
    smallest = min(usable, key=lambda scheme: (scheme.weight_bytes, _worst_kl(scheme)))
    bound = f"at most {NEARLY_LOSSLESS_KL:g} nats per token"
    if _is_nearly_lossless(smallest):
        if smallest.coverage >= _EVERYTHING:
            formats = [count.format for count in smallest.format_counts if count.format != BF16]
            what = f"Uniform {formats[0].upper()}" if len(formats) == 1 else "Quantising everything"
            return (
                f"{what} is good enough: take `{smallest.name}` {_numbers(report, smallest)}, nearly lossless "
                f"({bound}), so that a search has little left to win"
            )
        return f"Take `{smallest.name}` {_numbers(report, smallest)}: the smallest, and nearly lossless ({bound})"
    smallest_files = f"`{smallest.name}` {_numbers(report, smallest)} for the smallest files"
    gentle = [scheme for scheme in usable if _is_nearly_lossless(scheme)]
    if gentle:
        best = min(gentle, key=lambda scheme: scheme.weight_bytes)
        return (
            f"Take `{best.name}` {_numbers(report, best)} to stay nearly lossless ({bound})"
            f"{_against_chance(report, best)}, or {smallest_files}"
        )
    best = min(usable, key=lambda scheme: _worst_kl(scheme) or 0.0)
    if best is smallest:
        return f"No scheme is nearly lossless ({bound}); {smallest_files} does the least damage too"
    return (
        f"No scheme is nearly lossless ({bound}): take `{best.name}` {_numbers(report, best)} for the least damage"
        f"{_against_chance(report, best)}, or {smallest_files}"
    )


def _numbers(report: Report, scheme: ReportedScheme) -> str:
    """Return in brackets a scheme's KL, accuracy on a task, and share of the original's bytes."""
    worst = max((r for r in scheme.results or () if r.metric == KL), key=lambda result: result.value)
    said = [f"KL {worst.value:.2g}{f' on {worst.split}' if len(report.splits) > 1 else ''}"]
    task = next((r for r in scheme.results or () if r.metric == "task_accuracy"), None)
    if task is not None and task.reference is not None:
        said.append(f"task accuracy {task.value:.1%} against the original's {task.reference:.1%}")
    if scheme.weight_file_bytes is not None and report.source_weight_file_bytes:
        said.append(f"{scheme.weight_file_bytes / report.source_weight_file_bytes:.0%} of the original's bytes")
    return f"({', '.join(said)})"


def _against_chance(report: Report, scheme: ReportedScheme) -> str:
    """Return what a scheme's KL is beside that of random choices at its bits; "" where there are none."""
    for found in report.control_comparisons:
        if (found.scheme, found.control) == (scheme.name, "random") and found.ratio is not None:
            return f" at {found.ratio:.2f} times the KL of random groups"
    return ""


def _speed(report: Report, usable: Sequence[ReportedScheme]) -> list[str]:
    """Return which scheme was served fastest, and its tokens per second over the original's.

    Where none was timed, which is predicted to be; [] where there is no profile either.

    The fastest has the largest geometric mean of the ratios of its phases.
    """
    names = {scheme.name for scheme in usable}
    timed = [probe for probe in report.probes if probe.scheme in names and _ratios(probe)]
    if not timed:
        known = [one for one in report.speeds.schemes if one.scheme in names] if report.speeds else []
        return [fastest(known, report.speeds.device)] if report.speeds and known else []
    best = max(timed, key=lambda probe: math.prod(_ratios(probe)) ** (1 / len(_ratios(probe))))
    shown = " and ".join(f"{r:.2f} times at {s.phase}" for r, s in zip(_ratios(best), _rated(best), strict=True))
    device = f" on {best.device}" if best.device else ""
    if all(ratio < 1 for probe in timed for ratio in _ratios(probe)):
        return [f"none is faster than the original{device}: `{best.scheme}` comes nearest with {shown}"]
    return [f"served fastest{device} is `{best.scheme}`, {shown} the original's tokens per second"]


def _rated(probe: ReportedProbe) -> list[Throughput]:
    return [speed for speed in probe.throughput if speed.source_tokens_per_second]


def _ratios(probe: ReportedProbe) -> list[float]:
    return [speed.tokens_per_second / (speed.source_tokens_per_second or math.nan) for speed in _rated(probe)]
