"""What the report says about runtimes: who loads what, what isn't run as promised, and where FP8 is slower."""

import pytest

from bitladder.errors import StaleRecord
from bitladder.records import LogProbDifference, ProbedLayer, ProbeFinding, ProbeResult, Throughput
from bitladder.report import build_report, render_markdown
from test_report import make_manifest, make_measurement, make_report, make_scheme, section, tables, terminal

MISSING = ProbeFinding(error_class="missing_tensor", where="k.weight_scale", problem="not there", remedy="export again")
ODD = ProbeFinding(
    error_class="config_mismatch", severity="warning", where="config.json", problem="two producers", remedy="ignore it"
)


def make_probe(manifest, stage="load", formats=("fp8", "fp8", "bf16"), **changes):
    layers = tuple(
        ProbedLayer(
            name=f"l{i}", runtime_name=f"l{i}", promised=promised, format=found, method="M", kernel=None, dtype=None
        )
        for i, (promised, found) in enumerate(zip(("fp8", "fp8", "bf16"), formats, strict=True))
    )
    fields = {
        "checkpoint": manifest.scheme,
        "scheme": manifest.scheme,
        "manifest_sha256": manifest.fingerprint(),
        "runtime": "vllm",
        "version": "0.32.0",
        "stage": stage,
        "reached": stage,
        "device": None if stage == "preflight" else "cpu",
        "layers": layers,
    }
    return ProbeResult(**fields | changes)


def report_with(*probes_of):
    """A report of two schemes with the probes that each function makes of a manifest."""
    measurement = make_measurement()
    schemes = [make_scheme(measurement, "top25", {0, 1}), make_scheme(measurement, "full", set(range(8)))]
    manifests = {scheme.name: make_manifest(scheme) for scheme in schemes}
    probes = [make(manifests[name]) for name, make in probes_of]
    return build_report({}, measurement, schemes, manifests, None, {}, [], probes=probes)


def test_without_probes_the_page_says_that_they_did_not_run():
    report = make_report()
    assert "not run: `bitladder preflight` and `bitladder probe` do it" in section(render_markdown(report), "Runtimes")
    assert not any("loads" in line for line in terminal(report))


def test_every_probe_has_its_row():
    report = report_with(
        ("top25", lambda m: make_probe(m, "preflight", runtime="sglang", version="0.5")),
        ("top25", make_probe),
        ("full", lambda m: make_probe(m, formats=("fp8", "bf16", "bf16"), findings=(MISSING,))),
    )
    rows = tables(section(render_markdown(report), "Runtimes"))[0][2:]
    assert rows == [
        ["top25", "SGLang 0.5", "pre-flight", "–", "ok", "1 BF16, 2 FP8", "3 of 3"],
        ["top25", "vLLM 0.32.0", "loader", "cpu", "ok", "1 BF16, 2 FP8", "3 of 3"],
        ["full", "vLLM 0.32.0", "loader", "cpu", "missing_tensor", "2 BF16, 1 FP8", "2 of 3"],
    ]


def test_a_failure_is_said_at_the_top_and_in_the_closing_table():
    report = report_with(
        ("top25", make_probe),
        ("full", lambda m: make_probe(m, findings=(ODD, MISSING))),
    )
    top = render_markdown(report).split("\n## ")[0]
    assert "- Doesn't run as it says: `full` in vLLM 0.32.0 (loader): missing_tensor, not there." in top
    assert "`top25` in vLLM" not in top
    listed = section(render_markdown(report), "Runtimes")
    assert "warning, config_mismatch: `config.json`: two producers; ignore it" in listed
    assert "error, missing_tensor: `k.weight_scale`: not there; export again" in listed
    lines = terminal(report)
    assert any("top25" in line and "yes" in line for line in lines)
    assert any("full" in line and "vLLM: missing_tensor" in line for line in lines)


def test_a_probe_says_more_than_the_rules_do():
    report = report_with(
        ("top25", lambda m: make_probe(m, "preflight", version="rules of 0.30")),
        ("top25", lambda m: make_probe(m, findings=(MISSING,))),
        ("full", lambda m: make_probe(m, "preflight", version="rules of 0.30", findings=(MISSING,))),
        ("full", make_probe),
    )
    top = render_markdown(report).split("\n## ")[0]
    assert "`top25` in vLLM 0.32.0 (loader)" in top
    assert "`full` in vLLM" not in top


def test_rules_alone_are_called_so():
    report = report_with(("top25", lambda m: make_probe(m, "preflight")), ("full", make_probe))
    lines = terminal(report)
    assert any("top25" in line and "by rules" in line for line in lines)
    assert any("full" in line and "by rules" not in line and "yes" in line for line in lines)


def test_slower_than_the_original_is_said_plainly():
    speeds = (
        Throughput(phase="prefill", requests=64, tokens_per_second=106_800.0, source_tokens_per_second=85_500.0),
        Throughput(phase="decode", requests=64, tokens_per_second=1400.0, source_tokens_per_second=2200.0),
    )
    report = report_with(("full", lambda m: make_probe(m, "generate", throughput=speeds)))
    markdown = render_markdown(report)
    assert "Slower than the original: `full` in vLLM 0.32.0 at decode, 0.64× its tokens per second." in markdown
    assert "at prefill" not in markdown.split("\n## ")[0]
    rows = tables(section(markdown, "Runtimes"))[1][2:]
    assert [row[2:] for row in rows] == [
        ["prefill", "64", "106,800", "85,500", "1.25×"],
        ["decode", "64", "1,400", "2,200", "0.64× (slower)"],
    ]


def test_served_log_probabilities_stand_beside_the_originals():
    difference = LogProbDifference(
        split="captions", tokens=900, mean_abs_difference=0.0123, tolerance=0.05, source_mean_abs_difference=0.0111
    )
    report = report_with(("full", lambda m: make_probe(m, "generate", log_probs=(difference,))))
    rows = tables(section(render_markdown(report), "Runtimes"))[1][2:]
    assert rows == [["full", "vLLM 0.32.0", "captions", "900", "0.0123", "0.0111", "0.0500"]]


def test_a_probe_of_another_checkpoint_is_refused():
    with pytest.raises(StaleRecord, match="another checkpoint full .* was probed; probe again"):
        report_with(("full", lambda m: make_probe(m, manifest_sha256="0" * 64)))
