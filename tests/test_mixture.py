"""Calibration on several sets at once, from the recipe to the report: pairs, text, and rows that the model writes."""

import copy

import pytest

from bitladder import report
from bitladder.data.batches import interleaved
from bitladder.errors import MeasurementError
from bitladder.measuring.job import score_batch_count
from bitladder.measuring.measure import settings_sha256
from bitladder.recipe import MeasureSpec, parse_recipe
from bitladder.records import Evaluation, KlPoints, Measurement, Refinements, digest_of
from bitladder.report.numbers import data_names
from bitladder.steps.data import calibration_data
from bitladder.steps.measure import measure
from bitladder.steps.run import run
from bitladder.steps.workspace import Workspace
from conftest import source_of
from test_calibration import DEMO, rows_of

SETS = [
    {
        "data": {"kind": "image_text", "path": str(DEMO / "data" / "calibration.jsonl")},
        "samples": 12,
        "sequence_length": 64,
        "batch_size": 4,
    },
    {
        "data": {"kind": "text", "path": str(DEMO / "data" / "captions.txt")},
        "samples": 6,
        "sequence_length": 32,
        "batch_size": 2,
    },
    {"data": {"kind": "generated"}, "samples": 8, "sequence_length": 24, "batch_size": 4},
]
CONTENT = {
    "model": {"path": str(DEMO / "qwen2_5_vl_digits")},
    "calibration": SETS,
    "held_out": {
        "data": {"kind": "text", "path": str(DEMO / "data" / "captions.txt")},
        "samples": 6,
        "sequence_length": 32,
        "batch_size": 6,
    },
    "measurement": {"rounding": "compensated", "score_samples": 10},
    "schemes": [{"name": "half", "max_kl": 3.0e-5}, {"name": "full", "coverage": 1.0}],
    "refine": {"evaluations": 4, "marginal": 1},
    "controls": {"kinds": []},
}


def work_of(output, **changes):
    return Workspace(parse_recipe({**copy.deepcopy(CONTENT), "output": str(output), **changes}, "recipe"), output)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("mixture") / "out"
    work = work_of(output)
    result = run(work)
    assert work.done[:4] == ["generate", "measure", "measure KL of a few schemes", "refine schemes"]
    return output, result


def test_all_sets_are_measured_on(finished):
    output, _ = finished
    measurement = Measurement.read(output / "measurement.json")
    summary = measurement.calibration
    assert (summary.kind, summary.samples, len(summary.sample_ids)) == ("mixed", 26, 26)
    assert [(part.kind, part.samples) for part in summary.parts] == [
        ("image_text", 12),
        ("text", 6),
        ("generated", 8),
    ]
    assert summary.tokens == sum(part.tokens for part in summary.parts)
    assert len(measurement.score_weights) == 3  # batches of 4, 2 and 4 samples: as many as hold 10
    assert any(any(candidate.image_scores) for candidate in measurement.candidates)
    assert any(candidate.image_scores.count(0.0) == 2 for candidate in measurement.candidates)  # two batches of text
    assert measurement.rounding.samples == 26


def test_records_that_name_the_samples(finished):
    output, _ = finished
    summary = Measurement.read(output / "measurement.json").calibration
    points, refinements = KlPoints.read(output / "kl_points.json"), Refinements.read(output / "refinements.json")
    assert points.data == refinements.data == summary
    assert points.samples == refinements.samples == 10


def test_held_out_rows_are_none_of_the_set_s_they_share_a_file_with(finished):
    output, result = finished
    summary = Measurement.read(output / "measurement.json").calibration
    held_out = Evaluation.read(output / "evaluations" / "full.json").data["held_out"]
    captions = work_of(output).recipe.calibration[1]
    assert held_out.source == captions.data.path
    assert not set(held_out.sample_ids) & set(summary.sample_ids)
    assert {found.samples_seen_in_calibration for found in result.evaluations} == {0}


def test_the_report_lists_every_set(finished):
    output, result = finished
    assert result.calibration.parts == Measurement.read(output / "measurement.json").calibration.parts
    assert result.calibration.sample_ids == ()
    captions = DEMO / "data" / "captions.txt"
    markdown, page = (output / "report.md").read_text(), (output / "report.html").read_text()
    lines = markdown.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("- Calibration: 3 sets, batches in turn, 26 sam"))
    assert [line.split("`")[1] for line in lines[start + 1 : start + 4]] == [
        str(DEMO / "data" / "calibration.jsonl"),
        str(captions),
        "the model itself",
    ]
    assert "(generated), 8 samples, 184 tokens that count for the loss, sequence length 24" in lines[start + 3]
    assert page.count("<li>Calibration: ") == 4
    card = (output / "checkpoints" / "full" / "README.md").read_text()
    names = "`calibration.jsonl` (image_text) + `captions.txt` (text) + `the model itself` (generated)"
    assert f"- Calibration: {names}, 26 samples, " in card
    assert data_names(result.calibration) in report.compare_runs(result, result, ("a", "b"))


def test_a_second_run_does_nothing_and_another_order_measures_again(finished, tmp_path):
    output, _ = finished
    work = work_of(output)
    run(work)
    assert work.done == []
    here = calibration_data(work).summary
    other = calibration_data(work_of(tmp_path / "out", calibration=SETS[::-1])).summary
    assert other.sha256 != here.sha256
    assert sorted(other.sample_ids) == sorted(here.sample_ids)


def test_two_sets_of_one_file_share_no_sample(tmp_path):
    captions = SETS[1]
    data = calibration_data(work_of(tmp_path / "out", calibration=[captions, captions]))
    assert len(set(data.summary.sample_ids)) == data.summary.samples == 12


def test_engines_agree_on_a_mixture(tmp_path):
    found = {}
    for engine in ("native", "modelopt"):
        work = work_of(tmp_path / engine, measurement={"engine": engine, "method": "gradient", "score_samples": 10})
        found[engine] = measure(work)
    ours, theirs = found["native"], found["modelopt"]
    assert ours.calibration == theirs.calibration
    assert len(ours.score_weights) == len(theirs.score_weights) == 3
    for one, other in zip(ours.candidates, theirs.candidates, strict=True):
        assert ours.sensitivity(one) == pytest.approx(theirs.sensitivity(other), rel=0.05)


def test_how_many_batches_hold_the_samples_to_be_scored():
    data = interleaved([rows_of("a", [3, 3, 1]), rows_of("b", [2, 2], first=100)])
    sizes = [len(batch.labels) for batch in data.batches]
    for samples in range(1, 12):
        count = score_batch_count(data, MeasureSpec(score_samples=samples))
        assert sum(sizes[: count - 1]) < samples <= sum(sizes[:count])
    assert score_batch_count(data, MeasureSpec()) == 5
    with pytest.raises(MeasurementError, match=r"score_samples is 12, calibration\.samples is 11"):
        score_batch_count(data, MeasureSpec(score_samples=12))
    single = rows_of("a", [4, 4, 2])
    counts = [score_batch_count(single, MeasureSpec(score_samples=n)) for n in range(1, 11)]
    assert counts == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]


def test_a_single_set_keeps_its_measurement_s_key(processor_data):
    source, data = processor_data
    assert source.sha256 == "c8059515804b9efc98d3c2c0b67a336838fca6d91d36485ca8a17931e312cd52"
    sha256 = "a0ed20dfd2f8c7a49fc62c05b55e1cd61e386486459123684b8a47e9b09c33b7"
    settings = (
        '"formats":["fp8"],"share_fused_scales":true,"rounding":"nearest","damping":0.1,"score_samples":null,'
        '"dtype":"auto","device":"auto"}'
    )
    for spec, written in (
        (MeasureSpec(engine="modelopt", method="gradient"), '{"engine":"modelopt","method":"gradient",'),
        (MeasureSpec(engine="modelopt"), '{"engine":"modelopt","method":"gradient",'),
        (MeasureSpec(), '{"engine":"native","method":"fisher",'),
    ):
        key = settings_sha256(source, data, spec)
        assert key == digest_of([source.sha256, sha256, written + settings])


@pytest.fixture
def processor_data(tmp_path):
    """The embedded model, and the pairs of a recipe with one set."""
    pairs = {**SETS[0], "samples": 5, "batch_size": 2, "seed": 3}
    return source_of(DEMO / "qwen2_5_vl_digits"), calibration_data(work_of(tmp_path, calibration=pairs, measurement={}))
