"""What the page says in cards, rows and cells, as plain texts: the template only draws them."""

from collections.abc import Sequence
from typing import Any

from bitladder.formats.targets import TARGETS
from bitladder.recipe import SCHEME_PLACE
from bitladder.recipe.sections import LayoutSpec
from bitladder.records import BF16, BF16_BITS, KL, TASK_ACCURACY, EvalResult
from bitladder.report.damage import WORDS, bound_in_words, lost_tasks, worst_task
from bitladder.report.ladder import Ladder, points, verified
from bitladder.report.numbers import (
    KL_EXPONENT,
    NONE,
    NOT_RUN,
    byte_size,
    exact,
    percent,
    power_of_ten,
    runtime_title,
    share_with_error,
    significant,
    times,
)
from bitladder.report.plots import timing
from bitladder.report.sentences import asked_of, last_stages
from bitladder.report.serving import serve_command
from bitladder.report.tables import on_device, scored_so
from bitladder.report.types import Report, ReportedProbe, ReportedScheme

KL_UNIT = f"{power_of_ten(KL_EXPONENT)} nats a token"
STAGES_REACHED = {"preflight": "by rules", "load": "loaded", "generate": "served"}
_AIMS = {
    "nearly_lossless": "the smallest that is nearly lossless",
    "least_damage": "the least damage; none is nearly lossless",
}


def verdict_card(report: Report, ladder: Ladder) -> dict[str, Any]:
    """Return the card at the top: what to take, its tiles, how to serve it; without `scheme` where none is advised."""
    decision = report.decision
    card: dict[str, Any] = {
        "advice": decision.advice,
        "alternative": decision.alternative,
        "notes": list(decision.notes),
        "scheme": None,
    }
    scheme = next((scheme for scheme in report.schemes if scheme.name == decision.take), None)
    if scheme is None or decision.aim is None:
        return card
    tiles = [_size_tile(report, scheme), _kl_tile(scheme), _top1_tile(report, scheme)]
    tiles += [_task_tile(scheme, ladder), _speed_tile(report, scheme), _runtime_tile(report, scheme)]
    return card | {
        "scheme": scheme.name,
        "aim": _AIMS[decision.aim],
        **damage_in_words(scheme),
        "mix": mix_of(scheme),
        "bits": f"{scheme.effective_bits:.2f}",
        "tiles": [tile for tile in tiles if tile is not None],
        "serve": _served(report, scheme) if scheme.weight_file_bytes is not None else "",
    }


def damage_in_words(scheme: ReportedScheme) -> dict[str, str]:
    """Return the word for a scheme's damage, its bound, and the key that colours it."""
    if scheme.damage is None:
        return {"damage": "", "word": NOT_RUN, "bound": ""}
    return {"damage": scheme.damage, "word": WORDS[scheme.damage], "bound": bound_in_words(scheme.damage)}


def mix_of(scheme: ReportedScheme) -> list[dict[str, str]]:
    """Return the formats of a scheme with their shares of the searched weights, those that it uses."""
    whole = sum(count.weight_elements for count in scheme.format_counts)
    return [
        {
            "format": count.format,
            "title": count.format.upper(),
            "share": percent(count.weight_elements / whole, 1),
            "groups": exact(count.groups),
        }
        for count in scheme.format_counts
        if count.groups and whole
    ]


def _served(report: Report, scheme: ReportedScheme) -> str:
    """Return how vLLM serves a scheme's checkpoint, from the report's directory."""
    layout = report.settings.get("layout") or {}
    place = layout.get("checkpoints") or str(LayoutSpec.model_fields["checkpoints"].default)
    return serve_command(report, scheme, str(place).replace(SCHEME_PLACE, scheme.name))


def kl_with_error(result: EvalResult) -> tuple[str, str]:
    """Return a KL in 10⁻³ nats with two significant digits, and its standard error with one; "" without."""
    scale = 10.0**-KL_EXPONENT
    error = result.standard_error
    return significant(result.value * scale), "" if error is None else f"± {significant(error * scale, 1)}"


def _tile(label: str, value: str, detail: str, *, small: str = "", state: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "small": small, "detail": detail, "state": state}


def _size_tile(report: Report, scheme: ReportedScheme) -> dict[str, str]:
    what, size, whole = "searched weights", scheme.weight_bytes, report.searched_source_bytes
    if scheme.weight_file_bytes is not None and report.source_weight_file_bytes:
        what, size, whole = "weight files", scheme.weight_file_bytes, report.source_weight_file_bytes
    return _tile("Size", change_of(size, whole), f"{what}: {byte_size(size)} instead of {byte_size(whole)}")


def change_of(size: int, whole: int) -> str:
    """Return a change of size in percent, signed."""
    return f"{100 * (size / whole - 1):+.0f}%".replace("-", "−") if whole else NONE


def _kl_tile(scheme: ReportedScheme) -> dict[str, str]:
    kls = [result for result in scheme.results or () if result.metric == KL]
    worst = max(kls, key=lambda result: result.value)
    value, error = kl_with_error(worst)
    where = f" on {worst.split}, the most of {len(kls)} sets" if len(kls) > 1 else ""
    floor = ""
    if worst.noise_floor is not None:
        floor = f"; BF16 arithmetic alone: {significant(worst.noise_floor * 10.0**-KL_EXPONENT)}"
    return _tile("KL to the original", value, f"{KL_UNIT}{where}{floor}", small=error)


def worst_top1(scheme: ReportedScheme) -> EvalResult | None:
    """Return the least top-1 agreement over the held-out sets; None: not evaluated."""
    found = [result for result in scheme.results or () if result.metric == "top1_agreement"]
    return min(found, key=lambda result: result.value, default=None)


def _top1_tile(report: Report, scheme: ReportedScheme) -> dict[str, str] | None:
    worst = worst_top1(scheme)
    if worst is None:
        return None
    where = f", on {worst.split}" if len(report.splits) > 1 else ""
    return _tile("Top-1 agreement", percent(worst.value, 1), f"the same most likely next token{where}")


def _task_tile(scheme: ReportedScheme, ladder: Ladder) -> dict[str, str] | None:
    found = worst_task(scheme.results or ())
    if found is None:
        return None
    error = "" if found.standard_error is None else f"± {percent(found.standard_error, 1)}"
    label = "Task accuracy" if ladder.task_split is not None else f"Worst of {len(ladder.tasks)} tasks"
    detail = f"{found.split}; the original’s: {percent(found.reference, 1)}; {exact(found.samples)} questions"
    return _tile(label, percent(found.value, 1), detail, small=error, state="bad" if lost_tasks([found]) else "")


def _speed_tile(report: Report, scheme: ReportedScheme) -> dict[str, str] | None:
    timed = [
        (speed.ratio, speed, probe)
        for probe in report.probes
        if probe.scheme == scheme.name
        for speed in probe.throughput
        if speed.ratio is not None
    ]
    if not timed:
        return None
    ratio, speed, probe = timed[-1]
    rest = [f"{one.phase} {times(other)}" for other, one, _ in timed[:-1]]
    return _tile("Speed", times(ratio), "; ".join([timing(speed, probe), *rest]), state="good" if ratio >= 1 else "")


def _runtime_tile(report: Report, scheme: ReportedScheme) -> dict[str, str] | None:
    probes = [probe for probe in last_stages(report.probes) if probe.scheme == scheme.name]
    if not probes:
        return None
    order = list(STAGES_REACHED)
    best = max(probes, key=lambda p: (p.verdict == "ok", order.index(p.stage), p.runtime == "vllm"))
    device = f" on {best.device}" if best.device else ""
    refused = [runtime_title(p) for p in probes if p.verdict != "ok" and p is not best]
    others = f"; not in {', '.join(dict.fromkeys(refused))}" if refused else ""
    detail = f"version {best.version}{device}{others}"
    return _tile(runtime_title(best), probe_in_words(best), detail, state=_state(best))


def probe_in_words(probe: ReportedProbe) -> str:
    """Return how far a runtime came with a checkpoint, or what stopped it."""
    return STAGES_REACHED[probe.stage] if probe.verdict == "ok" else probe.verdict


def _state(probe: ReportedProbe) -> str:
    return "bad" if probe.verdict != "ok" else "" if probe.stage == "preflight" else "good"


def scheme_columns(report: Report, ladder: Ladder) -> list[str]:
    """Return the titles of the scheme table, beside the name."""
    kls = [f"KL on {split}" if ladder.further else "held-out KL" for split in ladder.kl_columns]
    task = [ladder.task_title] if ladder.has_task else []
    top1 = "least top-1" if ladder.further else "top-1"
    return ["effective bits", "weight files", *kls, "damage", top1, *task, "runs"]


def scheme_rows(report: Report, ladder: Ladder, lines: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of the scheme table: the original, what BF16 arithmetic does to it, and every scheme.

    Args:
        report: the whole.
        ladder: its table's columns.
        lines: all sentences about schemes: those that name one stand in its row.
    """
    titles = scheme_columns(report, ladder)
    source = byte_size(report.source_weight_file_bytes)
    has_kl = [split for split in ladder.kl_columns if report.first_result(KL, split)]
    floors = [report.first_result(KL, split) for split in ladder.kl_columns]
    task = report.first_result(TASK_ACCURACY, ladder.task_split) if ladder.task_split else None
    scale = 10.0**-KL_EXPONENT

    def reference(name: str, first: list[str], kls: list[str], top1: str, accuracy: float | None) -> dict[str, Any]:
        values = [*first, *kls, NONE, top1, *([percent(accuracy, 1)] if ladder.has_task else []), NONE]
        cells = [{"label": title, "value": value, "small": ""} for title, value in zip(titles, values, strict=True)]
        return {"name": name, "reference": True, "cells": cells}

    rows = [
        reference(
            "original",
            [f"{BF16_BITS:.2f}", source],
            ["0" if split in has_kl else NOT_RUN for split in ladder.kl_columns],
            "100%" if ladder.evaluated else NOT_RUN,
            task.reference if task else None,
        )
    ]
    if any(found is not None and found.noise_floor is not None for found in floors):
        shown = [significant(f.noise_floor * scale) if f and f.noise_floor is not None else NONE for f in floors]
        tops = [
            r.noise_floor for s in report.splits if (r := report.first_result("top1_agreement", s)) and r.noise_floor
        ]
        rows.append(
            reference(
                "original in BF16 arithmetic",
                [NONE, NONE],
                shown,
                percent(min(tops, default=None), 1),
                task.noise_floor if task else None,
            )
        )
    return rows + [_scheme_row(report, ladder, scheme, titles, lines) for scheme in report.schemes]


def _scheme_row(
    report: Report, ladder: Ladder, scheme: ReportedScheme, titles: Sequence[str], lines: Sequence[str]
) -> dict[str, Any]:
    cells: list[tuple[str, str]] = [(f"{scheme.effective_bits:.2f}", "")]
    if scheme.weight_file_bytes is None:
        cells.append((NOT_RUN, ""))
    else:
        whole = report.source_weight_file_bytes
        cells.append((byte_size(scheme.weight_file_bytes), change_of(scheme.weight_file_bytes, whole) if whole else ""))
    for split in ladder.kl_columns:
        kl = scheme.result(KL, split)
        cells.append(kl_with_error(kl) if kl else (NOT_RUN, ""))
    word = damage_in_words(scheme)
    cells.append((word["word"], ""))
    top1 = worst_top1(scheme)
    cells.append((percent(top1.value, 1) if top1 else NOT_RUN, ""))
    if ladder.has_task:
        cells.append(_task_cell(ladder, worst_task(scheme.results or ())))
    cells.append(runs_in_words(report, scheme.name))
    shown = [
        {"label": title, "value": value, "small": small} for title, (value, small) in zip(titles, cells, strict=True)
    ]
    return {
        "name": scheme.name,
        "reference": False,
        "take": scheme.name == report.decision.take,
        "damage": word["damage"],
        "bound": word["bound"],
        "mix": mix_of(scheme),
        "chips": chips_of(report, scheme),
        "cells": shown,
        "details": _details(report, ladder, scheme),
        "lines": [line for line in lines if f"`{scheme.name}`" in line],
    }


def _task_cell(ladder: Ladder, worst: EvalResult | None) -> tuple[str, str]:
    """Return the accuracy on the only task, or how the worst of several stands beside the original's."""
    if worst is None:
        return NOT_RUN, ""
    if ladder.task_split is None:
        return f"{points(worst)} points", f"{worst.split}: {percent(worst.value, 1)}"
    error = worst.standard_error
    return percent(worst.value, 1), "" if error is None else f"± {percent(error, 1)}"


def runs_in_words(report: Report, name: str) -> tuple[str, str]:
    """Return how far the runtime came with a checkpoint that came furthest; and which ones don't take it."""
    probes = [probe for probe in last_stages(report.probes) if probe.scheme == name]
    fine = [probe for probe in probes if probe.verdict == "ok"]
    failed = [f"{runtime_title(p)}: {p.verdict}" for p in probes if p.verdict != "ok"]
    if not fine:
        return ("no" if failed else NOT_RUN), "; ".join(failed)
    best = max(fine, key=lambda probe: list(STAGES_REACHED).index(probe.stage))
    by = "" if best.stage == "preflight" else f" by {runtime_title(best)}"
    return probe_in_words(best) + by, "; ".join(dict.fromkeys(failed))


def _details(report: Report, ladder: Ladder, scheme: ReportedScheme) -> list[tuple[str, str]]:
    perplexity = scheme.result("perplexity", ladder.split)
    predicted = ladder.predicted_column.show(scheme.predicted_score, scheme.predicted_standard_error)
    found = [
        ("asked for", asked_of(scheme.asked)),
        ("coverage", f"{percent(scheme.coverage)} of the searched weights are quantised"),
        ("searched weights", f"{byte_size(scheme.weight_bytes)} of {byte_size(report.searched_source_bytes)}"),
        ("groups", ", ".join(f"{part['groups']} {part['title']}" for part in mix_of(scheme))),
        ("predicted score", f"{predicted} {ladder.predicted_unit}"),
    ]
    for split in ladder.kl_columns:
        kl = scheme.result(KL, split)
        if kl is not None:
            name = f"KL on {split}" if ladder.further else "held-out KL"
            found.append((name, f"{ladder.kl_columns[split].show(kl.value, kl.standard_error)} {KL_UNIT}"))
    for name in ladder.tasks:
        task = scheme.result(TASK_ACCURACY, name)
        if task is not None:
            beside = f"; the original’s: {percent(task.reference, 1)}, {points(task)} points" if task.reference else ""
            found.append((f"accuracy on {name}", f"{share_with_error(task)}{beside}"))
    if perplexity is not None:
        original = "" if perplexity.reference is None else f"; the original’s: {perplexity.reference:,.2f}"
        found.append(("perplexity", f"{perplexity.value:,.2f}{original}"))
    if scheme.kv_cache_format:
        skipped = len(scheme.kv_cache_skips)
        words = f", but of {skipped} layer{'' if skipped == 1 else 's'}" if skipped else ""
        found.append(("KV cache", f"{scheme.kv_cache_format.upper()}{words}"))
    if scheme.checkpoint_bytes is not None:
        found.append(("all files", f"{exact(scheme.checkpoint_bytes)} bytes, {scheme.carrier}"))
    found.append(("files verified", verified(scheme.verified)))
    return found


def chips_of(report: Report, scheme: ReportedScheme) -> list[dict[str, str]]:
    """Return what was found about a scheme in a few words each; the sentences are in its details."""
    name = scheme.name
    chips: list[tuple[str, str]] = []
    if name == report.decision.take:
        chips.append(("recommended", "good"))
    if name == report.decision.smallest:
        chips.append(("smallest", ""))
    if scheme.verified is False:
        chips.append(("doesn’t match its scheme", "bad"))
    chips += [(f"worse on {task.split}", "bad") for task in lost_tasks(scheme.results or ())]
    failed = [p for p in last_stages(report.probes) if p.scheme == name and p.verdict != "ok"]
    chips += [(f"not in {runtime_title(p)}", "bad") for p in failed]
    if any(name in (pair.first, pair.second) and pair.within_noise for pair in report.comparisons):
        chips.append(("within noise of its neighbour", "open"))
    if name in report.below_noise_floor:
        chips.append(("below BF16’s own noise", "good"))
    if scheme.floor:
        chips.append(("at the floor", "open"))
    if any(edge.scheme == name and edge.within_noise for edge in report.edges):
        chips.append(("edge within noise", "open"))
    if scheme.unsettled is not None and scheme.unsettled.enough != 1:
        chips.append(("ranking open", "open"))
    for found in report.control_comparisons:
        if found.scheme == name and found.control == "random" and found.kl is not None and found.kl >= found.least:
            chips.append(("no better than chance", "open"))
    if any(refined.scheme == name for refined in report.refinements):
        chips.append(("refined", ""))
    return [{"text": text, "tone": tone} for text, tone in dict.fromkeys(chips)]


def runtime_matrix(report: Report) -> dict[str, Any]:
    """Return what each runtime does with each checkpoint: a row a scheme, a column a runtime on a device."""
    probes = last_stages(report.probes)
    columns = list(dict.fromkeys(_place(probe) for probe in probes))
    at = {(probe.scheme, _place(probe)): probe for probe in probes}
    rows = []
    for scheme in report.schemes:
        cells = []
        for place in columns:
            probe = at.get((scheme.name, place))
            text, state = (NONE, "") if probe is None else (probe_in_words(probe), _state(probe) or "fine")
            modules = sum(probe.layers.values()) if probe else 0
            unlike = modules - probe.as_promised if probe else 0
            small = f"{exact(unlike)} not as promised" if unlike else ""
            if probe is not None and probe.verdict == "ok" and probe.findings:
                small = small or "with a warning"
            cells.append({"text": text, "state": state, "small": small})
        rows.append({"scheme": scheme.name, "cells": cells})
    fine = all(probe.verdict == "ok" and not probe.findings for probe in report.probes)
    return {"columns": columns, "scored": [False] * len(columns), "rows": rows, "fine": fine}


def findings_of_runtimes(report: Report) -> list[str]:
    """Return a sentence for everything that runtimes found, with the schemes and the runtimes that it is said of."""
    found: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for probe in report.probes:
        for one in probe.findings:
            key = (one.severity, one.error_class, one.where, one.problem, one.remedy)
            said = found.setdefault(key, {"schemes": [], "places": []})
            said["schemes"].append(f"`{probe.scheme}`")
            said["places"].append(f"{_place(probe)} {STAGES_REACHED[probe.stage]}")
    return [
        f"{', '.join(dict.fromkeys(said['schemes']))} ({', '.join(dict.fromkeys(said['places']))}): "
        f"{severity}, {error_class}: `{where}`: {problem}; {remedy}"
        for (severity, error_class, where, problem, remedy), said in found.items()
    ]


def _place(probe: ReportedProbe) -> str:
    version = probe.version if len(probe.version) <= 12 else f"{probe.version[:12]}…"
    return f"{runtime_title(probe)} {version}{f' on {probe.device}' if probe.device else ''}"


def device_matrix(report: Report) -> dict[str, Any]:
    """Return how each kind of device computes each scheme in vLLM, by its rules: a row a scheme."""
    columns = [target.title.removeprefix("NVIDIA ") for target in TARGETS.values()]
    scored = [scored_so(report, name) for name in TARGETS]
    rows = []
    for scheme in report.schemes:
        cells = []
        for name in TARGETS:
            missing, unlike = on_device(scheme, name)
            text = ", ".join((*missing, *unlike)) or "as stored"
            cells.append({"text": text, "state": "bad" if missing else "" if unlike else "good", "small": ""})
        rows.append({"scheme": scheme.name, "cells": cells})
    return {"columns": columns, "scored": scored, "rows": rows}


def made_of(report: Report) -> str:
    """Return by which version of Bitladder and when the run was made, as far as it is recorded."""
    versions = list(dict.fromkeys(v for e in report.environments if (v := e.versions.get("bitladder"))))
    dates = sorted(e.started[:10] for e in report.environments if e.started)
    said = [f"Bitladder {', '.join(versions)}"] if versions else []
    said += [dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"] if dates else []
    return ", ".join(said)


def description_of(report: Report) -> str:
    """Return the page in one sentence for those who list or preview it."""
    formats = ", ".join(dict.fromkeys(name.upper() for name in report.formats if name != BF16))
    return f"{formats} beside BF16: {report.verdict.replace('`', '')}"
