"""The report says what the records say, no more, and reads the same every time."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy.stats import spearmanr

from bitladder.errors import StaleRecord
from bitladder.records import (
    Candidate,
    CheckpointManifest,
    CheckpointVerification,
    DataSummary,
    EvalResult,
    Evaluation,
    FileDigest,
    Finding,
    Measurement,
    ModelSource,
    PairDifference,
    PhaseCost,
    QuantGroup,
    QuantModule,
    RunInfo,
    Scheme,
    UntouchedModule,
    Verification,
)
from bitladder.report import Report, batch_standard_error, build_report, closing_table, render_markdown, write_report
from bitladder.report.groups import rank_correlation

LAYERS = 2
KINDS = {"self_attn.qkv_proj": 300, "self_attn.o_proj": 100, "mlp.gate_up_proj": 400, "mlp.down_proj": 200}
PREFIX = "model.layers."
RUN = RunInfo(
    started="2026-01-01T00:00:00+00:00",
    hardware="a processor, 2 cores",
    threads=2,
    versions={"torch": "2.13.0"},
    phases=(PhaseCost(phase="calibrate", seconds=12.25, peak_rss_bytes=3 << 30),),
)
DATA = DataSummary(
    source="captions.txt",
    kind="text",
    sha256="a" * 64,
    samples=64,
    tokens=32704,
    sequence_length=512,
    batch_size=4,
    seed=7,
    sample_ids=("one", "two"),
)
HELD_OUT = DATA.model_copy(update={"sha256": "b" * 64, "samples": 32, "sample_ids": ("three",)})


def make_measurement(**changes: Any) -> Measurement:
    """Two layers of four groups; the n-th group (from 1) has the score n·10⁻³ in every one of two batches."""
    groups, candidates = [], []
    for layer in range(LAYERS):
        for kind, elements in KINDS.items():
            name = f"{PREFIX}{layer}.{kind}"
            modules = (QuantModule(name=name, tensor=f"{name}.weight", shape=(10, elements // 10)),)
            groups.append(QuantGroup(name=name, modules=modules, weight_elements=elements))
            score = 1e-3 * len(groups)
            candidates.append(
                Candidate(group=name, format="fp8", weight_bits=8 * elements, scores=(0.9 * score, 1.1 * score))
            )
    fields: dict[str, Any] = {
        "model": ModelSource(
            path="/models/tiny-lm",
            architecture="TinyForCausalLM",
            model_type="tiny",
            sha256="c" * 64,
            files=(FileDigest(name="model.safetensors", bytes=6000, sha256="d" * 64),),
        ),
        "calibration": DATA,
        "engine": "modelopt",
        "method": "gradient",
        "fused_scales_shared": True,
        "compute_dtype": "float32",
        "score_unit": "nats² per token",
        "score_weights": (0.5, 0.5),
        "formats": ("fp8",),
        "groups": tuple(groups),
        "candidates": tuple(candidates),
        "untouched": (UntouchedModule(name="lm_head", checkpoint_name="lm_head", reason="vocabulary head"),),
        "amax_sha256": "e" * 64,
        "run": RUN,
    }
    return Measurement(**fields | changes)


def make_scheme(measurement: Measurement, name: str, chosen: set[int], **changes: Any) -> Scheme:
    """A scheme that quantises the groups with these indices."""
    total = measurement.searched_weights
    quantised = sum(group.weight_elements for i, group in enumerate(measurement.groups) if i in chosen)
    bits = 16 * total - 8 * quantised
    fields: dict[str, Any] = {
        "name": name,
        "measurement_sha256": measurement.fingerprint(),
        "asked": {"name": name, "coverage": 0.25},
        "formats": {g.name: "fp8" if i in chosen else "bf16" for i, g in enumerate(measurement.groups)},
        "effective_bits": bits / total,
        "coverage": quantised / total,
        "searched_weights": total,
        "weight_bits": bits,
        "weight_bytes": bits // 8 + 8 * len(chosen),
        "predicted_score": sum(1e-3 * (i + 1) for i in chosen),
        "score_unit": measurement.score_unit,
        "exclude_modules": ("lm_head",),
    }
    return Scheme(**fields | changes)


def make_manifest(scheme: Scheme) -> CheckpointManifest:
    files = (
        FileDigest(name="model.safetensors", bytes=5000 + len(scheme.name), sha256="f" * 64),
        FileDigest(name="tokenizer.json", bytes=77, sha256="0" * 64),
    )
    return CheckpointManifest(
        scheme=scheme.name,
        scheme_sha256=scheme.fingerprint(),
        measurement_sha256=scheme.measurement_sha256,
        source_sha256="c" * 64,
        files=files,
        modules=(),
    )


def make_evaluation(
    manifest: CheckpointManifest, kl: float, error: float | None, *, task: float | None = None, **changes: Any
) -> Evaluation:
    floor, split = changes.pop("floor", 0.96e-3), changes.pop("split", "held_out")
    results = [
        EvalResult(
            metric="kl",
            split=split,
            unit="nats per token",
            value=kl,
            standard_error=error,
            samples=32,
            noise_floor=floor,
        ),
        EvalResult(
            metric="perplexity",
            split=split,
            unit="perplexity",
            value=37.68,
            standard_error=0.4,
            samples=32,
            noise_floor=37.23,
            reference=37.21,
        ),
        EvalResult(
            metric="top1_agreement",
            split=split,
            unit="share",
            value=0.9712,
            standard_error=0.001,
            samples=32,
            noise_floor=0.9934,
        ),
    ]
    if task is not None:
        results.append(
            EvalResult(
                metric="task_accuracy",
                split=split,
                unit="share",
                value=task,
                standard_error=0.0101,
                samples=500,
                noise_floor=0.946,
                reference=0.948,
            )
        )
    fields: dict[str, Any] = {
        "scheme": manifest.scheme,
        "manifest_sha256": manifest.fingerprint(),
        "model_sha256": "c" * 64,
        "data": {split: HELD_OUT},
        "arithmetic": "float32",
        "results": tuple(results),
        "run": RUN,
    }
    return Evaluation(**fields | changes)


def make_verification(manifests: dict[str, CheckpointManifest], broken: str | None = None) -> Verification:
    finding = Finding(file="model.safetensors", tensor="k.weight_scale", problem="it is 2", remedy="export again")
    return Verification(
        checkpoints=tuple(
            CheckpointVerification(
                scheme=name,
                manifest_sha256=manifest.fingerprint(),
                tensors_checked=1234,
                codes_checked=56789,
                bytes_identical=424242,
                findings=(finding,) if name == broken else (),
            )
            for name, manifest in manifests.items()
        ),
        pairs=(PairDifference(first="top25", second="full", modules_expected=6, modules_differing=6),),
    )


def make_report(
    kls: dict[str, tuple[float, float | None]] | None = None, *, broken: str | None = None, task: bool = False
) -> Report:
    """A full report; `kls` gives value and standard error for top25, top50 and full."""
    measurement = make_measurement()
    schemes = [
        make_scheme(measurement, "full", set(range(8))),
        make_scheme(measurement, "top25", {0, 1}, standard_error=2e-4),
        make_scheme(measurement, "top50", {0, 1, 2}, standard_error=3e-4),
    ]
    manifests = {scheme.name: make_manifest(scheme) for scheme in schemes}
    if kls is None:
        kls = {"top25": (2.8e-3, 0.1e-3), "top50": (7.1e-3, 0.2e-3), "full": (29.7e-3, 0.6e-3)}
    evaluations = {
        name: make_evaluation(manifests[name], kl, error, task=0.944 if task else None)
        for name, (kl, error) in kls.items()
    }
    phases = [PhaseCost(phase="calibrate", seconds=12.25, peak_rss_bytes=3 << 30)]
    phases += [PhaseCost(phase="export full", seconds=1000.5, peak_rss_bytes=1 << 20, peak_gpu_bytes=5 << 20)]
    return build_report(
        {"model": {"path": "/models/tiny-lm"}, "schemes": ({"name": "full", "coverage": 1.0},)},
        measurement,
        schemes,
        manifests,
        make_verification(manifests, broken),
        evaluations,
        phases,
    )


def bare_report() -> Report:
    """A report of a run that has only measured and planned."""
    measurement = make_measurement(run=None)
    return build_report({}, measurement, [make_scheme(measurement, "top25", {0, 1})], {}, None, {}, [])


def tables(markdown: str) -> list[list[list[str]]]:
    """The tables of a page as cells; `\\|` doesn't end a cell."""
    found: list[list[list[str]]] = []
    inside = False
    for line in markdown.splitlines():
        if line.startswith("|"):
            if not inside:
                found.append([])
            found[-1].append([c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]])
        inside = line.startswith("|")
    return found


def section(markdown: str, title: str) -> str:
    return markdown.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def summary_row(markdown: str, scheme: str) -> dict[str, str]:
    """What the tables before the first details say of a scheme, and the one of what was asked for."""
    found = {}
    for header, _, *rows in tables(markdown.split("\n## What was measured\n")[0]):
        found |= dict(zip(header, next((row for row in rows if row[0] == scheme), ()), strict=False))
    return found


def terminal(report: Report) -> list[str]:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(closing_table(report))
    return console.export_text().splitlines()


def test_importing_the_report_imports_no_torch() -> None:
    code = "import sys, bitladder.report; print([m for m in ('torch', 'transformers', 'modelopt') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_summary_shows_every_number_of_a_scheme() -> None:
    row = summary_row(render_markdown(make_report(task=True)), "top25")
    assert row == {
        "scheme": "top25",
        "asked": "coverage ≤ 25%",
        "coverage": "20.00%",
        "effective bits": "14.40",
        "searched weights": "0.0 MiB (90.4%)",
        "weight files": "0.0 MiB (83.4%)",
        "predicted score ± SE, 10⁻² nats² per token": "0.300 ± 0.020",
        "held-out KL ± SE, 10⁻³ nats per token": "2.80 ± 0.10",
        "perplexity": "37.68",
        "top-1 agreement": "97.12%",
        "task accuracy ± SE": "94.4% ± 1.0%",
        "verified": "yes",
    }


def test_summary_has_the_original_and_its_noise_floor() -> None:
    markdown = render_markdown(make_report(task=True))
    original = summary_row(markdown, "original")
    assert original["effective bits"] == "16.00"
    assert original["held-out KL ± SE, 10⁻³ nats per token"] == "0"
    assert (original["perplexity"], original["task accuracy ± SE"]) == ("37.21", "94.8%")
    floor = summary_row(markdown, "original in BF16 arithmetic (noise floor)")
    assert floor["held-out KL ± SE, 10⁻³ nats per token"] == "0.96"
    assert (floor["perplexity"], floor["top-1 agreement"], floor["task accuracy ± SE"]) == ("37.23", "99.34%", "94.6%")


def test_schemes_stand_from_most_to_fewest_bits() -> None:
    report = make_report()
    assert [scheme.name for scheme in report.schemes] == ["top25", "top50", "full"]
    assert report.nesting == (("top25", "top50", "full"),)
    assert "Nested: `top25` ⊂ `top50` ⊂ `full`" in render_markdown(report)


def test_sizes_are_exact_beside_the_source() -> None:
    rows = tables(section(render_markdown(make_report()), "Sizes"))[0]
    assert rows[2] == ["original", "4,000", "6,000", "–"]
    assert rows[3] == ["top25", "3,616", "5,005", "5,082"]


def test_clear_differences_are_called_clear() -> None:
    markdown = render_markdown(make_report())
    assert "at least 2 standard errors of the difference, and none is below the noise floor" in markdown
    assert "Within noise" not in markdown
    assert "Below the noise floor" not in markdown


def test_neighbours_within_noise_are_called_out() -> None:
    report = make_report({"top25": (2.8e-3, 0.3e-3), "top50": (3.7e-3, 0.4e-3), "full": (29.7e-3, 0.6e-3)})
    markdown = render_markdown(report)
    first, second = report.comparisons
    assert first.standard_error == pytest.approx(0.5e-3)
    assert (first.within_noise, second.within_noise) == (True, False)
    assert "Within noise: `top25` and `top50`. Their KL differs by (0.90 ± 0.50) × 10⁻³ nats per token" in markdown
    assert "Within noise: `top50` and `full`" not in markdown
    assert "at least 2 standard errors" not in markdown


def test_exactly_two_errors_apart_is_not_within_noise() -> None:
    pair = make_report({"top25": (0.0, 0.3), "top50": (1.0, 0.4)}).comparisons[0]
    assert pair.within_noise is False


def test_below_the_noise_floor_is_called_out() -> None:
    report = make_report({"top25": (0.9e-3, 0.01e-3), "top50": (7.1e-3, 0.2e-3)})
    assert report.below_noise_floor == ("top25",)
    assert "Below the noise floor: `top25`. Its KL is 0.900 × 10⁻³ nats per token" in render_markdown(report)


def test_no_standard_error_no_statement() -> None:
    report = make_report({"top25": (2.8e-3, None), "top50": (2.9e-3, 0.2e-3)})
    markdown = render_markdown(report)
    assert report.comparisons[0].within_noise is None
    assert "no statement about noise: `top25` and `top50`" in markdown
    assert "Within noise" not in markdown


def two_sets(first: dict[str, float], second: dict[str, float], *, task: str | None = None) -> Report:
    """A report on two held-out sets, `images` and `text`: KL by scheme on each; `task` names the set that has one."""
    measurement = make_measurement()
    schemes = [make_scheme(measurement, "top25", {0, 1}), make_scheme(measurement, "full", set(range(8)))]
    manifests = {scheme.name: make_manifest(scheme) for scheme in schemes}
    summary = HELD_OUT.model_copy(update={"sha256": "7" * 64, "source": "prose.txt", "sample_ids": ("one",)})
    evaluations = {}
    for name, manifest in manifests.items():
        parts = [
            make_evaluation(
                manifest, kl[name], error, split=split, floor=floor, task=0.944 if task == split else None
            ).results
            for split, kl, error, floor in (("images", first, 1e-4, 0.96e-3), ("text", second, 1e-6, 0.5e-3))
        ]
        data = {"images": HELD_OUT, "text": summary}
        evaluations[name] = make_evaluation(manifest, 1.0, 1e-4).model_copy(
            update={"data": data, "results": tuple(result for part in parts for result in part)}
        )
    return build_report({}, measurement, schemes, manifests, None, evaluations, [])


def test_a_further_held_out_set_adds_a_column_of_kl() -> None:
    markdown = render_markdown(two_sets({"top25": 2.8e-3, "full": 29.7e-3}, {"top25": 1.5e-3, "full": 40e-3}))
    row = summary_row(markdown, "top25")
    assert list(row)[3:7] == [
        "held-out KL on images ± SE, 10⁻³ nats per token",
        "KL on text ± SE, 10⁻³ nats per token",
        "perplexity",
        "top-1 agreement",
    ]
    assert list(row.values())[3:5] == ["2.80 ± 0.10", "1.5000 ± 0.0010"]
    assert list(summary_row(markdown, "original").values())[3:5] == ["0", "0"]
    floor = summary_row(markdown, "original in BF16 arithmetic (noise floor)")
    assert list(floor.values())[3:5] == ["0.96", "0.5000"]
    assert "are those of the first held-out set, `images`" in markdown
    assert "are those of the first held-out set" not in render_markdown(make_report())


def test_details_of_every_held_out_set() -> None:
    report = two_sets({"top25": 2.8e-3, "full": 29.7e-3}, {"top25": 1.5e-3, "full": 40e-3})
    assert report.splits == ("images", "text")
    text = section(render_markdown(report), "Held-out evaluation")
    rows, unit = tables(text)[0][2:], "10⁻³ nats per token"
    assert [row[:4] for row in rows if "KL" in row[2]] == [
        ["top25", "images", f"KL to the original, {unit}", "2.80"],
        ["top25", "text", f"KL to the original, {unit}", "1.5000"],
        ["full", "images", f"KL to the original, {unit}", "29.70"],
        ["full", "text", f"KL to the original, {unit}", "40.0000"],
    ]
    assert "- `images`, top25, full: `captions.txt`" in text
    assert "- `text`, top25, full: `prose.txt`" in text
    assert [e.samples_seen_in_calibration for e in report.evaluations] == [0, 1, 0, 1]
    assert "`held_out`" not in render_markdown(make_report())  # one set needs no name


def test_statements_about_noise_are_about_the_first_held_out_set() -> None:
    clear = two_sets({"top25": 2.8e-3, "full": 29.7e-3}, {"top25": 0.1e-3, "full": 0.1e-3})
    assert clear.comparable
    assert [pair.within_noise for pair in clear.comparisons] == [False]
    assert clear.below_noise_floor == ()
    noisy = two_sets({"top25": 0.1e-3, "full": 0.1e-3}, {"top25": 2.8e-3, "full": 29.7e-3})
    assert [pair.within_noise for pair in noisy.comparisons] == [True]
    assert noisy.below_noise_floor == ("top25", "full")
    assert "Below the noise floor: `top25`. Its KL is 0.10 ×" in render_markdown(noisy)


@pytest.mark.parametrize(
    ("split", "column"), [("images", "task accuracy ± SE"), ("text", "task accuracy on text ± SE")]
)
def test_the_task_of_any_held_out_set_is_shown(split: str, column: str) -> None:
    kls = {"top25": 2.8e-3, "full": 29.7e-3}
    report = two_sets(kls, kls, task=split)
    markdown = render_markdown(report)
    assert summary_row(markdown, "full")[column] == "94.4% ± 1.0%"
    assert summary_row(markdown, "original")[column] == "94.8%"
    assert any("94.4% ± 1.0%" in line for line in terminal(report))


def test_closing_table_of_two_held_out_sets_fits_120_columns() -> None:
    lines = terminal(two_sets({"top25": 2.8e-3, "full": 29.7e-3}, {"top25": 1.5e-3, "full": 40e-3}, task="images"))
    assert max(len(line) for line in lines) + len("fp8_autoquant_top25") - len("noise floor") <= 120
    assert not any("…" in line for line in lines)
    (row,) = (line for line in lines if "top25" in line)
    assert [c.strip() for c in row.split("│")[1:-1]] == [
        "top25", "20.00%", "14.40", "0.0 MiB", "2.80 ± 0.10", "1.5000 ± 0.0010", "37.68", "97.12%", "94.4% ± 1.0%",
        "not run",
    ]  # fmt: skip
    names = next([c.strip() for c in re.split("[┃│]", line)] for line in lines if "images" in line)
    assert names.index("text") == names.index("images") + 1


def test_evaluations_on_different_held_out_sets_are_not_compared() -> None:
    measurement = make_measurement()
    schemes = [make_scheme(measurement, "top25", {0, 1}), make_scheme(measurement, "full", set(range(8)))]
    manifests = {scheme.name: make_manifest(scheme) for scheme in schemes}
    evaluations = {
        "top25": make_evaluation(manifests["top25"], 2e-3, 1e-3, split="a"),
        "full": make_evaluation(manifests["full"], 2e-3, 1e-3, split="b"),
    }
    report = build_report({}, measurement, schemes, manifests, None, evaluations, [])
    assert not report.comparable
    assert report.splits == ("a", "b")
    assert summary_row(render_markdown(report), "full")["KL on b ± SE, 10⁻³ nats per token"] == "2.0 ± 1.0"


def test_evaluations_on_different_data_are_not_compared() -> None:
    measurement = make_measurement()
    schemes = [make_scheme(measurement, "top25", {0, 1}), make_scheme(measurement, "full", set(range(8)))]
    manifests = {scheme.name: make_manifest(scheme) for scheme in schemes}
    other = HELD_OUT.model_copy(update={"sha256": "9" * 64})
    evaluations = {
        "top25": make_evaluation(manifests["top25"], 2e-3, 1e-3),
        "full": make_evaluation(manifests["full"], 2e-3, 1e-3, data={"held_out": other}),
    }
    report = build_report({}, measurement, schemes, manifests, None, evaluations, [])
    assert not report.comparable
    assert report.comparisons == ()
    assert "their KL can't be compared" in render_markdown(report)


def test_an_edge_within_noise_is_called_out_and_a_clear_one_not() -> None:
    measurement = make_measurement()
    # By score per bit saved the order begins 0, 2, 4, 6; 2 and 4 are far apart.
    clear = make_scheme(measurement, "clear", {0, 2})
    report = build_report({}, measurement, [clear], {}, None, {}, [])
    (edge,) = report.edges
    assert (edge.taken, edge.left) == (f"{PREFIX}0.mlp.gate_up_proj", f"{PREFIX}1.self_attn.qkv_proj")
    assert edge.within_noise is False
    assert "Edge within noise" not in render_markdown(report)
    noisy = tuple(
        c.model_copy(update={"scores": (c.scores[0] + 0.05 * (-1) ** i, c.scores[1] - 0.05 * (-1) ** i)})
        for i, c in enumerate(measurement.candidates)
    )
    measurement = make_measurement(candidates=noisy)
    report = build_report({}, measurement, [make_scheme(measurement, "noisy", {0, 2})], {}, None, {}, [])
    assert report.edges[0].within_noise
    assert "Edge within noise: `noisy` takes `0.mlp.gate_up_proj`" in render_markdown(report)


def test_a_scheme_against_the_order_has_no_edge() -> None:
    measurement = make_measurement()
    worst = make_scheme(measurement, "worst", {7})
    assert build_report({}, measurement, [worst], {}, None, {}, []).edges == ()


def test_groups_are_ranked_by_score_per_bit_saved() -> None:
    report = make_report()
    ranked = sorted(report.groups, key=lambda group: group.sensitivities[0].rank or 0)
    assert [report.groups.index(group) for group in ranked[:4]] == [0, 2, 4, 6]
    densities = [group.sensitivities[0].score / group.weight_elements for group in ranked]
    assert densities == pytest.approx(sorted(densities))
    assert ranked[-1].sensitivities[0].score_per_bit_saved == pytest.approx(6e-3 / 800)


def test_group_table_has_a_row_a_group_and_a_column_a_scheme() -> None:
    table, schemes = tables(section(render_markdown(make_report()), "Sensitivity, group by group"))
    assert schemes[0] == ["group", "top25", "top50", "full"]
    assert [row[0] for row in table[2:4]] == ["0.self_attn.qkv_proj", "0.self_attn.o_proj"]
    assert len(table) == 2 + LAYERS * len(KINDS)
    # Two batches of 0.45e-3 and 0.55e-3: their sum's standard error is |difference|.
    assert table[2] == ["0.self_attn.qkv_proj", "300", "1.00e-03", "1.00e-04", "1", "1"]
    assert schemes[2] == ["0.self_attn.qkv_proj", "FP8", "FP8", "FP8"]
    assert schemes[4][1:] == ["·", "FP8", "FP8"]


# The share of image positions in the score of each of the eight groups.
IMAGE_SHARES = (0.0, 0.5, 0.9, 0.0, 0.1, 0.0, 0.0, 0.25)


def with_images(shares: tuple[float, ...] = IMAGE_SHARES, **changes: Any) -> Measurement:
    candidates = tuple(
        c.model_copy(update={"image_scores": tuple(share * s for s in c.scores)})
        for c, share in zip(make_measurement().candidates, shares, strict=True)
    )
    return make_measurement(candidates=candidates, **changes)


def positions_report(measurement: Measurement, changes: dict[str, Any] | None = None) -> Report:
    found = changes or {}
    schemes = [
        make_scheme(measurement, name, groups, text_only_changes=found.get(name))
        for name, groups in (("top25", {0, 1}), ("full", set(range(8))))
    ]
    return build_report({}, measurement, schemes, {}, None, {}, [])


def test_text_and_image_positions_apart() -> None:
    report = positions_report(with_images(), {"full": "unattainable", "top25": 3})
    assert report.positions is not None
    (ranking,) = report.positions.rankings
    scores = [n + 1 for n in range(8)]
    shares = zip(IMAGE_SHARES, scores, strict=True)
    assert ranking.image_share == pytest.approx(sum(share * score for share, score in shares) / sum(scores))
    elements = [group.weight_elements for group in report.groups]
    both = [score / n for score, n in zip(scores, elements, strict=True)]
    text = [value * (1 - share) for value, share in zip(both, IMAGE_SHARES, strict=True)]
    assert ranking.rank_correlation == pytest.approx(float(spearmanr(text, both).statistic))
    orders = [sorted(range(8), key=side.__getitem__) for side in (text, both)]
    ranks = [[order.index(group) + 1 for group in range(8)] for order in orders]
    moves = [(g.name, a, b) for g, a, b in zip(report.groups, *ranks, strict=True) if a != b]
    assert sorted(moves) == sorted((m.group, m.rank_text, m.rank_both) for m in ranking.moved)
    distances = [abs(m.rank_text - m.rank_both) for m in ranking.moved]
    assert distances == sorted(distances, reverse=True)
    assert len(set(distances)) > 1
    by_name = {moved.group: moved.image_share for moved in ranking.moved}
    assert by_name[f"{PREFIX}0.mlp.gate_up_proj"] == pytest.approx(0.9)


def test_text_and_image_positions_on_the_page() -> None:
    report = positions_report(with_images(), {"full": "unattainable", "top25": 3})
    text = section(render_markdown(report), "Text and image positions")
    assert report.positions is not None
    (ranking,) = report.positions.rankings
    assert f"image positions carry {100 * (ranking.image_share or 0):.1f}% of the score summed over all groups" in text
    assert f"from both: {ranking.rank_correlation:.3f}." in text
    moved, schemes = tables(text)
    first = ranking.moved[0]
    assert moved[2][:3] == [first.group.removeprefix(PREFIX), str(first.rank_text), str(first.rank_both)]
    assert ["0.mlp.gate_up_proj", "90.0%"] in [[row[0], row[3]] for row in moved]
    assert schemes[0][1] == "of 8 groups, in another format"
    assert schemes[2:] == [["top25", "3"], ["full", "can't be met"]]
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_ten_groups_at_most_are_said_to_move() -> None:
    groups, candidates = [], []
    for index in range(12):
        name = f"g.{index}"
        groups.append(QuantGroup(name=name, modules=(QuantModule(name=name),), weight_elements=100))
        scores = (1.0 + index, 1.0 + index)  # the order of text alone is the other way round
        images = tuple(score - 1 / score for score in scores)
        candidates.append(Candidate(group=name, format="fp8", weight_bits=800, scores=scores, image_scores=images))
    report = positions_report(make_measurement(groups=tuple(groups), candidates=tuple(candidates)))
    assert report.positions is not None
    (ranking,) = report.positions.rankings
    assert ranking.rank_correlation == pytest.approx(-1)
    assert [m.group for m in ranking.moved][:4] == ["g.0", "g.11", "g.1", "g.10"]
    assert len(ranking.moved) == 10


def test_image_positions_that_change_no_rank() -> None:
    text = section(render_markdown(positions_report(with_images((0.5,) * 8))), "Text and image positions")
    assert "image positions carry 50.0%" in text
    assert "from both: 1.000. No group's rank differs." in text
    assert tables(text) == []


def test_no_section_without_scores_of_image_positions() -> None:
    report = positions_report(make_measurement())
    assert report.positions is None
    assert "Text and image positions" not in render_markdown(report)
    partly = with_images().candidates[:4] + make_measurement().candidates[4:]
    assert positions_report(make_measurement(candidates=partly)).positions is None


def test_rank_correlation() -> None:
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 25.0]) == pytest.approx(1)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    first, second = [3.0, 1.0, 1.0, 2.0, 5.0], [2.0, 2.0, 1.0, 7.0, 2.0]
    assert rank_correlation(first, second) == pytest.approx(float(spearmanr(first, second).statistic))
    assert rank_correlation([1.0, 1.0], [1.0, 2.0]) is None
    assert rank_correlation([], []) is None


def test_the_edge_is_that_of_the_scores_that_were_planned_from() -> None:
    measurement = with_images()
    # By score of text positions per bit saved the order begins 2, 0; by that of all it begins 0, 2.
    asked = {"name": "text", "coverage": 0.25, "image_weight": 0.0}
    text = make_scheme(measurement, "text", {2}, asked=asked)
    both = make_scheme(measurement, "both", {2})
    (edge,) = build_report({}, measurement, [text, both], {}, None, {}, []).edges
    assert (edge.scheme, edge.taken, edge.left) == (
        "text",
        f"{PREFIX}0.mlp.gate_up_proj",
        f"{PREFIX}0.self_attn.qkv_proj",
    )


def test_the_kv_cache_has_a_column_where_a_scheme_has_one() -> None:
    measurement = with_images()
    plain = make_scheme(measurement, "full", set(range(8)))
    asked = {"name": "full_kv", "coverage": 1.0, "image_weight": 0.5, "kv_cache": "fp8"}
    cached = make_scheme(measurement, "full_kv", set(range(8)), kv_cache_format="fp8", asked=asked)
    half = make_scheme(measurement, "half_kv", {0, 1}, kv_cache_format="fp8")
    report = build_report({}, measurement, [plain, cached, half], {}, None, {}, [])
    markdown = render_markdown(report)
    names = ("original", "full", "full_kv")
    assert [summary_row(markdown, name)["KV cache"] for name in names] == ["BF16", "BF16", "FP8"]
    assert summary_row(markdown, "full_kv")["asked"] == "coverage ≤ 100%; image weight 0.5; KV cache FP8"
    assert "KV cache" not in render_markdown(make_report())
    # Equal groups, and a KV cache besides.
    assert set(report.nesting) == {("full", "full_kv"), ("half_kv", "full_kv")}
    assert "Not nested: `half_kv` and `full`. Each quantises groups or a KV cache that the other leaves" in markdown


def test_layer_counts_by_kind_add_up() -> None:
    table, kinds = tables(section(render_markdown(make_report()), "Layers per scheme"))
    assert kinds[0][2:] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert table[2:4] == [["top25", "FP8", "2", "2", "400"], ["top25", "BF16", "6", "6", "1,600"]]
    assert kinds[2:4] == [["top25", "FP8", "1", "1", "0", "0"], ["top25", "BF16", "1", "1", "2", "2"]]


def test_evaluation_details() -> None:
    text = section(render_markdown(make_report()), "Held-out evaluation")
    row = tables(text)[0][2]
    assert row == ["top25", "KL to the original, 10⁻³ nats per token", "2.80", "0.10", "0.96", "–", "32"]
    assert HELD_OUT.sha256 in text
    assert "Samples that calibration also saw: 0." in text


def test_samples_seen_in_calibration_are_counted() -> None:
    measurement = make_measurement()
    scheme = make_scheme(measurement, "top25", {0, 1})
    manifest = make_manifest(scheme)
    leaky = HELD_OUT.model_copy(update={"sample_ids": ("two", "three")})
    evaluation = make_evaluation(manifest, 1e-3, 1e-4, data={"held_out": leaky})
    report = build_report({}, measurement, [scheme], {"top25": manifest}, None, {"top25": evaluation}, [])
    assert report.evaluations[0].samples_seen_in_calibration == 1


def test_a_broken_checkpoint_stands_out() -> None:
    report = make_report(broken="top50")
    markdown = render_markdown(report)
    assert summary_row(markdown, "top50")["verified"] == "NO"
    assert "`top50` doesn't match its scheme" in markdown
    assert "- top50: `model.safetensors`, `k.weight_scale`: it is 2; export again" in markdown
    assert any("top50" in line and "NO" in line for line in terminal(report))
    assert "Nothing was found." not in markdown


def test_a_finding_in_a_pair_fails_both() -> None:
    finding = Finding(file="model.safetensors", tensor=None, problem="they are equal", remedy="plan again")
    measurement = make_measurement()
    schemes = [make_scheme(measurement, name, set(range(n))) for name, n in (("a", 1), ("b", 2), ("c", 3))]
    manifests = {scheme.name: make_manifest(scheme) for scheme in schemes}
    pair = PairDifference(first="a", second="b", modules_expected=1, modules_differing=0, findings=(finding,))
    verification = make_verification(manifests).model_copy(update={"pairs": (pair,)})
    report = build_report({}, measurement, schemes, manifests, verification, {}, [])
    assert {scheme.name: scheme.verified for scheme in report.schemes} == {"a": False, "b": False, "c": True}
    assert "- a / b: `model.safetensors`: they are equal; plan again" in render_markdown(report)


def test_missing_steps_say_not_run() -> None:
    report = bare_report()
    markdown = render_markdown(report)
    row = summary_row(markdown, "top25")
    for column in (
        "weight files",
        "held-out KL ± SE, 10⁻³ nats per token",
        "perplexity",
        "top-1 agreement",
        "verified",
    ):
        assert row[column] == "not run", column
    assert "- Held-out evaluation: not run." in markdown
    assert section(markdown, "Held-out evaluation").strip().startswith("not run")
    assert section(markdown, "Verification").strip().startswith("not run")
    assert "Time and memory: not recorded." in markdown
    assert sum("not run" in line for line in terminal(report)) == 3


def test_one_scheme_without_evaluation_says_so() -> None:
    markdown = render_markdown(make_report({"top25": (2.8e-3, 1e-4), "top50": (7e-3, 1e-4)}))
    assert summary_row(markdown, "full")["perplexity"] == "not run"
    assert "| full | not run |" in section(markdown, "Held-out evaluation")


@pytest.mark.parametrize("report", [make_report(), make_report(task=True, broken="full"), bare_report()])
def test_tables_are_well_formed(report: Report) -> None:
    found = tables(render_markdown(report))
    assert len(found) >= 4
    for table in found:
        assert {len(row) for row in table} == {len(table[0])}, table[0]
        assert all(re.fullmatch(r":---|---:", name) for name in table[1])


def test_text_from_records_stays_in_its_cell() -> None:
    measurement = make_measurement()
    asked = {"name": "mine", "include": ["a|b", "*.0.*"], "exclude": ["c"]}
    scheme = make_scheme(measurement, "mine", {0}, asked=asked)
    markdown = render_markdown(build_report({}, measurement, [scheme], {}, None, {}, []))
    assert summary_row(markdown, "mine")["asked"] == "include <code>a&#124;b</code>, `*.0.*`; exclude `c`"


def test_schemes_that_are_not_nested_are_called_so() -> None:
    measurement = make_measurement()
    schemes = [make_scheme(measurement, "a", {1}, nested_in=("b",)), make_scheme(measurement, "b", {0})]
    report = build_report({}, measurement, schemes, {}, None, {}, [])
    assert report.nesting == ()
    assert "Not nested: `a` and `b`" in render_markdown(report)


def test_branches_show_every_inclusion_once() -> None:
    measurement = make_measurement()
    chosen = {"full": set(range(8)), "b": {0, 1, 2}, "c": {0, 1, 3}, "a": {0, 1}}
    schemes = [make_scheme(measurement, name, groups) for name, groups in chosen.items()]
    report = build_report({}, measurement, schemes, {}, None, {}, [])
    assert set(report.nesting) == {("a", "b", "full"), ("a", "c", "full")}


def test_what_was_not_searched_is_listed_by_reason() -> None:
    names = ("visual.0.qkv", "visual.1.qkv")
    untouched = tuple(UntouchedModule(name=n, checkpoint_name=n, reason="vision tower") for n in names)
    measurement = make_measurement(untouched=(*untouched, *make_measurement().untouched))
    text = section(
        render_markdown(build_report({}, measurement, [make_scheme(measurement, "a", {0})], {}, None, {}, [])),
        "What was not searched",
    )
    assert "<summary>2 modules: vision tower</summary>" in text
    assert "<summary>1 module: vocabulary head</summary>" in text
    assert text.count("<details>") == text.count("</details>") == 2
    assert "- `visual.1.qkv`" in text


def test_settings_hardware_and_cost_are_there() -> None:
    markdown = render_markdown(make_report())
    assert "- name: full\n  coverage: 1.0" in section(markdown, "Settings")
    cost = section(markdown, "Where it ran, and what it took")
    assert (
        "measure, evaluate top25, evaluate top50, evaluate full: a processor, 2 cores, 2 threads. torch 2.13.0" in cost
    )
    assert tables(cost)[0][-2:] == [["export full", "1,000.5", "1.0 MiB", "5.0 MiB"], ["total", "1,012.8", "", ""]]


def test_predicted_kl_is_shown_in_the_unit_of_the_measured_one() -> None:
    measurement = make_measurement(score_unit="nats per token", method="kl_div")
    scheme = make_scheme(measurement, "a", {0, 1}, standard_error=1.2e-4)
    markdown = render_markdown(build_report({}, measurement, [scheme], {}, None, {}, []))
    assert summary_row(markdown, "a")["predicted score ± SE, 10⁻³ nats per token"] == "3.00 ± 0.12"
    assert "compare it with the measured one" in markdown


def test_same_records_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_report(make_report(), tmp_path / name)
    for file in ("report.html", "report.md", "report.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]


def test_json_is_a_record_with_numbers(tmp_path: Path) -> None:
    report = make_report()
    write_report(report, tmp_path)
    assert Report.read(tmp_path / "report.json") == report
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["schema_version"] == 2
    scheme = content["schemes"][0]
    assert scheme["results"][0]["value"] == 2.8e-3
    assert scheme["weight_file_bytes"] == 5005
    assert scheme["predicted_standard_error"] == 2e-4


def test_the_page_follows_from_the_json(tmp_path: Path) -> None:
    write_report(make_report(), tmp_path)
    assert render_markdown(Report.read(tmp_path / "report.json")) == (tmp_path / "report.md").read_text()


def test_closing_table_fits_120_columns() -> None:
    lines = terminal(make_report(task=True))
    assert max(len(line) for line in lines) <= 120
    (row,) = (line for line in lines if "top50" in line)
    assert [c.strip() for c in row.split("│")[1:-1]] == [
        "top50", "40.00%", "12.80", "0.0 MiB", "7.10 ± 0.20", "37.68", "97.12%", "94.4% ± 1.0%", "yes",
    ]  # fmt: skip


def test_closing_table_has_task_accuracy_only_where_there_is_one() -> None:
    assert any("task accuracy" in line for line in terminal(make_report(task=True)))
    assert not any("task accuracy" in line for line in terminal(make_report()))


@pytest.mark.parametrize("stale", ["scheme", "manifest", "verification", "evaluation", "groups"])
def test_records_that_do_not_belong_together_are_refused(stale: str) -> None:
    measurement = make_measurement()
    scheme = make_scheme(measurement, "a", {0})
    manifest = make_manifest(scheme)
    verification, evaluation = make_verification({"a": manifest}), make_evaluation(manifest, 1e-3, 1e-4)
    if stale == "scheme":
        measurement = make_measurement(engine="other")
    elif stale == "groups":
        scheme = scheme.model_copy(update={"formats": {"a": "fp8"}})
    elif stale == "manifest":
        manifest = manifest.model_copy(update={"scheme_sha256": "0"})
    elif stale == "verification":
        verification = make_verification({"a": manifest.model_copy(update={"files": ()})})
    else:
        evaluation = evaluation.model_copy(update={"manifest_sha256": "0"})
    with pytest.raises(StaleRecord, match="again"):
        build_report({}, measurement, [scheme], {"a": manifest}, verification, {"a": evaluation}, [])


def test_batch_standard_error() -> None:
    assert batch_standard_error([1.0]) is None
    assert batch_standard_error([2.0, 2.0, 2.0]) == 0
    assert batch_standard_error([0.45, 0.55]) == pytest.approx(0.1)
